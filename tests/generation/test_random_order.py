"""Image tokens in another order than the raster's: read, drawn and completed."""

import pytest
import torch

from dalle_pytorch.errors import UserError
from dalle_pytorch.generation.decoder import Decoder
from dalle_pytorch.generation.generator import Candidates, Generator, Preview
from dalle_pytorch.generation.sampling import SamplingConfig
from dalle_pytorch.generation.strategies import KnownTokens, draw_image_tokens, random_order
from dalle_pytorch.models.dalle import DALLEConfig
from dalle_pytorch.text import BPETokenizer
from dalle_pytorch.training.dalle import orders

TEXT = torch.tensor([[3, 1, 4, 0], [1, 5, 0, 0]])
FREE = {"any_order": True, "shift_tokens": False}
SETTINGS = [
    {},
    {"positions": "learned"},
    {"positions": "flat", "kv_heads": 1},
    {"positions": "both", "bos": False},
    {"tie_embeddings": True, "norm": "rms"},
]


def logits_in(dalle, text, tokens, order):
    """Scores of the tokens at each place of an order, without a cache."""
    _, h = dalle.hidden(text, tokens, order.expand(len(text), -1))
    return dalle.image_head(h[:, dalle.config.text_length - 1 :])


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("candidates", [1, 3])
@pytest.mark.parametrize(("given", "window"), [(0, 1), (5, 1), (0, 4)])
def test_cached_equals_uncached(make_dalle, settings, candidates, given, window):
    dalle, order = make_dalle(**FREE, **settings), torch.randperm(16)
    decoder, start = Decoder(dalle), torch.randint(12, (2, given))
    tokens = torch.randint(12, (2 * candidates, 16))
    tokens[:, :given] = start.repeat_interleave(candidates, dim=0)
    expected = logits_in(dalle, TEXT.repeat_interleave(candidates, dim=0), tokens, order)[:, given:]
    state, first = decoder.start(TEXT, candidates, start, window=window, order=order)
    found = [first[:, None]]
    for place in range(given, 15, window):
        found.append(decoder.read(state, tokens[:, place : min(place + window, 15)], place))
    torch.testing.assert_close(torch.cat(found, dim=1), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("settings", SETTINGS)
def test_raster_order_is_no_order(make_dalle, settings):
    """And each image of a batch may have an order of its own."""
    dalle, image = make_dalle(**FREE, **settings), torch.randint(12, (2, 16))
    raster, other = torch.arange(16), torch.randperm(16)
    torch.testing.assert_close(logits_in(dalle, TEXT, image, raster), dalle.image_logits(TEXT, image))
    loss = dalle.loss(TEXT, image, order=torch.stack([raster, other])).image
    each = [
        dalle.loss(TEXT[i : i + 1], image[i : i + 1], order=order[None]).image
        for i, order in enumerate((raster, other))
    ]
    torch.testing.assert_close(loss, torch.stack(each).mean())


def test_what_is_told_is_what_is_predicted(make_dalle):
    """Two positions exchanged at the end of an order: every input but the one that names the first of them is the
    same, and so are the scores before it."""
    dalle, image, order = make_dalle(**FREE), torch.randint(12, (2, 16)), torch.arange(16)
    other = torch.cat([order[:14], order[[15, 14]]])
    one, two = logits_in(dalle, TEXT, image, order), logits_in(dalle, TEXT, image, other)
    torch.testing.assert_close(one[:, :14], two[:, :14])
    assert (one[:, 14] - two[:, 14]).abs().amax() > 1e-3


@pytest.mark.parametrize("scale", [1.0, 2.0])
@pytest.mark.parametrize("known", ["none", "some"])
def test_drawn_in_a_random_order_as_without_a_cache(make_dalle, scale, known):
    """Known tokens come first, so that every other one is drawn in sight of them all."""
    dalle, sampling = make_dalle(**FREE), SamplingConfig(strategy="random", cfg_scale=scale, order_seed=3)
    keep = torch.arange(16) % 3 == 0 if known == "some" else torch.zeros(16, dtype=torch.bool)
    given, uniforms = KnownTokens(torch.randint(12, (2, 16)), keep), torch.rand(6, 16)
    *_, (done, tokens) = draw_image_tokens(Decoder(dalle), TEXT, uniforms, sampling, given)
    order, text = random_order(sampling, keep), TEXT.repeat_interleave(3, dim=0)
    assert done == 16
    assert sorted(order.tolist()) == list(range(16))
    assert keep[order[: keep.sum()]].all()
    expected = torch.where(keep, given.tokens, 0).repeat_interleave(3, dim=0)
    for place in range(int(keep.sum()), 16):
        cond, uncond = (
            logits_in(dalle, x, expected[:, order], order)[:, place] for x in (text, torch.zeros_like(text))
        )
        picked = sampling.pick(uncond + scale * (cond - uncond), uniforms[:, order[place]])
        expected[:, order[place]] = picked
    assert torch.equal(tokens, expected)


def test_there_are_no_previews_of_a_random_order(make_dalle):
    """They would show rows, and tokens are drawn anywhere."""
    generator = Generator(with_tokenizer(make_dalle(**FREE)))
    for strategy, wanted in (("raster", {Preview, Candidates}), ("random", {Candidates})):
        sampling = SamplingConfig(strategy=strategy)
        assert {type(event) for event in generator.sample("red", [0], sampling=sampling, preview_rows=1)} == wanted
    with pytest.raises(UserError, match="not learned"):
        Generator(with_tokenizer(make_dalle())).check(["red"], SamplingConfig(strategy="random"))


def with_tokenizer(dalle):
    dalle.text_tokenizer = BPETokenizer.train(["red"], 260)
    dalle.config.text_vocab_size = 260
    dalle.text_emb = torch.nn.Embedding(260 + dalle.config.num_pads, dalle.config.dim)
    return dalle


def test_an_order_is_a_function_of_its_seed():
    nothing = torch.zeros(16, dtype=torch.bool)
    one, two = (random_order(SamplingConfig(order_seed=seed), nothing) for seed in (1, 2))
    assert torch.equal(one, random_order(SamplingConfig(order_seed=1), nothing))
    assert not torch.equal(one, two)


def test_orders_of_a_training():
    generator = torch.Generator().manual_seed(0)
    assert torch.equal(orders(5, 16, 0.0, generator), torch.arange(16).expand(5, 16))
    found = orders(400, 16, 0.75, generator)
    assert torch.equal(found.sort(dim=1).values, torch.arange(16).expand(400, 16))
    share = (found != torch.arange(16)).any(dim=1).float().mean()
    assert 0.65 < share < 0.85  # 0.75, four standard errors on either side


def test_a_batch_is_learned_in_every_order(make_dalle):
    """What is predicted in one order helps in the others: the image is known by heart, whatever comes first."""
    dalle, image = make_dalle(**FREE).train(), torch.randint(12, (2, 16))
    optimizer, generator = torch.optim.AdamW(dalle.parameters(), lr=3e-3), torch.Generator().manual_seed(0)
    for _ in range(150):
        optimizer.zero_grad()
        dalle.loss(TEXT, image, order=orders(2, 16, 1.0, generator)).loss.backward()
        optimizer.step()
    with torch.no_grad():
        unseen = dalle.eval().loss(TEXT, image, order=orders(2, 16, 1.0, generator)).image
    assert unseen < 0.3  # nats; 2.5 at first


def test_what_cannot_be_is_refused(make_dalle):
    for settings in ({}, {"shift_tokens": False, "attn_types": ["full", "axial_row"]}):
        with pytest.raises(UserError, match="shift_tokens=false and attn_types"):
            DALLEConfig(any_order=True, **settings)
    plain, image = make_dalle(), torch.randint(12, (2, 16))
    with pytest.raises(ValueError, match="without any_order"):
        plain.loss(TEXT, image, order=torch.arange(16).expand(2, 16))
    with pytest.raises(UserError, match=r"strategy=random.*not learned"):
        list(draw_image_tokens(Decoder(plain), TEXT, torch.rand(2, 16), SamplingConfig(strategy="random")))
