"""What the sparse kernels are given: a buffer of another size, dtype or layout, and lists of non-zeros that lead outside
of their values, are refused before anything is written."""

import pytest
import torch

from dyncore.backends import cpu

pytestmark = pytest.mark.skipif(not cpu.available, reason=cpu.reason)

T, H, I = 6, 5, 39  # noqa: E741
REGLU = 8  # of enum Activation
INF = float("inf")


def compressed():
    """(mask, values, row_offsets) as kernels make them of a gated activation."""
    torch.manual_seed(1)
    pre = torch.randn(T, 2 * I)
    pre[:, :I].relu_()
    mask, values = torch.empty(T, 2, dtype=torch.int32), torch.empty(2, T * I)
    row_offsets = torch.empty(T + 1, dtype=torch.int64)
    cpu.native.compress(pre, mask, values, row_offsets, True, 1)
    return mask, values[:, : int(row_offsets[-1])].contiguous(), row_offsets


def calls():
    """Of each binding: its arguments before the outputs, and the outputs by name, all of which may be written."""
    new = torch.empty
    x, h, grad, pre = torch.randn(T, H), torch.randn(T, I), torch.randn(T, H), torch.randn(T, 2 * I)
    w_in, w_out, b_in, b_out = torch.randn(2 * I, H), torch.randn(H, I), torch.randn(2 * I), torch.randn(H)
    kept = {
        "mask": new(T, 2, dtype=torch.int32),
        "values": new(2, T * I),
        "row_offsets": new(T + 1, dtype=torch.int64),
    }
    gradients = {"dx": new(T, H), "dw_in": new(2 * I, H), "dw_out": new(H, I), "db_in": new(2 * I), "db_out": new(H)}
    return {
        "sparse_linear": ((h, w_out, b_out, INF), {"out": new(T, H)}),
        "sparse_linear_backward": ((grad, h), {"dweight": new(H, I)}),
        "sparse_mlp": (
            (x, w_in, w_out, b_in, b_out, REGLU, INF),
            {"out": new(T, H), **kept, "pre": new(T, 2 * I)},
        ),
        "sparse_mlp_backward": ((grad, x, w_in, w_out, *compressed(), REGLU), gradients),
        "compress": ((pre,), kept),
    }


def call(op, inputs, outputs):
    last = (True, 1) if op == "compress" else (1,)
    getattr(cpu.native, op)(*inputs, *outputs.values(), *last)


OUTPUTS = [(op, name) for op, (_, outputs) in calls().items() for name in outputs]


@pytest.mark.parametrize(("op", "name"), OUTPUTS, ids=[f"{op}-{name}" for op, name in OUTPUTS])
def test_an_output_that_does_not_fit_is_refused(op, name):
    inputs, outputs = calls()[op]
    call(op, inputs, outputs)
    good = outputs[name]
    wrong = {
        "fewer dimensions": (good[0], ValueError),
        "more rows": (torch.cat([good, good]), ValueError),
        "fewer rows": (good[:-1], ValueError),
        "too narrow": (good[..., :-1].contiguous(), ValueError),
        "another dtype": (good.to(torch.float16), TypeError),
        "strides": (torch.stack([good, good], -1)[..., 0], ValueError),
        "no data": (good.to("meta"), ValueError),
    }
    for case, (buffer, kind) in wrong.items():
        before = buffer.clone()
        with pytest.raises(kind, match=f"{name}: expected"):
            call(op, inputs, {**outputs, name: buffer})
        assert buffer.is_meta or torch.equal(buffer.nan_to_num(), before.nan_to_num()), case


def wrong_lists():
    mask, values, row_offsets = compressed()
    count = int(row_offsets[-1])
    more, later, spare = mask.clone(), row_offsets.clone(), mask.clone()
    more[2, 0] = ~(~more[2, 0] & (~more[2, 0] - 1))  # its lowest 0 becomes 1
    later[3] += 1
    spare[0, 1] |= 1 << 20  # neuron 52, of 39
    return {
        "a bit without a value": (more, values, row_offsets),
        "an end inside the next row": (mask, values, later),
        "ends that begin later": (mask, values, row_offsets + 1),
        "ends before the first": (mask, values, row_offsets - count),
        "too few values": (mask, values[:, :-1].contiguous(), row_offsets),
        "a neuron behind the last": (spare, values, row_offsets),
    }


@pytest.mark.parametrize("case", wrong_lists() if cpu.available else [])
def test_lists_that_lead_elsewhere_are_refused(case):
    lists = wrong_lists()[case]
    (grad, x, w_in, w_out, *_), outputs = calls()["sparse_mlp_backward"]
    with pytest.raises(ValueError, match="row_offsets: expected the ends of each row's values"):
        call("sparse_mlp_backward", (grad, x, w_in, w_out, *lists, REGLU), outputs)
    with pytest.raises(ValueError, match="row_offsets: expected the ends of each row's values"):
        cpu.native.expand(torch.empty(T, 2 * I), *lists, True, 1)


def test_what_a_call_cannot_do_without_is_named():
    inputs, outputs = calls()["sparse_mlp"]
    with pytest.raises(ValueError, match="w_out: expected a Tensor where out is asked for"):
        call("sparse_mlp", (*inputs[:2], None, *inputs[3:]), outputs)
    for missing in ("values", "row_offsets"):
        with pytest.raises(TypeError, match=f"{missing}: expected a Tensor, got None"):
            call("sparse_mlp", inputs, {**outputs, missing: None})
    with pytest.raises(ValueError, match="activation: expected relu, relu2 or reglu"):
        call("sparse_mlp", (*inputs[:5], 3, INF), outputs)
    inputs, outputs = calls()["sparse_mlp_backward"]
    with pytest.raises(ValueError, match="mask: expected a Tensor, got None"):
        call("sparse_mlp_backward", (*inputs[:4], None, None, None, REGLU), outputs)
    with pytest.raises(ValueError, match="dweight: expected a Tensor, got None"):
        call("sparse_linear_backward", calls()["sparse_linear_backward"][0], {"dweight": None})
