"""What a call of ``MinDalle`` asks for, and min-dalle's rules for random numbers and grids.

Axes: m pictures, n image tokens, k codebook_size, c channels, H W pixels, g rows and columns of a grid.
"""

import math
import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import KW_ONLY, dataclass, field
from inspect import signature
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor

from dalle_pytorch.errors import UserError, finite
from dalle_pytorch.generation.rerank import Scorer, rank, score
from dalle_pytorch.generation.sampling import SamplingConfig, candidate_uniforms, keep_top_p

INTEGERS = ("grid_size", "top_k", "num_images", "num_keep", "keep_rows")
FLOATS = ("temperature", "supercondition_factor", "top_p")


@dataclass(kw_only=True)
class SharedStream(SamplingConfig):
    """min-dalle's rule: all pictures draw from one stream of random numbers, and all that tie with the last of the
    ``top_k`` stay."""

    generator: torch.Generator = field(default_factory=torch.Generator)

    def pick(self, logits: Float[Tensor, "m k"], uniform: Float[Tensor, " m"]) -> Int[Tensor, " m"]:
        """One token a row, from the generator and not from ``uniform``."""
        if self.temperature == 0:
            return logits.argmax(dim=-1)
        logits = logits.float()
        top = logits.topk(min(self.top_k or logits.shape[-1], logits.shape[-1]), dim=-1).values
        weights = ((logits - top[:, :1]) / self.temperature).exp() * (logits >= top[:, -1:])
        if self.top_p < 1:
            weights = keep_top_p(weights.log(), self.top_p).exp()
        return torch.multinomial(weights, 1, generator=self.generator)[:, 0]


@dataclass
class Request:
    """Arguments of a call: min-dalle's in its order, then further ones by name; documented in ``MinDalle``."""

    text: str
    seed: int | list[int]
    grid_size: int | None = None
    progressive_outputs: bool = False
    is_seamless: bool = False
    temperature: float = 1.0
    top_k: int = 256
    supercondition_factor: float = 16.0
    is_verbose: bool = False
    _: KW_ONLY
    num_images: int | None = None
    negative_prompt: str = ""
    top_p: float = 1.0
    clip: Scorer | Sequence[Scorer] | None = None
    num_keep: int | None = None
    image: Float[Tensor, "c H W"] | Image.Image | None = None
    keep_rows: int = 0

    @classmethod
    def of(cls, *args: Any, **kwargs: Any) -> "Request":
        """From a call; integers of any kind become Python's.

        Raises:
            ValueError: settings that do not fit; names them.
        """
        given: dict[str, Any] = signature(cls).bind(*args, **kwargs).arguments
        for names, convert in ((INTEGERS, operator.index), (FLOATS, float)):
            given |= {name: _as(convert, name, given[name]) for name in names if given.get(name) is not None}
        seed = given["seed"]
        try:
            given["seed"] = operator.index(seed)
        except TypeError:
            seeds = seed if isinstance(seed, Iterable) else [seed]
            given["seed"] = [_as(operator.index, "seed", each) for each in seeds]
        return cls(**given)

    def __post_init__(self) -> None:
        """Validate.

        Raises:
            ValueError: settings that do not fit; names them.
        """
        finite(self)
        if isinstance(self.seed, int) and self.seed >= 1 << 64:
            raise UserError(f"seed must be below 2^64, got {self.seed}")
        if self.grid_size is not None and self.grid_size < 1:
            raise UserError(f"grid_size must be at least 1, got {self.grid_size}")
        counts = {
            "grid_size": None if self.grid_size is None else self.grid_size**2,
            "num_images": self.num_images,
            "seed": None if isinstance(self.seed, int) else len(self.seed),
        }
        given = {name: count for name, count in counts.items() if count is not None}
        if not given or len(set(given.values())) > 1 or min(given.values()) < 1:
            raise UserError(
                "say how many pictures, once: grid_size (squared), num_images, or a list of seeds; got "
                f"{given or 'none of them'}"
            )
        self.count = next(iter(given.values()))
        self.settings: dict[str, Any] = {
            "temperature": self.temperature,
            "top_k": self.top_k,
            "top_p": self.top_p,
            "cfg_scale": self.supercondition_factor,
        }
        SamplingConfig(**self.settings)
        self._check_pairs()

    def _check_pairs(self) -> None:
        """Refuse what has no effect without something else."""
        if self.is_seamless and self.grid_size is None:
            raise UserError("is_seamless needs grid_size: the grid is one picture")
        if self.is_seamless and self.clip is not None:
            raise UserError("clip ranks pictures, is_seamless makes one of all: leave one of them out")
        if self.negative_prompt and self.supercondition_factor == 1:
            raise UserError("negative_prompt acts through guidance: set supercondition_factor above 1")
        if self.num_keep is not None and self.clip is None:
            raise UserError(f"num_keep={self.num_keep} keeps the best, which needs a clip to rank them")
        if self.num_keep is not None and not 1 <= self.num_keep <= self.count:
            raise UserError(f"num_keep ({self.num_keep}) must lie in 1 to the number of pictures ({self.count})")
        if self.keep_rows and self.image is None:
            raise UserError(f"keep_rows={self.keep_rows} are rows of a picture: give image=")

    def randomness(self, device: torch.device, tokens: int) -> tuple[SamplingConfig, Float[Tensor, "m n"]]:
        """The rule by which tokens are drawn, and the numbers that it reads."""
        if isinstance(self.seed, int):
            generator = torch.Generator(device)
            if self.seed > 0:
                generator.manual_seed(self.seed)
            else:
                generator.seed()
            return SharedStream(**self.settings, generator=generator), torch.zeros(self.count, tokens)
        chance = torch.Generator()
        chance.seed()
        rows = [
            candidate_uniforms(self.text, seed, 0, tokens) if seed > 0 else torch.rand(tokens, generator=chance)
            for seed in self.seed
        ]
        return SamplingConfig(**self.settings), torch.stack(rows)

    def ranked(self, images: Float[Tensor, "m c H W"]) -> Float[Tensor, "kept c H W"]:
        """The best, best first; all in their order without a ``clip``."""
        if self.clip is None:
            return images
        clips = list(self.clip) if isinstance(self.clip, Sequence) else [self.clip]
        return images[rank(score(images, self.text, clips), images, self.num_keep or self.count).indices]

    def apart(self, images: Float[Tensor, "m c H W"]) -> Float[Tensor, "pictures c h w"]:
        """The pictures one by one: of a seamless grid its parts, down the columns."""
        if not self.is_seamless:
            return images
        return rearrange(
            images, "1 c (row h) (column w) -> (column row) c h w", row=self.grid_size, column=self.grid_size
        )


def _as(convert: Callable[[Any], Any], name: str, value: Any) -> Any:
    """A number of a call, as Python's own kind.

    Raises:
        UserError: it is none of that kind; names the argument.
    """
    try:
        return convert(value)
    except (TypeError, ValueError) as error:
        kind = "an integer" if convert is operator.index else "a number"
        raise UserError(f"{name} must be {kind}, got {value!r}") from error


def tile(images: Float[Tensor, "m c H W"]) -> Float[Tensor, "rows columns c"]:
    """Pictures in the smallest square grid, going down the columns as in min-dalle; what is left of it is white."""
    side = math.ceil(math.sqrt(len(images)))
    blank = images.new_ones(side**2 - len(images), *images.shape[1:])
    grid = torch.cat([images, blank]).unflatten(0, (side, side))
    return grid.permute(1, 3, 0, 4, 2).flatten(0, 1).flatten(1, 2)
