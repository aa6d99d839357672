"""The contract of stage two: captions to image tokens, whatever the network.

Training, generation and evaluation talk to a DALLE or a DALLEBart through these names only. It is a base class as
ImageTokenizer is, since trainers need an ``nn.Module`` and what the networks share is then written once.

Axes: b batch, t text tokens, n image tokens, m image tokens given, q = min(m + 1, n) image positions, p predicted text
tokens, v text vocabulary, k codebook_size.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, Protocol, TypeVar, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from dalle_pytorch.errors import UserError
from dalle_pytorch.models.attention import StreamView
from dalle_pytorch.models.checks import check_ids
from dalle_pytorch.models.image_tokenizer import as_image_tokenizer
from dalle_pytorch.models.linear import Linear
from dalle_pytorch.text import TextTokenizer

Net = TypeVar("Net", bound="TextToImage")


@runtime_checkable
class TextToImageConfig(Protocol):
    """What the settings of every such network have. (Checkable while it runs for beartype's sake.)"""

    has_soft_targets: ClassVar[bool]
    """Whether ``loss`` takes ``image_targets``, probabilities in place of codes."""
    text_vocab_size: int
    caption_dropout: float
    """Share of captions replaced by the empty one in training; 0 = guidance has nothing to lead away from."""

    @property
    def text_len(self) -> int:
        """Tokens that a caption may have."""
        ...

    def fitted(self, vae: nn.Module, tokenizer: TextTokenizer, text_encoder: Any = None) -> "TextToImageConfig":
        """The settings with the sizes that the image tokenizer, the text tokenizer and the text encoder say."""
        ...

    def build(self, vae: nn.Module, text_encoder: Any = None) -> "TextToImage":
        """A network with fresh weights."""
        ...


class Losses(NamedTuple):
    """Losses of a batch, all of which are logged; nats per token but for the contrast. None = the network has none."""

    loss: Float[Tensor, ""]
    """What is minimised."""
    image: Float[Tensor, ""]
    """Mean over image tokens."""
    text: Float[Tensor, ""] | None = None
    """Mean over caption tokens and the pad that ends each caption."""
    contrast: Float[Tensor, ""] | None = None
    """Mean over images, no unit."""


class TextNLL(NamedTuple):
    """Nats of each caption token."""

    nats: Float[Tensor, "b p"]
    """0 where no token counts."""
    counted: Bool[Tensor, "b p"]
    """Caption tokens and the pad that ends the caption."""


class TextToImage(nn.Module, ABC):
    """An autoregressive model of image tokens given a caption.

    Args:
        config: sizes and options.
        vae: image tokenizer; kept frozen and in eval mode, and saved along.

    Raises:
        ValueError: ``vae`` lacks a name of the ImageTokenizer contract.
    """

    config: Any
    """A TextToImageConfig; each network narrows it to its own."""
    image_head: Linear
    """Scores the codebook, in its first ``codebook_size`` rows."""

    def __init__(self, config: TextToImageConfig, vae: nn.Module) -> None:
        super().__init__()
        self.config, self.vae = config, as_image_tokenizer(vae)
        self.text_tokenizer: TextTokenizer | None = None
        """Turns prompts into text tokens; set by training and load()."""
        self.vae.requires_grad_(False).eval()
        self.grid_size, self.codebook_size = self.vae.grid_size, self.vae.codebook_size
        self.num_image_tokens = self.grid_size**2

    def train(self: Net, mode: bool = True) -> Net:
        """Switch the network's mode; the image tokenizer stays in eval mode."""
        super().train(mode)
        self.vae.eval()
        return self

    def check_image_tokens(self, image_tokens: Int[Tensor, "b m"], *, wait: bool = True) -> None:
        """Refuse ids outside the codebook or more of them than the grid holds; ``wait`` as in ``checks.require``.

        Raises:
            ValueError: names the numbers.
        """
        if image_tokens.shape[1] > self.num_image_tokens:
            raise ValueError(
                f"{image_tokens.shape[1]} image tokens given, the vae's grid holds {self.num_image_tokens}"
            )
        check_ids(image_tokens, self.codebook_size, "image", wait=wait)

    def check_text_tokens(self, text_tokens: Int[Tensor, "b t"], *, wait: bool = True) -> None:
        """Refuse ids outside the vocabulary or more than the model reads; ``wait`` as in ``checks.require``.

        Raises:
            ValueError: names the numbers.
        """
        if text_tokens.shape[1] > self.config.text_len:
            raise ValueError(
                f"{text_tokens.shape[1]} text tokens given, the model reads text_len = {self.config.text_len}"
            )
        check_ids(text_tokens, self.config.text_vocab_size, "text", wait=wait)

    def check_pairs(self, text_tokens: Int[Tensor, "_ t"], image_tokens: Int[Tensor, "b m"]) -> None:
        """Refuse other than one caption and all tokens of each image.

        Raises:
            ValueError: names the numbers.
        """
        if len(text_tokens) != len(image_tokens):
            raise ValueError(f"{len(text_tokens)} captions given for {len(image_tokens)} pictures")
        if image_tokens.shape[1] != self.num_image_tokens:
            raise ValueError(f"{image_tokens.shape[1]} image tokens given, the vae's grid has {self.num_image_tokens}")

    @property
    def has_text_head(self) -> bool:
        """Whether the network predicts captions, too: ``text_nll`` and ``next_text_scores``."""
        return False

    @property
    def any_order(self) -> bool:
        """Whether image tokens may come in another order than the raster's."""
        return getattr(self.config, "any_order", False)

    @property
    @abstractmethod
    def trunk(self) -> nn.Module:
        """The blocks that image positions pass, and their last norm: ``trunk(x, views=..., **context)``."""

    @property
    @abstractmethod
    def prompt_length(self) -> int:
        """Positions in front of the image tokens; all candidates of a prompt share them."""

    @property
    @abstractmethod
    def key_heads(self) -> int:
        """Heads of keys and values in a layer."""

    @property
    @abstractmethod
    def key_width(self) -> int:
        """Channels of a position's keys in a layer, all heads together; its values have as many."""

    @abstractmethod
    def views(self) -> list[StreamView]:
        """What each layer of the trunk sees when all positions are there."""

    @abstractmethod
    def pattern(self, layer: int) -> str:
        """Attention pattern of a layer of the trunk."""

    @abstractmethod
    def read_prompt(
        self,
        text_tokens: Int[Tensor, "g t"],
        trunk: nn.Module,
        order: Int[Tensor, " n"],
        *,
        dtype: torch.dtype,
        trim: bool,
    ) -> tuple[Float[Tensor, "g p d"], dict[str, Any]]:
        """Inputs of the trunk in front of the image tokens, and what else it needs to know of the prompts.

        Args:
            text_tokens: prompts, 0 = padding.
            trunk: the model's own, or one with other linear layers.
            order: raster positions of the image tokens in the order in which they will be read.
            dtype: of keys and values that are made here once for all steps.
            trim: leave out padding that all prompts share.
        """

    @abstractmethod
    def embed_image(
        self, image_tokens: Int[Tensor, "b m"], positions: Int[Tensor, " m"], targets: Int[Tensor, " m"]
    ) -> Float[Tensor, "b m d"]:
        """Inputs of the trunk of image tokens at some raster positions, and the positions that they are to predict."""

    @abstractmethod
    def image_logits(self, text_tokens: Int[Tensor, "b t"], image_tokens: Int[Tensor, "b m"]) -> Float[Tensor, "b q k"]:
        """Scores of every image token given the caption and the image tokens before it.

        Args:
            text_tokens: ids of the text tokenizer, 0 = padding; at most text_len of them.
            image_tokens: the first m tokens, 0 <= m <= n.

        Returns:
            Scores of the codebook; position i predicts token i.
        """

    @abstractmethod
    def image_nll(self, text_tokens: Int[Tensor, "b t"], image_tokens: Int[Tensor, "b n"]) -> Float[Tensor, "b n"]:
        """Nats of each image token among all codes, given the caption and the image tokens before it, in fp32.

        Cross entropy of ``image_logits``, which never exist all at once.

        Args:
            text_tokens: ids of the text tokenizer, 0 = padding; at most text_len of them.
            image_tokens: all n tokens, raster order.
        """

    @abstractmethod
    def loss(
        self,
        text_tokens: Int[Tensor, "b t"],
        image_tokens: Int[Tensor, "b n"],
        *,
        generator: torch.Generator | None = None,
        mean: Callable[[Tensor], Tensor] | None = None,
    ) -> Losses:
        """Losses of a batch of captioned images; inputs are not changed.

        Args:
            text_tokens: ids of the text tokenizer, 0 = padding; at most text_len of them.
            image_tokens: all n tokens, raster order.
            generator: for dropout of captions and tokens (training mode only); None = torch's global one.
            mean: averages a number over the processes that share a batch.

        Raises:
            ValueError: shapes or ids that do not fit; names the numbers.
        """

    def text_nll(self, text_tokens: Int[Tensor, "b t"]) -> TextNLL:
        """Nats of each caption token given those before it, in fp32.

        Raises:
            UserError: the network has no text head.
        """
        raise UserError(NO_TEXT_HEAD)

    def next_text_scores(self, text_tokens: Int[Tensor, "b t"]) -> Float[Tensor, "b v"]:
        """Scores of the token that follows captions of t tokens, t < text_len; id 0 = the caption ends.

        Args:
            text_tokens: ids of the text tokenizer; a 0 stands for the pad of its position.

        Raises:
            UserError: the network has no text head, or cannot predict a first token.
        """
        raise UserError(NO_TEXT_HEAD)


NO_TEXT_HEAD = (
    "this dalle reads captions and has no head to write them (a DALL·E mini, or one with a text encoder): use another"
)
