"""The reference backend: every op in plain PyTorch, on any device and in any dtype.

This is the specification. The other backends are tested against it, and it serves wherever they have no kernel.
float16 and bfloat16 are computed in float32 and rounded once. Shapes: T rows, A slots, G groups; a plan comes as
`rows` [A], `offsets` [G+1], `scale` [A] or None, `row_offsets` [T+1], `row_slots` [A].
"""

from dyncore.backends.reference.attention import attention, attention_backward
from dyncore.backends.reference.common import check_plan, groups_of
from dyncore.backends.reference.grouped import (
    gather_rows,
    grouped_linear,
    grouped_linear_backward,
    grouped_mlp,
    grouped_mlp_backward,
    grouped_mlp_packed,
    pack_weight,
    scatter_rows,
    scatter_rows_backward,
)
from dyncore.backends.reference.plans import (
    check_capacity,
    check_experts,
    plan_inverse,
    plan_mask,
    plan_mask_sources,
    plan_route,
    plan_route_topk,
    plan_topk,
)
from dyncore.backends.reference.sparse import (
    sparse_hidden,
    sparse_linear,
    sparse_linear_backward,
    sparse_mlp,
    sparse_mlp_backward,
)
from dyncore.backends.reference.trees import tree_route

__all__ = [
    "attention",
    "attention_backward",
    "check_capacity",
    "check_experts",
    "check_plan",
    "gather_rows",
    "grouped_linear",
    "grouped_linear_backward",
    "grouped_mlp",
    "grouped_mlp_backward",
    "grouped_mlp_packed",
    "groups_of",
    "pack_weight",
    "plan_inverse",
    "plan_mask",
    "plan_mask_sources",
    "plan_route",
    "plan_route_topk",
    "plan_topk",
    "scatter_rows",
    "scatter_rows_backward",
    "sparse_hidden",
    "sparse_linear",
    "sparse_linear_backward",
    "sparse_mlp",
    "sparse_mlp_backward",
    "tree_route",
]
