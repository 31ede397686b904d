"""The reference backend's ReLU-sparse ops: the zeros of a hidden activation meet no weight.

Shapes: T rows, H model width, I hidden width, N outputs. Saved hidden activations ("compressed"): `mask` int32
[T, ceil(I/32)], bit j of word w for neuron 32w + j; `values` of the non-zeros in order of (row, neuron), gated [2, .]
(gate, then up); `row_offsets` int64 [T+1]. Or dense: `pre` [T, I], gated [T, 2I], 0 where the mask is.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dyncore import activations
from dyncore.backends.reference.common import or_empty, wide


def _product(values: Tensor, mask: Tensor, weight: Tensor, dense_from: float) -> Tensor:
    """y[t, n] = sum over the i in mask[t] of values[t, i] weight[n, i]; `values` are 0 outside of the mask.

    Where 0 times a weight is 0 this is the dense product. An infinity or NaN in a weight is met by non-zeros alone.
    """
    with torch.autocast(values.device.type, enabled=False):
        weight = wide(weight)
        if dense_from == 0 or weight.isfinite().all():
            return values @ weight.t()
        finite = weight.isfinite().all(0)
        y = torch.where(finite, values, 0) @ torch.where(finite, weight, 0).t()
        for i in (~finite).nonzero()[:, 0].tolist():
            y += torch.where(mask[:, i, None], values[:, i, None] * weight[:, i], 0)
        return y


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    with torch.autocast(x.device.type, enabled=False):
        y = wide(x) @ wide(weight).t()
        return y if bias is None else y + wide(bias)


def _laid_out(gradient: Tensor | None, like: Tensor) -> Tensor:
    """A gradient in the dtype and the memory layout of its weight, neuron-major ones included."""
    return like.new_empty(0) if gradient is None else torch.empty_like(like).copy_(gradient)


# sparse_linear -------------------------------------------------------------------------------------------------------


def sparse_linear(h: Tensor, weight: Tensor, bias: Tensor | None, dense_from: float) -> Tensor:
    y = _product(wide(h), h != 0, weight, dense_from)
    return (y if bias is None else y + wide(bias)).to(h.dtype)


def sparse_linear_backward(
    grad: Tensor, h: Tensor, weight: Tensor, dense_from: float, needs: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    dy = wide(grad)
    dh = _linear(grad, weight.t(), None) if needs[0] else None
    dweight = _product(wide(h).t(), (h != 0).t(), dy.t(), dense_from).t() if needs[1] else None
    return or_empty(dh, h), _laid_out(dweight, weight), or_empty(dy.sum(0) if needs[2] else None, h)


# sparse_mlp ----------------------------------------------------------------------------------------------------------


def _pack(mask: Tensor) -> Tensor:
    """bool [T, I] as bits, int32 [T, ceil(I/32)]."""
    rows, inner = mask.shape
    words = F.pad(mask.long(), (0, -inner % 32)).view(rows, (inner + 31) // 32, 32)
    return (words << torch.arange(32, device=mask.device)).sum(-1).to(torch.int32)


def _unpack(bits: Tensor, inner: int) -> Tensor:
    """bool [T, I] of bits int32 [T, ceil(I/32)]."""
    words = (bits[..., None] >> torch.arange(32, dtype=torch.int32, device=bits.device)) & 1
    return words.view(bits.shape[0], bits.shape[1] * 32)[:, :inner].bool()


def _activate(x: Tensor, w_in: Tensor, b_in: Tensor | None, activation: str) -> tuple[Tensor, Tensor, Tensor | None]:
    """bool [T, I]: the neurons that are on; relu of the pre-activation, rounded to x's dtype; up, where gated.

    A NaN is on, as it is for torch.relu and its derivative.
    """
    inner = w_in.shape[0] // (2 if activation in activations.GATED else 1)
    pre = _linear(x, w_in[:inner], None if b_in is None else b_in[:inner]).to(x.dtype)
    mask = ~(pre <= 0)
    gate, up = torch.where(mask, pre, 0), None
    if activation in activations.GATED:
        up = _linear(x, w_in[inner:], None if b_in is None else b_in[inner:]).to(x.dtype)
        up = torch.where(mask, up, 0)
    return mask, gate, up


def _value(gate: Tensor, up: Tensor | None, activation: str) -> Tensor:
    """The hidden activation, in the dtype of sums, from what is saved of it."""
    if up is not None:
        return wide(gate) * wide(up)
    return wide(gate).square() if activation == "relu2" else wide(gate)


def _compress(mask: Tensor, gate: Tensor, up: Tensor | None, capacity: int) -> tuple[Tensor, Tensor, Tensor]:
    """(bits, values, row_offsets); values of exactly the non-zeros, or with room for `capacity` of them."""
    counts = mask.sum(1)
    row_offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    values = gate[mask] if up is None else torch.stack([gate[mask], up[mask]])
    if capacity >= 0:
        padded = values.new_empty(*values.shape[:-1], capacity)
        padded[..., : values.shape[-1]] = values
        values = padded
    return _pack(mask), values, row_offsets


def _expand(
    bits: Tensor, values: Tensor, row_offsets: Tensor, pre: Tensor, inner: int, activation: str
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The mask, gate and up of `_activate` from what was saved of them."""
    gated = activation in activations.GATED
    if row_offsets.shape[0] == 0:  # saved dense
        gate = pre[:, :inner]
        return gate != 0, gate, pre[:, inner:] if gated else None
    mask = _unpack(bits, inner)
    kept = values[..., : int(row_offsets[-1])]

    def dense(part: Tensor) -> Tensor:
        full = part.new_zeros(mask.shape)
        full[mask] = part
        return full

    return (mask, dense(kept[0]), dense(kept[1])) if gated else (mask, dense(kept), None)


def sparse_hidden(
    x: Tensor, w_in: Tensor, b_in: Tensor | None, activation: str, dense_from: float, capacity: int
) -> tuple[Tensor, Tensor, Tensor]:
    return _compress(*_activate(x, w_in, b_in, activation), capacity)


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
    mask, gate, up = _activate(x, w_in, b_in, activation)
    out = _product(_value(gate, up, activation), mask, w_out, dense_from)
    out = (out if b_out is None else out + wide(b_out)).to(x.dtype)
    bits, values, row_offsets = x.new_empty(0, dtype=torch.int32), x.new_empty(0), x.new_empty(0, dtype=torch.int64)
    pre = x.new_empty(0)
    if save == "compressed":
        bits, values, row_offsets = _compress(mask, gate, up, capacity)
    elif save == "dense":
        pre = gate if up is None else torch.cat([gate, up], 1)
    return out, bits, values, row_offsets, pre


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
    inner = w_out.shape[1]
    on, gate, up = _expand(mask, values, row_offsets, pre, inner, activation)
    dy = wide(grad)
    dx = dw_in = dw_out = db_in = None
    if needs[2]:
        dw_out = _product(_value(gate, up, activation).t(), on.t(), dy.t(), dense_from).t()
    if needs[0] or needs[1] or needs[3]:
        dhidden = torch.where(on, _linear(grad, w_out.t(), None), 0)
        if up is not None:
            parts = [dhidden * wide(up), dhidden * wide(gate)]
        elif activation == "relu2":
            parts = [dhidden * 2 * wide(gate)]
        else:
            parts = [dhidden]
        dpre, on = torch.cat(parts, 1), torch.cat([on] * len(parts), 1)
        dx = _product(dpre, on, w_in.t(), dense_from) if needs[0] else None
        dw_in = _product(dpre.t(), on.t(), wide(x).t(), dense_from) if needs[1] else None
        db_in = dpre.sum(0) if needs[3] else None
    db_out = dy.sum(0) if needs[4] else None
    return or_empty(dx, x), _laid_out(dw_in, w_in), _laid_out(dw_out, w_out), or_empty(db_in, x), or_empty(db_out, x)
