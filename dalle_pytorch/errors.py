"""Errors meant for people, and the checks and words that many of them share."""

from collections.abc import Iterable
from typing import NoReturn


class UserError(ValueError):
    """A mistake that a person can correct from the message alone; commands show it in one line, without a traceback.

    The message names the culprit (a setting, a file, a value) and the correction. A defect of the program must not be
    raised as this class: it needs its traceback.
    """


class ConfigError(UserError):
    """Settings that contradict each other or do not exist: a misspelt key, an unknown option, a wrong type or value."""


def at_least_one(config: object, *names: str) -> None:
    """Refuse sizes and counts below 1.

    Raises:
        UserError: names the first field, and its value.
    """
    for name in names:
        if getattr(config, name) < 1:
            raise UserError(f"{name} must be at least 1, got {getattr(config, name)}")


def not_negative(config: object, *names: str) -> None:
    """Refuse counts and weights below 0.

    Raises:
        UserError: names the first field, and its value.
    """
    for name in names:
        if getattr(config, name) < 0:
            raise UserError(f"{name} must not be negative, got {getattr(config, name)}")


def some(names: Iterable[str]) -> str:
    """A few names for an error message."""
    names = list(names)
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "") or "none"


def first_line(error: BaseException) -> str:
    """The first line of an error's message."""
    return (str(error).splitlines() or [""])[0] or type(error).__name__


def refuse(path: object, why: str) -> NoReturn:
    """End the reading of a file with one line that names it.

    Raises:
        UserError: always.
    """
    raise UserError(f"{path}: {why}")
