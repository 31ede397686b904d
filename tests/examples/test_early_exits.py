"""The examples of early exits and cascades: their networks compute in parts what they compute as a whole."""

import importlib

import pytest
import torch

import dyncore as dc

pytest.importorskip("sklearn")


@pytest.mark.parametrize("name", ["early_exit_msdnet", "ranet", "dynamic_vit"])
def test_images_leave_as_running_everything_says_and_save_what_follows(name):
    example = importlib.import_module(f"examples.{name}")
    model, x = example.build().eval(), torch.randn(4, 1, example.SIZE, example.SIZE)
    logits = [z.detach() for z in model.every_exit(x)]
    assert all(z.shape == (4, 10) for z in logits)
    model.threshold = dc.nn.exits.confidences(logits, model.criterion)[:-1].median(1).values
    want = dc.nn.exits.simulate(logits, model.criterion, dc.measure.exit_costs(model, x))
    assert len(want.exit.unique()) > 1
    with torch.no_grad():
        torch.testing.assert_close(model(x), want.logits)
        assert torch.equal(model.last_exit, want.exit)
        assert dc.measure.flops(model, x) == int(want.cost.sum())
        model.threshold = torch.inf
        torch.testing.assert_close(model(x), logits[-1])


def test_the_cascade_runs_from_training_to_table(monkeypatch):
    example = importlib.import_module("examples.cascade")
    monkeypatch.setattr(example, "NETWORKS", ((4, 1), (8, 1), (12, 2)))
    result = example.run(quick=True)
    flops = [point.flops for point in result.points]
    assert flops == sorted(flops, reverse=True)
    assert flops[0] > result.dense.flops > flops[-1]
    assert result.points[0].accuracy == result.dense.accuracy
