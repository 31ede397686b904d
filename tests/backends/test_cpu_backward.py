"""The backward kernels on either side of every change of form, to the bit: sums of -1, 0 and 1 have no rounding."""

import pytest
import torch

from dyncore.backends import cpu, reference
from tests.backends.test_cpu import wide

pytestmark = pytest.mark.skipif(not cpu.available, reason=cpu.reason)

# rows of a register tile: 6 and 12; slots in a chain: 512; slots summed at once: 512, as pairs 1024
SLOTS = [1, 2, 5, 6, 7, 12, 13, 25, 511, 512, 513, 1023, 1025]
# rows of a weight gradient that share packed columns: 16 register tiles
OUTPUTS = [1, 11, 13, 95, 97, 191, 193]
COLUMNS = [1, 31, 32, 33, 100]
# terms in a chain: 512; depth of a packed panel: 2048
DEPTHS = [1, 2, 3, 17, 511, 513, 2049]


@pytest.fixture(params=[torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
def dtype(request):
    return request.param


def signs(*shape, dtype):
    return torch.randint(-1, 2, shape).to(dtype)


def slots_of_two_groups(count):
    """Plan tensors of `count` slots in group 1 of 3, of 3 slots in group 2; each row has up to two of them."""
    mask = torch.zeros(count + 1, 3, dtype=torch.bool)
    mask[:count, 1] = True
    mask[:3, 2] = True
    live = int(mask.sum())
    rows, offsets, row_offsets, row_slots = reference.plan_mask(mask, live)
    scale = torch.randint(0, 2, (live,)) * 2.0 - 1.0
    return rows, offsets, scale, row_offsets, row_slots


def check(args, needs, dtype):
    got = cpu.grouped_linear_backward(*args, needs)
    want = reference.grouped_linear_backward(*wide(args), needs)
    for g, w, need in zip(got[:3], want[:3], needs[:3], strict=True):
        if need:
            assert torch.equal(g, w.to(dtype))


@pytest.mark.parametrize("slots", SLOTS)
def test_weight_gradients(isa, dtype, slots):
    plan = slots_of_two_groups(slots)
    sizes = [(97, 40), (40, 33)]
    if slots in (7, 513, 1025):  # of each number of sums, every change of form in rows and columns
        sizes = [*((n, 40) for n in OUTPUTS), *((40, k) for k in COLUMNS)]
    for outputs, columns in sizes:
        grad = signs(slots + 1, outputs, dtype=dtype)
        x, weight = signs(slots + 1, columns, dtype=dtype), signs(3, outputs, columns, dtype=dtype)
        args = (grad, x, weight, weight[:, :, 0], x.new_empty(0), *plan, "none", True, True)
        check(args, [False, True, True, False], dtype)


@pytest.mark.parametrize("layout", ["inputs_adjacent", "outputs_adjacent"])
@pytest.mark.parametrize("depth", DEPTHS)
def test_input_gradients(isa, dtype, depth, layout):
    sizes = [(5, 33), (14, 64)]
    if depth in (3, 513, 2049):  # a chain, two, two panels: every change of form in slots and columns
        sizes = [*((m, 64) for m in SLOTS[:8]), *((m, k) for m in (5, 14) for k in COLUMNS)]
    for slots, columns in sizes:
        plan = slots_of_two_groups(slots)
        grad, x = signs(slots + 1, depth, dtype=dtype), signs(slots + 1, columns, dtype=dtype)
        weight = signs(3, depth, columns, dtype=dtype)
        if layout == "outputs_adjacent":
            weight = weight.transpose(1, 2).contiguous().transpose(1, 2)
        args = (grad, x, weight, None, x.new_empty(0), *plan, "none", True, True)
        check(args, [True, False, False, False], dtype)


@pytest.mark.parametrize("per_row", [1, 2])
def test_an_mlp_with_a_group_of_many_slots(isa, dtype, per_row):
    """A row's gradient goes straight to it where rows have one slot, and through a buffer of slots elsewhere."""
    num_rows, h, i = 1300, 33, 20
    expert = torch.stack([torch.zeros(num_rows, dtype=torch.int64), torch.randint(1, 3, (num_rows,))], 1)[:, :per_row]
    rows, offsets, row_offsets, row_slots, _ = reference.plan_route(expert, 4, expert.numel())
    plan = (rows, offsets, torch.ones(expert.numel()), row_offsets, row_slots)
    x, grad = signs(num_rows, h, dtype=dtype), signs(num_rows, h, dtype=dtype)
    # of few entries, so that every sum stays a whole number that 8 bits hold
    w_in, w_out = torch.zeros(4, i, h, dtype=dtype), torch.zeros(4, h, i, dtype=dtype)
    w_in[:, range(i), range(i)] = 1
    w_out[:, range(i), range(i)] = 1
    b_in, b_out, pre = w_in[:, :, 0], w_out[:, :, 0], signs(expert.numel(), i, dtype=dtype)
    args = (grad, x, w_in, w_out, b_in, b_out, pre, *plan, "relu", [True] * 6)
    got, want = cpu.grouped_mlp_backward(*args), reference.grouped_mlp_backward(*wide(args))
    for g, w in zip(got[:5], want[:5], strict=True):
        assert torch.equal(g, w.to(dtype))
