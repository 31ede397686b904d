"""attention: softmax attention of queries and keys that carry their positions, where some of either were left out."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dyncore.backends.reference.common import check_on
from dyncore.ops.checks import autocast, expect_shape, expect_tensor


def _expect_places(name: str, value: object, batch: int, count: int, like: Tensor) -> Tensor | None:
    """Positions as int32 [B, count] or [1, count]."""
    if value is None:
        return None
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a Tensor, got {type(value).__name__}")
    if value.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name}: expected int32 or int64, got {value.dtype}")
    places = value[None] if value.dim() == 1 else value
    if places.dim() != 2 or places.shape[0] not in (1, batch) or places.shape[1] != count:
        raise ValueError(f"{name}: expected shape [{batch}, {count}], [1, {count}] or [{count}], got {[*value.shape]}")
    _expect_device(name, value, like)
    if not torch.compiler.is_compiling() and check_on(value.device) and value.numel() and int(value.min()) < 0:
        raise ValueError(f"{name}: expected positions >= 0, got {int(value.min())}")
    return places.int()


def _expect_marks(name: str, value: object, letters: str, sizes: tuple[int, int], like: Tensor) -> None:
    """q_live and k_live are bool, k_sizes floating."""
    if value is None:
        return
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a Tensor, got {type(value).__name__}")
    kind = "a floating dtype" if name == "k_sizes" else "bool"
    if value.dtype != torch.bool if kind == "bool" else not value.dtype.is_floating_point:
        raise TypeError(f"{name}: expected {kind}, got {value.dtype}")
    expect_shape(name, value, letters, sizes)
    _expect_device(name, value, like)


def _expect_device(name: str, value: Tensor, like: Tensor) -> None:
    if value.device != like.device:
        raise ValueError(f"{name}: expected a tensor on {like.device}, got one on {value.device}")


def _expect_heads(q: object, k: object, v: object) -> tuple[Tensor, Tensor, Tensor]:
    q = expect_tensor("q", q)
    q, k, v = autocast(q, expect_tensor("k", k), expect_tensor("v", v))
    assert q is not None
    expect_shape("q", q, "B heads N D", (None,) * 4)
    batch, heads, _, width = q.shape
    k, v = expect_tensor("k", k, like=q, of="q"), expect_tensor("v", v, like=q, of="q")
    expect_shape("k", k, "B kv_heads M D", (batch, None, None, width))
    expect_shape("v", v, "B kv_heads M E", (*k.shape[:3], None))
    if heads % max(k.shape[1], 1):
        raise ValueError(f"k: expected a number of heads that divides that of q, {heads}, got {k.shape[1]}")
    return q, k, v


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    q_positions: Tensor | None = None,
    k_positions: Tensor | None = None,
    causal: bool = True,
    q_live: Tensor | None = None,
    k_live: Tensor | None = None,
    k_sizes: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """softmax(scale q k^T) v, each query attending to the keys that are live and, if causal, not later than itself.

    Args:
        q: [B, heads, N, D]. k: [B, kv_heads, M, D]. v: [B, kv_heads, M, E]. Fewer kv_heads (GQA): a divisor of heads.
        q_positions, k_positions: int [B, N], [B, M] (or of one sequence, for all), >= 0: the place of each token in its
            sequence; 0, 1, 2... where None. Causality goes by them: pair (i, j) counts where k_positions[j] <=
            q_positions[i]. Any order is right; ascending positions are fast.
        causal: whether it does; without it positions are not looked at.
        q_live: bool [B, N]: others are filling, and come out as 0. k_live: bool [B, M]: others are not attended to.
            Either may hold anything, NaN included, and gets a zero gradient.
        k_sizes: float [B, M], > 0: how many tokens a key stands for, as after ToMe's merging (Bolya 2023); no gradient.
        scale: D ** -0.5 where None.

    Returns [B, heads, N, E]; a query that may attend to nothing gives exactly 0. Raises TypeError or ValueError on what
    does not fit; on an accelerator positions are checked under DYNCORE_CHECK=1.
    """
    q, k, v = _expect_heads(q, k, v)
    batch, queries, keys = q.shape[0], q.shape[2], k.shape[2]
    q_places = _expect_places("q_positions", q_positions, batch, queries, q)
    k_places = _expect_places("k_positions", k_positions, batch, keys, q)
    _expect_marks("q_live", q_live, "B N", (batch, queries), q)
    _expect_marks("k_live", k_live, "B M", (batch, keys), q)
    _expect_marks("k_sizes", k_sizes, "B M", (batch, keys), q)
    scale = q.shape[3] ** -0.5 if scale is None else scale
    if k.shape[1] != q.shape[1]:
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
    if q_places is None and k_places is None and q_live is None and k_live is None and k_sizes is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale)
    allowed = torch.ones((), dtype=torch.bool, device=q.device)
    if causal:
        at, places = (
            torch.arange(n, device=q.device)[None] if p is None else p
            for p, n in ((q_places, queries), (k_places, keys))
        )
        allowed = places[:, None, :] <= at[:, :, None]
    if q_live is not None:
        q, allowed = torch.where(q_live[:, None, :, None], q, 0), allowed & q_live[:, :, None]
    if k_live is not None:
        k, v = (torch.where(k_live[:, None, :, None], t, 0) for t in (k, v))
        allowed = allowed & k_live[:, None, :]
    allowed = allowed.expand(batch, queries, keys)[:, None]
    alone = allowed.logical_not().all(-1, keepdim=True)  # attends to anything, so that the softmax is a number
    mask = allowed | alone
    if k_sizes is not None:
        bias = k_sizes.detach()[:, None, None, :].to(torch.float32).log().to(q.dtype)
        mask = torch.where(mask, bias, float("-inf"))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    return torch.where(alone, 0, out)
