"""Checks and times every path of the package that a GPU takes, in one run that should take at most eight minutes.

    python benchmarks/gpu.py                                     # one H200, H100 or A100
    python benchmarks/gpu.py --parts logits strategies attention # some parts
    python benchmarks/gpu.py --device cpu --tiny                 # tries the script; CUDA's own paths are left out

Checks: what a GPU computes against what it computes another way (the cached decoder, CUDA graphs and FlexAttention
against the plain network, DDP and FSDP2 against one process), and against a CPU. An error is the largest root mean
square of a row's difference (a row: the last axis), relative to that of all that is expected. Times: shares of the
memory bandwidth and of the matrix products that the same run measured. A part that fails is reported and the others
run; the exit code is 1 if a part raised or a check failed. Prints Markdown.
"""

import argparse
import contextlib
import copy
import csv
import gc
import itertools
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from hydra import compose, initialize_config_dir
from timing import best
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from training import write_pictures

import dalle_pytorch
from dalle_pytorch import DALLE, DALLEConfig, DiscreteVAE, DiscreteVAEConfig, Generator, SamplingConfig
from dalle_pytorch.commands import train_dalle
from dalle_pytorch.config import CONFIGS, typed
from dalle_pytorch.generation.cache import State
from dalle_pytorch.generation.decoder import Decoder
from dalle_pytorch.generation.strategies import KnownTokens, draw_image_tokens, generate_image_tokens
from dalle_pytorch.models.block_sparse import block_attention, layout
from dalle_pytorch.models.blocks import BLOCKS
from dalle_pytorch.models.dalle_bart import DALLEBart, DALLEBartConfig
from dalle_pytorch.models.text_to_image import TextToImage
from dalle_pytorch.models.vqgan import VQGAN, VQGANConfig
from dalle_pytorch.training.dalle import TrainDALLEConfig
from dalle_pytorch.training.optim import make_optimizer
from dalle_pytorch.training.plan import Sizes, flops

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
BOUNDS = {"fp32": 1e-4, "bf16": 6e-2, "fp16": 1e-2}
"""Largest errors that pass: rounding through a few layers, not more."""
TINY = ["model=tiny", "model.text_vocab_size=50"]
LARGE = ["model=paper_1b", "model.depth=42", "model.attn_types=[full]", "model.text_vocab_size=16384"]
"""1.3 billion weights: paper_1b as deep as minDALL-E, every layer over all positions."""


class SpentError(Exception):
    """The time budget is spent."""


class Bench:
    """What every part needs: a device, whether sizes are tiny, the ceilings, the clock, and the checks that failed."""

    def __init__(self, device: str, tiny: bool, budget: float) -> None:
        self.device, self.tiny, self.deadline = torch.device(device), tiny, time.monotonic() + budget
        self.cuda = self.device.type == "cuda"
        self.limits: dict[str, float] = {}
        self.losses: dict[str, float] = {}
        self.failed: list[str] = []

    def go_on(self) -> None:
        """Free what nothing refers to; raise where the time is over."""
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()
        if time.monotonic() > self.deadline:
            raise SpentError

    def wait(self) -> None:
        """For the GPU."""
        if self.cuda:
            torch.cuda.synchronize(self.device)

    def seconds(self, run: Callable[[], object], repeats: int = 5) -> float:
        """Of the fastest run."""
        return best(lambda: (run(), self.wait()), 1 if self.tiny else repeats)

    def check(self, what: str, error: float, bound: float) -> None:
        """Print a row of error and bound, and remember a failure. NaN fails."""
        good = error <= bound
        print(f"| {what} | {error:.1e} | {bound:.0e} | {'ok' if good else 'FAILED'} |", flush=True)
        if not good:
            self.failed.append(what)


def off(found: Tensor, expected: Tensor) -> float:
    """Largest root mean square of a row's difference, relative to that of all that is expected."""
    found, expected = found.detach().double().cpu(), expected.detach().double().cpu()
    return float((found - expected).square().mean(-1).sqrt().max() / expected.square().mean().sqrt())


def table(*names: str) -> None:
    """The head of a table."""
    print(f"\n| {' | '.join(names)} |\n{'|---' * len(names)}|", flush=True)


def ceilings(bench: Bench) -> None:
    """Memory bandwidth of a large copy and rates of large matrix products: what all shares are of."""
    source = torch.empty(2**22 if bench.tiny else 2**31, dtype=torch.uint8, device=bench.device)
    target = torch.empty_like(source)
    bench.limits["memory"] = 2 * source.nbytes / bench.seconds(lambda: target.copy_(source), 10)
    side = 256 if bench.tiny else 8192
    for name in ("fp32", "tf32", "bf16"):
        torch.set_float32_matmul_precision("high" if name == "tf32" else "highest")
        left, right = torch.randn(2, side, side, device=bench.device).to(DTYPES.get(name, torch.float32))
        bench.limits[name] = 2 * side**3 / bench.seconds(lambda a=left, b=right: a @ b, 10)
    table("ceiling", "measured")
    print(f"| memory, read + written | {bench.limits['memory'] / 1e9:,.0f} GB/s |")
    for name in ("fp32", "tf32", "bf16"):
        print(f"| products in {name} | {bench.limits[name] / 1e12:,.2f} TFLOP/s |", flush=True)


def small_models(bench: Bench) -> Iterator[tuple[str, TextToImage]]:
    """A DALLE of each mix of patterns, a DALLEBart; weights large enough that outputs depend on inputs."""
    grid = 4 if bench.tiny else 8
    vae = DiscreteVAE(
        DiscreteVAEConfig(image_size=4 * grid, num_layers=2, codebook_size=64, codebook_dim=8, hidden_dim=8)
    )
    every, paper = ["axial_row", "axial_col", "conv_like", "full"], ["axial_row", "axial_col", "axial_row", "conv_like"]
    plain = {"positions": "learned", "shift_tokens": False, "gated": False}
    mixes = {
        "full, rotary, shift": {"attn_types": ["full"]},
        "all four, rotary, shift": {"attn_types": every},
        "the paper's": {"attn_types": paper, **plain},
        "axial, both positions, qk_norm": {"attn_types": every[:2], "positions": "both", "qk_norm": True},
    }
    sizes = {"dim": 64, "depth": 4, "heads": 4, "head_dim": 16, "text_vocab_size": 50, "text_len": 12}
    bart = DALLEBartConfig(
        dim=64, encoder_layers=2, decoder_layers=3, heads=4, ffn_dim=96, grid_size=grid, text_vocab_size=50,
        text_positions=14, image_vocab_size=70, bos_id=64,
    )  # fmt: skip
    for name, more in mixes.items():
        yield name, awake(DALLE(DALLEConfig(**{**sizes, "conv_kernel": 3, **more}), vae=vae)).to(bench.device)
    yield "DALLEBart", awake(DALLEBart(bart, vae=vae)).to(bench.device)


def awake(model: TextToImage) -> TextToImage:
    """The model in eval mode with larger weights."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    return model.eval()


def inputs(model: TextToImage, bench: Bench) -> tuple[Tensor, Tensor]:
    """Two prompts of unequal length, and tokens of five images for each."""
    text = torch.randint(3, 50, (2, 12), device=bench.device)
    text[1, 5:] = 0
    return text, torch.randint(64, (10, model.num_image_tokens), device=bench.device)


def read_logits(decoder: Decoder, text: Tensor, tokens: Tensor, window: int) -> Tensor:
    """Image logits through the cache, ``window`` positions a step."""
    state, first = decoder.start(text, len(tokens) // len(text), window=window)
    found, count = [first[:, None]], tokens.shape[1] - 1
    for at in range(0, count, window):
        found.append(decoder.read(state, tokens[:, at : min(at + window, count)], at).clone())  # a graph reuses it
    return torch.cat(found, dim=1)


def check_logits(bench: Bench) -> None:
    """The cached decoder against the plain network on the same device, and that against a CPU."""
    table("logits of small models", "error", "bound", "")
    ways = [("fp32", False), ("bf16", False), ("fp16", False)]
    ways += [("fp32", True), ("bf16", True), ("fp16", True)] * bench.cuda
    for name, model in small_models(bench):
        bench.go_on()
        text, tokens = inputs(model, bench)
        each = text.repeat_interleave(5, dim=0)
        with torch.no_grad():
            expected = model.image_logits(each, tokens)
            if bench.cuda:
                on_cpu = copy.deepcopy(model).cpu().image_logits(each.cpu(), tokens.cpu())
                bench.check(f"{name}: image_logits against a CPU", off(expected, on_cpu), BOUNDS["fp32"])
        for precision, graphs in ways:
            decoder = Decoder(model, precision=precision, cache_dtype=DTYPES[precision])
            decoder.graphs = graphs
            for prompts, candidates, window in ((1, 1, 1), (1, 5, 1), (2, 5, 4), (1, 1, 4)):
                rows = prompts * candidates
                found = read_logits(decoder, text[:prompts], tokens[:rows], window)
                what = f"{name}: {precision}{', graph' * graphs}, {prompts} x {candidates}, {window} a step"
                bench.check(what, off(found, expected[:rows]), BOUNDS[precision])


def check_strategies(bench: Bench) -> None:
    """Drawing: equal tokens by every way; kept tokens; stable scores in fp16; memory given back; the released model."""
    table("tokens that differ, and the like", "found", "bound", "")
    for name, model in small_models(bench):
        bench.go_on()
        text, uniforms = inputs(model, bench)[0], torch.rand(10, model.num_image_tokens, device=bench.device)
        decoder, eager = Decoder(model), Decoder(model)
        eager.graphs = False
        guided = {"cfg_scale": 2.0, "cfg_interval": [0.0, 0.5], "top_p": 0.9}
        drawn = generate_image_tokens(eager, text, uniforms, SamplingConfig())
        ahead = generate_image_tokens(decoder, text, uniforms, SamplingConfig(strategy="speculative", draft_tokens=3))
        bench.check(f"{name}: speculative against raster", float((ahead != drawn).sum()), 0)
        given = drawn[::5, :6]
        kept = generate_image_tokens(decoder, text, uniforms, SamplingConfig(), given_tokens=given)
        bench.check(f"{name}: given tokens that were not kept", float((kept[::5, :6] != given).sum()), 0)
        held = sum(type(one) is State for one in gc.get_objects())  # nobody but the garbage collector could free it
        bench.check(f"{name}: caches still in memory", held, 0)
        for settings in ({}, guided) if bench.cuda else ():
            one, other = (
                generate_image_tokens(d, text, uniforms, SamplingConfig(**settings)) for d in (decoder, eager)
            )
            bench.check(f"{name}: graph against none, {settings}", float((one != other).sum()), 0)
    stable_scores(bench)
    generator(bench)


def stable_scores(bench: Bench) -> None:
    """Scores far beyond fp16's range stay finite with ``stable``, keys and values in fp16."""
    vae = DiscreteVAE(DiscreteVAEConfig(image_size=16, num_layers=2, codebook_size=64, codebook_dim=8, hidden_dim=8))
    model = DALLE(
        DALLEConfig(dim=64, depth=2, heads=4, head_dim=16, text_vocab_size=50, text_len=12, stable=True), vae=vae
    )
    for block in model.transformer.blocks:
        block.attention.to_qkv.weight.data[:128] *= 2000  # scores of about 1e5; fp16 ends at 65,504
    model = model.to(bench.device).eval()
    text, tokens = inputs(model, bench)
    found = read_logits(Decoder(model, precision="fp16", cache_dtype=torch.float16), text, tokens, 1)
    bench.check("stable, fp16: logits that are not finite", float((~found.isfinite()).sum()), 0)


def generator(bench: Bench) -> None:
    """The released emoji model through Generator: images on this device, of which a part is redrawn."""
    model = dalle_pytorch.load("emoji", kind="dalle").to(bench.device)
    sampling = SamplingConfig(cfg_scale=2.0, top_k=64)
    some = Generator(model, batch_size=2 if bench.tiny else 8, precision="fp32")
    with torch.no_grad():
        image = model.vae.decode(torch.zeros(1, model.num_image_tokens, dtype=torch.long, device=bench.device))[0]
    keep = torch.arange(model.num_image_tokens) < model.num_image_tokens // (1 if bench.tiny else 2)
    keep[-3:] = False
    given = some.given(image.cpu(), keep)
    drawn = some.candidates("a red apple", range(2 if bench.tiny else 8), sampling=sampling, given=given)
    wrong = (drawn.image_tokens[:, keep] != given.tokens[:, keep]).sum()
    bench.check("Generator, emoji: kept tokens that changed", float(wrong), 0)
    bench.check("Generator, emoji: pixels outside [0, 1]", float(((drawn.images - 0.5).abs() > 0.5).sum()), 0)


def check_attention(bench: Bench) -> None:
    """block_attention against torch's own under the dense mask, forward and backward."""
    grid, text, heads, width, batch = (4, 9, 2, 16, 1) if bench.tiny else (32, 257, 16, 64, 4)
    head = "attention, forward + backward", "ms", "dense mask, ms", "TFLOP/s of what is visible", "of ceiling"
    rows = []
    table("results and gradients", "error", "bound", "")
    for pattern in ("full", "axial_row", "axial_col", "conv_like"):
        plan = layout(pattern, text, grid, text + grid**2 - 1).on(bench.device)
        mask = plan.mask if plan.inverse is None else plan.mask[plan.inverse.cpu()][:, plan.inverse.cpu()]
        mask = mask.to(bench.device)
        for precision in ("fp32", "bf16"):
            bench.go_on()
            exact = torch.randn(4, batch, heads, plan.length, width, device=bench.device)
            *qkv, upper = exact.to(DTYPES[precision])
            qkv = [x.requires_grad_() for x in qkv]

            def ours(qkv=qkv, upper=upper, plan=plan) -> list[Tensor]:
                out = block_attention(*qkv, plan)
                return [out, *torch.autograd.grad(out, qkv, upper)]

            def dense(qkv=qkv, upper=upper, mask=mask) -> list[Tensor]:
                out = F.scaled_dot_product_attention(*qkv, attn_mask=mask)
                return [out, *torch.autograd.grad(out, qkv, upper)]

            wide = [x.detach().float().requires_grad_() for x in qkv]
            for name, found, expected in zip(
                ("out", "dq", "dk", "dv"), ours(), dense(wide, upper.float()), strict=True
            ):
                bench.check(f"{pattern}, {precision}: {name}", off(found, expected), BOUNDS[precision])
            ms, slow = bench.seconds(ours) * 1e3, bench.seconds(dense) * 1e3
            rate = 14 * batch * heads * width * int(mask.sum()) / ms * 1e3  # 2 products forward, 5 backward
            cells = f"{ms:.2f} | {slow:.2f} | {rate / 1e12:.1f} | {rate / bench.limits[precision]:.0%}"
            rows.append(f"| {pattern}, {precision} | {cells} |")
    table(*head)
    print("\n".join(rows), flush=True)


def training_config(*overrides: str) -> TrainDALLEConfig:
    """Settings of train_dalle.py."""
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return typed(compose("train_dalle", overrides=list(overrides)), TrainDALLEConfig)


def random_model(bench: Bench, config: DALLEConfig) -> DALLE:
    """Made on the device."""
    sizes = Sizes(16, 4, 32) if bench.tiny else Sizes(256, 32, 8192)
    with bench.device:
        return DALLE(config, vae=sizes)


def drawing_row(
    bench: Bench, decoder: Decoder, name: str, candidates: int, steps: int, strategy: str = "raster"
) -> None:
    """Speed of steps from the middle of the image on, without the prompt."""
    bench.go_on()
    model, device, n = decoder.dalle, bench.device, decoder.dalle.num_image_tokens
    first = n // 2 - min(steps, n // 4) - 3
    known = KnownTokens(
        torch.randint(model.codebook_size, (1, n), device=device), torch.arange(n, device=device) < first
    )
    text = torch.randint(1, model.config.text_vocab_size, (1, model.config.text_len), device=device)
    sampling = SamplingConfig(top_k=min(256, model.codebook_size), strategy=strategy)
    try:
        events = draw_image_tokens(decoder, text, torch.rand(candidates, n, device=device), sampling, known)
        done, _ = [next(events) for _ in range(3)][-1]
        bench.wait()
        start = time.perf_counter()
        taken = [now for now, _ in itertools.islice(events, steps)]  # in tiny sizes speculation may end before
        bench.wait()
        seconds = (time.perf_counter() - start) / len(taken)
    except torch.OutOfMemoryError:
        print(f"| {name} | {candidates} | does not fit | | |", flush=True)
        return
    events.close()
    slots = decoder.slots(1)
    seen = sum(int((~slots[pattern].hidden[n // 2]).sum()) for pattern in decoder.patterns)
    read = 2 * (candidates * seen + len(decoder.patterns) * model.prompt_length) * model.key_width
    read *= decoder.cache_dtype.itemsize
    read += 2 * sum(p.numel() for part in (model.trunk, model.image_head) for p in part.parameters())
    speed, share = candidates * (taken[-1] - done) / seconds / len(taken), read / seconds / bench.limits["memory"]
    print(f"| {name} | {candidates} | {speed:,.0f} | {seconds * 1e3:.2f} | {share:.0%} |", flush=True)


SPEED = ("bf16", "candidates", "tokens/s", "ms a step", "weights and visible keys / memory ceiling")


def time_sampling(bench: Bench) -> None:
    """A large random model in bf16, with and without CUDA graphs; speculation, whose guesses are all wrong here."""
    model = random_model(bench, training_config(*(TINY if bench.tiny else LARGE)).model).eval()
    print(f"\n{sum(p.numel() for p in model.parameters()) / 1e9:.2f} billion weights, {model.num_image_tokens} tokens")
    table(*SPEED)
    decoder = Decoder(model, precision="bf16", consume=True, cache_dtype=torch.bfloat16)
    counts, steps = ((1, 2), 2) if bench.tiny else ((1, 8, 64, 256), 128)
    for graphs in (True, False) if bench.cuda else (False,):
        decoder.graphs = graphs
        for candidates in counts:
            drawing_row(
                bench, decoder, "CUDA graph" if graphs else "no graph", candidates, steps if graphs else steps // 2
            )
    decoder.graphs = bench.cuda
    drawing_row(bench, decoder, "speculative, 8 positions a step", 1, steps // 2, "speculative")


def training_row(bench: Bench, name: str, batch: int, *, compiled: bool, more: tuple[str, ...]) -> None:
    """A step of a recipe: bf16 autocast, its optimiser and clipping, random tokens."""
    bench.go_on()
    config = training_config(*more)
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")  # as in training
    model = random_model(bench, replace(config.model, text_vocab_size=50 if bench.tiny else 16384)).train()
    if compiled:
        for block in (part for part in model.modules() if isinstance(part, BLOCKS)):
            block.compile()
    optimizer = make_optimizer(model, replace(config.optim, lr=1e-4))  # without a warm-up
    text = torch.randint(1, model.config.text_vocab_size, (batch, model.config.text_len), device=bench.device)
    image = torch.randint(model.codebook_size, (batch, model.num_image_tokens), device=bench.device)
    losses = []

    def step() -> None:
        with torch.autocast(bench.device.type, torch.bfloat16):
            loss = model.loss(text, image).loss
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.optim.clip)
        optimizer.step()
        losses.append(loss.detach())

    if bench.cuda:
        torch.cuda.reset_peak_memory_stats()
    seconds = bench.seconds(step, 4)
    peak = f"{torch.cuda.max_memory_allocated() / 1e9:.1f}" if bench.cuda else "-"
    tokens = batch * (model.config.text_len + model.num_image_tokens) / seconds
    share = sum(flops(model)) * batch / seconds / bench.limits["bf16"]
    recipe = f"{name}{', checkpointing' * model.config.checkpoint_activations}{', compiled' * compiled}, batch {batch}"
    ends = f"{losses[0]:.3f}, {losses[-1]:.3f}"
    print(f"| {recipe} | {seconds * 1e3:,.1f} | {tokens:,.0f} | {share:.0%} | {peak} | {ends} |", flush=True)
    if not losses[-1] < losses[0]:
        bench.failed.append(f"{recipe}: the loss of one batch does not fall")
    if not abs(losses[0] - bench.losses.setdefault(name, float(losses[0]))) < 2e-2:
        bench.failed.append(f"{recipe}: another loss than without torch.compile, {bench.losses[name]:.3f}")


STEP = ("training step, bf16", "ms", "tokens/s", "model FLOPs / bf16 ceiling", "peak GB", "first and last loss")


def recipes(bench: Bench) -> list[tuple[str, int, tuple[str, ...]]]:
    """Names, batches and settings."""
    if bench.tiny:
        return [("tiny", 2, ("model=tiny", "model.attn_types=[axial_row,axial_col]"))]
    return [("paper_100m", 32, ("experiment=paper_100m",)), ("paper_1b", 16, ("experiment=paper_1b",))]


def time_training(bench: Bench) -> None:
    """Steps of the paper's recipes."""
    table(*STEP)
    for name, batch, more in recipes(bench):
        training_row(bench, name, batch, compiled=False, more=more)


def check_trainer(bench: Bench) -> None:
    """train_dalle.py for two steps on this device: DDP, FSDP2 and compiled blocks against one plain process."""
    table("losses of two steps through the Trainer", "error", "bound", "")
    sizes = [
        "model=tiny",
        "model.depth=4",
        "model.attn_types=[full,axial_row,axial_col,conv_like]",
        "text.vocab_size=270",
        "text.truncate=true",
    ]
    common = [
        "trainer.devices=1", "trainer.max_steps=2", "trainer.log_every_n_steps=1", "trainer.enable_progress_bar=false",
        "trainer.val_check_interval=2", "data.batch_size=4", "callbacks.picture_every=1", "callbacks.ema_decay=0",
        f"trainer.accelerator={'gpu' if bench.cuda else 'cpu'}", "optim.warmup_steps=0", "matmul_precision=highest",
        f"data.num_workers={2 if bench.cuda else 0}",
    ]  # fmt: skip
    exact, half = ["trainer.precision=32-true"], ["trainer.precision=bf16-mixed"]
    ways = {"one process": exact, "ddp": ["trainer=ddp", *exact], "fsdp": ["trainer=fsdp", *exact], "bf16-mixed": half}
    if bench.cuda:
        ways |= {"compile=true": ["compile=true", *exact], "ddp, bf16-mixed": ["trainer=ddp", *half]}
    with tempfile.TemporaryDirectory() as name:
        folder, vae = Path(name), DiscreteVAEConfig(image_size=16, num_layers=2, codebook_size=32, hidden_dim=8)
        write_pictures(folder / "images", 16)
        dalle_pytorch.save(DiscreteVAE(vae), folder / "vae.safetensors")
        plain: list[float] = []
        for way, more in ways.items():
            bench.go_on()
            out = folder / way.replace(" ", "_").replace("=", "_").replace(",", "")
            losses = run_training([f"data.path={folder}/images", f"vae={folder}/vae.safetensors", f"out={out}", *sizes,
                                   *common, *more], out)  # fmt: skip
            plain = plain or losses
            error = max(abs(a - b) for a, b in zip(losses, plain, strict=True))
            bench.check(
                f"{way}: {', '.join(f'{loss:.4f}' for loss in losses)}", error, 2e-2 if half[0] in more else 1e-4
            )


def run_training(arguments: list[str], out: Path) -> list[float]:
    """The losses that a training logs."""
    before, sys.argv = sys.argv, ["train_dalle.py", *arguments]
    try:
        with contextlib.redirect_stdout(sys.stderr):
            train_dalle.main()
    finally:
        sys.argv = before
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    with (out / "csv/version_0/metrics.csv").open() as file:
        return [float(row["train/loss"]) for row in csv.DictReader(file) if row.get("train/loss")]


def codecs(bench: Bench) -> Iterator[tuple[str, nn.Module]]:
    """The two kinds of image tokenizers."""
    if bench.tiny:
        sizes = {"ch": 32, "ch_mult": [1] * 5, "attention_levels": [], "z_channels": 32, "embed_dim": 4}
        yield "DiscreteVAE", DiscreteVAE(DiscreteVAEConfig(image_size=32, num_layers=3, codebook_size=32, hidden_dim=8))
        yield "VQGAN f16", VQGAN(VQGANConfig(image_size=32, num_res_blocks=1, codebook_size=64, **sizes))
        return
    vae = DiscreteVAEConfig(image_size=256, num_layers=3, codebook_size=8192, hidden_dim=256, num_resnet_blocks=2)
    yield "DiscreteVAE f8", DiscreteVAE(vae)
    yield "VQGAN f16", VQGAN(VQGANConfig())


@torch.no_grad()
def time_codecs(bench: Bench) -> None:
    """Images a second of image tokenizers, and their pixels against fp32's."""
    batch, rows = 2 if bench.tiny else 32, []
    table("pixels that are decoded", "error", "bound", "")
    for name, vae in codecs(bench):
        torch.set_float32_matmul_precision("high")
        vae, expected = vae.eval(), torch.empty(0)
        images = torch.rand(batch, 3, vae.image_size, vae.image_size)
        tokens = torch.randint(vae.codebook_size, (batch, vae.grid_size**2))
        on_cpu = vae.decode(tokens[:1])
        vae, images, tokens = vae.to(bench.device), images.to(bench.device), tokens.to(bench.device)
        for precision in ("fp32", "bf16"):
            bench.go_on()
            made = copy.deepcopy(vae).to(DTYPES[precision])
            decoded = made.decode(tokens)
            expected = decoded if precision == "fp32" else expected
            bench.check(f"{name}, {precision}: against fp32", off(decoded, expected), BOUNDS["bf16"])
            if precision == "fp32":
                bench.check(f"{name}, {precision}: against a CPU", off(decoded[:1], on_cpu), 1e-2)  # TF32 on a GPU
            for verb, run in (("encode", lambda: made.encode(images)), ("decode", lambda: made.decode(tokens))):  # noqa: B023
                with FlopCounterMode(display=False) as counter:
                    run()
                seconds = bench.seconds(run)
                rate = counter.get_total_flops() / seconds
                limit = bench.limits["bf16" if precision == "bf16" else "tf32"]
                rows.append(
                    f"| {name}, {precision}: {verb} | {batch / seconds:,.0f} | {rate / 1e12:.2f} | {rate / limit:.0%} |"
                )
    table("codec", "images/s", "TFLOP/s", "of ceiling (fp32: TF32)")
    print("\n".join(rows), flush=True)


def time_compiled(bench: Bench) -> None:
    """What waits for torch.compile, so that it comes last: steps of sampling, and blocks in training."""
    if not bench.cuda:
        print("compiled: left out, it is for GPUs here (tests/generation/test_compiled.py compiles on a CPU)")
        return
    table("logits of small models", "error", "bound", "")
    for name, model in list(small_models(bench))[1::3]:
        bench.go_on()
        text, tokens = inputs(model, bench)
        with torch.no_grad():
            expected = model.image_logits(text.repeat_interleave(5, dim=0), tokens)
        found = read_logits(Decoder(model, compiled=True), text, tokens, 1)
        bench.check(f"{name}: fp32, compiled", off(found, expected), BOUNDS["fp32"])
    table(*STEP)
    for name, batch, more in recipes(bench):
        training_row(bench, name, batch, compiled=True, more=more)
    table(*SPEED)
    model = random_model(bench, training_config(*(TINY if bench.tiny else LARGE)).model).eval()
    decoder = Decoder(model, precision="bf16", compiled=True, consume=True)
    for candidates in (1, 8, 64, 256):
        drawing_row(bench, decoder, "compiled", candidates, 2 if bench.tiny else 64)


PARTS: dict[str, Callable[[Bench], None]] = {
    "logits": check_logits, "strategies": check_strategies, "attention": check_attention, "sampling": time_sampling,
    "training": time_training, "trainer": check_trainer, "codec": time_codecs, "compiled": time_compiled,
}  # fmt: skip
"""In the order of a run: what is short comes first."""


def run_part(bench: Bench, name: str) -> str:
    """A part's result in a word; what it raised is printed."""
    print(f"\n## {name}", flush=True)
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("highest")
    bench.failed, start = [], time.monotonic()
    try:
        bench.go_on()
        PARTS[name](bench)
    except SpentError:
        result = "skipped from here on, the time budget is spent"
    except (Exception, SystemExit):
        traceback.print_exc(file=sys.stdout)
        return "FAILED: it raised, see above"
    else:
        result = f"ok, {time.monotonic() - start:.0f} s"
    return f"FAILED: {'; '.join(bench.failed)}" if bench.failed else result


def main() -> None:
    """Run the parts that were asked for; exit with 1 if one failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS), help="besides the ceilings")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="sizes for a try on a CPU")
    parser.add_argument("--budget", type=float, default=480, help="seconds; what has not begun by then is skipped")
    settings = parser.parse_args()
    bench = Bench(settings.device, settings.tiny, settings.budget)
    device = torch.cuda.get_device_name(bench.device) if bench.cuda else "no GPU: CUDA graphs are left out"
    print(f"torch {torch.__version__}, {device}")
    ceilings(bench)
    results = {name: run_part(bench, name) for name in settings.parts}
    print("\n## Summary\n")
    for name, result in results.items():
        print(f"{name}: {result}")
    sys.exit(any(result.startswith("FAILED") for result in results.values()))


if __name__ == "__main__":
    main()
