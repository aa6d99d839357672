"""How a command ends: one line for what a person can mend, a traceback for a defect, no leftovers in stdout."""

import errno
import io
import os
import sys
from dataclasses import dataclass, field

import pytest

from dalle_pytorch.errors import ConfigError, StoppedError, UserError, exit_code, finite, one_line_errors


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UserError("out= is wrong"), 1, "error: out= is wrong\n"),
        (ConfigError("no such setting"), 2, "error: no such setting\n"),
        (OSError(errno.ENOSPC, "No space left on device", "a.png"), 1, "error: No space left on device: a.png\n"),
        (FileNotFoundError("no file a"), 1, "error: no file a\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (StoppedError(15), 143, "interrupted\n"),
    ],
)
def test_errors_for_people_are_one_line_and_an_exit_code(capsys, error, code, line):
    with pytest.raises(SystemExit) as stop, one_line_errors():
        raise error
    assert stop.value.code == code
    assert capsys.readouterr().err == line
    with pytest.raises(type(error)), one_line_errors(full=True):
        raise error


def test_defects_keep_their_traceback():
    for defect in (ValueError("x"), KeyError("x"), OSError("decoder error")):
        with pytest.raises(type(defect)), one_line_errors():
            raise defect


def test_a_signal_has_the_exit_code_of_a_shell():
    assert exit_code(KeyboardInterrupt()) == 130
    assert exit_code(StoppedError(15)) == 143


@pytest.mark.parametrize("length", [5, 100_000])
@pytest.mark.parametrize("where", ["pipe", "/dev/full"])
@pytest.mark.parametrize("end", ["returns", "exits"])
def test_output_that_cannot_be_written_is_one_line(monkeypatch, capsys, length, where, end):
    """At the end, or once more is printed than is held back; also where the program exits itself, as --help does."""
    if where == "pipe":
        reader, writer = os.pipe()
        os.close(reader)
    else:
        writer = os.open(where, os.O_WRONLY)
    stdout = os.fdopen(writer, "w")
    monkeypatch.setattr(sys, "stdout", stdout)

    @one_line_errors()
    def command():
        print("x" * length)
        if end == "exits":
            sys.exit(0)

    with pytest.raises(SystemExit) as stop:
        command()
    assert stop.value.code == 1
    error = capsys.readouterr().err
    assert error.startswith("error: Broken pipe" if where == "pipe" else "error: No space left on device")
    assert error.count("\n") == 1
    stdout.close()  # as at the interpreter's end: nothing is left that fails again


def test_numbers_that_are_not_finite_are_named():
    @dataclass
    class Config:
        count: int = 1
        scale: float | None = None
        points: list[float] = field(default_factory=list)

    finite(Config(scale=-1.5, points=[0.0, 1e38]))
    for name in ("scale", "points"):
        for value in (float("nan"), float("inf"), -float("inf")):
            with pytest.raises(UserError, match=f"{name} must be a finite number"):
                finite(Config(**{name: [1.0, value] if name == "points" else value}))


def test_what_an_encoding_lacks_is_printed_as_an_escape(monkeypatch):
    out = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(out, encoding="ascii"))
    with one_line_errors():
        print("größe.png")
    assert out.getvalue().strip() == rb"gr\xf6\xdfe.png"
