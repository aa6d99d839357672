"""Judge a checkpoint: ``evaluate.py checkpoint=... data=emoji split=test_concept``, of any kind.

Writes ``metrics.json`` and ``report.html``. ``evaluate.py compare A/metrics.json B/metrics.json`` sets two beside each
other, and refuses numbers that were measured in two ways.
"""

import hashlib
import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from dalle_pytorch import checkpoint, loading
from dalle_pytorch.commands.baselines import distinct_pairs
from dalle_pytorch.commands.results import new_folder
from dalle_pytorch.config import entry
from dalle_pytorch.data.datamodule import DataConfig, open_split
from dalle_pytorch.data.factors import Factors, asked, class_captions, factors_of
from dalle_pytorch.data.samples import Pictures
from dalle_pytorch.data.shards import ShardDataset
from dalle_pytorch.data.stream import is_stream
from dalle_pytorch.data.tokens import TokenShards
from dalle_pytorch.evaluation import compare, page, report
from dalle_pytorch.evaluation.clip import evaluate_clip
from dalle_pytorch.evaluation.completion import CompletionConfig, Eyes, complete, evaluate_completion
from dalle_pytorch.evaluation.dalle import Draw, Pairs, draw, evaluate_drawn, evaluate_likelihood
from dalle_pytorch.evaluation.features import (
    Extractor,
    clip_extractor,
    inception_extractor,
    inception_logits,
    load_inception,
    load_lpips,
    probe_extractor,
)
from dalle_pytorch.evaluation.image_tokenizer import evaluate_image_tokenizer, reconstruct
from dalle_pytorch.evaluation.measure import Evaluation, Measure
from dalle_pytorch.evaluation.memorisation import evaluate_memorisation
from dalle_pytorch.evaluation.probe import KEPT, evaluate_following, evaluate_probe
from dalle_pytorch.evaluation.report import Protocol
from dalle_pytorch.evaluation.shares import shared_by
from dalle_pytorch.evaluation.sweep import SweepConfig, evaluate_sweep
from dalle_pytorch.evaluation.zero_shot import evaluate_zero_shot
from dalle_pytorch.generation.generator import Generator, text_tokenizer_of
from dalle_pytorch.generation.processes import Processes
from dalle_pytorch.generation.sampling import SamplingConfig
from dalle_pytorch.header import role, weights_sha256
from dalle_pytorch.models.probe import Probe


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
    """Another CLIP, which ranks a DALLE's candidates; the judge then draws the best-of-N curve."""
    inception: str | None = None
    """FID's Inception, pt_inception-2015-12-05-6726825d.pth: FID, KID, precision, recall, Inception score."""
    probe: str | None = None
    """A probe, of commands.train_probe: whether drawn pictures show what is asked for, and distances like fid_probe."""
    vgg: str | None = None
    """torchvision's vgg16-397923af.pth: LPIPS of an image tokenizer, and of what a DALLE completes."""
    lpips_heads: str | None = None
    """LPIPS' own weights, vgg.pth of version 0.1; null = those of torchmetrics."""
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
            ValueError: a field is out of range; names it.
        """
        for name in ("max_samples", "max_train", "caption", "num_prompts", "halves"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if any(radius < 0 for radius in self.blurs):
            raise ValueError(f"blurs must not be negative, got {self.blurs}")
        for name in ("num_candidates", "threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.rounds < 2 or self.halves == 1:
            raise ValueError(f"rounds ({self.rounds}) and halves ({self.halves}) must be at least 2 (halves=0 = none)")
        if self.ranker is not None and self.judge is None:
            raise ValueError("ranker= chooses and judge= judges the choice: give judge= too")
        if self.sweep.settings(self.sampling) and self.judge is None:
            raise ValueError("sweep needs judge=, a CLIP that tells the settings apart")
        if self.num_prompts == 0 and (self.sweep.swept() or self.memorisation):
            raise ValueError("num_prompts=0 draws nothing, so sweep and memorisation have no pictures to judge")
        if self.memorisation and (both := set(self.split.split("+")) & set(self.data.train_split.split("+"))):
            raise ValueError(f"memorisation needs held-out pictures, and split {min(both)!r} is data.train_split too")


class Samples(NamedTuple):
    """Captioned pictures of a split."""

    images: Float[Tensor, "b 3 H W"]
    captions: list[str]
    metas: list[dict[str, Any]]
    """JSON of each."""

    @property
    def asked(self) -> list[Factors]:
        """What their captions tell."""
        return [asked(meta, caption) for meta, caption in zip(self.metas, self.captions, strict=True)]

    @property
    def factors(self) -> list[Factors]:
        """What they show."""
        return [factors_of(meta) for meta in self.metas]


def read_samples(shards: ShardDataset, config: EvaluateConfig, image_size: int, most: int) -> Samples:
    """Some pictures of a split in order, unaugmented, each with one of its captions.

    Raises:
        ValueError: they are tokens, not pictures, or one cannot be read.
    """
    if isinstance(shards, TokenShards):
        raise ValueError(f"{shards.folder} holds image tokens, and this needs the pictures: set data.path= to theirs")
    pictures = Pictures(shards, replace(config.data, cache_decoded=False), image_size=image_size, train=False)
    samples = [pictures[index] for index in chosen(len(pictures), most, config.seed)]
    metas = [shards.meta(sample["index"]) for sample in samples]
    captions = [meta["captions"][: config.caption + 1][-1] for meta in metas]
    return Samples(torch.stack([sample["image"] for sample in samples]), captions, metas)


def chosen(count: int, most: int, seed: int) -> list[int]:
    """Up to ``most`` of ``count`` indices, drawn by the seed, in order; all for 0."""
    every = range(count)
    return list(every) if not most or most >= count else sorted(random.Random(seed).sample(every, most))


def protocol(shards: ShardDataset, config: EvaluateConfig, image_size: int) -> dict[str, Any]:
    """What all numbers depend on: not where the data lie, but what they are."""
    used = len(chosen(len(shards), config.max_samples, config.seed))
    return {
        "data": shards.index["name"],
        "data_sha256": data_sha256(shards),
        "split": shards.split,
        "pictures": f"{used} of {len(shards)}" + (f", drawn by seed {config.seed}" if used < len(shards) else ""),
        "image_size": image_size,
        "caption": config.caption,
    }


def data_sha256(shards: ShardDataset) -> str:
    """Of a split: what its shards hold."""
    wanted = shards.split.split("+")
    parts = [shard["sha256"] for shard in shards.index["shards"] if shard["split"] in wanted]
    return hashlib.sha256("".join(parts).encode()).hexdigest()


def extractors_of(config: EvaluateConfig, device: str) -> tuple[Any, list[Extractor], Any]:
    """The judge, the networks for distances between sets, and the Inception; None for what is not given."""
    judge = None if config.judge is None else loading.load(config.judge, kind="clip").to(device)
    inception = None if config.inception is None else load_inception(config.inception).to(device)
    extractors = [] if judge is None else [clip_extractor(judge)]
    return judge, extractors + ([] if inception is None else [inception_extractor(inception)]), inception


def load_probe(config: EvaluateConfig, device: str) -> Probe | None:
    """The probe; None if there is none."""
    return None if config.probe is None else loading.load(config.probe, kind="probe").to(device)


def judge_tokenizer(vae: Any, config: EvaluateConfig, shards: ShardDataset, measure: Measure) -> Evaluation:
    """An image tokenizer."""
    device = next(vae.parameters()).device.type
    _, extractors, _ = extractors_of(config, device)
    probe = load_probe(config, device)
    lpips = None if config.vgg is None else load_lpips(config.vgg, config.lpips_heads).to(next(vae.parameters()).device)
    samples = read_samples(shards, config, vae.image_size, config.max_samples)
    images = samples.images
    options = {} if config.codecs else {"codecs": ()}
    if probe is None:
        return evaluate_image_tokenizer(vae, images, measure, lpips=lpips, extractors=extractors, **options)
    extractors = [*extractors, probe_extractor(probe)]
    found = evaluate_image_tokenizer(vae, images, measure, lpips=lpips, extractors=extractors, **options)
    decoded = reconstruct(vae, images)[1]
    return join([found, evaluate_following(probe, decoded[:, None], samples.factors, images, measure, words=KEPT)])


def judge_clip(clip: Any, config: EvaluateConfig, shards: ShardDataset, measure: Measure) -> Evaluation:
    """A CLIP."""
    samples = read_samples(shards, config, clip.config.image_size, config.max_samples)
    found = evaluate_clip(clip, samples.captions, samples.images, measure)
    classes = class_captions(samples.metas)
    return join([found, evaluate_zero_shot(clip, samples.images, samples.factors, classes, measure)])


def judge_probe(probe: Any, config: EvaluateConfig, shards: ShardDataset, measure: Measure) -> Evaluation:
    """A probe."""
    samples = read_samples(shards, config, probe.config.image_size, config.max_samples)
    return evaluate_probe(probe, samples.images, samples.factors, measure)


def check(dalle: Any, config: EvaluateConfig) -> None:
    """Refuse what cannot be drawn before time is spent.

    Raises:
        ValueError: a part of no token, or guidance of a model that never saw an empty caption.
    """
    config.complete.parts(dalle.grid_size)
    if settings := config.sweep.settings(config.sampling):
        generator = Generator(dalle)
        for sampling in settings.values():
            generator.check([], sampling)


def drawn_how(config: EvaluateConfig, sampling: SamplingConfig, **counts: int) -> Protocol:
    """The protocol of drawn pictures; ``counts`` are of prompts, and of candidates where not ``num_candidates``."""
    settings = {f"sampling.{key}": str(value) for key, value in asdict(sampling).items()}
    return {**settings, "seed": config.seed, "candidates": config.num_candidates, **counts}


def own_captions(samples: Samples, config: EvaluateConfig) -> Samples:
    """The samples with a caption each to itself, in the order of the prompts."""
    places = distinct_pairs(samples.captions, len(samples.captions), config.seed)
    return Samples(samples.images[places], [samples.captions[i] for i in places], [samples.metas[i] for i in places])


def join(found: Sequence[Evaluation]) -> Evaluation:
    """All numbers and sections, in this order."""
    metrics = {name: metric for one in found for name, metric in one.metrics.items()}
    return Evaluation(metrics, [section for one in found for section in one.sections])


def completions(dalle: Any, config: EvaluateConfig, samples: Samples, measure: Measure) -> Iterator[Evaluation]:
    """Every part of ``config.complete`` of some pictures."""
    settings, device = config.complete, next(dalle.parameters()).device
    judge, _, _ = extractors_of(config, device.type)
    lpips = None if config.vgg is None else load_lpips(config.vgg, config.lpips_heads).to(device)
    own = own_captions(samples, config)
    images, prompts = own.images[: settings.num_pictures], own.captions[: settings.num_pictures]
    image_tokens, _ = reconstruct(dalle.vae, images)
    eyes, generator = Eyes(measure, judge, lpips, own.captions), Generator(dalle)
    how = drawn_how(config, config.sampling, candidates=settings.num_candidates)
    parts = settings.parts(dalle.grid_size)
    processes = Processes()
    total = 2 * len(parts) * len(processes.share(prompts)) * settings.num_candidates * dalle.num_image_tokens
    with tqdm(total=total, desc="completing", unit="token", unit_scale=True, disable=processes.rank > 0) as bar:
        for name, part in parts.items():
            done = complete(
                generator, prompts, image_tokens, part,
                num_candidates=settings.num_candidates, seed=config.seed, sampling=config.sampling, progress=bar.update,
            )  # fmt: skip
            yield evaluate_completion(done, images, part, name, prompts, eyes, how)


def swept(
    dalle: Any, config: EvaluateConfig, samples: Samples, judge: Any, extractors: list[Extractor], measure: Measure
) -> list[Evaluation]:
    """What every setting of ``config.sweep`` draws of the prompts, if there is one."""
    if not (settings := config.sweep.settings(config.sampling)):
        return []
    own = own_captions(samples, config)
    prompts = own.captions[: config.num_prompts]

    def drawn(sampling: SamplingConfig) -> Tensor:
        return drawn_pictures(dalle, prompts, replace(config, sampling=sampling, sweep=SweepConfig()), None).images

    return [evaluate_sweep(
        drawn, settings, prompts, samples.images, own.images[: len(prompts)], measure,
        judge=judge, captions=own.captions, extractors=extractors,
        how=lambda sampling: drawn_how(config, sampling, prompts=len(prompts)),
    )]  # fmt: skip


def judge_dalle(dalle: Any, config: EvaluateConfig, shards: ShardDataset, measure: Measure) -> Evaluation:
    """A DALLE: likelihoods, then the pictures that it draws."""
    tokenizer, size = text_tokenizer_of(dalle, "dalle"), dalle.vae.image_size

    def pairs(samples: Samples) -> Pairs:
        text = tokenizer.tokenize(samples.captions, dalle.config.text_len, truncate=True)
        return Pairs(samples.captions, text, reconstruct(dalle.vae, samples.images)[0])

    check(dalle, config)
    samples = read_samples(shards, config, size, config.max_samples)
    train = open_split(config.data.path, config.data.train_split, "data.path")
    known = pairs(read_samples(train, config, size, config.max_train))
    trained: dict[str, Any] = {"unigram_split": train.split, "unigram_sha256": data_sha256(train)}
    if len(known.captions) < len(train):
        trained["unigram_seed"] = config.seed
    found = evaluate_likelihood(dalle, pairs(samples), known, measure, trained=trained)
    if config.complete.parts(dalle.grid_size):
        found = join([*completions(dalle, config, samples, measure), found])
    if not config.num_prompts:
        return found
    device = next(dalle.parameters()).device.type
    judge, extractors, inception = extractors_of(config, device)
    probe = load_probe(config, device)
    if probe is not None:
        extractors.append(probe_extractor(probe))
    ranker = None if config.ranker is None else loading.load(config.ranker, kind="clip").to(device)
    if ranker is not None and weights_sha256(ranker) == weights_sha256(judge):
        raise ValueError("ranker= and judge= are the same weights, which would praise their own choice: give two CLIPs")
    places = distinct_pairs(samples.captions, len(samples.captions), config.seed)
    captions, drawn_places = [samples.captions[i] for i in places], places[: config.num_prompts]
    prompts = [samples.captions[i] for i in drawn_places]
    drawn = drawn_pictures(dalle, prompts, config, ranker)
    how = {f"sampling.{key}": str(value) for key, value in asdict(config.sampling).items()} | {
        "seed": config.seed,
        "prompts": len(prompts),
        "candidates": config.num_candidates,
    }
    if ranker is not None:
        how["ranker_sha256"] = weights_sha256(ranker)
    judged = evaluate_drawn(
        drawn, samples.images, samples.images[drawn_places], measure,
        judge=judge, captions=captions, extractors=extractors,
        logits=None if inception is None else inception_logits(inception), blurs=config.blurs, how=how,
    )  # fmt: skip
    more = swept(dalle, config, samples, judge, extractors, measure)
    if probe is not None:
        told, own = [samples.asked[i] for i in drawn_places], samples.images[drawn_places]
        more.insert(0, evaluate_following(probe, drawn.images, told, own, measure, ranks=drawn.ranks, how=how))
    if config.memorisation:
        pictures = Pictures(train, replace(config.data, cache_decoded=False), image_size=size, train=False)
        more.append(evaluate_memorisation(
            drawn.images, prompts, samples.images,
            lambda places: torch.stack([pictures[i]["image"] for i in places]), len(pictures),
            lambda images: reconstruct(dalle.vae, images)[1], measure, extractors=extractors,
            how=drawn_how(config, config.sampling, prompts=len(prompts)),
            trained={"train_split": train.split, "train_sha256": data_sha256(train)},
        ))  # fmt: skip
    return join([judged, *more, found])


def drawn_pictures(dalle: Any, prompts: list[str], config: EvaluateConfig, ranker: Any) -> Draw:
    """The candidates, under a progress bar of the first process's share."""
    processes = Processes()
    total = len(processes.share(prompts)) * config.num_candidates * dalle.num_image_tokens
    with tqdm(total=total, desc="drawing", unit="token", unit_scale=True, disable=processes.rank > 0) as bar:
        return draw(
            dalle,
            prompts,
            num_candidates=config.num_candidates,
            seed=config.seed,
            sampling=config.sampling,
            ranker=ranker,
            progress=bar.update,
        )


JUDGES = {"vae": judge_tokenizer, "dalle": judge_dalle, "clip": judge_clip, "probe": judge_probe}
READ_BY = {
    "judge": ("vae", "dalle"),
    "ranker": ("dalle",),
    "inception": ("vae", "dalle"),
    "probe": ("vae", "dalle"),
    "vgg": ("vae", "dalle"),
    "lpips_heads": ("vae", "dalle"),
}
"""Which kinds look at a file; given to another it would be passed over in silence."""


def check_files(config: EvaluateConfig, kind: str) -> None:
    """Refuse files that nobody reads, and pictures that nobody draws.

    Raises:
        ValueError: names the setting.
    """
    for name, kinds in READ_BY.items():
        if getattr(config, name) is not None and kind not in kinds:
            raise ValueError(f"{name}= is for {' and '.join(kinds)} checkpoints, and this is a {kind}: leave it out")
    completed = bool(config.complete.rows or config.complete.hole)
    if kind == "dalle" and config.vgg is not None and not completed:
        raise ValueError(
            "vgg= is for vae checkpoints, and for what a dalle completes: give complete.rows=, or leave it out"
        )
    if kind != "dalle" and (completed or config.sweep.swept() or config.memorisation):
        raise ValueError(
            f"sweep, complete and memorisation are for dalle checkpoints, and this is a {kind}: leave them out"
        )
    if config.lpips_heads is not None and config.vgg is None:
        raise ValueError("lpips_heads= goes on top of a VGG: give vgg= too")


def judge(config: EvaluateConfig, processes: Processes) -> None:
    """Judge in shares; the first process writes both files and prints the numbers."""
    if is_stream(config.data.path):
        raise ValueError(f"data.path={config.data.path} is a stream, which has no end: a folder of shards is needed")
    shards = open_split(config.data.path, config.split, "data.path")
    torch.set_num_threads(config.threads)
    step = loading.read_header(config.checkpoint)["training"].get("step")
    model = loading.load(config.checkpoint).to(processes.device(config.device))
    head = checkpoint.header(model)
    kind = role(head)
    check_files(config, kind)
    owner = model.vae if kind == "dalle" else model.config if kind in ("clip", "probe") else model
    measure = Measure(
        protocol(shards, config, owner.image_size), seed=config.seed, rounds=config.rounds, halves=config.halves
    )
    folder = new_folder(config.out) if processes.rank == 0 else Path(config.out)
    with shared_by(processes):
        found = JUDGES[kind](model, config, shards, measure)
    if processes.rank > 0:
        return
    record = report.Record(
        report.Subject(kind=head["kind"], weights_sha256=weights_sha256(model), step=step), found.metrics
    )
    report.write(record, folder / "metrics.json")
    title = f"{head['kind']} on {shards.index['name']}, split {shards.split}"
    page.write(record, found.sections, folder / "report.html", title=title)
    for name, metric in found.metrics.items():
        print(f"{name:32} {compare.with_interval(metric)}")
    print(f"{folder / 'metrics.json'}, {folder / 'report.html'}")


@entry("evaluate", EvaluateConfig)
def main(config: EvaluateConfig) -> None:
    """Judge, write both files, print the numbers; with siblings where torchrun started this."""
    processes = Processes()
    try:
        judge(config, processes)
    finally:
        processes.close()


def run() -> None:
    """``compare A B``, or an evaluation."""
    if sys.argv[1:2] == ["compare"]:
        sys.exit(compare.main(sys.argv[2:]))
    main()


if __name__ == "__main__":
    run()
