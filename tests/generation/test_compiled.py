"""The compiled step: the program is right for every pattern, and torch can compile it."""

import json
import subprocess
import sys

import pytest
import torch
import torch._inductor.config

from dalle_pytorch import save
from dalle_pytorch.errors import UserError
from dalle_pytorch.generation.decoder import Decoder
from dalle_pytorch.generation.kernel import library
from dalle_pytorch.generation.sampling import SamplingConfig
from dalle_pytorch.generation.strategies import generate_image_tokens
from dalle_pytorch.models.patterns import PATTERNS, SEMANTICS


@pytest.fixture(autouse=True)
def not_compiled(monkeypatch):
    """Programs run as they are written: the shape checks of these tests cannot be compiled."""
    monkeypatch.setattr(torch, "compile", lambda program, **_: program)


@pytest.mark.parametrize("positions", ["rotary", "learned"])
@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize("patterns", [["full"], list(PATTERNS)])
@pytest.mark.parametrize("semantics", SEMANTICS)
def test_the_program_equals_uncached(make_mixed, assert_exact, patterns, shift, positions, semantics):
    dalle = make_mixed(patterns, attn_semantics=semantics, shift_tokens=shift, positions=positions)
    decoder = Decoder(dalle, compiled=True)
    assert_exact(decoder, (1, 0, 1), (1, 6, 1), (3, 9, 1), (3, 2, 4))


def test_the_program_equals_uncached_with_options_of_others(make_mixed, assert_exact, options_of_others):
    decoder = Decoder(make_mixed(list(PATTERNS), attn_semantics="dalle_pytorch", **options_of_others), compiled=True)
    assert_exact(decoder, (1, 0, 1), (1, 6, 1), (3, 9, 1), (3, 2, 4))


@pytest.mark.parametrize(
    "settings",
    [{"strategy": "speculative", "draft_tokens": 3}, {"cfg_scale": 3.0, "cfg_interval": [0.0, 0.5]}],
    ids=lambda settings: next(iter(settings)),
)
def test_it_draws_what_an_eager_step_draws(make_mixed, settings):
    """Positions that are read again, in rings, too; null twins that are dropped on the way."""
    dalle, sampling = make_mixed(list(PATTERNS)), SamplingConfig(**settings)
    text, uniforms = torch.tensor([[3, 7, 4, 0], [8, 5, 0, 0]]), torch.rand(4, 16)
    eager, compiled = (
        generate_image_tokens(Decoder(dalle, compiled=compiled), text, uniforms, sampling) for compiled in (False, True)
    )
    assert torch.equal(eager, compiled)


def test_a_missing_compiler_is_named(make_dalle):
    library.cache_clear()
    without = torch._inductor.config.patch("cpp.cxx", ("no-such-compiler",))
    with without, pytest.raises(UserError, match=r"compile=true needs a C\+\+ compiler"):
        Decoder(make_dalle(), compiled=True)


@pytest.mark.parametrize("compiled", [False, True])
def test_keys_of_types_that_are_not_there_are_refused(make_dalle, compiled):
    dtype = torch.int16 if compiled else torch.int8
    with pytest.raises(UserError, match=r"need compiled=True on a CPU, and are torch\.int8"):
        Decoder(make_dalle(), compiled=compiled, cache_dtype=dtype)


PROGRAM = """
import json, sys, torch
from dalle_pytorch import load
from dalle_pytorch.generation.decoder import Decoder

torch._inductor.config.compile_threads = torch._inductor.config.cpp.simdlen = 1  # scalar code, compiled here: quick
text, tokens = torch.tensor([[3, 7, 4, 0], [8, 5, 0, 0]]), torch.arange(96).reshape(6, 16) * 5 % 12
errors, programs = [], []
for path in sys.argv[1:]:
    rows = {}
    for compiled in (False, True):
        decoder = Decoder(load(path), precision="int8", compiled=compiled)
        state, logits = decoder.start(text, 3)
        rows[compiled] = torch.stack([logits, *(decoder.read(state, tokens[:, [i]], i)[:, 0] for i in range(15))])
    errors.append(((rows[True] - rows[False]).norm() / rows[False].norm()).item())
    programs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
print(json.dumps([errors, programs]))
"""


def test_compiled_once_a_model_it_serves_every_position(make_dalle, make_bart, tmp_path):
    """In a process of its own, since the shape checks of these tests cannot be compiled. Keys are 8-bit integers."""
    models = {
        "plain": make_dalle(depth=1),
        "normed": make_dalle(attn_types=["full", "axial_col"], depth=2, qk_norm=True),
        "bart": make_bart(encoder_layers=1, decoder_layers=1),
    }
    paths = [str(tmp_path / f"{name}.safetensors") for name in models]
    for path, model in zip(paths, models.values(), strict=True):
        save(model, path)
    done = subprocess.run([sys.executable, "-c", PROGRAM, *paths], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    errors, programs = json.loads(done.stdout.splitlines()[-1])
    assert max(errors) < 0.03
    assert programs == [1, 2, 3]
