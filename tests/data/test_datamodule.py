import multiprocessing
import os
import random
import signal
import subprocess
import sys
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from dalle_pytorch.data.batches import EpochBatches, epoch_order
from dalle_pytorch.data.config import DataConfig
from dalle_pytorch.data.datamodule import TextImageDataModule
from dalle_pytorch.data.samples import Collate
from dalle_pytorch.data.shards import ShardWriter
from dalle_pytorch.errors import UserError
from dalle_pytorch.text import BPETokenizer


def write(folder, sizes=(16,) * 13, broken=None):
    with ShardWriter(folder, name="greys", image_size=16 if set(sizes) == {16} else None) as writer:
        for split in ("train", "val"):
            for i, size in enumerate(sizes):
                data = BytesIO()
                Image.linear_gradient("L").resize((size, size)).point(lambda v, i=i: max(0, v - 9 * i)).save(
                    data, "PNG"
                )
                content = b"nonsense" if split == "train" and i == broken else data.getvalue()
                captions = [f"grey {i}", f"number {i} of the greys"]
                writer.write(split, f"{split}{i}", content, "png", {"captions": captions})
    return str(folder)


@pytest.fixture
def path(tmp_path):
    return write(tmp_path / "greys")


def module(path, *, seed=0, text=True, **settings):
    config = DataConfig(path=path, **{"batch_size": 4, "jitter": 2, **settings})
    data = TextImageDataModule(config, image_size=16, seed=seed)
    if text:
        captions = [c for row in data.train_set.captions for c in row]
        data.set_text(BPETokenizer.train(captions, 280), 24, truncate=False, dropout=0.3)
    return data


def same(a, b):
    return a.keys() == b.keys() and all(
        torch.equal(a[k], b[k]) if isinstance(a[k], torch.Tensor) else a[k] == b[k] for k in a
    )


def test_the_order_is_a_permutation_and_a_function_of_seed_and_epoch():
    assert sorted(epoch_order(0, 0, 50)) == list(range(50))
    assert epoch_order(0, 1, 50) == epoch_order(0, 1, 50)
    assert epoch_order(0, 1, 50) != epoch_order(0, 2, 50)
    assert epoch_order(0, 1, 50) != epoch_order(1, 1, 50)


def test_processes_share_the_same_global_batches():
    alone = list(EpochBatches(23, 6, seed=1))
    shared = [list(EpochBatches(23, 6, seed=1, rank=rank, world_size=2)) for rank in (0, 1)]
    assert alone == [a + b for a, b in zip(*shared, strict=True)]
    with pytest.raises(ValueError, match=r"6.*4 processes"):
        EpochBatches(23, 6, seed=1, world_size=4)


def test_batches_do_not_depend_on_workers_or_the_global_random_state(path):
    first = list(module(path).train_dataloader())
    random.seed(5)
    torch.manual_seed(5)
    again = list(module(path, num_workers=1).train_dataloader())
    assert len(first) == 3
    assert all(same(a, b) for a, b in zip(first, again, strict=True))
    assert not same(first[0], next(iter(module(path, seed=1).train_dataloader())))


def test_reading_changes_no_global_random_state(path):
    before = torch.get_rng_state()  # not Python's as well: beartype, on under pytest, draws from it
    list(module(path, flip=True).train_dataloader())
    assert torch.equal(before, torch.get_rng_state())


def test_a_batch_is_what_the_models_read(path):
    batch = next(iter(module(path).train_dataloader()))
    assert batch["images"].shape == (4, 3, 16, 16)
    assert batch["images"].min() >= 0
    assert batch["images"].max() <= 1
    assert batch["text_tokens"].shape == (4, 24)
    assert len(batch["captions"]) == 4


def test_captions_and_augmentation_change_from_epoch_to_epoch(path):
    data = module(path)
    samples = [data.train_set[epoch, 3] for epoch in range(8)]
    assert {s["caption"] for s in samples} == {"grey 3", "number 3 of the greys"}
    assert not all(torch.equal(samples[0]["image"], s["image"]) for s in samples)


def test_a_loader_goes_on_where_its_state_was_taken(path):
    loader = module(path).train_dataloader()
    whole = [*loader, *loader]
    half = module(path).train_dataloader()
    iterator = iter(half)
    next(iterator), next(iterator)
    rest = module(path).train_dataloader()
    rest.load_state_dict(half.state_dict())
    assert all(same(a, b) for a, b in zip([*rest, *rest], whole[2:], strict=True))


def test_the_decoded_cache_changes_nothing(path):
    plain, cached = (list(module(path, cache_decoded=cache).train_dataloader()) for cache in (False, True))
    assert all(torch.allclose(a["images"], b["images"], atol=1e-6) for a, b in zip(plain, cached, strict=True))


def test_validation_is_untouched_and_complete(path):
    batches = list(module(path).val_dataloader())
    assert [c for b in batches for c in b["captions"]] == [f"grey {i}" for i in range(13)]
    assert torch.equal(batches[0]["images"], next(iter(module(path, jitter=0).val_dataloader()))["images"])


def test_cached_image_tokens_are_the_vaes(path, tiny_vae):
    data = module(path, jitter=0)
    images = [data.train_set[0, i]["image"] for i in range(13)]
    data.cache_image_tokens(tiny_vae)
    batch = next(iter(data.train_dataloader()))
    assert "images" not in batch
    assert batch["image_tokens"].dtype == torch.long
    order = epoch_order(0, 0, 13)[:4]
    assert torch.equal(batch["image_tokens"], tiny_vae.encode(torch.stack([images[i] for i in order])))
    data = module(path, token_crops=3)
    data.cache_image_tokens(tiny_vae)
    assert data.train_set.image_tokens.shape == (3, 13, 16)
    assert data.val_set.image_tokens.shape == (1, 13, 16)


def test_crops_come_from_larger_pictures(tmp_path):
    data = module(write(tmp_path / "mixed", sizes=(30, 24) * 4), resize=True, crop=True)
    first, second = data.train_set[0, 0]["image"], data.train_set[1, 0]["image"]
    assert first.shape == second.shape == (3, 16, 16)
    assert not torch.equal(first, second)


def test_errors_name_what_is_wrong(path, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere.*prepare_data"):
        module(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match=r"dev.*train, val"):
        module(path, val_split="dev")
    with pytest.raises(ValueError, match=r"13 images.*batch_size is 64"):
        module(path, batch_size=64)
    with pytest.raises(ValueError, match=r"16 x 16.*32 x 32.*resize"):
        TextImageDataModule(DataConfig(path=path, batch_size=4), image_size=32, seed=0)
    with pytest.raises(ValueError, match="train3"):
        list(module(write(tmp_path / "broken", broken=3)).train_dataloader())
    with pytest.raises(ValueError, match="number 0 of the greys"):
        module(path, text=False).set_text(BPETokenizer.train(["grey"], 260), 9, truncate=False, dropout=0.0)
    with pytest.raises(ValueError, match="crop"):
        DataConfig(crop=True)


def test_a_caption_that_only_dropout_makes_too_long_is_taken_without():
    tokenizer = BPETokenizer.train(["green square"] * 9, 300)
    length = len(tokenizer.encode("green square"))
    batch = Collate(tokenizer, length, truncate=False, dropout=0.9)(
        [{"caption": "green square", "rng": random.Random(i)} for i in range(9)]
    )
    assert (batch["text_tokens"] == torch.tensor(tokenizer.encode("green square"))).all()


def test_a_state_of_other_data_or_batches_is_refused(path):
    loader = module(path).train_dataloader()
    state = loader.state_dict()
    assert state == {"epoch": 0, "samples": 0, "size": 13, "data": module(path).train_set.shards.sha256}
    for change, named in (
        ({"size": 14}, "14 samples.*13"),
        ({"samples": 5}, "no whole number"),
        ({"samples": 12}, "no whole"),
    ):
        with pytest.raises(ValueError, match=named):
            loader.load_state_dict({**state, **change})
    with pytest.raises(ValueError, match="stream"):
        loader.load_state_dict({"epoch": 1})


def test_other_data_of_the_same_size_are_told_once(path, tmp_path, caplog):
    state = module(path).train_dataloader().state_dict()
    module(path).train_dataloader().load_state_dict(state)
    module(path).train_dataloader().load_state_dict({key: state[key] for key in ("epoch", "samples", "size")})
    assert "other data" not in caplog.text
    other = module(write(tmp_path / "other", broken=3)).train_dataloader()
    other.load_state_dict(state)
    assert caplog.text.count("data.path= holds other data than the run was trained on") == 1
    with pytest.raises(UserError, match="13"):
        module(write(tmp_path / "more", sizes=(16,) * 14)).train_dataloader().load_state_dict(state)


SIZES = (None, 1, 2, 3, 4, 6, 12)
SHARES = [(world, micro) for world in (1, 2, 3, 4) for micro in SIZES if not 12 % (world * (micro or 1))]


@pytest.mark.parametrize(("world", "micro"), SHARES)
def test_a_step_depends_on_neither_processes_nor_micro_batches(world, micro):
    processes = [
        EpochBatches(40, 12, seed=1, rank=rank, world_size=world, micro_batch_size=micro) for rank in range(world)
    ]
    given = [list(process) for process in processes]
    accumulate = processes[0].accumulate
    assert accumulate == 12 // world // (micro or 12 // world)
    assert all(
        len(batches) == len(process) == 3 * accumulate for batches, process in zip(given, processes, strict=True)
    )
    order = epoch_order(1, 0, 40)
    for step in range(3):
        parts = [batch for batches in given for batch in batches[step * accumulate : (step + 1) * accumulate]]
        assert {len(batch) for batch in parts} == {micro or 12 // world}
        assert [index for batch in parts for _, index in batch] == order[step * 12 : (step + 1) * 12]


def test_steps_that_cannot_be_shared_name_both_settings(path):
    with pytest.raises(UserError, match=r"data\.micro_batch_size \(4\).*3 images.*data\.batch_size \(6\) over 2 proc"):
        EpochBatches(23, 6, seed=1, world_size=2, micro_batch_size=4)
    with pytest.raises(UserError, match=r"data\.batch_size \(6\).*4 processes"):
        EpochBatches(23, 6, seed=1, world_size=4, micro_batch_size=1)
    data = module(path, text=False, batch_size=12, micro_batch_size=2)
    assert [data.accumulate(world) for world in (1, 2, 3, 6)] == [6, 3, 2, 1]
    with pytest.raises(UserError, match=r"data\.micro_batch_size \(2\).*data\.batch_size \(12\) over 4"):
        data.accumulate(4)
    with pytest.raises(UserError, match="micro_batch_size must be at least 1"):
        module(path, micro_batch_size=0)


def test_micro_batches_are_those_of_the_whole_step_and_know_its_captions(path):
    whole = list(module(path).train_dataloader())
    loader = module(path, micro_batch_size=2, num_workers=1).train_dataloader()
    parts = list(loader)
    assert (loader.accumulate, len(loader), len(parts)) == (2, 6, 6)
    for step, batch in enumerate(whole):
        assert "step_captions" not in batch
        first, second = parts[2 * step : 2 * step + 2]
        for name in ("images", "text_tokens", "indices"):
            assert torch.equal(torch.cat([first[name], second[name]]), batch[name])
        for part in (first, second):
            assert part["step_captions"] == batch["captions"]
            assert torch.equal(part["step_text_tokens"], batch["text_tokens"])
    assert "step_text_tokens" not in next(iter(module(path, text=False, micro_batch_size=2).train_dataloader()))
    assert [len(batch["captions"]) for batch in module(path, micro_batch_size=2).val_dataloader()] == [2] * 6 + [1]


@pytest.mark.parametrize(("before", "after"), [(1, 4), (4, 2), (2, None), (None, 1)])
def test_a_state_at_the_border_of_a_step_fits_any_micro_batch(path, before, after):
    stopped = module(path, micro_batch_size=before).train_dataloader()
    iterator = iter(stopped)
    captions = []
    for _ in range(stopped.accumulate):
        captions += next(iterator)["captions"]
    assert stopped.state_dict()["samples"] == 4
    resumed = module(path, micro_batch_size=after).train_dataloader()
    resumed.load_state_dict(stopped.state_dict())
    rest = [caption for batch in [*resumed, *resumed] for caption in batch["captions"]]
    loader = module(path).train_dataloader()
    assert captions + rest == [caption for batch in [*loader, *loader] for caption in batch["captions"]]


def test_a_state_inside_a_step_is_refused(path):
    stopped = module(path, micro_batch_size=1).train_dataloader()
    iterator = iter(stopped)
    for count in range(1, 12):
        next(iterator)
        state = stopped.state_dict()
        assert state["samples"] == count
        if count % 4:
            with pytest.raises(UserError, match=rf"{count} samples.*no whole number of steps of data\.batch_size=4"):
                module(path).train_dataloader().load_state_dict(state)
    next(iterator)
    assert (stopped.state_dict()["epoch"], stopped.state_dict()["samples"]) == (1, 0)


def only_train(folder, source):
    with ShardWriter(folder, name="x", image_size=16, source=source) as writer:
        for i in range(4):
            data = BytesIO()
            Image.new("RGB", (16, 16)).save(data, "PNG")
            writer.write("train", f"{i}", data.getvalue(), "png", {"captions": ["grey"]})
    return str(folder)


def test_data_packed_without_validation_are_trained_on_without(tmp_path, caplog, tiny_vae):
    caplog.set_level("INFO")
    path = only_train(tmp_path / "none", {"val_share": 0.0})
    data = module(path)
    assert data.val_set is None
    assert caplog.text.count("nothing to validate on") == 1
    data.trainer = SimpleNamespace(limit_val_batches=1.0, global_rank=0, world_size=1)
    data.setup("fit")
    data.trainer = None
    assert data.val_dataloader() == []
    assert len(list(data.train_dataloader())) == 1
    data.cache_image_tokens(tiny_vae)
    assert "image_tokens" in next(iter(data.train_dataloader()))
    with pytest.raises(UserError, match=r"no split 'vla'.*it has: train\..*trainer\.limit_val_batches=0"):
        module(path, val_split="vla")


def test_a_missing_split_is_an_error_unless_validation_is_off(path, tmp_path):
    with pytest.raises(UserError, match=r"no split 'val'.*it has: train\..*data\.val_split=.*limit_val_batches=0"):
        module(only_train(tmp_path / "train", {"val_share": 0.1}))
    with pytest.raises(UserError, match=r"no split 'val\+vla'.*it has: train, val"):
        module(path, val_split="val+vla")
    config = DataConfig(path=path, batch_size=4, val_split="vla")
    assert TextImageDataModule(config, image_size=16, seed=0, validate=False).val_set is None


def test_workers_leave_signals_to_the_main_process(path):
    loader = module(path, text=False, num_workers=2, prefetch_factor=1).train_dataloader()
    iterator = iter(loader)
    given = [next(iterator)["captions"]]
    for worker in multiprocessing.active_children():
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
            os.kill(worker.pid, number)
    given += [batch["captions"] for batch in iterator]
    assert given == [batch["captions"] for batch in module(path, text=False).train_dataloader()]


def test_reading_ahead_needs_processes(path):
    assert module(path, num_workers=1, prefetch_factor=3).train_dataloader().prefetch_factor == 3
    with pytest.raises(UserError, match=r"prefetch_factor=3.*num_workers="):
        DataConfig(path=path, prefetch_factor=3)


def test_few_files_are_open_at_a_time(path, monkeypatch):
    from dalle_pytorch.data import tar

    monkeypatch.setattr(tar, "MOST_OPEN", 2)
    readers = [tar.TarReader(file) for file in sorted(Path(path).glob("*.tar")) * 3]
    contents = [reader.read(0, 100) for reader in readers]
    assert sum(reader._descriptor is not None for reader in readers) <= 2
    assert [reader.read(0, 100) for reader in readers] == contents


def test_a_file_that_is_open_when_the_interpreter_ends_is_closed_in_silence(path):
    """The module that holds the reader outlives those that its methods call."""
    script = (
        "import os, pathlib, sys; from dalle_pytorch.data.tar import TarReader; "
        "os.kept = TarReader(pathlib.Path(sys.argv[1])); os.kept.read(0, 100)"
    )
    file = next(Path(path).glob("*.tar"))
    done = subprocess.run([sys.executable, "-c", script, file], capture_output=True, text=True, check=True)
    assert done.stderr == ""


def test_captions_read_one_by_one_are_the_same(path, monkeypatch):
    from dalle_pytorch.data import samples

    kept = list(module(path).train_dataloader())
    monkeypatch.setattr(samples, "CAPTIONS_IN_MEMORY", 4)
    data = module(path, text=False)
    assert data.train_set.captions is None
    assert len(list(data.train_set.some_captions())) == 2 * 4  # two captions of every fourth of 13
    read = list(data.train_dataloader())
    assert [batch["captions"] for batch in read] == [batch["captions"] for batch in kept]


def test_captions_are_drawn_by_their_weights(path):
    drawn = [module(path, text=False, caption_weights=weights) for weights in ([0.0, 1.0], [1.0], [3.0, 1.0])]
    found = [[data.train_set[epoch, 4]["caption"] for epoch in range(400)] for data in drawn]
    assert set(found[0]) == {"number 4 of the greys"}
    assert set(found[1]) == {"grey 4"}  # those beyond the list are not used
    assert 250 < found[2].count("grey 4") < 350  # 300, and five standard deviations of 9 on either side


def test_caption_weights_that_leave_none_are_named(path):
    for weights in ([1.0, -1.0], [0.0, 0.0], [float("nan"), 1.0]):
        with pytest.raises(ValueError, match="caption_weights must not be negative"):
            DataConfig(path=path, caption_weights=weights)
    with pytest.raises(ValueError, match=r"caption_weights=\[0.0, 0.0, 1.0\] leaves none of a picture's 2 captions"):
        module(path, text=False, caption_weights=[0.0, 0.0, 1.0]).train_set[0, 4]
