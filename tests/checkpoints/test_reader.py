import datetime
import json
import mmap
import os
import pickle
import re
import struct
import subprocess
import sys
import warnings
import zipfile
from collections import OrderedDict, deque

import numpy as np
import omegaconf
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from dalle_pytorch.checkpoints.importers.table import rename
from dalle_pytorch.checkpoints.reader import Stub, mmap_scope, read, release, safetensors_notes, state_dict, weights_of


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
            with pytest.raises(ValueError, match=r"a\.pt sets attributes of a (Call|type)"):
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
    (tmp_path / "pointer.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n")
    (tmp_path / "settings.pt").write_text("model:\n  target: taming\n")
    (tmp_path / "noise.pt").write_bytes(b"\xff" * 99)
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
        archive.writestr("a.txt", "hello")
    for name, message in (
        ("pointer.safetensors", "git lfs pull"),
        ("settings.pt", "begins with 'model:"),
        ("page.pt", "web page"),
        ("empty.pt", "is empty"),
        ("noise.pt", "neither"),
        ("other.zip", "none of torch's"),
    ):
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
from dalle_pytorch.checkpoints.reader import read
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


HYPER = {
    "numpy": [np.float64(0.5), np.int64(3), np.arange(4), np.float32, np.dtype("f4")],
    "config": omegaconf.OmegaConf.create({"lr": 0.1, "sizes": [1, 2], "nested": {"name": "x"}}),
    "bytes": [b"abc\xff", b"", bytearray(b"abc"), bytearray()],
    "times": [datetime.datetime(2021, 3, 4), datetime.timedelta(1)],
    "others": [deque([1, 2]), range(3), slice(1, 2), 1j, int, torch.float16, torch.device("cpu"), type(None)],
    "function": [torch.nn.functional.relu, torch.nn.functional.gelu],
}


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("name", HYPER)
def test_hyper_parameters_of_every_kind_do_not_hide_the_weights(tmp_path, name, zipped):
    content = {"hyper_parameters": HYPER[name], "state_dict": {"a.weight": torch.ones(2)}}
    torch.save(content, tmp_path / "a.ckpt", _use_new_zipfile_serialization=zipped)
    read_back = read(tmp_path / "a.ckpt")
    assert_same(weights_of(read_back), {"a.weight": torch.ones(2)})
    assert state_dict(read_back).keys() == {"state_dict.a.weight"}
    if name == "bytes":
        assert read_back["hyper_parameters"] == [bytes(item) for item in HYPER["bytes"]]


@pytest.mark.parametrize("zipped", [True, False])
def test_modules_that_hold_functions_are_read(tmp_path, zipped):
    layer = nn.TransformerEncoderLayer(4, 2, 8, activation="gelu")
    torch.save(layer, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    assert_same(state_dict(read(tmp_path / "a.pt")), layer.state_dict())


@pytest.mark.parametrize("kind", [bytes, bytearray])
def test_a_file_cannot_ask_for_memory(tmp_path, kind):
    torch.save({"x": Hostile(kind, 10**13)}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"a\.pt makes bytes of something else; nothing was loaded"):
        read(tmp_path / "a.pt")


@pytest.mark.parametrize("kind", [str, range, slice, complex, int, type])
def test_builtins_that_weights_do_not_need_do_nothing(tmp_path, kind):
    torch.save({"x": Hostile(kind, 3)}, tmp_path / "a.pt")
    found = read(tmp_path / "a.pt")["x"]
    assert isinstance(found, Stub)
    assert found.args == (3,)


def repack(path, change, compression=zipfile.ZIP_STORED):
    """The file with another data.pkl."""
    with zipfile.ZipFile(path) as archive:
        parts = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in parts.items():
            is_pickle = name.endswith("data.pkl")
            archive.writestr(name, change(content) if is_pickle else content, compression if is_pickle else None)


def test_no_state_is_put_into_tensors_and_dicts(tmp_path):
    """BUILD on a tensor would set its attributes; a state dict's is of no use."""
    state = OrderedDict(a=torch.ones(2))
    state._metadata = OrderedDict(version=1)
    torch.save(state, tmp_path / "a.pt")
    assert not hasattr(read(tmp_path / "a.pt"), "_metadata")
    torch.save({"a": torch.ones(2)}, tmp_path / "b.pt")
    # the memo of torch's pickle of this dict keeps the tensor last, before it is put into the dict
    repack(tmp_path / "b.pt", lambda content: content.removesuffix(b"s.") + b"}X\x01\x00\x00\x00zK\x01sbs.")
    with pytest.raises(ValueError, match="sets attributes of a Tensor"):
        read(tmp_path / "b.pt")


def test_tensors_larger_than_their_storage_are_refused(tmp_path):
    torch.save({"a": torch.ones(1).expand(10**9)}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"a\.pt holds a tensor of 1000000000 numbers that has 1; nothing"):
        read(tmp_path / "a.pt")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"K\x04tq", b"\x88tq"),  # a storage of True numbers
        (b"K\x04tq", b"J\xff\xff\xff\xfftq"),  # of -1
        (b"QK\x00K\x04", b"QK\x00\x89"),  # a side of False
        (b"QK\x00", b"QJ\xff\xff\xff\xff"),  # an offset of -1
    ],
)
def test_counts_are_counts(tmp_path, old, new):
    def change(content):
        assert old in content
        return content.replace(old, new)

    torch.save({"a": torch.zeros(4)}, tmp_path / "a.pt")
    repack(tmp_path / "a.pt", change)
    with pytest.raises(ValueError, match=r"a\.pt holds .*no count"):
        read(tmp_path / "a.pt")


def test_a_compressed_pickle_is_refused(tmp_path):
    torch.save({"a": torch.zeros(4)}, tmp_path / "a.pt")
    repack(tmp_path / "a.pt", lambda content: content, zipfile.ZIP_DEFLATED)
    with pytest.raises(ValueError, match=r"a\.pt has a compressed .*data\.pkl"):
        read(tmp_path / "a.pt")


def test_an_old_file_that_omits_a_tensor_is_refused(tmp_path):
    torch.save({"a": torch.zeros(4)}, tmp_path / "a.pt", _use_new_zipfile_serialization=False)
    content = (tmp_path / "a.pt").read_bytes()
    found = re.search(rb"\x80\x02\]q\x00X....\d+q\x01a\.", content, re.DOTALL)
    (tmp_path / "a.pt").write_bytes(content[: found.start()] + b"\x80\x02]q\x00.")
    with pytest.raises(ValueError, match=r"a\.pt lists other tensors than it has"):
        read(tmp_path / "a.pt")


def test_what_holds_itself_ends(tmp_path):
    state = {"a": torch.ones(1)}
    state["self"] = state
    torch.save(state, tmp_path / "a.pt")
    assert_same(state_dict(read(tmp_path / "a.pt")), {"a": torch.ones(1)})
    deep = {"a": torch.ones(1)}
    for _ in range(5000):
        deep = {"x": deep}
    with pytest.raises(ValueError, match="too deep"):
        state_dict(deep)


def test_modules_need_not_have_buffers():
    stub = Stub()
    stub.state = {"_modules": {"x": {"w": torch.ones(1)}}}
    assert_same(state_dict(stub), {"x.w": torch.ones(1)})


def test_memory_is_given_back_where_the_system_can(tmp_path, monkeypatch):
    torch.save({"a": torch.ones(5000)}, tmp_path / "a.pt")
    with mmap_scope():
        tensor = read(tmp_path / "a.pt")["a"]
        release()
        assert tensor.sum() == 5000
        monkeypatch.delattr(mmap, "MADV_DONTNEED")
        release()


def test_safetensors_of_every_type_are_as_they_were(tmp_path):
    state = {
        "h": torch.randn(3, 5).half(), "b": torch.randn(7).bfloat16(), "d": torch.randn(2).double(),
        "i": torch.arange(4), "z": torch.zeros(0, 3), "s": torch.tensor(2.0), "t": torch.tensor([True, False]),
    }  # fmt: skip
    save_file(state, tmp_path / "a.safetensors", metadata={"note": "x"})
    found = read(tmp_path / "a.safetensors")
    assert_same(found, state)
    assert all(
        found[name].dtype == tensor.dtype and found[name].shape == tensor.shape for name, tensor in state.items()
    )
    assert safetensors_notes(tmp_path / "a.safetensors") == {"note": "x"}


def test_safetensors_need_no_alignment(tmp_path):
    header = json.dumps({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
    header += b" " * (5 - len(header) % 8)
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + struct.pack("<2f", 1, 2))
    assert_same(read(tmp_path / "a.safetensors"), {"a": torch.tensor([1.0, 2.0])})


@pytest.mark.parametrize(
    "row",
    [
        {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [-2], "data_offsets": [0, -8]},
        {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]},
        {"dtype": "F33", "shape": [2], "data_offsets": [0, 8]},
        {"dtype": "F32"},
        3,
    ],
)
def test_damaged_safetensors_are_named(tmp_path, row):
    header = json.dumps({"a": row}).encode()
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    with pytest.raises(ValueError, match=r"a\.safetensors cannot be read: truncated or damaged \(.+\)$"):
        read(tmp_path / "a.safetensors")


def test_flax_weights_go_by_their_folder(tmp_path):
    (tmp_path / "flax_model.msgpack").write_bytes(b"\x81\xa1a\xc0")
    with pytest.raises(ValueError, match="give the folder"):
        read(tmp_path / "flax_model.msgpack")
