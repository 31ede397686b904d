"""Whether two results are the same numbers, by the tolerances of the contract. No time is reported without it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Largest error over max(rms, |reference|); the RMS error may be a quarter of it.
VALUES = {torch.float64: 1e-10, torch.float32: 5e-5, torch.float16: 5e-3, torch.bfloat16: 2.5e-2}
# Gradients in 16 bits sum terms that were rounded themselves: their RMS error alone is bounded.
GRADIENTS_RMS = {torch.float16: 4e-3, torch.bfloat16: 1e-2}


_PIECE = 2**15  # elements: temporaries stay in a cache, and each step on one thread


def _pieces(t: Tensor) -> tuple[Tensor, ...]:
    """Weight gradients may take gigabytes: what is made of them in float64 is made piece by piece."""
    return t.detach().reshape(-1).split(_PIECE)


def errors(value: Tensor, reference: Tensor) -> tuple[float, float]:
    """(largest error over max(rms, |reference|), RMS error over the RMS of the reference); infinite for a lone NaN."""
    if value.shape != reference.shape:
        raise ValueError(f"value: expected shape {list(reference.shape)}, got {list(value.shape)}")
    if not value.numel():
        return 0.0, 0.0
    total, count = 0.0, 0
    for r in _pieces(reference):
        finite = r.double()
        if not finite.isfinite().all():
            finite = finite[finite.isfinite()]
        total, count = total + float(finite.square().sum()), count + finite.numel()
    rms = math.sqrt(total / count) if count else 0.0
    largest = squares = 0.0
    for v, r in zip(_pieces(value), _pieces(reference), strict=True):
        v, r = v.double(), r.double()
        difference = (v - r).abs_()
        relative = difference / r.abs().clamp_(min=rms)
        if not (rms and difference.isfinite().all()):  # the same infinity, NaN or 0 is no difference
            same = (v == r) | (v.isnan() & r.isnan())
            difference = torch.where(same, 0.0, difference)
            relative = torch.where(same, 0.0, torch.nan_to_num(relative, nan=torch.inf))
        largest = max(largest, float(relative.max()))
        squares += float(difference.square().sum())
    if largest == 0:
        return 0.0, 0.0
    return largest, math.sqrt(squares / value.numel()) / rms if rms else float("inf")


def disagreement(
    value: Tensor, reference: Tensor, *, gradient: bool = False, tolerance: float | None = None
) -> str | None:
    """Why `value` is not `reference` within the tolerance of value's dtype, or None if it is.

    Args:
        gradient: the tensors are gradients.
        tolerance: for the largest error (the RMS error may be a quarter of it) instead of the contract's.
    """
    if value.shape != reference.shape:
        return f"shape {list(value.shape)}, expected {list(reference.shape)}"
    bound, rms_bound = VALUES.get(value.dtype, 0.0), VALUES.get(value.dtype, 0.0) / 4
    if gradient and value.dtype in GRADIENTS_RMS:
        bound, rms_bound = float("inf"), GRADIENTS_RMS[value.dtype]
    if tolerance is not None:
        bound, rms_bound = tolerance, tolerance / 4
    largest, rms = errors(value, reference)
    if largest <= bound and rms <= rms_bound:
        return None
    return f"largest error {largest:.1e} (allowed {bound:.1e}), RMS {rms:.1e} (allowed {rms_bound:.1e})"
