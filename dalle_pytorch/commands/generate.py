"""Prompts to ranked images: ``generate.py prompt="a red apple" weights=... clip=... num_candidates=64 num_keep=8``.

Without ``weights=`` it draws with those that come along, ``weights=emoji clip=emoji``, in the settings of their card.
"""

import sys

from dalle_pytorch.checkpoints.loading import load, load_scorer
from dalle_pytorch.config import entry
from dalle_pytorch.distributed import Processes
from dalle_pytorch.generation.config import GenerateConfig
from dalle_pytorch.generation.draw import draw, merge, to_complete
from dalle_pytorch.generation.generator import Generator
from dalle_pytorch.generation.results import Results, file_stem

CANCELLED = 130
"""Exit code after Ctrl-C, as of a shell."""


@entry("generate", GenerateConfig)
def main(config: GenerateConfig) -> None:
    """Sample, rank, write PNGs, ``grid.png`` and ``ranking.json``; Ctrl-C of a lone process keeps what is finished."""
    prompts, processes, cancelled = config.prompts(), Processes(), False
    try:
        device = processes.device(config.device)
        dalle = load(config.weights, kind="dalle").to(device)
        clips = [load_scorer(name, device) for name in config.clips()]
        generator = Generator(
            dalle, clips, batch_size=config.batch_size, memory_gb=config.memory_gb, precision=config.precision,
            compiled=config.compile,
        )  # fmt: skip
        generator.check(prompts, config.sampling, truncate=config.truncate)
        given = to_complete(config, generator)
        results = Results(config) if processes.rank == 0 else None
        for number, prompt in enumerate(prompts):
            share, film, cancelled = draw(generator, prompt, config, given, processes)
            result = merge(processes.gather(share), config)
            if results is not None and result is not None:
                results.add(file_stem(number, prompt), prompt, result, film)
            if cancelled:
                break
    finally:
        processes.close()
    if results is None:
        return
    if done := results.finish():
        print(done)
    if cancelled:
        print("cancelled:", "this is what was finished until then" if done else "nothing is written", file=sys.stderr)
        sys.exit(CANCELLED)


if __name__ == "__main__":
    main()
