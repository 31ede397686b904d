"""grouped_linear's kernels in Triton's interpreter, on the CPU, against the reference in float64."""

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("runs under TRITON_INTERPRET=1, in a process of its own", allow_module_level=True)

import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st

import dyncore as dc
from dyncore.backends import reference
from dyncore.backends import triton as backend
from dyncore.kernels.common.tiles import count_tiles, find_tile, num_tiles, swizzle
from tests.support import PLAN_KINDS, assert_values, make_plan

ACTIVATIONS = ("none", "relu", "relu2", "gelu", "gelu_tanh", "silu")
FORMS = [(True, True), (True, False), (False, True), (False, False)]
FORM_NAMES = ["rows-rows", "rows-slots", "slots-rows", "slots-slots"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")


def tensors(plan: dc.Plan) -> tuple:
    scale = None if plan.scale is None else plan.scale.detach()
    return plan.rows, plan.offsets, scale, plan.row_offsets, plan.row_slots


def problem(plan, gather=True, dtype=torch.float32, k=63, n=100):
    """x, weight and bias; pre-activations have unit scale, where activations differ most."""
    x = torch.randn(plan.num_rows if gather else plan.num_slots, k)
    weight = torch.randn(plan.num_groups, n, k) * max(k, 1) ** -0.5
    return tuple(t.to(dtype) for t in (x, weight, torch.randn(plan.num_groups, n)))


def check(x, weight, bias, plan, activation="none", gather=True, scatter=True):
    """Kernel against reference: out, the live saved pre-activations, exact zeros in padding and rows without slots."""
    form = (activation, gather, scatter, True)
    out, pre = backend.grouped_linear(x, weight, bias, *tensors(plan), *form)
    wide = [t if t is None else t.double() for t in (x, weight, bias)]
    want, want_pre = reference.grouped_linear(*wide, *tensors(plan), *form)
    assert out.dtype == pre.dtype == x.dtype
    assert out.is_contiguous()
    assert_values(out, want)
    live = int(plan.offsets[-1])
    assert pre.shape == want_pre.shape
    assert_values(pre[:live], want_pre[:live], what="pre")
    assert not pre[live:].any()
    assert not scatter or (out[plan.row_offsets.diff() == 0] == 0).all()
    assert scatter or (out[live:] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_and_dtype(activation, dtype):
    plan = make_plan("routed", 37, 5, dtype)
    check(*problem(plan, dtype=dtype), plan, activation)


@pytest.mark.parametrize("kind", PLAN_KINDS)
@pytest.mark.parametrize(("gather", "scatter"), FORMS, ids=FORM_NAMES)
def test_every_form_and_kind_of_plan(gather, scatter, kind):
    plan = make_plan(kind, 29, 4, torch.float32)
    check(*problem(plan, gather), plan, "gelu", gather, scatter)


@pytest.mark.parametrize("k", [1, 31, 32, 100])
@pytest.mark.parametrize("n", [1, 63, 64, 130])
def test_any_width(n, k):
    plan = make_plan("duplicates", 21, 3, torch.float32)
    check(*problem(plan, n=n, k=k), plan)


def test_groups_of_many_tiles_and_more_groups_than_one_load_takes():
    groups = 1024 + 44
    expert = torch.cat([torch.zeros(90, 1, dtype=torch.long), torch.randint(0, groups, (60, 1))])
    plan = dc.route(expert, torch.rand(150, 1), num_groups=groups)
    check(*problem(plan, k=17, n=9), plan)


def test_every_slot_in_one_group_of_a_large_tile():
    plan = dc.route(torch.full((300, 1), 1), num_groups=2)
    check(*problem(plan, k=32, n=144), plan, "silu")


@pytest.mark.parametrize("scale_dtype", [None, torch.float64, torch.bfloat16], ids=str)
def test_no_scale_and_scales_of_other_dtypes(scale_dtype):
    plan = make_plan("routed", 19, 3, scale_dtype)
    check(*problem(plan), plan)


def test_without_bias():
    plan = make_plan("routed", 19, 3, torch.float32)
    x, weight, _ = problem(plan)
    check(x, weight, None, plan, "relu")


def test_any_strides():
    plan = make_plan("routed", 19, 3, torch.float32)
    x, weight, bias = problem(plan, n=48, k=64)
    check(x.t().contiguous().t(), weight.transpose(1, 2).contiguous().transpose(1, 2), bias, plan)
    check(torch.cat([x, x], 1)[:, ::2], weight.flip(0).repeat(2, 1, 1)[::2], bias[:, :1].expand(-1, 48), plan)
    check(x[:1].expand(19, -1), weight[:1].expand(3, -1, -1), bias, plan)


def test_a_scale_of_any_stride():
    plan = make_plan("routed", 19, 3, None)
    scale = torch.randn(plan.num_slots, 2)[:, 0]
    plan = dc.Plan(plan.rows, plan.offsets, scale, plan.num_rows, plan.row_offsets, plan.row_slots, True)
    check(*problem(plan), plan)


def test_unselected_rows_may_hold_nan():
    plan = make_plan("padded", 29, 4, torch.float32)
    x, weight, bias = problem(plan)
    idle = plan.row_offsets.diff() == 0
    assert idle.any()
    x[idle] = float("nan")
    check(x, weight, bias, plan)  # assert_values wants every value finite


def test_a_nan_stays_in_its_row_and_passes_every_activation():
    plan = dc.select(torch.ones(20, dtype=torch.bool))
    x, weight, bias = problem(plan)
    x[3] = float("nan")
    for activation in ACTIVATIONS:
        out, _ = backend.grouped_linear(x, weight, bias, *tensors(plan), activation, True, True, False)
        assert out[3].isnan().all()
        assert not out[torch.arange(20) != 3].isnan().any()


@pytest.mark.parametrize("k", [0, 5])
@pytest.mark.parametrize("n", [0, 5])
@pytest.mark.parametrize("num_rows", [0, 4])
def test_empty_dimensions(num_rows, n, k):
    plan = dc.route(torch.zeros(num_rows, 1, dtype=torch.long), num_groups=2)
    check(*problem(plan, n=n, k=k), plan, "relu")


def test_nothing_is_saved_when_nobody_asks():
    plan = make_plan("routed", 19, 3, torch.float32)
    x, weight, bias = problem(plan)
    saved = backend.grouped_linear(x, weight, bias, *tensors(plan), "gelu", True, True, True)
    unsaved = backend.grouped_linear(x, weight, bias, *tensors(plan), "gelu", True, True, False)
    assert torch.equal(saved[0], unsaved[0])
    assert unsaved[1].shape == (0,)
    assert backend.grouped_linear(x, weight, bias, *tensors(plan), "none", True, True, True)[1].shape == (0,)


def test_float64_takes_the_reference():
    plan = make_plan("routed", 19, 3, torch.float64)
    args = (*problem(plan, dtype=torch.float64), *tensors(plan), "gelu", True, True, False)
    assert torch.equal(backend.grouped_linear(*args)[0], reference.grouped_linear(*args)[0])


def test_a_row_outside_the_input_is_an_index_error():
    plan = make_plan("routed", 19, 3, None)
    rows = plan.rows.clone()
    rows[4] = 19
    with pytest.raises(IndexError, match=r"plan\.rows: expected rows in \[0, 19\)"):
        backend.grouped_linear(*problem(plan), rows, *tensors(plan)[1:], "none", True, True, False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [1, 100, 1500])
@pytest.mark.parametrize("kind", ["no_slots", "duplicates", "padded"])
def test_scatter_rows(kind, width, dtype):
    plan = make_plan(kind, 23, 3, torch.float32)
    y, base = torch.randn(plan.num_slots, width).to(dtype), torch.randn(23, width).to(dtype)
    idle = plan.row_offsets.diff() == 0
    y[int(plan.offsets[-1]) :] = float("nan")  # padding is never read
    for b in (base, None):
        out = backend.scatter_rows(y, b, *tensors(plan))
        want = reference.scatter_rows(y.double(), b if b is None else b.double(), *tensors(plan))
        assert_values(out, want, dtype)
        assert torch.equal(out[idle], base[idle] if b is not None else torch.zeros_like(base[idle]))


def test_scatter_rows_of_any_strides():
    plan = make_plan("duplicates", 23, 3, torch.float32)
    y, base = torch.randn(40, plan.num_slots).t(), torch.randn(1, 40).expand(23, -1)
    want = reference.scatter_rows(y.double(), base.double(), *tensors(plan))
    assert_values(backend.scatter_rows(y, base, *tensors(plan)), want)


@triton.jit
def mark_tiles(offsets, marks, idle, num_slots, num_groups, tiles_n, BM: tl.constexpr, BLOCK: tl.constexpr):
    tiles_m = count_tiles(offsets, num_groups, BM, BLOCK)
    for number in range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        tile, tile_n = swizzle(number, tiles_m, tiles_n, 4)
        group, first, end = find_tile(tile, offsets, num_groups, BM, BLOCK)
        if first >= end:
            tl.store(idle, 1)
        slot = first + tl.arange(0, BM)
        mark = marks + tile_n * num_slots + slot
        tl.store(mark, tl.load(mark, mask=slot < end, other=0) + group + 1, mask=slot < end)


@given(st.lists(st.integers(0, 40), min_size=1, max_size=12), st.integers(0, 40), st.integers(1, 3))
@settings(max_examples=20, deadline=None)
def test_tiles_cover_every_live_slot_once_with_its_group(sizes, padding, tiles_n):
    block_m, groups, slots = 16, len(sizes), sum(sizes) + padding
    offsets = torch.tensor([0, *sizes]).cumsum(0).int()
    assert sum(-(-size // block_m) for size in sizes) <= num_tiles(slots, groups, block_m)
    marks = torch.zeros(tiles_n, slots, dtype=torch.int32)
    idle = torch.zeros(1, dtype=torch.int32)
    mark_tiles[(3,)](offsets, marks, idle, slots, groups, tiles_n, BM=block_m, BLOCK=8)
    want = torch.repeat_interleave(torch.arange(1, groups + 1), torch.tensor(sizes))
    assert torch.equal(marks[:, : sum(sizes)], want.int().expand(tiles_n, -1))
    assert (marks[:, sum(sizes) :] == 0).all()
    assert int(idle) == 0
