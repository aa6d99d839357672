"""``dalle_pytorch.loader`` of DALLE-pytorch: its data set is not here, the error says what is."""

from typing import Any

from dalle_pytorch.compat.names import missing


def __getattr__(name: str) -> Any:
    raise missing(__name__, name)
