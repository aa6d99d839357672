"""What every metric refuses: too few samples, numbers that are none, arrays that do not fit together.

Axes: b samples, r real ones, g generated ones, e features, _ = any number.
"""

import torch
from jaxtyping import Shaped
from torch import Tensor

from dalle_pytorch.errors import UserError


def check_rows(rows: Shaped[Tensor, "b ..."], name: str, *, least: int) -> None:
    """Refuse too few rows, and rows with NaN or infinite numbers.

    Args:
        rows: a row a sample.
        name: what to call them in an error.
        least: how few will do.

    Raises:
        ValueError: names the count or the first bad sample, and the mend.
    """
    if len(rows) < least:
        raise UserError(f"{name}: {len(rows)} samples given, at least {least} are needed; evaluate on more of them")
    bad = (~torch.isfinite(rows.flatten(1) if rows.ndim > 1 else rows[:, None])).any(dim=1)
    if bad.any():
        first = int(bad.int().argmax())
        raise UserError(
            f"{name}: {int(bad.sum())} of {len(rows)} samples are NaN or infinite, the first is number {first}; look "
            "at it, and run the model that made them in fp32"
        )


def check_two(real: Shaped[Tensor, "r e"], other: Shaped[Tensor, "g _"], *, least: int) -> None:
    """Refuse two sets of features that cannot be compared.

    Raises:
        ValueError: another width, too few rows or rows that are no numbers; names them and the mend.
    """
    if real.shape[1] != other.shape[1]:
        raise UserError(
            f"real features have {real.shape[1]} columns, generated ones {other.shape[1]}: take both from one extractor"
        )
    check_rows(real, "real features", least=least)
    check_rows(other, "generated features", least=least)
