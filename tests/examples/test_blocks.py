"""The examples of halting, policies and branches: run as they stand, on few images, and compute less point by point."""

import importlib

import pytest
import torch

pytest.importorskip("sklearn")


@pytest.mark.parametrize("name", ["skipnet", "blockdrop", "act", "a_vit", "hierarchy"])
def test_the_curve_falls(name, monkeypatch):
    torch.manual_seed(0)
    for module, width in (("resnet", 8), ("vit", 32)):
        monkeypatch.setattr(importlib.import_module(f"examples.{module}"), "WIDTH", width)
    monkeypatch.setattr(importlib.import_module("examples.vit"), "SIZE", 8)
    result = importlib.import_module(f"examples.{name}").run(quick=True)
    flops = [point.flops for point in result.points]
    assert flops == sorted(flops, reverse=True)
    assert flops[-1] < 0.6 * result.dense.flops
    assert flops[0] == pytest.approx(result.dense.flops, rel=0.25)
    assert all(0 <= point.accuracy <= 1 and point.ms > 0 for point in [result.dense, *result.points])
