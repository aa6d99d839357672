"""A training step of image tokenizers: what LPIPS and an adversary add, and LlamaGen's own code beside ours.

    git clone https://github.com/FoundationVision/LlamaGen
    python benchmarks/image_tokenizer.py --peer LlamaGen

Parts: ``losses`` steps of 16 images of 64 pixels, with the pixels' error alone, with LPIPS (VGG-16), and with an
adversary too; ``peer`` the network of LlamaGen's VQ-16 with all losses at 256 pixels, one image. Weights are random.
Every case is a process of its own, since the most that it held is asked for; the best of a few steps counts.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from training import reset_peak, status, subprocess_case

from dalle_pytorch.models.conv_tokenizer import ConvConfig
from dalle_pytorch.models.discrete_vae import DiscreteVAEConfig
from dalle_pytorch.models.discriminator import DiscriminatorConfig
from dalle_pytorch.models.image_tokenizer import Relaxation
from dalle_pytorch.models.lpips import LPIPS
from dalle_pytorch.models.vq_vae import FSQConfig
from dalle_pytorch.models.vqgan import VQGANConfig
from dalle_pytorch.training.image_losses import AdversaryConfig, ImageLosses, PerceptualConfig
from dalle_pytorch.training.optim import OptimConfig, make_optimizer
from dalle_pytorch.training.vae import make_vae

MODELS: dict[str, ConvConfig | VQGANConfig] = {
    "`model=base`": DiscreteVAEConfig(),
    "FSQ, 16 x 16 tokens": FSQConfig(
        num_layers=2, hidden_dim=192, num_resnet_blocks=2, fine_blocks=2, taper=True, levels=[8, 5, 5, 5]
    ),
    "`model=vqgan`, narrow": VQGANConfig(
        image_size=64, ch=32, ch_mult=[1, 2, 4], num_res_blocks=1, attention_levels=[], z_channels=128, embed_dim=16,
        norm_groups=8, codebook_size=1024,
    ),
    "VQ-16": VQGANConfig(embed_dim=8, normalize_codes=True, likelihood="mse"),
}  # fmt: skip
SMALL = list(MODELS)[:3]
LOSSES = ("pixels", "LPIPS", "LPIPS and adversary")
DISCRIMINATORS = {64: DiscriminatorConfig(width=32, num_layers=2), 256: DiscriminatorConfig()}
PARTS = ("losses", "peer")


def run_case(case: dict[str, Any]) -> dict[str, float]:
    """Seconds of the fastest step, and megabytes that the networks and their steps took."""
    torch.manual_seed(0)
    torch.set_num_threads(case["threads"])
    torch.conv2d(torch.rand(1, 3, 8, 8), torch.rand(3, 3, 3, 3))  # code that is loaded on its first use
    before = reset_peak()
    net = make_vae(MODELS[case["model"]]).train()
    size = net.image_size
    perceptual = PerceptualConfig(weight=float("LPIPS" in case["losses"]), network="random")
    adversary = AdversaryConfig(weight=0.5 * ("adversary" in case["losses"]), discriminator=DISCRIMINATORS[size])
    lpips = LPIPS().eval() if perceptual.weight else None
    losses = ImageLosses(perceptual, adversary, lpips=lpips)
    optimizer = make_optimizer(net, OptimConfig())
    for group in losses.groups():
        optimizer.add_param_group(group)
    if case["compile"]:
        for part in (net.encoder, net.decoder, *losses.compilable):
            part.compile()
    images, times = torch.rand(case["batch"], 3, size, size), []
    for step in range(case["steps"]):
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=case["precision"] == "bf16"):
            found = net.reconstruct(images, Relaxation(1.0, 0.0, 0.02))
            loss = losses(net, found.output, images, step).loss + found.codes_loss
        optimizer.zero_grad()
        loss.backward()
        losses.end_step(step, None)
        for group in optimizer.param_groups:
            nn.utils.clip_grad_norm_(group["params"], 1.0)
        optimizer.step()
        times.append(time.perf_counter() - start)
    return {"seconds": min(times[1:]), "megabytes": status("VmHWM") - before}


def part_losses(threads: int) -> None:
    """The table of what losses add."""
    print("\n| network | precision | " + " | ".join(f"{losses}, s | MB" for losses in LOSSES) + " | ratio |")
    print("|---|---|" + "---|" * (2 * len(LOSSES) + 1))
    for model in SMALL:
        for precision, compiled in (("fp32", False), ("bf16", False), ("bf16", True)):
            case = {"model": model, "precision": precision, "compile": compiled, "batch": 16, "threads": threads}
            found = [
                subprocess_case(sys.executable, "image_tokenizer.py", {**case, "losses": losses, "steps": 6})
                for losses in LOSSES
            ]
            cells = [f"{each['seconds']:.2f} | {each['megabytes']:,.0f}" for each in found]
            ratio = found[-1]["seconds"] / found[0]["seconds"]
            how = precision + (", compiled" if compiled else "")
            print(f"| {model} | {how} | {' | '.join(cells)} | {ratio:.1f} x |", flush=True)


def part_peer(peer: Path, threads: int) -> None:
    """The table of LlamaGen's step and ours."""
    print("\n| | precision | s a step | MB | ratio |\n|---|---|---|---|---|")
    for precision in ("fp32", "bf16"):
        case = {"precision": precision, "batch": 1, "threads": threads, "steps": 4}
        theirs = subprocess_case(sys.executable, "peer_image_tokenizer.py", {**case, "peer": str(peer.absolute())})
        print(f"| LlamaGen | {precision} | {theirs['seconds']:.2f} | {theirs['megabytes']:,.0f} | |", flush=True)
        for compiled in (False, True) if precision == "bf16" else (False,):
            more = {"model": "VQ-16", "losses": LOSSES[-1], "compile": compiled}
            ours = subprocess_case(sys.executable, "image_tokenizer.py", {**case, **more})
            ratio, how = theirs["seconds"] / ours["seconds"], precision + (", compiled" if compiled else "")
            print(f"| ours | {how} | {ours['seconds']:.2f} | {ours['megabytes']:,.0f} | {ratio:.2f} x |", flush=True)


def main() -> None:
    """Print the tables of the parts asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--peer", type=Path, help="a checkout of LlamaGen")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--case", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        print(json.dumps(run_case(json.loads(arguments.case))))
        return
    if "losses" in arguments.parts:
        part_losses(arguments.threads)
    if "peer" in arguments.parts and arguments.peer:
        part_peer(arguments.peer, arguments.threads)


if __name__ == "__main__":
    main()
