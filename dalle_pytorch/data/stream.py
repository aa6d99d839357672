"""Training samples from remote tar shards, as they arrive: nothing is downloaded beforehand, and there is no end.

A process draws shards at random, again and again, and shuffles their samples in a buffer. What it draws is a
function of seed, process, worker and the epoch in which the run began or went on. How far it came is not kept: a stream
is not resumed exactly.
"""

import json
import logging
import random
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import PurePosixPath
from typing import Any, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from webdataset import DataPipeline, ResampledShards, SimpleShardList, batched, shuffle
from webdataset.gopen import gopen, set_options
from webdataset.tariterators import group_by_keys, tar_file_expander

from dalle_pytorch.data.bad_samples import BadSamples
from dalle_pytorch.data.batches import Batch, divide, with_steps
from dalle_pytorch.data.config import DataConfig
from dalle_pytorch.data.packing import captions_of
from dalle_pytorch.data.samples import Collate, augmented, pick_caption, pick_variant
from dalle_pytorch.data.tokens import read_tokens
from dalle_pytorch.data.urls import expand
from dalle_pytorch.errors import UserError, first_line
from dalle_pytorch.images import IMAGE_SUFFIXES, fit, open_rgb, to_tensor

log = logging.getLogger(__name__)

RawSample: TypeAlias = dict[str, Any]
"""``__key__``, ``__url__`` and the bytes of its files by extension."""

PICTURES = tuple(sorted(suffix[1:] for suffix in IMAGE_SUFFIXES))
TEXTS = ("json", "txt")
TOKENS = "npy"
CAPTIONS = 10_000  # to train a BPE on; the pictures between them travel too
ALLOWED = 10  # bad samples: at the beginning of a stream a fraction says little
CHUNK = 1 << 16

# WebDataset raises ValueError for samples that it cannot group.
_BROKEN = (OSError, EOFError, ValueError, tarfile.TarError)


def read_shard(url: str, extensions: Sequence[str]) -> Iterator[RawSample]:
    """The samples of a shard while it is read, with those of their files that have one of the extensions.

    Raises:
        ValueError: it cannot be read, or not to its end, or has no samples; names it.
    """
    empty = True
    try:
        stream = gopen(url)
        try:
            files = tar_file_expander(
                [{"url": url, "stream": stream}],
                select_files=lambda name: PurePosixPath(name).suffix[1:].lower() in extensions,
            )
            for group in group_by_keys(files):
                for sample in _samples_of(group):
                    empty = False
                    yield sample
            while stream.read(CHUNK):  # only at its end does a command tell that it failed
                pass
            stream.close()
        finally:
            set_options(stream, ignore_errors=True)  # a command that is not read to its end
            stream.close()
    except _BROKEN as error:
        # The library puts the stream and the URL behind the message.
        reason = error if isinstance(error, OSError) and error.errno is not None else error.args[0]
        raise UserError(f"shard {url} cannot be read: {reason}") from error
    if empty:
        raise UserError(f"shard {url} has no samples: no files of images, image tokens (.{TOKENS}) or captions")


def _samples_of(group: RawSample) -> Iterator[RawSample]:
    """The samples of what WebDataset takes for one, since it divides names at the first dot.

    "holiday.001.jpg" and "holiday.001.txt" are a sample of their own; "0001.mask.png" belongs to "0001".
    """
    about = {name: value for name, value in group.items() if name.startswith("__")}
    samples: dict[str, RawSample] = {}
    for name in group.keys() - about.keys():
        inner, _, ext = name.rpartition(".")
        key = f"{group['__key__']}.{inner}" if inner else group["__key__"]
        samples.setdefault(inner, {**about, "__key__": key})[ext] = group[name]
    for inner, sample in sorted(samples.items()):
        files = sample.keys() - about.keys()
        if not inner or "" not in samples or not (files.isdisjoint(TEXTS) or files <= set(TEXTS)):
            yield sample


class Tally:
    """What was read and what could not be; each worker counts its own."""

    def __init__(self, config: DataConfig) -> None:
        self.read = 0
        self.bad = BadSamples(config.path, config.max_bad_fraction, "data.max_bad_fraction", allowed=ALLOWED)

    def add(self, kind: str, error: UserError) -> None:
        """Note what cannot be read and tell its name.

        Raises:
            UserError: it is too much now.
        """
        self.bad.add(kind, str(error))
        self.bad.check(self.read)
        log.warning("skipped: %s (%d beside %d samples read)", error, self.bad.count, self.read)


class Stream:
    """The samples of remote shards, without an end; ``len`` is how many count as an epoch.

    Args:
        config: URLs, augmentation, buffer.
        image_size: side of the pictures in pixels.
        seed: of every choice.

    Raises:
        ValueError: a bad URL, or the first shard cannot be read; names it.
    """

    def __init__(self, config: DataConfig, *, image_size: int, seed: int) -> None:
        self.config, self.image_size, self.seed = config, image_size, seed
        self.urls = expand(config.path)
        first = next(read_shard(self.urls[0], (*PICTURES, TOKENS, *TEXTS)))
        try:
            count = tokens_of(first).shape[1] if TOKENS in first else None
        except UserError as error:
            raise UserError(f"{_name(first)}: {error}") from error
        self.num_image_tokens: int | None = count
        """Image tokens of a picture; None if the stream is of pictures."""
        kinds = PICTURES if count is None else (TOKENS,)
        self.extensions = (*kinds, *TEXTS)
        log.info(
            "streaming %d shards of %s from %s", len(self.urls), "images" if count is None else "tokens", config.path
        )

    def __len__(self) -> int:
        """Samples that count as an epoch."""
        return self.config.epoch_size

    def some_captions(self) -> Iterator[str]:
        """The captions of the first samples of shards in random order, each shard once; the same in every process."""
        log.info("reading up to %d captions of %s", CAPTIONS, self.config.path)
        tally = Tally(self.config)
        yield from islice(self._captions(tally), CAPTIONS)

    def batches(self, place: str, collate: Collate, size: int) -> DataPipeline:
        """Endless batches.

        Args:
            place: epoch, process and worker; with the seed it settles what is drawn.
            collate: see `Collate`.
            size: samples of a batch.
        """
        rng = random.Random(f"{self.seed}/{place}")
        tally = Tally(self.config)
        return DataPipeline(
            # Its own worker_seed knows the process only where torch.distributed is up; rng knows it always.
            ResampledShards(self.urls, seed=rng.getrandbits(31), worker_seed=lambda: 0, deterministic=True),
            partial(self._raw, tally),
            shuffle(self.config.shuffle_buffer, rng=rng),
            partial(self._samples, tally, place, collate),
            batched(size, collation_fn=_join, partial=False),
        )

    def _raw(self, tally: Tally, chosen: Iterable[dict[str, str]]) -> Iterator[RawSample]:
        """Samples as they lie in the shards."""
        for shard in chosen:
            try:
                yield from read_shard(shard["url"], self.extensions)
            except UserError as error:
                tally.add("unreadable shard", error)

    def _captions(self, tally: Tally) -> Iterator[str]:
        for raw in self._raw(tally, SimpleShardList(self.urls, seed=self.seed)):
            tally.read += 1
            try:
                yield from read_captions(raw)
            except UserError as error:
                tally.add("unreadable sample", UserError(f"{_name(raw)}: {error}"))

    def _samples(self, tally: Tally, place: str, collate: Collate, raws: Iterable[RawSample]) -> Iterator[Batch]:
        """Batches of one, so that a sample that cannot be collated is known by its name."""
        for counter, raw in enumerate(raws):
            tally.read += 1
            try:
                yield collate([self._load(raw, random.Random(f"{self.seed}/{place}/{counter}"))])
            except UserError as error:
                tally.add("unreadable sample", UserError(f"{_name(raw)}: {error}"))

    def _load(self, raw: RawSample, rng: random.Random) -> Batch:
        """A sample as `Captioned` gives it in training."""
        sample = {"caption": pick_caption(read_captions(raw), rng, self.config.caption_weights), "rng": rng}
        if self.num_image_tokens is None:
            image = augmented(partial(self._decode, raw), self.config, image_size=self.image_size, rng=rng)
            return {**sample, "image": image}
        tokens = tokens_of(raw)
        if tokens.shape[1] != self.num_image_tokens:
            raise UserError(f"it has {tokens.shape[1]} image tokens, the first sample {self.num_image_tokens}")
        return {**sample, "image_tokens": pick_variant(tokens, rng)}

    def _decode(self, raw: RawSample, size: int) -> Float[Tensor, "3 H W"]:
        files = [ext for ext in PICTURES if ext in raw]
        if len(files) != 1:
            raise UserError(f"it needs one picture, but has {' and '.join(files) or 'none'}")
        picture = open_rgb(raw[files[0]], name=raw["__key__"])
        if picture.size != (self.image_size, self.image_size) and not self.config.resize:
            raise UserError(
                f"the picture has {picture.width} x {picture.height} pixels, the model's {self.image_size} x "
                f"{self.image_size}; scale them with data.resize=true"
            )
        return to_tensor(fit(picture, size))


def read_captions(raw: RawSample) -> list[str]:
    """All captions of a sample: "captions" or "caption" of its json, or its txt.

    Raises:
        ValueError: broken JSON, or no caption.
    """
    try:
        meta = json.loads(raw["json"]) if "json" in raw else {}
        value = meta.get("captions", meta.get("caption")) if isinstance(meta, dict) else None
        if value is None and "txt" in raw:
            value = raw["txt"].decode("utf-8-sig")
    except ValueError as error:  # no JSON, or bytes that are no UTF-8
        raise UserError(f"its captions cannot be read: {first_line(error)}") from error
    if not isinstance(meta, dict):
        raise UserError(f"its json holds no object but {meta!r}")
    captions = captions_of(value)
    if not captions:
        raise UserError(
            'it has no caption, neither "captions" or "caption" in a json nor a txt; they must lie beside it in the tar'
        )
    return captions


def tokens_of(raw: RawSample) -> Int[Tensor, "variants n"]:
    """The image tokens of a sample.

    Raises:
        ValueError: there are none, or no rows of whole numbers from 0 on.
    """
    if TOKENS not in raw:
        raise UserError(f"it has no image tokens (.{TOKENS}), as the first sample has")
    return read_tokens(raw[TOKENS], raw["__key__"])


class StreamBatches(IterableDataset[Batch]):
    """What a worker of one process reads of a stream, without an end.

    Args:
        stream: where from.
        collate: makes batches.
        epoch: draws anew in each that a run begins or goes on with.
        rank: of the process.
        size: samples of a batch in this process.
    """

    def __init__(self, stream: Stream, collate: Collate, *, epoch: int, rank: int, size: int) -> None:
        self.stream, self.collate = stream, collate
        self.epoch, self.rank, self.size = epoch, rank, size

    def __iter__(self) -> Iterator[Batch]:
        """This worker's batches."""
        info = get_worker_info()
        yield from self.stream.batches(f"{self.epoch}/{self.rank}/{info.id if info else 0}", self.collate, self.size)


class StreamLoader:
    """A stream's batches, an epoch at a time; Lightning keeps its state in checkpoints.

    The state is the number of epochs begun, so that a run that goes on in the middle of one draws anew there.

    Args:
        stream: where from.
        collate: makes batches.
        rank: of this process.
        world_size: number of processes; divides ``data.batch_size``.
        settings: of the DataLoader: num_workers and so on.

    Attributes:
        accumulate: micro-batches of a step.

    Raises:
        UserError: a step that cannot be shared; names the numbers.
    """

    def __init__(
        self, stream: Stream, collate: Collate, *, rank: int = 0, world_size: int = 1, **settings: Any
    ) -> None:
        config = stream.config
        self.stream, self.collate, self.settings = stream, collate, settings
        self.micro_batch_size, self.accumulate = divide(config.batch_size, world_size, config.micro_batch_size)
        self.rank, self.epoch = rank, 0
        self.running: Iterator[Batch] | None = None
        """One pass for all epochs: an epoch may end inside a shard, and what follows is to be read as well."""

    def __len__(self) -> int:
        """Micro-batches of an epoch."""
        return len(self.stream) // self.stream.config.batch_size * self.accumulate

    def __iter__(self) -> Iterator[Batch]:
        """The next epoch."""
        if self.running is None:
            batches = StreamBatches(
                self.stream, self.collate, epoch=self.epoch, rank=self.rank, size=self.micro_batch_size
            )
            self.running = iter(DataLoader(batches, batch_size=None, **self.settings))
        self.epoch += 1
        yield from with_steps(islice(self.running, len(self)), self.accumulate)

    def state_dict(self) -> dict[str, int]:
        """Number of epochs begun."""
        return {"epoch": self.epoch}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on with an epoch that was not begun before ``state`` was taken."""
        self.epoch, self.running = state["epoch"], None
        if self.rank == 0:
            log.warning(
                "%s is a stream, which is not resumed exactly: training goes on with samples drawn anew",
                self.stream.config.path,
            )


def _join(samples: Sequence[Batch]) -> Batch:
    """Batches of one to a batch."""
    parts = {name: [sample[name] for sample in samples] for name in samples[0]}
    captions = [caption for one in parts.pop("captions") for caption in one]
    return {"captions": captions, **{name: torch.cat(tensors) for name, tensors in parts.items()}}


def _name(raw: RawSample) -> str:
    return f"sample {raw['__key__']!r} of {raw['__url__']}"
