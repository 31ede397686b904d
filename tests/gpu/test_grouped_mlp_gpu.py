"""grouped_mlp on a CUDA device, forward and backward, through the public functions: `pytest -m gpu`."""

import pytest
import torch

import dyncore as dc
from tests.gpu.tools import DEVICE, DTYPES, captured, no_waiting, on_gpu, wide, with_scale
from tests.support import ACTIVATIONS, GATED, PLAN_KINDS, assert_gradients, assert_values, make_plan

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: PyTorch finds none"),
]

ODD, SMALL, DEEP = (63, 101), (64, 144), (2048, 1536)  # H, I
NAMES = ("x", "w_in", "w_out", "b_in", "b_out", "residual", "scale")


@pytest.fixture(autouse=True)
def sparse_execution():
    with dc.execution("sparse"):
        yield


def problem(plan, activation, dtype=torch.float32, sizes=SMALL):
    """x, w_in, w_out, b_in, b_out and residual on the CPU; pre-activations have unit scale."""
    (h, i), g = sizes, plan.num_groups
    width = 2 * i if activation in GATED else i
    x, residual = torch.randn(plan.num_rows, h), torch.randn(plan.num_rows, h)
    w_in, w_out = torch.randn(g, width, h) * h**-0.5, torch.randn(g, h, i) * i**-0.5
    return [t.to(dtype) for t in (x, w_in, w_out, torch.randn(g, width), torch.randn(g, h), residual)]


def run(tensors, plan, activation):
    *rest, residual = tensors
    return dc.grouped_mlp(*rest, plan=plan, activation=activation, residual=residual)


def check_step(p, plan, activation, dtype):
    """Values and every gradient against the float64 path, which is the reference's."""
    leaves = [t.requires_grad_() for t in on_gpu(p)]
    scale = plan.scale.detach().to(DEVICE).requires_grad_()
    out = run(leaves, with_scale(plan.to(DEVICE), scale), activation)
    exact = [t.requires_grad_() for t in wide(p)]
    exact_scale = plan.scale.detach().double().requires_grad_()
    want = run(exact, with_scale(plan, exact_scale), activation)
    assert_values(out.cpu(), want, dtype)
    grad = torch.randn(out.shape).to(dtype)
    got = torch.autograd.grad(out, [*leaves, scale], grad.to(DEVICE))
    grads = torch.autograd.grad(want, [*exact, exact_scale], grad.double())
    for name, g, w in zip(NAMES, got, grads, strict=True):
        assert_gradients(g.cpu(), w, dtype, name)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation(activation):
    plan = make_plan("routed", 150, 4, torch.float32)
    check_step(problem(plan, activation, torch.float16), plan, activation, torch.float16)


@pytest.mark.parametrize("sizes", [ODD, SMALL], ids=["odd", "small"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype(dtype, sizes):
    plan = make_plan("routed", 150, 4, torch.float32)
    check_step(problem(plan, "swiglu", dtype, sizes), plan, "swiglu", dtype)


@pytest.mark.parametrize("num_rows", [3, 150, 1500], ids=["few", "some", "many"])
@pytest.mark.parametrize("kind", PLAN_KINDS)
def test_every_kind_of_plan_and_tiling(kind, num_rows):
    plan = make_plan(kind, num_rows, 4, torch.float32)
    check_step(problem(plan, "swiglu", torch.bfloat16), plan, "swiglu", torch.bfloat16)


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_the_large_tiles(activation):
    plan = make_plan("routed", 300, 3, torch.float32)
    check_step(problem(plan, activation, torch.bfloat16, DEEP), plan, activation, torch.bfloat16)


def test_without_biases_scale_and_residual():
    plan = make_plan("padded", 200, 4, None)
    x, w_in, w_out, *_ = problem(plan, "swiglu")
    p = [x, w_in, w_out, None, None, None]
    assert_values(run(on_gpu(p), plan.to(DEVICE), "swiglu").cpu(), run(wide(p), plan, "swiglu"))


def test_unselected_rows_may_hold_nan():
    plan = make_plan("padded", 200, 4, torch.float32)
    p = problem(plan, "swiglu")
    idle = plan.row_offsets.diff() == 0
    assert idle.any()
    want = run(wide(p), plan, "swiglu")
    p[0][idle] = float("nan")
    leaves = [t.requires_grad_() for t in on_gpu(p)]
    out = run(leaves, plan.to(DEVICE), "swiglu")
    assert_values(out.cpu(), want)
    grad = torch.randn(out.shape)
    grad[idle] = float("nan")
    grads = torch.autograd.grad(out, leaves[:5], grad.to(DEVICE))
    assert all(g.isfinite().all() for g in grads)
    assert (grads[0].cpu()[idle] == 0).all()


def step(tensors, make):
    """One forward and backward; make() builds the plan anew."""
    out = run(tensors, make(), "swiglu")
    return out, *torch.autograd.grad(out, tensors, torch.ones_like(out))


def test_nothing_waits_for_the_device():
    mask, scale = torch.rand(200, device=DEVICE) < 0.3, torch.rand(200, device=DEVICE, requires_grad=True)
    expert, gate = torch.randint(-1, 6, (200, 2), device=DEVICE), torch.rand(200, 2, device=DEVICE)
    one = [t.requires_grad_() for t in on_gpu(problem(make_plan("all_rows", 200, 1, None), "swiglu"))]
    six = [t.requires_grad_() for t in on_gpu(problem(make_plan("all_rows", 200, 6, None), "swiglu"))]

    def everything():
        step(one, lambda: dc.select(mask, scale))
        step(six, lambda: dc.route(expert, gate, num_groups=6))

    everything()  # compiles
    with no_waiting():
        everything()


def test_a_cuda_graph_of_a_training_step_follows_the_mask():
    plan = make_plan("all_rows", 300, 1, None)
    p = problem(plan, "swiglu")
    mask, scale = torch.rand(300) < 0.5, torch.rand(300)
    mask_gpu, scale_gpu = mask.to(DEVICE), scale.to(DEVICE)
    leaves = [t.requires_grad_() for t in on_gpu(p)]
    graph, results = captured(lambda: step(leaves, lambda: dc.select(mask_gpu, scale_gpu)))
    for density in (0.0, 0.1, 0.7, 1.0):
        mask = torch.rand(300) < density
        mask_gpu.copy_(mask)
        graph.replay()
        plan = dc.select(mask, scale)
        exact = [t.requires_grad_() for t in wide(p)]
        want = run(exact, plan, "swiglu")
        grads = torch.autograd.grad(want.sum(), exact)
        assert_values(results[0].cpu(), want)
        for name, g, w in zip(NAMES, results[1:], grads, strict=False):
            assert_gradients(g.cpu(), w, torch.float32, name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forty_steps_give_the_same_bits(dtype):
    plan = make_plan("duplicates", 500, 5, torch.float32).to(DEVICE)
    leaves = [t.requires_grad_() for t in on_gpu(problem(plan, "swiglu", dtype))]
    first = step(leaves, lambda: plan)
    for _ in range(39):
        assert all(torch.equal(a, b) for a, b in zip(step(leaves, lambda: plan), first, strict=True))


def test_expanded_gradients_and_weights_by_columns():
    plan = make_plan("routed", 190, 3, torch.float32)
    p = problem(plan, "geglu")
    leaves = on_gpu(p)
    for at in (1, 2):
        leaves[at] = leaves[at].transpose(1, 2).contiguous().transpose(1, 2)
    leaves = [t.requires_grad_() for t in leaves]
    out = run(leaves, plan.to(DEVICE), "geglu")
    exact = [t.requires_grad_() for t in wide(p)]
    want = run(exact, plan, "geglu")
    assert_values(out.cpu(), want)
    got = torch.autograd.grad(out.sum(), leaves)
    for name, g, w in zip(NAMES, got, torch.autograd.grad(want.sum(), exact), strict=False):
        assert_gradients(g.cpu(), w, torch.float32, name)


def test_a_hidden_layer_of_more_than_2_to_the_31_elements():
    rows, h, i = 2**20 + 100, 64, 2064
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("needs 40 GiB of free device memory")
    mask = torch.ones(rows, dtype=torch.bool, device=DEVICE)
    x = torch.randn(rows, h, device=DEVICE).bfloat16().requires_grad_()
    w_in, w_out = torch.randn(1, 2 * i, h) * h**-0.5, torch.randn(1, h, i) * i**-0.5
    w_in, w_out = w_in.bfloat16(), w_out.bfloat16()
    out = dc.grouped_mlp(x, *on_gpu([w_in, w_out]), plan=dc.select(mask), activation="swiglu")
    (dx,) = torch.autograd.grad(out, [x], torch.ones_like(out))
    tail = x[-80:].detach().cpu().double().requires_grad_()
    plan = dc.select(torch.ones(80, dtype=torch.bool))
    want = dc.grouped_mlp(tail, w_in.double(), w_out.double(), plan=plan, activation="swiglu")
    assert_values(out[-80:].cpu(), want)
    assert_gradients(dx[-80:].cpu(), torch.autograd.grad(want.sum(), [tail])[0], torch.bfloat16)


@pytest.mark.parametrize("keep", [1500, 2000], ids=["some", "all"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_wide_group_of_known_size_equals_the_kernels(dtype, keep):
    x, scores = torch.randn(2000, 2048, device=DEVICE).to(dtype), torch.randn(1, 2000, device=DEVICE)
    w_in, w_out = (torch.randn(1, 2048, 2048, device=DEVICE).mul_(2048**-0.5).to(dtype) for _ in range(2))
    leaves = [t.requires_grad_() for t in (x, w_in, w_out)]

    def run(mode):
        with dc.execution(mode):
            out = dc.grouped_mlp(*leaves, plan=dc.select_topk(scores, keep))
        return out, *torch.autograd.grad(out, leaves, torch.ones_like(out))

    run("auto")  # compiles
    with no_waiting():
        got = run("auto")
    for name, g, w in zip(("out", *NAMES), got, run("sparse"), strict=False):
        assert_gradients(g, w, dtype, name)
