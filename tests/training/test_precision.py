"""bf16 where the machine computes in it, fp32 where it would emulate it."""

import logging

import pytest
import torch

from dalle_pytorch.training import precision


@pytest.mark.parametrize("supported", [False, True])
@pytest.mark.parametrize("accelerator", ["cpu", "auto"])
@pytest.mark.parametrize("name", ["bf16-mixed", "bf16-true", "32-true", "16-mixed"])
def test_bf16_becomes_fp32_only_where_a_cpu_would_emulate_it(monkeypatch, caplog, supported, accelerator, name):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: supported)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    section = {"accelerator": accelerator, "precision": name, "max_steps": 3}
    with caplog.at_level(logging.WARNING):
        found = precision.fast_precision(section)
    if name.startswith("bf16") and not supported:
        assert found == {**section, "precision": "32-true"}
        assert f"in place of {name}" in caplog.text
    else:
        assert found == section
        assert not caplog.text


@pytest.mark.parametrize(("accelerator", "there"), [("gpu", True), ("auto", True), ("gpu", False)])
def test_gpus_keep_what_they_are_told(monkeypatch, accelerator, there):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: there)
    section = {"accelerator": accelerator, "precision": "bf16-mixed"}
    assert precision.fast_precision(section) == section
