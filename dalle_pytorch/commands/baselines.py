"""Set a run's three models beside their honest baselines: ``dalle-baselines dalle=... clip=... ranking=...``."""

import sys

from dalle_pytorch.config import entry
from dalle_pytorch.evaluation.baselines import BaselinesConfig, compare, table


@entry("baselines", BaselinesConfig)
def main(config: BaselinesConfig) -> None:
    """Print the table; exit with 1 where a baseline is not beaten."""
    comparisons = compare(config)
    print(f"on the split {config.data.val_split!r} of {config.data.path}")
    print(table(comparisons))
    if not all(comparison.beaten for comparison in comparisons):
        sys.exit("a baseline is not beaten")


if __name__ == "__main__":
    main()
