"""Train an image tokenizer on image shards: ``train_vae.py data=emoji model=base out=runs/vae/mine``."""

from hydra.core.hydra_config import HydraConfig

from dalle_pytorch.config import entry
from dalle_pytorch.data.datamodule import TextImageDataModule
from dalle_pytorch.models.discrete_vae import DiscreteVAE
from dalle_pytorch.models.vq_vae import VQVAE
from dalle_pytorch.training.launch import launch
from dalle_pytorch.training.run import Run
from dalle_pytorch.training.vae import LitVAE, TrainVAEConfig, check_settings


@entry("train_vae", TrainVAEConfig)
def main(config: TrainVAEConfig) -> None:
    """Train; the result is <out>/vae.safetensors."""
    check_settings(config, HydraConfig.get().overrides.task)
    if launch("vae", config, "dalle_pytorch.commands.train_vae"):
        return
    run = Run("vae", config)
    data = TextImageDataModule(config.data, image_size=config.sizes().image_size, seed=config.seed)
    net = DiscreteVAE(config.model) if config.network == "dvae" else VQVAE(config.vq)
    run.fit(LitVAE(net, config), data)


if __name__ == "__main__":
    main()
