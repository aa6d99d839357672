"""Train an image tokenizer on image shards: ``train_vae.py data=emoji model=base out=runs/vae/mine``."""

from dalle_pytorch.compat.flags import TRAIN_VAE
from dalle_pytorch.config import entry, explicit_overrides
from dalle_pytorch.data.datamodule import TextImageDataModule
from dalle_pytorch.training.run import Run
from dalle_pytorch.training.vae import LitVAE, TrainVAEConfig, check_settings, make_vae, start_from


@entry("train_vae", TrainVAEConfig, flags=TRAIN_VAE)
def main(config: TrainVAEConfig) -> float | None:
    """Train; the result is <out>/vae.safetensors.

    Returns:
        Its PSNR on the validation split, or its LPIPS, where lower is better, if that is part of the loss.
    """
    source = start_from(config, explicit_overrides())
    check_settings(config, explicit_overrides())
    run = Run("vae", config, config.schema)
    data = TextImageDataModule(
        config.data, image_size=config.model.image_size, seed=config.seed, validate=config.validates
    )
    vae = make_vae(config.model) if source is None else source  # new weights are drawn after Run has set the seed
    return run.fit(LitVAE(vae, config), data)


if __name__ == "__main__":
    main()
