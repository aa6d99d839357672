"""Training of the DALLE on captions and the tokens of a frozen VAE."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from omegaconf import MISSING
from torch import Tensor

from dalle_pytorch.config import RENAMED, register
from dalle_pytorch.data.batches import Batch
from dalle_pytorch.errors import ConfigError, UserError
from dalle_pytorch.generation.sampling import SamplingConfig, candidate_uniforms
from dalle_pytorch.generation.strategies import find_strategy, generate_image_tokens
from dalle_pytorch.models.dalle import DALLEConfig
from dalle_pytorch.models.dalle_bart import DALLEBartConfig
from dalle_pytorch.models.image_tokenizer import CodeLogits, ImageTokenizer
from dalle_pytorch.models.mode import eval_mode
from dalle_pytorch.models.text_to_image import TextToImage
from dalle_pytorch.models.transformer import ForeignConfig
from dalle_pytorch.text.phrases import check_phrases
from dalle_pytorch.training.base import LitBase, tile
from dalle_pytorch.training.config import RunConfig
from dalle_pytorch.training.plan import HardwareConfig
from dalle_pytorch.training.schedules import ScheduleConfig, scheduled
from dalle_pytorch.training.text import TextConfig
from dalle_pytorch.training.wrong_captions import read_wrong, wrong_caption

SHOWN_PROMPTS = 6  # prompts in a picture of samples
SHOWN_EACH = 4  # samples of each, one row
IMAGE_CODES = ("likeliest", "sampled", "soft")
MODELS: dict[str, type[Any]] = {"dalle": DALLEConfig, "dalle_bart": DALLEBartConfig}
"""Schemas of the options of model=."""
for _name, _config in MODELS.items():
    register(_name, _config, group="model")
RENAMED["bart"] = "say model.NAME=, with model=dalle_mini, model=dalle_mega or model=bart"
RENAMED["cluster"] = "say hardware.NAME="
for _item in fields(ForeignConfig):
    RENAMED[f"model.{_item.name}"] = f"say model.foreign.{_item.name}="


@dataclass(kw_only=True)
class TrainDALLEConfig(RunConfig):
    """Settings of train_dalle.py."""

    vae: str | None = None
    """Checkpoint of the image tokenizer; it says the size of pictures, grid and codebook. Only a plan does without."""
    init: str | None = None
    """Checkpoint of a DALLE whose weights to start from, with a new optimiser. It brings its sizes, image tokenizer and
    text tokenizer; model settings that say how to train (dropouts, weights of losses) may still be given, and
    model.contrast_weight is not taken over."""
    plan: bool = False
    """Only print what the training would cost: parameters, arithmetic, memory, days."""
    hardware: HardwareConfig = field(default_factory=HardwareConfig)
    """The machines that a plan is for."""
    model: Any = MISSING
    """Sizes; model=dalle_mini, dalle_mega and bart are a DALL·E mini's, an encoder-decoder, all others a DALLE's.
    Vocabularies and grid are filled from the tokenizers."""
    image_codes: str = "likeliest"
    """Which codes of a picture are learned: "likeliest" (the ones that are cached), "sampled" (drawn anew every time by
    the image tokenizer's probabilities), or "soft" (drawn likewise, and their probabilities predicted). The last two
    hold back a network that is large for its data (the paper, footnote 6); validation is always on the likeliest."""
    contrast_phrases: list[str] = field(default_factory=list)
    """Phrases that exclude each other, such as the names of styles. With model.contrast_weight a picture's wrong
    caption is half the time its own with another phrase, where it holds one, and otherwise another picture's."""
    random_order: ScheduleConfig = field(default_factory=lambda: ScheduleConfig(start=0.0, end=0.0))
    """Share of the images whose tokens are learned in a random order, over the training, with model.any_order. One that
    falls from 1 to 0, ``random_order.start=1 random_order.share=0.75``, ends in raster order, as RAR does (there it
    stays at 1 for half of the training and falls in a line over the next quarter). One that stays above 0 keeps
    sampling.strategy=random as well."""
    text: TextConfig = field(default_factory=TextConfig)
    """Text tokenizer."""
    text_encoder: str | None = None
    """A text encoder of transformers whose features stand for captions: a folder, or an id of the hub (T5, CLIP, BERT
    and their kin). It brings its tokenizer, stays frozen and is saved along; captions are not predicted."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """How the pictures to look at are drawn."""

    def __post_init__(self) -> None:
        """Validate.

        Raises:
            ValueError: no such image_codes, or phrases that cannot take each other's place.
        """
        super().__post_init__()
        if self.image_codes not in IMAGE_CODES:
            raise UserError(f"image_codes must be one of {', '.join(IMAGE_CODES)}, got {self.image_codes!r}")
        check_phrases(self.contrast_phrases, "contrast_phrases")
        if self.text_encoder is not None and (
            self.text.tokenizer != "bpe" or self.text.tokenizer_from or self.text.path or self.text.bpe_dropout
        ):
            raise UserError(
                f"text_encoder={self.text_encoder} brings its tokenizer, which has no BPE dropout: leave "
                "text.tokenizer, text.tokenizer_from and text.bpe_dropout out"
            )
        if self.text_encoder is not None and self.init is not None:
            raise UserError(f"init={self.init} brings its text encoder, if it has one: leave text_encoder out")

    @property
    def schema(self) -> str:
        """Option of ``schema/model`` that the model's settings are of."""
        return next(name for name, config in MODELS.items() if type(self.model) is config)


class LitDALLE(LitBase[TextToImage]):
    """Trains a network of captions to image tokens; its VAE stays as it is."""

    monitor = "val/loss"

    def __init__(self, net: TextToImage, config: TrainDALLEConfig) -> None:
        super().__init__(net, config.optim, config.seed)
        self.prompts, self.sampling = config.callbacks.prompts, config.sampling
        self.image_codes, self.contrast_phrases = config.image_codes, config.contrast_phrases
        self.bpe_dropout, self.random_order = config.text.bpe_dropout, config.random_order

    def training_step(self, batch: Batch, batch_idx: int) -> Float[Tensor, ""]:
        """Loss of a batch; pictures whose tokens are not cached are tokenised here."""
        generator = self.step_generator(batch_idx, "cpu")  # DALLE draws on the CPU, the same on every device
        settings: dict[str, Any] = {"generator": generator, "mean": self.mean_over_step(batch)}
        if self.image_codes == "likeliest":
            image_tokens = self.image_tokens(batch)
        else:
            vae = cast(CodeLogits, self.net.vae)  # check_codes saw to it
            image_tokens, probabilities = sampled_codes(vae, batch["images"], generator)
            if self.image_codes == "soft":
                settings["image_targets"] = probabilities
        if getattr(self.net.config, "contrast_weight", 0.0):
            settings["wrong_text"] = self.wrong_text(batch, batch_idx)
        if share := scheduled(self.random_order, self.global_step, self.total_steps):
            settings["order"] = orders(len(image_tokens), image_tokens.shape[1], share, generator).to(
                image_tokens.device
            )
        result = self.net.loss(batch["text_tokens"], image_tokens, **settings)
        self.log_losses("train", result._asdict(), len(batch["captions"]))
        return result.loss

    def mean_over_step(self, batch: Batch) -> Callable[[Tensor], Tensor] | None:
        """Averages a number of caption tokens over the processes and micro-batches of a step; None where there is one.

        Of the other micro-batches the captions before caption_dropout are known, so with it the mean is an estimate.
        """
        mean = self.mean_over_processes()
        if "step_text_tokens" not in batch:
            return mean
        whole, own = caption_tokens(batch["step_text_tokens"]), caption_tokens(batch["text_tokens"])
        ratio = whole / (own * self.trainer.accumulate_grad_batches)
        return lambda count: count * ratio if mean is None else mean(count * ratio)

    def wrong_text(self, batch: Batch, batch_idx: int) -> Int[Tensor, "b t"]:
        """Tokens of a wrong caption for each picture of a batch; of its own where there is no other."""
        captions = batch["captions"]
        parts = [batch.get("step_captions", captions)]
        if self.trainer.world_size > 1:
            own, parts = parts[0], [[]] * self.trainer.world_size
            torch.distributed.all_gather_object(parts, own)
        everyones = sorted(set(itertools.chain.from_iterable(parts)))
        rngs = self.sample_rngs(batch, batch_idx, "contrast")
        wrong = [
            wrong_caption(caption, everyones, self.contrast_phrases, rng)
            for caption, rng in zip(captions, rngs, strict=True)
        ]
        tokens, differ = read_wrong(
            wrong, captions, self.net.text_tokenizer, self.net.config.text_len, dropout=self.bpe_dropout, rngs=rngs
        )
        text_tokens = batch["text_tokens"]
        return torch.where(differ[:, None].to(text_tokens.device), tokens.to(text_tokens.device), text_tokens)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Loss without dropout, nats per token."""
        result = self.net.loss(batch["text_tokens"], self.image_tokens(batch))
        self.log_losses("val", result._asdict(), len(batch["captions"]), bar="image")

    def image_tokens(self, batch: Batch) -> Int[Tensor, "b n"]:
        """The batch's image tokens, cached or new."""
        if "image_tokens" in batch:
            return batch["image_tokens"]
        with torch.no_grad():
            return self.net.vae.encode(batch["images"])

    def pictures(self, batch: Batch) -> Float[Tensor, "3 H W"]:
        """Samples for fixed prompts, the same random numbers at every step; a row a prompt."""
        prompts = list(self.prompts) or list(dict.fromkeys(batch["captions"]))[:SHOWN_PROMPTS]
        net, tokenizer = self.net, self.net.text_tokenizer
        if tokenizer is None:
            raise UserError("the DALLE has no text_tokenizer: set it before training")
        rows = [(prompt, index) for prompt in prompts for index in range(SHOWN_EACH)]
        text = tokenizer.tokenize([prompt for prompt, _ in rows], net.config.text_len, truncate=True)
        uniforms = torch.stack([candidate_uniforms(p, 0, i, net.num_image_tokens) for p, i in rows])
        with eval_mode(net):
            tokens = generate_image_tokens(net, text.to(self.device), uniforms.to(self.device), self.sampling)
            return tile(net.vae.decode(tokens), columns=SHOWN_EACH)


def orders(images: int, count: int, share: float, generator: torch.Generator) -> Int[Tensor, "images n"]:
    """An order of ``count`` positions for each image: a random one for a share of them, else the raster's.

    Source:
        Yu et al. 2024, https://arxiv.org/abs/2411.00776, section 3.2.
    """
    random = torch.rand(images, count, generator=generator).argsort(dim=1)
    chosen = torch.rand(images, 1, generator=generator) < share
    return torch.where(chosen, random, torch.arange(count))


def caption_tokens(text_tokens: Int[Tensor, "b t"]) -> Int[Tensor, ""]:
    """Tokens that the text loss of a batch is a mean over: those of captions, and the pad that ends each."""
    return (text_tokens != 0).sum() + (text_tokens == 0).any(dim=1).sum()


def sampled_codes(
    vae: CodeLogits, images: Float[Tensor, "b c H W"], generator: torch.Generator
) -> tuple[Int[Tensor, "b n"], Float[Tensor, "b n k"]]:
    """Codes drawn from the image tokenizer's distribution, and that distribution.

    Args:
        vae: image tokenizer that knows probabilities.
        images: pictures in [0, 1].
        generator: of the CPU, so that every device draws the same.
    """
    with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
        logits = vae.encode_logits(images).flatten(2).mT
    uniforms = torch.rand(logits.shape[:2], generator=generator).to(logits.device)
    tokens = SamplingConfig().pick(logits.flatten(0, 1), uniforms.flatten()).view(uniforms.shape)
    return tokens, logits.softmax(dim=-1)


def check_contrast(config: TrainDALLEConfig) -> None:
    """Refuse settings of the contrastive loss that change nothing.

    Raises:
        ConfigError: the network has no such loss, or it has no weight, or no wrong captions.
    """
    if not hasattr(config.model, "contrast_weight"):
        if config.contrast_phrases:
            raise ConfigError("contrast_phrases is not there for a DALL·E mini: leave it out")
    elif config.contrast_phrases and not config.model.contrast_weight:
        raise ConfigError("contrast_phrases changes nothing while model.contrast_weight is 0: set it, e.g. to 0.3")
    elif config.model.contrast_weight and config.data.batch_size == 1 and not config.contrast_phrases:
        raise ConfigError(
            "model.contrast_weight with data.batch_size=1 has no other picture's caption to take: raise it, or give "
            "contrast_phrases"
        )


def check_order(config: TrainDALLEConfig) -> None:
    """Refuse random orders that the network cannot learn, shares that are none, and a network that never sees one.

    Raises:
        ConfigError: says which.
    """
    schedule, can = config.random_order, getattr(config.model, "any_order", False)
    shares = (schedule.start, schedule.start if schedule.shape == "constant" else schedule.end)
    if find_strategy(config.sampling.strategy).order is not None and not can:
        raise ConfigError(
            f"sampling.strategy={config.sampling.strategy} needs a model of any order: model.any_order=true"
        )
    if not all(0 <= share <= 1 for share in shares):
        raise ConfigError(f"random_order.start and .end are shares of the images, in [0, 1], got {shares}")
    if any(shares) and not can:
        raise ConfigError(
            "random_order needs a network that is told which position comes next: model.any_order=true "
            "model.shift_tokens=false, with full attention (not there for a DALL·E mini)"
        )
    if can and not any(shares) and config.init is None:
        raise ConfigError("model.any_order never sees another order than the raster's: set random_order.start=1")


def check_codes(config: TrainDALLEConfig, vae: ImageTokenizer, *, cached: bool) -> None:
    """Refuse to draw codes where there are only the likeliest.

    Args:
        config: says which codes are learned.
        vae: image tokenizer.
        cached: whether the data holds tokens in place of pictures.

    Raises:
        ConfigError: the network has no soft loss, ``vae`` no distribution over codes, or the data no pictures.
    """
    if config.image_codes == "likeliest":
        return
    if config.image_codes == "soft" and not config.model.has_soft_targets:
        raise ConfigError("image_codes=soft is not there for a DALL·E mini: use sampled or likeliest")
    if not hasattr(vae, "encode_logits"):
        raise ConfigError(
            f"image_codes={config.image_codes} draws codes by their probability, and a {type(vae).__name__} gives "
            "none: set image_codes=likeliest"
        )
    if cached:
        raise ConfigError(
            f"image_codes={config.image_codes} draws new codes of every picture, and the data holds tokens: "
            "train on pictures, or set image_codes=likeliest"
        )
