"""dyncore: conditional computation that pays. Plans, ops, layers and the instruments that measure them.

A `Plan` lists what is to be computed: slots, pairs (row, group). `select`, `select_topk`, `route`, `route_topk` and
`route_mask` make one; `gather_rows`, `scatter_rows`, `grouped_linear` and `grouped_mlp` take one. `sparse_linear` and
`sparse_mlp` find the zeros of a ReLU themselves. `compact` and `expand` move whole samples for any module to run on.
`attention` takes tokens by their positions, `tree_route` walks a tree of decisions. `execution` says whether ops skip.

- `dyncore.nn`: dynamic layers, gates and losses
- `dyncore.convert`: models made to skip, in place
- `dyncore.integrations.transformers`: the experts of Hugging Face models
- `dyncore.measure`: executed FLOPs, time, savings, activation sparsity
- `dyncore.masks`: activation masks, drawn and recorded
- `dyncore.audit`, `dyncore.report`: what dyncore could do for a model; results as one page
"""

import importlib
from types import ModuleType as _ModuleType
from typing import TYPE_CHECKING

import torch as _torch  # noqa: F401  # first, so that the C++ kernels share its OpenMP runtime

from dyncore import backends as _backends  # noqa: F401  # registers the ops
from dyncore import ops
from dyncore.execution import execution
from dyncore.ops import (
    attention,
    compact,
    expand,
    gather_rows,
    grouped_linear,
    grouped_mlp,
    scatter_rows,
    sparse_linear,
    sparse_mlp,
    tree_route,
)
from dyncore.plan import Plan, route, route_mask, route_topk, select, select_topk

if TYPE_CHECKING:
    from dyncore import audit, convert, integrations, masks, measure, nn, report

__version__ = "0.1.0"

__all__ = [
    "Plan",
    "attention",
    "audit",
    "compact",
    "convert",
    "execution",
    "expand",
    "gather_rows",
    "grouped_linear",
    "grouped_mlp",
    "integrations",
    "masks",
    "measure",
    "nn",
    "ops",
    "report",
    "route",
    "route_mask",
    "route_topk",
    "scatter_rows",
    "select",
    "select_topk",
    "sparse_linear",
    "sparse_mlp",
    "tree_route",
]

_LAZY = ("audit", "convert", "integrations", "masks", "measure", "nn", "report")  # loaded at first use, to stay light


def __getattr__(name: str) -> _ModuleType:
    if name in _LAZY:
        return importlib.import_module(f"dyncore.{name}")
    raise AttributeError(f"module 'dyncore' has no attribute {name!r}")
