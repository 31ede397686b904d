"""tree_route: the leaf that each row reaches in a complete binary tree of linear decisions. Floor 0.

Arithmetic: a dot product a level and row, of a row of x and the node that the row has reached; both come from the
caches after the first level, which reads x from memory.
"""

import torch
import triton
import triton.language as tl

BM, BK, NUM_WARPS = 16, 128, 4  # not timed: 16 elements a thread


@triton.jit(do_not_specialize=["T"])
def tree_route_kernel(
    x,  # [T, D], any strides
    weight,  # [nodes, D], any strides
    bias,  # [nodes]
    leaves,  # [T]
    T,
    D,
    stride_xt,
    stride_xd,
    stride_wn,
    stride_wd,
    stride_b,
    DEPTH: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)  # [BM]
    live = row < T
    node = tl.zeros([BM], tl.int32)
    for _ in range(DEPTH):
        total = tl.zeros([BM], tl.float32)
        for start in range(0, D, BK):
            k = start + tl.arange(0, BK).to(tl.int64)  # [BK]
            inside = live[:, None] & (k < D)[None, :]
            x_block = tl.load(x + row[:, None] * stride_xt + k[None, :] * stride_xd, mask=inside, other=0.0)
            w_ptr = weight + node.to(tl.int64)[:, None] * stride_wn + k[None, :] * stride_wd
            w_block = tl.load(w_ptr, mask=inside, other=0.0)
            total += tl.sum(x_block.to(tl.float32) * w_block.to(tl.float32), 1)  # [BM]
        if HAS_BIAS:
            total += tl.load(bias + node.to(tl.int64) * stride_b, mask=live, other=0.0).to(tl.float32)
        node = 2 * node + 1 + (total > 0).to(tl.int32)
    tl.store(leaves + row, node - ((1 << DEPTH) - 1), mask=live)


def tree_route(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """int32 leaves [T]."""
    leaves = x.new_empty(x.shape[0], dtype=torch.int32)
    if x.shape[0]:
        tree_route_kernel[(triton.cdiv(x.shape[0], BM),)](
            x, weight, x if bias is None else bias, leaves, *x.shape, *x.stride(), *weight.stride(),
            0 if bias is None else bias.stride(0), DEPTH=(weight.shape[0] + 1).bit_length() - 1,
            HAS_BIAS=bias is not None, BM=BM, BK=BK, num_warps=NUM_WARPS,
        )  # fmt: skip
    return leaves
