"""How far the rows of x lie apart does not change a bit, though rows 4096 bytes apart are copied first."""

import pytest
import torch

import dyncore as dc
from dyncore.backends import cpu

pytestmark = pytest.mark.skipif(not cpu.available, reason=cpu.reason)

ROWS, SIZES = 700, [40, 0, 130, 460, 70]  # with groups below and above the dot form's range
CROWDED = [(torch.float32, 1024), (torch.bfloat16, 2048), (torch.float32, 4096)]


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def plan():
    """A group at a time takes the rows of a permutation, so that none has several slots."""
    group = torch.repeat_interleave(torch.arange(len(SIZES)), torch.tensor(SIZES))
    return dc.route(group[torch.randperm(ROWS), None], num_groups=len(SIZES))


def apart(x):
    """The same rows, 32 elements further apart."""
    padded = torch.full((x.shape[0], x.shape[1] + 32), float("nan"), dtype=x.dtype)
    padded[:, : x.shape[1]] = x
    return padded[:, : x.shape[1]]


@pytest.mark.parametrize(("dtype", "width"), CROWDED, ids=str)
@pytest.mark.parametrize("gather", [True, False], ids=["gathered", "by slot"])
def test_grouped_linear(isa, threads, plan, dtype, width, gather):
    columns = 1056
    x = torch.randn(ROWS, width).to(dtype)
    weight = (torch.randn(len(SIZES), columns, width) / width**0.5).to(dtype)
    options = {"plan": plan, "gather": gather, "scatter": gather}
    y = dc.grouped_linear(x, weight, **options)
    assert torch.equal(y, dc.grouped_linear(apart(x), weight, **options))


@pytest.mark.parametrize(("dtype", "width"), CROWDED[:2], ids=str)
@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_grouped_mlp(isa, threads, plan, dtype, width, activation):
    hidden = 2816 if activation == "gelu" else 544  # where groups make up several blocks, and one
    x = torch.randn(ROWS, width).to(dtype)
    w_in = torch.randn(len(SIZES), hidden * (2 if activation == "swiglu" else 1), width) / width**0.5
    w_out = torch.randn(len(SIZES), width, hidden) / hidden**0.5
    weights, options = (w_in.to(dtype), w_out.to(dtype)), {"plan": plan, "activation": activation}
    y = dc.grouped_mlp(x, *weights, **options)
    assert torch.equal(y, dc.grouped_mlp(apart(x), *weights, **options))
