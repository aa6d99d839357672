"""The kernel of compiled steps against attention written out, for every type that it stores."""

import pytest
import torch

from dalle_pytorch.generation.cache import Read, Slots
from dalle_pytorch.generation.decoder import Decoder
from dalle_pytorch.generation.kernel import TYPES, KernelCache
from dalle_pytorch.models.patterns import PATTERNS, pattern_mask

ROUNDING = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2, torch.int8: 3e-2}
"""Error relative to the whole: some units of the last place."""
GROUPS, CANDIDATES, HEADS = 2, 3, 2


def read_of(slots: Slots, first: int, count: int) -> Read:
    """As State.step makes it."""
    some = slice(first, first + count)
    start, stop = min(slots.starts[some]), max(slots.stops[some])
    bias = torch.zeros(count, stop - start).masked_fill_(slots.hidden[some, start:stop], -torch.inf)
    return Read(slots.write[some], start, stop, None if count == 1 and slots.gapless[first] else bias)


def run(cache: KernelCache, slots: Slots, q, k, v, given: int, window: int) -> torch.Tensor:
    """All image positions from ``given`` on, ``window`` at a time."""
    found = []
    for first in range(given, q.shape[2], window):
        some = slice(first, min(first + window, q.shape[2]))
        read = read_of(slots, first, some.stop - first)
        found.append(cache.attend(*(part[:, :, some].contiguous() for part in (q, k, v)), read))
    return torch.cat(found, dim=2)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize(
    ("length", "given", "window", "head_dim"), [(5, 0, 1, 64), (40, 7, 1, 20), (0, 1, 4, 20), (33, 30, 5, 20)]
)
def test_it_is_attention(dtype, pattern, length, given, window, head_dim):
    """Prompts of no, few and more than a block's positions; rings, more given than they hold; heads that are padded."""
    visible = pattern_mask(pattern, 0, 7, kernel=3)
    slots, rows, n = Slots(visible, pattern, window), GROUPS * CANDIDATES, len(visible)
    q, k, v = torch.randn(3, rows, HEADS, n, head_dim)
    for part in (k, v):  # given tokens are those of the group
        part[:, :, :given] = part[::CANDIDATES, :, :given].repeat_interleave(CANDIDATES, dim=0)
    prompt = torch.randn(2, GROUPS, HEADS, length, head_dim)
    recorded = torch.cat([prompt, torch.stack([k, v])[:, ::CANDIDATES, :, :given]], dim=3)
    cache = KernelCache(recorded, length, slots, CANDIDATES, dtype)
    found = run(cache, slots, q, k, v, given, window)
    keys, values = torch.cat([prompt.repeat_interleave(CANDIDATES, dim=1), torch.stack([k, v])], dim=3)
    mask = torch.cat([torch.ones(n, length, dtype=torch.bool), visible], dim=1)
    expected = torch.nn.functional.scaled_dot_product_attention(q, keys, values, attn_mask=mask)[:, :, given:]
    assert (found - expected).norm() < ROUNDING[dtype] * expected.norm()


@pytest.mark.parametrize("dtype", TYPES)
def test_a_row_depends_on_no_other(dtype, monkeypatch):
    """Bit for bit the same alone, among others, on several threads, and once the null twins are no longer read."""
    slots = Slots(pattern_mask("full", 0, 6), "full")
    prompt, (q, k, v) = torch.randn(2, GROUPS, HEADS, 9, 20), torch.randn(3, GROUPS * CANDIDATES, HEADS, 36, 20)
    together = KernelCache(prompt, 9, slots, CANDIDATES, dtype)
    found = run(together, slots, q, k, v, 0, 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert torch.equal(run(KernelCache(prompt, 9, slots, CANDIDATES, dtype), slots, q, k, v, 0, 1), found)
    alone = KernelCache(prompt[:, 1:], 9, slots, 1, dtype)
    assert torch.equal(run(alone, slots, q[4:5], k[4:5], v[4:5], 0, 1), found[4:5])
    half = KernelCache(prompt, 9, slots, CANDIDATES, dtype)
    first = run(half, slots, q[:, :, :20], k[:, :, :20], v[:, :, :20], 0, 1)
    half.keep_rows(CANDIDATES, 1)
    rest = run(half, slots, q[:CANDIDATES], k[:CANDIDATES], v[:CANDIDATES], 20, 1)
    assert torch.equal(torch.cat([first[:CANDIDATES], rest], dim=2), found[:CANDIDATES])


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("damaged", [torch.nan, torch.inf])
@pytest.mark.parametrize("part", [0, 1, 2], ids=["query", "key", "value"])
def test_what_is_not_finite_stays_so(dtype, damaged, part):
    """Rounding to integers does not hide a key of the largest score, nor any value: drawing refuses such scores."""
    slots = Slots(pattern_mask("full", 0, 3), "full")
    new = torch.randn(3, 1, 1, 9, 20)
    new[0, :, :, 2, 5] = 1
    new[part, :, :, 2, 5] = damaged
    found = run(KernelCache(torch.randn(2, 1, 1, 4, 20), 4, slots, 1, dtype), slots, *new, 0, 1)
    assert found[:, :, :2].isfinite().all()
    assert not found[:, :, 2].isfinite().all()


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
def test_its_memory_is_foretold(make_dalle, precision):
    dalle = make_dalle(attn_types=list(PATTERNS), depth=4, conv_kernel=3)
    decoder, text = Decoder(dalle, precision=precision, compiled=True), torch.tensor([[3, 1, 4, 0]])
    few, many = (decoder.start(text, candidates)[0] for candidates in (40, 50))
    assert decoder.bytes_per_candidate() == pytest.approx((many.bytes() - few.bytes()) / 10)
    length = decoder.dalle.prompt_length
    one, two = (decoder.start(text.expand(count, -1), 1)[0] for count in (1, 2))
    prompt = two.bytes() - one.bytes() - decoder.bytes_per_candidate()
    assert prompt + 8 * 4 * length * dalle.config.dim == pytest.approx(decoder.bytes_per_prompt())


def test_a_misfit_is_refused():
    """C++ would read beyond it."""
    slots = Slots(pattern_mask("full", 0, 3), "full")
    cache, new = KernelCache(torch.randn(2, 1, 1, 4, 20), 4, slots, 1, torch.float32), torch.randn(3, 2, 1, 1, 20)
    with pytest.raises(ValueError, match=r"given, expected \(1, 1, 1, 20\)"):
        cache.attend(*new, read_of(slots, 0, 1))
