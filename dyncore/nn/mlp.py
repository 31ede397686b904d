"""MLP: the plain two-layer perceptron of a transformer, with the activations and the layout of dc.grouped_mlp."""

from __future__ import annotations

from torch import Tensor, nn

from dyncore import activations
from dyncore.nn.base import expect_choice
from dyncore.nn.inputs import called

ACTIVATIONS = (*activations.ELEMENTWISE, *activations.GATED)


class MLP(nn.Module):
    """w_out act(w_in x + b_in) + b_out on [..., H].

    `w_in.weight` is [I, H], for gated activations (swiglu, geglu, reglu; Shazeer 2020) [2I, H], gate half first;
    `w_out.weight` is [H, I]. Dense: every row is computed. One expert of `MoE` is such an MLP.
    """

    def __init__(self, dim: int, hidden_dim: int, *, activation: str = "gelu", bias: bool = True) -> None:
        super().__init__()
        self.activation: str = expect_choice("activation", activation, ACTIVATIONS)
        width = 2 * hidden_dim if activation in activations.GATED else hidden_dim
        self.w_in: nn.Linear = nn.Linear(dim, width, bias=bias)
        self.w_out: nn.Linear = nn.Linear(hidden_dim, dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Rows x [..., H] to rows [..., H]."""
        return self.w_out(activations.hidden(called("w_in", self.w_in, x), self.activation))

    def extra_repr(self) -> str:
        return f"activation={self.activation}"
