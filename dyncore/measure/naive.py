"""The ops as one writes them in plain PyTorch, to be put in their place for a while: index_select, a loop over groups
of torch's own products, index_add.

The rival of a kernel is not only the dense network but also the skipping that takes ten lines. Plans are dyncore's, so
that both skip the same.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dyncore import activations, ops
from dyncore.backends import reference
from dyncore.execution import execution
from dyncore.ops.packed import PackedMLP, grouped_mlp_packed
from dyncore.plan import Plan


def _live(plan: Plan) -> Tensor:
    """The rows of the live slots; waits for an accelerator, as a mask's nonzero() does."""
    return plan.rows if plan.exact else plan.rows[: int(plan.offsets[-1])]


def _spans(plan: Plan) -> list[tuple[int, int, int]]:
    """(group, its first slot, the one past its last) of the groups that have any."""
    edges = plan.offsets.tolist()
    return [(g, edges[g], edges[g + 1]) for g in range(plan.num_groups) if edges[g] < edges[g + 1]]


def _rows(x: Tensor, plan: Plan) -> Tensor:
    return x.reshape(plan.num_rows, x.shape[-1])


def _padded(y: Tensor, plan: Plan) -> Tensor:
    return y if y.shape[0] == plan.num_slots else F.pad(y, (0, 0, 0, plan.num_slots - y.shape[0]))


def _add(out: Tensor, plan: Plan, y: Tensor, first: int, past: int) -> None:
    """out[rows of the slots] += scale * y, in place."""
    if plan.scale is not None:
        y = y * plan.scale[first:past, None]
    out.index_add_(0, plan.rows[first:past], y.to(out.dtype))


def gather_rows(x: Tensor, plan: Plan) -> Tensor:
    return _padded(_rows(x, plan).index_select(0, _live(plan)), plan)


def scatter_rows(y: Tensor, plan: Plan, base: Tensor | None = None) -> Tensor:
    out = y.new_zeros(plan.num_rows, y.shape[-1]) if base is None else _rows(base, plan).clone()
    live = _live(plan).shape[0]
    _add(out, plan, y[:live], 0, live)
    return out if base is None else out.view(base.shape)


def grouped_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    plan: Plan,
    activation: str | None = None,
    gather: bool = True,
    scatter: bool = True,
) -> Tensor:
    shape, slots = x.shape, not gather
    x = x if slots else _rows(x, plan)
    done: list[Tensor] = []
    out = x.new_zeros(plan.num_rows, weight.shape[1]) if scatter else None
    for g, first, past in _spans(plan):
        live = x[first:past] if slots else x.index_select(0, plan.rows[first:past])
        y = activations.value(F.linear(live, weight[g], None if bias is None else bias[g]), activation or "none")
        if out is None:
            done.append(y)
        else:
            _add(out, plan, y, first, past)
    if out is None:
        return _padded(torch.cat(done) if done else x.new_zeros(0, weight.shape[1]), plan)
    return out.view(*shape[:-1], -1) if gather else out


def grouped_mlp(
    x: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    b_in: Tensor | None = None,
    b_out: Tensor | None = None,
    *,
    plan: Plan,
    activation: str = "gelu",
    residual: Tensor | None = None,
) -> Tensor:
    rows = _rows(x, plan)
    out = torch.zeros_like(rows) if residual is None else _rows(residual, plan).clone()
    for g, first, past in _spans(plan):
        live = rows.index_select(0, plan.rows[first:past])
        pre = F.linear(live, w_in[g], None if b_in is None else b_in[g])
        hidden = activations.hidden(pre, activation)
        _add(out, plan, F.linear(hidden, w_out[g], None if b_out is None else b_out[g]), first, past)
    return out.view(x.shape)


def _packed(
    x: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    packed: PackedMLP,
    b_in: Tensor | None = None,
    b_out: Tensor | None = None,
    *,
    plan: Plan,
    residual: Tensor | None = None,
) -> Tensor:
    return grouped_mlp(x, w_in, w_out, b_in, b_out, plan=plan, activation=packed.activation, residual=residual)


def sparse_linear(h: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.linear(h, weight, bias)


def sparse_mlp(
    x: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    b_in: Tensor | None = None,
    b_out: Tensor | None = None,
    *,
    activation: str = "relu",
    save: str = "compressed",
) -> Tensor:
    return F.linear(activations.hidden(F.linear(x, w_in, b_in), activation), w_out, b_out)


_attention = ops.attention


def attention(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    """torch's scaled_dot_product_attention, with a mask where one is needed."""
    with execution("masked"):
        return _attention(q, k, v, **options)


def tree_route(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return reference.tree_route(x.detach().reshape(-1, x.shape[-1]), weight.detach(), bias).view(x.shape[:-1])


PLAIN: dict[Callable[..., Any], Callable[..., Any]] = {
    ops.gather_rows: gather_rows,
    ops.scatter_rows: scatter_rows,
    ops.grouped_linear: grouped_linear,
    ops.grouped_mlp: grouped_mlp,
    grouped_mlp_packed: _packed,
    ops.sparse_linear: sparse_linear,
    ops.sparse_mlp: sparse_mlp,
    ops.attention: attention,
    ops.tree_route: tree_route,
}


class PlainOps:
    """Plain PyTorch in the place of dyncore's ops: `with plain(): ...`.

    The ops are replaced wherever a module of Python holds them by name, for all threads. `used` says whether any was
    called; it is set by calls inside of `with plain.counting()`.
    """

    def __init__(self) -> None:
        known = {id(op): op for op in PLAIN}
        self._places: list[tuple[dict[str, Any], str, Callable[..., Any]]] = []
        for module in list(sys.modules.values()):
            names = getattr(module, "__dict__", None)
            if not isinstance(names, dict) or module.__name__ == __name__:
                continue
            for name, value in list(names.items()):
                if type(value) is FunctionType and id(value) in known:
                    self._places.append((names, name, known[id(value)]))
        self.used: bool = False

    @contextmanager
    def __call__(self) -> Generator[None]:
        for names, name, op in self._places:
            names[name] = PLAIN[op]
        try:
            yield
        finally:
            for names, name, op in self._places:
                names[name] = op

    @contextmanager
    def counting(self) -> Generator[None]:
        """As a call, noting whether an op is called."""

        def noting(plain: Callable[..., Any]) -> Callable[..., Any]:
            def run(*args: Any, **kwargs: Any) -> Any:
                self.used = True
                return plain(*args, **kwargs)

            return run

        try:
            for names, name, op in self._places:
                names[name] = noting(PLAIN[op])
            yield
        finally:
            for names, name, op in self._places:
                names[name] = op
