"""The token examples: run as they stand, on few images, and compute less from point to point."""

import importlib
import itertools

import pytest
import torch

pytest.importorskip("sklearn")


@pytest.mark.parametrize("name", ["mixture_of_depths", "token_skip", "token_drop", "token_merge"])
def test_the_curve_falls(name, monkeypatch):
    vit = importlib.import_module("examples.vit")
    example = importlib.import_module(f"examples.{name}")
    torch.manual_seed(0)
    monkeypatch.setattr(vit, "WIDTH", 32)
    monkeypatch.setattr(vit, "SIZE", 8)
    result = example.run(quick=True)
    flops = [point.flops for point in result.points]
    assert flops == sorted(flops, reverse=True)
    assert flops[-1] < 0.6 * result.dense.flops
    assert flops[0] == pytest.approx(result.dense.flops, rel=0.25)
    assert all(later.threshold != earlier.threshold for earlier, later in itertools.pairwise(result.points))
    assert all(0 <= point.accuracy <= 1 and point.ms > 0 for point in result.points)
