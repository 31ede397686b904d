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


def test_ponder_is_the_mean_of_steps_and_remainders():
    remainder = torch.tensor([0.25, 0.75], requires_grad=True)
    loss = losses.ponder(torch.tensor([3, 1]), remainder)
    assert float(loss.detach()) == pytest.approx((3.25 + 1.75) / 2)
    loss.backward()
    torch.testing.assert_close(remainder.grad, torch.tensor([0.5, 0.5]))


def test_ponder_kl_is_zero_at_the_prior_and_follows_the_definition():
    prior = torch.tensor([0.8**n for n in range(5)])
    prior = prior / prior.sum()
    assert float(losses.ponder_kl(prior[:, None].expand(5, 3), 0.2)) == pytest.approx(0.0, abs=1e-6)
    p = torch.tensor([[0.5, 0.0], [0.3, 0.0], [0.2, 0.0], [0.0, 0.0], [0.0, 1.0]], requires_grad=True)
    loss = losses.ponder_kl(p, 0.2)
    live = p.detach()
    want = sum(float(q * (q / r).log()) for row, r in zip(live, prior, strict=True) for q in row if q > 0) / 2
    assert float(loss.detach()) == pytest.approx(want)
    loss.backward()
    assert p.grad.isfinite().all()


def test_expected_weighs_the_loss_of_each_step():
    values, p = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[0.5, 1.0], [0.5, 0.0]])
    assert float(losses.expected(values, p)) == pytest.approx((2.0 + 2.0) / 2)


def test_l1_is_the_mean_size():
    assert float(losses.l1(torch.tensor([[-1.0, 0.0], [2.0, 1.0]]))) == pytest.approx(1.0)


def test_square_hoyer_counts_equal_activations_whatever_their_size():
    h = torch.zeros(3, 8)
    h[0, :4], h[1, 2] = -7.0, 0.01
    h.requires_grad_()
    loss = losses.square_hoyer(h)
    assert float(loss.detach()) == pytest.approx((4 + 1 + 0) / 3)
    loss.backward()
    assert h.grad.isfinite().all()


def test_reinforce_follows_the_gradient_of_the_expected_reward():
    torch.manual_seed(0)
    logit = torch.tensor(0.3, requires_grad=True)
    p = torch.sigmoid(logit)
    share = p.item()
    action = torch.bernoulli(p.detach().expand(200_000))
    log_probability = torch.where(action > 0, p.log(), (1 - p).log())
    (grad,) = torch.autograd.grad(losses.reinforce(log_probability, 3 * action, 1.5), logit)
    assert float(grad) == pytest.approx(-3 * share * (1 - share), rel=0.02)  # of -E[reward] = -3 p


def test_no_rows_cost_nothing():
    assert float(losses.ponder(torch.zeros(0), torch.zeros(0))) == 0.0
    assert float(losses.ponder_kl(torch.zeros(3, 0), 0.5)) == 0.0
    assert float(losses.expected(torch.zeros(3, 0), torch.zeros(3, 0))) == 0.0
    assert float(losses.l1(torch.zeros(0, 4))) == float(losses.square_hoyer(torch.zeros(0, 4))) == 0.0
    assert float(losses.reinforce(torch.zeros(0), torch.zeros(0))) == 0.0
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
    for target in (50, -0.1, float("nan")):
        with pytest.raises(ValueError, match=f"target: expected a share in 0..1, got {target}"):
            losses.compute_target(torch.rand(3), target)
    with pytest.raises(ValueError, match=r"remainder: expected the shape of steps, \[3\], got \[2\]"):
        losses.ponder(torch.ones(3), torch.ones(2))
    with pytest.raises(ValueError, match=r"prior: expected a number in 0..1 \(both excluded\), got 1.0"):
        losses.ponder_kl(torch.rand(3, 2), 1.0)
    with pytest.raises(ValueError, match=r"probabilities: expected the shape of losses, \[3, 2\], got \[3\]"):
        losses.expected(torch.rand(3, 2), torch.rand(3))
    with pytest.raises(ValueError, match=r"reward: expected the shape of log_probability, \[4\], got \[4, 1\]"):
        losses.reinforce(torch.rand(4), torch.rand(4, 1))
    with pytest.raises(ValueError, match=r"activations: expected at least 1 dimension, got shape \[\]"):
        losses.square_hoyer(torch.tensor(1.0))


def test_multi_exit_is_the_weighted_mean_of_cross_entropies():
    logits = [torch.randn(6, 5, dtype=torch.double, requires_grad=True) for _ in range(3)]
    target = torch.randint(5, (6,))
    each = [torch.nn.functional.cross_entropy(z, target) for z in logits]
    torch.testing.assert_close(losses.multi_exit(logits, target), sum(each) / 3)
    torch.testing.assert_close(losses.multi_exit(logits, target, [1, 0, 3]), (each[0] + 3 * each[2]) / 4)
    soft = torch.nn.functional.one_hot(target, 5).double()
    torch.testing.assert_close(losses.multi_exit(logits, soft), sum(each) / 3)
    assert losses.multi_exit([torch.zeros(0, 5)] * 2, torch.zeros(0, dtype=torch.long)) == 0


def test_exit_distillation_teaches_all_exits_but_the_last():
    logits = [torch.randn(6, 5, dtype=torch.double, requires_grad=True) for _ in range(3)]
    p = torch.softmax(logits[2] / 2, 1)
    want = [4 * (p * (p.log() - torch.softmax(z / 2, 1).log())).sum(1).mean() for z in logits[:2]]
    got = losses.exit_distillation(logits, temperature=2.0, weights=[1, 3])
    torch.testing.assert_close(got, (want[0] + 3 * want[1]) / 4)
    got.backward()
    assert logits[0].grad.abs().sum() > 0
    assert logits[2].grad is None
    same = [logits[2].detach()] * 2
    assert losses.exit_distillation(same).abs() < 1e-12


def test_losses_of_exits_name_what_is_wrong():
    z, target = torch.zeros(3, 5), torch.zeros(3, dtype=torch.long)
    with pytest.raises(ValueError, match="weights: expected 2 of them, one an exit, got 1"):
        losses.multi_exit([z, z], target, [1.0])
    with pytest.raises(ValueError, match="weights: expected a sum > 0"):
        losses.multi_exit([z], target, [0.0])
    with pytest.raises(ValueError, match="logits: expected a sequence of tensors"):
        losses.multi_exit(z, target)
    with pytest.raises(ValueError, match="logits: expected those of at least 2 exits, got 1"):
        losses.exit_distillation([z])
    with pytest.raises(ValueError, match="temperature: expected a number > 0, got 0"):
        losses.exit_distillation([z, z], 0)


def test_activations_of_16_bits_do_not_overflow_a_loss():
    activations = torch.rand(4, 4096)
    half = activations.half()
    assert float(losses.square_hoyer(half)) == pytest.approx(float(losses.square_hoyer(half.double())), rel=1e-5)
    assert float(losses.l1(half.expand(100, -1, -1))) == pytest.approx(float(half.double().mean()), rel=1e-5)
    for loss in (losses.square_hoyer, losses.l1):
        x = half.clone().requires_grad_()
        loss(x).backward()
        assert x.grad.dtype == torch.float16
        assert loss(half.double()).dtype == torch.float64
