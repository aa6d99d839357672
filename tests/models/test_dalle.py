"""Causality, caching, purity, reduction and learning of the DALLE."""

import pytest
import torch

from dalle_pytorch import DALLE, DALLEConfig, load, save
from dalle_pytorch.models.patterns import PATTERNS
from dalle_pytorch.models.transformer import ForeignConfig

TEXT = torch.tensor([[3, 1, 4, 0], [1, 5, 0, 0]])
IMAGE = torch.arange(32).reshape(2, 16) * 5 % 12

OTHERS = {  # options that models of others need
    "layer_scale": {"layer_scale": True},
    "layer_scale_sandwich": {"layer_scale": True, "sandwich_norm": True},
    "reversible": {"reversible": True},
    "reversible_shared": {"reversible": True, "layer_scale": True, "shared_attn_ids": [0], "shared_ff_ids": [0, 1]},
    "divide_max": {"divide_max": True, "stable": True},
    "rotary": {"rotary": "dalle_pytorch"},
    "rotate_values": {"rotary": "dalle_pytorch", "rotate_values": True},
    "qkv_bias": {"qkv_bias": True},
    "head_bias": {"tie_embeddings": True, "head_bias": True},
    "no_bos": {"bos": False},
    "flat": {"positions": "flat"},
    "mindalle": {"bos": False, "positions": "flat", "qkv_bias": True, "gated": False, "shift_tokens": False},
}
EACH_OF_OTHERS = pytest.mark.parametrize("settings", OTHERS.values(), ids=OTHERS.keys())


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
    torch.testing.assert_close(copies[:3], one[:3])
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
    assert dalle.loss(TEXT, IMAGE) == expected
    logits, loss = plain.logits(TEXT, IMAGE), dalle.train().loss(TEXT, IMAGE)
    torch.testing.assert_close(loss.image, expected.image + 0.1 * logits.image.logsumexp(-1).square().mean())
    squares = logits.text.logsumexp(-1).square()
    counted = torch.cat([squares[0, :4], squares[1, :3]])  # the caption and its first pad
    torch.testing.assert_close(loss.text, expected.text + 0.1 * counted.mean())
    torch.testing.assert_close(loss.loss, (loss.text + 7 * loss.image) / 8)
    with pytest.raises(ValueError, match="z_loss"):
        DALLEConfig(z_loss=-1e-4)


def test_contrast_is_the_logistic_of_what_the_caption_is_worth(make_dalle):
    dalle = make_dalle(contrast_weight=0.4, contrast_scale=3.0, loss_img_weight=2.0).eval()
    wrong = TEXT.flip(0)

    def nats(text):
        logits = dalle.logits(text, IMAGE).image
        return torch.nn.functional.cross_entropy(logits.mT, IMAGE, reduction="none").mean(dim=1)

    plain, both = dalle.loss(TEXT, IMAGE), dalle.loss(TEXT, IMAGE, wrong_text=wrong)
    assert plain.contrast is None
    torch.testing.assert_close((both.text, both.image), (plain.text, plain.image))
    worth = nats(wrong) - nats(TEXT)
    torch.testing.assert_close(both.contrast, (1 + (-3.0 * worth).exp()).log().mean())
    torch.testing.assert_close(both.loss, plain.loss + 0.4 * both.contrast)
    # a picture whose wrong caption is its own, or whose caption is empty, counts as 0
    one = dalle.loss(TEXT, IMAGE, wrong_text=torch.stack([wrong[0], TEXT[1]])).contrast
    torch.testing.assert_close(one, (1 + (-3.0 * worth[0]).exp()).log() / 2)
    empty = torch.stack([TEXT[0], torch.zeros_like(TEXT[1])])
    torch.testing.assert_close(dalle.loss(empty, IMAGE, wrong_text=wrong).contrast, one)


def test_contrast_teaches_a_dalle_to_tell_captions_apart(make_dalle):
    """Both pictures go with both captions, so that the cross entropy has no use for them; only the contrast has."""
    text, image = TEXT.repeat(2, 1), torch.cat([IMAGE, IMAGE.flip(0)])
    worth = []
    for weight in (0.0, 1.0):
        torch.manual_seed(0)
        dalle = make_dalle().train()
        optimizer = torch.optim.Adam([p for p in dalle.parameters() if p.requires_grad], lr=3e-3)
        for _ in range(40):
            optimizer.zero_grad()
            contrast = dalle.loss(TEXT, IMAGE, wrong_text=TEXT.flip(0)).contrast
            (dalle.loss(text, image).loss + weight * contrast).backward()
            optimizer.step()
        dalle.eval()
        with torch.no_grad():
            worth.append(dalle.loss(TEXT.flip(0), IMAGE).image - dalle.loss(TEXT, IMAGE).image)
    assert abs(worth[0]) < 0.1
    assert worth[1] > 0.2


def test_half_precision_keeps_positions(make_dalle):
    """Rotary positions survive a cast: cosines rounded to 8 bits, not angles."""
    dalle = make_dalle(text_len=5)
    full = dalle.logits(TEXT, IMAGE).image
    half = dalle.bfloat16().logits(TEXT, IMAGE).image.float()
    torch.testing.assert_close(half, full, atol=0.05 * full.abs().max().item(), rtol=0)


def test_every_padded_position_has_its_own_pad(make_dalle):
    padded = make_dalle().pad_text(torch.tensor([[2, 0]]))
    assert padded.tolist() == [[2, 10, 11, 12, 13]]


def test_one_pad_fills_all_positions(make_dalle):
    dalle = make_dalle(one_pad=True)
    assert dalle.pad_text(torch.tensor([[2, 0]])).tolist() == [[2, 9, 9, 9, 9]]
    assert dalle.logits(TEXT, IMAGE).text.shape[-1] == 10
    log_probs = dalle.logits(TEXT, IMAGE).text.log_softmax(-1)
    picked = [(0, 0, 3), (0, 1, 1), (0, 2, 4), (0, 3, 9), (1, 0, 1), (1, 1, 5), (1, 2, 9)]
    torch.testing.assert_close(
        dalle.loss(TEXT, IMAGE).text, -torch.stack([log_probs[index] for index in picked]).mean()
    )


def test_soft_targets_of_one_code_are_that_code(make_dalle):
    dalle = make_dalle()
    sure = torch.nn.functional.one_hot(IMAGE, dalle.codebook_size).float()
    torch.testing.assert_close(dalle.loss(TEXT, IMAGE, image_targets=sure)[:3], dalle.loss(TEXT, IMAGE)[:3])
    logits = dalle.logits(TEXT, IMAGE).image
    spread = torch.rand(logits.shape).softmax(dim=-1)
    expected = -(spread * logits.log_softmax(-1)).sum(-1).mean()
    torch.testing.assert_close(dalle.loss(TEXT, IMAGE, image_targets=spread).image, expected)


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


@EACH_OF_OTHERS
def test_options_of_others_read_no_future_and_the_whole_text(make_dalle, settings):
    dalle = make_dalle(attn_types=["full", "axial_row"], **settings)
    embedded = dalle.embed(dalle.pad_text(TEXT), IMAGE[:, :-1]).detach().requires_grad_()
    outputs, length = dalle.transformer(embedded, dalle.views()), dalle.config.text_length
    assert length == (6 if dalle.config.foreign.bos else 5)
    assert outputs.shape[1] == length + 15
    for position in (0, 1, length - 1, length, length + 7, length + 14):
        (gradient,) = torch.autograd.grad(outputs[:, position].square().sum(), embedded, retain_graph=True)
        per_input = gradient.abs().sum(dim=(0, 2))
        assert per_input[position + 1 :].sum() == 0, position
        assert (per_input[: min(position + 1, length)] > 0).all(), position


@EACH_OF_OTHERS
def test_options_of_others_are_saved(make_dalle, settings, tmp_path):
    """The file alone brings the same model back."""
    dalle = make_dalle(**settings)
    expected = dalle.logits(TEXT, IMAGE)
    save(dalle, tmp_path / "dalle.safetensors")
    loaded = load(tmp_path / "dalle.safetensors")
    assert loaded.config == dalle.config
    for logits, wanted in zip(loaded.logits(TEXT, IMAGE), expected, strict=True):
        torch.testing.assert_close(logits, wanted, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["reversible", "rotary", "rotate_values", "divide_max"])
def test_options_without_weights_change_the_function(make_dalle, name):
    """The same weights; what reaches the last norm is another tensor, and for divide_max a known one."""
    plain, other, seen = make_dalle(depth=1), make_dalle(depth=1, **OTHERS[name]), []
    other.load_state_dict(plain.state_dict())
    for dalle in (plain, other):
        dalle.transformer.norm.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
        dalle.logits(TEXT, IMAGE)
    assert not torch.allclose(seen[0], seen[1], rtol=1e-2, atol=1e-2)
    if name == "divide_max":
        torch.testing.assert_close(seen[1], seen[0] / seen[0].amax(dim=-1, keepdim=True))


def test_reversible_streams_in_closed_form(make_dalle):
    """One block: attention of the input, the feed-forward of what it made; the mean of both streams."""
    dalle = make_dalle(depth=1, reversible=True)
    inputs, (view,) = dalle.embed(dalle.pad_text(TEXT), IMAGE[:, :-1]), dalle.views()
    block = dalle.transformer.blocks[0]
    first = inputs + block.attend(inputs, view)
    second = inputs + block.feed(first, view)
    torch.testing.assert_close(dalle.transformer(inputs, [view]), dalle.transformer.norm((first + second) / 2))


@EACH_OF_OTHERS
def test_options_of_others_learn(make_dalle, settings):
    """Every weight of the blocks and every new one has a gradient, and recomputed activations change none."""
    dalle, gradients = make_dalle(**settings).train(), []
    for checkpointed in (False, True):
        dalle.config.checkpoint_activations = checkpointed
        dalle.zero_grad()
        dalle.loss(TEXT, IMAGE).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in dalle.named_parameters() if p.grad is not None})
    names = {name for name, p in dalle.named_parameters() if p.requires_grad}
    assert gradients[0].keys() == names
    for name in names:
        assert gradients[0][name].abs().sum() > 0, name
        torch.testing.assert_close(gradients[1][name], gradients[0][name])


@EACH_OF_OTHERS
def test_options_of_others_go_with_gradient_scales(make_dalle, settings):
    plain = make_dalle(**settings).train()
    scaled = make_dalle(**settings, gradient_scaling=True).train()
    scaled.load_state_dict(plain.state_dict(), strict=False)
    for dalle in (plain, scaled):
        dalle.loss(TEXT, IMAGE).loss.backward()
    own = dict(scaled.named_parameters())
    for name, parameter in plain.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(own[name].grad, parameter.grad, msg=lambda text, name=name: f"{name}: {text}")


def test_without_bos_the_first_text_token_is_not_predicted(make_dalle):
    dalle = make_dalle(bos=False)
    logits, loss = dalle.logits(TEXT, IMAGE), dalle.loss(TEXT, IMAGE)
    assert logits.text.shape == (2, 4, 9 + 5)
    assert logits.image.shape == (2, 16, 12)
    log_probs = logits.text.log_softmax(-1)
    picked = [(0, 0, 1), (0, 1, 4), (0, 2, 9 + 3), (1, 0, 5), (1, 1, 9 + 2)]  # (sample, output, next token or pad)
    torch.testing.assert_close(loss.text, -torch.stack([log_probs[index] for index in picked]).mean())
    image = -logits.image.log_softmax(-1).gather(2, IMAGE[..., None]).mean()
    torch.testing.assert_close(loss.image, image)
    assert dalle.loss(torch.zeros_like(TEXT), IMAGE).text.isfinite()


def test_a_checkpoint_of_before_the_options_loads(make_dalle, tmp_path):
    """Its config names none of them: they are off."""
    dalle = make_dalle(positions="both", sandwich_norm=True)
    save(dalle, tmp_path / "dalle.pt")
    content = torch.load(tmp_path / "dalle.pt", weights_only=True)
    del content["config"]["foreign"]
    torch.save(content, tmp_path / "old.pt")
    loaded = load(tmp_path / "old.pt")
    assert loaded.config == dalle.config
    torch.testing.assert_close(loaded.logits(TEXT, IMAGE).image, dalle.logits(TEXT, IMAGE).image, rtol=0, atol=0)


def test_reversible_means_what_it_did_in_dalle_pytorch(tiny_vae):
    """Its keyword makes its function, two streams; and saves memory, as it did."""
    config = DALLE(dim=32, depth=1, heads=2, dim_head=16, num_text_tokens=9, vae=tiny_vae, reversible=True).config
    assert config.foreign.reversible
    assert config.checkpoint_activations


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"foreign": ForeignConfig(rotate_values=True), "positions": "learned"},
            "rotate_values needs positions that rotate.*'learned'",
        ),
        (
            {"foreign": ForeignConfig(rotate_values=True), "positions": "flat"},
            "rotate_values needs positions that rotate.*'flat'",
        ),
        ({"foreign": ForeignConfig(bos=False), "text_len": 1}, r"text_len must be at least 2, got 1"),
    ],
)
def test_settings_without_effect_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        DALLEConfig(**settings)


def test_tables_made_while_sampling_serve_training(make_dalle):
    dalle = make_dalle(attn_types=["axial_col"])
    text, image = torch.tensor([[3, 1]]), torch.randint(12, (1, 16))
    with torch.inference_mode():
        dalle.image_logits(text, image)
    dalle.loss(text, image).loss.backward()
