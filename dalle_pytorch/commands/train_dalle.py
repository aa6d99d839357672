"""Train a DALLE on image or token shards: ``train_dalle.py vae=runs/vae/mine/vae.safetensors``."""

from dalle_pytorch.checkpoints.checkpoint import describe_tokenizer
from dalle_pytorch.checkpoints.loading import load
from dalle_pytorch.checkpoints.text_encoder import load_text_encoder
from dalle_pytorch.compat.flags import TRAIN_DALLE
from dalle_pytorch.config import entry, explicit_overrides
from dalle_pytorch.data.datamodule import TextImageDataModule
from dalle_pytorch.errors import ConfigError
from dalle_pytorch.training import initial
from dalle_pytorch.training.dalle import LitDALLE, TrainDALLEConfig, check_codes, check_contrast, check_order
from dalle_pytorch.training.plan import make_plan
from dalle_pytorch.training.run import Run
from dalle_pytorch.training.text import make_tokenizer
from dalle_pytorch.training.wrong_captions import check_held


@entry("train_dalle", TrainDALLEConfig, flags=TRAIN_DALLE)
def main(config: TrainDALLEConfig) -> float | None:
    """Train; the result is <out>/dalle.safetensors, which carries VAE and text tokenizer, the score its loss."""
    if config.init is not None:
        initial.inherit_config(config, explicit_overrides())
    check_contrast(config)
    check_order(config)
    if config.plan:
        print(make_plan(config))
        return None
    initial.check_filled(explicit_overrides())
    if (origin := config.init or config.vae) is None:
        raise ConfigError("vae= is missing: the checkpoint of the image tokenizer")
    run = Run("dalle", config, config.schema)
    source = None if config.init is None else load(origin, kind="dalle")
    vae = load(origin, kind="vae") if source is None else source.vae
    data = TextImageDataModule(
        config.data, image_size=vae.image_size, seed=config.seed, tokens=True, validate=config.validates
    )
    initial.check_can_encode(vae, data, origin)
    check_held(config.contrast_phrases, data.train_set.some_captions())
    check_codes(config, vae, cached=data.tokenizer is not None)
    if data.tokenizer is not None:
        data.check_tokenizer(describe_tokenizer(vae), origin)
    if source is None:
        encoder = None
        if config.text_encoder is None:
            tokenizer = make_tokenizer(config.text, data, run.header)
        else:
            encoder, tokenizer = load_text_encoder(config.text_encoder)
        net = config.model.fitted(vae, tokenizer, encoder).build(vae, encoder)
    else:
        tokenizer = initial.tokenizer_of(source, config, data, run.header)
        net = initial.network_from(source, config.model)
        del source  # its weights are in net now
    data.set_text(
        tokenizer,
        net.config.text_len,
        truncate=config.text.truncate,
        dropout=config.text.bpe_dropout,
        codebook_size=vae.codebook_size,
    )
    net.text_tokenizer = tokenizer
    run.check(net)
    run.check_frozen(net)
    if config.image_codes == "likeliest" and config.data.token_crops and data.can_cache_tokens:
        data.cache_image_tokens(vae, device=run.device)
    return run.fit(LitDALLE(net, config), data)


if __name__ == "__main__":
    main()
