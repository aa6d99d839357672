"""Sampling speed of DALLE-pytorch 1.6.6, run by ``sampling.py`` with an interpreter that has it; prints one JSON line.

``peer.py`` says how to make such an interpreter.
"""

import json
import sys
import time

import torch
from peer import build

sizes = json.loads(sys.argv[1])
torch.manual_seed(0)
torch.set_num_threads(sizes["threads"])
dalle = build(sizes).eval()
speeds = {}
for batch in (1, 8):
    for cache in (False, True):  # it has a cache that it then drops, and a user would ask for it
        text = torch.randint(1, sizes["vocabulary"], (batch, sizes["text"]))
        start = time.perf_counter()
        dalle.generate_images(text, filter_thres=0.9, use_cache=cache)
        speed = batch * sizes["grid"] ** 2 / (time.perf_counter() - start)
        speeds[str(batch)] = max(speed, speeds.get(str(batch), 0))
print(json.dumps(speeds))
