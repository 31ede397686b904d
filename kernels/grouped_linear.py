"""grouped_linear, forward: y[a] = act(x[rows[a]] @ weight[g(a)].T + bias[g(a)]) for the live slots a, by group.
Floor 0: kernel and launcher; the slots are then summed to rows by common/combine.py.

Arithmetic: 2 A N K FLOPs on (A K + G N K + A N) elements. With m rows a group an element of weight read does 2 m
FLOPs: below about 300 rows a group in bf16 on an H100 the weights' bandwidth bounds it, above it the tensor cores do.
The gather costs row pointers instead of a copy: every row still comes as whole 16-byte pieces along K.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .common.activations import activate
from .common.combine import combine
from .common.tiles import BLOCK_G, find_tile, num_tiles, swizzle

# ---------------------------------------------------------------- configurations


class Config(NamedTuple):
    """One tiling: a program computes BM slots x BN columns in steps of BK, num_stages steps in flight."""

    BM: int
    BN: int
    BK: int
    num_warps: int
    num_stages: int


# architecture -> arithmetic -> (most rows a group, tiling) by rising rows. Architectures differ in shared memory
# (86 stands for all that have 99 KB: 8.6, 8.9, 12.x) and in the shape of their tensor-core instruction.
# "half" is bf16 and fp16, "tf32" fp32 on tensor cores, "ieee" fp32 on the FMA units.
# Reasons: up to 16 rows a group the weights are streamed once, so a long BK in several stages keeps many bytes in
# flight and no wider BM is paid for; in between BM = 64 is the smallest tile of Hopper's wgmma; above, the largest
# tile whose accumulator fits the registers without spills (tests/kernels compiles every line and looks).
# On sm_90 the large half tile takes 96 KB and 128 registers a thread, so that two programs share a multiprocessor and
# one's epilogue hides behind the other's products.
# Chosen by these counts, not by a stopwatch: they have not been timed on a GPU yet.
FEW, SOME, MANY = 16, 96, 2**31
IEEE = [(FEW, Config(16, 64, 32, 4, 3)), (MANY, Config(64, 64, 16, 8, 3))]
CONFIGS: dict[int, dict[str, list[tuple[int, Config]]]] = {
    80: {
        "half": [
            (FEW, Config(16, 64, 128, 4, 4)),
            (SOME, Config(64, 128, 64, 4, 4)),
            (MANY, Config(128, 128, 64, 8, 4)),
        ],
        "tf32": [
            (FEW, Config(16, 64, 64, 4, 4)),
            (SOME, Config(64, 128, 32, 4, 4)),
            (MANY, Config(128, 128, 32, 8, 4)),
        ],
        "ieee": IEEE,
    },
    86: {
        "half": [(FEW, Config(16, 64, 64, 4, 4)), (MANY, Config(64, 128, 32, 4, 4))],
        "tf32": [(FEW, Config(16, 64, 32, 4, 4)), (MANY, Config(64, 128, 32, 4, 3))],
        "ieee": IEEE,
    },
    90: {
        "half": [
            (FEW, Config(16, 64, 128, 4, 5)),
            (SOME, Config(64, 128, 64, 4, 4)),
            (MANY, Config(128, 128, 64, 8, 3)),
        ],
        "tf32": [
            (FEW, Config(16, 64, 64, 4, 5)),
            (SOME, Config(64, 128, 32, 4, 4)),
            (MANY, Config(128, 128, 32, 8, 3)),
        ],
        "ieee": IEEE,
    },
    100: {
        "half": [
            (FEW, Config(16, 64, 128, 4, 5)),
            (SOME, Config(64, 128, 64, 4, 4)),
            (MANY, Config(128, 256, 64, 8, 4)),
        ],
        "tf32": [
            (FEW, Config(16, 64, 64, 4, 5)),
            (SOME, Config(64, 128, 32, 4, 4)),
            (MANY, Config(128, 128, 32, 8, 4)),
        ],
        "ieee": IEEE,
    },
}
# Where rows do not start at whole 16 bytes, every element is a load with a pointer of its own, on any architecture:
# a smaller tile keeps those pointers in registers.
UNALIGNED = [(FEW, Config(16, 64, 32, 4, 3)), (MANY, Config(64, 128, 32, 8, 3))]
GROUP_M = 8  # row tiles that share a strip of weights in L2


def architecture(capability: tuple[int, int]) -> int:
    """The key of CONFIGS for a CUDA compute capability."""
    major, minor = capability
    if major in (9, 10):
        return major * 10
    return 80 if (major, minor) in ((8, 0), (8, 7)) else 86


def aligned(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether Triton sees (by its specialisation on multiples of 16) that x and weight can be read 16 bytes a load."""
    k, n = weight.shape[2], weight.shape[1]
    stride_g, stride_n, stride_k = weight.stride()
    by_rows = stride_k == 1 and stride_n % 16 == 0
    by_columns = stride_n == 1 and stride_k % 16 == 0 and n % 16 == 0
    x_fits = x.stride(1) == 1 and x.stride(0) % 16 == 0 and k % 16 == 0
    pointers_fit = x.data_ptr() % 16 == 0 and weight.data_ptr() % 16 == 0
    return x_fits and (by_rows or by_columns) and stride_g % 16 == 0 and pointers_fit


def choose_config(arch: int, arithmetic: str, num_slots: int, num_groups: int, aligned: bool) -> Config:
    """The tiling for this capacity: static facts alone, since the live count stays on the device."""
    rows_per_group = triton.cdiv(num_slots, num_groups)
    table = CONFIGS[arch][arithmetic] if aligned else UNALIGNED
    return next(config for most, config in table if rows_per_group <= most)


# ---------------------------------------------------------------- kernel


@triton.jit
def store_tile(pointer, values, slot, end, n, N):
    """pointer[slot, n] = values for slots below end and columns below N, rounded to the pointer's dtype."""
    live = (slot < end)[:, None] & (n < N)[None, :]
    tl.store(pointer + slot[:, None] * N + n[None, :], values.to(pointer.dtype.element_ty), mask=live)


@triton.jit
def finish(
    total,  # [BM, columns of n]
    n,
    N,
    slot,  # [BM]
    end,
    bias,  # of this group
    stride_bn,
    out,
    pre,
    ACTIVATION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SAVE_PRE: tl.constexpr,
):
    """Bias, activation and store of some columns of a tile."""
    if HAS_BIAS:
        total += tl.load(bias + n.to(tl.int64) * stride_bn, mask=n < N, other=0.0).to(tl.float32)[None, :]
    if SAVE_PRE:
        store_tile(pre, total, slot, end, n, N)
    store_tile(out, activate(total, ACTIVATION), slot, end, n, N)


@triton.jit(do_not_specialize=["num_slots", "num_groups"])
def grouped_linear_kernel(
    x,  # [T, K] rows, or [A, K] slots
    weight,  # [G, N, K], any strides
    bias,  # [G, N], any strides
    rows,  # [A]
    offsets,  # [G + 1]
    out,  # [A, N] contiguous
    pre,  # [A, N] contiguous
    num_slots,
    num_groups,
    N,
    K,
    stride_xt,
    stride_xk,
    stride_wg,
    stride_wn,
    stride_wk,
    stride_bg,
    stride_bn,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,  # of tl.dot: "tf32" or "ieee"
    GATHER: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SAVE_PRE: tl.constexpr,
    ZERO_PADDING: tl.constexpr,  # write zeros to the slots behind offsets[G]
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP_M: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    tiles_n = tl.cdiv(N, BN)
    tile, tile_n = swizzle(tl.program_id(0), num_slots // BM + num_groups + 1, tiles_n, GROUP_M)
    group, first, end = find_tile(tile, offsets, num_slots, num_groups, BM, BLOCK_G)
    if first >= end:
        return

    slot = first + tl.arange(0, BM)  # [BM]
    n = tile_n * BN + tl.arange(0, BN)  # [BN]
    if group == num_groups:
        if ZERO_PADDING:
            zero = tl.zeros([BM, BN], tl.float32)
            store_tile(out, zero, slot, end, n, N)
            if SAVE_PRE:
                store_tile(pre, zero, slot, end, n, N)
        return

    # A slot behind the group's end reads the row of its first slot: a result of its own that nobody stores
    row = tl.where(slot < end, slot, first)  # [BM]
    if GATHER:
        row = tl.load(rows + row).to(tl.int64)
    k = tl.arange(0, BK)  # [BK]
    x_ptr = x + row[:, None] * stride_xt + k.to(tl.int64)[None, :] * stride_xk  # [BM, BK]
    w_ptr = weight + group.to(tl.int64) * stride_wg
    w_ptr = w_ptr + n.to(tl.int64)[None, :] * stride_wn + k.to(tl.int64)[:, None] * stride_wk  # [BK, BN]
    step_x = tl.cast(stride_xk, tl.int64) * BK
    step_w = tl.cast(stride_wk, tl.int64) * BK

    total = tl.zeros([BM, BN], tl.float32)
    for start in range(0, K, BK):
        x_block = tl.load(x_ptr, mask=(k < K - start)[None, :], other=0.0)  # [BM, BK]
        w_block = tl.load(w_ptr, mask=(k < K - start)[:, None] & (n < N)[None, :], other=0.0)  # [BK, BN]
        total = tl.dot(x_block, w_block, total, input_precision=PRECISION)
        x_ptr += step_x
        w_ptr += step_w

    # Two halves of the columns, one after the other: whole, the activation's temporaries spill the large tiles
    HALF: tl.constexpr = BN // 2
    left, right = tl.split(tl.permute(tl.reshape(total, (BM, 2, HALF)), (0, 2, 1)))  # [BM, HALF] each
    n = tile_n * BN + tl.arange(0, HALF)  # [HALF]
    b_ptr = (bias + group.to(tl.int64) * stride_bg) if HAS_BIAS else bias
    finish(left, n, N, slot, end, b_ptr, stride_bn, out, pre, ACTIVATION, HAS_BIAS, SAVE_PRE)
    finish(right, n + HALF, N, slot, end, b_ptr, stride_bn, out, pre, ACTIVATION, HAS_BIAS, SAVE_PRE)


# ---------------------------------------------------------------- launcher


def grouped_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    rows: torch.Tensor,
    offsets: torch.Tensor,
    scale: torch.Tensor | None,
    row_offsets: torch.Tensor,
    row_slots: torch.Tensor,
    activation: str,
    gather: bool,
    scatter: bool,
    save: bool,
    *,
    arch: int,
    tf32: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, pre) as the op's backends return them; x, weight and bias of one dtype: float32, bfloat16 or float16.

    The launch depends on shapes alone; nothing here waits for the device. scatter buffers the slots in float32, so
    that a row is rounded once however many slots it sums."""
    num_slots, num_groups, num_rows = rows.shape[0], weight.shape[0], row_offsets.shape[0] - 1
    n, k = weight.shape[1:]
    save = save and activation != "none"
    slots = x.new_empty(num_slots, n, dtype=torch.float32 if scatter else x.dtype)
    pre = x.new_empty(num_slots, n) if save else x.new_empty(0)
    if num_slots > 0 and n > 0:
        arithmetic = "half" if x.dtype != torch.float32 else "tf32" if tf32 else "ieee"
        config = choose_config(arch, arithmetic, num_slots, num_groups, aligned(x, weight))
        grid = (num_tiles(num_slots, num_groups, config.BM) * triton.cdiv(n, config.BN),)
        grouped_linear_kernel[grid](
            x,
            weight,
            bias,
            rows,
            offsets,
            slots,
            pre if save else None,
            num_slots,
            num_groups,
            n,
            k,
            *x.stride(),
            *weight.stride(),
            *(bias.stride() if bias is not None else (0, 0)),
            ACTIVATION=activation,
            PRECISION="tf32" if arithmetic == "tf32" else "ieee",
            GATHER=gather,
            HAS_BIAS=bias is not None,
            SAVE_PRE=save,
            ZERO_PADDING=save or not scatter,
            BM=config.BM,
            BN=config.BN,
            BK=config.BK,
            GROUP_M=GROUP_M,
            BLOCK_G=BLOCK_G,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
    if not scatter:
        return slots, pre
    out = x.new_empty(num_rows, n)
    combine(slots, None, scale, row_offsets, row_slots, out)
    return out, pre
