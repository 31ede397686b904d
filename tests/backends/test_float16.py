"""Conversions from and to float16 in every instruction set, to the bit: every float16, and a dense set of floats."""

import pytest
import torch

from dyncore.backends import cpu, reference

pytestmark = pytest.mark.skipif(not cpu.available, reason=cpu.reason)

WIDTHS = [1, 45]  # a vector that is partly filled; whole panels, whole vectors behind them and such a one
EVERY = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.float16)


@pytest.fixture(params=[False, True], ids=["", "flush-denormal"])
def flush(request):
    """Denormal floats flushed to zero, as a user may ask; those of float16 are not among them."""
    if request.param and not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush denormals")
    yield
    torch.set_flush_denormal(False)


def identity(num_rows):
    plan = reference.plan_mask(torch.ones(num_rows, 1, dtype=torch.bool), num_rows)
    return plan[0], plan[1], plan[2], plan[3]


def narrow_floats():
    """Floats on and beside every boundary between two float16, and random bits."""
    halves = EVERY[torch.isfinite(EVERY)].double().unique()
    boundaries = torch.cat([halves, (halves[1:] + halves[:-1]) / 2, torch.tensor([65520.0, -65520.0])]).float()
    bits = boundaries.view(torch.int32)
    random = torch.randint(-(2**31), 2**31, (200_000,)).to(torch.int32)
    special = torch.tensor([float("inf"), -float("inf"), float("nan"), 1e-40, -1e-45, 3.4e38])
    return torch.cat([special, *(t.view(torch.float32) for t in (bits, bits + 1, bits - 1, random))])


def agree(got, want):
    return (
        got.dtype == want.dtype
        and torch.equal(got.isnan(), want.isnan())
        and torch.equal(
            got.nan_to_num(0.0, float("inf"), -float("inf")), want.nan_to_num(0.0, float("inf"), -float("inf"))
        )
    )


@pytest.mark.parametrize("width", WIDTHS)
def test_every_float16_becomes_the_float_it_is(isa, flush, width):
    """The gradient of a slot's scale is float32: here the one element of its row that is not 0, times 1."""
    rows, offsets, row_offsets, row_slots = identity(len(EVERY))
    y, grad = torch.zeros(2, len(EVERY), width, dtype=torch.float16)
    y[:, width // 2], grad[:, width // 2] = EVERY, 1.0
    scale = torch.ones(len(EVERY))
    got = cpu.scatter_rows_backward(grad, y, rows, offsets, scale, row_offsets, row_slots, [False, True])[1]
    assert agree(got, EVERY.float())


@pytest.mark.parametrize("width", WIDTHS)
def test_floats_round_to_float16_as_in_torch(isa, flush, width):
    """Each row is 1 times its slot's scale, which is float32."""
    floats = narrow_floats()
    rows, offsets, row_offsets, row_slots = identity(len(floats))
    ones = torch.ones(len(floats), width, dtype=torch.float16)
    out = cpu.scatter_rows(ones, None, rows, offsets, floats, row_offsets, row_slots)
    assert agree(out, floats.half()[:, None].expand(-1, width))


def test_every_float16_survives_a_round_trip(isa, flush):
    rows, offsets, row_offsets, row_slots = identity(len(EVERY) // 64)
    y = EVERY.view(-1, 64)
    out = cpu.scatter_rows(y, None, rows, offsets, None, row_offsets, row_slots)
    assert agree(out, y)
    assert torch.equal(out.view(torch.int16)[~y.isnan() & (y != 0)], y.view(torch.int16)[~y.isnan() & (y != 0)])


def test_what_is_too_large_is_infinite(isa):
    rows, offsets, row_offsets, row_slots = identity(40)
    x = torch.full((40, 33), 60.0, dtype=torch.float16)
    weight = torch.full((1, 35, 33), 60.0, dtype=torch.float16)
    weight[0, 1] = -60.0
    weight[0, 2] = 59.0
    plan = (rows, offsets, None, row_offsets, row_slots)
    out = cpu.grouped_linear(x, weight, None, *plan, "none", True, True, False)[0]
    want = (x.double() @ weight[0].double().t()).half()
    assert torch.equal(out, want)
    assert out[0, 0] == float("inf")
    assert out[0, 1] == -float("inf")
