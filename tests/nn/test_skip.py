"""Skip: x' = g F(x) + (1 - g) x with F on the live rows only."""

import pytest
import torch
from torch import nn

import dyncore as dc
from tests.nn.oracle import D, Fixed, flops, run

MODES = ("sparse", "masked", "auto")


def images(*shape):
    """A convolution on samples, which must not see what is closed."""
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 3, 3, padding=1)), torch.randn(*shape)


@pytest.mark.parametrize("mode", MODES)
def test_all_open_is_exactly_the_module(mode):
    module, x = dc.nn.MLP(D, 24), torch.randn(4, 7, D)
    gate = dc.nn.StraightThroughGate(D, threshold=-1.0)
    got = run(dc.nn.Skip(module, gate), x, mode)
    want = run(module, x)
    rows = module(x.view(-1, D)).view(x.shape).detach()
    assert torch.equal(got.out, rows)
    torch.testing.assert_close(got.grads["module.w_in.weight"], want.grads["w_in.weight"])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("returns", ["output", "update"])
def test_all_closed_is_exactly_the_identity(mode, returns):
    x = torch.randn(4, 7, D)
    layer = dc.nn.Skip(dc.nn.MLP(D, 24), dc.nn.StraightThroughGate(D, threshold=1.0), returns=returns)
    got = run(layer, x, mode, torch.ones(x.shape))
    assert torch.equal(got.out, x)
    assert torch.equal(got.grads["x"], torch.ones_like(x))
    for name, grad in got.grads.items():
        assert name == "x" or (grad is not None and not grad.any()), name
    assert not layer.last_cost.any()


def test_live_rows_follow_the_definition():
    module = dc.nn.MLP(D, 24)
    x, mask, g = torch.randn(4, 7, D), torch.rand(4, 7) > 0.5, torch.rand(4, 7)
    f = module(x)
    want = torch.where(mask[..., None], g[..., None] * f + (1 - g[..., None]) * x, x)
    torch.testing.assert_close(dc.nn.Skip(module, Fixed(mask, g))(x), want)
    want = torch.where(mask[..., None], x + g[..., None] * f, x)
    torch.testing.assert_close(dc.nn.Skip(module, Fixed(mask, g), returns="update")(x), want)


def test_update_without_scale_adds_exactly():
    module, x, mask = dc.nn.MLP(D, 24), torch.randn(11, D), torch.rand(11) > 0.5
    out = dc.nn.Skip(module, Fixed(mask), returns="update")(x)
    assert torch.equal(out[mask], x[mask] + module(x[mask]))
    assert torch.equal(out[~mask], x[~mask])


def test_gradient_of_the_gate_is_the_change_it_lets_through():
    module, x, mask = dc.nn.MLP(D, 24).double(), torch.randn(9, D, dtype=torch.float64), torch.rand(9) > 0.4
    scale = torch.ones(9, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(9, D, dtype=torch.float64)
    (dc.nn.Skip(module, Fixed(mask, scale))(x) * weights).sum().backward()
    want = torch.where(mask, ((module(x) - x) * weights).sum(1), 0)
    torch.testing.assert_close(scale.grad, want.detach())


def test_flops_are_those_of_the_live_rows():
    module, x, mask = dc.nn.MLP(D, 24), torch.randn(5, 20, D), torch.rand(5, 20) > 0.7
    live = int(mask.sum())
    layer = dc.nn.Skip(module, Fixed(mask))
    assert flops(lambda: layer(x)) == 2 * live * (D * 24 + 24 * D)
    assert flops(lambda: layer(x), "masked") == 2 * 100 * (D * 24 + 24 * D)
    x.requires_grad_()
    assert flops(lambda: layer(x).sum().backward()) == 3 * 2 * live * (D * 24 + 24 * D)


@pytest.mark.parametrize("mode", MODES)
def test_rows_may_be_samples_of_any_shape(mode):
    module, x = images(5, 3, 6, 4)
    mask = torch.tensor([True, False, True, True, False])
    got = run(dc.nn.Skip(module, Fixed(mask)), x, mode)
    assert torch.equal(got.out[~mask], x[~mask])
    torch.testing.assert_close(got.out[mask], module(x[mask]).detach())
    assert dc.nn.Skip(module, Fixed(mask))(x.to(memory_format=torch.channels_last)).shape == x.shape


def test_a_gate_on_samples_pools_them():
    module, x = images(6, 3, 5, 5)
    gate = dc.nn.StraightThroughGate(3, pool=dc.nn.gates.pool_spatial)
    layer = dc.nn.Skip(module, gate).double()
    x = x.double()
    sparse, masked = run(layer, x, "sparse"), run(layer, x, "masked")
    open_ = torch.sigmoid(nn.functional.linear(x.mean((2, 3)), gate.score.weight, gate.score.bias))[:, 0] > 0.5
    assert 0 < int(open_.sum()) < 6
    assert torch.equal(layer.last_cost.detach() > 0.5, open_)
    for name, grad in sparse.grads.items():
        torch.testing.assert_close(grad, masked.grads[name])


@pytest.mark.parametrize("mode", MODES)
def test_closed_rows_may_hold_nan(mode):
    module, x = dc.nn.MLP(D, 24), torch.randn(10, D)
    mask = torch.arange(10) % 3 == 0
    scale, nan = torch.rand(10), float("nan")
    clean = run(dc.nn.Skip(module, Fixed(mask, scale)), x, mode)
    layer = dc.nn.Skip(module, Fixed(mask, torch.where(mask, scale, nan)))
    dirty = run(layer, torch.where(mask[:, None], x, nan), mode)
    assert dirty.out[~mask].isnan().all()
    assert torch.equal(dirty.out[mask], clean.out[mask])
    for name, grad in dirty.grads.items():
        torch.testing.assert_close(grad, clean.grads[name])


def test_closed_rows_may_hold_nan_when_compiled():
    module, x = dc.nn.MLP(D, 24), torch.randn(10, D)
    mask = torch.arange(10) % 3 == 1  # row 0 closed: padding repeats its index
    layer = dc.nn.Skip(module, Fixed(mask, torch.where(mask, 0.5, float("nan"))))
    got = run(torch.compile(layer, fullgraph=True, backend="aot_eager"), torch.where(mask[:, None], x, float("nan")))
    assert got.out[mask].isfinite().all()
    for name, grad in got.grads.items():
        assert grad.isfinite().all(), name


def test_a_module_that_refuses_an_empty_batch_is_not_called():
    class Refuses(nn.Linear):
        def forward(self, x):
            assert x.shape[0] > 0
            return super().forward(x)

    got = run(dc.nn.Skip(Refuses(D, D), Fixed(torch.zeros(6, dtype=torch.bool))), torch.randn(6, D))
    assert torch.equal(got.grads["module.weight"], torch.zeros(D, D))


def test_batch_norm_sees_the_live_rows_only():
    x, mask = torch.randn(12, D) * 3 + 1, torch.arange(12) < 5
    layer = dc.nn.Skip(nn.BatchNorm1d(D), Fixed(mask))
    twin = nn.BatchNorm1d(D)
    want = twin(x[mask])
    torch.testing.assert_close(layer(x)[mask], want)
    torch.testing.assert_close(layer.module.running_mean, twin.running_mean)


def test_a_compute_target_teaches_the_gate_how_much_to_open():
    x = torch.randn(64, D)
    layer = dc.nn.Skip(dc.nn.MLP(D, 24), dc.nn.StraightThroughGate(D))
    optimizer = torch.optim.Adam(layer.gate.parameters(), lr=0.05)
    for _ in range(150):
        layer(x)
        optimizer.zero_grad()
        dc.nn.losses.compute_target(layer.last_cost, 0.25).backward()
        optimizer.step()
    layer(x)
    assert 0.15 < float(layer.last_cost.detach().mean()) < 0.35


def test_a_shape_changed_by_the_module_is_refused():
    mask = torch.ones(4, dtype=torch.bool)
    with pytest.raises(
        ValueError, match=r"module: expected an output of the shape of its input, \[4, 16\], got \[4, 3\]"
    ):
        dc.nn.Skip(nn.Linear(D, 3), Fixed(mask))(torch.randn(4, D))
    layer = dc.nn.Skip(nn.LSTM(D, D), Fixed(mask))
    with pytest.raises(TypeError, match="module: expected a module that returns a Tensor, got tuple"):
        layer(torch.randn(4, D))


@pytest.mark.parametrize(
    ("gate", "error", "message"),
    [
        (lambda x: x[..., 0], TypeError, "gate: expected a bool mask, got torch.float32"),
        (lambda x: ([True], None), TypeError, "gate: expected a bool mask, got list"),
        (
            lambda x: x[:, :3, 0] > 0,
            ValueError,
            r"gate: expected a mask whose shape begins .* \[4, 5, 16\], got \[4, 3\]",
        ),
        (lambda x: (x > 0).any(), ValueError, r"gate: expected a mask whose shape begins .* got \[\]"),
        (lambda x: (x[..., 0] > 0, x[:, 0, 0]), ValueError, r"gate: expected a scale of the mask's shape \[4, 5\]"),
        (lambda x: (x[..., 0] > 0, x[..., 0] > 0), TypeError, "scale: expected a floating dtype, got torch.bool"),
        (lambda x: None, TypeError, r"gate: expected a bool mask, \(mask, scale\) or a Decision, got NoneType"),
        (lambda x: [x[..., 0] > 0, None], TypeError, r"gate: expected a bool mask, .* or a Decision, got list"),
        (lambda x: (), TypeError, r"gate: expected a bool mask, .* or a Decision, got a tuple of length 0"),
        (
            lambda x: (x[..., 0] > 0,),
            TypeError,
            r"gate: expected a bool mask, .* or a Decision, got a tuple of length 1",
        ),
        (lambda x: (x[..., 0] > 0, None, None), TypeError, r"gate: .* or a Decision, got a tuple of length 3"),
        (lambda x: (x[..., 0] > 0, 0.5), TypeError, r"gate: .* or a Decision, got a scale of type float"),
        (lambda x: dc.nn.Decision(x[..., 0] > 0, 0.5), TypeError, r"gate: .* or a Decision, got a scale of type float"),
        (
            lambda x: x > 0,
            ValueError,
            r"gate: expected a mask that leaves .* trailing dimension of x \[4, 5, 16\], got \[",
        ),
        (
            lambda x: dc.nn.Decision(torch.arange(20).view(4, 5) % 3 > 0, None, 4),
            ValueError,
            "gate: expected a Decision of count=4 live rows in every sequence, got 3 in one",
        ),
        (
            lambda x: dc.nn.Decision(torch.arange(4) > 0, None, 2),
            ValueError,
            "gate: expected a Decision of count=2 live rows in every sequence, got 3 in one",
        ),
        (
            lambda x: dc.nn.Decision(x[..., 0] > 0, None, 0.5),
            TypeError,
            "gate: expected a Decision whose count is an int or None, got float",
        ),
    ],
)
def test_a_gate_that_does_not_fit_is_refused(gate, error, message):
    with pytest.raises(error, match=message):
        dc.nn.Skip(nn.Identity(), gate)(torch.randn(4, 5, D))


class WithinRows(nn.Module):
    """Attention between two tokens of D / 2 in each row."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(D // 2, 4, batch_first=True)

    def forward(self, x):
        tokens = x.view(len(x), 2, D // 2)
        return x + self.attention(tokens, tokens, tokens)[0].flatten(1)


class OwnLayer(nn.TransformerEncoderLayer):
    """The same by a forward put over PyTorch's."""

    def __init__(self):
        super().__init__(D // 2, 4, 24, dropout=0.0, batch_first=True)

    def forward(self, x):
        return super().forward(x.view(len(x), 2, D // 2)).flatten(1)


@pytest.mark.parametrize(
    "build",
    [
        WithinRows,
        OwnLayer,
        lambda: nn.Sequential(
            nn.Unflatten(1, (2, D // 2)),
            nn.TransformerEncoderLayer(D // 2, 4, 24, dropout=0.0, batch_first=True),
            nn.Flatten(1),
        ),
    ],
)
@pytest.mark.parametrize("shape", [(6,), (2, 3)])
def test_a_module_may_attend_within_each_row(build, shape):
    module, x = build(), torch.randn(*shape, D)
    mask = torch.tensor([True, False, True, True, False, True]).view(shape)
    y = dc.nn.Skip(module, Fixed(mask))(x)
    torch.testing.assert_close(y[mask], torch.cat([module(row[None]) for row in x[mask]]))
    assert torch.equal(y[~mask], x[~mask])


@pytest.mark.parametrize(
    "build",
    [
        lambda: nn.TransformerEncoderLayer(D, 4, 24, dropout=0.0, batch_first=True),
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(D, 4, 24, dropout=0.0, batch_first=True), 1),
        lambda: nn.Sequential(nn.LayerNorm(D), dc.nn.TransformerBlock(D, 4)),
        lambda: nn.Sequential(nn.LayerNorm(D), nn.Sequential(dc.nn.Attention(D, 4))),
    ],
)
def test_tokens_of_a_module_that_attends_are_refused_whole_sequences_are_not(build):
    module, x = build(), torch.randn(3, 5, D)
    layer = dc.nn.Skip(module, dc.nn.ThresholdGate(D))
    with pytest.raises(ValueError, match=r"module: expected one that treats rows \[16\] one by one, .* TokenSkip"):
        layer(x)
    assert layer.last_plan is None
    assert layer.last_cost is None
    mask = torch.tensor([True, False, True])
    y = dc.nn.Skip(module, Fixed(mask))(x)
    torch.testing.assert_close(y[mask], module(x[mask]))
    assert torch.equal(y[1], x[1])


@pytest.mark.parametrize("wrap", [lambda layer: layer, lambda layer: nn.TransformerEncoder(layer, 1), nn.Sequential])
def test_layers_that_take_the_sequence_first_are_refused(wrap):
    with pytest.raises(ValueError, match=r"module: expected a module that takes \[B, S, D\], got .*batch_first=False"):
        dc.nn.Skip(wrap(nn.TransformerEncoderLayer(D, 4, 24)), dc.nn.ThresholdGate(D, pool=dc.nn.gates.pool_tokens))


def test_returns_must_be_known():
    with pytest.raises(ValueError, match="returns: expected one of output, update, got 'sum'"):
        dc.nn.Skip(nn.Identity(), lambda x: x, returns="sum")


@pytest.mark.parametrize("layer", [dc.nn.Skip, dc.nn.TokenSkip])
def test_what_is_not_callable_is_refused(layer):
    name = "module" if layer is dc.nn.Skip else "block"
    with pytest.raises(TypeError, match="gate: expected a callable, got Tensor"):
        layer(dc.nn.TransformerBlock(D, 4), torch.ones(4, dtype=torch.bool))
    with pytest.raises(TypeError, match=f"{name}: expected a callable, got NoneType"):
        layer(None, lambda x: x[..., 0] > 0)


@pytest.mark.parametrize("live", [True, False])
def test_a_plain_function_is_a_module_and_a_block(live):
    x, mask = torch.randn(2, 4, D), torch.zeros(2, 4, dtype=torch.bool)
    mask[:, 1] = live
    want = torch.where(mask[..., None], 2 * x, x)
    assert torch.equal(dc.nn.Skip(lambda rows: 2 * rows, Fixed(mask))(x), want)
    assert torch.equal(dc.nn.TokenSkip(lambda rows, positions, live: 2 * rows, Fixed(mask))(x), want)


def test_a_plain_function_is_a_gate():
    x = torch.randn(6, 4, D)
    out = dc.nn.Skip(nn.Linear(D, D), lambda x: x.norm(dim=-1) > 4.0)(x)
    small = x.norm(dim=-1) <= 4.0
    assert 0 < int(small.sum()) < 24
    assert torch.equal(out[small], x[small])
    assert not torch.equal(out[~small], x[~small])


def test_a_scale_that_is_no_number_where_no_row_is_live_leaves_the_cost_alone():
    scale = torch.tensor([1.0, float("nan"), 0.5, float("inf")], requires_grad=True)
    layer = dc.nn.Skip(nn.Linear(D, D), lambda x: (torch.tensor([True, False, True, False]), scale))
    layer(torch.randn(4, D))
    assert layer.last_cost.tolist() == [1.0, 0.0, 1.0, 0.0]
    (grad,) = torch.autograd.grad(layer.last_cost.sum(), scale)
    assert grad.tolist() == [1.0, 0.0, 1.0, 0.0]


@pytest.mark.parametrize("mode", ["sparse", "masked"])
def test_samples_may_be_empty(mode):
    x = torch.zeros(2, 0, 13)

    def first(x):
        return torch.tensor([True, False])

    def routed(x):
        return torch.tensor([[True, False], [False, True]])

    layers = [
        dc.nn.Skip(nn.Identity(), first),
        dc.nn.PolicySkip([nn.Identity()] * 2, routed),
        dc.nn.Branch([nn.Identity()] * 2, routed),
    ]
    for layer in layers:
        with dc.execution(mode):
            assert layer(x).shape == x.shape
