"""grouped_linear against the float64 oracle, in its four gather/scatter forms."""

import itertools

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import dyncore as dc
from dyncore.ops.checks import expect_shape
from tests.support import PLAN_KINDS, assert_gradients, assert_values, make_plan, oracle_linear

FORMS = list(itertools.product([True, False], [True, False]))
FORM_IDS = ["gather-scatter", "gather-slots", "slots-scatter", "slots-slots"]
ELEMENTWISE = [None, "relu", "relu2", "gelu", "gelu_tanh", "silu"]


def problem(plan, gather, out_width=31, width=33, dtype=torch.float32):
    rows = plan.num_rows if gather else plan.num_slots
    x = torch.randn(rows, width).to(dtype).requires_grad_()
    weight = (torch.randn(plan.num_groups, out_width, width) * width**-0.5).to(dtype).requires_grad_()
    bias = torch.randn(plan.num_groups, out_width).to(dtype).requires_grad_()
    return x, weight, bias


def check(plan, gather, scatter, activation=None, mode="sparse", biased=True, **sizes):
    x, weight, bias = problem(plan, gather, **sizes)
    with dc.execution(mode):
        out = dc.grouped_linear(
            x, weight, bias if biased else None, plan=plan, activation=activation, gather=gather, scatter=scatter
        )
    wide = [t.detach().double().requires_grad_() for t in (x, weight, bias)]
    scale = None if plan.scale is None else plan.scale.detach().double().requires_grad_()
    want = oracle_linear(wide[0], wide[1], wide[2] if biased else None, plan, scale, activation, gather, scatter)
    assert out.dtype == x.dtype
    assert_values(out, want)
    grad = torch.randn(out.shape).to(out.dtype)
    with_scale = scale is not None and scatter
    names = ["x", "weight", *["bias"] * biased, *["scale"] * with_scale]
    got = torch.autograd.grad(out, [x, weight, *[bias] * biased, *[plan.scale] * with_scale], grad)
    expected = torch.autograd.grad(
        want, [*wide[:2], *wide[2:] * biased, *[scale] * with_scale], grad.double(), materialize_grads=True
    )
    for name, a, b in zip(names, got, expected, strict=True):
        assert_gradients(a, b, out.dtype, name)


@pytest.mark.parametrize("mode", ["sparse", "masked", "auto"])
@pytest.mark.parametrize(("gather", "scatter"), FORMS, ids=FORM_IDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_values_and_gradients_equal_the_oracle(dtype, gather, scatter, mode):
    check(make_plan("routed", 37, 3, torch.float32), gather, scatter, mode=mode, dtype=dtype)


@pytest.mark.parametrize("mode", ["sparse", "masked"])
@pytest.mark.parametrize(("gather", "scatter"), FORMS, ids=FORM_IDS)
@pytest.mark.parametrize("kind", PLAN_KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_kind_of_plan(dtype, kind, gather, scatter, mode):
    check(make_plan(kind, 37, 3, torch.float32), gather, scatter, "gelu", mode, dtype=dtype)


@pytest.mark.parametrize("activation", ELEMENTWISE)
@pytest.mark.parametrize(("gather", "scatter"), FORMS, ids=FORM_IDS)
def test_every_activation(gather, scatter, activation):
    check(make_plan("duplicates", 37, 3, torch.float32), gather, scatter, activation)


@pytest.mark.parametrize("size", [(1, 1, 1), (2, 3, 5), (63, 64, 100), (100, 96, 63), (130, 1, 1000)], ids=str)
@pytest.mark.parametrize(("gather", "scatter"), FORMS, ids=FORM_IDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_odd_sizes_without_bias_and_scale(dtype, gather, scatter, size):
    rows, out_width, width = size
    plan = make_plan("routed", rows, 4, None)
    check(plan, gather, scatter, None, biased=False, out_width=out_width, width=width, dtype=dtype)


@pytest.mark.parametrize(("gather", "scatter"), FORMS, ids=FORM_IDS)
def test_gradcheck_in_float64(gather, scatter):
    plan = make_plan("padded", 5, 2, torch.float64)
    x, weight, bias = problem(plan, gather, 4, 3, torch.float64)

    def run(x, weight, bias, scale):
        scaled = dc.Plan(plan.rows, plan.offsets, scale, 5, plan.row_offsets, plan.row_slots)
        return dc.grouped_linear(x, weight, bias, plan=scaled, activation="gelu_tanh", gather=gather, scatter=scatter)

    assert torch.autograd.gradcheck(run, (x, weight, bias, plan.scale))


@pytest.mark.parametrize(("gather", "scatter"), FORMS, ids=FORM_IDS)
@pytest.mark.parametrize("mode", ["sparse", "masked"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_padding_slots_are_never_read_and_come_out_as_zero(dtype, mode, gather, scatter):
    plan = make_plan("padded", 37, 3, torch.float32)
    slots = int(plan.offsets[-1])
    assert slots < plan.num_slots
    with torch.no_grad():
        plan.scale[slots:] = float("nan")
        plan.rows[slots:] = 2**30
    x, weight, bias = problem(plan, gather, dtype=dtype)
    if not gather:
        with torch.no_grad():
            x[slots:] = float("nan")
    with dc.execution(mode):
        out = dc.grouped_linear(x, weight, bias, plan=plan, gather=gather, scatter=scatter)
    grad = torch.ones_like(out)
    if not scatter:
        assert not out[slots:].any()
        grad[slots:] = float("nan")
    grads = torch.autograd.grad(out, [x, weight, bias, *[plan.scale] * scatter], grad)
    assert torch.isfinite(out).all()
    assert all(torch.isfinite(g).all() for g in grads)
    if not gather:
        assert not grads[0][slots:].any()


def test_two_linears_by_slots_equal_the_mlp():
    plan = make_plan("routed", 37, 3, torch.float32)
    x, w_in, b_in = problem(plan, True)
    w_out = torch.randn(3, 33, 31)
    hidden = dc.grouped_linear(x, w_in, b_in, plan=plan, activation="silu", scatter=False)
    by_parts = dc.grouped_linear(hidden, w_out, plan=plan, gather=False)
    torch.testing.assert_close(by_parts, dc.grouped_mlp(x, w_in, w_out, b_in, plan=plan, activation="silu"))


def test_rows_in_ranges_give_the_bits_of_the_whole():
    mask = torch.rand(40000, 4) < 0.9  # 115000 slots, 256 bytes each: two ranges
    mask[::5] = False
    plan = dc.route_mask(mask, torch.rand(40000, 4))
    x, weight, bias = problem(plan, True)
    x.data[::5] = float("nan")
    with dc.execution("sparse"):
        slots = dc.grouped_linear(x, weight, bias, plan=plan, scatter=False)
        assert torch.equal(dc.grouped_linear(x, weight, bias, plan=plan), dc.scatter_rows(slots, plan))


def test_flops_are_those_of_live_slots():
    plan = make_plan("padded", 40, 3, torch.float32)
    slots = int(plan.offsets[-1])
    x, weight, bias = problem(plan, True, 24, 16)
    with FlopCounterMode(display=False) as forward:
        out = dc.grouped_linear(x, weight, bias, plan=plan)
    with FlopCounterMode(display=False) as backward:
        out.sum().backward()
    assert forward.get_total_flops() == 2 * slots * 24 * 16
    assert backward.get_total_flops() == 2 * forward.get_total_flops()


@pytest.mark.parametrize("activation", [None, "gelu"])
@pytest.mark.parametrize("wanted", [["x"], ["weight"], ["scale"], ["x", "scale"], ["bias"]], ids="-".join)
def test_backward_flops_are_those_of_the_products_made(wanted, activation):
    plan = make_plan("routed", 40, 3, torch.float32)
    x, weight, bias = problem(plan, True, 24, 16)
    leaves = {"x": x, "weight": weight, "bias": bias, "scale": plan.scale}
    for name, t in leaves.items():
        t.requires_grad_(name in wanted)
    out = dc.grouped_linear(x, weight, bias, plan=plan, activation=activation)
    with FlopCounterMode(display=False) as counter:
        torch.autograd.grad(out.sum(), [leaves[n] for n in wanted])
    back = "x" in wanted or ("scale" in wanted and activation is None)
    assert counter.get_total_flops() == (back + ("weight" in wanted)) * 2 * plan.num_slots * 24 * 16


@pytest.mark.parametrize("mode", ["sparse", "masked"])
def test_nan_in_the_weights_of_a_group_without_rows_reaches_nothing(mode):
    plan = dc.route(torch.randint(1, 3, (37, 2)), num_groups=3)
    x, weight, bias = problem(plan, True)
    with torch.no_grad():
        weight[0] = float("nan")
    with dc.execution(mode):
        out = dc.grouped_linear(x, weight, bias, plan=plan, activation="silu")
    assert torch.isfinite(out).all()
    assert all(torch.isfinite(g).all() for g in torch.autograd.grad(out.sum(), [x, weight, bias]))


@pytest.mark.parametrize(("gather", "scatter"), FORMS, ids=FORM_IDS)
def test_opcheck(gather, scatter):
    plan = make_plan("duplicates", 9, 2, torch.float32)
    x, weight, bias = (t.detach() for t in problem(plan, gather, 4, 6))
    tensors = (plan.rows, plan.offsets, plan.scale.detach(), plan.row_offsets, plan.row_slots)
    for activation, save in (("none", True), ("gelu", False), ("gelu", True)):
        args = (x, weight, bias, *tensors, activation, gather, scatter, save)
        torch.library.opcheck(torch.ops.dyncore.grouped_linear.default, args)
    out, pre = torch.ops.dyncore.grouped_linear(*args)
    for needs in ([True] * 4, [False, True, False, True], [True, False, True, False]):
        torch.library.opcheck(
            torch.ops.dyncore.grouped_linear_backward.default,
            (out, x, weight, bias, pre, *tensors, "gelu", gather, scatter, needs),
        )


def test_compiles_with_its_plan_as_one_graph():
    weight = torch.randn(1, 6, 8, requires_grad=True)

    def step(x, scores):
        return dc.grouped_linear(x, weight, plan=dc.select_topk(scores, 3, scores.sigmoid()), activation="silu")

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        x, scores = torch.randn(2, 10, 8, requires_grad=True), torch.randn(2, 10, requires_grad=True)
        got, want = compiled(x, scores), step(x, scores)
        torch.testing.assert_close(got, want)
        grads = (torch.autograd.grad(y.sin().sum(), [x, scores, weight]) for y in (got, want))
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b)


BAD_CALLS = {
    "plan: expected a dyncore.Plan, got str": (TypeError, {"plan": "all"}),
    "x: expected 37 rows": (ValueError, {"x": torch.zeros(5, 33)}),
    "x: expected 74 slots (plan.rows), got 37": (ValueError, {"gather": False}),
    "x: expected shape [A, D], got [37, 2, 33]": (ValueError, {"x": torch.zeros(37, 2, 33), "gather": False}),
    "weight: expected shape [G=3, N, K=33], got [3, 31, 32]": (ValueError, {"weight": torch.zeros(3, 31, 32)}),
    "weight: expected the dtype of x, torch.float32, got torch.bfloat16": (
        TypeError, {"weight": torch.zeros(3, 31, 33, dtype=torch.bfloat16)}),
    "bias: expected shape [G=3, N=31], got [31]": (ValueError, {"bias": torch.zeros(31)}),
    "activation: expected one of relu, relu2, gelu, gelu_tanh, silu, got 'swiglu'; gated activations belong to "
    "grouped_mlp": (ValueError, {"activation": "swiglu"}),
}  # fmt: skip


def test_weights_that_are_stored_transposed_are_known_as_such_whatever_they_are_called():
    with pytest.raises(ValueError, match=r"got \[2, 3\]; stored transposed\? kernel.mT is read where it lies"):
        expect_shape("kernel", torch.ones(2, 3), "N K", (None, 2), matrix=True)
    with pytest.raises(ValueError, match=r"got \[2, 3\]$"):
        expect_shape("who", torch.ones(2, 3), "T D", (None, 2))


@pytest.mark.parametrize("message", BAD_CALLS)
def test_bad_calls_name_the_argument(message):
    kind, change = BAD_CALLS[message]
    plan = dc.route(torch.randint(0, 3, (37, 2)), num_groups=3)
    x, weight, bias = problem(plan, True)
    call = {"x": x, "weight": weight, "bias": bias, "plan": plan, **change}
    with pytest.raises(kind) as error:
        dc.grouped_linear(**call)
    assert message in str(error.value)


@pytest.mark.parametrize("mode", ["sparse", "masked"])
@pytest.mark.parametrize("row", [-1, 37, 2**31 - 1])
def test_a_row_outside_x_is_an_index_error(row, mode):
    good = make_plan("routed", 37, 3, None)
    rows = good.rows.clone()
    rows[5] = row
    plan = dc.Plan(rows, good.offsets, None, 37, good.row_offsets, good.row_slots, good.exact)
    x, weight, _ = problem(good, True)
    with pytest.raises(IndexError, match=r"plan.rows: expected rows in \[0, 37\)"), dc.execution(mode):
        dc.grouped_linear(x, weight, plan=plan)


@pytest.mark.parametrize("offsets", [[0, 30, 20, 74], [1, 2, 3, 74], [0, 1, 2, 75], [-4, 0, 5, 9]], ids=str)
@pytest.mark.parametrize("mode", ["sparse", "masked"])
def test_bad_offsets_are_a_value_error(offsets, mode):
    good = make_plan("routed", 37, 3, None)
    bad = torch.tensor(offsets, dtype=torch.int32)
    plan = dc.Plan(good.rows, bad, None, 37, good.row_offsets, good.row_slots, good.exact)
    x, weight, _ = problem(good, True)
    with pytest.raises(ValueError, match=r"plan.offsets: expected non-decreasing"), dc.execution(mode):
        dc.grouped_linear(x, weight, plan=plan)
