"""Causality, caching, purity, reduction and learning of the DALLE."""

import pytest
import torch

from dalle_pytorch import DALLE, DALLEConfig
from dalle_pytorch.models.patterns import PATTERNS

TEXT = torch.tensor([[3, 1, 4, 0], [1, 5, 0, 0]])
IMAGE = torch.arange(32).reshape(2, 16) * 5 % 12


@pytest.mark.parametrize("semantics", ["paper", "dalle_pytorch"])
@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_no_position_reads_the_future(make_dalle, pattern, shift, semantics):
    """The gradient of an output is zero for later inputs, and for image outputs not zero for the whole text."""
    dalle = make_dalle(attn_types=[pattern], attn_semantics=semantics, conv_kernel=3, shift_tokens=shift)
    embedded = dalle.embed(dalle.pad_text(TEXT), IMAGE[:, :-1]).detach().requires_grad_()
    outputs = dalle.transformer(embedded, dalle.views())
    for position in range(outputs.shape[1]):
        (gradient,) = torch.autograd.grad(outputs[:, position].square().sum(), embedded, retain_graph=True)
        per_input = gradient.abs().sum(dim=(0, 2))
        assert per_input[position + 1 :].sum() == 0, position
        assert per_input[position] > 0
        if position > dalle.config.text_len:
            assert (per_input[: 1 + dalle.config.text_len] > 0).all(), position


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"stable": True, "sandwich_norm": True, "qk_norm": True},
        {"shared_attn_ids": [0, 1], "shared_ff_ids": [0], "tie_embeddings": True},
    ],
)
def test_loss_is_the_mean_over_the_batch(make_dalle, settings):
    """Copies of a sample cost what one costs, and the loss of the parts averages to that of the whole."""
    dalle = make_dalle(**settings)
    one = dalle.loss(TEXT[:1], IMAGE[:1])
    copies = dalle.loss(TEXT[:1].repeat(5, 1), IMAGE[:1].repeat(5, 1))
    torch.testing.assert_close(torch.stack(copies), torch.stack(one))
    both = dalle.loss(TEXT, IMAGE).image
    torch.testing.assert_close(both, (one.image + dalle.loss(TEXT[1:], IMAGE[1:]).image) / 2)


def test_loss_is_the_cross_entropy_of_the_logits(make_dalle):
    dalle = make_dalle()
    logits, loss = dalle.logits(TEXT, IMAGE), dalle.loss(TEXT, IMAGE)
    image = -logits.image.log_softmax(-1).gather(2, IMAGE[..., None]).mean()
    torch.testing.assert_close(loss.image, image)
    # caption tokens and the first pad: 3 1 4 <pad 3> and 1 5 <pad 2>; pad ids follow the 9 of the vocabulary
    log_probs = logits.text.log_softmax(-1)
    picked = [(0, 0, 3), (0, 1, 1), (0, 2, 4), (0, 3, 9 + 3), (1, 0, 1), (1, 1, 5), (1, 2, 9 + 2)]
    text = -torch.stack([log_probs[index] for index in picked]).mean()
    torch.testing.assert_close(loss.text, text)
    torch.testing.assert_close(loss.loss, (text + 7 * image) / 8)


def test_z_loss_is_added_in_training_only(make_dalle):
    plain, dalle = make_dalle(), make_dalle(z_loss=0.1)
    dalle.load_state_dict(plain.state_dict())
    expected = plain.loss(TEXT, IMAGE)
    assert torch.equal(torch.stack(dalle.loss(TEXT, IMAGE)), torch.stack(expected))
    logits, loss = plain.logits(TEXT, IMAGE), dalle.train().loss(TEXT, IMAGE)
    torch.testing.assert_close(loss.image, expected.image + 0.1 * logits.image.logsumexp(-1).square().mean())
    squares = logits.text.logsumexp(-1).square()
    counted = torch.cat([squares[0, :4], squares[1, :3]])  # the caption and its first pad
    torch.testing.assert_close(loss.text, expected.text + 0.1 * counted.mean())
    torch.testing.assert_close(loss.loss, (loss.text + 7 * loss.image) / 8)
    with pytest.raises(ValueError, match="z_loss"):
        DALLEConfig(z_loss=-1e-4)


def test_half_precision_keeps_positions(make_dalle):
    """Rotary positions survive a cast: cosines rounded to 8 bits, not angles."""
    dalle = make_dalle(text_len=5)
    full = dalle.logits(TEXT, IMAGE).image
    half = dalle.bfloat16().logits(TEXT, IMAGE).image.float()
    torch.testing.assert_close(half, full, atol=0.05 * full.abs().max().item(), rtol=0)


def test_every_padded_position_has_its_own_pad(make_dalle):
    padded = make_dalle().pad_text(torch.tensor([[2, 0]]))
    assert padded.tolist() == [[2, 10, 11, 12, 13]]


def test_inputs_and_modes_are_left_alone(make_dalle):
    dalle = make_dalle(caption_dropout=0.5, token_dropout=0.5).train()
    text, image = TEXT.clone(), IMAGE.clone()
    dalle.loss(text, image).loss.backward()
    dalle(text, image, return_loss=True, null_cond_prob=0.9)
    dalle.generate_images(text, cond_scale=3.0, mask=text > 1)
    assert torch.equal(text, TEXT)
    assert torch.equal(image, IMAGE)
    assert dalle.training
    assert not dalle.vae.training
    assert all(parameter.grad is None for parameter in dalle.vae.parameters())


def test_mask_means_padding(make_dalle):
    dalle = make_dalle()
    mask = torch.tensor([[True, True, False, False], [True, True, True, True]])
    masked = dalle(TEXT, IMAGE, mask=mask, return_loss=True)
    torch.testing.assert_close(masked, dalle(torch.where(mask, TEXT, 0), IMAGE, return_loss=True))
    assert masked != dalle(TEXT, IMAGE, return_loss=True)


def test_caption_dropout_is_the_empty_caption(make_dalle):
    dalle = make_dalle(caption_dropout=0.999999).train()
    dropped = dalle.loss(TEXT, IMAGE)
    torch.testing.assert_close(dropped.loss, dalle.eval().loss(torch.zeros_like(TEXT), IMAGE).loss)


def test_recomputed_activations_give_the_same_gradients(make_dalle):
    dalle = make_dalle().train()
    gradients = []
    for checkpointed in (False, True):
        dalle.config.checkpoint_activations = checkpointed
        dalle.zero_grad()
        dalle.loss(TEXT, IMAGE).loss.backward()
        gradients.append([p.grad.clone() for p in dalle.parameters() if p.grad is not None])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed)


def test_shared_layers_and_tied_heads_share_storage(make_dalle):
    dalle = make_dalle(shared_attn_ids=[0, 1, 0], shared_ff_ids=[0], tie_embeddings=True)
    blocks = dalle.transformer.blocks
    assert blocks[0].attention is blocks[2].attention is not blocks[1].attention
    assert blocks[0].feed_forward is blocks[1].feed_forward
    assert dalle.image_head.weight is dalle.image_emb.weight


def test_one_batch_overfits(make_dalle):
    dalle = make_dalle(dim=64, depth=2).train()
    optimizer = torch.optim.AdamW([p for p in dalle.parameters() if p.requires_grad], lr=3e-3)
    for _ in range(120):
        optimizer.zero_grad()
        loss = dalle.loss(TEXT, IMAGE)
        loss.loss.backward()
        optimizer.step()
    assert loss.image < 0.05  # chance: ln 12 = 2.5
    # the text of two equally likely captions keeps the bit that tells them apart, over 7 tokens
    assert loss.text < 0.2
    tokens = dalle.eval().logits(TEXT, IMAGE).image.argmax(-1)
    assert torch.equal(tokens, IMAGE)


def test_misfits_are_named(make_dalle, tiny_vae):
    dalle = make_dalle()
    with pytest.raises(ValueError, match=r"6 text tokens.*text_len = 5"):
        dalle.loss(torch.ones(1, 6, dtype=torch.long), IMAGE[:1])
    with pytest.raises(ValueError, match=r"\[1, 9\].*0 to 8"):
        dalle.loss(torch.tensor([[1, 9]]), IMAGE[:1])
    with pytest.raises(ValueError, match=r"\[12, 12\].*0 to 11"):
        dalle.loss(TEXT[:1], torch.full((1, 16), 12))
    with pytest.raises(ValueError, match=r"15 image tokens.*16"):
        dalle.loss(TEXT[:1], IMAGE[:1, :15])
    with pytest.raises(ValueError, match=r"\(3, 8, 8\).*\(3, 16, 16\)"):
        dalle(TEXT[:1], torch.rand(1, 3, 8, 8), return_loss=True)
    with pytest.raises(ValueError, match="no image tokenizer"):
        DALLE(DALLEConfig(), vae=torch.nn.Linear(1, 1))
    with pytest.raises(ValueError, match="full, axial_row"):
        DALLEConfig(attn_types=["sparse"])
