"""relu_sparse where the ReLU is a function that no child shows: found in a trace of the forward, or told why not."""

import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dyncore as dc
from dyncore.nn import SparseMLP
from tests.test_convert import check

X = torch.linspace(-2, 2, 6 * 16).view(6, 16).sin()


class Two(nn.Module):
    """Layers by names of its own, around whatever `run` does."""

    def __init__(self, run, **children):
        super().__init__()
        self.a, self.b, self.run = nn.Linear(16, 40), nn.Linear(40, 16), run
        for name, child in children.items():
            self.add_module(name, child)

    def forward(self, x):
        return self.run(self, x)


def relu_function(m, x):
    return m.b(F.relu(m.a(x)))


def torch_relu(m, x):
    return m.b(torch.relu(m.a(x)))


def method(m, x):
    return m.b(m.a(x).relu_())


def squared(m, x):
    return m.b(F.relu(m.a(x)).square())


def power(m, x):
    return m.b(m.a(x).relu() ** 2)


def product(m, x):
    h = torch.relu(m.a(x))
    return m.b(h * h)


def dropouts(m, x):
    return m.out(m.b(m.inner(F.relu(m.a(x)))))


def gated(m, x):
    return m.b(m.up(x) * F.relu(m.a(x)))


def loss(model):
    return model["ff"](X).square().sum()


@pytest.mark.parametrize(
    ("run", "activation", "children"),
    [
        (relu_function, "relu", ()),
        (torch_relu, "relu", ()),
        (method, "relu", ()),
        (squared, "relu2", ()),
        (power, "relu2", ()),
        (product, "relu2", ()),
        (dropouts, "relu", ("inner", "out")),
        (gated, "reglu", ("up",)),
    ],
)
def test_a_module_that_is_an_mlp_by_its_forward_is_replaced(run, activation, children):
    def make():
        return Two(run, **{name: nn.Linear(16, 40) if name == "up" else nn.Dropout(0.2) for name in children})

    check(nn.ModuleDict({"ff": make()}), loss, [("ff", "Two", "SparseMLP", activation, (16, 40))])
    assert SparseMLP.from_dense(make()).activation == activation


class Usual(nn.Module):
    """Under the usual names, with a function."""

    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(16, 40), nn.Linear(40, 16)

    def forward(self, x):
        return self.fc2(F.relu(self.fc1(x)))


def test_usual_names_around_a_function():
    check(nn.ModuleDict({"ff": Usual()}), loss, [("ff", "Usual", "SparseMLP", "relu", (16, 40))])


def residual(m, x):
    return x + m.b(F.relu(m.a(x)))


def flattened(m, x):
    return m.b(F.relu(m.a(x.flatten(1))))


def dropped(m, x):
    return m.b(F.dropout(F.relu(m.a(x)), 0.3, m.training))


def called_twice(m, x):
    return relu_function(m, relu_function(m, x))


@pytest.mark.parametrize("run", [residual, flattened, dropped, called_twice])
def test_of_a_larger_forward_the_second_layer_skips(run):
    check(nn.ModuleDict({"ff": Two(run)}), loss, [("ff.b", "Linear", "SparseLinear", "relu", (16, 40))])


class Listed(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(16, 40), nn.Linear(40, 24), nn.Linear(24, 16)])

    def forward(self, x):
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        return self.layers[-1](x)


def test_layers_in_a_list():
    swaps = [
        ("ff.layers.1", "Linear", "SparseLinear", "relu", (24, 40)),
        ("ff.layers.2", "Linear", "SparseLinear", "relu", (16, 24)),
    ]
    check(nn.ModuleDict({"ff": Listed()}), loss, swaps)


def test_a_forward_keeps_nothing_of_the_trace_and_goes_on_storing():
    def stores(m, x):
        m.last = F.relu(m.a(x))
        return m.b(m.last)

    model = nn.ModuleDict({"ff": Two(stores)})
    (swap,) = dc.convert.relu_sparse(model).swapped
    assert swap.now == "SparseLinear"
    assert not hasattr(model["ff"], "last")
    model["ff"](X)
    assert model["ff"].last.shape == (6, 40)


def branches(m, x):
    return m.b(F.relu(m.a(x))) if x.sum() > 0 else x


@pytest.mark.parametrize(
    ("run", "reason"),
    [
        (
            branches,
            r"expected an activation between a and b that shows .* got none \(TraceError: .*an nn.ReLU as a child",
        ),
        (lambda m, x: m.b(F.gelu(m.a(x))), "expected a ReLU or its square, got gelu"),
    ],
    ids=["branches", "gelu"],
)
def test_what_is_no_relu_or_not_understood_is_told(run, reason):
    model = nn.ModuleDict({"ff": Two(run)})
    report = dc.convert.relu_sparse(model)
    assert report.swapped == ()
    ((name, kind, why),) = [(k.name, k.kind, k.reason) for k in report.kept]
    assert (name, kind) == ("ff", "Two")
    assert re.search(reason, why)


def test_from_dense_says_why_a_forward_is_no_mlp():
    with pytest.raises(ValueError, match="around a ReLU and does no more, got that of Two, which does more than call"):
        SparseMLP.from_dense(Two(residual))
    with pytest.raises(ValueError, match="got that of Two, not understood: TraceError: symbolically traced"):
        SparseMLP.from_dense(Two(branches))


def test_linear_layers_without_an_activation_are_no_mlp():
    assert dc.convert.relu_sparse(nn.ModuleDict({"ff": Two(lambda m, x: m.b(m.a(x)))})).kept == ()


class Plain(nn.Module):
    def __init__(self):
        nn.Module.__init__(self)  # not super(): see beside_a_linear
        self.a, self.b = nn.Linear(16, 40), nn.Linear(40, 16)

    def forward(self, x):
        return self.b(F.relu(self.a(x)))


class Frozen(Plain):
    def forward(self, x):
        with torch.no_grad():
            h = F.relu(self.a(x))
        return self.b(h)


class FullPrecision(Plain):
    def forward(self, x):
        with torch.autocast("cpu", enabled=False):
            return self.b(F.relu(self.a(x)))


class Decorated(Plain):
    @torch.no_grad()
    def forward(self, x):
        return self.b(F.relu(self.a(x)))


class Switched(Plain):
    def __init__(self):
        Plain.__init__(self)
        self.noise = 0.0

    def forward(self, x):
        h = F.relu(self.a(x))
        return self.b(h + torch.randn_like(h) if self.noise else h)


class Scheduled(Plain):
    def __init__(self):
        Plain.__init__(self)
        self.p = 0.0

    def forward(self, x):
        return self.b(F.dropout(F.relu(self.a(x)), self.p, self.training))


class Helped(Plain):
    def forward(self, x):
        return self.b(self.encode(x))

    def encode(self, x):
        return F.relu(self.a(x))


class Recording(Plain):
    def __init__(self):
        Plain.__init__(self)
        self.history = []

    def forward(self, x):
        h = F.relu(self.a(x))
        self.history.append(h)
        return self.b(h)


class Counting(Plain):
    def __init__(self):
        Plain.__init__(self)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return self.b(F.relu(self.a(x)) + 0 * torch.rand(()))


class Unpickled(Plain):
    def __getstate__(self):
        raise RuntimeError("not to be pickled")


def beside_a_linear(kind):
    """A model with a module of this kind, which no class stands behind: what a base has would be lost, too."""
    parts = {n: v for n, v in {**vars(Plain), **vars(kind)}.items() if n not in ("__dict__", "__weakref__")}
    return nn.Sequential(nn.Linear(16, 16), type(kind.__name__, (nn.Module,), parts)())


def test_nothing_but_layers_and_a_forward_is_replaced_whole():
    model = beside_a_linear(Plain)
    dc.convert.relu_sparse(model)
    assert isinstance(model[1], SparseMLP)


@pytest.mark.parametrize(
    "kind", [Frozen, FullPrecision, Decorated, Switched, Scheduled, Helped, Recording, Counting, Unpickled]
)
def test_a_module_that_would_lose_something_stays(kind):
    model = beside_a_linear(kind)
    before, state = {n: v.clone() for n, v in model.state_dict().items()}, torch.get_rng_state()
    dc.convert.relu_sparse(model)
    assert type(model[1]).__name__ == kind.__name__
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    history = getattr(model[1], "history", [])
    assert not any(isinstance(h, torch.fx.Proxy) for h in history)


class Named(nn.Module):
    """Under the usual names, with something before the second layer that no name shows."""

    def __init__(self, between):
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(16, 40), nn.ReLU(), nn.Linear(40, 16)
        self.norm, self.between = nn.LayerNorm(40), between

    def forward(self, x):
        return self.fc2(self.between(self, self.act(self.fc1(x))))


@pytest.mark.parametrize(
    ("between", "lost"),
    [
        (lambda m, h: m.norm(h), "LayerNorm"),
        (lambda m, h: F.layer_norm(h, (40,)), "layer_norm"),
        (lambda m, h: h + 1, "add"),
    ],
)
def test_a_layer_that_the_zeros_do_not_reach_is_left_alone(between, lost):
    model = nn.ModuleDict({"ff": Named(between)})
    report = dc.convert.relu_sparse(model)
    assert report.swapped == ()
    (kept,) = report.kept
    assert kept.reason == f"expected the zeros of the ReLU as the input of fc2, got {lost} in between, which keeps none"
    assert type(model["ff"].fc2) is nn.Linear


@pytest.mark.parametrize("between", [lambda m, h: h.view(-1, 40).float(), lambda m, h: F.dropout(h, 0.2) * 2])
def test_what_keeps_zeros_may_stand_before_a_named_layer(between):
    (swap,) = dc.convert.relu_sparse(nn.ModuleDict({"ff": Named(between)})).swapped
    assert (swap.name, swap.now) == ("ff.fc2", "SparseLinear")


@pytest.mark.parametrize(
    ("run", "between"),
    [
        (lambda m, x: m.b(F.layer_norm(F.relu(m.a(x)), (40,))), "relu, layer_norm"),
        (lambda m, x: m.b(m.a(x).clamp(min=0)), "clamp"),
        (lambda m, x: m.b(F.threshold(m.a(x), 0, 0)), "threshold"),
    ],
    ids=["norm", "clamp", "threshold"],
)
def test_zeros_whose_way_is_not_understood_are_told(run, between):
    report = dc.convert.relu_sparse(nn.ModuleDict({"ff": Two(run)}))
    assert report.swapped == ()
    assert [k.reason for k in report.kept] == [
        "expected a ReLU, its square or a gate by it between a and b, and at most a dropout, got what is not "
        f"understood: {between}"
    ]


def test_a_sequential_with_a_norm_before_its_relu_skips_and_with_one_behind_it_does_not():
    before = nn.Sequential(nn.Linear(16, 40), nn.BatchNorm1d(40), nn.ReLU(), nn.Linear(40, 16))
    check_swap = dc.convert.relu_sparse(nn.ModuleDict({"ff": before}))
    assert [(s.name, s.now) for s in check_swap.swapped] == [("ff.3", "SparseLinear")]
    behind = nn.Sequential(nn.Linear(16, 40), nn.ReLU(), nn.LayerNorm(40), nn.Linear(40, 16))
    (kept,) = dc.convert.relu_sparse(nn.ModuleDict({"ff": behind})).kept
    assert kept.reason.endswith("between 0 and 3, and at most a dropout, got what is not understood: relu, LayerNorm")


def test_what_torch_fx_stumbles_over_is_told_in_few_words():
    from dyncore.nn import forwards

    def stumbles(self, root, concrete_args=None):
        raise ValueError("code: co_varnames is too small")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(forwards._Tracer, "trace", stumbles)
        with pytest.raises(ValueError, match=r"not understood: torch.fx can make no trace of it \(ValueError\)"):
            SparseMLP.from_dense(Two(relu_function))
