"""Property tests: every op on shapes, plans, strides and dtypes that nobody would write down, against the oracle.

float32 is compared within a tolerance, on random data. bfloat16 and float16 are compared to the bit, on small whole
numbers: every product and sum of them is exact in float32, and the hidden layer in the narrow type, so that only the
last rounding is left.
"""

import hypothesis
import hypothesis.strategies as st
import torch

import dyncore as dc
from tests.support import ACTIVATIONS, GATED, combine, live, oracle_linear, oracle_mlp

settings = hypothesis.settings(max_examples=120, deadline=None, suppress_health_check=list(hypothesis.HealthCheck))

odd_sizes = st.one_of(st.integers(1, 9), st.sampled_from([31, 32, 33, 63, 64, 65, 100, 129]))
modes = st.sampled_from(["sparse", "masked", "auto"])
layouts = st.sampled_from(["contiguous", "transposed", "sliced"])
NARROW = (torch.bfloat16, torch.float16)


@st.composite
def plans(draw, max_rows=70):
    """Plans that a user may make or write by hand: any rows, duplicates, empty groups, padding, with a scale or not.
    Scales are -1 and 1, and exact in any dtype."""
    num_rows = draw(st.integers(0, max_rows))
    num_groups = draw(st.integers(1, 6))
    sizes = draw(st.lists(st.integers(0, 40 if num_rows else 0), min_size=num_groups, max_size=num_groups))
    generator = torch.manual_seed(draw(st.integers(0, 2**31)))  # seeds the tensors of the example, too
    rows = [torch.randint(0, max(num_rows, 1), (n,), generator=generator).sort().values for n in sizes]
    padding = draw(st.integers(0, 3))
    offsets = torch.tensor([0, *torch.tensor(sizes).cumsum(0).tolist()])
    flat = torch.cat([*rows, torch.zeros(padding, dtype=torch.long)])
    scale = torch.randint(0, 2, flat.shape, generator=generator).mul(2.0).sub(1.0).requires_grad_()
    return dc.Plan.from_slots(flat, offsets, num_rows=num_rows, scale=scale if draw(st.booleans()) else None)


def leaf(shape, dtype, layout, scale=1.0):
    """A leaf of the layout named: random, or -1, 0 and 1 for the narrow types."""
    t = torch.randint(-1, 2, shape).to(dtype) if dtype in NARROW else torch.randn(shape) * scale
    if layout == "transposed":
        t = t.transpose(-1, -2).contiguous().transpose(-1, -2)
    elif layout == "sliced":
        wide = torch.full((*t.shape[:-1], t.shape[-1] + 3), float("nan"), dtype=t.dtype)
        wide[..., 1:-2] = t
        t = wide[..., 1:-2]
    return t.detach().requires_grad_()


def wide_copy(t):
    return None if t is None else t.detach().double().requires_grad_()


def compare(out, want, leaves, wide_leaves, plan):
    """The values and every gradient."""
    exact = out.dtype in NARROW
    grad = torch.randint(-1, 2, out.shape).to(out.dtype) if exact else torch.randn(out.shape)
    leaves, wide_leaves = ([t for t in ts if t is not None] for ts in (leaves, wide_leaves))
    got = torch.autograd.grad(out, leaves, grad)
    expected = torch.autograd.grad(want, wide_leaves, grad.double(), materialize_grads=True, allow_unused=True)
    # A sum of few terms of unit size may cancel: float32 errors are taken relative to the terms of a row at least.
    term = float(plan.row_offsets.diff().max().clamp(min=1)) if plan.num_rows else 1.0
    for a, b in zip((out, *got), (want, *expected), strict=True):
        assert a.shape == b.shape
        if exact:
            assert torch.equal(a, b.to(a.dtype))
        elif b.numel():
            rms = (a.double() - b).square().mean().sqrt() / b.square().mean().sqrt().clamp(min=term)
            assert rms <= 5e-5, f"RMS error {rms:.2e}"


def check_grouped_mlp(plan, width, inner, dtype, layout, activation, biased, with_residual, mode):
    wide_inner = inner * (2 if activation in GATED else 1)
    groups = plan.num_groups
    x = leaf((plan.num_rows, width), dtype, layout)
    w_in = leaf((groups, wide_inner, width), dtype, layout, width**-0.5)
    w_out = leaf((groups, width, inner), dtype, layout, inner**-0.5)
    b_in = leaf((groups, wide_inner), dtype, layout) if biased else None
    b_out = leaf((groups, width), dtype, layout) if biased else None
    residual = leaf((plan.num_rows, width), dtype, layout) if with_residual else None
    with dc.execution(mode):
        out = dc.grouped_mlp(x, w_in, w_out, b_in, b_out, plan=plan, activation=activation, residual=residual)
    tensors = (x, w_in, w_out, b_in, b_out, residual, plan.scale)
    wide = [wide_copy(t) for t in tensors]
    compare(out, oracle_mlp(*wide[:5], plan, wide[6], activation, wide[5]), tensors, wide, plan)


@settings
@hypothesis.given(
    plans(), odd_sizes, odd_sizes, layouts, st.sampled_from(ACTIVATIONS), st.booleans(), st.booleans(), modes
)
def test_grouped_mlp(plan, width, inner, layout, activation, biased, with_residual, mode):
    check_grouped_mlp(plan, width, inner, torch.float32, layout, activation, biased, with_residual, mode)


@settings
@hypothesis.given(plans(), odd_sizes, odd_sizes, st.sampled_from(NARROW), layouts, st.booleans(), st.booleans())
def test_grouped_mlp_is_exact_on_small_whole_numbers(plan, width, inner, dtype, layout, biased, with_residual):
    check_grouped_mlp(plan, width, inner, dtype, layout, "relu", biased, with_residual, "sparse")


def check_grouped_linear(plan, width, out_width, dtype, layout, activation, biased, gather, scatter, mode):
    x = leaf((plan.num_rows if gather else plan.num_slots, width), dtype, layout)
    weight = leaf((plan.num_groups, out_width, width), dtype, layout, width**-0.5)
    bias = leaf((plan.num_groups, out_width), dtype, layout) if biased else None
    with dc.execution(mode):
        out = dc.grouped_linear(x, weight, bias, plan=plan, activation=activation, gather=gather, scatter=scatter)
    tensors = (x, weight, bias, plan.scale if scatter else None)
    wide = [wide_copy(t) for t in tensors]
    compare(out, oracle_linear(*wide[:3], plan, wide[3], activation, gather, scatter), tensors, wide, plan)


@settings
@hypothesis.given(
    plans(), odd_sizes, odd_sizes, layouts, st.sampled_from([None, "relu", "relu2", "gelu", "gelu_tanh", "silu"]),
    st.booleans(), st.booleans(), st.booleans(), modes,
)  # fmt: skip
def test_grouped_linear(plan, width, out_width, layout, activation, biased, gather, scatter, mode):
    check_grouped_linear(plan, width, out_width, torch.float32, layout, activation, biased, gather, scatter, mode)


@settings
@hypothesis.given(
    plans(), odd_sizes, odd_sizes, st.sampled_from(NARROW), layouts, st.sampled_from([None, "relu"]), st.booleans(),
    st.booleans(), st.booleans(),
)  # fmt: skip
def test_grouped_linear_is_exact_on_small_whole_numbers(
    plan, width, out_width, dtype, layout, activation, biased, gather, scatter
):
    check_grouped_linear(plan, width, out_width, dtype, layout, activation, biased, gather, scatter, "sparse")


@settings
@hypothesis.given(plans(), odd_sizes, st.sampled_from([torch.float32, *NARROW]), layouts, st.booleans())
def test_gather_and_scatter_rows(plan, width, dtype, layout, with_base):
    x = leaf((plan.num_rows, width), dtype, layout)
    base = leaf((plan.num_rows, width), dtype, layout) if with_base else None
    out = dc.scatter_rows(dc.gather_rows(x, plan), plan, base)
    tensors = (x, base, plan.scale)
    wide = [wide_copy(t) for t in tensors]
    rows, _ = live(plan)
    scale = None if wide[2] is None else wide[2][: len(rows)]
    compare(out, combine(wide[0][rows], rows, plan.num_rows, scale, wide[1]), tensors, wide, plan)
