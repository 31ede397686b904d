"""DynamicKMoE: the experts whose predicted norm is near the largest; and SoftMoE, which skips nothing."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dyncore as dc
from tests.nn.oracle import D, flops, run
from tests.support import act

MODES = ("sparse", "masked", "auto")
EXPERTS, WIDTH = 4, 6


class Told(nn.Module):
    """A router that predicts what it was told."""

    def __init__(self, norms):
        super().__init__()
        self.register_buffer("told", norms)

    def forward(self, x):
        return self.told


def layer_of(norms=None, tau=0.5, **options):
    return dc.nn.DynamicKMoE(D, WIDTH, EXPERTS, tau, router=None if norms is None else Told(norms), **options)


def outputs(layer, x):
    """Every expert's output [T, E, H], from the dense weights."""
    wide = layer.w_in.shape[0] // EXPERTS
    found = []
    for e in range(EXPERTS):
        rows = slice(e * wide, (e + 1) * wide)
        hidden = act(F.linear(x, layer.w_in[rows], layer.b_in[rows]), layer.activation)
        found.append(hidden @ layer.w_out[:, e * WIDTH : (e + 1) * WIDTH].t())
    return torch.stack(found, 1)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("activation", ["relu", "swiglu"])
def test_experts_run_whose_norm_is_near_the_largest(activation, mode):
    norms = torch.tensor([[4.0, 1.0, 2.0, 1.9], [0.0, 0.0, 0.0, 0.0], [3.0, 3.0, 0.0, 1.0]])
    layer, x = layer_of(norms, activation=activation).double(), torch.randn(3, D).double()
    runs = torch.tensor([[1, 0, 1, 0], [1, 1, 1, 1], [1, 1, 0, 0]])
    want = (outputs(layer, x) * runs[..., None]).sum(1) + layer.b_out
    torch.testing.assert_close(run(layer, x, mode).out, want.detach())
    torch.testing.assert_close(layer.last_cost, runs.float().mean(1))


def test_tau_moves_from_one_expert_to_exactly_the_dense_mlp():
    layer, x = layer_of(activation="swiglu"), torch.randn(50, D)
    costs = []
    for tau in (0, 0.02, 0.1, 0.3, 1):
        layer.tau = tau
        y = layer(x)
        costs.append(float(layer.last_cost.mean()))
    assert costs[0] == 1 / EXPERTS
    assert costs[-1] == 1
    assert costs == sorted(costs)
    assert len(set(costs)) > 3
    assert torch.equal(y, layer.to_dense()(x))


def test_flops_are_those_of_the_experts_that_run_and_the_router():
    norms = torch.rand(40, EXPERTS)
    layer, x = layer_of(norms), torch.randn(40, D)
    slots = int((norms >= 0.5 * norms.amax(1, keepdim=True)).sum())
    assert flops(lambda: layer(x)) == 2 * slots * 2 * D * WIDTH
    router = layer_of(norms)
    router.router = dc.nn.NormRouter(D, EXPERTS, 10)
    router.tau = 1
    assert flops(lambda: router(x)) == 2 * 40 * (EXPERTS * 2 * D * WIDTH + D * 10 + 10 * EXPERTS)


@pytest.mark.parametrize("mode", MODES)
def test_a_row_of_nan_runs_everything_and_harms_no_other(mode):
    layer, x = layer_of(tau=0.05), torch.randn(9, D)
    with dc.execution(mode):
        clean = layer(x)
        x[4] = float("nan")
        dirty = layer(x)
    assert dirty[4].isnan().all()
    assert layer.last_cost[4] == 1
    others = torch.arange(9) != 4
    torch.testing.assert_close(dirty[others], clean[others])


@pytest.mark.parametrize("activation", ["relu", "geglu"])
def test_norms_are_those_of_the_outputs(activation):
    layer, x = layer_of(activation=activation), torch.randn(7, D)
    torch.testing.assert_close(layer.norms(x), outputs(layer, x).norm(dim=-1).detach())


def test_the_router_learns_the_norms_by_its_loss_alone():
    layer, x = layer_of(), torch.randn(60, D)
    before = copy.deepcopy(layer.state_dict())
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.02)
    losses = []
    for _ in range(100):
        layer(x)
        loss = layer.losses()["router_regression"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.2 * losses[0]
    for name, value in layer.state_dict().items():
        learned = name.startswith("router.") and name != "router.scale"
        assert torch.equal(value, before[name]) != learned, name
    layer.eval()(x)
    assert layer.losses() == {}


def test_fit_router_leaves_everything_else_as_it_was():
    layer, x = layer_of().eval().requires_grad_(False), torch.randn(200, D)
    start = float(layer.regression(x))
    steps = []
    left = dc.nn.fit_router(layer, x, steps=80, lr=0.01, report=lambda step, loss: steps.append(step))
    assert left == pytest.approx(float(layer.regression(x)))
    assert left < 0.5 * start
    assert steps == [*range(80)]
    assert not any(p.requires_grad or p.grad is not None for p in layer.parameters())


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: layer_of(tau=1.5), ValueError, r"tau: expected a number in 0\.\.1, got 1\.5"),
        (lambda: dc.nn.DynamicKMoE(D, 0, 4), ValueError, "hidden_dim: expected an int >= 1, got 0"),
        (lambda: dc.nn.DynamicKMoE(D, 4, 2.0), TypeError, "num_experts: expected an int >= 1, got float"),
        (lambda: layer_of()(torch.randn(2, 3)), ValueError, r"x: expected shape \[\.\.\., 16\], got \[2, 3\]"),
        (
            lambda: layer_of(torch.ones(2, 3))(torch.randn(2, D)),
            ValueError,
            r"router: expected norms \[2, 4\], got \[2, 3\]",
        ),
        (lambda: dc.nn.SoftMoE(D, 4, 0), ValueError, "num_experts: expected an int >= 1, got 0"),
        (lambda: dc.nn.SoftMoE(D, 4, 2)(torch.randn(3, 2)), ValueError, r"x: expected shape \[\.\.\., S, 16\], got"),
        (lambda: dc.nn.SoftMoE(D, 4, 2)(3), TypeError, "x: expected a Tensor, got int"),
    ],
)
def test_what_does_not_fit_is_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_soft_experts_see_means_of_all_tokens(activation, mode):
    layer = dc.nn.SoftMoE(D, 10, 3, 2, activation=activation).double()
    x = torch.randn(2, 7, D).double()
    vectors = layer.slot_vectors / layer.slot_vectors.norm(dim=0)
    logits = x / x.norm(dim=-1, keepdim=True) @ vectors * layer.scale * D**0.5
    mixed = torch.softmax(logits, 1).transpose(1, 2) @ x
    y = torch.empty(2, 6, D).double()
    for slot in range(6):
        e = slot // 2
        hidden = act(F.linear(mixed[:, slot], layer.w_in[e], layer.b_in[e]), activation)
        y[:, slot] = F.linear(hidden, layer.w_out[e], layer.b_out[e])
    want = torch.softmax(logits, 2) @ y
    got = run(layer, x, mode)
    torch.testing.assert_close(got.out, want.detach())
    assert all(grad.abs().sum() > 0 for grad in got.grads.values())
    assert torch.equal(layer.last_cost, torch.ones(2, 7))


def test_a_soft_mixture_costs_the_same_in_every_mode():
    layer, x = dc.nn.SoftMoE(D, 10, 3, 2), torch.randn(2, 7, D)
    want = 2 * 2 * 6 * (3 * 7 * D + 2 * D * 10)  # logits, both mixtures, and the experts on their slots
    assert flops(lambda: layer(x)) == want
    assert layer(torch.randn(4, D)).shape == (4, D)
    for shape in ((0, 5, D), (2, 0, D)):
        assert run(layer, torch.randn(shape)).out.shape == shape


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_norms_of_any_size_are_learned(size):
    torch.manual_seed(0)
    layer = dc.nn.DynamicKMoE(16, 16, 4)
    with torch.no_grad():
        layer.w_out.mul_(size)
        layer.b_out.zero_()
    assert dc.nn.fit_router(layer, torch.randn(512, 16), steps=200, batch=128, lr=3e-3) < 0.1
