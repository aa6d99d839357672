"""512 candidates of trained models: where the seconds go, and what faster arithmetic does to the pictures.

    python benchmarks/candidates.py --dalle runs/.../dalle.safetensors --clip runs/.../clip.safetensors

Prints Markdown. Times are of one run, prompt by prompt; quality is a CLIP score and agreement with fp32.
"""

import argparse
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from dalle_pytorch import Generator, SamplingConfig, load
from dalle_pytorch.generation.decoder import Decoder
from dalle_pytorch.generation.rerank import rank, score
from dalle_pytorch.models.clip import CLIP
from dalle_pytorch.models.dalle import DALLE

MODES = [("fp32", False), ("bf16", False), ("int8", False), ("int8", True)]
KEPT = 8


class Clock:
    """Seconds by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Add the time of a block."""
        start = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0) + time.perf_counter() - start


def timed_decoder(decoder: Decoder, clock: Clock) -> None:
    """Make a decoder's calls add to the clock."""
    start, read = decoder.start, decoder.read

    def timed_start(*given, **more):
        with clock("prefill"):
            return start(*given, **more)

    def timed_read(*given):
        with clock("steps"):
            return read(*given)

    decoder.start, decoder.read = timed_start, timed_read


def where_time_goes(dalle: DALLE, clip: CLIP, prompt: str, count: int, sampling: SamplingConfig) -> None:
    """Seconds of each part, for every mode, and the scores of what came out."""
    print(f"\n{count} candidates of {prompt!r}, {sampling}\n")
    print(
        "| mode | seconds | prefill | steps | drawing | decode | rank | score of all | of the best 8 | same pictures |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    exact = None
    for precision, compiled in MODES:
        generator = Generator(dalle, clip, precision=precision, compiled=compiled)
        warm = range(min(count, generator.micro_batch(sampling)))
        generator.candidates(prompt, warm, seed=1, sampling=sampling)  # and translate: a micro-batch's size counts
        clock = Clock()
        timed_decoder(generator.decoder, clock)
        inner = generator.decode

        def decode(tokens, inner=inner, clock=clock):
            with clock("decode"):
                return inner(tokens)

        generator.decode = decode
        start = time.perf_counter()
        candidates = generator.candidates(prompt, range(count), sampling=sampling)
        with clock("rank"):
            scores = score(candidates.images, prompt, [clip])
            ranking = rank(scores, candidates.images, min(KEPT, count))
        total = time.perf_counter() - start
        exact = candidates.image_tokens if exact is None else exact
        parts = clock.seconds
        drawing = total - sum(parts.values())
        same = (candidates.image_tokens == exact).all(dim=1).float().mean()
        best = ranking.scores.mean() if ranking.scores is not None else 0.0
        name = precision + (", compiled" if compiled else "")
        each = [parts["prefill"], parts["steps"], drawing, parts["decode"], parts["rank"]]
        seconds = " | ".join(f"{value:.2f}" for value in each)
        print(f"| {name} | {total:.1f} | {seconds} | {scores.mean():.4f} | {best:.4f} | {same:.0%} |", flush=True)


def agreement(dalle: DALLE, prompt: str, sampling: SamplingConfig) -> None:
    """Logits of each precision against fp32's, along 64 pictures that fp32 drew."""
    tokens = Generator(dalle).candidates(prompt, range(64), sampling=sampling).image_tokens
    tokenizer = dalle.text_tokenizer
    assert tokenizer is not None
    text = tokenizer.tokenize(prompt, dalle.config.text_len)
    print("\n| mode | KL from fp32, nats/token | same likeliest token | error of logits |\n|---|---|---|---|")
    exact = None
    for precision, compiled in MODES:
        decoder = Decoder(dalle, precision=precision, compiled=compiled)
        state, logits = decoder.start(text, len(tokens))
        rows = [logits]
        for position in range(dalle.num_image_tokens - 1):
            rows.append(decoder.read(state, tokens[:, position, None], position)[:, 0])
        found = torch.stack(rows, dim=1).float()
        exact = found if exact is None else exact
        log_p, log_q = exact.log_softmax(-1), found.log_softmax(-1)
        divergence = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
        likeliest = (exact.argmax(-1) == found.argmax(-1)).float().mean()
        off = (found - exact).std() / exact.std()
        name = precision + (", compiled" if compiled else "")
        print(f"| {name} | {divergence:.5f} | {likeliest:.1%} | {off:.2%} |", flush=True)


def batches(dalle: DALLE, prompt: str, count: int, sampling: SamplingConfig) -> None:
    """Share of candidates that come out the same in micro-batches of another size (rounding may tip a draw)."""
    print("\n| micro-batch | candidates equal to those of 256 |\n|---|---|")
    reference = Generator(dalle, batch_size=256).candidates(prompt, range(count), sampling=sampling).image_tokens
    for size in (1, 7, 64):
        some = range(count if size > 1 else min(count, 64))
        drawn = Generator(dalle, batch_size=size).candidates(prompt, some, sampling=sampling).image_tokens
        same = (drawn == reference[: len(some)]).all(dim=1)
        print(f"| {size} | {int(same.sum())} of {len(some)} |", flush=True)


def main() -> None:
    """Run all three."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dalle", required=True)
    parser.add_argument("--clip", required=True)
    parser.add_argument("--prompt", default="a grinning cat")
    parser.add_argument("--candidates", type=int, default=512)
    settings = parser.parse_args()
    dalle, clip = load(settings.dalle, kind="dalle"), load(settings.clip, kind="clip")
    sampling = SamplingConfig(temperature=0.8, top_k=64, cfg_scale=3.0)  # as make demo draws
    where_time_goes(dalle, clip, settings.prompt, settings.candidates, sampling)
    agreement(dalle, settings.prompt, sampling)
    batches(dalle, settings.prompt, settings.candidates, sampling)


if __name__ == "__main__":
    main()
