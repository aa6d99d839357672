"""MinDalle: min-dalle's tokens and grids, and what it has beyond it."""

import inspect
import sys

import pytest
import torch
from PIL import Image

from dalle_pytorch import MinDalle
from dalle_pytorch.commands import image_from_text


@pytest.fixture(scope="module")
def root(min_dalle_folder):
    """A folder as min-dalle leaves it, with small random weights."""
    return min_dalle_folder


@pytest.fixture(scope="module")
def model(root):
    return MinDalle(root, is_mega=False, is_verbose=False, device="cpu", bos_id=16383, norm_eps=1e-5)


@pytest.fixture
def drawn(model, monkeypatch):
    """The image tokens of each call; pictures are not decoded."""
    seen: list[torch.Tensor] = []

    def decode(dalle, tokens, grid_size):
        seen.append(tokens.clone())
        return torch.zeros(len(tokens), 3, 256, 256)

    monkeypatch.setattr(model, "_decode", decode)
    return seen


def test_tokens_are_min_dalles(model, drawn, min_dalle_fixture):
    tensors, notes = min_dalle_fixture
    for sample in notes["samples"]:
        settings = {name: float(sample[name]) for name in ("temperature", "supercondition_factor")}
        settings["top_k"] = sample["top_k"]
        model.generate_image(sample["prompt"], sample["seed"], sample["grid_size"], **settings)
        assert torch.equal(drawn[-1], tensors[sample["name"]].long())


def test_the_signature_is_min_dalles():
    """Positional arguments in the order of min-dalle 0.4.11."""
    names = (
        "self text seed grid_size progressive_outputs is_seamless temperature top_k supercondition_factor is_verbose"
    )
    assert " ".join(list(inspect.signature(MinDalle.generate_raw_image_stream).parameters)[:10]) == names
    names = "self models_root dtype device is_mega is_reusable is_verbose"
    assert " ".join(list(inspect.signature(MinDalle.__init__).parameters)[:7]) == names


def test_the_global_random_state_is_neither_read_nor_set(model, drawn):
    state = torch.get_rng_state()
    model.generate_image("a cat", 7, 1)
    assert torch.equal(state, torch.get_rng_state())
    torch.rand(5)
    model.generate_image("a cat", 7, 1)
    assert torch.equal(drawn[0], drawn[1])
    model.generate_image("a cat", -1, 1)
    assert not torch.equal(drawn[0], drawn[2])


def test_a_picture_with_its_own_seed_does_not_depend_on_the_others(model, drawn):
    model.generate_images("a cat", [5, 6, 7])
    model.generate_images("a cat", [6])
    assert torch.equal(drawn[0][1], drawn[1][0])
    assert not torch.equal(drawn[0][0], drawn[0][1])


def test_any_number_of_pictures(model, drawn):
    assert model.generate_images("a cat", 3, num_images=3).shape == (3, 256, 256, 3)
    assert model.generate_image("a cat", 3, num_images=3).size == (512, 512)
    for wrong in ({}, {"grid_size": 2, "num_images": 3}, {"num_images": 0}):
        with pytest.raises(ValueError, match="how many pictures"):
            model.generate_images("a cat", 3, **wrong)


def test_progressive_outputs_come_every_32_tokens(model, drawn):
    frames = list(model.generate_image_stream("a cat", 3, 1, progressive_outputs=True))
    assert len(frames) == len(drawn) == 8
    assert all(isinstance(frame, Image.Image) for frame in frames)
    for done, tokens in zip(range(32, 257, 32), drawn, strict=True):
        assert torch.equal(tokens[:, :done], drawn[-1][:, :done])


def test_options_change_what_they_should(model, drawn):
    model.generate_images("a cat", 3, 1)
    for options in (
        {"negative_prompt": "the red"},
        {"top_p": 0.5},
        {"top_k": 2},
        {"temperature": 0.1},
        {"supercondition_factor": 1.0},
    ):
        model.generate_images("a cat", 3, 1, **{"supercondition_factor": 4.0, **options})
        assert not torch.equal(drawn[0], drawn[-1]), options
    model.generate_images("a cat", 3, 2, temperature=0.0)
    assert (drawn[-1] == drawn[-1][0]).all()


def test_grids_are_min_dalles(model):
    """Down the columns, in raw and in seamless grids; a seamless grid of one picture is that picture."""
    raw = next(model.generate_raw_image_stream("a cat", 3, 2))
    images = model.generate_images("a cat", 3, 2)
    assert raw.shape == (512, 512, 3)
    assert raw.max() <= 255
    for index, image in enumerate(images):
        column, row = divmod(index, 2)
        assert torch.equal(raw[256 * row : 256 * (row + 1), 256 * column : 256 * (column + 1)], image)
    one, seamless = (next(model.generate_raw_image_stream("a cat", 3, 1, is_seamless=flag)) for flag in (False, True))
    torch.testing.assert_close(one, seamless, atol=0.01, rtol=0)


def test_seamless_tokens_lie_as_the_pictures_do(model, monkeypatch):
    seen = []
    vae = model._decoder.dalle.vae
    monkeypatch.setattr(vae, "decode_grid", lambda grid: seen.append(grid) or torch.zeros(1, 3, 512, 512))
    next(model.generate_raw_image_stream("a cat", 3, 2, is_seamless=True))
    drawn = []
    monkeypatch.setattr(model, "_decode", lambda dalle, tokens, _: drawn.append(tokens) or torch.zeros(4, 3, 256, 256))
    model.generate_images("a cat", 3, 2)
    for index, tokens in enumerate(drawn[0].view(4, 16, 16)):
        column, row = divmod(index, 2)
        assert torch.equal(seen[0][0, 16 * row : 16 * (row + 1), 16 * column : 16 * (column + 1)], tokens)


def test_candidates_are_ranked(model, tiny_clip, monkeypatch):
    class Fixed:
        def tokenize(self, text, length, truncate):
            return torch.ones(1, length, dtype=torch.long)

    tiny_clip.text_tokenizer = Fixed()
    images = model.generate_images("a cat", [1, 2, 3])
    ranked = model.generate_images("a cat", [1, 2, 3], clip=tiny_clip, num_keep=2)
    scores = tiny_clip.scores(torch.ones(1, 5, dtype=torch.long), images.permute(0, 3, 1, 2) / 255)[0]
    best = scores.argsort(descending=True)[:2]
    torch.testing.assert_close(ranked, images[best])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_draws_on_a_cpu(root, dtype):
    model = MinDalle(root, dtype, "cpu", False, is_verbose=False, cache_dtype=dtype)
    images = model.generate_images("a cat", 3, 1)
    assert images.shape == (1, 256, 256, 3)
    assert images.isfinite().all()
    assert model._decoder.cache_dtype == dtype


def test_weights_that_are_not_kept_give_the_same(root, model):
    again = MinDalle(root, torch.float32, "cpu", False, False, False, bos_id=16383, norm_eps=1e-5)
    assert again._decoder is None
    assert torch.equal(again.generate_images("a cat", 3, 1), model.generate_images("a cat", 3, 1))


def test_a_long_prompt_is_cut_and_said(model, drawn, caplog):
    model.generate_image("cat " * 100, 3, 1)
    assert "the model reads the first 62" in caplog.text


def test_misuse_is_named(model, root):
    with pytest.raises(ValueError, match="dtype must be one of"):
        MinDalle(root, torch.int8, "cpu", False)
    with pytest.raises(ValueError, match="keep_rows must lie in 1 to 15"):
        model.generate_images("a cat", 3, 1, image=Image.new("RGB", (8, 8)))
    with pytest.raises(ValueError, match="decoder"):  # detoker.pt has no encoder
        model.generate_images("a cat", 3, 1, image=Image.new("RGB", (8, 8)), keep_rows=2)
    with pytest.raises(ValueError, match="is_seamless"):
        model.generate_images("a cat", 3, 1, is_seamless=True)


def test_the_command_takes_min_dalles_flags(root, tmp_path, monkeypatch, capsys):
    out = tmp_path / "cat.png"
    flags = ["--no-mega", "--text=a cat", "--seed=3", "--grid-size=1", f"--image-path={out}", f"--models-root={root}"]
    monkeypatch.setattr(sys, "argv", ["image_from_text", *flags, "--top_k=64", "--device=cpu"])
    image_from_text.main()
    with Image.open(out) as image:
        assert image.size == (256, 256)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 37
    assert lines[-1] == str(out)
    with pytest.raises(SystemExit, match=r"error: .*cat\.png exists"):
        image_from_text.main()
