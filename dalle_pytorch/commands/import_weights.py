"""Weights of other programs as a checkpoint of ours: ``dalle-import-weights SOURCE PATH --out FILE``."""

import argparse
from pathlib import Path

from dalle_pytorch.checkpoints import checkpoint
from dalle_pytorch.checkpoints.loading import load_with_header
from dalle_pytorch.checkpoints.sources import SOURCES, parse_options
from dalle_pytorch.errors import one_line_errors


def parser() -> argparse.ArgumentParser:
    """The arguments."""
    rows = "\n".join(f"  {name:18} {row.what}" for name, row in SOURCES.items())
    arguments = argparse.ArgumentParser(
        prog="dalle-import-weights",
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
    with one_line_errors():
        if arguments.out.exists():
            raise FileExistsError(f"{arguments.out} exists; choose another --out")
        source = None if arguments.source == "auto" else arguments.source
        options = parse_options(arguments.options)
        model, head = load_with_header(arguments.path, source=source, dtype=None, **options)
        checkpoint.save(model, arguments.out, training=head["training"])
        count = sum(parameter.numel() for parameter in model.parameters())
        print(f"{arguments.out}: {head['kind']}, {count:,} parameters")


if __name__ == "__main__":
    main()
