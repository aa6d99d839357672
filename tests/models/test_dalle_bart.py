"""Causality, candidates, padding, reduction and learning of the DALLEBart."""

import dataclasses

import pytest
import torch
from torch.nn import functional as F

from dalle_pytorch.generation.backend import prepare
from dalle_pytorch.models.dalle_bart import DALLEBart, DALLEBartConfig

TEXT = torch.tensor([[3, 7, 4, 0], [8, 5, 0, 0]])
IMAGE = torch.arange(32).reshape(2, 16) * 5 % 12


def test_no_position_reads_the_future(make_bart):
    """The gradient of an output is zero for later inputs, and not for earlier ones, the begin token or the caption."""
    bart = make_bart()
    padded = bart.pad_text(TEXT)
    memory = bart.encode_text(padded).detach().requires_grad_()
    x = (
        torch.cat([bart.embed_bos(2), bart.embed_image(IMAGE[:, :-1], torch.arange(15))], dim=1)
        .detach()
        .requires_grad_()
    )
    out = bart.decoder(x, bart.decoder.keys(memory), bart.visible(padded), bart.views())
    assert out.shape == x.shape == (2, 16, 32)
    for position in range(16):
        inputs, captions = torch.autograd.grad(out[:, position].square().sum(), (x, memory), retain_graph=True)
        per_input = inputs.abs().sum(dim=(0, 2))
        assert per_input[position + 1 :].sum() == 0, position
        assert (per_input[: position + 1] > 0).all(), position
        assert torch.equal(captions.abs().sum(dim=2) > 0, bart.visible(padded)), position


def test_every_caption_token_is_read_both_ways(make_bart):
    """The encoder is not causal: each visible output depends on each visible input."""
    bart = make_bart(encoder_layers=1)
    padded = bart.pad_text(TEXT[1:])  # <s> 8 5 </s> and padding
    before = bart.encode_text(padded)
    for position in range(4):
        changed = padded.clone()
        changed[0, position] = 6
        differs = (bart.encode_text(changed) - before).abs().sum(dim=2)[0] > 1e-6
        assert differs[:4].all(), position


@pytest.mark.parametrize("length", [1, 3])
def test_candidates_are_as_separate_rows(make_bart, length):
    """Three candidates of each of two prompts over one set of keys, and the same six rows with keys of their own."""
    bart = make_bart()
    padded = bart.pad_text(TEXT)
    x, memory, visible = torch.randn(6, length, 32), bart.encode_text(padded), bart.visible(padded)
    folded = bart.decoder(x, bart.decoder.keys(memory), visible, bart.views())
    keys = bart.decoder.keys(memory.repeat_interleave(3, dim=0))
    separate = bart.decoder(x, keys, visible.repeat_interleave(3, dim=0), bart.views())
    torch.testing.assert_close(folded, separate)
    wrong = bart.decoder(x, keys, visible.repeat(3, 1), bart.views())
    assert not torch.allclose(folded, wrong)


def test_padding_is_invisible(make_bart):
    """Neither its number, nor its embedding, nor what the encoder makes of it changes a score."""
    short, long = make_bart(text_positions=5), make_bart()
    weights = {name: tensor for name, tensor in long.state_dict().items() if name != "text_pos.weight"}
    short.load_state_dict({**weights, "text_pos.weight": long.text_pos.weight[:5]})
    logits = long.image_logits(TEXT[:, :3], IMAGE)
    torch.testing.assert_close(short.image_logits(TEXT[:, :3], IMAGE), logits)
    torch.testing.assert_close(long.image_logits(F.pad(TEXT[:, :3], (0, 2)), IMAGE), logits)
    with torch.no_grad():
        long.text_emb.weight[1] += 10
    torch.testing.assert_close(long.image_logits(TEXT[:, :3], IMAGE), logits)
    with torch.no_grad():
        long.text_emb.weight[2] += 10
    assert not torch.allclose(long.image_logits(TEXT[:, :3], IMAGE), logits)


def test_captions_are_framed_and_filled_up(make_bart):
    bart, text = make_bart(), TEXT.clone()
    expected = [[0, 3, 7, 4, 2, 1, 1], [0, 8, 5, 2, 1, 1, 1]]
    assert bart.pad_text(text).tolist() == expected
    assert torch.equal(text, TEXT)
    assert bart.pad_text(TEXT[:, :0]).tolist() == bart.pad_text(TEXT * 0).tolist() == [[0, 2, 1, 1, 1, 1, 1]] * 2
    assert bart.pad_text(torch.tensor([[3, 4, 5, 6, 7]])).tolist() == [[0, 3, 4, 5, 6, 7, 2]]
    assert bart.config.text_len == 5
    other = make_bart(text_bos=7, text_pad=0, text_eos=8)
    assert other.pad_text(torch.tensor([[1, 2, 0]])).tolist() == [[7, 1, 2, 8, 0, 0, 0]]


def test_an_empty_prompt_is_a_prompt(make_bart):
    bart = make_bart()
    empty = bart.image_logits(TEXT * 0, IMAGE)
    assert empty.isfinite().all()
    torch.testing.assert_close(empty, bart.image_logits(TEXT[:, :0], IMAGE))
    assert not torch.allclose(empty, bart.image_logits(TEXT, IMAGE))


def test_first_tokens_are_enough_for_their_scores(make_bart):
    bart = make_bart()
    logits = bart.image_logits(TEXT, IMAGE)
    assert logits.shape == (2, 16, 12)  # the codebook's 12 of the head's 16 rows
    for count in (0, 1, 7, 15):
        torch.testing.assert_close(bart.image_logits(TEXT, IMAGE[:, :count]), logits[:, : count + 1])


def test_a_token_is_embedded_one_position_later(make_bart):
    bart = make_bart()
    torch.testing.assert_close(
        bart.embed_image(IMAGE[:, 3:5], torch.arange(3, 5)), bart.embed_image(IMAGE[:, :-1], torch.arange(15))[:, 3:5]
    )
    torch.testing.assert_close(
        bart.embed_image(IMAGE[:, 3:4], torch.arange(3, 4)),
        bart.image_norm(bart.image_emb(IMAGE[:, 3:4]) + bart.image_pos.weight[4]),
    )
    with pytest.raises(IndexError):  # the last token is read nowhere
        bart.embed_image(IMAGE[:, 15:], torch.arange(15, 16))


def test_loss_is_the_mean_over_the_batch_and_all_rows_of_the_head(make_bart):
    bart = make_bart()
    loss = bart.loss(TEXT, IMAGE)
    scores = bart.image_head(bart.hidden(TEXT, IMAGE))
    assert scores.shape == (2, 16, 16)
    torch.testing.assert_close(loss.image, F.cross_entropy(scores.flatten(0, 1), IMAGE.flatten()))
    assert loss.loss == loss.image
    parts = [bart.loss(TEXT[i : i + 1], IMAGE[i : i + 1]).loss for i in range(2)]
    torch.testing.assert_close(loss.loss, (parts[0] + parts[1]) / 2)
    assert bart.loss(TEXT, IMAGE, mean=lambda count: count).loss == loss.loss


def test_caption_dropout_is_the_empty_caption(make_bart):
    bart = make_bart(caption_dropout=0.999999).train()
    dropped = bart.loss(TEXT, IMAGE)
    torch.testing.assert_close(dropped.loss, bart.eval().loss(TEXT * 0, IMAGE).loss)


def test_caption_dropout_follows_the_generator(make_bart):
    bart = make_bart(caption_dropout=0.5).train()
    text = torch.full((64, 2), 4)
    drawn = [bart.corrupt(text, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert set(drawn[0].sum(dim=1).tolist()) == {0, 8}
    assert torch.equal(bart.eval().corrupt(text, None), text)


def test_inputs_and_modes_are_left_alone(make_bart):
    bart = make_bart(caption_dropout=0.5, dropout=0.1).train()
    text, image = TEXT.clone(), IMAGE.clone()
    bart.loss(text, image).loss.backward()
    assert torch.equal(text, TEXT)
    assert torch.equal(image, IMAGE)
    assert bart.training
    assert not bart.vae.training
    assert all(parameter.grad is None for parameter in bart.vae.parameters())
    assert all(parameter.grad is not None for name, parameter in bart.named_parameters() if not name.startswith("vae."))


def test_dropout_is_for_training(make_bart):
    bart = make_bart(dropout=0.5, caption_dropout=0.0)
    assert bart.loss(TEXT, IMAGE).loss == bart.loss(TEXT, IMAGE).loss
    bart.train()
    assert bart.loss(TEXT, IMAGE).loss != bart.loss(TEXT, IMAGE).loss


def test_recomputed_activations_give_the_same_gradients(make_bart):
    bart = make_bart(caption_dropout=0.0).train()
    gradients = []
    for checkpointed in (False, True):
        bart.config.checkpoint_activations = checkpointed
        bart.zero_grad()
        bart.loss(TEXT, IMAGE).loss.backward()
        gradients.append([p.grad.clone() for p in bart.parameters() if p.grad is not None])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed)


def test_one_batch_overfits(make_bart):
    bart = make_bart(caption_dropout=0.0).train()
    optimizer = torch.optim.AdamW([p for p in bart.parameters() if p.requires_grad], lr=3e-3)
    for _ in range(80):
        optimizer.zero_grad()
        loss = bart.loss(TEXT, IMAGE).loss
        loss.backward()
        optimizer.step()
    assert loss < 0.05  # chance: ln 16 = 2.8
    assert torch.equal(bart.eval().image_logits(TEXT, IMAGE).argmax(-1), IMAGE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_close(make_bart, dtype):
    bart = make_bart()
    full = bart.image_logits(TEXT, IMAGE)
    half = bart.to(dtype).image_logits(TEXT, IMAGE)
    assert half.dtype == dtype
    torch.testing.assert_close(half.float(), full, atol=0.06 * full.abs().max().item(), rtol=0)
    assert bart.loss(TEXT, IMAGE).loss.isfinite()


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-5), ("bf16", 0.06), ("int8", 0.1)])
def test_decoder_can_be_laid_out_for_sampling(make_bart, precision, tolerance):
    bart = make_bart().requires_grad_(False)
    padded = bart.pad_text(TEXT)
    memory, visible, x = bart.encode_text(padded), bart.visible(padded), bart.embed_image(IMAGE[:, :9], torch.arange(9))
    plain = bart.decoder(x, bart.decoder.keys(memory), visible, bart.views())
    decoder = prepare(bart.decoder, precision)
    laid_out = decoder(x, decoder.keys(memory), visible, bart.views())
    torch.testing.assert_close(laid_out, plain, atol=tolerance * plain.abs().max().item(), rtol=0)


def test_norms_in_front_of_a_product_have_no_scale(make_bart):
    """As many weights as the released files have: 12 in an encoder block, 19 in one of the decoder, before joining."""
    names = [name for name, _ in make_bart(encoder_layers=1, decoder_layers=1).named_parameters()]
    joined = {"to_qkv": 3, "to_kv": 2, "to_hidden": 2}
    counts = {
        side: sum(joined.get(name.split(".")[-2], 1) for name in names if name.startswith(f"{side}.blocks."))
        for side in ("encoder", "decoder")
    }
    assert counts == {"encoder": 12, "decoder": 19}
    assert not [name for name in names if name.endswith(("norm.weight", "norm.scale")) and "blocks" in name]


def test_config_can_be_written_down_and_read():
    config = DALLEBartConfig(dropout=0.1, text_positions=7)
    assert DALLEBartConfig(**dataclasses.asdict(config)) == config


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"heads": 3}, r"dim \(32\).*heads \(3\)"),
        ({"ffn_dim": 0}, "ffn_dim must be at least 1, got 0"),
        ({"image_vocab_size": 0}, "image_vocab_size must be at least 1"),
        ({"text_positions": 2}, "text_positions must be at least 3"),
        ({"bos_id": 16}, r"bos_id \(16\).*image_vocab_size = 15"),
        ({"text_eos": 9}, r"text_eos \(9\).*text_vocab_size = 9"),
        ({"text_pad": 0}, "must differ"),
        ({"caption_dropout": 1.0}, r"caption_dropout must lie in \[0, 1\)"),
        ({"dropout": -0.1}, r"dropout must lie in \[0, 1\)"),
    ],
)
def test_settings_out_of_range_are_named(make_bart, settings, message):
    with pytest.raises(ValueError, match=message):
        make_bart(**settings)


def test_misfits_are_named(make_bart):
    bart = make_bart()
    with pytest.raises(ValueError, match=r"6 text tokens.*text_len = 5"):
        bart.loss(torch.full((1, 6), 4), IMAGE[:1])
    with pytest.raises(ValueError, match=r"\[4, 9\].*0 to 8"):
        bart.loss(torch.tensor([[4, 9]]), IMAGE[:1])
    with pytest.raises(ValueError, match=r"\[0, 1, 2\].*another text tokenizer"):
        bart.loss(torch.tensor([[4, 2]]), IMAGE[:1])
    with pytest.raises(ValueError, match=r"\[12, 12\].*0 to 11"):
        bart.loss(TEXT[:1], torch.full((1, 16), 12))
    with pytest.raises(ValueError, match=r"15 image tokens.*16"):
        bart.loss(TEXT[:1], IMAGE[:1, :15])
    with pytest.raises(ValueError, match=r"17 image tokens.*16"):
        bart.image_logits(TEXT[:1], torch.zeros(1, 17, dtype=torch.long))
    with pytest.raises(ValueError, match=r"4 token rows.*grid_size = 5"):
        make_bart(grid_size=5)
    with pytest.raises(ValueError, match=r"12 codes.*image_vocab_size = 11"):
        make_bart(image_vocab_size=11, bos_id=11)
    with pytest.raises(ValueError, match="no image tokenizer"):
        DALLEBart(bart.config, vae=torch.nn.Linear(1, 1))
