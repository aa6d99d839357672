"""Train a probe on image shards: ``dalle-train-probe data=emoji out=runs/probe``."""

import logging

from dalle_pytorch.checkpoints.loading import load
from dalle_pytorch.config import entry
from dalle_pytorch.data.datamodule import TextImageDataModule
from dalle_pytorch.data.factors import factor_classes, factors_of
from dalle_pytorch.data.splits import open_splits
from dalle_pytorch.errors import UserError
from dalle_pytorch.models.probe import Probe
from dalle_pytorch.training.probe import LitProbe, TrainProbeConfig, through
from dalle_pytorch.training.run import Run

log = logging.getLogger(__name__)


@entry("train_probe", TrainProbeConfig)
def main(config: TrainProbeConfig) -> float | None:
    """Train; the result is <out>/probe.safetensors, which carries its classes."""
    reconstruct = None
    if config.vae is not None:
        vae = load(config.vae, kind="vae")
        if vae.image_size != config.model.image_size:
            raise UserError(
                f"vae={config.vae} is for {vae.image_size} pixels, the probe for {config.model.image_size}; "
                f"set model.image_size={vae.image_size}"
            )
        reconstruct = through(vae)
    run = Run("probe", config)
    train, val = open_splits(config.data)
    data = TextImageDataModule(config.data, image_size=config.model.image_size, seed=config.seed, shards=(train, val))
    metas = train.metas()
    config.model.classes = factor_classes(metas, config.min_pictures)
    if not config.model.classes:
        raise UserError(
            f"{config.data.path} knows no factor (style, concept or factors in its samples' JSON) with two values of "
            f"min_pictures={config.min_pictures} pictures each in {train.split!r}: nothing to probe"
        )
    known = [factors_of(meta) for meta in metas]
    for name, values in config.model.classes.items():
        there = {row[name] for row in known if name in row}
        log.info("%s: %d values of %d have %d pictures or more", name, len(values), len(there), config.min_pictures)
    lit = LitProbe(Probe(config.model), config, known, [factors_of(meta) for meta in val.metas()], reconstruct)
    return run.fit(lit, data)


if __name__ == "__main__":
    main()
