"""Judge a checkpoint: ``evaluate.py checkpoint=... data=emoji split=test_concept``, of any kind.

Writes ``metrics.json``, ``report.html`` and the galleries of that page as ``pictures/*.png``. ``evaluate.py compare
A/metrics.json B/metrics.json`` sets two beside each other, and refuses numbers that were measured in two ways.
"""

import sys
from pathlib import Path

from dalle_pytorch.config import entry
from dalle_pytorch.distributed import Processes
from dalle_pytorch.errors import UserError, one_line_errors, report
from dalle_pytorch.evaluation.compare import side_by_side, with_interval
from dalle_pytorch.evaluation.config import EvaluateConfig
from dalle_pytorch.evaluation.evaluate import evaluate


@entry("evaluate", EvaluateConfig)
def main(config: EvaluateConfig) -> None:
    """Judge, write the files, print the numbers; with siblings where torchrun started this."""
    processes = Processes()
    try:
        record = evaluate(config, processes)
    finally:
        processes.close()
    if record is not None:
        for name, metric in record.metrics.items():
            print(f"{name:32} {with_interval(metric)}")
        print(", ".join(str(path) for path in sorted(Path(config.out).iterdir())))


def run() -> None:
    """``compare A B``, or an evaluation."""
    if sys.argv[1:2] != ["compare"]:
        return main()
    if len(sys.argv) != 4:
        sys.exit("usage: evaluate.py compare A/metrics.json B/metrics.json")
    with one_line_errors():
        table, refused = side_by_side(*sys.argv[2:])
        print(table)
        if refused is not None:
            sys.exit(report(UserError(refused)))


if __name__ == "__main__":
    run()
