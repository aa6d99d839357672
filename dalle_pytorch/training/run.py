"""A training run: its folder, its Trainer, its result."""

import logging
import os
import socket
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from lightning_utilities.core.rank_zero import rank_zero_only
from omegaconf import OmegaConf
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers import WandbLogger
from pytorch_lightning.plugins import MixedPrecision
from pytorch_lightning.plugins.environments import LightningEnvironment, SLURMEnvironment, TorchElasticEnvironment
from pytorch_lightning.plugins.io import TorchCheckpointIO
from torch import nn
from torch.amp import GradScaler

from dalle_pytorch.checkpoints import checkpoint
from dalle_pytorch.checkpoints.checkpoint import Header
from dalle_pytorch.config import build, explicit_overrides
from dalle_pytorch.data.datamodule import TextImageDataModule
from dalle_pytorch.data.urls import is_stream
from dalle_pytorch.errors import ConfigError, UserError
from dalle_pytorch.files import atomic, ensure_empty, write_json
from dalle_pytorch.training.base import LitBase
from dalle_pytorch.training.callbacks import make_callbacks
from dalle_pytorch.training.config import RunConfig
from dalle_pytorch.training.loggers import make_loggers
from dalle_pytorch.training.precision import fast_precision
from dalle_pytorch.training.preemption import PreemptedError
from dalle_pytorch.training.progress import StepBar
from dalle_pytorch.training.resume import differences, find_last, remove_leftovers, warn_of_changes
from dalle_pytorch.training.sharding import whole_state
from dalle_pytorch.training.strategies import check_strategy, is_sharded

log = logging.getLogger(__name__)

SWEEP_FILES = ("multirun.yaml", "scores.csv", ".submitit")
"""What Hydra and its launchers write into a folder before the run in it begins."""
PACKAGES = ("torch", "pytorch-lightning", "hydra-core", "numpy", "transformers", "dalle-pytorch-lab")
"""Versions that a run records."""

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


class Run:
    """The folder of a training, taken or continued. Nothing is written before `fit`.

    Args:
        kind: vae, dalle, clip or probe.
        config: settings; ``out`` is the folder.
        schema: option of ``schema/model`` that the settings of the model are of; "" = the command's own.

    Raises:
        FileExistsError: the folder holds files and ``resume`` is off.
        UserError: several processes were started without a folder in common, or the checkpoint to resume from is of
            another kind, or all are damaged.
    """

    def __init__(self, kind: str, config: RunConfig, schema: str = "") -> None:
        check_folder(config)
        # in the settings themselves, so that the run's record says what it was
        self.kind, self.config, self.schema = kind, replace(config, trainer=fast_precision(config.trainer)), schema
        self.out = Path(config.out).absolute()
        self.first = rank() == 0
        if self.first and not config.resume:
            advice = "resume=true continues the run there, another out= starts a new one"
            ensure_empty(self.out, advice, ignore=lambda path: path.name in SWEEP_FILES)
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
        torch.set_float32_matmul_precision(config.matmul_precision)
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

    def check_frozen(self, net: nn.Module) -> None:
        """Refuse to resume a DALLE with other weights of its image tokenizer or its text encoder.

        Its tokens or its captions would mean something else.

        Raises:
            ValueError: the weights differ from those in the checkpoint.
        """
        if self.last is None:
            return
        before = checkpoint.load(self.last, kind="dalle")
        for name, what, setting in (("vae", "the tokens", "vae="), ("text_encoder", "captions", "text_encoder=")):
            old, new = (getattr(model, name, None) for model in (before, net))
            saved, given = ({} if part is None else part.state_dict() for part in (old, new))
            different = [key for key in saved if key not in given or not torch.equal(saved[key], given[key])]
            if different or len(saved) != len(given):
                raise UserError(
                    f"{self.last} was trained on {what} of another {name} (it differs in {len(different)} tensors, "
                    f"{different[0] if different else 'by surplus ones'} first): resume with the {setting} of the "
                    "first start"
                )

    def fit(self, lit: LitBase[Any], data: TextImageDataModule) -> float | None:
        """Train, write the weights that the run ends with, and log their path, ``<out>/<kind>.safetensors``.

        Returns:
            The value of ``lit.monitor`` of these weights; None where nothing was validated.

        Raises:
            UserError: a Trainer or logger setting that does not exist, or a model that differs from the one to resume.
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
            return self._write_finished(result, lit.monitor)
        if data.val_set is None and not is_stream(config.data.path):  # of a stream it has to be said
            config = replace(config, trainer={**config.trainer, "limit_val_batches": 0})
        trainer = make_trainer(config, self.out, lit, step, accumulate=data.accumulate)
        handler = self._begin(trainer, lit, data, step) if trainer.is_global_zero else None
        if config.compile:
            lit.compile_parts()
        try:
            trainer.fit(lit, datamodule=data, ckpt_path=self.last, weights_only=True)
            net, notes = _final(trainer, lit, config.callbacks.keep)
            if trainer.is_global_zero:
                checkpoint.save(net, result, training=notes, overwrite=True)
                log.info("%s", result)
        except PreemptedError as stopped:
            log.warning("%s", stopped)
            stopped.requeue()
            # As a shell reports it; but a failing process could take down the one that asks SLURM for another turn.
            sys.exit(128 + stopped.number if trainer.is_global_zero else 0)
        finally:
            for logger in trainer.loggers:
                if isinstance(logger, WandbLogger) and trainer.is_global_zero:
                    logger.experiment.finish()  # the next run of a sweep is one of its own
            if handler is not None:
                logging.getLogger().removeHandler(handler)
                handler.close()
        return notes.get(lit.monitor)

    def _begin(self, trainer: pl.Trainer, lit: LitBase[Any], data: TextImageDataModule, step: int) -> logging.Handler:
        """Write what the run is: its settings, what started it and which versions it runs on; and begin its log."""
        settings = asdict(self.config)
        self.out.mkdir(parents=True, exist_ok=True)
        handler = logging.FileHandler(self.out / f"train_{self.kind}.log")
        logging.getLogger().addHandler(handler)
        remove_leftovers(self.out / "checkpoints")
        suffix = "" if self.last is None else f"_from_step_{step:08d}"
        if self.last is not None:
            log.info("going on from step %d", step)
            if (self.out / "config.yaml").is_file():
                warn_of_changes(self.out / "config.yaml", settings)
        schema = [f"schema/model/{self.schema}@model"] if self.schema else []
        defaults = [f"train_{self.kind}_schema", "base", "run", *schema, "_self_"]
        # With its defaults the file is a configuration of its own: train_vae.py config=<out>/config.yaml
        OmegaConf.save(OmegaConf.create({"defaults": defaults, **settings}), self.out / f"config{suffix}.yaml")
        record: dict[str, Any] = {
            "command": sys.argv,
            "started": datetime.now().isoformat(timespec="seconds"),
            "host": socket.gethostname(),
            "commit": git_commit(),
            "versions": {name: installed_version(name) for name in PACKAGES},
        }
        if HydraConfig.initialized():
            hydra = HydraConfig.get()
            record["overrides"] = list(hydra.overrides.task)
            (self.out / ".hydra").mkdir(exist_ok=True)
            OmegaConf.save(hydra.overrides.task, self.out / ".hydra" / f"overrides{suffix}.yaml")
        write_json(self.out / f"run{suffix}.json", record)
        for logger in trainer.loggers:
            logger.log_hyperparams({key: value for key, value in settings.items() if key != "logger"})
        count = sum(p.numel() for p in lit.net.parameters() if p.requires_grad) / 1e6
        log.info("%s: %.2f M parameters, %d training pictures, %s", self.kind, count, len(data.train_set), self.out)
        return handler

    def _write_finished(self, result: Path, monitor: str) -> float | None:
        """The score of a run that has ended, and its result if it was killed after its last checkpoint."""
        best = self.out / "checkpoints" / "best.ckpt"
        keep = "best" if self.config.callbacks.keep == "best" and best.exists() else "last"
        path = best if keep == "best" else self.last
        assert path is not None
        if not result.is_file() and self.first:
            step = checkpoint.read_header(path)["training"]["step"]
            checkpoint.save(checkpoint.load(path), result, training={"step": step, "kept": keep})
        return checkpoint.read_header(result)["training"].get(monitor)


def rank() -> int:
    """This process's number among those of the training; Lightning finds it out when it is imported."""
    return getattr(rank_zero_only, "rank", 0) or 0


def check_folder(config: RunConfig) -> None:
    """Refuse the default folder, whose name is the time, where several processes or several starts must agree on one.

    Raises:
        UserError: says why ``out`` is needed.
    """
    if not HydraConfig.initialized() or "out" in explicit_overrides() or HydraConfig.get().mode == RunMode.MULTIRUN:
        return
    if config.resume:
        raise ConfigError("resume=true continues the run in a folder: say which with out=")
    if not interactive():
        try:
            outside = next((kind() for kind in (TorchElasticEnvironment, SLURMEnvironment) if kind.detect()), None)
        except RuntimeError as error:  # how srun was called
            raise UserError(str(error)) from error
        if outside is not None and outside.world_size() > 1:
            raise UserError("several processes need one folder: say which with out=")


def interactive() -> bool:
    """Whether SLURM has given out machines, as to a shell, but did not start this process (srun would number it)."""
    return "SLURM_NTASKS" in os.environ and "SLURM_PROCID" not in os.environ


def installed_version(name: str) -> str | None:
    """The version of a distribution; None where it is not installed, as this package may be used from a checkout."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def git_commit() -> str | None:
    """The commit of the checkout that this package is in, with "+" if it was changed; None outside of one."""
    folder = Path(__file__).parents[2]
    if not (folder / ".git").exists():
        return None
    ask = ["git", "-C", str(folder), "describe", "--always", "--abbrev=40", "--dirty=+", "--exclude=*"]
    try:
        return subprocess.run(ask, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoint files, whole or not at all, on any file system."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write beside the target and move over it."""
        with atomic(Path(path)) as temporary:
            torch.save(checkpoint, temporary)


def make_trainer(
    config: RunConfig, out: Path, lit: LitBase[Any], step: int = 0, *, accumulate: Callable[[int], int] = lambda _: 1
) -> pl.Trainer:
    """The Trainer of a run, with its loggers and callbacks.

    Args:
        config: settings.
        out: folder of the run.
        lit: what it trains.
        step: where it goes on.
        accumulate: micro-batches of an optimiser step, for a number of processes.

    Raises:
        UserError: an argument that Trainer does not take.
    """
    section = dict(config.trainer)
    check_strategy(section, lit.net.config, config.optim.kind)
    sharded = is_sharded(section)
    callbacks = make_callbacks(
        config.callbacks,
        out,
        lit,
        validates=config.validates,
        sharded=sharded,
        count=lit.forward_alone and not config.compile,
    )
    if section.get("enable_progress_bar", True):
        callbacks.append(StepBar())
    plugins: list[Any] = [] if sharded else [AtomicCheckpointIO()]
    if interactive():  # Lightning would take the shell's number of tasks for that of its processes
        plugins.append(LightningEnvironment())
    if section.get("precision") == "16-mixed" and getattr(lit.net.config, "gradient_scaling", False):
        # every block has a gradient scale of its own, so there is none over all
        device = "cpu" if section.get("accelerator") == "cpu" else "cuda"
        plugins.append(MixedPrecision(section.pop("precision"), device, GradScaler(device, enabled=False)))
    trainer = build(
        section,
        "trainer",
        plugins=plugins,
        logger=make_loggers(config.logger, out, step=step),
        callbacks=callbacks,
        default_root_dir=str(out),
        use_distributed_sampler=False,  # EpochBatches splits a batch itself
    )
    trainer.accumulate_grad_batches = parts = accumulate(trainer.world_size)
    if isinstance(trainer.val_check_interval, int):
        trainer.val_check_interval *= parts  # Lightning counts batches, we count optimiser steps
    return trainer


def _model_differences(before: Header, now: Header, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    # what a header of an earlier version lacks is at its default
    yield from differences(asdict(checkpoint.config_of(before)), now["config"], prefix)
    for part in ("vae", "text_encoder"):
        if before.get(part) is not None and now[part] is not None:
            yield from _model_differences(before[part], now[part], f"{part}.")
    if now["text_encoder"] is not None and before["text_tokenizer"] != now["text_tokenizer"]:
        yield "text tokenizer", "another one", f"that of the text encoder ({now['text_tokenizer']['kind']})"


def _final(trainer: pl.Trainer, lit: LitBase[Any], keep: str) -> tuple[nn.Module, dict[str, Any]]:
    """The model that a run ends with, and notes on it; complete in the first process."""
    best = next((c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)), None)
    path = "" if best is None else best.best_model_path
    if keep == "last" or best is None or not path:
        score, step = trainer.callback_metrics.get(lit.monitor), trainer.global_step
        net = _whole(lit.net, trainer.is_global_zero) if lit.sharded else lit.net
    else:
        score, step = best.best_model_score, checkpoint.read_header(path)["training"]["step"]
        net = checkpoint.load(path) if trainer.is_global_zero else lit.net
    notes = {"step": step, "kept": "best" if path and keep == "best" else "last"}
    return net, notes if score is None else {**notes, lit.monitor: float(score)}


def _whole(net: nn.Module, first: bool) -> nn.Module:
    """A sharded network in one piece, in the first process."""
    state = whole_state(net)
    if not first:
        return net
    whole = checkpoint.build(checkpoint.header(net))
    checkpoint.load_state(whole, state)
    return whole


def _quieten() -> None:
    """Keep Lightning's notices and advice away from what a person reads."""
    for name in ("pytorch_lightning", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("pytorch_lightning.utilities.rank_zero").setLevel(logging.WARNING)
    for pattern in NOISE:
        warnings.filterwarnings("ignore", pattern)
