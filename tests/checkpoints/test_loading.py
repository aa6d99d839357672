import http.server
import json
import re
import sys
import threading
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError

import dalle_pytorch
from dalle_pytorch import VQGanVAE
from dalle_pytorch.checkpoints import checkpoint, hub, sources
from dalle_pytorch.checkpoints.export import ExportConfig, card
from dalle_pytorch.checkpoints.loading import load_scorer, load_vae
from dalle_pytorch.commands import export
from dalle_pytorch.commands import import_weights as command
from dalle_pytorch.errors import UserError
from dalle_pytorch.models.openai_dvae import OpenAIDVAE, OpenAIDVAEConfig
from dalle_pytorch.models.vqgan import VQGAN, VQGANConfig

SMALL = VQGANConfig(
    image_size=16, ch=32, ch_mult=[1, 1], num_res_blocks=1, attention_levels=[1], z_channels=8, embed_dim=4,
    codebook_size=12,
)  # fmt: skip


@pytest.fixture
def vqgan():
    return VQGAN(SMALL).eval()


@pytest.fixture
def foreign(vqgan, tmp_path):
    """The same network as a file of taming-transformers."""

    def write(name="last.ckpt", dtype=torch.float32, **extra) -> Path:
        state = {key.replace("codebook.", "quantize.embedding."): value for key, value in vqgan.state_dict().items()}
        torch.save({"state_dict": {key: value.to(dtype) for key, value in state.items()} | extra}, tmp_path / name)
        return tmp_path / name

    return write


def test_a_foreign_file_is_recognised_and_loaded(vqgan, foreign):
    images = torch.rand(2, 3, 16, 16)
    loaded = dalle_pytorch.load(foreign(), image_size=16)
    assert isinstance(loaded, VQGAN)
    assert not loaded.training
    assert torch.equal(loaded.encode(images), vqgan.encode(images))


def test_weights_are_fp32_unless_asked_otherwise(foreign):
    path = foreign(dtype=torch.float16)
    assert dalle_pytorch.load(path).codebook.weight.dtype == torch.float32
    assert dalle_pytorch.load(path, dtype=None).codebook.weight.dtype == torch.float16
    assert dalle_pytorch.load(path, dtype=torch.bfloat16).codebook.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused_by_name(foreign, vqgan, tmp_path, value):
    """One number of one tensor, in any file and any way to load it."""
    with torch.no_grad():
        vqgan.decoder.conv_in.weight.view(-1)[3] = value
    checkpoint.save(vqgan, tmp_path / "ours.safetensors")
    message = r"weight decoder\.conv_in\.weight is not finite \(1 of \d+ numbers"
    for load in (dalle_pytorch.load, load_vae, lambda path: dalle_pytorch.load(path, dtype=None), VQGanVAE):
        with pytest.raises(UserError, match=r"last\.ckpt: " + message):
            load(foreign())
        if load is not VQGanVAE:
            with pytest.raises(UserError, match=r"ours\.safetensors: " + message):
                load(tmp_path / "ours.safetensors")


def test_large_numbers_are_finite_unless_their_type_is_too_narrow(vqgan, tmp_path):
    with torch.no_grad():
        vqgan.decoder.conv_in.weight.fill_(3e38)  # their sum is infinite in fp32
    checkpoint.save(vqgan, tmp_path / "ours.safetensors")
    assert dalle_pytorch.load(tmp_path / "ours.safetensors").decoder.conv_in.weight.max() > 2e38
    with pytest.raises(UserError, match=r"decoder\.conv_in\.weight is too large for float16: choose bf16"):
        dalle_pytorch.load(tmp_path / "ours.safetensors", dtype=torch.float16)


def test_an_imported_model_is_saved_and_loaded_as_ours(vqgan, foreign, tmp_path):
    checkpoint.save(dalle_pytorch.load(foreign(), image_size=16), tmp_path / "vqgan.safetensors")
    again = dalle_pytorch.load(tmp_path / "vqgan.safetensors", kind="vae")
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in vqgan.state_dict().items())
    assert again.config == SMALL


def test_training_what_was_mapped_leaves_the_file_alone(foreign):
    path = foreign()
    before = path.read_bytes()
    loaded = dalle_pytorch.load(path, image_size=16)
    with torch.no_grad():
        loaded.codebook.weight += 1
    assert path.read_bytes() == before


def test_an_image_tokenizer_may_come_with_a_dalle(make_dalle, tiny_clip, tmp_path):
    dalle = make_dalle()
    checkpoint.save(dalle, tmp_path / "dalle.safetensors")
    checkpoint.save(tiny_clip, tmp_path / "clip.safetensors")
    vae = load_vae(tmp_path / "dalle.safetensors")
    assert torch.equal(vae.codebook.weight, dalle.vae.codebook.weight)
    with pytest.raises(ValueError, match=r"clip\.safetensors holds a clip, an image tokenizer or a DALLE"):
        load_vae(tmp_path / "clip.safetensors")


def test_another_kind_is_refused(foreign):
    with pytest.raises(ValueError, match=r"last\.ckpt holds a vqgan, a dalle is needed"):
        dalle_pytorch.load(foreign(), kind="dalle")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"source": "tamming"}, "source 'tamming' is not one of openai_dvae, taming"),
        ({"source": "llamagen"}, "last.ckpt"),
        ({"source": "taming", "colour": 3}, "source taming: .*colour"),
    ],
)
def test_wrong_sources_and_options_are_named(foreign, options, message):
    with pytest.raises(ValueError, match=message):
        dalle_pytorch.load(foreign(), **options)


def test_an_extra_weight_is_named(foreign):
    with pytest.raises(ValueError, match=r"last\.ckpt.*encoder\.surplus"):
        dalle_pytorch.load(foreign(**{"encoder.surplus": torch.zeros(1)}))


def test_what_nothing_fits_is_named(tmp_path, tiny_vae):
    torch.save({"a": torch.zeros(1)}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"a\.pt is of no known format; say which with source="):
        dalle_pytorch.load(tmp_path / "a.pt")
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match="folder is of no known format"):
        dalle_pytorch.load(tmp_path / "folder")
    with pytest.raises(FileNotFoundError, match=r"no file or folder nothing\.pt, nor a released model .*dalle_mini"):
        dalle_pytorch.load("nothing.pt")
    checkpoint.save(tiny_vae, tmp_path / "vae.safetensors")
    with pytest.raises(ValueError, match="takes no image_size"):
        dalle_pytorch.load(tmp_path / "vae.safetensors", image_size=16)


def test_the_command_writes_a_checkpoint_once(foreign, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out.safetensors"
    arguments = ["importers", "auto", str(foreign()), "image_size=16", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", arguments)
    command.main()
    assert "vqgan" in capsys.readouterr().out
    assert dalle_pytorch.load(out).image_size == 16
    with pytest.raises(SystemExit):
        command.main()
    assert "out.safetensors exists" in capsys.readouterr().err


class Hostile:
    """Makes a file where a pickle is loaded in the ordinary way."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("fault", ["hostile", "truncated", "source", "swapped", "surplus"])
def test_every_fault_of_a_file_is_one_line_and_nothing_is_written(foreign, tmp_path, monkeypatch, capsys, fault):
    """As the command says it; in `tests/checkpoints/importers` each source has its own."""
    mark, path, source = tmp_path / "mark", foreign(), "taming"
    if fault == "hostile":
        path, named = foreign(x=Hostile(mark)), r"last\.ckpt calls \w+\.open"
    elif fault == "truncated":
        path.write_bytes(path.read_bytes()[:-2000])
        named = r"last\.ckpt cannot be read: truncated or damaged"
    elif fault == "source":
        source, named = "openai_clip", r"last\.ckpt"
    elif fault == "swapped":
        source, path, named = "openai_dvae", tmp_path / "dvae", r"swap"
        path.mkdir()
        vae = OpenAIDVAE(OpenAIDVAEConfig(image_size=16, hidden_dim=16, init_dim=8, codebook_size=32))
        encoder, decoder = foreign_dvae(vae)
        torch.save(decoder, path / "encoder.pkl")
        torch.save(encoder, path / "decoder.pkl")
    else:
        path, named = foreign(**{"encoder.surplus": torch.zeros(1)}), r"encoder\.surplus"
    before, out = {*tmp_path.rglob("*")}, tmp_path / "out" / "out.safetensors"
    monkeypatch.setattr(sys, "argv", ["importers", source, str(path), "--out", str(out)])
    with pytest.raises(SystemExit):
        command.main()
    # one line: a dot stands for no line's end
    assert re.fullmatch(rf"error: .*{named}.*\n", capsys.readouterr().err)
    assert {*tmp_path.rglob("*")} == before
    assert not mark.exists()


def foreign_dvae(vae):
    """Weights of the two halves under OpenAI's names."""
    inverse = {}
    for name, tensor in vae.state_dict().items():
        side, rest = name.split(".", 1)
        inverse.setdefault(side, {})[rest] = tensor
    tables = {side: {} for side in inverse}
    for side, state in inverse.items():
        for rest, tensor in state.items():
            new = re.sub(r"groups\.(\d)\.(\d)\.(id_path)", r"blocks.group_\1.block_\2.\3", rest)
            new = re.sub(r"groups\.(\d)\.(\d)\.(conv_\d)", r"blocks.group_\1.block_\2.res_path.\3", new)
            new = re.sub(r"^(input)", r"blocks.\1", new)
            new = re.sub(r"^(output)", r"blocks.\1.conv", new)
            tables[side][new.replace("weight", "w").replace("bias", "b")] = tensor
    if tables["decoder"]["blocks.input.w"].ndim == 2:
        tables["decoder"]["blocks.input.w"] = tables["decoder"]["blocks.input.w"].T[:, :, None, None].contiguous()
    return tables["encoder"], tables["decoder"]


def test_the_command_reads_words_of_python_too():
    words = {"a=True": True, "a=false": False, "a=None": None, "a=1": 1, "a=x.yaml": "x.yaml", "a=1e-5": 1e-5}
    assert {word: sources.parse_options([word]) for word in words} == {
        word: {"a": value} for word, value in words.items()
    }


def test_the_command_refuses_what_is_no_option_of_a_source(foreign, tmp_path, monkeypatch, capsys):
    arguments = ["importers", "taming", str(foreign()), "dtype=float16", "--out", str(tmp_path / "out.safetensors")]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit):
        command.main()
    assert capsys.readouterr().err == "error: dtype is no option of a source\n"


def test_options_are_checked(foreign):
    path = foreign()
    assert sources.convert(path, "taming", norm_eps=1)[0]["config"]["norm_eps"] == 1.0
    for options, message in (
        ({"image_size": "16"}, r"source taming: image_size='16' is no int or None"),
        ({"image_size": True}, r"image_size=True is no int or None"),
        ({"norm_eps": None}, r"norm_eps=None is no float"),
        ({"config": 3}, r"config=3 is no Path or None"),
        ({"path": "x"}, r"source taming: it takes no path, only config, pixel_range"),
    ):
        with pytest.raises(ValueError, match=message):
            dalle_pytorch.load(path, source="taming", **options)


@pytest.mark.parametrize("error", [TypeError, KeyError, IndexError, AttributeError, RecursionError])
def test_content_that_breaks_a_converter_is_named(foreign, monkeypatch, error):
    def convert(path: Path):
        raise error("inside")

    monkeypatch.setitem(sources.SOURCES, "taming", sources.SOURCES["taming"]._replace(convert=convert))
    with pytest.raises(ValueError, match=r"last\.ckpt does not have the form of taming, .*inside") as caught:
        dalle_pytorch.load(foreign())
    assert isinstance(caught.value.__cause__, error)


def test_two_names_of_one_tensor_are_trained_apart(vqgan, foreign):
    """Where the model does not tie them."""
    shared = torch.ones(32)
    loaded = dalle_pytorch.load(
        foreign(**{"encoder.norm_out.weight": shared, "encoder.norm_out.bias": shared}), image_size=16, dtype=None
    )
    with torch.no_grad():
        loaded.encoder.norm_out.bias.zero_()
    assert torch.equal(loaded.encoder.norm_out.weight, shared)


def test_the_command_explains_itself(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["import_weights", "--help"])
    with pytest.raises(SystemExit, match="0"):
        command.main()
    printed = capsys.readouterr().out
    assert all(name in printed for name in sources.SOURCES)


def test_every_release_has_a_source():
    assert {release.source for release in hub.RELEASES.values() if not release.bundled} <= sources.SOURCES.keys()


class FakeHub:
    """Stands for the network: a cache that is empty at first, and a repository with one file."""

    def __init__(self, folder: Path, *, mismatches=(), error=None):
        self.folder, self.mismatches, self.error = folder, list(mismatches), error
        self.calls: list[bool] = []

    def snapshot_download(self, repo, *, revision, allow_patterns, ignore_patterns, local_files_only=False):
        self.calls.append(local_files_only)
        self.ignored = ignore_patterns
        if local_files_only and self.calls.count(False) == 0:
            raise LocalEntryNotFoundError("not there")
        if self.error is not None:
            raise self.error
        return str(self.folder)

    def list_repo_files(self, repo, *, revision):
        return [file.name for file in self.folder.iterdir()]

    def verify_repo_checksums(self, repo, *, revision):
        return self


@pytest.fixture
def fake_hub(monkeypatch):
    def install(folder, **options):
        fake = FakeHub(folder, **options)
        monkeypatch.setattr(hub, "snapshot_download", fake.snapshot_download)
        monkeypatch.setattr(hub, "HfApi", lambda: fake)
        return fake

    return install


def test_a_hub_id_is_downloaded_once_and_then_read_from_the_cache(tiny_vae, tmp_path, fake_hub):
    checkpoint.save(tiny_vae, tmp_path / checkpoint.HUB_FILE)
    fake = fake_hub(tmp_path)
    for _ in range(2):
        assert torch.equal(dalle_pytorch.load("me/mine").codebook.weight, tiny_vae.codebook.weight)
    assert fake.calls == [True, False, True]


def test_a_wrong_checksum_is_an_error(tmp_path, fake_hub):
    fake_hub(tmp_path, mismatches=[{"path": "model.safetensors"}])
    with pytest.raises(ValueError, match=r"me/mine: the checksum of model\.safetensors is wrong; delete") as caught:
        dalle_pytorch.load("me/mine")
    # of models--me--mine/snapshots/HASH the first has the files themselves
    assert f"delete {tmp_path.parent.parent} and" in str(caught.value)


def test_without_a_network_the_mend_is_said(tmp_path, fake_hub):
    fake_hub(tmp_path, error=LocalEntryNotFoundError("no connection"))
    with pytest.raises(ValueError, match=r"me/mine is not in the cache, .*\(no connection\).*give the folder"):
        dalle_pytorch.load("me/mine")


def test_a_repository_that_is_not_there_is_named(tmp_path, fake_hub):
    error = RepositoryNotFoundError.__new__(RepositoryNotFoundError)
    fake_hub(tmp_path, error=error)
    with pytest.raises(ValueError, match=r"^no file or folder me/mine here, and me/mine is not on the hub"):
        dalle_pytorch.load("me/mine")


def test_a_revision_that_is_not_there_is_named(tmp_path, fake_hub):
    fake_hub(tmp_path, error=RevisionNotFoundError.__new__(RevisionNotFoundError))
    with pytest.raises(ValueError, match=r"^no file or folder me/mine@v9 here, and me/mine .* has no revision v9$"):
        dalle_pytorch.load("me/mine@v9")


def test_a_download_that_breaks_off_is_said(tmp_path, fake_hub):
    fake_hub(tmp_path, error=hub.NetworkError("the read timed out"))
    with pytest.raises(ValueError, match=r"^no file or folder me/mine here, .*\(the read timed out\); try again"):
        dalle_pytorch.load("me/mine")


@pytest.mark.parametrize("name", ["weights/dalle.pt", "runs/vae.safetensors", "a/b.ckpt", "a/flax_model.msgpack"])
def test_a_mistyped_path_is_no_id_of_the_hub(name, tmp_path, fake_hub):
    fake = fake_hub(tmp_path)
    with pytest.raises(FileNotFoundError, match=f"no file or folder {name}"):
        dalle_pytorch.load(name)
    assert not fake.calls


@pytest.mark.parametrize(("files", "skipped"), [(["flax_model.msgpack"], False), (["model.safetensors"], True)])
def test_weights_are_not_downloaded_twice(tmp_path, fake_hub, files, skipped):
    fake = fake_hub(tmp_path)
    for name in files:
        (tmp_path / name).touch()
    for _ in range(2):
        hub.fetch("me/mine")
        assert ("flax_model*" in fake.ignored) == skipped


def test_files_elsewhere_come_whole_or_not_at_all(tmp_path, monkeypatch):
    source = tmp_path / "source.bin"
    source.write_bytes(b"weights")
    digest = "9a40f0f1b8ae8c41f1fb9f0b57e1d9b0"  # not theirs
    release = hub.Release("taming", urls=(("a.bin", source.as_uri(), digest),))
    monkeypatch.setattr(hub, "CACHE", tmp_path / "cache")
    monkeypatch.setitem(hub.RELEASES, "mine", release)
    with pytest.raises(ValueError, match="hash"):
        hub.fetch("mine")
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    monkeypatch.setitem(hub.RELEASES, "mine", release._replace(urls=(("a.bin", source.as_uri(), ""),)))
    assert (hub.fetch("mine") / "a.bin").read_bytes() == b"weights"
    source.unlink()
    assert (hub.fetch("mine") / "a.bin").read_bytes() == b"weights"
    missing = release._replace(urls=(("b.bin", source.as_uri(), ""),))
    monkeypatch.setitem(hub.RELEASES, "mine", missing)
    with pytest.raises(ValueError, match=r"source\.bin cannot be reached .*put it at .*b\.bin"):
        hub.fetch("mine")


def test_a_file_that_breaks_off_is_not_kept(tmp_path, monkeypatch):
    """A server that says 100 bytes and sends 10; there is no digest to tell."""

    class Short(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Length", "100")
            self.end_headers()
            self.wfile.write(b"0123456789")

        def log_message(self, *_):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Short) as server:
        threading.Thread(target=server.serve_forever).start()
        release = hub.Release("taming", urls=(("a.bin", f"http://127.0.0.1:{server.server_port}/a", ""),))
        monkeypatch.setattr(hub, "CACHE", tmp_path)
        monkeypatch.setitem(hub.RELEASES, "mine", release)
        try:
            with pytest.raises(ValueError, match="broke off after 10 of 100 bytes"):
                hub.fetch("mine")
        finally:
            server.shutdown()
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_only_a_dalles_card_speaks_of_an_image_tokenizer(make_dalle, tiny_vae, tiny_clip):
    config = ExportConfig(weights="a", out="b")
    cards = {name: card(model, checkpoint.header(model), config)
             for name, model in (("dalle", make_dalle()), ("vae", tiny_vae), ("clip", tiny_clip))}  # fmt: skip
    assert [name for name, card in cards.items() if "image tokenizer included" in card] == ["dalle"]


def test_exported_folders_come_back(make_dalle, tmp_path, monkeypatch, capsys):
    dalle = make_dalle(text_vocab_size=262)
    checkpoint.save(dalle, tmp_path / "dalle.safetensors", training={"step": 7})
    out = tmp_path / "hub"
    arguments = [f"weights={tmp_path / 'dalle.safetensors'}", f"out={out}", "license=mit", "description='A test.'"]
    monkeypatch.setattr(sys, "argv", ["export", *arguments])
    export.main()
    assert sorted(path.name for path in out.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    loaded = dalle_pytorch.load(out, kind="dalle")
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in dalle.state_dict().items())
    assert checkpoint.read_header(out / "model.safetensors")["training"] == {"step": 7}
    card = (out / "README.md").read_text(encoding="utf-8")
    assert "license: mit" in card
    assert "A test." in card
    assert "step 7" in card
    assert json.loads((out / "config.json").read_text(encoding="utf-8"))["config"]["depth"] == 3
    with pytest.raises(SystemExit, match="1"):
        export.main()
    assert "holds files; nothing is overwritten" in capsys.readouterr().err


def test_an_export_may_be_one_file(tiny_vae, tmp_path, monkeypatch, capsys):
    checkpoint.save(tiny_vae, tmp_path / "vae.pt", training={"step": 7})
    out = tmp_path / "one.safetensors"
    monkeypatch.setattr(sys, "argv", ["export", f"weights={tmp_path / 'vae.pt'}", f"out={out}"])
    export.main()
    assert checkpoint.read_header(out)["training"] == {"step": 7}
    loaded = dalle_pytorch.load(out).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tiny_vae.state_dict().items())
    before = out.read_bytes()
    with pytest.raises(SystemExit):
        export.main()
    assert "one.safetensors exists" in capsys.readouterr().err
    assert out.read_bytes() == before
    with pytest.raises(ValueError, match="push=me/mine uploads a folder, and out=a"):
        ExportConfig(weights="x", out="a.safetensors", push="me/mine")


def test_an_export_may_be_half_as_large(make_dalle, tmp_path, monkeypatch, capsys):
    dalle = make_dalle(text_vocab_size=262)
    checkpoint.save(dalle, tmp_path / "dalle.safetensors")
    arguments = ["export", f"weights={tmp_path / 'dalle.safetensors'}", "precision=fp16"]
    monkeypatch.setattr(sys, "argv", [*arguments, f"out={tmp_path / 'half'}"])
    export.main()
    half = dalle_pytorch.load(tmp_path / "half", dtype=None).state_dict()
    assert all(torch.equal(half[name], tensor.half()) for name, tensor in dalle.state_dict().items())
    with torch.no_grad():
        dalle.image_head.bias[0] = 1e6
    checkpoint.save(dalle, tmp_path / "dalle.safetensors", overwrite=True)
    monkeypatch.setattr(sys, "argv", [*arguments, f"out={tmp_path / 'large'}"])
    with pytest.raises(SystemExit):
        export.main()
    assert "image_head.bias is too large for float16: choose bf16" in capsys.readouterr().err
    assert not (tmp_path / "large").exists()


@pytest.fixture
def scorers(tmp_path, monkeypatch):
    """A user's module of scorers, one whose own import fails, and the folder they can be imported from."""
    (tmp_path / "users_scorers.py").write_text(
        "class Warm:\n    def score(self, images, prompt):\n        return images.mean(dim=(1, 2, 3))\n"
        "class Weighed(Warm):\n    def __init__(self, weight):\n        self.weight = weight\n"
        "maker = Warm\nnumber = 3\n",
        encoding="utf-8",
    )
    (tmp_path / "users_defect.py").write_text("import no_such_package_of_theirs\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name in ("users_scorers", "users_defect"):
        sys.modules.pop(name, None)


def test_a_scorer_of_a_user_is_imported_and_built(scorers):
    scorer = load_scorer("users_scorers.Warm")
    assert type(scorer).__name__ == "Warm"
    assert scorer.score(torch.full((2, 3, 4, 4), 0.5), "red").tolist() == [0.5, 0.5]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("users_modul.Warm", "users_modul.Warm is neither a file.*no module users_modul"),
        ("users_scorers.sub.Warm", r"no module users_scorers\.sub"),
        ("users_scorers.Cold", "module users_scorers has no class Cold"),
        ("users_scorers.number", "module users_scorers has no class number"),
        ("users_scorers.Weighed", r"Weighed is built without arguments, and it needs some \(.*weight"),
    ],
)
def test_a_scorer_that_cannot_be_built_is_named(scorers, name, message):
    with pytest.raises(UserError, match=message):
        load_scorer(name)


def test_a_defect_of_a_users_module_keeps_its_traceback(scorers):
    with pytest.raises(ModuleNotFoundError, match="no_such_package_of_theirs"):
        load_scorer("users_defect.Warm")


def test_a_file_or_a_release_is_no_import_path(scorers, tiny_clip, monkeypatch):
    """Though a module of that name could be imported."""
    monkeypatch.chdir(scorers)
    checkpoint.save(tiny_clip, scorers / "clip.pt")
    (scorers / "clip.pt").rename(scorers / "users_scorers.Warm")
    assert torch.equal(load_scorer("users_scorers.Warm").text_emb.weight, tiny_clip.text_emb.weight)
    with pytest.raises(FileNotFoundError, match=r"no file or folder users_scorers\.pt"):
        load_scorer("users_scorers.pt")
    assert load_scorer("emoji").text_tokenizer is not None
