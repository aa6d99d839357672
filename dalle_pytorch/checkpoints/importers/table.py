"""Key tables: which weight of a foreign file becomes which of ours."""

import re
from collections.abc import Mapping

from torch import Tensor

from dalle_pytorch.errors import UserError, some

Table = Mapping[str, str | None]
"""Regular expressions of whole source keys, and the target with its groups; None = dropped on purpose. The first row
that fits counts."""


def rename(state: Mapping[str, Tensor], table: Table) -> dict[str, Tensor]:
    """The weights under our names.

    Args:
        state: weights under their source's names.
        table: what becomes of each.

    Raises:
        ValueError: a key that no row fits, or two keys with one target; names them.
    """
    rows = [(re.compile(pattern), target) for pattern, target in table.items()]
    renamed: dict[str, Tensor] = {}
    left: list[str] = []
    for key, tensor in state.items():
        match, target = next(
            ((match, target) for pattern, target in rows if (match := pattern.fullmatch(key))), (None, None)
        )
        if match is None:
            left.append(key)
        if match is None or target is None:
            continue
        name = match.expand(target)
        if name in renamed:
            raise UserError(f"two weights would become {name}, one of them {key}")
        renamed[name] = tensor
    if left:
        raise UserError(f"weights left over that this format does not have: {some(left)}")
    return renamed
