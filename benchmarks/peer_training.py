"""Training speed of DALLE-pytorch 1.6.6, run by ``training.py`` with an interpreter that has it; prints one JSON line.

``peer_stubs.py`` says how to make such an interpreter.
"""

import json
import sys
import time
from pathlib import Path

import peer_stubs  # noqa: F401  (puts empty modules in place of the requirements that cannot be installed)
import torch

from dalle_pytorch import DALLE, DiscreteVAE


def status(name):
    """Megabytes, from the kernel's account of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) / 1024


case = json.loads(sys.argv[1])
torch.manual_seed(0)
small = {
    "dim": 64,
    "depth": 1,
    "heads": case["heads"],
    "dim_head": 32,
    "num_text_tokens": 10,
    "text_seq_len": case["text"],
}
tiny = DiscreteVAE(image_size=8 * case["grid"], num_layers=3, num_tokens=16, codebook_dim=8, hidden_dim=8)
ones = torch.ones(1, case["text"], dtype=torch.long), torch.ones(1, case["grid"] ** 2, dtype=torch.long)
DALLE(vae=tiny, **small)(*ones, return_loss=True).backward()  # code that is loaded on its first use is not the model's
Path("/proc/self/clear_refs").write_text("5")  # forgets the most that was held
before = status("VmRSS")
torch.set_num_threads(case["threads"])
vae = DiscreteVAE(
    image_size=8 * case["grid"], num_layers=3, num_tokens=case["codebook"], codebook_dim=64, hidden_dim=16
)
dalle = DALLE(
    dim=case["dim"],
    vae=vae,
    num_text_tokens=case["vocabulary"],
    text_seq_len=case["text"],
    depth=case["depth"],
    heads=case["heads"],
    dim_head=case["head_dim"],
    attn_types=tuple(case["patterns"]),
)
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
