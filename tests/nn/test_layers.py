"""What holds for every layer: the same in each mode, true skipping, compile, copies, autocast, odd and empty sizes."""

import copy
import pickle
import weakref

import pytest
import torch
import torch.utils.checkpoint

import dyncore as dc
from tests.nn.oracle import LAYERS, D, flops, run
from tests.support import assert_gradients, assert_values


@pytest.fixture(params=LAYERS)
def build(request):
    return LAYERS[request.param]


def same(a, b, dtype=torch.float64):
    assert_values(a.out, b.out, dtype)
    assert a.grads.keys() == b.grads.keys()
    for name, grad in a.grads.items():
        assert (grad is None) == (b.grads[name] is None), name
        if grad is not None:
            assert_gradients(grad, b.grads[name], dtype, name)


@pytest.mark.parametrize("shape", [(3, 13), (1, 63), (2, 1)], ids=str)
def test_sparse_equals_masked_in_values_and_gradients(build, shape):
    layer = build().double()
    x = torch.randn(*shape, D, dtype=torch.float64)
    same(run(layer, x, "sparse"), run(layer, x, "masked"))


def test_sparse_equals_masked_with_the_kernels(build):
    layer = build()
    x = torch.randn(3, 13, D)
    assert_values(run(layer, x, "sparse").out, run(layer, x, "masked").out)
    assert_gradients(run(layer, x, "sparse").grads["x"], run(layer, x, "masked").grads["x"], torch.float32)


def test_auto_equals_sparse(build):
    layer = build().double()
    x = torch.randn(3, 13, D, dtype=torch.float64)
    same(run(layer, x, "auto"), run(layer, x, "sparse"))


def test_fewer_flops_than_masked(build):
    layer, x = build(), torch.randn(3, 13, D)
    sparse, masked = flops(lambda: layer(x)), flops(lambda: layer(x), "masked")
    assert 0 < sparse < 0.8 * masked


def test_every_parameter_gets_a_gradient(build):
    layer = build()
    grads = run(layer, torch.randn(3, 13, D)).grads
    for name, grad in grads.items():
        if grad is None:  # a router that learns by a loss of its own
            assert name.startswith("router.")
            assert "router_regression" in layer.losses()
            continue
        assert grad.abs().sum() > 0, name


def test_compiles_into_one_graph_with_the_same_result(build):
    layer, x = build().double(), torch.randn(3, 13, D, dtype=torch.float64)
    eager = run(layer, x, "sparse")
    cost = layer.last_cost.detach()
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    run(compiled, torch.randn_like(x), "sparse")
    with torch._dynamo.config.patch(error_on_recompile=True):  # for another mask, least of all
        got = run(compiled, x, "sparse")
    assert_values(got.out, eager.out)
    for name, grad in eager.grads.items():
        other = got.grads["x" if name == "x" else f"_orig_mod.{name}"]
        assert (other is None) == (grad is None), name
        if grad is not None:
            assert_gradients(other, grad, torch.float64, name)
    assert torch.equal(layer.last_cost.detach(), cost)


def test_exports_without_leaving_a_trace(build):
    layer, x = build(), torch.randn(3, 13, D)
    exported = torch.export.export(layer, (x,)).module()
    assert layer.last_plan is None
    assert layer.last_cost is None
    assert layer.losses() == {}
    assert_values(exported(x), layer(x))


# one of each module, gate and choice of keys; how their results are returned and weighted depends on no length
@pytest.mark.parametrize(
    "name", ["skip", "skip_topk", "mod", "token_skip", "token_skip_topk", "moe", "moe_expert_choice"]
)
def test_one_compiled_graph_serves_every_length(name):
    layer = LAYERS[name]()
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    for shape in ((3, 13), (2, 9), (5, 31)):
        x = torch.randn(*shape, D)
        with torch._dynamo.config.patch(error_on_recompile=shape != (3, 13)):
            assert_values(compiled(x), layer(x))


def test_checkpointing_gives_the_same_gradients(build):
    layer, x = build(), torch.randn(3, 13, D, requires_grad=True)
    (want,) = torch.autograd.grad(layer(x).sum(), x)
    (got,) = torch.autograd.grad(torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False).sum(), x)
    assert torch.equal(got, want)


def test_copies_pickles_and_loads_after_a_forward(build):
    layer, x = build(), torch.randn(2, 9, D)
    want = run(layer, x).out
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert twin.last_plan is None
        assert twin.last_cost is None
        assert torch.equal(run(twin, x).out, want)
    fresh = build()
    fresh.load_state_dict(layer.state_dict(), strict=True)
    assert torch.equal(run(fresh, x).out, want)
    assert layer.state_dict().keys() == dict(fresh.state_dict()).keys()


def test_autocast_stays_near_float32(build):
    layer, x = build(), torch.randn(3, 13, D)
    want = run(layer, x).out
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = run(layer, x)
    assert (got.out.float() - want).square().mean().sqrt() < 2e-2 * want.square().mean().sqrt()
    assert got.grads["x"].dtype == torch.float32


def test_works_in_bfloat16(build):
    layer, x = build().bfloat16(), torch.randn(3, 13, D).bfloat16()
    twin = copy.deepcopy(layer).double()
    got, want = run(layer, x), run(twin, x.double())
    assert got.out.dtype == torch.bfloat16
    assert torch.equal(layer.last_cost.float(), twin.last_cost.float())  # routers are in float32: no choice moves
    assert (got.out.double() - want.out).square().mean().sqrt() < 2e-2 * want.out.square().mean().sqrt()


@pytest.mark.parametrize("shape", [(0, 5), (2, 0)], ids=str)
@pytest.mark.parametrize("mode", ["sparse", "masked", "auto"])
def test_no_rows_at_all(build, shape, mode):
    layer = build()
    got = run(layer, torch.randn(*shape, D), mode)
    assert got.out.shape == (*shape, D)
    assert layer.last_cost.shape == shape
    for name, grad in got.grads.items():
        assert grad is None or not grad.any(), name
    for name, loss in layer.losses().items():
        assert torch.isfinite(loss), name


def test_cost_is_the_density_of_the_plan(build):
    layer = build()
    run(layer, torch.randn(3, 13, D))
    plan, cost = layer.last_plan, layer.last_cost.detach()
    assert cost.shape == (3, 13)
    density = int(plan.offsets[-1]) / (plan.num_rows * plan.num_groups)
    assert float(cost.mean()) == pytest.approx(density, rel=1e-6)
    per_row = (plan.row_offsets[1:] - plan.row_offsets[:-1]).view(3, 13) / plan.num_groups
    torch.testing.assert_close(cost, per_row.to(cost.dtype))


def test_cost_is_that_of_the_latest_forward_in_the_gradient_mode_of_it(build):
    layer, x = build(), torch.randn(3, 13, D)
    run(layer, x)
    want = layer.last_cost
    with torch.no_grad():
        assert layer.last_cost.requires_grad == want.requires_grad
    with torch.inference_mode():
        assert layer.last_cost.requires_grad == want.requires_grad
        assert not layer.last_cost.is_inference()
    with torch.no_grad():
        layer(x)
    assert not layer.last_cost.requires_grad
    assert torch.equal(layer.last_cost, want.detach())
    with torch.inference_mode():
        layer(x)
    assert torch.equal(layer.last_cost, want.detach())
    layer(-x)
    assert torch.equal(layer.last_plan.row_offsets.diff() > 0, layer.last_cost.flatten() > 0)


def test_a_layer_keeps_no_row_of_its_input(build):
    layer, x = build(), torch.randn(3, 13, D)
    with torch.no_grad():
        layer(x)
    gone = weakref.ref(x)
    del x
    assert gone() is None


def test_forty_repeats_are_bit_identical(build):
    layer, x = build(), torch.randn(3, 13, D)
    first = run(layer, x)
    for _ in range(40):
        again = run(layer, x)
        assert torch.equal(again.out, first.out)
        assert all(torch.equal(again.grads[name], grad) for name, grad in first.grads.items() if grad is not None)


def test_losses_and_costs_are_collected_by_layer_name():
    model = torch.nn.Sequential(LAYERS["moe"](), torch.nn.Linear(D, D), LAYERS["skip"]())
    model(torch.randn(2, 5, D))
    assert set(dc.nn.collect_losses(model)) == {"0.load_balance", "0.router_z"}
    costs = dc.nn.collect_costs(model)
    assert set(costs) == {"0", "2"}
    assert all(c.shape == (2, 5) for c in costs.values())
