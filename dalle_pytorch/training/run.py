"""A training run: its folder, its Trainer, its result."""

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_utilities.core.rank_zero import rank_zero_only
from omegaconf import OmegaConf
from pytorch_lightning.plugins import MixedPrecision
from pytorch_lightning.plugins.io import TorchCheckpointIO
from torch import nn
from torch.amp import GradScaler

from dalle_pytorch.checkpoints import checkpoint
from dalle_pytorch.checkpoints.checkpoint import Header
from dalle_pytorch.config import build
from dalle_pytorch.data.datamodule import DataConfig, TextImageDataModule
from dalle_pytorch.errors import UserError
from dalle_pytorch.files import atomic
from dalle_pytorch.models.blocks import BLOCKS
from dalle_pytorch.training.base import LitBase
from dalle_pytorch.training.callbacks import CallbacksConfig, make_callbacks
from dalle_pytorch.training.launch import LauncherConfig
from dalle_pytorch.training.loggers import make_loggers
from dalle_pytorch.training.optim import OptimConfig
from dalle_pytorch.training.precision import fast_precision
from dalle_pytorch.training.preemption import Stopped
from dalle_pytorch.training.progress import StepBar
from dalle_pytorch.training.resume import (
    claim,
    default_folder,
    differences,
    find_last,
    remove_leftovers,
    warn_of_changes,
)
from dalle_pytorch.training.sharding import whole_state
from dalle_pytorch.training.strategies import check_strategy, is_sharded

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
    ".*WeightAveraging callback with a model that overrides.*",  # only sharded models do anything there
    ".*Experiment logs directory .* exists and is not empty.*",  # make_loggers keeps what it holds
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
    launcher: LauncherConfig = field(default_factory=LauncherConfig)
    """Scheduler."""
    trainer: dict[str, Any] = field(default_factory=dict)
    """pytorch_lightning.Trainer: ``_target_`` and its arguments."""
    logger: dict[str, Any] = field(default_factory=dict)
    """Loggers by name, each with ``_target_``; ``save_dir`` is filled in."""
    seed: int = 0
    """Of weights, order, augmentation and noise."""
    out: str | None = None
    """Folder of the run; null = runs/<kind>/<date and time>."""
    resume: bool = False
    """Continue the run in ``out`` from its last checkpoint, or begin it: the same command after every interruption."""
    compile: bool = False
    """Compile the transformers' blocks (torch.compile); pays on GPUs."""

    def __post_init__(self) -> None:
        """Validate.

        Raises:
            ValueError: ``resume`` without ``out``.
        """
        if self.resume and self.out is None:
            raise UserError("resume=true continues the run in a folder: say which with out=")


class Run:
    """The folder of a training, taken or continued. Nothing is written before `fit`.

    Args:
        kind: vae, dalle or clip.
        config: settings.

    Raises:
        FileExistsError: the folder holds files and ``resume`` is off.
        ValueError: the checkpoint to resume from is of another kind, or all are damaged.
    """

    def __init__(self, kind: str, config: RunConfig) -> None:
        # in the settings themselves, so that the run's record says what it was
        self.kind, self.config = kind, replace(config, trainer=fast_precision(config.trainer))
        self.out = _run_folder(kind, config)
        self.last = find_last(self.out / "checkpoints") if config.resume else None
        """Checkpoint that the run continues from."""
        self.header = None if self.last is None else checkpoint.read_header(self.last, kind=kind)
        """Its header."""
        if config.resume and self.last is None:
            left = [path.name for path in (*self.out.glob(f"{kind}.safetensors"), *self.out.glob("checkpoints/*.ckpt"))]
            if left:
                raise FileExistsError(
                    f"{self.out} holds {', '.join(left)} but no step_*.ckpt to go on from; nothing is overwritten: "
                    "start anew with another out="
                )
            log.info("%s has no checkpoint yet: starting at step 0", self.out)
        _quieten()
        pl.seed_everything(config.seed, verbose=False)

    @property
    def device(self) -> torch.device:
        """Where this process may work before the Trainer has chosen: its GPU, unless the run is for a CPU."""
        if self.config.trainer.get("accelerator", "auto") == "cpu" or not torch.cuda.is_available():
            return torch.device("cpu")
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", 0))))

    def check(self, net: nn.Module) -> None:
        """Refuse to resume with another model.

        Raises:
            ValueError: settings of the model (or of a DALLE's VAE) differ; names them with both values.
        """
        if self.header is None:
            return
        differences = [
            f"{key} was {old}, is {new}" for key, old, new in _model_differences(self.header, checkpoint.header(net))
        ]
        if differences:
            raise UserError(
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
            raise UserError(
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
            SystemExit: a signal stopped the run, which is saved.
        """
        config, result = self.config, self.out / f"{self.kind}.safetensors"
        self.check(lit.net)
        if self.last is not None and self.last.is_dir() and not is_sharded(config.trainer):
            raise UserError(
                f"{self.last} holds sharded weights: resume with trainer=fsdp, or make one file of the weights with "
                "dalle-export weights=FOLDER out=FILE.safetensors"
            )
        step = 0 if self.header is None else self.header["training"]["step"]
        if step and step >= config.trainer.get("max_steps", -1) > 0:
            log.info("%s is finished: %d steps. More of them: trainer.max_steps=", self.out, step)
            self._write_finished(result)
            return result
        trainer = make_trainer(config, self.out, lit, step)
        if trainer.is_global_zero:
            self.out.mkdir(parents=True, exist_ok=True)
            remove_leftovers(self.out / "checkpoints")
            if self.last is not None:
                log.info("going on from step %d", step)
                warn_of_changes(self.out / "config.yaml", asdict(config))
            name = "config.yaml" if self.last is None else f"config_from_step_{step:08d}.yaml"
            OmegaConf.save(OmegaConf.create(asdict(config)), self.out / name)
            count = sum(p.numel() for p in lit.net.parameters() if p.requires_grad) / 1e6
            pictures = len(data.train_set)
            log.info("%s: %.2f M parameters, %d training pictures, %s", self.kind, count, pictures, self.out)
        if config.compile:
            for block in (part for part in lit.net.modules() if isinstance(part, BLOCKS)):
                block.compile()
        try:
            trainer.fit(lit, datamodule=data, ckpt_path=self.last, weights_only=True)
        except Stopped as stopped:
            log.warning("%s", stopped)
            stopped.requeue()
            # As a shell reports it; but a failing process could take down the one that asks SLURM for another turn.
            sys.exit(128 + stopped.number if trainer.is_global_zero else 0)
        net, notes = _final(trainer, lit, config.callbacks.keep)
        if trainer.is_global_zero:
            checkpoint.save(net, result, training=notes, overwrite=True)
            log.info("%s", result)
        return result

    def _write_finished(self, result: Path) -> None:
        """The result of a run that was killed after its last checkpoint."""
        if result.is_file() or getattr(rank_zero_only, "rank", 0):
            return
        best = self.out / "checkpoints" / "best.ckpt"
        keep = "best" if self.config.callbacks.keep == "best" and best.exists() else "last"
        path = best if keep == "best" else self.last
        assert path is not None
        step = checkpoint.read_header(path)["training"]["step"]
        checkpoint.save(checkpoint.load(path), result, training={"step": step, "kept": keep})


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoint files, whole or not at all, on any file system."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write beside the target and move over it."""
        with atomic(Path(path)) as temporary:
            torch.save(checkpoint, temporary)


def make_trainer(config: RunConfig, out: Path, lit: LitBase[Any], step: int = 0) -> pl.Trainer:
    """The Trainer of a run, with its loggers and callbacks; ``step`` is where it goes on.

    Raises:
        ValueError: an argument that Trainer does not take, or wandb missing.
    """
    section = dict(config.trainer)
    if "gradient_clip_val" in section:
        raise UserError("clipping is set with optim.clip, not trainer.gradient_clip_val")
    interval = section.get("val_check_interval")
    batches = section.get("max_steps", -1) * section.get("accumulate_grad_batches", 1)
    if isinstance(interval, int) and batches > 0:
        # The last steps are to be validated as well: as many validations as asked for, evenly spread.
        interval *= section.get("accumulate_grad_batches", 1)  # Lightning counts batches, we count steps
        section["val_check_interval"] = batches // max(1, round(batches / interval))
    settings = config.callbacks
    if (steps := section.get("max_steps", -1)) > 0:
        settings = replace(settings, checkpoint_every=steps // max(1, round(steps / settings.checkpoint_every)))
    validates = section.get("limit_val_batches", 1.0) != 0
    check_strategy(section, lit.net.config, config.optim.kind)
    callbacks = make_callbacks(settings, out, lit, validates=validates, sharded=is_sharded(section))
    if section.get("enable_progress_bar", True):
        callbacks.append(StepBar())
    plugins: list[Any] = [] if is_sharded(section) else [AtomicCheckpointIO()]
    if section.get("precision") == "16-mixed" and getattr(lit.net.config, "gradient_scaling", False):
        # every block has a gradient scale of its own, so there is none over all
        device = "cpu" if section.get("accelerator") == "cpu" else "cuda"
        plugins.append(MixedPrecision(section.pop("precision"), device, GradScaler(device, enabled=False)))
    return build(
        section,
        "trainer",
        plugins=plugins,
        logger=make_loggers(config.logger, out, step=step),
        callbacks=callbacks,
        default_root_dir=str(out),
        use_distributed_sampler=False,  # EpochBatches splits a batch itself
    )


def _model_differences(before: Header, now: Header, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    # what a header of an earlier version lacks is at its default
    config_class = checkpoint.KINDS[before["kind"]].config
    yield from differences(asdict(config_class(**before["config"])), now["config"], prefix)
    if before["vae"] is not None and now["vae"] is not None:
        yield from _model_differences(before["vae"], now["vae"], "vae.")


def _final(trainer: pl.Trainer, lit: LitBase[Any], keep: str) -> tuple[nn.Module, dict[str, Any]]:
    """The model that a run ends with, and notes on it; complete in the first process."""
    # the checkpoints to resume from have a monitor too, the step
    best = next((c for c in trainer.checkpoint_callbacks if getattr(c, "monitor", None) == lit.monitor), None)
    path = getattr(best, "best_model_path", "")
    score = getattr(best, "best_model_score", None)
    if keep == "last" or not path:
        notes = {"step": trainer.global_step, "kept": "last"}
        return _whole(lit.net, trainer.is_global_zero) if lit.sharded else lit.net, notes
    step = checkpoint.read_header(path)["training"]["step"]
    notes = {"step": step, "kept": "best", lit.monitor: None if score is None else float(score)}
    return checkpoint.load(path) if trainer.is_global_zero else lit.net, notes


def _whole(net: nn.Module, first: bool) -> nn.Module:
    """A sharded network in one piece, in the first process."""
    state = whole_state(net)
    if not first:
        return net
    whole = checkpoint.build(checkpoint.header(net))
    checkpoint.load_state(whole, state)
    return whole


def _run_folder(kind: str, config: RunConfig) -> Path:
    """Choose and check the folder; the processes that Lightning starts take over that of the first."""
    rank = getattr(rank_zero_only, "rank", 0)  # Lightning sets it when it is imported
    if config.out is not None:
        out = Path(config.out)
    elif rank and OUT_VARIABLE in os.environ:
        return Path(os.environ[OUT_VARIABLE])
    elif int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError("several processes need one folder: say which with out=")
    else:
        out = default_folder(kind)
    out = out.absolute()
    os.environ[OUT_VARIABLE] = str(out)
    if rank == 0:
        claim(out, resume=config.resume)
    return out


def _quieten() -> None:
    """Keep Lightning's notices and advice away from what a person reads."""
    for name in ("pytorch_lightning", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("pytorch_lightning.utilities.rank_zero").setLevel(logging.WARNING)
    for pattern in NOISE:
        warnings.filterwarnings("ignore", pattern)
    torch.set_float32_matmul_precision("high")
