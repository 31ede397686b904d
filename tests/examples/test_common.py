"""examples/common.py: what the curves of the examples are made with."""

import pytest
import torch
from torch import nn

import dyncore as dc
from dyncore.nn import MLP, Skip
from dyncore.nn.gates import ThresholdGate

pytest.importorskip("sklearn")
from examples import common


@pytest.fixture(scope="module")
def data():
    return common.digits()


class Flat(nn.Module):
    def __init__(self, block):
        super().__init__()
        self.block, self.head = block, nn.Linear(64, 10)

    def forward(self, x):
        return self.head(self.block(x.flatten(1)))


def test_parts_of_the_digits_do_not_overlap_and_have_all_classes(data):
    images = torch.cat([data.train[0], data.valid[0], data.test[0]]).flatten(1)
    assert len(images) == 1797
    assert len(images.unique(dim=0)) >= 1790  # few digits are alike; a part twice would halve them
    for x, y in (data.train, data.valid, data.test):
        assert x.shape[1:] == (1, 8, 8)
        assert 0 <= float(x.min()) < float(x.max()) <= 1
        assert len(y.unique()) == 10
    assert common.digits(size=32).test[0].shape[1:] == (1, 32, 32)


def test_moved_images_are_the_same_images_elsewhere():
    x = torch.zeros(50, 2, 8, 8)
    x[:, 1, 4, 3] = 1
    moved = common.shifted(x, 1)
    assert moved.shape == x.shape
    assert torch.equal(moved[:, 1].flatten(1).sum(1), torch.ones(50))
    places = {tuple(p[1:]) for p in moved[:, 1].nonzero().tolist()}
    assert places <= {(i, j) for i in (3, 4, 5) for j in (2, 3, 4)}
    assert len(places) > 4


def test_training_learns_and_leaves_evaluation(data):
    torch.manual_seed(0)
    model = common.train(Flat(MLP(64, 64)), data.train, epochs=4, rate=1e-2)
    assert not model.training
    x, y = data.test
    assert float((model(x).argmax(1) == y).float().mean()) > 0.6


def test_a_curve_holds_accuracy_flops_and_times_at_each_threshold(data):
    torch.manual_seed(0)
    test = (data.test[0][:100], data.test[1][:100])
    gate = ThresholdGate(64)
    model, dense = Flat(Skip(MLP(64, 256), gate)).eval(), Flat(MLP(64, 256)).eval()
    move = lambda model, threshold: setattr(model.block.gate, "threshold", threshold)  # noqa: E731
    first, points = common.curve(dense, model, move, [-1.0, 1.0], test, batch=30, seconds=0.1, singles=2)
    mlp, head, score = 2 * 2 * 64 * 256, 2 * 640, 2 * 64
    assert first.threshold is None
    assert first.flops == mlp + head
    assert [p.threshold for p in points] == [-1.0, 1.0]
    assert [p.flops for p in points] == [mlp + head + score, head + score]
    for point, state in zip(points, (-1.0, 1.0), strict=True):
        move(model, state)
        assert point.accuracy == pytest.approx(float((model(test[0]).argmax(1) == test[1]).float().mean()))
        assert point.ms > 0
        assert point.single_ms > 0
    text = common.table(common.Result("Skip", first, points, "a note"))
    assert "dense" in text
    assert "a note" in text
    assert dc.measure.flops(dense, test[0]) / 100 == first.flops


def test_a_quick_run_says_that_it_is_a_smoke_test():
    result = common.Result("Skip", common.Point(None, 0.9, 1e6, 1.0, 1.0), [], "why")
    assert common.marked(result, True).note == f"{common.SMOKE}; why"
    assert common.marked(result, False) == result
