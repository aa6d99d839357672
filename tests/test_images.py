"""Picture bytes to tensors."""

import io
import random
import struct
from contextlib import suppress
from unittest.mock import Mock

import pytest
import torch
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo

from dalle_pytorch.errors import UserError
from dalle_pytorch.images import decode_image, open_rgb, random_crop, random_flip, random_resized_crop, to_pil


def encoded(image: Image.Image, kind: str = "png", **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "F"])
def test_every_mode_becomes_rgb_in_range(mode: str) -> None:
    kind = {"CMYK": "jpeg", "F": "tiff"}.get(mode, "png")
    data = encoded(Image.new("L", (8, 6), 255).convert(mode), kind)
    image = decode_image(data, image_size=4, name="a")
    assert image.shape == (3, 4, 4)
    assert image.dtype == torch.float32
    assert 0 <= image.min() <= image.max() <= 1


def test_sixteen_bit_grey_keeps_its_brightness() -> None:
    data = encoded(Image.new("I;16", (4, 4), 32768))
    assert decode_image(data, image_size=4, name="a").mean().item() == pytest.approx(0.5, abs=0.01)


def test_transparency_lies_on_white() -> None:
    clear = encoded(Image.new("RGBA", (4, 4), (255, 0, 0, 0)))
    assert decode_image(clear, image_size=4, name="a").eq(1).all()
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([255, 0, 0])
    assert decode_image(encoded(palette, transparency=0), image_size=4, name="a").eq(1).all()


def test_exif_rotation_is_applied() -> None:
    image = Image.new("RGB", (8, 8), "white")
    image.paste("black", (0, 0, 8, 4))
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    turned = decode_image(encoded(image, exif=exif), image_size=8, name="a")
    assert turned[:, :4].eq(1).all()
    assert turned[:, 4:].eq(0).all()


def test_broken_exif_costs_the_rotation_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    image = Image.new("RGB", (8, 8), "white")
    for error in (TypeError("no number"), struct.error("short"), KeyError(7), ZeroDivisionError(), SyntaxError("x")):
        monkeypatch.setattr(ImageOps, "exif_transpose", Mock(side_effect=error))
        assert decode_image(encoded(image), image_size=8, name="a").eq(1).all()


@pytest.mark.parametrize("error", [TypeError, struct.error, KeyError, RuntimeError, NotImplementedError, IndexError])
def test_whatever_the_decoder_raises_names_the_image(error: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image.Image, "convert", Mock(side_effect=error("odd")))
    with pytest.raises(UserError, match="red-apple"):
        decode_image(encoded(Image.new("RGB", (8, 8))), image_size=8, name="red-apple")


@pytest.mark.parametrize("kind", ["dds", "blp", "avif", "spider", "tiff", "qoi", "icns", "jpeg2000", "gif", "psd"])
def test_damaged_files_of_every_format_name_the_image(kind: str) -> None:
    headers = {"psd": b"8BPS\0\1" + bytes(20), "spider": encoded(Image.new("F", (16, 16)), "spider")}
    image = Image.effect_noise((16, 16), 50).convert("P" if kind == "blp" else "RGB")
    whole = headers[kind] if kind in headers else encoded(image, kind)
    rng = random.Random(0)
    for _ in range(60):
        data = bytearray(whole[: rng.randrange(4, len(whole) + 1)])
        for _ in range(4):
            data[rng.randrange(4, len(data) + 1) - 1] = rng.randrange(256)
        with suppress(UserError):  # any other error is a failure
            assert open_rgb(bytes(data), name="a").mode == "RGB"


def test_long_text_in_a_png_is_no_obstacle() -> None:
    text = PngInfo()
    text.add_text("workflow", "x" * 3_000_000, zip=True)
    assert decode_image(encoded(Image.new("RGB", (8, 8), "white"), pnginfo=text), image_size=8, name="a").eq(1).all()


def test_the_middle_square_is_kept() -> None:
    image = Image.new("RGB", (24, 8), "black")
    image.paste("white", (8, 0, 16, 8))
    assert decode_image(encoded(image), image_size=8, name="a").eq(1).all()


def test_a_picture_of_the_right_size_is_exact() -> None:
    image = torch.randint(0, 256, (3, 8, 8), generator=torch.Generator().manual_seed(0)).float() / 255
    assert torch.equal(decode_image(encoded(to_pil(image)), image_size=8, name="a"), image)


@pytest.mark.parametrize("kind", ["png", "webp", "jpeg"])
def test_corrupt_bytes_name_the_sample(kind: str) -> None:
    whole = encoded(Image.effect_noise((32, 32), 50).convert("RGB"), kind)
    for data in (b"", b"not a picture", whole[: len(whole) // 2]):
        with pytest.raises(ValueError, match="red-apple_noto"):
            decode_image(data, image_size=8, name="red-apple_noto")


def test_crops_depend_on_the_generator_alone_and_leave_the_picture_alone() -> None:
    image = torch.rand(3, 12, 10, generator=torch.Generator().manual_seed(0))
    before = image.clone()
    for crop in (
        lambda g: random_crop(image, padding=2, generator=g),
        lambda g: random_resized_crop(image, image_size=6, generator=g),
        lambda g: random_flip(image, generator=g),
    ):
        one, again = (crop(torch.Generator().manual_seed(3)) for _ in range(2))
        many = {crop(torch.Generator().manual_seed(seed)).sum(-1).flatten()[:20].numpy().tobytes() for seed in range(9)}
        assert torch.equal(one, again)
        assert 0 <= one.min() <= one.max() <= 1
        assert len(many) > 1
    assert torch.equal(image, before)
    assert random_crop(image, padding=2, generator=torch.Generator()).shape == (3, 12, 10)
    assert random_resized_crop(image, image_size=16, generator=torch.Generator()).shape == (3, 16, 16)
