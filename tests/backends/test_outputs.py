"""What kernels write to: a buffer of another size, dtype or layout is refused before anything is written."""

import pytest
import torch

from dyncore.backends import cpu, reference

pytestmark = pytest.mark.skipif(not cpu.available, reason=cpu.reason)

T, G, H, I = 6, 2, 5, 7  # noqa: E741
A = 4  # slots
GELU = 3  # of enum Activation


def calls():
    """Of each binding: its arguments before the outputs, and the outputs by name; most take a thread count last."""
    rows, offsets, row_offsets, row_slots, _ = reference.plan_route(
        torch.tensor([[0], [1], [-1], [0], [1], [-1]]), G, A
    )
    plan = (rows, offsets, torch.rand(A), row_offsets, row_slots)
    x, y, w_in, w_out = torch.randn(T, H), torch.randn(A, H), torch.randn(G, I, H), torch.randn(G, H, I)
    b_in, b_out, pre, grad = torch.randn(G, I), torch.randn(G, H), torch.randn(A, I), torch.randn(T, I)
    new, ints = torch.empty, {"dtype": torch.int32}
    lists = {
        "rows": new(A, **ints),
        "offsets": new(G + 1, **ints),
        "row_offsets": new(T + 1, **ints),
        "row_slots": new(A, **ints),
    }
    one_group = {**lists, "offsets": new(2, **ints)}
    gradients = {"dx": new(T, H), "dweight": new(G, I, H), "dbias": new(G, I), "dscale": new(A)}
    mlp_gradients = {
        "dx": new(T, H),
        "dw_in": new(G, I, H),
        "dw_out": new(G, H, I),
        "db_in": new(G, I),
        "db_out": new(G, H),
        "dscale": new(A),
    }
    mask = torch.zeros(T, G, dtype=torch.bool)
    mask[:2] = True
    return {
        "gather_rows": ((x, rows, offsets), {"out": new(A, H)}),
        "scatter_rows": ((y, None, *plan), {"out": new(T, H)}),
        "scatter_rows_backward": ((x, y, *plan[:3], T), {"dy": new(A, H), "dscale": new(A)}),
        "grouped_linear": ((x, w_in, b_in, *plan, GELU, True, True), {"out": new(T, I), "pre": new(A, I)}),
        "grouped_linear_backward": ((grad, x, w_in, b_in, pre, *plan, GELU, True, True), gradients),
        "grouped_mlp": (
            (x, w_in, w_out, b_in, b_out, None, *plan, GELU, None, None),
            {"out": new(T, H), "pre": new(A, I)},
        ),
        "grouped_mlp_backward": ((x, x, w_in, w_out, b_out, pre, *plan, GELU, False), mlp_gradients),
        "pack_weight": ((w_in, 1), {"panels": new(G, 1, 1, H, 32)}),
        "plan_mask": ((mask,), {**lists, "sources": new(A, **ints)}),
        "plan_route": ((torch.zeros(T, 2, dtype=torch.int64),), {**lists, "sources": new(A, **ints)}),
        "plan_topk": ((torch.randn(1, T), A), one_group),
        "plan_inverse": ((rows, offsets), {name: lists[name] for name in ("row_offsets", "row_slots")}),
    }


def call(op, inputs, outputs):
    threads = () if op.startswith("plan_") else (1,)
    getattr(cpu.native, op)(*inputs, *outputs.values(), *threads)


# The length of these is what says how many slots or groups a new plan has.
FREE = {("plan_mask", "rows"), ("plan_route", "rows"), ("plan_route", "offsets"), ("plan_inverse", "row_offsets")}
OUTPUTS = [(op, name) for op, (_, outputs) in calls().items() for name in outputs]


@pytest.mark.parametrize(("op", "name"), OUTPUTS, ids=[f"{op}-{name}" for op, name in OUTPUTS])
def test_an_output_that_does_not_fit_is_refused(op, name):
    inputs, outputs = calls()[op]
    call(op, inputs, outputs)
    good = outputs[name]
    wrong = {
        "fewer dimensions": (good[0], ValueError),
        "another dtype": (good.to(torch.float16), TypeError),
        "strides": (torch.stack([good, good], -1)[..., 0], ValueError),
        "no data": (good.to("meta"), ValueError),
    }
    if (op, name) not in FREE:
        wrong["too short"] = good[:-1], ValueError
        wrong["too long"] = torch.cat([good, good]), ValueError
        wrong["too narrow"] = good[..., :-1].contiguous(), ValueError
    for buffer, kind in wrong.values():
        before = buffer.clone()
        with pytest.raises(kind, match=f"{name}: expected"):
            call(op, inputs, {**outputs, name: buffer})
        assert buffer.is_meta or torch.equal(buffer, before)


@pytest.mark.parametrize("op", ["plan_mask", "plan_route"])
def test_lists_that_do_not_agree_are_refused(op):
    """A plan's own length is free, but its lists have it in common."""
    inputs, outputs = calls()[op]
    for rows in (outputs["rows"][:-1], torch.cat([outputs["rows"]] * 2)):
        with pytest.raises(ValueError, match="row_slots: expected shape"):
            call(op, inputs, {**outputs, "rows": rows})


def test_a_backward_pass_through_an_activation_needs_the_pre_activation():
    inputs, outputs = calls()["grouped_linear_backward"]
    with pytest.raises(TypeError, match="pre: expected a Tensor, got NoneType"):
        call("grouped_linear_backward", (*inputs[:4], None, *inputs[5:]), outputs)


def test_parts_that_do_not_divide_a_weight_are_refused():
    (weight, _), outputs = calls()["pack_weight"]
    for parts in (-1, 0, 2, 8):
        with pytest.raises(ValueError, match=f"parts: expected a divisor of the weight's 7 outputs, got {parts}"):
            call("pack_weight", (weight, parts), outputs)
