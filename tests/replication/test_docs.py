"""docs/replication.md says what the published numbers say."""

import json
import re
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from dalle_pytorch.config import CONFIGS, typed
from replication import __main__ as replicate
from replication import runner, summary
from replication.experiment import ReplicateConfig

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "replication.md").read_text(encoding="utf-8")
ROWS = {row: verdict for row, _, verdict in re.findall(r"^\| (R\d+) \| (.*?) \| (.*?) \|", PAGE, re.MULTILINE)}
PUBLISHED = sorted(path.name.split(".")[0] for path in (DOCS / "replication").glob("*.numbers.json"))
assert replicate.main


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_verdict_is_that_of_the_published_numbers(name):
    found = json.loads((DOCS / "replication" / f"{name}.numbers.json").read_text(encoding="utf-8"))
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        config = typed(compose("replicate", overrides=[f"experiment={name}"]), ReplicateConfig)
    values = {arm: {int(seed): each for seed, each in seeds.items()} for arm, seeds in found["numbers"].items()}
    assert list(values) == list(config.arms)
    assert all(list(seeds) == config.seeds for seeds in values.values())
    assert found["expect"] == config.expect
    verdict = summary.overall([each for text in config.expect for each in summary.judge(text, values)])
    assert ROWS[config.row] == verdict
    assert f"](replication/{name}.plot.png)" in PAGE
    assert f"](replication/{name}.table.md)" in PAGE


def test_every_row_has_a_verdict_or_says_that_it_was_not_run():
    assert list(ROWS) == [f"R{number}" for number in range(1, 31)]
    for verdict in ROWS.values():
        assert verdict in ("holds", "does not hold", "undecided") or verdict.startswith("not run")
    ready = [re.search(r"`(\w+)` is ready", verdict) for verdict in ROWS.values()]
    experiments = runner.names()
    assert sorted([*PUBLISHED, *(each[1] for each in ready if each)]) == experiments
