"""The product that gives a layer's input its gradient, back through the activation that made that input:
g[a] = grad[rows[a]] @ weight[g(a)], then for v = value[a], whose act(v) was the layer's input,
dv[a] = scale[a] * g[a] * act'(v), act(v) * scale[a] for the weight's gradient, and the sums over slots.
Floor 0, shared by the grouped ops.

sum(g * act(v)) over a slot is the gradient of its scale, without the layer's output: <grad, W u> = <grad W, u>. And
scale[a] stands at act(v), not at grad, in the weight's gradient: grad is then gathered as it is, never copied.
"""

import torch
import triton
import triton.language as tl

from .activations import activate_with_derivative
from .blocks import clear_padding, halves, multiply, store_tile
from .configs import CONFIGS, GROUP_M, UNALIGNED, Config, Key, Target, aligned, key_of, num_programs, usual
from .tiles import block_of_groups, count_tiles, find_tile, swizzle

# ---------------------------------------------------------------- kernel


@triton.jit
def finish_backward(
    g,  # [BM, columns of n]
    n,
    N,
    slot,  # [BM]
    end,
    value_row,  # [BM]
    factor,  # [BM], the slots' scales
    value,
    stride_vt,
    stride_vn,
    out,
    scaled,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    STORE: tl.constexpr,
    STORE_SCALED: tl.constexpr,
):
    """Everything elementwise for some columns of a tile; returns their part of the row sums, [BM]."""
    live = (slot < end)[:, None] & (n < N)[None, :]
    v_ptr = value + value_row[:, None] * stride_vt + n.to(tl.int64)[None, :] * stride_vn
    u, slope = activate_with_derivative(tl.load(v_ptr, mask=live, other=0.0).to(tl.float32), ACTIVATION)
    # of the slots behind the end u is 0, but not g: it is that of the first slot, and might be NaN
    g = tl.where(live, g, 0.0)
    if GATED:
        gate = u
        up = tl.load(v_ptr + tl.cast(stride_vn, tl.int64) * N, mask=live, other=0.0).to(tl.float32)
        u = gate * up
    sums = tl.sum(g * u, 1)
    if HAS_SCALE:
        g *= factor[:, None]
    if STORE_SCALED:
        if HAS_SCALE:
            u *= factor[:, None]
        store_tile(scaled, u, slot, end, n, N, N)
    if GATED:
        dup = g * gate
        dgate = g * up * slope
        if STORE:
            store_tile(out, dgate, slot, end, n, N, 2 * N)
            store_tile(out + N, dup, slot, end, n, N, 2 * N)
    else:
        if ACTIVATION != "none":
            g *= slope
        if STORE:
            store_tile(out, g, slot, end, n, N, N)
    return sums


@triton.jit(do_not_specialize=["num_slots", "num_groups"])
def product_backward_kernel(
    grad,  # [T, K] rows, or [A, K] slots
    weight,  # [G, N, K], any strides
    value,  # [A, N] slots, or [T, N] rows, any strides; gated [A, 2N]
    scale,  # [A]
    rows,  # [A]
    offsets,  # [G + 1]
    out,  # [A, N] contiguous; gated [A, 2N]
    scaled,  # [A, N] contiguous
    row_pieces,  # [tiles of columns, A]
    num_slots,
    num_groups,
    N,
    K,
    stride_gt,
    stride_gk,
    stride_wg,
    stride_wn,
    stride_wk,
    stride_vt,
    stride_vn,
    stride_scale,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    PRECISION: tl.constexpr,  # of tl.dot: "tf32" or "ieee"
    GATHER: tl.constexpr,
    GATHER_VALUE: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    STORE: tl.constexpr,
    STORE_SCALED: tl.constexpr,
    ROW_SUMS: tl.constexpr,
    ZERO_PADDING: tl.constexpr,  # write zeros to the slots of out behind offsets[G]
    EVEN_N: tl.constexpr,  # N is a multiple of BN
    EVEN_K: tl.constexpr,  # K is a multiple of BK
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP_M: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    tiles_n = tl.cdiv(N, BN)
    tiles_m = count_tiles(offsets, num_groups, BM, BLOCK_G)
    for number in range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        tile, tile_n = swizzle(number, tiles_m, tiles_n, GROUP_M)
        group, first, end = find_tile(tile, offsets, num_groups, BM, BLOCK_G)
        slot = first + tl.arange(0, BM)  # [BM]
        # A slot behind the group's end reads the row of its first slot
        row = tl.where(slot < end, slot, first)  # [BM]
        value_row = row
        if GATHER or GATHER_VALUE:
            source = tl.load(rows + row).to(tl.int64)
            if GATHER:
                row = source
            if GATHER_VALUE:
                value_row = source
        n = tile_n * BN + tl.arange(0, BN)  # [BN]
        total = multiply(
            grad, weight, row, group, n, n < N, K, stride_gt, stride_gk, stride_wg, stride_wn, stride_wk,
            PRECISION, EVEN_N, EVEN_K, BM, BN, BK,
        )  # fmt: skip

        # Quarters of the columns, one after the other: whole, the temporaries spill large tiles
        PART: tl.constexpr = BN // 4
        n = tile_n * BN + tl.arange(0, PART)  # [PART]
        factor = tl.zeros([BM], tl.float32)
        if HAS_SCALE:
            factor = tl.load(scale + slot * stride_scale, mask=slot < end, other=0.0).to(tl.float32)
        left, right = halves(total, BM, BN)  # [BM, BN / 2] each
        a, b = halves(left, BM, BN // 2)  # [BM, PART] each
        c, d = halves(right, BM, BN // 2)
        sums = finish_backward(
            a, n, N, slot, end, value_row, factor, value, stride_vt, stride_vn, out, scaled,
            ACTIVATION, GATED, HAS_SCALE, STORE, STORE_SCALED,
        )  # fmt: skip
        sums += finish_backward(
            b, n + PART, N, slot, end, value_row, factor, value, stride_vt, stride_vn, out, scaled,
            ACTIVATION, GATED, HAS_SCALE, STORE, STORE_SCALED,
        )  # fmt: skip
        sums += finish_backward(
            c, n + 2 * PART, N, slot, end, value_row, factor, value, stride_vt, stride_vn, out, scaled,
            ACTIVATION, GATED, HAS_SCALE, STORE, STORE_SCALED,
        )  # fmt: skip
        sums += finish_backward(
            d, n + 3 * PART, N, slot, end, value_row, factor, value, stride_vt, stride_vn, out, scaled,
            ACTIVATION, GATED, HAS_SCALE, STORE, STORE_SCALED,
        )  # fmt: skip
        if ROW_SUMS:
            tl.store(row_pieces + tl.cast(tile_n, tl.int64) * num_slots + slot, sums, mask=slot < end)
    if ZERO_PADDING:
        clear_padding(out, offsets, num_slots, num_groups, N, BM, BN)


# ---------------------------------------------------------------- launcher

# The epilogue reads as much as it writes: for its registers not to spill, tiles from 64 rows on are shared by eight
# warps, which have a multiprocessor to themselves, and stay small where elements are of 4 bytes or pointers many.
ROOMY = {"num_warps": 8, "num_stages": 4, "resident": 1}


def choose_roomy_config(target: Target, key: Key, aligned: bool) -> Config:
    special = target.special(key) if aligned else None
    if special is not None:
        return special
    config = usual(CONFIGS[target.arch][key.arithmetic] if aligned else UNALIGNED, key)
    if config.BM < 64:
        return config
    if not aligned:
        return config._replace(BN=64, num_warps=8)
    return config._replace(**ROOMY, BM=config.BM if key.arithmetic == "half" else 64)


def product_backward(
    grad: torch.Tensor,
    weight: torch.Tensor,
    value: torch.Tensor,
    scale: torch.Tensor | None,
    rows: torch.Tensor,
    offsets: torch.Tensor,
    out: torch.Tensor | None,
    scaled: torch.Tensor | None = None,
    *,
    activation: str = "none",
    gated: bool = False,
    gather: bool = True,
    gather_value: bool = False,
    zero_padding: bool = False,
    multiplied: bool = True,
    sum_rows: bool = False,
    target: Target,
) -> torch.Tensor:
    """Writes out and scaled, where given, and returns the pieces (see sums.py) of the row sums of g * act(value).

    weight is [G, N, K] with K the width of grad. gather: grad is [T, K], else [A, K]; gather_value: value is [T, N],
    else [A, N] (gated [A, 2N]). Not multiplied: g is taken as 0, where only `scaled` is wanted."""
    num_slots, (num_groups, n) = rows.shape[0], weight.shape[:2]
    k = weight.shape[2] if multiplied else 0
    key = key_of("product_backward", target.arithmetic(grad.dtype), num_slots, num_groups, weight.shape[2])
    config = choose_roomy_config(target, key, aligned(grad, weight))
    tiles_n = triton.cdiv(n, config.BN)
    row_pieces = grad.new_empty(tiles_n if sum_rows else 0, num_slots, dtype=torch.float32)
    if num_slots > 0 and n > 0:
        product_backward_kernel[(num_programs(target, config, num_slots, num_groups, tiles_n),)](
            grad,
            weight,
            value,
            scale,
            rows,
            offsets,
            out,
            scaled,
            row_pieces if sum_rows else None,
            num_slots,
            num_groups,
            n,
            k,
            *grad.stride(),
            *weight.stride(),
            *value.stride(),
            scale.stride(0) if scale is not None else 0,
            ACTIVATION=activation,
            GATED=gated,
            PRECISION=target.precision(grad.dtype),
            GATHER=gather,
            GATHER_VALUE=gather_value,
            HAS_SCALE=scale is not None,
            STORE=out is not None,
            STORE_SCALED=scaled is not None,
            ROW_SUMS=sum_rows,
            ZERO_PADDING=zero_padding,
            EVEN_N=n % config.BN == 0,
            EVEN_K=k % config.BK == 0,
            BM=config.BM,
            BN=config.BN,
            BK=config.BK,
            GROUP_M=GROUP_M,
            BLOCK_G=block_of_groups(num_groups),
            **config.options(),
        )
    return row_pieces
