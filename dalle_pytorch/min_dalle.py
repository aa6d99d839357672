"""``MinDalle``: the class of that name of the package min-dalle, over the generation engine of this one.

Constructor and methods take what min-dalle 0.4.11 takes, and with ``bos_id=16383, norm_eps=1e-5`` an int as seed gives
the image tokens that it gives. What differs: weights are read without running anything in them, from ``models_root``
or the cache of the Hugging Face hub, which needs no network once they are there; no global setting or random state is
touched; a prompt that is too long keeps its </s>; the default ``bos_id`` and ``norm_eps`` are those that the weights
were trained with (min-dalle's are not).

Beyond it: any number of pictures, a seed for each, top_p, a negative prompt, ranking by a CLIP, a picture whose upper
rows are kept, bf16 and int8 on a CPU.

Axes: m pictures, n image tokens (256), c channels, H W pixels (256 each).
"""

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor, nn

from dalle_pytorch.data.images import to_pil
from dalle_pytorch.generation.bart import BartDecoder
from dalle_pytorch.generation.engine import Given, draw_image_tokens
from dalle_pytorch.generation.linear import prepare
from dalle_pytorch.generation.rerank import rank, score
from dalle_pytorch.generation.sampling import SamplingConfig, candidate_uniforms, keep_top_p
from dalle_pytorch.loading import load
from dalle_pytorch.models.dalle_bart import DALLEBart

log = logging.getLogger(__name__)

PRECISIONS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
PREVIEW = 32
"""Image tokens between two pictures of a stream, as in min-dalle."""
LARGEST = 4
"""Pictures in one call of the detokenizer."""


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


class MinDalle:
    """DALL·E mini or mega, ready to draw.

    Args:
        models_root: folder with ``dalle_bart_mini`` or ``dalle_bart_mega`` and ``vqgan``, as min-dalle leaves it; where
            it is not, the weights come from the hub (kuprel/min-dalle).
        dtype: of the arithmetic, and of the weights laid out for it: torch.float32, torch.bfloat16 or torch.float16, on
            any device.
        device: None = "cuda" where there is one, else "cpu".
        is_mega: mega (2.6 billion weights) or mini (0.4 billion).
        is_reusable: keep the weights between calls; otherwise every call reads them anew and drops them at its end.
        is_verbose: log what happens.
        precision: "fp32", "bf16", "fp16" or "int8" (CPU), in place of the one that ``dtype`` says.
        compiled: translate a step with ``torch.compile``, half a minute for each number of pictures; pays with "int8".
        cache_dtype: of the keys and values of pictures; None = fp32 on a CPU, else as the arithmetic.
        bos_id: image token that begins a picture; min-dalle 0.4.11 takes 16383, which is wrong.
        norm_eps: of the detokenizer's norms; min-dalle takes 1e-5, which is wrong.

    Raises:
        ValueError: weights that cannot be read or downloaded, or an unknown dtype; names it.
    """

    def __init__(
        self,
        models_root: str | Path = "pretrained",
        dtype: torch.dtype = torch.float32,
        device: str | None = None,
        is_mega: bool = True,
        is_reusable: bool = True,
        is_verbose: bool = True,
        *,
        precision: str | None = None,
        compiled: bool = False,
        cache_dtype: torch.dtype | None = None,
        bos_id: int = 16384,
        norm_eps: float = 1e-6,
    ) -> None:
        if dtype not in PRECISIONS:
            raise ValueError(f"dtype must be one of {', '.join(map(str, PRECISIONS))}, got {dtype}")
        self.models_root, self.dtype, self.is_mega = Path(models_root), dtype, is_mega
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.is_reusable, self.is_verbose = is_reusable, is_verbose
        self.arithmetic = {
            "precision": precision or PRECISIONS[dtype],
            "compiled": compiled,
            "cache_dtype": cache_dtype,
        }
        self.options = {"bos_id": bos_id, "norm_eps": norm_eps}
        self._decoder = self._load() if is_reusable else None

    def _load(self) -> BartDecoder:
        name = "mega" if self.is_mega else "mini"
        folder = self.models_root / f"dalle_bart_{name}"
        weights: Path | str = folder if folder.is_dir() else f"dalle_{name}"
        self._say(f"reading {weights} for {self.device}")
        dalle: DALLEBart = load(
            weights, kind="dalle", source="min_dalle", map_location=self.device, dtype=None, **self.options
        )
        half = torch.float16 if self.dtype == torch.float16 and self.device != "cpu" else torch.bfloat16
        dalle.vae.to(torch.float32 if self.arithmetic["precision"] == "fp32" else half)
        return lay_out(dalle, **self.arithmetic)

    def _say(self, text: str) -> None:
        if self.is_verbose:
            log.info(text)

    def generate_raw_image_stream(
        self,
        text: str,
        seed: int | Sequence[int],
        grid_size: int | None = None,
        progressive_outputs: bool = False,
        is_seamless: bool = False,
        temperature: float = 1.0,
        top_k: int = 256,
        supercondition_factor: float = 16.0,
        is_verbose: bool = False,
        **options: Any,
    ) -> Iterator[Float[Tensor, "rows columns c"]]:
        """Grids of pictures in 0 to 255, the last one finished.

        Args:
            text: the prompt.
            seed: positive: the same pictures every time; 0 or less: others each time. A list gives each picture its
                own seed, which then does not depend on the others.
            grid_size: rows and columns; or give ``num_images``, or a list of seeds.
            progressive_outputs: also a grid after every 32 image tokens.
            is_seamless: decode the grid as one picture.
            temperature: divides the logits; 0 = the likeliest token.
            top_k: draw among so many likeliest tokens; 0 = all.
            supercondition_factor: guidance; 1 = off.
            is_verbose: log what happens.
            **options: see ``draw``; not ``clip`` with ``is_seamless``.
        """
        for images in self.draw(
            text,
            seed,
            grid_size,
            progressive_outputs=progressive_outputs,
            is_seamless=is_seamless,
            temperature=temperature,
            top_k=top_k,
            supercondition_factor=supercondition_factor,
            is_verbose=is_verbose,
            **options,
        ):
            yield images[0].permute(1, 2, 0) * 255 if is_seamless else tile(images) * 255

    def generate_images_stream(self, *args: Any, **kwargs: Any) -> Iterator[Float[Tensor, "m H W c"]]:
        """As ``generate_raw_image_stream``, but the pictures one by one; best first where ``clip`` ranks them."""
        if kwargs.pop("is_seamless", False):
            raise ValueError("is_seamless makes one picture of the grid: use generate_image")
        for images in self.draw(*args, **kwargs):
            yield images.permute(0, 2, 3, 1) * 255

    def generate_image_stream(self, *args: Any, **kwargs: Any) -> Iterator[Image.Image]:
        """As ``generate_raw_image_stream``, as PIL pictures."""
        for image in self.generate_raw_image_stream(*args, **kwargs):
            yield to_pil(image.permute(2, 0, 1) / 255)

    def generate_images(self, *args: Any, **kwargs: Any) -> Float[Tensor, "m H W c"]:
        """The finished pictures in 0 to 255; arguments as ``generate_raw_image_stream``."""
        return next(self.generate_images_stream(*args, **kwargs, progressive_outputs=False))

    def generate_image(self, *args: Any, **kwargs: Any) -> Image.Image:
        """The finished grid; arguments as ``generate_raw_image_stream``."""
        return next(self.generate_image_stream(*args, **kwargs, progressive_outputs=False))

    def draw(
        self,
        text: str,
        seed: int | Sequence[int],
        grid_size: int | None = None,
        progressive_outputs: bool = False,
        is_seamless: bool = False,
        temperature: float = 1.0,
        top_k: int = 256,
        supercondition_factor: float = 16.0,
        is_verbose: bool = False,
        *,
        num_images: int | None = None,
        negative_prompt: str = "",
        top_p: float = 1.0,
        clip: Any = None,
        num_keep: int | None = None,
        image: Float[Tensor, "c H W"] | Image.Image | None = None,
        keep_rows: int = 0,
    ) -> Iterator[Float[Tensor, "m c H W"]]:
        """Pictures in [0, 1], the last ones finished; the arguments of ``generate_raw_image_stream``, and:

        Args:
            text: the prompt; this and the next eight as there.
            seed: see there.
            grid_size: see there; seamless pictures need it.
            progressive_outputs: see there.
            is_seamless: see there; gives one picture, [1, c, g * H, g * W].
            temperature: see there.
            top_k: see there.
            supercondition_factor: see there.
            is_verbose: see there.
            num_images: any number, in place of ``grid_size``.
            negative_prompt: what guidance leads away from.
            top_p: of the ``top_k``, keep the fewest with so much probability; 1 = all.
            clip: a CLIP or several, which rank the finished pictures: best first.
            num_keep: how many of them stay; None = all.
            image: a picture to complete, with ``keep_rows``; needs weights with a VQGAN encoder.
            keep_rows: token rows of ``image`` that stay, from the top.

        Raises:
            ValueError: settings that do not fit; names them.
        """
        count = self._count(seed, grid_size, num_images)
        if is_seamless and grid_size is None:
            raise ValueError("is_seamless needs grid_size: the grid is one picture")
        decoder = self._decoder or self._load()
        dalle = decoder.dalle
        assert dalle.text_tokenizer is not None  # the importer sets it
        length, tokenizer = dalle.config.text_len, dalle.text_tokenizer
        for part in (text, negative_prompt):
            if (found := len(tokenizer.encode(part))) > length:
                log.warning("%r has %d tokens, the model reads the first %d", part, found, length)
            elif is_verbose:
                log.info("%r has %d tokens", part, found)
        tokens = [
            tokenizer.tokenize(part, length, truncate=True).to(decoder.device) for part in (text, negative_prompt)
        ]
        settings = {"temperature": float(temperature), "top_k": top_k, "top_p": top_p}
        sampling, uniforms = self._randomness(text, seed, count, dalle.num_image_tokens, settings)
        sampling.cfg_scale = float(supercondition_factor)
        given = None if image is None else self._given(dalle, image, keep_rows)
        for done, drawn in draw_image_tokens(
            decoder, tokens[0], uniforms.to(decoder.device), sampling, given, null_tokens=tokens[1]
        ):
            finished = done == dalle.num_image_tokens
            if not finished and not (progressive_outputs and done % PREVIEW == 0):
                continue
            images = self._decode(dalle, drawn, grid_size if is_seamless else None)
            if finished and clip is not None and not is_seamless:
                clips = list(clip) if isinstance(clip, Sequence) else [clip]
                images = images[rank(score(images, text, clips), images, num_keep or count).indices]
            yield images

    def _count(self, seed: int | Sequence[int], grid_size: int | None, num_images: int | None) -> int:
        counts = {
            "grid_size": None if grid_size is None else grid_size**2,
            "num_images": num_images,
            "seed": None if isinstance(seed, int) else len(seed),
        }
        given = {name: count for name, count in counts.items() if count is not None}
        if not given or len(set(given.values())) > 1 or min(given.values()) < 1:
            raise ValueError(
                "say how many pictures, once: grid_size (squared), num_images, or a list of seeds; got "
                f"{given or 'none of them'}"
            )
        return next(iter(given.values()))

    def _randomness(
        self, text: str, seed: int | Sequence[int], count: int, tokens: int, settings: dict[str, Any]
    ) -> tuple[SamplingConfig, Float[Tensor, "m n"]]:
        """The rule by which tokens are drawn, and the numbers that it reads."""
        if not isinstance(seed, int):
            uniforms = torch.stack([candidate_uniforms(text, each, 0, tokens) for each in seed])
            return SamplingConfig(**settings), uniforms
        generator = torch.Generator(self.device)
        if seed > 0:
            generator.manual_seed(seed)
        else:
            generator.seed()
        return SharedStream(**settings, generator=generator), torch.zeros(count, tokens)

    def _given(self, dalle: DALLEBart, image: Tensor | Image.Image, keep_rows: int) -> Given:
        """The upper rows of a picture."""
        if not 0 < keep_rows < dalle.grid_size:
            raise ValueError(f"keep_rows must lie in 1 to {dalle.grid_size - 1}, got {keep_rows}")
        if isinstance(image, Image.Image):
            size = dalle.vae.image_size
            pixels = torch.frombuffer(bytearray(image.convert("RGB").resize((size, size)).tobytes()), dtype=torch.uint8)
            image = pixels.view(size, size, 3).permute(2, 0, 1) / 255
        keep = torch.arange(dalle.num_image_tokens) < keep_rows * dalle.grid_size
        return Given(dalle.vae.encode(image[None].to(self.device)).cpu(), keep)

    @torch.inference_mode()
    def _decode(
        self, dalle: DALLEBart, drawn: Int[Tensor, "m n"], grid_size: int | None
    ) -> Float[Tensor, "pictures c rows columns"]:
        """Pictures of image tokens; with a grid size one picture of all of them."""
        if grid_size is None:
            return torch.cat([dalle.vae.decode(part).cpu() for part in drawn.split(LARGEST)])
        rows = drawn.view(grid_size, grid_size, dalle.grid_size, dalle.grid_size)  # min-dalle goes down the columns
        grid = rows.permute(1, 2, 0, 3).reshape(1, grid_size * dalle.grid_size, -1)
        vae: Any = dalle.vae
        return vae.decode_grid(grid).cpu()


def lay_out(dalle: DALLEBart, *, precision: str, **options: Any) -> BartDecoder:
    """A decoder that uses the model up: its linear layers in ``precision``, all between them in fp32.

    The text encoder, which runs once a prompt, and the image tokenizer keep the type of their weights.
    """
    for name, module in dalle.named_modules():
        if not isinstance(module, nn.Linear) and not name.startswith("vae."):
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.float()
    dalle.add_module("encoder", prepare(dalle.encoder, "stored"))
    return BartDecoder(dalle, precision=precision, consume=True, **options)


def tile(images: Float[Tensor, "m c H W"]) -> Float[Tensor, "rows columns c"]:
    """Pictures in the smallest square grid, going down the columns as in min-dalle; what is left of it is white."""
    side = math.ceil(math.sqrt(len(images)))
    blank = images.new_ones(side**2 - len(images), *images.shape[1:])
    grid = torch.cat([images, blank]).unflatten(0, (side, side))
    return grid.permute(1, 3, 0, 4, 2).flatten(0, 1).flatten(1, 2)
