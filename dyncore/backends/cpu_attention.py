"""The cpu backend's attention: csrc/cpu/attention.cpp, else the reference."""

from __future__ import annotations

import torch
from torch import Tensor

from dyncore.backends import reference
from dyncore.backends.cpu import native, or_empty, serves, threads
from dyncore.backends.reference.attention import by_token


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_positions: Tensor | None,
    k_positions: Tensor | None,
    q_live: Tensor | None,
    k_live: Tensor | None,
    bias: Tensor | None,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    marks = (q_positions, k_positions, q_live, k_live, bias, causal, scale)
    if not serves(q):
        return reference.attention(q, k, v, *marks)
    out = by_token(q, q.shape[0], q.shape[1], q.shape[2], v.shape[3])
    logarithm = q.new_empty(q.shape[:3], dtype=torch.float32)
    native.attention(q, k, v, *marks, out, logarithm, threads())
    return out, logarithm


def attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    logarithm: Tensor,
    q_positions: Tensor | None,
    k_positions: Tensor | None,
    q_live: Tensor | None,
    k_live: Tensor | None,
    bias: Tensor | None,
    causal: bool,
    scale: float,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    marks = (q_positions, k_positions, q_live, k_live, bias, causal, scale)
    if not serves(q):
        return reference.attention_backward(grad, q, k, v, out, logarithm, *marks, needs)
    dq, dk, dv = (by_token(q, *t.shape) if need else None for t, need in zip((q, k, v), needs, strict=True))
    native.attention_backward(grad, q, k, v, out, logarithm, *marks, dq, dk, dv, threads())
    return or_empty(dq, q), or_empty(dk, q), or_empty(dv, q)
