"""Settings of the data of a training."""

import math
from dataclasses import dataclass, field

from dalle_pytorch.config import RENAMED
from dalle_pytorch.data.urls import expand, is_stream
from dalle_pytorch.errors import UserError, at_least_one, not_negative

RENAMED["data.max_bad_share"] = "say data.max_bad_fraction="


@dataclass(kw_only=True)
class AugmentationConfig:
    """How training pictures are changed."""

    resize: bool = False
    """Scale pictures of another size than the model's; without it they are an error."""
    jitter: int = 0
    """Training pictures are shifted by up to so many pixels each way; 0 = off."""
    crop: bool = False
    """Training pictures are cut at random, as in the paper (A.2, listing 1); needs resize, for larger pictures."""
    flip: bool = False
    """Training pictures are mirrored half the time; wrong for captions that tell left from right."""

    def __post_init__(self) -> None:
        """Validate.

        Raises:
            UserError: a negative jitter, or crop without resize.
        """
        not_negative(self, "jitter")
        if self.crop and not self.resize:
            raise UserError("crop cuts from pictures larger than the model's: set resize=true as well")

    @property
    def augments(self) -> list[str]:
        """Names of what is on, of jitter, crop and flip."""
        return [name for name in ("jitter", "crop", "flip") if getattr(self, name)]


@dataclass(kw_only=True)
class DataConfig(AugmentationConfig):
    """Which shards, and how they become batches."""

    path: str = "???"
    """A folder of image or token shards, as prepare_data.py writes them; relative to the current directory. Or remote
    shards to stream: a URL ("https://host/x-{000..123}.tar") or the output of a command
    ("pipe:aws s3 cp s3://bucket/x-{000..123}.tar -"); several are joined by "::". Streams are not resumed exactly."""
    train_split: str = "train"
    """Split to learn from; several are joined by "+". A stream is learnt from as a whole."""
    val_path: str | None = None
    """Folder of the shards to validate on; null = path. A stream needs one, unless trainer.limit_val_batches=0."""
    val_split: str = "val"
    """Split to validate on."""
    batch_size: int = 64
    """Images of one optimiser step, over all devices and micro-batches together."""
    micro_batch_size: int | None = None
    """Images that one device holds at a time; a step adds up the gradients of its micro-batches, so this changes memory
    and speed alone. null = a device's whole share of the step."""
    num_workers: int = 0
    """Processes that read and augment; 0 = the training process itself."""
    prefetch_factor: int | None = None
    """Batches that each of these processes reads ahead; null = PyTorch's default, 2."""
    cache_decoded: bool = False
    """Decode all pictures once and keep them in memory, 3 * image_size ** 2 bytes each."""
    token_crops: int = 1
    """DALLE: tokenise every training picture so often, each with its own augmentation; 0 = anew in every step, as
    also where ``image_codes`` draws them. Token shards have settled that already."""
    caption_weights: list[float] = field(default_factory=list)
    """How often a picture is learnt with its first, second, ... caption, relative to each other; empty = all alike.
    Captions beyond the list are not drawn. The BPE learns from all of them, and validation reads the first."""
    max_bad_fraction: float = 0.01
    """Samples that cannot be read are named and left out, up to this fraction of a split; more are an error."""
    verify: bool = True
    """Compare the checksums of token shards before training; about a second for every 2 GB."""
    shuffle_buffer: int = 5000
    """Streams: every worker keeps so many encoded samples in memory and draws from them; 1 = the order of a shard."""
    epoch_size: int = 100_000
    """Streams: samples that count as an epoch, over all devices together."""

    def __post_init__(self) -> None:
        """Validate.

        Raises:
            UserError: a field is out of range; names it.
        """
        at_least_one(self, "batch_size", "shuffle_buffer", "epoch_size")
        super().__post_init__()
        not_negative(self, "num_workers", "token_crops")
        optional = ("micro_batch_size", "prefetch_factor")
        at_least_one(self, *(name for name in optional if getattr(self, name) is not None))
        if self.prefetch_factor is not None and self.num_workers == 0:
            raise UserError(f"prefetch_factor={self.prefetch_factor} needs processes that read ahead: set num_workers=")
        weights = self.caption_weights
        if weights and not (all(0 <= weight < math.inf for weight in weights) and any(weights)):
            raise UserError(f"caption_weights must not be negative, and one must be positive, got {list(weights)}")
        if not 0 <= self.max_bad_fraction <= 1:
            raise UserError(f"max_bad_fraction must lie in [0, 1], got {self.max_bad_fraction}")
        if self.crop and self.cache_decoded:
            raise UserError("crop needs the whole pictures: set cache_decoded=false")
        if self.val_path is not None and is_stream(self.val_path):
            raise UserError(f"val_path={self.val_path} is a stream: validation needs a folder of shards")
        if is_stream(self.path):
            self._check_stream()

    def _check_stream(self) -> None:
        expand(self.path)
        if self.cache_decoded:
            raise UserError(f"path={self.path} is a stream, which has no end: set cache_decoded=false")
        if self.epoch_size < self.batch_size:
            raise UserError(f"epoch_size ({self.epoch_size}) must be at least batch_size ({self.batch_size})")
