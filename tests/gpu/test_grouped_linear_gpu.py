"""Plans, grouped_linear and scatter_rows on a CUDA device, through the public functions: `pytest -m gpu`."""

import pytest
import torch

import dyncore as dc
from dyncore.backends import triton as backend
from tests.gpu.tools import DEVICE, DTYPES, captured, no_waiting, on_gpu, wide, with_scale
from tests.support import PLAN_KINDS, assert_gradients, assert_values, make_plan, oracle_linear

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: PyTorch finds none"),
]

FORMS = [(True, True), (True, False), (False, True), (False, False)]
FORM_NAMES = ["rows-rows", "rows-slots", "slots-rows", "slots-slots"]
ODD, SMALL, EVEN = (63, 101), (64, 144), (256, 512)  # K, N


@pytest.fixture(autouse=True)
def sparse_execution():
    with dc.execution("sparse"):
        yield


def problem(plan, gather=True, dtype=torch.float32, sizes=ODD):
    """x, weight and bias on the CPU; pre-activations have unit scale, where activations differ most."""
    k, n = sizes
    x = torch.randn(plan.num_rows if gather else plan.num_slots, k)
    weight = torch.randn(plan.num_groups, n, k) * k**-0.5
    return [t.to(dtype) for t in (x, weight, torch.randn(plan.num_groups, n))]


def wide_scale(plan):
    return None if plan.scale is None else plan.scale.detach().double()


def test_the_kernels_are_what_runs():
    assert backend.available, backend.reason


@pytest.mark.parametrize("sizes", [ODD, EVEN], ids=["odd", "even"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", [None, "relu", "relu2", "gelu", "gelu_tanh", "silu"])
def test_every_activation_and_dtype(activation, dtype, sizes):
    plan = make_plan("routed", 300, 5, torch.float32)
    p = problem(plan, dtype=dtype, sizes=sizes)
    x, weight, bias = on_gpu(p)
    out = dc.grouped_linear(x, weight, bias, plan=plan.to("cuda"), activation=activation)
    assert_values(out.cpu(), oracle_linear(*wide(p), plan, wide_scale(plan), activation, True, True))


@pytest.mark.parametrize("num_rows", [3, 150, 3000], ids=["few", "some", "many"])
@pytest.mark.parametrize("kind", PLAN_KINDS)
@pytest.mark.parametrize(("gather", "scatter"), FORMS, ids=FORM_NAMES)
def test_every_form_kind_of_plan_and_tiling(gather, scatter, kind, num_rows):
    plan = make_plan(kind, num_rows, 4, torch.float32)
    p = problem(plan, gather, torch.bfloat16, SMALL)
    x, weight, bias = on_gpu(p)
    out = dc.grouped_linear(x, weight, bias, plan=plan.to("cuda"), activation="silu", gather=gather, scatter=scatter)
    assert_values(out.cpu(), oracle_linear(*wide(p), plan, wide_scale(plan), "silu", gather, scatter))
    live = int(plan.offsets[-1])
    assert scatter or (out[live:] == 0).all()


def check_gradients(dtype, gather, scatter, activation, sizes):
    plan = make_plan("routed", 100, 4, torch.float32)
    p = problem(plan, gather, dtype, sizes)
    leaves = [t.requires_grad_() for t in on_gpu(p)]
    scale = plan.scale.detach().to(DEVICE).requires_grad_()
    form = {"activation": activation, "gather": gather, "scatter": scatter}
    out = dc.grouped_linear(*leaves, plan=with_scale(plan.to(DEVICE), scale), **form)
    grad = torch.randn(out.shape).to(dtype)
    inputs = [*leaves, scale] if scatter else leaves
    got = torch.autograd.grad(out, inputs, grad.to(DEVICE))

    oracle = [t.requires_grad_() for t in (*wide(p), wide_scale(plan))]
    want = oracle_linear(*oracle[:3], plan, oracle[3], activation, gather, scatter)
    want = torch.autograd.grad(want, oracle[: len(inputs)], grad.double())
    for name, g, w in zip(("x", "weight", "bias", "scale"), got, want, strict=False):
        assert_gradients(g.cpu(), w, dtype, name)


@pytest.mark.parametrize("activation", [None, "gelu"])
@pytest.mark.parametrize(("gather", "scatter"), FORMS, ids=FORM_NAMES)
def test_gradients_of_every_form(gather, scatter, activation):
    check_gradients(torch.bfloat16, gather, scatter, activation, EVEN)


@pytest.mark.parametrize("sizes", [ODD, EVEN], ids=["odd", "even"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_of_every_dtype(dtype, sizes):
    check_gradients(dtype, True, True, "gelu", sizes)


def test_plans_are_those_of_the_cpu():
    mask, scores = torch.rand(4, 50) < 0.3, torch.randn(4, 50)
    expert, weight = torch.randint(-1, 6, (80, 3)), torch.rand(80, 3)
    pairs = torch.rand(80, 6) < 0.4
    makers = {
        "select": lambda d: dc.select(mask.to(d), scores.to(d)),
        "select_topk": lambda d: dc.select_topk(scores.to(d), 7, scores.to(d)),
        "route": lambda d: dc.route(expert.to(d), weight.to(d), num_groups=6),
        "route_mask": lambda d: dc.route_mask(pairs.to(d), torch.rand(80, 6, generator=seeded()).to(d)),
    }
    for name, make in makers.items():
        want, got = make("cpu"), make("cuda").to("cpu")
        live = int(want.offsets[-1])
        assert torch.equal(got.offsets, want.offsets), name
        assert torch.equal(got.row_offsets, want.row_offsets), name
        for field in ("rows", "scale", "row_slots"):
            assert torch.equal(getattr(got, field)[:live], getattr(want, field)[:live]), f"{name}.{field}"


def seeded():
    return torch.Generator().manual_seed(5)


def test_nothing_waits_for_the_device():
    x, weight = torch.randn(4, 50, 64, device="cuda"), torch.randn(6, 32, 64, device="cuda")
    mask, scores = torch.rand(4, 50, device="cuda") < 0.3, torch.randn(4, 50, device="cuda")
    expert, gate = torch.randint(-1, 6, (200, 2), device="cuda"), torch.rand(200, 2, device="cuda")
    pairs = torch.rand(200, 6, device="cuda") < 0.3

    def everything():
        for plan in (dc.select(mask, scores), dc.select_topk(scores, 7)):
            dc.grouped_linear(x, weight[:1], plan=plan, activation="relu")
        for plan in (dc.route(expert, gate, num_groups=6), dc.route_mask(pairs, max_slots=500)):
            y = dc.grouped_linear(x, weight, plan=plan, scatter=False)
            dc.scatter_rows(y, plan, torch.ones(200, 32, device="cuda"))

    everything()  # compiles
    with no_waiting():
        everything()


def test_a_cuda_graph_follows_the_mask():
    torch.manual_seed(1)
    x, weight = torch.randn(500, 64), torch.randn(1, 96, 64)
    mask, scale = torch.rand(500) < 0.5, torch.rand(500)
    x_gpu, weight_gpu, mask_gpu, scale_gpu = on_gpu((x, weight, mask, scale))

    def run():
        return dc.grouped_linear(x_gpu, weight_gpu, plan=dc.select(mask_gpu, scale_gpu), activation="gelu")

    graph, out = captured(run)
    for density in (0.0, 0.1, 0.7, 1.0):
        mask = torch.rand(500) < density
        mask_gpu.copy_(mask)
        graph.replay()
        plan = dc.select(mask, scale)
        want = oracle_linear(x.double(), weight.double(), None, plan, plan.scale.double(), "gelu", True, True)
        assert_values(out.cpu(), want)
        assert (out.cpu()[~mask] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forty_runs_give_the_same_bits(dtype):
    plan = make_plan("duplicates", 700, 5, torch.float32).to("cuda")
    x, weight, bias = on_gpu(problem(plan, dtype=dtype))
    first = dc.grouped_linear(x, weight, bias, plan=plan, activation="gelu")
    for _ in range(39):
        assert torch.equal(dc.grouped_linear(x, weight, bias, plan=plan, activation="gelu"), first)


def test_unselected_rows_may_hold_nan():
    plan = make_plan("padded", 200, 4, torch.float32)
    p = problem(plan)
    p[0][plan.row_offsets.diff() == 0] = float("nan")
    assert p[0].isnan().any()
    x, weight, bias = on_gpu(p)
    out = dc.grouped_linear(x, weight, bias, plan=plan.to("cuda"))
    assert_values(out.cpu(), oracle_linear(*wide(p), plan, wide_scale(plan), None, True, True))


def test_tf32_is_used_when_torch_allows_it_and_only_then():
    plan = make_plan("all_rows", 300, 2, None)
    p = problem(plan, sizes=EVEN)
    want = oracle_linear(*wide(p), plan, None, None, True, True)
    x, weight, bias = on_gpu(p)

    def error():
        out = dc.grouped_linear(x, weight, bias, plan=plan.to("cuda"))
        return float((out.cpu() - want).square().mean().sqrt() / want.square().mean().sqrt())

    before = torch.backends.cuda.matmul.fp32_precision
    try:
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        assert 5e-5 < error() < 2e-3
        torch.backends.cuda.matmul.fp32_precision = "ieee"
        assert error() < 2e-6
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def test_any_strides():
    plan = make_plan("routed", 190, 3, torch.float32)
    p = problem(plan, sizes=(64, 48))
    x, weight, bias = on_gpu(p)
    want = oracle_linear(*wide(p), plan, wide_scale(plan), None, True, True)
    moved = plan.to("cuda")
    by_columns = weight.transpose(1, 2).contiguous().transpose(1, 2)
    apart = torch.cat([x, x.flip(1)], 1)[:, :64]
    shifted = torch.cat([x.new_zeros(1), x.reshape(-1)])[1:].view_as(x)  # 4 bytes off
    for a, w in ((x.t().contiguous().t(), weight), (x, by_columns), (apart, weight), (shifted, weight)):
        assert_values(dc.grouped_linear(a, w, bias, plan=moved).cpu(), want)


def test_compiled_in_one_graph():
    mask, x, weight = torch.rand(200) < 0.4, torch.randn(200, 64), torch.randn(1, 48, 64)
    plan = dc.select(mask)

    @torch.compile(fullgraph=True)
    def compiled(mask, x, weight):
        return dc.grouped_linear(x, weight, plan=dc.select(mask), activation="silu")

    out = compiled(*on_gpu((mask, x, weight)))
    assert_values(out.cpu(), oracle_linear(x.double(), weight.double(), None, plan, None, "silu", True, True))


def test_more_than_2_to_the_31_elements():
    rows, k = 2**20 + 100, 2064
    if torch.cuda.mem_get_info()[0] < 16 * 2**30:
        pytest.skip("needs 16 GiB of free device memory")
    x = torch.empty(rows, k, dtype=torch.bfloat16, device="cuda")
    tail = torch.randn(80, k).to(torch.bfloat16)
    x[-80:] = tail.cuda()
    weight = torch.randn(1, 64, k).to(torch.bfloat16)
    mask = torch.zeros(rows, dtype=torch.bool, device="cuda")
    mask[-80:] = True
    out = dc.grouped_linear(x, weight.cuda(), plan=dc.select(mask))
    assert_values(out[-80:].cpu(), tail.double() @ weight[0].double().t())
    assert (out[:-80] == 0).all()


def test_the_device_of_the_tensors_counts_not_the_current_one():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    plan = make_plan("routed", 60, 3, torch.float32)
    p = problem(plan)
    x, weight, bias = (t.to("cuda:1") for t in p)
    with torch.cuda.device(0):
        out = dc.grouped_linear(x, weight, bias, plan=plan.to("cuda:1"))
    assert_values(out.cpu(), oracle_linear(*wide(p), plan, wide_scale(plan), None, True, True))


def test_a_bad_plan_is_an_error_when_checks_are_asked_for(monkeypatch):
    plan = make_plan("routed", 60, 3, None)
    x, weight, bias = on_gpu(problem(plan))
    rows = plan.rows.clone()
    rows[5] = 60
    bad = dc.Plan(rows, plan.offsets, None, 60, plan.row_offsets, plan.row_slots).to("cuda")
    monkeypatch.setenv("DYNCORE_CHECK", "1")
    with pytest.raises(IndexError, match=r"plan\.rows: expected rows in \[0, 60\)"):
        dc.grouped_linear(x, weight, bias, plan=bad)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [64, 100])
def test_few_rows_of_one_narrow_group_in_pieces_of_their_depth(n, dtype):
    plan = make_plan("selected", 12, 1, torch.float32)
    p = problem(plan, dtype=dtype, sizes=(8192, n))
    on_device, run = plan.to("cuda"), on_gpu(p)
    out, again = (dc.grouped_linear(*run, plan=on_device, activation="gelu") for _ in range(2))
    assert torch.equal(out, again)
    assert_values(out.cpu(), oracle_linear(*wide(p), plan, wide_scale(plan), "gelu", True, True))
