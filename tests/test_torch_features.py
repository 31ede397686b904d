"""What PyTorch offers around an op, on the whole chain from gate to rows: export, checkpointing, inductor, large data."""

import subprocess
import sys

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import dyncore as dc


class SkippedMLP(nn.Module):
    """x + MLP(x) where the score is positive."""

    def __init__(self, width=16, hidden=24):
        super().__init__()
        self.score = nn.Linear(width, 1)
        self.w_in = nn.Parameter(torch.randn(1, hidden, width) * width**-0.5)
        self.w_out = nn.Parameter(torch.randn(1, width, hidden) * hidden**-0.5)

    def forward(self, x):
        score = self.score(x).squeeze(-1)
        plan = dc.select(score > 0, score.sigmoid())
        return dc.grouped_mlp(x, self.w_in, self.w_out, plan=plan, residual=x)


def gradients(model, out):
    return torch.autograd.grad(out.square().sum(), list(model.parameters()))


@pytest.mark.parametrize("strict", [False, True])
def test_export_runs_with_another_batch_and_another_mask(strict):
    model = SkippedMLP().eval()
    batch = torch.export.Dim("batch", min=2, max=64)
    exported = torch.export.export(model, (torch.randn(4, 7, 16),), dynamic_shapes={"x": {0: batch}}, strict=strict)
    graphs = [m.graph for m in exported.graph_module.modules() if isinstance(m, torch.fx.GraphModule)]
    assert any("dyncore.grouped_mlp" in str(node.target) for graph in graphs for node in graph.nodes)
    for size in (3, 9):
        x = torch.randn(size, 7, 16)
        torch.testing.assert_close(exported.module()(x), model(x))


DYNAMIC_LENGTH = {
    "Skip of half": lambda: dc.nn.Skip(nn.Linear(8, 8), dc.nn.TopKGate(8, 0.5)),
    "Skip of one": lambda: dc.nn.Skip(nn.Linear(8, 8), dc.nn.TopKGate(8, 1)),
    "TokenSkip": lambda: dc.nn.TokenSkip(dc.nn.TransformerBlock(8, 2), dc.nn.TopKGate(8, 0.5)),
    "MixtureOfDepths": lambda: dc.nn.MixtureOfDepths(nn.Linear(8, 8), 0.25),
}


@pytest.mark.parametrize("make", DYNAMIC_LENGTH.values(), ids=DYNAMIC_LENGTH)
def test_export_of_a_ratio_of_the_sequence_runs_with_any_batch_and_length(make):
    layer = make().eval()
    sizes = {0: torch.export.Dim("batch", min=2, max=64), 1: torch.export.Dim("tokens", min=6, max=64)}
    exported = torch.export.export(layer, (torch.randn(4, 12, 8),), dynamic_shapes=(sizes,)).module()
    for shape in ((2, 6), (3, 7), (5, 64)):
        x = torch.randn(*shape, 8)
        torch.testing.assert_close(exported(x), layer(x))


PROCESS = """
import sys, torch, dyncore
run = torch._inductor.aoti_load_package(sys.argv[1])
torch.save([run(x) for x in torch.load(sys.argv[2])], sys.argv[2])
"""


@pytest.mark.slow
def test_an_ahead_of_time_package_runs_in_a_process_that_imports_dyncore(tmp_path):
    layer = dc.nn.MoE(16, 24, num_experts=3).eval()
    batch = torch.export.Dim("batch", min=2, max=64)
    xs = [torch.randn(size, 7, 16) for size in (4, 9)]
    with torch.no_grad():
        exported = torch.export.export(layer, (xs[0],), dynamic_shapes={"x": {0: batch}})
        package = torch._inductor.aoti_compile_and_package(exported, package_path=str(tmp_path / "layer.pt2"))
        want = [layer(x) for x in xs]
    torch.save(xs, tmp_path / "tensors.pt")
    subprocess.run([sys.executable, "-c", PROCESS, package, str(tmp_path / "tensors.pt")], check=True)
    for got, expected in zip(torch.load(tmp_path / "tensors.pt"), want, strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("mode", ["sparse", "masked"])
def test_activation_checkpointing_gives_the_same_gradients(mode, use_reentrant):
    model, x = SkippedMLP(), torch.randn(5, 7, 16, requires_grad=True)
    with dc.execution(mode):
        want = gradients(model, model(x))
        got = gradients(model, checkpoint(model, x, use_reentrant=False)) if not use_reentrant else None
        if use_reentrant:  # the re-entrant form supports backward() alone
            checkpoint(model, x, use_reentrant=True).square().sum().backward()
            got = [p.grad for p in model.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_a_checkpoint_is_computed_again_in_the_mode_of_its_forward():
    model, x = SkippedMLP(), torch.randn(5, 7, 16)
    with dc.execution("masked"):
        want = gradients(model, model(x))
        out = checkpoint(model, x, use_reentrant=False, context_fn=dc.execution.context_fn)
    assert all(torch.equal(a, b) for a, b in zip(gradients(model, out), want, strict=True))


W = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(0))
PLAN = dc.route(torch.tensor([[0, 1], [1, -1], [0, -1], [1, 0], [-1, -1]]), torch.rand(5, 2), num_groups=2)
FUNCTIONS = {  # of x [5, 4]
    "gather_rows": lambda x: dc.gather_rows(x, PLAN),
    "scatter_rows": lambda x: dc.scatter_rows(dc.gather_rows(x, PLAN), PLAN, x),
    "grouped_linear": lambda x: dc.grouped_linear(x, W, plan=PLAN, activation="gelu"),
    "grouped_mlp": lambda x: dc.grouped_mlp(x, W, W.mT, plan=PLAN, residual=x),
    "sparse_linear": lambda x: dc.sparse_linear(x.relu(), W[0]),
    "sparse_mlp": lambda x: dc.sparse_mlp(x, W[0], W[1].t()),
    "select": lambda x: dc.grouped_linear(x, W[:1], plan=dc.select(x[:, 0] > 0, x[:, 1])),
    "select_topk": lambda x: dc.grouped_linear(x, W[:1], plan=dc.select_topk(x[:, :1].t(), 2, x[:, :1].t())),
    "route_topk": lambda x: dc.grouped_linear(x, W, plan=dc.route_topk(x[:, :2], 1)),
    "route_mask": lambda x: dc.grouped_linear(x, W, plan=dc.route_mask(x[:, :2] > 0, x[:, :2])),
}


@pytest.fixture(params=FUNCTIONS)
def function(request):
    with dc.execution("sparse"):
        yield FUNCTIONS[request.param]


def square(function):
    return lambda x: function(x).square().sum()


def gradient(function, x):
    x = x.clone().requires_grad_()
    return torch.autograd.grad(function(x), x)[0]


def test_torch_func_differentiates_once(function):
    x = torch.randn(5, 4)
    want = gradient(square(function), x)
    torch.testing.assert_close(torch.func.grad(square(function))(x), want)
    out, back = torch.func.vjp(function, x)
    torch.testing.assert_close(back(2 * out)[0], want)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        torch.func.grad(lambda a: torch.func.grad(square(function))(a).square().sum())(x)


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
def test_vmap_computes_one_sample_after_the_other(function):
    x = torch.randn(3, 5, 4)
    torch.testing.assert_close(torch.vmap(function)(x), torch.stack([function(a) for a in x]))
    got = torch.vmap(torch.func.grad(square(function)))(x)
    torch.testing.assert_close(got, torch.stack([gradient(square(function), a) for a in x]))


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
def test_gradients_go_through_vmap(function):
    x = torch.randn(3, 5, 4)
    want = torch.stack([gradient(square(function), a) for a in x])
    mapped = lambda xs: torch.vmap(function)(xs).square().sum()  # noqa: E731
    torch.testing.assert_close(torch.func.grad(mapped)(x), want)
    torch.testing.assert_close(gradient(mapped, x), want)


WEIGHTED = {  # of W [2, 6, 4] and x [5, 4]
    "grouped_linear": lambda w, x: dc.grouped_linear(x, w, plan=PLAN),
    "grouped_mlp": lambda w, x: dc.grouped_mlp(x, w, w.mT, plan=PLAN),
    "sparse_linear": lambda w, x: dc.sparse_linear(x.relu(), w[0]),
    "sparse_mlp": lambda w, x: dc.sparse_mlp(x, w[0], w[1].t()),
}


@pytest.mark.parametrize("name", WEIGHTED)
@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
def test_gradients_of_weights_go_through_vmap_and_compile(name):
    f, xs = WEIGHTED[name], torch.randn(3, 5, 4)
    with dc.execution("sparse"):
        one = lambda w: f(w, xs[0]).square().sum()  # noqa: E731
        want = gradient(one, W)
        compiled = torch.compile(torch.func.grad(one), backend="aot_eager")
        torch.testing.assert_close(compiled(W), want)
        shared = torch.func.grad(lambda w: torch.vmap(f, (None, 0))(w, xs).square().sum())(W)
        torch.testing.assert_close(shared, sum(gradient(lambda w, x=x: f(w, x).square().sum(), W) for x in xs))
        each = torch.func.grad(lambda w: torch.vmap(f)(w, xs).square().sum())(W.expand(3, 2, 6, 4).clone())
        torch.testing.assert_close(each[0], want)


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
@pytest.mark.parametrize("name", ["gather_rows", "grouped_mlp", "route_mask"])
def test_a_compiled_vmap_refuses_to_leave_gradients_out(name):
    xs = torch.randn(3, 5, 4)
    loss = lambda xs: torch.vmap(FUNCTIONS[name])(xs).square().sum()  # noqa: E731
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    with dc.execution("sparse"):
        with torch.no_grad():
            torch.testing.assert_close(compiled(xs), loss(xs))
        with pytest.raises(
            RuntimeError, match=r"torch.vmap over dyncore's ops has no gradients: leave out torch.compile"
        ):
            compiled(xs)


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
@pytest.mark.parametrize("build", [lambda: dc.nn.MoE(4, 8, 3), lambda: hard_skip()], ids=["moe", "skip"])
def test_an_ensemble_of_layers_trains(build):
    layers, x = [build() for _ in range(2)], torch.randn(5, 4)
    parameters, buffers = torch.func.stack_module_state(layers)
    call = lambda p, b: torch.func.functional_call(layers[0], (p, b), (x,))  # noqa: E731
    torch.vmap(call)(parameters, buffers).square().sum().backward()
    for i, layer in enumerate(layers):
        layer(x).square().sum().backward()
        for name, parameter in layer.named_parameters():
            torch.testing.assert_close(parameters[name].grad[i], parameter.grad, msg=name)
    assert layers[0].last_cost is not None


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
@pytest.mark.parametrize("read", ["last_cost", "losses"])
def test_a_record_is_read_inside_of_the_vmap_that_made_it(read):
    layer = dc.nn.MoE(4, 8, 3)
    values = lambda: [layer.last_cost] if read == "last_cost" else list(layer.losses().values())  # noqa: E731
    xs = torch.randn(3, 5, 4)
    inside = torch.vmap(lambda x: (layer(x), *values())[1:])(xs)
    with pytest.raises(RuntimeError, match=f"{read}: belongs to a forward inside torch.vmap, which has ended"):
        values()
    for i, x in enumerate(xs):
        layer(x)
        for got, want in zip(inside, values(), strict=True):
            torch.testing.assert_close(got[i], want)


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
@pytest.mark.parametrize("read", ["last_cost", "losses"])
@pytest.mark.parametrize("gradient", ["inside", "outside"])
def test_a_record_of_a_vmap_with_gradients_says_that_the_vmap_has_ended(gradient, read):
    layer, xs = dc.nn.MoE(4, 8, 3), torch.randn(3, 5, 4)
    if gradient == "inside":
        torch.vmap(torch.func.grad(lambda x: layer(x).sum()))(xs)
    else:
        torch.func.grad(lambda xs: torch.vmap(layer)(xs).sum())(xs)
    with pytest.raises(RuntimeError, match=f"{read}: belongs to a forward inside torch.vmap, which has ended"):
        layer.last_cost if read == "last_cost" else layer.losses()
    assert repr(layer.last_plan) == "Plan(rows=5, groups=3, slots=<=10, density=unknown, scaled)"
    layer(xs[0])
    assert all(loss.isfinite() for loss in [layer.last_cost.mean(), *layer.losses().values()])
    assert "slots=10" in repr(layer.last_plan)


def hard_skip():
    return dc.nn.Skip(nn.Linear(4, 4), dc.nn.StraightThroughGate(4))


def test_forward_derivatives_of_a_hard_gate_in_masked_execution():
    layer, x = hard_skip(), torch.randn(5, 4)
    with dc.execution("masked"):
        _, tangent = torch.func.jvp(layer, (x,), (torch.ones_like(x),))
        want = torch.autograd.functional.jvp(layer, x, torch.ones_like(x))[1]
    torch.testing.assert_close(tangent, want)


@pytest.mark.parametrize("dynamic", [False, True])
def test_one_compiled_graph_serves_every_mask(function, dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for first in (True, False, False):
        x = torch.randn(5, 4)
        with torch._dynamo.config.patch(error_on_recompile=not first):
            torch.testing.assert_close(gradient(square(compiled), x), gradient(square(function), x))
            torch.testing.assert_close(compiled(x), function(x))


def test_a_layer_as_a_function_of_its_parameters():
    layer, x = dc.nn.MoE(4, 8, 3), torch.randn(5, 4)
    loss = layer(x).square().sum()
    parameters = dict(layer.named_parameters())
    want = torch.autograd.grad(loss, list(parameters.values()))
    got = torch.func.grad(lambda p: torch.func.functional_call(layer, p, (x,)).square().sum())(parameters)
    for a, b in zip(got.values(), want, strict=True):
        torch.testing.assert_close(a.detach(), b)


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [False, True])
def test_inductor_gives_the_same_values_and_gradients_without_recompiling_for_another_mask(dynamic):
    torch._dynamo.reset()  # of the graph that the other way has made of the same code
    model = SkippedMLP()
    compiled = torch.compile(model, fullgraph=True, dynamic=dynamic)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(3):
            x = torch.randn(5, 7, 16)
            got, want = compiled(x), model(x)
            torch.testing.assert_close(got, want)
            for a, b in zip(gradients(model, got), gradients(model, want), strict=True):
                torch.testing.assert_close(a, b)


def test_second_derivatives_are_refused():
    model, x = SkippedMLP(), torch.randn(5, 16, requires_grad=True)
    for loss in (lambda y: y.square().sum(), lambda y: y.sum()):  # the second: its gradient is a constant
        with dc.execution("sparse"):
            (grad,) = torch.autograd.grad(loss(model(x)), x, create_graph=True)
        with pytest.raises(RuntimeError, match="first derivatives only"):
            grad.square().sum().backward()


@pytest.mark.parametrize("wanted", ["x", "weight", "scale"])
def test_second_derivatives_by_named_inputs_are_refused(wanted):
    """As a gradient penalty and torch.autograd.functional.hessian ask for them: nothing else of the graph is visited."""
    leaves = {"x": torch.randn(5, 4), "weight": torch.randn(1, 4, 4), "scale": torch.rand(5)}
    leaf = leaves[wanted].requires_grad_()
    plan = dc.select(torch.ones(5, dtype=torch.bool), scale=leaves["scale"])
    with dc.execution("sparse"):
        loss = dc.grouped_linear(leaves["x"], leaves["weight"], plan=plan, activation="gelu").square().sum()
    (grad,) = torch.autograd.grad(loss, leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        torch.autograd.grad(loss + grad.square().sum(), leaf)


def test_forward_derivatives_are_refused():
    x, w = torch.randn(5, 4), torch.randn(1, 4, 4)
    plan = dc.select(torch.arange(5) < 3)
    with dc.execution("sparse"):
        with pytest.raises(RuntimeError, match="no forward derivatives"):
            torch.func.jvp(lambda a: dc.grouped_linear(a, w, plan=plan), (x,), (x,))
        with torch.autograd.forward_ad.dual_level(), pytest.raises(RuntimeError, match="jvp"):
            dc.grouped_linear(torch.autograd.forward_ad.make_dual(x, x), w, plan=plan)


def test_dispatch_modes_see_every_op():
    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            names.append(func.name())
            return func(*args, **(kwargs or {}))

    names: list[str] = []
    x, w = torch.randn(5, 4), torch.randn(1, 4, 4)
    with Seen(), torch.no_grad():
        dc.grouped_mlp(x, w, w, plan=dc.select(x[:, 0] > 0))
    assert [n for n in names if n.startswith("dyncore")] == ["dyncore::plan_mask", "dyncore::grouped_mlp"]


def test_fake_tensors_give_fake_results_and_are_checked():
    with FakeTensorMode():
        x, w = torch.randn(3, 5, 4), torch.randn(1, 4, 4)
        plan = dc.select(x[..., 0] > 0)
        out = dc.grouped_mlp(x, w, w, plan=plan, residual=x)
        assert isinstance(out, FakeTensor)
        assert out.shape == (3, 5, 4)
        with pytest.raises(ValueError, match=r"w_in: expected shape \[G=1, I=4, H=4\], got \[1, 4, 3\]"):
            dc.grouped_mlp(x, w[..., :3], w, plan=plan)


def test_meta_tensors_give_meta_results():
    x, w = torch.randn(5, 4, device="meta"), torch.randn(1, 8, 4, device="meta")
    plan = dc.select(torch.ones(5, dtype=torch.bool, device="meta"))
    out = dc.grouped_mlp(x, w, w.transpose(1, 2), plan=plan, residual=x)
    assert out.device.type == "meta"
    assert out.shape == (5, 4)


@pytest.mark.slow
def test_more_than_two_to_the_31_elements():
    torch.utils.deterministic.fill_uninitialized_memory = False  # pages that nobody writes cost no memory
    rows, width = 70_000, 32_768
    x = torch.empty(rows, width, dtype=torch.bfloat16)
    assert x.numel() > 2**31
    chosen = torch.tensor([1, 65_000, rows - 1])
    x[chosen] = torch.randn(3, width).bfloat16()
    mask = torch.zeros(rows, dtype=torch.bool)
    mask[chosen] = True
    plan = dc.select(mask)
    assert torch.equal(dc.gather_rows(x, plan), x[chosen])
    weight = (torch.randn(1, 8, width) * width**-0.5).bfloat16().requires_grad_()
    x.requires_grad_()
    out = dc.grouped_linear(x, weight, plan=plan)
    want = x.detach()[chosen].float() @ weight.detach()[0].float().t()
    torch.testing.assert_close(out[chosen].float(), want, rtol=2e-2, atol=2e-2)
    assert not out[~mask].any()
    grad = torch.randn(out.shape).bfloat16()
    dx, dweight = torch.autograd.grad(out, [x, weight], grad)
    torch.testing.assert_close(dx[chosen].float(), grad[chosen].float() @ weight[0].float(), rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(
        dweight[0].float(), grad[chosen].float().t() @ x.detach()[chosen].float(), rtol=2e-2, atol=5e-2
    )
    assert not dx[2:64_999:1000].any()
