"""Computing only what a pattern shows equals computing all of it under a mask."""

import gc
import pickle
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounter

from dalle_pytorch.models import block_sparse
from dalle_pytorch.models.attention import StreamView
from dalle_pytorch.models.block_sparse import block_attention, flex_mask, layout
from dalle_pytorch.models.patterns import PATTERNS, SEMANTICS, pattern_mask

TEXT, GRID = 4, 5
LENGTH = TEXT + GRID**2 - 1


@pytest.fixture
def small_blocks(monkeypatch):
    """Several blocks for short streams; layouts made with them are not kept."""
    monkeypatch.setattr(block_sparse, "BLOCK", 4)
    monkeypatch.setattr(block_sparse, "layout", layout.__wrapped__)
    return lambda pattern, **settings: block_sparse.layout(pattern, TEXT, GRID, LENGTH, kernel=3, **settings)


def tensors(dtype=torch.float32, length=LENGTH):
    return [torch.randn(2, 3, length, 8).to(dtype).requires_grad_() for _ in range(3)]


@pytest.mark.parametrize("semantics", SEMANTICS)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_blocks_equal_the_dense_mask_forward_and_backward(small_blocks, pattern, semantics):
    mask = pattern_mask(pattern, TEXT, GRID, semantics=semantics, kernel=3)[:LENGTH, :LENGTH]
    inputs, upper = tensors(), torch.randn(2, 3, LENGTH, 8)
    results = []
    for attend in (
        lambda q, k, v: block_attention(q, k, v, small_blocks(pattern, semantics=semantics)),
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=mask),
    ):
        out = attend(*inputs)
        results.append([out, *torch.autograd.grad(out, inputs, upper)])
    for ours, dense in zip(*results, strict=True):
        torch.testing.assert_close(ours, dense, atol=1e-5, rtol=1e-5)


def test_sixteen_bits_stay_near_the_exact_result(small_blocks):
    """The relative error is that of torch's own kernel, two roundings to 8 bits."""
    exact = tensors()
    rounded = [x.detach().bfloat16().requires_grad_() for x in exact]
    upper = torch.randn(2, 3, LENGTH, 8)
    mask = pattern_mask("axial_col", TEXT, GRID)[:LENGTH, :LENGTH]
    expected = F.scaled_dot_product_attention(*exact, attn_mask=mask)
    got = block_attention(*rounded, small_blocks("axial_col"))
    pairs = zip(
        [got, *torch.autograd.grad(got, rounded, upper.bfloat16())],
        [expected, *torch.autograd.grad(expected, exact, upper)],
        strict=True,
    )
    assert all((a.float() - b).norm() < 0.01 * b.norm() for a, b in pairs)


def test_axial_patterns_compute_a_fraction_at_the_papers_size():
    """256 text and 1,024 image positions; a dense causal computation needs half of all pairs."""
    shares = {pattern: layout(pattern, 257, 32, 1280).share for pattern in PATTERNS}
    assert 0.5 < shares["full"] < 0.55
    assert shares["axial_row"] < 0.25
    assert shares["axial_col"] < 0.25  # dense along columns: in raster order every block would see all
    assert shares["conv_like"] < 0.33


@pytest.mark.parametrize("length", [TEXT, LENGTH - 1])
def test_other_lengths_than_the_layouts_are_computed_under_the_mask(length):
    mask = pattern_mask("axial_row", TEXT, GRID)
    view = StreamView(mask, layout("axial_row", TEXT, GRID, LENGTH), None, None)
    q, k, v = tensors(length=length)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:length, :length])
    torch.testing.assert_close(view.attend(q, k, v, False), expected)


def test_tables_of_a_device_go_with_the_model(make_dalle, monkeypatch):
    """Only those of the CPU are kept for the next model; another device than the CPU: that of copies here."""
    copied = []

    def on(self, device):
        copied.append(weakref.ref(table := self.mask.clone()))
        return self._replace(mask=table)

    monkeypatch.setattr(block_sparse.Layout, "on", on)
    dalle = make_dalle(attn_types=["axial_row", "axial_col"])
    for _ in range(2):
        dalle.views()
    assert len(copied) == 2  # once for each pattern
    assert all(table() is not None for table in copied)
    again = pickle.loads(pickle.dumps(dalle))
    again.views()
    assert len(copied) == 4
    del dalle, again
    gc.collect()
    assert not any(table() is not None for table in copied)


@pytest.mark.filterwarnings("error")
def test_many_batch_sizes_do_not_exhaust_the_compiler(monkeypatch):
    """Each size is compiled once, whatever the mask; torch would stop at 8 programs of one function."""
    counter = CompileCounter()
    block_sparse._compiled_flex.cache_clear()
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **options: compile(function, backend=counter, **options))
    plans = [
        plan._replace(flex=flex_mask(plan.mask, torch.device("cpu")))
        for plan in (layout(pattern, TEXT, GRID, LENGTH) for pattern in ("axial_row", "conv_like"))
    ]
    sizes = range(1, 11)
    for size in sizes:
        q, k, v = (torch.randn(size, 2, LENGTH, 8) for _ in range(3))
        for plan in plans:
            torch.testing.assert_close(
                block_attention(q, k, v, plan), block_attention(q, k, v, plan._replace(flex=None))
            )
    assert counter.frame_count == len(sizes)


def test_the_layout_is_the_one_that_the_model_runs(make_dalle, monkeypatch):
    """A whole stream goes through the blocks, and leaves the loss as it is under the dense mask."""
    dalle = make_dalle(attn_types=["axial_row", "axial_col", "conv_like"])
    text, image = torch.randint(0, 9, (2, 5)), torch.randint(0, 12, (2, 16))
    calls = []
    original = block_sparse.block_attention
    monkeypatch.setattr(
        "dalle_pytorch.models.attention.block_attention", lambda *args: calls.append(1) or original(*args)
    )
    fast = dalle.loss(text, image).loss
    assert len(calls) == 3
    dense = [StreamView(view.mask, None, view.turns, view.shifts) for view in dalle.views()]
    monkeypatch.setattr(type(dalle), "views", lambda self: dense)
    # other orders of the sums over up to 20 keys, in three layers: a few units in the last place of each
    torch.testing.assert_close(dalle.loss(text, image).loss, fast, atol=0, rtol=3 * 20 * torch.finfo(torch.float32).eps)
    assert len(calls) == 3


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_reads_the_same_mask(small_blocks):
    """What a GPU runs, forward (on a CPU it has no backward) and uncompiled."""
    plan = small_blocks("axial_col")
    q, k, v = (x.detach() for x in tensors())
    ordered = [x.index_select(2, plan.order) for x in (q, k, v)]
    out = block_sparse.flex_attention(*ordered, block_mask=flex_mask(plan.mask, torch.device("cpu")))
    expected = block_attention(q, k, v, plan)
    torch.testing.assert_close(out.index_select(2, plan.inverse), expected, atol=1e-5, rtol=1e-5)
