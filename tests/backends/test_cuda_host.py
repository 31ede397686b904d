"""The cuda backend's host code, on CPU tensors with a stand-in for the compiled module: what it allocates, what it
passes on and in which order, and when it leaves an op to others. The kernels' own tests are csrc/tests/test_cuda_*.cpp.
"""

import inspect

import pytest
import torch

import dyncore as dc
from dyncore.backends import SCHEMAS, cpu, cuda, reference, triton
from tests.support import make_plan

INT32 = torch.int32


class Native:
    """Takes what dyncore._C.cuda takes, checks it as that does, and writes what the reference says."""

    MOST_GROUPS = 1024
    MOST_CHOSEN = 32

    def __init__(self):
        self.called = []

    def __getattribute__(self, name):
        function = object.__getattribute__(self, name)
        if not callable(function):
            return function

        def call(*args):
            if not name.endswith("_workspace"):
                self.called.append(name)
                expect_parameters(name, len(args))
            return function(*args)

        return call

    def plan_mask_workspace(self, num_rows, groups):
        return 3

    def plan_mask(self, mask, rows, offsets, row_offsets, row_slots, sources, workspace):
        groups = mask.shape[1] if mask.dim() == 2 else 1
        expect_ints(rows, offsets, row_offsets, row_slots, workspace)
        assert mask.dtype is torch.bool
        assert (offsets.shape[0], row_offsets.shape[0]) == (groups + 1, mask.shape[0] + 1)
        assert workspace.shape == (3,)
        write((rows, offsets, row_offsets, row_slots), reference.plan_mask(mask, rows.shape[0]))
        if sources is not None:
            expect_ints(sources)
            write([sources], reference.plan_mask_sources(mask, rows.shape[0])[4:])

    def plan_route_workspace(self, num_rows, k, groups):
        return 5

    def plan_route(self, expert, rows, offsets, row_offsets, row_slots, sources, workspace):
        expect_ints(rows, offsets, row_offsets, row_slots, sources, workspace)
        assert workspace.shape == (5,)
        made = reference.plan_route(expert, offsets.shape[0] - 1, rows.shape[0])
        write((rows, offsets, row_offsets, row_slots, sources), made)

    def plan_route_topk_workspace(self, num_rows, k, groups):
        return num_rows * k + 5

    def plan_route_topk(
        self, logits, k, normalize, rows, offsets, row_offsets, row_slots, sources, scale, expert, workspace
    ):
        expect_ints(rows, offsets, row_offsets, row_slots, sources, workspace)
        assert (scale.dtype, expert.dtype) == (torch.float32, INT32)
        assert workspace.shape[0] == logits.shape[0] * k + 5
        outputs = (rows, offsets, row_offsets, row_slots, sources, scale, expert)
        write(outputs, reference.plan_route_topk(logits, k, normalize))

    def plan_topk(self, scores, k, rows, offsets, row_offsets, row_slots):
        expect_ints(rows, offsets, row_offsets, row_slots)
        write((rows, offsets, row_offsets, row_slots), reference.plan_topk(scores, k))

    def plan_inverse_workspace(self, capacity):
        return capacity

    def plan_inverse(self, rows, offsets, row_offsets, row_slots, workspace):
        expect_ints(row_offsets, row_slots, workspace)
        assert workspace.shape == rows.shape
        write((row_offsets, row_slots), reference.plan_inverse(rows, offsets, row_offsets.shape[0] - 1))

    def gather_rows(self, x, rows, offsets, out):
        write([out], [reference.gather_rows(x, rows, offsets)])

    def scatter_rows(self, y, base, rows, offsets, scale, row_offsets, row_slots, out):
        write([out], [reference.scatter_rows(y, base, rows, offsets, scale, row_offsets, row_slots)])

    def scatter_rows_backward(self, grad, y, rows, offsets, scale, num_rows, dy, dscale):
        assert num_rows == grad.shape[0]
        needs = [dy is not None, dscale is not None]
        made = reference.scatter_rows_backward(grad, y, rows, offsets, scale, None, None, needs)
        if dscale is not None:
            assert dscale.dtype is torch.float32
        write([t for t in (dy, dscale) if t is not None], [m for m, need in zip(made, needs, strict=True) if need])


def expect_parameters(name, count):
    """The compiled function takes as many arguments, where it was built."""
    if cuda.native is not None and hasattr(cpu.native, "cuda"):
        signature = getattr(cpu.native.cuda, name).__doc__.split(" -> ")[0]
        assert signature.count(":") == count, signature


def expect_ints(*tensors):
    assert all(t.dtype is INT32 and t.dim() == 1 and t.is_contiguous() for t in tensors)


def write(outputs, values):
    for out, value in zip(outputs, values, strict=True):
        assert out.shape == value.shape
        out.copy_(value)


@pytest.fixture
def native(monkeypatch):
    fake = Native()
    monkeypatch.setattr(cuda, "native", fake)
    monkeypatch.setattr(cuda, "_serves", lambda x: True)
    return fake


def assert_same(got, want):
    for g, w in zip(got, want, strict=True):
        assert g.dtype == w.dtype
        assert torch.equal(g, w)


@pytest.mark.parametrize("shape", [(0,), (50,), (50, 1), (40, 6), (3, 1024)], ids=str)
def test_plan_mask(native, shape):
    mask = torch.rand(shape) < 0.5
    capacity = mask.numel() + 2
    assert_same(cuda.plan_mask(mask, capacity), reference.plan_mask(mask, capacity))
    assert_same(cuda.plan_mask_sources(mask, capacity), reference.plan_mask_sources(mask, capacity))
    assert native.called == ["plan_mask"] * 2


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize(("num_rows", "k"), [(0, 2), (30, 1), (30, 3)])
def test_plan_route(native, num_rows, k, dtype):
    expert = torch.randint(-1, 5, (num_rows, k), dtype=dtype)
    assert_same(cuda.plan_route(expert, 5, expert.numel()), reference.plan_route(expert, 5, expert.numel()))
    assert native.called == ["plan_route"]


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(("num_rows", "k"), [(0, 2), (30, 1), (30, 5)])
def test_plan_route_topk(native, num_rows, k, normalize):
    logits = torch.randn(num_rows, 5)
    assert_same(cuda.plan_route_topk(logits, k, normalize), reference.plan_route_topk(logits, k, normalize))
    assert native.called == ["plan_route_topk"]


def test_a_router_too_wide_for_its_kernel_makes_its_plan_by_plan_route(native):
    logits = torch.randn(6, 40)
    assert_same(cuda.plan_route_topk(logits, 33, False), reference.plan_route_topk(logits, 33, False))
    wide = logits.double()
    assert_same(cuda.plan_route_topk(wide, 2, True), reference.plan_route_topk(wide, 2, True))
    assert native.called == ["plan_route"] * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_plan_topk(native, dtype):
    scores = torch.randn(3, 20).to(dtype)
    assert_same(cuda.plan_topk(scores, 4), reference.plan_topk(scores, 4))
    assert native.called == ["plan_topk"]


def test_plan_inverse(native):
    plan = make_plan("padded", 30, 3, None)
    assert_same(cuda.plan_inverse(plan.rows, plan.offsets, 30), (plan.row_offsets, plan.row_slots))
    assert native.called == ["plan_inverse"]


def tensors_of(plan):
    return plan.rows, plan.offsets, plan.scale, plan.row_offsets, plan.row_slots


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8, torch.float64], ids=str)
def test_gather_rows_takes_any_dtype(native, dtype):
    plan = make_plan("padded", 30, 3, None)
    x = torch.randn(30, 7).to(dtype)
    assert_same([cuda.gather_rows(x, *tensors_of(plan)[:2])], [reference.gather_rows(x, *tensors_of(plan)[:2])])
    assert native.called == ["gather_rows"]


@pytest.mark.parametrize("scale_dtype", [None, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("with_base", [True, False])
def test_scatter_rows(native, with_base, scale_dtype):
    plan = make_plan("padded", 30, 3, scale_dtype)
    y, base = torch.randn(plan.num_slots, 7), torch.randn(30, 7) if with_base else None
    with torch.no_grad():
        assert_same(
            [cuda.scatter_rows(y, base, *tensors_of(plan))], [reference.scatter_rows(y, base, *tensors_of(plan))]
        )
    assert native.called == ["scatter_rows"]


@pytest.mark.parametrize("scale_dtype", [None, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("needs", [[True, True], [True, False], [False, True], [False, False]], ids=str)
def test_scatter_rows_backward(native, needs, scale_dtype):
    plan = make_plan("padded", 30, 3, scale_dtype)
    args = torch.randn(30, 7), torch.randn(plan.num_slots, 7), *tensors_of(plan), needs
    with torch.no_grad():
        assert_same(cuda.scatter_rows_backward(*args), reference.scatter_rows_backward(*args))
    assert native.called == ["scatter_rows_backward"]


def test_what_no_kernel_takes_is_left_to_others(native):
    wide = torch.rand(2, 1025) < 0.5
    for name in ("plan_mask", "plan_mask_sources"):
        assert_same(getattr(cuda, name)(wide, wide.numel()), getattr(reference, name)(wide, wide.numel()))
    expert = torch.randint(0, 2000, (9, 2))
    assert_same(cuda.plan_route(expert, 2000, 18), reference.plan_route(expert, 2000, 18))
    assert_same(cuda.plan_route(expert.short(), 2000, 18), reference.plan_route(expert.short(), 2000, 18))
    scores = torch.randn(2, 9, dtype=torch.float64)
    assert_same(cuda.plan_topk(scores, 3), reference.plan_topk(scores, 3))
    plan = make_plan("routed", 30, 3, torch.float64)
    y = torch.randn(plan.num_slots, 7, dtype=torch.float64)
    with torch.no_grad():
        assert_same(
            [cuda.scatter_rows(y, None, *tensors_of(plan))], [reference.scatter_rows(y, None, *tensors_of(plan))]
        )
    assert native.called == []


def test_checks_name_the_argument(native):
    with pytest.raises(ValueError, match="max_slots: the mask has 9 slots"):
        cuda.plan_mask(torch.ones(3, 3, dtype=torch.bool), 8)
    with pytest.raises(IndexError, match="expert: expected indices below num_groups=4, got 4"):
        cuda.plan_route(torch.full((2, 2), 4), 4, 4)
    rows, offsets = torch.tensor([0, 9], dtype=INT32), torch.tensor([0, 2], dtype=INT32)
    with pytest.raises(IndexError, match=r"plan\.rows"):
        cuda.gather_rows(torch.randn(5, 2), rows, offsets)
    with pytest.raises(IndexError, match=r"plan\.rows"):
        cuda.plan_inverse(rows, offsets, 5)


def test_without_kernels_every_op_is_left_to_others(monkeypatch):
    def refuse(name):
        return lambda *args: name

    for name in ("plan_mask", "plan_mask_sources", "plan_route", "plan_topk", "plan_inverse", "gather_rows"):
        monkeypatch.setattr(reference, name, refuse(name))
        monkeypatch.delattr(triton, name, raising=False)
    x = torch.zeros(2, 2)  # not on a CUDA device
    assert cuda.plan_mask(x, 4) == "plan_mask"
    assert cuda.plan_mask_sources(x, 4) == "plan_mask_sources"
    assert cuda.plan_route(x, 3, 4) == "plan_route"
    assert cuda.plan_topk(x, 1) == "plan_topk"
    assert cuda.plan_inverse(x, x, 1) == "plan_inverse"
    assert cuda.gather_rows(x, x, x) == "gather_rows"


OPS = [name for name in SCHEMAS if hasattr(cuda, name)]


@pytest.mark.parametrize("name", OPS)
def test_an_ops_arguments_are_those_of_its_schema(name):
    schema = getattr(torch.ops.dyncore, name).default._schema
    assert list(inspect.signature(getattr(cuda, name)).parameters) == [a.name for a in schema.arguments]
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"dyncore::{name}", "CUDA")


def test_every_op_of_this_backend_is_tested_here():
    assert set(OPS) - {"plan_mask_sources"} == {
        name for name in vars(Native) if name in SCHEMAS
    }  # of plan_mask's kernel


def test_triton_comes_before_the_reference():
    assert cuda.elsewhere("scatter_rows") is triton.scatter_rows
    assert cuda.elsewhere("plan_mask") is reference.plan_mask


def test_why_it_is_not_available_is_said(monkeypatch):
    monkeypatch.setattr(cuda, "native", None)
    cuda._unusable.cache_clear()
    try:
        assert "DYNCORE_CUDA=1" in cuda._unusable(0)
        monkeypatch.setattr(cuda, "native", type("Native", (), {"unusable": staticmethod(lambda device: "too old")}))
        cuda._unusable.cache_clear()
        assert cuda._unusable(0) == "too old"
    finally:
        cuda._unusable.cache_clear()


@pytest.mark.skipif(cuda.native is None, reason="dyncore was built without CUDA kernels")
class TestModule:
    """dyncore._C.cuda itself, as far as it goes without a device."""

    def test_it_says_why_a_device_is_unusable(self):
        if torch.cuda.is_available():
            assert cuda.native.unusable(0) == ""
        assert cuda.native.unusable(4096) != ""

    def test_cpu_tensors_are_refused(self):
        lists = [torch.zeros(3, dtype=INT32) for _ in range(6)]
        with pytest.raises(ValueError, match="mask: expected a tensor with data on cuda"):
            cuda.native.plan_mask(torch.ones(3, dtype=torch.bool), *lists)

    def test_workspaces_are_sized_by_shapes(self):
        assert cuda.native.plan_mask_workspace(512, 1) == 0
        assert cuda.native.plan_mask_workspace(16384, 1) == 16
        assert cuda.native.plan_route_workspace(16384, 8, 64) == 64 * 128
        assert cuda.native.plan_inverse_workspace(0) >= 0


def test_shapes_and_devices_of_fake_cuda_tensors():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        mask = torch.empty(40, dtype=torch.bool, device="cuda")
        plan = dc.select(mask)
        assert plan.rows.device.type == "cuda"
        assert (plan.num_slots, plan.num_groups, plan.row_offsets.shape[0]) == (40, 1, 41)
        x = torch.empty(40, 8, device="cuda", dtype=torch.bfloat16)
        out = dc.scatter_rows(dc.gather_rows(x, plan), plan, x)
        assert (out.shape, out.device.type, out.dtype) == (x.shape, "cuda", torch.bfloat16)
