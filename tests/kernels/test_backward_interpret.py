"""The backward kernels in Triton's interpreter, on the CPU, against the reference in float64."""

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("runs under TRITON_INTERPRET=1, in a process of its own", allow_module_level=True)

import dyncore as dc
from dyncore.backends import reference
from dyncore.backends import triton as backend
from dyncore.kernels.common import weight_gradient
from dyncore.kernels.common.sums import sum_pieces
from tests.support import ACTIVATIONS, GATED, PLAN_KINDS, assert_gradients, make_plan

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FORMS = [(True, True), (True, False), (False, True), (False, False)]
FORM_NAMES = ["rows-rows", "rows-slots", "slots-rows", "slots-slots"]
NAMES = {4: ("x", "weight", "bias", "scale"), 6: ("x", "w_in", "w_out", "b_in", "b_out", "scale")}

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")


def tensors(plan: dc.Plan) -> tuple:
    scale = None if plan.scale is None else plan.scale.detach()
    return plan.rows, plan.offsets, scale, plan.row_offsets, plan.row_slots


def wide(items) -> list:
    return [t if t is None else t.double() for t in items]


def spoil_padding(t, plan):
    """Padding is never read: what it holds must not show."""
    if t is not None and t.shape[0] == plan.num_slots:
        t[int(plan.offsets[-1]) :] = float("nan")
    return t


def compare(got, want, dtype, plan) -> None:
    for g, w, name in zip(got, want, NAMES[len(got)], strict=True):
        assert g.shape == w.shape, name
        assert_gradients(g, w, dtype, name)
        if name == "scale" and g.numel():
            assert (g[int(plan.offsets[-1]) :] == 0).all()


def random(dtype, *shape):
    return torch.randn(shape).to(dtype)


def linear_problem(plan, activation, gather, scatter, dtype=torch.float32, k=63, n=100) -> list:
    """grad, x, weight, bias, pre."""
    g, slots = plan.num_groups, plan.num_slots
    grad, x = (
        random(dtype, plan.num_rows if scatter else slots, n),
        random(dtype, plan.num_rows if gather else slots, k),
    )
    pre = random(dtype, slots, n) if activation != "none" else torch.empty(0, dtype=dtype)
    if not (scatter and plan.num_rows == slots):
        grad = grad if scatter else spoil_padding(grad, plan)
    x = x if gather else spoil_padding(x, plan)
    return [grad, x, (random(dtype, g, n, k) * n**-0.5).to(dtype), random(dtype, g, n), spoil_padding(pre, plan)]


def check_linear(p, plan, activation="none", gather=True, scatter=True, needs=(True, True, True, True)) -> None:
    form = (activation, gather, scatter, list(needs))
    got = backend.grouped_linear_backward(*p, *tensors(plan), *form)
    want = reference.grouped_linear_backward(
        *[torch.nan_to_num(t) if t is not None else t for t in wide(p)], *tensors(plan), *form
    )
    assert got[0].dtype == got[1].dtype == p[1].dtype
    compare(got, want, p[0].dtype, plan)
    if needs[0] and not gather:
        assert (got[0][int(plan.offsets[-1]) :] == 0).all()


@pytest.mark.parametrize(("gather", "scatter"), FORMS, ids=FORM_NAMES)
@pytest.mark.parametrize("kind", PLAN_KINDS)
def test_linear_every_form_and_kind_of_plan(kind, gather, scatter):
    plan = make_plan(kind, 17, 4, torch.float32)
    for activation in ("none", "gelu") if kind == "padded" else ("none",):
        check_linear(linear_problem(plan, activation, gather, scatter), plan, activation, gather, scatter)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear_every_dtype(dtype):
    plan = make_plan("routed", 40, 3, dtype)
    for activation in ("none", "silu"):
        check_linear(linear_problem(plan, activation, True, True, dtype, 64, 144), plan, activation)


@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
def test_a_weight_gradient_made_in_pieces(density, monkeypatch):
    made = []
    monkeypatch.setattr(weight_gradient, "sum_pieces", lambda *args: made.append(1) or sum_pieces(*args))
    mask = torch.rand(300) < density
    plan = dc.Plan(*torch.ops.dyncore.plan_mask(mask, 300)[:2], None, 300, *torch.ops.dyncore.plan_mask(mask, 300)[2:])
    check_linear(linear_problem(plan, "none", True, True, k=32, n=48), plan, needs=(False, True, False, False))
    assert made


def test_linear_without_scale():
    plan = make_plan("padded", 29, 4, None)
    for activation in ("none", "relu"):
        check_linear(linear_problem(plan, activation, True, True), plan, activation)


def test_linear_without_bias():
    plan = make_plan("padded", 29, 4, torch.float64)
    grad, x, weight, _, pre = linear_problem(plan, "none", True, True)
    check_linear([grad, x, weight, None, pre], plan, needs=(True, True, False, True))


@pytest.mark.parametrize("needed", range(4))
@pytest.mark.parametrize("activation", ["none", "relu2"])
def test_linear_one_gradient_alone(activation, needed):
    plan = make_plan("padded", 19, 3, torch.float32)
    needs = [i == needed for i in range(4)]
    check_linear(linear_problem(plan, activation, True, True), plan, activation, needs=needs)


@pytest.mark.parametrize("k", [0, 5])
@pytest.mark.parametrize("n", [0, 5])
@pytest.mark.parametrize("num_rows", [0, 4])
def test_linear_empty_dimensions(num_rows, n, k):
    plan = dc.route(torch.zeros(num_rows, 1, dtype=torch.long), torch.ones(num_rows, 1), num_groups=2)
    x, weight = torch.randn(num_rows, k), torch.randn(2, n, k)
    p = [torch.randn(num_rows, n), x, weight, torch.randn(2, n), torch.randn(num_rows, n)]
    check_linear(p, plan, "relu")
    check_linear(p, plan)


def test_linear_any_strides():
    plan = make_plan("routed", 19, 3, torch.float32)
    grad, x, weight, bias, pre = linear_problem(plan, "silu", True, True, k=48, n=64)
    check_linear(
        [
            grad[:1].expand(19, -1),
            torch.cat([x, x], 1)[:, ::2],
            weight.transpose(1, 2).contiguous().transpose(1, 2),
            bias,
            pre,
        ],
        plan,
        "silu",
    )
    check_linear(
        [grad.new_ones(1, 1).expand(19, 64), x, weight[:1].expand(3, -1, -1), bias[:, :1].expand(-1, 64), pre], plan
    )


def mlp_problem(plan, activation, dtype=torch.float32, h=63, i=101) -> list:
    """grad, x, w_in, w_out, b_in, b_out, pre."""
    g, width = plan.num_groups, 2 * i if activation in GATED else i
    w_in, w_out = random(torch.float32, g, width, h) * width**-0.5, random(torch.float32, g, h, i) * h**-0.5
    grad, x = random(dtype, plan.num_rows, h), random(dtype, plan.num_rows, h)
    pre = spoil_padding(random(dtype, plan.num_slots, width), plan)
    return [grad, x, w_in.to(dtype), w_out.to(dtype), random(dtype, g, width), random(dtype, g, h), pre]


def check_mlp(p, plan, activation, needs=(True,) * 6) -> None:
    got = backend.grouped_mlp_backward(*p, *tensors(plan), activation, list(needs))
    want = reference.grouped_mlp_backward(*wide(p), *tensors(plan), activation, list(needs))
    assert all(g.dtype == p[0].dtype for g in got[:5])
    compare(got, want, p[0].dtype, plan)
    assert not needs[0] or (got[0][plan.row_offsets.diff() == 0] == 0).all()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_mlp_every_activation(activation):
    plan = make_plan("routed", 23, 4, torch.float32)
    check_mlp(mlp_problem(plan, activation), plan, activation)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_mlp_every_dtype_with_many_rows_of_whole_16_bytes(activation, dtype):
    plan = make_plan("routed", 60, 3, dtype)
    check_mlp(mlp_problem(plan, activation, dtype, 64, 160), plan, activation)


@pytest.mark.parametrize("kind", PLAN_KINDS)
def test_mlp_every_kind_of_plan(kind):
    plan = make_plan(kind, 17, 3, torch.float32)
    check_mlp(mlp_problem(plan, "geglu"), plan, "geglu")


@pytest.mark.parametrize("needed", range(6))
def test_mlp_one_gradient_alone(needed):
    plan = make_plan("padded", 19, 3, torch.float32)
    check_mlp(mlp_problem(plan, "reglu"), plan, "reglu", [i == needed for i in range(6)])


def test_mlp_without_biases_and_scale():
    plan = make_plan("padded", 29, 4, None)
    grad, x, w_in, w_out, _, _, pre = mlp_problem(plan, "swiglu")
    check_mlp([grad, x, w_in, w_out, None, None, pre], plan, "swiglu", (True, True, True, False, False, False))


@pytest.mark.parametrize(("num_rows", "h", "i"), [(0, 5, 5), (4, 0, 5), (4, 5, 0)])
def test_mlp_empty_dimensions(num_rows, h, i):
    plan = dc.route(torch.zeros(num_rows, 1, dtype=torch.long), torch.ones(num_rows, 1), num_groups=2)
    p = [
        torch.randn(s)
        for s in ((num_rows, h), (num_rows, h), (2, 2 * i, h), (2, h, i), (2, 2 * i), (2, h), (num_rows, 2 * i))
    ]
    check_mlp(p, plan, "swiglu")


def test_unselected_rows_may_hold_nan():
    plan = make_plan("padded", 29, 4, torch.float32)
    p = mlp_problem(plan, "swiglu")
    idle = plan.row_offsets.diff() == 0
    p[0][idle] = p[1][idle] = float("nan")
    assert idle.any()
    check_mlp(p, plan, "swiglu")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["no_slots", "duplicates", "padded"])
def test_gather_rows_and_scatter_rows_backward(kind, dtype):
    plan = make_plan(kind, 23, 3, torch.float32)
    grad, y = random(dtype, 23, 300), spoil_padding(random(dtype, plan.num_slots, 300), plan)
    got, want = (b.gather_rows(grad, plan.rows, plan.offsets) for b in (backend, reference))
    assert torch.equal(got, want)
    for needs in ([True, True], [True, False], [False, True]):
        got = backend.scatter_rows_backward(grad, y, *tensors(plan), needs)
        want = reference.scatter_rows_backward(*wide([grad, y]), *tensors(plan), needs)
        for g, w in zip(got, want, strict=True):
            assert g.shape == w.shape
            assert_gradients(g, w, dtype)
        assert not needs[0] or (got[0][int(plan.offsets[-1]) :] == 0).all()


def test_the_same_bits_twice():
    plan = make_plan("duplicates", 60, 3, torch.float32)
    p = mlp_problem(plan, "swiglu")
    first, second = (backend.grouped_mlp_backward(*p, *tensors(plan), "swiglu", [True] * 6) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
