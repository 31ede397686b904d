"""A layer that is computed for every row and then multiplied by a mask: what skipping the masked rows would be."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dyncore.audit.candidates import expression
from dyncore.audit.findings import Layer
from dyncore.audit.loading import Inputs
from dyncore.audit.watching import watch
from dyncore.measure.agreement import disagreement
from dyncore.measure.calls import first_tensor
from dyncore.measure.masked_layers import Masked
from dyncore.nn.inputs import takes
from dyncore.nn.skip import Skip

Run = Callable[[], Any]


def _advice(name: str, mask: Tensor, way: str) -> str:
    """The line of code; gate(x) gives the mask that is multiplied with now."""
    letters = "BSTUVW"[: mask.dim()] if mask.dim() > 1 else "B"
    place, shape = expression(name), ", ".join(letters)
    return (
        f'{place} = dyncore.nn.{way}({place}, gate, returns="update") in the place of x + mask * {place}(x), '
        f"gate(x) being the mask [{shape}]"
    )


def masked_run(
    model: nn.Module, masked: Masked, inputs: Inputs, siblings: Sequence[str] = ()
) -> tuple[Layer, tuple[Run, Run] | None]:
    """The finding, and (run now, run skipping) where its rows can be left out one by one.

    Siblings, other masked layers beside it, that are called with the same rows are experts: x + mask * f(x), which a
    Skip computes, is not what a model has then.
    """
    module, mask = model.get_submodule(masked.layer), masked.mask
    layer = Layer(masked.layer, type(module).__name__, "masked", f"computed in full, then masked {list(mask.shape)}")
    layer.density = float(mask.double().mean())
    calls, _, _ = watch(model, inputs, {masked.layer, *siblings})
    call = calls[masked.layer]
    layer.calls = call.count
    if masked.what != "rows":
        layer.why_not = f"the mask leaves out {masked.what} of its rows, and no whole rows"
        return layer, None
    x, y = call.x, call.y
    beside = [name for name in siblings if name in calls and _same(calls[name].x, x)]
    if beside:
        layer.why_not = (
            f"it and {len(beside)} beside it compute the same rows, each masked: experts of which a row takes some. "
            "dyncore.nn.MoE.from_experts, or plan = dyncore.route(expert, weight, num_groups="
            f"{len(beside) + 1}) and dyncore.grouped_mlp(x, w_in, w_out, plan=plan), compute the chosen ones alone"
        )
        return layer, None
    if x is None or y is None or x.shape != y.shape or x.shape[: mask.dim()] != mask.shape:
        layer.why_not = "it does not give back rows of the shape of its input: the rows to leave out are not known"
        return layer, None
    layer.input = f"{list(x.shape)} {str(x.dtype).removeprefix('torch.')}"
    if len(call.inputs.args) + len(call.inputs.kwargs) > 1 and mask.dim() == 1:
        layer.why_not = "it takes more than x: its other arguments would have to be cut to the rows that stay, too"
        return layer, None
    alone = _rows_alone(module, x, y, mask)
    if alone is not None:
        if takes(module, "positions") and takes(module, "live"):
            layer.how = _advice(masked.layer, mask, "TokenSkip")
            layer.why_not = (
                "measured once it is a TokenSkip: its numbers change, for tokens left out are not attended to"
            )
        else:
            layer.why_not = f"it mixes rows ({alone}): rows cannot be left out without changing the others"
        return layer, None
    layer.how = _advice(masked.layer, mask, "Skip")
    skip = Skip(module, lambda _: mask, returns="update").eval()
    factor = mask.reshape(*mask.shape, *[1] * (x.dim() - mask.dim())).to(x.dtype)

    def now() -> Tensor:
        return x + factor * module(x)

    return layer, (now, lambda: skip(x))


def _same(x: Tensor | None, y: Tensor | None) -> bool:
    return x is not None and y is not None and x.shape == y.shape and bool(torch.equal(x, y))


def _rows_alone(module: nn.Module, x: Tensor, y: Tensor, mask: Tensor) -> str | None:
    """Why the module's rows are not computed each by itself; None if they are."""
    if not bool(mask.any()):
        mask = torch.ones_like(mask)
    try:
        got = first_tensor(module(x[mask]))
    except Exception as error:
        return f"on rows alone it raises {type(error).__name__}"
    if got is None:
        return "on rows alone it returns no tensor"
    return disagreement(got, y[mask])
