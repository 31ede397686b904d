"""compact and expand: rows of several tensors of any shape and dtype, exactly, and their gradients."""

import pytest
import torch

import dyncore as dc

PLANS = ("some", "none", "all", "padded", "topk", "full")
T = 11


def make(kind):
    """(plan, its rows)"""
    mask = {"none": torch.zeros(T), "all": torch.ones(T)}.get(kind, torch.rand(T)) > 0.5
    if kind in ("topk", "full"):
        plan = dc.select_topk(torch.rand(1, T), T if kind == "full" else 4)
    elif kind == "padded":  # static buffers, as an accelerator has them
        tensors = torch.ops.dyncore.plan_mask(mask, T)
        tensors[0][int(mask.sum()) :] = 2**30
        plan = dc.Plan(tensors[0], tensors[1], torch.full((T,), 3.0), T, tensors[2], tensors[3])
    else:
        plan = dc.select(mask, torch.full((T,), 3.0))
    return plan, plan.rows[: int(plan.offsets[-1])].long()


def tree(rows, dtype=torch.float32):
    return {
        "images": torch.randn(rows, 3, 4, 5).to(dtype),
        "last": torch.randn(rows, 3, 4, 5).to(dtype).to(memory_format=torch.channels_last),
        "parts": (torch.randn(rows).to(dtype), torch.randn(rows, 7).double(), torch.randn(2, rows, 3).transpose(0, 1)),
        "labels": torch.randint(9, (rows,)),
        "seen": [torch.rand(rows, 2, 2) > 0.5, torch.randint(200, (rows, 3)).to(torch.uint8), None, "name"],
        "empty": torch.randn(rows, 0, 3),
    }


def tensors(t):
    return [leaf for leaf in torch.utils._pytree.tree_leaves(t) if isinstance(leaf, torch.Tensor)]


@pytest.mark.parametrize("kind", PLANS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_compact_takes_the_rows_of_every_tensor(kind, dtype):
    plan, rows = make(kind)
    x = tree(T, dtype)
    out = dc.compact(x, plan)
    assert list(out) == list(x)
    assert out["seen"][2:] == [None, "name"]
    for got, want in zip(tensors(out), tensors(x), strict=True):
        assert got.dtype == want.dtype
        assert got.shape == (plan.num_slots, *want.shape[1:])
        assert torch.equal(got[: len(rows)], want[rows])
        assert not got[len(rows) :].any()


@pytest.mark.parametrize("kind", PLANS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
def test_expand_puts_them_back_and_leaves_the_others_exactly_as_they_are(kind, dtype):
    plan, rows = make(kind)
    y, base = tree(plan.num_slots, dtype), tree(T, dtype)
    for t in tensors(base):
        if t.is_floating_point():
            t[:] = torch.nan
    for t in tensors(y):
        if t.is_floating_point():
            t[len(rows) :] = torch.nan  # padding is never read
    for below in (None, base):
        out = dc.expand(y, plan, below)
        rests = [None] * len(tensors(y)) if below is None else tensors(base)
        for got, part, rest in zip(tensors(out), tensors(y), rests, strict=True):
            want = torch.zeros(T, *part.shape[1:], dtype=part.dtype) if rest is None else rest.clone()
            want[rows] = part[: len(rows)]
            assert got.dtype == part.dtype
            assert torch.equal(got.double().nan_to_num(7), want.double().nan_to_num(7))


@pytest.mark.parametrize("kind", PLANS)
def test_gradients_are_those_of_moving_rows(kind):
    plan, rows = make(kind)
    x = torch.randn(T, 2, 3, dtype=torch.double, requires_grad=True)
    z = torch.randn(T, dtype=torch.double, requires_grad=True)
    base = torch.randn(T, 2, 3, dtype=torch.double, requires_grad=True)

    def run(x, z, base):
        a, b = dc.compact((x, z), plan)
        return dc.expand((a.sin() * b[:, None, None]), plan, base), dc.expand(b.cos(), plan)

    def want(x, z, base):
        a, b = x[rows], z[rows]
        return base.index_copy(0, rows, a.sin() * b[:, None, None]), torch.zeros_like(z).index_copy(0, rows, b.cos())

    for got, expected in zip(run(x, z, base), want(x, z, base), strict=True):
        torch.testing.assert_close(got, expected)
    assert torch.autograd.gradcheck(run, (x, z, base))


@pytest.mark.parametrize("kind", PLANS)
def test_nan_outside_the_plan_harms_no_gradient(kind):
    plan, rows = make(kind)
    dead = torch.ones(T, dtype=torch.bool).index_fill(0, rows, False)
    x = torch.randn(T, 6).masked_fill(dead[:, None], torch.nan).requires_grad_()
    weight = torch.randn(6, 6, requires_grad=True)
    out = dc.expand(dc.compact(x, plan) @ weight, plan, x)
    dx, dw = torch.autograd.grad(out[rows].sum(), [x, weight])
    assert torch.isfinite(dx).all()
    assert torch.isfinite(dw).all()
    assert not dx[dead].any()


@pytest.mark.parametrize("kind", ["some", "padded"])
@pytest.mark.parametrize("shape", [(3, 4, 5), (2, 3, 4, 5)], ids=str)
def test_order_in_memory_is_kept(shape, kind):
    plan, _ = make(kind)
    form = torch.channels_last if len(shape) == 3 else torch.channels_last_3d
    x = torch.randn(T, *shape).to(memory_format=form)
    live = dc.compact(x, plan)
    assert live.is_contiguous(memory_format=form)
    assert dc.expand(live, plan, x).is_contiguous(memory_format=form)
    assert dc.expand(live, plan).is_contiguous(memory_format=form)


def test_leaves_of_base_may_be_missing():
    plan, _ = make("some")
    y, base = torch.randn(plan.num_slots, 2), torch.randn(T, 2)
    first, second = dc.expand((y, y), plan, (base, None))
    assert torch.equal(first, dc.expand(y, plan, base))
    assert torch.equal(second, dc.expand(y, plan))


def test_nothing_is_moved_where_the_plan_is_full():
    plan, x = dc.select_topk(torch.rand(1, T), T), torch.randn(T, 3)
    assert dc.compact(x, plan) is x
    assert dc.expand([x], plan, [x + 1])[0] is x


def test_moving_rows_executes_no_flops():
    plan, _ = make("some")
    assert dc.measure.flops(lambda: dc.expand(dc.compact(tree(T), plan), plan)) == 0


def test_no_rows_at_all():
    plan = dc.select(torch.zeros(0, dtype=torch.bool))
    x = {"a": torch.zeros(0, 3, 4), "b": torch.zeros(0, dtype=torch.long)}
    for out in (dc.compact(x, plan), dc.expand(x, plan), dc.expand(x, plan, x)):
        assert [t.shape for t in out.values()] == [(0, 3, 4), (0,)]


def test_one_compiled_graph_serves_every_mask():
    def run(x, labels, mask):
        plan = dc.select(mask)
        live = dc.compact({"x": x, "labels": labels}, plan)
        return dc.expand({"x": live["x"].sin(), "labels": live["labels"] + 1}, plan, {"x": x, "labels": labels})

    x, labels = torch.randn(T, 3, 4, requires_grad=True), torch.randint(9, (T,))
    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for density in (0.5, 0.0, 1.0):
        mask = torch.rand(T) < density
        with torch._dynamo.config.patch(error_on_recompile=density != 0.5):
            got = compiled(x, labels, mask)
        want = run(x, labels, mask)
        assert torch.equal(got["x"], want["x"])
        assert torch.equal(got["labels"], want["labels"])
        (a,), (b,) = (torch.autograd.grad(out["x"].square().sum(), x) for out in (got, want))
        torch.testing.assert_close(a, b)


ONE, TWO = dc.select(torch.arange(T) < 4), dc.route(torch.zeros(T, 1, dtype=torch.long), num_groups=2)
X, Y = torch.zeros(T, 3), torch.zeros(4, 3)
BAD_CALLS = [
    (lambda: dc.compact(X, TWO), ValueError, "plan: expected one group, got 2"),
    (lambda: dc.expand(X, TWO), ValueError, "plan: expected one group, got 2"),
    (lambda: dc.compact(X, ONE.rows), TypeError, "plan: expected a dyncore.Plan, got Tensor"),
    (lambda: dc.compact(Y, ONE), ValueError, "tree: expected 11 rows (plan.num_rows), got shape [4, 3]"),
    (lambda: dc.compact({"a": (X, Y)}, ONE), ValueError, "tree['a'][1]: expected 11 rows"),
    (lambda: dc.compact(torch.tensor(1.0), ONE), ValueError, "tree: expected 11 rows (plan.num_rows), got shape []"),
    (lambda: dc.compact(X.to("meta"), ONE), ValueError, "plan: expected a plan on the device of tree, meta, got one on"),
    (lambda: dc.expand([X], ONE), ValueError, "tree[0]: expected 4 slots (plan.rows), got shape [11, 3]"),
    (lambda: dc.expand([Y], ONE, (X,)), ValueError, "base: expected the structure of tree"),
    (lambda: dc.expand([Y], ONE, [X.double()]), TypeError, "base[0]: expected the dtype of tree, torch.float32, got"),
    (lambda: dc.expand([Y], ONE, [X[:, :2]]), ValueError, "base[0]: expected shape [11, 3], got [11, 2]"),
    (lambda: dc.expand([Y], ONE, [3]), TypeError, "base[0]: expected a Tensor or None, got int"),
    (lambda: dc.expand([Y], ONE, [X.to("meta")]), ValueError, "base[0]: expected a tensor on cpu, got one on meta"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "kind", "message"), BAD_CALLS, ids=[m for _, _, m in BAD_CALLS])
def test_bad_calls_name_the_argument(call, kind, message):
    with pytest.raises(kind) as error:
        call()
    assert message in str(error.value)
