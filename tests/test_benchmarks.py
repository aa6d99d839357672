"""benchmarks/gpu.py runs: on a CPU, in tiny sizes."""

import importlib
import re
import sys
from pathlib import Path

import pytest
import torch

import dalle_pytorch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
BESIDE = ("gpu", "timing", "training")  # scripts that import each other by these names


@pytest.fixture
def run(monkeypatch, capsys, unchecked_shapes):
    """Run gpu.py with arguments; gives the exit code and what it printed. ``parts`` take the place of its own."""
    before = torch.get_float32_matmul_precision()
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    for name in BESIDE:
        monkeypatch.delitem(sys.modules, name, raising=False)
    module = importlib.import_module("gpu")

    def run(*arguments, parts=None):
        if parts is not None:
            monkeypatch.setattr(module, "PARTS", parts)
        monkeypatch.setattr(sys, "argv", ["gpu.py", "--device", "cpu", "--tiny", *arguments])
        with pytest.raises(SystemExit) as stop:
            module.main()
        return int(stop.value.code), capsys.readouterr().out

    yield run
    torch.set_float32_matmul_precision(before)
    for name in BESIDE:
        sys.modules.pop(name, None)


def test_every_part_of_the_gpu_benchmark_runs_on_a_cpu(run):
    code, printed = run()
    summary = printed.partition("## Summary")[2].strip().splitlines()
    assert [line.partition(":")[0] for line in summary] == [
        "logits", "strategies", "attention", "sampling", "training", "trainer", "codec", "compiled",
    ]  # fmt: skip
    assert all(": ok, " in line for line in summary), printed
    assert code == 0
    assert "compiled: left out" in printed


def test_a_wrong_decoder_fails_its_check(run, monkeypatch):
    scores = dalle_pytorch.generation.decoder.Decoder.scores
    monkeypatch.setattr("dalle_pytorch.generation.decoder.Decoder.scores", lambda self, out: scores(self, out) * 1.001)
    code, printed = run("--parts", "logits")
    assert code == 1
    assert re.search(r"\| full, rotary, shift: fp32, 1 x 1, 1 a step \| 1\.\de-03 \| 1e-04 \| FAILED \|", printed)
    assert "\nlogits: FAILED: full, rotary, shift: fp32" in printed


def test_parts_fail_alone_and_stop_when_the_time_is_over(run):
    def broken(bench):
        raise RuntimeError("no kernel image")

    def wrong(bench):
        bench.check("sums", float("nan"), 1e-4)

    parts = {"broken": broken, "wrong": wrong, "right": lambda bench: bench.check("sums", 0.0, 1e-4)}
    code, printed = run(parts=parts)
    assert code == 1
    assert "RuntimeError: no kernel image" in printed
    assert "broken: FAILED: it raised" in printed
    assert "wrong: FAILED: sums" in printed
    assert "right: ok, " in printed
    code, printed = run("--budget", "0", parts=parts)
    assert code == 0
    assert printed.count("skipped from here on, the time budget is spent") == 3
