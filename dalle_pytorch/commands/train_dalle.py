"""Train a DALLE on image or token shards: ``train_dalle.py vae=runs/vae/mine/vae.safetensors``."""

from dalle_pytorch import DALLE
from dalle_pytorch.checkpoint import describe_tokenizer, load
from dalle_pytorch.config import ConfigError, entry
from dalle_pytorch.data.datamodule import TextImageDataModule
from dalle_pytorch.training.dalle import LitDALLE, TrainDALLEConfig
from dalle_pytorch.training.launch import launch
from dalle_pytorch.training.plan import make_plan
from dalle_pytorch.training.run import Run
from dalle_pytorch.training.text import make_tokenizer


@entry("train_dalle", TrainDALLEConfig)
def main(config: TrainDALLEConfig) -> None:
    """Train; the result is <out>/dalle.safetensors, which carries the VAE and the text tokenizer."""
    if config.plan:
        print(make_plan(config))
        return
    if config.vae is None:
        raise ConfigError("vae= is missing: the checkpoint of the image tokenizer")
    if launch("dalle", config, "dalle_pytorch.commands.train_dalle"):
        return
    run = Run("dalle", config)
    vae = load(config.vae, kind="vae")
    data = TextImageDataModule(config.data, image_size=vae.image_size, seed=config.seed, tokens=True)
    if data.tokenizer is not None:
        data.check_tokenizer(describe_tokenizer(vae), config.vae)
    tokenizer = make_tokenizer(config.text, data, run)
    config.model.text_vocab_size = tokenizer.vocab_size
    data.set_text(tokenizer, config.model.text_len, truncate=config.text.truncate, dropout=config.text.bpe_dropout)
    net = DALLE(config.model, vae=vae)
    net.text_tokenizer = tokenizer
    run.check(net)
    run.check_vae(vae)
    if config.data.token_crops and data.can_cache_tokens:
        data.cache_image_tokens(vae, device=run.device)
    run.fit(LitDALLE(net, config), data)


if __name__ == "__main__":
    main()
