"""Infinity in gradients, rows and weights: the C++ kernels give infinity and NaN where the reference does."""

import pytest
import torch

from dyncore.backends import cpu, reference
from tests.backends.test_cpu import wide
from tests.support import assert_gradients, assert_values

pytestmark = pytest.mark.skipif(not cpu.available, reason=cpu.reason)

INF = float("inf")
SIZES = (1, 5, 11, 70)  # slots of groups: one row, few, a register tile, packed panels
H, I = 33, 45  # noqa: E741  # neither a whole number of panels


@pytest.fixture(params=[torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
def dtype(request):
    return request.param


def plan_tensors():
    """Plan tensors of SIZES; rows of the last two groups stand in both."""
    expert = torch.full((75, 2), -1)
    expert[0, 0] = 0
    expert[1:5, 0] = 1
    expert[4, 1] = 1
    expert[5:75, 0] = 3
    expert[5:16, 1] = 2
    rows, offsets, row_offsets, row_slots, _ = reference.plan_route(expert, 4, 87)
    assert offsets.diff().tolist() == list(SIZES)
    return rows, offsets, 0.5 + torch.rand(87), row_offsets, row_slots


def drawn(positive):
    """Random tensors of the shape asked for. Of positive numbers no sum of infinities is NaN, whatever its order."""

    def draw(*shape, dtype, scale=1.0):
        t = 0.1 + torch.rand(shape) if positive else torch.randn(shape)
        return (t * scale).to(dtype)

    return draw


def put_infinity(t, positive):
    """Into two rows of every group, or into two weights of each."""
    if t.dim() == 3:
        t[:, 3, 5] = INF
        t[:, 7, 2] = INF if positive else -INF
    else:
        t[[0, 2, 6, 50], 1] = INF
        t[[3, 8, 51], 4] = INF if positive else -INF


def agree(got, want, compare):
    assert torch.equal(got.isnan(), want.isnan())
    for infinity in (INF, -INF):
        assert torch.equal(got == infinity, want == infinity)
    compare(got.nan_to_num(0.0, 0.0, 0.0), want.nan_to_num(0.0, 0.0, 0.0))


def check(got, want, dtype, positive):
    """`got` and `want` end in the gradient of scale, which the kernels do not make as a product with the output: of
    infinities of both signs it is NaN in other places, but not finite in the same."""

    def compare(a, b):
        assert_gradients(a, b, dtype)

    for a, b in zip(got[:-1], want[:-1], strict=True):
        agree(a, b, compare)
    if positive:
        agree(got[-1], want[-1], compare)
    else:
        finite = want[-1].isfinite()
        assert torch.equal(got[-1].isfinite(), finite)
        compare(got[-1][finite], want[-1][finite])


@pytest.mark.parametrize("positive", [True, False], ids=["positive", "signed"])
@pytest.mark.parametrize("where", ["grad", "x", "weight"])
def test_grouped_linear(isa, dtype, where, positive):
    draw, plan = drawn(positive), plan_tensors()
    t = {
        "grad": draw(75, I, dtype=dtype),
        "x": draw(75, H, dtype=dtype),
        "weight": draw(4, I, H, dtype=dtype, scale=H**-0.5),
    }
    put_infinity(t[where], positive)
    grad, x, weight = t.values()
    bias = draw(4, I, dtype=dtype)
    for w in (weight, weight.mT.contiguous().mT):
        for activation in ("none", "relu", "gelu"):
            args = (x, w, bias, *plan, activation, True, True, True)
            (out, pre), (want, want_pre) = cpu.grouped_linear(*args), reference.grouped_linear(*wide(args))
            agree(out, want, assert_values)
            if activation != "none":
                agree(pre, want_pre, assert_values)
            args = (grad, x, w, bias, pre, *plan, activation, True, True, [True] * 4)
            got, expected = cpu.grouped_linear_backward(*args), reference.grouped_linear_backward(*wide(args))
            check(got, expected, dtype, positive)


@pytest.mark.parametrize("positive", [True, False], ids=["positive", "signed"])
@pytest.mark.parametrize("where", ["grad", "x", "w_in", "w_out"])
def test_grouped_mlp(isa, dtype, where, positive):
    draw, plan = drawn(positive), plan_tensors()
    for activation in ("relu", "swiglu"):
        width = 2 * I if activation == "swiglu" else I
        t = {
            "grad": draw(75, H, dtype=dtype),
            "x": draw(75, H, dtype=dtype),
            "w_in": draw(4, width, H, dtype=dtype, scale=H**-0.5),
            "w_out": draw(4, H, I, dtype=dtype, scale=I**-0.5),
        }
        put_infinity(t[where], positive)
        grad, *inputs = t.values()
        inputs += [draw(4, width, dtype=dtype), draw(4, H, dtype=dtype)]
        args = (*inputs, None, *plan, activation, True)
        (out, pre), (want, want_pre) = cpu.grouped_mlp(*args), reference.grouped_mlp(*wide(args))
        agree(out, want, assert_values)
        agree(pre, want_pre, assert_values)
        panels = [cpu.pack_weight(inputs[1], width // I), cpu.pack_weight(inputs[2], 1)]
        agree(cpu.grouped_mlp_packed(*args[:-1], *panels, isa), want, assert_values)
        args = (grad, *inputs, pre, *plan, activation, [True] * 6)
        check(cpu.grouped_mlp_backward(*args), reference.grouped_mlp_backward(*wide(args)), dtype, positive)
