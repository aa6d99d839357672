"""Errors meant for people, the checks and words that many of them share, and how a command ends."""

import contextlib
import io
import math
import os
import signal
import sys
import threading
from collections.abc import Iterable, Iterator
from dataclasses import fields
from typing import Any, NoReturn


class UserError(ValueError):
    """A mistake that a person can correct from the message alone; commands show it in one line, without a traceback.

    The message names the culprit (a setting, a file, a value) and the correction. A defect of the program must not be
    raised as this class: it needs its traceback.
    """


class ConfigError(UserError):
    """Settings that contradict each other or do not exist: a misspelt key, an unknown option, a wrong type or value."""


def at_least_one(config: object, *names: str) -> None:
    """Refuse sizes and counts below 1. None is none given.

    Raises:
        UserError: names the first field, and its value.
    """
    for name in names:
        value = getattr(config, name)
        if value is not None and value < 1:
            raise UserError(f"{name} must be at least 1, got {value}")


def not_negative(config: object, *names: str) -> None:
    """Refuse counts and weights below 0.

    Raises:
        UserError: names the first field, and its value.
    """
    for name in names:
        if getattr(config, name) < 0:
            raise UserError(f"{name} must not be negative, got {getattr(config, name)}")


def finite(config: Any) -> None:
    """Refuse NaN and infinity in the fields of a dataclass, and in lists there.

    Raises:
        UserError: names the first field, and its value.
    """
    for item in fields(config):
        value = getattr(config, item.name)
        if any(isinstance(each, float) and not math.isfinite(each) for each in _each(value)):
            raise UserError(f"{item.name} must be a finite number, got {value}")


def _each(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


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


class StoppedError(KeyboardInterrupt):
    """A signal asks the program to end; whatever handles Ctrl-C handles it too.

    Args:
        number: the signal.
    """

    def __init__(self, number: int = signal.SIGINT) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


@contextlib.contextmanager
def stopped_by_signals() -> Iterator[None]:
    """Raise `StoppedError` where SIGTERM or SIGHUP would end the program at once; further ones are ignored."""

    def stop(number: int, _: Any) -> None:
        signal.signal(number, signal.SIG_IGN)
        raise StoppedError(number)

    names = ("SIGTERM", "SIGHUP") if threading.current_thread() is threading.main_thread() else ()
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    found = [number for number in numbers if signal.getsignal(number) == signal.SIG_DFL]  # nohup ignores SIGHUP
    for number in found:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number in found:
            signal.signal(number, signal.SIG_DFL)


def exit_code(error: KeyboardInterrupt) -> int:
    """The exit code after a signal, as a shell has it: 130 after Ctrl-C, 143 after SIGTERM."""
    return 128 + (error.number if isinstance(error, StoppedError) else signal.SIGINT)


@contextlib.contextmanager
def one_line_errors(*, full: bool = False) -> Iterator[None]:
    """End the program with one line and an exit code where an error is meant for people.

    Settings that cannot be end it with 2, other errors with 1, Ctrl-C with 130. Standard output is written out here, so
    that a closed pipe or a full disk behind it is such an error, too; what its encoding lacks is printed as an escape.

    Args:
        full: keep every traceback.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        try:
            yield
        except SystemExit:
            _flush_stdout()
            raise
        _flush_stdout()
    except KeyboardInterrupt as error:
        if full:
            raise
        sys.stderr.write("interrupted\n")
        sys.exit(exit_code(error))
    except (UserError, OSError) as error:
        if full or not is_for_people(error):
            raise
        code = report(error)
        with contextlib.suppress(OSError):
            _flush_stdout()  # may be what failed: the interpreter would fail again at its end
        sys.exit(code)


def is_for_people(error: Exception) -> bool:
    """Whether an error says all that a person needs: ours, or one of the system that names what failed."""
    return isinstance(error, UserError | FileNotFoundError | FileExistsError) or (
        isinstance(error, OSError) and error.errno is not None
    )


def report(error: Exception) -> int:
    """Print an error in one line; return the exit code."""
    text = str(error)
    if isinstance(error, OSError) and error.errno is not None:  # raised by the system, not by us
        text = f"{error.strerror}: {error.filename}" if error.filename is not None else str(error.strerror)
    sys.stderr.write(f"error: {text}\n")
    return 2 if isinstance(error, ConfigError) else 1


def _flush_stdout() -> None:
    """Write out what ``print`` holds back; what cannot be written is dropped.

    Raises:
        OSError: it cannot be written; names standard output.
    """
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        error.filename = "standard output"
        raise
