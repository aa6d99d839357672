"""Writing shards and reading them back."""

import errno
import gc
import io
import json
import os
import pickle
import tarfile
import warnings
from pathlib import Path
from typing import Any

import pytest
import webdataset
from PIL import Image

from dalle_pytorch.data import shards
from dalle_pytorch.data.index import read_index
from dalle_pytorch.data.shards import ShardDataset, ShardWriter


def png(value: int) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (8, 8), (value, value, value)).save(out, "png")
    return out.getvalue()


def write(folder: Path, count: int = 7, *, compress: bool = False) -> Path:
    with ShardWriter(folder, name="toy", image_size=8, samples_per_shard=3, compress=compress) as writer:
        for i in range(count):
            meta = {"captions": [f"number {i}", f"Nummer {i}, ä"], "concept": f"{i}"}
            writer.write("val" if i == 2 else "train", f"key-{i}", png(i), "png", meta)
    return folder


@pytest.mark.parametrize("compress", [False, True])
def test_what_is_written_is_read_back(tmp_path: Path, compress: bool) -> None:
    data = ShardDataset(write(tmp_path / "a", compress=compress), "train")
    assert [data[i].key for i in range(len(data))] == [f"key-{i}" for i in (0, 1, 3, 4, 5, 6)]
    assert data[2].image == png(3)
    assert data[2].meta == {
        "captions": ["number 3", "Nummer 3, ä"],
        "concept": "3",
        "style": None,
        "split": "train",
    }
    assert data.captions()[2] == data[2].meta["captions"]
    assert len(data.metas()) == len(data) == 6
    assert data[-1] == data[5]
    data.verify()


@pytest.mark.parametrize("compress", [False, True])
def test_bytes_depend_on_the_samples_alone(tmp_path: Path, compress: bool) -> None:
    first, second = (write(tmp_path / name, compress=compress) for name in "ab")
    assert {p.name: p.read_bytes() for p in first.iterdir()} == {p.name: p.read_bytes() for p in second.iterdir()}


def test_a_union_of_splits_is_their_concatenation(tmp_path: Path) -> None:
    folder = write(tmp_path / "a")
    parts = [*ShardDataset(folder, "val"), *ShardDataset(folder, "train")]
    assert list(ShardDataset(folder, "val+train")) == parts
    with pytest.raises(ValueError, match="more than once"):
        ShardDataset(folder, "val+val")


@pytest.mark.parametrize("compress", [False, True])
def test_a_dataset_can_be_sent_to_another_process(tmp_path: Path, compress: bool) -> None:
    data = ShardDataset(write(tmp_path / "a", compress=compress), "train")
    assert data[0] == pickle.loads(pickle.dumps(data))[0]


@pytest.mark.parametrize("compress", [False, True])
def test_webdataset_reads_the_shards(tmp_path: Path, compress: bool) -> None:
    folder = write(tmp_path / "a", compress=compress)
    index = read_index(folder)
    urls = [str(folder / shard["file"]) for shard in index["shards"] if shard["split"] == "train"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # WebDataset leaves files for the collector
        samples = list(webdataset.WebDataset(urls, shardshuffle=False))
        gc.collect()
    assert [sample["__key__"] for sample in samples] == ShardDataset(folder, "train").keys()
    assert json.loads(samples[0]["json"])["captions"][0] == "number 0"


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    folder = write(tmp_path / "a")
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    with pytest.raises(FileExistsError, match="nothing is overwritten"):
        write(folder)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


def test_a_failed_run_leaves_nothing(tmp_path: Path) -> None:
    def fail() -> None:
        with ShardWriter(tmp_path / "a", name="toy", samples_per_shard=1) as writer:
            writer.write("train", "one", png(1), "png", {"captions": ["one"]})
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        fail()
    assert list((tmp_path / "a").iterdir()) == []
    write(tmp_path / "a")


def full(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("place", ["write", "close", "open", "index"])
@pytest.mark.parametrize("compress", [False, True])
def test_a_full_disk_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, compress: bool
) -> None:
    close = webdataset.TarWriter.close

    def fail_to_close(writer: webdataset.TarWriter) -> None:
        close(writer)
        full()

    target: Any = {
        "write": (webdataset.TarWriter, "write", full), "close": (webdataset.TarWriter, "close", fail_to_close),
        "open": (Path, "open", full), "index": (shards, "write_json", full),
    }[place]  # fmt: skip

    def pack() -> None:
        with monkeypatch.context() as patch, ShardWriter(tmp_path / "a", name="toy", compress=compress) as writer:
            writer.write("train", "one", png(1), "png", {"captions": ["one"]})
            patch.setattr(*target)
            writer.write("val", "two", png(1), "png", {"captions": ["two"]})

    with pytest.raises(OSError, match="No space left on device"):
        pack()
    assert list((tmp_path / "a").iterdir()) == []
    write(tmp_path / "a")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"key": "a.b"}, "a.b"),
        ({"key": "a/b"}, "a/b"),
        ({"key": "x" * 99}, "longer"),
        ({"key": "there"}, "twice"),
        ({"split": "te-st"}, "te-st"),
        ({"ext": "tiff"}, "tiff"),
        ({"meta": {"captions": []}}, "captions"),
        ({"meta": {"captions": [" "]}}, "empty caption"),
    ],
)
def test_a_bad_sample_is_refused_by_name(tmp_path: Path, change: dict[str, object], message: str) -> None:
    good = {"split": "train", "key": "new", "image": png(1), "ext": "png", "meta": {"captions": ["one"]}}
    with ShardWriter(tmp_path / "a", name="toy") as writer:
        writer.write(**good | {"key": "there"})  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=message):
            writer.write(**good | change)  # type: ignore[arg-type]


def test_missing_things_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        ShardDataset(tmp_path / "nowhere", "train")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no index\.json"):
        ShardDataset(tmp_path / "empty", "train")
    folder = write(tmp_path / "a")
    with pytest.raises(ValueError, match="no split 'test'; it has: train, val"):
        ShardDataset(folder, "test")
    (folder / "train-00001.tar").unlink()
    with pytest.raises(FileNotFoundError, match=r"train-00001\.tar"):
        ShardDataset(folder, "train")


def test_another_kind_or_a_broken_index_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "a")
    index = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps(index | {"kind": "tokens"}))
    with pytest.raises(ValueError, match="'tokens'"):
        ShardDataset(folder, "train")
    (folder / "index.json").write_text("{")
    with pytest.raises(ValueError, match="not a shard index"):
        ShardDataset(folder, "train")


@pytest.mark.parametrize("compress", [False, True])
def test_a_truncated_shard_is_named(tmp_path: Path, compress: bool) -> None:
    folder = write(tmp_path / "a", compress=compress)
    path = next(folder.glob("train-00000.*"))
    whole = path.read_bytes()
    for length in (len(whole) // 2, len(whole) // 4, 0):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="train-00000"):
            ShardDataset(folder, "train")


def test_a_changed_shard_is_found_by_its_hash(tmp_path: Path) -> None:
    folder = write(tmp_path / "a")
    path = folder / "train-00000.tar"
    data = bytearray(path.read_bytes())
    with tarfile.open(path) as tar:
        member = tar.getmembers()[0]
    data[member.offset_data] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="SHA-256"):
        ShardDataset(folder, "train").verify()
