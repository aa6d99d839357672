"""How fast image tokens are drawn: against DALLE-pytorch 1.6.6, against this machine's ceilings, and as sizes grow.

    python benchmarks/sampling.py --peer peer/bin/python     # peer.py says how to make such an interpreter
    python benchmarks/sampling.py --parts ours large kernels growth  # without it

Ratios matter, not times. Everything is measured in one run, the best of a few repeats, on ``--threads`` threads. Our
figures start from the prompt's tokens and include prefill and drawing, as the peer's do. Prints Markdown.
"""

import argparse
import json
import os
import subprocess
from pathlib import Path

import torch
import torch.nn.functional as F
from timing import best

from dalle_pytorch import DALLE, DALLEConfig, DiscreteVAE, DiscreteVAEConfig, SamplingConfig
from dalle_pytorch.generation.backend import CastLinear
from dalle_pytorch.generation.cache import BLOCK, attend_one, mix_blocks
from dalle_pytorch.generation.decoder import Decoder
from dalle_pytorch.generation.strategies import generate_image_tokens

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
MODES = [("fp32", False), ("bf16", False), ("int8", False), ("int8", True)]
PARTS = ["ours", "large", "kernels", "growth"]
SAMPLING = SamplingConfig(top_k=102)  # the peer's filter_thres=0.9 of 1,024 codes


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


def model(sizes: dict[str, int], patterns: tuple[str, ...] = ("full",)) -> DALLE:
    """A random DALLE."""
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
    return DALLE(config, vae=DiscreteVAE(vae)).eval()


def read_weights(dalle: DALLE) -> int:
    """Number of weights that a step reads."""
    return sum(p.numel() for part in (dalle.transformer, dalle.image_head) for p in part.parameters())


def ours(sizes: dict[str, int], limits: dict[str, float], peer: dict[str, float] | None) -> None:
    """Tokens a second of every mode, for one candidate, eight prompts and 512 candidates of one prompt."""
    torch.manual_seed(0)
    dalle = model(sizes)
    weights, tokens = read_weights(dalle), sizes["grid"] ** 2
    print(f"\n{weights / 1e6:.1f} M weights a token, {tokens} image tokens, {sizes['text']} text tokens\n")
    print(
        "| mode | prompts x candidates | tokens/s | x peer | reads / ceiling | products / ceiling | cache, prompt MB |"
    )
    print("|---|---|---|---|---|---|---|")
    for precision, compiled in MODES:
        decoder = Decoder(dalle, precision=precision, compiled=compiled)
        width = {"fp32": 4, "bf16": 2, "int8": 1}[precision]
        for prompts, candidates, together in ((1, 1, 1), (8, 1, 1), (1, 512, 256)):
            text = torch.randint(1, sizes["vocabulary"], (prompts, sizes["text"]))

            def draw(text=text, candidates=candidates, together=together, decoder=decoder) -> None:
                for _ in range(candidates // together):
                    generate_image_tokens(decoder, text, torch.rand(len(text) * together, tokens), SAMPLING)

            speed = prompts * candidates * tokens / best(draw, 3 if candidates == 1 else 1)
            state = decoder.start(text, together)[0]
            prompt = sum(view.cache.prompt.nbytes for view in state.views) / 1e6
            held = f"{state.bytes() / 1e6:.0f}, {prompt:.1f}" if prompt else f"{state.bytes() / 1e6:.0f}, in it"
            del state
            rows = prompts * together
            read = weights * width * speed / rows / 1e9 / limits["read"]
            products = 2 * weights * speed / 1e9 / limits["bf16" if precision == "bf16" else "fp32"]
            ratio = f"{speed / peer[str(min(rows, 8))]:.0f}" if peer else "-"
            share = "-" if precision == "int8" else f"{products:.0%}"
            name = precision + (", compiled" if compiled else "")
            print(
                f"| {name} | {prompts} x {candidates} | {speed:,.0f} | {ratio} | {read:.0%} | {share} | {held} |",
                flush=True,
            )


def large(limits: dict[str, float]) -> None:
    """A model of more than 100 M weights for one candidate: nothing but moving them counts."""
    print("\n| weights | mode | tokens/s | weights read, GB/s | of ceiling |\n|---|---|---|---|---|")
    dalle = model(LARGE)
    for precision in ("fp32", "bf16", "int8"):
        decoder, text = Decoder(dalle, precision=precision), torch.randint(1, 8192, (1, LARGE["text"]))
        width = {"fp32": 4, "bf16": 2, "int8": 1}[precision]
        speed = LARGE["grid"] ** 2 / best(
            lambda text=text, decoder=decoder: generate_image_tokens(decoder, text, torch.rand(1, 256), SAMPLING), 2
        )
        moved = read_weights(dalle) * width * speed / 1e9
        share = moved / limits["read"]
        print(
            f"| {read_weights(dalle) / 1e6:.0f} M | {precision} | {speed:.1f} | {moved:.1f} | {share:.0%} |", flush=True
        )


def kernels() -> None:
    """The choices that cache.py and linear.py rest on: packed weights, keys in blocks, plain products."""
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

    rows, slots, width = 256 * SIZES["heads"], SIZES["grid"] ** 2, SIZES["head_dim"]
    queries, prompt = torch.randn(rows, width), torch.randn(2, SIZES["heads"], 65, width)
    layouts = {size: [torch.randn(slots // size, 2, rows, size, width) for _ in range(8)] for size in (slots, BLOCK)}
    print(f"\n| keys seen | attention of 256 candidates, ms: side by side, blocks of {BLOCK} | ratio |\n|---|---|---|")
    for seen in (32, 64, 128, 192, 256):
        times = []
        for size, layers in layouts.items():
            with torch.inference_mode():
                used = -(-seen // size)
                run = lambda: [mix_blocks(queries, prompt, blocks[:used], seen) for blocks in layers]  # noqa: E731, B023
                times.append(best(run, 5) * 1e3)
        print(f"| {seen} | {times[0]:.1f}, {times[1]:.1f} | {times[0] / times[1]:.1f} |", flush=True)

    layers = [torch.randn(2, 32, 256, 64) for _ in range(48)]  # DALL·E mini's 16 heads, with guidance; beyond caches
    query = torch.randn(32, 1, 64)
    print("\n| keys seen | attention of one candidate, us: fused kernel, two products | ratio |\n|---|---|---|")
    for seen in (16, 64, 128, 192, 256):
        times = []
        for attend in (F.scaled_dot_product_attention, attend_one):
            with torch.inference_mode():
                run = lambda: [attend(query, *layer[:, :, :seen]) for layer in layers]  # noqa: E731, B023
                times.append(best(run, 20) / len(layers) * 1e6)
        print(f"| {seen} | {times[0]:.0f}, {times[1]:.0f} | {times[0] / times[1]:.1f} |", flush=True)


def step_times(decoder: Decoder, candidates: int, positions: list[int]) -> list[float]:
    """Milliseconds of a step at some positions."""
    dalle = decoder.dalle
    text, times = torch.randint(1, 8192, (1, dalle.config.text_len)), []
    for position in positions:
        state, _ = decoder.start(text, candidates, torch.randint(0, 1024, (1, position)))
        token = torch.randint(0, 1024, (candidates,))
        views = state.views

        def step(state=state, token=token, position=position, views=views) -> None:
            decoder.step(state, token)
            for view in views:  # stay where we are
                view.position = position

        times.append(best(step, 15) * 1e3)
    return times


def growth(path: Path) -> None:
    """Cost of a step against position, candidates and grid, for full and axial attention; a picture and its numbers."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    small = {**SIZES, "depth": 4}
    patterns = {"full": ("full",), "axial": ("axial_row", "axial_col", "axial_row", "axial_row")}
    figure, axes = pyplot.subplots(1, 3, figsize=(14, 4))
    print(
        "\n| pattern | image tokens | ms a step at 1/8, 1/2 and the end of the picture, 8 candidates |\n|---|---|---|"
    )
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
        "at the picture's end, by image tokens",
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
    parser.add_argument("--peer", help="interpreter with dalle-pytorch==1.6.6")
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--plot", type=Path, default=Path("sampling_growth.png"))
    settings = parser.parse_args()
    torch.set_num_threads(settings.threads)
    limits = ceilings()
    print(
        f"torch {torch.__version__}, {settings.threads} threads; ceilings: read {limits['read']:.0f} GB/s, products "
        f"{limits['fp32']:.0f} GFLOP/s in fp32, {limits['bf16']:.0f} in bf16"
    )
    peer = None
    if settings.peer:
        sizes = json.dumps({**SIZES, "threads": settings.threads})
        script = Path(__file__).with_name("peer_sampling.py")
        clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}  # would lead to our package
        done = subprocess.run(
            [settings.peer, str(script), sizes], check=True, stdout=subprocess.PIPE, text=True, env=clean
        )
        peer = json.loads(done.stdout.splitlines()[-1])
        print(f"DALLE-pytorch 1.6.6: {peer['1']:.1f} tokens/s for one picture, {peer['8']:.1f} for eight")
    if "ours" in settings.parts:
        ours(SIZES, limits, peer)
    if "large" in settings.parts:
        large(limits)
    if "kernels" in settings.parts:
        kernels()
    if "growth" in settings.parts:
        growth(settings.plot)


if __name__ == "__main__":
    main()
