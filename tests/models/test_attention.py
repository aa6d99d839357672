"""Each pattern equals its definition, written here as plain loops."""

import pytest
import torch

from dalle_pytorch.models.attention import stable_attention
from dalle_pytorch.models.patterns import pattern_mask

TEXT, GRID = 3, 5


def sees(pattern: str, semantics: str, kernel: int, query: int, key: int) -> bool:
    """May image token `query` read image token `key`? The definitions of the paper and of DALLE-pytorch, in words."""
    if key > query:
        return False
    (query_row, query_col), (key_row, key_col) = divmod(query, GRID), divmod(key, GRID)
    if pattern == "full":
        return True
    if pattern == "axial_col":
        return query_col == key_col
    if pattern == "axial_row":
        return query - key <= GRID if semantics == "paper" else query_row == key_row
    if semantics == "dalle_pytorch":
        return 0 <= query_row - key_row < kernel and 0 <= query_col - key_col < kernel
    half = kernel // 2
    window = [query - up * GRID - left for up in range(half + 1) for left in range(-half, half + 1)]
    return key in window


@pytest.mark.parametrize("semantics", ["paper", "dalle_pytorch"])
@pytest.mark.parametrize("pattern", ["full", "axial_row", "axial_col", "conv_like"])
def test_pattern_is_its_definition(pattern, semantics):
    mask = pattern_mask(pattern, TEXT, GRID, semantics=semantics, kernel=3)
    for query in range(TEXT + GRID**2):
        for key in range(TEXT + GRID**2):
            if query < TEXT or key < TEXT:
                expected = key <= query  # causal text; every image token sees the whole text
            else:
                expected = sees(pattern, semantics, 3, query - TEXT, key - TEXT)
            assert mask[query, key] == expected, (query, key)


def test_visible_keys_of_the_papers_grid():
    """Mean visible image keys at 32 x 32, from the window sizes: row 32.5, column 16.5, convolution about 56."""
    means = {
        pattern: pattern_mask(pattern, 1, 32)[1:, 1:].sum(dim=1).float().mean().item()
        for pattern in ("axial_row", "axial_col", "conv_like", "full")
    }
    assert means["axial_row"] == pytest.approx(33 - 33 * 32 / 2 / 1024)
    assert means["axial_col"] == 16.5
    assert 55 < means["conv_like"] < 57
    assert means["full"] == 512.5


def test_unknown_names_and_even_kernels_are_refused():
    with pytest.raises(ValueError, match=r"one of full, axial_row, axial_col, conv_like, got 'sparse'"):
        pattern_mask("sparse", 1, 2)
    with pytest.raises(ValueError, match="paper, dalle_pytorch"):
        pattern_mask("full", 1, 2, semantics="mine")
    with pytest.raises(ValueError, match="odd"):
        pattern_mask("conv_like", 1, 2, kernel=4)


@pytest.mark.parametrize("causal", [True, False])
def test_stable_attention_is_attention(causal):
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 2, 4, 7, 8, generator=generator)
    mask = None if causal else torch.rand(7, 7, generator=generator) > 0.3
    if mask is not None:
        mask[:, 0] = True
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
    torch.testing.assert_close(stable_attention(q, k, v, mask, causal), expected, atol=1e-5, rtol=1e-5)
