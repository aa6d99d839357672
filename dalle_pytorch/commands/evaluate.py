"""Judge a checkpoint: ``evaluate.py checkpoint=... data=emoji split=test_concept``, of any kind.

Writes ``metrics.json``, ``report.html`` and the galleries of that page as ``pictures/*.png``. ``evaluate.py compare
A/metrics.json B/metrics.json`` sets two beside each other, and refuses numbers that were measured in two ways.
"""

import sys
from dataclasses import asdict
from pathlib import Path

import torch

from dalle_pytorch.checkpoints import checkpoint, loading
from dalle_pytorch.checkpoints.checkpoint import role, weights_sha256
from dalle_pytorch.config import entry
from dalle_pytorch.data.datamodule import open_split
from dalle_pytorch.data.urls import is_stream
from dalle_pytorch.distributed import Processes
from dalle_pytorch.errors import UserError
from dalle_pytorch.evaluation import compare, page, report
from dalle_pytorch.evaluation.config import EvaluateConfig, check_files
from dalle_pytorch.evaluation.judges import JUDGES, protocol
from dalle_pytorch.evaluation.measure import Measure
from dalle_pytorch.evaluation.shares import shared_by
from dalle_pytorch.generation.results import new_folder


def judge(config: EvaluateConfig, processes: Processes) -> None:
    """Judge in shares; the first process writes the files and prints the numbers."""
    if is_stream(config.data.path):
        raise UserError(f"data.path={config.data.path} is a stream, which has no end: a folder of shards is needed")
    shards = open_split(config.data.path, config.split, "data.path")
    torch.set_num_threads(config.threads)
    step = loading.read_header(config.checkpoint)["training"].get("step")
    model = loading.load(config.checkpoint).to(processes.device(config.device))
    head = checkpoint.header(model)
    kind = role(head)
    check_files(config, kind)
    owner = model.vae if kind == "dalle" else model.config if kind in ("clip", "probe") else model
    measure = Measure(
        protocol(shards, config, owner.image_size), seed=config.seed, rounds=config.rounds, halves=config.halves
    )
    folder = new_folder(config.out) if processes.rank == 0 else Path(config.out)
    with shared_by(processes):
        found = JUDGES[kind](model, config, shards, measure)
    if processes.rank > 0:
        return
    record = report.Record(
        report.Subject(kind=head["kind"], weights_sha256=weights_sha256(model), step=step), found.metrics
    )
    report.write(record, folder / "metrics.json")
    title = f"{head['kind']} on {shards.index['name']}, split {shards.split}"
    page.write(record, found.sections, folder / "report.html", title=title)
    page.write_galleries(found.sections, folder / "pictures", {**asdict(record.subject), **page.common(record)})
    for name, metric in found.metrics.items():
        print(f"{name:32} {compare.with_interval(metric)}")
    print(", ".join(str(path) for path in sorted(folder.iterdir())))


@entry("evaluate", EvaluateConfig)
def main(config: EvaluateConfig) -> None:
    """Judge, write the files, print the numbers; with siblings where torchrun started this."""
    processes = Processes()
    try:
        judge(config, processes)
    finally:
        processes.close()


def run() -> None:
    """``compare A B``, or an evaluation."""
    if sys.argv[1:2] == ["compare"]:
        sys.exit(compare.main(sys.argv[2:]))
    main()


if __name__ == "__main__":
    run()
