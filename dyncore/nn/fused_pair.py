"""An MLP whose parts a larger module calls one by one, fc2(act(fc1(x))): the first computes it all, the rest pass on.

For forwards that do nothing else in between; names and Parameters of both Linear layers stay what they are.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch.nn.functional as F
from torch import Tensor, nn

from dyncore import activations
from dyncore.nn.sparse_mlp import SparseLinear
from dyncore.ops import sparse_mlp


class FusedSecond(SparseLinear):
    """Holds the output layer's Parameters and passes on what the first layer computed with them."""

    def forward(self, h: Tensor) -> Tensor:
        out_features, in_features = self.weight.shape
        if h.shape[-1] != out_features:
            raise ValueError(
                f"h: expected the MLP's output [..., {out_features}], which the first layer makes here, got "
                f"{list(h.shape)}; for hidden activations [..., {in_features}] use dyncore.nn.SparseLinear"
            )
        return h


class FusedFirst(nn.Module):
    """The whole MLP, with the input layer's Parameters and those of its partner."""

    weight: nn.Parameter
    bias: nn.Parameter | None
    second: FusedSecond

    def __init__(self, first: nn.Linear, second: FusedSecond, activation: str, save: str) -> None:
        super().__init__()
        for name, parameter in first._parameters.items():
            self.register_parameter(name, parameter)
        object.__setattr__(self, "second", second)  # no child: its Parameters have their own name already
        self.activation = activation
        self.save = save
        self.training: bool = first.training

    def forward(self, x: Tensor) -> Tensor:
        second = self.second
        weights = (self.weight, second.weight, self.bias, second.bias)
        return sparse_mlp(x, *weights, activation=self.activation, save=self.save)

    def hidden(self, x: Tensor) -> Tensor:
        """The hidden activation [..., I] of x, which a forward makes where no hook sees it."""
        return activations.hidden(F.linear(x, self.weight, self.bias), self.activation)

    @property
    def in_features(self) -> int:
        return self.weight.shape[1]

    @property
    def out_features(self) -> int:
        """Of this layer's Parameters; a forward returns the second layer's."""
        return self.weight.shape[0]

    def extra_repr(self) -> str:
        inner, width = self.weight.shape
        return f"{width}, {inner}, activation={self.activation}, save={self.save}"


def fuse(owner: nn.Module, first: str, activation: str, last: str, kind: str, save: str) -> None:
    """Fuse the Linear layers `first` and `last` of owner around its module `activation`, which is of `kind`."""
    inner, output = owner.get_submodule(first), owner.get_submodule(last)
    assert isinstance(inner, nn.Linear)
    assert isinstance(output, nn.Linear)
    second = FusedSecond.from_dense(output)
    setattr(owner, first, FusedFirst(inner, second, kind, save))
    setattr(owner, activation, nn.Identity())
    setattr(owner, last, second)


def emptied(model: nn.Module) -> Iterator[tuple[str, FusedFirst]]:
    """The names in `model` of the modules that a fused MLP has left to do nothing, and what computes it."""
    for name, owner in model.named_modules():
        first = next((m for m in owner.children() if isinstance(m, FusedFirst)), None)
        for child_name, child in owner.named_children():
            if first is not None and isinstance(child, (FusedSecond, nn.Identity)):
                yield (f"{name}.{child_name}" if name else child_name), first
