"""Linear layers laid out for sampling."""

import pytest
import torch
from torch import nn

from dalle_pytorch.generation import backend
from dalle_pytorch.generation.backend import CastLinear, Int8Linear, keep_stored, keys_dtype, prepare
from dalle_pytorch.generation.decoder import Decoder

TEXT = torch.tensor([[3, 1, 4, 0], [1, 5, 0, 0]])


@pytest.mark.parametrize("rows", [1, 3, 8, 100])
@pytest.mark.parametrize("bias", [True, False])
def test_fp32_is_the_layer_itself(rows, bias):
    linear, x = nn.Linear(48, 20, bias=bias), torch.randn(rows, 2, 48)
    torch.testing.assert_close(CastLinear(linear, "fp32")(x), linear(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("precision", "error"), [("bf16", 0.01), ("int8", 0.03)])
def test_less_precision_is_near(precision, error):
    linear, x = nn.Linear(256, 64), torch.randn(50, 256)
    exact, near = linear(x), prepare(linear, precision)(x)
    assert near.dtype == torch.float32
    assert 0 < (near - exact).norm() / exact.norm() < error


@pytest.mark.parametrize("make", [Int8Linear, lambda linear: CastLinear(linear, "fp32")])
def test_a_row_does_not_depend_on_the_others(make):
    """To the last bit, also beside a row a thousand times as large."""
    layer, x = make(nn.Linear(256, 64)), torch.randn(8, 256)
    alone = torch.cat([layer(row[None]) for row in x])
    assert torch.equal(layer(x), alone)
    x[0] *= 1000
    assert torch.equal(layer(x)[1:], alone[1:])


@pytest.mark.parametrize("bias", [True, False])
def test_int8_is_the_same_on_every_cpu(monkeypatch, bias):
    """The sums are exact, packed or not."""
    linear, x = nn.Linear(300, 64, bias=bias), torch.randn(2, 5, 300)
    here = Int8Linear(linear)(x)
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    plain = Int8Linear(linear)
    assert not plain.packed
    # of the scales and the bias: three roundings, which a fused multiplication and addition leaves out
    atol = 3 * torch.finfo(torch.float32).eps * float(here.abs().max())
    torch.testing.assert_close(plain(x), here, atol=atol, rtol=0)


def test_int8_rounds_to_the_nearest_step():
    """One weight of 1, so that what comes out is the input in steps of a 127th of the row's largest."""
    linear = nn.Linear(3, 3, bias=False)
    linear.weight.data = torch.eye(3)
    x = torch.tensor([[1.27, 0.0149, -0.0151], [-127.0, 3.4, 90.6]])
    expected = torch.tensor([[1.27, 0.01, -0.02], [-127.0, 3.0, 91.0]])
    torch.testing.assert_close(Int8Linear(linear)(x), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
def test_the_operator_of_compiled_programs_keeps_its_promises(precision):
    layer = prepare(nn.Linear(64, 32), precision)
    x = torch.randn(2, 1, 64).to(torch.bfloat16 if precision == "bf16" else torch.float32)
    if precision == "int8":
        x = torch.randint(256, (2, 1, 64), dtype=torch.uint8)
    elif not layer.packed:
        pytest.skip("this CPU has no such kernel")
    operator = torch.ops.dalle_pytorch.packed_products.default
    out = x.dtype if x.is_floating_point() else torch.float32
    torch.library.opcheck(operator, (x, layer.number, 32, out), test_utils=("test_schema", "test_faketensor"))


def test_zeros_stay_finite():
    assert torch.equal(Int8Linear(nn.Linear(16, 4, bias=False))(torch.zeros(2, 16)), torch.zeros(2, 4))


def test_shared_layers_stay_shared_and_the_model_untouched(make_dalle):
    dalle = make_dalle(shared_attn_ids=[0], shared_ff_ids=[0, 1, 0]).train()
    before = {name: value.clone() for name, value in dalle.state_dict().items()}
    decoder = Decoder(dalle, precision="int8")
    blocks = decoder.trunk.blocks
    assert blocks[0].attention is blocks[2].attention
    assert blocks[0].feed_forward is blocks[2].feed_forward is not blocks[1].feed_forward
    assert not any(module.training for module in decoder.trunk.modules())
    assert dalle.training
    assert all(module.training for module in dalle.transformer.modules())
    assert isinstance(dalle.transformer.blocks[0].attention.to_qkv, nn.Linear)
    decoder.start(TEXT)
    for name, value in dalle.state_dict().items():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize(
    ("precision", "error"),
    [("fp32", 1e-5), ("bf16", 0.05), ("fp16", 0.01), ("int8", 0.1)],
)
def test_logits_of_each_precision_are_near(make_dalle, precision, error):
    dalle = make_dalle(dim=64)
    expected = dalle.logits(TEXT, torch.zeros(2, 0, dtype=torch.long)).image[:, 0]
    logits = Decoder(dalle, precision=precision).start(TEXT)[1]
    assert (logits - expected).norm() / expected.norm() < error


def test_stored_weights_keep_their_type_and_give_the_same(make_dalle):
    dalle, x = make_dalle(dim=64), torch.randn(2, 20, 64)
    kept = keep_stored(dalle.transformer)
    torch.testing.assert_close(kept(x, dalle.views()), dalle.transformer(x, dalle.views()))
    assert not kept.training
    half = keep_stored(nn.Linear(3, 5).to(torch.bfloat16))
    assert half.weight.dtype == torch.bfloat16
    assert half(torch.ones(2, 3)).dtype == torch.float32


@pytest.mark.parametrize("precision", ["fp64", "stored"])
def test_unknown_precision_is_named(make_dalle, precision):
    with pytest.raises(ValueError, match=rf"fp32, bf16, fp16, int8, got '{precision}'"):
        Decoder(make_dalle(), precision=precision)


@pytest.mark.parametrize(
    ("precision", "plain", "amx", "gpu", "kernel"),
    [
        ("fp32", torch.float32, torch.float32, torch.float32, torch.float32),
        ("bf16", torch.float32, torch.bfloat16, torch.bfloat16, torch.bfloat16),
        ("fp16", torch.float32, torch.float32, torch.float16, torch.float32),
        ("int8", torch.float32, torch.bfloat16, torch.bfloat16, torch.int8),
    ],
)
def test_keys_are_as_small_as_a_processor_reads_them_fast(monkeypatch, precision, plain, amx, gpu, kernel):
    assert keys_dtype(precision, torch.device("cpu"), kernel=True) == kernel
    for has, expected in ((False, plain), (True, amx)):
        monkeypatch.setattr(backend, "multiplies_bf16", lambda has=has: has)
        assert keys_dtype(precision, torch.device("cpu")) == expected
    assert keys_dtype(precision, torch.device("cuda")) == gpu


@pytest.mark.parametrize(
    ("precision", "supported", "warned"), [("bf16", False, True), ("bf16", True, False), ("fp32", False, False)]
)
def test_emulated_bf16_is_told(monkeypatch, caplog, precision, supported, warned):
    monkeypatch.setattr(backend, "onednn_computes", lambda dtype: supported)
    backend.check_precision(precision, torch.device("cpu"))
    assert ("use fp32 or int8" in caplog.text) is warned
