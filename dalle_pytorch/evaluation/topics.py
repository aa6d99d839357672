"""What the page says about numbers: which come first, what belongs together, and each in a few words."""

import re
from collections.abc import Iterable
from typing import NamedTuple


class Topic(NamedTuple):
    """Numbers that are read together."""

    title: str
    names: str
    """Regular expression of their names."""
    note: str = ""
    folded: bool = False
    """They are also in a plot or table of the page, which is easier to read."""


TOPICS = (  # the first that fits has a number
    Topic("Sweep of sampling settings", r".+_at_.+", folded=True),
    Topic("Best of N", r".+_best_of_\d+", "Of N candidates the ranker's choice, as the judge sees it.", folded=True),
    Topic("Completed pictures", r"complete_.+", "Part of a picture is given, the model draws the rest."),
    Topic(
        "Nearest training pictures", r"nearest_.+", "A model that does not copy is no nearer than held-out pictures."
    ),
    Topic("JPEG and WebP", r"(jpeg|webp)_.+", "Files of at most as many bytes as the tokens take.", folded=True),
    Topic("Reconstructions, one by one", r"psnr|l1|ssim|ms_ssim.*|lpips.*", "Of each picture, then the mean."),
    Topic(
        "Reconstructions as a set", r"r(fid|kid|cmmd)(_.+)?|reconstruction_.+", "Their features beside the originals'."
    ),
    Topic("Codes and size", r"codebook_.+|(entropy_)?bits_per_pixel", "Over the pictures that were looked at."),
    Topic(
        "Likelihood of held-out pairs",
        r"(image|text)_(nats|bits).*|gain_.+",
        "Gains are differences sample by sample, so that their intervals are narrow.",
    ),
    Topic("Pictures and their captions", r"(clip_score|r_precision|follows).*"),
    Topic(
        "Drawn pictures as a set",
        r"(fid|kid|cmmd|precision|recall|inception_score)(_.+)?",
        "Their features beside those of real pictures. Compare only values of equally many pictures.",
    ),
    Topic("What a probe still sees", r"kept_.+", "In reconstructions, beside the originals."),
    Topic("Right first guesses", r"accuracy_.+", "Of values that the probe knows."),
    Topic("Retrieval", r"(text_to_image|image_to_text)_r\d+", "Among all pairs that were looked at."),
    Topic("Zero-shot classes", r"zero_shot_.+"),
    Topic("Phrases told apart", r"phrases_told", "Of captions that differ by one phrase only."),
    Topic("Calibration", r"logit_scale.*|caption_nats.*|calibration_.+", "The choice of a caption as probabilities."),
    Topic("Other numbers", r".+"),
)

HEADLINES = (
    *("psnr", "ssim", "lpips_vgg", "rfid", "rfid_clip", "rfid_mobilenet", "codebook_perplexity", "bits_per_pixel"),
    *("clip_score", "r_precision", "follows_style", "follows_concept", "fid", "fid_clip", "image_nats"),
    *("gain_of_caption", "text_to_image_r1", "image_to_text_r1", "zero_shot_concept_top1", "calibration_error"),
)
"""Numbers that stand large at the top, in this order."""
MOST = 6
"""So many of them."""
ASIDE = {"_real": "real pictures", "_unigram": "frequencies alone"}
"""Endings of numbers that a headline is read beside."""

WORDS = {
    r"phrases_told": "the own phrase fits better than each other one",
    r"psnr": "peak signal-to-noise ratio",
    r"l1": "mean absolute difference of pixels",
    r"ssim": "structural similarity",
    r"ms_ssim.*": "structural similarity over scales",
    r"lpips.*": "perceptual distance",
    r"r?fid.*": "Fréchet distance of features",
    r"r?kid.*": "kernel distance of features, unbiased",
    r"r?cmmd.*": "kernel distance of CLIP features",
    r"precision.*": "drawn pictures that lie among real ones",
    r"recall.*": "real pictures that lie among drawn ones",
    r"reconstruction_precision.*": "reconstructions that lie among originals",
    r"reconstruction_recall.*": "originals that lie among reconstructions",
    r"inception_score": "sure of each picture, varied over all",
    r"codebook_used": "codes that occur",
    r"codebook_dead": "codes that do not",
    r"codebook_perplexity": "as many codes, were all equally frequent",
    r"bits_per_pixel": "size of the image tokens",
    r"entropy_bits_per_pixel": "with a coder that knows their frequencies",
    r"image_nats": "surprise at image tokens, given the caption",
    r"image_nats_unigram": "by token frequencies of training alone",
    r"image_nats_shuffled_captions": "given another picture's caption",
    r"gain_over_unigram": "what the model knows beyond frequencies",
    r"gain_of_caption": "what the right caption saves",
    r"image_bits_per_pixel": "the same as a size",
    r"text_nats": "surprise at text tokens",
    r"text_nats_unigram": "by token frequencies of training alone",
    r"clip_score": "100 times the cosine of picture and caption",
    r"clip_score_real": "the same of the real pictures",
    r"r_precision": "nearer to its caption than to others",
    r"r_precision_real": "the same of the real pictures",
    r"follows_(\w+)": r"drawn as the caption asks: \1",
    r"follows_(\w+)_real": r"the same of the real pictures: \1",
    r"follows_(\w+)_shuffled": r"with another's caption: \1",
    r"kept_(\w+)": r"seen in the reconstruction as it was: \1",
    r"kept_(\w+)_real": r"the same of the originals: \1",
    r"kept_(\w+)_shuffled": r"with another picture: \1",
    r"accuracy_(\w+)": r"right at the first guess: \1",
    r"accuracy_(\w+)_top(\d+)": r"right among the first \2: \1",
    r"zero_shot_(\w+)_top1": r"right at the first guess: \1",
    r"zero_shot_(\w+)_top5": r"right among the first five: \1",
    r"text_to_image_r(\d+)": r"a right picture among the first \1",
    r"image_to_text_r(\d+)": r"a right caption among the first \1",
    r"logit_scale": "of the model",
    r"logit_scale_best": "that fits these pairs best",
    r"caption_nats": "surprise at the right caption",
    r"caption_nats_best_scale": "the same with the best scale",
    r"calibration_error": "gap of confidence and share of right choices",
}
"""What a number is, by the regular expression of its name; of several that fit the last counts."""


def headlines(names: Iterable[str]) -> list[str]:
    """The numbers for the top of the page."""
    found = set(names)
    return [name for name in HEADLINES if name in found][:MOST]


def grouped(names: Iterable[str]) -> list[tuple[Topic, list[str]]]:
    """All numbers by topic: topics in order of their first number, those that are folded last."""
    groups: dict[Topic, list[str]] = {}
    for name in names:
        topic = next(topic for topic in TOPICS if re.fullmatch(topic.names, name))
        groups.setdefault(topic, []).append(name)
    return sorted(groups.items(), key=lambda group: group[0].folded)


def words(name: str) -> str:
    """A number in a few words; nothing where its name must do."""
    found = [(pattern, text) for pattern, text in WORDS.items() if re.fullmatch(pattern, name)]
    return re.sub(found[-1][0], found[-1][1], name, count=1) if found else ""
