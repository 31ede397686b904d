"""Making plans and moving rows on a CUDA device, against the reference on the CPU: `pytest -m gpu`."""

import contextlib

import pytest
import torch

import dyncore as dc
from dyncore.backends import cuda, reference
from tests.support import PLAN_KINDS, assert_gradients, assert_values, make_plan

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: PyTorch finds none"),
]

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NAMES = ("rows", "offsets", "row_offsets", "row_slots", "sources")


@pytest.fixture(autouse=True)
def sparse_execution():
    with dc.execution("sparse"):
        yield


@contextlib.contextmanager
def no_waiting():
    """Any wait of the host for the device is an error."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def assert_same_lists(got, want):
    for name, g, w in zip(NAMES, got, want, strict=False):
        assert torch.equal(g.cpu(), w), name


def test_the_kernels_are_what_runs():
    assert cuda.available, cuda.reason


@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(
    "shape", [(0,), (1,), (1000,), (100_000,), (16384, 6), (5000, 64), (700, 1000), (3, 1024)], ids=str
)
def test_plan_mask(shape, density):
    mask = torch.rand(shape) < density
    for capacity in (mask.numel(), mask.numel() + 3, int(mask.sum())):
        want = reference.plan_mask_sources(mask, capacity)
        assert_same_lists(torch.ops.dyncore.plan_mask(mask.cuda(), capacity), want[:4])
        assert_same_lists(torch.ops.dyncore.plan_mask_sources(mask.cuda(), capacity), want)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize(
    ("num_rows", "k", "groups"),
    [(1, 8, 64), (64, 8, 64), (16384, 8, 64), (50_000, 1, 1000), (200_000, 2, 8), (9, 300, 4)],
)
def test_plan_route(num_rows, k, groups, dtype):
    expert = torch.randint(-2, groups, (num_rows, k), dtype=dtype)
    want = reference.plan_route(expert, groups, expert.numel())
    assert_same_lists(torch.ops.dyncore.plan_route(expert.cuda(), groups, expert.numel()), want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("batch", "seq", "k"), [(4, 4096, 1024), (3, 100, 0), (3, 100, 100), (1, 50_000, 7), (300, 33, 5)]
)
def test_plan_topk(batch, seq, k, dtype):
    scores = torch.randn(batch, seq).to(dtype)
    scores[:, 1::7] = scores[:, :1]  # ties
    scores[0, 5 % seq] = float("nan")
    scores[0, 6 % seq] = -0.0
    assert_same_lists(torch.ops.dyncore.plan_topk(scores.cuda(), k), reference.plan_topk(scores, k))


@pytest.mark.parametrize("num_rows", [5, 1000, 70_000, 2_000_000])
def test_plan_inverse(num_rows):
    plan = dc.route(torch.randint(-1, 6, (min(num_rows, 70_000), 2)), num_groups=6)
    got = dc.Plan.from_slots(plan.rows.cuda(), plan.offsets.cuda(), num_rows=num_rows)
    want = dc.Plan.from_slots(plan.rows, plan.offsets, num_rows=num_rows)
    assert_same_lists(
        (got.rows, got.offsets, got.row_offsets, got.row_slots),
        (want.rows, want.offsets, want.row_offsets, want.row_slots),
    )


@pytest.mark.parametrize("width", [1, 63, 64, 4096])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", PLAN_KINDS)
def test_rows_move_and_so_do_their_gradients(kind, dtype, width):
    plan = make_plan(kind, 150, 4, torch.float32)
    x, base = torch.randn(150, width).to(dtype), torch.randn(150, width).to(dtype)
    grad = torch.randn(150, width).to(dtype)

    def run(device, wide):
        moved = plan.to(device)
        leaves = [t.to(device, torch.float64 if wide else dtype).requires_grad_() for t in (x, base)]
        scale = moved.scale.detach().to(torch.float64 if wide else torch.float32).requires_grad_()
        moved = dc.Plan(moved.rows, moved.offsets, scale, 150, moved.row_offsets, moved.row_slots, moved.exact)
        y = dc.gather_rows(leaves[0], moved)
        out = dc.scatter_rows(y, moved, leaves[1])
        return y, out, torch.autograd.grad(out, [*leaves, scale], grad.to(out))

    got, want = run("cuda", False), run("cpu", True)
    live = int(plan.offsets[-1])
    assert torch.equal(got[0][:live].cpu(), x[plan.rows[:live].long()])
    assert (got[0][live:] == 0).all()
    assert_values(got[1].cpu(), want[1])
    for name, g, w in zip(("x", "base", "scale"), got[2], want[2], strict=True):
        assert_gradients(g.cpu(), w, dtype, name)


def test_any_strides():
    plan = make_plan("routed", 190, 3, torch.float32)
    x = torch.randn(190, 64)
    moved, here = plan.to("cuda"), x.cuda()
    apart = torch.cat([here, here], 1)[:, :64]
    shifted = torch.cat([here.new_zeros(1), here.reshape(-1)])[1:].view_as(here)  # 4 bytes off
    for t in (here, here.t().contiguous().t(), apart, shifted, here[:1].expand(190, 64)):
        want = dc.gather_rows(t.cpu(), plan)
        assert torch.equal(dc.gather_rows(t, moved).cpu(), want)
        assert_values(dc.scatter_rows(dc.gather_rows(t, moved), moved, t).cpu(), dc.scatter_rows(want, plan, t.cpu()))


def makers():
    """Everything that makes a plan, as functions of inputs that may change."""
    mask, scores = torch.rand(4, 50, device="cuda") < 0.3, torch.randn(4, 50, device="cuda")
    expert, pairs = torch.randint(-1, 6, (2000, 2), device="cuda"), torch.rand(2000, 6, device="cuda") < 0.3
    plan = dc.route(expert, num_groups=6)
    logits = torch.randn(2000, 6, device="cuda")
    inputs = {"logits": logits, "mask": mask, "scores": scores, "expert": expert, "pairs": pairs}
    calls = {
        "select": lambda: dc.select(mask, scores),
        "select_topk": lambda: dc.select_topk(scores, 7, scores),
        "route": lambda: dc.route(expert, num_groups=6),
        "route_topk": lambda: dc.route_topk(logits, 2, normalize=True),
        "route_mask": lambda: dc.route_mask(pairs, max_slots=12_000),
        "from_slots": lambda: dc.Plan.from_slots(plan.rows, plan.offsets, num_rows=2000),
    }
    return inputs, calls


def lists_of(plan):
    return plan.rows, plan.offsets, plan.row_offsets, plan.row_slots


def test_nothing_waits_for_the_device():
    _, calls = makers()
    x = torch.randn(2000, 64, device="cuda", requires_grad=True)

    def everything():
        for call in calls.values():
            plan = call()
            rows = x[: plan.num_rows]
            dc.scatter_rows(dc.gather_rows(rows, plan), plan, rows).sum().backward()

    everything()  # loads the kernels
    with no_waiting():
        everything()


@pytest.mark.parametrize("name", ["select", "select_topk", "route", "route_topk", "route_mask"])
def test_a_cuda_graph_follows_its_inputs(name):
    inputs, calls = makers()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        calls[name]()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = calls[name]()
    for density in (0.0, 0.5, 1.0):
        inputs["mask"].copy_(torch.rand(4, 50) < density)
        inputs["pairs"].copy_(torch.rand(2000, 6) < density)
        inputs["scores"].normal_()
        inputs["logits"].normal_()
        inputs["expert"].random_(-1, 6)
        graph.replay()
        assert_same_lists([t.clone() for t in lists_of(captured)], [t.cpu() for t in lists_of(calls[name]())])


def test_forty_runs_give_the_same_bits():
    plan = make_plan("duplicates", 700, 5, torch.float32).to("cuda")
    y, grad = torch.randn(plan.num_slots, 200, device="cuda"), torch.randn(700, 200, device="cuda")
    scale = plan.scale.detach()
    lists = (plan.rows, plan.offsets, scale, plan.row_offsets, plan.row_slots)

    def run():
        forward = torch.ops.dyncore.scatter_rows(y, None, *lists)
        return [forward, *torch.ops.dyncore.scatter_rows_backward(grad, y, *lists, [True, True])]

    first = run()
    for _ in range(39):
        assert all(torch.equal(a, b) for a, b in zip(run(), first, strict=True))


def test_two_streams_do_not_disturb_each_other():
    masks = [torch.rand(300_000, device="cuda") < d for d in (0.2, 0.8)]
    want = [[t.clone() for t in lists_of(dc.select(m))] for m in masks]
    streams = [torch.cuda.Stream() for _ in masks]
    torch.cuda.synchronize()
    plans = []
    for _ in range(20):
        for mask, stream in zip(masks, streams, strict=True):
            with torch.cuda.stream(stream):
                plans.append(dc.select(mask))
    torch.cuda.synchronize()
    for i, plan in enumerate(plans):
        assert_same_lists(lists_of(plan), [t.cpu() for t in want[i % 2]])


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_the_tensors_device_is_used_and_the_current_one_kept():
    mask = torch.rand(5000) < 0.5
    with torch.cuda.device(0):
        plan = dc.select(mask.to("cuda:1"))
        assert torch.cuda.current_device() == 0
    assert plan.rows.device.index == 1
    assert_same_lists(lists_of(plan), torch.ops.dyncore.plan_mask(mask, 5000))
    with pytest.raises(ValueError, match="on one device"):
        torch.ops.dyncore.gather_rows(torch.randn(5000, 4, device="cuda:0"), plan.rows, plan.offsets)


def test_checks_name_the_argument(monkeypatch):
    monkeypatch.setenv("DYNCORE_CHECK", "1")
    with pytest.raises(IndexError, match="expert: expected indices below num_groups=4, got 4"):
        dc.route(torch.full((2, 2), 4, device="cuda"), num_groups=4)
    with pytest.raises(ValueError, match="max_slots"):
        dc.route_mask(torch.ones(3, 3, dtype=torch.bool, device="cuda"), max_slots=8)


def test_slots_past_the_bound_are_dropped():
    pairs = torch.rand(3000, 8) < 0.5
    kept = dc.route_mask(pairs.cuda(), max_slots=5000)
    whole = dc.route_mask(pairs)
    assert int(kept.offsets[-1]) == 5000
    assert torch.equal(kept.rows.cpu(), whole.rows[:5000])
    assert int(kept.row_offsets[-1]) == 5000
    of_rows = torch.repeat_interleave(torch.arange(3000), kept.row_offsets.cpu().diff())
    assert torch.equal(kept.rows.cpu()[kept.row_slots.cpu().long()].long(), of_rows)


def test_more_than_2_to_the_31_elements():
    rows, width = 2**20 + 100, 2064
    if torch.cuda.mem_get_info()[0] < 20 * 2**30:
        pytest.skip("needs 20 GiB of free device memory")
    x = torch.empty(rows, width, dtype=torch.bfloat16, device="cuda")
    tail = torch.randn(80, width).to(torch.bfloat16)
    x[-80:] = tail.cuda()
    mask = torch.zeros(rows, dtype=torch.bool, device="cuda")
    mask[-80:] = True
    plan = dc.select(mask)
    slots = torch.ops.dyncore.gather_rows(x, plan.rows[:80], plan.offsets)
    assert torch.equal(slots.cpu(), tail)
    back = torch.ops.dyncore.scatter_rows(
        slots, None, plan.rows[:80], plan.offsets, None, plan.row_offsets, plan.row_slots[:80]
    )
    assert torch.equal(back[-80:].cpu(), tail)
    assert not back[:-80].any()
