"""Settings that all trainings share."""

from dataclasses import dataclass, field
from typing import Any

from dalle_pytorch.config import RENAMED
from dalle_pytorch.data.config import DataConfig
from dalle_pytorch.errors import ConfigError, UserError, at_least_one, not_negative
from dalle_pytorch.training.optim import OptimConfig

RENAMED["launcher"] = "say hydra.launcher.NAME= (the names are those of hydra-submitit-launcher), or launcher=slurm"


@dataclass(kw_only=True)
class CallbacksConfig:
    """Averaging, pictures, checkpoints."""

    ema_decay: float = 0.999
    """Decay of the averaged weights, which are validated and kept; 0 = off."""
    picture_every: int = 500
    """A picture at the first validation after so many steps; 0 = none."""
    prompts: list[str] = field(default_factory=list)
    """DALLE: what to draw in the pictures; empty = the first captions of the validation split."""
    checkpoint_every: int = 500
    """Steps between checkpoints to resume from; the last step has one, too."""
    keep_last: int = 2
    """How many of these are kept; with one alone a damaged file would be the end of the run."""
    keep_every: int = 0
    """Checkpoints of every so many steps are kept for good, a multiple of checkpoint_every; 0 = none."""
    activation_scales: bool = False
    """Log the root mean square of every transformer block's output."""
    keep: str = "best"
    """Which weights the run ends with: "best" (on the validation split) or "last"."""
    custom: dict[str, Any] = field(default_factory=dict)
    """Callbacks of your own by name, each with ``_target_`` and its arguments."""

    def __post_init__(self) -> None:
        """Validate.

        Raises:
            UserError: a field is out of range; names it.
        """
        if not 0 <= self.ema_decay < 1:
            raise UserError(f"ema_decay must lie in [0, 1), 0 = off; got {self.ema_decay}")
        not_negative(self, "picture_every", "keep_every")
        at_least_one(self, "checkpoint_every", "keep_last")
        if self.keep_every % self.checkpoint_every:
            raise UserError(
                f"keep_every ({self.keep_every}) must be a multiple of checkpoint_every ({self.checkpoint_every})"
            )
        if self.keep not in ("best", "last"):
            raise UserError(f'keep must be "best" or "last", got {self.keep!r}')


@dataclass(kw_only=True)
class RunConfig:
    """Settings that all trainings share."""

    data: DataConfig = field(default_factory=DataConfig)
    """Images and captions."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimiser."""
    callbacks: CallbacksConfig = field(default_factory=CallbacksConfig)
    """Averaging, pictures, checkpoints."""
    trainer: dict[str, Any] = field(default_factory=dict)
    """pytorch_lightning.Trainer: ``_target_`` and its arguments."""
    logger: dict[str, Any] = field(default_factory=dict)
    """Loggers by name, each with ``_target_``; ``save_dir`` is filled in."""
    seed: int = 0
    """Of weights, order, augmentation and noise."""
    out: str = "???"
    """Folder of the run, or of a sweep; by default runs/<kind>/<date and time>."""
    resume: bool = False
    """Continue the run in ``out`` from its last checkpoint, or begin it: the same command after every interruption."""
    compile: bool = False
    """Compile the transformers' blocks, or an image tokenizer's networks (torch.compile); pays on GPUs, and in the
    tokenizer on CPUs."""
    matmul_precision: str = "high"
    """Of products in fp32 on GPUs: "highest", or "high" (TF32) or "medium" (bfloat16), which are faster."""

    @property
    def validates(self) -> bool:
        """Whether the settings ask for validation."""
        return self.trainer.get("limit_val_batches", 1.0) != 0

    def __post_init__(self) -> None:
        """Validate.

        Raises:
            ConfigError: a Trainer setting that another setting stands for; names it.
            UserError: no such ``matmul_precision``.
        """
        if self.matmul_precision not in ("highest", "high", "medium"):
            raise UserError(f'matmul_precision must be "highest", "high" or "medium", got {self.matmul_precision!r}')
        if "gradient_clip_val" in self.trainer:
            raise ConfigError("clipping is set with optim.clip, not trainer.gradient_clip_val")
        if (parts := self.trainer.get("accumulate_grad_batches", 1)) != 1:
            size = self.data.batch_size
            raise ConfigError(
                f"trainer.accumulate_grad_batches={parts}: data.batch_size is what one optimiser step sees, and "
                "data.micro_batch_size what one process holds at a time. On one process the same step as before is "
                f"data.batch_size={size * parts} data.micro_batch_size={size}"
            )
