"""How the bindings read tensors: what is no tensor, or of another type or shape, is refused before a kernel runs."""

import pytest
import torch

import dyncore as dc
from dyncore.backends import cpu, reference

pytestmark = pytest.mark.skipif(not cpu.available, reason=cpu.reason)

T, G, H, I = 6, 2, 5, 7  # noqa: E741
GOOD = {
    "x": torch.randn(T, H),
    "w_in": torch.randn(G, I, H),
    "w_out": torch.randn(G, H, I),
    "b_in": torch.randn(G, I),
    "b_out": torch.randn(G, H),
    "residual": torch.randn(T, H),
}
BAD = [
    ("x", torch.randn(T, H + 1), ValueError, "x: expected shape [6, 5], got [6, 6]"),
    ("x", torch.randn(T - 1, H), ValueError, "x: expected 6 rows, got 5"),
    ("w_in", torch.randn(G, I, H + 1), ValueError, "w_in: expected shape [2, 7, 5], got [2, 7, 6]"),
    ("w_in", torch.randn(I, H), ValueError, "w_in: expected 3 dimensions, got shape [7, 5]"),
    ("w_out", torch.randn(G + 1, H, I), ValueError, "w_out: expected shape [2, 5, 7], got [3, 5, 7]"),
    ("w_out", torch.randn(G, H, I).double(), TypeError, "w_out: expected the dtype of x"),
    ("b_in", torch.randn(G, I).bfloat16(), TypeError, "b_in: expected the dtype of x"),
    ("b_in", torch.randn(G, H), ValueError, "b_in: expected shape [2, 7], got [2, 5]"),
    ("b_out", torch.randn(G), ValueError, "b_out: expected 2 dimensions, got shape [2]"),
    ("residual", torch.randn(T + 1, H), ValueError, "residual: expected 6 rows, got 7"),
    ("b_in", [1.0], TypeError, "b_in: expected a Tensor, got list"),
    ("w_in", torch.empty(G, I, H, device="meta"), ValueError, "w_in: expected a tensor with data on cpu"),
    ("b_in", torch.randn(G, I).to_sparse(), ValueError, "b_in: expected a tensor with data on cpu"),
]


def run(**changed):
    expert = torch.tensor([[0], [1], [-1], [0], [1], [1]])
    rows, offsets, row_offsets, row_slots, _ = reference.plan_route(expert, G, 5)
    arguments = GOOD | changed
    return cpu.grouped_mlp(*arguments.values(), rows, offsets, None, row_offsets, row_slots, "gelu", False)[0]


@pytest.mark.parametrize(("name", "value", "kind", "message"), BAD, ids=[f"{b[0]}-{i}" for i, b in enumerate(BAD)])
def test_a_tensor_that_does_not_fit_is_refused(name, value, kind, message):
    with pytest.raises(kind) as error:
        run(**{name: value})
    assert message in str(error.value)


@pytest.mark.parametrize("activation", ["swiglu", "tanh"])
def test_an_activation_that_grouped_linear_lacks_is_refused(activation):
    plan = dc.select(torch.ones(T, dtype=torch.bool))
    tensors = (plan.rows, plan.offsets, None, plan.row_offsets, plan.row_slots)
    with pytest.raises(ValueError, match="activation"):
        torch.ops.dyncore.grouped_linear(GOOD["x"], GOOD["w_in"][:1], None, *tensors, activation, True, True, False)


@pytest.mark.parametrize("parts", [0, -1, 3])
def test_parts_that_a_weight_does_not_have_are_refused(parts):
    with pytest.raises(ValueError, match="parts"):
        cpu.pack_weight(torch.randn(2, 4, 3), parts)


def test_none_is_refused_where_a_tensor_must_be():
    rows, offsets, row_offsets, _ = reference.plan_mask(torch.ones(T, 1, dtype=torch.bool), T)
    with pytest.raises(TypeError, match=r"plan\.row_slots"):
        cpu.scatter_rows(torch.randn(T, H), None, rows, offsets, None, row_offsets, None)


def test_plan_tensors_of_other_types_and_strides_are_read_from_copies():
    mask = torch.tensor([True, False, True, True, False, True])
    rows, offsets, row_offsets, row_slots = cpu.plan_mask(mask, 4)
    x, scale = torch.randn(T, H), torch.rand(4)
    want = cpu.scatter_rows(x[:4], None, rows, offsets, scale, row_offsets, row_slots)
    spread = [torch.stack([t, t], 1)[:, 0] for t in (rows, offsets, scale, row_offsets, row_slots)]
    wide = [rows.long(), offsets.long(), scale.double(), row_offsets.long(), row_slots.long()]
    for plan in (spread, wide):
        assert torch.equal(cpu.scatter_rows(x[:4], None, *plan), want)


# what wraps to the value that was there, or to another that is in range
TOO_WIDE = (2**32, -(2**32), 2**31, -(2**31) - 1, 2**62)


def ops_on(rows, offsets, row_offsets, row_slots):
    """Every op on these plan tensors, by name, with the names of those that it reads."""
    ops, slots = torch.ops.dyncore, rows.shape[0]
    plan = (rows, offsets, None, row_offsets, row_slots)
    x, y, w = torch.randn(T, H), torch.randn(slots, H), torch.randn(offsets.shape[0] - 1, H, H)
    empty, listed, every = x.new_empty(0), ("rows", "offsets"), ("rows", "offsets", "row_offsets", "row_slots")
    return {
        "plan_inverse": (lambda: ops.plan_inverse(rows, offsets, T), listed),
        "gather_rows": (lambda: ops.gather_rows(x, rows, offsets), listed),
        "scatter_rows": (lambda: ops.scatter_rows(y, None, *plan), every),
        "scatter_rows_backward": (lambda: ops.scatter_rows_backward(x, y, *plan, [True, False]), listed),
        "grouped_linear": (lambda: ops.grouped_linear(x, w, None, *plan, "none", True, True, False), every),
        "grouped_linear_backward": (
            lambda: ops.grouped_linear_backward(x, x, w, None, empty, *plan, "none", True, True, [True] * 4),
            every,
        ),
        "grouped_mlp": (lambda: ops.grouped_mlp(x, w, w, None, None, None, *plan, "relu", False), every),
        "grouped_mlp_backward": (
            lambda: ops.grouped_mlp_backward(x, x, w, w, None, None, y, *plan, "relu", [True] * 6),
            every,
        ),
    }


def int64_plan():
    """2 groups and one slot of padding."""
    mask = torch.tensor([[True, False], [False, True], [True, True], [False, False], [True, False], [False, True]])
    rows, offsets, row_offsets, row_slots = (t.long() for t in reference.plan_mask(mask, 7))
    return {"rows": rows, "offsets": offsets, "row_offsets": row_offsets, "row_slots": row_slots}


READS = [(op, name) for op, (_, reads) in ops_on(**int64_plan()).items() for name in reads]


@pytest.mark.parametrize(("op", "name"), READS, ids=[f"{op}-{name}" for op, name in READS])
def test_an_int64_that_int32_cannot_hold_is_refused(op, name):
    for change in TOO_WIDE:
        plan = int64_plan()
        plan[name][1] += change
        with pytest.raises((IndexError, ValueError), match=rf"plan\.{name}: expected"):
            ops_on(**plan)[op][0]()


@pytest.mark.parametrize("change", TOO_WIDE)
def test_padding_of_an_int64_plan_may_hold_anything(change):
    torch.manual_seed(1)
    want = {op: call() for op, (call, _) in ops_on(**int64_plan()).items()}
    plan = int64_plan()
    plan["rows"][-1] = plan["row_slots"][-1] = change
    torch.manual_seed(1)
    for op, (call, _) in ops_on(**plan).items():
        for a, b in zip(*((t,) if isinstance(t, torch.Tensor) else t for t in (call(), want[op])), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize(("op", "name"), READS, ids=[f"{op}-{name}" for op, name in READS])
def test_indices_that_are_no_integers_are_refused(op, name):
    plan = int64_plan()
    plan[name] = plan[name].float()
    with pytest.raises(TypeError, match=rf"plan\.{name}: expected int32, got float32"):
        ops_on(**plan)[op][0]()


def test_negated_and_offset_views_are_read_as_their_values():
    weight = torch.randn(3, H)
    plan = cpu.plan_mask(torch.ones(2, dtype=torch.bool), 2)
    rows, offsets = plan[0], plan[1]
    assert torch.equal(torch.ops.dyncore.gather_rows(weight[1:], rows, offsets), weight[1:])
    assert torch.equal(torch.ops.dyncore.gather_rows(torch._neg_view(weight)[1:], rows, offsets), -weight[1:])


def test_a_plan_whose_inverse_map_is_of_other_rows_is_refused():
    def ints(*values):
        return torch.tensor(values, dtype=torch.int32)

    x, w = torch.ones(3, H), torch.ones(1, H, H)
    names_row_1_that_no_slot_has = ints(0, 0), ints(0, 2), None, ints(0, 1, 2, 2), ints(0, 1)
    one_slot_twice = ints(0, 0), ints(0, 2), None, ints(0, 2, 2, 2), ints(0, 0)
    for plan in (names_row_1_that_no_slot_has, one_slot_twice):
        with pytest.raises(ValueError, match="row_slots: expected the slots of each row"):
            torch.ops.dyncore.grouped_linear(x, w, None, *plan, "none", True, True, False)


def test_plan_ops_refuse_what_would_lead_them_out_of_their_buffers():
    with pytest.raises(ValueError, match=r"k: expected 0\.\.4, got 100000"):
        torch.ops.dyncore.plan_topk(torch.randn(1, 4), 100000)
    with pytest.raises(TypeError, match="mask: expected a bool tensor"):
        torch.ops.dyncore.plan_mask(torch.ones(4, 2), 8)
