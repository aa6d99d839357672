"""How fast image tokens are drawn: against DALLE-pytorch 1.6.6, an older checkout, and this machine's ceilings.

    python benchmarks/sampling.py --peer peer/bin/python --old ../before    # peer.py says how to make the environment
    python benchmarks/sampling.py --parts sizes emoji large kernels growth  # without either

Ratios matter, not times. Everything is measured in one run on ``--threads`` threads, each mode of each program in a
process of its own, second call onwards. Ours go through ``Generator``, from prompts to images, as the peer's do through
``generate_images``. ``--old`` is a checkout of this repository; its rows stand beside ours. Prints Markdown.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from timing import best

ROOT = Path(__file__).resolve().parents[1]
# what a 10.8 M-parameter DALLE-pytorch is: issue-sized, not chosen to flatter
SIZES = {
    "dim": 256,
    "depth": 8,
    "heads": 8,
    "head_dim": 32,
    "text": 64,
    "vocabulary": 8192,
    "grid": 16,
    "codebook": 1024,
}
LARGE = {**SIZES, "dim": 1024, "heads": 16, "head_dim": 64}
MODES = [("fp32", False), ("bf16", False), ("int8", False), ("bf16", True), ("int8", True)]
ROWS = [(1, 1), (8, 1), (1, 512)]
"""Prompts and candidates of each."""
PARTS = ["sizes", "emoji", "large", "kernels", "growth"]
TOP_K = 102  # the peer's filter_thres=0.9 of 1,024 codes
WIDTHS = {"fp32": 4, "bf16": 2, "int8": 1}


class Letters:
    """A text tokenizer that needs no training: a token a letter."""

    vocab_size = SIZES["vocabulary"]

    def encode(self, text: str) -> list[int]:
        """Ids of letters, 1 to 128."""
        return [1 + ord(letter) % 128 for letter in text]

    def tokenize(self, text: str, length: int, *, truncate: bool = False) -> torch.Tensor:
        """``[1, length]``."""
        ids = self.encode(text)[:length]
        return torch.tensor([ids + [0] * (length - len(ids))])


def model(sizes: dict[str, int], patterns: tuple[str, ...] = ("full",)):
    """A random DALLE."""
    from dalle_pytorch import DALLE, DALLEConfig, DiscreteVAE, DiscreteVAEConfig

    vae = DiscreteVAEConfig(
        image_size=8 * sizes["grid"], num_layers=3, codebook_size=sizes["codebook"], codebook_dim=64, hidden_dim=16
    )
    config = DALLEConfig(
        dim=sizes["dim"],
        depth=sizes["depth"],
        heads=sizes["heads"],
        head_dim=sizes["head_dim"],
        text_vocab_size=sizes["vocabulary"],
        text_len=sizes["text"],
        attn_types=list(patterns),
    )
    dalle = DALLE(config, vae=DiscreteVAE(vae)).eval()
    dalle.text_tokenizer = Letters()
    return dalle


def read_weights(dalle) -> int:
    """Number of weights that a step reads."""
    return sum(p.numel() for part in (dalle.transformer, dalle.image_head) for p in part.parameters())


def drawer(generator, sampling) -> Callable[[list[str], int], object]:
    """Draws candidates of each of some prompts, to images; an old checkout draws several prompts to tokens only."""
    if hasattr(generator, "sample_each"):
        return lambda prompts, count: list(generator.sample_each(prompts, range(count), sampling=sampling))

    def draw(prompts: list[str], count: int) -> object:
        if len(prompts) == 1:
            return generator.candidates(prompts[0], range(count), sampling=sampling)
        from dalle_pytorch.generation.engine import generate_image_tokens

        dalle = generator.dalle
        text = torch.cat([dalle.text_tokenizer.tokenize(prompt, dalle.config.text_len) for prompt in prompts])
        uniforms = torch.rand(len(prompts) * count, dalle.num_image_tokens)
        return dalle.vae.decode(generate_image_tokens(generator.decoder, text, uniforms, sampling))

    return draw


def measure(what: str, precision: str, compiled: bool) -> dict[str, float]:
    """Tokens a second of one mode by prompts x candidates, or seconds of the emoji weights; in its own process."""
    from dalle_pytorch import Generator, SamplingConfig, load

    torch.manual_seed(0)
    if what == "emoji":
        folder = ROOT / "weights" / "emoji"
        dalle, clip = load(folder / "dalle.safetensors", kind="dalle"), load(folder / "clip.safetensors", kind="clip")
        generator = Generator(dalle, clip, precision=precision, compiled=compiled)
        card = SamplingConfig(cfg_scale=2.0, top_p=0.9)
        draw = lambda: generator.generate("a red apple", num_candidates=512, num_keep=8, sampling=card)  # noqa: E731
        return {"seconds": best(draw, 1)}
    dalle = model(LARGE if what == "large" else SIZES)
    draw = drawer(Generator(dalle, precision=precision, compiled=compiled), SamplingConfig(top_k=TOP_K))
    found = {}
    for prompts, count in ROWS[:1] if what == "large" else ROWS:
        texts = [f"prompt {number} of an image that nobody has seen yet" for number in range(prompts)]
        seconds = best(lambda texts=texts, count=count: draw(texts, count), 3 if count == 1 else 1)
        found[f"{prompts} x {count}"] = prompts * count * dalle.num_image_tokens / seconds
    return found | {"weights": read_weights(dalle)}


def child(settings: argparse.Namespace, checkout: Path, what: str, precision: str, compiled: bool) -> dict[str, float]:
    """``measure`` in another process, with the package of a checkout."""
    task = json.dumps([what, precision, compiled])
    command = [sys.executable, __file__, "--threads", str(settings.threads), "--measure", task]
    done = subprocess.run(
        command, check=True, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(checkout)}
    )
    return json.loads(done.stdout.splitlines()[-1])


def ceilings() -> dict[str, float]:
    """What the machine can do: GB/s of a streaming read, GFLOP/s of large matrix products."""
    numbers = torch.randn(128 * 1024 * 1024)  # 512 MB, beyond any cache
    found = {"read": numbers.nbytes / best(numbers.sum, 5) / 1e9}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        left, right = torch.randn(2, 2048, 2048).to(dtype)
        packed = torch.ops.mkldnn._reorder_linear_weight(right)
        seconds = best(lambda x=left, w=packed: torch.ops.mkldnn._linear_pointwise(x, w, None, "none", [], ""), 5)
        found[name] = 2 * 2048**3 / seconds / 1e9
    return found


def peers(settings: argparse.Namespace) -> dict[str, float] | None:
    """Tokens a second of DALLE-pytorch for one image and for eight."""
    if not settings.peer:
        return None
    sizes = json.dumps({**SIZES, "threads": settings.threads})
    script = Path(__file__).with_name("peer_sampling.py")
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}  # would lead to our package
    done = subprocess.run([settings.peer, str(script), sizes], check=True, stdout=subprocess.PIPE, text=True, env=clean)
    peer = json.loads(done.stdout.splitlines()[-1])
    print(f"DALLE-pytorch 1.6.6: {peer['1']:.1f} tokens/s for one image, {peer['8']:.1f} for eight")
    return peer


def programs(settings: argparse.Namespace) -> dict[str, Path]:
    """Checkouts to measure, by name."""
    return ({"old": settings.old} if settings.old else {}) | {"new": ROOT}


def name_of(precision: str, compiled: bool) -> str:
    """A mode in words."""
    return precision + (", compiled" if compiled else "")


def sizes(settings: argparse.Namespace, limits: dict[str, float]) -> None:
    """Tokens a second of every mode, for one candidate, eight prompts and 512 candidates of one prompt."""
    from dalle_pytorch.generation.generator import CPU_ROWS

    peer = peers(settings)
    print("\n| mode | prompts x candidates | tokens/s | x old | x peer | reads / ceiling | products / ceiling |")
    print("|---|---|---|---|---|---|---|")
    for precision, compiled in MODES:
        found = {
            name: child(settings, checkout, "sizes", precision, compiled)
            for name, checkout in programs(settings).items()
        }
        weights = found["new"].pop("weights")
        for row, speed in found["new"].items():
            prompts, count = map(int, row.split(" x "))
            rows = prompts * min(count, CPU_ROWS)
            gain = f"{speed / found['old'][row]:.2f}" if "old" in found else "-"
            ratio = f"{speed / peer['1' if rows == 1 else '8']:.0f}" if peer else "-"
            read = weights * WIDTHS[precision] * speed / rows / 1e9 / limits["read"]
            products = 2 * weights * speed / 1e9 / limits["fp32" if precision == "fp32" else "bf16"]
            cells = [name_of(precision, compiled), row, f"{speed:,.0f}", gain, ratio, f"{read:.0%}", f"{products:.0%}"]
            print(f"| {' | '.join(cells)} |", flush=True)


def emoji(settings: argparse.Namespace) -> None:
    """Seconds from a prompt to the best 8 of 512 images with the released weights."""
    print("\n| mode | 512 candidates of the emoji weights, ranked: seconds | old | ratio |\n|---|---|---|---|")
    for precision, compiled in MODES:
        found = {
            name: child(settings, checkout, "emoji", precision, compiled)["seconds"]
            for name, checkout in programs(settings).items()
        }
        old = found.get("old")
        cells = [f"{found['new']:.1f}", f"{old:.1f}" if old else "-", f"{old / found['new']:.2f}" if old else "-"]
        print(f"| {name_of(precision, compiled)} | {' | '.join(cells)} |", flush=True)


def large(settings: argparse.Namespace, limits: dict[str, float]) -> None:
    """A model of more than 100 M weights for one candidate: nothing but moving them counts."""
    print("\n| weights | mode | tokens/s | weights read, GB/s | of ceiling |\n|---|---|---|---|---|")
    for precision in WIDTHS:
        found = child(settings, ROOT, "large", precision, False)
        moved = found["weights"] * WIDTHS[precision] * found["1 x 1"] / 1e9
        cells = [f"{found['weights'] / 1e6:.0f} M", precision, f"{found['1 x 1']:.1f}", f"{moved:.1f}"]
        print(f"| {' | '.join(cells)} | {moved / limits['read']:.0%} |", flush=True)


def kernels() -> None:
    """The choices that backend.py rests on: packed weights, two products or the fused kernel, fp32 or bf16 keys."""
    from dalle_pytorch.generation.backend import CastLinear, part_of_attention

    shapes = [(768, 256), (256, 256), (2048, 256), (256, 1024)] * 8  # the layers of SIZES
    print("\n| rows | fp32: F.linear, packed ms | ratio | bf16: F.linear, packed ms | ratio |\n|---|---|---|---|---|")
    for rows in (1, 8, 64, 512):
        cells = []
        for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
            plain = [torch.nn.Linear(i, o, bias=False).to(dtype) for o, i in shapes]
            packed = [CastLinear(layer, precision) for layer in plain]
            inputs = {width: torch.randn(rows, width).to(dtype) for width in (256, 1024)}
            times = []
            for layers in (plain, packed):
                with torch.inference_mode():
                    run = lambda layers=layers: [f(inputs[i]) for f, (_, i) in zip(layers, shapes, strict=True)]  # noqa: E731, B023
                    times.append(best(run, 20) * 1e3)
            cells.append(f"{times[0]:.2f}, {times[1]:.2f} | {times[0] / times[1]:.1f}")
        print(f"| {rows} | {' | '.join(cells)} |", flush=True)

    slots, width, heads = SIZES["grid"] ** 2, SIZES["head_dim"], SIZES["heads"]
    print("\n| candidates | keys seen | us a candidate: fused fp32, two products fp32, fused bf16 |\n|---|---|---|")
    for rows in (1, 32, 256):
        keys = {
            dtype: torch.randn(8, 2, rows, heads, slots, width).to(dtype) for dtype in (torch.float32, torch.bfloat16)
        }
        queries = torch.randn(rows, heads, 1, width)
        for seen in (64, 256):
            fused = lambda q, k, v: F.scaled_dot_product_attention(q, k, v)  # noqa: E731
            parts = lambda q, k, v: part_of_attention(q, k, v, None)  # noqa: E731
            times = []
            for attend, dtype in ((fused, torch.float32), (parts, torch.float32), (parts, torch.bfloat16)):
                with torch.inference_mode():
                    run = lambda: [attend(queries, *layer[:, :, :, :seen]) for layer in keys[dtype]]  # noqa: E731, B023
                    times.append(best(run, 5) / 8 / rows * 1e6)
            print(f"| {rows} | {seen} | {', '.join(f'{value:.1f}' for value in times)} |", flush=True)


def step_times(decoder, candidates: int, positions: list[int]) -> list[float]:
    """Milliseconds of a step at some positions."""
    dalle = decoder.dalle
    text, times = torch.randint(1, 8192, (1, dalle.config.text_len)), []
    for position in positions:
        state, _ = decoder.start(text, candidates, torch.randint(0, 1024, (1, position)))
        token = torch.randint(0, 1024, (candidates, 1))
        times.append(best(lambda: decoder.read(state, token, position), 15) * 1e3)  # noqa: B023
    return times


def growth(path: Path) -> None:
    """Cost of a step against position, candidates and grid, for full and axial attention; a picture and its numbers."""
    import matplotlib

    from dalle_pytorch.generation.decoder import Decoder

    matplotlib.use("Agg")
    from matplotlib import pyplot

    small = {**SIZES, "depth": 4}
    patterns = {"full": ("full",), "axial": ("axial_row", "axial_col", "axial_row", "axial_row")}
    figure, axes = pyplot.subplots(1, 3, figsize=(14, 4))
    print("\n| pattern | image tokens | ms a step at 1/8, 1/2 and the end of the image, 8 candidates |\n|---|---|---|")
    for grid in (16, 32, 64):
        for name, mixed in patterns.items():
            decoder = Decoder(model({**small, "grid": grid}, mixed))
            positions = [grid * grid // 8, grid * grid // 2, grid * grid - 2]
            times = step_times(decoder, 8, positions)
            print(f"| {name} | {grid * grid} | {times[0]:.2f}, {times[1]:.2f}, {times[2]:.2f} |", flush=True)
            style = "-" if name == "full" else "--"
            axes[0].plot(positions, times, marker="o", label=f"{name}, {grid * grid}", linestyle=style)
            axes[2].plot(grid * grid, times[2], "o" if name == "full" else "x", color="C0" if name == "full" else "C1")
    print("\n| pattern | candidates | ms a step for each, at position 128 of 256 |\n|---|---|---|")
    for name, mixed in patterns.items():
        decoder = Decoder(model(small, mixed))
        counts = [1, 4, 16, 64, 256]
        each = [step_times(decoder, count, [128])[0] / count for count in counts]
        print(f"| {name} | {', '.join(map(str, counts))} | {', '.join(f'{value:.3f}' for value in each)} |", flush=True)
        axes[1].loglog(counts, each, "o-", label=name)
    titles = (
        "8 candidates, by position",
        "by candidates, position 128 of 256",
        "at the image's end, by image tokens",
    )
    labels = (("position", "ms a step"), ("candidates", "ms a step for each"), ("image tokens", "ms a step"))
    for axis, title, (x, y) in zip(axes, titles, labels, strict=True):
        axis.set(title=title, xlabel=x, ylabel=y)
    axes[0].legend(fontsize=7)
    axes[1].legend()
    axes[2].plot([], [], "o", color="C0", label="full")
    axes[2].plot([], [], "x", color="C1", label="axial")
    axes[2].legend()
    figure.suptitle("Cost of drawing one token (dim 256, 4 layers)")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    print(f"\n{path}")


def main() -> None:
    """Run the parts that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", help="interpreter of an environment with dalle-pytorch==1.6.6")
    parser.add_argument("--old", type=Path, help="checkout of this repository to compare with")
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--plot", type=Path, default=Path("sampling_growth.png"))
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    settings = parser.parse_args()
    torch.set_num_threads(settings.threads)
    if settings.measure:
        print(json.dumps(measure(*json.loads(settings.measure))))
        return
    limits = ceilings()
    print(
        f"torch {torch.__version__}, {settings.threads} threads; ceilings: read {limits['read']:.0f} GB/s, products "
        f"{limits['fp32']:.0f} GFLOP/s in fp32, {limits['bf16']:.0f} in bf16"
    )
    if "sizes" in settings.parts:
        sizes(settings, limits)
    if "emoji" in settings.parts:
        emoji(settings)
    if "large" in settings.parts:
        large(settings, limits)
    if "kernels" in settings.parts:
        kernels()
    if "growth" in settings.parts:
        growth(settings.plot)


if __name__ == "__main__":
    main()
