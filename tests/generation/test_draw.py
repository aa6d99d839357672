"""Which prompts processes draw together, and what each of them draws."""

from types import SimpleNamespace

import pytest

from dalle_pytorch.generation.config import GenerateConfig
from dalle_pytorch.generation.draw import GATHERED, groups


class Team:
    """Processes that are not there: a micro-batch of each."""

    def __init__(self, sizes):
        self.sizes, self.count = sizes, len(sizes)

    def map(self, function, items):
        return [function(item) for item in items]


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize("sizes", [[7], [4, 9], [1] * 8, [100, 101, 2000]])
@pytest.mark.parametrize("candidates", [1, 4, 64])
@pytest.mark.parametrize("prompts", [1, 5, 3000])
def test_every_process_cuts_the_prompts_alike(sizes, candidates, prompts):
    """Whatever memory it has; each prompt comes once, no process is idle, and the first can hold what it is given."""
    config = GenerateConfig(prompt="a", num_candidates=candidates, num_keep=1)
    left = iter(sizes)
    generator = SimpleNamespace(micro_batch=lambda sampling, each: next(left))
    found = groups(generator, config, Team(sizes), prompts)
    assert [number for some in found for number in some] == list(range(prompts))
    if len(found) > 1 and candidates < len(sizes):
        assert len(found[0]) >= len(sizes)
    assert len(found[0]) == 1 or len(found[0]) * candidates <= max(GATHERED, len(sizes) * candidates)
