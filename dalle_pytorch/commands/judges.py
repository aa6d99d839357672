"""How each kind of checkpoint is judged: its samples, its networks, its numbers."""

import hashlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from dalle_pytorch import loading
from dalle_pytorch.commands.baselines import distinct_pairs
from dalle_pytorch.commands.evaluate_config import EvaluateConfig
from dalle_pytorch.data.datamodule import open_split
from dalle_pytorch.data.factors import Factors, asked, class_captions, factors_of
from dalle_pytorch.data.samples import Pictures
from dalle_pytorch.data.shards import ShardDataset
from dalle_pytorch.data.tokens import TokenShards
from dalle_pytorch.evaluation.clip import evaluate_clip
from dalle_pytorch.evaluation.completion import Eyes, complete, evaluate_completion
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
from dalle_pytorch.evaluation.sweep import SweepConfig, evaluate_sweep
from dalle_pytorch.evaluation.zero_shot import evaluate_zero_shot
from dalle_pytorch.generation.generator import Generator, text_tokenizer_of
from dalle_pytorch.generation.processes import Processes
from dalle_pytorch.generation.sampling import SamplingConfig
from dalle_pytorch.header import weights_sha256
from dalle_pytorch.models.probe import Probe


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
