"""Weights of other programs as a checkpoint of ours: ``dalle-import-weights SOURCE PATH --out FILE``."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from dalle_pytorch.checkpoints import checkpoint
from dalle_pytorch.checkpoints.loading import load_with_header
from dalle_pytorch.checkpoints.sources import SOURCES
from dalle_pytorch.errors import UserError

WORDS = {"True": "true", "False": "false", "None": "null"}


def parser() -> argparse.ArgumentParser:
    """The arguments."""
    rows = "\n".join(f"  {name:18} {row.what}" for name, row in SOURCES.items())
    arguments = argparse.ArgumentParser(
        prog="python -m dalle_pytorch.commands.import_weights",
        description="Weights of other programs as a checkpoint of dalle_pytorch. Nothing in a file is executed.",
        epilog=f"sources:\n{rows}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    arguments.add_argument("source", choices=["auto", *SOURCES], help="format of the weights; auto: find out")
    arguments.add_argument("path", help="file, folder, name of a release or id of the Hugging Face hub")
    arguments.add_argument("options", nargs="*", metavar="name=value", help="what the source's convert() takes beyond")
    arguments.add_argument("--out", type=Path, required=True, help="file to write, .safetensors; must not exist")
    return arguments


def main() -> None:
    """Import and save; errors in one line."""
    arguments = parser().parse_intermixed_args()
    try:
        options = dict(parse(option) for option in arguments.options)
        if arguments.out.exists():
            raise FileExistsError(f"{arguments.out} exists; choose another --out")
        source = None if arguments.source == "auto" else arguments.source
        if taken := sorted(options.keys() & {"weights", "kind", "source", "map_location", "dtype"}):
            raise UserError(f"{', '.join(taken)} is no option of a source")
        model, head = load_with_header(arguments.path, source=source, dtype=None, **options)
        checkpoint.save(model, arguments.out, training=head["training"])
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"error: {error}")
    count = sum(parameter.numel() for parameter in model.parameters())
    print(f"{arguments.out}: {head['kind']}, {count:,} parameters")


def parse(option: str) -> tuple[str, Any]:
    """Name and value; numbers, true, false and null as in JSON or Python, anything else as text.

    Raises:
        ValueError: no ``=`` in it.
    """
    name, separator, value = option.partition("=")
    if not separator:
        raise UserError(f"{option!r} is not name=value")
    try:
        return name, json.loads(WORDS.get(value, value))
    except json.JSONDecodeError:
        return name, value


if __name__ == "__main__":
    main()
