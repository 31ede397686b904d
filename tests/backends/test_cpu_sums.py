"""Long sums of numbers of one sign, whose rounding errors add up: the C++ kernels stay within the float32 tolerance."""

import pytest
import torch

from dyncore.backends import cpu, reference
from tests.backends.test_cpu import unscaled, wide
from tests.support import assert_values

pytestmark = pytest.mark.skipif(not cpu.available, reason=cpu.reason)

LONG = 65536
# every term equal: each rounding errs to the same side, as long as the sum stays between two powers of two
TERMS = {"constant": lambda *shape: torch.full(shape, 0.1), "random": torch.rand}
ROWS = [5, 9, 60]  # the dot form, panels read in place in both widths of the register tile, packed panels


@pytest.fixture(params=TERMS)
def terms(request):
    return TERMS[request.param]


def all_rows(num_rows):
    plan = reference.plan_mask(torch.ones(num_rows, 1, dtype=torch.bool), num_rows)
    return plan[0], plan[1], torch.ones(num_rows), *plan[2:]


def one_row(num_slots):
    """The plan tensors of one row that owns every slot."""
    rows, offsets, row_offsets, row_slots, _ = reference.plan_route(
        torch.zeros(1, num_slots, dtype=torch.int64), 1, num_slots
    )
    return rows, offsets, torch.ones(num_slots), row_offsets, row_slots


def compare(got, want):
    for n, (a, b) in enumerate(zip(got, want, strict=True)):
        assert_values(a, b, what=f"tensor {n}")


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("layout", ["inputs_adjacent", "outputs_adjacent"])
def test_forward(isa, terms, rows, layout):
    x, weight = terms(rows, LONG), torch.ones(1, 32, LONG)
    if layout == "outputs_adjacent":
        weight = weight.transpose(1, 2).contiguous().transpose(1, 2)
    args = (x, weight, None, *unscaled(all_rows(rows)), "none", True, True, False)
    compare(cpu.grouped_linear(*args)[:1], reference.grouped_linear(*wide(args))[:1])


@pytest.mark.parametrize("rows", ROWS)
def test_gradients_of_rows_with_many_outputs(isa, terms, rows):
    """dx and dscale: sums over the outputs."""
    x, weight, bias = terms(rows, 32), torch.ones(1, LONG, 32), torch.ones(1, LONG)
    for activation in ("none", "relu"):
        pre = torch.ones(rows, LONG) if activation == "relu" else x.new_empty(0)
        args = (terms(rows, LONG), x, weight, bias, pre, *all_rows(rows), activation, True, True)
        args += ([True, False, False, True],)
        got, want = cpu.grouped_linear_backward(*args), reference.grouped_linear_backward(*wide(args))
        compare((got[0], got[3]), (want[0], want[3]))


def test_weight_gradients_of_many_slots(isa, terms):
    x, weight, bias = torch.ones(LONG, 40), torch.zeros(1, 24, 40), torch.zeros(1, 24)
    args = (terms(LONG, 24), x, weight, bias, x.new_empty(0), *all_rows(LONG), "none", True, True)
    args += ([False, True, True, False],)
    compare(cpu.grouped_linear_backward(*args)[1:3], reference.grouped_linear_backward(*wide(args))[1:3])


def test_weight_gradients_of_an_mlp_with_many_slots(isa, terms):
    x, w_in, w_out = torch.ones(LONG, 8), torch.ones(1, 8, 8), torch.ones(1, 8, 8)
    b_in, b_out, pre = torch.ones(1, 8), torch.ones(1, 8), torch.ones(LONG, 8)
    args = (terms(LONG, 8), x, w_in, w_out, b_in, b_out, pre, *all_rows(LONG), "relu", [False] + [True] * 4 + [False])
    compare(cpu.grouped_mlp_backward(*args)[1:5], reference.grouped_mlp_backward(*wide(args))[1:5])


@pytest.mark.parametrize("base", [True, False])
def test_scatter_of_many_slots_to_one_row(isa, terms, base):
    args = (terms(LONG, 40), torch.ones(1, 40) if base else None, *one_row(LONG))
    compare([cpu.scatter_rows(*args)], [reference.scatter_rows(*wide(args))])


def test_grouped_ops_with_many_slots_of_one_row(isa, terms):
    plan, x, weight = one_row(LONG), terms(1, 8), torch.ones(1, 8, 8)
    args = (x, weight, None, *plan, "none", True, True, False)
    compare(cpu.grouped_linear(*args)[:1], reference.grouped_linear(*wide(args))[:1])
    args = (x, weight, weight, None, None, x, *plan, "relu", False)
    compare(cpu.grouped_mlp(*args)[:1], reference.grouped_mlp(*wide(args))[:1])
    args = (x, x, weight, None, x.new_empty(0), *plan, "none", True, True, [True, False, False, False])
    compare(cpu.grouped_linear_backward(*args)[:1], reference.grouped_linear_backward(*wide(args))[:1])


def test_scale_gradients_of_wide_rows(isa, terms):
    args = (terms(3, LONG), torch.ones(3, LONG), *all_rows(3), [False, True])
    compare(cpu.scatter_rows_backward(*args)[1:], reference.scatter_rows_backward(*wide(args))[1:])


def test_long_sums_have_the_same_bits_whatever_the_thread_count(isa):
    threads = torch.get_num_threads()
    results = []
    x, y, weight = torch.rand(3000, 40), torch.rand(3000, 70), torch.rand(1, 70, 40)
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        args = (y, x, weight, weight[:, :, 0], x.new_empty(0), *all_rows(3000), "none", True, True, [True] * 4)
        results.append((cpu.scatter_rows(y, None, *one_row(3000)), *cpu.grouped_linear_backward(*args)))
    torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
