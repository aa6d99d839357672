"""A training run: its folder, its Trainer, its result."""

import importlib.util
import logging
import os
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from omegaconf import OmegaConf
from pytorch_lightning.plugins.io import TorchCheckpointIO
from torch import nn

from dalle_pytorch import checkpoint
from dalle_pytorch.checkpoint import atomic
from dalle_pytorch.config import build
from dalle_pytorch.data.datamodule import DataConfig, TextImageDataModule
from dalle_pytorch.training.base import LitBase
from dalle_pytorch.training.callbacks import CallbacksConfig, make_callbacks
from dalle_pytorch.training.optim import OptimConfig
from dalle_pytorch.training.progress import StepBar

log = logging.getLogger(__name__)

OUT_VARIABLE = "DALLE_PYTORCH_OUT"  # how the processes that Lightning starts learn the folder of the first

# Advice of Lightning that does not fit here: each is answered in this package or is no concern of a reader.
NOISE = (
    ".*does not have many workers.*",  # data.num_workers is a setting
    ".*is smaller than the logging interval.*",
    ".*Checkpoint directory .* exists and is not empty.*",  # a resumed run
    ".*in eval mode at the start of training.*",  # the frozen VAE of a DALLE
    ".*LeafSpec.* is deprecated.*",  # torch, through Lightning
    ".*lr_scheduler.step.. before .optimizer.step.*",  # a resumed LambdaLR
    ".*The `srun` command is available.*",
    ".*callbacks used to create the checkpoint need to be provided.*",  # a resumed run with other intervals
)


@dataclass(kw_only=True)
class RunConfig:
    """Settings that the three trainings share."""

    data: DataConfig = field(default_factory=DataConfig)
    """Pictures and captions."""
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
    out: str | None = None
    """Folder of the run; null = runs/<kind>/<date and time>."""
    resume: bool = False
    """Continue the run in ``out`` from its last checkpoint."""

    def __post_init__(self) -> None:
        """Validate.

        Raises:
            ValueError: ``resume`` without ``out``.
        """
        if self.resume and self.out is None:
            raise ValueError("resume=true continues the run in a folder: say which with out=")


class Run:
    """The folder of a training, taken or continued. Nothing is written before `fit`.

    Args:
        kind: vae, dalle or clip.
        config: settings.

    Raises:
        FileExistsError: the folder holds files and ``resume`` is off.
        FileNotFoundError: nothing is there to resume.
        ValueError: the checkpoint to resume from is of another kind.
    """

    def __init__(self, kind: str, config: RunConfig) -> None:
        self.kind, self.config = kind, config
        self.out = _run_folder(kind, config)
        last = self.out / "checkpoints" / "last.ckpt"
        self.last = last if config.resume and last.is_file() else None
        """Checkpoint that the run continues from."""
        self.header = None if self.last is None else checkpoint.read_header(self.last, kind=kind)
        """Its header."""
        if config.resume and self.last is None:
            log.warning("%s has no checkpoint yet (%s): starting over", self.out, last)
        _quieten()
        pl.seed_everything(config.seed, verbose=False)

    @property
    def device(self) -> torch.device:
        """Where this process may work before the Trainer has chosen: its GPU, unless the run is for a CPU."""
        if self.config.trainer.get("accelerator", "auto") == "cpu" or not torch.cuda.is_available():
            return torch.device("cpu")
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))

    def check(self, net: nn.Module) -> None:
        """Refuse to resume with another model.

        Raises:
            ValueError: settings of the model (or of a DALLE's VAE) differ; names them with both values.
        """
        if self.header is None:
            return
        differences = [
            f"{key} was {old}, is {new}" for key, old, new in _differences(self.header, checkpoint.header(net))
        ]
        if differences:
            raise ValueError(
                f"{self.last} was trained with another model: {'; '.join(differences)}. "
                "Resume with the same settings, or start a new run with another out="
            )

    def check_vae(self, vae: nn.Module) -> None:
        """Refuse to resume a DALLE with other weights of the image tokenizer: its tokens would mean something else.

        Raises:
            ValueError: the weights differ from those in the checkpoint.
        """
        if self.last is None:
            return
        saved, given = checkpoint.load(self.last, kind="dalle").vae.state_dict(), vae.state_dict()
        different = [key for key in saved if key not in given or not torch.equal(saved[key], given[key])]
        if different or len(saved) != len(given):
            raise ValueError(
                f"{self.last} was trained on the tokens of another vae (it differs in {len(different)} tensors, "
                f"{different[0] if different else 'by surplus ones'} first): resume with the vae= of the first start"
            )

    def fit(self, lit: LitBase[Any], data: TextImageDataModule) -> Path:
        """Train, write the weights that the run ends with, and log their path.

        Returns:
            ``<out>/<kind>.safetensors``.

        Raises:
            ValueError: a Trainer or logger setting that does not exist, or a model that differs from the one
                to resume.
        """
        config, result = self.config, self.out / f"{self.kind}.safetensors"
        self.check(lit.net)
        trainer = make_trainer(config, self.out, lit)
        if trainer.is_global_zero:
            self.out.mkdir(parents=True, exist_ok=True)
            OmegaConf.save(OmegaConf.create(asdict(config)), self.out / "config.yaml")
            count = sum(p.numel() for p in lit.net.parameters() if p.requires_grad) / 1e6
            pictures = len(data.train_set)
            log.info("%s: %.2f M parameters, %d training pictures, %s", self.kind, count, pictures, self.out)
        trainer.fit(lit, datamodule=data, ckpt_path=self.last, weights_only=True)
        if trainer.is_global_zero:
            net, notes = _final(trainer, lit, config.callbacks.keep)
            checkpoint.save(net, result, training=notes, overwrite=True)
            log.info("%s", result)
        return result


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoint files, whole or not at all, on any file system."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write beside the target and move over it."""
        with atomic(Path(path)) as temporary:
            torch.save(checkpoint, temporary)


def make_trainer(config: RunConfig, out: Path, lit: LitBase[Any]) -> pl.Trainer:
    """The Trainer of a run, with its loggers and callbacks.

    Raises:
        ValueError: an argument that Trainer does not take, or wandb missing.
    """
    section = dict(config.trainer)
    if "gradient_clip_val" in section:
        raise ValueError("clipping is set with optim.clip, not trainer.gradient_clip_val")
    interval = section.get("val_check_interval")
    batches = section.get("max_steps", -1) * section.get("accumulate_grad_batches", 1)
    if isinstance(interval, int) and batches > 0:
        # The last steps are to be validated as well: as many validations as asked for, evenly spread.
        section["val_check_interval"] = batches // max(1, round(batches / interval))
    every = config.callbacks.checkpoint_every
    if (steps := section.get("max_steps", -1)) > 0:
        config.callbacks.checkpoint_every = steps // max(1, round(steps / every))
    validates = section.get("limit_val_batches", 1.0) != 0
    callbacks = make_callbacks(config.callbacks, out, lit, validates=validates)
    if section.get("enable_progress_bar", True):
        callbacks.append(StepBar())
    return build(
        section,
        "trainer",
        plugins=[AtomicCheckpointIO()],
        logger=make_loggers(config.logger, out),
        callbacks=callbacks,
        default_root_dir=str(out),
        gradient_clip_val=config.optim.clip or None,
        use_distributed_sampler=False,  # EpochBatches splits a batch itself
    )


def make_loggers(sections: dict[str, Any], out: Path) -> list[Any]:
    """The loggers of a run; wandb stays offline unless WANDB_API_KEY is set.

    Raises:
        ValueError: wandb is asked for and not installed, or a logger's argument does not exist.
    """
    loggers = []
    for name, section in sections.items():
        extra: dict[str, Any] = {"save_dir": str(out)}
        if name == "wandb":
            if importlib.util.find_spec("wandb") is None:
                raise ValueError("logger=wandb needs the package wandb: pip install '.[wandb]'")
            # Without a key wandb would ask for one, and without a network wait for a minute.
            extra["offline"] = section.get("offline") or not os.environ.get("WANDB_API_KEY")
            out.mkdir(parents=True, exist_ok=True)
        loggers.append(build(section, f"logger.{name}", **extra))
    return loggers


def _differences(before: checkpoint.Header, now: checkpoint.Header, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    old, new = before["config"], now["config"]
    for key in sorted(old.keys() | new.keys()):
        if old.get(key) != new.get(key):
            yield prefix + key, old.get(key), new.get(key)
    if before["vae"] is not None and now["vae"] is not None:
        yield from _differences(before["vae"], now["vae"], "vae.")


def _final(trainer: pl.Trainer, lit: LitBase[Any], keep: str) -> tuple[nn.Module, dict[str, Any]]:
    """The model that a run ends with, and notes on it."""
    best = next((c for c in trainer.checkpoint_callbacks if getattr(c, "monitor", None)), None)
    path = getattr(best, "best_model_path", "")
    score = getattr(best, "best_model_score", None)
    if keep == "last" or not path:
        return lit.net, {"step": trainer.global_step, "kept": "last"}
    step = checkpoint.read_header(path)["training"]["step"]
    notes = {"step": step, "kept": "best", lit.monitor: None if score is None else float(score)}
    return checkpoint.load(path), notes


def _run_folder(kind: str, config: RunConfig) -> Path:
    """Choose and check the folder; the processes that Lightning starts take over that of the first."""
    if int(os.environ.get("LOCAL_RANK", 0)) and OUT_VARIABLE in os.environ:
        return Path(os.environ[OUT_VARIABLE])
    if config.out is None:
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise ValueError("several processes need one folder: say which with out=")
        out = Path("runs", kind, datetime.now().strftime("%Y-%m-%d_%H-%M-%S"))
    else:
        out = Path(config.out)
    out = out.absolute()
    os.environ[OUT_VARIABLE] = str(out)
    first = int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", 0))) == 0
    if config.resume and not out.is_dir():
        raise FileNotFoundError(f"resume=true, but there is no run in {out}; its folder is set with out=")
    if first and not config.resume and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(
            f"{out} exists and holds files; resume=true continues the run there, another out= starts a new one"
        )
    return out


def _quieten() -> None:
    """Keep Lightning's notices and advice away from what a person reads."""
    for name in ("pytorch_lightning", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("pytorch_lightning.utilities.rank_zero").setLevel(logging.WARNING)
    for pattern in NOISE:
        warnings.filterwarnings("ignore", pattern)
    torch.set_float32_matmul_precision("high")
