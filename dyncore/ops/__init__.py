"""The ops, differentiable, one file each: gather - compute - scaled scatter over the slots of a plan; and products that
skip the zeros of a ReLU; compaction of whole samples for any module; attention by position; and trees of decisions."""

from dyncore.ops.attention import attention
from dyncore.ops.compact import compact, expand
from dyncore.ops.gather_rows import gather_rows
from dyncore.ops.grouped_linear import grouped_linear
from dyncore.ops.grouped_mlp import grouped_mlp
from dyncore.ops.scatter_rows import scatter_rows
from dyncore.ops.sparse_linear import sparse_linear
from dyncore.ops.sparse_mlp import sparse_mlp
from dyncore.ops.tree_route import tree_route

__all__ = [
    "attention",
    "compact",
    "expand",
    "gather_rows",
    "grouped_linear",
    "grouped_mlp",
    "scatter_rows",
    "sparse_linear",
    "sparse_mlp",
    "tree_route",
]
