"""How each kind of checkpoint is judged: its samples, its networks, its numbers."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from dalle_pytorch.checkpoints import loading
from dalle_pytorch.checkpoints.checkpoint import weights_sha256
from dalle_pytorch.checkpoints.pretrained import load_encoder, load_inception, load_lpips
from dalle_pytorch.data.factors import class_captions
from dalle_pytorch.data.samples import Pictures
from dalle_pytorch.data.shards import ShardDataset
from dalle_pytorch.data.splits import open_split
from dalle_pytorch.distributed import Processes, find_device
from dalle_pytorch.errors import UserError
from dalle_pytorch.evaluation.clip import evaluate_clip
from dalle_pytorch.evaluation.codecs import CODECS
from dalle_pytorch.evaluation.completion import Eyes, complete, evaluate_completion
from dalle_pytorch.evaluation.config import EvaluateConfig
from dalle_pytorch.evaluation.dalle import Draw, Pairs, draw, evaluate_drawn, evaluate_likelihood
from dalle_pytorch.evaluation.features import (
    Extractor,
    caption_features,
    clip_extractor,
    encoder_extractor,
    inception_extractor,
    inception_logits,
    probe_extractor,
)
from dalle_pytorch.evaluation.image_tokenizer import evaluate_image_tokenizer, reconstruct
from dalle_pytorch.evaluation.likelihood import likelihoods
from dalle_pytorch.evaluation.measure import Evaluation, Measure
from dalle_pytorch.evaluation.memorisation import evaluate_memorisation
from dalle_pytorch.evaluation.phrases import check_held_out, evaluate_phrases
from dalle_pytorch.evaluation.probe import KEPT, evaluate_following, evaluate_probe
from dalle_pytorch.evaluation.report import Protocol
from dalle_pytorch.evaluation.samples import Samples, chosen, distinct_pairs, read_samples
from dalle_pytorch.evaluation.sweep import SweepConfig, evaluate_sweep
from dalle_pytorch.evaluation.zero_shot import evaluate_zero_shot
from dalle_pytorch.generation.generator import Generator, best_precision, text_tokenizer_of
from dalle_pytorch.generation.rerank import as_scorers
from dalle_pytorch.generation.sampling import SamplingConfig
from dalle_pytorch.generation.strategies import find_strategy
from dalle_pytorch.models.image_tokenizer import margin_of
from dalle_pytorch.models.lpips import LPIPS
from dalle_pytorch.models.probe import Probe
from dalle_pytorch.models.two_towers import TwoTowers


def samples_of(shards: ShardDataset, config: EvaluateConfig, image_size: int, most: int | None = None) -> Samples:
    """The pictures that are looked at; ``most`` in place of ``config.max_samples``.

    Raises:
        UserError: they are tokens, not pictures, or one cannot be read.
    """
    most = config.max_samples if most is None else most
    return read_samples(shards, config.data, image_size, most=most, seed=config.seed, caption=config.caption)


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


class Networks(NamedTuple):
    """Whose eyes a model is judged through; None for what is not given."""

    judge: Any
    ranker: Any
    probe: Probe | None
    lpips: LPIPS | None
    alexnet: LPIPS | None
    inception: Any
    extractors: list[Extractor]
    """For distances between sets."""


def networks_of(config: EvaluateConfig, device: torch.device) -> Networks:
    """All networks that the settings name.

    Raises:
        UserError: a file that cannot be read, or a ranker that is the judge.
    """
    judge = None if config.judge is None else loading.load(config.judge, kind="clip").to(device)
    ranker = None if config.ranker is None else loading.load_scorer(config.ranker, device)
    as_scorers(ranker)  # refuses what cannot rank
    if ranker is not None and ranked_by(ranker) == ranked_by(judge):
        raise UserError("ranker= and judge= are the same weights, which would praise their own choice: give two CLIPs")
    inception = None if config.inception is None else load_inception(config.inception).to(device)
    probe = None if config.probe is None else loading.load(config.probe, kind="probe").to(device)
    lpips = None if config.vgg is None else load_lpips(config.vgg, config.lpips_heads).to(device)
    extractors = [] if judge is None else [clip_extractor(judge)]
    alexnet = None if config.alexnet is None else load_lpips(config.alexnet).to(device)
    for name, net, wanted in (("vgg", lpips, "vgg"), ("alexnet", alexnet, "alex")):
        if net is not None and net.name != wanted:
            raise UserError(
                f"{name}={getattr(config, name)} is a file of the other network: exchange vgg= and alexnet="
            )
    extractors += [] if inception is None else [inception_extractor(inception)]
    extractors += [] if config.encoder is None else [encoder_extractor(load_encoder(config.encoder).to(device))]
    extractors += [] if probe is None else [probe_extractor(probe)]
    return Networks(judge, ranker, probe, lpips, alexnet, inception, extractors)


def judge_tokenizer(vae: Any, config: EvaluateConfig, shards: ShardDataset, measure: Measure) -> Evaluation:
    """An image tokenizer."""
    networks = networks_of(config, next(vae.parameters()).device)
    samples = samples_of(shards, config, vae.image_size)
    tokens, decoded = reconstruct(vae, samples.images)
    found = evaluate_image_tokenizer(
        vae, samples.images, measure, lpips=[net for net in (networks.lpips, networks.alexnet) if net is not None],
        extractors=networks.extractors,
        codecs=CODECS if config.codecs else (), reconstructed=(tokens, decoded),
    )  # fmt: skip
    if (probe := networks.probe) is None:
        return found
    kept = evaluate_following(probe, decoded[:, None], samples.factors, samples.images, measure, words=KEPT)
    return join([found, kept])


def judge_clip(clip: Any, config: EvaluateConfig, shards: ShardDataset, measure: Measure) -> Evaluation:
    """A CLIP."""
    samples = samples_of(shards, config, clip.config.image_size)
    check_held_out(samples.captions, config.phrases)
    found = evaluate_clip(clip, samples.captions, samples.images, measure)
    classes = class_captions(samples.metas)
    found = join([found, evaluate_zero_shot(clip, samples.images, samples.factors, classes, measure)])
    if not config.phrases:
        return found
    pictures = clip_extractor(clip)(samples.images)

    def cosines(places: Sequence[int], captions: Sequence[str]) -> Tensor:
        return (caption_features(clip, captions) * pictures[list(places)]).sum(dim=1)

    return join([found, evaluate_phrases(cosines, samples.captions, config.phrases, measure)])


def judge_probe(probe: Any, config: EvaluateConfig, shards: ShardDataset, measure: Measure) -> Evaluation:
    """A probe."""
    samples = samples_of(shards, config, probe.config.image_size)
    return evaluate_probe(probe, samples.images, samples.factors, measure)


def check(dalle: Any, config: EvaluateConfig) -> None:
    """Refuse what cannot be drawn before time is spent.

    Raises:
        UserError: a part of no token, or guidance of a model that never saw an empty caption.
    """
    config.complete.parts(dalle.grid_size, margin_of(dalle.vae))
    if settings := config.sweep.settings(config.sampling):
        generator = Generator(dalle)
        for sampling in settings.values():
            generator.check([], sampling)


def drawn_how(config: EvaluateConfig, sampling: SamplingConfig, **counts: int) -> Protocol:
    """The protocol of drawn pictures; ``counts`` are of prompts, and of candidates where not ``num_candidates``."""
    settings = {f"sampling.{key}": str(value) for key, value in asdict(sampling).items()}
    if find_strategy(sampling.strategy).order is None:
        del settings["sampling.order_seed"]
    precision = best_precision(find_device(config.device))
    arithmetic = {} if precision == "fp32" else {"precision": precision}
    return {**settings, **arithmetic, "seed": config.seed, "candidates": config.num_candidates, **counts}


def join(found: Sequence[Evaluation]) -> Evaluation:
    """All numbers and sections, in this order."""
    metrics = {name: metric for one in found for name, metric in one.metrics.items()}
    return Evaluation(metrics, [section for one in found for section in one.sections])


def completions(
    dalle: Any, config: EvaluateConfig, own: Samples, networks: Networks, measure: Measure
) -> Iterator[Evaluation]:
    """Every part of ``config.complete`` of some pictures, whose captions all differ."""
    settings = config.complete
    images, prompts = own.images[: settings.num_pictures], own.captions[: settings.num_pictures]
    image_tokens, _ = reconstruct(dalle.vae, images)
    eyes, generator = Eyes(measure, networks.judge, networks.lpips, own.captions), Generator(dalle)
    how = drawn_how(config, config.sampling, candidates=settings.num_candidates)
    parts = settings.parts(dalle.grid_size, margin_of(dalle.vae))
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
    dalle: Any, config: EvaluateConfig, samples: Samples, own: Samples, networks: Networks, measure: Measure
) -> list[Evaluation]:
    """What every setting of ``config.sweep`` draws of the prompts, if there is one."""
    if not (settings := config.sweep.settings(config.sampling)):
        return []
    prompts = own.captions[: config.num_prompts]

    def drawn(sampling: SamplingConfig) -> Tensor:
        return drawn_pictures(dalle, prompts, replace(config, sampling=sampling, sweep=SweepConfig()), None).images

    return [evaluate_sweep(
        drawn, settings, prompts, samples.images, own.images[: len(prompts)], measure,
        judge=networks.judge, captions=own.captions, extractors=networks.extractors,
        how=lambda sampling: drawn_how(config, sampling, prompts=len(prompts)),
    )]  # fmt: skip


def judge_dalle(dalle: Any, config: EvaluateConfig, shards: ShardDataset, measure: Measure) -> Evaluation:
    """A DALLE: likelihoods, then the pictures that it completes and draws."""
    tokenizer, size = text_tokenizer_of(dalle, "dalle"), dalle.vae.image_size

    def pairs(samples: Samples) -> Pairs:
        text = tokenizer.tokenize(samples.captions, dalle.config.text_len, truncate=True)
        return Pairs(samples.captions, text, reconstruct(dalle.vae, samples.images)[0])

    check(dalle, config)
    networks = networks_of(config, next(dalle.parameters()).device)
    samples = samples_of(shards, config, size)
    check_held_out(samples.captions, config.phrases)
    train = open_split(config.data.path, config.data.train_split, "data.path")
    known = pairs(samples_of(train, config, size, config.max_train))
    trained: dict[str, Any] = {"unigram_split": train.split, "unigram_sha256": data_sha256(train)}
    if len(known.captions) < len(train):
        trained["unigram_seed"] = config.seed
    held_out = pairs(samples)
    found = [evaluate_likelihood(dalle, held_out, known, measure, trained=trained)]
    if config.phrases:

        def log_likelihoods(places: Sequence[int], captions: Sequence[str]) -> Tensor:
            text = tokenizer.tokenize(list(captions), dalle.config.text_len, truncate=True)
            return -likelihoods(dalle, text, held_out.image_tokens[list(places)]).image

        found.append(evaluate_phrases(log_likelihoods, samples.captions, config.phrases, measure))
    own = samples.take(distinct_pairs(samples.captions, len(samples.captions), config.seed))
    if config.complete.parts(dalle.grid_size, margin_of(dalle.vae)):
        found = [*completions(dalle, config, own, networks, measure), *found]
    if config.num_prompts:
        found = [*judge_drawn(dalle, config, samples, own, train, networks, measure), *found]
    return join(found)


def judge_drawn(
    dalle: Any, config: EvaluateConfig, samples: Samples, own: Samples, train: ShardDataset, networks: Networks,
    measure: Measure,
) -> list[Evaluation]:  # fmt: skip
    """The pictures that a DALLE draws of the first captions of ``own``, which all differ."""
    first = own.take(list(range(min(config.num_prompts, len(own.captions)))))
    prompts, how = first.captions, drawn_how(config, config.sampling, prompts=len(first.captions))
    drawn = drawn_pictures(dalle, prompts, config, networks.ranker)
    ranked = {} if networks.ranker is None else ranked_by(networks.ranker)
    found = [evaluate_drawn(
        drawn, samples.images, first.images, measure,
        judge=networks.judge, captions=own.captions, extractors=networks.extractors,
        logits=None if networks.inception is None else inception_logits(networks.inception), blurs=config.blurs,
        how={**how, **ranked},
    )]  # fmt: skip
    if networks.probe is not None:
        found.append(evaluate_following(
            networks.probe, drawn.images, first.asked, first.images, measure, ranks=drawn.ranks, how={**how, **ranked}
        ))  # fmt: skip
    found += swept(dalle, config, samples, own, networks, measure)
    if config.memorisation:
        size = dalle.vae.image_size
        pictures = Pictures(train, replace(config.data, cache_decoded=False), image_size=size, train=False)
        found.append(evaluate_memorisation(
            drawn.images, prompts, samples.images,
            lambda places: torch.stack([pictures[i]["image"] for i in places]), len(pictures),
            lambda images: reconstruct(dalle.vae, images)[1], measure, extractors=networks.extractors,
            how=how, trained={"train_split": train.split, "train_sha256": data_sha256(train)},
        ))  # fmt: skip
    return found


def ranked_by(ranker: Any) -> dict[str, str]:
    """Which ranker chose: the hash of its weights if it has any, and of a user's scorer the class."""
    hashed = {"ranker_sha256": weights_sha256(ranker)} if isinstance(ranker, nn.Module) else {}
    if isinstance(ranker, TwoTowers):
        return hashed
    return {"ranker": f"{type(ranker).__module__}.{type(ranker).__qualname__}", **hashed}


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
