"""Codebook usage in closed form."""

import math

import pytest
import torch

from dalle_pytorch.evaluation.codebook import codebook_use


def test_equal_use_of_some_codes():
    tokens = torch.tensor([[0, 1, 2, 3], [3, 2, 1, 0]])
    use = codebook_use(tokens, 16, 8)
    assert (use.used, use.dead) == (4, 12)
    assert use.perplexity == pytest.approx(4)
    assert use.bits_per_pixel == pytest.approx(4 * 4 / 64)  # four tokens of log2(16) bits
    assert use.entropy_bits_per_pixel == pytest.approx(4 * 2 / 64)
    assert use.bytes_per_picture == pytest.approx(2)


def test_unequal_use():
    use = codebook_use(torch.tensor([[0, 0, 0, 1]]), 2, 2)
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert use.perplexity == pytest.approx(math.exp(entropy))
    assert use.entropy_bits_per_pixel == pytest.approx(entropy / math.log(2))


def test_one_code_alone():
    use = codebook_use(torch.zeros(3, 4, dtype=torch.long), 5, 4)
    assert (use.used, use.dead, use.perplexity, use.entropy_bits_per_pixel) == (1, 4, 1, 0)


def test_what_is_no_token_is_refused():
    with pytest.raises(ValueError, match=r"span \[0, 5\].*0 to 4"):
        codebook_use(torch.tensor([[0, 5]]), 5, 4)
    with pytest.raises(ValueError, match="at least one picture"):
        codebook_use(torch.zeros(0, 4, dtype=torch.long), 5, 4)
