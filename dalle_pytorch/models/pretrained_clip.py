"""CLIPs that others have trained (OpenAI, open_clip, SigLIP), with the methods of our own: they rank candidates.

The towers are in clip_towers.py and clip_resnet.py, the files are read by importers/. A source's start and end marks
are put around the text tokens here, so that a text tokenizer gives none, as everywhere in this package.

Axes: b batch, n texts, m images, t text tokens, s positions of the context, c channels, H W pixels, h w pixels after
resizing, e features.
"""

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from dalle_pytorch.errors import UserError, at_least_one
from dalle_pytorch.models.checks import check_ids, check_pixels
from dalle_pytorch.models.clip_resnet import ModifiedResNet
from dalle_pytorch.models.clip_towers import ACTIVATIONS, TextTower, VisionTransformer
from dalle_pytorch.models.two_towers import TwoTowers
from dalle_pytorch.text import TextTokenizer

IMAGE_POOLS, TEXT_POOLS = ("class", "attention"), ("end", "last")
RESIZES, INTERPOLATIONS = ("crop", "squash"), ("bicubic", "bilinear")
OPENAI_MEAN = [0.48145466, 0.4578275, 0.40821073]  # clip/clip.py, `_transform`
OPENAI_STD = [0.26862954, 0.26130258, 0.27577711]
TOGETHER = 32
"""Pictures in one pass of the image tower: its activations are far larger than they are."""


@dataclass(kw_only=True)
class PretrainedCLIPConfig:
    """Sizes and habits of a released CLIP; the defaults are OpenAI's ViT-B/32."""

    embed_dim: int = 512
    """Width of the shared features."""
    image_size: int = 224
    """Side of the square picture that the image tower reads, pixels."""
    patch_size: int = 32
    """Side of a patch of the vision transformer, pixels; what is left over at the right and below is not read."""
    image_width: int = 768
    """Width of the vision transformer, or channels after the ResNet's stem."""
    image_depth: int = 12
    """Blocks of the vision transformer."""
    image_stages: list[int] = field(default_factory=list)
    """Blocks of the four stages of a ResNet ([3, 4, 6, 3] in RN50); empty = a vision transformer."""
    image_heads: int = 12
    """Heads of the vision transformer, or of the attention that ends the ResNet."""
    image_hidden: int = 3072
    """Hidden width of the vision transformer's MLPs."""
    image_pool: str = "class"
    """Vision transformer: "class" (CLIP: class token) or "attention" (SigLIP)."""
    image_activation: str = "quick_gelu"
    """Of the vision transformer: "gelu", "quick_gelu" or "gelu_tanh"."""
    image_eps: float = 1e-5
    """Added to the variance in the vision transformer's layer norms."""
    text_vocab_size: int = 49_408
    """Rows of the text embedding: ids as the source counts them, its marks included."""
    context_len: int = 77
    """Positions of the text tower, marks included."""
    text_width: int = 512
    """Width of the text tower."""
    text_depth: int = 12
    """Blocks of the text tower."""
    text_heads: int = 8
    """Heads of the text tower."""
    text_hidden: int = 2048
    """Hidden width of the text tower's MLPs."""
    text_activation: str = "quick_gelu"
    """As ``image_activation``, of the text tower."""
    text_eps: float = 1e-5
    """As ``image_eps``, of the text tower."""
    text_causal: bool = True
    """Whether a position reads only those before it (CLIP) or all, padding included (SigLIP)."""
    text_pool: str = "end"
    """Whose output is the text's: "end" (CLIP: the end mark) or "last" (SigLIP: the last position, often padding)."""
    text_proj_bias: bool = False
    """Whether the text projection has a bias (SigLIP)."""
    start_id: int | None = 49_406
    """Id put before the text tokens; None = none (SigLIP)."""
    end_id: int = 49_407
    """Id put after them."""
    pad_id: int = 0
    """Id that fills the rest of the context."""
    token_shift: int = 0
    """How much higher the text tokenizer's ids are than the source's: 1 where its id 0 is no padding (text/hf.py)."""
    logit_bias: bool = False
    """Whether the checkpoint has SigLIP's bias; ranking does not need it."""
    interpolation: str = "bicubic"
    """How pictures are resized: "bicubic" or "bilinear", both with antialiasing."""
    resize: str = "crop"
    """"crop": the shorter side to image_size, then the middle; "squash": both sides to image_size."""
    mean: list[float] = field(default_factory=lambda: list(OPENAI_MEAN))
    """Subtracted from red, green and blue in [0, 1]."""
    std: list[float] = field(default_factory=lambda: list(OPENAI_STD))
    """What red, green and blue are divided by then."""

    @property
    def text_len(self) -> int:
        """Longest text in tokens, without the marks."""
        return self.context_len - (1 if self.start_id is None else 2)

    def __post_init__(self) -> None:
        """Validate.

        Raises:
            ValueError: a field is out of range; names it.
        """
        at_least_one(
            self, "embed_dim", "image_size", "patch_size", "image_width", "image_depth", "image_heads",
            "image_hidden", "text_vocab_size", "text_width", "text_depth", "text_heads", "text_hidden", "text_len",
        )  # fmt: skip
        for name, known in (
            *(("image_pool", IMAGE_POOLS), ("text_pool", TEXT_POOLS), ("resize", RESIZES)),
            *(("interpolation", INTERPOLATIONS), ("image_activation", ACTIVATIONS), ("text_activation", ACTIVATIONS)),
        ):
            if getattr(self, name) not in known:
                raise UserError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        channels = 32 * self.image_width if self.image_stages else self.image_width
        for name, width, heads in (("image", channels, self.image_heads), ("text", self.text_width, self.text_heads)):
            if width % heads:
                raise UserError(f"{name}_heads ({heads}) must divide the width of its attention ({width})")
        if self.image_stages and (len(self.image_stages) != 4 or min(self.image_stages) < 1 or self.image_size % 32):
            raise UserError(
                f"a ResNet has four stages and an image_size that 32 divides, "
                f"got {self.image_stages} and {self.image_size}"
            )
        if not self.image_stages and self.image_size < self.patch_size:
            raise UserError(f"image_size ({self.image_size}) must be at least patch_size ({self.patch_size})")
        if not self.image_stages and self.image_pool == "attention" and self.embed_dim != self.image_width:
            raise UserError(f"image_pool='attention' has no projection: image_width must be {self.embed_dim}")
        for name in ("start_id", "end_id", "pad_id"):
            if not 0 <= (getattr(self, name) or 0) < self.text_vocab_size:
                raise UserError(f"{name} ({getattr(self, name)}) must be below {self.text_vocab_size}")
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise UserError(f"mean and std need three numbers each, std positive, got {self.mean} and {self.std}")


class PretrainedCLIP(TwoTowers):
    """Two towers with the weights of a released CLIP; takes our CLIP's place where candidates are ranked.

    Args:
        config: sizes and habits.

    Source:
        github.com/openai/CLIP, clip/model.py; of SigLIP transformers, models/siglip/modeling_siglip.py. The importers'
        tests compare outputs with the packages' own.
    """

    def __init__(self, config: PretrainedCLIPConfig) -> None:
        super().__init__()
        self.config = config
        self.text_tokenizer: TextTokenizer | None = None
        """Turns prompts into text tokens; set by importers and load()."""
        self.text, self.image = text_tower(config), image_tower(config)
        self.log_logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))  # 0.07: section 2.5 of CLIP's paper
        self.logit_bias = nn.Parameter(torch.tensor(-10.0)) if config.logit_bias else None  # section 3 of SigLIP's

    @property
    def logit_scale(self) -> Float[Tensor, ""]:
        """What cosines were multiplied by in training."""
        return self.log_logit_scale.exp()

    def encode_text(
        self, text_tokens: Int[Tensor, "b t"], text_mask: Shaped[Tensor, "..."] | None = None
    ) -> Float[Tensor, "b e"]:
        """Unit features of texts, fp32.

        Args:
            text_tokens: ids of ``text_tokenizer``, 0 = padding, at most ``config.text_len`` of them, without marks.
            text_mask: [b, t], true or not zero = read; None = every id but the padding.

        Raises:
            ValueError: too many tokens, or an id outside the vocabulary; names the numbers.
        """
        framed, end = self.frame(text_tokens, text_mask)
        at = end if self.config.text_pool == "end" else torch.full_like(end, self.config.context_len - 1)
        return F.normalize(self.text(framed, at).float(), dim=-1)

    def frame(
        self, text_tokens: Int[Tensor, "b t"], text_mask: Shaped[Tensor, "..."] | None = None
    ) -> tuple[Int[Tensor, "b s"], Int[Tensor, " b"]]:
        """The source's own text tokens, marks and padding included, and where the end marks are.

        Args and Raises as of ``encode_text``.
        """
        config = self.config
        if text_tokens.shape[1] > config.text_len:
            raise ValueError(f"{text_tokens.shape[1]} text tokens given, the model reads text_len = {config.text_len}")
        check_ids(text_tokens, config.text_vocab_size + config.token_shift, "text")
        mask = text_tokens != 0 if text_mask is None else text_mask.bool()
        if mask.shape != text_tokens.shape:
            raise ValueError(f"text_mask of shape {tuple(mask.shape)} given for text of {tuple(text_tokens.shape)}")
        first = config.context_len - config.text_len - 1  # position of the first text token
        order = (~mask).long().argsort(dim=1, stable=True)  # what is read, in its order, then what is not
        ids = (text_tokens - config.token_shift).gather(1, order)
        end = mask.sum(dim=1)
        read = torch.arange(ids.shape[1], device=ids.device) < end[:, None]
        framed = torch.full((len(ids), config.context_len), config.pad_id, dtype=torch.long, device=ids.device)
        framed[:, first : first + ids.shape[1]] = torch.where(read, ids, config.pad_id)
        if config.start_id is not None:
            framed[:, 0] = config.start_id
        end = first + end
        framed[torch.arange(len(ids), device=ids.device), end] = config.end_id
        return framed, end

    def encode_image(self, images: Float[Tensor, "b c H W"]) -> Float[Tensor, "b e"]:
        """Unit features, fp32, of pictures in [0, 1] of any size.

        Raises:
            ValueError: another number of channels than three, or pixels that are no floats in [0, 1].
        """
        check_pixels(images)
        if images.shape[1] != 3:
            raise ValueError(f"pictures of {images.shape[1]} channels given, the model reads 3")
        parts = [self.image(self.prepare(part)) for part in images.split(TOGETHER)]
        return F.normalize(torch.cat(parts).float(), dim=-1)

    def prepare(self, images: Float[Tensor, "b c H W"]) -> Float[Tensor, "b c h w"]:
        """Pictures in [0, 1] resized, cut and normalised as the source does it, fp32.

        Deviation: the sources resize 8-bit pictures with PIL and so round, by up to 1.2/255 from here.
        """
        config, (height, width) = self.config, images.shape[2:]
        size = resized(height, width, config)
        images = images.float()
        for step in ((height, size[1]), size):  # rows, then columns: PIL too clamps what overshoots after each
            if step != tuple(images.shape[2:]):
                images = F.interpolate(images, step, mode=config.interpolation, antialias=True).clamp(0, 1)
        top, left = (round((side - config.image_size) / 2) for side in size)
        images = images[:, :, top : top + config.image_size, left : left + config.image_size]
        mean, std = (images.new_tensor(numbers)[:, None, None] for numbers in (config.mean, config.std))
        return (images - mean) / std


def resized(height: int, width: int, config: PretrainedCLIPConfig) -> tuple[int, int]:
    """Height and width after resizing; the longer side is rounded down, as torchvision's ``Resize`` does."""
    side = config.image_size
    if config.resize == "squash":
        return side, side
    return (side, side * width // height) if height <= width else (side * height // width, side)


def text_tower(config: PretrainedCLIPConfig) -> TextTower:
    """The text tower with fresh weights."""
    return TextTower(
        vocab_size=config.text_vocab_size,
        context_len=config.context_len,
        width=config.text_width,
        depth=config.text_depth,
        heads=config.text_heads,
        hidden=config.text_hidden,
        embed_dim=config.embed_dim,
        activation=config.text_activation,
        eps=config.text_eps,
        causal=config.text_causal,
        proj_bias=config.text_proj_bias,
    )


def image_tower(config: PretrainedCLIPConfig) -> VisionTransformer | ModifiedResNet:
    """The image tower with fresh weights."""
    if config.image_stages:
        return ModifiedResNet(
            stages=config.image_stages,
            width=config.image_width,
            image_size=config.image_size,
            heads=config.image_heads,
            embed_dim=config.embed_dim,
        )
    return VisionTransformer(
        patch_size=config.patch_size,
        grid=config.image_size // config.patch_size,
        width=config.image_width,
        depth=config.image_depth,
        heads=config.image_heads,
        hidden=config.image_hidden,
        embed_dim=config.embed_dim,
        activation=config.image_activation,
        eps=config.image_eps,
        pool=config.image_pool,
    )
