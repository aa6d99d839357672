"""Trains a CLIP and measures how often it finds the right picture or caption among all held-out pairs."""

from dalle_pytorch.checkpoints import checkpoint
from dalle_pytorch.evaluation.clip import evaluate_clip
from dalle_pytorch.evaluation.measure import Measure
from replication.arms import Job, Result, train
from replication.dalles import LEAST_ROUNDS
from replication.pictures import EMOJI, HELD_OUT, read


def run(job: Job) -> Result:
    """Train with ``job.settings`` on top of ``experiment=replicate``; the numbers of ``evaluate.py``."""
    weights = train("clip", ["experiment=replicate", *job.settings], job.seed, job.folder / "clip", job.threads)
    clip = checkpoint.load(weights, kind="clip")
    pairs = read(EMOJI, HELD_OUT, clip.config.image_size)
    found = evaluate_clip(clip, pairs.captions, pairs.images, Measure({}, rounds=LEAST_ROUNDS))
    return Result({name: metric.value for name, metric in found.metrics.items()})
