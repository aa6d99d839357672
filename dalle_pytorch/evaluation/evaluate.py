"""Judges a checkpoint of any kind and writes ``metrics.json``, ``report.html`` and its galleries."""

from dataclasses import asdict
from pathlib import Path

import torch

from dalle_pytorch.checkpoints import checkpoint, loading
from dalle_pytorch.checkpoints.checkpoint import role, weights_sha256
from dalle_pytorch.data.shards import ShardDataset
from dalle_pytorch.data.splits import open_split
from dalle_pytorch.data.urls import is_stream
from dalle_pytorch.distributed import Processes
from dalle_pytorch.errors import UserError
from dalle_pytorch.evaluation import page, report
from dalle_pytorch.evaluation.config import EvaluateConfig, check_files
from dalle_pytorch.evaluation.judges import JUDGES, protocol
from dalle_pytorch.evaluation.measure import Measure
from dalle_pytorch.evaluation.shares import shared_by
from dalle_pytorch.files import ensure_empty


def held_out(config: EvaluateConfig) -> ShardDataset:
    """The split to judge on.

    Raises:
        FileNotFoundError: no such folder.
        UserError: a stream, a split that is not there, or fewer than two images of it.
    """
    if is_stream(config.data.path):
        raise UserError(f"data.path={config.data.path} is a stream, which has no end: a folder of shards is needed")
    shards = open_split(config.data.path, config.split, "data.path")
    if len(shards) < 2:
        raise UserError(
            f"split={config.split} of {config.data.path} has {len(shards)} of the two images that are needed at least: "
            "give split=train+val, or pack the data again with a larger val_fraction="
        )
    return shards


def evaluate(config: EvaluateConfig, processes: Processes) -> report.Record | None:
    """Judge in shares; the first process writes the files into ``config.out``.

    Returns:
        What was measured; None at the other processes.

    Raises:
        FileExistsError: ``out`` holds files.
        UserError: what cannot be read or judged; names it.
    """
    folder = Path(config.out)
    if processes.rank == 0:
        ensure_empty(folder)
    shards = held_out(config)
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
    if processes.rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
    with shared_by(processes):
        found = JUDGES[kind](model, config, shards, measure)
    if processes.rank > 0:
        return None
    record = report.Record(
        report.Subject(kind=head["kind"], weights_sha256=weights_sha256(model), step=step), found.metrics
    )
    report.write(record, folder / "metrics.json")
    title = f"{head['kind']} on {shards.index['name']}, split {shards.split}"
    page.write(record, found.sections, folder / "report.html", title=title)
    page.write_galleries(found.sections, folder / "pictures", {**asdict(record.subject), **page.common(record)})
    return record
