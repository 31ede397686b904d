"""measure.exits: counts, accuracy and calibration of each exit, by hand."""

import math

import pytest
import torch
from torch import nn

import dyncore as dc
from dyncore.nn import exits


class Says(nn.Module):
    """Logits whose largest probability is `p` on class x[:, k]."""

    def __init__(self, k, p):
        super().__init__()
        self.k, self.p = k, p

    def forward(self, x):
        rest = (1 - self.p[x[:, 2]]) / 3
        p = rest[:, None].repeat(1, 4)
        return p.scatter(1, x[:, self.k : self.k + 1], self.p[x[:, 2]][:, None]).log()


def model():
    """Two exits: x[:, 0] is what the first says, x[:, 1] the second, x[:, 2] how hard the sample is (0 or 1)."""
    first, second = Says(0, torch.tensor([0.9, 0.5])), Says(1, torch.tensor([0.82, 0.82]))
    return dc.nn.EarlyExit([nn.Identity(), nn.Identity()], [first, second], exits.MaxProbability(0.7), [1, 3])


X = torch.tensor([[0, 0, 0], [1, 0, 0], [2, 2, 0], [3, 3, 1], [0, 1, 1]])
Y = torch.tensor([0, 1, 2, 3, 2])  # first: right, right, right, right, wrong; second: right, wrong, right, right, wrong


@pytest.mark.parametrize("batch", [256, 2])
def test_counts_accuracy_and_calibration_of_each_exit(batch):
    layer = model().train()
    found = dc.measure.exits(layer, X, Y, batch=batch)
    assert layer.training
    assert layer.heads[0].training
    first, second = found.exits
    assert [p.samples for p in (first.everything, first.reached, first.left)] == [5, 5, 3]
    assert [p.samples for p in (second.everything, second.reached, second.left)] == [5, 2, 2]
    assert (first.cost, second.cost) == (0.25, 1.0)
    assert first.everything.accuracy == pytest.approx(0.8)
    assert (first.left.accuracy, second.everything.accuracy, second.reached.accuracy) == pytest.approx((1.0, 0.6, 0.5))
    assert first.left.calibration_error == pytest.approx(0.1, abs=1e-6)  # 0.9 sure, always right
    assert first.everything.calibration_error == pytest.approx(0.6 * 0.1 + 0.4 * 0.0, abs=1e-6)  # 0.5 sure, half right
    assert second.reached.calibration_error == pytest.approx(0.32, abs=1e-6)
    assert second.reached.confidence == pytest.approx(0.82)
    assert found.accuracy == pytest.approx(0.8)
    assert found.cost == pytest.approx((3 * 1 + 2 * 4) / 5 / 4)
    assert (found.agreement, found.rescued, found.lost) == pytest.approx((0.8, 0.2, 0.0))


def test_the_table_shows_every_exit_and_exits_that_nobody_takes():
    layer = model()
    layer.threshold = -math.inf
    table = repr(dc.measure.exits(layer, X, Y))
    assert "5 samples: accuracy 80.0% at 25.0% of the cost, 60.0% at all of it" in table
    assert table.splitlines()[-1].split() == ["1", "100%", "0", "0", "60.0%", "-", "-", "22.0%", "-", "-"]


def test_it_agrees_with_what_the_network_does():
    layer = model().eval()
    found = dc.measure.exits(layer, X, Y)
    out = layer(X)
    assert found.accuracy == pytest.approx(float((out.argmax(1) == Y).double().mean()))
    assert found.cost == pytest.approx(float(layer.last_cost.mean()))
    left = torch.bincount(layer.last_exit, minlength=2)
    assert [e.left.samples for e in found.exits] == left.tolist()


def test_models_of_several_arguments():
    class Sum(nn.Module):
        def forward(self, a, *, b):
            return a + b

    layer = dc.nn.Cascade([Sum(), Sum()])
    a, b, y = torch.randn(9, 4), torch.randn(9, 4), torch.randint(4, (9,))
    found = dc.measure.exits(layer, {"a": a, "b": b}, y, batch=4)
    assert found.exits[1].everything.accuracy == pytest.approx(float(((a + b).argmax(1) == y).double().mean()))


def test_costs_of_exits_are_the_flops_that_each_stage_adds():
    heads = [nn.Linear(8, 4), nn.Linear(6, 4)]
    layer = dc.nn.EarlyExit([nn.Linear(5, 8), nn.Linear(8, 6)], heads, exits.Margin(0.3)).train()
    kept = layer.criterion
    assert dc.measure.exit_costs(layer, torch.randn(9, 5)) == [2 * (5 * 8 + 8 * 4), 2 * (8 * 6 + 6 * 4)]
    assert layer.criterion is kept
    assert layer.training


BAD_CALLS = [
    (lambda: dc.measure.exit_costs(nn.Identity(), X), TypeError, "model: expected an EarlyExit, a Cascade or another ExitLayer"),
    (lambda: dc.measure.exits(nn.Identity(), X, Y), TypeError, "model: expected an EarlyExit, a Cascade or another ExitLayer"),
    (lambda: dc.measure.exits(model(), X, X), ValueError, "y: expected classes [N] of at least one sample, got shape [5, 3]"),
    (lambda: dc.measure.exits(model(), X[:0], Y[:0]), ValueError, "y: expected classes [N] of at least one sample, got shape [0]"),
    (lambda: dc.measure.exits(model(), X[:4], Y), ValueError, "x: expected tensors of 5 samples, as many as in y, got shape [4, 3]"),
    (lambda: dc.measure.exits(model(), X, Y.float()), TypeError, "y: expected classes as integers, got torch.float32"),
    (lambda: dc.measure.exits(model(), X, Y + 2), IndexError, "y: expected classes in 0..3, got 2..5"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "kind", "message"), BAD_CALLS, ids=[m for _, _, m in BAD_CALLS])
def test_bad_calls_name_the_argument(call, kind, message):
    with pytest.raises(kind) as error:
        call()
    assert message in str(error.value)


def test_a_network_of_one_exit_has_its_cost():
    net = dc.nn.EarlyExit([nn.Identity()], [nn.Linear(4, 3)])
    assert dc.measure.exit_costs(net, torch.randn(2, 4)) == [24.0]
