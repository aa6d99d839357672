"""Packing COCO captions, img2dataset's output and Hugging Face data sets."""

import bz2
import errno
import gzip
import io
import json
import lzma
import os
import random
import sys
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from PIL import Image

from dalle_pytorch.commands.prepare_data import main
from dalle_pytorch.data import img2dataset, packing, shards
from dalle_pytorch.data.coco import pack_coco
from dalle_pytorch.data.huggingface import pack_huggingface
from dalle_pytorch.data.img2dataset import pack_img2dataset
from dalle_pytorch.data.index import hash_share, read_index
from dalle_pytorch.data.packing import Item, PackConfig, Skipped, pack
from dalle_pytorch.data.shards import ShardDataset
from dalle_pytorch.errors import UserError
from dalle_pytorch.images import decode_image

SMALL = PackConfig(image_size=8)
BROKEN = b"\xff\xd8\xff broken"


def png(grey: int = 0, size: tuple[int, int] = (12, 8)) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", size, (grey, grey, grey)).save(out, "png")
    return out.getvalue()


def command(arguments: list[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["prepare_data.py", *arguments])
        main()


def splits(out: Path) -> dict[str, set[str]]:
    return {name: {meta["path"] for meta in ShardDataset(out, name).metas()} for name in read_index(out)["splits"]}


def read(out: Path) -> dict[str, list[str]]:
    metas = ShardDataset(out, "+".join(read_index(out)["splits"])).metas()
    return {meta["path"]: meta["captions"] for meta in metas}


def greys(out: Path) -> dict[str, int]:
    """Brightness of each stored picture, to know it by."""
    data = ShardDataset(out, "+".join(read_index(out)["splits"]))
    return {s.meta["path"]: round(255 * decode_image(s.image, image_size=8, name=s.key).mean().item()) for s in data}


def reasons(out: Path) -> dict[str, str]:
    return {item["path"]: item["reason"] for item in json.loads((out / "skipped.json").read_text(encoding="utf-8"))}


def same_files(one: Path, two: Path) -> bool:
    contents = [{file.name: file.read_bytes() for file in folder.iterdir()} for folder in (one, two)]
    return contents[0] == contents[1]


# The three sources over the same numbered pictures: each writes what it reads from, and gives the packing function.


def make_coco(folder: Path, count: int, bad: int = 0) -> Callable[[Path, PackConfig], Any]:
    """COCO with `count` good pictures and `bad` missing ones."""
    names = [f"{i:04d}.png" for i in range(count + bad)]
    images = folder / "images"
    images.mkdir(parents=True)
    for i, name in enumerate(names[:count]):
        (images / name).write_bytes(png(i))
    annotations = folder / "captions_toy.json"
    coco_json(annotations, {name: [f"number {i}"] for i, name in enumerate(names)})
    return lambda out, config: pack_coco(annotations, images, out, config)


def make_img2dataset(folder: Path, count: int, bad: int = 0) -> Callable[[Path, PackConfig], Any]:
    """Tars of 10 samples; the bad ones have no caption."""
    for shard, start in enumerate(range(0, count + bad, 10)):
        samples = {f"{i:04d}.jpg": png(i) for i in range(start, min(start + 10, count + bad))}
        texts = {f"{i:04d}.txt": f"number {i}".encode() for i in range(start, min(start + 10, count))}
        tar(folder / f"{shard:05d}.tar", samples | texts)
    return lambda out, config: pack_img2dataset(folder, out, config)


def make_huggingface(folder: Path, count: int, bad: int = 0) -> Callable[[Path, PackConfig], Any]:
    """A saved data set; the bad rows have a broken picture."""
    pictures = [png(i) for i in range(count)] + [BROKEN] * bad
    save(folder, pictures, [f"number {i}" for i in range(count + bad)])
    return lambda out, config: pack_huggingface(str(folder), out, config)


MAKERS = [make_coco, make_img2dataset, make_huggingface]
every_source = pytest.mark.parametrize("make", MAKERS)


def coco_json(path: Path, captions: dict[str, list[str]]) -> None:
    images = [{"id": 100 + i, "file_name": name} for i, name in enumerate(captions)]
    pairs = [(100 + i, text) for i, texts in enumerate(captions.values()) for text in texts]
    # As in COCO, the captions of a picture do not stand together.
    annotations = [{"id": i, "image_id": number, "caption": text} for i, (number, text) in enumerate(pairs)]
    path.write_text(json.dumps({"images": images, "annotations": annotations[::2] + annotations[1::2]}))


def tar(path: Path, files: dict[str, bytes], *, ordered: bool = True) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as file:
        for name, data in sorted(files.items()) if ordered else files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))


def save(folder: Path, pictures: list[bytes | None], captions: list[Any], **columns: str) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    image, caption = columns.get("image", "image"), columns.get("caption", "caption")
    data = {image: [{"bytes": p, "path": None} if p is not None else None for p in pictures], caption: captions}
    dataset = datasets.Dataset.from_dict(data).cast_column(image, datasets.Image())
    dataset.save_to_disk(str(folder))


@pytest.fixture
def datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The package, with a cache of its own."""
    package = pytest.importorskip("datasets")
    monkeypatch.setattr(package.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return package


@every_source
def test_every_picture_is_packed_once_with_its_caption(tmp_path: Path, make: Callable) -> None:
    report = make(tmp_path / "in", 25)(tmp_path / "out", SMALL)
    assert sorted(read(tmp_path / "out").values()) == sorted([f"number {i}"] for i in range(25))
    grey = greys(tmp_path / "out")
    for path, (caption,) in read(tmp_path / "out").items():
        assert abs(grey[path] - int(caption.split()[1])) <= 1
    assert report.skipped == []
    assert read_index(tmp_path / "out")["image_size"] == 8
    assert sum(report.index["splits"].values()) == 25


@every_source
def test_the_same_source_gives_the_same_bytes(tmp_path: Path, make: Callable) -> None:
    run = make(tmp_path / "in", 25)
    run(tmp_path / "one", SMALL)
    run(tmp_path / "two", SMALL)
    assert same_files(tmp_path / "one", tmp_path / "two")


@every_source
def test_splits_follow_hashes_and_stay_when_samples_are_added(tmp_path: Path, make: Callable) -> None:
    config = PackConfig(image_size=8, val_fraction=0.3)
    make(tmp_path / "few", 30)(tmp_path / "a", config)
    make(tmp_path / "more", 50)(tmp_path / "b", config)
    few, more = splits(tmp_path / "a"), splits(tmp_path / "b")
    assert few["val"] == {path for path in read(tmp_path / "a") if hash_share(path) < 0.3}
    assert few["val"] < more["val"]
    assert few["train"] < more["train"]


@every_source
def test_val_has_at_least_one_unless_it_is_to_have_none(tmp_path: Path, make: Callable) -> None:
    run = make(tmp_path / "in", 12)
    run(tmp_path / "tiny", PackConfig(image_size=8, val_fraction=1e-9))
    (held_out,) = splits(tmp_path / "tiny")["val"]
    assert held_out == min(read(tmp_path / "tiny"), key=hash_share)
    run(tmp_path / "none", PackConfig(image_size=8, val_fraction=0.0))
    assert list(splits(tmp_path / "none")) == ["train"]
    run(tmp_path / "fixed", PackConfig(image_size=8, split="test"))
    assert {name: len(paths) for name, paths in splits(tmp_path / "fixed").items()} == {"test": 12}
    assert read_index(tmp_path / "fixed")["source"]["split"] == "test"


@every_source
def test_too_many_unusable_samples_are_an_error_that_leaves_nothing(tmp_path: Path, make: Callable) -> None:
    run = make(tmp_path / "in", 60, bad=20)
    with pytest.raises(ValueError, match=r"20 of the 80 samples of .* max_bad_fraction=0\.1 .*\n  20 x ") as error:
        run(tmp_path / "out", SMALL)
    assert any(kind in str(error.value) for kind in ("missing picture", "no captions", "unreadable picture"))
    assert list((tmp_path / "out").iterdir()) == []
    report = run(tmp_path / "out", PackConfig(image_size=8, max_bad_fraction=0.25))
    assert (sum(report.index["splits"].values()), len(report.skipped)) == (60, 20)
    assert reasons(tmp_path / "out") == {item.path: item.reason for item in report.skipped}
    assert "left out 20" in report.summary()


@every_source
def test_a_few_unusable_samples_are_no_error_whatever_their_share(tmp_path: Path, make: Callable) -> None:
    run = make(tmp_path / "in", 5, bad=10)
    assert len(run(tmp_path / "out", PackConfig(image_size=8, max_bad_fraction=0.0)).skipped) == 10


@every_source
def test_nothing_usable_is_an_error_that_leaves_nothing(tmp_path: Path, make: Callable) -> None:
    with pytest.raises(ValueError, match="0 usable pictures; left out 3, among them"):
        make(tmp_path / "in", 0, bad=3)(tmp_path / "out", PackConfig(image_size=8, split="train"))
    assert list((tmp_path / "out").iterdir()) == []


def test_an_error_of_the_source_leaves_nothing(tmp_path: Path) -> None:
    def interrupted() -> Iterator[Item | Skipped]:
        yield Item("a", ["a"], png())
        yield Item("b", ["b"], png())
        raise ConnectionError("gone")

    with pytest.raises(ConnectionError):
        pack(interrupted(), tmp_path / "out", SMALL, name="x", where="x")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_full_disk_at_the_last_file_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    entries = [Item(name, [name], png()) for name in "abc"]
    for module in (packing, shards):
        with monkeypatch.context() as patch:
            patch.setattr(module, "write_json", full)
            with pytest.raises(OSError, match="No space left"):
                pack(entries, tmp_path / "out", SMALL, name="x", where="x")
        assert list((tmp_path / "out").iterdir()) == []
    pack(entries, tmp_path / "out", SMALL, name="x", where="x")


def test_one_picture_at_a_time_is_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read_so_far, written = [0], [0]

    def source() -> Iterator[Item | Skipped]:
        for i in range(40):
            read_so_far[0] += 1
            assert read_so_far[0] - written[0] <= 2  # this one, and the one held back for "val"
            yield Item(str(i), ["x"], png())

    class Writer(packing.ShardWriter):
        def write(self, *arguments: Any) -> None:
            super().write(*arguments)
            written[0] += 1

    monkeypatch.setattr(packing, "ShardWriter", Writer)
    pack(source(), tmp_path / "out", PackConfig(image_size=8, val_fraction=1e-9), name="x", where="x")
    assert written[0] == 40


def test_captions_are_cleaned_and_names_are_text() -> None:
    assert packing.captions_of([" a\n cat ", "", None, "\t", "a  dog"]) == ["a cat", "a dog"]
    assert packing.captions_of("one\r\ntwo") == ["one two"]
    assert packing.captions_of(None) == packing.captions_of(3) == packing.captions_of({"a": "b"}) == []
    assert packing.captions_of("half \ud83d") == ["half \\ud83d"]


@pytest.mark.parametrize(
    "text", ["&nbsp;", "&#8203;", "\u00a0", "\u200b", "\ufeff", " \u2060\u00ad ", "\ufe0f", "\x00"]
)
def test_what_shows_nothing_is_no_caption(text: str) -> None:
    assert packing.captions_of([text, f"a cat{text}"]) == packing.captions_of(f"a cat{text}")
    assert len(packing.captions_of(["🙂", "R&amp;D", "猫", "é"])) == 4


@pytest.mark.parametrize("wrong", [{"image_size": 0}, {"val_fraction": 1.0}, {"max_bad_fraction": 1.5}])
def test_settings_out_of_range_are_named(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        PackConfig(**wrong)


def test_coco_groups_captions_and_names_what_it_leaves_out(tmp_path: Path) -> None:
    images, out = tmp_path / "images", tmp_path / "out"
    (images / "sub").mkdir(parents=True)
    for i, name in enumerate(["a.png", "b.jpg", "sub/c.png", "mute.png", "blank.png"]):
        (images / name).write_bytes(png(i))
    (images / "broken.png").write_bytes(png()[:30])
    names = {
        "a.png": ["one ", "two\nlines", " ", "three"],
        "b.jpg": ["b"],
        "sub/c.png": ["c"],
        "mute.png": [],
        "blank.png": ["\n"],
        "broken.png": ["x"],
        "gone.png": ["x"],
    }
    coco_json(tmp_path / "toy.json", names)
    content = json.loads((tmp_path / "toy.json").read_text())
    content["annotations"].append({"image_id": 5, "caption": "nobody's"})
    content["images"].append({"id": 900, "file_name": "a.png"})
    (tmp_path / "toy.json").write_text(json.dumps(content))
    pack_coco(tmp_path / "toy.json", images, out, SMALL)
    captions = read(out)
    assert sorted(captions.pop("a.png")) == ["one", "three", "two lines"]
    assert captions == {"b.jpg": ["b"], "sub/c.png": ["c"]}
    assert {path: reason.split(":")[0] for path, reason in reasons(out).items()} == {
        "mute.png": "no captions",
        "blank.png": "no captions",
        "broken.png": "unreadable picture",
        "gone.png": "missing picture",
        "image_id 5": "captions without a picture",
        "a.png": "repeated picture",
    }
    assert read_index(out)["name"] == "toy"


def test_coco_names_wrong_files(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    with pytest.raises(FileNotFoundError, match=r"none\.json"):
        pack_coco(tmp_path / "none.json", tmp_path / "images", tmp_path / "out", SMALL)
    coco_json(tmp_path / "toy.json", {"a.png": ["a"]})
    with pytest.raises(FileNotFoundError, match="nowhere"):
        pack_coco(tmp_path / "toy.json", tmp_path / "nowhere", tmp_path / "out", SMALL)
    instances = {"images": [{"id": 1, "file_name": "a.png"}], "annotations": [{"image_id": 1, "bbox": []}]}
    for text in ("{", "[]", "{}", '{"images": [1], "annotations": []}', json.dumps(instances)):
        (tmp_path / "wrong.json").write_text(text)
        with pytest.raises(ValueError, match=r"wrong\.json is not a COCO captions file"):
            pack_coco(tmp_path / "wrong.json", tmp_path / "images", tmp_path / "out", SMALL)
    assert not (tmp_path / "out").exists()


def test_img2dataset_reads_captions_and_names_what_it_leaves_out(tmp_path: Path) -> None:
    folder, out = tmp_path / "in", tmp_path / "out"
    meta = json.dumps({"caption": "from json", "url": "x"}).encode()
    files = {
        "0.jpg": png(),
        "0.txt": b" two\nlines ",
        "0.json": meta,
        "1.PNG": png(),
        "1.json": meta,
        "2.webp": png(),
        "2.txt": b"",
        "2.json": meta,
        "bare.txt": b"no picture",
        "bare.json": b"{}",
        "mute.jpg": png(),
        "mute.json": b'{"caption": null}',
        "odd.jpg": png(),
        "odd.json": b"{",
        "latin.jpg": png(),
        "latin.txt": "été".encode("latin-1"),
        "broken.jpg": BROKEN,
        "broken.txt": b"broken",
    }
    tar(folder / "00000.tar", files)
    tar(folder / "00001.tar", {"0.jpg": png(), "0.txt": "the key of another tar, été".encode()})
    (folder / "00000.parquet").write_bytes(b"")
    pack_img2dataset(folder, out, SMALL)
    assert read(out) == {
        "00000/0.jpg": ["two lines"],
        "00000/1.png": ["from json"],
        "00000/2.webp": ["from json"],
        "00001/0.jpg": ["the key of another tar, été"],
    }
    assert {path: reason.split(":")[0] for path, reason in reasons(out).items()} == {
        "00000/bare": "no image",
        "00000/mute.jpg": "no captions",
        "00000/odd.jpg": "unreadable captions",
        "00000/latin.jpg": "unreadable captions",
        "00000/broken.jpg": "unreadable picture",
    }


def test_img2dataset_files_give_the_same_as_tars(tmp_path: Path) -> None:
    for shard in ("00000", "00001"):
        files = {}
        for i in range(6):
            files |= {f"{shard}{i:04d}.jpg": png(i), f"{shard}{i:04d}.txt": b"text", f"{shard}{i:04d}.json": b"{}"}
        tar(tmp_path / "tars" / f"{shard}.tar", files)
        (tmp_path / "files" / shard).mkdir(parents=True)
        for name, data in files.items():
            (tmp_path / "files" / shard / name).write_bytes(data)
    pack_img2dataset(tmp_path / "tars", tmp_path / "a" / "out", SMALL)
    pack_img2dataset(tmp_path / "files", tmp_path / "b" / "out", SMALL)
    assert splits(tmp_path / "a" / "out") == splits(tmp_path / "b" / "out")
    for file in (tmp_path / "a" / "out").glob("*.tar"):
        assert file.read_bytes() == (tmp_path / "b" / "out" / file.name).read_bytes()


def test_a_truncated_tar_gives_what_is_before_the_break_and_is_named(tmp_path: Path) -> None:
    """Cut at every block and in between: no sample that was whole is lost, and the break is never silent."""
    files = {}
    for i in range(3):
        files |= {f"{i}.jpg": png(i), f"{i}.txt": b"text"}
    tar(tmp_path / "whole.tar", files)
    whole = (tmp_path / "whole.tar").read_bytes()
    with tarfile.open(tmp_path / "whole.tar") as file:
        ends = [member.offset_data + member.size for member in file][1::2]  # of the captions
    for length in range(0, ends[-1] + 512, 128):
        folder, out = tmp_path / f"in{length}", tmp_path / f"out{length}"
        folder.mkdir()
        tar(folder / "00000.tar", {"a.jpg": png(), "a.txt": b"a"})
        (folder / "00001.tar").write_bytes(whole[:length])
        pack_img2dataset(folder, out, PackConfig(image_size=8, val_fraction=0.0))
        expected = {f"00001/{i}.jpg" for i, end in enumerate(ends) if end <= length}
        assert read(out).keys() == {"00000/a.jpg"} | expected, length
        assert reasons(out)["00001.tar"].startswith("broken tar"), length


def test_a_tar_with_a_broken_header_inside_is_named(tmp_path: Path) -> None:
    files = {f"{i}.{ext}": png() if ext == "jpg" else b"text" for i in range(3) for ext in ("jpg", "txt")}
    tar(tmp_path / "in" / "00000.tar", files)
    with tarfile.open(tmp_path / "in" / "00000.tar") as file:
        offset = file.getmember("1.jpg").offset
    data = bytearray((tmp_path / "in" / "00000.tar").read_bytes())
    data[offset : offset + 512] = b"x" * 512
    (tmp_path / "in" / "00000.tar").write_bytes(data)
    pack_img2dataset(tmp_path / "in", tmp_path / "out", PackConfig(image_size=8, val_fraction=0.0))
    assert read(tmp_path / "out") == {"00000/0.jpg": ["text"]}
    assert list(reasons(tmp_path / "out")) == ["00000.tar"]


def test_repeated_files_of_a_tar_are_named(tmp_path: Path) -> None:
    path, out = tmp_path / "in" / "00000.tar", tmp_path / "out"
    tar(path, {"a.jpg": png(1), "a.JPG": png(2), "a.txt": b"first", "b.jpg": png(), "b.txt": b"b"}, ordered=False)
    with tarfile.open(path, "a") as file:
        file.addfile(tarfile.TarInfo("a.jpg"), io.BytesIO())
    (tmp_path / "in" / "00000").mkdir()
    (tmp_path / "in" / "00000" / "x.jpg").write_bytes(png())
    pack_img2dataset(path.parent, out, SMALL)
    assert read(out) == {"00000/a.jpg": ["first"], "00000/b.jpg": ["b"]}
    assert {path: reason.split(":")[0] for path, reason in reasons(out).items()} == {
        "00000/a.jpg": "repeated file",
        "00000/x.jpg": "image beside tars",
    }
    assert len(json.loads((out / "skipped.json").read_text())) == 3


def test_dotted_names_are_samples_of_their_own(tmp_path: Path) -> None:
    names = [f"{i:03d}" for i in range(4)] + [f"holiday.{i:03d}" for i in range(6)] + ["v1.2 a/b.c"]
    files = {f"{name}{ext}": png() if ext == ".jpg" else name.encode() for name in names for ext in (".jpg", ".txt")}
    others = {"mask.seg.png": png(), "000.mask.png": png(), "000.class.txt": b"7"}  # the last two belong to "000"
    tar(tmp_path / "in" / "00000.tar", {**files, **others})
    pack_img2dataset(tmp_path / "in", tmp_path / "out", SMALL)
    assert read(tmp_path / "out") == {f"00000/{name}.jpg": [name] for name in names}
    assert reasons(tmp_path / "out").keys() == {"00000/mask.seg.png"}


@pytest.mark.parametrize("name", ["00000.tar", "00000.tar.gz", "00000.tgz", "00000.TAR", "00000.tar.xz"])
@pytest.mark.parametrize("mode", ["w", "w:gz", "w:xz"])
def test_tars_are_read_in_any_order_and_compression(tmp_path: Path, name: str, mode: str) -> None:
    parts = [(f"{i:03d}{ext}", png(9 * i) if ext == ".png" else b"grey") for ext in (".txt", ".png") for i in range(14)]
    folder = tmp_path / "in" / "part_a"
    folder.mkdir(parents=True)
    with tarfile.open(folder / name, mode) as file:
        for part, data in parts[::-1]:
            info = tarfile.TarInfo(part)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    report = pack_img2dataset(tmp_path / "in", tmp_path / "out", SMALL)
    assert report.skipped == []
    found = greys(tmp_path / "out")
    assert found.keys() == {f"part_a/00000/{i:03d}.png" for i in range(14)}
    assert all(abs(grey - 9 * int(path[-7:-4])) <= 1 for path, grey in found.items())


@pytest.mark.parametrize("compress", [bz2.compress, lzma.compress])
def test_a_damaged_compressed_tar_is_named(tmp_path: Path, compress: Callable[[bytes], bytes]) -> None:
    randomness = random.Random(0)
    for name in ("0.tar", "1.tar"):
        tar(tmp_path / "in" / name, {f"{i}.{ext}": png(i) if ext == "jpg" else randomness.randbytes(3000).hex().encode()
                                     for i in range(9) for ext in ("jpg", "txt")})  # fmt: skip
    content = bytearray(compress((tmp_path / "in" / "1.tar").read_bytes()))
    content[len(content) // 2] ^= 255
    (tmp_path / "in" / "1.tar").write_bytes(content)
    pack_img2dataset(tmp_path / "in", tmp_path / "out", PackConfig(image_size=8, max_bad_fraction=0.5))
    assert reasons(tmp_path / "out")["1.tar"].startswith("broken tar")
    assert Counter(path.partition("/")[0] for path in read(tmp_path / "out"))["0"] == 9


def test_tars_that_are_none_and_a_compressed_one_cut_short_are_named(tmp_path: Path) -> None:
    files = {f"{i}.{ext}": os.urandom(3000) if ext == "txt" else png() for i in range(9) for ext in ("jpg", "txt")}
    tar(
        tmp_path / "in" / "0.tar",
        {name: data if name[-1] == "g" else data.hex().encode() for name, data in files.items()},
    )
    plain = (tmp_path / "in" / "0.tar").read_bytes()
    (tmp_path / "in" / "1.tar.gz").write_bytes(gzip.compress(plain)[:-9000])
    (tmp_path / "in" / "2.tar").write_bytes(b"<html>not found</html>")
    (tmp_path / "in" / "3.tar.gz").write_bytes(plain)
    (tmp_path / "in" / "3.tar").write_bytes(plain)
    pack_img2dataset(tmp_path / "in", tmp_path / "out", PackConfig(image_size=8, max_bad_fraction=0.5))
    why = reasons(tmp_path / "out")
    assert why["1.tar.gz"].startswith("broken tar")
    assert why["2.tar"].startswith("broken tar")
    assert sum(reason.startswith("repeated tar") for reason in why.values()) == 9
    shards = Counter(path.partition("/")[0] for path in read(tmp_path / "out"))
    assert (shards["0"], shards["3"]) == (9, 9)
    assert 0 < shards["1"] < 9


def test_a_folder_that_may_not_be_read_beside_tars_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_img2dataset(tmp_path / "in", 25)
    monkeypatch.setattr(img2dataset, "walk", partial(locked, img2dataset.walk))
    pack_img2dataset(tmp_path / "in", tmp_path / "out", SMALL)
    assert len(read(tmp_path / "out")) == 25
    assert reasons(tmp_path / "out") == {"locked": "unreadable folder"}


def locked(walk: Callable, path: Path, unreadable: list[Skipped]) -> Iterator:
    unreadable.append(Skipped("locked", "unreadable folder"))
    return walk(path, unreadable)


def test_img2dataset_names_wrong_folders(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        pack_img2dataset(tmp_path / "nowhere", tmp_path / "out", SMALL)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jpg").write_bytes(png())
    with pytest.raises(ValueError, match=r"neither \.tar files nor folders"):
        pack_img2dataset(tmp_path / "in", tmp_path / "out", SMALL)


def test_huggingface_takes_texts_and_lists_and_names_rows_left_out(tmp_path: Path) -> None:
    captions = [["one", " two\nlines ", ""], ["b"], [], ["no picture"], ["broken"], [None, "c"]]
    save(tmp_path / "in", [png(), png(), png(), None, BROKEN, png()], captions)
    pack_huggingface(str(tmp_path / "in"), tmp_path / "out", SMALL)
    assert read(tmp_path / "out") == {"row 0": ["one", "two lines"], "row 1": ["b"], "row 5": ["c"]}
    assert {path: reason.split(":")[0] for path, reason in reasons(tmp_path / "out").items()} == {
        "row 2": "no captions",
        "row 3": "no picture",
        "row 4": "unreadable picture",
    }


def test_huggingface_names_missing_columns_and_those_there_are(tmp_path: Path) -> None:
    save(tmp_path / "in", [png(), png()], ["a", "b"], image="jpg", caption="text")
    with pytest.raises(ValueError, match=r"no column 'image'; set image_column to one of: jpg, text"):
        pack_huggingface(str(tmp_path / "in"), tmp_path / "out", SMALL)
    with pytest.raises(ValueError, match=r"no column 'caption'; set caption_column to one of: jpg, text"):
        pack_huggingface(str(tmp_path / "in"), tmp_path / "out", SMALL, image_column="jpg")
    assert not (tmp_path / "out").exists()
    pack_huggingface(str(tmp_path / "in"), tmp_path / "out", SMALL, image_column="jpg", caption_column="text")
    assert read(tmp_path / "out") == {"row 0": ["a"], "row 1": ["b"]}


def test_huggingface_reads_dictionaries_of_splits_and_streams_data_files(tmp_path: Path, datasets: ModuleType) -> None:
    save(tmp_path / "one", [png(), png()], ["a", "b"])
    data = datasets.load_from_disk(str(tmp_path / "one"))
    datasets.DatasetDict(train=data, small=data.select([0])).save_to_disk(str(tmp_path / "dict"))
    fixed = PackConfig(image_size=8, split="train")
    pack_huggingface(str(tmp_path / "dict"), tmp_path / "a", fixed, hf_split="small")
    assert read(tmp_path / "a") == {"row 0": ["a"]}
    with pytest.raises(ValueError, match="no split 'test'; set hf_split to one of: train, small"):
        pack_huggingface(str(tmp_path / "dict"), tmp_path / "x", fixed, hf_split="test")

    (tmp_path / "parquet").mkdir()
    data.to_parquet(str(tmp_path / "parquet" / "train.parquet"))
    pack_huggingface(str(tmp_path / "parquet"), tmp_path / "b", fixed)
    assert read(tmp_path / "b") == {"row 0": ["a"], "row 1": ["b"]}
    with pytest.raises(ValueError, match=r"hf_split=test: .*train"):
        pack_huggingface(str(tmp_path / "parquet"), tmp_path / "x", fixed, hf_split="test")

    (tmp_path / "files").mkdir()  # pictures apart from the table
    (tmp_path / "files" / "a.png").write_bytes(png(7))
    (tmp_path / "files" / "metadata.jsonl").write_text('{"file_name": "a.png", "caption": "seven"}\n')
    pack_huggingface(str(tmp_path / "files"), tmp_path / "c", fixed)
    assert (read(tmp_path / "c"), greys(tmp_path / "c")) == ({"row 0": ["seven"]}, {"row 0": 7})


def test_huggingface_streams_that_know_their_columns_by_rows_alone(
    tmp_path: Path, datasets: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    def rows() -> Iterator[dict[str, Any]]:
        yield from ({"image": png(), "caption": "a", "n": i} for i in range(3))

    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.IterableDataset.from_generator(rows))
    pack_huggingface("name/toy", tmp_path / "out", SMALL)
    assert len(read(tmp_path / "out")) == 3
    assert read_index(tmp_path / "out")["name"] == "toy"
    with pytest.raises(ValueError, match="one of: image, caption, n"):
        pack_huggingface("name/toy", tmp_path / "out", SMALL, caption_column="text")


@pytest.mark.usefixtures("datasets")
def test_huggingface_without_its_package_or_data_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        pack_huggingface(str(tmp_path / "nowhere"), tmp_path / "out", SMALL)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match="pip install datasets"):
        pack_huggingface(str(tmp_path), tmp_path / "out", SMALL)


def test_the_command_packs_each_source(tmp_path: Path) -> None:
    make_coco(tmp_path / "coco", 4)
    make_img2dataset(tmp_path / "laion", 4)
    make_huggingface(tmp_path / "hf", 4)
    for arguments in (
        ["source=coco", f"path={tmp_path / 'coco' / 'captions_toy.json'}", f"images={tmp_path / 'coco' / 'images'}"],
        ["source=img2dataset", f"path={tmp_path / 'laion'}"],
        ["source=huggingface", f"path={tmp_path / 'hf'}"],
    ):
        out = tmp_path / arguments[0]
        command([*arguments, f"out='{out}'", "image_size=16", "split=test"])
        assert read_index(out)["image_size"] == 16
        assert {name: len(paths) for name, paths in splits(out).items()} == {"test": 4}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["source=coco", "path=x.json"], "images= is missing"),
        (["source=img2dataset"], "path= is missing"),
        (["source=huggingface"], "path= is missing"),
        (["source=emoji", "path=x"], "path is no setting; "),
        (["source=folder", "path=x", "images=y"], "images is no setting; did you mean image_size?"),
        (["source=folder", "path=x", "max_bad_fraction=0.5"], "max_bad_fraction is no setting"),
        (["source=coco", "path=x", "images=y", "hf_split=test"], "hf_split is no setting; did you mean split?"),
        (["source=img2dataset", "path=x", "skin_tones=true"], "skin_tones is no setting"),
        (["source=img2dataset", "path=/nowhere", "max_bad_fraction=2"], "max_bad_fraction must lie between 0 and 1"),
        (["source=img2dataset", "path=/nowhere", "max_bad_share=0.2"], "say max_bad_fraction="),
        (["source=rainbow", "train_share=0.2"], "say train_fraction="),
        (["source=rainbow", "image_size=64"], "image_size is no setting"),
        (["source=shards", "path=/nowhere"], "vae= is missing"),
        (["source=shards", "path=x", "vae=y", "image_size=64"], "image_size is no setting"),
        (["encode=true", "path=x", "vae=y"], "say source=shards"),
        (["source=folder", "path=x", "val_share=1"], "val_fraction must be at least 0 and below 1"),
    ],
)
def test_the_command_names_settings_that_do_not_go_together(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], wrong: list[str], message: str
) -> None:
    with pytest.raises(SystemExit):
        command([*wrong, f"out={tmp_path / 'out'}"])
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
