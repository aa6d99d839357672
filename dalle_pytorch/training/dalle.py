"""Training of the DALLE on captions and the tokens of a frozen VAE."""

from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dalle_pytorch.data.batches import Batch
from dalle_pytorch.generation.engine import AnyDALLE, generate_image_tokens
from dalle_pytorch.generation.sampling import SamplingConfig, candidate_uniforms
from dalle_pytorch.models.dalle import DALLEConfig
from dalle_pytorch.models.dalle_bart import DALLEBartConfig
from dalle_pytorch.models.mode import eval_mode
from dalle_pytorch.training.base import LitBase, tile
from dalle_pytorch.training.plan import ClusterConfig
from dalle_pytorch.training.run import RunConfig
from dalle_pytorch.training.text import TextConfig

SHOWN_PROMPTS = 6  # prompts in a picture of samples
SHOWN_EACH = 4  # samples of each, one row


@dataclass(kw_only=True)
class TrainDALLEConfig(RunConfig):
    """Settings of train_dalle.py."""

    vae: str | None = None
    """Checkpoint of the image tokenizer; it says the size of pictures, grid and codebook. Only a plan does without."""
    init: str | None = None
    """Checkpoint of a DALLE whose weights to start from, with a new optimiser. It brings its sizes, image tokenizer and
    text tokenizer; model settings that say how to train (dropouts, weights of losses) may still be given."""
    plan: bool = False
    """Only print what the training would cost: parameters, arithmetic, memory, days."""
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    """The machines that a plan is for."""
    model: DALLEConfig = field(default_factory=DALLEConfig)
    """Sizes of the DALLE; text_vocab_size is filled from the text tokenizer."""
    network: str = "dalle"
    """What is trained: "dalle" (settings in model) or "dalle_bart", a DALL·E mini (settings in bart); model=dalle_mini
    and init= choose it."""
    bart: DALLEBartConfig = field(default_factory=DALLEBartConfig)
    """Sizes of a DALL·E mini; vocabulary, grid and codebook are filled from the tokenizers."""
    text: TextConfig = field(default_factory=TextConfig)
    """Text tokenizer."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """How the pictures to look at are drawn."""

    def sizes(self) -> DALLEConfig | DALLEBartConfig:
        """The settings of the network that is trained."""
        return self.bart if self.network == "dalle_bart" else self.model


class LitDALLE(LitBase[AnyDALLE]):
    """Trains a DALLE or a DALLEBart; its VAE stays as it is."""

    monitor = "val/loss"

    def __init__(self, net: AnyDALLE, config: TrainDALLEConfig) -> None:
        super().__init__(net, config.optim, config.seed)
        self.prompts, self.sampling = config.callbacks.prompts, config.sampling

    def training_step(self, batch: Batch, batch_idx: int) -> Float[Tensor, ""]:
        """Loss of a batch; pictures whose tokens are not cached are tokenised here."""
        generator = self.step_generator(batch_idx, "cpu")  # DALLE draws on the CPU, the same on every device
        result = self.net.loss(
            batch["text_tokens"], self.image_tokens(batch), generator=generator, mean=self.mean_over_processes()
        )
        self.log_losses("train", result._asdict(), len(batch["captions"]))
        return result.loss

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
            raise ValueError("the DALLE has no text_tokenizer: set it before training")
        rows = [(prompt, index) for prompt in prompts for index in range(SHOWN_EACH)]
        text = tokenizer.tokenize([prompt for prompt, _ in rows], net.config.text_len, truncate=True)
        uniforms = torch.stack([candidate_uniforms(p, 0, i, net.num_image_tokens) for p, i in rows])
        with eval_mode(net):
            tokens = generate_image_tokens(net, text.to(self.device), uniforms.to(self.device), self.sampling)
            return tile(net.vae.decode(tokens), columns=SHOWN_EACH)
