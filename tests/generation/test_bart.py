"""A DALLEBart token by token gives what one pass over all of them gives."""

import pytest
import torch

from dalle_pytorch import Generator, SamplingConfig, caption_picture, image_log_likelihood
from dalle_pytorch.evaluation.baselines import image_loss
from dalle_pytorch.evaluation.exact_match import greedy_matches
from dalle_pytorch.generation.captions import draw_texts
from dalle_pytorch.generation.decoder import Decoder
from dalle_pytorch.generation.strategies import generate_image_tokens
from dalle_pytorch.text import BPETokenizer

TEXT = torch.tensor([[3, 7, 4, 0], [8, 5, 0, 0]])


@pytest.mark.parametrize("given", [0, 1, 6, 15])
def test_cached_equals_uncached(make_bart, assert_exact, given):
    """Two prompts, with and without first tokens, alone and with several candidates, one or more positions a step."""
    assert_exact(Decoder(make_bart()), (1, given, 1), (3, given, 1), (1, given, 4), (3, given, 3))


@pytest.fixture
def prompted(make_bart):
    """One that reads prompts."""
    tokenizer = BPETokenizer.train(["a red apple", "a blue car"], 300)
    ids = tokenizer.vocab_size
    bart = make_bart(
        text_vocab_size=ids + 2, text_pad=ids, text_eos=ids + 1, text_positions=14, caption_dropout=0.1, dropout=0.3
    )
    bart.text_tokenizer = tokenizer
    return bart


GUIDED = SamplingConfig(temperature=0.8, top_k=5, cfg_scale=2.0)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
def test_a_candidate_does_not_depend_on_the_others(prompted, precision):
    """Whatever is drawn beside it, with guidance away from a prompt."""
    drawn = [
        Generator(prompted, batch_size=size, precision=precision).candidates(
            "a red apple", [4, 2, 0], seed=3, sampling=GUIDED, negative_prompt="a car"
        )
        for size in (1, 2, 3)
    ]
    assert torch.equal(drawn[0].image_tokens, drawn[1].image_tokens)
    assert torch.equal(drawn[0].image_tokens, drawn[2].image_tokens)
    assert len(drawn[0].image_tokens.unique(dim=0)) == 3


def test_guided_tokens_are_those_of_uncached_scores(prompted):
    """Greedy, so that the tokens follow from the scores alone."""
    sampling = SamplingConfig(temperature=0.0, cfg_scale=3.0)
    (tokens,) = (
        Generator(prompted).candidates("a red apple", [0], sampling=sampling, negative_prompt="a car").image_tokens
    )
    text, null = (prompted.text_tokenizer.tokenize(part, 12) for part in ("a red apple", "a car"))
    cond, uncond = (prompted.image_logits(part, tokens[None]) for part in (text, null))
    assert torch.equal((uncond + 3 * (cond - uncond)).argmax(-1)[0], tokens)
    assert not torch.equal(cond.argmax(-1)[0], tokens)


def test_dropout_is_off_while_drawing(prompted):
    """A model in training draws what it would in evaluation, and stays in training."""
    text, uniforms = prompted.text_tokenizer.tokenize(["a red apple"], 12), torch.rand(2, 16)
    given = torch.randint(12, (1, 3))
    expected = generate_image_tokens(prompted, text, uniforms, GUIDED, given_tokens=given)
    prompted.train()
    assert torch.equal(generate_image_tokens(prompted, text, uniforms, GUIDED, given_tokens=given), expected)
    assert prompted.training
    assert all(module.training for module in prompted.encoder.modules())
    assert not prompted.vae.training


def test_likelihoods_and_exact_matches(make_bart):
    bart = make_bart()
    image = torch.randint(12, (2, 16))
    log_probs = bart.image_logits(TEXT, image).log_softmax(-1)
    expected = log_probs.gather(2, image[..., None]).sum(dim=(1, 2))
    torch.testing.assert_close(image_log_likelihood(bart, TEXT, image), expected)
    greedy = generate_image_tokens(bart, TEXT, torch.zeros(2, 16), SamplingConfig(temperature=0.0))
    greedy[1, 5] = (greedy[1, 5] + 1) % 12
    assert (~greedy_matches(bart, TEXT, greedy)).nonzero().tolist() == [[1, 5]]
    assert image_loss(bart, TEXT, image) == pytest.approx(bart.loss(TEXT, image).image.item())


def test_it_writes_no_captions(prompted):
    with pytest.raises(ValueError, match="no head to write them"):
        draw_texts(prompted, torch.zeros(1, 0, dtype=torch.long), torch.rand(1, 12), SamplingConfig())
    with pytest.raises(ValueError, match="no head to write them"):
        caption_picture(prompted, torch.rand(3, 16, 16))
