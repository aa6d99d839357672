"""Captioned samples of a split: pictures, decoded and augmented, or image tokens; and how they become batches."""

import logging
import random
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor
from torch.utils.data import Dataset

from dalle_pytorch.data.bad_samples import BadSamples
from dalle_pytorch.data.batches import Batch, Position
from dalle_pytorch.data.config import AugmentationConfig, DataConfig
from dalle_pytorch.data.shards import ShardDataset
from dalle_pytorch.data.tokens import TokenShards
from dalle_pytorch.errors import UserError
from dalle_pytorch.images import decode_image, random_crop, random_flip, random_resized_crop
from dalle_pytorch.text import TextTokenizer

log = logging.getLogger(__name__)

ENCODE_BATCH = 64  # pictures tokenised at once
CAPTIONS_IN_MEMORY = 200_000  # pictures; above it captions are read when they are needed, about 50 us each


def sample_rng(seed: int, epoch: int, index: int) -> random.Random:
    """The random source of one sample in one epoch; the same in every process."""
    return random.Random(f"{seed}/{epoch}/{index}")


def pick_caption(captions: Sequence[str], rng: random.Random, weights: Sequence[float] = ()) -> str:
    """The caption that a picture is learnt with this time.

    Args:
        captions: of the picture, at least one.
        rng: of the choice.
        weights: of its first, second, ... caption, 0 for those beyond; empty = all alike.

    Raises:
        ValueError: no caption has a weight.
    """
    if not weights:
        return rng.choice(captions)
    known = [*weights, *[0.0] * len(captions)][: len(captions)]
    if not any(known):
        raise UserError(f"data.caption_weights={list(weights)} leaves none of a picture's {len(captions)} captions")
    return rng.choices(captions, known)[0]


def pick_variant(tokens: Int[Tensor, "variants n"], rng: random.Random) -> Int[Tensor, " n"]:
    """The image tokens that a picture is learnt as this time."""
    return tokens[rng.randrange(len(tokens))]


def augmented(
    decode: Callable[[int], Tensor], config: AugmentationConfig, *, image_size: int, rng: random.Random
) -> Float[Tensor, "3 H W"]:
    """A training picture.

    Args:
        decode: gives the picture as a square, Float[3 H W] in [0, 1]; takes its side in pixels.
        config: jitter, crop, flip.
        image_size: side of the result in pixels.
        rng: of the augmentation.

    Returns:
        RGB in [0, 1].
    """
    if not config.augments:
        return decode(image_size)
    generator = torch.Generator().manual_seed(rng.getrandbits(63))
    if config.crop:
        # 12/8: the most that the random scale can use, see random_resized_crop.
        image = random_resized_crop(decode(image_size * 12 // 8), image_size=image_size, generator=generator)
    else:
        image = decode(image_size)
    image = random_crop(image, padding=config.jitter, generator=generator)
    return random_flip(image, generator=generator) if config.flip else image


class Captioned(Dataset[Batch]):
    """Samples with one caption each; the next readable one takes the place of one that cannot be read.

    Args:
        shards: the split.
        config: settings.
        train: draw a caption, and among variants; otherwise the first of each.
        seed: of these choices.
    """

    def __init__(self, shards: ShardDataset, config: DataConfig, *, train: bool, seed: int) -> None:
        self.shards, self.config, self.train, self.seed = shards, config, train, seed
        self.captions = shards.captions() if len(shards) <= CAPTIONS_IN_MEMORY else None
        """All captions of every sample; None = read when they are needed."""
        self.unreadable: dict[int, str] = {}
        """Why, by index. Each process counts its own."""
        self._bad = BadSamples(f"{shards.split!r} of {shards.folder}", config.max_bad_fraction, "data.max_bad_fraction")

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.shards)

    def __getitem__(self, index: Position | int) -> Batch:
        """A sample: its ``index``, ``caption``, ``rng`` for BPE dropout, and ``image`` or ``image_tokens``."""
        epoch, first = index if isinstance(index, tuple) else (0, index)
        for step in range(len(self)):
            place = (first + step) % len(self)
            if place in self.unreadable:
                continue
            rng = sample_rng(self.seed, epoch, place)
            try:
                captions = self.captions_of(place)
                caption = pick_caption(captions, rng, self.config.caption_weights) if self.train else captions[0]
                return {"index": place, "caption": caption, "rng": rng, **self.load(place, rng)}
            except UserError as error:
                self.leave_out(place, error)
        raise UserError(f"no sample of {self.shards.split!r} can be read")

    def leave_out(self, index: int, error: UserError) -> None:
        """Note a sample that cannot be read and tell its name, once.

        Raises:
            UserError: they are too many now.
        """
        if index in self.unreadable:
            return
        self.unreadable[index] = str(error)
        self._bad.add("unreadable", str(error))
        self._bad.check(len(self))
        log.warning("skipped: %s (%d of %d in %r)", error, self._bad.count, len(self), self.shards.split)

    def captions_of(self, index: int) -> list[str]:
        """All captions of a sample."""
        return self.shards.meta(index)["captions"] if self.captions is None else self.captions[index]

    def some_captions(self) -> Iterator[str]:
        """Captions of as many samples as are kept in memory at most, evenly spread."""
        step = -(-len(self) // CAPTIONS_IN_MEMORY) or 1
        for index in range(0, len(self), step):
            yield from self.captions_of(index)

    def load(self, index: int, rng: random.Random) -> Batch:
        """What a sample is besides its caption.

        Raises:
            ValueError: it cannot be read; names it.
        """
        raise NotImplementedError


def check_size(folder: str | Path, stored: int | None, image_size: int, config: AugmentationConfig) -> None:
    """Refuse pictures of another size than the model's, unless they may be scaled.

    Args:
        folder: where they are.
        stored: side of the pictures in pixels; None where they differ.
        image_size: side of the model's.
        config: ``resize``.

    Raises:
        ValueError: another size and no resize; names both.
    """
    if stored is not None and stored != image_size and not config.resize:
        raise UserError(
            f"the pictures of {folder} are {stored} x {stored} pixels, the model's {image_size} x {image_size}; use a "
            "model of that image_size, or scale them with data.resize=true (of prepare_data.py: resize=true)"
        )


class Pictures(Captioned):
    """Pictures of a split, augmented in training; or their tokens, once they are known.

    Args:
        shards: the split.
        config: augmentation and caching; used with ``train`` only.
        image_size: side of the pictures in pixels.
        train: augment, and draw a caption; otherwise the first caption of the untouched picture.
        seed: of the augmentation and of the choice of captions.
        start: position in the split of the first of these pictures, where they are a part of it.

    Raises:
        ValueError: the pictures are of another size and ``config.resize`` is off; names both sizes.
    """

    def __init__(
        self,
        shards: ShardDataset,
        config: DataConfig,
        *,
        image_size: int,
        train: bool,
        seed: int = 0,
        start: int = 0,
    ) -> None:
        check_size(shards.folder, shards.image_size, image_size, config)
        super().__init__(shards, config, train=train, seed=seed)
        self.image_size, self.start = image_size, start
        self.decoded = self._decode_all() if config.cache_decoded else None
        self.image_tokens: Int[Tensor, "variants b n"] | None = None

    def load(self, index: int, rng: random.Random) -> Batch:
        """``image``, or ``image_tokens`` where they are cached."""
        if self.image_tokens is not None:
            return {"image_tokens": pick_variant(self.image_tokens[:, index], rng)}
        return {"image": self.image(index, rng)}

    def image(self, index: int, rng: random.Random) -> Float[Tensor, "3 H W"]:
        """A picture in [0, 1], augmented in training.

        Raises:
            ValueError: it cannot be read; names it.
        """
        decode = partial(self._decode, index)
        if not self.train:
            return decode(self.image_size)
        return augmented(decode, self.config, image_size=self.image_size, rng=rng)

    def images(self, indices: Sequence[int], variant: int) -> Float[Tensor, "b 3 H W"]:
        """Some pictures in one of their augmentations; white in place of those that cannot be read, which are noted."""
        images = []
        for index in indices:
            try:
                images.append(self.image(index, sample_rng(self.seed, variant, self.start + index)))
            except UserError as error:
                self.leave_out(index, error)
                images.append(torch.ones(3, self.image_size, self.image_size))
        return torch.stack(images)

    def _decode(self, index: int, size: int) -> Float[Tensor, "3 H W"]:
        if self.decoded is not None:
            return self.decoded[index].float() / 255
        sample = self.shards[index]
        return decode_image(sample.image, image_size=size, name=sample.key)

    def _decode_all(self) -> UInt8[Tensor, "b 3 H W"]:
        size = self.image_size
        decoded = torch.zeros(len(self), 3, size, size, dtype=torch.uint8)
        self.decoded = None
        for index in range(len(self)):
            try:
                decoded[index] = (self._decode(index, size) * 255).round().byte()
            except UserError as error:
                self.leave_out(index, error)
        return decoded


class Tokens(Captioned):
    """Image tokens of a split of token shards; in training one of the variants of each picture."""

    def load(self, index: int, rng: random.Random) -> Batch:
        """``image_tokens``."""
        assert isinstance(self.shards, TokenShards)
        tokens = self.shards.tokens(index)
        return {"image_tokens": pick_variant(tokens, rng) if self.train else tokens[0]}


class Collate:
    """Joins samples into a batch and turns captions into text tokens.

    Args:
        tokenizer: None = captions stay text.
        text_len: columns of the text tokens.
        truncate: cut captions that are longer; otherwise they are an error.
        dropout: share of BPE merges left out, in [0, 1).
        codebook_size: of the model's image tokenizer; None = image tokens are taken as they are.
    """

    def __init__(
        self,
        tokenizer: TextTokenizer | None,
        text_len: int,
        *,
        truncate: bool,
        dropout: float,
        codebook_size: int | None = None,
    ) -> None:
        self.tokenizer, self.text_len = tokenizer, text_len
        self.truncate, self.dropout, self.codebook_size = truncate, dropout, codebook_size

    def __call__(self, samples: Sequence[Batch]) -> Batch:
        """A batch, with ``captions`` and whichever of the other parts there are; a stream has no ``indices``.

        Raises:
            UserError: image tokens outside the codebook. (A training step does not look: it would wait for its GPU.)
        """
        batch: Batch = {"captions": [sample["caption"] for sample in samples]}
        if "index" in samples[0]:
            batch["indices"] = torch.tensor([sample["index"] for sample in samples])
        for source, name in (("image", "images"), ("image_tokens", "image_tokens")):
            if source in samples[0]:
                batch[name] = torch.stack([sample[source] for sample in samples])
        if "image_tokens" in batch:
            batch["image_tokens"] = batch["image_tokens"].long()
            if self.codebook_size is not None and (most := int(batch["image_tokens"].max())) >= self.codebook_size:
                raise UserError(
                    f"it has image tokens up to {most}, the codebook of vae= has {self.codebook_size}: train with the "
                    "image tokenizer that made them"
                )
        if self.tokenizer is not None:
            how = {"truncate": self.truncate, "dropout": self.dropout}
            rows = [caption_ids(self.tokenizer, s["caption"], self.text_len, rng=s["rng"], **how) for s in samples]
            batch["text_tokens"] = torch.cat(rows)
        return batch


def caption_ids(
    tokenizer: TextTokenizer, caption: str, text_len: int, *, truncate: bool, dropout: float, rng: random.Random
) -> Int[Tensor, "1 t"]:
    """A caption as training reads it, 0 = padding.

    Args:
        tokenizer: of the model.
        caption: what stands there.
        text_len: columns.
        truncate: cut a caption that is longer; otherwise it is an error.
        dropout: share of BPE merges left out, in [0, 1).
        rng: of the dropout.

    Raises:
        ValueError: the caption is too long and not to be cut.
    """
    if dropout:
        ids = tokenizer.encode(caption, dropout=dropout, rng=rng)
        # Dropout lengthens a caption: one that only then outgrows the context is taken without.
        if len(ids) <= text_len:
            row = torch.zeros(1, text_len, dtype=torch.long)
            row[0, : len(ids)] = torch.tensor(ids, dtype=torch.long)
            return row
    return tokenizer.tokenize(caption, text_len, truncate=truncate)
