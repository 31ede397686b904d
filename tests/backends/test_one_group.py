"""cuBLAS as an executor for one group of known size: on CPU tensors its values and gradients, on fake ones that say they
are on a CUDA device when it is taken and what it launches."""

import importlib

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import dyncore as dc
from dyncore import activations
from dyncore.backends import one_group, reference
from tests.nn.test_launches import Launches
from tests.support import assert_gradients, assert_values

DTYPES = [torch.float32, torch.bfloat16]
ACTIVATIONS = (*activations.ELEMENTWISE, *activations.GATED)
T, H, INNER = 23, 17, 66  # of few terms, sums of rounded activations err by more than of the thousands it serves


def plan_of(kind, scale=None):
    """A plan of one group whose count the host knows: 9 rows, none, or all of them."""
    count = {"some": 9, "none": 0, "all": T}[kind]
    plan = dc.select_topk(torch.randn(1, T), count, None if scale is None else scale[None])
    assert plan.exact
    assert plan.full == (kind == "all")
    return plan


def problem(activation, dtype, bias=True):
    """x, w_in, w_out, b_in, b_out, residual"""
    inner = 2 * INNER if activation in activations.GATED else INNER
    shapes = [(T, H), (1, inner, H), (1, H, INNER), (1, inner), (1, H), (T, H)]
    tensors = [(torch.randn(s) * (s[-1] ** -0.5 if len(s) == 3 else 1.0)).to(dtype) for s in shapes]
    return tensors if bias else [*tensors[:3], None, None, None]


def tensors_of(plan):
    return plan.rows, plan.offsets, plan.scale, plan.row_offsets, plan.row_slots


def wide(tensors):
    return [None if t is None else t.detach().double() for t in tensors]


@pytest.mark.parametrize("kind", ["some", "none", "all"])
@pytest.mark.parametrize("with_scale", [False, True], ids=["unscaled", "scaled"])
@pytest.mark.parametrize("bias", [False, True], ids=["bare", "biases"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_mlp_equals_the_reference(dtype, bias, with_scale, kind):
    for activation in ACTIVATIONS:
        plan = plan_of(kind, torch.randn(T) if with_scale else None)
        p = problem(activation, dtype, bias)
        idle = plan.row_offsets.diff() == 0
        p[0][idle] = float("nan")
        out, pre = one_group.grouped_mlp(*p, *tensors_of(plan), activation, True, full=plan.full)
        want, want_pre = reference.grouped_mlp(*wide(p), *tensors_of(plan), activation, True)
        assert_values(out, want)
        assert_values(pre, want_pre)
        assert one_group.grouped_mlp(*p, *tensors_of(plan), activation, False, full=plan.full)[1].numel() == 0


@pytest.mark.parametrize("kind", ["some", "none", "all"])
@pytest.mark.parametrize("form", [(True, True), (True, False), (False, True), (False, False)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_linear_layer_equals_the_reference(dtype, form, kind):
    for activation in ("none", "silu"):
        for scale in (None, torch.randn(T)):
            plan = plan_of(kind, scale)
            x = torch.randn(T if form[0] else plan.num_slots, H).to(dtype)
            p = [x, torch.randn(1, INNER, H).to(dtype), torch.randn(1, INNER).to(dtype)]
            out, pre = one_group.grouped_linear(*p, *tensors_of(plan), activation, *form, True, full=plan.full)
            want, want_pre = reference.grouped_linear(*wide(p), *tensors_of(plan), activation, *form, True)
            assert_values(out, want)
            assert_values(pre, want_pre)


@pytest.fixture
def preferred(monkeypatch):
    """CPU tensors take the executor wherever it serves."""
    for op in ("grouped_mlp", "grouped_linear"):
        module = importlib.import_module(f"dyncore.ops.{op}")
        monkeypatch.setattr(module, "by_cublas", lambda plan, x, *weights: plan.exact and plan.num_groups == 1)


@pytest.mark.parametrize("kind", ["some", "all"])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_equal_the_oracle(dtype, compiled, kind, preferred, monkeypatch):
    taken = []
    own = one_group.grouped_mlp
    monkeypatch.setattr(one_group, "grouped_mlp", lambda *args, **kwargs: taken.append(1) or own(*args, **kwargs))
    scale = torch.randn(T)
    plan = plan_of(kind, scale)

    def run(x, w_in, w_out, b_in, b_out, residual, scale):
        own_scale = dc.Plan(*tensors_of(plan)[:2], scale, T, plan.row_offsets, plan.row_slots, plan.exact, plan.full)
        weights = (w_in, w_out, b_in, b_out)
        return dc.grouped_mlp(x, *weights, plan=own_scale, activation="swiglu", residual=residual)

    p = [*problem("swiglu", dtype), tensors_of(plan)[2]]
    leaves, exact = ([t.detach().clone().requires_grad_() for t in tensors] for tensors in (p, wide(p)))
    with dc.execution("masked"):
        want = run(*exact)
    out = (torch.compile(run, fullgraph=True, backend="aot_eager") if compiled else run)(*leaves)
    assert taken
    assert_values(out, want)
    grad = torch.randn(T, H)
    got = torch.autograd.grad(out, leaves, grad.to(dtype))
    names = ("x", "w_in", "w_out", "b_in", "b_out", "residual", "scale")
    for name, g, w in zip(names, got, torch.autograd.grad(want, exact, grad.to(dtype).double()), strict=True):
        assert_gradients(g, w, dtype, name)


def test_two_linear_layers_by_slots_equal_an_mlp(preferred):
    x, w_in, w_out, b_in, b_out, _ = (t.requires_grad_() for t in problem("gelu", torch.float32))
    plan = plan_of("some", torch.randn(T))
    hidden = dc.grouped_linear(x, w_in, b_in, plan=plan, activation="gelu", scatter=False)
    out = dc.grouped_linear(hidden, w_out, b_out, plan=plan, gather=False)
    want = dc.grouped_mlp(x, w_in, w_out, b_in, b_out, plan=plan)
    leaves = [x, w_in, w_out, b_in, b_out]
    for g, w in zip(
        (out, *torch.autograd.grad(out.sum(), leaves)), (want, *torch.autograd.grad(want.sum(), leaves)), strict=True
    ):
        torch.testing.assert_close(g, w)


def test_its_flops_are_those_of_the_live_rows(preferred):
    x, w_in, w_out, *_ = problem("swiglu", torch.float32)
    flops = dc.measure.flops(lambda: dc.grouped_mlp(x, w_in, w_out, plan=plan_of("some"), activation="swiglu"))
    assert flops == 2 * 9 * 3 * H * INNER


# When it is taken -------------------------------------------------------------------------------------------------

MLP = ["mm", "gelu", "mm"]
KERNELS = ["grouped_mlp"] * 3


@pytest.fixture
def on_cuda(monkeypatch):
    monkeypatch.setattr(FakeTensor, "is_cuda", True, raising=False)
    monkeypatch.setattr(FakeTensor, "is_cpu", False, raising=False)
    monkeypatch.setattr(one_group, "check_plan", lambda *args: None)  # as on a device
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)


def launched(rows, plan_maker, dtype=torch.bfloat16, width=2048, groups=1, **options):
    with FakeTensorMode():
        x, w = torch.empty(rows, width, dtype=dtype), torch.empty(groups, 4096, width, dtype=dtype)
        plan = plan_maker(rows)
        with Launches() as launches:
            out = dc.grouped_mlp(x, w, w.transpose(1, 2), plan=plan, **options)
    assert out.shape == x.shape
    return launches.names


def topk(keep):
    return lambda rows: dc.select_topk(torch.empty(1, rows), int(keep * rows))


def test_all_rows_are_neither_gathered_nor_scattered(on_cuda):
    assert launched(4096, topk(1)) == MLP
    assert launched(4096, topk(1), residual=None, activation="silu") == ["mm", "silu", "mm"]
    assert launched(4096, lambda rows: dc.route_topk(torch.empty(rows, 1), 1)) == [*MLP, "scatter_rows"]


def test_some_rows_are_gathered_and_scattered(on_cuda):
    assert launched(4096, topk(0.5)) == ["gather_rows", *MLP, "scatter_rows"]


def test_what_it_does_not_serve_goes_to_our_kernels(on_cuda):
    assert launched(4096, topk(0.2)) == KERNELS  # too few rows
    assert launched(4096, topk(1), width=1024) == KERNELS  # too narrow
    assert launched(4096, topk(1), dtype=torch.float16) == KERNELS
    assert launched(4096, lambda rows: dc.select(torch.empty(rows, dtype=torch.bool))) == KERNELS  # nobody has counted
    assert launched(4096, lambda rows: dc.route_topk(torch.empty(rows, 2), 2), groups=2) == KERNELS
    with dc.execution("sparse"):
        assert launched(4096, topk(1)) == KERNELS
