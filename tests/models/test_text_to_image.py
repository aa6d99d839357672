"""What DALLE and DALLEBart have in common, of both."""

import ast
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import dalle_pytorch
from dalle_pytorch.models import loss
from dalle_pytorch.models.text_to_image import TextToImage, TextToImageConfig

TEXT = torch.tensor([[3, 4, 5, 0, 0], [6, 7, 8, 4, 5]])
IMAGE = torch.arange(32).view(2, 16) % 12
PACKAGE = Path(dalle_pytorch.__file__).parent


@pytest.fixture(params=["make_dalle", "make_bart"])
def model(request) -> TextToImage:
    """A small network of each kind."""
    return request.getfixturevalue(request.param)()


def test_the_nats_of_an_image_are_those_of_its_logits(model):
    logits = model.image_logits(TEXT, IMAGE)
    assert logits.shape == (2, 16, model.codebook_size)
    nats = F.cross_entropy(logits.transpose(1, 2), IMAGE, reduction="none")
    torch.testing.assert_close(model.image_nll(TEXT, IMAGE), nats)


def test_the_nats_of_a_token_do_not_depend_on_later_ones(model):
    other = IMAGE.clone()
    other[:, 9:] = 11 - other[:, 9:]
    ours, theirs = model.image_nll(TEXT, IMAGE), model.image_nll(TEXT, other)
    torch.testing.assert_close(ours[:, :9], theirs[:, :9])
    assert not torch.isclose(ours[:, 9:], theirs[:, 9:]).any()


def test_logits_exist_for_a_few_positions_at_a_time(model, monkeypatch):
    expected, rows = model.image_nll(TEXT, IMAGE), []
    linear = loss.linear
    monkeypatch.setattr(loss, "ROWS", 5)
    monkeypatch.setattr(loss, "linear", lambda x, *args: rows.append(x.shape[1]) or linear(x, *args))
    torch.testing.assert_close(model.image_nll(TEXT, IMAGE), expected)
    assert rows == [5] * 6 + [2]


def test_a_loss_says_what_is_logged(model):
    losses = model.loss(TEXT, IMAGE)._asdict()
    assert losses["loss"].isfinite()
    assert losses["image"] > 0
    assert (losses["text"] is not None) == model.has_text_head


def test_misfits_are_named(model):
    with pytest.raises(ValueError, match=r"15 image tokens given.*has 16"):
        model.image_nll(TEXT, IMAGE[:, :15])
    with pytest.raises(ValueError, match=r"image tokens span.*0 to 11"):
        model.image_nll(TEXT, IMAGE + 1)
    with pytest.raises(ValueError, match=r"text tokens span.*0 to 8"):
        model.image_logits(TEXT + 1, IMAGE)
    with pytest.raises(ValueError, match=r"6 text tokens given.*text_len = 5"):
        model.image_logits(F.pad(TEXT, (0, 1)), IMAGE)


def test_settings_build_their_network(model):
    assert isinstance(model.config, TextToImageConfig)
    again = model.config.build(model.vae)
    assert type(again) in type(model).__mro__
    again.load_state_dict(model.state_dict())
    assert torch.equal(again.eval().image_logits(TEXT, IMAGE), model.image_logits(TEXT, IMAGE))


@pytest.mark.parametrize("bos", [True, False])
def test_the_nats_of_a_caption_end_with_its_first_pad(make_dalle, bos):
    dalle = make_dalle(bos=bos)
    nats, counted = dalle.text_nll(TEXT)
    skipped = 0 if bos else 1  # the first token is given
    assert counted.sum(dim=1).tolist() == [4 - skipped, 5 - skipped]
    log_probs = dalle.logits(TEXT, IMAGE).text.log_softmax(-1)
    targets = dalle.pad_text(TEXT)[:, skipped:]
    expected = -log_probs.gather(2, targets[..., None])[..., 0]
    torch.testing.assert_close(nats, expected * counted)
    mean = (nats.sum() / counted.sum()).item()
    assert dalle.loss(TEXT, IMAGE).text.item() == pytest.approx(mean)


def test_the_next_text_token_is_a_word_or_the_end(make_dalle):
    dalle = make_dalle()
    for given in (0, 3):
        scores = dalle.next_text_scores(TEXT[:, :given])
        logits = dalle.logits(TEXT[:, :given], IMAGE[:, :0]).text[:, given]
        torch.testing.assert_close(scores[:, 1:], logits[:, 1:9])
        torch.testing.assert_close(scores[:, 0], logits[:, 9 + given])  # the pad of that position


def test_a_network_without_text_head_says_so(make_bart):
    bart = make_bart()
    for call in (bart.text_nll, bart.next_text_scores):
        with pytest.raises(ValueError, match="no head to write them"):
            call(TEXT)


def test_only_models_ask_for_the_class_of_a_network():
    """Elsewhere the contract does."""
    classes = {"DALLE", "DALLEBart", "DALLEConfig", "DALLEBartConfig"}
    found = []
    for path in PACKAGE.rglob("*.py"):
        if path.relative_to(PACKAGE).parts[0] == "models":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("isinstance", "issubclass"):
                names = {getattr(part, "id", getattr(part, "attr", "")) for part in ast.walk(node.args[1])}
                found += [f"{path.name}:{node.lineno}"] if names & classes else []
    assert not found
