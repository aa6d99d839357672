"""Search of the library by meaning: a CLIP's features of images beside those of some words.

Axes: m images, e features.
"""

import logging
import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from dalle_pytorch.checkpoints.checkpoint import weights_sha256
from dalle_pytorch.images import to_tensor
from dalle_pytorch.models.mode import eval_mode
from dalle_pytorch.models.two_towers import SCORED_TOGETHER, TwoTowers
from dalle_pytorch.serving.ledger import Ledger, Row
from dalle_pytorch.serving.library import Library
from dalle_pytorch.serving.room import Room

log = logging.getLogger(__name__)
EMBEDDED_AT_ONCE = 512
"""Images of one search that are looked at for the first time; some seconds on a CPU."""


class Found(NamedTuple):
    """Images near to some words, the nearest first."""

    rows: list[tuple[Row, float]]
    """Each with its cosine, in [-1, 1]."""
    complete: bool
    """Whether all images of the owner were compared; otherwise ask again."""


class Similar:
    """The library through a CLIP. Features are kept in the ledger, made when they are first asked for.

    Args:
        clip: reads images and words.
        ledger: has the rows and keeps the features.
        library: has the files.
    """

    def __init__(self, clip: TwoTowers, ledger: Ledger, library: Library) -> None:
        self.clip, self.ledger, self.library = clip, ledger, library
        self.name, self.lock = weights_sha256(clip), threading.Lock()
        self.room = Room("too many searches at once")

    def find(self, words: str, owner: str, limit: int) -> Found:
        """Images of an owner by their cosine with some words.

        Raises:
            HTTPException: too many search at once.
        """
        with self.room.turn(), self.lock:  # one at a time, since all threads would work on the same images
            new = self.ledger.without_features(self.name, owner, EMBEDDED_AT_ONCE)
            self.ledger.add_features(self.name, self.features(new))
            known = self.ledger.features(self.name, owner)
            if not known:
                return Found([], True)
            with eval_mode(self.clip):
                text = self.clip.encode_text(self.clip.tokenize(words)).float().cpu()
        values = torch.frombuffer(bytearray(b"".join(known.values())), dtype=torch.float16).view(len(known), -1)
        cosines = values.float() @ text[0]
        best = cosines.topk(min(limit, len(known)))
        ids = list(known)
        names = {ids[at]: cosine for at, cosine in zip(best.indices.tolist(), best.values.tolist(), strict=True)}
        rows = sorted(self.ledger.images_of(list(names)), key=lambda row: -names[row["id"]])
        return Found([(row, round(names[row["id"]], 4)) for row in rows], len(new) < EMBEDDED_AT_ONCE)

    def features(self, images: Sequence[str]) -> dict[str, bytes]:
        """Unit features in half precision; nothing for an image that cannot be read."""
        pixels: dict[str, Float[Tensor, "c H W"]] = {}
        for image in images:
            try:
                pixels[image] = to_tensor(self.library.open(image))
            except OSError:
                log.warning("image %s cannot be read", image)
        found: dict[str, Any] = dict.fromkeys(images, b"")
        device = self.clip.log_logit_scale.device
        with eval_mode(self.clip):
            for shape in {tuple(image.shape) for image in pixels.values()}:
                alike = [name for name, image in pixels.items() if tuple(image.shape) == shape]
                batch = torch.stack([pixels[name] for name in alike]).to(device)
                parts = [self.clip.encode_image(part) for part in batch.split(SCORED_TOGETHER)]
                features = torch.cat(parts).half().cpu()
                found |= {name: row.numpy().tobytes() for name, row in zip(alike, features, strict=True)}
        return found
