"""The cache is exact and keeps no more than a pattern can see."""

import pytest
import torch

from dalle_pytorch.generation.cache import mix_blocks, plan
from dalle_pytorch.generation.decoder import Decoder
from dalle_pytorch.generation.engine import generate_image_tokens
from dalle_pytorch.generation.sampling import SamplingConfig
from dalle_pytorch.models.patterns import PATTERNS, SEMANTICS, pattern_mask

TEXT = torch.tensor([[3, 1, 4, 0], [1, 5, 0, 0]])
MIXED = [["full"], ["axial_row"], ["axial_col"], ["conv_like"], list(PATTERNS)]


@pytest.mark.parametrize("semantics", SEMANTICS)
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("grid", [3, 6])
def test_a_plan_reads_what_the_mask_shows(pattern, semantics, grid):
    """Slots read at a position hold exactly the visible positions, none of them overwritten meanwhile."""
    visible = pattern_mask(pattern, 0, grid, semantics=semantics, kernel=3)
    made = plan(visible, pattern)
    held: dict[int, int] = {}
    for position, row in enumerate(visible):
        held[made.slots[position]] = position
        read = made.reads[position]
        slots = range(made.room)[read] if isinstance(read, slice) else read.tolist()
        assert sorted(held[slot] for slot in slots) == row.nonzero()[:, 0].tolist()
    assert max(made.slots) < made.room


def test_rings_are_as_long_as_a_pattern_looks_back():
    """32 x 32 grid, the paper's patterns: a row and one, all of it for columns, five rows and six for 11 x 11."""
    rooms = {name: plan(pattern_mask(name, 0, 32), name).room for name in PATTERNS}
    assert rooms == {"full": 1024, "axial_row": 33, "axial_col": 1024, "conv_like": 5 * 32 + 6}


@pytest.mark.parametrize("positions", ["rotary", "learned", "both"])
@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize("patterns", MIXED)
@pytest.mark.parametrize("semantics", SEMANTICS)
def test_cached_equals_uncached(make_mixed, assert_exact, patterns, shift, positions, semantics):
    """Alone, few and many candidates of each prompt; nothing, a token and several rows given."""
    dalle = make_mixed(patterns, attn_semantics=semantics, shift_tokens=shift, positions=positions)
    assert_exact(Decoder(dalle), (1, 0), (1, 6), (3, 1), (40, 9))


@pytest.mark.parametrize("patterns", [["full"], list(PATTERNS)])
def test_cached_equals_uncached_with_options_of_others(make_mixed, assert_exact, patterns, options_of_others):
    dalle = make_mixed(patterns, attn_semantics="dalle_pytorch", **options_of_others)
    assert_exact(Decoder(dalle), (1, 0), (1, 6), (3, 1), (40, 9))


@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize("patterns", MIXED)
@pytest.mark.parametrize("given", [0, 5])
@pytest.mark.parametrize("settings", [{}, {"cfg_scale": 3.0}, {"cfg_schedule": [1.0, 4.0]}])
def test_sampling_with_a_cache_is_sampling_without(make_mixed, settings, given, patterns, shift):
    """Token for token what drawing from the full forward pass gives, 3 candidates of each of two prompts."""
    dalle = make_mixed(patterns, shift_tokens=shift)
    start, uniforms = torch.randint(12, (2, given)), torch.rand(6, 16)
    tokens = generate_image_tokens(dalle, TEXT, uniforms, SamplingConfig(**settings), given_tokens=start)
    text, expected = TEXT.repeat_interleave(3, dim=0), start.repeat_interleave(3, dim=0)
    scales = SamplingConfig(**settings).scales(16)
    for position in range(given, 16):
        cond = dalle.logits(text, expected).image[:, -1]
        uncond = dalle.logits(torch.zeros_like(text), expected).image[:, -1]
        probabilities = (uncond + scales[position] * (cond - uncond)).double().softmax(-1).cumsum(-1)
        picked = (probabilities > uniforms[:, position, None]).int().argmax(dim=1)
        expected = torch.cat([expected, picked[:, None]], dim=1)
    assert torch.equal(tokens, expected)


def test_a_prompt_is_stored_once(make_dalle):
    """Sixteen candidates hold their prompt's keys once: what each adds does not depend on the text's length."""
    held = {}
    for text_len in (5, 50):
        decoder = Decoder(make_dalle(text_len=text_len, depth=2))
        held[text_len] = [decoder.start(TEXT[:1], candidates)[0].bytes() for candidates in (16, 17)]
    assert held[50][1] - held[50][0] == held[5][1] - held[5][0] > 0
    assert (
        held[50][0] - held[5][0] == 2 * 2 * 45 * 2 * 16 * 4
    )  # layers, keys and values, positions, heads, width, bytes


def test_the_memory_of_a_candidate_is_foretold(make_dalle):
    decoder = Decoder(make_dalle(attn_types=list(PATTERNS), depth=4, conv_kernel=3))
    few, many = (decoder.start(TEXT[:1], candidates)[0] for candidates in (40, 50))
    for state, candidates in ((few, 40), (many, 50)):
        for _ in range(15):
            decoder.step(state, torch.zeros(candidates, dtype=torch.long))
    assert decoder.bytes_per_candidate() == pytest.approx((many.bytes() - few.bytes()) / 10)


@pytest.mark.parametrize("seen", [1, 31, 32, 70])
def test_blocks_mix_as_one_run_would(seen):
    queries, prompt, blocks = torch.randn(12, 8), torch.randn(2, 4, 5, 8), torch.randn(-(-seen // 32), 2, 12, 32, 8)
    image = blocks.permute(1, 2, 0, 3, 4).flatten(2, 3)[:, :, :seen]
    keys, values = torch.cat([prompt.repeat_interleave(3, dim=1), image], dim=2)
    expected = ((keys @ queries[:, :, None]).softmax(dim=1) * values).sum(dim=1)
    torch.testing.assert_close(mix_blocks(queries, prompt, blocks, seen), expected)


def test_a_half_precision_model_can_be_sampled(make_dalle):
    """Weights cast by hand: tokens come out, near the full model's likeliest."""
    dalle = make_dalle(attn_types=["full", "axial_row"], depth=2)
    expected = dalle.logits(TEXT, torch.zeros(2, 0, dtype=torch.long)).image[:, 0]
    state, logits = Decoder(dalle.bfloat16()).start(TEXT, 2)
    assert (logits[::2].float() - expected).norm() / expected.norm() < 0.05
    assert Decoder(dalle).step(state, torch.zeros(4, dtype=torch.long)).isfinite().all()
