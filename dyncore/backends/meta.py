"""The meta backend: the shapes, dtypes and devices of every op's results, for fake tensors and torch.compile."""

from __future__ import annotations

import torch
from torch import Tensor

from dyncore import activations
from dyncore.backends.cpu import panels_shape
from dyncore.backends.reference.attention import by_token


def _plan(like: Tensor, num_rows: int, num_groups: int, capacity: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    def ints(size: int) -> Tensor:
        return like.new_empty(size, dtype=torch.int32)

    return ints(capacity), ints(num_groups + 1), ints(num_rows + 1), ints(capacity)


def plan_inverse(rows: Tensor, offsets: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    return rows.new_empty(num_rows + 1), rows.new_empty(rows.shape[0])


def plan_mask(mask: Tensor, capacity: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _plan(mask, mask.shape[0], mask.shape[1] if mask.dim() == 2 else 1, capacity)


def plan_mask_sources(mask: Tensor, capacity: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return *plan_mask(mask, capacity), mask.new_empty(capacity, dtype=torch.int32)


def plan_route(expert: Tensor, num_groups: int, capacity: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return *_plan(expert, expert.shape[0], num_groups, capacity), expert.new_empty(capacity, dtype=torch.int32)


def plan_route_topk(
    logits: Tensor, k: int, normalize: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    num_rows, num_groups = logits.shape
    plan = _plan(logits, num_rows, num_groups, num_rows * k)
    sources, expert = (logits.new_empty(shape, dtype=torch.int32) for shape in ((num_rows * k,), (num_rows, k)))
    return *plan, sources, logits.new_empty(num_rows * k), expert


def plan_topk(scores: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, seq = scores.shape
    return _plan(scores, batch * seq, 1, batch * k)


def gather_rows(x: Tensor, rows: Tensor, offsets: Tensor) -> Tensor:
    return x.new_empty(rows.shape[0], x.shape[1])


def scatter_rows(
    y: Tensor,
    base: Tensor | None,
    rows: Tensor,
    offsets: Tensor,
    scale: Tensor | None,
    row_offsets: Tensor,
    row_slots: Tensor,
) -> Tensor:
    return y.new_empty(row_offsets.shape[0] - 1, y.shape[1])


def _gradients(needs: list[bool], *tensors: Tensor | None) -> tuple[Tensor, ...]:
    """Empty gradients of `tensors`, of no elements where one is absent or not needed."""
    like = next(t for t in tensors if t is not None)
    return tuple(
        (like if t is None else t).new_empty(t.shape if need and t is not None else (0,))
        for need, t in zip(needs, tensors, strict=True)
    )


def scatter_rows_backward(
    grad: Tensor,
    y: Tensor,
    rows: Tensor,
    offsets: Tensor,
    scale: Tensor | None,
    row_offsets: Tensor,
    row_slots: Tensor,
    needs: list[bool],
) -> tuple[Tensor, ...]:
    return _gradients(needs, y, scale)


def grouped_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: Tensor,
    offsets: Tensor,
    scale: Tensor | None,
    row_offsets: Tensor,
    row_slots: Tensor,
    activation: str,
    gather: bool,
    scatter: bool,
    save: bool,
) -> tuple[Tensor, Tensor]:
    num_slots, width = rows.shape[0], weight.shape[1]
    out = x.new_empty(row_offsets.shape[0] - 1 if scatter else num_slots, width)
    return out, x.new_empty((num_slots, width) if save and activation != "none" else (0,))


def grouped_linear_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pre: Tensor,
    rows: Tensor,
    offsets: Tensor,
    scale: Tensor | None,
    row_offsets: Tensor,
    row_slots: Tensor,
    activation: str,
    gather: bool,
    scatter: bool,
    needs: list[bool],
) -> tuple[Tensor, ...]:
    return _gradients([*needs[:3], needs[3] and scatter], x, weight, bias, scale)


def grouped_mlp(
    x: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    b_in: Tensor | None,
    b_out: Tensor | None,
    residual: Tensor | None,
    rows: Tensor,
    offsets: Tensor,
    scale: Tensor | None,
    row_offsets: Tensor,
    row_slots: Tensor,
    activation: str,
    save: bool,
) -> tuple[Tensor, Tensor]:
    out = x.new_empty(row_offsets.shape[0] - 1, w_out.shape[1])
    return out, x.new_empty((rows.shape[0], w_in.shape[1]) if save else (0,))


def pack_weight(weight: Tensor, parts: int) -> Tensor:
    return weight.new_empty(panels_shape(weight, parts), dtype=torch.float32)


def grouped_mlp_packed(
    x: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    b_in: Tensor | None,
    b_out: Tensor | None,
    residual: Tensor | None,
    rows: Tensor,
    offsets: Tensor,
    scale: Tensor | None,
    row_offsets: Tensor,
    *others: object,
) -> Tensor:
    return x.new_empty(row_offsets.shape[0] - 1, w_out.shape[1])


def grouped_mlp_backward(
    grad: Tensor,
    x: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    b_in: Tensor | None,
    b_out: Tensor | None,
    pre: Tensor,
    rows: Tensor,
    offsets: Tensor,
    scale: Tensor | None,
    row_offsets: Tensor,
    row_slots: Tensor,
    activation: str,
    needs: list[bool],
) -> tuple[Tensor, ...]:
    return _gradients(needs, x, w_in, w_out, b_in, b_out, scale)


def tree_route(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], dtype=torch.int32)


def attention(q: Tensor, k: Tensor, v: Tensor, *others: object) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(q.dtype, torch.float32)
    return by_token(q, q.shape[0], q.shape[1], q.shape[2], v.shape[3]), q.new_empty(q.shape[:3], dtype=wide)


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
) -> tuple[Tensor, ...]:
    return tuple(by_token(q, *t.shape) if need else q.new_empty(0) for t, need in zip((q, k, v), needs, strict=True))


def sparse_linear(h: Tensor, weight: Tensor, *others: object) -> Tensor:
    return h.new_empty(h.shape[0], weight.shape[0])


def _weight_gradient(need: bool, weight: Tensor) -> Tensor:
    """In the weight's memory layout."""
    return torch.empty_like(weight) if need else weight.new_empty(0)


def sparse_linear_backward(
    grad: Tensor, h: Tensor, weight: Tensor, dense_from: float, needs: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    dh, dbias = _gradients([needs[0], needs[2]], h, h.new_empty(weight.shape[0]))
    return dh, _weight_gradient(needs[1], weight), dbias


def sparse_hidden(
    x: Tensor, w_in: Tensor, b_in: Tensor | None, activation: str, dense_from: float, capacity: int
) -> tuple[Tensor, Tensor, Tensor]:
    gated = activation in activations.GATED
    num_rows, inner = x.shape[0], w_in.shape[0] // (2 if gated else 1)
    bits = x.new_empty((num_rows, (inner + 31) // 32), dtype=torch.int32)
    values = x.new_empty((2, capacity) if gated else (capacity,))
    return bits, values, x.new_empty(num_rows + 1, dtype=torch.int64)


def sparse_mlp(
    x: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    b_in: Tensor | None,
    b_out: Tensor | None,
    activation: str,
    dense_from: float,
    save: str,
    capacity: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    bits, values, row_offsets = x.new_empty(0, dtype=torch.int32), x.new_empty(0), x.new_empty(0, dtype=torch.int64)
    if save == "compressed":
        bits, values, row_offsets = sparse_hidden(x, w_in, b_in, activation, dense_from, capacity)
    pre = x.new_empty((x.shape[0], w_in.shape[0]) if save == "dense" else (0,))
    return x.new_empty(x.shape[0], w_out.shape[0]), bits, values, row_offsets, pre


def sparse_mlp_backward(
    grad: Tensor,
    x: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    mask: Tensor,
    values: Tensor,
    row_offsets: Tensor,
    pre: Tensor,
    activation: str,
    dense_from: float,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dx, db_in, db_out = _gradients(
        [needs[0], needs[3], needs[4]], x, x.new_empty(w_in.shape[0]), x.new_empty(w_out.shape[0])
    )
    return dx, _weight_gradient(needs[1], w_in), _weight_gradient(needs[2], w_out), db_in, db_out
