"""Run and draw one replication: ``python -m replication kl_weight jobs=2``."""

import logging
import sys

from dalle_pytorch.config import entry
from replication.experiment import ReplicateConfig
from replication.runner import names, run_all, write

log = logging.getLogger(__name__)


@entry("replicate", ReplicateConfig)
def main(config: ReplicateConfig) -> None:
    """Run, judge, draw."""
    folder = write(config, run_all(config))
    log.info("%s\n%s", (folder / "table.md").read_text(encoding="utf-8"), folder)


def run() -> None:
    """``NAME`` as the first word stands for ``experiment=NAME``."""
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        sys.exit(f"usage: python -m replication NAME [jobs=2 ...]; there are {', '.join(names())}")
    if "=" not in sys.argv[1]:
        sys.argv[1] = f"experiment={sys.argv[1]}"
    main()


if __name__ == "__main__":
    run()
