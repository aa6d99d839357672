"""Training of DALL·E mini: from nothing, and on from weights that min-dalle or dalle-mini had."""

import re

import pytest
import torch

import dalle_pytorch
from dalle_pytorch.commands import train_dalle
from dalle_pytorch.models.dalle_bart import DALLEBart, DALLEBartConfig
from dalle_pytorch.models.vqgan import VQGAN, VQGANConfig
from dalle_pytorch.text import BartTokenizer, BPETokenizer

COMMON = [
    "trainer=cpu",
    "data.batch_size=4",
    "trainer.val_check_interval=1",
    "trainer.enable_progress_bar=false",
    "callbacks.ema_decay=0",
    "logger=none",
]
SMALL = [
    "model=dalle_mini", "model.dim=32", "model.encoder_layers=1", "model.decoder_layers=2", "model.heads=2",
    "model.ffn_dim=40", "model.text_positions=30", "text.vocab_size=262",
]  # fmt: skip


def test_it_trains_from_nothing(shards, vae_file, tmp_path, run_command):
    more = [f"data.path={shards}", f"out={tmp_path / 'run'}", f"vae={vae_file}", "trainer.max_steps=2"]
    printed = run_command(train_dalle.main, *COMMON, *SMALL, *more)
    net = dalle_pytorch.load(printed, kind="dalle")
    assert isinstance(net, DALLEBart)
    vae, ids = dalle_pytorch.load(vae_file), net.text_tokenizer.vocab_size
    sizes = net.config
    assert (sizes.grid_size, sizes.image_vocab_size, sizes.bos_id) == (vae.grid_size, *[vae.codebook_size] * 2)
    assert (sizes.text_vocab_size, sizes.text_bos, sizes.text_pad, sizes.text_eos) == (ids + 2, 0, ids, ids + 1)
    generator = dalle_pytorch.Generator(net)
    sampling = dalle_pytorch.SamplingConfig(cfg_scale=3.0)
    candidates, _ = generator.generate("a red square", num_candidates=2, num_keep=1, sampling=sampling)
    assert candidates.images.shape == (2, 3, vae.image_size, vae.image_size)


@pytest.fixture
def mini(tmp_path, vae_file):
    """A DALL·E mini with BART's kind of tokenizer."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    symbols = ["<s>", "<pad>", "</s>", "<unk>", "\u0120", *letters, *("\u0120" + letter for letter in letters)]
    vae = dalle_pytorch.load(vae_file)
    config = DALLEBartConfig(
        dim=32, encoder_layers=1, decoder_layers=2, heads=2, ffn_dim=40, text_vocab_size=len(symbols) + 5,
        text_positions=40, image_vocab_size=vae.codebook_size + 3, bos_id=vae.codebook_size, grid_size=vae.grid_size,
    )  # fmt: skip
    net = DALLEBart(config, vae)
    net.text_tokenizer = BartTokenizer({symbol: at for at, symbol in enumerate(symbols)}, [])
    dalle_pytorch.save(net, tmp_path / "mini.safetensors")
    return tmp_path / "mini.safetensors"


def test_it_trains_on_and_resumes(shards, mini, tmp_path, run_command):
    out = tmp_path / "run"
    more = [
        f"data.path={shards}",
        f"out={out}",
        f"init={mini}",
        "model=bart",
        "optim.warmup_steps=0",
        "model.dropout=0.1",
    ]
    first = dalle_pytorch.load(run_command(train_dalle.main, *COMMON, *more, "trainer.max_steps=1"))
    before = dalle_pytorch.load(mini)
    assert first.text_tokenizer.state() == before.text_tokenizer.state()
    assert first.config == DALLEBartConfig(**{**vars(before.config), "dropout": 0.1})
    assert not torch.equal(first.image_head.weight, before.image_head.weight)
    again = dalle_pytorch.load(run_command(train_dalle.main, *COMMON, *more, "trainer.max_steps=2", "resume=true"))
    assert not torch.equal(again.image_head.weight, first.image_head.weight)


def test_a_resumed_run_is_the_uninterrupted_one(shards, mini, tmp_path, run_command):
    """Weight for weight, with dropout, dropped captions and averaged weights."""
    more = [
        f"data.path={shards}", f"init={mini}", "model=bart", "model.dropout=0.1", "model.caption_dropout=0.3",
        "optim.warmup_steps=0",
        "optim.schedule=constant", "trainer.limit_val_batches=0", "callbacks.ema_decay=0.9", "resume=true",
    ]  # fmt: skip
    run = lambda out, steps: run_command(  # noqa: E731
        train_dalle.main, *COMMON, *more, f"out={tmp_path / out}", f"trainer.max_steps={steps}"
    )
    whole = dalle_pytorch.load(run("whole", 5)).state_dict()
    half = dalle_pytorch.load(run("parts", 2)).state_dict()
    assert any(not torch.equal(half[name], tensor) for name, tensor in whole.items())
    resumed = dalle_pytorch.load(run("parts", 5)).state_dict()
    assert all(torch.equal(resumed[name], tensor) for name, tensor in whole.items())


def test_pictures_need_an_image_tokenizer_with_encoder(shards, tmp_path, run_command):
    """Weights as min-dalle's, whose VQGAN is a decoder."""
    sizes = {"ch": 32, "ch_mult": [1, 1, 1], "num_res_blocks": 1, "attention_levels": [], "z_channels": 8}
    vae = VQGAN(VQGANConfig(image_size=16, codebook_size=32, embed_dim=4, encoder=False, **sizes))
    config = DALLEBartConfig(
        dim=32, encoder_layers=1, decoder_layers=1, heads=2, ffn_dim=40, text_vocab_size=300, text_positions=40,
        image_vocab_size=32, bos_id=32, grid_size=4, text_pad=298, text_eos=299,
    )  # fmt: skip
    net = DALLEBart(config, vae)
    net.text_tokenizer = BPETokenizer.train(["a red square"], 262)
    dalle_pytorch.save(net, tmp_path / "mini.safetensors")
    arguments = [f"data.path={shards}", f"out={tmp_path / 'run'}", f"init={tmp_path / 'mini.safetensors'}"]
    code, error = run_command(train_dalle.main, *COMMON, *arguments)
    assert code == 2
    assert re.search(
        r"mini\.safetensors has an image tokenizer without encoder.*data are pictures.*vqgan=FOLDER", error
    )
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["model=bart", "model.bos_id=3"], r"model\.bos_id comes from the tokenizers"),
        (["model=bart", "model.grid_size=4"], r"model\.grid_size comes from the tokenizers"),
        (["model=bart", "model.image_vocab_size=17000"], r"model\.image_vocab_size comes from the tokenizers"),
        (["model=dalle_mini", "model.dim=64"], r"model\.\w+=\d+, model\.\w+=\d+ contradicts"),
        (["model.dim=64"], r"model\.dim is not its setting: leave it out, or say model=bart"),
        (["text.tokenizer=clip"], "brings its text tokenizer"),
    ],
)
def test_what_contradicts_the_weights_is_refused(shards, mini, tmp_path, run_command, more, message):
    code, error = run_command(
        train_dalle.main, *COMMON, *more, f"data.path={shards}", f"out={tmp_path / 'run'}", f"init={mini}"
    )
    assert code == 2
    assert re.search(message, error)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("model", "setting"),
    [(SMALL, "model.bos_id=3"), (SMALL, "model.text_vocab_size=300"), (["model=tiny"], "model.text_vocab_size=300")],
)
def test_what_the_tokenizers_say_cannot_be_set(shards, vae_file, tmp_path, run_command, model, setting):
    more = [f"data.path={shards}", f"out={tmp_path / 'run'}", f"vae={vae_file}", setting]
    code, error = run_command(train_dalle.main, *COMMON, *model, *more)
    assert code == 2
    assert f"{setting.partition('=')[0]} comes from the tokenizers" in error
    assert not (tmp_path / "run").exists()


def test_settings_of_the_other_network_are_refused(shards, vae_file, tmp_path, run_command):
    more = [f"data.path={shards}", f"out={tmp_path / 'run'}", f"vae={vae_file}", "model.depth=3"]
    code, error = run_command(train_dalle.main, *COMMON, *SMALL, *more)
    assert code == 2
    assert "model.depth is no setting" in error
