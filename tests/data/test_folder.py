"""Packing a folder of pictures with caption files."""

import io
import json
import os
import struct
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from dalle_pytorch.commands.prepare_data import main
from dalle_pytorch.data.folder import pack_folder
from dalle_pytorch.data.index import hash_share, read_index
from dalle_pytorch.data.shards import ShardDataset
from dalle_pytorch.images import decode_image

# Orientation 6, and an XResolution that is text in place of a fraction.
_ENTRIES = struct.pack("<HHII", 0x0112, 3, 1, 6) + struct.pack("<HHI4s", 0x011A, 2, 4, b"72")
DAMAGED_EXIF = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + _ENTRIES + bytes(4)


def command(arguments: list[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["prepare_data.py", *arguments])
        main()


def picture(path: Path, colour: str = "red", size: tuple[int, int] = (12, 8)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


def captioned(path: Path, text: str, colour: str = "red") -> None:
    picture(path, colour)
    path.with_suffix(".txt").write_text(text, encoding="utf-8")


def read(out: Path) -> dict[str, list[str]]:
    data = ShardDataset(out, "train+val")
    return {sample.meta["path"]: sample.meta["captions"] for sample in data}


def reasons(out: Path) -> dict[str, str]:
    return {item["path"]: item["reason"] for item in json.loads((out / "skipped.json").read_text())}


def test_lines_are_captions_and_names_may_be_anything(tmp_path: Path) -> None:
    folder, out = tmp_path / "in", tmp_path / "out"
    captioned(folder / "a.png", "one\n\n  two  \n")
    captioned(folder / "my cat v1.2 (final).jpeg", "a cat")
    captioned(folder / "träume" / "猫.PNG", "\ufeff猫\r\n")
    captioned(folder / "b.gif", "a gif")
    captioned(folder / "c.BMP", "a bmp")
    captioned(folder / "d.webp", "a webp")
    pack_folder(folder, out, image_size=8)
    assert read(out) == {
        "a.png": ["one", "two"],
        "my cat v1.2 (final).jpeg": ["a cat"],
        "träume/猫.PNG": ["猫"],
        "b.gif": ["a gif"],
        "c.BMP": ["a bmp"],
        "d.webp": ["a webp"],
    }
    assert reasons(out) == {}


def test_only_the_line_ends_of_files_divide_captions(tmp_path: Path) -> None:
    texts = {
        "ends": ("one\r\ntwo\rthree\n", ["one", "two", "three"]),
        "nel": ("the cat waits\u0085 and sleeps", ["the cat waits and sleeps"]),
        "ls": ("a red apple\u2028on a table", ["a red apple on a table"]),
        "vt": ("a blue\x0bcup", ["a blue cup"]),
        "ff": ("a green\x0cplate", ["a green plate"]),
        "fs": ("a\x1cb\x1dc\x1ed\u2029e", ["a b c d e"]),
        "blank": ("\u200b\n&nbsp;\na cat", ["a cat"]),
    }
    for name, (text, _) in texts.items():
        picture(tmp_path / "in" / f"{name}.png")
        (tmp_path / "in" / f"{name}.txt").write_bytes(text.encode())
    pack_folder(tmp_path / "in", tmp_path / "out", image_size=8)
    assert read(tmp_path / "out") == {f"{name}.png": captions for name, (_, captions) in texts.items()}


@pytest.mark.parametrize("suffix", [".jfif", ".jpe", ".tif", ".TIFF", ".avif", ".jp2", ".ppm", ".tga", ".ico"])
def test_whatever_pillow_reads_is_an_image(tmp_path: Path, suffix: str) -> None:
    captioned(tmp_path / "in" / f"a{suffix}", "a")
    captioned(tmp_path / "in" / "b.png", "b")
    pack_folder(tmp_path / "in", tmp_path / "out", image_size=8)
    assert read(tmp_path / "out") == {f"a{suffix}": ["a"], "b.png": ["b"]}


def test_a_photo_with_damaged_metadata_is_kept(tmp_path: Path) -> None:
    captioned(tmp_path / "in" / "a.png", "a")
    captioned(tmp_path / "in" / "phone.jpg", "from a phone")
    Image.new("RGB", (90, 60)).save(tmp_path / "in" / "phone.jpg", exif=DAMAGED_EXIF)
    pack_folder(tmp_path / "in", tmp_path / "out", image_size=8)
    assert read(tmp_path / "out") == {"a.png": ["a"], "phone.jpg": ["from a phone"]}


def test_linked_folders_are_read_once(tmp_path: Path) -> None:
    folder, store = tmp_path / "in", tmp_path / "store"
    captioned(folder / "z" / "own.png", "own")
    captioned(store / "sub" / "other.png", "other")
    (store / "back").symlink_to(folder)  # a loop
    (folder / "z" / "loop").symlink_to(folder)
    (folder / "a").symlink_to(folder / "z")  # has a place of its own, which gives the name
    (folder / "more").symlink_to(store)
    (folder / "more again").symlink_to(store / "sub")
    (folder / "gone").symlink_to(tmp_path / "nowhere")
    pack_folder(folder, tmp_path / "out", image_size=8)
    assert sorted(read(tmp_path / "out").values()) == [["other"], ["own"]]
    assert "z/own.png" in read(tmp_path / "out")
    assert reasons(tmp_path / "out").keys() == {"gone"}


def test_the_folder_itself_may_be_a_link(tmp_path: Path) -> None:
    captioned(tmp_path / "store" / "a" / "a.png", "a")
    captioned(tmp_path / "store" / "b.png", "b")
    (tmp_path / "in").symlink_to(tmp_path / "store")
    pack_folder(tmp_path / "in", tmp_path / "out", image_size=8)
    assert read(tmp_path / "out") == {"a/a.png": ["a"], "b.png": ["b"]}


def test_folders_that_may_not_be_read_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a.png", "b.png", "locked/c.png"):
        captioned(tmp_path / "in" / name, "x")
    scan = os.scandir

    def refuse(path: str) -> Iterator[os.DirEntry[str]]:  # to root, no real folder is locked
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    pack_folder(tmp_path / "in", tmp_path / "out", image_size=8)
    assert reasons(tmp_path / "out") == {"locked": "unreadable folder: Permission denied"}


def test_a_stem_in_two_folders_never_pairs_across_them(tmp_path: Path) -> None:
    folder, out = tmp_path / "in", tmp_path / "out"
    captioned(folder / "cats" / "1.png", "a cat", "black")
    captioned(folder / "dogs" / "1.png", "a dog", "white")
    picture(folder / "birds" / "1.png")
    (folder / "1.txt").write_text("nobody's caption")
    pack_folder(folder, out, image_size=8)
    assert read(out) == {"cats/1.png": ["a cat"], "dogs/1.png": ["a dog"]}
    assert reasons(out).keys() == {"birds/1.png", "1.txt"}
    for sample in ShardDataset(out, "train+val"):
        grey = decode_image(sample.image, image_size=8, name=sample.key).mean().item()
        assert grey == pytest.approx(float(sample.meta["captions"] == ["a dog"]), abs=0.02)


def test_pictures_of_one_stem_share_their_captions(tmp_path: Path) -> None:
    folder, out = tmp_path / "in", tmp_path / "out"
    captioned(folder / "a.png", "a thing")
    picture(folder / "a.jpg")
    pack_folder(folder, out, image_size=8)
    assert read(out) == {"a.png": ["a thing"], "a.jpg": ["a thing"]}


def test_what_is_left_out_is_listed_with_the_reason(tmp_path: Path) -> None:
    folder, out = tmp_path / "in", tmp_path / "out"
    for i in range(3):
        captioned(folder / f"good {i}.png", "good")
    picture(folder / "no-text.png")
    captioned(folder / "blank.png", " \n\n")
    captioned(folder / "latin.png", "x")
    (folder / "latin.txt").write_bytes("été".encode("latin-1"))
    captioned(folder / "broken.png", "broken")
    (folder / "broken.png").write_bytes((folder / "broken.png").read_bytes()[:40])
    (folder / "notes.md").write_text("x")
    report = pack_folder(folder, out, image_size=8)
    assert sum(report.index["splits"].values()) == 3
    why = reasons(out)
    assert why == {item.path: item.reason for item in report.skipped}
    assert why.keys() == {"no-text.png", "blank.png", "latin.png", "broken.png", "notes.md"}
    assert why["no-text.png"].startswith("no captions")
    assert why["blank.png"].startswith("empty captions")
    assert why["latin.png"].startswith("captions not in UTF-8")
    assert why["broken.png"].startswith("unreadable picture")
    assert "1 x empty captions" in report.summary()


def test_the_split_of_a_picture_is_fixed_by_its_path(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    for i in range(40):
        captioned(folder / f"{i}.png", "x")
    pack_folder(folder, tmp_path / "a", image_size=8, val_fraction=0.3)
    pack_folder(folder, tmp_path / "again", image_size=8, val_fraction=0.3)
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes()
    val = {meta["path"] for meta in ShardDataset(tmp_path / "a", "val").metas()}
    assert val == {f"{i}.png" for i in range(40) if hash_share(f"{i}.png") < 0.3}
    pack_folder(folder, tmp_path / "none", image_size=8, val_fraction=0.0)
    assert len(ShardDataset(tmp_path / "none", "train")) == 40


def test_the_smallest_folder_has_both_splits(tmp_path: Path) -> None:
    captioned(tmp_path / "in" / "a.png", "a")
    captioned(tmp_path / "in" / "b.png", "b")
    report = pack_folder(tmp_path / "in", tmp_path / "out", image_size=8, val_fraction=0.01)
    assert report.index["splits"] == {"train": 1, "val": 1}


def test_nothing_usable_is_an_error_that_tells_why(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        pack_folder(tmp_path / "nowhere", tmp_path / "out")
    picture(tmp_path / "in" / "lonely.png")
    with pytest.raises(ValueError, match=r"lonely\.png: no captions"):
        pack_folder(tmp_path / "in", tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_pictures_are_scaled_to_the_middle_square(tmp_path: Path) -> None:
    image = Image.new("RGB", (30, 10), "black")
    image.paste("white", (10, 0, 20, 10))
    (tmp_path / "in").mkdir()
    image.save(tmp_path / "in" / "a.png")
    (tmp_path / "in" / "a.txt").write_text("white")
    pack_folder(tmp_path / "in", tmp_path / "out", image_size=5, val_fraction=0.0)
    sample = ShardDataset(tmp_path / "out", "train")[0]
    with Image.open(io.BytesIO(sample.image)) as stored:
        assert stored.size == (5, 5)
    assert decode_image(sample.image, image_size=5, name="a").mean().item() > 0.9


def test_the_command_packs_a_folder_and_names_mistakes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    captioned(tmp_path / "in" / "a.png", "a")
    captioned(tmp_path / "in" / "b.png", "b")
    arguments = ["source=folder", f"path={tmp_path / 'in'}", f"out={tmp_path / 'out'}", "image_size=16"]
    command(arguments)
    assert read(tmp_path / "out") == {"a.png": ["a"], "b.png": ["b"]}
    assert read_index(tmp_path / "out")["image_size"] == 16
    for name in ("val_share", "val_fraction"):
        command([*arguments[:2], f"out={tmp_path / name}", f"{name}=0"])
        assert read_index(tmp_path / name)["splits"] == {"train": 2}
    for wrong, message in [
        (arguments, "nothing is overwritten"),
        (["source=folder", f"out={tmp_path / 'x'}"], "path= is missing"),
        (["source=foldr", f"out={tmp_path / 'x'}"], "source=foldr: no such option; did you mean folder?"),
        (["source=rainbow"], "out= is missing"),
        (["styels=[noto]"], "did you mean styles"),
    ]:
        with pytest.raises(SystemExit):
            command(wrong)
        assert message in capsys.readouterr().err
