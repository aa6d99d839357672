"""What the tests of eager and compiled sampling share."""

import pytest
import torch

from dalle_pytorch.generation.decoder import Decoder


@pytest.fixture
def assert_exact():
    """Check a decoder's logits against the uncached pass, for (candidates, given tokens, positions a step)."""
    text = torch.tensor([[3, 7, 4, 0], [8, 5, 0, 0]])

    def check(decoder: Decoder, *cases: tuple[int, int, int], atol: float = 1e-5) -> None:
        for candidates, given, window in cases:
            tokens = torch.randint(12, (2 * candidates, 16))
            start = torch.randint(12, (2, given))
            tokens[:, :given] = start.repeat_interleave(candidates, dim=0)
            expected = decoder.dalle.image_logits(text.repeat_interleave(candidates, dim=0), tokens)[:, given:]
            state, logits = decoder.start(text, candidates, start, window=window)
            found = [logits[:, None]]
            for first in range(given, 15, window):
                found.append(decoder.read(state, tokens[:, first : min(first + window, 15)], first))
            torch.testing.assert_close(torch.cat(found, dim=1), expected, atol=atol, rtol=1e-5)

    return check


@pytest.fixture
def make_mixed(make_dalle):
    """A DALLE with a layer of each of some patterns, two at least."""

    def make(patterns: list[str], **settings):
        return make_dalle(attn_types=patterns, conv_kernel=3, depth=max(len(patterns), 2), **settings)

    return make


@pytest.fixture(
    params=[
        {"layer_scale": True, "sandwich_norm": True},
        {"reversible": True, "layer_scale": True, "shared_attn_ids": [0], "shared_ff_ids": [0, 1]},
        {"divide_max": True, "stable": True},
        {"rotary": "dalle_pytorch"},
        {"rotary": "dalle_pytorch", "rotate_values": True, "positions": "both", "qk_norm": True},
        {"qkv_bias": True, "rotate_values": True},
        {"tie_embeddings": True, "head_bias": True},
        {"bos": False},
        {"bos": False, "positions": "flat", "qkv_bias": True, "gated": False, "shift_tokens": False},
        {"norm": "rms", "activation": "silu", "ff_dim": 24, "bias": False, "qk_norm": True},
        {"kv_heads": 1, "rotate_values": True, "rotary": "dalle_pytorch"},
    ],
    ids=lambda settings: "-".join(settings),
)
def options_of_others(request):
    """Settings that models of others need."""
    return request.param
