"""The simulated workers compute what torch's hook computes in processes of their own."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from torch import nn
from torch.distributed import barrier, destroy_process_group, init_process_group
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

from dalle_pytorch.training.optim import inner_matrices
from replication import cached, powersgd
from replication.arms import Job
from replication.powersgd import PowerSGD, PowerSGDConfig, sent, shrinks

WORKERS, STEPS, FIRST = 2, 6, 2
"""FIRST: torch compresses from the third step on."""
CASES = [(1, True, True), (3, True, True), (3, False, True), (2, True, False)]
"""Rank, warm start, error feedback."""


def gradients(count=1, workers=3, rows=7, columns=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(workers, rows, columns, generator=generator) for _ in range(count)]


def net():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 9))


def loss_of(model, step, worker):
    generator = torch.Generator().manual_seed(100 * step + worker)
    return model(torch.randn(6, 12, generator=generator)).square().sum()


def worker(rank, folder):
    """One process: torch's hook on its gradients, same weights in each step; all cases in a row."""
    torch.set_num_threads(1)
    init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORKERS)
    found = [hooked(rank, *case) for case in CASES]
    if rank == 0:
        torch.save(found, f"{folder}/found.pt")
    barrier()  # gloo aborts a process whose peer has gone
    destroy_process_group()


def hooked(rank, matrix_rank, warm, feedback):
    """Shapes in the order of the bucket, and the gradients after each step."""
    model = DistributedDataParallel(net())
    state = PowerSGDState(
        None, matrix_approximation_rank=matrix_rank, start_powerSGD_iter=FIRST, min_compression_rate=1,
        warm_start=warm, use_error_feedback=feedback,
    )  # fmt: skip
    shapes, found = [], []

    def hook(state, bucket):
        if state.iter == FIRST:
            shapes.extend(tuple(gradient.shape) for gradient in bucket.gradients())
        return powerSGD_hook(state, bucket)

    model.register_comm_hook(state, hook)
    for step in range(STEPS):
        model.zero_grad()
        loss_of(model, step, rank).backward()
        found.append([parameter.grad.clone() for parameter in model.parameters()])
    return {"shapes": shapes, "gradients": found}


@pytest.fixture(scope="module")
def torchs(tmp_path_factory):
    """What torch's hook gives in each case."""
    folder = tmp_path_factory.mktemp("torchs")
    mp.spawn(worker, (str(folder),), nprocs=WORKERS)
    return dict(zip(CASES, torch.load(folder / "found.pt", weights_only=True), strict=True))


class AsTorch(PowerSGD):
    """Random matrices in torch's order: one seed a step for the matrices of a bucket, one after the other."""

    def __init__(self, order, *settings, **more):
        super().__init__(*settings, **more)
        self.order, self.seeds, self.drawn = order, np.random.RandomState(0), {}

    def draw(self):
        generator = torch.Generator().manual_seed(self.seeds.randint(1_000_000_000))
        self.drawn = {
            name: torch.randn(columns, min(rows, columns, self.rank), generator=generator)
            for name, (rows, columns) in self.order.items()
        }

    def _start(self, name, columns, rank):
        if name not in self.q or self.policy == "resampled":
            self.q[name] = self.drawn[name]
        return powersgd.orthonormal(self.q[name])


@pytest.mark.parametrize("case", CASES)
def test_equals_torchs_hook_in_two_processes(torchs, case):
    rank, warm, feedback = case
    found = torchs[case]
    model, policy = net(), "warm" if warm else "resampled"
    names = {tuple(p.shape): name for name, p in model.named_parameters() if p.ndim == 2}
    order = {names[shape]: shape for shape in map(tuple, found["shapes"]) if len(shape) == 2}
    assert len(order) == 2
    compressor = AsTorch(order, rank, 0, policy=policy, feedback=feedback)
    for step in range(STEPS):
        each = [
            torch.autograd.grad(loss_of(model, step, number), list(model.parameters())) for number in range(WORKERS)
        ]
        if step >= FIRST:
            compressor.draw()
        for (name, parameter), *rows, expected in zip(
            model.named_parameters(), *each, found["gradients"][step], strict=True
        ):
            stacked = torch.stack(rows)
            compressed = step >= FIRST and parameter.ndim == 2
            given = compressor.average(name, stacked) if compressed else stacked.mean(dim=0)
            torch.testing.assert_close(given, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("policy", powersgd.POLICIES)
def test_the_full_rank_gives_the_mean(policy, monkeypatch):
    monkeypatch.setattr(powersgd, "shrinks", lambda *sizes: True)  # it would rightly send the matrix itself
    compressor = PowerSGD(5, 0, policy=policy)
    for matrices in gradients(4):
        torch.testing.assert_close(compressor.average("a", matrices), matrices.mean(dim=0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("policy", powersgd.POLICIES)
def test_nothing_is_lost_with_feedback(policy):
    """What was sent so far and the errors still carried are all gradients so far."""
    compressor, steps = PowerSGD(2, 0, policy=policy), gradients(6)
    total = sum(compressor.average("a", matrices) for matrices in steps)
    carried = compressor.errors["a"].mean(dim=0)
    torch.testing.assert_close(total + carried, sum(steps).mean(dim=0), rtol=1e-4, atol=1e-5)
    assert carried.norm() > 0.1
    without = PowerSGD(2, 0, policy=policy, feedback=False)
    without.average("a", steps[0])
    assert not without.errors


def test_only_the_mean_counts():
    """All steps are linear in the gradients: four workers get what one with their mean would."""
    many, one = PowerSGD(2, 0), PowerSGD(2, 0)
    for matrices in gradients(5, workers=4):
        torch.testing.assert_close(
            many.average("a", matrices), one.average("a", matrices.mean(dim=0, keepdim=True)), rtol=1e-4, atol=1e-5
        )


def test_policies_differ_in_q_alone():
    """Warm Q finds the directions of a gradient that stays; a fixed one never does, were it not for the errors."""
    (matrices,) = gradients(workers=1, rows=30, columns=20)
    s = torch.linalg.svdvals(matrices[0])
    best = (s[3:].square().sum() / s.square().sum()).sqrt()
    far = {}
    for policy in powersgd.POLICIES:
        compressor = PowerSGD(3, 0, policy=policy, feedback=False)
        found = [compressor.average("a", matrices) for _ in range(60)]
        far[policy] = [((each - matrices[0]).norm() / matrices.norm()).item() for each in found]
    assert far["warm"][-1] == pytest.approx(best.item(), abs=1e-3)
    assert far["fixed"][-1] == far["fixed"][0] > best + 0.02
    assert len(set(far["resampled"])) == 60


def test_sent_numbers_by_hand():
    matrices = [torch.empty(64, 64), torch.empty(512, 64), torch.empty(4, 64)]
    # rank 8: 128 * 8 + 576 * 8; of the last, which has no 8 rows, 68 * 4 are more than the 256 of the matrix itself
    assert sent(matrices, 8) == (1024 + 4608 + 256, 4096 + 32768 + 256)
    assert sent(matrices, 0) == (37120, 37120)
    assert shrinks(64, 64, 31)
    assert not shrinks(64, 64, 32)


def test_the_share_that_is_saved_in_a_block(make_dalle):
    """GEGLU: 1 - 5 r / 4 d, where the paper has 1 - 5 r / 8 d for its shards."""
    dim, rank = 64, 8
    dalle = make_dalle(dim=dim, heads=2, head_dim=32, depth=2)
    narrow, whole = sent(inner_matrices(dalle), rank)
    assert narrow / whole == pytest.approx(5 * rank / (4 * dim))


def test_workers_share_a_batch(make_dalle):
    """Their mean is the whole batch's gradient where captions are equally long."""
    dalle = make_dalle()
    batch = {
        "text_tokens": torch.tensor([[3, 1, 4, 0], [1, 5, 2, 0]]),
        "image_tokens": torch.arange(32).reshape(2, 16) % 12,
    }
    weights = {name: p for name, p in dalle.named_parameters() if p.requires_grad}
    loss, stacked = powersgd.worker_gradients(dalle, weights, batch, 2, torch.Generator())
    whole = dalle.loss(**batch).loss
    assert loss == pytest.approx(whole.item(), rel=1e-5)
    for name, expected in zip(weights, torch.autograd.grad(whole, list(weights.values())), strict=True):
        torch.testing.assert_close(stacked[name].mean(dim=0), expected, rtol=1e-4, atol=1e-6)


def test_an_arm(shared, tmp_path):
    settings = ["dim=32", "depth=1", "batch_size=4", "steps=3", "workers=2"]

    def numbers(*more):
        return powersgd.run(Job("powersgd", (*settings, *more), 0, tmp_path, shared, 1)).numbers

    exact, narrow = numbers(), numbers("rank=2")
    assert exact["error"] == pytest.approx(0)
    assert exact["saved"] == exact["saved_paper"] == 0
    assert narrow["error"] > 0.1
    assert narrow["saved"] == pytest.approx(100 * (1 - 5 * 2 / (4 * 32)))
    assert numbers("rank=2") == narrow
    assert len({found["image_val"] for found in (exact, narrow, numbers("rank=2", "policy=resampled"))}) == 3


def test_batches_go_on_in_the_next_epoch(shared):
    found = cached.open_cached(shared, batch_size=8, seed=0)
    rows = [batch["image_tokens"] for batch in cached.batches(found, 5)]  # two in an epoch
    assert len(rows) == 5
    assert not torch.equal(torch.cat(rows[:2]), torch.cat(rows[2:4]))
    assert len(found.text_tokens) == len(found.image_tokens) == 5


def test_curves_are_thinned():
    curve = cached.over_steps([float(x) for x in range(120)])
    assert len(curve.x) == len(curve.y) <= cached.POINTS
    assert (curve.x[0], curve.y[0], curve.x[-1]) == (3, 1.0, 120)
    assert cached.over_steps([2.0]) == cached.Curve([1], [2.0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"policy": "cold"}, "got 'cold'"),
        ({"rank": -1}, "got -1"),
        ({"workers": 5}, r"\(32\) must be a multiple .* \(5\)"),
    ],
)
def test_impossible_settings_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        replace(PowerSGDConfig(), **change)
