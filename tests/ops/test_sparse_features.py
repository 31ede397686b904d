"""The sparse ops in what PyTorch offers around an op: compile, export, checkpointing, autocast, opcheck, derivatives."""

from typing import ClassVar

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint

import dyncore as dc
from tests.ops.sparse import ACTIVATIONS, DTYPES, NAMES, grads, problem, run

SAVE = ("compressed", "dense", "recompute")


@pytest.mark.parametrize("save", SAVE)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck(activation, save):
    p = problem(4, 3, 37, activation, torch.float64)
    with torch.no_grad():  # away from the kink, which finite differences must not straddle
        p["b_in"].add_(1 / 32)
    with dc.execution("sparse"):
        assert torch.autograd.gradcheck(
            lambda *t: dc.sparse_mlp(*t, activation=activation, save=save), tuple(p.values())
        )


def test_gradcheck_of_sparse_linear():
    h = torch.where(torch.rand(4, 37) < 0.3, torch.randn(4, 37), 0).double().requires_grad_()
    weight, bias = torch.randn(5, 37).double().requires_grad_(), torch.randn(5).double().requires_grad_()
    with dc.execution("sparse"):
        assert torch.autograd.gradcheck(dc.sparse_linear, (h, weight, bias))


@pytest.mark.parametrize("major", [False, True], ids=["row_major", "neuron_major"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck_of_sparse_mlp(dtype, activation, major):
    p = {n: t.detach() for n, t in problem(9, 6, 45, activation, dtype, major=major).items()}
    # as many values as there are: opcheck compares what lies past them, too, which is not written
    room = int(torch.ops.dyncore.sparse_hidden(p["x"], p["w_in"], p["b_in"], activation, 0.0, -1)[2][-1])
    for save in ("none", "compressed", "dense"):
        args = (*p.values(), activation, float("inf"), save, room)
        torch.library.opcheck(torch.ops.dyncore.sparse_mlp.default, args)
        _, *saved = torch.ops.dyncore.sparse_mlp(*args)
        if save == "none":
            assert [t.numel() for t in saved] == [0] * 4
            continue
        for needs in ([True] * 5, [False, True, False, False, True], [True, False, True, False, False]):
            grad = torch.randn(9, 6).to(dtype)
            backward = (grad, p["x"], p["w_in"], p["w_out"], *saved, activation, float("inf"), needs)
            torch.library.opcheck(torch.ops.dyncore.sparse_mlp_backward.default, backward)
    torch.library.opcheck(
        torch.ops.dyncore.sparse_hidden.default, (p["x"], p["w_in"], p["b_in"], activation, float("inf"), room)
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck_of_sparse_linear(dtype):
    h, weight = torch.relu(torch.randn(9, 45)).to(dtype), torch.randn(6, 45).to(dtype)
    for w in (weight, weight.t().contiguous().t()):
        torch.library.opcheck(torch.ops.dyncore.sparse_linear.default, (h, w, w[:, 0], float("inf")))
        for needs in ([True] * 3, [True, False, True], [False, True, False]):
            args = (torch.randn(9, 6).to(dtype), h, w, float("inf"), needs)
            torch.library.opcheck(torch.ops.dyncore.sparse_linear_backward.default, args)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_compressed_form_is_bits_and_the_non_zeros_in_order(activation):
    p = {n: t.detach() for n, t in problem(13, 6, 70, activation, shift=0.5).items()}
    _, mask, values, row_offsets, pre = torch.ops.dyncore.sparse_mlp(
        *p.values(), activation, float("inf"), "compressed", -1
    )
    gate = p["x"] @ p["w_in"][:70].t() + p["b_in"][:70]
    on = gate > 0
    bits = (mask[..., None].long() >> torch.arange(32)) & 1
    assert mask.dtype == torch.int32
    assert torch.equal(bits.reshape(13, 96), torch.nn.functional.pad(on.long(), (0, 26)))
    assert torch.equal(row_offsets, torch.nn.functional.pad(on.sum(1).cumsum(0), (1, 0)))
    assert pre.numel() == 0
    if activation == "reglu":
        up = p["x"] @ p["w_in"][70:].t() + p["b_in"][70:]
        assert torch.equal(values, torch.stack([gate[on], up[on]]))
        dense = torch.cat([torch.relu(gate), torch.where(on, up, 0)], 1)
    else:
        assert torch.equal(values, gate[on])
        dense = torch.relu(gate)
    *nothing, pre = torch.ops.dyncore.sparse_mlp(*p.values(), activation, float("inf"), "dense", -1)[1:]
    assert torch.equal(pre, dense)
    assert [t.numel() for t in nothing] == [0, 0, 0]


@pytest.mark.parametrize("mode", ["sparse", "masked", "auto"])
def test_autocast_computes_in_its_dtype_as_linear_does(mode):
    p = problem()
    with torch.autocast("cpu", dtype=torch.bfloat16), dc.execution(mode):
        out = run(p)
        linear = dc.sparse_linear(torch.relu(p["x"]), p["w_in"])
    with dc.execution(mode):
        assert torch.equal(out, run({n: t.bfloat16() for n, t in p.items()}))
        assert torch.equal(linear, dc.sparse_linear(torch.relu(p["x"]).bfloat16(), p["w_in"].bfloat16()))
    assert out.dtype == linear.dtype == torch.bfloat16
    found = grads(out.float(), p, torch.ones(out.shape))
    assert all(g.dtype == torch.float32 and g.abs().sum() > 0 for g in found.values())


class Model(nn.Module):
    def __init__(self, activation="relu", save="compressed"):
        super().__init__()
        tensors = problem(1, 16, 100, activation, shift=0.7)
        for name in NAMES[1:]:
            setattr(self, name, nn.Parameter(tensors[name].detach()))
        self.options = {"activation": activation, "save": save}

    def forward(self, x):
        y = dc.sparse_mlp(x, self.w_in, self.w_out, self.b_in, self.b_out, **self.options)
        return dc.sparse_linear(torch.relu(y), self.w_in[:100], self.b_in[:100])


def compare(got, want, *leaves):
    torch.testing.assert_close(got, want)
    for a, b in zip(
        torch.autograd.grad(got.sin().sum(), leaves), torch.autograd.grad(want.sin().sum(), leaves), strict=True
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(("activation", "mode", "save", "dynamic"), [
    ("relu", "sparse", "compressed", False), ("reglu", "sparse", "compressed", True), ("relu2", "auto", "dense", True),
    ("reglu", "sparse", "recompute", False), ("reglu", "masked", "compressed", False),
])  # fmt: skip
def test_compiles_as_one_graph_whatever_is_on(activation, mode, save, dynamic):
    torch._dynamo.reset()  # graphs of other models would count as recompiled
    model = Model(activation, save)
    compiled = torch.compile(model, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    with dc.execution(mode), torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(3):
            x = torch.randn(3, 5, 16, requires_grad=True)
            compare(compiled(x), model(x), x, *model.parameters())
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x))


def test_one_dynamic_graph_serves_any_number_of_rows():
    torch._dynamo.reset()
    model = Model()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    with dc.execution("sparse"):
        compiled(torch.randn(7, 16, requires_grad=True))
        with torch._dynamo.config.patch(error_on_recompile=True):
            for rows in (3, 40):
                x = torch.randn(rows, 16, requires_grad=True)
                compare(compiled(x), model(x), x, *model.parameters())


@pytest.mark.slow
def test_inductor_gives_the_same_values_and_gradients():
    model = Model("reglu")
    compiled = torch.compile(model, fullgraph=True)
    for _ in range(2):
        x = torch.randn(9, 16, requires_grad=True)
        compare(compiled(x), model(x), x, *model.parameters())


@pytest.mark.parametrize("strict", [False, True])
def test_export_runs_with_another_batch(strict):
    model = Model().eval()
    batch = torch.export.Dim("batch", min=2, max=64)
    exported = torch.export.export(model, (torch.randn(4, 7, 16),), dynamic_shapes={"x": {0: batch}}, strict=strict)
    graphs = [m.graph for m in exported.graph_module.modules() if isinstance(m, torch.fx.GraphModule)]
    targets = {str(node.target) for graph in graphs for node in graph.nodes}
    assert any("dyncore.sparse_mlp" in t for t in targets)
    assert any("dyncore.sparse_linear" in t for t in targets)
    for size in (3, 9):
        x = torch.randn(size, 7, 16)
        torch.testing.assert_close(exported.module()(x), model(x))


@pytest.mark.parametrize("save", SAVE)
@pytest.mark.parametrize("mode", ["sparse", "masked"])
def test_activation_checkpointing_gives_the_same_gradients(mode, save):
    model, x = Model("reglu", save), torch.randn(5, 7, 16, requires_grad=True)
    leaves = [x, *model.parameters()]
    with dc.execution(mode):
        want = torch.autograd.grad(model(x).sin().sum(), leaves)
        out = checkpoint(model, x, use_reentrant=False, context_fn=dc.execution.context_fn)
    got = torch.autograd.grad(out.sin().sum(), leaves)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_a_backward_runs_as_its_forward_did():
    p = problem(shift=1.0)
    with dc.execution("sparse"):
        out = run(p)
    with torch.no_grad():
        p["b_out"][:] = 7  # not saved
    with dc.execution("masked"):
        assert "SparseMLP" in type(out.grad_fn).__name__
        grads(out, p, torch.ones_like(out))
    with dc.execution("masked"):
        assert "SparseMLP" not in type(run(p).grad_fn).__name__


@pytest.mark.parametrize("save", SAVE)
def test_second_and_forward_derivatives_are_refused(save):
    p = problem()
    with dc.execution("sparse"):
        out = run(p, save=save)
        (dx,) = torch.autograd.grad(out.square().sum(), p["x"], create_graph=True)
        with pytest.raises(RuntimeError, match="first derivatives only"):
            torch.autograd.grad(dx.square().sum(), p["w_in"])
        x = p["x"].detach()
        with torch.autograd.forward_ad.dual_level(), pytest.raises(RuntimeError, match="jvp"):
            run({**p, "x": torch.autograd.forward_ad.make_dual(x, x)}, save=save)


def test_fake_and_meta_tensors_give_shapes():
    with torch._subclasses.FakeTensorMode():
        p = problem()
        with dc.execution("sparse"):
            out = run(p)
            assert {n: g.shape for n, g in grads(out, p, out).items()} == {n: t.shape for n, t in p.items()}
    p = {n: t.detach().to("meta").requires_grad_() for n, t in problem(activation="reglu").items()}
    for mode in ("sparse", "auto"):
        with dc.execution(mode):
            out = run(p, "reglu")
            assert out.device.type == "meta"
            assert out.shape == (37, 33)
            assert grads(out, p, out)["w_in"].shape == (142, 33)


class _Names(TorchDispatchMode):
    """Notes the ops that reach PyTorch's dispatcher."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.add(func.name())
        return func(*args, **(kwargs or {}))


class _FunctionNames(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if hasattr(func, "name"):
            self.seen.add(func.name() if callable(func.name) else func.name)
        return func(*args, **(kwargs or {}))


class _Named(torch.Tensor):
    """A tensor with data that notes the ops it meets."""

    seen: ClassVar[set[str]] = set()
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, plain):
        tensor = torch.Tensor._make_subclass(cls, plain)
        tensor.plain = plain
        return tensor

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        cls.seen.add(func.name())
        return func(*tree_map_only(cls, lambda t: t.plain, args), **(kwargs or {}))


_CALLS = {"dyncore::sparse_linear": dc.sparse_linear, "dyncore::sparse_mlp": dc.sparse_mlp}


def _one_row(op):
    """Arguments as inference has them, with which an op is called straight where nothing is there to see it."""
    x, w_in, w_out, b_in, b_out = [t.detach() for t in problem(1, 16, 64, "relu", torch.float32, major=True).values()]
    return [torch.relu(w_in[:, :1].t()), w_out, b_out] if op.endswith("linear") else [x, w_in, w_out, b_in, b_out]


@pytest.mark.parametrize("op", _CALLS)
def test_modes_and_the_profiler_see_the_op(op):
    args = _one_row(op)
    want = _CALLS[op](*args)
    for mode in (_Names(), _FunctionNames()):
        with mode:
            assert torch.equal(_CALLS[op](*args), want)
        assert op in mode.seen
    with torch.profiler.profile() as profile:
        _CALLS[op](*args)
    assert op in {event.key for event in profile.key_averages()}


@pytest.mark.parametrize("op", _CALLS)
def test_a_tensor_of_a_class_of_its_own_sees_the_op(op):
    args = _one_row(op)
    want = _CALLS[op](*args)
    for i, plain in enumerate(args):
        _Named.seen.clear()
        assert torch.equal(_CALLS[op](*args[:i], _Named(plain), *args[i + 1 :]), want)
        assert op in _Named.seen


@pytest.mark.parametrize("op", _CALLS)
def test_a_tensor_that_is_the_negative_of_its_memory(op):
    args = _one_row(op)
    for i, t in enumerate(args):
        want = _CALLS[op](*args[:i], -t, *args[i + 1 :])
        assert torch.equal(_CALLS[op](*args[:i], torch._neg_view(t), *args[i + 1 :]), want)


@pytest.mark.parametrize("op", _CALLS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_a_trace_holds_the_op_and_no_constant(op):
    first, *rest = _one_row(op)
    with torch.no_grad():
        traced = torch.jit.trace(lambda x: _CALLS[op](x, *rest), (first,), check_trace=False)
        assert torch.equal(traced(first + 1), _CALLS[op](first + 1, *rest))
