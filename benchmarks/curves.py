"""Loss curves of trainings from their CSV logs, a panel a model.

    python benchmarks/curves.py weights/emoji/logs weights/emoji/curves.png

Draws every ``*.csv`` of the folder: the losses of training, thin, and what validation watches, on an axis of its own.
"""

import argparse
import csv
from pathlib import Path

from matplotlib.figure import Figure

IMAGE_NATS = ("val/image", "nats per image token")
WATCHED = {"vae": ("val/psnr", "dB"), "dalle": IMAGE_NATS, "dalle_contrast": IMAGE_NATS, "clip": ("val/loss", "nats")}


def column(rows: list[dict[str, str]], name: str) -> tuple[list[int], list[float]]:
    """Steps and values of a logged quantity, where it was logged."""
    there = [row for row in rows if row.get(name)]
    return [int(row["step"]) + 1 for row in there], [float(row[name]) for row in there]


def main() -> None:
    """Read the logs, write the plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("logs", type=Path, help="folder of <model>.csv files")
    parser.add_argument("out", type=Path, help="PNG to write")
    given = parser.parse_args()
    logs = [path for path in sorted(given.logs.glob("*.csv")) if path.stem in WATCHED]
    figure = Figure(figsize=(5 * len(logs), 3.4), layout="constrained")
    for axis, path in zip(figure.subplots(1, len(logs), squeeze=False)[0], logs, strict=True):
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        name, unit = WATCHED[path.stem]
        axis.plot(*column(rows, "train/loss"), color="0.6", linewidth=0.7, label="train/loss")
        axis.set(title=path.stem, xlabel="step", ylabel="train/loss", yscale="log")
        other = axis.twinx()
        other.plot(*column(rows, name), color="C0", marker=".", label=name)
        other.set_ylabel(f"{name}, {unit}", color="C0")
    figure.savefig(given.out, dpi=110)
    print(given.out)


if __name__ == "__main__":
    main()
