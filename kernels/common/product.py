"""The product of slots by their groups' weights: out[a] = scale[a] * act(x[rows[a]] @ weight[g(a)].T + bias[g(a)]).
Floor 0, shared by the grouped ops, forward and (with weights transposed by their strides) backward.

Arithmetic: 2 A N K FLOPs on (A K + G N K + A N) elements. With m rows a group an element of weight read does 2 m
FLOPs: below about 300 rows a group in bf16 on an H100 the weights' bandwidth bounds it, above it the tensor cores do.
The gather costs row pointers instead of a copy: every row still comes as whole 16-byte pieces along K. Where the tiles
would leave half of the device idle (few rows of few narrow groups), each is made in pieces of its depth (split.py).
"""

import torch
import triton
import triton.language as tl

from .blocks import clear_padding, halves, multiply, store_tile
from .configs import GROUP_M, Config, Target, aligned, choose_config, key_of, num_programs
from .split import finish, finish_gated, finish_pieces
from .tiles import block_of_groups, count_tiles, find_tile, num_tiles, swizzle

# ---------------------------------------------------------------- kernel


@triton.jit(do_not_specialize=["num_slots", "num_groups", "num_pieces"])
def product_kernel(
    x,  # [T, K] rows, or [A, K] slots
    weight,  # [G, N, K], any strides; gated [G, 2N, K]
    bias,  # [G, N], any strides; gated [G, 2N]
    scale,  # [A]
    rows,  # [A]
    offsets,  # [G + 1]
    out,  # [A, N] contiguous
    pre,  # [A, N] contiguous; gated [A, 2N]
    pieces,  # [num_pieces, A, N] contiguous; gated [num_pieces, A, 2N]
    num_slots,
    num_groups,
    num_pieces,
    N,
    K,
    stride_xt,
    stride_xk,
    stride_wg,
    stride_wn,
    stride_wk,
    stride_bg,
    stride_bn,
    stride_scale,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    PRECISION: tl.constexpr,  # of tl.dot: "tf32" or "ieee"
    GATHER: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    SAVE_PRE: tl.constexpr,
    ZERO_PADDING: tl.constexpr,  # write zeros to the slots of out behind offsets[G]
    SPLIT: tl.constexpr,  # write bare products of pieces of the depth
    EVEN_N: tl.constexpr,  # N is a multiple of a tile's columns of out
    EVEN_K: tl.constexpr,  # K is a multiple of BK
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP_M: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    WIDTH: tl.constexpr = BN // 2 if GATED else BN  # columns of out in a tile
    tiles_n = tl.cdiv(N, WIDTH)
    tiles_m = count_tiles(offsets, num_groups, BM, BLOCK_G)
    for number in range(tl.program_id(0), tiles_m * tiles_n * num_pieces, tl.num_programs(0)):
        index = number
        begin = 0
        length = K
        if SPLIT:
            index = number // num_pieces
            length = tl.cdiv(tl.cdiv(K, num_pieces), BK) * BK
            begin = number % num_pieces * length
            length = tl.minimum(length, K - begin)
        tile, tile_n = swizzle(index, tiles_m, tiles_n, GROUP_M)
        group, first, end = find_tile(tile, offsets, num_groups, BM, BLOCK_G)
        slot = first + tl.arange(0, BM)  # [BM]
        # A slot behind the group's end reads the row of its first slot: a result of its own that nobody stores
        row = tl.where(slot < end, slot, first)  # [BM]
        if GATHER:
            row = tl.load(rows + row).to(tl.int64)
        column = tl.arange(0, BN)
        n = tile_n * WIDTH + column % WIDTH  # [BN]
        w_row = n + column // WIDTH * N  # gate's columns, then up's
        total = multiply(
            x + tl.cast(begin, tl.int64) * stride_xk, weight + tl.cast(begin, tl.int64) * stride_wk,
            row, group, w_row, n < N, length, stride_xt, stride_xk, stride_wg, stride_wn, stride_wk,
            PRECISION, EVEN_N, EVEN_K, BM, BN, BK,
        )  # fmt: skip

        # Quarters of the columns, one after the other: whole, the activation's temporaries spill large tiles
        PART: tl.constexpr = BN // 4
        n = tile_n * WIDTH + tl.arange(0, PART)  # [PART]
        left, right = halves(total, BM, BN)  # [BM, BN / 2] each
        a, b = halves(left, BM, BN // 2)  # [BM, PART] each
        c, d = halves(right, BM, BN // 2)
        b_ptr = (bias + group.to(tl.int64) * stride_bg) if HAS_BIAS else bias
        if SPLIT:
            ROW: tl.constexpr = 2 if GATED else 1
            p_ptr = pieces + (number % num_pieces).to(tl.int64) * num_slots * N * ROW
            r_ptr = p_ptr + N if GATED else p_ptr
            n_right = n if GATED else n + 2 * PART
            store_tile(p_ptr, a, slot, end, n, N, N * ROW)
            store_tile(p_ptr, b, slot, end, n + PART, N, N * ROW)
            store_tile(r_ptr, c, slot, end, n_right, N, N * ROW)
            store_tile(r_ptr, d, slot, end, n_right + PART, N, N * ROW)
        elif GATED:
            finish_gated(a, c, n, N, slot, end, b_ptr, stride_bn, out, pre, ACTIVATION, HAS_BIAS, SAVE_PRE)
            finish_gated(b, d, n + PART, N, slot, end, b_ptr, stride_bn, out, pre, ACTIVATION, HAS_BIAS, SAVE_PRE)
        else:
            factor = tl.zeros([BM], tl.float32)
            if HAS_SCALE:
                factor = tl.load(scale + slot * stride_scale, mask=slot < end, other=0.0).to(tl.float32)
            finish(
                a, n, N, slot, end, factor, b_ptr, stride_bn, out, pre,
                ACTIVATION, HAS_BIAS, HAS_SCALE, SAVE_PRE,
            )  # fmt: skip
            finish(
                b, n + PART, N, slot, end, factor, b_ptr, stride_bn, out, pre,
                ACTIVATION, HAS_BIAS, HAS_SCALE, SAVE_PRE,
            )  # fmt: skip
            finish(
                c, n + 2 * PART, N, slot, end, factor, b_ptr, stride_bn, out, pre,
                ACTIVATION, HAS_BIAS, HAS_SCALE, SAVE_PRE,
            )  # fmt: skip
            finish(
                d, n + 3 * PART, N, slot, end, factor, b_ptr, stride_bn, out, pre,
                ACTIVATION, HAS_BIAS, HAS_SCALE, SAVE_PRE,
            )  # fmt: skip
    if ZERO_PADDING:
        clear_padding(out, offsets, num_slots, num_groups, N, BM, WIDTH)
    if SAVE_PRE:
        clear_padding(pre, offsets, num_slots, num_groups, 2 * N if GATED else N, BM, WIDTH)


# ---------------------------------------------------------------- launcher

STEPS_OF_A_PIECE = 8  # at least: a piece is written and read again


def num_pieces(target: Target, config: Config, depth: int, tiles: int) -> int:
    """Pieces of its depth that a tile is made in, where there can be but `tiles` of them: none unless half of the
    multiprocessors would stand idle, for it takes a kernel more."""
    if 2 * tiles > target.processors:
        return 1
    places = target.processors * config.resident
    return max(1, min(places // tiles, triton.cdiv(depth, config.BK) // STEPS_OF_A_PIECE))


def product(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    scale: torch.Tensor | None,
    rows: torch.Tensor | None,
    offsets: torch.Tensor,
    out: torch.Tensor,
    pre: torch.Tensor | None = None,
    *,
    activation: str = "none",
    gated: bool = False,
    zero_padding: bool = False,
    target: Target,
) -> None:
    """Writes the live slots of out [A, N], and all of pre where given: x is [T, K] where rows are given, else [A, K].

    gated: `activation` is that of the gate; weight is [G, 2N, K], gate half first. x, weight and bias are of one dtype.
    The launch depends on shapes alone; nothing here waits for the device."""
    (num_slots, n), num_groups, k = out.shape, weight.shape[0], weight.shape[2]
    if num_slots == 0 or n == 0:
        return
    transposed = weight.stride(1) == 1 != weight.stride(2)
    kernel = "product_gated" if gated else "product_transposed" if transposed else "product"
    key = key_of(kernel, target.arithmetic(x.dtype), num_slots, num_groups, k)
    config = choose_config(target, key, aligned(x, weight))
    width = config.BN // 2 if gated else config.BN
    tiles_n = triton.cdiv(n, width)
    count = num_pieces(target, config, k, num_tiles(num_slots, num_groups, config.BM) * tiles_n)
    split = count > 1
    pieces = x.new_empty(count, num_slots, weight.shape[1], dtype=torch.float32) if split else None
    product_kernel[(num_programs(target, config, num_slots, num_groups, tiles_n * count),)](
        x,
        weight,
        None if split else bias,
        None if split else scale,
        rows,
        offsets,
        None if split else out,
        None if split else pre,
        pieces,
        num_slots,
        num_groups,
        count,
        n,
        k,
        *x.stride(),
        *weight.stride(),
        *(bias.stride() if bias is not None and not split else (0, 0)),
        scale.stride(0) if scale is not None and not split else 0,
        ACTIVATION="none" if split else activation,
        GATED=gated,
        PRECISION=target.precision(x.dtype),
        GATHER=rows is not None,
        HAS_BIAS=bias is not None and not split,
        HAS_SCALE=scale is not None and not split,
        SAVE_PRE=pre is not None and not split,
        ZERO_PADDING=zero_padding and not split,
        SPLIT=split,
        EVEN_N=n % width == 0,
        EVEN_K=k % config.BK == 0,
        BM=config.BM,
        BN=config.BN,
        BK=config.BK,
        GROUP_M=GROUP_M,
        BLOCK_G=block_of_groups(num_groups),
        **config.options(),
    )
    if pieces is not None:
        finish_pieces(pieces, bias, scale, offsets, out, pre, activation, gated, zero_padding, target)


def slot_buffer(x: torch.Tensor, num_slots: int, width: int) -> torch.Tensor:
    """Where slots wait to be summed to rows: float32, but bfloat16 for bfloat16.

    A slot rounded to bfloat16 adds an error of 2^-9 of itself, below that of the result's own rounding, and halves the
    bytes of the longest buffer (written and read once a call). float16 has no room for a slot beyond 65504 that others
    bring back."""
    return x.new_empty(num_slots, width, dtype=x.dtype if x.dtype == torch.bfloat16 else torch.float32)
