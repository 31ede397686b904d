"""scatter_rows: slots back to rows, alone and after gather_rows."""

import pytest
import torch

import dyncore as dc
from tests.support import PLAN_KINDS, assert_gradients, assert_values, combine, live, make_plan

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.mark.parametrize("with_base", [False, True], ids=["no-base", "base"])
@pytest.mark.parametrize("scale_dtype", [None, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", PLAN_KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scatter_scales_sums_and_adds_to_base(dtype, kind, scale_dtype, with_base):
    plan = make_plan(kind, 37, 3, scale_dtype)
    rows, _ = live(plan)
    y = torch.randn(plan.num_slots, 19).to(dtype).requires_grad_()
    base = torch.randn(37, 19).to(dtype).requires_grad_() if with_base else None
    out = dc.scatter_rows(y, plan, base)
    leaves = [t for t in (y, base, plan.scale) if t is not None]
    wide = {id(t): t.detach().double().requires_grad_() for t in leaves}
    scale = None if plan.scale is None else wide[id(plan.scale)][: len(rows)]
    want = combine(wide[id(y)][: len(rows)], rows, 37, scale, wide[id(base)] if with_base else None)
    assert_values(out, want)
    grad = torch.randn(37, 19).to(dtype)
    for got, expected in zip(
        torch.autograd.grad(out, leaves, grad),
        torch.autograd.grad(want, [wide[id(t)] for t in leaves], grad.double(), materialize_grads=True),
        strict=True,
    ):
        assert_gradients(got, expected, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scatter_never_reads_padding_and_leaves_other_rows_exactly_base(dtype):
    mask = torch.rand(37, 3) < 0.2
    mask[4] = False
    rows, offsets, row_offsets, row_slots = torch.ops.dyncore.plan_mask(mask, 111)
    count = int(offsets[-1])
    scale = torch.rand(111)
    y = torch.randn(111, 19).to(dtype)
    y[count:] = float("nan")
    scale[count:] = float("nan")
    rows[count:] = 2**30
    plan = dc.Plan(rows, offsets, scale.requires_grad_(), 37, row_offsets, row_slots)
    base = torch.randn(37, 19).to(dtype)
    base[4, 0] = float("nan")
    out = dc.scatter_rows(y.requires_grad_(), plan, base)
    empty = ~mask.any(1)
    assert torch.equal(out[empty].nan_to_num(7), base[empty].nan_to_num(7))
    assert torch.isfinite(out[~empty]).all()
    dy, dscale = torch.autograd.grad(out[~empty].sum(), [y, plan.scale])
    assert torch.isfinite(dy).all()
    assert torch.isfinite(dscale).all()
    assert not dy[count:].any()
    assert not dscale[count:].any()


@pytest.mark.parametrize("kind", PLAN_KINDS)
def test_gradcheck_in_float64(kind):
    plan = make_plan(kind, 6, 2, torch.float64)
    x = torch.randn(6, 3, dtype=torch.double, requires_grad=True)
    base = torch.randn(6, 3, dtype=torch.double, requires_grad=True)

    def run(x, base, scale):
        scaled = dc.Plan(plan.rows, plan.offsets, scale, 6, plan.row_offsets, plan.row_slots)
        return dc.scatter_rows(dc.gather_rows(x, scaled).sin(), scaled, base)

    assert torch.autograd.gradcheck(run, (x, base, plan.scale))


def test_strided_and_expanded_inputs_and_gradients():
    plan = make_plan("duplicates", 37, 3, torch.float32)
    x = torch.randn(19, 37).t().requires_grad_()
    base = torch.randn(1, 19).expand(37, 19)
    out = dc.scatter_rows(dc.gather_rows(x, plan), plan, base)
    want = dc.scatter_rows(dc.gather_rows(x.contiguous(), plan), plan, base.contiguous())
    assert torch.equal(out, want)
    expanded = torch.autograd.grad(out, [x, plan.scale], torch.ones(()).expand_as(out), retain_graph=True)
    dense = torch.autograd.grad(out, [x, plan.scale], torch.ones_like(out))
    assert all(torch.equal(a, b) for a, b in zip(expanded, dense, strict=True))


def test_leading_dimensions_are_rows():
    mask = torch.rand(3, 5) < 0.5
    plan = dc.select(mask)
    x = torch.randn(3, 5, 7)
    assert torch.equal(dc.gather_rows(x, plan), x[mask])
    assert torch.equal(dc.scatter_rows(dc.gather_rows(x, plan), plan, x), torch.where(mask[..., None], 2 * x, x))


def test_opcheck():
    plan = make_plan("duplicates", 9, 2, torch.float32)
    tensors = (plan.rows, plan.offsets, plan.scale.detach(), plan.row_offsets, plan.row_slots)
    x, y = torch.randn(9, 5), torch.randn(plan.num_slots, 5)
    torch.library.opcheck(torch.ops.dyncore.scatter_rows.default, (y, x, *tensors))
    torch.library.opcheck(torch.ops.dyncore.scatter_rows.default, (y, None, *tensors))
    for needs in ([True, True], [True, False], [False, True]):
        torch.library.opcheck(torch.ops.dyncore.scatter_rows_backward.default, (x, y, *tensors, needs))


def test_compiles_as_one_graph():
    def step(x, mask):
        plan = dc.select(mask)
        return dc.scatter_rows(dc.gather_rows(x, plan).sin(), plan, x)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        x, mask = torch.randn(11, 4, requires_grad=True), torch.rand(11) < 0.5
        got, want = compiled(x, mask), step(x, mask)
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(*(torch.autograd.grad(y.square().sum(), x)[0] for y in (got, want)))


BAD_CALLS = [
    (lambda p: dc.scatter_rows(torch.zeros(37, 3), p), ValueError, "y: expected 74 slots"),
    (lambda p: dc.scatter_rows(torch.zeros(74), p), ValueError, "y: expected shape [A, D], got [74]"),
    (lambda p: dc.scatter_rows(torch.zeros(74, 3), p, torch.zeros(37, 4)), ValueError, "base: expected shape [T=37, D=3]"),
    (lambda p: dc.scatter_rows(torch.zeros(74, 3), p, torch.zeros(37, 3).double()), TypeError, "base: expected the dtype"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "kind", "message"), BAD_CALLS, ids=[m for _, _, m in BAD_CALLS])
def test_bad_calls_name_the_argument(call, kind, message):
    plan = dc.route(torch.randint(0, 3, (37, 2)), num_groups=3)
    with pytest.raises(kind) as error:
        call(plan)
    assert message in str(error.value)
