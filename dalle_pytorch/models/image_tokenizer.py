"""The contract of an image tokenizer: pictures to a grid of codebook indices and back.

Everything downstream (DALLE, generation, evaluation) talks to a tokenizer through these names only, so any
network that keeps them can take the place of the DiscreteVAE.

Axes: b batch, c channels, H W pixels, n image tokens in raster order (n = grid_size ** 2).
"""

from abc import ABC, abstractmethod
from typing import NamedTuple, Protocol, cast, runtime_checkable

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from dalle_pytorch.errors import UserError
from dalle_pytorch.models.checks import check_ids, check_pixels

CONTRACT = ("image_size", "grid_size", "codebook_size", "channels", "encode", "decode")


class ImageTokenizer(nn.Module, ABC):
    """A frozen or trainable network with ``encode`` and ``decode``.

    Attributes:
        image_size: side of the square picture, pixels.
        grid_size: token rows, equal to token columns.
        codebook_size: number of codes; tokens lie in ``[0, codebook_size)``.
        channels: picture channels (3 = RGB).
        margin: pixels that the grid reaches beyond the picture, on the left and the right, above and below; may be
            left out of a network that keeps the contract without inheriting.
    """

    image_size: int
    grid_size: int
    codebook_size: int
    channels: int
    margin: tuple[int, int] = (0, 0)

    @property
    def num_image_tokens(self) -> int:
        """Tokens per picture, ``grid_size ** 2``."""
        return self.grid_size**2

    @property
    def can_encode(self) -> bool:
        """Whether pictures can be turned into tokens; not where a file had a decoder alone."""
        return True

    @abstractmethod
    def encode(self, images: Float[Tensor, "b c H W"]) -> Int[Tensor, "b n"]:
        """Tokens of pictures in [0, 1], raster order. Deterministic: no sampling, no dropout."""

    @abstractmethod
    def decode(self, image_tokens: Int[Tensor, "b n"]) -> Float[Tensor, "b c H W"]:
        """Pictures in [0, 1] of tokens in raster order."""

    def check_images(self, images: Shaped[Tensor, "..."]) -> None:
        """Refuse images of another shape, type or range; to be called before they are converted.

        Raises:
            ValueError: channels or sides differ from the network's, or ``check_pixels`` refuses; names both.
        """
        check_pixels(images)
        expected = (self.channels, self.image_size, self.image_size)
        if tuple(images.shape[1:]) != expected:
            raise ValueError(
                f"pictures of shape {tuple(images.shape[1:])} given to a tokenizer for {expected} "
                "(channels, height, width); resize them or use another tokenizer"
            )

    def check_tokens(self, image_tokens: Int[Tensor, "b n"]) -> None:
        """Refuse tokens that are no full grid of this codebook.

        Raises:
            ValueError: wrong count or an id outside ``[0, codebook_size)``; names the numbers.
        """
        if image_tokens.shape[1] != self.num_image_tokens:
            raise ValueError(
                f"{image_tokens.shape[1]} image tokens given, the tokenizer's grid is "
                f"{self.grid_size} x {self.grid_size} = {self.num_image_tokens}"
            )
        check_ids(image_tokens, self.codebook_size, "image")


class Relaxation(NamedTuple):
    """The Gumbel-softmax of a training step; other codebooks have none."""

    gumbel_tau: float = 1.0
    """Temperature, above 0."""
    kl_weight: float = 0.0
    """Of the KL to uniform codes, the paper's beta."""
    usage_weight: float = 0.0
    """Of the KL of the mean code distribution to uniform, which keeps codes alive."""


NOT_RELAXED = Relaxation()
"""Temperature 1, no penalties."""


class Reconstruction(NamedTuple):
    """What a training step makes of images."""

    output: Float[Tensor, "b maps H W"]
    """The decoder's output in fp32, with a gradient."""
    codes_loss: Float[Tensor, ""]
    """What the codebook adds to the loss."""
    parts: dict[str, Tensor]
    """What that consists of, by name, for the logs."""
    image_tokens: Int[Tensor, "b n"]
    """Hard codes."""


class TrainableTokenizer(ImageTokenizer):
    """An image tokenizer that can be trained: it gives the decoder's output before it becomes pixels."""

    @abstractmethod
    def reconstruct(
        self,
        images: Float[Tensor, "b c H W"],
        relaxation: Relaxation = NOT_RELAXED,
        generator: torch.Generator | None = None,
    ) -> Reconstruction:
        """Images through codes with gradients; in training mode a codebook may learn from them.

        Args:
            images: in [0, 1].
            relaxation: read by Gumbel-softmax codes alone.
            generator: source of their noise; None = torch's global one.

        Raises:
            ValueError: images of another shape.
        """

    @abstractmethod
    def output(self, image_tokens: Int[Tensor, "b n"]) -> Float[Tensor, "b maps H W"]:
        """The decoder's output for tokens, before it becomes pixels."""

    @abstractmethod
    def code_vectors(self) -> Float[Tensor, "k d"]:
        """What the decoder reads of each code."""

    @property
    @abstractmethod
    def decoding_parts(self) -> list[nn.Module]:
        """What makes images of codes' vectors, apart from the codes themselves."""

    @abstractmethod
    def reconstruction_error(
        self, output: Float[Tensor, "b maps H W"], images: Float[Tensor, "b c H W"]
    ) -> Float[Tensor, ""]:
        """Mean over subpixels of the negative log-likelihood, up to constants."""

    @abstractmethod
    def to_pixels(self, output: Float[Tensor, "b maps H W"], *, clamp: bool = True) -> Float[Tensor, "b c H W"]:
        """Decoder output to images in [0, 1]; without ``clamp`` a little beyond, where a gradient is needed."""


@runtime_checkable
class CodeLogits(Protocol):
    """An image tokenizer that finds every code more or less likely, where others give one code only.

    (Checkable while it runs for beartype's sake; ``training.dalle.check_codes`` looks for the method.)
    """

    def encode_logits(self, images: Float[Tensor, "b c H W"]) -> Float[Tensor, "b k h w"]:
        """Code logits of every grid position, from pictures in [0, 1]."""
        ...


def margin_of(vae: nn.Module) -> tuple[int, int]:
    """The margin of an image tokenizer, none where it does not say."""
    return getattr(vae, "margin", ImageTokenizer.margin)


def token_edges(image_size: int, grid_size: int, margin: tuple[int, int] = (0, 0)) -> list[int]:
    """Where each token row begins, in pixels from the top, and at last where the picture ends.

    Args:
        image_size: side of the picture in pixels.
        grid_size: token rows.
        margin: of the image tokenizer.
    """
    side = (image_size + sum(margin)) // grid_size
    return [min(max(row * side - margin[0], 0), image_size) for row in range(grid_size + 1)]


def as_image_tokenizer(vae: nn.Module) -> ImageTokenizer:
    """The module itself, once it is seen to keep the contract; it need not inherit from ImageTokenizer.

    Raises:
        ValueError: a name of the contract is missing.
    """
    for name in CONTRACT:
        if not hasattr(vae, name):
            raise UserError(f"vae ({type(vae).__name__}) is no image tokenizer: it has no {name!r}")
    return cast(ImageTokenizer, vae)
