"""The cpu backend's ReLU-sparse ops: csrc/cpu/sparse_*.cpp, else the reference. Dense products, where most of a hidden
activation is not 0, are those of the grouped ops with one group.

Shapes: T rows, H model width, I hidden width, N outputs.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from dyncore import activations
from dyncore.backends import reference
from dyncore.backends.cpu import ACTIVATION_CODES, native, new_int32, or_empty, serves, threads

# Hidden elements that a call has room for; more are computed some rows after others. Room that is not written costs no
# memory, but a system may refuse more of it than it has.
_ROOM = 2**28


@functools.lru_cache(maxsize=8)
def _all_rows(rows: int) -> tuple[Tensor, Tensor, None, Tensor, Tensor]:
    """A plan's tensors: one group that has every row."""
    each = torch.arange(rows + 1, dtype=torch.int32)
    return each[:-1], torch.tensor([0, rows], dtype=torch.int32), None, each, each[:-1]


def _by_neuron(w_out: Tensor) -> bool:
    return w_out.stride(0) == 1 and w_out.stride(1) != 1


STREAMS = 2  # of sparse_linear_fits: one row, and weights stored by neuron (break_even.dense_from: never dense)


def sparse_linear_fits(h: object, weight: object, bias: object) -> int:
    """Whether these are CPU tensors of one dtype that has kernels, in the shapes that dyncore.sparse_linear asks: 0 if
    not, else 1 or STREAMS."""
    return 0 if native is None else native.sparse_linear_fits(h, weight, bias)


def sparse_mlp_fits(x: object, w_in: object, w_out: object, b_in: object, b_out: object, gated: bool) -> bool:
    """The same for dyncore.sparse_mlp."""
    return native is not None and native.sparse_mlp_fits(x, w_in, w_out, b_in, b_out, gated)


def sparse_linear(h: Tensor, weight: Tensor, bias: Tensor | None, dense_from: float) -> Tensor:
    if not serves(h):
        return reference.sparse_linear(h, weight, bias, dense_from)
    out = h.new_empty(h.shape[0], weight.shape[0])
    native.sparse_linear(h, weight, bias, dense_from, out, threads())
    return out


def _linear_backward(
    grad: Tensor, x: Tensor, weight: Tensor, dx: Tensor | None, dweight: Tensor | None, dbias: Tensor | None
) -> None:
    """Gradients of the dense x weight^T + bias into those of dx, dweight and dbias that are there."""
    if dx is None and dweight is None and dbias is None:
        return
    dweight = None if dweight is None else dweight[None]
    dbias = None if dbias is None else dbias[None]
    outputs = (dx, dweight, dbias, None)
    plan = _all_rows(x.shape[0])
    native.grouped_linear_backward(grad, x, weight[None], None, None, *plan, 0, True, True, *outputs, threads())


def sparse_linear_backward(
    grad: Tensor, h: Tensor, weight: Tensor, dense_from: float, needs: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    if not serves(h):
        return reference.sparse_linear_backward(grad, h, weight, dense_from, needs)
    dh = h.new_empty(h.shape) if needs[0] else None
    dweight = torch.empty_like(weight) if needs[1] else None
    dbias = h.new_empty(weight.shape[0]) if needs[2] else None
    dense = None
    if dweight is not None:
        if dense_from < 1 and native.count_nonzeros(h, threads()) >= dense_from * h.numel():
            dense = dweight
        else:
            native.sparse_linear_backward(grad, h, dweight, threads())
    if dense is not None and _by_neuron(dense):  # its transpose is the gradient of a linear from grad to h
        _linear_backward(h, grad, weight.t(), None, dense.t(), None)
        dense = None
    _linear_backward(grad, h, weight, dh, dense, dbias)
    return or_empty(dh, h), or_empty(dweight, h), or_empty(dbias, h)


def _compressed_buffers(x: Tensor, inner: int, gated: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(mask, values, row_offsets) with room for all values: what is not written takes up addresses, but no memory."""
    rows = x.shape[0]
    values = x.new_empty((2, rows * inner) if gated else (rows * inner,))
    return (
        x.new_empty((rows, (inner + 31) // 32), dtype=torch.int32),
        values,
        x.new_empty(rows + 1, dtype=torch.int64),
    )


def _of_capacity(values: Tensor, count: int, capacity: int) -> Tensor:
    """The first `count` of values' last dimension, alone (capacity -1) or in a buffer of `capacity` elements."""
    if capacity < 0:
        return values[..., :count].clone(memory_format=torch.contiguous_format)
    if count > capacity:
        raise ValueError(f"capacity: expected room for {count} non-zeros, got {capacity}")
    buffer = values.new_empty((*values.shape[:-1], capacity))
    buffer[..., :count] = values[..., :count]
    return buffer


def _joined(parts: list[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """What _sparse_mlp returns for all rows, from what it returned for some after some."""
    out, mask, values, row_offsets, pre = zip(*parts, strict=True)
    counts = torch.cat([offsets.diff() for offsets in row_offsets])
    joined = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return torch.cat(out), torch.cat(mask), torch.cat(values, -1), joined, pre[0]


def _sparse_mlp(
    x: Tensor,
    w_in: Tensor,
    w_out: Tensor | None,
    b_in: Tensor | None,
    b_out: Tensor | None,
    activation: str,
    dense_from: float,
    save: str,
    capacity: int,
) -> tuple[Tensor, ...]:
    """(out, mask, values, row_offsets, pre), each empty where it is not asked for: out where there is no w_out."""
    rows, width = x.shape[0], w_in.shape[0]
    gated = activation in activations.GATED
    if save not in ("none", "compressed", "dense"):
        raise ValueError(f"save: expected none, compressed or dense, got {save!r}")
    out = None if w_out is None else x.new_empty(rows, w_out.shape[0])
    at_once = max(1, _ROOM // max(1, width))
    if save == "compressed" and capacity < 0 and rows > at_once:
        weights = (w_in, w_out, b_in, b_out, activation, dense_from, save, capacity)
        return _joined([_sparse_mlp(part, *weights) for part in x.split(at_once)])
    mask = values = row_offsets = None
    if save == "compressed":
        mask, values, row_offsets = _compressed_buffers(x, width // 2 if gated else width, gated)
    pre = x.new_empty(rows, width) if save == "dense" else None
    form = (ACTIVATION_CODES[activation], dense_from)
    native.sparse_mlp(x, w_in, w_out, b_in, b_out, *form, out, mask, values, row_offsets, pre, threads())
    if values is not None and row_offsets is not None and capacity != values.shape[-1]:
        values = _of_capacity(values, int(row_offsets[-1]), capacity)
    return (
        or_empty(out, x),
        new_int32(0) if mask is None else mask,
        or_empty(values, x),
        x.new_empty(0, dtype=torch.int64) if row_offsets is None else row_offsets,
        or_empty(pre, x),
    )


def sparse_hidden(
    x: Tensor, w_in: Tensor, b_in: Tensor | None, activation: str, dense_from: float, capacity: int
) -> tuple[Tensor, Tensor, Tensor]:
    if not serves(x):
        return reference.sparse_hidden(x, w_in, b_in, activation, dense_from, capacity)
    _, mask, values, row_offsets, _ = _sparse_mlp(
        x, w_in, None, b_in, None, activation, dense_from, "compressed", capacity
    )
    return mask, values, row_offsets


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
    if not serves(x):
        return reference.sparse_mlp(x, w_in, w_out, b_in, b_out, activation, dense_from, save, capacity)
    out, mask, values, row_offsets, pre = _sparse_mlp(
        x, w_in, w_out, b_in, b_out, activation, dense_from, save, capacity
    )
    return out, mask, values, row_offsets, pre


def _count(values: Tensor, row_offsets: Tensor, pre: Tensor, inner: int) -> int:
    return int(row_offsets[-1]) if row_offsets.shape[0] else native.count_nonzeros(pre[:, :inner], threads())


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
    if not serves(x):
        return reference.sparse_mlp_backward(
            grad, x, w_in, w_out, mask, values, row_offsets, pre, activation, dense_from, needs
        )
    rows, inner = x.shape[0], w_out.shape[1]
    gated = activation in activations.GATED
    dx = x.new_empty(x.shape) if needs[0] else None
    dw_in = torch.empty_like(w_in) if needs[1] else None
    dw_out = torch.empty_like(w_out) if needs[2] else None
    db_in = x.new_empty(w_in.shape[0]) if needs[3] else None
    db_out = x.new_empty(w_out.shape[0]) if needs[4] else None
    code, saved_dense = ACTIVATION_CODES[activation], row_offsets.shape[0] == 0
    if dense_from < 1 and _count(values, row_offsets, pre, inner) >= dense_from * rows * inner:
        if not saved_dense:
            pre = x.new_empty(rows, w_in.shape[0])
            native.expand(pre, mask, values, row_offsets, gated, threads())
        _dense_backward(grad, x, w_in, w_out, pre, code, dx, dw_in, dw_out, db_in, db_out)
    else:
        if saved_dense:
            mask, values, row_offsets = _compressed_buffers(x, inner, gated)
            native.compress(pre, mask, values, row_offsets, gated, threads())
        outputs = (dx, dw_in, dw_out, db_in, db_out)
        native.sparse_mlp_backward(grad, x, w_in, w_out, mask, values, row_offsets, code, *outputs, threads())
    return or_empty(dx, x), or_empty(dw_in, x), or_empty(dw_out, x), or_empty(db_in, x), or_empty(db_out, x)


def _dense_backward(
    grad: Tensor,
    x: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    pre: Tensor,
    code: int,
    dx: Tensor | None,
    dw_in: Tensor | None,
    dw_out: Tensor | None,
    db_in: Tensor | None,
    db_out: Tensor | None,
) -> None:
    """Gradients by grouped_mlp of one group, which writes weights' row by row, but that of w_out by neuron, too."""
    by_neuron = dw_out is not None and _by_neuron(dw_out)  # an expanded w_out may be when its gradient is not
    rows_in = None if dw_in is None or dw_in.is_contiguous() else dw_in.new_empty(dw_in.shape)
    outputs = [dw_in if rows_in is None else rows_in, dw_out.t() if dw_out is not None and by_neuron else dw_out]
    weights = [None if g is None else g[None] for g in (*outputs, db_in, db_out)]
    native.grouped_mlp_backward(
        *(grad, x, w_in[None], w_out[None], None, pre),
        *(*_all_rows(x.shape[0]), code, by_neuron, dx, *weights, None, threads()),
    )
    if rows_in is not None and dw_in is not None:
        dw_in.copy_(rows_in)
