"""The datamodule of the three trainings."""

import logging
import signal
from typing import Any

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from dalle_pytorch.checkpoints.checkpoint import token_differences
from dalle_pytorch.data.batches import Batch, EpochBatches, ResumableLoader, divide
from dalle_pytorch.data.config import DataConfig
from dalle_pytorch.data.index import read_index
from dalle_pytorch.data.samples import ENCODE_BATCH, Captioned, Collate, Pictures, Tokens
from dalle_pytorch.data.shards import ShardDataset
from dalle_pytorch.data.splits import find_folder, open_split
from dalle_pytorch.data.stream import Stream, StreamLoader
from dalle_pytorch.data.tokens import TokenShards
from dalle_pytorch.data.urls import is_stream
from dalle_pytorch.errors import UserError
from dalle_pytorch.models.image_tokenizer import ImageTokenizer
from dalle_pytorch.text import TextTokenizer

log = logging.getLogger(__name__)


class TextImageDataModule(pl.LightningDataModule):
    """Training and validation batches from image or token shards, those for training local or remote.

    Args:
        config: which shards, batch size, augmentation.
        image_size: side of the pictures in pixels.
        seed: of order, augmentation and captions.
        shards: the two splits, if they are open already (see `open_splits`).
        tokens: token shards will do.
        validate: False = there need be nothing to validate on.

    Raises:
        FileNotFoundError: no such shards; says how to make them.
        UserError: no such split, too few pictures, pictures of another size, tokens in place of pictures, or a stream
            that cannot be read.
    """

    def __init__(
        self,
        config: DataConfig,
        *,
        image_size: int,
        seed: int,
        shards: tuple[ShardDataset, ShardDataset] | None = None,
        tokens: bool = False,
        validate: bool = True,
    ) -> None:
        super().__init__()
        self.config, self.seed = config, seed
        self.train_set: Captioned | Stream
        self.val_set: Captioned | None = None
        """None where there is nothing to validate on: validation must be off."""
        val: ShardDataset | None
        if shards is not None:
            train, val = shards
        else:
            train = None if is_stream(config.path) else open_split(config.path, config.train_split, "data.path")
            val = _open_validation(config, validate=validate)
        for part in (train, val):
            if isinstance(part, TokenShards) and not tokens:
                raise UserError(
                    f"{part.folder} holds image tokens, and this needs the pictures: give data.path= the folder "
                    "that they were encoded from"
                )
        if train is None:
            self.train_set = _open_stream(config, image_size=image_size, seed=seed)
        else:
            if len(train) < config.batch_size:
                EpochBatches(len(train), config.batch_size, seed=seed)  # raises, before pictures are decoded
            self.train_set = _samples(train, config, image_size=image_size, train=True, seed=seed)
        if val is not None:
            self.val_set = _samples(val, config, image_size=image_size, train=False, seed=seed)
        else:
            log.info("there is nothing to validate on: the run goes without validation")
        self.train_collate = Collate(None, 0, truncate=False, dropout=0.0)
        self.val_collate = self.train_collate

    def set_text(
        self,
        tokenizer: TextTokenizer,
        text_len: int,
        *,
        truncate: bool,
        dropout: float,
        codebook_size: int | None = None,
    ) -> None:
        """Add ``text_tokens`` to the batches; BPE dropout in training only. Refuse image tokens of a larger codebook.

        Raises:
            ValueError: a caption of either split is longer than ``text_len`` and may not be cut; shows it. In a stream
                it counts as a sample that cannot be read.
        """
        settings: dict[str, Any] = {"truncate": truncate, "codebook_size": codebook_size}
        self.train_collate = Collate(tokenizer, text_len, dropout=dropout, **settings)
        self.val_collate = Collate(tokenizer, text_len, dropout=0.0, **settings)
        if not truncate:  # better now than in the middle of an epoch
            for caption in sorted({caption for data in self._local() for caption in data.some_captions()}):
                tokenizer.tokenize(caption, text_len)

    @property
    def tokenizer(self) -> dict[str, Any] | None:
        """The image tokenizer of token shards as their index describes it; None for pictures and streams."""
        return next((shards.tokenizer for shards in self._token_shards()), None)

    @property
    def can_cache_tokens(self) -> bool:
        """Whether `cache_image_tokens` can work: all pictures are in folders."""
        return isinstance(self.train_set, Pictures) and (self.val_set is None or isinstance(self.val_set, Pictures))

    def check_tokenizer(self, given: dict[str, Any], name: str) -> None:
        """Refuse token shards of another image tokenizer.

        Args:
            given: the image tokenizer of the training, as ``checkpoint.describe_tokenizer`` says it.
            name: what to call it in an error.

        Raises:
            ValueError: they differ; names what, and the mend.
        """
        for shards in self._token_shards():
            different = token_differences(shards.tokenizer, given)
            if different:
                raise UserError(
                    f"the tokens of {shards.folder} are not of {name}: {'; '.join(different)}. Train with the vae= "
                    "that they were encoded with, or encode again: prepare_data.py source=shards"
                )

    @torch.no_grad()
    def cache_image_tokens(self, vae: ImageTokenizer, *, device: str | torch.device = "cpu") -> None:
        """Tokenise every picture once, so that training need not read or encode pictures.

        The training pictures are taken ``config.token_crops`` times, each time with another augmentation.

        Raises:
            ValueError: they are not all in folders.
        """
        if not self.can_cache_tokens:
            raise UserError(f"the image tokens of {self.config.path} cannot be cached: it is no folder of pictures")
        vae.to(device)
        for data, variants in ((self.train_set, self.config.token_crops), (self.val_set, 1)):
            if data is None:
                continue
            assert isinstance(data, Pictures)
            rows = []
            starts = [(variant, first) for variant in range(variants) for first in range(0, len(data), ENCODE_BATCH)]
            for variant, first in tqdm(starts, desc=f"image tokens of {data.shards.split}"):
                images = data.images(range(first, min(first + ENCODE_BATCH, len(data))), variant)
                rows.append(vae.encode(images.to(device)).int().cpu())
            data.image_tokens = torch.cat(rows).unflatten(0, (variants, len(data)))
        vae.to("cpu")

    def setup(self, stage: str) -> None:
        """Refuse a stream that is to be validated and has nothing for it."""
        if self.trainer is not None and self.trainer.limit_val_batches and isinstance(self.train_set, Stream):
            self._validated()

    def accumulate(self, world_size: int) -> int:
        """Micro-batches of a step in each of so many processes: after as many gradients comes a step of the optimiser.

        Raises:
            UserError: the processes cannot share a step; names the numbers.
        """
        return divide(self.config.batch_size, world_size, self.config.micro_batch_size)[1]

    def train_dataloader(self) -> ResumableLoader | StreamLoader:
        """Endless epochs' worth of augmented batches; resumes in the middle of an epoch, unless it is a stream."""
        rank, world_size = _place(self.trainer)
        if isinstance(self.train_set, Stream):
            return StreamLoader(self.train_set, self.train_collate, rank=rank, world_size=world_size, **self._workers())
        batches = EpochBatches(
            len(self.train_set), self.config.batch_size, seed=self.seed, rank=rank, world_size=world_size,
            micro_batch_size=self.config.micro_batch_size,
        )  # fmt: skip
        sha256 = self.train_set.shards.sha256
        return ResumableLoader(
            self.train_set, batches, data_sha256=sha256, collate_fn=self.train_collate, **self._workers()
        )

    def val_dataloader(self) -> DataLoader[Batch] | list[Batch]:
        """All validation pictures in order, in micro-batches, the last one smaller; none if there is no `val_set`.

        Each of several processes takes every n-th, and all the same number: the last few pictures are left out, since a
        process that lacked a batch would keep the others waiting.

        Raises:
            ValueError: fewer pictures than processes; names the numbers.
        """
        rank, world_size = _place(self.trainer)
        if self.val_set is None and not isinstance(self.train_set, Stream):
            return []
        pictures = self._validated()
        if len(pictures) < world_size:
            raise UserError(f"the split to validate on has {len(pictures)} pictures for {world_size} processes")
        if rank == 0 and (left := len(pictures) % world_size):
            log.warning(
                "the last %d pictures of %r are not validated: %d processes", left, pictures.shards.split, world_size
            )
        return DataLoader(
            pictures,
            batch_size=self.config.micro_batch_size or max(1, self.config.batch_size // world_size),
            sampler=range(rank, len(pictures) // world_size * world_size, world_size),
            collate_fn=self.val_collate,
            **self._workers(),
        )

    def _validated(self) -> Captioned:
        if self.val_set is None:
            raise UserError(
                f"data.path={self.config.path} is a stream: give a folder of shards to validate on (data.val_path=), "
                "or switch validation off (trainer.limit_val_batches=0)"
            )
        return self.val_set

    def _local(self) -> list[Captioned]:
        return [data for data in (self.train_set, self.val_set) if isinstance(data, Captioned)]

    def _token_shards(self) -> list[TokenShards]:
        return [data.shards for data in self._local() if isinstance(data.shards, TokenShards)]

    def _workers(self) -> dict[str, Any]:
        workers = self.config.num_workers
        return {
            "num_workers": workers,
            "generator": torch.Generator().manual_seed(self.seed),  # otherwise a loader draws from the global one
            "persistent_workers": workers > 0,
            "pin_memory": torch.cuda.is_available(),
            "prefetch_factor": self.config.prefetch_factor,
            "worker_init_fn": ignore_signals,
        }


def ignore_signals(worker: int) -> None:
    """Leave signals to the main process, in a worker of a DataLoader: it ends the workers once it has saved."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)


def _samples(shards: ShardDataset, config: DataConfig, *, image_size: int, train: bool, seed: int) -> Captioned:
    """Pictures or tokens, as the shards are.

    Raises:
        ValueError: tokens of pictures of another size, or damaged shards; names them.
    """
    if not isinstance(shards, TokenShards):
        return Pictures(shards, config, image_size=image_size, train=train, seed=seed)
    if shards.image_size != image_size:
        raise UserError(
            f"{shards.folder} has tokens of pictures of {shards.image_size} pixels, the model's have {image_size}"
        )
    if given := config.augments:
        raise UserError(
            f"{shards.folder} holds tokens, which were augmented when they were encoded: leave out data.{given[0]}, or "
            "give it to prepare_data.py source=shards"
        )
    if config.verify:
        shards.verify()
    return Tokens(shards, config, train=train, seed=seed)


def _open_stream(config: DataConfig, *, image_size: int, seed: int) -> Stream:
    stream = Stream(config, image_size=image_size, seed=seed)
    if stream.num_image_tokens is not None:
        log.warning(
            "%s streams image tokens, and no index says of which image tokenizer: they are not compared with vae=",
            config.path,
        )
    return stream


def _open_validation(config: DataConfig, *, validate: bool) -> ShardDataset | None:
    """The split to validate on; None if there is none and need be none."""
    path, name = (config.path, "data.path") if config.val_path is None else (config.val_path, "data.val_path")
    if is_stream(path):
        return None
    index = read_index(find_folder(path, name), kind=None)
    if set(config.val_split.split("+")) <= index["splits"].keys():
        return open_split(path, config.val_split, name)
    packed_without = config.val_split == "val" and index.get("source", {}).get("val_share") == 0
    if packed_without or not validate:
        return None
    raise UserError(
        f"{path} has no split {config.val_split!r} to validate on; it has: {', '.join(index['splits'])}. Name one with "
        "data.val_split=, or train without validation (trainer.limit_val_batches=0)"
    )


def _place(trainer: pl.Trainer | None) -> tuple[int, int]:
    return (0, 1) if trainer is None else (trainer.global_rank, trainer.world_size)
