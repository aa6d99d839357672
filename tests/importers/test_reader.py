import os
import pickle
import subprocess
import sys
import warnings
import zipfile

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from dalle_pytorch.importers.reader import Stub, read, state_dict
from dalle_pytorch.importers.table import rename


@pytest.fixture
def net():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Sequential(nn.Linear(4, 2)))


def assert_same(state, expected):
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickled_module_gives_its_weights_and_no_module(net, tmp_path, zipped):
    torch.save(net, tmp_path / "net.pt", _use_new_zipfile_serialization=zipped)
    content = read(tmp_path / "net.pt")
    assert isinstance(content, Stub)
    assert content.name == "torch.nn.modules.container.Sequential"
    assert_same(state_dict(content), net.state_dict())


@pytest.mark.parametrize("zipped", [True, False])
def test_tensors_of_every_layout_are_as_they_were(tmp_path, zipped):
    base = torch.arange(12, dtype=torch.bfloat16).view(3, 4)
    saved = {
        "view": base.t()[1:],
        "shared": base[1],
        "empty": torch.empty(0, 3),
        "scalar": torch.tensor(3.5, dtype=torch.float16),
        "ids": torch.tensor([2**40, -1]),
        "parameter": nn.Parameter(torch.ones(2)),
        "nested": [{"a": (torch.zeros(1), "text", None, {1, 2})}],
    }
    torch.save(saved, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    content = read(tmp_path / "a.pt")
    for name in ("view", "shared", "empty", "scalar", "ids", "parameter"):
        assert content[name].dtype == saved[name].dtype
        assert torch.equal(content[name], saved[name])
    assert content["nested"][0]["a"][1:] == ("text", None, {1, 2})


def test_torchscript_is_read_and_not_run(net, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated, the files are there
        torch.jit.script(net.eval()).save(tmp_path / "net.pt")
    content = read(tmp_path / "net.pt")
    assert isinstance(content, Stub)
    assert_same(state_dict(content), net.state_dict())


def test_safetensors_are_read(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "a.safetensors")
    assert_same(read(tmp_path / "a.safetensors"), {"a": torch.ones(2)})


def test_a_zip_file_is_mapped_and_never_written(tmp_path):
    torch.save({"a": torch.zeros(1000)}, tmp_path / "a.pt")
    before = (tmp_path / "a.pt").read_bytes()
    tensor = read(tmp_path / "a.pt")["a"]
    tensor += 1
    assert (tmp_path / "a.pt").read_bytes() == before
    assert torch.equal(read(tmp_path / "a.pt")["a"], torch.zeros(1000))
    assert torch.equal(tensor, torch.ones(1000))


class Hostile:
    """Runs a command where a pickle is loaded in the ordinary way."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("function", [os.system, eval, exec, subprocess.run, getattr, __import__, torch.hub.load])
def test_a_hostile_file_loads_nothing_and_says_why(tmp_path, function, zipped):
    mark = tmp_path / "ran"
    command = ["touch", str(mark)] if function is subprocess.run else f"touch {mark}"
    content = {"weight": torch.zeros(2), "x": Hostile(function, command)}
    torch.save(content, tmp_path / "bad.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"bad\.pt calls \w+(\.\w+)*, which has no place .* nothing was loaded$"):
        read(tmp_path / "bad.pt")
    assert not mark.exists()


def test_a_bare_pickle_is_refused(tmp_path):
    mark = tmp_path / "ran"
    (tmp_path / "bad.pkl").write_bytes(pickle.dumps(Hostile(os.system, f"touch {mark}")))
    with pytest.raises(ValueError, match=r"system"):
        read(tmp_path / "bad.pkl")
    (tmp_path / "list.pkl").write_bytes(pickle.dumps([1, 2]))
    with pytest.raises(ValueError, match="no file of torch"):
        read(tmp_path / "list.pkl")
    assert not mark.exists()


def test_what_a_file_may_name_cannot_be_changed_by_it(tmp_path):
    """BUILD sets attributes: on the functions and types that every later file relies on it must not."""
    for name in ("ctorch._utils\n_rebuild_tensor_v2\n", "ccollections\nOrderedDict\n", "ctorch\nSize\n"):
        for attribute in ("__call__", "function"):
            script = name + f"(N}}S'{attribute}'\nI1\nstb."  # (None, {attribute: 1}) as state
            with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
                archive.writestr("a/data.pkl", script)
            with pytest.raises(ValueError, match=r"read-only|can't set attribute|cannot set"):
                read(tmp_path / "a.pt")


def test_a_tensor_cannot_reach_beyond_its_file(tmp_path):
    torch.save({"a": torch.zeros(4)}, tmp_path / "a.pt")
    with zipfile.ZipFile(tmp_path / "a.pt") as archive:
        parts = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    for old, new in ((b"K\x04tq", b"K\x09tq"), (b"K\x00K\x04", b"K\x03K\x04")):
        assert old in parts["a/data.pkl"]
        with zipfile.ZipFile(tmp_path / "b.pt", "w") as archive:
            for name, content in parts.items():
                archive.writestr(name, content.replace(old, new) if name.endswith("data.pkl") else content)
        with pytest.raises(ValueError, match=r"b\.pt"):
            read(tmp_path / "b.pt")


@pytest.mark.parametrize("zipped", [True, False])
def test_a_truncated_file_is_named(net, tmp_path, zipped):
    torch.save(net.state_dict(), tmp_path / "net.pt", _use_new_zipfile_serialization=zipped)
    whole = (tmp_path / "net.pt").read_bytes()
    for length in (20, len(whole) // 2, len(whole) - 5):
        (tmp_path / "cut.pt").write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"cut\.pt cannot be read: truncated or damaged"):
            read(tmp_path / "cut.pt")


def test_what_is_no_weight_file_is_named(tmp_path):
    (tmp_path / "page.pt").write_text("<!DOCTYPE html><title>404</title>")
    (tmp_path / "empty.pt").write_bytes(b"")
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
        archive.writestr("a.txt", "hello")
    for name, message in (("page.pt", "web page"), ("empty.pt", "neither"), ("other.zip", "none of torch's")):
        with pytest.raises(ValueError, match=f"{name}.*{message}"):
            read(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="nothing"):
        read(tmp_path / "nothing.pt")


def test_nothing_is_imported_for_a_file(tmp_path):
    """A class of a package that is not installed, or not to be imported, is a stub."""
    code = f"""
import sys, types, torch
module = types.ModuleType("taming"); sys.modules["taming"] = module
class Thing(torch.nn.Module): pass
Thing.__module__ = "taming"; module.Thing = Thing
torch.save(Thing(), {str(tmp_path / "a.pt")!r})
del sys.modules["taming"]
from dalle_pytorch.importers.reader import read
assert read({str(tmp_path / "a.pt")!r}).name == "taming.Thing"
assert "taming" not in sys.modules
"""
    result = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_key_tables_leave_nothing_over():
    state = {"a.0.w": torch.zeros(1), "a.1.w": torch.ones(1), "loss.x": torch.zeros(1)}
    table = {r"a\.(\d)\.w": r"layers.\1.weight", r"loss\..*": None}
    assert rename(state, table).keys() == {"layers.0.weight", "layers.1.weight"}
    with pytest.raises(ValueError, match=r"left over.*loss\.x"):
        rename(state, {r"a\.(\d)\.w": r"layers.\1.weight"})
    with pytest.raises(ValueError, match="two weights would become layer"):
        rename(state, {r"a\.\d\.w": "layer", r"loss\..*": None})
