"""Runs the arms of one replication and writes its table, numbers and plot.

Arms that ended before are not run again, so that an interrupted experiment goes on where it was.
"""

import concurrent.futures
import json
import multiprocessing
from collections.abc import Mapping
from pathlib import Path

from tqdm import tqdm

from dalle_pytorch.config import CONFIGS
from dalle_pytorch.files import atomic
from replication import plot, summary
from replication.arms import Job, Result, function, perform, read, slug, threads_of
from replication.experiment import ReplicateConfig

Results = Mapping[str, Mapping[int, Result]]
"""arm -> seed -> result."""


def jobs_of(config: ReplicateConfig) -> dict[tuple[str, int], Job]:
    """All arms with all seeds, seed by seed, so that what is finished early covers all arms."""
    out = Path(config.out).absolute()
    return {
        (arm, seed): Job(
            config.run, (*config.base, *settings), seed, out / config.name / slug(arm) / f"seed_{seed}",
            out / "shared", threads_of(config.jobs),
        )
        for seed in config.seeds
        for arm, settings in config.arms.items()
    }  # fmt: skip


def run_all(config: ReplicateConfig) -> Results:
    """Run what is not there yet, ``config.jobs`` at a time, each in a process of its own.

    Raises:
        UserError: an unknown run, or results of other settings.
        ArmError: an arm failed; the others that ran beside it are kept.
    """
    jobs = jobs_of(config)
    found: dict[str, dict[int, Result]] = {arm: {} for arm in config.arms}
    for arm, seed in [place for place, job in jobs.items() if (job.folder / "result.json").is_file()]:
        found[arm][seed] = read(jobs.pop((arm, seed)))
    prepare = function(config.run, "prepare")
    if jobs and prepare is not None:
        prepare(next(iter(jobs.values())).shared, config.seeds, config.jobs)
    context = multiprocessing.get_context("spawn")
    with (
        concurrent.futures.ProcessPoolExecutor(config.jobs, context, max_tasks_per_child=1) as pool,
        tqdm(total=len(jobs), desc=config.name, unit="arm") as bar,
    ):
        waiting = {pool.submit(perform, job): place for place, job in jobs.items()}
        try:
            for done in concurrent.futures.as_completed(waiting):
                arm, seed = waiting[done]
                found[arm][seed] = done.result()
                bar.update()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return {arm: dict(sorted(seeds.items())) for arm, seeds in found.items()}


def write(config: ReplicateConfig, results: Results) -> Path:
    """``table.md``, ``numbers.json`` and, where matplotlib is installed, ``plot.png``; returns the folder."""
    folder = Path(config.out) / config.name
    values = {arm: {seed: result.numbers for seed, result in seeds.items()} for arm, seeds in results.items()}
    verdicts = [verdict for text in config.expect for verdict in summary.judge(text, values)]
    lines = [f"{config.row} {config.claim} ({config.source})", "", summary.table(values, config.shown, config.axis), ""]
    lines += [f"- {line}" for line in summary.verdict_lines(verdicts)]
    if verdicts:
        lines += ["", f"At this scale: {summary.overall(verdicts)}."]
    numbers = {arm: {str(seed): dict(each) for seed, each in seeds.items()} for arm, seeds in values.items()}
    content = {"row": config.row, "claim": config.claim, "expect": list(config.expect), "numbers": numbers}
    folders = [folder] if config.publish is None else [folder, Path(config.publish)]
    for target, prefix in zip(folders, ("", f"{config.name}."), strict=False):
        target.mkdir(parents=True, exist_ok=True)
        with atomic(target / f"{prefix}table.md") as temporary:
            temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
        with atomic(target / f"{prefix}numbers.json") as temporary:
            temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        plot.draw(config, results, target / f"{prefix}plot.png")
    return folder


def names() -> list[str]:
    """The bundled experiments."""
    return sorted(path.stem for path in (CONFIGS / "replicate/experiment").glob("*.yaml"))
