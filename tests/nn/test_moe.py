"""MoE against each token and expert by itself; routing, losses, and experts of other code bases in and out."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dyncore as dc
from dyncore.nn.mlp import ACTIVATIONS
from tests.nn.oracle import D, flops, run
from tests.support import act

MODES = ("sparse", "masked", "auto")
E, I = 5, 24  # noqa: E741


def oracle(layer: dc.nn.MoE, x):
    """Token by token, expert by expert."""
    probabilities = torch.softmax(x @ layer.router.weight.t(), -1)
    experts = layer.to_experts()
    want = torch.zeros_like(x) if layer.shared is None else layer.shared(x).clone()
    for t, row in enumerate(x):
        weight, chosen = probabilities[t].topk(layer.top_k)
        if layer.normalize:
            weight = weight / weight.sum()
        for w, e in zip(weight, chosen, strict=True):
            h = act(F.linear(row, experts[e].w_in.weight, experts[e].w_in.bias), layer.activation)
            want[t] += w * F.linear(h, experts[e].w_out.weight, experts[e].w_out.bias)
    return want


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_token_choice_is_the_weighted_sum_of_the_chosen_experts(mode, activation):
    layer = dc.nn.MoE(D, I, E, 2, activation=activation, bias=True, shared_experts=2).double()
    x = torch.randn(13, D, dtype=torch.float64)
    with dc.execution(mode), torch.no_grad():
        torch.testing.assert_close(layer(x), oracle(layer, x))


@pytest.mark.parametrize("normalize", [True, False])
def test_weights_are_normalised_when_asked(normalize):
    layer = dc.nn.MoE(D, I, E, 3, normalize=normalize).double()
    x = torch.randn(9, D, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), oracle(layer, x))
    sums = layer.last_plan.scale.detach().new_zeros(9).index_add(0, layer.last_plan.rows.long(), layer.last_plan.scale)
    assert torch.allclose(sums, torch.ones_like(sums)) == normalize


def test_one_expert_a_token_keeps_the_probability_so_that_the_router_learns():
    layer, x = dc.nn.MoE(D, I, E, 1), torch.randn(9, D)
    assert not layer.normalize
    assert run(layer, x).grads["router.weight"].abs().max() > 1e-6


def test_expert_choice_gives_each_expert_its_best_tokens():
    layer, x = dc.nn.MoE(D, I, E, 2, routing="expert_choice").double(), torch.randn(4, 5, D, dtype=torch.float64)
    with torch.no_grad():
        got = layer(x).view(-1, D)
    rows = x.view(-1, D)
    probabilities = torch.softmax(rows @ layer.router.weight.t(), -1)
    want = torch.zeros_like(rows)
    for e, expert in enumerate(layer.to_experts()):
        best = probabilities[:, e].topk(2 * 20 // E).indices
        want[best] += probabilities[best, e, None] * expert(rows[best])
    torch.testing.assert_close(got, want)
    assert layer.last_plan.offsets.diff().tolist() == [8] * E
    assert "NOT" in dc.nn.MoE.__doc__
    assert "causal" in dc.nn.MoE.__doc__


def test_flops_are_the_router_the_chosen_and_the_shared():
    x = torch.randn(3, 7, D)
    layer = dc.nn.MoE(D, I, E, 2, shared_experts=1)
    one = 2 * (D * 2 * I + I * D)
    assert flops(lambda: layer(x)) == 21 * (2 * D * E + 2 * one + one)
    assert flops(lambda: layer(x), "masked") == 21 * (2 * D * E + E * one + one)


def test_load_balance_is_one_when_balanced_and_the_number_of_experts_when_not():
    layer, x = dc.nn.MoE(D, I, 4, 1), torch.randn(64, D)
    nn.init.zeros_(layer.router.weight)
    layer(x)
    assert float(layer.losses()["load_balance"].detach()) == pytest.approx(1.0)
    assert float(layer.losses()["router_z"].detach()) == pytest.approx(float(torch.tensor(4.0).log() ** 2))
    router = nn.Linear(D, 4)
    nn.init.zeros_(router.weight)
    router.bias.data = torch.tensor([20.0, 0, 0, 0])
    layer.router = router
    layer(x)
    assert float(layer.losses()["load_balance"].detach()) == pytest.approx(4.0, rel=1e-4)


def test_load_balance_loss_balances():
    layer, x = dc.nn.MoE(D, I, 4, 1), torch.randn(256, D) + 1.0
    with torch.no_grad():
        layer.router.weight[0] += 0.1  # the mean of x favours expert 0
    optimizer = torch.optim.Adam(layer.router.parameters(), lr=0.02)
    spread = []
    for _ in range(120):
        layer(x)
        spread.append(int(layer.last_plan.offsets.diff().max()))
        optimizer.zero_grad()
        layer.losses()["load_balance"].backward()
        optimizer.step()
    assert spread[0] > 150
    assert spread[-1] < 90


def test_no_losses_before_the_first_forward():
    layer = dc.nn.MoE(D, I, E)
    assert layer.losses() == {}
    assert layer.last_plan is None


def test_all_tokens_to_one_expert():
    router = nn.Linear(D, E)
    nn.init.zeros_(router.weight)
    router.bias.data = torch.arange(float(E))
    layer, x = dc.nn.MoE(D, I, E, 1, router=router), torch.randn(33, D)
    got = run(layer, x)
    weight = torch.softmax(router.bias, 0)[-1]
    torch.testing.assert_close(got.out, (weight * layer.to_experts()[-1](x)).detach())
    assert not got.grads["w_in"][:-1].any()
    assert got.grads["w_in"][-1].any()


class Mixtral(nn.Module):
    def __init__(self, bias=False):
        super().__init__()
        self.w1, self.w3 = nn.Linear(D, I, bias=bias), nn.Linear(D, I, bias=bias)
        self.w2 = nn.Linear(I, D, bias=bias)

    def forward(self, x):
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Llama(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(D, I), nn.Linear(D, I, bias=False)
        self.down_proj = nn.Linear(I, D, bias=False)
        self.act_fn = nn.GELU()

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Opt(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(D, I), nn.Linear(I, D)

    def forward(self, x):
        return self.fc2(F.relu(self.fc1(x)))


SOURCES = {
    "mixtral": (Mixtral, None, "swiglu"),
    "mixtral_biased": (lambda: Mixtral(bias=True), None, "swiglu"),
    "llama_gelu": (Llama, None, "geglu"),
    "opt": (Opt, "relu", "relu"),
    "sequential": (
        lambda: nn.Sequential(nn.Linear(D, I), nn.GELU(approximate="tanh"), nn.Linear(I, D)),
        None,
        "gelu_tanh",
    ),
    "sequential_dropout": (
        lambda: nn.Sequential(nn.Linear(D, I), nn.SiLU(), nn.Dropout(0.0), nn.Linear(I, D, bias=False)),
        None,
        "silu",
    ),
    "own": (lambda: dc.nn.MLP(D, I, activation="reglu", bias=False), None, "reglu"),
    "own_elementwise": (lambda: dc.nn.MLP(D, I, activation="relu2"), None, "relu2"),
}


@pytest.mark.parametrize("name", SOURCES)
def test_experts_of_other_code_bases_come_in_and_go_out(name):
    make, activation, read_as = SOURCES[name]
    experts = [make().double() for _ in range(E)]
    router, x = nn.Linear(D, E).double(), torch.randn(12, D, dtype=torch.float64)
    layer = dc.nn.MoE.from_experts(experts, router, top_k=2, activation=activation)
    assert layer.activation == read_as
    assert layer.router is router
    weight, chosen = torch.softmax(router(x), -1).topk(2)
    weight = weight / weight.sum(-1, keepdim=True)
    want = torch.stack([sum(weight[t, j] * experts[chosen[t, j]](x[t]) for j in range(2)) for t in range(12)])
    torch.testing.assert_close(layer(x), want)
    back = layer.to_experts()
    for module, expert in zip(back, experts, strict=True):
        torch.testing.assert_close(module(x), expert(x))
    again = dc.nn.MoE.from_experts(back, router, top_k=2)
    assert torch.equal(again(x), layer(x))


def test_from_experts_leaves_the_router_as_it_is():
    router = nn.Linear(D, 2)
    layer = dc.nn.MoE.from_experts([Mixtral().bfloat16(), Mixtral().bfloat16()], router)
    assert layer.router is router
    assert router.weight.dtype == torch.float32
    assert layer.w_in.dtype == torch.bfloat16


def test_from_experts_copies():
    experts = [Mixtral() for _ in range(E)]
    layer = dc.nn.MoE.from_experts(experts)
    before = experts[0].w1.weight.detach().clone()
    with torch.no_grad():
        layer.w_in.zero_()
        layer.to_experts()[0].w_in.weight.fill_(7.0)
    assert torch.equal(experts[0].w1.weight, before)
    assert not layer.w_in.any()


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: dc.nn.MoE(D, 0, E), ValueError, "hidden_dim: expected a positive number, got 0"),
        (lambda: dc.nn.MoE(D, I, E, 6), ValueError, r"top_k: expected 1..5 \(num_experts\), got 6"),
        (lambda: dc.nn.MoE(D, I, E, activation="tanh"), ValueError, "activation: expected one of relu, .* got 'tanh'"),
        (
            lambda: dc.nn.MoE(D, I, E, routing="hash"),
            ValueError,
            "routing: expected one of token_choice, expert_choice",
        ),
        (lambda: dc.nn.MoE(D, I, E, shared_experts=-1), ValueError, "shared_experts: expected a number >= 0, got -1"),
        (lambda: dc.nn.MoE(D, I, E)(torch.randn(4, 3)), ValueError, r"x: expected shape \[..., 16\], got \[4, 3\]"),
        (
            lambda: dc.nn.MoE(D, I, E, router=nn.Linear(D, 3))(torch.randn(4, D)),
            ValueError,
            r"router: expected logits \[T, 5\], got \[4, 3\]",
        ),
        (lambda: dc.nn.MoE.from_experts([]), ValueError, "experts: expected at least one module, got none"),
        (lambda: dc.nn.MoE.from_experts([nn.Linear(D, D)]), ValueError, "experts: expected modules with .* got Linear"),
        (lambda: dc.nn.MoE.from_experts([Opt()], top_k=1), ValueError, "activation: expected its name, for Opt"),
        (
            lambda: dc.nn.MoE.from_experts([Mixtral(), Mixtral(bias=True)]),
            ValueError,
            "experts: expected one build, got expert 1 with another b_in than 0",
        ),
        (
            lambda: dc.nn.MoE.from_experts([nn.Sequential(nn.Linear(D, I), nn.Tanh(), nn.Linear(I, D))], top_k=1),
            ValueError,
            "experts: expected one of the activations .* got 'tanh'",
        ),
    ],
)
def test_bad_arguments_are_named(make, error, message):
    with pytest.raises(error, match=message):
        make()
