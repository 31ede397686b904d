"""grouped_mlp's kernels in Triton's interpreter, on the CPU, against the reference in float64."""

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("runs under TRITON_INTERPRET=1, in a process of its own", allow_module_level=True)

from triton.runtime import interpreter

import dyncore as dc
from dyncore.backends import reference
from dyncore.backends import triton as backend
from tests.support import ACTIVATIONS, GATED, PLAN_KINDS, assert_values, make_plan

DTYPES = [torch.float32, torch.bfloat16, torch.float16]

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")


def tensors(plan: dc.Plan) -> tuple:
    scale = None if plan.scale is None else plan.scale.detach()
    return plan.rows, plan.offsets, scale, plan.row_offsets, plan.row_slots


def problem(plan, activation, dtype=torch.float32, h=63, i=101) -> list:
    """x, w_in, w_out, b_in, b_out and a residual; pre-activations have unit scale, where activations differ most."""
    g, wide = plan.num_groups, 2 * i if activation in GATED else i
    x, residual = torch.randn(plan.num_rows, h), torch.randn(plan.num_rows, h)
    w_in, w_out = torch.randn(g, wide, h) * max(h, 1) ** -0.5, torch.randn(g, h, i) * max(i, 1) ** -0.5
    return [t.to(dtype) for t in (x, w_in, w_out, torch.randn(g, wide), torch.randn(g, h), residual)]


def wide(tensors) -> list:
    return [t if t is None else t.double() for t in tensors]


def check(p, plan, activation) -> None:
    """Kernel against reference: out, and the live saved pre-activations."""
    out, pre = backend.grouped_mlp(*p, *tensors(plan), activation, True)
    want, want_pre = reference.grouped_mlp(*wide(p), *tensors(plan), activation, True)
    assert out.dtype == pre.dtype == p[0].dtype
    assert_values(out, want)
    assert pre.shape == want_pre.shape
    live = int(plan.offsets[-1])
    assert_values(pre[:live], want_pre[:live], what="pre")
    assert not pre[live:].any()
    idle = plan.row_offsets.diff() == 0
    assert torch.equal(out[idle], torch.zeros_like(out[idle]) if p[5] is None else p[5][idle])


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation(activation):
    plan = make_plan("routed", 23, 4, torch.float32)
    check(problem(plan, activation), plan, activation)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype(dtype):
    plan = make_plan("routed", 23, 4, dtype)
    check(problem(plan, "swiglu", dtype), plan, "swiglu")


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
@pytest.mark.parametrize("kind", PLAN_KINDS)
def test_every_kind_of_plan(kind, activation):
    plan = make_plan(kind, 17, 4, torch.float32)
    check(problem(plan, activation), plan, activation)


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_many_rows_of_whole_16_bytes(activation):
    plan = make_plan("routed", 90, 2, torch.float32)
    check(problem(plan, activation, torch.bfloat16, 64, 160), plan, activation)


@pytest.mark.parametrize("activation", ["relu2", "geglu"])
def test_without_biases_scale_and_residual(activation):
    plan = make_plan("routed", 29, 4, None)
    x, w_in, w_out, *_ = problem(plan, activation)
    check([x, w_in, w_out, None, None, None], plan, activation)


@pytest.mark.parametrize(("num_rows", "h", "i"), [(0, 5, 5), (4, 0, 5), (4, 5, 0)])
def test_empty_dimensions(num_rows, h, i):
    plan = dc.route(torch.zeros(num_rows, 1, dtype=torch.long), num_groups=2)
    check(problem(plan, "swiglu", h=h, i=i), plan, "swiglu")


def test_any_strides():
    plan = make_plan("routed", 19, 3, torch.float32)
    x, w_in, w_out, b_in, b_out, residual = problem(plan, "swiglu", h=48, i=32)
    x = torch.cat([x, x], 1)[:, ::2]
    w_in, w_out = (w.transpose(1, 2).contiguous().transpose(1, 2) for w in (w_in, w_out))
    check([x, w_in, w_out, b_in[:, :1].expand(-1, 64), b_out, residual[:1].expand(19, -1)], plan, "swiglu")


def test_unselected_rows_may_hold_nan():
    plan = make_plan("padded", 29, 4, torch.float32)
    p = problem(plan, "swiglu")
    p[0][plan.row_offsets.diff() == 0] = float("nan")
    assert p[0].isnan().any()
    check(p, plan, "swiglu")  # assert_values wants every value finite


def test_float64_and_mixed_dtypes_take_the_reference():
    plan = make_plan("routed", 19, 3, None)
    p = problem(plan, "swiglu", torch.float64)
    got, want = (b.grouped_mlp(*p, *tensors(plan), "swiglu", False)[0] for b in (backend, reference))
    assert torch.equal(got, want)


def test_a_row_outside_the_input_is_an_index_error():
    plan = make_plan("routed", 19, 3, None)
    rows = plan.rows.clone()
    rows[4] = 19
    with pytest.raises(IndexError, match=r"plan\.rows: expected rows in \[0, 19\)"):
        backend.grouped_mlp(*problem(plan, "swiglu"), rows, *tensors(plan)[1:], "swiglu", False)


def test_a_forward_takes_three_kernels(monkeypatch):
    launched = []
    launch = interpreter.GridExecutor.__call__
    monkeypatch.setattr(
        interpreter.GridExecutor,
        "__call__",
        lambda self, *args, **kwargs: launched.append(1) or launch(self, *args, **kwargs),
    )
    plan = make_plan("routed", 60, 4, torch.float32)
    backend.grouped_mlp(*problem(plan, "swiglu"), *tensors(plan), "swiglu", True)
    assert len(launched) == 3
