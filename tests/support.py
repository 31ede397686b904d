"""What the tests share: an independent float64 oracle with torch's own autograd, tolerances, and plans to try."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

import dyncore as dc

ACTIVATIONS = ("relu", "relu2", "gelu", "gelu_tanh", "silu", "swiglu", "geglu", "reglu")
GATED = ("swiglu", "geglu", "reglu")

# max error over max(rms, |reference|), and RMS error over rms (DESIGN: the tolerances of the contract)
VALUE_TOLERANCE = {
    torch.float64: (1e-11, 1e-11),
    torch.float32: (5e-5, 1.25e-5),
    torch.bfloat16: (2.5e-2, 6.25e-3),
    torch.float16: (5e-3, 1.25e-3),
}
GRAD_RMS_TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 4e-3}


def _errors(got: Tensor, want: Tensor) -> tuple[float, float]:
    got, want = got.detach().double(), want.detach().double()
    assert got.shape == want.shape, f"shape {list(got.shape)}, expected {list(want.shape)}"
    assert torch.isfinite(got).all(), "not finite"
    if want.numel() == 0:
        return 0.0, 0.0
    rms = want.square().mean().sqrt().clamp(min=1e-30)
    error = (got - want).abs()
    return float((error / torch.maximum(rms, want.abs())).max()), float(error.square().mean().sqrt() / rms)


def assert_values(got: Tensor, want: Tensor, computed_in: torch.dtype | None = None, what: str = "value") -> None:
    """`computed_in` is the dtype of the op, if not that of `got`: the coarser of the two sets the tolerance."""
    worst, rms = _errors(got, want)
    max_tolerance, rms_tolerance = max(VALUE_TOLERANCE[got.dtype], VALUE_TOLERANCE[computed_in or got.dtype])
    assert worst <= max_tolerance, f"{what}: max error {worst:.2e} > {max_tolerance:.2e}"
    assert rms <= rms_tolerance, f"{what}: RMS error {rms:.2e} > {rms_tolerance:.2e}"


def assert_gradients(got: Tensor, want: Tensor, computed_in: torch.dtype, what: str = "gradient") -> None:
    """`computed_in` is the dtype of the op: the gradient of a float32 scale is as exact as bfloat16 products are."""
    if computed_in in GRAD_RMS_TOLERANCE:
        rms = _errors(got, want)[1]
        assert rms <= GRAD_RMS_TOLERANCE[computed_in], f"{what}: RMS {rms:.2e} > {GRAD_RMS_TOLERANCE[computed_in]}"
    else:
        assert_values(got, want, computed_in, what)


def act(h: Tensor, name: str | None) -> Tensor:
    if name in GATED:
        gate, up = h.chunk(2, dim=-1)
        return act(gate, {"swiglu": "silu", "geglu": "gelu", "reglu": "relu"}[name]) * up
    functions = {
        None: lambda t: t,
        "relu": F.relu,
        "relu2": lambda t: F.relu(t) ** 2,
        "gelu": F.gelu,
        "gelu_tanh": lambda t: F.gelu(t, approximate="tanh"),
        "silu": F.silu,
    }
    return functions[name](h)


def live(plan: dc.Plan) -> tuple[Tensor, Tensor]:
    """(rows, groups) of the live slots, int64, from rows and offsets alone."""
    count = int(plan.offsets[-1])
    sizes = plan.offsets.long().diff()
    return plan.rows[:count].long(), torch.repeat_interleave(torch.arange(sizes.shape[0]), sizes)


def combine(y: Tensor, rows: Tensor, num_rows: int, scale: Tensor | None, base: Tensor | None) -> Tensor:
    if scale is not None:
        y = y * scale[:, None]
    out = torch.zeros(num_rows, y.shape[1], dtype=y.dtype)
    return out.index_add(0, rows, y) + (0 if base is None else base)


def oracle_linear(x, weight, bias, plan, scale, activation, gather, scatter):
    """grouped_linear slot by slot; `scale` [A] or None stands in for plan.scale, so that it can be differentiated."""
    rows, groups = live(plan)
    slots = x[rows] if gather else x[: len(rows)]
    y = torch.einsum("ank,ak->an", weight[groups], slots)
    if bias is not None:
        y = y + bias[groups]
    y = act(y, activation)
    if scatter:
        return combine(y, rows, plan.num_rows, None if scale is None else scale[: len(rows)], None)
    return torch.cat([y, y.new_zeros(plan.num_slots - len(rows), y.shape[1])])


def oracle_mlp(x, w_in, w_out, b_in, b_out, plan, scale, activation, residual):
    rows, groups = live(plan)
    h = torch.einsum("aih,ah->ai", w_in[groups], x[rows])
    if b_in is not None:
        h = h + b_in[groups]
    y = torch.einsum("ahi,ai->ah", w_out[groups], act(h, activation))
    if b_out is not None:
        y = y + b_out[groups]
    return combine(y, rows, plan.num_rows, None if scale is None else scale[: len(rows)], residual)


def make_plan(kind: str, num_rows: int, num_groups: int, scale_dtype: torch.dtype | None) -> dc.Plan:
    """A plan of the kind named, its scale a leaf that requires grad (None if `scale_dtype` is)."""
    if kind == "one_group":  # token skipping
        num_groups = 1
        plan = dc.select(torch.rand(num_rows) < 0.4)
    elif kind == "all_rows":
        plan = dc.route(torch.full((num_rows, 1), num_groups - 1), num_groups=num_groups)
    elif kind == "no_slots":
        plan = dc.route(torch.full((num_rows, 2), -1), num_groups=num_groups)
    elif kind == "duplicates":  # a row may go to a group twice
        plan = dc.route(torch.randint(-1, max(num_groups - 1, 1), (num_rows, 3)), num_groups=num_groups)
    elif kind == "padded":  # static buffers, as an accelerator has them
        mask = torch.rand(num_rows, num_groups) < 0.3
        tensors = torch.ops.dyncore.plan_mask(mask, num_rows * num_groups + 3)
        plan = dc.Plan(tensors[0], tensors[1], None, num_rows, tensors[2], tensors[3])
    else:
        assert kind == "routed"  # top-2, group 0 always empty
        low = 1 if num_groups > 1 else 0
        plan = dc.route(torch.randint(low, num_groups, (num_rows, 2)), num_groups=num_groups)
    if scale_dtype is None:
        return plan
    scale = torch.randn(plan.num_slots).to(scale_dtype).requires_grad_()
    return dc.Plan(plan.rows, plan.offsets, scale, plan.num_rows, plan.row_offsets, plan.row_slots, plan.exact)


PLAN_KINDS = ("one_group", "all_rows", "no_slots", "duplicates", "padded", "routed")
