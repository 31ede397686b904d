"""Rows to slots, with what is elementwise in a backward pass: dy[a] = scale[a] * grad[rows[a]] * act'(pre[a]), beside
it the sums over a slot (gradients of scales) and over a group's slots (of biases). Floor 0.

Arithmetic: a few FLOPs an element, each element read and written once: memory bandwidth bounds it.
"""

import torch
import triton
import triton.language as tl

from .activations import activate_with_derivative
from .blocks import clear_padding, load_columns, store_tile
from .configs import Target
from .tiles import block_of_groups, count_tiles, find_tile, num_tiles

# 16 elements a thread: more, and the derivative of gelu spills registers
BM, BN, NUM_WARPS = 32, 128, 8
RESIDENT = 4  # programs launched for each multiprocessor


@triton.jit(do_not_specialize=["num_slots", "num_groups"])
def slots_kernel(
    grad,  # [T, N] rows, or [A, N] slots, any strides
    value,  # [A, N], any strides
    bias,  # [G, N], any strides
    scale,  # [A]
    rows,  # [A]
    offsets,  # [G + 1]
    out,  # [A, N] contiguous
    row_pieces,  # [tiles of columns, A]
    column_pieces,  # [tiles of slots, N]
    num_slots,
    num_groups,
    N,
    stride_gt,
    stride_gn,
    stride_va,
    stride_vn,
    stride_bg,
    stride_bn,
    stride_scale,
    ACTIVATION: tl.constexpr,
    GATHER: tl.constexpr,
    HAS_VALUE: tl.constexpr,
    HAS_BIAS: tl.constexpr,  # stands for value
    HAS_SCALE: tl.constexpr,
    STORE: tl.constexpr,
    ROW_SUMS: tl.constexpr,  # of grad * act(value)
    COLUMN_SUMS: tl.constexpr,  # of dy
    ZERO_PADDING: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    tiles_n = tl.cdiv(N, BN)
    tiles_m = count_tiles(offsets, num_groups, BM, BLOCK_G)
    for number in range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        tile, tile_n = number // tiles_n, number % tiles_n
        group, first, end = find_tile(tile, offsets, num_groups, BM, BLOCK_G)
        slot = first + tl.arange(0, BM)  # [BM]
        n = tile_n * BN + tl.arange(0, BN)  # [BN]
        live = slot < end
        row = slot
        if GATHER:
            row = tl.load(rows + slot, mask=live, other=0).to(tl.int64)
        g_ptr = grad + row[:, None] * stride_gt + n.to(tl.int64)[None, :] * stride_gn
        dy = tl.load(g_ptr, mask=live[:, None] & (n < N)[None, :], other=0.0).to(tl.float32)  # [BM, BN]
        slope = dy
        if HAS_VALUE:
            v_ptr = value + slot[:, None] * stride_va + n.to(tl.int64)[None, :] * stride_vn
            v = tl.load(v_ptr, mask=live[:, None] & (n < N)[None, :], other=0.0).to(tl.float32)
            y, slope = activate_with_derivative(v, ACTIVATION)
            if ROW_SUMS:
                tl.store(row_pieces + tl.cast(tile_n, tl.int64) * num_slots + slot, tl.sum(dy * y, 1), mask=live)
        elif HAS_BIAS:
            y = load_columns(bias + group.to(tl.int64) * stride_bg, n, N, stride_bn)
            if ROW_SUMS:
                total = tl.sum(dy * y[None, :], 1)
                tl.store(row_pieces + tl.cast(tile_n, tl.int64) * num_slots + slot, total, mask=live)
        if HAS_SCALE:
            dy *= tl.load(scale + slot * stride_scale, mask=live, other=0.0).to(tl.float32)[:, None]
        if ACTIVATION != "none":
            dy *= slope
        if STORE:
            store_tile(out, dy, slot, end, n, N, N)
        if COLUMN_SUMS:
            tl.store(column_pieces + tl.cast(tile, tl.int64) * N + n, tl.sum(dy, 0), mask=n < N)
    if ZERO_PADDING:
        clear_padding(out, offsets, num_slots, num_groups, N, BM, BN)


def slots(
    grad: torch.Tensor,
    rows: torch.Tensor | None,
    offsets: torch.Tensor,
    num_slots: int,
    *,
    scale: torch.Tensor | None = None,
    value: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    activation: str = "none",
    out: torch.Tensor | None = None,
    zero_padding: bool = False,
    sum_rows: bool = False,
    sum_columns: bool = False,
    target: Target,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Writes out [A, N] where given, from grad [T, N] if rows are given, else [A, N]; returns the pieces (see sums.py)
    of the row sums of grad * act(value), or of grad * bias, and of the column sums of out, tiles of BM slots."""
    n, num_groups = grad.shape[1], offsets.shape[0] - 1
    tiles_n, tiles_m = triton.cdiv(n, BN), num_tiles(num_slots, num_groups, BM)
    row_pieces = grad.new_empty(tiles_n if sum_rows else 0, num_slots, dtype=torch.float32)
    column_pieces = grad.new_empty(tiles_m if sum_columns else 0, n, dtype=torch.float32)
    if num_slots > 0 and n > 0:
        slots_kernel[(min(target.processors * RESIDENT, tiles_m * tiles_n),)](
            grad,
            value,
            bias,
            scale,
            rows,
            offsets,
            out,
            row_pieces if sum_rows else None,
            column_pieces if sum_columns else None,
            num_slots,
            num_groups,
            n,
            *grad.stride(),
            *(value.stride() if value is not None else (0, 0)),
            *(bias.stride() if bias is not None else (0, 0)),
            scale.stride(0) if scale is not None else 0,
            ACTIVATION=activation,
            GATHER=rows is not None,
            HAS_VALUE=value is not None,
            HAS_BIAS=bias is not None,
            HAS_SCALE=scale is not None,
            STORE=out is not None,
            ROW_SUMS=sum_rows,
            COLUMN_SUMS=sum_columns,
            ZERO_PADDING=zero_padding,
            BM=BM,
            BN=BN,
            BLOCK_G=block_of_groups(num_groups),
            num_warps=NUM_WARPS,
        )
    return row_pieces, column_pieces
