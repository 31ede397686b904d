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
    layer = dc.nn.MoE.from_experts(experts, nn.Linear(D, E))
    before = experts[0].w1.weight.detach().clone()
    with torch.no_grad():
        layer.w_in.zero_()
        layer.to_experts()[0].w_in.weight.fill_(7.0)
    assert torch.equal(experts[0].w1.weight, before)
    assert not layer.w_in.any()


class Fc(nn.Module):
    """fc1, act, fc2, and a forward of one's own."""

    def __init__(self, forward, act=None, **others):
        super().__init__()
        self.fc1, self.fc2, self.act = nn.Linear(D, I), nn.Linear(I, D), act or nn.GELU()
        for name, module in others.items():
            setattr(self, name, module)
        self.compute = forward

    def forward(self, x):
        return self.compute(self, x)


def plain(m, x):
    return m.fc2(m.act(m.fc1(x)))


class GeluMixtral(Mixtral):
    def forward(self, x):
        return self.w2(F.gelu(self.w1(x)) * self.w3(x))


class Pair(Opt):
    def forward(self, x):
        return super().forward(x), None


class ThreeDims(Opt):
    def forward(self, x):
        return super().forward(x.transpose(1, 2))


def sequential(*between_and_after):
    return nn.Sequential(nn.Linear(D, I), *between_and_after)


def last():
    return nn.Linear(I, D)


@pytest.mark.parametrize(
    ("make", "activation", "message"),
    [
        (
            lambda: sequential(nn.GELU(), nn.LayerNorm(I), last()),
            None,
            r"got Sequential\(Linear, GELU, LayerNorm, Linear",
        ),
        (
            lambda: sequential(nn.GELU(), last(), nn.LayerNorm(D)),
            None,
            r"got Sequential\(Linear, GELU, Linear, LayerNo",
        ),
        (lambda: sequential(nn.GELU(), last(), nn.ReLU()), None, r"got Sequential\(Linear, GELU, Linear, ReLU\)"),
        (lambda: sequential(last(), nn.ReLU()), None, r"got Sequential\(Linear, Linear, ReLU\)"),
        (lambda: sequential(last()), "relu", r"got Sequential\(Linear, Linear\)"),
        (lambda: sequential(nn.GELU(), nn.Dropout(0.1), last()), None, r"dropout with p=0, .* got Dropout\(0.1\)"),
        (
            lambda: Fc(lambda m, x: x + plain(m, m.norm(x)), norm=nn.LayerNorm(D)),
            None,
            "got norm.weight, norm.bias in Fc",
        ),
        (lambda: Fc(lambda m, x: m.out(plain(m, x)), out=nn.ReLU()), None, "one activation .* got GELU and ReLU"),
        (lambda: Fc(plain, activation="relu"), None, "one activation, got gelu and relu"),
        (lambda: Fc(lambda m, x: x + plain(m, x)), None, "computes the gelu MLP .* got Fc whose outputs are"),
        (lambda: Fc(lambda m, x: plain(m, x).relu()), None, "computes the gelu MLP .* got Fc whose outputs are"),
        (GeluMixtral, None, "computes the swiglu MLP of its Linear layers, got GeluMixtral whose outputs are"),
        (lambda: GeluMixtral().bfloat16(), None, "computes the swiglu MLP of its Linear layers, got GeluMixtral"),
        (Opt, "gelu", "computes the gelu MLP of its Linear layers, got Opt whose outputs are"),
        (lambda: sequential(nn.GELU("tanh"), last()), "gelu", "computes the gelu MLP .* got Sequential whose"),
        (Pair, "relu", r"returns rows \[8, 16\], got tuple"),
        (ThreeDims, "relu", r"maps rows \[8, 16\], got IndexError: Dimension out of range"),
        (Opt, "swiglu", r"weights \[48, H\] and \[H, 24\] for swiglu, got \[24, 16\] and \[16, 24\]"),
        (
            lambda: Fc(plain, fc1=nn.Linear(D, I).double()),
            None,
            "parameters of one dtype, got torch.float32 and torch.float64",
        ),
    ],
)
def test_an_expert_that_computes_more_than_is_read_is_refused(make, activation, message):
    good = sequential(nn.GELU(), last()) if activation is None else None
    with pytest.raises(ValueError, match=r"experts\[0\]: expected .*" + message):
        dc.nn.MoE.from_experts([make(), *([good] if good else [])], nn.Linear(D, E), top_k=1, activation=activation)


def test_experts_are_read_under_another_default_device():
    expert = Mixtral()
    with torch.device("meta"):
        assert torch.equal(dc.nn.experts.read_expert(expert).w_out, expert.w2.weight)


def test_the_expert_at_fault_is_named():
    with pytest.raises(ValueError, match=r"experts\[2\]: expected .* got GeluMixtral"):
        dc.nn.MoE.from_experts([Mixtral(), Mixtral(), GeluMixtral()], nn.Linear(D, 3))


def test_experts_are_read_in_evaluation_and_left_as_they_were():
    class Noisy(Mixtral):
        def forward(self, x):
            return super().forward(x) + (torch.randn_like(x) if self.training else 0)

    experts = [Noisy(), Noisy().eval()]
    experts[0].w1.eval()
    before = torch.get_rng_state()
    read = [dc.nn.experts.read_expert(e) for e in experts]
    assert torch.equal(torch.get_rng_state(), before)
    assert [e.training for e in experts] == [True, False]
    assert not experts[0].w1.training
    assert experts[0].w2.training
    assert torch.equal(read[0].w_in, torch.cat([experts[0].w1.weight, experts[0].w3.weight]))
    with pytest.raises(ValueError, match="expected a module that maps rows"):
        dc.nn.experts.read_expert(ThreeDims().train(), "relu")


@pytest.mark.parametrize("scale", [1e-2, 1.0, 1e2])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_experts_of_any_dtype_and_size_are_told_apart(dtype, scale):
    for make, good in ((Mixtral, True), (GeluMixtral, False)):
        expert = make()
        with torch.no_grad():
            expert.w1.weight.mul_(scale)
            expert.w2.weight.mul_(0.1)
        expert.to(dtype)
        if good:
            assert torch.equal(dc.nn.experts.read_expert(expert).w_out, expert.w2.weight)
        else:
            with pytest.raises(ValueError, match="computes the swiglu MLP"):
                dc.nn.experts.read_expert(expert)


@pytest.mark.parametrize("grad", [True, False])
def test_frozen_experts_stay_frozen(grad):
    experts = [Llama() for _ in range(3)]
    for e in experts:
        e.down_proj.requires_grad_(False)
    experts[0].up_proj.requires_grad_(False)
    with torch.set_grad_enabled(grad):
        layer = dc.nn.MoE.from_experts(experts, nn.Linear(D, 3))
    assert not layer.w_out.requires_grad
    assert layer.w_in.requires_grad
    for e in experts:
        e.requires_grad_(False)
    layer = dc.nn.MoE.from_experts(experts, nn.Linear(D, 3), shared_experts=1)
    assert not layer.w_in.requires_grad
    assert not layer.b_in.requires_grad
    assert layer.router.weight.requires_grad
    run(layer, torch.randn(4, D))
    assert layer.w_in.grad is None


def test_experts_of_several_dtypes_are_refused():
    with pytest.raises(
        ValueError, match=r"experts: expected one dtype, got expert 1 with torch\.bfloat16 and expert 0 with"
    ):
        dc.nn.MoE.from_experts([Mixtral(), Mixtral().bfloat16()], nn.Linear(D, 2))


@pytest.mark.parametrize(("name", "value"), [("num_experts", 2), ("bias", True), ("dim", 16), ("experts_", 1)])
def test_options_that_the_experts_settle_are_refused(name, value):
    with pytest.raises(
        TypeError, match=f"{name}: expected one of the options routing, normalize, .* got {name}={value}"
    ):
        dc.nn.MoE.from_experts([Mixtral(), Mixtral()], nn.Linear(D, 2), **{name: value})
    with pytest.raises(TypeError, match=r"experts\[1\]: expected a module, got int"):
        dc.nn.MoE.from_experts([Mixtral(), 3], nn.Linear(D, 2))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: dc.nn.MoE(D, 0, E), ValueError, "hidden_dim: expected a positive number, got 0"),
        (lambda: dc.nn.MoE(16.0, I, E), TypeError, r"dim: expected an int, got 16\.0 \(float\)"),
        (lambda: dc.nn.MoE(D, "24", E), TypeError, r"hidden_dim: expected an int, got '24' \(str\)"),
        (lambda: dc.nn.MoE(D, I, None), TypeError, r"num_experts: expected an int, got None \(NoneType\)"),
        (lambda: dc.nn.MoE(D, I, E, 2.0), TypeError, r"top_k: expected an int, got 2\.0 \(float\)"),
        (lambda: dc.nn.MoE(D, I, E, True), TypeError, r"top_k: expected an int, got True \(bool\)"),
        (lambda: dc.nn.MoE(D, I, E, shared_experts=0.5), TypeError, r"shared_experts: expected an int, got 0\.5"),
        (lambda: dc.nn.MoE(D, I, E, capacity="1"), TypeError, "capacity: expected a number or None, got str"),
        (lambda: dc.nn.MoE(D, I, E, capacity=0), ValueError, "capacity: expected a number > 0, got 0"),
        (
            lambda: dc.nn.MoE(D, I, E, capacity=1.0, routing="expert_choice"),
            ValueError,
            "capacity: expected None where experts choose",
        ),
        (lambda: dc.nn.MoE(D, I, E)([1.0]), TypeError, "x: expected a Tensor, got list"),
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
        (
            lambda: dc.nn.MoE(D, I, E, router=nn.Linear(D + 1, E))(torch.randn(4, D)),
            ValueError,
            r"router: expected rows of its width 17, got shape \[4, 16\]",
        ),
        (
            lambda: dc.nn.MoE.from_experts([], nn.Linear(D, 1)),
            ValueError,
            "experts: expected at least one module, got none",
        ),
        (
            lambda: dc.nn.MoE.from_experts([nn.Linear(D, D)], nn.Linear(D, 1)),
            ValueError,
            r"experts\[0\]: expected a module with .* got Linear",
        ),
        (
            lambda: dc.nn.MoE.from_experts([Opt()], nn.Linear(D, 1), top_k=1),
            ValueError,
            "activation: expected its name, for Opt",
        ),
        (
            lambda: dc.nn.MoE.from_experts([Mixtral(), Mixtral()], None),
            TypeError,
            r"router: expected the module that gives logits \[T, E\] .*, got NoneType",
        ),
        (
            lambda: dc.nn.MoE.from_experts([Mixtral(), Mixtral(bias=True)], nn.Linear(D, 2)),
            ValueError,
            "experts: expected one build, got expert 1 with another b_in than 0",
        ),
        (
            lambda: dc.nn.MoE.from_experts(
                [nn.Sequential(nn.Linear(D, I), nn.Tanh(), nn.Linear(I, D))], nn.Linear(D, 1), top_k=1
            ),
            ValueError,
            r"experts\[0\]: expected one of the activations .* got 'tanh'",
        ),
    ],
)
def test_bad_arguments_are_named(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_a_capacity_drops_what_comes_last():
    layer, x = dc.nn.MoE(D, 8, 3, 2, capacity=0.75), torch.randn(8, D)
    first, second = [0, 0, 0, 0, 0, 1, 1, 2], [1, 1, 1, 2, 2, 0, 0, 0]
    logits = torch.zeros(8, 3)
    for row, (a, b) in enumerate(zip(first, second, strict=True)):
        logits[row, a], logits[row, b] = 2.0, 1.0
    layer.router = nn.Identity()
    layer.router.forward = lambda rows: logits
    y = layer(x)
    limit = 4  # 0.75 * 8 * 2 / 3
    taken = {(row, e) for e in range(3) for row in [r for r in range(8) if first[r] == e][:limit]}
    for e in range(3):
        room = limit - sum(expert == e for _, expert in taken)
        taken |= {(row, e) for row in [r for r in range(8) if second[r] == e][:room]}
    plan = layer.last_plan
    assert set(zip(plan.rows.tolist(), plan.groups().tolist(), strict=True)) == taken
    assert len(taken) < 16
    torch.testing.assert_close(layer.last_cost.sum() * 3, torch.tensor(float(len(taken))))
    layer._capacity = None
    whole = layer(x)
    for row in range(8):
        assert torch.allclose(y[row], whole[row]) == ({(row, first[row]), (row, second[row])} <= taken)


def test_a_wide_capacity_drops_nothing():
    layer, x = dc.nn.MoE(D, 8, 4, 2, capacity=2.0), torch.randn(3, 10, D)
    y = layer(x)
    layer._capacity = None
    assert torch.equal(layer(x), y)


def test_a_capacity_is_one_graph_and_the_same_in_each_mode():
    layer = dc.nn.MoE(D, 8, 4, 2, capacity=1.0).double()
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (10, 13):
        x = torch.randn(rows, D, dtype=torch.float64)
        want = run(layer, x)
        torch.testing.assert_close(compiled(x), want.out)
        for name, grad in run(layer, x, "masked").grads.items():
            torch.testing.assert_close(grad, want.grads[name])
