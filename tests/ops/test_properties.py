"""Property tests: every op on shapes, plans, strides and dtypes that nobody would write down, against the oracle."""

import hypothesis
import hypothesis.strategies as st
import torch

import dyncore as dc
from tests.support import ACTIVATIONS, GATED, combine, live, oracle_linear, oracle_mlp

settings = hypothesis.settings(max_examples=120, deadline=None, suppress_health_check=list(hypothesis.HealthCheck))

odd_sizes = st.one_of(st.integers(1, 9), st.sampled_from([31, 32, 33, 63, 64, 65, 100, 129]))
dtypes = st.sampled_from([torch.float32, torch.bfloat16])


@st.composite
def plans(draw, max_rows=70):
    """Plans that a user may make or write by hand: any rows, duplicates, empty groups, padding, with a scale or not."""
    num_rows = draw(st.integers(0, max_rows))
    num_groups = draw(st.integers(1, 6))
    sizes = draw(st.lists(st.integers(0, 40 if num_rows else 0), min_size=num_groups, max_size=num_groups))
    generator = torch.manual_seed(draw(st.integers(0, 2**31)))  # seeds the tensors of the example, too
    rows = [torch.randint(0, max(num_rows, 1), (n,), generator=generator).sort().values for n in sizes]
    padding = draw(st.integers(0, 3))
    offsets = torch.tensor([0, *torch.tensor(sizes).cumsum(0).tolist()])
    flat = torch.cat([*rows, torch.zeros(padding, dtype=torch.long)])
    scale = torch.randn(len(flat), generator=generator).requires_grad_() if draw(st.booleans()) else None
    return dc.Plan.from_slots(flat, offsets, num_rows=num_rows, scale=scale)


def strided(t, form):
    """`t` in another memory layout, with the same values."""
    if form == "transposed":
        return t.transpose(-1, -2).contiguous().transpose(-1, -2)
    if form == "sliced":
        wide = torch.full((*t.shape[:-1], t.shape[-1] + 3), float("nan"), dtype=t.dtype)
        wide[..., 1:-2] = t
        return wide[..., 1:-2]
    return t


layouts = st.sampled_from(["contiguous", "transposed", "sliced"])


def leaf(shape, dtype, form, scale=1.0):
    return strided((torch.randn(shape) * scale).to(dtype), form).detach().requires_grad_()


# The contract's tolerances are tested at usual sizes. Here a result may be a sum of few terms of unit size that cancel,
# so errors are taken relative to one term at least; a wrong row, group or tail is off by O(1).
RMS_TOLERANCE = {torch.float32: 5e-5, torch.bfloat16: 4e-2}


def compare(out, want, leaves, wide_leaves, dtype, computed=slice(None)):
    """Values of the rows `computed` (rows that are 0 would only make the errors look smaller), and all gradients."""
    grad = torch.randn(out.shape).to(dtype)
    got = torch.autograd.grad(out, leaves, grad)
    expected = torch.autograd.grad(want, wide_leaves, grad.double(), materialize_grads=True, allow_unused=True)
    for a, b in zip((out[computed], *got), (want[computed], *expected), strict=True):
        assert a.shape == b.shape
        assert torch.isfinite(a).all()
        if b.numel():
            rms = (a.double() - b).square().mean().sqrt() / b.square().mean().sqrt().clamp(min=1.0)
            assert rms <= RMS_TOLERANCE[dtype], f"RMS error {rms:.2e}"


def has_slot(plan):
    return plan.row_offsets.diff() > 0


def wide_copy(t):
    return None if t is None else t.detach().double().requires_grad_()


@settings
@hypothesis.given(
    plans(), odd_sizes, odd_sizes, dtypes, layouts, st.sampled_from(ACTIVATIONS), st.booleans(), st.booleans(),
    st.sampled_from(["sparse", "masked", "auto"]),
)  # fmt: skip
def test_grouped_mlp(plan, width, inner, dtype, layout, activation, biased, with_residual, mode):
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
    want = oracle_mlp(*wide[:5], plan, wide[6], activation, wide[5])
    compare(out, want, [t for t in tensors if t is not None], [t for t in wide if t is not None], dtype, has_slot(plan))


@settings
@hypothesis.given(
    plans(), odd_sizes, odd_sizes, dtypes, layouts,
    st.sampled_from([None, "relu", "relu2", "gelu", "gelu_tanh", "silu"]), st.booleans(), st.booleans(), st.booleans(),
    st.sampled_from(["sparse", "masked", "auto"]),
)  # fmt: skip
def test_grouped_linear(plan, width, out_width, dtype, layout, activation, biased, gather, scatter, mode):
    x = leaf((plan.num_rows if gather else plan.num_slots, width), dtype, layout)
    weight = leaf((plan.num_groups, out_width, width), dtype, layout, width**-0.5)
    bias = leaf((plan.num_groups, out_width), dtype, layout) if biased else None
    with dc.execution(mode):
        out = dc.grouped_linear(x, weight, bias, plan=plan, activation=activation, gather=gather, scatter=scatter)
    tensors = (x, weight, bias, plan.scale if scatter else None)
    wide = [wide_copy(t) for t in tensors]
    want = oracle_linear(*wide[:3], plan, wide[3], activation, gather, scatter)
    leaves, wide_leaves = [t for t in tensors if t is not None], [t for t in wide if t is not None]
    compare(out, want, leaves, wide_leaves, dtype, has_slot(plan) if scatter else slice(None))


@settings
@hypothesis.given(plans(), odd_sizes, dtypes, layouts, st.booleans())
def test_gather_and_scatter_rows(plan, width, dtype, layout, with_base):
    x = leaf((plan.num_rows, width), dtype, layout)
    base = leaf((plan.num_rows, width), dtype, layout) if with_base else None
    out = dc.scatter_rows(dc.gather_rows(x, plan), plan, base)
    tensors = (x, base, plan.scale)
    wide = [wide_copy(t) for t in tensors]
    rows, _ = live(plan)
    scale = None if wide[2] is None else wide[2][: len(rows)]
    want = combine(wide[0][rows], rows, plan.num_rows, scale, wide[1])
    compare(out, want, [t for t in tensors if t is not None], [t for t in wide if t is not None], dtype)
