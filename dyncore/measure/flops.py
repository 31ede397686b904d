"""flops: executed FLOPs of any callable, 2 per multiply-add. Matrix products alone count (no bias, activation, scale).

dyncore's ops have registered formulas that see the plan, so slots that were not computed are not counted. Torch's ops
have those of torch.utils.flop_counter and of `flops_formulas`; an op that should have one and has not is reported.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any, Literal, overload

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from dyncore.measure.calls import preserved, tensors, told
from dyncore.measure.flops_counter import Counter, Modules


class Flops(int):
    """Executed FLOPs, an int; `print(found.table())` shows of what.

    Attributes:
        by_module: FLOPs by name, those of `named_modules()` with "" for everything. A module has what ran inside it,
            its backward pass and the modules that it calls included, so names do not add up; 0 for those that did
            nothing. Of a callable that is neither a module nor a module's method there is "" alone.
        backward: FLOPs of those that ran in a backward pass (a checkpoint's second forward is part of it).
        uncounted: calls by name of ops that no formula counts though they may multiply matrices: custom ops, such as
            "mylib::kernel", quantized products, decompositions and Fourier transforms. Their FLOPs are missing.
    """

    by_module: dict[str, int]
    backward: int
    uncounted: dict[str, int]

    def __new__(
        cls,
        total: int,
        *,
        by_module: Mapping[str, int] | None = None,
        backward: int = 0,
        uncounted: Mapping[str, int] | None = None,
    ) -> Flops:
        self = super().__new__(cls, total)
        self.by_module = {"": total} if by_module is None else dict(by_module)
        self.backward = backward
        self.uncounted = dict(uncounted or {})
        return self

    def table(self, depth: int | None = None) -> str:
        """Modules that executed FLOPs, with their share of all; and what was not counted.

        Args:
            depth: show names of so many parts at most ("layers.0" has two); None: all.
        """
        shown = {
            name: count
            for name, count in self.by_module.items()
            if name and count and (depth is None or name.count(".") < depth)
        }
        width = max([6, *map(len, shown)])
        lines = [f"{'module':{width}} {'FLOPs':>19} {'share':>6}"]
        for name, count in {"total": int(self), **shown}.items():
            lines.append(f"{name:{width}} {count:>19,} {count / self if self else 0:>6.1%}")
        if self.backward:
            lines.append(f"of these {self.backward:,} in the backward pass")
        if self.uncounted:
            lines.append("uncounted: " + ", ".join(f"{name} x{calls}" for name, calls in self.uncounted.items()))
        return "\n".join(lines)


@overload
def flops(fn: Callable[..., Any], *inputs: Any, per_row: Literal[False] = False, **kwargs: Any) -> Flops: ...
@overload
def flops(fn: Callable[..., Any], *inputs: Any, per_row: Literal[True], **kwargs: Any) -> Tensor: ...


def flops(fn: Callable[..., Any], *inputs: Any, per_row: bool = False, **kwargs: Any) -> Flops | Tensor:
    """FLOPs executed by fn(*inputs, **kwargs), 2 per multiply-add, the backward pass included if `fn` runs one.

    Args:
        fn: a module or any other callable. It is called once, in the grad and execution mode of the caller.
        inputs, kwargs: what it is called with.
        per_row: count each sample instead, float64 [B]: see below.

    Element-wise ops count as 0. An op that may do more and has no formula is reported (`Flops.uncounted`);
    `torch.utils.flop_counter.register_flop_formula(torch.ops.mylib.op)` gives it one. What is no op of torch in the
    calling thread cannot be seen, and is not reported: a Triton kernel launched without an op, work handed to other
    threads, products of numpy. `sparse_linear` and `sparse_mlp` count the products of what is not zero, also of rows
    with so few zeros that "auto" execution computes them densely. What torch.compile compiled runs eagerly here (a
    graph shows a counter nothing), so that a mask's live rows count; compiled code gives a mask that nobody has counted
    (of a ThresholdGate, say) room for every row, and a Skip's or TokenSkip's own module runs on them all.

    With per_row each of the B samples is run alone, as a batch of one, and then all of them together, whose records
    (`last_cost`) layers keep. So any model's samples are counted exactly, whatever it skips, however its layers are
    nested, at the price of B + 1 calls. They add up to the count of the batch where that computes nothing for company:
    not where tokens are padded to the longest sequence, nor where "auto" execution finds another way faster for one
    sample (`with dc.execution("sparse")` counts what a sample needs). Tensors among the inputs that are as long as the
    first of them are split, others are given whole.

    Raises TypeError if `fn` cannot be called, and with per_row where no input is a tensor; ValueError with per_row
    where samples are not treated apart from each other (in training, or by a choice among the samples of a batch), so
    that outputs differ from those alone, or a module in training fails on a sample alone. Buffers keep their values.
    """
    if not callable(fn):
        raise TypeError(f"fn: expected a module or another callable, got {type(fn).__name__}")
    if per_row:
        return _per_row(fn, inputs, kwargs)
    return _count(fn, inputs, kwargs)[0]


def _owner(fn: Callable[..., Any]) -> nn.Module | None:
    """The module that is called, or whose method is."""
    owner = fn if isinstance(fn, nn.Module) else getattr(fn, "__self__", None)
    return owner if isinstance(owner, nn.Module) else None


def _count(fn: Callable[..., Any], inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Flops, Any]:
    """What fn executed, and what it returned."""
    modules = Modules(_owner(fn))
    with torch.compiler.set_stance("force_eager"), modules, Counter(modules) as counter, warnings.catch_warnings():
        # the hooks of `modules`, which do no harm there
        warnings.filterwarnings("ignore", r"Using `torch\.compile\(module\)` when there are global hooks", UserWarning)
        result = fn(*inputs, **kwargs)
    by_module = {name: counter.by_module.get(name, 0) for name in modules.names.values()} | {"": counter.total}
    found = Flops(counter.total, by_module=by_module, backward=counter.backward, uncounted=dict(counter.uncounted))
    return found, result


# Sample by sample -----------------------------------------------------------------------------------------------------

# Alone a sample's products are rounded in another order, which may tip the decision of a gate now and then: so many
# samples may have other outputs, by more than so much of their RMS.
_OTHERS = 0.05
_ERROR = 0.05


def _per_row(fn: Callable[..., Any], inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    leaves, spec = pytree.tree_flatten((inputs, kwargs))
    first = next((leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.dim()), None)
    if first is None:
        raise TypeError("inputs: expected a tensor [B, ...] or a pytree of them for per_row=True, got none")
    batch = first.shape[0]
    owner = _owner(fn)
    split = [isinstance(leaf, Tensor) and leaf.dim() > 0 and leaf.shape[0] == batch for leaf in leaves]
    counts: list[int] = []
    alone: list[Any] = []
    with preserved(owner):
        for i in range(batch):
            own = [leaf[i : i + 1] if each else leaf for leaf, each in zip(leaves, split, strict=True)]
            args, keywords = pytree.tree_unflatten(own, spec)
            try:
                found, result = _count(fn, args, keywords)
            except Exception as error:
                if owner is None or not owner.training:
                    raise
                raise ValueError(
                    "fn: expected a module in evaluation for per_row=True, got one in training that fails on a sample "
                    f"alone: {told(error)}"
                ) from error
            counts.append(int(found))
            alone.append(_outputs(result))
        together = _outputs(fn(*inputs, **kwargs))
    others = sum(_differs(one, together, i, batch) for i, one in enumerate(alone))
    if others > max(1, _OTHERS * batch) or 2 * others >= batch > 0:
        raise ValueError(
            "fn: expected one that treats samples apart from each other for per_row=True (a module in evaluation, no "
            f"choice among the samples of a batch), got other outputs alone for {others} of {batch}"
        )
    return torch.tensor(counts, dtype=torch.float64)


def _outputs(result: Any) -> list[Tensor]:
    return [t.detach() for t in tensors(result) if t.is_floating_point()]


def _differs(alone: list[Tensor], together: list[Tensor], sample: int, batch: int) -> bool:
    """Whether an output of a sample alone is another than in the batch, where they are outputs of samples [B, ...]."""
    if len(alone) != len(together):
        return True
    for one, all_of_them in zip(alone, together, strict=True):
        if not all_of_them.dim() or len(all_of_them) != batch or one.shape != (1, *all_of_them.shape[1:]):
            continue
        a, b = (torch.nan_to_num(t.double()) for t in (one[0], all_of_them[sample]))
        if (a - b).norm() > _ERROR * b.norm():
            return True
    return False
