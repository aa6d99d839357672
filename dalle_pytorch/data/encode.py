"""Image shards to token shards: every picture through the image tokenizer once, in parallel, restartable.

Each image shard becomes one token shard. A finished one has a record beside it, so that the same call after a kill goes
on with the next; the index is written, and the records removed, when all are there.
"""

import io
import itertools
import json
import logging
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import closing
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm
from webdataset import TarWriter

from dalle_pytorch.checkpoints.checkpoint import describe_tokenizer
from dalle_pytorch.checkpoints.loading import load_vae
from dalle_pytorch.data.bad_samples import BadSamples
from dalle_pytorch.data.config import AugmentationConfig, DataConfig
from dalle_pytorch.data.index import INDEX_NAME, INDEX_VERSION, SKIPPED_NAME, read_index
from dalle_pytorch.data.packing import Skipped
from dalle_pytorch.data.samples import ENCODE_BATCH, Pictures, check_size
from dalle_pytorch.data.shards import ShardDataset
from dalle_pytorch.data.tar import GZIP_SUFFIX
from dalle_pytorch.data.tokens import TokenShards, smallest_type
from dalle_pytorch.errors import UserError, at_least_one
from dalle_pytorch.files import atomic, ensure_empty, sha256_file, write_json
from dalle_pytorch.models.image_tokenizer import ImageTokenizer

log = logging.getLogger(__name__)

SETTINGS_NAME = "encoding.json"  # there while an encoding is unfinished
FREE = ("vae", "path", "max_bad_fraction")  # may differ when an encoding goes on: hashes say what the first two hold


@dataclass(kw_only=True)
class EncodeConfig(AugmentationConfig):
    """How pictures become tokens."""

    vae: str
    """Checkpoint of the image tokenizer, or of a DALLE that carries it."""
    path: str
    """Folder of image shards."""
    crops: int = 1
    """Variants of each training picture, every one augmented in its own way."""
    train_splits: list[str] = field(default_factory=lambda: ["train"])
    """Splits whose pictures are augmented; of the others each picture is taken once, as it is."""
    seed: int = 0
    """Of the augmentation."""
    max_bad_fraction: float = 0.01
    """Pictures that cannot be read are named and left out, up to this fraction of a split; more are an error."""

    def __post_init__(self) -> None:
        """Validate.

        Raises:
            ValueError: a field is out of range; names it.
        """
        super().__post_init__()
        at_least_one(self, "crops")
        if self.crops > 1 and not self.augments:
            raise UserError(f"crops={self.crops} without jitter, crop or flip would be equal: set one of them")

    def data(self) -> DataConfig:
        """The same as the training's settings; what cannot be read is counted at the end."""
        augmentation = {item.name: getattr(self, item.name) for item in fields(AugmentationConfig)}
        return DataConfig(path=self.path, max_bad_fraction=1.0, **augmentation)


@dataclass(frozen=True)
class Job:
    """One image shard."""

    split: str
    file: str
    start: int
    """Its first sample in the split."""
    count: int

    @property
    def out(self) -> str:
        """Name of its token shard."""
        return self.file.removesuffix(GZIP_SUFFIX)


def encode_folder(
    config: EncodeConfig, out: str | Path, *, workers: int | None = None, device: str = "cpu"
) -> dict[str, Any]:
    """Write the token shards of a folder of image shards.

    The bytes are a function of pictures and settings, whatever the number of workers and however often the work was
    interrupted.

    Args:
        config: what to encode and how.
        out: folder to write; absent, empty, or left by an interrupted call with the same settings.
        workers: processes; None = one for each core (on GPUs: for each GPU).
        device: "cpu" or "cuda"; on several GPUs each worker takes the next one.

    Returns:
        The index.

    Raises:
        FileExistsError: the folder holds something else, or was encoded with other settings.
        ValueError: too many pictures cannot be read, or they do not fit the image tokenizer.
    """
    if device not in ("cpu", "cuda") or (device == "cuda" and not torch.cuda.is_available()):
        raise UserError(f"device={device} is not there; use cpu, or cuda on a machine with a GPU")
    out, vae = Path(out), load_vae(config.vae)
    source = read_index(config.path)
    settings = {**asdict(config), "tokenizer": describe_tokenizer(vae), "pictures": source["shards"]}
    check_size(config.path, source["image_size"], vae.image_size, config)
    if unknown := set(config.train_splits) - set(source["splits"]):
        raise UserError(f"train_splits {sorted(unknown)} are not in {config.path}: it has {list(source['splits'])}")
    _begin(out, settings)
    jobs = list(_jobs(source))
    waiting = [job for job in jobs if not _record(out, job).is_file()]
    if len(waiting) < len(jobs):
        log.info("%s: %d of %d shards are there already", out, len(jobs) - len(waiting), len(jobs))
    _run(waiting, config, out, workers, device, vae)
    return _finish(out, source, jobs, config, settings)


def _begin(out: Path, settings: dict[str, Any]) -> None:
    """Take the folder, or take up an interrupted encoding in it."""
    path = out / SETTINGS_NAME
    if path.is_file():
        before = json.loads(path.read_text(encoding="utf-8"))
        now = json.loads(json.dumps(settings))
        if different := [key for key in now if key not in FREE and before.get(key) != now[key]]:
            raise FileExistsError(
                f"{out} holds an interrupted encoding with another {', '.join(different)}: "
                "repeat it with the same settings, or choose another out="
            )
    else:
        ensure_empty(out, ignore=lambda path: path.suffix == ".tmp")
        out.mkdir(parents=True, exist_ok=True)
        write_json(path, settings)


def _jobs(source: dict[str, Any]) -> Iterator[Job]:
    for split in source["splits"]:
        start = 0
        for shard in source["shards"]:
            if shard["split"] == split:
                yield Job(split, shard["file"], start, shard["count"])
                start += shard["count"]


def _run(
    jobs: list[Job], config: EncodeConfig, out: Path, workers: int | None, device: str, vae: ImageTokenizer
) -> None:
    """Encode, in this process if one is enough."""
    cores = torch.cuda.device_count() if device == "cuda" else len(os.sched_getaffinity(0))
    workers = min(workers or cores, len(jobs))
    with tqdm(total=sum(job.count for job in jobs), desc="pictures", unit="picture") as bar:
        if workers <= 1:
            vae.to(device)
            for job in jobs:
                encode_shard(job, config, out, vae, device)
                bar.update(job.count)
            return
        context = multiprocessing.get_context("spawn")
        places = context.Queue()
        for worker in range(workers):
            places.put(f"cuda:{worker % cores}" if device == "cuda" else device)
        # Torch's own threads would only stand in each other's way.
        settings = (config, places, max(1, cores // workers), os.getpid())
        pool = ProcessPoolExecutor(workers, context, _start_worker, settings)
        try:
            futures = {pool.submit(_encode_in_worker, job, out): job for job in jobs}
            for future in as_completed(futures):
                future.result()
                bar.update(futures[future].count)
        finally:
            pool.shutdown(cancel_futures=True)


_worker: dict[str, Any] = {}
"""What a worker process has: settings, image tokenizer, device."""


def _start_worker(config: EncodeConfig, places: Any, threads: int, parent: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the first process's
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    torch.set_num_threads(threads)
    device = places.get()
    _worker.update(config=config, device=device, vae=load_vae(config.vae, map_location=device))


def _end_with(parent: int) -> None:
    """End when the first process is killed: otherwise this one would go on, beside the next call's."""
    while os.getppid() == parent:
        time.sleep(0.2)
    os._exit(1)


def _encode_in_worker(job: Job, out: Path) -> None:
    encode_shard(job, _worker["config"], out, _worker["vae"], _worker["device"])


@torch.inference_mode()
def encode_shard(job: Job, config: EncodeConfig, out: Path, vae: ImageTokenizer, device: str) -> None:
    """Write one token shard and then its record; a shard without a record does not count."""
    train = job.split in config.train_splits
    pictures = Pictures(
        ShardDataset(config.path, job.split, only=job.file), config.data(),
        image_size=vae.image_size, train=train, seed=config.seed, start=job.start,
    )  # fmt: skip
    variants, kind = config.crops if train else 1, smallest_type(vae.codebook_size)
    keys = pictures.shards.keys()
    with (
        atomic(out / job.out) as temporary,
        closing(TarWriter(str(temporary), user="", group="", mtime=0, encoder=False)) as tar,
    ):
        for first in range(0, job.count, ENCODE_BATCH):
            indices = range(first, min(first + ENCODE_BATCH, job.count))
            rows = [vae.encode(pictures.images(indices, variant).to(device)).cpu() for variant in range(variants)]
            for index, tokens in zip(indices, torch.stack(rows, dim=1).numpy(), strict=True):
                if index not in pictures.unreadable:
                    tar.write(_sample(keys[index], tokens.astype(kind), pictures.shards.meta(index)))
    bad = sorted(Skipped(keys[index], reason) for index, reason in pictures.unreadable.items())
    entry = {"file": job.out, "split": job.split, "count": job.count - len(bad), "sha256": sha256_file(out / job.out)}
    write_json(_record(out, job), {**entry, "skipped": [item._asdict() for item in bad]})


def _sample(key: str, tokens: np.ndarray, meta: dict[str, Any]) -> dict[str, Any]:
    data = io.BytesIO()
    np.save(data, tokens)
    text = json.dumps(meta, ensure_ascii=False, sort_keys=True)
    return {"__key__": key, "npy": data.getvalue(), "json": text.encode()}


def _record(out: Path, job: Job) -> Path:
    return out / f"{job.out}.json"


def _finish(
    out: Path, source: dict[str, Any], jobs: list[Job], config: EncodeConfig, settings: dict[str, Any]
) -> dict[str, Any]:
    """Write the index and what was left out; remove the records."""
    records = [json.loads(_record(out, job).read_text(encoding="utf-8")) for job in jobs]
    skipped = {split: [] for split in source["splits"]}
    for record in records:
        skipped[record["split"]] += record.pop("skipped")
    splits = {split: sum(r["count"] for r in records if r["split"] == split) for split in source["splits"]}
    for split in splits:
        bad = BadSamples(f"{split!r} of {config.path}", config.max_bad_fraction, "max_bad_fraction")
        for item in skipped[split]:
            bad.add("unreadable", f"{item['path']}: {item['reason']}")
        bad.check(source["splits"][split])
        if skipped[split]:
            log.warning("%s: %d pictures left out, see %s", split, len(skipped[split]), SKIPPED_NAME)
    names = ("crops", "train_splits", "resize", "jitter", "crop", "flip", "seed")
    index = {
        "kind": TokenShards.KIND, "version": INDEX_VERSION, "name": source["name"],
        "image_size": settings["tokenizer"]["image_size"], "splits": splits, "shards": records,
        "source": source["source"], "tokenizer": settings["tokenizer"],
        "encoding": {name: settings[name] for name in names},
        "dtype": smallest_type(settings["tokenizer"]["codebook_size"]).name,
    }  # fmt: skip
    write_json(out / SKIPPED_NAME, list(itertools.chain.from_iterable(skipped.values())))
    write_json(out / INDEX_NAME, index)
    # the settings first: without them, and with an index, the folder is finished
    for path in itertools.chain([out / SETTINGS_NAME], (_record(out, job) for job in jobs)):
        path.unlink()
    return index
