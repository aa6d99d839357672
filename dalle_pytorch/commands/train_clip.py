"""Train a CLIP on image shards: ``train_clip.py data=emoji``."""

from dalle_pytorch.config import entry
from dalle_pytorch.data.datamodule import TextImageDataModule
from dalle_pytorch.models.clip import CLIP
from dalle_pytorch.training.clip import LitCLIP, TrainCLIPConfig
from dalle_pytorch.training.run import Run
from dalle_pytorch.training.text import make_tokenizer
from dalle_pytorch.training.wrong_captions import check_held


@entry("train_clip", TrainCLIPConfig)
def main(config: TrainCLIPConfig) -> float | None:
    """Train; the result is <out>/clip.safetensors, which carries the text tokenizer, the score its loss."""
    run = Run("clip", config)
    data = TextImageDataModule(
        config.data, image_size=config.model.image_size, seed=config.seed, validate=config.validates
    )
    check_held(config.contrast_phrases, data.train_set.some_captions())
    tokenizer = make_tokenizer(config.text, data, run.header)
    config.model.text_vocab_size = tokenizer.vocab_size
    data.set_text(tokenizer, config.model.text_len, truncate=config.text.truncate, dropout=config.text.bpe_dropout)
    net = CLIP(config.model)
    net.text_tokenizer = tokenizer
    return run.fit(LitCLIP(net, config), data)


if __name__ == "__main__":
    main()
