"""Batches of captioned pictures for training: order and augmentation are pure functions of (seed, epoch, index)."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import pytorch_lightning as pl
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from tqdm import tqdm

from dalle_pytorch.data.images import decode_image, random_crop, random_flip, random_resized_crop
from dalle_pytorch.data.shards import ShardDataset
from dalle_pytorch.models.image_tokenizer import ImageTokenizer
from dalle_pytorch.text import TextTokenizer

Position: TypeAlias = tuple[int, int]
"""Epoch and index of a sample: what a batch sampler yields."""
Batch: TypeAlias = dict[str, Any]
"""``captions`` list[str], ``text_tokens`` Int[b t], ``images`` Float[b 3 H W] or ``image_tokens`` Int[b n]."""

ENCODE_BATCH = 64  # pictures tokenised at once


@dataclass(kw_only=True)
class DataConfig:
    """Which shards, and how they become batches."""

    path: str = "???"
    """A folder of shards, as prepare_data.py writes them; relative to the current directory."""
    train_split: str = "train"
    """Split to learn from; several are joined by "+"."""
    val_split: str = "val"
    """Split to validate on."""
    batch_size: int = 64
    """Pictures of one step, over all devices together."""
    num_workers: int = 0
    """Processes that read and augment; 0 = the training process itself."""
    cache_decoded: bool = False
    """Decode all pictures once and keep them in memory, 3 * image_size ** 2 bytes each."""
    resize: bool = False
    """Scale pictures of another size than the model's; without it they are an error."""
    jitter: int = 0
    """Training pictures are shifted by up to so many pixels each way; 0 = off."""
    crop: bool = False
    """Training pictures are cut at random, as in the paper (A.2, listing 1); needs resize, for larger pictures."""
    flip: bool = False
    """Training pictures are mirrored half the time; wrong for captions that tell left from right."""
    token_crops: int = 1
    """DALLE: tokenise every training picture so often, each with its own augmentation; 0 = anew in every step."""

    def __post_init__(self) -> None:
        """Validate.

        Raises:
            ValueError: a field is out of range; names it.
        """
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {self.batch_size}")
        for name in ("num_workers", "jitter", "token_crops"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.crop and not self.resize:
            raise ValueError("crop cuts from pictures larger than the model's: set resize=true as well")
        if self.crop and self.cache_decoded:
            raise ValueError("crop needs the whole pictures: set cache_decoded=false")


def sample_rng(seed: int, epoch: int, index: int) -> random.Random:
    """The random source of one sample in one epoch; the same in every process."""
    return random.Random(f"{seed}/{epoch}/{index}")


def epoch_order(seed: int, epoch: int, size: int) -> list[int]:
    """The order of an epoch, a permutation of ``range(size)``."""
    order = list(range(size))
    random.Random(f"{seed}/{epoch}/order").shuffle(order)
    return order


class EpochBatches(Sampler[list[Position]]):
    """Batches of one epoch for one of several equal processes; whole batches only.

    Args:
        size: number of samples.
        batch_size: samples of a step over all processes; the global batches do not depend on their number.
        seed: of the order.
        rank: of this process.
        world_size: number of processes; divides ``batch_size``.

    Raises:
        ValueError: fewer samples than a batch, or a batch that the processes cannot share; names the numbers.
    """

    def __init__(self, size: int, batch_size: int, *, seed: int, rank: int = 0, world_size: int = 1) -> None:
        if size < batch_size:
            raise ValueError(
                f"the training split has {size} pictures, data.batch_size is {batch_size}; "
                f"set data.batch_size={size} or less"
            )
        if batch_size % world_size:
            raise ValueError(f"data.batch_size ({batch_size}) must be a multiple of the {world_size} processes")
        self.size, self.batch_size, self.seed = size, batch_size, seed
        self.rank, self.local_size = rank, batch_size // world_size
        self.epoch, self.first = 0, 0

    def __len__(self) -> int:
        """Batches of a whole epoch."""
        return self.size // self.batch_size

    def __iter__(self) -> Iterator[list[Position]]:
        """This process's share of every batch of ``epoch``, from batch ``first`` on."""
        epoch, order = self.epoch, epoch_order(self.seed, self.epoch, self.size)
        for batch in range(self.first, len(self)):
            start = batch * self.batch_size + self.rank * self.local_size
            yield [(epoch, index) for index in order[start : start + self.local_size]]


class ResumableLoader(DataLoader[Any]):
    """A loader that goes on behind the last batch it gave; Lightning keeps its state in checkpoints."""

    def __init__(self, dataset: Dataset[Batch], batches: EpochBatches, **settings: Any) -> None:
        super().__init__(dataset, batch_sampler=batches, **settings)
        self.batches, self.epoch, self.batch = batches, 0, 0

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        """The rest of the current epoch."""
        self.batches.epoch, self.batches.first = self.epoch, self.batch
        for batch in super().__iter__():
            # Counted before it is given: Lightning never asks for more than the last batch.
            self.batch += 1
            if self.batch == len(self):
                self.epoch, self.batch = self.epoch + 1, 0
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Epoch and number of batches given in it."""
        return {"epoch": self.epoch, "batch": self.batch}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue where ``state`` was taken."""
        self.epoch, self.batch = state["epoch"], state["batch"]


class Pictures(Dataset[Batch]):
    """Samples of a split: decoded, augmented, one caption each.

    Args:
        shards: the split.
        config: augmentation and caching; used with ``train`` only.
        image_size: side of the pictures in pixels.
        train: augment, and draw a caption; otherwise the first caption of the untouched picture.
        seed: of the augmentation and of the choice of captions.

    Raises:
        ValueError: the pictures are of another size and ``config.resize`` is off; names both sizes.
    """

    def __init__(
        self, shards: ShardDataset, config: DataConfig, *, image_size: int, train: bool, seed: int = 0
    ) -> None:
        stored = shards.image_size
        if stored is not None and stored != image_size and not config.resize:
            raise ValueError(
                f"the pictures of {config.path} are {stored} x {stored} pixels, the model's {image_size} x "
                f"{image_size}; use a model of that image_size, or scale them with data.resize=true"
            )
        self.shards, self.config, self.image_size = shards, config, image_size
        self.train, self.seed = train, seed
        self.captions = shards.captions()
        self.decoded = self._decode_all() if config.cache_decoded else None
        self.image_tokens: Int[Tensor, "variants b n"] | None = None

    def __len__(self) -> int:
        """Number of pictures."""
        return len(self.shards)

    def __getitem__(self, index: Position | int) -> Batch:
        """A sample: ``caption``, ``seed`` for BPE dropout, and ``image`` or ``image_tokens``."""
        epoch, index = index if isinstance(index, tuple) else (0, index)
        rng = sample_rng(self.seed, epoch, index)
        captions = self.captions[index]
        sample: Batch = {"caption": rng.choice(captions) if self.train else captions[0], "rng": rng}
        if self.image_tokens is not None:
            sample["image_tokens"] = self.image_tokens[rng.randrange(len(self.image_tokens)), index]
        else:
            sample["image"] = self.image(index, rng)
        return sample

    def image(self, index: int, rng: random.Random) -> Float[Tensor, "3 H W"]:
        """A picture in [0, 1], augmented in training."""
        config, size = self.config, self.image_size
        if not (self.train and (config.jitter or config.crop or config.flip)):
            return self._decode(index, size)
        generator = torch.Generator().manual_seed(rng.getrandbits(63))
        if config.crop:
            # 12/8: the most that the random scale can use, see random_resized_crop.
            image = self._decode(index, size * 12 // 8)
            image = random_resized_crop(image, image_size=size, generator=generator)
        else:
            image = self._decode(index, size)
        image = random_crop(image, padding=config.jitter, generator=generator)
        return random_flip(image, generator=generator) if config.flip else image

    def _decode(self, index: int, size: int) -> Float[Tensor, "3 H W"]:
        if self.decoded is not None:
            return self.decoded[index].float() / 255
        sample = self.shards[index]
        return decode_image(sample.image, image_size=size, name=sample.key)

    def _decode_all(self) -> UInt8[Tensor, "b 3 H W"]:
        size = self.image_size
        decoded = torch.empty(len(self), 3, size, size, dtype=torch.uint8)
        for index in range(len(self)):
            sample = self.shards[index]
            image = decode_image(sample.image, image_size=size, name=sample.key)
            decoded[index] = (image * 255).round().byte()
        return decoded


class Collate:
    """Joins samples into a batch and turns captions into text tokens.

    Args:
        tokenizer: None = captions stay text.
        text_len: columns of the text tokens.
        truncate: cut captions that are longer; otherwise they are an error.
        dropout: share of BPE merges left out, in [0, 1).
    """

    def __init__(self, tokenizer: TextTokenizer | None, text_len: int, *, truncate: bool, dropout: float) -> None:
        self.tokenizer, self.text_len = tokenizer, text_len
        self.truncate, self.dropout = truncate, dropout

    def __call__(self, samples: Sequence[Batch]) -> Batch:
        """A batch, with ``captions`` and whichever of ``images``, ``image_tokens``, ``text_tokens`` there are."""
        batch: Batch = {"captions": [sample["caption"] for sample in samples]}
        for source, name in (("image", "images"), ("image_tokens", "image_tokens")):
            if source in samples[0]:
                batch[name] = torch.stack([sample[source] for sample in samples])
        if "image_tokens" in batch:
            batch["image_tokens"] = batch["image_tokens"].long()
        if self.tokenizer is not None:
            rows = [self._encode(sample["caption"], sample["rng"]) for sample in samples]
            batch["text_tokens"] = torch.cat(rows)
        return batch

    def _encode(self, caption: str, rng: random.Random) -> Int[Tensor, "1 t"]:
        assert self.tokenizer is not None
        if self.dropout:
            ids = self.tokenizer.encode(caption, dropout=self.dropout, rng=rng)
            # Dropout lengthens a caption: one that only then outgrows the context is taken without.
            if len(ids) <= self.text_len:
                row = torch.zeros(1, self.text_len, dtype=torch.long)
                row[0, : len(ids)] = torch.tensor(ids, dtype=torch.long)
                return row
        return self.tokenizer.tokenize(caption, self.text_len, truncate=self.truncate)


class TextImageDataModule(pl.LightningDataModule):
    """Training and validation batches from image shards.

    Args:
        config: which shards, batch size, augmentation.
        image_size: side of the pictures in pixels.
        seed: of order, augmentation and captions.
        shards: the two splits, if they are open already (see `open_splits`).

    Raises:
        FileNotFoundError: no such shards; says how to make them.
        ValueError: no such split, too few pictures, or pictures of another size.
    """

    def __init__(
        self,
        config: DataConfig,
        *,
        image_size: int,
        seed: int,
        shards: tuple[ShardDataset, ShardDataset] | None = None,
    ) -> None:
        super().__init__()
        self.config, self.seed = config, seed
        train, val = shards or open_splits(config)
        if len(train) < config.batch_size:
            EpochBatches(len(train), config.batch_size, seed=seed)  # raises, before pictures are decoded
        self.train_set = Pictures(train, config, image_size=image_size, train=True, seed=seed)
        self.val_set = Pictures(val, config, image_size=image_size, train=False, seed=seed)
        self.train_collate = Collate(None, 0, truncate=False, dropout=0.0)
        self.val_collate = self.train_collate

    def set_text(self, tokenizer: TextTokenizer, text_len: int, *, truncate: bool, dropout: float) -> None:
        """Add ``text_tokens`` to the batches; BPE dropout in training only.

        Raises:
            ValueError: a caption of either split is longer than ``text_len`` and may not be cut; shows it.
        """
        self.train_collate = Collate(tokenizer, text_len, truncate=truncate, dropout=dropout)
        self.val_collate = Collate(tokenizer, text_len, truncate=truncate, dropout=0.0)
        if not truncate:  # better now than in the middle of an epoch
            distinct = {c for data in (self.train_set, self.val_set) for row in data.captions for c in row}
            for caption in sorted(distinct):
                tokenizer.tokenize(caption, text_len)

    @torch.no_grad()
    def cache_image_tokens(self, vae: ImageTokenizer, *, device: str | torch.device = "cpu") -> None:
        """Tokenise every picture once, so that training need not read or encode pictures.

        The training pictures are taken ``config.token_crops`` times, each time with another augmentation.
        """
        vae.to(device)
        for data, variants in ((self.train_set, self.config.token_crops), (self.val_set, 1)):
            rows = []
            positions = [(variant, index) for variant in range(variants) for index in range(len(data))]
            for start in tqdm(range(0, len(positions), ENCODE_BATCH), desc=f"image tokens of {data.shards.split}"):
                images = torch.stack(
                    [
                        data.image(index, sample_rng(self.seed, variant, index))
                        for variant, index in positions[start : start + ENCODE_BATCH]
                    ]
                )
                rows.append(vae.encode(images.to(device)).int().cpu())
            data.image_tokens = torch.cat(rows).unflatten(0, (variants, len(data)))
        vae.to("cpu")

    def train_dataloader(self) -> ResumableLoader:
        """Endless epochs' worth of augmented batches; resumes in the middle of an epoch."""
        rank, world_size = _place(self.trainer)
        sampler = EpochBatches(
            len(self.train_set), self.config.batch_size, seed=self.seed, rank=rank, world_size=world_size
        )
        return ResumableLoader(self.train_set, sampler, collate_fn=self.train_collate, **self._workers())

    def val_dataloader(self) -> DataLoader[Batch]:
        """All validation pictures in order, the last batch smaller; each process takes every n-th picture."""
        rank, world_size = _place(self.trainer)
        return DataLoader(
            self.val_set,
            batch_size=max(1, self.config.batch_size // world_size),
            sampler=range(rank, len(self.val_set), world_size),
            collate_fn=self.val_collate,
            **self._workers(),
        )

    def _workers(self) -> dict[str, Any]:
        workers = self.config.num_workers
        return {
            "num_workers": workers,
            "generator": torch.Generator().manual_seed(self.seed),  # otherwise a loader draws from the global one
            "persistent_workers": workers > 0,
            "pin_memory": torch.cuda.is_available(),
        }


def all_pictures(
    shards: ShardDataset, config: DataConfig, image_size: int
) -> tuple[Float[Tensor, "b 3 H W"], list[str]]:
    """A whole split in order, unaugmented, with the first caption of each picture."""
    pictures = Pictures(shards, config, image_size=image_size, train=False)
    samples = [pictures[index] for index in range(len(pictures))]
    return torch.stack([sample["image"] for sample in samples]), [sample["caption"] for sample in samples]


def open_splits(config: DataConfig) -> tuple[ShardDataset, ShardDataset]:
    """The training and the validation split.

    Raises:
        FileNotFoundError: no such folder; says where it was looked for and how to make one.
        ValueError: no such split, or broken shards.
    """
    folder = Path(config.path)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"data.path={config.path}: there is no folder {folder.absolute()}. The emoji come with a checkout, in "
            "data/emoji; prepare_data.py writes others (source=emoji, source=rainbow, source=folder path=...)"
        )
    return ShardDataset(folder, config.train_split), ShardDataset(folder, config.val_split)


def _place(trainer: pl.Trainer | None) -> tuple[int, int]:
    return (0, 1) if trainer is None else (trainer.global_rank, trainer.world_size)
