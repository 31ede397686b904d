"""Dynamic width and adaptive computation modules: an MLP of which every row takes blocks of neurons."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dyncore as dc
from tests.nn.oracle import D, Fixed, flops, run
from tests.support import act

MODES = ("sparse", "masked", "auto")


def by_hand(layer, x, mask, scale=None):
    """Row by row and block by block, from the dense weights."""
    size, gated = layer.hidden_dim // layer.num_blocks, layer.w_in.shape[0] > layer.hidden_dim
    rows = []
    for t, row in enumerate(x):
        y = torch.zeros(layer.dim, dtype=x.dtype)
        for g in mask[t].nonzero().flatten().tolist():
            wide = 2 * size if gated else size
            inside = slice(g * wide, (g + 1) * wide)
            hidden = act(F.linear(row, layer.w_in[inside], layer.b_in[inside]), layer.activation)
            block = layer.w_out[:, g * size : (g + 1) * size] @ hidden
            if layer.bias_of_first_block and g == 0:
                block = block + layer.b_out
            y = y + (block if scale is None else scale[t, g] * block)
        rows.append(y if layer.bias_of_first_block else y + layer.b_out)
    return torch.stack(rows)


def width(gate, **options):
    return dc.nn.DynamicWidthMLP(D, 24, 4, gate, **options)


def acm(gate, **options):
    return dc.nn.ACM(D, 4, 6, gate, **options)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
@pytest.mark.parametrize("build", [width, acm])
def test_blocks_follow_the_definition(build, activation, mode):
    x, mask, scale = torch.randn(9, D).double(), torch.rand(9, 4) < 0.4, torch.rand(9, 4).double()
    for s in (None, scale):
        layer = build(Fixed(mask, s), activation=activation).double()
        torch.testing.assert_close(run(layer, x, mode).out, by_hand(layer, x, mask, s).detach())


@pytest.mark.parametrize("activation", ["relu", "geglu"])
@pytest.mark.parametrize("build", [width, acm])
def test_all_blocks_are_exactly_the_dense_mlp(build, activation):
    x, ones = torch.randn(2, 5, D), torch.ones(2, 5, 4)
    for scale in (None, ones):
        layer = build(Fixed(ones > 0, scale), activation=activation)
        assert torch.equal(layer(x), layer.to_dense()(x))
        with dc.execution("sparse"):
            torch.testing.assert_close(layer(x), layer.to_dense()(x))
    assert torch.equal(layer.last_cost, torch.ones(2, 5))


@pytest.mark.parametrize("build", [width, acm])
def test_a_scale_counts_where_all_blocks_are_taken_too(build):
    x, scale = torch.randn(9, D).double(), torch.rand(9, 4).double()
    layer = build(Fixed(scale > -1, scale), activation="reglu").double()
    torch.testing.assert_close(layer(x), by_hand(layer, x, scale > -1, scale))


@pytest.mark.parametrize("build", [width, acm])
@pytest.mark.parametrize("scaled", [True, False])
def test_where_a_gradient_is_wanted_and_most_blocks_are_taken_the_dense_layer_is_masked(build, scaled, monkeypatch):
    monkeypatch.setattr("dyncore.nn.dynamic_width._MANY", 0)
    mask, x = torch.rand(20, 4) < 0.8, torch.randn(20, D).double()
    mask[3], mask[4] = False, True
    layer = build(Fixed(mask, torch.rand(20, 4).double() if scaled else None)).double()
    x[3] = float("nan")
    auto, sparse = run(layer, x, "auto"), run(layer, x, "sparse")
    assert flops(lambda: layer(x), "auto") == flops(lambda: layer(x), "masked") > flops(lambda: layer(x))
    torch.testing.assert_close(auto.out, sparse.out)
    for name, grad in sparse.grads.items():
        torch.testing.assert_close(auto.grads[name], grad, msg=name)
    with torch.no_grad():
        assert flops(lambda: layer(x), "auto") == flops(lambda: layer(x))


@pytest.mark.parametrize("mode", MODES)
def test_no_block_gives_exactly_the_bias_or_zero(mode):
    x, none = torch.randn(2, 5, D), torch.zeros(2, 5, 4, dtype=torch.bool)
    layer = width(Fixed(none))
    assert torch.equal(run(layer, x, mode).out, layer.b_out.detach().expand(2, 5, D))
    got = run(acm(Fixed(none)), x, mode)
    assert not got.out.any()
    assert not got.grads["w_in"].any()
    assert not run(width(Fixed(none), bias=False), x, mode).out.any()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("build", [width, acm])
def test_rows_without_blocks_may_hold_nan(build, mode):
    mask = torch.rand(12, 4) < 0.5
    mask[::3] = False
    scale, x = torch.rand(12, 4), torch.randn(12, D)
    layer = build(Fixed(mask, scale))
    clean = run(layer, x, mode)
    layer.gate.scale = torch.where(mask, scale, float("nan"))
    x[::3] = float("nan")
    dirty = run(layer, x, mode)
    assert torch.equal(dirty.out, clean.out)
    for name, grad in dirty.grads.items():
        torch.testing.assert_close(grad, clean.grads[name])


@pytest.mark.parametrize(("activation", "products"), [("gelu", 2), ("swiglu", 3)])
def test_flops_are_those_of_the_blocks_taken(activation, products):
    for keep in (0.0, 0.3, 1.0):
        mask = torch.rand(3, 20, 4) < keep
        layer, x = width(Fixed(mask), activation=activation), torch.randn(3, 20, D)
        want = 2 * int(mask.sum()) * products * D * 6
        assert flops(lambda: layer(x)) == want  # noqa: B023
        assert flops(lambda: layer(x), "auto") == want  # noqa: B023
        assert flops(lambda: layer(x), "masked") == 2 * 60 * products * D * 24  # noqa: B023


def test_flops_of_a_linear_layer_are_those_of_the_learners_taken():
    counts = torch.randint(0, 5, (3, 20))
    mask = torch.arange(4) < counts[..., None]
    layer, x = dc.nn.ACMLinear(D, 10, 4, Fixed(mask)), torch.randn(3, 20, D)
    assert flops(lambda: layer(x)) == 2 * int(counts.sum()) * 10 * D // 4


@pytest.mark.parametrize("mode", MODES)
def test_learners_of_a_linear_layer_are_parts_of_its_input(mode):
    linear, counts = nn.Linear(D, 10).double(), torch.arange(10) % 5
    mask, x = torch.arange(4) < counts[:, None], torch.randn(10, D).double()
    layer = dc.nn.ACMLinear.from_dense(linear, 4, Fixed(mask))
    assert layer.weight is linear.weight
    cut = x * mask.repeat_interleave(D // 4, 1)
    want = cut @ linear.weight.t() + (counts > 0)[:, None] * linear.bias
    got = run(layer, x, mode)
    torch.testing.assert_close(got.out, want.detach())
    assert not got.out[counts == 0].any()
    whole = dc.nn.ACMLinear.from_dense(linear, 4, Fixed(torch.ones(10, 4, dtype=torch.bool)))
    with dc.execution("auto"):
        assert torch.equal(whole(x), linear(x))


@pytest.mark.parametrize("counts", [[0, 1, 2, 3, 4, 4, 4], [0, 3, 3], [3, 3, 3]], ids=["mixed", "zero or 3", "all 3"])
@pytest.mark.parametrize("scaled", [True, False])
def test_rows_that_share_a_count_of_learners_share_a_product(counts, scaled, monkeypatch):
    counts = torch.tensor(counts).repeat(7)
    mask, x = torch.arange(4) < counts[:, None], torch.randn(len(counts), D).double()
    gate = Fixed(mask, torch.rand(mask.shape).double() if scaled else None)
    layer = dc.nn.ACMLinear(D, 10, 4, gate).double()
    by_slot = run(layer, x, "sparse")
    monkeypatch.setattr("dyncore.nn.acm._ROWS", 0)
    x[~mask.repeat_interleave(D // 4, 1)] = float("nan")  # so are learners that are not taken
    if scaled:
        gate.scale = torch.where(mask, gate.scale, float("nan"))
    by_count = run(layer, x, "sparse")
    torch.testing.assert_close(by_count.out, by_slot.out)
    for name, grad in by_slot.grads.items():
        torch.testing.assert_close(by_count.grads[name], grad, msg=name)
    assert flops(lambda: layer(x)) == 2 * int(counts.sum()) * 10 * D // 4


def test_learners_in_any_order_are_computed_one_by_one(monkeypatch):
    monkeypatch.setattr("dyncore.nn.acm._ROWS", 0)
    mask, x = torch.rand(30, 4) < 0.8, torch.randn(30, D).double()
    layer = dc.nn.ACMLinear(D, 10, 4, Fixed(mask)).double()
    cut = x * mask.repeat_interleave(D // 4, 1)
    torch.testing.assert_close(layer(x), cut @ layer.weight.t() + mask[:, :1] * layer.bias)


def test_blocks_are_views_of_the_dense_weights():
    layer = width(None, activation="swiglu")
    for view, weight in zip(layer.blocks(), (layer.w_in, layer.w_out, layer.b_in), strict=True):
        assert view.untyped_storage().data_ptr() == weight.untyped_storage().data_ptr()


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
@pytest.mark.parametrize("bias", [True, False])
def test_weights_of_a_dense_mlp_come_in_and_out_in_any_order(activation, bias):
    mlp, x = dc.nn.MLP(D, 24, activation=activation, bias=bias), torch.randn(7, D)
    layer = width(Fixed(torch.ones(7, 4, dtype=torch.bool)), activation=activation)
    order = torch.randperm(24)
    layer.fill(dc.nn.experts.read_expert(mlp), order)
    torch.testing.assert_close(layer(x), mlp(x))
    torch.testing.assert_close(layer.to_dense()(x), mlp(x))
    assert torch.equal(layer.w_out, mlp.w_out.weight[:, order])
    assert (layer.b_out is None) == (not bias)


def test_thresholds_move_a_trained_layer_from_nothing_to_everything():
    x = torch.randn(40, D)
    for layer in (width(None), acm(None).eval(), dc.nn.ACMLinear(D, D, 4).eval()):
        costs = []
        for threshold in (-0.1, 0.0, 0.3, 0.5, 0.7, 1.0):
            layer.gate.threshold = threshold
            layer(x)
            costs.append(float(layer.last_cost.detach().mean()))
        assert costs[0] == 1
        assert costs[-1] == 0
        assert costs == sorted(costs, reverse=True)
        assert len(set(costs)) > 3


@pytest.mark.parametrize("training", [True, False])
def test_counts_are_nested_and_reach_both_ends(training):
    gate = dc.nn.CountGate(D, 5).train(training)
    nn.init.normal_(gate.score.weight, std=3.0)
    mask, scale, _ = gate(torch.randn(4, 100, D))
    assert torch.equal(mask, mask.cummin(-1).values)
    assert set(mask.sum(-1).flatten().tolist()) == {0, 1, 2, 3, 4, 5}
    assert torch.equal(scale, mask.float())


def test_the_scale_of_a_count_is_the_chance_of_more():
    gate = dc.nn.CountGate(D, 3, weight="soft").eval()
    x = torch.randn(6, D)
    p = torch.softmax(gate.score(x), -1)
    mask, scale, _ = gate(x)
    want = torch.stack([p[:, 1:].sum(1), p[:, 2:].sum(1), p[:, 3]], 1)
    torch.testing.assert_close(scale, want)
    assert torch.equal(mask, scale > 0.5)


@pytest.mark.parametrize("build", [width, acm])
def test_a_compute_target_teaches_the_gate_how_wide_to_be(build):
    layer, x = build(None), torch.randn(64, D)
    optimizer = torch.optim.Adam(layer.gate.parameters(), lr=0.05)
    for _ in range(120):
        layer(x)
        optimizer.zero_grad()
        dc.nn.losses.compute_target(layer.last_cost, 0.25).backward()
        optimizer.step()
    layer.eval()(x)
    assert 0.1 < float(layer.last_cost.detach().mean()) < 0.4


def test_the_cost_has_the_gradient_of_the_gate():
    scale = torch.ones(5, 4, requires_grad=True)
    layer = width(Fixed(torch.rand(5, 4) < 0.5, scale))
    layer(torch.randn(5, D))
    layer.last_cost.sum().backward()
    assert torch.equal(scale.grad, torch.full((5, 4), 0.25))


@pytest.mark.parametrize("layer", [width(None), acm(None), dc.nn.ACMLinear(D, D, 4)], ids=["width", "acm", "linear"])
def test_no_rows_are_no_rows(layer):
    for shape in ((0, D), (2, 0, D)):
        got = run(layer, torch.randn(shape))
        assert got.out.shape == shape
        assert layer.last_cost.shape == shape[:-1]


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: dc.nn.DynamicWidthMLP(D, 24, 5), ValueError, "num_blocks: expected a divisor of hidden_dim=24, got 5"),
        (lambda: dc.nn.ACM(D, 0, 5), ValueError, "num_learners: expected an int >= 1, got 0"),
        (lambda: dc.nn.ACM(D, 2, 1.5), TypeError, "hidden: expected an int >= 1, got float"),
        (lambda: dc.nn.ACMLinear(D, 5, 3), ValueError, "num_learners: expected a divisor of in_features=16, got 3"),
        (lambda: dc.nn.ACMLinear.from_dense(nn.Identity()), TypeError, "linear: expected an nn.Linear, got Identity"),
        (lambda: width(3), TypeError, "gate: expected a callable, got int"),
        (lambda: width(None)(torch.randn(3, D + 1)), ValueError, r"x: expected shape \[..., 16\], got \[3, 17\]"),
        (lambda: width(None)([1]), TypeError, "x: expected a Tensor, got list"),
        (lambda: width(lambda x: x)(torch.randn(3, D)), TypeError, "gate: expected a bool mask, .* got torch.float32"),
        (lambda: width(lambda x: None)(torch.randn(3, D)), TypeError, "gate: expected a bool mask, .* got NoneType"),
        (
            lambda: width(lambda x: x > 0)(torch.randn(3, D)),
            ValueError,
            r"gate: expected a mask of shape \[3, 4\], got \[3, 16\]",
        ),
        (
            lambda: width(lambda x: (x[:, :4] > 0, x))(torch.randn(3, D)),
            ValueError,
            r"gate: expected a scale of shape \[3, 4\], got \[3, 16\]",
        ),
        (
            lambda: width(lambda x: (x[:, :4] > 0, 0.5))(torch.randn(3, D)),
            TypeError,
            "gate: expected a scale that is a Tensor, got float",
        ),
        (
            lambda: dc.nn.CountGate(D, 3, temperature=0),
            ValueError,
            "temperature: expected a finite number > 0, got 0.0",
        ),
        (
            lambda: dc.nn.CountGate(nn.Linear(D, 3), 3)(torch.randn(2, D)),
            ValueError,
            r"score: expected logits \[2, 4\], got \[2, 3\]",
        ),
        (
            lambda: width(None).fill(dc.nn.experts.read_expert(dc.nn.MLP(D, 25))),
            ValueError,
            r"weights: expected \(dim, hidden_dim, activation\) \(16, 24, 'gelu'\), got \(16, 25, 'gelu'\)",
        ),
    ],
)
def test_what_does_not_fit_is_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()
