"""minDALL-E: the same text ids, logits, greedy tokens, codes and pixels, and nothing left over."""

import json

import pytest
import torch
import yaml

from dalle_pytorch import SamplingConfig, load, save
from dalle_pytorch.checkpoints.checkpoint import assemble, build, load_state, make_header
from dalle_pytorch.checkpoints.importers import kakao_mindalle as mindalle
from dalle_pytorch.checkpoints.reader import read, state_dict
from dalle_pytorch.generation.strategies import generate_image_tokens
from dalle_pytorch.models.vqgan import VQGANConfig

STAGE1, STAGE2 = mindalle.STAGES


@pytest.fixture
def reference(recorded):
    """Tensors and metadata of the fixture."""
    tensors, metadata = recorded("mindalle")
    return tensors, {name: json.loads(value) for name, value in metadata.items()}


@pytest.fixture
def make_weights(seeded, reference):
    """The weights that the reference had, of both stages."""
    _, metadata = reference
    stages = []
    for name, checksum in zip(("stage1", "stage2"), metadata["checksums"], strict=True):
        state = {key: torch.empty(shape) for key, shape in metadata[name].items()}
        seeded.fill(state)
        assert seeded.checksum(state) == checksum
        stages.append(state)
    return stages


@pytest.fixture
def folder(tmp_path, make_weights, reference):
    """A folder as its archive unpacks to; pieces of it may be replaced."""

    def write(vocabulary="unk_first", *, stage1=None, stage2=None, hparams=None):
        _, metadata = reference
        (tmp_path / "tokenizer").mkdir(exist_ok=True)
        text = metadata["text"][vocabulary]
        (tmp_path / mindalle.VOCABULARY[0]).write_text(json.dumps(text["vocabulary"]))
        (tmp_path / mindalle.VOCABULARY[1]).write_text("\n".join(["#version: 0.2", *text["merges"], ""]))
        settings = {
            "stage1": {"type": "vqgan", "n_embed": 20, "hparams": metadata["hparams"]["stage1"]},
            "stage2": {"type": "transformer1d", "hparams": metadata["hparams"]["stage2"] | (hparams or {})},
        }
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
        for name, state in zip(mindalle.STAGES, (stage1 or make_weights[0], stage2 or make_weights[1]), strict=True):
            torch.save({"state_dict": state, "epoch": 3, "hyper_parameters": {}}, tmp_path / name)
        return tmp_path

    return write


def imported(path):
    return assemble(*mindalle.convert(path), path)


def padded(text, ids, shift):
    """Its text ids as ours: [PAD] is 0."""
    return torch.where(text == ids["pad"], 0, text + shift)


def test_logits_tokens_and_pixels_are_its(folder, reference):
    tensors, metadata = reference
    dalle = imported(folder())
    images, tokens = tensors["images"] / 255, tensors["tokens"].long()
    assert torch.equal(dalle.vae.encode(images), tokens)
    torch.testing.assert_close(dalle.vae.decode(tokens), tensors["decoded"], atol=1e-5, rtol=0)
    text = padded(tensors["text"].long(), metadata["text"]["unk_first"], 1)
    logits = dalle.logits(text, tokens)
    torch.testing.assert_close(logits.image, tensors["logits.image"], atol=1e-5, rtol=0)
    drawn = generate_image_tokens(dalle, text, torch.rand(2, 64), SamplingConfig(temperature=0.0))
    assert torch.equal(drawn, tensors["greedy"].long())


@pytest.mark.parametrize(("vocabulary", "shift"), [("unk_first", 1), ("pad_first", 0), ("letter_first", 1)])
def test_text_probabilities_are_its(folder, reference, vocabulary, shift):
    """Of every id; of [PAD] those of all our pads together. An id that it lacks has none."""
    tensors, metadata = reference
    ids = metadata["text"][vocabulary]
    pad = ids["pad"]
    text = torch.where(tensors["text"] == 1, pad, torch.where(tensors["text"] == pad, 2, tensors["text"])).long()
    dalle = imported(folder(vocabulary))
    ours = dalle.logits(padded(text, ids, shift), tensors["tokens"].long()).text.log_softmax(-1)
    theirs = theirs_for(folder(vocabulary), text).log_softmax(-1)
    words = [i for i in range(24) if i != pad]
    torch.testing.assert_close(ours[:, :, [i + shift for i in words]], theirs[:, :, words], atol=1e-5, rtol=0)
    pads = ours[:, :, -6:].logsumexp(-1)
    torch.testing.assert_close(pads, theirs[:, :, pad], atol=1e-5, rtol=0)
    assert ours[:, :, pad + shift].exp().max() == 0
    assert shift == 0 or ours[:, :, 0].exp().max() == 0


def theirs_for(path, text):
    """Its text logits, by our model without pads: every one of its ids stands for itself."""
    weights = state_dict(read(path / STAGE2)["state_dict"])
    config, state = mindalle.dalle_from_state(weights, heads=4, shift=1, pad=1)
    state["text_head.bias"] = torch.zeros_like(state["text_head.bias"])
    vae = VQGANConfig(image_size=16, ch=32, ch_mult=[1, 2], num_res_blocks=1, z_channels=8, embed_dim=6,
                      codebook_size=20, attention_levels=[1])  # fmt: skip
    dalle = build(make_header(config, vae=make_header(vae)))
    dalle.load_state_dict(state, strict=False, assign=True)
    assert not [p for name, p in dalle.named_parameters() if p.is_meta and not name.startswith("vae.")]
    return dalle.logits(text + 1, text.new_empty(2, 0)).text[:, :, 1:25]


def test_its_recorded_text_logits(folder, reference):
    """What the test above takes for the reference is what the reference gave."""
    tensors, _ = reference
    theirs = theirs_for(folder(), tensors["text"].long())
    torch.testing.assert_close(theirs, tensors["logits.text"], atol=1e-5, rtol=0)


@pytest.mark.parametrize(("vocabulary", "shift"), [("unk_first", 1), ("pad_first", 0), ("letter_first", 1)])
def test_text_ids_are_its(folder, reference, vocabulary, shift):
    _, metadata = reference
    expected = metadata["text"][vocabulary]
    header, _ = mindalle.convert(folder(vocabulary))
    dalle = build(header)
    for caption, ids in expected["ids"].items():
        kept = [i + shift for i in ids if i != expected["pad"]]
        assert dalle.text_tokenizer.encode(caption)[:6] == kept, caption  # there it is cut as well
    assert dalle.config.text_vocab_size == 24 + shift
    assert dalle.text_tokenizer.vocab_size <= dalle.config.text_vocab_size


def test_it_is_saved_and_trained_on(folder, tmp_path):
    dalle = imported(folder())
    save(dalle, tmp_path / "ours.safetensors")
    again = load(tmp_path / "ours.safetensors", kind="dalle")
    text, image = torch.tensor([[3, 9, 5]]), torch.randint(20, (1, 64))
    assert torch.equal(again.logits(text, image).image, dalle.logits(text, image).image)
    optimizer = torch.optim.AdamW([p for p in again.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        losses.append(again.train().loss(text, image))
        losses[-1].loss.backward()
        optimizer.step()
    assert losses[-1].loss < losses[0].loss - 0.1
    assert losses[-1].text < losses[0].text
    assert all(p.isfinite().all() for p in again.parameters())


def test_half_precision_can_be_sampled(folder, reference):
    """The bias of ids that do not exist is a number in half precision too."""
    tensors, _ = reference
    for dtype in (torch.bfloat16, torch.float16):
        dalle = imported(folder()).to(dtype)
        logits = dalle.logits(torch.tensor([[3, 9]]), tensors["tokens"][:1].long())
        assert logits.text.isfinite().all()
        assert logits.text.float().log_softmax(-1)[:, :, 0].exp().max() == 0


def test_the_released_size(reference):
    """1,291,081,728 weights; ours adds rows and biases for pads and one id that is padding."""
    _, metadata = reference
    released = metadata["released"]
    assert released["count"] == 1_291_081_728
    shapes = {key: shape for key, shape in released["shapes"].items() if not key.startswith("blocks.")}
    for key, shape in released["shapes"].items():
        if key.startswith("blocks."):
            shapes |= {key.replace("blocks.0.", f"blocks.{layer}."): shape for layer in range(42)}
    weights = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    assert sum(tensor.numel() for tensor in weights.values()) == released["count"]
    config, state = mindalle.dalle_from_state(weights, heads=24, shift=1, pad=1)
    vae = make_header(VQGANConfig())
    dalle = build(make_header(config, vae=vae))
    of_vae = {name: tensor for name, tensor in dalle.state_dict().items() if name.startswith("vae.")}
    load_state(dalle, state | of_vae)
    total = sum(p.numel() for name, p in dalle.named_parameters() if not name.startswith("vae."))
    added = 2 * (64 + 1) * 1536 + (16384 + 64 + 1) + 16384  # rows of two tables, biases of two heads
    assert total == released["count"] + added


def test_misfits_are_named(folder, make_weights, tmp_path):
    stage1, stage2 = make_weights
    with pytest.raises(ValueError, match=r"stage2_last.ckpt: .*left over.*surplus"):
        mindalle.convert(folder(stage2=stage2 | {"surplus": torch.zeros(1)}))
    missing = {key: tensor for key, tensor in stage2.items() if key != "blocks.1.attn.key.bias"}
    with pytest.raises(ValueError, match=r"stage2_last.ckpt: weights are missing: blocks.1.attn.key.bias"):
        mindalle.convert(folder(stage2=missing))
    missing = {key: tensor for key, tensor in stage2.items() if key != "ln_f.bias"}
    with pytest.raises(ValueError, match=r"missing transformer.norm.bias"):
        imported(folder(stage2=missing))
    with pytest.raises(ValueError, match=r"stage2_last.ckpt: is no stage 2.*swapped"):
        mindalle.convert(folder(stage1=stage2, stage2=stage1))
    with pytest.raises(ValueError, match=r"stage1_last.ckpt: .*left over.*surplus"):
        mindalle.convert(folder(stage1=stage1 | {"surplus": torch.zeros(1)}))
    path = folder()
    config = yaml.safe_load((path / "config.yaml").read_text())
    config["stage1"]["hparams"]["resolution"] = 32
    (path / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(ValueError, match=r"positions of 64 image tokens, stage 1 makes"):
        mindalle.convert(path)
    with pytest.raises(ValueError, match=r"config.yaml: says gelu_use_approx"):
        mindalle.convert(folder(hparams={"gelu_use_approx": True}))
    with pytest.raises(ValueError, match=r"width \(32\) is no multiple of n_heads \(5\)"):
        mindalle.convert(folder(hparams={"n_heads": 5}))
    path = folder()
    (path / "tokenizer/bpe-16k-vocab.json").write_text(json.dumps({f"{i}</w>": i for i in range(30)}))
    (path / "tokenizer/bpe-16k-merges.txt").write_text("#version: 0.2\n")
    with pytest.raises(ValueError, match=r"knows 24 text ids"):
        mindalle.convert(path)
    (folder() / "tokenizer/bpe-16k-vocab.json").write_text("no json")
    with pytest.raises(ValueError, match=r"bpe-16k-vocab.json: is no vocabulary"):
        mindalle.convert(tmp_path)
    (folder() / "config.yaml").write_text("[1, 2]")
    with pytest.raises(ValueError, match=r"config.yaml: is no config"):
        mindalle.convert(tmp_path)
    path = folder() / STAGE1
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(ValueError, match=r"stage1_last.ckpt cannot be read: truncated"):
        mindalle.convert(tmp_path)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"has no stage1_last.ckpt"):
        mindalle.convert(tmp_path)


def test_signature_is_stage_2s(make_weights):
    assert make_weights[1].keys() >= mindalle.SIGNATURE
    assert not make_weights[0].keys() & mindalle.SIGNATURE


@pytest.mark.live
def test_reference_says_the_same_today(reference_script, recorded):
    pytest.importorskip("dalle")
    tensors, metadata = recorded("mindalle")
    now, now_metadata = reference_script("mindalle").record()
    assert now_metadata == metadata
    for name, tensor in tensors.items():
        torch.testing.assert_close(now[name], tensor, atol=1e-5, rtol=0)
