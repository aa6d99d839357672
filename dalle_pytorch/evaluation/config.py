"""Settings of evaluate.py, and which kinds of checkpoint they are for."""

from dataclasses import dataclass, field

from dalle_pytorch.data.config import DataConfig
from dalle_pytorch.errors import UserError, at_least_one, finite, not_negative
from dalle_pytorch.evaluation.completion import CompletionConfig
from dalle_pytorch.evaluation.sweep import SweepConfig
from dalle_pytorch.generation.sampling import SamplingConfig
from dalle_pytorch.text.phrases import check_phrases


@dataclass(kw_only=True)
class EvaluateConfig:
    """What to judge, on which pictures, through whose eyes."""

    checkpoint: str = "???"
    """An image tokenizer, a DALLE, a CLIP or a probe: a checkpoint, or another program's weights (docs/weights.md)."""
    data: DataConfig = field(default_factory=DataConfig)
    """Where the pictures are; train_split gives a DALLE's unigram model its frequencies."""
    split: str = "val"
    """Split to judge on; several are joined by "+"."""
    max_samples: int = 1000
    """Pictures of the split that are looked at, drawn by ``seed``; 0 = all."""
    max_train: int = 2000
    """Training pictures for the frequencies; 0 = all."""
    caption: int = 0
    """Which of a picture's captions is read and drawn, from 0; its last where there are fewer. 1 has emoji's styles."""
    judge: str | None = None
    """A CLIP: of a DALLE, CLIP score, R-precision and distances like fid_clip; of an image tokenizer, rfid_clip."""
    ranker: str | None = None
    """Another CLIP, or a class of yours as package.module.Class, which ranks a DALLE's candidates; the judge then draws
    the best-of-N curve."""
    inception: str | None = None
    """FID's Inception, pt_inception-2015-12-05-6726825d.pth: FID, KID, precision, recall, Inception score."""
    probe: str | None = None
    """A probe, of commands.train_probe: whether drawn pictures show what is asked for, and distances like fid_probe."""
    vgg: str | None = None
    """torchvision's vgg16-397923af.pth: LPIPS of an image tokenizer, and of what a DALLE completes."""
    lpips_heads: str | None = None
    """LPIPS' own weights for ``vgg``, vgg.pth of version 0.1; null = those of torchmetrics."""
    alexnet: str | None = None
    """torchvision's alexnet-owt-7be5be79.pth: LPIPS of an image tokenizer through another network."""
    encoder: str | None = None
    """An image encoder, for distances between sets: torchvision's mobilenet_v2-b0353104.pth (fid_mobilenet), or a
    vision model of transformers, a folder or an id of the hub (fid_dinov2)."""
    phrases: list[str] = field(default_factory=list)
    """Phrases that exclude each other, as [noto emoji,twemoji]: how often a DALLE finds a picture likelier, or a CLIP
    nearer, with its own than with another one in its caption."""
    num_prompts: int = 16
    """Captions that a DALLE draws, all different; 0 = it draws nothing."""
    num_candidates: int = 16
    """Candidates of each."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """How they are drawn."""
    sweep: SweepConfig = field(default_factory=SweepConfig)
    """Other ways to draw them, all combinations, as sweep.cfg_scale=[1,2,3] sweep.temperature=[0.7,1]."""
    complete: CompletionConfig = field(default_factory=CompletionConfig)
    """Held-out pictures that a DALLE completes, as complete.rows=[0.25,0.5] complete.hole=[0.5]."""
    memorisation: bool = False
    """Look up the nearest training pictures of what a DALLE draws, among all of data.train_split."""
    codecs: bool = True
    """Set JPEG and WebP beside an image tokenizer."""
    blurs: list[float] = field(default_factory=lambda: [0.0])
    """Radii in pixels of Gaussian filters over real and drawn pictures before distances between them; [0,1,2,4,8] is
    the paper's protocol for FID."""
    rounds: int = 1000
    """Draws for the confidence interval of a mean."""
    halves: int = 20
    """Halves for the interval of a distance like FID; 0 = no interval."""
    seed: int = 0
    """Of the choice of pictures, of the candidates and of the intervals."""
    device: str = "auto"
    """"auto" (a GPU where there is one), "cpu", "cuda", "cuda:1", ..."""
    threads: int = 1
    """Of each process on the CPU. Sums over another number of threads differ in their last digits: for equal bytes on
    any machine leave it, and start several processes with torchrun."""
    out: str = "???"
    """Folder to make; it must not hold files yet."""

    def __post_init__(self) -> None:
        """Validate.

        Raises:
            UserError: a field is out of range; names it.
        """
        finite(self)
        not_negative(self, "max_samples", "max_train", "caption", "num_prompts", "halves")
        if any(radius < 0 for radius in self.blurs):
            raise UserError(f"blurs must not be negative, got {self.blurs}")
        at_least_one(self, "num_candidates", "threads")
        if self.max_samples == 1:
            raise UserError("max_samples must be at least 2 (0 = all), got 1")
        if self.num_prompts == 1:
            raise UserError("num_prompts must be at least 2 (0 = draw nothing), got 1")
        check_phrases(self.phrases, "phrases")
        if self.rounds < 2 or self.halves == 1:
            raise UserError(f"rounds ({self.rounds}) and halves ({self.halves}) must be at least 2 (halves=0 = none)")
        if self.ranker is not None and self.judge is None:
            raise UserError("ranker= chooses and judge= judges the choice: give judge= too")
        if self.sweep.settings(self.sampling) and self.judge is None:
            raise UserError("sweep needs judge=, a CLIP that tells the settings apart")
        if self.num_prompts == 0 and (self.sweep.swept() or self.memorisation):
            raise UserError("num_prompts=0 draws nothing, so sweep and memorisation have no pictures to judge")
        if self.memorisation and (both := set(self.split.split("+")) & set(self.data.train_split.split("+"))):
            raise UserError(f"memorisation needs held-out pictures, and split {min(both)!r} is data.train_split too")


READ_BY = {
    "judge": ("vae", "dalle"),
    "ranker": ("dalle",),
    "inception": ("vae", "dalle"),
    "probe": ("vae", "dalle"),
    "vgg": ("vae", "dalle"),
    "lpips_heads": ("vae", "dalle"),
    "alexnet": ("vae",),
    "encoder": ("vae", "dalle"),
    "phrases": ("dalle", "clip"),
}
"""Which kinds read a setting; given to another it would be passed over in silence."""


def check_files(config: EvaluateConfig, kind: str) -> None:
    """Refuse settings that nobody reads, and pictures that nobody draws.

    Raises:
        UserError: names the setting.
    """
    for name, kinds in READ_BY.items():
        if getattr(config, name) and kind not in kinds:
            raise UserError(f"{name}= is for {' and '.join(kinds)} checkpoints, and this is a {kind}: leave it out")
    completed = bool(config.complete.rows or config.complete.hole)
    if kind == "dalle" and config.vgg is not None and not completed:
        raise UserError(
            "vgg= is for vae checkpoints, and for what a dalle completes: give complete.rows=, or leave it out"
        )
    if kind != "dalle" and (completed or config.sweep.swept() or config.memorisation):
        raise UserError(
            f"sweep, complete and memorisation are for dalle checkpoints, and this is a {kind}: leave them out"
        )
    if config.lpips_heads is not None and config.vgg is None:
        raise UserError("lpips_heads= goes on top of a VGG: give vgg= too")
