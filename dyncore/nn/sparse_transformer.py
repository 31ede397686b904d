"""torch.nn's transformer layers with a feed-forward block that skips what its ReLU shuts."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dyncore.nn.dense_mlps import expect_plain, hooked
from dyncore.nn.sparse_mlp import SparseLinear, feed_forward

_RELU = (F.relu, torch.relu)


class SparseTransformerEncoderLayer(nn.TransformerEncoderLayer):
    """nn.TransformerEncoderLayer(activation="relu") on dc.sparse_mlp; made by `sparsify`.

    It takes no part in torch's fused inference path, which computes every neuron.
    """

    save: str = "compressed"

    def _ff_block(self, x: Tensor) -> Tensor:
        y = feed_forward(x, self.linear1, None, self.linear2, self.dropout, "relu", self.save)
        return self.dropout2(y)


class SparseTransformerDecoderLayer(nn.TransformerDecoderLayer):
    """nn.TransformerDecoderLayer(activation="relu") on dc.sparse_mlp; made by `sparsify`."""

    save: str = "compressed"

    def _ff_block(self, x: Tensor) -> Tensor:
        y = feed_forward(x, self.linear1, None, self.linear2, self.dropout, "relu", self.save)
        return self.dropout3(y)


SPARSE: dict[type[nn.Module], type[SparseTransformerEncoderLayer | SparseTransformerDecoderLayer]] = {
    nn.TransformerEncoderLayer: SparseTransformerEncoderLayer,
    nn.TransformerDecoderLayer: SparseTransformerDecoderLayer,
}


def sparsify(layer: nn.Module, save: str = "compressed") -> None:
    """Make an encoder or decoder layer of torch.nn a sparse one, in place: the same object, Parameters and names.

    Raises ValueError, with the reason, on another class, activation or build.
    """
    sparse = SPARSE.get(type(layer))
    if sparse is None:
        raise ValueError(f"layer: expected one of {', '.join(c.__name__ for c in SPARSE)}, got {type(layer).__name__}")
    dense = cast(nn.TransformerEncoderLayer, layer)
    if not (dense.activation in _RELU or type(dense.activation) is nn.ReLU):
        name = getattr(dense.activation, "__name__", type(dense.activation).__name__)
        raise ValueError(f"layer: expected the activation relu, got {name}")
    if "_ff_block" in dense.__dict__ or "forward" in dense.__dict__:
        raise ValueError("layer: expected its class's forward, got one that was put over it")
    for name in ("linear1", "linear2", "dropout"):
        hook = hooked(dense.get_submodule(name))
        if hook:
            raise ValueError(f"layer: expected nothing that hangs on {name}, got {hook}")
    expect_plain(dense.linear1, "linear1")
    dense.linear2 = SparseLinear.from_dense(expect_plain(dense.linear2, "linear2"))
    dense.activation_relu_or_gelu = 0  # what torch asks before it takes its fused path
    layer.__class__ = sparse
    layer.save = save  # type: ignore[attr-defined]
