import http.server
import io
import json
import random
import threading
from functools import partial
from io import BytesIO
from itertools import islice
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from webdataset import TarWriter

from dalle_pytorch.data.config import DataConfig
from dalle_pytorch.data.datamodule import TextImageDataModule
from dalle_pytorch.data.shards import ShardWriter
from dalle_pytorch.data.splits import open_splits
from dalle_pytorch.data.stream import ALLOWED, StreamBatches, StreamLoader, read_captions
from dalle_pytorch.errors import UserError
from dalle_pytorch.text import BPETokenizer

SHARDS, EACH = 3, 5  # samples of a shard
CAPTIONS = [f"grey {i}" for i in range(SHARDS * EACH)]


def picture(i, size=16):
    data = BytesIO()
    Image.linear_gradient("L").resize((size, size)).point(lambda v: max(0, v - 9 * i)).save(data, "PNG")
    return data.getvalue()


def tokens(i):
    data = BytesIO()
    np.save(data, np.array([[i] * 16, [i + 100] * 16], dtype=np.uint8))
    return data.getvalue()


def sample(i, **files):
    files = files or {"png": picture(i), "json": json.dumps({"captions": [CAPTIONS[i]]}).encode()}
    return {"__key__": f"key{i}", **files}


def write(folder, samples=None):
    """Shards of five samples each; the pattern of their paths."""
    folder.mkdir()
    samples = samples or [sample(i) for i in range(SHARDS * EACH)]
    for number in range(SHARDS):
        with TarWriter(str(folder / f"s-{number}.tar"), encoder=False) as tar:
            for one in samples[number * EACH : (number + 1) * EACH]:
                tar.write(one)
    return f"{folder}/s-{{0..{SHARDS - 1}}}.tar"


@pytest.fixture
def pattern(tmp_path):
    return write(tmp_path / "remote")


def module(path, *, seed=0, **settings):
    settings = {"batch_size": 4, "jitter": 2, "epoch_size": 20, "shuffle_buffer": 8, **settings}
    path = path if ":" in path else f"file://{path}"
    return TextImageDataModule(DataConfig(path=path, **settings), image_size=16, seed=seed)


def captions(batches):
    return [caption for batch in batches for caption in batch["captions"]]


def same(a, b):
    return a.keys() == b.keys() and all(
        torch.equal(a[k], b[k]) if isinstance(a[k], torch.Tensor) else a[k] == b[k] for k in a
    )


def loader(data, **settings):
    return StreamLoader(data.train_set, data.train_collate, **settings)


def test_every_sample_comes(pattern):
    assert set(captions(module(pattern, epoch_size=300).train_dataloader())) == set(CAPTIONS)


def test_a_batch_is_what_the_models_read(pattern):
    data = module(pattern)
    data.set_text(BPETokenizer.train(CAPTIONS, 270), 12, truncate=False, dropout=0.3)
    assert len(data.train_set) == 20
    assert len(data.train_dataloader()) == 5
    batches = list(data.train_dataloader())
    assert len(batches) == 5
    for batch in batches:
        assert batch["images"].shape == (4, 3, 16, 16)
        assert batch["images"].dtype == torch.float32
        assert 0 <= batch["images"].min() <= batch["images"].max() <= 1
        assert batch["text_tokens"].shape == (4, 12)
        assert len(batch["captions"]) == 4


def test_pictures_are_those_of_the_shards(pattern):
    batch = next(iter(module(pattern, jitter=0).train_dataloader()))
    for image, caption in zip(batch["images"], batch["captions"], strict=True):
        stored = np.array(Image.open(io.BytesIO(picture(CAPTIONS.index(caption)))).convert("RGB"))
        assert torch.equal((image * 255).round().byte(), torch.from_numpy(stored).permute(2, 0, 1))


def test_batches_are_a_function_of_the_seed_and_the_epoch(pattern):
    first, again = module(pattern).train_dataloader(), module(pattern).train_dataloader()
    epochs = [list(first), list(first)]
    random.seed(5)
    torch.manual_seed(5)
    assert all(same(a, b) for a, b in zip([*again, *again], epochs[0] + epochs[1], strict=True))
    assert captions(epochs[0]) != captions(epochs[1])
    assert captions(module(pattern, seed=1).train_dataloader()) != captions(epochs[0])


def test_processes_draw_differently_and_share_a_batch(pattern):
    data = module(pattern)
    parts = [list(loader(data, rank=rank, world_size=2)) for rank in (0, 1)]
    assert [len(part) for part in parts] == [5, 5]
    assert all(len(batch["captions"]) == len(batch["images"]) == 2 for part in parts for batch in part)
    assert captions(parts[0]) != captions(parts[1])
    with pytest.raises(ValueError, match=r"batch_size \(4\).*3 processes"):
        loader(data, world_size=3)


def test_a_step_is_cut_into_micro_batches(pattern):
    data = module(pattern, micro_batch_size=1)
    data.set_text(BPETokenizer.train(CAPTIONS, 270), 12, truncate=False, dropout=0.0)
    reader = loader(data, world_size=2)
    batches = list(reader)
    assert (reader.accumulate, len(reader), len(batches)) == (2, 10, 10)
    for first, second in zip(batches[::2], batches[1::2], strict=True):
        assert first["step_captions"] == second["step_captions"] == captions([first, second])
        assert torch.equal(first["step_text_tokens"], torch.cat([first["text_tokens"], second["text_tokens"]]))
    assert len(list(reader)) == 10
    with pytest.raises(UserError, match=r"micro_batch_size \(1\).*|data\.batch_size"):
        loader(data, world_size=3)


def test_workers_draw_differently_and_share_an_epoch(pattern):
    data = module(pattern, num_workers=2)
    batches = list(data.train_dataloader())
    assert len(batches) == 5
    alone = list(islice(StreamBatches(data.train_set, data.train_collate, epoch=0, rank=0, size=4), 5))
    assert all(same(a, b) for a, b in zip(batches[::2], alone[:3], strict=True))
    assert captions(batches[1::2]) != captions(alone[:2])
    assert all(same(a, b) for a, b in zip(module(pattern, num_workers=2).train_dataloader(), batches, strict=True))
    assert len(list(module(pattern, num_workers=2, epoch_size=4).train_dataloader())) == 1


def test_reading_changes_no_global_random_state(pattern):
    before, numpy = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    list(module(pattern, flip=True).train_dataloader())
    assert torch.equal(before, torch.get_rng_state())
    assert (numpy == np.random.get_state()[1]).all()  # noqa: NPY002


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture
def host(tmp_path):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_http_and_commands_give_the_same(pattern, host, tmp_path):
    expected = list(module(pattern).train_dataloader())
    for path in (f"{host}/remote/s-{{0..2}}.tar", f"pipe:cat {pattern}"):
        assert all(same(a, b) for a, b in zip(module(path).train_dataloader(), expected, strict=True))
    joined = module(f"{host}/remote/s-0.tar::pipe:cat {tmp_path}/remote/s-{{1..2}}.tar", epoch_size=200)
    assert set(captions(joined.train_dataloader())) == set(CAPTIONS)


def test_what_cannot_be_opened_is_named(pattern, host, tmp_path):
    for path, message in {
        f"{host}/remote/none-{{0..3}}.tar": r"none-0\.tar cannot be read",
        f"pipe:cat {tmp_path}/nowhere.tar": r"nowhere\.tar cannot be read",
        f"file://{tmp_path}/nowhere.tar": r"nowhere\.tar cannot be read: .*No such file",
        "s3://bucket/x-{0..3}.tar": r"s3://bucket/x-0\.tar.*pipe:aws s3 cp",
        "https://host/x-{0..3.tar": r"data\.path=https://host/x-\{0\.\.3\.tar",
    }.items():
        with pytest.raises(ValueError, match=message):
            module(path)
    with TarWriter(str(tmp_path / "other.tar"), encoder=False) as tar:
        tar.write({"__key__": "a", "mp3": b"la"})
    with pytest.raises(ValueError, match=r"other\.tar has no samples: no files of images"):
        module(str(tmp_path / "other.tar"))


def test_a_shard_that_breaks_off_is_named_and_the_others_go_on(pattern, tmp_path, caplog):
    shard = tmp_path / "remote/s-1.tar"
    shard.write_bytes(shard.read_bytes()[:3000])
    cut = captions(module(pattern, epoch_size=40).train_dataloader())
    assert len(cut) == 40
    assert "s-1.tar cannot be read" in caplog.text
    caplog.clear()
    # A command that fails after whole samples: only its exit status tells.
    path = f"pipe:cat {tmp_path}/remote/s-0.tar::pipe:cat {tmp_path}/remote/s-2.tar; exit 3"
    assert len(captions(module(path, epoch_size=40).train_dataloader())) == 40
    assert "exit 3" in caplog.text


def bad_samples(tmp_path, bad):
    samples = [sample(i) for i in range(SHARDS * EACH)]
    for i, files in bad.items():
        samples[i] = sample(i, **files)
    return write(tmp_path / "bad", samples)


def test_bad_samples_are_named_and_skipped(tmp_path, caplog):
    path = bad_samples(
        tmp_path,
        {
            2: {"png": b"nonsense", "txt": b"grey 2"},
            6: {"png": picture(6), "json": b"{broken"},
            11: {"png": picture(6)},
            13: {"txt": b"grey 13"},
        },
    )
    data = module(path, epoch_size=400, max_bad_fraction=0.5)
    assert set(captions(data.train_dataloader())) == {c for i, c in enumerate(CAPTIONS) if i not in (2, 6, 11, 13)}
    for key, reason in {"key2": "decoded", "key6": "Expecting", "key11": "no caption", "key13": "one picture"}.items():
        assert any(key in line and ".tar" in line and reason in line for line in caplog.messages)
    assert f"remote/s-{2 // EACH}.tar" not in caplog.text
    assert f"bad/s-{2 // EACH}.tar" in caplog.text


def test_dotted_names_are_samples_of_their_own(tmp_path):
    (tmp_path / "dotted").mkdir()
    with TarWriter(str(tmp_path / "dotted" / "s.tar"), encoder=False) as tar:
        for i in range(4):
            tar.write({"__key__": f"holiday.{i}", "png": picture(i), "txt": CAPTIONS[i].encode()})
        tar.write({"__key__": "other", "png": picture(4), "mask.png": b"no image", "txt": CAPTIONS[4].encode()})
    given = module(str(tmp_path / "dotted" / "s.tar"), epoch_size=80, max_bad_fraction=0.0).train_dataloader()
    assert set(captions(given)) == set(CAPTIONS[:5])


def test_too_many_bad_samples_are_fatal(tmp_path):
    path = bad_samples(tmp_path, {i: {"png": b"nonsense", "txt": b"grey"} for i in range(SHARDS * EACH)})
    with pytest.raises(
        ValueError,
        match=rf"(?s){ALLOWED + 1} of the .*max_bad_fraction.*11 x unreadable sample, such as sample 'key\d+' of .*tar",
    ):
        next(iter(module(path).train_dataloader()))
    (tmp_path / "second").mkdir()
    path = bad_samples(tmp_path / "second", {0: {"png": b"nonsense", "txt": b"grey"}})
    given = []
    with pytest.raises(ValueError, match=r"(?s)max_bad_fraction=0\.01.*key0"):
        given.extend(module(path, epoch_size=10_000, batch_size=1).train_dataloader())
    assert 100 < len(given) < 200  # the eleventh bad one of 15 * 11 samples, more or less


def test_captions_come_from_json_or_txt():
    assert read_captions({"json": b'{"captions": ["a", "b"]}', "txt": b"c"}) == ["a", "b"]
    assert read_captions({"json": b'{"caption": "a  dog\\n", "url": "x"}'}) == ["a dog"]
    assert read_captions({"txt": "ein Bär\n".encode()}) == ["ein Bär"]
    assert read_captions({"json": b'{"caption": null}', "txt": b"c"}) == ["c"]
    for raw in ({}, {"txt": b" \n"}, {"json": b"{}"}, {"json": b"[]"}, {"txt": b"\xff"}):
        with pytest.raises(ValueError, match=r"caption|object|decode"):
            read_captions(raw)


def test_a_caption_that_is_too_long_is_a_bad_sample_unless_cut(tmp_path, caplog):
    path = bad_samples(tmp_path, {4: {"png": picture(4), "txt": b"grey " * 30}})
    for truncate in (False, True):
        data = module(path, epoch_size=200, max_bad_fraction=0.5)
        data.set_text(BPETokenizer.train(CAPTIONS, 270), 12, truncate=truncate, dropout=0.0)
        assert any(caption.startswith("grey grey") for caption in captions(data.train_dataloader())) == truncate
    assert "key4" in caplog.text


def test_a_bpe_is_trained_on_the_captions_of_each_shard_once(pattern, caplog):
    caplog.set_level("INFO")
    found = list(module(pattern).train_set.some_captions())
    assert sorted(found) == sorted(CAPTIONS)
    assert found == list(module(pattern, num_workers=2).train_set.some_captions())
    assert "10000 captions" in caplog.text


def test_pictures_of_another_size_need_resize(tmp_path):
    larger = [sample(i, png=picture(i, 30), txt=b"grey") for i in range(SHARDS * EACH)]
    path = write(tmp_path / "larger", larger)
    with pytest.raises(ValueError, match=r"30 x 30 pixels.*16 x 16.*data\.resize=true"):
        next(iter(module(path).train_dataloader()))
    batch = next(iter(module(path, resize=True, crop=True).train_dataloader()))
    assert batch["images"].shape == (4, 3, 16, 16)


def test_image_tokens_are_streamed_without_pictures(tmp_path, caplog, tiny_vae):
    samples = [sample(i, npy=tokens(i), png=b"nonsense", txt=CAPTIONS[i].encode()) for i in range(SHARDS * EACH)]
    data = module(write(tmp_path / "tokens", samples), epoch_size=200)
    assert "no index" in caplog.text
    assert data.tokenizer is None
    assert not data.can_cache_tokens
    variants = set()
    for batch in data.train_dataloader():
        assert batch["image_tokens"].shape == (4, 16)
        assert batch["image_tokens"].dtype == torch.long
        assert "images" not in batch
        for row, caption in zip(batch["image_tokens"], batch["captions"], strict=True):
            assert row[0] % 100 == CAPTIONS.index(caption)
            variants.add(int(row[0]) // 100)
    assert variants == {0, 1}
    with pytest.raises(ValueError, match="cannot be cached"):
        data.cache_image_tokens(tiny_vae)


def test_bad_image_tokens_are_named(tmp_path, caplog):
    samples = [sample(i, npy=tokens(i), txt=b"grey") for i in range(SHARDS * EACH)]
    data = BytesIO()
    np.save(data, np.zeros((1, 9), dtype=np.uint8))
    samples[1]["npy"], samples[7]["npy"], samples[9] = data.getvalue(), b"nonsense", sample(9, txt=b"grey")
    batches = module(write(tmp_path / "tokens", samples), epoch_size=200, max_bad_fraction=0.5).train_dataloader()
    assert len(list(batches)) == 50
    for key, reason in {"key1": "9 image tokens", "key7": "cannot be read", "key9": "no image tokens"}.items():
        assert any(f"'{key}'" in line and reason in line for line in caplog.messages)


def test_image_tokens_of_a_larger_codebook_are_named(tmp_path, caplog):
    """A stream does not say of which image tokenizer it is, and a training step does not look."""
    samples = [sample(i, npy=tokens(i), txt=b"grey") for i in range(SHARDS * EACH)]
    data = module(write(tmp_path / "tokens", samples), epoch_size=40, max_bad_fraction=0.9)
    data.set_text(BPETokenizer.train(["grey"], 262), 8, truncate=False, dropout=0.0, codebook_size=105)
    kept = torch.cat([batch["image_tokens"] for batch in data.train_dataloader()])
    assert kept.max() < 105
    assert "the codebook of vae= has 105" in caplog.text


def test_a_resumed_stream_draws_anew_and_says_so(pattern, caplog):
    stopped = module(pattern).train_dataloader()
    whole = list(stopped)
    iterator = iter(stopped)
    next(iterator), next(iterator)
    assert stopped.state_dict() == {"epoch": 2}
    resumed, other = module(pattern).train_dataloader(), loader(module(pattern), rank=1, world_size=2)
    resumed.load_state_dict(stopped.state_dict())
    other.load_state_dict(stopped.state_dict())
    assert caplog.text.count("not resumed exactly") == 1
    rest = list(resumed)
    assert len(rest) == 5
    begun = module(pattern).train_dataloader()
    assert all(captions(rest) != captions(epoch) for epoch in (whole, list(begun), list(begun)))
    again = module(pattern).train_dataloader()
    again.load_state_dict(stopped.state_dict())
    assert same(rest[0], next(iter(again)))


def folder(path):
    with ShardWriter(path, name="greys", image_size=16) as writer:
        for i in range(6):
            writer.write("val", f"val{i}", picture(i), "png", {"captions": [f"grey {i}"]})
    return str(path)


def test_validation_reads_a_folder(pattern, tmp_path):
    data = module(pattern, val_path=folder(tmp_path / "val"))
    data.setup("fit")
    assert captions(data.val_dataloader()) == CAPTIONS[:6]
    assert not data.can_cache_tokens
    with pytest.raises(FileNotFoundError, match=r"data\.val_path=.*nowhere"):
        module(pattern, val_path=str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="val_path=pipe:cat x is a stream"):
        module(pattern, val_path="pipe:cat x")


def test_without_val_path_validation_must_be_off(pattern):
    data = module(pattern)
    data.trainer = SimpleNamespace(limit_val_batches=0)
    data.setup("fit")
    data.trainer = SimpleNamespace(limit_val_batches=1.0)
    with pytest.raises(ValueError, match=r"data\.val_path=.*limit_val_batches=0"):
        data.setup("fit")
    data.trainer = None
    with pytest.raises(ValueError, match=r"data\.val_path="):
        data.val_dataloader()


def test_settings_that_no_stream_can_have_are_refused(pattern):
    for settings, message in (
        ({"cache_decoded": True}, "cache_decoded=false"),
        ({"epoch_size": 3}, r"epoch_size \(3\).*batch_size \(4\)"),
        ({"shuffle_buffer": 0}, "shuffle_buffer must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            module(pattern, **settings)
    with pytest.raises(ValueError, match="folder of shards is needed"):
        open_splits(module(pattern).config)


def test_epochs_shorter_than_a_shard_reach_its_end(tmp_path):
    """What an epoch leaves of a shard the next one reads."""
    data = module(write(tmp_path / "remote"), batch_size=1, epoch_size=2, shuffle_buffer=1)
    loader = data.train_dataloader()
    seen = {caption for _ in range(60) for batch in loader for caption in batch["captions"]}
    assert seen == set(CAPTIONS)
