"""OpenAI's encoder.pkl and decoder.pkl: the reference's codes and pixels, no key over, nothing run."""

import json
import os
import pickletools
import sys
import types
import warnings
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

from dalle_pytorch.checkpoints import checkpoint
from dalle_pytorch.checkpoints.importers.openai_dvae import FILES, SIGNATURE, TABLE, convert
from dalle_pytorch.checkpoints.importers.table import rename
from dalle_pytorch.models.openai_dvae import OpenAIDVAE, OpenAIDVAEConfig

PARTS = ("encoder", "decoder")


class Encoder(nn.Module):
    """Stands for dall_e.encoder.Encoder while a file is written; so do the others."""


class EncoderBlock(nn.Module): ...


class Decoder(nn.Module): ...


class DecoderBlock(nn.Module): ...


class Conv2d(nn.Module): ...


class Evil:
    """Runs a command when it is unpickled by a trusting reader."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.fixture
def dall_e(monkeypatch):
    """The package's classes under their names, for pickle to find."""
    homes = {Encoder: "encoder", EncoderBlock: "encoder", Decoder: "decoder", DecoderBlock: "decoder", Conv2d: "utils"}
    monkeypatch.setitem(sys.modules, "dall_e", types.ModuleType("dall_e"))
    for cls, home in homes.items():
        name = f"dall_e.{home}"
        if name not in sys.modules:
            monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
        monkeypatch.setattr(cls, "__module__", name)
        setattr(sys.modules[name], cls.__name__, cls)


@pytest.fixture
def notes(recorded):
    """What the reference wrote down beside its outputs."""
    return {key: json.loads(value) for key, value in recorded("openai_dvae")[1].items()}


@pytest.fixture
def states(notes, reference_script):
    """Seeded weights of both parts under OpenAI's names."""
    states = {part: {key: torch.empty(shape) for key, shape in notes["small"][part].items()} for part in PARTS}
    for part, state in states.items():
        reference_script("openai_dvae").fill(part, state)
    return states


def module(part, state, attributes):
    """A module tree like the package's, filled with weights."""
    root_class, block_class = {"encoder": (Encoder, EncoderBlock), "decoder": (Decoder, DecoderBlock)}[part]
    root = root_class()
    vars(root).update(attributes, device=torch.device("cpu"), requires_grad=False, use_mixed_precision=True)
    for key, tensor in state.items():
        node, names = root, key.split(".")
        for name, after in zip(names[:-1], [*names[1:-1], "w"], strict=True):
            if name not in node._modules:
                is_conv = after in ("w", "b")
                node.add_module(
                    name, Conv2d() if is_conv else block_class() if name.startswith("block_") else nn.Sequential()
                )
            node = node._modules[name]
        node.register_parameter(names[-1], nn.Parameter(tensor, requires_grad=False))
    for block in [item for item in root.modules() if isinstance(item, block_class)]:
        block.res_path.add_module("relu_1", nn.ReLU())
        if not hasattr(block, "id_path"):
            block.add_module("id_path", nn.Identity())
    change = nn.MaxPool2d(2) if part == "encoder" else nn.Upsample(scale_factor=2, mode="nearest")
    root.blocks.group_1.add_module("change", change)
    return root.eval()


@pytest.fixture
def write(dall_e, states, notes, tmp_path):
    """Write both files as torch.save writes modules; returns their folder."""

    def write(new_format: bool = True, **changes) -> Path:
        for part in PARTS:
            root = changes.get(part) or module(part, states[part], notes["attributes"][part])
            with warnings.catch_warnings():  # the old format looks for the source of classes
                warnings.simplefilter("ignore")
                torch.save(root, tmp_path / f"{part}.pkl", _use_new_zipfile_serialization=new_format)
        return tmp_path

    return write


def load(path, **options):
    """The model of a folder."""
    return checkpoint.assemble(*convert(path, **options), path)


def test_stand_ins_pickle_like_the_package(write, notes):
    folder = write()
    for part in PARTS:
        with zipfile.ZipFile(folder / f"{part}.pkl") as archive:
            data = archive.read(f"{part}/data.pkl")
        names = {arg for code, arg, _ in pickletools.genops(data) if code.name == "GLOBAL"}
        assert names == set(notes["names"][part])


@pytest.mark.parametrize("new_format", [True, False])
@pytest.mark.parametrize("side", [32, 48])
def test_outputs_are_the_references(write, states, notes, recorded, seeded, new_format, side):
    for part in PARTS:
        assert seeded.checksum(states[part]) == notes["checksums"][part]
    expected, folder = recorded("openai_dvae")[0], write(new_format)
    vae = load(folder, image_size=side)
    images = expected[f"{side}.images"] / 255
    assert torch.equal(vae.encode(images), expected[f"{side}.codes"].long())
    torch.testing.assert_close(
        vae.decode(expected[f"{side}.tokens"].long()), expected[f"{side}.pixels"], atol=1e-6, rtol=0
    )
    if side == 48:
        with torch.no_grad():
            torch.testing.assert_close(vae.encode_logits(images), expected["48.logits"], atol=1e-4, rtol=1e-5)


def test_the_package_is_not_imported(write, monkeypatch):
    folder = write()
    for name in [name for name in sys.modules if name.startswith("dall_e")]:
        monkeypatch.setitem(sys.modules, name, None)  # an import of it fails
    assert load(folder).codebook_size == 64


def test_full_size_has_all_keys_and_no_other(notes):
    with torch.device("meta"):
        own = OpenAIDVAE(OpenAIDVAEConfig()).state_dict()
        state = {f"{part}.{key}": torch.empty(shape) for part in PARTS for key, shape in notes["full"][part].items()}
    renamed = rename(state, TABLE)
    assert renamed.keys() == own.keys()
    counts = {part: [p.numel() for key, p in renamed.items() if key.startswith(part)] for part in PARTS}
    assert [(sum(counts[part]), len(counts[part])) for part in PARTS] == [(53_786_240, 74), (43_829_766, 76)]
    renamed["decoder.input.weight"] = renamed["decoder.input.weight"].flatten(1).T
    assert {key: tensor.shape for key, tensor in renamed.items()} == {key: tensor.shape for key, tensor in own.items()}


def test_sizes_come_from_the_files(write):
    head, state = convert(write(), image_size=64)
    sizes = {"hidden_dim": 16, "init_dim": 12, "num_blocks": 2, "codebook_size": 64, "channels": 3}
    assert head["kind"] == "openai_dvae"
    assert head["config"] == {"image_size": 64, **sizes}
    assert state["decoder.input.weight"].shape == (64, 12)


def test_either_file_stands_for_both(write):
    folder = write()
    whole = convert(folder)
    for name in FILES:
        head, state = convert(folder / name)
        assert head == whole[0]
        assert all(torch.equal(state[key], tensor) for key, tensor in whole[1].items())


def test_state_dicts_and_half_precision_pass(states, tmp_path):
    """Somebody's files with the weights alone: no attributes to compare, the type is kept."""
    for part in PARTS:
        torch.save({key: tensor.half() for key, tensor in states[part].items()}, tmp_path / f"{part}.pkl")
    head, state = convert(tmp_path)
    assert head["config"]["num_blocks"] == 2
    assert {tensor.dtype for tensor in state.values()} == {torch.float16}


def test_comes_back_from_our_own_format(write, recorded, tmp_path):
    folder, expected = write(), recorded("openai_dvae")[0]
    vae = load(folder, image_size=32)
    checkpoint.save(vae, tmp_path / "ours.safetensors")
    again = checkpoint.load(tmp_path / "ours.safetensors", kind="vae")
    assert torch.equal(again.encode(expected["32.images"] / 255), expected["32.codes"].long())
    tokens = expected["32.tokens"].long()
    assert torch.equal(again.decode(tokens), vae.decode(tokens))


def test_one_of_two_is_not_enough(write):
    folder = write()
    (folder / "decoder.pkl").unlink()
    for path in (folder, folder / "encoder.pkl"):
        with pytest.raises(FileNotFoundError, match=r"has no decoder\.pkl; .*encoder\.pkl and decoder\.pkl"):
            convert(path)


def test_another_name_is_refused(write):
    folder = write()
    (folder / "encoder.pkl").rename(folder / "dvae.pkl")
    with pytest.raises(ValueError, match=r"dvae\.pkl: .*are called encoder\.pkl and decoder\.pkl"):
        convert(folder / "dvae.pkl")


def test_swapped_files_are_told(write):
    folder = write()
    (folder / "encoder.pkl").rename(folder / "other")
    (folder / "decoder.pkl").rename(folder / "encoder.pkl")
    (folder / "other").rename(folder / "decoder.pkl")
    with pytest.raises(ValueError, match=r"^\S+: encoder\.pkl holds a decoder: .*swapped\?$"):
        convert(folder)


def test_keys_left_over_and_missing_are_named(write, states, notes):
    extra = {**states["decoder"], "blocks.group_5.block_1.res_path.conv_1.w": torch.zeros(1, 1, 1, 1)}
    with pytest.raises(ValueError, match=r"left over.*decoder\.blocks\.group_5\.block_1\.res_path\.conv_1\.w"):
        convert(write(decoder=module("decoder", extra, notes["attributes"]["decoder"])))
    gone = {key: value for key, value in states["encoder"].items() if key != "blocks.group_3.block_2.res_path.conv_2.b"}
    folder = write(encoder=module("encoder", gone, notes["attributes"]["encoder"]))
    with pytest.raises(ValueError, match=r"missing encoder\.groups\.3\.2\.conv_2\.bias, left over none"):
        load(folder)


def test_other_networks_are_refused(write):
    folder = write()
    torch.save({"conv.weight": torch.zeros(3)}, folder / "decoder.pkl")
    with pytest.raises(ValueError, match=r"decoder\.pkl is no part of OpenAI's dVAE: .*no weight blocks\.group_1"):
        convert(folder)
    torch.save({key: torch.zeros(3) for key in SIGNATURE}, folder / "decoder.pkl")
    with pytest.raises(ValueError, match=r"decoder\.pkl: weight blocks\.group_1.* is \(3,\)"):
        convert(folder)


def test_parts_of_two_networks_are_told(write, states, notes):
    sizes = {**notes["attributes"]["decoder"], "vocab_size": 65}
    other = {**states["decoder"], "blocks.input.w": torch.zeros(12, 65, 1, 1)}
    with pytest.raises(ValueError, match=r"codebook_size is 64 in encoder\.pkl but 65 in decoder\.pkl"):
        convert(write(decoder=module("decoder", other, sizes)))


def test_a_module_that_misstates_its_sizes_is_told(write, states, notes):
    sizes = {**notes["attributes"]["encoder"], "n_hid": 32}
    with pytest.raises(ValueError, match=r"encoder\.pkl: says n_hid = 32, but its weights have 16"):
        convert(write(encoder=module("encoder", states["encoder"], sizes)))


@pytest.mark.parametrize("new_format", [True, False])
def test_truncated_files_are_named(write, new_format):
    path = write(new_format) / "decoder.pkl"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match=r"decoder\.pkl cannot be read: truncated"):
        convert(path)


@pytest.mark.parametrize("new_format", [True, False])
def test_commands_in_a_file_are_not_run(write, states, notes, tmp_path, new_format):
    """The class is the right one, and one of its attributes calls os.system."""
    evil = tmp_path / "evil"
    attributes = {**notes["attributes"]["encoder"], "n_blk_per_group": Evil(f"touch {evil}")}
    folder = write(new_format, encoder=module("encoder", states["encoder"], attributes))
    with pytest.raises(ValueError, match=r"encoder\.pkl calls \w+\.system.*nothing was loaded"):
        convert(folder)
    assert not evil.exists()
    # the file is not a dud: torch itself, told to trust it, does run the command
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.load(folder / "encoder.pkl", weights_only=False)
    assert evil.exists()


def test_a_command_in_place_of_the_module_is_not_run(write, tmp_path):
    evil = tmp_path / "evil"
    folder = write()
    torch.save(Evil(f"touch {evil}"), folder / "decoder.pkl")
    with pytest.raises(ValueError, match=r"decoder\.pkl calls \w+\.system"):
        convert(folder)
    assert not evil.exists()


def test_bad_image_size_is_named(write):
    with pytest.raises(ValueError, match=r"image_size \(20\) must be a multiple of 8"):
        convert(write(), image_size=20)


@pytest.mark.live
def test_live_reference_is_as_recorded(recorded, reference_script, tmp_path):
    """OpenAI's package, here and now: the same outputs, and its own pickles import."""
    pytest.importorskip("attr")
    pytest.importorskip("dall_e.encoder")
    script, (expected, metadata) = reference_script("openai_dvae"), recorded("openai_dvae")
    tensors, again = script.record()
    assert {key: json.loads(value) for key, value in again.items()} == {
        key: json.loads(value) for key, value in metadata.items()
    }
    for key, tensor in expected.items():
        torch.testing.assert_close(tensors[key], tensor, atol=1e-3 if key == "48.logits" else 1e-5, rtol=1e-5)
    for part, model in script.build_small().items():
        torch.save(model, tmp_path / f"{part}.pkl")
    vae = load(tmp_path, image_size=48)
    assert torch.equal(vae.encode(tensors["48.images"] / 255), tensors["48.codes"].long())
    torch.testing.assert_close(vae.decode(tensors["48.tokens"].long()), tensors["48.pixels"], atol=1e-5, rtol=0)
