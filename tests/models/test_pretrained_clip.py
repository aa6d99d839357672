"""Frames, pictures, types and limits of released CLIPs; their outputs are compared in tests/checkpoints/importers."""

import pytest
import torch

from dalle_pytorch.generation.rerank import rank, score
from dalle_pytorch.models.pretrained_clip import PretrainedCLIP, PretrainedCLIPConfig
from dalle_pytorch.text import CLIPTokenizer

SMALL = {
    "embed_dim": 16, "image_size": 16, "patch_size": 4, "image_width": 16, "image_depth": 2, "image_heads": 2,
    "image_hidden": 24, "text_vocab_size": 30, "context_len": 8, "text_width": 16, "text_depth": 2, "text_heads": 2,
    "text_hidden": 24, "start_id": 28, "end_id": 29,
}  # fmt: skip
SIGLIP = {
    **SMALL, "image_pool": "attention", "text_causal": False, "text_pool": "last", "text_proj_bias": True,
    "start_id": None, "end_id": 1, "pad_id": 1, "logit_bias": True, "image_activation": "gelu_tanh",
    "text_activation": "gelu_tanh", "image_eps": 1e-6, "text_eps": 1e-6, "resize": "squash",
}  # fmt: skip
RESNET = {**SMALL, "image_size": 64, "image_stages": [1, 1, 1, 1], "image_width": 4, "image_heads": 4}
KINDS = {"clip": SMALL, "siglip": SIGLIP, "resnet": RESNET}
TEXT = torch.tensor([[5, 3, 7, 0, 0], [0, 0, 0, 0, 0], [2, 4, 6, 8, 9]])


def make(kind: str, **settings) -> PretrainedCLIP:
    clip = PretrainedCLIP(PretrainedCLIPConfig(**{**KINDS[kind], **settings})).eval()
    with torch.no_grad():
        for parameter in clip.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
        for name, buffer in clip.named_buffers():
            buffer.copy_(torch.rand_like(buffer) + 0.5 * name.endswith("var"))
    return clip


@pytest.fixture(params=KINDS)
def clip(request) -> PretrainedCLIP:
    return make(request.param)


def test_marks_go_round_what_is_read():
    framed, end = make("clip").frame(TEXT)
    assert framed.tolist() == [[28, 5, 3, 7, 29, 0, 0, 0], [28, 29, 0, 0, 0, 0, 0, 0], [28, 2, 4, 6, 8, 9, 29, 0]]
    assert end.tolist() == [4, 1, 6]
    framed, end = make("siglip").frame(TEXT)
    assert framed.tolist() == [[5, 3, 7, 1, 1, 1, 1, 1], [1] * 8, [2, 4, 6, 8, 9, 1, 1, 1]]
    assert end.tolist() == [3, 0, 5]
    framed, _ = make("siglip", token_shift=1).frame(TEXT)
    assert framed[0].tolist() == [4, 2, 6, 1, 1, 1, 1, 1]


def test_a_mask_leaves_text_out_and_closes_the_gap(clip):
    mask = torch.tensor([[True, False, True, False, False], [False] * 5, [True] * 5])
    closed = torch.tensor([[5, 7, 0, 0, 0], [0, 0, 0, 0, 0], [2, 4, 6, 8, 9]])
    torch.testing.assert_close(clip.encode_text(TEXT, mask), clip.encode_text(closed))
    torch.testing.assert_close(clip.encode_text(TEXT[:1]), clip.encode_text(TEXT[:1, :3]))


def test_clip_does_not_read_behind_its_end_mark_and_siglip_does():
    for kind, reads in (("clip", False), ("siglip", True)):
        clip = make(kind)
        before = clip.encode_text(TEXT[:1])
        with torch.no_grad():
            clip.text.positions[-2] += torch.randn(16)
        assert (not torch.allclose(clip.encode_text(TEXT[:1]), before)) == reads


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.half])
def test_sixteen_bits_give_nearly_the_same_features_in_fp32(clip, dtype):
    images = torch.rand(2, 3, 20, 30)
    exact = torch.cat([clip.encode_text(TEXT), clip.encode_image(images)])
    clip.to(dtype)
    rounded = torch.cat([clip.encode_text(TEXT), clip.encode_image(images)])
    assert rounded.dtype == torch.float32
    assert ((exact * rounded).sum(dim=1) > 0.995).all()
    torch.testing.assert_close(rounded.norm(dim=1), torch.ones(5))


def test_pictures_are_scaled_cut_and_normalised():
    clip = make("clip", mean=[0.5, 0.5, 0.5], std=[0.5, 0.25, 0.125])
    images = torch.rand(2, 3, 16, 16)
    same = clip.prepare(images)
    torch.testing.assert_close(same, (images - 0.5) / torch.tensor([0.5, 0.25, 0.125])[:, None, None])
    wide = torch.zeros(1, 3, 16, 48)
    wide[..., 16:32] = images[:1]
    torch.testing.assert_close(clip.prepare(wide), same[:1])
    torch.testing.assert_close(clip.prepare(wide.mT), same[:1].mT)
    squashed = make("clip", resize="squash").prepare(wide)
    assert squashed.shape == (1, 3, 16, 16)
    assert squashed[..., 0].abs().max() > 0  # black columns stay in the picture
    edge = torch.zeros(1, 3, 64, 64)
    edge[..., 32:] = 1.0
    assert (clip.prepare(edge)[0, 0].abs() <= 1).all()  # bicubic would go beyond black and white


def test_features_do_not_depend_on_the_batch_and_inputs_stay(clip):
    images = torch.rand(40, 3, 16, 16)
    copy = images.clone()
    together = clip.encode_image(images)
    torch.testing.assert_close(together[33:], clip.encode_image(images[33:]), atol=1e-5, rtol=0)
    assert torch.equal(images, copy)
    assert clip.encode_image(images[:0]).shape == (0, 16)


def test_scoring_does_not_teach(clip):
    """Batch norm's statistics too stay as they are, even in training mode."""
    images, state = torch.rand(2, 3, 16, 16), {key: tensor.clone() for key, tensor in clip.state_dict().items()}
    before = clip.encode_image(images)
    torch.testing.assert_close(clip.train().encode_image(images), before)
    assert all(torch.equal(tensor, state[key]) for key, tensor in clip.state_dict().items())


def test_scores_are_cosines(clip):
    images = torch.rand(2, 3, 16, 16)
    scores = clip.scores(TEXT, images)
    assert scores.shape == (3, 2)
    torch.testing.assert_close(scores, clip.encode_text(TEXT) @ clip.encode_image(images).T)
    assert scores.abs().max() <= 1 + 1e-6
    assert clip.logit_scale > 0


def test_it_ranks_beside_a_clip_of_ours(tiny_clip):
    clip = make("clip", text_vocab_size=49_408, start_id=49_406, end_id=49_407)
    with pytest.raises(ValueError, match="no text tokenizer"):
        score(torch.rand(2, 3, 16, 16), "a red apple", [clip])
    clip.text_tokenizer = tiny_clip.text_tokenizer = CLIPTokenizer()
    tiny_clip.text_emb = torch.nn.Embedding(49_408, 16)
    tiny_clip.config.text_vocab_size = 49_408
    images = torch.rand(3, 3, 16, 16)
    both = score(images, "a red apple on a table beside a blue car", [tiny_clip, clip])
    assert both.shape == (2, 3)
    tokens = clip.text_tokenizer.tokenize("a red apple on a table", 6)
    torch.testing.assert_close(both[1:], clip.scores(tokens, images))  # cut to its own context
    assert rank(both[1:], images, 1).indices.item() == both[1].argmax()


def test_misfits_are_named(clip):
    length = clip.config.text_len
    with pytest.raises(ValueError, match=rf"{length + 1} text tokens given.*text_len = {length}"):
        clip.encode_text(torch.ones(1, length + 1, dtype=torch.long))
    with pytest.raises(ValueError, match=r"\[30, 30\].*0 to 29"):
        clip.encode_text(torch.full((1, 2), 30))
    with pytest.raises(ValueError, match=r"text_mask of shape \(1, 2\)"):
        clip.encode_text(TEXT[:1], torch.ones(1, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match="1 channels"):
        clip.encode_image(torch.rand(1, 1, 16, 16))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_pool": "mean"}, "class, attention"),
        ({"text_activation": "relu"}, "text_activation must be one of gelu"),
        ({"image_heads": 3}, r"image_heads \(3\).*\(16\)"),
        ({"text_heads": 3}, r"text_heads \(3\)"),
        ({"image_stages": [1, 1]}, "four stages"),
        ({"image_size": 2}, "image_size"),
        ({"image_pool": "attention", "embed_dim": 8}, "no projection"),
        ({"end_id": 30}, r"end_id \(30\) must be below 30"),
        ({"context_len": 2}, "text_len must be at least 1"),
        ({"std": [0.5, 0.5, 0.0]}, "std positive"),
        ({"resize": "pad"}, "crop, squash"),
    ],
)
def test_settings_out_of_range_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        PretrainedCLIPConfig(**{**SMALL, **settings})
