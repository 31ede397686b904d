"""tree_route: the leaf that each row reaches in a complete binary tree of linear decisions."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from dyncore.ops.checks import expect_dims, expect_shape, expect_tensor, flattened

_tree_route = torch.ops.dyncore.tree_route.default


@register_flop_formula(torch.ops.dyncore.tree_route, get_raw=True)
def _flops(x: Tensor, weight: Tensor, bias: Tensor | None, out_val: Tensor | None = None) -> int:
    return 2 * x.shape[0] * depth_of(weight.shape[0]) * x.shape[1]


def depth_of(nodes: int) -> int:
    """The depth of a complete binary tree of so many inner nodes, 2^depth - 1; -1 where no tree has so many."""
    depth = (nodes + 1).bit_length() - 1
    return depth if 2**depth == nodes + 1 and depth <= 30 else -1


def tree_route(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The leaf of each row: from the root down, a row goes right where weight[n] . x + bias[n] > 0 (fast feedforward
    networks, Belcak 2023).

    Args:
        x: rows [..., D].
        weight: [2^depth - 1, D], the nodes in heap order: the children of node n are 2n + 1, left, and 2n + 2.
        bias: [2^depth - 1] or None.

    Returns int32 leaves 0..2^depth - 1, from left to right, of shape [...]: `dc.route(leaf.view(-1, 1),
    num_groups=2**depth)` is the plan of the leaves. A row costs depth dot products, made in float32 (float64 for
    float64), however many nodes there are; NaN goes left. There is no gradient. Raises TypeError on dtypes and on what
    is no tensor, ValueError on shapes, devices and a number of nodes that no complete tree has.
    """
    expect_tensor("x", x)
    expect_dims("x", x)
    expect_tensor("weight", weight, like=x)
    expect_shape("weight", weight, "nodes D", (None, x.shape[-1]), matrix=True)
    if depth_of(weight.shape[0]) < 0:
        raise ValueError(f"weight: expected 2^depth - 1 nodes, got {weight.shape[0]}")
    if bias is not None:
        expect_shape("bias", expect_tensor("bias", bias, like=x), "nodes", (weight.shape[0],))
    leaves = _tree_route(flattened(x.detach()), weight.detach(), None if bias is None else bias.detach())
    return leaves.view(x.shape[:-1])
