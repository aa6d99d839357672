"""Work in parts: the same results whoever computes them, and a share for each process."""

import torch

from dalle_pytorch import distributed as module
from dalle_pytorch.distributed import Processes
from dalle_pytorch.evaluation.shares import in_parts, shared_by


def as_one_of(monkeypatch, rank: int, others: list[list[int]]) -> Processes:
    """A process among siblings, whose results are given."""
    processes = Processes()
    processes.rank, processes.count = rank, len(others) + 1

    def exchange(found, own):
        found[:] = [*others[:rank], own, *others[rank:]]

    monkeypatch.setattr(module.distributed, "all_gather_object", exchange)
    return processes


def test_alone_every_part_is_computed_in_order():
    assert in_parts(lambda part: 2 * part, [3, 1, 2]) == [6, 2, 4]
    with shared_by(Processes()):
        assert in_parts(lambda part: 2 * part, (3, 1, 2)) == [6, 2, 4]


def test_a_process_computes_its_share_and_has_all_results_in_order(monkeypatch):
    computed = []

    def double(part: int) -> int:
        computed.append(part)
        return 2 * part

    with shared_by(as_one_of(monkeypatch, 1, [[0, 6], [4]])):
        assert in_parts(double, [0, 1, 2, 3]) == [0, 2, 4, 6]
    assert computed == [1]
    assert in_parts(double, [0, 1]) == [0, 2]  # outside nothing is shared
    assert computed == [1, 0, 1]


def test_what_a_part_divides_further_is_not_shared(monkeypatch):
    with shared_by(as_one_of(monkeypatch, 0, [[[10]]])):
        assert in_parts(lambda part: in_parts(lambda x: 2 * x, [part, part + 1]), [3, 5]) == [[6, 8], [10]]


def test_more_processes_than_parts(monkeypatch):
    with shared_by(as_one_of(monkeypatch, 2, [[0], [2]])):
        assert in_parts(lambda part: 2 * part, [0, 1]) == [0, 2]


def test_parts_of_a_tensor_come_back_whole(monkeypatch):
    rows = torch.rand(10, 3)
    with shared_by(as_one_of(monkeypatch, 0, [[rows[4:8].exp()]])):
        assert torch.equal(torch.cat(in_parts(torch.exp, rows.split(4))), rows.exp())
