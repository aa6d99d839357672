import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError

import dalle_pytorch
from dalle_pytorch import checkpoint
from dalle_pytorch.importers import __main__ as command
from dalle_pytorch.importers import hub, sources
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
    with pytest.raises(SystemExit, match=r"out\.safetensors exists"):
        command.main()


def test_the_command_leaves_nothing_behind_an_error(foreign, tmp_path, monkeypatch):
    path, out = foreign(**{"encoder.surplus": torch.zeros(1)}), tmp_path / "out" / "out.safetensors"
    monkeypatch.setattr(sys, "argv", ["importers", "taming", str(path), "--out", str(out)])
    with pytest.raises(SystemExit, match=r"^error: .*encoder\.surplus.*$"):
        command.main()
    assert not out.parent.exists()


def test_the_command_explains_itself():
    result = subprocess.run(
        [sys.executable, "-m", "dalle_pytorch.importers", "--help"], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert all(name in result.stdout for name in sources.SOURCES)


def test_every_release_has_a_source():
    assert {release.source for release in hub.RELEASES.values()} <= sources.SOURCES.keys()


class FakeHub:
    """Stands for the network: a cache that is empty at first, and a repository with one file."""

    def __init__(self, folder: Path, *, mismatches=(), error=None):
        self.folder, self.mismatches, self.error = folder, list(mismatches), error
        self.calls: list[bool] = []

    def snapshot_download(self, repo, *, revision, allow_patterns, ignore_patterns, local_files_only=False):
        self.calls.append(local_files_only)
        if local_files_only and self.calls.count(False) == 0:
            raise LocalEntryNotFoundError("not there")
        if self.error is not None:
            raise self.error
        return str(self.folder)

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
    with pytest.raises(ValueError, match=r"me/mine: the checksum of model\.safetensors is wrong; delete"):
        dalle_pytorch.load("me/mine")


def test_without_a_network_the_mend_is_said(tmp_path, fake_hub):
    fake_hub(tmp_path, error=LocalEntryNotFoundError("no connection"))
    with pytest.raises(ValueError, match=r"me/mine is not in the cache, .*\(no connection\).*give the folder"):
        dalle_pytorch.load("me/mine")


def test_a_repository_that_is_not_there_is_named(tmp_path, fake_hub):
    error = RepositoryNotFoundError.__new__(RepositoryNotFoundError)
    fake_hub(tmp_path, error=error)
    with pytest.raises(ValueError, match="me/mine is not on the hub"):
        dalle_pytorch.load("me/mine")


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


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_loading_needs_little_more_memory_than_the_weights(tmp_path, dtype):
    """Peak of a process that loads a VQGAN of 76 M parameters as fp32, beyond what it needs without one."""
    code = f"""
import sys, torch, dalle_pytorch
from dalle_pytorch.models.vqgan import VQGAN, VQGANConfig
path = sys.argv[2]
def peak():  # kB; getrusage would count the process that started this one
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
if sys.argv[1] == "write":
    state = VQGAN(VQGANConfig()).state_dict()
    state["quantize.embedding.weight"] = state.pop("codebook.weight")
    torch.save({{"state_dict": {{key: value.to(torch.{dtype}) for key, value in state.items()}}}}, path)
else:
    before = peak()
    model = dalle_pytorch.load(path)
    touched = sum(p.sum() for p in model.parameters())
    weights = sum(p.nbytes for p in model.parameters()) / 1024
    print((peak() - before) / weights)
"""
    path = str(tmp_path / "last.ckpt")
    for step in ("write", "read"):
        result = subprocess.run([sys.executable, "-c", code, step, path], capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr
    assert 0.9 < float(result.stdout) < 1.3


def test_exported_folders_come_back(make_dalle, tmp_path):
    dalle = make_dalle(text_vocab_size=262)
    checkpoint.save(dalle, tmp_path / "dalle.safetensors", training={"step": 7})
    out = tmp_path / "hub"
    arguments = [f"weights={tmp_path / 'dalle.safetensors'}", f"out={out}", "license=mit", "description='A test.'"]
    run = [sys.executable, "-m", "dalle_pytorch.commands.export", *arguments]
    result = subprocess.run(run, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert sorted(path.name for path in out.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    loaded = dalle_pytorch.load(out, kind="dalle")
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in dalle.state_dict().items())
    assert checkpoint.read_header(out / "model.safetensors")["training"] == {"step": 7}
    card = (out / "README.md").read_text(encoding="utf-8")
    assert "license: mit" in card
    assert "A test." in card
    assert "step 7" in card
    assert json.loads((out / "config.json").read_text(encoding="utf-8"))["config"]["depth"] == 3
    result = subprocess.run(run, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert "holds files already" in result.stderr
