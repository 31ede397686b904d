"""Property tests of the sparse ops: shapes, sparsities, strides and dtypes that nobody would write down.

float32 is compared within a tolerance; bfloat16 and float16 to the bit, on small whole numbers, of which every product
and sum is exact in float32 and every hidden activation in the narrow type.
"""

import hypothesis
import hypothesis.strategies as st
import torch
import torch.nn.functional as F

import dyncore as dc
from tests.ops.sparse import ACTIVATIONS, oracle, run, wide_copy

settings = hypothesis.settings(max_examples=100, deadline=None, suppress_health_check=list(hypothesis.HealthCheck))

num_rows = st.one_of(st.integers(0, 9), st.sampled_from([15, 16, 17, 64, 65, 100]))
sizes = st.one_of(st.integers(1, 9), st.sampled_from([31, 32, 33, 63, 64, 65, 100, 129]))
widths = st.one_of(sizes, st.sampled_from([256, 513]))
modes = st.sampled_from(["sparse", "masked", "auto"])
layouts = st.sampled_from(["contiguous", "transposed", "sliced"])
densities = st.sampled_from([0.0, 0.03, 0.1, 0.3, 0.7, 1.0])
dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])


def leaf(t, dtype, layout):
    t = t.to(dtype)
    if layout == "transposed":
        t = t.t().contiguous().t()
    elif layout == "sliced":
        wide = torch.full((*t.shape[:-1], t.shape[-1] + 3), float("nan"), dtype=dtype)
        wide[..., 1:-2] = t
        t = wide[..., 1:-2]
    return t.detach().requires_grad_()


def compare(out, want, leaves, wide_leaves):
    exact = out.dtype is not torch.float32
    grad = torch.randint(-1, 2, out.shape).to(out.dtype)
    leaves, wide_leaves = ([t for t in ts if t is not None] for ts in (leaves, wide_leaves))
    got = torch.autograd.grad(out, leaves, grad)
    expected = torch.autograd.grad(want, wide_leaves, grad.double())
    for a, b in zip((out, *got), (want, *expected), strict=True):
        assert a.shape == b.shape
        if exact:
            assert torch.equal(a, b.to(a.dtype))
        elif b.numel():
            rms = (a.double() - b).square().mean().sqrt() / b.square().mean().sqrt().clamp(min=1)
            assert rms <= 1e-5, f"RMS error {rms:.2e}"


def signs(*shape, density=1.0):
    """-1, 0 and 1."""
    return torch.randint(-1, 2, shape) * (torch.rand(shape) < density)


@settings
@hypothesis.given(
    num_rows, sizes, widths, dtypes, layouts, layouts, st.sampled_from(ACTIVATIONS), densities, st.booleans(), modes,
    st.sampled_from(["compressed", "dense", "recompute"]), st.integers(0, 2**31),
)  # fmt: skip
def test_sparse_mlp(rows, width, inner, dtype, in_layout, out_layout, activation, density, biased, mode, save, seed):
    torch.manual_seed(seed)
    gated = activation == "reglu"
    w_in = signs((1 + gated) * inner, width, density=min(1.0, 4 / width))  # few terms: hidden activations stay small
    b_in = signs(w_in.shape[0])
    on = torch.rand(inner) < density
    b_in[:inner] -= torch.where(on, 0, 40)
    p = {
        "x": leaf(signs(rows, width), dtype, in_layout),
        "w_in": leaf(w_in, dtype, in_layout),
        "w_out": leaf(signs(width, inner), dtype, out_layout),
        "b_in": leaf(b_in, dtype, "contiguous") if biased else None,
        "b_out": leaf(signs(width), dtype, "contiguous") if biased else None,
    }
    with dc.execution(mode):
        out = run(p, activation, save=save)
    q = {n: wide_copy(t) for n, t in p.items()}
    compare(out, oracle(q, activation), p.values(), q.values())


@settings
@hypothesis.given(
    num_rows, widths, sizes, dtypes, layouts, layouts, densities, st.booleans(), modes, st.integers(0, 2**31)
)
def test_sparse_linear(rows, inner, width, dtype, h_layout, layout, density, biased, mode, seed):
    torch.manual_seed(seed)
    p = (
        leaf(signs(rows, inner, density=density), dtype, h_layout),
        leaf(signs(width, inner), dtype, layout),
        leaf(signs(width), dtype, "contiguous") if biased else None,
    )
    with dc.execution(mode):
        out = dc.sparse_linear(*p)
    q = [wide_copy(t) for t in p]
    compare(out, F.linear(*q), p, q)
