"""The cache is exact and keeps no more than a pattern can see."""

import pytest
import torch
from torch.utils._pytree import tree_leaves, tree_map_only

from dalle_pytorch.generation.backend import attend
from dalle_pytorch.generation.cache import Slots
from dalle_pytorch.generation.decoder import Decoder
from dalle_pytorch.generation.sampling import SamplingConfig
from dalle_pytorch.generation.strategies import generate_image_tokens
from dalle_pytorch.models.patterns import PATTERNS, SEMANTICS, pattern_mask

TEXT = torch.tensor([[3, 1, 4, 0], [1, 5, 0, 0]])
MIXED = [["full"], ["axial_row"], ["axial_col"], ["conv_like"], list(PATTERNS)]


@pytest.mark.parametrize("semantics", SEMANTICS)
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("grid", [3, 6])
@pytest.mark.parametrize("window", [1, 4])
def test_slots_hold_what_the_mask_shows(pattern, semantics, grid, window):
    """Slots that a position sees hold exactly the visible positions, whatever else its step has written."""
    visible = pattern_mask(pattern, 0, grid, semantics=semantics, kernel=3)
    slots = Slots(visible, pattern, window)
    held: dict[int, int] = {}
    for first in range(0, grid**2, window):
        step = range(first, min(first + window, grid**2))
        held |= {int(slots.write[position]): position for position in step}
        for position in step:
            seen = (~slots.hidden[position]).nonzero()[:, 0].tolist()
            assert sorted(held[slot] for slot in seen) == visible[position].nonzero()[:, 0].tolist()
            assert (min(seen), max(seen) + 1) == (slots.starts[position], slots.stops[position])
            assert slots.gapless[position] is (len(seen) == max(seen) + 1 - min(seen))


def test_rings_are_as_long_as_a_pattern_looks_back():
    """32 x 32 grid, the paper's patterns: a row and one, all of it for columns, five rows and six for 11 x 11."""
    counts = {name: Slots(pattern_mask(name, 0, 32), name).count for name in PATTERNS}
    assert counts == {"full": 1024, "axial_row": 33, "axial_col": 1024, "conv_like": 5 * 32 + 6}
    assert Slots(pattern_mask("axial_row", 0, 32), "axial_row", window=8).count == 40


CASES = (1, 0, 1), (1, 6, 1), (3, 1, 1), (40, 9, 1), (1, 0, 5), (1, 7, 3), (3, 2, 4)


@pytest.mark.parametrize("positions", ["rotary", "learned", "both"])
@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize("patterns", MIXED)
@pytest.mark.parametrize("semantics", SEMANTICS)
def test_cached_equals_uncached(make_mixed, assert_exact, patterns, shift, positions, semantics):
    """Alone, few and many candidates of each prompt; nothing, a token and several rows given; several at once."""
    dalle = make_mixed(patterns, attn_semantics=semantics, shift_tokens=shift, positions=positions)
    assert_exact(Decoder(dalle), *CASES)


@pytest.mark.parametrize("patterns", [["full"], list(PATTERNS)])
def test_cached_equals_uncached_with_options_of_others(make_mixed, assert_exact, patterns, options_of_others):
    dalle = make_mixed(patterns, attn_semantics="dalle_pytorch", **options_of_others)
    assert_exact(Decoder(dalle), *CASES)


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
    assert decoder.bytes_per_candidate() == pytest.approx((many.bytes() - few.bytes()) / 10)


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("biased", [False, True])
def test_two_parts_of_attention_are_one(count, dtype, biased):
    """Rows with keys of their own and of a prompt that they share, against one softmax over both; scores up to 100."""
    q = 20 * torch.randn(6, 2, count, 16)
    keys, values = torch.randn(2, 6, 2, 9, 16).to(dtype)
    prompt = torch.randn(2, 2, 2, 5, 16).to(dtype)
    hidden = torch.rand(count, 9) < 0.5 * biased
    bias = torch.zeros(count, 9).masked_fill(hidden, -torch.inf) if biased else None
    all_keys, all_values = (
        torch.cat([part.repeat_interleave(3, dim=0), own], dim=2).float()
        for part, own in zip(prompt, (keys, values), strict=True)
    )
    scores = q.to(dtype).float() @ all_keys.transpose(2, 3) / 4
    scores = scores.masked_fill(torch.nn.functional.pad(hidden, (5, 0)), -torch.inf)
    found = attend(q, keys, values, prompt, bias)
    tolerance = 1e-5 if dtype == torch.float32 else 0.02
    torch.testing.assert_close(found, scores.softmax(-1) @ all_values, atol=tolerance, rtol=tolerance)
    whole = torch.cat([torch.zeros(count, 5), torch.zeros(count, 9) if bias is None else bias], dim=1)
    alone = attend(q, all_keys.to(dtype), all_values.to(dtype), None, whole)
    torch.testing.assert_close(alone, found, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_large_scores_stay_finite_in_any_cache(make_dalle, dtype):
    """Queries and keys a thousand times as large: their scores are beyond what fp16 holds."""
    dalle = make_dalle(depth=2, stable=True)
    with torch.no_grad():
        for block in dalle.transformer.blocks:
            block.attention.to_qkv.weight[: 2 * 32] *= 300
    decoder = Decoder(dalle, cache_dtype=dtype)
    tokens = torch.randint(12, (4, 16))
    state, logits = decoder.start(TEXT, 2)
    scores = [logits, *(decoder.read(state, tokens[:, [i]], i)[:, 0] for i in range(15))]
    assert torch.stack(scores).isfinite().all()


@pytest.mark.parametrize("candidates", [1, 3])
def test_a_step_of_fixed_shapes_is_the_same(make_mixed, candidates):
    """What a CUDA graph replays: all slots are read under a bias, from tensors that keep their place."""
    decoder = Decoder(make_mixed(list(PATTERNS), positions="both"))
    tokens = torch.randint(12, (2 * candidates, 16))
    expected_state, _ = decoder.start(TEXT, candidates)
    state, _ = decoder.start(TEXT, candidates)
    fixed = tree_map_only(torch.Tensor, torch.clone, state.step(0, 1, static=True))
    for first in range(15):
        with torch.inference_mode():
            for kept, new in zip(tree_leaves(fixed), tree_leaves(state.step(first, 1, static=True)), strict=True):
                if isinstance(kept, torch.Tensor):
                    kept.copy_(new)
            found = decoder.run(state, tokens[:, [first]], fixed)
        expected = decoder.read(expected_state, tokens[:, [first]], first)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_positions_can_be_read_again(make_mixed):
    """With other tokens: what was read behind them is forgotten."""
    decoder = Decoder(make_mixed(list(PATTERNS)))
    tokens, wrong = torch.randint(12, (2, 16)), torch.randint(12, (2, 4))
    state, _ = decoder.start(TEXT, window=4)
    expected = decoder.dalle.image_logits(TEXT, tokens)
    for first in range(12):
        decoder.read(state, wrong, first)
        found = decoder.read(state, tokens[:, [first]], first)[:, 0]
        torch.testing.assert_close(found, expected[:, first + 1], atol=1e-5, rtol=1e-5)


def test_a_half_precision_model_can_be_sampled(make_dalle):
    """Weights cast by hand: tokens come out, near the full model's likeliest."""
    dalle = make_dalle(attn_types=["full", "axial_row"], depth=2)
    expected = dalle.logits(TEXT, torch.zeros(2, 0, dtype=torch.long)).image[:, 0]
    state, logits = Decoder(dalle.bfloat16()).start(TEXT, 2)
    assert (logits[::2].float() - expected).norm() / expected.norm() < 0.05
    assert Decoder(dalle).read(state, torch.zeros(4, 1, dtype=torch.long), 0).isfinite().all()
