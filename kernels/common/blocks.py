"""Pieces of a product's tile: its K loop, its columns in halves, and its stores.
Floor 0, shared by the kernels that multiply slots by weights."""

import triton
import triton.language as tl


@triton.jit
def multiply(
    x,
    weight,
    row,  # [BM] int64: rows of x
    group,
    n,  # [BN]: rows of weight[group]
    live_n,  # [BN]: which of them there are
    K,
    stride_xt,
    stride_xk,
    stride_wg,
    stride_wn,
    stride_wk,
    PRECISION: tl.constexpr,
    EVEN_N: tl.constexpr,  # all of n are live
    EVEN_K: tl.constexpr,  # K is a multiple of BK
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """x[row] @ weight[group, n].T in fp32: [BM, BN]."""
    k = tl.arange(0, BK)  # [BK]
    x_ptr = x + row[:, None] * stride_xt + k.to(tl.int64)[None, :] * stride_xk  # [BM, BK]
    w_ptr = weight + group.to(tl.int64) * stride_wg
    w_ptr = w_ptr + n.to(tl.int64)[None, :] * stride_wn + k.to(tl.int64)[:, None] * stride_wk  # [BK, BN]
    step_x = tl.cast(stride_xk, tl.int64) * BK
    step_w = tl.cast(stride_wk, tl.int64) * BK

    total = tl.zeros([BM, BN], tl.float32)
    for start in range(0, K, BK):
        if EVEN_K:
            x_block = tl.load(x_ptr)  # [BM, BK]
        else:
            x_block = tl.load(x_ptr, mask=(k < K - start)[None, :], other=0.0)
        if EVEN_K and EVEN_N:
            w_block = tl.load(w_ptr)  # [BK, BN]
        elif EVEN_K:
            w_block = tl.load(w_ptr, mask=live_n[None, :], other=0.0)
        else:
            w_block = tl.load(w_ptr, mask=(k < K - start)[:, None] & live_n[None, :], other=0.0)
        total = tl.dot(x_block, w_block, total, input_precision=PRECISION)
        x_ptr += step_x
        w_ptr += step_w
    return total


@triton.jit
def halves(block, BM: tl.constexpr, BN: tl.constexpr):
    """The left and the right half of a block's columns. Both stay in the registers that they are in: a thread of a
    tensor-core tile holds columns of each."""
    return tl.split(tl.permute(tl.reshape(block, (BM, 2, BN // 2)), (0, 2, 1)))


@triton.jit
def load_columns(pointer, n, N, stride):
    """pointer[n] in fp32, 0 from N on: [columns of n]."""
    return tl.load(pointer + n.to(tl.int64) * stride, mask=n < N, other=0.0).to(tl.float32)


@triton.jit
def load_tile(pointer, slot, end, n, N, width):
    """pointer[slot, n] in fp32, 0 for slots from end and columns from N on; rows are `width` apart."""
    live = (slot < end)[:, None] & (n < N)[None, :]
    return tl.load(pointer + slot[:, None] * width + n[None, :], mask=live, other=0.0).to(tl.float32)


@triton.jit
def store_tile(pointer, values, slot, end, n, N, width):
    """pointer[slot, n] = values for slots below end and columns below N, rounded to the pointer's dtype."""
    live = (slot < end)[:, None] & (n < N)[None, :]
    tl.store(pointer + slot[:, None] * width + n[None, :], values.to(pointer.dtype.element_ty), mask=live)


@triton.jit
def clear_padding(pointer, offsets, num_slots, num_groups, N, BM: tl.constexpr, BN: tl.constexpr):
    """Zeros to pointer[slot, :] for the slots behind offsets[num_groups], shared among the programs."""
    begin = tl.load(offsets + num_groups)
    tiles_n = tl.cdiv(N, BN)
    for number in range(tl.program_id(0), tl.cdiv(num_slots - begin, BM) * tiles_n, tl.num_programs(0)):
        slot = begin + (number // tiles_n).to(tl.int64) * BM + tl.arange(0, BM)  # [BM]
        n = number % tiles_n * BN + tl.arange(0, BN)  # [BN]
        store_tile(pointer, tl.zeros([BM, BN], tl.float32), slot, num_slots, n, N, N)
