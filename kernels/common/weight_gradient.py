"""The gradient of a group's weight: dweight[g] = sum over its slots a of left[a]^T right[a], gathered on either side.
Floor 0, shared by the grouped ops. A program owns a tile of a weight and walks the group's slots in order, so the sum
has one order and no atomic; a group without slots gets zeros. Where the tiles are too few for the device, each is made
in pieces of the group's slots, as many as shapes alone say, which are then summed in order.

Arithmetic: 2 A N K FLOPs on (A N + A K + G N K) elements: at few slots a group the weights written bound it.
"""

import torch
import triton
import triton.language as tl

from .configs import GROUP_M, Config, Key, Target, fits_wide_loads, key_of
from .sums import sum_pieces
from .tiles import swizzle

# ---------------------------------------------------------------- configurations

# architecture -> arithmetic -> tiling: BM columns of left x BN columns of right, BK slots a step.
IEEE = Config(64, 64, 16, 8, 3, 2)
CONFIGS: dict[int, dict[str, Config]] = {
    80: {"half": Config(128, 128, 32, 8, 4, 1), "tf32": Config(128, 128, 16, 8, 4, 1), "ieee": IEEE},
    86: {"half": Config(64, 128, 32, 4, 4, 2), "tf32": Config(64, 128, 16, 4, 4, 2), "ieee": IEEE},
    90: {"half": Config(128, 256, 64, 8, 4, 1), "tf32": Config(128, 128, 32, 8, 4, 1), "ieee": IEEE},
    100: {"half": Config(128, 256, 64, 8, 4, 1), "tf32": Config(128, 128, 32, 8, 4, 1), "ieee": IEEE},
}
UNALIGNED = Config(64, 64, 32, 8, 3, 1)  # a pointer an element: a smaller tile keeps them in registers

# ---------------------------------------------------------------- kernel


@triton.jit(do_not_specialize=["num_groups", "num_pieces"])
def weight_gradient_kernel(
    left,  # [A, N] slots, or [T, N] rows, any strides
    right,  # [A, K] slots, or [T, K] rows, any strides
    rows,  # [A]
    offsets,  # [G + 1]
    out,  # [pieces, G, N, K] contiguous
    num_groups,
    num_pieces,
    N,
    K,
    stride_la,
    stride_ln,
    stride_ra,
    stride_rk,
    PRECISION: tl.constexpr,  # of tl.dot: "tf32" or "ieee"
    GATHER_LEFT: tl.constexpr,
    GATHER_RIGHT: tl.constexpr,
    EVEN: tl.constexpr,  # N and K are multiples of BM and BN
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    tiles_n, tiles_k = tl.cdiv(N, BM), tl.cdiv(K, BN)
    tiles = tiles_n * tiles_k
    for number in range(tl.program_id(0), num_groups * tiles * num_pieces, tl.num_programs(0)):
        piece, index = number % num_pieces, number // num_pieces
        group = index // tiles
        tile_n, tile_k = swizzle(index % tiles, tiles_n, tiles_k, GROUP_M)
        begin, end = tl.load(offsets + group), tl.load(offsets + group + 1)
        length = tl.cdiv(tl.cdiv(end - begin, num_pieces), BK) * BK
        begin += piece * length
        end = min(end, begin + length)
        n = tile_n * BM + tl.arange(0, BM)  # [BM]
        k = tile_k * BN + tl.arange(0, BN)  # [BN]
        l_ptr = left + n.to(tl.int64)[None, :] * stride_ln  # [1, BM]
        r_ptr = right + k.to(tl.int64)[None, :] * stride_rk  # [1, BN]

        total = tl.zeros([BM, BN], tl.float32)
        for start in range(begin, end, BK):
            slot = start + tl.arange(0, BK)  # [BK]
            live = slot < end
            l_row = slot.to(tl.int64)
            r_row = l_row
            if GATHER_LEFT or GATHER_RIGHT:
                row = tl.load(rows + slot, mask=live, other=0).to(tl.int64)
                if GATHER_LEFT:
                    l_row = row
                if GATHER_RIGHT:
                    r_row = row
            # both are 0 behind the end: another group's slot may hold an infinity
            if EVEN:
                l_block = tl.load(l_ptr + l_row[:, None] * stride_la, mask=live[:, None], other=0.0)  # [BK, BM]
                r_block = tl.load(r_ptr + r_row[:, None] * stride_ra, mask=live[:, None], other=0.0)  # [BK, BN]
            else:
                l_block = tl.load(l_ptr + l_row[:, None] * stride_la, mask=live[:, None] & (n < N)[None, :], other=0.0)
                r_block = tl.load(r_ptr + r_row[:, None] * stride_ra, mask=live[:, None] & (k < K)[None, :], other=0.0)
            total = tl.dot(tl.trans(l_block), r_block, total, input_precision=PRECISION)

        o_ptr = out + (tl.cast(piece, tl.int64) * num_groups + group) * N * K + n.to(tl.int64)[:, None] * K + k[None, :]
        tl.store(o_ptr, total.to(out.dtype.element_ty), mask=(n < N)[:, None] & (k < K)[None, :])


# ---------------------------------------------------------------- launcher


def choose_gradient_config(target: Target, key: Key, wide: bool) -> Config:
    if not wide:
        return UNALIGNED
    return target.special(key) or CONFIGS[target.arch][key.arithmetic]


STEPS_OF_A_PIECE = 8  # at least: a piece is written and read again


def num_pieces(target: Target, config: Config, num_slots: int, num_groups: int, tiles: int) -> int:
    """Pieces that a tile is made in, by the capacity: the live count stays on the device."""
    idle = target.processors * config.resident // tiles
    return max(1, min(idle, num_slots // (num_groups * STEPS_OF_A_PIECE * config.BK)))


def weight_gradient(
    left: torch.Tensor,
    right: torch.Tensor,
    rows: torch.Tensor,
    offsets: torch.Tensor,
    out: torch.Tensor,
    *,
    gather_left: bool,
    gather_right: bool,
    target: Target,
) -> None:
    """Writes out [G, N, K]; left is [T, N] if gathered, else [A, N]; right is [T, K] if gathered, else [A, K]."""
    num_groups, n, k = out.shape
    if out.numel() == 0:
        return
    key = key_of("weight_gradient", target.arithmetic(left.dtype), rows.shape[0], num_groups, min(n, k))
    config = choose_gradient_config(target, key, fits_wide_loads(left) and fits_wide_loads(right))
    tiles = num_groups * triton.cdiv(n, config.BM) * triton.cdiv(k, config.BN)
    pieces = num_pieces(target, config, rows.shape[0], num_groups, tiles)
    made = out if pieces == 1 else out.new_empty(pieces, *out.shape, dtype=torch.float32)
    weight_gradient_kernel[(min(target.processors * config.resident, tiles * pieces),)](
        left,
        right,
        rows,
        offsets,
        made,
        num_groups,
        pieces,
        n,
        k,
        *left.stride(),
        *right.stride(),
        PRECISION=target.precision(left.dtype),
        GATHER_LEFT=gather_left,
        GATHER_RIGHT=gather_right,
        EVEN=n % config.BM == 0 and k % config.BN == 0,
        BM=config.BM,
        BN=config.BN,
        BK=config.BK,
        GROUP_M=GROUP_M,
        # a step's rows must be there before its loads: Triton then fills half as many buffers with as many stages
        **{**config.options(), "num_stages": config.num_stages * (2 if gather_left or gather_right else 1)},
    )
    if pieces > 1:
        sum_pieces(made, out)
