"""Sampling speed of DALLE-pytorch 1.6.6, run by ``sampling.py`` with an interpreter that has it; prints one JSON line.

``peer_stubs.py`` says how to make such an interpreter.
"""

import json
import sys
import time

import peer_stubs  # noqa: F401
import torch

from dalle_pytorch import DALLE, DiscreteVAE

sizes = json.loads(sys.argv[1])
torch.manual_seed(0)
torch.set_num_threads(sizes["threads"])
vae = DiscreteVAE(
    image_size=8 * sizes["grid"], num_layers=3, num_tokens=sizes["codebook"], codebook_dim=64, hidden_dim=16
)
dalle = DALLE(
    dim=sizes["dim"],
    vae=vae,
    num_text_tokens=sizes["vocabulary"],
    text_seq_len=sizes["text"],
    depth=sizes["depth"],
    heads=sizes["heads"],
    dim_head=sizes["head_dim"],
).eval()
speeds = {}
for batch in (1, 8):
    for cache in (False, True):  # it has a cache that it then drops, and a user would ask for it
        text = torch.randint(1, sizes["vocabulary"], (batch, sizes["text"]))
        start = time.perf_counter()
        dalle.generate_images(text, filter_thres=0.9, use_cache=cache)
        speed = batch * sizes["grid"] ** 2 / (time.perf_counter() - start)
        speeds[str(batch)] = max(speed, speeds.get(str(batch), 0))
print(json.dumps(speeds))
