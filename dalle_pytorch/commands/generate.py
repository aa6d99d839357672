"""Prompts to ranked images: ``generate.py prompt="a red apple" weights=... clip=... num_candidates=64 num_keep=8``.

Without ``weights=`` it draws with those that come along, ``weights=emoji clip=emoji``, in the settings of their card.
"""

import contextlib
import secrets
import sys
from pathlib import Path

from dalle_pytorch.checkpoints.loading import load, load_scorer
from dalle_pytorch.compat.flags import FILTER_THRES, GENERATE
from dalle_pytorch.config import RENAMED, WRONG_VALUES, entry
from dalle_pytorch.distributed import Processes
from dalle_pytorch.errors import exit_code, stopped_by_signals
from dalle_pytorch.files import ensure_empty
from dalle_pytorch.generation.config import GenerateConfig
from dalle_pytorch.generation.draw import draw, groups, merge, to_complete
from dalle_pytorch.generation.generator import Generator
from dalle_pytorch.generation.results import Results, file_stem

WRONG_VALUES["sampling.top_k"] = RENAMED["sampling.filter_thres"] = FILTER_THRES


@entry("generate", GenerateConfig, flags=GENERATE)
def main(config: GenerateConfig) -> None:
    """Sample, rank, write PNGs, ``grid.png`` and ``ranking.json``; signals to a lone process keep what is finished."""
    prompts, processes, stopped = config.prompts(), Processes(), None
    try:
        if config.out is not None and processes.rank == 0:
            ensure_empty(Path(config.out))
        if config.wants_random_seed():
            (config.seed,) = processes.map(lambda _: secrets.randbelow(1 << 31), [None])
            if processes.rank == 0:
                print(f"seed={config.seed}", flush=True)
        device = processes.device(config.device)
        dalle = load(config.weights, kind="dalle").to(device)
        clips = [load_scorer(name, device) for name in config.clips()]
        generator = Generator(
            dalle, clips, batch_size=config.batch_size, memory_gb=config.memory_gb, precision=config.precision,
            compiled=config.compile,
        )  # fmt: skip
        generator.check(prompts, config.sampling, truncate=config.truncate)
        given = to_complete(config, generator)
        with stopped_by_signals(), Results(config) if processes.rank == 0 else contextlib.nullcontext() as results:
            for numbers in groups(generator, config, processes, len(prompts)):
                drawn = draw(generator, prompts, numbers, config, given, processes)
                frames = {number: film.frames for number, film in drawn.films.items() if film.frames}
                shares, stopped = processes.gather((drawn.finished, frames)), drawn.stopped
                for number in numbers:
                    result = merge([finished.get(number) for finished, _ in shares], config)
                    if results is not None and result is not None:
                        prompt, film = prompts[number], drawn.films[number]
                        film.frames = next((shown[number] for _, shown in shares if number in shown), [])
                        results.add(file_stem(number, prompt), prompt, result, film)
                if stopped is not None:
                    break
    finally:
        processes.close()
    if results is None:
        return
    if results.report:
        print(results.summary())
    if stopped is not None:
        kept = "this is what was finished until then" if results.report else "nothing is written"
        print(f"cancelled: {kept}", file=sys.stderr)
        sys.exit(exit_code(stopped))


if __name__ == "__main__":
    main()
