"""A training step of LlamaGen's VQ-16, by its own code; ``image_tokenizer.py`` runs it.

Its LPIPS asks torchvision for a VGG-16 and downloads the heads: here both have random weights. Its two steps, of the
tokenizer and of the discriminator, are those of tokenizer/tokenizer_image/vq_train.py.
"""

import json
import sys
import time
import types

import torch
from torch import nn
from training import reset_peak, status

case = json.loads(sys.argv[1])
sys.path.insert(0, case["peer"])
WIDTHS = (64, 64, "pool", 128, 128, "pool", 256, 256, 256, "pool", 512, 512, 512, "pool", 512, 512, 512, "pool")


def vgg16(**_: object) -> types.SimpleNamespace:
    """torchvision's network, with random weights."""
    layers, source = [], 3
    for width in WIDTHS:
        if isinstance(width, str):
            layers.append(nn.MaxPool2d(2))
        else:
            layers += [nn.Conv2d(source, width, 3, padding=1), nn.ReLU(inplace=True)]
            source = width
    return types.SimpleNamespace(features=nn.Sequential(*layers))


for name in ("torchvision", "torchvision.models"):
    sys.modules[name] = types.ModuleType(name)
sys.modules["torchvision"].models = sys.modules["torchvision.models"]
sys.modules["torchvision.models"].vgg16 = vgg16

from tokenizer.tokenizer_image import lpips  # noqa: E402  (after what it would import is there)

lpips.LPIPS.load_from_pretrained = lambda self, name="vgg_lpips": None

from tokenizer.tokenizer_image.vq_loss import VQLoss  # noqa: E402
from tokenizer.tokenizer_image.vq_model import VQ_models  # noqa: E402

torch.manual_seed(0)
torch.set_num_threads(case["threads"])
torch.conv2d(torch.rand(1, 3, 8, 8), torch.rand(3, 3, 3, 3))
before = reset_peak()
# counting codes in use changes a parameter in place, which torch refuses by now
net = VQ_models["VQ-16"](codebook_size=16384, codebook_embed_dim=8, codebook_show_usage=False).train()
losses = VQLoss(disc_start=0, disc_weight=0.5, disc_adaptive_weight=True).train()
optimizer = torch.optim.Adam(net.parameters(), lr=1e-4, betas=(0.9, 0.95))
other = torch.optim.Adam(losses.discriminator.parameters(), lr=1e-4, betas=(0.9, 0.95))
images, times = 2 * torch.rand(case["batch"], 3, 256, 256) - 1, []
autocast = torch.autocast("cpu", torch.bfloat16, enabled=case["precision"] == "bf16")
for step in range(1, case["steps"] + 1):
    start = time.perf_counter()
    optimizer.zero_grad()
    with autocast:
        copies, codebook = net(images)
        last = net.decoder.last_layer
        loss = losses(codebook, images, copies, optimizer_idx=0, global_step=step, last_layer=last, log_every=10**9)
    loss.backward()
    nn.utils.clip_grad_norm_(net.parameters(), 1.0)
    optimizer.step()
    other.zero_grad()
    with autocast:
        loss = losses(codebook, images, copies, optimizer_idx=1, global_step=step, log_every=10**9)
    loss.backward()
    nn.utils.clip_grad_norm_(losses.discriminator.parameters(), 1.0)
    other.step()
    times.append(time.perf_counter() - start)
print(json.dumps({"seconds": min(times[1:]), "megabytes": status("VmHWM") - before}))
