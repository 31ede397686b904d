"""attention: softmax attention of queries and keys that carry their positions, where some of either were left out."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from dyncore.backends import cpu
from dyncore.backends.reference.attention import pairs_that_count
from dyncore.backends.reference.common import check_on
from dyncore.execution import mode
from dyncore.ops.autograd import first_derivative_only, wants_grad
from dyncore.ops.checks import autocast, expect_shape, expect_tensor
from dyncore.ops.flops import holds_no_data
from dyncore.transforms import apply

_forward = torch.ops.dyncore.attention.default
_backward = torch.ops.dyncore.attention_backward.default

# From so many queries on the kernel is faster than torch's attention, where something is left out and where nothing
# is. 32 stand in its lanes together: with fewer it does the work of 32. Measured on Zen 4 with 2 threads in float32,
# forward (and with backward): with inputs that change, 32 of 2048 tokens take 0.86 times a mask's speed, 128 of 2048
# 1.48 (1.43); all of 128 tokens 1.02 (0.89) times is_causal's, of 512 1.87 (1.74). In bfloat16 the gain is larger.
_FEWEST_SELECTED = 64
_FEWEST_OF_ALL = 192


def _pairs(q: Tensor, k: Tensor, marks: tuple[Any, ...]) -> int:
    """How many pairs count, of all heads; all where tensors hold no data. marks: the op's arguments after v."""
    q_positions, k_positions, q_live, k_live, _, causal = marks[:6]
    batch, heads, queries, keys = *q.shape[:3], k.shape[2]
    given = [t for t in marks[:4] if t is not None]
    if any(holds_no_data(t) for t in given):
        return batch * heads * queries * keys
    if not given:
        least = min(queries, keys)
        return batch * heads * (least * (least + 1) // 2 + (queries - least) * keys if causal else queries * keys)
    places = torch.zeros(1, 1, dtype=torch.int64, device=q.device)
    at = places
    if causal:
        at, places = (
            torch.arange(n, device=q.device)[None] if p is None else p.long()
            for p, n in ((q_positions, queries), (k_positions, keys))
        )
    places = places.expand(batch, keys)
    if k_live is not None:
        places = torch.where(k_live, places, 2**31)  # later than any
    counts = torch.searchsorted(places.sort(-1).values, at.expand(batch, queries).contiguous(), right=True)
    return heads * int(counts.sum() if q_live is None else (counts * q_live).sum())


@register_flop_formula(torch.ops.dyncore.attention, get_raw=True)
def _forward_flops(q: Tensor, k: Tensor, v: Tensor, *marks: Any, out_val: Any = None) -> int:
    return 2 * _pairs(q, k, marks) * (q.shape[3] + v.shape[3])


@register_flop_formula(torch.ops.dyncore.attention_backward, get_raw=True)
def _backward_flops(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, logarithm: Tensor, *marks: Any, out_val: Any = None
) -> int:
    needs = marks[7]
    # scores, and from them and grad v^T each gradient
    widths = q.shape[3] * (1 + needs[0] + needs[1]) + v.shape[3] * (1 + needs[2])
    return 2 * _pairs(q, k, marks) * widths


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, *marks: Any) -> Tensor:
        out, logarithm = _forward(q, k, v, *marks)
        ctx.save_for_backward(q, k, v, out, logarithm, *marks[:5])
        ctx.causal, ctx.scale = marks[5:]
        return out

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        needs = list(ctx.needs_input_grad[:3])
        grads = _backward(grad, *ctx.saved_tensors, ctx.causal, ctx.scale, needs)
        return *(g if need else None for g, need in zip(grads, needs, strict=True)), *(None,) * 7


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

    On a CPU a kernel multiplies the pairs that count alone; with few queries, and on other devices, "auto" is torch's
    scaled_dot_product_attention, with a mask where one is needed. The kernel has first derivatives only.

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
    factor: float = max(q.shape[3], 1) ** -0.5 if scale is None else scale
    bias = None if k_sizes is None else k_sizes.detach().to(torch.promote_types(q.dtype, torch.float32)).log()
    marks = (q_places, k_places, q_live, k_live, bias, causal, factor)
    if _skips(q, any(t is not None for t in marks[:5])):
        if not wants_grad(q, k, v):
            return _forward(q, k, v, *marks)[0]
        if torch.compiler.is_compiling():  # no tensor may come twice into a function that Dynamo traces
            places, live = (None if t is None else t.view_as(t) for t in (q_places, q_live))
            return apply(_Attention, q.view_as(q), k.view_as(k), v, places, k_places, live, *marks[3:])
        return apply(_Attention, q, k, v, *marks)
    return _of_torch(q, k, v, *marks)


def _skips(q: Tensor, something_is_left_out: bool) -> bool:
    """Whether the kernel runs, or its reference, rather than torch's attention, which multiplies all pairs."""
    if q.device.type != "cpu" or mode() == "masked" or q.shape[3] == 0:  # the kernel has no scores without products
        return False
    fewest = _FEWEST_SELECTED if something_is_left_out else _FEWEST_OF_ALL
    return mode() == "sparse" or (cpu.serves(q) and q.shape[2] >= fewest)


def _of_torch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_places: Tensor | None,
    k_places: Tensor | None,
    q_live: Tensor | None,
    k_live: Tensor | None,
    bias: Tensor | None,
    causal: bool,
    scale: float,
) -> Tensor:
    if k.shape[1] != q.shape[1]:
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
    if q_places is None and k_places is None and q_live is None and k_live is None and bias is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale)
    if q_live is not None:
        q = torch.where(q_live[:, None, :, None], q, 0)
    if k_live is not None:
        k, v = (torch.where(k_live[:, None, :, None], t, 0) for t in (k, v))
    counts = pairs_that_count(q, k, q_places, k_places, q_live, k_live, causal)
    alone = counts.logical_not().all(-1, keepdim=True)  # attends to anything, so that the softmax is a number
    mask = counts | alone
    if bias is not None:
        mask = torch.where(mask, bias[:, None, None, :].to(q.dtype), float("-inf"))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    return torch.where(alone, 0, out)
