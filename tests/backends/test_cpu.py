"""The C++ kernels against the reference backend in float64, in every instruction set that this machine has."""

import pytest
import torch

import dyncore as dc
from dyncore.activations import ELEMENTWISE, GATED
from dyncore.backends import cpu, reference
from tests.support import assert_gradients, assert_values

pytestmark = pytest.mark.skipif(not cpu.available, reason=cpu.reason)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# rows, groups, H, I: odd sizes, whole panels, one of each, none, and groups on either side of every kernel's range
SIZES = [(0, 3, 5, 7), (1, 1, 1, 1), (33, 4, 31, 63), (64, 3, 100, 33), (150, 2, 64, 96), (90, 5, 3, 100)]


@pytest.fixture(params=DTYPES, ids=["fp32", "bf16", "fp16"])
def dtype(request):
    return request.param


def routed(num_rows, num_groups, dtype=torch.float32, per_row=2):
    """The plan tensors of rows that go to up to `per_row` groups, the last group empty if there are several."""
    expert = torch.randint(-1, max(num_groups - 1, 1), (num_rows, per_row))
    live = int((expert >= 0).sum())
    rows, offsets, row_offsets, row_slots, _ = reference.plan_route(expert, num_groups, live + 2)
    return rows, offsets, torch.randn(live + 2).to(dtype), row_offsets, row_slots


def unscaled(plan):
    return plan[0], plan[1], None, plan[3], plan[4]


def wide(t):
    """`t`, or every tensor in it, in float64."""
    if isinstance(t, torch.Tensor):
        return t.double() if t.is_floating_point() else t
    return tuple(wide(u) for u in t) if isinstance(t, tuple) else t


def randn(*shape, dtype, scale=1.0):
    return (torch.randn(*shape) * scale).to(dtype)


def mlp_problem(size, dtype, activation, bias=True):
    num_rows, groups, h, i = size
    width = 2 * i if activation in GATED else i
    x = randn(num_rows, h, dtype=dtype)
    w_in, w_out = randn(groups, width, h, dtype=dtype, scale=h**-0.5), randn(groups, h, i, dtype=dtype, scale=i**-0.5)
    b_in, b_out = (randn(groups, width, dtype=dtype), randn(groups, h, dtype=dtype)) if bias else (None, None)
    return x, w_in, w_out, b_in, b_out


def compare_values(got, want):
    for a, b in zip(got, want, strict=True):
        assert_values(a, b)


def compare_gradients(got, want, dtype):
    for a, b in zip(got, want, strict=True):
        assert_gradients(a, b, dtype)


def with_each(sizes, few, every):
    """Pairs: every size with a few of the activations, which see one panel like the next; every one with a size."""
    return [(s, a) for s in sizes for a in few] + [(sizes[2], a) for a in every if a not in few]


@pytest.mark.parametrize(("size", "activation"), with_each(SIZES, ["gelu", "swiglu"], [*ELEMENTWISE, *GATED]), ids=str)
def test_grouped_mlp(isa, dtype, size, activation):
    plan = routed(*size[:2])
    inputs = mlp_problem(size, dtype, activation)
    residual = randn(*inputs[0].shape, dtype=dtype)
    args = (*inputs, residual, *plan, activation, True)
    out, pre = cpu.grouped_mlp(*args)
    want_out, want_pre = reference.grouped_mlp(*wide(args))
    live = int(plan[1][-1])
    compare_values((out, pre), (want_out, torch.cat([want_pre[:live], torch.zeros_like(want_pre[live:])])))

    grad = randn(*out.shape, dtype=dtype)
    args = (grad, *inputs, pre, *plan, activation, [True] * 6)
    compare_gradients(cpu.grouped_mlp_backward(*args), reference.grouped_mlp_backward(*wide(args)), dtype)


@pytest.mark.parametrize("bias", [True, False])
def test_grouped_mlp_without_scale_or_residual(isa, dtype, bias):
    plan = unscaled(routed(70, 3))
    inputs = mlp_problem((70, 3, 40, 72), dtype, "geglu", bias)
    args = (*inputs, None, *plan, "geglu", True)
    out, pre = cpu.grouped_mlp(*args)
    compare_values([out], [reference.grouped_mlp(*wide(args))[0]])
    assert cpu.grouped_mlp(*args[:-1], False)[1].numel() == 0
    needs = [True, True, True, bias, bias, False]
    args = (randn(*out.shape, dtype=dtype), *inputs, pre, *plan, "geglu", needs)
    compare_gradients(cpu.grouped_mlp_backward(*args), reference.grouped_mlp_backward(*wide(args)), dtype)


@pytest.mark.parametrize("wanted", range(6))
def test_each_mlp_gradient_alone_has_the_bits_it_has_with_the_others(isa, dtype, wanted):
    plan = routed(60, 3)
    inputs = mlp_problem((60, 3, 33, 45), dtype, "swiglu")
    out, pre = cpu.grouped_mlp(*inputs, None, *plan, "swiglu", True)
    args = (randn(*out.shape, dtype=dtype), *inputs, pre, *plan, "swiglu")
    everything = cpu.grouped_mlp_backward(*args, [True] * 6)
    alone = cpu.grouped_mlp_backward(*args, [n == wanted for n in range(6)])
    for n in range(6):
        assert torch.equal(alone[n], everything[n]) if n == wanted else alone[n].numel() == 0


@pytest.mark.parametrize("gather", [True, False], ids=["gather", "slots"])
@pytest.mark.parametrize("scatter", [True, False], ids=["scatter", "slots"])
@pytest.mark.parametrize(("size", "activation"), with_each(SIZES, ["none", "gelu"], ELEMENTWISE), ids=str)
def test_grouped_linear(isa, dtype, size, gather, scatter, activation):
    num_rows, groups, k, n = size
    plan = routed(num_rows, groups)
    slots, live = plan[0].shape[0], int(plan[1][-1])
    x = randn(num_rows if gather else slots, k, dtype=dtype)
    weight, bias = randn(groups, n, k, dtype=dtype, scale=k**-0.5), randn(groups, n, dtype=dtype)
    args = (x, weight, bias, *plan, activation, gather, scatter, True)
    out, pre = cpu.grouped_linear(*args)
    want, want_pre = reference.grouped_linear(*wide(args))
    if not scatter:
        want[live:] = 0
    want_pre[live:] = 0
    compare_values((out, pre), (want, want_pre))

    grad = randn(*out.shape, dtype=dtype)
    args = (grad, x, weight, bias, pre, *plan, activation, gather, scatter, [True] * 4)
    compare_gradients(cpu.grouped_linear_backward(*args), reference.grouped_linear_backward(*wide(args)), dtype)


@pytest.mark.parametrize("rows", [5, 70])
def test_products_deeper_than_a_panel(isa, dtype, rows):
    """More inputs than one packed panel holds, with groups of few rows and of many."""
    plan = routed(rows, 1, per_row=1)
    x, weight = randn(rows, 4133, dtype=dtype), randn(1, 35, 4133, dtype=dtype, scale=1 / 64)
    args = (x, weight, None, *plan, "none", True, True, False)
    compare_values([cpu.grouped_linear(*args)[0]], [reference.grouped_linear(*wide(args))[0]])
    grad = randn(rows, 35, dtype=dtype)
    args = (grad, x, weight, None, x.new_empty(0), *plan, "none", True, True, [True, True, False, True])
    compare_gradients(cpu.grouped_linear_backward(*args), reference.grouped_linear_backward(*wide(args)), dtype)


def test_weight_gradients_of_more_slots_than_a_panel_holds(isa, dtype):
    plan = routed(2500, 2, per_row=2)
    inputs = mlp_problem((2500, 2, 9, 35), dtype, "silu")
    out, pre = cpu.grouped_mlp(*inputs, None, *plan, "silu", True)
    args = (randn(*out.shape, dtype=dtype), *inputs, pre, *plan, "silu", [True] * 6)
    compare_gradients(cpu.grouped_mlp_backward(*args), reference.grouped_mlp_backward(*wide(args)), dtype)


@pytest.mark.parametrize("layout", ["transposed", "every_other", "one_for_all"])
@pytest.mark.parametrize("per_group", [4, 60])
def test_weights_in_any_layout(isa, dtype, layout, per_group):
    """Inputs side by side, outputs side by side, neither, and one weight expanded over the groups."""
    groups, n, k = 3, 45, 39
    dense = randn(groups, n, k, dtype=dtype, scale=k**-0.5)
    if layout == "transposed":
        weight = dense.transpose(1, 2).contiguous().transpose(1, 2)
    elif layout == "every_other":
        weight = torch.stack([dense, dense], -1)[..., 0]
    else:
        dense = dense[:1].expand(groups, n, k)
        weight = dense
    plan = routed(per_group * groups, groups, per_row=1)
    x = randn(per_group * groups, k, dtype=dtype)
    args = (None, *plan, "none", True, True, False)
    out = cpu.grouped_linear(x, weight, *args)[0]
    compare_values([out], [reference.grouped_linear(*wide((x, dense, *args)))[0]])
    grad, empty = randn(*out.shape, dtype=dtype), x.new_empty(0)
    args = (None, empty, *plan, "none", True, True, [True, True, False, True])
    want = reference.grouped_linear_backward(*wide((grad, x, dense, *args)))
    compare_gradients(cpu.grouped_linear_backward(grad, x, weight, *args), want, dtype)


def test_rows_in_any_layout(isa, dtype):
    plan = routed(50, 3)
    inputs = mlp_problem((50, 3, 40, 48), dtype, "gelu")
    out, pre = cpu.grouped_mlp(*inputs, None, *plan, "gelu", True)
    spread = torch.stack([inputs[0], inputs[0]], -1)[..., 0]
    sliced = torch.cat([inputs[0], inputs[0]], 1)[:, :40]
    for x in (spread, sliced):
        assert torch.equal(cpu.grouped_mlp(x, *inputs[1:], None, *plan, "gelu", True)[0], out)
    expanded = randn(1, 1, dtype=dtype).expand(50, 40)
    column = randn(50, 1, dtype=dtype).expand(50, 40)
    for grad in (expanded, column):
        args = (*inputs, pre, *plan, "gelu", [True] * 6)
        for a, b in zip(
            cpu.grouped_mlp_backward(grad, *args), cpu.grouped_mlp_backward(grad.contiguous(), *args), strict=True
        ):
            assert torch.equal(a, b)


def test_all_rows_in_one_of_many_groups(isa, dtype):
    rows, offsets, row_offsets, row_slots, _ = reference.plan_route(torch.full((80, 1), 5), 8, 80)
    inputs = mlp_problem((80, 8, 36, 40), dtype, "reglu")
    args = (*inputs, None, rows, offsets, None, row_offsets, row_slots, "reglu", True)
    out, pre = cpu.grouped_mlp(*args)
    compare_values([out], [reference.grouped_mlp(*wide(args))[0]])
    args = (out, *inputs, pre, rows, offsets, None, row_offsets, row_slots, "reglu", [True] * 5 + [False])
    gradients = cpu.grouped_mlp_backward(*args)
    compare_gradients(gradients, reference.grouped_mlp_backward(*wide(args)), dtype)
    for gradient in gradients[1:5]:
        assert not gradient[torch.arange(8) != 5].any()


@pytest.mark.parametrize("width", [1, 3, 31, 33, 100])
def test_gather_and_scatter(isa, dtype, width):
    plan = routed(41, 4)
    x = randn(41, width, dtype=dtype)
    assert torch.equal(cpu.gather_rows(x, *plan[:2]), reference.gather_rows(x, *plan[:2]))
    y, base = randn(plan[0].shape[0], width, dtype=dtype), randn(41, width, dtype=dtype)
    y[int(plan[1][-1]) :] = float("nan")  # padding may hold anything
    for scales in (plan, unscaled(plan)):
        for b in (base, None):
            compare_values([cpu.scatter_rows(y, b, *scales)], [reference.scatter_rows(*wide((y, b, *scales)))])
        args = (randn(41, width, dtype=dtype), y, *scales, [True, True])
        compare_gradients(cpu.scatter_rows_backward(*args), reference.scatter_rows_backward(*wide(args)), dtype)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int8, torch.float16, torch.int64, torch.complex128])
def test_gather_moves_elements_of_any_size(dtype):
    plan = routed(20, 3)
    x = torch.randint(0, 2, (20, 7)).to(dtype)
    assert torch.equal(cpu.gather_rows(x, *plan[:2]), reference.gather_rows(x, *plan[:2]))


def test_unselected_rows_may_hold_nan(isa, dtype):
    mask = torch.rand(60, 1) < 0.4
    plan_tensors = reference.plan_mask(mask, int(mask.sum()))
    plan = (*plan_tensors[:2], None, *plan_tensors[2:])
    inputs = mlp_problem((60, 1, 33, 47), dtype, "gelu")
    x, residual = inputs[0].clone(), randn(60, 33, dtype=dtype)
    x[~mask[:, 0]] = float("nan")
    residual[~mask[:, 0]] = float("nan")
    out, pre = cpu.grouped_mlp(x, *inputs[1:], residual, *plan, "gelu", True)
    assert torch.isnan(out[~mask[:, 0]]).all()
    assert torch.isfinite(out[mask[:, 0]]).all()
    grad = randn(60, 33, dtype=dtype)
    grad[~mask[:, 0]] = float("nan")
    dx, *others, _ = cpu.grouped_mlp_backward(grad, x, *inputs[1:], pre, *plan, "gelu", [True] * 5 + [False])
    assert not dx[~mask[:, 0]].any()
    assert all(torch.isfinite(g).all() for g in (dx, *others))


def test_nan_and_infinity_in_a_selected_row_stay_in_it(isa, dtype):
    rows, offsets, row_offsets, row_slots = reference.plan_mask(torch.ones(40, 1, dtype=torch.bool), 40)
    inputs = mlp_problem((40, 1, 33, 47), dtype, "silu")
    clean = cpu.grouped_mlp(*inputs, None, rows, offsets, None, row_offsets, row_slots, "silu", False)[0]
    inputs[0][7, 3] = float("nan")
    inputs[0][9, 3] = float("inf")
    out = cpu.grouped_mlp(*inputs, None, rows, offsets, None, row_offsets, row_slots, "silu", False)[0]
    assert torch.isnan(out[7]).all()
    assert not torch.isfinite(out[9]).all()
    others = [t for t in range(40) if t not in (7, 9)]
    assert torch.equal(out[others], clean[others])


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "silu", "relu", "relu2"])
def test_activations_far_from_zero(isa, activation):
    """Values and derivatives over the whole range, in which exponentials over- and underflow."""
    h = torch.cat([torch.linspace(-120, 120, 997), torch.linspace(-6, 6, 997), torch.tensor([0.0, 1e-30, -1e-30])])
    plan_tensors = reference.plan_mask(torch.ones(len(h), 1, dtype=torch.bool), len(h))
    plan = (*plan_tensors[:2], None, *plan_tensors[2:])
    one = torch.ones(1, 1, 1)
    args = (h[:, None], one, None, *plan, activation, True, True, True)
    out, pre = cpu.grouped_linear(*args)
    assert torch.equal(pre, h[:, None])
    args = (torch.ones(len(h), 1), h[:, None], one, None, pre, *plan, activation, True, True, [True] + [False] * 3)
    derivative = cpu.grouped_linear_backward(*args)[0]
    wanted = reference.grouped_linear(*wide((h[:, None], one, None, *plan, activation, True, True, True)))[0]
    torch.testing.assert_close(out.double(), wanted, rtol=2e-6, atol=5e-7)
    torch.testing.assert_close(
        derivative.double(), reference.grouped_linear_backward(*wide(args))[0], rtol=2e-6, atol=1e-6
    )


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "silu"])
def test_activations_at_the_ends_of_the_exponential(isa, activation):
    """e^x is neither infinite before 88.72 nor 0 before -103: the smallest results keep their leading digits."""
    ends = torch.tensor([88.4, 88.7, 88.8, 89.5, 103.0, 104.0, 150.0, float("inf")])
    if activation == "gelu":
        ends = (2 * ends).sqrt()  # its exponential is that of -h^2/2
    elif activation == "gelu_tanh":
        ends = torch.cat([ends, torch.tensor([10.05, 10.07, 10.08, 10.1])])  # 2z passes 88.4 to 88.8 here
    h = torch.cat([-ends, ends, torch.tensor([float("nan")])])
    plan_tensors = reference.plan_mask(torch.ones(len(h), 1, dtype=torch.bool), len(h))
    plan = (*plan_tensors[:2], None, *plan_tensors[2:])
    one = torch.ones(1, 1, 1)
    args = (h[:, None], one, None, *plan, activation, True, True, True)
    out, pre = cpu.grouped_linear(*args)
    wanted = reference.grouped_linear(*wide(args))[0]
    args = (torch.ones(len(h), 1), h[:, None], one, None, pre, *plan, activation, True, True, [True] + [False] * 3)
    derivative, slope = cpu.grouped_linear_backward(*args)[0], reference.grouped_linear_backward(*wide(args))[0]
    # silu ends where e^-x overflows; the float64 gelu_tanh has no digits left here
    sharp = h.abs() <= {"silu": 88.72, "gelu": 15.0, "gelu_tanh": 0.0}[activation]
    for got, want in ((out, wanted), (derivative, slope)):
        torch.testing.assert_close(got[sharp].double(), want[sharp], rtol=1e-4, atol=3e-39)
        torch.testing.assert_close(got[h.isfinite()].double(), want[h.isfinite()], rtol=1e-4, atol=1e-36)
    assert out[h == float("inf")] == float("inf")
    assert torch.isnan(out[h.isnan()])
    assert torch.isnan(derivative[h.isnan()])


# Plans ------------------------------------------------------------------------------------------------------------


def equal(got, want):
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("shape", [(0, 3), (1, 1), (57, 1), (200, 7)], ids=str)
@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("spare", [0, 5])
def test_plan_mask(shape, density, spare):
    mask = torch.rand(shape) < density
    count = cpu.count_mask(mask)
    assert count == int(mask.sum())
    assert equal(cpu.plan_mask(mask, count + spare), reference.plan_mask(mask, count + spare))
    assert equal(cpu.plan_mask_sources(mask, count + spare), reference.plan_mask_sources(mask, count + spare))
    assert equal(cpu.plan_mask(mask.t().contiguous().t(), count), reference.plan_mask(mask, count))


def test_a_mask_of_bytes_other_than_0_and_1():
    """As another library's bytes, viewed as bool, may hold: every byte but 0 is True, as it is to torch."""
    mask = torch.tensor([[2, 0, 255], [0, 0, 128], [7, 1, 0]], dtype=torch.uint8).view(torch.bool)
    plain = torch.tensor([[True, False, True], [False, False, True], [True, True, False]])
    assert cpu.count_mask(mask) == 5
    assert equal(cpu.plan_mask(mask, 6), reference.plan_mask(plain, 6))
    plan = dc.select(mask[:, 2])
    assert plan.rows.tolist() == [0, 1]
    assert plan.offsets.tolist() == [0, 2]
    assert plan.row_offsets.tolist() == [0, 1, 2, 2]
    assert plan.row_slots.tolist() == [0, 1]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("shape", [(0, 2), (1, 1), (57, 3), (200, 1)], ids=str)
@pytest.mark.parametrize("change", [-4, 0, 5])
def test_plan_route(dtype, shape, change):
    expert = torch.randint(-2, 6, shape, dtype=dtype)
    count = cpu.count_route(expert, 6)
    assert count == int((expert >= 0).sum())
    capacity = max(count + change, 0)
    assert equal(cpu.plan_route(expert, 6, capacity), reference.plan_route(expert, 6, capacity))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("k", [0, 1, 9, 40])
def test_plan_topk(dtype, k):
    scores = torch.randint(-4, 4, (5, 40)).to(dtype)
    scores[0, 7:9] = float("nan")
    scores[1, 3], scores[1, 4] = float("inf"), -float("inf")
    scores[2] = 0.0
    scores[2, ::2] = -0.0
    assert equal(cpu.plan_topk(scores, k), reference.plan_topk(scores, k))


def test_plan_inverse():
    rows, offsets, *_ = routed(60, 4)
    assert equal(cpu.plan_inverse(rows, offsets, 60), reference.plan_inverse(rows, offsets, 60))


# Bad plans --------------------------------------------------------------------------------------------------------


def run_all(plan, num_rows=20):
    """Every op that follows a plan's indices."""
    x, weight = torch.randn(num_rows, 8), torch.randn(plan[1].shape[0] - 1, 8, 8)
    return [
        lambda: cpu.gather_rows(x, *plan[:2]),
        lambda: cpu.scatter_rows(torch.randn(plan[0].shape[0], 8), None, *plan),
        lambda: cpu.scatter_rows_backward(x, torch.randn(plan[0].shape[0], 8), *plan, [True, True]),
        lambda: cpu.grouped_linear(x, weight, None, *plan, "none", True, True, False),
        lambda: cpu.grouped_mlp(x, weight, weight, None, None, None, *plan, "relu", False),
        lambda: cpu.plan_inverse(*plan[:2], num_rows),
    ]


@pytest.mark.parametrize("row", [-1, 20, 2**31 - 1])
def test_rows_outside_are_refused(row):
    plan = routed(20, 3)
    plan[0][4] = row
    for op in run_all(plan):
        with pytest.raises(IndexError, match=r"plan.rows: expected rows in \[0, 20\), got values from"):
            op()


@pytest.mark.parametrize("offsets", [[0, 9, 5, 12], [1, 4, 5, 12], [0, 4, 5, 2**30], [0, -3, 5, 12]], ids=str)
def test_bad_offsets_are_refused(offsets):
    plan = routed(20, 3)
    for op in run_all((plan[0], torch.tensor(offsets, dtype=torch.int32), *plan[2:])):
        with pytest.raises(ValueError, match=r"plan.offsets: expected non-decreasing offsets from 0 to at most \d+"):
            op()


def test_a_bad_inverse_map_is_refused():
    plan = routed(20, 3)
    y = torch.randn(plan[0].shape[0], 8)
    slots = plan[4].clone()
    slots[3] = int(plan[1][-1])
    with pytest.raises(IndexError, match=r"plan\.row_slots: expected slots in"):
        cpu.scatter_rows(y, None, *plan[:4], slots)
    starts = plan[3].clone()
    starts[5] = -7
    with pytest.raises(ValueError, match=r"plan\.row_offsets: expected non-decreasing offsets"):
        cpu.scatter_rows(y, None, *plan[:3], starts, plan[4])
    with pytest.raises(ValueError, match=r"plan\.row_slots: expected"):
        cpu.scatter_rows(y, None, *plan[:4], plan[4][:-1])


def test_tensors_that_do_not_fit_the_plan_are_refused():
    plan = routed(20, 3)
    slots = plan[0].shape[0]
    with pytest.raises(ValueError, match=f"y: expected {slots} slots, got 3"):
        cpu.scatter_rows(torch.randn(3, 8), None, *plan)
    with pytest.raises(ValueError, match="x: expected 20 rows, got 19"):
        cpu.grouped_linear(torch.randn(19, 8), torch.randn(3, 8, 8), None, *plan, "none", True, True, False)
    with pytest.raises(ValueError, match=f"plan.scale: expected {slots} entries"):
        cpu.scatter_rows(torch.randn(slots, 8), None, *plan[:2], plan[2][:-1], *plan[3:])


def test_too_many_slots_and_unknown_groups_are_refused():
    with pytest.raises(ValueError, match="max_slots: the mask has 12 slots, more than the capacity of 11"):
        cpu.plan_mask(torch.ones(4, 3, dtype=torch.bool), 11)
    expert = torch.tensor([[0, 3], [1, 7]])
    for call in (lambda: cpu.plan_route(expert, 3, 4), lambda: cpu.count_route(expert, 3)):
        with pytest.raises(IndexError, match="expert: expected indices below num_groups=3, got 7"):
            call()
