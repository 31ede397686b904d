"""The examples of width and experts: run as they stand, on few images, and compute less from point to point."""

import importlib
import itertools

import pytest
import torch

pytest.importorskip("sklearn")


@pytest.mark.parametrize(("name", "least"), [("moe_dynamic_k", 0.5), ("acm", 0.8), ("tree", 0.4)])
def test_the_curve_falls(name, least, monkeypatch):
    mixer = importlib.import_module("examples.mixer")
    example = importlib.import_module(f"examples.{name}")
    torch.manual_seed(0)
    monkeypatch.setattr(mixer, "WIDTH", 64)
    monkeypatch.setattr(mixer, "HIDDEN", 256)
    monkeypatch.setattr(mixer, "DEPTH", 1)
    monkeypatch.setattr(mixer, "STEM", 4)
    result = example.run(quick=True)
    flops = [point.flops for point in result.points]
    assert flops == sorted(flops, reverse=True)
    assert flops[-1] < least * result.dense.flops
    assert flops[0] == pytest.approx(result.dense.flops, rel=0.3)
    assert all(later.threshold != earlier.threshold for earlier, later in itertools.pairwise(result.points))
    assert all(0 <= point.accuracy <= 1 and point.ms > 0 for point in result.points)
