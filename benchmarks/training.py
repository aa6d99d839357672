"""Training speed and memory, against DALLE-pytorch 1.6.6 and the machine's own limits.

    python benchmarks/training.py --peer peer/bin/python      # peer.py says how to make such an interpreter

Parts: ``step`` a bare optimisation step of two sizes, full and axial attention; ``layer`` attention alone, at two
grids; ``process`` the whole train_dalle.py from token shards against the bare step; ``memory`` what plan=true foretells
against what a step takes. Every case is a process of its own, since the most that it held is asked for.
"""

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from timing import best
from torch import nn

import dalle_pytorch
from dalle_pytorch.models.block_sparse import block_attention, layout
from dalle_pytorch.models.dalle import DALLE, DALLEConfig
from dalle_pytorch.training.optim import OptimConfig, make_optimizer
from dalle_pytorch.training.plan import Sizes, flops, memory

SMALL = {"dim": 256, "depth": 8, "heads": 8, "head_dim": 32, "text": 64, "grid": 16, "vocabulary": 8192,
         "codebook": 1024, "batch": 8}  # fmt: skip
LARGE = {"dim": 512, "depth": 6, "heads": 8, "head_dim": 64, "text": 256, "grid": 32, "vocabulary": 10_000,
         "codebook": 8192, "batch": 2}  # fmt: skip
PATTERNS = {"full": ["full"], "axial": ["axial_row", "axial_col"]}
FREED = {"MALLOC_MMAP_THRESHOLD_": "65536"}  # freed memory goes back at once: holes between blocks are not counted
PARTS = ("step", "layer", "process", "memory")


def ceiling(dtype: torch.dtype) -> float:
    """GFLOP/s of a large product in oneDNN; in fp32 as a convolution, which is how to get oneDNN."""
    x, weight = torch.randn(1, 4096, 2048, dtype=dtype), torch.randn(2048, 2048, dtype=dtype)
    if dtype == torch.float32:
        seconds = best(lambda: nn.functional.conv2d(x.transpose(1, 2).unsqueeze(2), weight[:, :, None, None]), 10)
    else:
        seconds = best(lambda: nn.functional.linear(x, weight), 10)
    return 2 * 4096 * 2048 * 2048 / seconds / 1e9


def reset_peak() -> float:
    """Megabytes held now; forgets the most that was held (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")
    return status("VmRSS")


def status(name: str) -> float:
    """Megabytes, from the kernel's account of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) / 1024


def make(case: dict[str, Any]) -> DALLE:
    """A model of a case's sizes."""
    config = DALLEConfig(
        dim=case["dim"], depth=case["depth"], heads=case["heads"], head_dim=case["head_dim"], text_len=case["text"],
        text_vocab_size=case["vocabulary"], attn_types=case["patterns"],
        checkpoint_activations=case.get("checkpointing", False),
    )  # fmt: skip
    return DALLE(config, Sizes(8 * case["grid"], case["grid"], case["codebook"]))


def run_case(case: dict[str, Any]) -> dict[str, float]:
    """Seconds of the fastest step, and megabytes that the model and its steps took."""
    torch.manual_seed(0)
    torch.set_num_threads(case["threads"])
    warm = make({**case, "dim": 64, "depth": 1})  # code that is loaded on its first use is not the model's
    warm.loss(torch.ones(1, case["text"], dtype=torch.long), torch.zeros(1, case["grid"] ** 2, dtype=torch.long))[
        0
    ].backward()
    before = reset_peak()
    dalle = make(case)
    optimizer = make_optimizer(dalle, OptimConfig())
    text = torch.randint(1, case["vocabulary"], (case["batch"], case["text"]))
    image_tokens = torch.randint(0, case["codebook"], (case["batch"], case["grid"] ** 2))
    half, times = case["precision"] == "bf16", []
    for _ in range(case["steps"]):
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            loss = dalle.loss(text, image_tokens).loss
        optimizer.zero_grad()  # where Lightning has it: the last gradients live through the forward pass
        loss.backward()
        nn.utils.clip_grad_norm_(dalle.parameters(), 1.0)
        optimizer.step()
        times.append(time.perf_counter() - start)
    took = status("VmHWM") - before
    need = memory(
        dalle, case["batch"], gpus=1, sharded=False, half=half, averaged=False,
        checkpointing=case.get("checkpointing", False),
    )  # fmt: skip
    return {"seconds": min(times), "megabytes": took, "plan": need.total / 2**20, "flops": sum(flops(dalle))}


def subprocess_case(interpreter: str, script: str, case: dict[str, Any], **more: str) -> dict[str, float]:
    """A case in a process of its own, with more environment variables."""
    path = str(Path(__file__).with_name(script))
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH" or interpreter == sys.executable}
    arguments = [interpreter, path, *([] if script.startswith("peer_") else ["--case"]), json.dumps(case)]
    done = subprocess.run(arguments, check=True, stdout=subprocess.PIPE, text=True, env={**clean, **more})
    return json.loads(done.stdout.splitlines()[-1])


def step(peer: str | None, threads: int) -> None:
    """The table of bare steps."""
    limits = {"fp32": ceiling(torch.float32), "bf16": ceiling(torch.bfloat16)}
    print(f"ceilings: {limits['fp32']:.0f} GFLOP/s in fp32, {limits['bf16']:.0f} in bf16")
    print("\n| size | attention | | samples/s | of the peer in fp32 | in its own bf16 | of the ceiling | MB |")
    print("|---|---|---|---|---|---|---|---|")
    for name, size in (("dim 256, 320 tokens, batch 8", SMALL), ("dim 512, 1,280 tokens, batch 2", LARGE)):
        for pattern, patterns in PATTERNS.items():
            case = {**size, "patterns": patterns, "threads": threads, "steps": 5}
            theirs: dict[str, dict[str, float]] = {}
            for precision in ("fp32", "bf16") if peer else ():
                got = subprocess_case(str(peer), "peer_training.py", {**case, "precision": precision})
                theirs[precision] = got
                speed, taken = case["batch"] / got["seconds"], got["megabytes"]
                print(f"| {name} | {pattern} | peer, {precision} | {speed:.2f} | | | | {taken:.0f} |", flush=True)
            for precision, limit in limits.items():
                ours = subprocess_case(sys.executable, "training.py", {**case, "precision": precision})
                times = [f"{theirs[p]['seconds'] / ours['seconds']:.1f} x" if p in theirs else "" for p in limits]
                share = ours["flops"] * case["batch"] / ours["seconds"] / 1e9 / limit
                print(
                    f"| {name} | {pattern} | ours, {precision} | {case['batch'] / ours['seconds']:.2f} | "
                    f"{times[0]} | {times[1]} | {share:.0%} | {ours['megabytes']:.0f} |",
                    flush=True,
                )


def layer(threads: int) -> None:
    """Attention alone, forward and backward: milliseconds, and megabytes besides inputs and results."""
    print("\n| pattern | image tokens | | ms | MB | dense mask: ms | MB |\n|---|---|---|---|---|---|---|")
    for grid in (32, 64):
        for pattern in ("full", "axial_row", "axial_col", "conv_like"):
            for precision in ("fp32", "bf16"):
                case = {"layer": pattern, "grid": grid, "precision": precision, "threads": threads}
                values = []
                for dense in (0, 1):
                    timed = subprocess_case(sys.executable, "training.py", {**case, "dense": dense})
                    held = subprocess_case(sys.executable, "training.py", {**case, "dense": dense}, **FREED)
                    values.append(f"{timed['seconds'] * 1e3:.0f} | {held['megabytes']:.0f}")
                values = " | ".join(values)
                print(f"| {pattern} | {grid * grid} | {precision} | {values} |", flush=True)


def layer_case(case: dict[str, Any]) -> dict[str, float]:
    """One attention of 8 heads of 64 over 256 text tokens and a grid, batch 1."""
    torch.set_num_threads(case["threads"])
    dtype = torch.bfloat16 if case["precision"] == "bf16" else torch.float32
    plan = layout(case["layer"], 257, case["grid"], 256 + case["grid"] ** 2)
    q, k, v = (torch.randn(1, 8, plan.length, 64, dtype=dtype).requires_grad_() for _ in range(3))
    upper = torch.randn_like(q)
    mask = None
    if case["dense"] and case["layer"] != "full":
        mask = plan.mask if plan.inverse is None else plan.mask[plan.inverse][:, plan.inverse]
    fused = case["layer"] == "full" and case["precision"] == "fp32"  # what a model calls

    def run() -> None:
        if case["dense"] or fused:
            out = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        else:
            out = block_attention(q, k, v, plan)
        torch.autograd.grad(out, (q, k, v), upper)

    run()
    before = reset_peak()
    seconds = best(run, 5)
    return {"seconds": seconds, "megabytes": max(0.0, status("VmHWM") - before)}


def process(threads: int) -> None:
    """The whole program against the bare step, both of the small size in bf16, from token shards of random pictures."""
    from dalle_pytorch.data.encode import EncodeConfig, encode_folder

    print("\n| train_dalle.py | samples/s | of the bare step |\n|---|---|---|")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_pictures(folder / "pictures", 8 * SMALL["grid"])
        sizes = {"image_size": 8 * SMALL["grid"], "num_layers": 3, "codebook_size": SMALL["codebook"]}
        vae = dalle_pytorch.DiscreteVAE(dalle_pytorch.DiscreteVAEConfig(**sizes, codebook_dim=32, hidden_dim=16))
        dalle_pytorch.save(vae, folder / "vae.safetensors")
        encode = EncodeConfig(vae=str(folder / "vae.safetensors"), path=str(folder / "pictures"))
        encode_folder(encode, folder / "tokens")
        command = [
            sys.executable, "-m", "dalle_pytorch.commands.train_dalle", f"vae={folder}/vae.safetensors",
            f"data.path={folder}/tokens", "data.batch_size=8", f"out={folder}/run", "trainer=cpu",
            "trainer.precision=bf16-mixed", "trainer.max_steps=120", "trainer.limit_val_batches=0",
            "trainer.log_every_n_steps=10", "trainer.enable_progress_bar=false", "callbacks.picture_every=0",
            "callbacks.checkpoint_every=100000", f"model.text_len={SMALL['text']}", "model.caption_dropout=0",
            *(f"model.{key}={SMALL[key]}" for key in ("dim", "depth", "heads", "head_dim")),
        ]  # fmt: skip
        subprocess.run(
            command, check=True, stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": str(threads)}
        )
        with (folder / "run/csv/version_0/metrics.csv").open() as file:
            speed = float(list(csv.DictReader(file))[-1]["train/samples_per_second"])
        head = dalle_pytorch.load(folder / "run/dalle.safetensors").config
        case = {**SMALL, "vocabulary": head.text_vocab_size, "patterns": ["full"], "precision": "bf16"}
        bare = subprocess_case(sys.executable, "training.py", {**case, "threads": threads, "steps": 30})
        print(f"| averaged weights, logs, data and all | {speed:.2f} | {speed * bare['seconds'] / 8:.0%} |")


def write_pictures(folder: Path, size: int) -> None:
    """256 pictures of noise with captions of ten words."""
    import io
    import random

    from PIL import Image

    from dalle_pytorch.data.shards import ShardWriter

    words = random.Random(0)
    with ShardWriter(folder, name="noise", image_size=size) as writer:
        for i in range(256):
            data = io.BytesIO()
            Image.effect_noise((size, size), 50).convert("RGB").save(data, "webp")
            caption = " ".join(words.choice(["red", "apple", "blue", "cat", "on", "a", "table"]) for _ in range(10))
            writer.write("val" if i < 16 else "train", f"p{i}", data.getvalue(), "webp", {"captions": [caption]})


def foretold(threads: int) -> None:
    """plan=true against what steps take."""
    print("\n| model | megabytes: plan, taken | ratio |\n|---|---|---|")
    wide = {**SMALL, "dim": 768, "heads": 12, "head_dim": 64, "depth": 12, "batch": 2}
    cases = {
        "small, fp32": {**SMALL, "precision": "fp32"},
        "large, bf16": {**LARGE, "precision": "bf16"},
        "dim 768, depth 12, bf16": {**wide, "precision": "bf16"},
        "dim 768, depth 12, bf16, checkpointing": {**wide, "batch": 16, "precision": "bf16", "checkpointing": True},
    }
    for name, case in cases.items():
        case = {**case, "patterns": PATTERNS["axial"], "threads": threads, "steps": 3}
        got = subprocess_case(sys.executable, "training.py", case, **FREED)
        print(
            f"| {name} | {got['plan']:.0f}, {got['megabytes']:.0f} | {got['plan'] / got['megabytes']:.2f} |", flush=True
        )


def main() -> None:
    """Run the parts that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", help="interpreter with dalle-pytorch==1.6.6")
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--case", help=argparse.SUPPRESS)
    settings = parser.parse_args()
    if settings.case:
        case = json.loads(settings.case)
        print(json.dumps(layer_case(case) if "layer" in case else run_case(case)))
        return
    torch.set_num_threads(settings.threads)
    print(f"torch {torch.__version__}, {settings.threads} threads")
    if "step" in settings.parts:
        step(settings.peer, settings.threads)
    if "layer" in settings.parts:
        layer(settings.threads)
    if "process" in settings.parts:
        process(settings.threads)
    if "memory" in settings.parts:
        foretold(settings.threads)


if __name__ == "__main__":
    main()
