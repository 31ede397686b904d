"""Plans and what makes one: every property of the contract, on random and on degenerate input."""

import copy
import itertools
import pickle

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
import torch.utils._pytree as pytree
from torch._subclasses.fake_tensor import FakeTensorMode

import dyncore as dc
from dyncore.backends import cpu, reference
from tests.support import live


def check_invariants(plan):
    """What holds of every plan: int32, sorted, an inverse map that lists each live slot of a row, ascending."""
    rows, groups = live(plan)
    count = len(rows)
    for t in (plan.rows, plan.offsets, plan.row_offsets, plan.row_slots):
        assert t.dtype == torch.int32
        assert t.is_contiguous()
    assert plan.offsets[0] == 0
    assert plan.offsets.shape == (plan.num_groups + 1,)
    assert plan.rows.shape == plan.row_slots.shape == (plan.num_slots,)
    assert plan.row_offsets.shape == (plan.num_rows + 1,)
    key = groups * max(plan.num_rows, 1) + rows
    assert (key.diff() >= 0).all()  # by group, then ascending row
    want = [[a for a in range(count) if rows[a] == t] for t in range(plan.num_rows)]
    bounds = plan.row_offsets.tolist()
    assert [plan.row_slots[s:e].tolist() for s, e in itertools.pairwise(bounds)] == want
    assert plan.exact <= (count == plan.num_slots)


def test_select_lists_the_rows_of_the_mask_in_order():
    mask = torch.tensor([[True, False, True], [False, False, True]])
    scale = torch.arange(6.0).view(2, 3).requires_grad_()
    plan = dc.select(mask, scale)
    assert plan.rows.tolist() == [0, 2, 5]
    assert plan.offsets.tolist() == [0, 3]
    assert plan.row_offsets.tolist() == [0, 1, 1, 2, 2, 2, 3]
    assert plan.row_slots.tolist() == [0, 1, 2]
    assert plan.num_rows == 6
    assert plan.scale.tolist() == [0, 2, 5]
    plan.scale.sum().backward()
    assert scale.grad.tolist() == [[1, 0, 1], [0, 0, 1]]
    assert repr(plan) == "Plan(rows=6, groups=1, slots=3, density=0.500, scaled)"


def test_select_topk_takes_the_best_rows_of_each_sequence():
    scores = torch.tensor([[0.1, 0.9, 0.5, 0.7], [4.0, 4.0, 4.0, 5.0], [float("nan"), 1.0, 2.0, float("-inf")]])
    plan = dc.select_topk(scores, 2, scores * 10)
    assert plan.rows.tolist() == [1, 3, 4, 7, 8, 10]  # equal scores: the earlier row; NaN ranks highest
    assert plan.offsets.tolist() == [0, 6]
    assert plan.scale.nan_to_num(-1).tolist() == pytest.approx([9, 7, 40, 50, -1, 20])
    check_invariants(plan)
    assert dc.select_topk(scores, 0).num_slots == 0
    assert dc.select_topk(scores, 4).rows.tolist() == list(range(12))


def test_route_sorts_slots_by_expert_and_drops_negative_indices():
    expert = torch.tensor([[2, 0], [0, -1], [2, 2], [-5, 1]])
    weight = torch.arange(8.0).view(4, 2).requires_grad_()
    plan = dc.route(expert, weight, num_groups=4)
    assert plan.rows.tolist() == [0, 1, 3, 0, 2, 2]
    assert plan.offsets.tolist() == [0, 2, 3, 6, 6]
    assert plan.scale.tolist() == [1, 2, 7, 0, 4, 5]
    check_invariants(plan)
    plan.scale.sum().backward()
    assert weight.grad.tolist() == [[1, 1], [1, 0], [1, 1], [0, 1]]


def test_route_mask_takes_any_number_of_groups_a_row():
    mask = torch.tensor([[True, True, False], [False, False, False], [True, False, True]])
    weight = torch.arange(9.0).view(3, 3).requires_grad_()
    plan = dc.route_mask(mask, weight)
    assert plan.rows.tolist() == [0, 2, 0, 2]
    assert plan.offsets.tolist() == [0, 2, 3, 4]
    assert plan.scale.tolist() == [0, 6, 1, 8]
    check_invariants(plan)
    plan.scale.sum().backward()
    assert torch.equal(weight.grad, mask.float())


def test_route_mask_takes_weights_of_more_pairs_than_an_int32_counts():
    with FakeTensorMode():
        mask, weight = torch.empty(2**21, 2**10, dtype=torch.bool), torch.empty(2**21, 2**10)
        assert dc.route_mask(mask, weight, max_slots=9).scale.shape == (9,)


sizes = st.integers(0, 40)
groups = st.integers(1, 9)


@hypothesis.settings(max_examples=150, deadline=None)
@hypothesis.given(sizes, groups, st.floats(0, 1), st.integers(0, 2**31), st.integers(0, 5))
def test_plans_of_a_mask_equal_the_reference(num_rows, num_groups, density, seed, spare):
    mask = torch.rand(num_rows, num_groups, generator=torch.Generator().manual_seed(seed)) < density
    check_invariants(dc.route_mask(mask))
    check_invariants(dc.select(mask))
    assert cpu.count_mask(mask) == int(mask.sum())
    for capacity in (int(mask.sum()), int(mask.sum()) + spare):
        for strided in (mask, mask.t().contiguous().t(), torch.stack([mask, mask], 2)[..., 1]):
            got, want = cpu.plan_mask(strided, capacity), reference.plan_mask(mask, capacity)
            assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@hypothesis.settings(max_examples=150, deadline=None)
@hypothesis.given(
    sizes, st.integers(0, 4), groups, st.integers(0, 2**31), st.sampled_from([torch.int32, torch.int64]), sizes
)
def test_plans_of_a_routing_equal_the_reference(num_rows, k, num_groups, seed, dtype, spare):
    generator = torch.Generator().manual_seed(seed)
    expert = torch.randint(-2, num_groups, (num_rows, k), generator=generator, dtype=dtype)
    check_invariants(dc.route(expert, num_groups=num_groups))
    count = int((expert >= 0).sum())
    assert cpu.count_route(expert, num_groups) == count
    for strided in (expert, expert.t().contiguous().t()):
        got = cpu.plan_route(strided, num_groups, count + spare)
        want = reference.plan_route(expert, num_groups, expert.numel())
        assert all(torch.equal(a[:count], b[:count]) for a, b in zip(got, want, strict=True) if a.dim() == 1 and count)
        assert torch.equal(got[1], want[1])
        assert torch.equal(got[2], want[2])
        for padded in (got[0], got[3], got[4]):
            assert padded.shape == (count + spare,)
            assert not padded[count:].any()


@hypothesis.settings(max_examples=150, deadline=None)
@hypothesis.given(st.integers(0, 4), st.integers(0, 30), st.data(), st.integers(0, 2**31))
def test_plans_of_the_best_equal_the_reference(batch, seq, data, seed):
    k = data.draw(st.integers(0, seq))
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]))
    scores = torch.randint(-3, 4, (batch, seq), generator=torch.Generator().manual_seed(seed)).to(dtype)
    scores[scores == 3] = float("nan")
    scores[scores == -3] = float("-inf")
    plan = dc.select_topk(scores, k)
    check_invariants(plan)
    for got, want in zip(cpu.plan_topk(scores, k), reference.plan_topk(scores, k), strict=True):
        assert torch.equal(got, want)


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(sizes, groups, st.integers(0, 2**31))
def test_from_slots_builds_the_inverse_map(num_rows, num_groups, seed):
    expert = torch.randint(-1, num_groups, (num_rows, 2), generator=torch.Generator().manual_seed(seed))
    plan = dc.route(expert, num_groups=num_groups)
    again = dc.Plan.from_slots(plan.rows.long(), plan.offsets, num_rows=num_rows)
    for name in ("rows", "offsets", "row_offsets", "row_slots"):
        assert torch.equal(getattr(plan, name), getattr(again, name))
    assert again.exact


def test_buffers_are_exact_on_a_cpu_and_static_under_compile_and_for_fakes():
    mask = torch.rand(50) < 0.3
    assert dc.select(mask).num_slots == int(mask.sum())
    seen = []

    def build(mask):
        plan = dc.select(mask)
        seen.append(plan.num_slots)
        return plan.rows, plan.offsets

    rows, offsets = torch.compile(build, fullgraph=True, backend="aot_eager")(mask)
    assert rows.shape == (50,)
    assert rows[: int(offsets[1])].tolist() == mask.nonzero().flatten().tolist()
    with FakeTensorMode() as mode:
        assert dc.select(mode.from_tensor(mask)).num_slots == 50
        assert dc.route(mode.from_tensor(torch.zeros(5, 2, dtype=torch.long)), num_groups=3).num_slots == 10
        assert dc.route_mask(mode.from_tensor(torch.ones(4, 6, dtype=torch.bool)), max_slots=9).num_slots == 9


def test_max_slots_bounds_the_buffers_and_too_few_are_an_error():
    mask = torch.ones(4, 3, dtype=torch.bool)
    assert dc.route_mask(mask, max_slots=100).num_slots == 12
    with pytest.raises(ValueError, match="max_slots: the mask has 12 slots, more than max_slots=11"):
        dc.route_mask(mask, max_slots=11)
    build = torch.compile(lambda m: dc.route_mask(m, max_slots=11).rows, backend="aot_eager")
    with pytest.raises(ValueError, match="max_slots"):
        build(mask)


def test_a_plan_is_a_pytree_that_moves_copies_and_pickles():
    plan = dc.route(torch.randint(-1, 3, (9, 2)), torch.rand(9, 2), num_groups=3)
    leaves, spec = pytree.tree_flatten(plan)
    assert len(leaves) == 5
    for other in (
        pytree.tree_unflatten(leaves, spec), plan.to("cpu"), copy.deepcopy(plan), pickle.loads(pickle.dumps(plan))
    ):  # fmt: skip
        check_invariants(other)
        assert torch.equal(other.rows, plan.rows)
        assert torch.equal(other.scale, plan.scale)
        assert other.num_rows == 9
    assert plan.to("meta").rows.device.type == "meta"
    with pytest.raises(AttributeError):
        plan.num_rows = 3
    spec_again = pytree.treespec_loads(pytree.treespec_dumps(spec))
    assert pytree.tree_unflatten(leaves, spec_again).num_rows == 9


def test_a_plan_passes_into_and_out_of_a_compiled_function():
    x = torch.randn(6, 4)
    plan = dc.select(torch.rand(6) < 0.5)
    assert torch.equal(torch.compile(lambda x, p: dc.gather_rows(x, p), fullgraph=True, backend="eager")(x, plan),
                       dc.gather_rows(x, plan))  # fmt: skip
    made = torch.compile(lambda s: dc.select_topk(s, 2), fullgraph=True, backend="eager")(torch.randn(3, 4))
    check_invariants(made)


def by_hand(logits, k, normalize):
    weight, expert = logits.softmax(-1).topk(k)
    weight = weight / weight.sum(-1, keepdim=True) if normalize else weight
    return dc.route(expert, weight, num_groups=logits.shape[1])


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(("num_rows", "num_groups", "k"), [(0, 4, 2), (1, 1, 1), (40, 5, 1), (40, 5, 3), (40, 5, 5)])
def test_route_topk_is_route_of_the_softmax_and_its_topk(num_rows, num_groups, k, normalize):
    logits = torch.randn(num_rows, num_groups, dtype=torch.float64, requires_grad=True)
    plan, want = dc.route_topk(logits, k, normalize=normalize), by_hand(logits, k, normalize)
    check_invariants(plan)
    assert plan.exact
    for name in ("rows", "offsets", "row_offsets", "row_slots"):
        assert torch.equal(getattr(plan, name), getattr(want, name)), name
    torch.testing.assert_close(plan.scale, want.scale, rtol=1e-12, atol=1e-12)
    if num_rows == 0:
        return
    grad = torch.randn_like(want.scale)
    got, wanted = (torch.autograd.grad(p.scale, logits, grad)[0] for p in (plan, want))
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("normalize", [False, True])
def test_the_gradient_of_route_topk_twice_over(normalize):
    logits = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradgradcheck(lambda t: dc.route_topk(t, 2, normalize=normalize).scale, logits)


def test_route_topk_breaks_ties_and_ranks_nan():
    logits = torch.tensor([[1.0, 2.0, 2.0], [0.0, float("nan"), 5.0], [3.0, 3.0, 3.0]])
    plan = dc.route_topk(logits, 1)
    assert plan.offsets.tolist() == [0, 1, 3, 3]
    assert plan.rows.tolist() == [2, 0, 1]
    assert plan.scale.isnan().tolist() == [False, False, True]
    halves = dc.route_topk(logits[::2].half(), 2, normalize=True)
    assert halves.scale.dtype is torch.float32
    torch.testing.assert_close(halves.scale, torch.full((4,), 0.5))


def test_route_topk_in_a_compiled_function():
    logits = torch.randn(12, 4, requires_grad=True)

    def scale(t):
        return dc.route_topk(t, 2, normalize=True).scale

    want = torch.autograd.grad(scale(logits).square().sum(), logits)[0]
    compiled = torch.compile(scale, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(logits).square().sum(), logits)[0], want)


@pytest.mark.parametrize(
    "op", ["plan_mask", "plan_mask_sources", "plan_route", "plan_route_topk", "plan_topk", "plan_inverse"]
)
def test_opcheck(op):
    plan = dc.route(torch.randint(-1, 3, (9, 2)), num_groups=3)
    args = {
        "plan_mask": (torch.rand(9, 3) < 0.5, 27),
        "plan_mask_sources": (torch.rand(9, 3) < 0.5, 27),
        "plan_route": (torch.randint(-1, 3, (9, 2)), 3, 18),
        "plan_route_topk": (torch.randn(9, 4), 2, True),
        "plan_topk": (torch.randn(3, 7), 4),
        "plan_inverse": (plan.rows, plan.offsets, 9),
    }[op]
    torch.library.opcheck(getattr(torch.ops.dyncore, op).default, args)


BAD_CALLS = [
    (lambda: dc.route_topk(torch.zeros(3, 4), 5), ValueError, "k: expected 1..4 (the number of groups), got 5"),
    (lambda: dc.route_topk(torch.zeros(3, 4), 0), ValueError, "k: expected 1..4 (the number of groups), got 0"),
    (lambda: dc.route_topk(torch.zeros(3, 4), 1.0), TypeError, "k: expected an int, got float"),
    (lambda: dc.route_topk(torch.zeros(3), 1), ValueError, "logits: expected 2 dimensions, got shape [3]"),
    (lambda: dc.route_topk(torch.zeros(3, 4).int(), 1), TypeError, "logits: expected a floating dtype, got torch.int32"),
    (lambda: dc.select([True]), TypeError, "mask: expected a Tensor, got list"),
    (lambda: dc.select(torch.ones(3)), TypeError, "mask: expected a bool tensor, got torch.float32"),
    (lambda: dc.select(torch.ones(3).bool(), torch.ones(4)), ValueError, "scale: expected shape [3], got [4]"),
    (lambda: dc.select(torch.ones(3).bool(), torch.ones(3).int()), TypeError, "scale: expected a floating dtype"),
    (lambda: dc.select(torch.ones(3).bool(), torch.ones(3, device="meta")), ValueError, "scale: expected a tensor on cpu"),
    (lambda: dc.select_topk(torch.rand(6), 2), ValueError, "scores: expected 2 dimensions, got shape [6]"),
    (lambda: dc.select_topk(torch.ones(2, 3).int(), 2), TypeError, "scores: expected a floating dtype"),
    (lambda: dc.select_topk(torch.rand(2, 3), 4), ValueError, "k: expected 0..3 (the sequence length), got 4"),
    (lambda: dc.select_topk(torch.rand(2, 3), -1), ValueError, "k: expected 0..3"),
    (lambda: dc.select_topk(torch.rand(2, 3), 1.5), TypeError, "k: expected an int, got float"),
    (lambda: dc.route(torch.tensor([[3]]), num_groups=3), IndexError, "expert: expected indices below num_groups=3, got 3"),
    (lambda: dc.route(torch.rand(2, 2), num_groups=3), TypeError, "expert: expected a signed integer dtype"),
    (lambda: dc.route(torch.zeros(4).long(), num_groups=3), ValueError, "expert: expected 2 dimensions"),
    (lambda: dc.route(torch.zeros(4, 1).long(), num_groups=0), ValueError, "num_groups: expected a positive number, got 0"),
    (lambda: dc.route(torch.zeros(4, 1).long(), num_groups=True), TypeError, "num_groups: expected an int"),
    (lambda: dc.route(torch.zeros(4, 1).long(), torch.ones(4), num_groups=1), ValueError, "weight: expected shape [4, 1]"),
    (lambda: dc.route_mask(torch.ones(4).bool()), ValueError, "mask: expected 2 dimensions, got shape [4]"),
    (lambda: dc.route_mask(torch.ones(4, 0).bool()), ValueError, "mask: expected at least one group"),
    (lambda: dc.route_mask(torch.ones(4, 2).bool(), torch.ones(2, 4)), ValueError, "weight: expected shape [4, 2]"),
    (lambda: dc.route_mask(torch.ones(4, 2).bool(), max_slots=-1), ValueError, "max_slots: expected a number >= 0"),
    (lambda: dc.Plan.from_slots(torch.tensor([0, 9]), torch.tensor([0, 2]), num_rows=9), IndexError, "plan.rows: expected rows in [0, 9), got values from 0 to 9"),
    (lambda: dc.Plan.from_slots(torch.tensor([0, 1]), torch.tensor([0, 2, 1]), num_rows=9), ValueError, "plan.offsets: expected non-decreasing"),
    (lambda: dc.Plan.from_slots(torch.tensor([0, 1]), torch.tensor([0]), num_rows=9), ValueError, "offsets: expected at least 2 entries"),
    (lambda: dc.Plan.from_slots(torch.tensor([0]), torch.tensor([0, 1], device="meta"), num_rows=9), ValueError, "offsets: expected a tensor on cpu, got one on meta"),
    (lambda: dc.Plan.from_slots(torch.tensor([0]), torch.tensor([0, 1]), num_rows=None), TypeError, "num_rows: expected an int, got NoneType"),
    (lambda: dc.Plan.from_slots(torch.tensor([0]), torch.tensor([0, 1]), num_rows=2.5), TypeError, "num_rows: expected an int, got float"),
    (lambda: dc.route_mask(torch.ones(4, 2).bool(), max_slots=4.0), TypeError, "max_slots: expected an int, got float"),
    (lambda: dc.select(torch.ones(3).bool()).to(torch.float64), TypeError, "device: expected a device, got torch.float64"),
    (lambda: dc.Plan.from_slots(torch.tensor([1, 3, 2, 0]), torch.tensor([0, 0, 3, 4]), num_rows=9), ValueError, "rows: expected ascending rows inside a group, got 3 then 2 at slot 2"),
    (lambda: dc.Plan.from_slots(torch.tensor([0.0]), torch.tensor([0, 1]), num_rows=9), TypeError, "rows: expected int32 or int64"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "kind", "message"), BAD_CALLS, ids=[m for _, _, m in BAD_CALLS])
def test_bad_calls_name_the_argument(call, kind, message):
    with pytest.raises(kind) as error:
        call()
    assert message in str(error.value)


class Wrapper(torch.Tensor):
    """A tensor subclass without data of its own."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device=inner.device)

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return func(*(a.inner if isinstance(a, Wrapper) else a for a in args), **(kwargs or {}))


def test_a_mask_that_is_a_wrapper_subclass_is_left_to_its_dispatch():
    mask = torch.tensor([True, False, True, False])
    plan = dc.select(Wrapper(mask))
    assert plan.rows[: int(plan.offsets[-1])].tolist() == [0, 2]


def test_int64_slots_out_of_range_do_not_wrap_into_range():
    with pytest.raises(IndexError, match="rows"):
        dc.Plan.from_slots(torch.tensor([2**32]), torch.tensor([0, 1]), num_rows=4)
    with pytest.raises(ValueError, match="offsets"):
        dc.Plan.from_slots(torch.tensor([1]), torch.tensor([2**32, 2**32 + 1]), num_rows=4)
