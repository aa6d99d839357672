"""MinDalle: min-dalle's tokens and grids, and what it has beyond it."""

import inspect
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from dalle_pytorch import MinDalle
from dalle_pytorch.checkpoints import hub
from dalle_pytorch.commands import image_from_text as cli
from dalle_pytorch.compat import image_from_text, min_dalle
from dalle_pytorch.compat.min_dalle import as_pil
from dalle_pytorch.compat.min_dalle_request import Request
from dalle_pytorch.errors import UserError
from dalle_pytorch.generation.strategies import KnownTokens
from dalle_pytorch.models.vqgan import VQGAN, VQGANConfig


@pytest.fixture(scope="module")
def root(min_dalle_folder):
    """A folder as min-dalle leaves it, with small random weights."""
    return min_dalle_folder


@pytest.fixture(scope="module")
def model(root):
    return MinDalle(root, is_mega=False, is_verbose=False, device="cpu", bos_id=16383, norm_eps=1e-5)


@pytest.fixture(scope="module")
def vqgan(tmp_path_factory):
    """A checkpoint of taming-transformers of the small VQGAN with its encoder."""
    torch.manual_seed(0)
    sizes = {"ch": 32, "ch_mult": [1] * 5, "num_res_blocks": 1, "attention_levels": [], "z_channels": 32}
    net, path = VQGAN(VQGANConfig(**sizes, embed_dim=4)), tmp_path_factory.mktemp("vqgan") / "last.ckpt"
    with torch.no_grad():
        net.codebook.weight.copy_(torch.randn_like(net.codebook.weight) * 0.1)  # so that pictures have many codes
    state = {key.replace("codebook.", "quantize.embedding."): value for key, value in net.state_dict().items()}
    torch.save({"state_dict": state}, path)
    return path


@pytest.fixture
def brief(monkeypatch):
    """Only the last two rows of an image are drawn: quick, where a test says nothing of the others."""
    draw = min_dalle.draw_image_tokens
    above = torch.randint(16384, (1, 256), generator=torch.Generator().manual_seed(0))

    def last_rows(decoder, text, uniforms, sampling, given, **more):
        assert given is None
        return draw(decoder, text, uniforms, sampling, KnownTokens(above, torch.arange(256) < 224), **more)

    monkeypatch.setattr(min_dalle, "draw_image_tokens", last_rows)


@pytest.fixture
def drawn(model, monkeypatch):
    """The image tokens of each call; images are not decoded."""
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


def test_the_global_random_state_is_neither_read_nor_set(model, drawn, brief):
    state = torch.get_rng_state()
    model.generate_image("a cat", 7, 1)
    assert torch.equal(state, torch.get_rng_state())
    torch.rand(5)
    model.generate_image("a cat", 7, 1)
    assert torch.equal(drawn[0], drawn[1])
    model.generate_image("a cat", -1, 1)
    assert not torch.equal(drawn[0], drawn[2])


def test_a_picture_with_its_own_seed_does_not_depend_on_the_others(model, drawn, brief):
    model.generate_images("a cat", [5, 6, 7])
    model.generate_images("a cat", [6])
    assert torch.equal(drawn[0][1], drawn[1][0])
    assert not torch.equal(drawn[0][0], drawn[0][1])
    model.generate_images("a cat", [5, 0, -1])
    model.generate_images("a cat", [5, 0, -1])
    assert [torch.equal(*pair) for pair in zip(drawn[2], drawn[3], strict=True)] == [True, False, False]
    assert not torch.equal(drawn[2][1], drawn[2][2])


def test_integers_may_be_numpys(model, drawn, brief):
    model.generate_images("a cat", 3, 1, top_k=8)
    model.generate_images("a cat", np.int64(3), np.int32(1), top_k=np.int64(8))
    model.generate_images("a cat", [3, 4])
    model.generate_images("a cat", np.array([3, 4]), num_images=np.int64(2))
    assert torch.equal(drawn[0], drawn[1])
    assert torch.equal(drawn[2], drawn[3])


def test_any_number_of_pictures(model, drawn, brief):
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
        assert (tokens[:, done:] == 16383).all()  # what min-dalle's previews have there


def test_fractions_of_pixels_are_cut_off():
    """min-dalle's ``image.to(torch.uint8)``; rounding would give 1 and 255."""
    grid = torch.tensor([0.0, 0.99, 254.6, 255.0]).view(1, 4, 1).expand(1, 4, 3)
    assert np.asarray(as_pil(grid))[0, :, 0].tolist() == [0, 0, 254, 255]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text": ["a cat"]}, "text must be a text, got list"),
        ({"text": None}, "text must be a text, got NoneType"),
        ({"seed": None}, "seed must be a whole number, got None: 0 or less"),
        ({"seed": 7.5}, "seed must be a whole number, got 7.5"),
        ({"seed": "7"}, "seed must be a whole number, got '7'"),
        ({"seed": [1, None], "grid_size": None}, "seed must be a whole number, got None"),
        ({"seed": 2**64}, "less than 2"),
        ({"top_k": 0.9}, "top_k must be a whole number, got 0.9"),
        ({"temperature": float("nan")}, "temperature must be a finite number, got nan"),
        ({"temperature": "warm"}, "temperature must be a finite number, got 'warm'"),
        ({"supercondition_factor": float("inf")}, "supercondition_factor must be a finite number"),
    ],
)
def test_arguments_of_another_kind_are_refused_before_anything_is_drawn(change, message):
    with pytest.raises(UserError, match=message):
        Request.of(**{"text": "a cat", "seed": 7, "grid_size": 1, **change})


def test_whole_numbers_may_be_floats():
    request = Request.of("a cat", 7.0, 2.0, top_k=256.0)
    assert (request.seed, request.grid_size, request.top_k) == (7, 2, 256)
    assert isinstance(request.top_k, int)
    assert Request.of("a cat", torch.tensor([3, 4])).seed == [3, 4]
    assert Request.of("a cat", torch.tensor(3), 1).seed == 3


def test_options_change_what_they_should(model, drawn, brief):
    same = {"supercondition_factor": 4.0}
    model.generate_images("a cat", 3, 1, **same)
    model.generate_images("a cat", 3, 1, **same)
    assert torch.equal(drawn[0], drawn[1])
    for options in (
        {"negative_prompt": "the red"},
        {"top_p": 0.5},
        {"top_k": 2},
        {"temperature": 0.1},
        {"supercondition_factor": 1.0},
    ):
        model.generate_images("a cat", 3, 1, **{**same, **options})
        assert not torch.equal(drawn[0], drawn[-1]), options
    model.generate_images("a cat", 3, 2, temperature=0.0)
    assert (drawn[-1] == drawn[-1][0]).all()


def test_grids_are_min_dalles(model, brief):
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


def test_pictures_of_a_seamless_grid_are_its_parts(model, brief):
    """As in min-dalle, with arguments by name or by place."""
    grid = next(model.generate_raw_image_stream("a cat", 3, 2, is_seamless=True))
    for images in (
        model.generate_images("a cat", 3, 2, is_seamless=True),
        model.generate_images("a cat", 3, 2, False, True),
        next(model.generate_images_stream("a cat", 3, 2, False, True)),
    ):
        assert images.shape == (4, 256, 256, 3)
        for index, image in enumerate(images):
            column, row = divmod(index, 2)
            assert torch.equal(grid[256 * row : 256 * (row + 1), 256 * column : 256 * (column + 1)], image)


def test_seamless_tokens_lie_as_the_pictures_do(model, monkeypatch, brief):
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


def test_candidates_are_ranked(model, tiny_clip, brief):
    class Fixed:
        def tokenize(self, text, length, truncate):
            return torch.ones(1, length, dtype=torch.long)

    tiny_clip.text_tokenizer = Fixed()
    images = model.generate_images("a cat", [1, 2, 3])
    ranked = model.generate_images("a cat", [1, 2, 3], clip=tiny_clip, num_keep=2)
    scores = tiny_clip.scores(torch.ones(1, 5, dtype=torch.long), images.permute(0, 3, 1, 2) / 255)[0]
    best = scores.argsort(descending=True)[:2]
    torch.testing.assert_close(ranked, images[best])


@pytest.mark.parametrize("pil", [True, False])
def test_the_upper_rows_of_a_picture_stay(root, vqgan, pil):
    """With a VQGAN that has an encoder; of a picture that is no square its middle."""
    model = MinDalle(root, is_mega=False, is_verbose=False, device="cpu", vqgan=vqgan)
    vae, seen = model._decoder.dalle.vae, []
    model._decode = lambda dalle, tokens, grid: seen.append(tokens.clone()) or torch.zeros(2, 3, 256, 256)
    middle = np.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=np.uint8)
    wide = np.pad(middle, ((0, 0), (100, 100), (0, 0)))
    square = torch.from_numpy(middle).permute(2, 0, 1) / 255
    model.generate_images("a cat", 3, image=Image.fromarray(wide) if pil else square, keep_rows=14, num_images=2)
    expected = vae.encode(square[None]).expand(2, -1)
    assert len(expected[0, :224].unique()) > 5
    kept = seen[0][:, :224] == expected[:, :224]
    assert kept.float().mean() > 0.99  # pixels of the two ways differ in the last bit, and two codes may be as near
    assert not torch.equal(seen[0][:, 224:], expected[:, 224:])


@pytest.mark.parametrize(
    ("dtype", "precision", "vae"),
    [
        (torch.float32, None, torch.float32),
        (torch.float32, "int8", torch.float32),
        (torch.bfloat16, None, torch.bfloat16),
        (torch.float16, None, torch.float32),
    ],
)
def test_the_vqgans_type_follows_dtype(root, dtype, precision, vae):
    model = MinDalle(root, dtype, "cpu", False, is_verbose=False, precision=precision)
    assert {parameter.dtype for parameter in model._decoder.dalle.vae.parameters()} == {vae}
    assert model.device == torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_draws_on_a_cpu(root, dtype, brief):
    model = MinDalle(root, dtype, "cpu", False, is_verbose=False, cache_dtype=dtype)
    images = model.generate_images("a cat", 3, 1)
    assert images.shape == (1, 256, 256, 3)
    assert images.isfinite().all()
    assert model._decoder.cache_dtype == dtype


def test_weights_that_are_not_kept_give_the_same(root, model, brief):
    again = MinDalle(root, torch.float32, "cpu", False, False, False, bos_id=16383, norm_eps=1e-5)
    assert again._decoder is None
    assert torch.equal(again.generate_images("a cat", 3, 1), model.generate_images("a cat", 3, 1))


def test_a_long_prompt_is_cut_and_said(model, drawn, caplog, brief):
    model.generate_image("cat " * 100, 3, 1)
    assert "the model reads the first 62" in caplog.text


def test_misuse_is_named(model, root):
    with pytest.raises(ValueError, match="dtype must be one of"):
        MinDalle(root, torch.int8, "cpu", False)
    with pytest.raises(ValueError, match="keep_rows must lie in 1 to 15"):
        model.generate_images("a cat", 3, 1, image=Image.new("RGB", (8, 8)))
    with pytest.raises(ValueError, match="decoder"):  # detoker.pt has no encoder
        model.generate_images("a cat", 3, 1, image=Image.new("RGB", (8, 8)), keep_rows=2)


def test_what_has_no_effect_is_refused_before_drawing(model, tiny_clip, monkeypatch):
    monkeypatch.setattr(model, "_tokens", lambda *arguments: pytest.fail("drawn"))
    for options, message in (
        ({"num_images": 1, "is_seamless": True}, "is_seamless needs grid_size"),
        ({"grid_size": 1, "is_seamless": True, "clip": tiny_clip}, "clip ranks pictures, is_seamless makes one"),
        ({"grid_size": -1}, "grid_size must be at least 1, got -1"),
        ({"grid_size": 0}, "grid_size must be at least 1, got 0"),
        ({"grid_size": 1, "negative_prompt": "a dog", "supercondition_factor": 1.0}, "supercondition_factor above 1"),
        ({"grid_size": 1, "num_keep": 1}, "num_keep=1 keeps the best, which needs a clip"),
        ({"grid_size": 2, "num_keep": 5, "clip": tiny_clip}, r"num_keep \(5\) must lie in 1 to .* \(4\)"),
        ({"grid_size": 2, "num_keep": 0, "clip": tiny_clip}, r"num_keep \(0\) must lie in 1 to .* \(4\)"),
        ({"grid_size": 1, "keep_rows": 3}, "keep_rows=3 are rows of a picture: give image="),
        ({"grid_size": 1, "top_p": 1.5}, "top_p must lie in"),
        ({"grid_size": 1, "temperature": -1}, "temperature must not be negative"),
    ):
        for method in (model.generate_image, model.generate_images, model.generate_images_stream):
            with pytest.raises(ValueError, match=message):
                method("a cat", 3, **options)


def test_what_cannot_run_is_refused_before_weights_are_read(tmp_path):
    for options, message in (
        ({"precision": "fp64"}, "precision must be one of fp32, bf16, fp16, int8, got 'fp64'"),
        ({"precision": "stored"}, "precision must be one of"),
        ({"device": "cud"}, "device=cud cannot be used here"),
        ({"device": "cuda:77"}, "device=cuda:77 cannot be used here"),
    ):
        with pytest.raises(ValueError, match=message):
            MinDalle(tmp_path, is_verbose=False, **{"device": "cpu", **options})


@pytest.mark.parametrize(
    ("name", "value", "kind"),
    [
        ("seed", None, "a whole number"),
        ("seed", [1, 2.5], "a whole number"),
        ("seed", 1 << 65, "less than 2"),
        ("grid_size", 2.5, "a whole number"),
        ("temperature", "hot", "a finite number"),
        ("supercondition_factor", float("nan"), "a finite number"),
    ],
)
def test_arguments_of_another_kind_are_named(name, value, kind):
    with pytest.raises(UserError, match=f"^{name} must be {kind}"):
        Request.of(**{"text": "a", "seed": 1, "grid_size": 1, name: value})


def test_an_empty_folder_is_none(tmp_path, monkeypatch):
    """min-dalle makes it before it downloads."""
    (tmp_path / "dalle_bart_mini").mkdir()
    asked = []
    monkeypatch.setattr(hub, "fetch", lambda name, kind=None: asked.append(name) or tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        MinDalle(tmp_path, is_mega=False, is_verbose=False, device="cpu")
    assert asked == ["dalle_mini"]


@pytest.fixture
def command(root, monkeypatch, capsys):
    """Run image_from_text; returns its lines, or the exit code and its errors."""

    def run(*flags):
        given = ["--no-mega", "--text=a cat", "--seed=3", f"--models-root={root}", "--device=cpu", *flags]
        monkeypatch.setattr(sys, "argv", ["image_from_text", *map(str, given)])
        try:
            cli.main()
        except SystemExit as stop:
            return stop.code, capsys.readouterr().err
        return capsys.readouterr().out.splitlines()

    return run


def test_the_command_takes_min_dalles_flags(command, tmp_path):
    out = tmp_path / "cat.png"
    lines = command("--grid-size=1", f"--image-path={out}", "--top_k=64")
    with Image.open(out) as image:
        assert image.size == (256, 256)
    assert len(lines) == 37
    assert lines[-1] == str(out)


@pytest.fixture
def quick(monkeypatch):
    """No weights: a white picture in place of a drawn one; the flags of each call."""
    calls = []
    monkeypatch.setattr(cli, "draw", lambda flags: calls.append(flags) or Image.new("RGB", (8, 8), "white"))
    return calls


def test_the_command_loses_no_picture(command, quick, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert [command()[-1] for _ in range(3)] == ["generated.png", "generated_1.png", "generated_2.png"]
    (tmp_path / "folder").mkdir()
    assert command("--image-path=folder")[-1] == "folder/generated.png"
    assert command("--image-path=folder")[-1] == "folder/generated_1.png"
    assert command("--image-path=new/my.cat.png")[-1] == "new/my.cat.png"
    assert command("--image-path=cat")[-1] == "cat.png"
    assert command("--image-path=cat.JPG")[-1] == "cat.JPG"
    Image.new("RGB", (3, 3)).save("cat.png")
    drawn = len(quick)
    for path, message in (
        ("cat", "error: cat.png exists; choose another --image-path, or --overwrite it\n"),
        ("cat.xyz", "error: --image-path cat.xyz is no picture; end it in one of"),
        ("cat.png/dog", "error: --image-path cat.png/dog.png lies in cat.png, which is a file\n"),
    ):
        code, error = command(f"--image-path={path}")
        assert code == 1
        assert error.startswith(message)
    assert len(quick) == drawn
    assert command("--image-path=cat", "--overwrite")[-1] == "cat.png"
    with Image.open("cat.png") as image:
        assert image.size == (8, 8)


def test_flags_of_the_command_reach_the_model(command, monkeypatch, tmp_path):
    made = []

    class Recorded(MinDalle):
        def __init__(self, *arguments, **options):
            made.append((arguments[1], options))
            super().__init__(*arguments, **options)

        def generate_image(self, *arguments, **options):
            return Image.new("RGB", (8, 8))

    monkeypatch.setattr(image_from_text, "MinDalle", Recorded)
    monkeypatch.chdir(tmp_path)
    command("--exact")
    command("--bf16", "--precision=int8")
    assert made == [
        (torch.float32, {"precision": None, "bos_id": 16383, "norm_eps": 1e-5}),
        (torch.bfloat16, {"precision": "int8"}),
    ]
    assert command("--fp16", "--bf16")[0] == 2
    assert command("--fp16", "--exact")[0] == 2
    assert command("--exact", "--precision=bf16") == (
        1,
        "error: --exact draws as min-dalle does, in fp32: leave --precision bf16 out\n",
    )
    assert "error: device=cud cannot be used here" in command("--device=cud")[1]
    drawn = len(made)
    for flag in ("temperature", "top-p", "supercondition-factor"):
        for value in ("nan", "inf"):
            code, error = command(f"--{flag}={value}")
            assert (code, error.count("\n")) == (1, 1)
            assert error.startswith(f"error: {flag.replace('-', '_')} must be a finite number, got {value}")
    assert len(made) == drawn  # before weights are read
