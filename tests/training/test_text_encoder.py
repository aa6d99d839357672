"""A pretrained text encoder in front of a DALLE: read as its own program reads it, carried along, never trained."""

import json
import shutil

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors

import dalle_pytorch
from dalle_pytorch.checkpoints.checkpoint import load, save
from dalle_pytorch.checkpoints.text_encoder import load_text_encoder
from dalle_pytorch.commands import train_dalle
from dalle_pytorch.errors import UserError
from dalle_pytorch.generation.decoder import Decoder
from dalle_pytorch.models.dalle import DALLE, DALLEConfig

WORDS = ["<pad>", "<start>", "<end>", "<unk>", "red", "green", "blue", "circle", "square", "triangle", "a"]
CAPTIONS = ["a red circle", "blue", "a green square a red circle"]
SMALL = {"vocab_size": len(WORDS), "pad_token_id": 0}
KINDS = {
    "bert": (
        lambda: transformers.BertConfig(
            hidden_size=12, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16,
            max_position_embeddings=32, **SMALL
        ),
        "BertModel", "<start> $A <end>",
    ),
    "t5": (
        lambda: transformers.T5Config(d_model=12, d_kv=6, num_layers=2, num_heads=2, d_ff=16, **SMALL),
        "T5EncoderModel", "$A <end>",
    ),
    "clip": (
        lambda: transformers.CLIPConfig(
            text_config={"hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16,
                         "max_position_embeddings": 32, "eos_token_id": 2, "bos_token_id": 1, **SMALL},
            vision_config={"hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 8,
                           "patch_size": 4, "intermediate_size": 16},
        ),
        "CLIPModel", "<start> $A <end>",
    ),
}  # fmt: skip


@pytest.fixture(params=KINDS)
def folder(request, tmp_path):
    """A folder as transformers writes it: settings, random weights, a tokenizer."""
    settings, name, template = KINDS[request.param]
    path = tmp_path / request.param
    getattr(transformers, name)(settings()).save_pretrained(path)
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(WORDS[:3])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[(word, WORDS.index(word)) for word in ("<start>", "<end>")]
    )
    tokenizer.save(str(path / "tokenizer.json"))
    return path


def make(folder, tiny_vae, **settings) -> DALLE:
    encoder, tokenizer = load_text_encoder(folder)
    sizes = {"dim": 32, "depth": 2, "heads": 2, "head_dim": 16, "text_len": 8}
    config = DALLEConfig(**{**sizes, **settings}).fitted(tiny_vae, tokenizer, encoder)
    dalle = config.build(tiny_vae, encoder).eval()
    dalle.text_tokenizer = tokenizer
    with torch.no_grad():
        for parameter in dalle.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    return dalle


def test_features_are_those_of_its_own_program(folder):
    """Each caption alone, with the marks that its own tokenizer puts around it."""
    encoder, tokenizer = load_text_encoder(folder)
    own = Tokenizer.from_file(str(folder / "tokenizer.json"))
    found = encoder.encode(tokenizer.tokenize(CAPTIONS, 8))
    assert found.values.shape == (3, 8, 12)
    for row, caption in enumerate(CAPTIONS):
        ids = torch.tensor([own.encode(caption).ids])
        alone = encoder.net(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state[0]
        alone = alone[int(ids[0, 0] == 1) :]  # the start mark has no place of its own
        count = int(found.present[row].sum())
        assert count == len(caption.split()) + 1 == len(alone)
        torch.testing.assert_close(found.values[row, :count], alone, atol=1e-5, rtol=1e-5)


def test_an_empty_caption_is_no_caption(folder, tiny_vae):
    """Guidance leads away from it; nothing of the encoder is in it. A full one has no room for the end mark."""
    encoder, tokenizer = load_text_encoder(folder)
    found = encoder.encode(tokenizer.tokenize(["", " ".join(["red"] * 8)], 8))
    assert found.present.sum(dim=1).tolist() == [0, 8]
    dalle, image = make(folder, tiny_vae), torch.randint(12, (2, 16))
    before = dalle.image_logits(torch.zeros(2, 8, dtype=torch.long), image)
    for parameter in dalle.text_encoder.parameters():
        parameter.data.mul_(2)
    torch.testing.assert_close(dalle.image_logits(torch.zeros(2, 8, dtype=torch.long), image), before)


def test_captions_reach_the_images_and_are_not_predicted(folder, tiny_vae):
    dalle, image = make(folder, tiny_vae), torch.randint(12, (3, 16))
    text = dalle.text_tokenizer.tokenize(CAPTIONS, 8)
    losses = dalle.loss(text, image)
    assert losses.text is None
    assert losses.loss == losses.image
    assert dalle.logits(text, image).text is None
    assert not torch.allclose(dalle.image_logits(text, image), dalle.image_logits(text.roll(1, 0), image), atol=1e-3)
    with pytest.raises(UserError, match="text encoder"):
        dalle.text_nll(text)
    with pytest.raises(UserError, match="text encoder"):
        dalle.next_text_scores(text[:, :1])


@pytest.mark.parametrize("settings", [{}, {"any_order": True, "shift_tokens": False, "kv_heads": 1}])
def test_cached_equals_uncached(folder, tiny_vae, settings):
    dalle, tokens = make(folder, tiny_vae, **settings), torch.randint(12, (3, 16))
    text, decoder = dalle.text_tokenizer.tokenize(CAPTIONS, 8), Decoder(dalle)
    state, first = decoder.start(text)
    found = [first[:, None], *(decoder.read(state, tokens[:, i : i + 1], i) for i in range(15))]
    torch.testing.assert_close(torch.cat(found, dim=1), dalle.image_logits(text, tokens), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_a_checkpoint_carries_it(folder, tiny_vae, tmp_path, suffix):
    """The folder is not needed again, and the file holds JSON and weights only."""
    dalle, image = make(folder, tiny_vae), torch.randint(12, (3, 16))
    text = dalle.text_tokenizer.tokenize(CAPTIONS, 8)
    save(dalle, tmp_path / f"dalle.{suffix}")
    shutil.rmtree(folder)
    loaded = load(tmp_path / f"dalle.{suffix}")
    assert loaded.config == dalle.config
    assert loaded.text_tokenizer.tokenize(CAPTIONS, 8).equal(text)
    torch.testing.assert_close(loaded.image_logits(text, image), dalle.image_logits(text, image), rtol=0, atol=0)


def test_it_is_frozen(folder, tiny_vae):
    dalle = make(folder, tiny_vae).train()
    assert not dalle.text_encoder.training
    text = dalle.text_tokenizer.tokenize(CAPTIONS, 8)
    dalle.loss(text, torch.randint(12, (3, 16))).loss.backward()
    assert all(parameter.grad is None for parameter in dalle.text_encoder.parameters())
    trained = {name for name, p in dalle.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert trained == {name for name, p in dalle.named_parameters() if p.requires_grad}


def test_misfits_are_refused(folder, tiny_vae, tmp_path):
    encoder, tokenizer = load_text_encoder(folder)
    config = DALLEConfig(dim=32, text_len=8).fitted(tiny_vae, tokenizer, encoder)
    with pytest.raises(UserError, match="0 features, text_features is 12"):
        config.build(tiny_vae)
    if encoder.config.max_tokens is not None:
        with pytest.raises(UserError, match="30 tokens at most, text_len is 31"):
            DALLEConfig(dim=32, text_len=31).fitted(tiny_vae, tokenizer, encoder).build(tiny_vae, encoder)
    with pytest.raises(FileNotFoundError, match="no folder"):
        load_text_encoder(tmp_path / "nothing")
    text = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(text.replace('"a":10', '"a": 99').replace('"a": 10', '"a": 99'))
    with pytest.raises(UserError, match=r"100 ids, the encoder knows 11"):
        load_text_encoder(folder)
    (folder / "tokenizer.json").write_text(text)
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, "model_type": "vit"}))
    with pytest.raises(UserError, match="no text encoder"):
        load_text_encoder(folder)


@pytest.mark.parametrize("folder", ["bert"], indirect=True)
def test_it_is_fp32_without_paths_and_without_a_pooler(folder):
    """Whatever it is stored in: a checkpoint gives it back in fp32, and holds nothing that is not read."""
    net = transformers.BertModel.from_pretrained(folder, dtype=torch.bfloat16)
    net.save_pretrained(folder)
    encoder, _ = load_text_encoder(folder)
    assert {parameter.dtype for parameter in encoder.parameters()} == {torch.float32}
    assert not any("pooler" in name for name in encoder.state_dict())
    assert str(folder) not in json.dumps(encoder.config.network)


@pytest.mark.parametrize("folder", ["bert"], indirect=True)
def test_networks_that_count_positions_from_the_padding_have_fewer(folder):
    """RoBERTa: the longest caption that is let in can be read."""
    settings = transformers.RobertaConfig(
        hidden_size=12, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, max_position_embeddings=20,
        **{**SMALL, "pad_token_id": 1},
    )  # fmt: skip
    transformers.RobertaModel(settings).save_pretrained(folder)
    encoder, _ = load_text_encoder(folder)
    assert encoder.config.max_tokens == 18
    encoder.encode(torch.full((1, 16), 5))  # 18 with the marks


@pytest.mark.parametrize("folder", ["bert"], indirect=True)
def test_trained_and_resumed_by_the_command(folder, shards, vae_file, tmp_path, run_command):
    """Weights after a resumption equal those without one; the encoder's are those of its folder; another is refused."""

    def small(out, steps, *more):
        return [
            f"data.path={shards}", f"out={out}", f"vae={vae_file}", f"text_encoder={folder}", "model=tiny",
            "trainer=cpu", f"trainer.max_steps={steps}", "data.batch_size=8", "text.truncate=true",
            "callbacks.checkpoint_every=1", "optim.schedule=constant", *more,
        ]  # fmt: skip

    whole = run_command(train_dalle.main, *small(tmp_path / "whole", 4))
    run_command(train_dalle.main, *small(tmp_path / "parts", 2))
    parts = run_command(train_dalle.main, *small(tmp_path / "parts", 4, "resume=true"))
    one, two = (dalle_pytorch.load(path) for path in (whole, parts))
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, two.state_dict()[name]), name
    encoder, _ = load_text_encoder(folder)
    for name, tensor in encoder.state_dict().items():
        assert torch.equal(tensor, one.text_encoder.state_dict()[name])
    for arguments, message in (
        (["model=bart"], "DALL·E mini, which has its own"),
        (["text.bpe_dropout=0.1"], "leave text.tokenizer"),
        ([f"init={whole}"], "leave text_encoder out"),
    ):
        code, error = run_command(train_dalle.main, *small(tmp_path / "no", 2), *arguments)
        assert code in (1, 2)
        assert message in error
    text = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(text.replace('"triangle"', '"hexagon"'))
    code, error = run_command(train_dalle.main, *small(tmp_path / "parts", 6, "resume=true"))
    assert code == 1
    assert "text tokenizer was another one" in error
    (folder / "tokenizer.json").write_text(text)
    torch.manual_seed(1)
    transformers.BertModel(KINDS["bert"][0]()).save_pretrained(folder)
    code, error = run_command(train_dalle.main, *small(tmp_path / "parts", 6, "resume=true"))
    assert code == 1
    assert "resume with the text_encoder= of the first start" in error
