"""The losses, by hand."""

import pytest
import torch

from dyncore.nn import losses


def test_load_balance_is_the_product_of_shares():
    probabilities = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.8, 0.1]], requires_grad=True)
    counts = torch.tensor([3, 1, 0])
    loss = losses.load_balance(probabilities, counts)
    assert float(loss.detach()) == pytest.approx(3 * (0.75 * 0.3 + 0.25 * 0.55))
    loss.backward()
    torch.testing.assert_close(probabilities.grad, torch.tensor([[0.75, 0.25, 0.0]] * 2) * 3 / 2)


def test_router_z_is_the_mean_square_of_logsumexp():
    logits = torch.tensor([[0.0, 0.0], [1.0, -1.0]])
    want = (torch.tensor(2.0).log() ** 2 + (torch.tensor(1.0).exp() + torch.tensor(-1.0).exp()).log() ** 2) / 2
    assert float(losses.router_z(logits)) == pytest.approx(float(want))


def test_compute_target_is_the_squared_miss_of_the_mean():
    a, b = torch.tensor([1.0, 0.0, 0.0, 1.0], requires_grad=True), torch.tensor([1.0, 1.0])
    assert float(losses.compute_target(a, 0.25).detach()) == pytest.approx(0.0625)
    assert float(losses.compute_target([a, b], 0.25).detach()) == pytest.approx(0.25)
    assert float(losses.compute_target([a, b], 0.0, weights=[3.0, 1.0]).detach()) == pytest.approx(0.625**2)
    losses.compute_target(a, 0.25).backward()
    torch.testing.assert_close(a.grad, torch.full((4,), 2 * 0.25 / 4))


def test_no_rows_cost_nothing():
    assert float(losses.load_balance(torch.zeros(0, 3), torch.zeros(3))) == 0.0
    assert float(losses.router_z(torch.zeros(0, 3))) == 0.0
    assert float(losses.compute_target(torch.zeros(0), 0.5)) == 0.25


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match=r"counts: expected one for each column of probabilities \[2, 3\], got \[2\]"):
        losses.load_balance(torch.rand(2, 3), torch.rand(2))
    with pytest.raises(ValueError, match="costs: expected the cost of at least one layer, got none"):
        losses.compute_target([], 0.5)
    for costs, got in ((None, "NoneType"), ({"0": torch.rand(3)}, "dict"), ([None], "one of NoneType")):
        with pytest.raises(TypeError, match=f"costs: expected a Tensor or an iterable of them, got {got}"):
            losses.compute_target(costs, 0.5)
    with pytest.raises(ValueError, match="weights: expected 1 of them, one a layer, got 2"):
        losses.compute_target([torch.rand(3)], 0.5, weights=[1.0, 2.0])
