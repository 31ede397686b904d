"""tree_route: the leaf of a tree of linear decisions, by whichever backend."""

import pytest
import torch

import dyncore as dc
from dyncore.backends import cpu, reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def tree(rows, dim, depth, dtype=torch.float32):
    """Numbers of which all sums are exact in float32, so that every order of them gives the same decision."""
    nodes = 2**depth - 1
    return [torch.randint(-4, 5, shape).to(dtype) for shape in ((rows, dim), (nodes, dim), (nodes,))]


def walk(x, weight, bias):
    leaves = []
    for row in x.double():
        node = 0
        while node < len(weight):
            score = float(row @ weight[node].double()) + (0 if bias is None else float(bias[node]))
            node = 2 * node + 1 + (score > 0)
        leaves.append(node - len(weight))
    return torch.tensor(leaves, dtype=torch.int32).view(len(x))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "dim", "depth"), [(40, 19, 3), (7, 64, 1), (5, 3, 0), (0, 8, 2), (33, 130, 5)])
def test_rows_turn_right_where_the_score_is_positive(dtype, rows, dim, depth, isa):
    x, weight, bias = tree(rows, dim, depth, dtype)
    for b in (None, bias):
        leaf = dc.tree_route(x, weight, b)
        assert leaf.dtype == torch.int32
        assert torch.equal(leaf, walk(x, weight, b))
        assert torch.equal(leaf, reference.tree_route(x, weight, b))


def test_leading_dimensions_and_strides():
    x, weight, bias = tree(12, 10, 3)
    wide, deep = torch.zeros(12, 25), torch.zeros(7, 20)
    wide[:, 3:13], deep[:, ::2] = x, weight
    want = walk(x, weight, bias)
    assert torch.equal(dc.tree_route(x.view(3, 4, 10), weight, bias), want.view(3, 4))
    assert torch.equal(dc.tree_route(wide[:, 3:13], deep[:, ::2], bias), want)
    assert torch.equal(dc.tree_route(x[:1].expand(5, 10), weight, bias), want[:1].expand(5))


@pytest.mark.skipif(not cpu.available, reason="needs the C++ kernels")
def test_the_same_bits_at_every_number_of_threads():
    x, weight, bias = torch.randn(4000, 200), torch.randn(63, 200), torch.randn(63)
    want = dc.tree_route(x, weight, bias)
    before = torch.get_num_threads()
    for threads in (1, 3):
        torch.set_num_threads(threads)
        assert torch.equal(dc.tree_route(x, weight, bias), want)
        assert torch.equal(dc.tree_route(x[7:8], weight, bias), want[7:8])
    torch.set_num_threads(before)


def test_nan_goes_left_and_the_plan_takes_the_leaves():
    x, weight, _ = tree(9, 6, 2)
    x[4] = float("nan")
    leaf = dc.tree_route(x, weight)
    assert leaf[4] == 0
    plan = dc.route(leaf[:, None], num_groups=4)
    assert torch.equal(plan.offsets.diff(), torch.bincount(leaf, minlength=4))


def test_flops_are_those_of_one_path():
    x, weight, bias = tree(12, 10, 5)
    assert dc.measure.flops(lambda: dc.tree_route(x, weight, bias)) == 2 * 12 * 5 * 10


def test_no_gradient_and_one_graph():
    x, weight, bias = (t.requires_grad_() for t in tree(12, 10, 3))
    leaf = dc.tree_route(x, weight, bias)
    assert not leaf.requires_grad
    compiled = torch.compile(dc.tree_route, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, weight, bias), leaf)
    torch.library.opcheck(torch.ops.dyncore.tree_route.default, tuple(t.detach() for t in (x, weight, bias)))


BAD_CALLS = [
    (lambda x, w, b: dc.tree_route([1], w), TypeError, "x: expected a Tensor, got list"),
    (lambda x, w, b: dc.tree_route(x[0], w), ValueError, "x: expected at least 2 dimensions"),
    (lambda x, w, b: dc.tree_route(x, w.double()), TypeError, "weight: expected the dtype of x, torch.float32"),
    (lambda x, w, b: dc.tree_route(x, w[:, :3]), ValueError, "weight: expected shape [nodes, D=6], got [3, 3]"),
    (lambda x, w, b: dc.tree_route(x, w[:2]), ValueError, "weight: expected 2^depth - 1 nodes, got 2"),
    (lambda x, w, b: dc.tree_route(x, w, b[:2]), ValueError, "bias: expected shape [nodes=3], got [2]"),
]


@pytest.mark.parametrize(("call", "kind", "message"), BAD_CALLS, ids=[m for _, _, m in BAD_CALLS])
def test_bad_calls_name_the_argument(call, kind, message):
    with pytest.raises(kind) as error:
        call(*tree(5, 6, 2))
    assert message in str(error.value)


@pytest.mark.skipif(not cpu.available, reason="needs the C++ kernels")
def test_the_bindings_refuse_what_would_lead_outside():
    x, weight, bias = tree(5, 6, 2)
    leaves = torch.empty(5, dtype=torch.int32)
    for args in ((x, weight[:2], None), (x, weight[:, :4], None), (x, weight, bias[:2]), (x[:4], weight, bias)):
        with pytest.raises(ValueError, match="expected"):
            cpu.native.tree_route(*args, leaves, 1)
