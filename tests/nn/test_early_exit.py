"""EarlyExit and Cascade: samples leave where running everything says they would, and what they leave is not computed."""

import copy
import math
import pickle

import pytest
import torch
from torch import Tensor, nn

import dyncore as dc
from dyncore.nn import exits
from tests.nn.oracle import flops
from tests.support import assert_gradients, assert_values

INF, K, C = math.inf, 4, 5
MODES = ("sparse", "masked", "auto")


class Stage(nn.Module):
    """State of several tensors: features at two scales, the image kept for later, and an integer tensor."""

    def __init__(self, first: bool) -> None:
        super().__init__()
        self.first = first
        self.fine = nn.Linear(6 if first else 8, 8)
        self.coarse = nn.Linear(6, 3)

    def forward(self, state):
        if self.first:
            state = {"image": state, "fine": state.flatten(1), "ids": torch.arange(len(state), device=state.device)}
        coarse = self.coarse(state["image"].flatten(1)).view(-1, 3, 1)
        return {**state, "fine": torch.tanh(self.fine(state["fine"])), "coarse": (coarse,)}


class Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(11, C)

    def forward(self, state):
        return self.linear(torch.cat([state["fine"], state["coarse"][0].flatten(1)], 1)) * 2


class Features(nn.Module):
    def forward(self, state):
        return torch.cat([state["fine"], state["coarse"][0].flatten(1)], 1)


def early_exit(criterion=None, head=None):
    stages = [Stage(k == 0) for k in range(K)]
    return dc.nn.EarlyExit(
        stages, [head() if head else Head() for _ in range(K)], criterion or exits.MaxProbability(0.4), [1, 2, 3, 4]
    )


def cascade():
    models = [nn.Sequential(nn.Flatten(), nn.Linear(6, 8 * k), nn.Tanh(), nn.Linear(8 * k, C)) for k in range(1, K + 1)]
    return dc.nn.Cascade(models, exits.Margin(0.1), [1, 2, 3, 4])


LAYERS = {
    "early_exit": early_exit,
    "patience": lambda: early_exit(exits.Patience(1)),
    "entropy": lambda: early_exit(exits.Entropy([0.1, 0.2, 0.05])),
    "zero_time_waste": lambda: early_exit(
        exits.MaxProbability([0.25, 0.3, 0.36]), lambda: exits.ZeroTimeWaste(Features(), 11, C)
    ),
    "cascade": cascade,
}


@pytest.fixture(params=LAYERS)
def layer(request):
    return LAYERS[request.param]().double().eval()


def images(samples=24):
    return torch.randn(samples, 3, 2, dtype=torch.double)


def run(layer, x, mode="sparse"):
    """(output, {name: gradient})"""
    x = x.detach().clone().requires_grad_()
    layer.zero_grad()
    with dc.execution(mode):
        out = layer(x)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.double)
    (out * weights).sum().backward()
    return out.detach(), {"x": x.grad, **{name: p.grad for name, p in layer.named_parameters()}}


def share(exit: Tensor) -> Tensor:
    return torch.tensor([0.1, 0.3, 0.6, 1.0])[exit]


@pytest.mark.parametrize("mode", MODES)
def test_exits_are_those_of_running_everything(layer, mode):
    x = images()
    with torch.no_grad(), dc.execution(mode):
        want = exits.simulate(layer.every_exit(x), layer.criterion, layer.costs)
        got = layer(x)
    assert 2 < len(want.exit.unique()) <= K  # the test would say little otherwise
    assert torch.equal(layer.last_exit, want.exit)
    assert_values(got, want.logits)
    torch.testing.assert_close(layer.last_cost, share(want.exit))
    torch.testing.assert_close(layer.last_cost * 10, want.cost.float())


def test_each_sample_gets_what_it_would_get_alone(layer):
    x = images(12)
    with torch.no_grad():
        together = layer(x)
        exit = layer.last_exit
        for i in range(12):
            assert_values(layer(x[i : i + 1]), together[i : i + 1])
            assert layer.last_exit.tolist() == [exit[i]]


def test_sparse_equals_masked_in_values_and_gradients(layer):
    x = images()
    (got, grads), (want, others) = run(layer, x, "sparse"), run(layer, x, "masked")
    assert_values(got, want)
    for name, grad in grads.items():
        assert (grad is None) == (others[name] is None), name
        if grad is not None:
            assert_gradients(grad, others[name], torch.float64, name)


def test_gradient_goes_to_x_and_to_what_was_taken(layer):
    _, grads = run(layer, images())
    taken = layer.last_exit.unique().tolist()
    assert grads["x"].flatten(1).any(1).all()
    for name, grad in grads.items():
        assert grad is not None, name
        if name != "x":
            number = name.split(".")[1]
            chain = "fine" in name  # what later stages stand on
            assert grad.any() == (int(number) <= max(taken) if chain else int(number) in taken), name


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("threshold", "exit"), [(INF, K - 1), (-INF, 0)])
def test_at_the_ends_it_is_exactly_the_last_exit_or_the_first(layer, mode, threshold, exit):
    layer.threshold = threshold
    x = images()
    with torch.no_grad(), dc.execution(mode):
        got = layer(x)
        assert torch.equal(got, layer.every_exit(x)[exit])
    assert layer.last_exit.tolist() == [exit] * 24
    torch.testing.assert_close(layer.last_cost, share(layer.last_exit))


def test_stages_that_nobody_needed_have_zero_gradients(layer):
    layer.threshold = -INF
    _, grads = run(layer, images())
    last = [name for name in grads if name.split(".")[1:2] == [str(K - 1)]]
    assert last
    assert all(grads[name] is not None and not grads[name].any() for name in last)


def test_flops_are_those_of_the_samples_that_ran(layer):
    x = images()
    layer.threshold = INF
    layer(x)
    with torch.no_grad():
        reached = {}
        for k in range(K):  # what each stage takes for one sample
            layer.threshold = [INF] * k + [-INF] * (K - 1 - k)
            reached[k] = flops(lambda: layer(x[:1]))
    executed = []
    for threshold in (INF, 0.6, 0.45, 0.35, 0.05, -INF):
        layer.threshold = threshold
        with torch.no_grad():
            executed.append(flops(lambda: layer(x)))
        assert executed[-1] == sum(reached[k] for k in layer.last_exit.tolist())
    assert executed == sorted(executed, reverse=True)
    assert len(set(executed)) > 2
    with torch.no_grad():
        assert flops(lambda: layer(x), "masked") == 24 * reached[K - 1]


def test_the_plan_has_the_samples_that_went_through_each_stage(layer):
    with torch.no_grad():
        layer(images())
    plan, exit = layer.last_plan, layer.last_exit
    assert (plan.num_rows, plan.num_groups) == (24, K)
    for k in range(K):
        rows = plan.rows[plan.offsets[k] : plan.offsets[k + 1]]
        assert rows.tolist() == (exit >= k).nonzero()[:, 0].tolist()


@pytest.mark.parametrize("mode", MODES)
def test_nan_of_one_sample_harms_no_other(layer, mode):
    if isinstance(layer.criterion, exits.Patience):
        pytest.skip("a prediction of NaN is a prediction")
    x = images()
    broken = x.clone()
    broken[3] = torch.nan
    with torch.no_grad(), dc.execution(mode):
        want = layer(x)
        got = layer(broken)
    assert layer.last_exit[3] == K - 1
    others = torch.arange(24) != 3
    assert_values(got[others], want[others])


@pytest.mark.parametrize("mode", MODES)
def test_nan_that_a_sample_leaves_behind_harms_no_gradient(mode):
    class Spoil(Stage):
        def forward(self, state):
            state = super().forward(state)
            gone = (state["ids"] % 2 == 0).view(-1, 1, 1)
            return {**state, "image": torch.where(gone, torch.nan, state["image"])}

    class Sure(exits.MaxProbability):
        def confidence(self, logits, state):
            return (logits[:, 0] > 50).double(), state

    class Even(Head):
        def forward(self, state):
            even = (state["ids"] % 2 == 0).double()[:, None]
            return super().forward(state) + 100 * even * torch.eye(C, dtype=torch.double)[0]

    layer = dc.nn.EarlyExit([Spoil(True), Stage(False)], [Even(), Head()], Sure(0.5)).double().eval()
    out, grads = run(layer, images(), mode)
    assert layer.last_exit.tolist() == [0, 1] * 12
    assert torch.isfinite(out).all()
    assert all(torch.isfinite(g).all() for g in grads.values())


def test_training_returns_all_exits_and_their_loss_trains_all(layer):
    layer.train()
    x, target = images(), torch.randint(C, (24,))
    logits = layer(x)
    assert len(logits) == K
    for got, want in zip(logits, layer.eval().every_exit(x), strict=True):
        assert torch.equal(got, want)
    loss = dc.nn.losses.multi_exit(logits, target) + dc.nn.losses.exit_distillation(logits)
    loss.backward()
    for name, p in layer.named_parameters():
        assert p.grad is not None, name
    layer.train()(x)
    assert layer.last_exit is None
    assert layer.last_cost.tolist() == [1.0] * 24


def test_zero_time_waste_heads_see_the_exit_before():
    layer = LAYERS["zero_time_waste"]().double().eval()
    x = images(5)
    state, previous = x, None
    for stage, head, got in zip(layer.stages, layer.heads, layer.every_exit(x), strict=True):
        state = stage(state)
        previous = head(state, previous=previous)
        assert torch.equal(got, previous)


def test_no_samples_at_all(layer):
    for mode in MODES:
        out, grads = run(layer, images(0), mode)
        assert out.shape == (0, C)
        assert layer.last_cost.shape == layer.last_exit.shape == (0,)
        assert all(g is None or not g.any() for g in grads.values())


@pytest.mark.parametrize("name", ["entropy", "patience", "cascade"])
def test_thresholds_move_at_run_time_without_a_retrace(name):
    layer, x = LAYERS[name]().double().eval(), images()
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    first = True
    for threshold in (0.4, INF, 0.1, -INF, 1.0):
        layer.threshold = threshold
        with torch.no_grad():
            want = layer(x)
            exit, cost = layer.last_exit, layer.last_cost
            with torch._dynamo.config.patch(error_on_recompile=not first):
                got = compiled(x)
        assert_values(got, want)
        assert torch.equal(layer.last_exit, exit)
        assert torch.equal(layer.last_cost, cost)
        first = False


def test_compiled_gradients_are_those_of_eager_code():
    layer, x = LAYERS["zero_time_waste"]().double().eval(), images()
    want = run(layer, x)
    torch._dynamo.reset()
    got = run(torch.compile(layer, fullgraph=True, backend="aot_eager"), x)
    assert_values(got[0], want[0])
    for name, grad in want[1].items():
        assert_gradients(got[1]["x" if name == "x" else f"_orig_mod.{name}"], grad, torch.float64, name)


@pytest.mark.parametrize("name", ["early_exit", "cascade"])
def test_exports_without_leaving_a_trace(name):
    layer, x = LAYERS[name]().double().eval(), images()
    exported = torch.export.export(layer, (x,)).module()
    assert layer.last_plan is layer.last_exit is layer.last_cost is None
    with torch.no_grad():
        assert_values(exported(x), layer(x))


def test_copies_pickles_and_loads_after_a_forward(layer):
    x = images()
    with torch.no_grad():
        want = layer(x)
        for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert twin.last_plan is twin.last_exit is twin.last_cost is None
            assert torch.equal(twin(x), want)
        fresh = copy.deepcopy(layer)
        for p in fresh.parameters():
            nn.init.zeros_(p)
        fresh.load_state_dict(layer.state_dict())
        assert torch.equal(fresh(x), want)


def test_nothing_is_moved_while_every_sample_stays():
    seen = []

    class Look(nn.Module):
        def forward(self, x):
            seen.append(x)
            return x

    x = torch.randn(6, C)
    layer = dc.nn.EarlyExit([Look(), Look(), Look()], [nn.Identity()] * 3, exits.MaxProbability(INF)).eval()
    for mode in ("sparse", "auto"):
        seen.clear()
        with dc.execution(mode):
            layer(x)
        assert all(t is x for t in seen)


def test_a_cascade_hands_on_every_argument_and_takes_models_that_return_more_than_logits():
    class Output:
        def __init__(self, logits):
            self.logits = logits

    class Model(nn.Module):
        def __init__(self, sign):
            super().__init__()
            self.sign = sign

        def forward(self, tokens, *, mask=None, flag=None):
            assert flag == "yes"
            return Output(torch.nn.functional.one_hot((tokens * mask).sum(1) % C, C).float() * self.sign)

    layer = dc.nn.Cascade([Model(1.0), Model(20.0)], exits.Margin(0.9)).eval()
    tokens, mask = torch.randint(9, (8, 3)), torch.ones(8, 3, dtype=torch.long)
    out = layer(tokens, mask=mask, flag="yes")
    assert torch.equal(out.argmax(1), tokens.sum(1) % C)
    assert layer.last_exit.tolist() == [1] * 8


def test_big_little_asks_the_big_one_where_the_margin_is_small():
    little, big = nn.Linear(6, C), nn.Linear(6, C)
    layer = dc.nn.Cascade([little, big], exits.Margin(0.2)).eval()
    x = torch.randn(50, 6)
    first, second = torch.softmax(little(x), 1).topk(2).values.unbind(1)
    asks = first - second < 0.2
    assert 0 < asks.sum() < 50
    torch.testing.assert_close(layer(x), torch.where(asks[:, None], big(x), little(x)))


ONE, HEAD = nn.Identity(), nn.Linear(6, C)
X = torch.randn(4, 6)


class ByNumber(exits.Criterion):
    def confidence(self, logits, state):
        return torch.arange(len(logits)).double(), state


class AndHalf(nn.Module):
    def forward(self, x):
        return x, x[:2]


class First(nn.Module):
    def forward(self, state):
        return HEAD(state[0])


def run_two(stage=ONE, first=HEAD, last=HEAD, x=X):
    return dc.nn.EarlyExit([stage, ONE], [first, last], ByNumber(1)).eval()(x)


BAD_CALLS = [
    (lambda: dc.nn.EarlyExit([], []), ValueError, "stages: expected at least one, got none"),
    (lambda: dc.nn.Cascade([]), ValueError, "models: expected at least one, got none"),
    (lambda: dc.nn.EarlyExit([ONE], []), ValueError, "heads: expected 1 of them, one a stage, got 0"),
    (lambda: dc.nn.EarlyExit([ONE], [3]), TypeError, "heads[0]: expected a callable, got int"),
    (lambda: dc.nn.EarlyExit([ONE], [HEAD], 0.5), TypeError, "criterion: expected a callable, got float"),
    (lambda: dc.nn.EarlyExit([ONE] * 3, [HEAD] * 3, exits.Margin([0.5])), IndexError, "threshold: expected one for exit 1, got 1"),
    (lambda: dc.nn.Cascade([HEAD], costs=[1, 2]), ValueError, "costs: expected 1 of them, one a stage, got 2"),
    (lambda: run_two(last=nn.Linear(6, 3)), ValueError, "exit 1: expected 5 classes, got 3"),
    (lambda: run_two(last=nn.Unflatten(1, (2, 3))), ValueError, "exit 1: expected logits ["),
    (lambda: run_two(last=nn.LSTM(6, 5)), TypeError, "exit 1: expected logits [B, C], got tuple"),
    (lambda: run_two(x="a"), TypeError, "x: expected a tensor [B, ...] or a pytree of them, got none"),
    (lambda: run_two(AndHalf(), First(), First()), ValueError, "expected 4 rows (plan.num_rows), got shape [2, 6]"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "kind", "message"), BAD_CALLS, ids=[m for _, _, m in BAD_CALLS])
def test_bad_calls_name_the_argument(call, kind, message):
    with pytest.raises(kind) as error:
        call()
    assert message in str(error.value)


def test_costs_may_be_a_tensor():
    layer = dc.nn.EarlyExit([nn.Identity()] * 2, [nn.Identity()] * 2, costs=torch.tensor([1.0, 3.0]))
    assert layer.costs == (1.0, 3.0)


@pytest.mark.parametrize("mode", ["sparse", "masked"])
def test_the_dtype_of_the_logits_does_not_depend_on_who_leaves(mode):
    class Half(nn.Module):
        def forward(self, x):
            return x.bfloat16()

    layer = dc.nn.EarlyExit([nn.Identity()] * 2, [Half(), nn.Identity()]).eval()
    x = torch.tensor([[9.0, 0.0], [0.1, 0.0]])
    for threshold in (-INF, 0.9, INF):
        layer.threshold = threshold
        with dc.execution(mode):
            assert layer(x).dtype == torch.bfloat16
