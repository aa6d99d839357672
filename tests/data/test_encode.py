"""Token shards hold what the image tokenizer says, survive a kill, and are refused where they do not belong."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image

import dalle_pytorch
from dalle_pytorch.checkpoints.checkpoint import describe_tokenizer
from dalle_pytorch.data import encode
from dalle_pytorch.data.config import DataConfig
from dalle_pytorch.data.datamodule import TextImageDataModule
from dalle_pytorch.data.encode import SETTINGS_NAME, EncodeConfig, encode_folder
from dalle_pytorch.data.samples import sample_rng
from dalle_pytorch.data.shards import ShardDataset, ShardWriter
from dalle_pytorch.data.tokens import TokenShards, smallest_type


def write_pictures(folder, *, broken=(), train=11, size=16):
    with ShardWriter(folder, name="greys", image_size=size, samples_per_shard=3, compress=True) as writer:
        for split, count in (("train", train), ("val", 4)):
            for i in range(count):
                data = BytesIO()
                Image.effect_noise((size, size), 40 + 9 * i).save(data, "PNG")
                content = b"nonsense" if (split, i) in broken else data.getvalue()
                writer.write(split, f"{split}{i}", content, "png", {"captions": [f"grey {i}", f"number {i}"]})
    return str(folder)


@pytest.fixture
def vae_path(tiny_vae, tmp_path):
    dalle_pytorch.save(tiny_vae, tmp_path / "vae.safetensors")
    return str(tmp_path / "vae.safetensors")


@pytest.fixture
def pictures(tmp_path):
    return write_pictures(tmp_path / "pictures")


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_shards_hold_every_variant_of_every_picture(pictures, vae_path, tiny_vae, tmp_path):
    config = EncodeConfig(vae=vae_path, path=pictures, crops=3, jitter=2)
    encode_folder(config, tmp_path / "tokens", workers=1)
    train, val = (TokenShards(tmp_path / "tokens", split) for split in ("train", "val"))
    assert train.index["dtype"] == "uint8"
    assert train.tokenizer == describe_tokenizer(tiny_vae)
    assert train.keys() == ShardDataset(pictures, "train").keys()
    assert train.captions() == ShardDataset(pictures, "train").captions()
    data = TextImageDataModule(DataConfig(path=pictures, batch_size=4, jitter=2), image_size=16, seed=0)
    for index in range(len(train)):
        images = torch.stack([data.train_set.image(index, sample_rng(0, variant, index)) for variant in range(3)])
        assert torch.equal(train.tokens(index), tiny_vae.encode(images))
    images = torch.stack([data.val_set[index]["image"] for index in range(len(val))])
    assert torch.equal(torch.cat([val.tokens(index) for index in range(len(val))]), tiny_vae.encode(images))


def test_bytes_depend_on_neither_workers_nor_a_kill(pictures, vae_path, tmp_path):
    settings = {"vae": vae_path, "path": pictures, "crops": 2, "jitter": 1}
    encode_folder(EncodeConfig(**settings), tmp_path / "whole", workers=1)
    encode_folder(EncodeConfig(**settings), tmp_path / "shared", workers=2)
    killed = tmp_path / "killed"
    program = f"""
import time
from dalle_pytorch.data import encode
original = encode.encode_shard
encode.encode_shard = lambda *job: (original(*job), time.sleep(1))  # leaves time for the kill
encode.encode_folder(encode.EncodeConfig(**{settings!r}), {str(killed)!r}, workers=1)
"""
    process = subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not list(killed.glob("*.tar.json")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (killed / SETTINGS_NAME).is_file()
    with pytest.raises(FileNotFoundError, match="interrupted"):
        TokenShards(killed, "train")
    with pytest.raises(FileExistsError, match="another crops"):
        encode_folder(EncodeConfig(**{**settings, "crops": 1}), killed)
    first = next(killed.glob("*.tar.json")).with_suffix("")
    before = first.stat().st_mtime_ns
    encode_folder(EncodeConfig(**settings), killed, workers=1)
    assert first.stat().st_mtime_ns == before  # what was finished is not done again
    assert contents(tmp_path / "whole") == contents(tmp_path / "shared") == contents(killed)


def test_a_finished_folder_is_never_overwritten(pictures, vae_path, tmp_path):
    config = EncodeConfig(vae=vae_path, path=pictures)
    encode_folder(config, tmp_path / "tokens", workers=1)
    with pytest.raises(FileExistsError, match="nothing is overwritten"):
        encode_folder(config, tmp_path / "tokens")
    with pytest.raises(ValueError, match="crops=2 without jitter"):
        EncodeConfig(vae=vae_path, path=pictures, crops=2)
    with pytest.raises(ValueError, match="device=gpu is not there"):
        encode_folder(config, tmp_path / "other", device="gpu")
    with pytest.raises(ValueError, match=r"train_splits.*dev"):
        encode_folder(EncodeConfig(vae=vae_path, path=pictures, train_splits=["dev"]), tmp_path / "other")


def test_unreadable_pictures_are_named_and_too_many_are_fatal(vae_path, tmp_path):
    path = write_pictures(tmp_path / "pictures", broken=[("train", 4)])
    config = EncodeConfig(vae=vae_path, path=path, max_bad_fraction=0.05)
    with pytest.raises(ValueError, match=r"(?s)1 of the 11 samples of 'train'.*max_bad_fraction=0\.05.*train4"):
        encode_folder(config, tmp_path / "tokens", workers=1)
    assert not (tmp_path / "tokens/index.json").exists()
    encode_folder(EncodeConfig(vae=vae_path, path=path, max_bad_fraction=0.1), tmp_path / "tokens", workers=1)
    train = TokenShards(tmp_path / "tokens", "train")
    assert train.keys() == [f"train{i}" for i in range(11) if i != 4]
    (left_out,) = json.loads((tmp_path / "tokens/skipped.json").read_text())
    assert left_out["path"] == "train4"
    assert "cannot be decoded" in left_out["reason"]


def test_training_reads_tokens_as_it_would_make_them(pictures, vae_path, tiny_vae, tmp_path):
    """The same batches, bit for bit, as from the pictures with token_crops=3."""
    encode_folder(EncodeConfig(vae=vae_path, path=pictures, crops=3, jitter=2, seed=5), tmp_path / "tokens", workers=1)
    cached = TextImageDataModule(
        DataConfig(path=pictures, batch_size=4, jitter=2, token_crops=3), image_size=16, seed=5
    )
    cached.cache_image_tokens(tiny_vae)
    stored = TextImageDataModule(
        DataConfig(path=str(tmp_path / "tokens"), batch_size=4), image_size=16, seed=5, tokens=True
    )
    stored.check_tokenizer(describe_tokenizer(tiny_vae), "vae")
    for make in ("train_dataloader", "val_dataloader"):
        for a, b in zip(getattr(cached, make)(), getattr(stored, make)(), strict=True):
            assert a["captions"] == b["captions"]
            assert torch.equal(a["image_tokens"], b["image_tokens"])


def test_damaged_or_foreign_tokens_are_refused_by_name(pictures, vae_path, tiny_vae, tmp_path):
    encode_folder(EncodeConfig(vae=vae_path, path=pictures), tmp_path / "tokens", workers=1)
    config = DataConfig(path=str(tmp_path / "tokens"), batch_size=4)
    data = TextImageDataModule(config, image_size=16, seed=0, tokens=True)
    with torch.no_grad():
        tiny_vae.codebook.weight.mul_(2)
    with pytest.raises(ValueError, match=r"not of mine\.safetensors: tokens_sha256.*encode"):
        data.check_tokenizer(describe_tokenizer(tiny_vae), "mine.safetensors")
    with pytest.raises(ValueError, match=r"16 pixels.*32"):
        TextImageDataModule(config, image_size=32, seed=0, tokens=True)
    with pytest.raises(ValueError, match=r"augmented when they were encoded: leave out data\.jitter"):
        TextImageDataModule(DataConfig(**{**vars(config), "jitter": 1}), image_size=16, seed=0, tokens=True)
    with pytest.raises(ValueError, match=r"holds image tokens.*pictures"):
        TextImageDataModule(config, image_size=16, seed=0)
    shard = tmp_path / "tokens/train-00001.tar"
    content = bytearray(shard.read_bytes())
    place = content.index(b"\x93NUMPY") + 128  # the first token
    content[place] = 200
    shard.write_bytes(content)
    with pytest.raises(ValueError, match=r"train-00001\.tar.*SHA-256"):
        TextImageDataModule(config, image_size=16, seed=0, tokens=True)
    unchecked = TextImageDataModule(DataConfig(**{**vars(config), "verify": False}), image_size=16, seed=0, tokens=True)
    with pytest.raises(ValueError, match="'train3' has image tokens up to 200, the codebook 12"):
        unchecked.train_set.shards.tokens(3)


@pytest.mark.parametrize(
    ("codebook_size", "kind"), [(256, np.uint8), (257, np.uint16), (8192, np.uint16), (70_000, np.int32)]
)
def test_the_smallest_type_that_holds_every_code(codebook_size, kind):
    assert smallest_type(codebook_size) == kind


def test_a_bad_sample_gives_its_place_to_the_next_and_too_many_are_fatal(tmp_path, caplog):
    path = write_pictures(tmp_path / "pictures", broken=[("train", 4)])
    data = TextImageDataModule(DataConfig(path=path, batch_size=11, max_bad_fraction=0.1), image_size=16, seed=0)
    batch = next(iter(data.train_dataloader()))
    assert len(batch["captions"]) == 11
    assert "train4" in caplog.text
    assert torch.equal(data.train_set[0, 4]["image"], data.train_set[0, 5]["image"])
    assert caplog.text.count("skipped") == 1
    with pytest.raises(ValueError, match=r"(?s)1 of the 11.*data\.max_bad_fraction.*train4"):
        next(iter(TextImageDataModule(DataConfig(path=path, batch_size=11), image_size=16, seed=0).train_dataloader()))


def test_a_full_disk_leaves_what_the_same_call_goes_on_from(pictures, vae_path, tmp_path, monkeypatch):
    config = EncodeConfig(vae=vae_path, path=pictures)
    original, written = encode.TarWriter.write, []

    def write(tar, sample):
        written.append(sample["__key__"])
        if len(written) == 5:  # in the second shard
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(tar, sample)

    with monkeypatch.context() as patch:
        patch.setattr(encode.TarWriter, "write", write)
        with pytest.raises(OSError, match="No space left"):
            encode_folder(config, tmp_path / "tokens", workers=1)
    assert sorted(contents(tmp_path / "tokens")) == [SETTINGS_NAME, "train-00000.tar", "train-00000.tar.json"]
    encode_folder(config, tmp_path / "tokens", workers=1)
    encode_folder(config, tmp_path / "whole", workers=1)
    assert contents(tmp_path / "tokens") == contents(tmp_path / "whole")
