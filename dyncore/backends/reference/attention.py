"""The reference backend's attention: a softmax over the pairs of queries and keys that count.

Shapes: B batch, N queries, M keys, D and E widths of a head. `logarithm` [B, heads, N] is log2 of each query's
denominator, infinity where no pair counts.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dyncore.backends.reference.common import wide


def by_token(like: Tensor, batch: int, heads: int, tokens: int, width: int) -> Tensor:
    """An empty [B, heads, N, D], the heads of a token side by side: the layout of every result, as projections have
    it."""
    return like.new_empty(batch, tokens, heads, width).transpose(1, 2)


def _only_live(t: Tensor, live: Tensor | None) -> Tensor:
    return wide(t) if live is None else torch.where(live[:, None, :, None], wide(t), 0)


def _of_each_head(t: Tensor, heads: int) -> Tensor:
    """Keys or values [B, kv_heads, M, D] as [B, heads, M, D]."""
    return t.repeat_interleave(heads // max(t.shape[1], 1), dim=1)


def pairs_that_count(
    q: Tensor,
    k: Tensor,
    q_positions: Tensor | None,
    k_positions: Tensor | None,
    q_live: Tensor | None,
    k_live: Tensor | None,
    causal: bool,
) -> Tensor:
    """bool [B, 1, N, M]."""
    queries, keys = q.shape[2], k.shape[2]
    counts = torch.ones((), dtype=torch.bool, device=q.device)
    if causal:
        at = torch.arange(queries, device=q.device)[None] if q_positions is None else q_positions
        places = torch.arange(keys, device=q.device)[None] if k_positions is None else k_positions
        counts = places[:, None, :] <= at[:, :, None]
    if q_live is not None:
        counts = counts & q_live[:, :, None]
    if k_live is not None:
        counts = counts & k_live[:, None, :]
    return counts.expand(q.shape[0], queries, keys)[:, None]


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
    counts = pairs_that_count(q, k, q_positions, k_positions, q_live, k_live, causal)
    values = _of_each_head(_only_live(v, k_live), q.shape[1])
    scores = _scores(q, k, q_live, k_live, bias, scale).masked_fill(~counts, -math.inf)
    logarithm = scores.logsumexp(-1) if k.shape[2] else scores.new_full(scores.shape[:3], -math.inf)
    logarithm = torch.where(counts.any(-1), logarithm, math.inf)
    out = (scores - logarithm[..., None]).exp() @ values
    return by_token(q, *out.shape).copy_(out), logarithm / math.log(2)


def _scores(
    q: Tensor, k: Tensor, q_live: Tensor | None, k_live: Tensor | None, bias: Tensor | None, scale: float
) -> Tensor:
    keys = _of_each_head(_only_live(k, k_live), q.shape[1])
    scores = scale * (_only_live(q, q_live) @ keys.transpose(2, 3))
    return scores if bias is None else scores + bias[:, None, None, :]


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
    heads, kv_heads = q.shape[1], k.shape[1]
    counts = pairs_that_count(q, k, q_positions, k_positions, q_live, k_live, causal)
    grad, rows = _only_live(grad, q_live), _only_live(q, q_live)
    keys, values = (_of_each_head(_only_live(t, k_live), heads) for t in (k, v))
    scores = _scores(q, k, q_live, k_live, bias, scale)
    weights = torch.where(counts, (scores - logarithm[..., None] * math.log(2)).exp(), 0)
    inner = (grad * _only_live(out, q_live)).sum(-1, keepdim=True)
    dscores = torch.where(counts, weights * (grad @ values.transpose(2, 3) - inner), 0)

    def of_kv_heads(t: Tensor) -> Tensor:
        return t.unflatten(1, (kv_heads, -1)).sum(2) if heads else t.new_zeros(t.shape[0], kv_heads, *t.shape[2:])

    found = (
        scale * (dscores @ keys),
        of_kv_heads(scale * (dscores.transpose(2, 3) @ rows)),
        of_kv_heads(weights.transpose(2, 3) @ grad),
    )
    dq, dk, dv = (
        by_token(q, *t.shape).copy_(t) if need else q.new_empty(0) for t, need in zip(found, needs, strict=True)
    )
    return dq, dk, dv
