"""gather_rows: rows to slots, exactly, and the sums of their gradients."""

import pytest
import torch

import dyncore as dc
from tests.support import PLAN_KINDS, assert_gradients, live, make_plan

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.mark.parametrize("kind", PLAN_KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gather_copies_rows_and_sums_their_gradients(dtype, kind):
    plan = make_plan(kind, 37, 3, None)
    rows, _ = live(plan)
    x = torch.randn(37, 19).to(dtype).requires_grad_()
    out = dc.gather_rows(x, plan)
    assert torch.equal(out[: len(rows)], x[rows])
    assert out.shape == (plan.num_slots, 19)
    assert not out[len(rows) :].any()
    grad = torch.randn(out.shape).to(dtype)
    want = torch.zeros(37, 19, dtype=torch.double).index_add(0, rows, grad[: len(rows)].double())
    assert_gradients(torch.autograd.grad(out, x, grad)[0], want, dtype)


def test_opcheck():
    plan = make_plan("duplicates", 9, 2, None)
    torch.library.opcheck(torch.ops.dyncore.gather_rows.default, (torch.randn(9, 5), plan.rows, plan.offsets))


BAD_CALLS = [
    (lambda p: dc.gather_rows(torch.zeros(36, 3), p), ValueError, "x: expected 37 rows"),
    (lambda p: dc.gather_rows(torch.zeros(37), p), ValueError, "x: expected at least 2 dimensions"),
    (lambda p: dc.gather_rows([1.0], p), TypeError, "x: expected a Tensor, got list"),
    (lambda p: dc.gather_rows(torch.zeros(37, 3), p.rows), TypeError, "plan: expected a dyncore.Plan, got Tensor"),
    (lambda p: dc.gather_rows(torch.zeros(37, 3, device="meta"), p), ValueError, "plan: expected a plan on the device"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "kind", "message"), BAD_CALLS, ids=[m for _, _, m in BAD_CALLS])
def test_bad_calls_name_the_argument(call, kind, message):
    plan = dc.route(torch.randint(0, 3, (37, 2)), num_groups=3)
    with pytest.raises(kind) as error:
        call(plan)
    assert message in str(error.value)
