"""Exact match of greedy decoding: ``dalle-exact-match dalle=... data=rainbow``."""

from dalle_pytorch.config import entry
from dalle_pytorch.evaluation.exact_match import ExactMatchConfig, judge


@entry("exact_match", ExactMatchConfig)
def main(config: ExactMatchConfig) -> None:
    """Print a line for each split."""
    print("\n".join(judge(config)))


if __name__ == "__main__":
    main()
