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
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, SupportsIndex

import torch
from jaxtyping import Float, Int
from PIL import Image, ImageOps
from torch import Tensor, nn

from dalle_pytorch.checkpoints.loading import load
from dalle_pytorch.compat.min_dalle_request import Request, tile
from dalle_pytorch.distributed import find_device
from dalle_pytorch.errors import UserError
from dalle_pytorch.generation.backend import DTYPES, check_precision, keep_stored, prepare
from dalle_pytorch.generation.decoder import Decoder
from dalle_pytorch.generation.strategies import KnownTokens, draw_image_tokens
from dalle_pytorch.images import fit, flatten, to_tensor
from dalle_pytorch.models.dalle_bart import DALLEBart
from dalle_pytorch.models.text_to_image import TextToImage

log = logging.getLogger(__name__)

PRECISIONS = {dtype: precision for precision, dtype in DTYPES.items()}
PREVIEW = 32
"""Image tokens between two pictures of a stream, as in min-dalle."""


class MinDalle:
    """DALL·E mini or mega, ready to draw.

    Args:
        models_root: folder with ``dalle_bart_mini`` or ``dalle_bart_mega`` and ``vqgan``, as min-dalle leaves it; where
            it is not, the weights come from the hub (kuprel/min-dalle).
        dtype: of the arithmetic, and of the weights laid out for it: torch.float32, torch.bfloat16 or torch.float16, on
            any device. The VQGAN computes in bfloat16 with torch.bfloat16, else in fp32, as in min-dalle.
        device: None = "cuda" where there is one, else "cpu".
        is_mega: mega (2.6 billion weights) or mini (0.4 billion).
        is_reusable: keep the weights between calls; otherwise every call reads them anew and drops them at its end.
        is_verbose: log what happens.
        precision: "fp32", "bf16", "fp16" or "int8" (CPU), in place of the one that ``dtype`` says.
        compiled: translate a step with ``torch.compile``, half a minute for each number of pictures; pays with "int8".
        cache_dtype: of the keys and values of images; None = as ``generation.backend.keys_dtype`` says.
        bos_id: image token that begins a picture; min-dalle 0.4.11 takes 16383, which is wrong.
        norm_eps: of the detokenizer's norms; min-dalle takes 1e-5, which is wrong.
        vqgan: a whole VQGAN in place of ``detoker.pt``, which has no encoder; completing pictures needs it. Its folder
            in Flax (dalle-mini/vqgan_imagenet_f16_16384) or its checkpoint in torch.

    Raises:
        ValueError: weights that cannot be read or downloaded, an unknown dtype or precision, or a device that is not
            here; names it.
    """

    def __init__(
        self,
        models_root: str | Path = "pretrained",
        dtype: torch.dtype = torch.float32,
        device: str | torch.device | None = None,
        is_mega: bool = True,
        is_reusable: bool = True,
        is_verbose: bool = True,
        *,
        precision: str | None = None,
        compiled: bool = False,
        cache_dtype: torch.dtype | None = None,
        bos_id: int = 16384,
        norm_eps: float = 1e-6,
        vqgan: str | Path | None = None,
    ) -> None:
        if dtype not in PRECISIONS:
            raise UserError(f"dtype must be one of {', '.join(map(str, PRECISIONS))}, got {dtype}")
        self.models_root, self.dtype, self.is_mega = Path(models_root), dtype, is_mega
        self.device = find_device(device or "auto")
        check_precision(precision or PRECISIONS[dtype], self.device)
        self.is_reusable, self.is_verbose = is_reusable, is_verbose
        self.arithmetic = {
            "precision": precision or PRECISIONS[dtype],
            "compiled": compiled,
            "cache_dtype": cache_dtype,
        }
        self.options: dict[str, Any] = {"bos_id": bos_id, "norm_eps": norm_eps}
        if vqgan is not None:
            self.options["vqgan"] = Path(vqgan)
        self._decoder = self._load() if is_reusable else None

    def _load(self) -> Decoder:
        name = "mega" if self.is_mega else "mini"
        folder = self.models_root / f"dalle_bart_{name}"
        there = folder.is_dir() and any(folder.iterdir())  # min-dalle makes the folder before it downloads
        weights: Path | str = folder if there else f"dalle_{name}"
        self._say(f"reading {weights} for {self.device}")
        dalle: DALLEBart = load(
            weights, kind="dalle", source="min_dalle", map_location=self.device, dtype=None, **self.options
        )
        dalle.vae.to(torch.bfloat16 if self.dtype == torch.bfloat16 else torch.float32)
        return lay_out(dalle, **self.arithmetic)

    def _say(self, text: str) -> None:
        if self.is_verbose:
            log.info(text)

    def generate_raw_image_stream(
        self,
        text: str,
        seed: SupportsIndex | Iterable[SupportsIndex],
        grid_size: SupportsIndex | None = None,
        progressive_outputs: bool = False,
        is_seamless: bool = False,
        temperature: float = 1.0,
        top_k: SupportsIndex = 256,
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
            **options: num_images: any number, in place of ``grid_size``; negative_prompt: what guidance leads away
                from; top_p: of the ``top_k``, keep the fewest with so much probability, 1 = all; clip: a CLIP or
                several, which rank the finished pictures, best first; num_keep: how many of these stay, None = all;
                image: a picture to complete (PIL, of which the middle square is taken, or RGB in [0, 1]), with
                keep_rows, its token rows that stay, from the top.

        Raises:
            ValueError: settings that do not fit; names them. Raised before anything is drawn.
        """
        request = Request.of(
            text,
            seed,
            grid_size,
            progressive_outputs,
            is_seamless,
            temperature,
            top_k,
            supercondition_factor,
            is_verbose,
            **options,
        )
        return self._grids(request)

    def generate_images_stream(self, *args: Any, **kwargs: Any) -> Iterator[Float[Tensor, "m H W c"]]:
        """As ``generate_raw_image_stream``, but the pictures one by one; best first where ``clip`` ranks them."""
        return self._pictures(Request.of(*args, **kwargs))

    def generate_image_stream(self, *args: Any, **kwargs: Any) -> Iterator[Image.Image]:
        """As ``generate_raw_image_stream``, as PIL pictures."""
        return (as_pil(grid) for grid in self._grids(Request.of(*args, **kwargs)))

    def generate_images(self, *args: Any, **kwargs: Any) -> Float[Tensor, "m H W c"]:
        """The finished pictures in 0 to 255; arguments as ``generate_raw_image_stream``."""
        return next(self._pictures(replace(Request.of(*args, **kwargs), progressive_outputs=False)))

    def generate_image(self, *args: Any, **kwargs: Any) -> Image.Image:
        """The finished grid; arguments as ``generate_raw_image_stream``."""
        return as_pil(next(self._grids(replace(Request.of(*args, **kwargs), progressive_outputs=False))))

    def _grids(self, request: Request) -> Iterator[Float[Tensor, "rows columns c"]]:
        for images in self._draw(request):
            yield (images[0].permute(1, 2, 0) if request.is_seamless else tile(images)) * 255

    def _pictures(self, request: Request) -> Iterator[Float[Tensor, "m H W c"]]:
        for images in self._draw(request):
            yield request.apart(images).permute(0, 2, 3, 1) * 255

    def _draw(self, request: Request) -> Iterator[Float[Tensor, "m c H W"]]:
        """Pictures in [0, 1], the last ones finished; where they are seamless one for all."""
        decoder = self._decoder or self._load()
        dalle = decoder.dalle
        text, null = (
            self._tokens(dalle, part, request.is_verbose).to(decoder.device)
            for part in (request.text, request.negative_prompt)
        )
        sampling, uniforms = request.randomness(self.device, dalle.num_image_tokens)
        given = None if request.image is None else self._given(dalle, request.image, request.keep_rows)
        for done, drawn in draw_image_tokens(
            decoder, text, uniforms.to(decoder.device), sampling, given, null_tokens=null
        ):
            finished = done == dalle.num_image_tokens
            if finished or (request.progressive_outputs and done % PREVIEW == 0):
                shown = drawn if finished else undrawn_as_last(drawn, done, dalle.codebook_size)
                images = self._decode(dalle, shown, request.grid_size if request.is_seamless else None)
                yield request.ranked(images) if finished else images

    def _tokens(self, dalle: TextToImage, text: str, is_verbose: bool) -> Int[Tensor, "1 t"]:
        """Of a prompt, cut where it is too long."""
        assert dalle.text_tokenizer is not None  # the importer sets it
        length, tokenizer = dalle.config.text_len, dalle.text_tokenizer
        if (found := len(tokenizer.encode(text))) > length:
            log.warning("%r has %d tokens, the model reads the first %d", text, found, length)
        elif is_verbose:
            log.info("%r has %d tokens", text, found)
        return tokenizer.tokenize(text, length, truncate=True)

    @torch.inference_mode()
    def _given(self, dalle: TextToImage, image: Tensor | Image.Image, keep_rows: int) -> KnownTokens:
        """The upper rows of a picture."""
        if not 0 < keep_rows < dalle.grid_size:
            raise UserError(f"image needs keep_rows: keep_rows must lie in 1 to {dalle.grid_size - 1}, got {keep_rows}")
        if isinstance(image, Image.Image):
            image = to_tensor(fit(flatten(ImageOps.exif_transpose(image)), dalle.vae.image_size))
        keep = torch.arange(dalle.num_image_tokens) < keep_rows * dalle.grid_size
        return KnownTokens(dalle.vae.encode(image[None].to(self.device)).cpu(), keep)

    @torch.inference_mode()
    def _decode(
        self, dalle: TextToImage, drawn: Int[Tensor, "m n"], grid_size: int | None
    ) -> Float[Tensor, "pictures c rows columns"]:
        """Pictures of image tokens; with a grid size one picture of all of them."""
        if grid_size is None:
            return dalle.vae.decode(drawn).cpu()
        rows = drawn.view(grid_size, grid_size, dalle.grid_size, dalle.grid_size)  # min-dalle goes down the columns
        grid = rows.permute(1, 2, 0, 3).reshape(1, grid_size * dalle.grid_size, -1)
        vae: Any = dalle.vae
        return vae.decode_grid(grid).cpu()


def lay_out(dalle: DALLEBart, *, precision: str, **options: Any) -> Decoder:
    """A decoder that uses the model up: its linear layers in ``precision``, all between them in fp32.

    The image tokenizer keeps the type of its weights; so does the text encoder, which runs once a prompt, in "fp32" (it
    computes in fp32 then) and "fp16", which is slow on a CPU.
    """
    for name, module in dalle.named_modules():
        if not isinstance(module, nn.Linear) and not name.startswith("vae."):
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.float()
    if precision in ("bf16", "int8"):
        encoder = prepare(dalle.encoder, precision, consume=True)
    else:
        encoder = keep_stored(dalle.encoder)
    dalle.add_module("encoder", encoder)
    return Decoder(dalle, precision=precision, consume=True, **options)


def undrawn_as_last(drawn: Int[Tensor, "m n"], done: int, codebook_size: int) -> Int[Tensor, "m n"]:
    """Image tokens of a preview: those that are not drawn yet are the last of the codebook, 16383, as in min-dalle."""
    later = torch.arange(drawn.shape[1], device=drawn.device) >= done
    return torch.where(later, codebook_size - 1, drawn)


def as_pil(grid: Float[Tensor, "rows columns c"]) -> Image.Image:
    """An image of values in 0 to 255, whose fractions are cut off, as in min-dalle."""
    return Image.fromarray(grid.clamp(0, 255).byte().cpu().numpy())
