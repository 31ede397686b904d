"""The ops: gather - compute - scaled scatter over the slots of a plan, differentiable, one file each."""

from dyncore.ops.gather_rows import gather_rows
from dyncore.ops.grouped_linear import grouped_linear
from dyncore.ops.grouped_mlp import grouped_mlp
from dyncore.ops.scatter_rows import scatter_rows

__all__ = ["gather_rows", "grouped_linear", "grouped_mlp", "scatter_rows"]
