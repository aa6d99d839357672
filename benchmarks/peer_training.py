"""Training speed of DALLE-pytorch 1.6.6, run by ``training.py`` with an interpreter that has it; prints one JSON line.

``peer.py`` says how to make such an interpreter.
"""

import json
import sys
import time
from pathlib import Path

import torch
from peer import build


def status(name):
    """Megabytes, from the kernel's account of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) / 1024


case = json.loads(sys.argv[1])
torch.manual_seed(0)
ones = torch.ones(1, case["text"], dtype=torch.long), torch.ones(1, case["grid"] ** 2, dtype=torch.long)
warm = {**case, "dim": 64, "depth": 1, "head_dim": 32}  # code that is loaded on its first use is not the model's
build(warm)(*ones, return_loss=True).backward()
Path("/proc/self/clear_refs").write_text("5")  # forgets the most that was held
before = status("VmRSS")
torch.set_num_threads(case["threads"])
dalle = build(case, attn_types=tuple(case["patterns"]))
optimizer = torch.optim.Adam([p for p in dalle.parameters() if p.requires_grad], lr=3e-4)  # as its train_dalle.py
text = torch.randint(1, case["vocabulary"], (case["batch"], case["text"]))
image_tokens = torch.randint(0, case["codebook"], (case["batch"], case["grid"] ** 2))
times = []
for _ in range(case["steps"]):
    start = time.perf_counter()
    with torch.autocast("cpu", torch.bfloat16, enabled=case["precision"] == "bf16"):
        loss = dalle(text, image_tokens, return_loss=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(dalle.parameters(), 0.5)  # likewise
    optimizer.step()
    optimizer.zero_grad()
    times.append(time.perf_counter() - start)
print(json.dumps({"seconds": min(times), "megabytes": status("VmHWM") - before}))
