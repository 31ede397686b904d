"""How far rows lie apart does not change a bit, 4096 bytes (where they share a set of the L1 cache) included."""

import pytest
import torch

import dyncore as dc
from dyncore.backends import cpu

pytestmark = pytest.mark.skipif(not cpu.available, reason=cpu.reason)

CROWDED = [(torch.float32, 1024), (torch.bfloat16, 2048)]
SMALL = (40, 0, 130, 460, 70)  # rows of groups below and above the dot form's range, in one block


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def plan_of(sizes):
    """The groups share out a permutation of the rows, so that none has several slots."""
    group = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    return dc.route(group[torch.randperm(len(group)), None], num_groups=len(sizes))


def apart(t):
    """The same rows, 32 elements further apart."""
    padded = torch.full((t.shape[0], t.shape[1] + 32), float("nan"), dtype=t.dtype)
    padded[:, : t.shape[1]] = t.detach()
    return padded[:, : t.shape[1]].requires_grad_(t.requires_grad)


def weight(*shape, dtype):
    return (torch.randn(shape) / shape[-1] ** 0.5).to(dtype).requires_grad_()


def assert_same_bits(op, x, weights, grad):
    results = []
    for rows, cotangent in ((x, grad), (apart(x), apart(grad))):
        y = op(rows, *weights)
        results.append((y, *torch.autograd.grad(y, (rows, *weights), cotangent)))
    for crowded, spread in zip(*results, strict=True):
        assert torch.isfinite(crowded).all()
        assert torch.equal(crowded, spread)


@pytest.mark.parametrize(("dtype", "width"), CROWDED, ids=str)
@pytest.mark.parametrize("gather", [True, False], ids=["gathered", "by slot"])
def test_grouped_linear(isa, dtype, width, gather):
    plan = plan_of(SMALL)
    x = torch.randn(sum(SMALL), width).to(dtype).requires_grad_()
    assert_same_bits(
        lambda x, w: dc.grouped_linear(x, w, plan=plan, gather=gather, scatter=gather),
        x,
        [weight(len(SMALL), width, width, dtype=dtype)],
        torch.randn(sum(SMALL), width).to(dtype),
    )


@pytest.mark.parametrize(("dtype", "width"), CROWDED, ids=str)
@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_grouped_mlp(isa, dtype, width, activation):
    plan, hidden = plan_of(SMALL), 1056
    x = torch.randn(sum(SMALL), width).to(dtype).requires_grad_()
    w_in = weight(len(SMALL), hidden * (2 if activation == "swiglu" else 1), width, dtype=dtype)
    assert_same_bits(
        lambda x, w_in, w_out: dc.grouped_mlp(x, w_in, w_out, plan=plan, activation=activation),
        x,
        [w_in, weight(len(SMALL), width, hidden, dtype=dtype)],
        torch.randn(sum(SMALL), width).to(dtype),
    )


def test_several_blocks():
    """A block of grouped_linear has 768 rows here, one of grouped_mlp 1117 (4 MB a thread)."""
    sizes = (900, 20, 1500, 1300)
    plan, rows = plan_of(sizes), sum(sizes)
    with torch.no_grad():
        x, w = torch.randn(rows, 4096), weight(len(sizes), 1024, 4096, dtype=torch.float32)
        assert torch.equal(dc.grouped_linear(x, w, plan=plan), dc.grouped_linear(apart(x), w, plan=plan))
        x, w_in = x[:, :1024].contiguous(), weight(len(sizes), 2816, 1024, dtype=torch.float32)
        mlp = (w_in, weight(len(sizes), 1024, 2816, dtype=torch.float32))
        assert torch.equal(dc.grouped_mlp(x, *mlp, plan=plan), dc.grouped_mlp(apart(x), *mlp, plan=plan))
