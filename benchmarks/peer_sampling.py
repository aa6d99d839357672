"""Sampling speed of DALLE-pytorch 1.6.6, run by ``sampling.py`` with an interpreter that has it; prints one JSON line.

    python -m venv peer
    peer/bin/pip install "torch>=2.11,<2.14" einops ftfy regex tokenizers transformers webdataset pillow requests
    peer/bin/pip install --no-deps dalle-pytorch==1.6.6 axial-positional-embedding rotary-embedding-torch DALL-E

Its other requirements cannot be installed beside a current torch (youtokentome, taming-transformers, pkg_resources) or
are not needed here (torchvision, omegaconf), so empty modules stand in for them.
"""

import json
import sys
import time
import types

STUBS = (
    "omegaconf taming taming.models taming.models.vqgan youtokentome pkg_resources torchvision torchvision.transforms "
    "torchvision.transforms.functional"
)
for name in STUBS.split():
    sys.modules[name] = types.ModuleType(name)
sys.modules["omegaconf"].OmegaConf = object
sys.modules["taming.models.vqgan"].VQModel = sys.modules["taming.models.vqgan"].GumbelVQ = object
sys.modules["pkg_resources"].get_distribution = lambda name: types.SimpleNamespace(version="1.6.6")
sys.modules["torchvision"].transforms = sys.modules["torchvision.transforms"]
sys.modules["torchvision.transforms"].functional = sys.modules["torchvision.transforms.functional"]

import torch  # noqa: E402, I001
from dalle_pytorch import DALLE, DiscreteVAE  # noqa: E402

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
