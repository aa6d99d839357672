"""The library: images as PNG files under ids that the server makes, each with all that draws it again."""

import contextlib
import json
import re
import time
import uuid
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from dalle_pytorch.files import atomic

ID = re.compile(r"[0-9a-f]{32}")
NOTES = "dalle_pytorch"
"""Name of the text chunk that holds the notes of an image as JSON."""


class Library:
    """A folder of images.

    Args:
        folder: made if it is not there.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "images"
        self.folder.mkdir(parents=True, exist_ok=True)

    def path(self, image: str) -> Path:
        """Where an image lies.

        Raises:
            KeyError: no id that this server could have made.
        """
        if not ID.fullmatch(image):
            raise KeyError(image)
        return self.folder / image[:2] / f"{image}.png"

    def add(self, image: Image.Image, notes: dict[str, Any], *, name: str | None = None) -> str:
        """Write an image whole, or not at all; its id, a new one unless it is given."""
        name, text = name or uuid.uuid4().hex, PngInfo()
        text.add_itxt("parameters", str(notes.get("prompt", "")))  # where other programs look for the prompt
        text.add_itxt(NOTES, json.dumps(notes))
        path = self.path(name)
        path.parent.mkdir(exist_ok=True)
        with atomic(path) as temporary:
            image.save(temporary, format="PNG", pnginfo=text)
        return name

    def open(self, image: str) -> Image.Image:
        """An image in RGB.

        Raises:
            KeyError: no id that this server could have made.
            OSError: there is no whole file of it.
        """
        try:
            with Image.open(self.path(image)) as picture:
                return picture.convert("RGB")
        except (SyntaxError, ValueError) as error:  # what Pillow's readers also raise
            raise OSError(f"image {image} is damaged") from error

    def delete(self, image: str) -> None:
        """Delete the file of an image; it may be gone already."""
        self.path(image).unlink(missing_ok=True)

    def ids(self) -> list[str]:
        """All images that lie here."""
        return sorted(path.stem for path in self.folder.glob("??/*.png") if ID.fullmatch(path.stem))

    def delete_halves(self, *, older_than: float) -> int:
        """Delete what writers that were killed have left, once it is so many seconds old; how many files."""
        count = 0
        for path in self.folder.glob("??/.*.tmp"):
            with contextlib.suppress(FileNotFoundError):
                if time.time() - path.stat().st_mtime > older_than:
                    path.unlink()
                    count += 1
        return count

    def notes(self, image: str) -> dict[str, Any]:
        """What stands in the file of an image."""
        with Image.open(self.path(image)) as picture:
            return json.loads(picture.info[NOTES])
