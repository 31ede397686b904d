"""TreeMLP: one leaf of a tree of decisions for every row; in soft training the mixture of all."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dyncore as dc
from dyncore.nn.tree import leaf_chances
from tests.nn.oracle import D, flops, run
from tests.support import act

MODES = ("sparse", "masked", "auto")


def leaf_by_hand(layer, x, leaf):
    hidden = act(F.linear(x, layer.w_in[leaf], layer.b_in[leaf]), layer.activation)
    return F.linear(hidden, layer.w_out[leaf], layer.b_out[leaf])


def path(layer, row):
    """The leaf of a row and the chance of its turns."""
    node, chance = 0, torch.ones((), dtype=row.dtype)
    while node < layer.num_leaves - 1:
        logit = layer.nodes.weight[node] @ row + layer.nodes.bias[node]
        chance = chance * torch.sigmoid(logit if logit > 0 else -logit)
        node = 2 * node + 1 + int(logit > 0)
    return node - (layer.num_leaves - 1), chance


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_in_evaluation_a_row_gets_its_leaf(activation, mode):
    layer, x = dc.nn.TreeMLP(D, 3, 5, activation=activation).double().eval(), torch.randn(30, D).double()
    want = torch.stack([leaf_by_hand(layer, row, path(layer, row)[0]) for row in x])
    with torch.no_grad(), dc.execution(mode):
        torch.testing.assert_close(layer(x), want)
    torch.testing.assert_close(run(layer, x, mode).out, want.detach())


@pytest.mark.parametrize("activation", ["gelu", "geglu"])
def test_in_soft_training_leaves_are_mixed_by_the_chance_of_their_turns(activation):
    layer, x = dc.nn.TreeMLP(D, 2, 5, activation=activation).double(), torch.randn(3, 4, D).double()
    s = torch.sigmoid(layer.nodes(x))[..., None]
    chances = [(1 - s[:, :, 0]) * (1 - s[:, :, 1]), (1 - s[:, :, 0]) * s[:, :, 1]]
    chances += [s[:, :, 0] * (1 - s[:, :, 2]), s[:, :, 0] * s[:, :, 2]]
    want = sum(p * leaf_by_hand(layer, x, leaf) for leaf, p in enumerate(chances))
    torch.testing.assert_close(layer(x), want)
    assert torch.equal(layer.last_cost, torch.ones(3, 4))
    for name, grad in run(layer, x).grads.items():
        assert grad.abs().sum() > 0, name


def test_the_nodes_learn_by_the_chance_of_the_path():
    layer, x = dc.nn.TreeMLP(D, 3, 5, soft=False).double(), torch.randn(20, D).double()
    weights = torch.randn(20, D).double()
    got = run(layer, x, weights=weights).grads["nodes.weight"]
    total = 0
    for row, weight in zip(x, weights, strict=True):
        leaf, chance = path(layer, row)
        total = total + chance * (leaf_by_hand(layer, row, leaf).detach() @ weight)
    (want,) = torch.autograd.grad(total, layer.nodes.weight)
    torch.testing.assert_close(got, want)


def test_hard_training_and_evaluation_agree_and_soft_training_comes_near_them_when_hardened():
    layer, x = dc.nn.TreeMLP(D, 3, 5), torch.randn(50, D)
    with torch.no_grad():
        layer.nodes.weight.mul_(1e4)
        layer.nodes.bias.mul_(1e4)
    soft = layer(x).detach()
    assert float(layer.losses()["hardening"].detach()) < 0.01
    torch.testing.assert_close(soft, layer.eval()(x).detach(), rtol=1e-3, atol=1e-3)
    layer.soft = False
    torch.testing.assert_close(layer.train()(x), layer.eval()(x))


def test_hardening_is_the_mean_entropy_of_the_turns():
    layer = dc.nn.TreeMLP(D, 2, 5)
    assert layer.losses() == {}
    nn.init.zeros_(layer.nodes.weight)
    nn.init.zeros_(layer.nodes.bias)
    layer(torch.randn(6, D))
    assert float(layer.losses()["hardening"].detach()) == pytest.approx(math.log(2), rel=1e-6)
    layer.eval()
    with torch.no_grad():
        layer(torch.randn(6, D))
    assert layer.losses() == {}


def test_chances_of_all_leaves_sum_to_one():
    chances = leaf_chances(torch.randn(7, 15).double())
    assert chances.shape == (7, 16)
    torch.testing.assert_close(chances.sum(1), torch.ones(7).double())


def test_a_tree_without_nodes_is_exactly_an_mlp():
    layer, mlp, x = dc.nn.TreeMLP(D, 0, 24), dc.nn.MLP(D, 24), torch.randn(5, 3, D)
    with torch.no_grad():
        for name in ("w_in", "w_out"):
            getattr(layer, name)[0] = getattr(mlp, name).weight
            getattr(layer, name.replace("w", "b"))[0] = getattr(mlp, name).bias
    assert torch.equal(layer(x), mlp(x))
    assert torch.equal(layer.last_cost, torch.ones(5, 3))
    with dc.execution("sparse"):
        torch.testing.assert_close(layer(x), mlp(x))


def test_flops_are_those_of_one_path_and_one_leaf():
    layer, x = dc.nn.TreeMLP(D, 4, 5, activation="swiglu").eval(), torch.randn(3, 20, D)
    with torch.no_grad():
        assert flops(lambda: layer(x)) == 2 * 60 * (4 * D + 3 * D * 5)
    assert torch.equal(layer.last_cost, torch.full((3, 20), 1 / 16))
    layer.train()
    assert flops(lambda: layer(x)) == 2 * 60 * (15 * D + 16 * 3 * D * 5 + 16 * D)  # the last: of the biases


@pytest.mark.parametrize("mode", MODES)
def test_a_row_of_nan_harms_no_other(mode):
    layer, x = dc.nn.TreeMLP(D, 2, 5).eval(), torch.randn(9, D)
    clean = layer(x)
    x[4] = float("nan")
    with dc.execution(mode):
        dirty = layer(x)
    assert dirty[4].isnan().all()
    others = torch.arange(9) != 4
    torch.testing.assert_close(dirty[others], clean[others])


def test_it_learns_through_the_leaf_that_was_run():
    x = torch.rand(512, 2) * 2 - 1
    y = torch.where(x[:, :1] > 0, torch.sin(4 * x[:, 1:]), x[:, 1:].square())
    layer = nn.Sequential(dc.nn.TreeMLP(2, 1, 8, soft=False), nn.Linear(2, 1))
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.02)
    for _ in range(400):
        loss = F.mse_loss(layer(x), y) + 0.02 * layer[0].losses()["hardening"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(F.mse_loss(layer.eval()(x), y).detach()) < 0.2 * float(y.var())


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: dc.nn.TreeMLP(D, -1, 4), ValueError, r"depth: expected 0\.\.16, got -1"),
        (lambda: dc.nn.TreeMLP(D, 1.5, 4), TypeError, "depth: expected an int, got float"),
        (lambda: dc.nn.TreeMLP(D, 2, 0), ValueError, "leaf_dim: expected an int >= 1, got 0"),
        (lambda: dc.nn.TreeMLP(D, 2, 4, activation="tanh"), ValueError, "activation: expected one of"),
        (lambda: dc.nn.TreeMLP(D, 2, 4)(torch.randn(2, 3)), ValueError, r"x: expected shape \[\.\.\., 16\], got"),
        (lambda: dc.nn.TreeMLP(D, 2, 4)(None), TypeError, "x: expected a Tensor, got NoneType"),
    ],
)
def test_what_does_not_fit_is_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()
