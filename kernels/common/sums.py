"""Sums that kernels leave in pieces, one a tile, put together in a fixed order: no atomics, the same bits every time.
Floor 0, shared by the backward kernels.

Row sums ([A], gradients of scales) come as [pieces, A], a piece a tile of columns. Column sums ([G, N], gradients of
biases) come as [tiles, N], a piece a tile of slots, numbered as in tiles.py. Whole tensors come as [pieces, ...].
"""

import torch
import triton
import triton.language as tl

from .tiles import block_of_groups, first_tile

BLOCK_A = 256  # slots a program sums
BLOCK_T, BLOCK_N = 16, 128  # tiles in a load, and columns a program sums
BLOCK = 1024  # elements of a tensor that a program sums


@triton.jit(do_not_specialize=["num_slots", "num_groups", "num_first", "num_second"])
def row_sums_kernel(
    first,  # [num_first, A]
    second,  # [num_second, A]
    offsets,  # [G + 1]
    out,  # [A]
    num_slots,
    num_groups,
    num_first,
    num_second,
    BLOCK_A: tl.constexpr,
):
    slot = tl.program_id(0).to(tl.int64) * BLOCK_A + tl.arange(0, BLOCK_A)  # [BLOCK_A]
    live = slot < tl.load(offsets + num_groups)
    total = tl.zeros([BLOCK_A], tl.float32)
    for i in range(num_first):
        total += tl.load(first + tl.cast(i, tl.int64) * num_slots + slot, mask=live, other=0.0)
    for i in range(num_second):
        total += tl.load(second + tl.cast(i, tl.int64) * num_slots + slot, mask=live, other=0.0)
    tl.store(out + slot, total.to(out.dtype.element_ty), mask=slot < num_slots)


def row_sums(pieces: list[torch.Tensor], offsets: torch.Tensor, out: torch.Tensor) -> None:
    """Writes out [A] from one or two sets of pieces [., A]; padding slots get 0."""
    num_slots = out.shape[0]
    if num_slots == 0:
        return
    first, second = pieces[0], pieces[-1]
    row_sums_kernel[(triton.cdiv(num_slots, BLOCK_A),)](
        first, second, offsets, out, num_slots, offsets.shape[0] - 1, first.shape[0],
        second.shape[0] if len(pieces) > 1 else 0, BLOCK_A=BLOCK_A, num_warps=4,
    )  # fmt: skip


@triton.jit
def column_sums_kernel(
    pieces,  # [tiles, N]
    offsets,  # [G + 1]
    out,  # [G, N] contiguous
    N,
    BM: tl.constexpr,  # slots a tile
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    group = tl.program_id(0) // tl.cdiv(N, BLOCK_N)
    n = tl.program_id(0) % tl.cdiv(N, BLOCK_N) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    tiles = tl.cdiv(tl.load(offsets + group + 1) - tl.load(offsets + group), BM)
    first = first_tile(group, offsets, BM, BLOCK_G)
    total = tl.zeros([BLOCK_N], tl.float32)
    for start in range(0, tiles, BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)  # [BLOCK_T]
        piece = pieces + (first + t).to(tl.int64)[:, None] * N + n[None, :]
        total += tl.sum(tl.load(piece, mask=(t < tiles)[:, None] & (n < N)[None, :], other=0.0), axis=0)
    tl.store(out + group.to(tl.int64) * N + n, total.to(out.dtype.element_ty), mask=n < N)


def column_sums(pieces: torch.Tensor, block_m: int, offsets: torch.Tensor, out: torch.Tensor) -> None:
    """Writes out [G, N] from the pieces of tiles of block_m slots; groups without slots get 0."""
    num_groups, n = out.shape
    if out.numel() > 0:
        column_sums_kernel[(num_groups * triton.cdiv(n, BLOCK_N),)](
            pieces, offsets, out, n, BM=block_m, BLOCK_T=BLOCK_T, BLOCK_N=BLOCK_N,
            BLOCK_G=block_of_groups(num_groups), num_warps=4,
        )  # fmt: skip


@triton.jit
def pieces_kernel(
    pieces,  # [num_pieces, size]
    out,  # [size]
    num_pieces,
    size,
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    total = tl.zeros([BLOCK], tl.float32)
    for piece in range(num_pieces):
        total += tl.load(pieces + tl.cast(piece, tl.int64) * size + i, mask=i < size, other=0.0)
    tl.store(out + i, total.to(out.dtype.element_ty), mask=i < size)


def sum_pieces(pieces: torch.Tensor, out: torch.Tensor) -> None:
    """Writes out, contiguous, the sum of pieces [num_pieces, ...]."""
    grid = (triton.cdiv(out.numel(), BLOCK),)
    pieces_kernel[grid](pieces, out, pieces.shape[0], out.numel(), BLOCK=BLOCK, num_warps=4)
