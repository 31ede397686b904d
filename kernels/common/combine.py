"""Combine: out[t] = base[t] + sum over the slots of row t of scale * y, in ascending slot order.
Floor 0, shared by every op that scatters. One program owns a piece of a row and walks the row's slots through the
inverse map, so there is no atomic, the order of the sum is fixed, and a row without slots is exactly its base (or 0).

Arithmetic: 2 A D FLOPs over (A + 2 T) D elements read and written: memory bandwidth bounds it.
"""

import torch
import triton
import triton.language as tl

# Columns a program takes. 1024 fp32 on 4 warps are two 16-byte loads a thread and slot.
BLOCK_D = 1024
NUM_WARPS = 4


@triton.jit
def combine_kernel(
    y,  # [A, D], any strides
    base,  # [T, D], any strides
    scale,  # [A]
    row_offsets,  # [T + 1]
    row_slots,  # [A]
    out,  # [T, D] contiguous
    D,
    stride_ya,
    stride_yd,
    stride_scale,
    stride_bt,
    stride_bd,
    HAS_BASE: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    pieces = tl.cdiv(D, BLOCK_D)
    pid = tl.program_id(0)
    t = (pid // pieces).to(tl.int64)
    d = (pid % pieces) * BLOCK_D + tl.arange(0, BLOCK_D)  # [BLOCK_D]
    live = d < D

    if HAS_BASE:
        total = tl.load(base + t * stride_bt + d.to(tl.int64) * stride_bd, mask=live, other=0.0).to(tl.float32)
    else:
        total = tl.zeros([BLOCK_D], tl.float32)
    first, end = tl.load(row_offsets + t), tl.load(row_offsets + t + 1)
    following = tl.load(row_slots + first, mask=first < end, other=0)
    for i in range(first, end):
        slot = following.to(tl.int64)
        # fetched while this slot is read, or each slot would wait for two loads, one after the other
        following = tl.load(row_slots + i + 1, mask=i + 1 < end, other=0)
        y_ptr = y + slot * stride_ya + d.to(tl.int64) * stride_yd  # [BLOCK_D]
        part = tl.load(y_ptr, mask=live, other=0.0).to(tl.float32)
        if HAS_SCALE:
            part *= tl.load(scale + slot * stride_scale).to(tl.float32)
        total += part
    tl.store(out + t * D + d, total.to(out.dtype.element_ty), mask=live)


def combine(
    y: torch.Tensor,
    base: torch.Tensor | None,
    scale: torch.Tensor | None,
    row_offsets: torch.Tensor,
    row_slots: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """Writes out [T, D] from y [A, D] (of any floating dtype), base [T, D] and scale [A]."""
    num_rows, dim = out.shape
    if num_rows == 0 or dim == 0:
        return
    block = min(BLOCK_D, triton.next_power_of_2(dim))
    combine_kernel[(num_rows * triton.cdiv(dim, block),)](
        y,
        base,
        scale,
        row_offsets,
        row_slots,
        out,
        dim,
        *y.stride(),
        scale.stride(0) if scale is not None else 0,
        base.stride(0) if base is not None else 0,
        base.stride(1) if base is not None else 0,
        HAS_BASE=base is not None,
        HAS_SCALE=scale is not None,
        BLOCK_D=block,
        num_warps=NUM_WARPS,
    )
