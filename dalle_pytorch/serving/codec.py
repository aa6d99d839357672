"""Image tokens over HTTP: the routes of the encoder-decoder server, for whichever image tokenizer is loaded.

Axes: b images, h w token rows and columns, n image tokens.
"""

import base64
import copy
import io
import json
import math
import threading
from typing import Annotated, Any, Literal

import torch
from fastapi import APIRouter, File, HTTPException, Path, Query, Request, Response
from fastapi.concurrency import run_in_threadpool
from PIL import Image

from dalle_pytorch.errors import UserError
from dalle_pytorch.evaluation.codecs import CODECS, at_bytes
from dalle_pytorch.evaluation.reconstruction import psnr_each
from dalle_pytorch.images import fit, open_rgb, to_pil, to_tensor
from dalle_pytorch.serving.engine import png
from dalle_pytorch.serving.room import Room

Format = Literal["jpeg", "png", "webp"]
QUALITY = 70
"""Of JPEG and WebP files, as the encoder-decoder server has it."""
MAX_SIDE, MAX_BATCH = 1024, 64
READ = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
"""Formats of uploads: readers that decode nothing before the number of pixels is known, and start no other program."""
NO_GRIDS = "the body must be a JSON array [images][rows][columns] of integers"
IMAGE: dict[int | str, dict[str, Any]] = {200: {"content": {f"image/{form}": {} for form in ("jpeg", "png", "webp")}}}
TOKENS = {
    "required": True,
    "content": {
        "application/json": {
            "schema": {
                "type": "array",
                "items": {"type": "array", "items": {"type": "array", "items": {"type": "integer"}}},
            }
        }
    },
}


class Codec:
    """An image tokenizer that encodes and decodes one request at a time.

    Args:
        vae: image tokenizer. One without fully connected parts reads images of other sizes than its own as well.
        max_pixels: of an uploaded image.
    """

    def __init__(self, vae: Any, *, max_pixels: int) -> None:
        self.vae, self.max_pixels, self.lock = vae, max_pixels, threading.Lock()
        self.room = Room("too many images at once")
        self.factor = vae.image_size // vae.grid_size
        self.device = next(vae.parameters()).device

    def at(self, grid: int) -> Any:
        """The image tokenizer for a grid of other sides, sharing its weights."""
        vae = copy.copy(self.vae)
        vae.image_size, vae.grid_size = grid * self.factor, grid
        return vae

    def read(self, data: bytes, size: int) -> torch.Tensor:
        """An uploaded image as a square, its short side scaled to ``size``, cut to whole tokens.

        Raises:
            HTTPException: no image, too many pixels, or one that is smaller.
        """
        try:
            with Image.open(io.BytesIO(data), formats=READ) as image:
                width, height = image.size
        except Exception as error:  # foreign bytes break Pillow's readers in any way
            raise HTTPException(415, "the file is no image that can be read") from error
        if size < self.factor:
            raise HTTPException(422, f"a token of this image tokenizer covers {self.factor} pixels, size is {size}")
        if width * height > self.max_pixels:
            raise HTTPException(413, f"the image has {width} x {height} pixels, {self.max_pixels} at most")
        if min(width, height) < size:
            raise HTTPException(422, f"the image has {width} x {height} pixels, its short side must be {size} at least")
        try:
            square = fit(open_rgb(data, name="the file"), size)
        except (ValueError, OSError) as error:
            raise HTTPException(415, "the file is no whole image") from error
        whole = size - size % self.factor
        return to_tensor(square)[None, :, :whole, :whole]

    def encode(self, data: bytes, size: int) -> list[list[list[int]]]:
        """Tokens ``[1, h, w]`` of an uploaded image.

        Raises:
            HTTPException: as ``read``; or a size that the image tokenizer does not read.
        """
        with self.room.turn():
            return self._tokens(self.read(data, size)).tolist()

    def _tokens(self, images: torch.Tensor) -> torch.Tensor:
        vae = self.at(images.shape[-1] // self.factor)
        with self.lock, torch.inference_mode():
            tokens = self._run(vae.encode, images)
        return tokens.view(-1, vae.grid_size, vae.grid_size)

    def decode(self, tokens: torch.Tensor, item: int = 0) -> Image.Image:
        """One image of tokens ``[b, h, w]``, all of which are checked before any reaches the device.

        Raises:
            HTTPException: another shape, a token that is no code, or no such image.
        """
        count, rows, columns = tokens.shape
        if rows != columns or not 1 <= rows <= MAX_SIDE // self.factor or not 1 <= count <= MAX_BATCH:
            raise HTTPException(422, f"tokens of shape {list(tokens.shape)} are no square grids, {MAX_BATCH} at most")
        low, high = int(tokens.min()), int(tokens.max())
        if low < 0 or high >= self.vae.codebook_size:
            raise HTTPException(
                422, f"tokens lie in {low} to {high}, the codebook has 0 to {self.vae.codebook_size - 1}"
            )
        if item >= count:
            raise HTTPException(422, f"item {item} of a batch of {count}")
        with self.room.turn():
            return self._decode(tokens[item : item + 1])

    def _decode(self, tokens: torch.Tensor) -> Image.Image:
        vae = self.at(tokens.shape[1])
        with self.lock, torch.inference_mode():
            (image,) = self._run(vae.decode, tokens.flatten(1))
        return to_pil(image.float())

    def compare(self, data: bytes, size: int) -> list[dict[str, Any]]:
        """An uploaded image through its tokens, and as JPEG and WebP files of at most as many bytes.

        Raises:
            HTTPException: as ``encode``.
        """
        with self.room.turn():
            return self._compare(data, size)

    def _compare(self, data: bytes, size: int) -> list[dict[str, Any]]:
        image = self.read(data, size)
        grid = self._tokens(image)
        budget = math.ceil(grid.numel() * math.log2(self.vae.codebook_size) / 8)
        made = to_tensor(self._decode(grid))[None]
        rows = [("tokens", made, budget)]
        for codec in CODECS:
            coded = at_bytes(image, codec, budget)
            rows.append((codec.lower(), coded.images, int(coded.file_bytes[0])))
        return [
            {
                "name": name, "bytes": count, "psnr": round(float(psnr_each(pixels, image)[0]), 2),
                "png": base64.b64encode(png(to_pil(pixels[0]))).decode(),
            }
            for name, pixels, count in [("original", image, len(data)), *rows]
        ]  # fmt: skip

    def _run(self, function: Any, x: torch.Tensor) -> torch.Tensor:
        try:
            return function(x.to(self.device)).cpu()
        except (UserError, ValueError) as error:
            raise HTTPException(
                422, f"this image tokenizer reads {self.vae.image_size} pixels only: {error}"
            ) from error


def encoded(image: Image.Image, form: Format) -> Response:
    """An image as the body of an answer."""
    file = io.BytesIO()
    image.save(file, form.upper(), **({} if form == "png" else {"quality": QUALITY}))
    return Response(file.getvalue(), media_type=f"image/{form}")


def as_grids(value: Any) -> torch.Tensor:
    """JSON ``[b][h][w]`` of integers as a tensor.

    Raises:
        HTTPException: anything else.
    """
    wrong = HTTPException(422, NO_GRIDS)
    rows = [row for grid in value for row in grid] if _lists(value) and all(map(_lists, value)) else []
    if not rows or not all(isinstance(row, list) and row for row in rows):
        raise wrong
    if any(type(token) is not int or abs(token) > 1 << 31 for row in rows for token in row):
        raise wrong
    if len({len(row) for row in rows}) > 1 or len({len(grid) for grid in value}) > 1:
        raise wrong
    return torch.tensor(value)


def _lists(value: Any) -> bool:
    return isinstance(value, list) and bool(value)


def routes(codec: Any) -> APIRouter:
    """The routes.

    Args:
        codec: gives the Codec when it is asked for.
    """
    router = APIRouter(tags=["codec"])
    Size = Annotated[int, Path(ge=8, le=MAX_SIDE, description="short side of the image in pixels")]
    Upload = Annotated[bytes, File(description="PNG, JPEG, WebP, GIF, BMP or TIFF, in any mode")]
    Form = Annotated[Format, Query(alias="format")]

    @router.post("/encode/{size}")
    def encode(size: Size, file: Upload) -> list[list[list[int]]]:
        """Tokens `[1][rows][columns]` of an image, scaled and cut to a square."""
        return codec().encode(file, size)

    @router.post("/decode", response_class=Response, responses=IMAGE, openapi_extra={"requestBody": TOKENS})
    async def decode(
        request: Request,
        form: Form = "jpeg",
        item: Annotated[int, Query(ge=0, description="which image of the batch")] = 0,
    ) -> Response:
        """The image of tokens `[images][rows][columns]`, whatever the content type says."""
        body, own = await request.body(), codec()

        def answer() -> Response:
            try:
                grids = as_grids(json.loads(body))
            except (ValueError, RecursionError) as error:
                raise HTTPException(422, NO_GRIDS) from error
            return encoded(own.decode(grids, item), form)

        return await run_in_threadpool(answer)

    @router.post("/encode-decode/{size}", response_class=Response, responses=IMAGE)
    def encode_decode(size: Size, file: Upload, form: Form = "jpeg") -> Response:
        """An image as the tokens of it make it again."""
        own = codec()
        return encoded(own.decode(torch.tensor(own.encode(file, size))), form)

    @router.post("/compare/{size}")
    def compare(size: Size, file: Upload) -> list[dict[str, Any]]:
        """An image as its tokens make it, and as JPEG and WebP of at most as many bytes: PNGs, bytes, PSNR in dB.

        JPEG's tables alone take some 290 bytes: where `bytes` is more than the tokens', no file is so small.
        """
        return codec().compare(file, size)

    return router
