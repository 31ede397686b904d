"""How a product of slots by weights ends: bias, activation, scale, store; of a tile at once, or after the pieces of its
depth, written by programs of their own, have been added in order. Floor 0, shared by the kernels that multiply.

Arithmetic of the pieces: each is a float32 of every result, written and read again, mostly out of L2.
"""

import torch
import triton
import triton.language as tl

from .activations import activate
from .blocks import clear_padding, load_columns, load_tile, store_tile
from .configs import Target
from .tiles import block_of_groups, count_tiles, find_tile, num_tiles

# 8 elements a thread and half: few rows are spread over many programs
BM, BN, NUM_WARPS = 16, 64, 4
RESIDENT = 4  # programs launched for each multiprocessor


@triton.jit
def finish(
    total,  # [BM, columns of n]
    n,
    N,
    slot,  # [BM]
    end,
    factor,  # [BM], the slots' scales
    bias,  # of this group
    stride_bn,
    out,
    pre,
    ACTIVATION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    SAVE_PRE: tl.constexpr,
):
    """Bias, activation, scale and store of some columns of a tile."""
    if HAS_BIAS:
        total += load_columns(bias, n, N, stride_bn)[None, :]
    if SAVE_PRE:
        store_tile(pre, total, slot, end, n, N, N)
    total = activate(total, ACTIVATION)
    if HAS_SCALE:
        total *= factor[:, None]
    store_tile(out, total, slot, end, n, N, N)


@triton.jit
def finish_gated(
    gate,  # [BM, columns of n]
    up,  # [BM, columns of n]
    n,
    N,
    slot,  # [BM]
    end,
    bias,  # of this group: gate's N, then up's
    stride_bn,
    out,
    pre,
    ACTIVATION: tl.constexpr,  # of the gate
    HAS_BIAS: tl.constexpr,
    SAVE_PRE: tl.constexpr,
):
    """Bias, gated activation and store of some columns of both halves of a tile."""
    if HAS_BIAS:
        gate += load_columns(bias, n, N, stride_bn)[None, :]
        up += load_columns(bias + tl.cast(stride_bn, tl.int64) * N, n, N, stride_bn)[None, :]
    if SAVE_PRE:
        store_tile(pre, gate, slot, end, n, N, 2 * N)
        store_tile(pre + N, up, slot, end, n, N, 2 * N)
    store_tile(out, activate(gate, ACTIVATION) * up, slot, end, n, N, N)


@triton.jit(do_not_specialize=["num_slots", "num_groups", "num_pieces"])
def finish_pieces_kernel(
    pieces,  # [num_pieces, A, N] contiguous; gated [num_pieces, A, 2N]
    bias,  # [G, N], any strides; gated [G, 2N]
    scale,  # [A]
    offsets,  # [G + 1]
    out,  # [A, N] contiguous
    pre,  # [A, N] contiguous; gated [A, 2N]
    num_slots,
    num_groups,
    num_pieces,
    N,
    stride_bg,
    stride_bn,
    stride_scale,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    SAVE_PRE: tl.constexpr,
    ZERO_PADDING: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    ROW: tl.constexpr = 2 if GATED else 1
    tiles_n = tl.cdiv(N, BN)
    tiles_m = count_tiles(offsets, num_groups, BM, BLOCK_G)
    for number in range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        group, first, end = find_tile(number // tiles_n, offsets, num_groups, BM, BLOCK_G)
        slot = first + tl.arange(0, BM)  # [BM]
        n = number % tiles_n * BN + tl.arange(0, BN)  # [BN]
        total = tl.zeros([BM, BN], tl.float32)
        up = tl.zeros([BM, BN], tl.float32)
        for i in range(num_pieces):
            p_ptr = pieces + tl.cast(i, tl.int64) * num_slots * N * ROW
            total += load_tile(p_ptr, slot, end, n, N, N * ROW)
            if GATED:
                up += load_tile(p_ptr + N, slot, end, n, N, N * ROW)
        b_ptr = (bias + group.to(tl.int64) * stride_bg) if HAS_BIAS else bias
        if GATED:
            finish_gated(total, up, n, N, slot, end, b_ptr, stride_bn, out, pre, ACTIVATION, HAS_BIAS, SAVE_PRE)
        else:
            factor = tl.zeros([BM], tl.float32)
            if HAS_SCALE:
                factor = tl.load(scale + slot * stride_scale, mask=slot < end, other=0.0).to(tl.float32)
            finish(
                total, n, N, slot, end, factor, b_ptr, stride_bn, out, pre,
                ACTIVATION, HAS_BIAS, HAS_SCALE, SAVE_PRE,
            )  # fmt: skip
    if ZERO_PADDING:
        clear_padding(out, offsets, num_slots, num_groups, N, BM, BN)
    if SAVE_PRE:
        clear_padding(pre, offsets, num_slots, num_groups, N * ROW, BM, BN)


def finish_pieces(
    pieces: torch.Tensor,
    bias: torch.Tensor | None,
    scale: torch.Tensor | None,
    offsets: torch.Tensor,
    out: torch.Tensor,
    pre: torch.Tensor | None,
    activation: str,
    gated: bool,
    zero_padding: bool,
    target: Target,
) -> None:
    """Writes the live slots of out [A, N], and all of pre where given, from pieces [., A, N], gated [., A, 2N]."""
    (num_slots, n), num_groups = out.shape, offsets.shape[0] - 1
    tiles = num_tiles(num_slots, num_groups, BM) * triton.cdiv(n, BN)
    finish_pieces_kernel[(min(target.processors * RESIDENT, tiles),)](
        pieces,
        bias,
        scale,
        offsets,
        out,
        pre,
        num_slots,
        num_groups,
        pieces.shape[0],
        n,
        *(bias.stride() if bias is not None else (0, 0)),
        scale.stride(0) if scale is not None else 0,
        ACTIVATION=activation,
        GATED=gated,
        HAS_BIAS=bias is not None,
        HAS_SCALE=scale is not None,
        SAVE_PRE=pre is not None,
        ZERO_PADDING=zero_padding,
        BM=BM,
        BN=BN,
        BLOCK_G=block_of_groups(num_groups),
        num_warps=NUM_WARPS,
    )
