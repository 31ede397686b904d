"""Dynamic-k mixture of experts: a row runs as many experts as its router expects to matter."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dyncore import activations
from dyncore.nn.base import expect_size
from dyncore.nn.dynamic_width import BlockMLP
from dyncore.nn.full_precision import full_precision
from dyncore.nn.gates import Movable, expect_share, scalar, shown


class NormRouter(nn.Module):
    """A router that predicts the norm of every expert's output: softplus(w_out relu(w_in x)), a small MLP
    (D2DMoE, Szatkowski 2024).

    Args:
        dim: H, the width of x. num_experts: E. hidden_dim: of the MLP.

    Predictions are in units of the buffer `scale`, 1 until `fit_router` sets it to the mean norm: small outputs are
    learned as fast as large ones.
    """

    scale: Tensor

    def __init__(self, dim: int, num_experts: int, hidden_dim: int = 128) -> None:
        super().__init__()
        for name, value in (("dim", dim), ("num_experts", num_experts), ("hidden_dim", hidden_dim)):
            expect_size(name, value)
        self.w_in: nn.Linear = nn.Linear(dim, hidden_dim)
        self.w_out: nn.Linear = nn.Linear(hidden_dim, num_experts)
        self.register_buffer("scale", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        """Norms [..., E] > 0 of rows x [..., H]."""
        return self.scale * F.softplus(self.w_out(torch.relu(self.w_in(x))))


class DynamicKMoE(Movable, BlockMLP):
    """y = b_out + sum over the experts e that run of f_e(x), e running where its predicted norm r_e(x) is at least
    (1 - tau) max r(x) (D2DMoE, Szatkowski 2024).

    Args:
        dim: H. hidden_dim: the width of each expert. num_experts: E.
        tau: 0: a row runs the expert of the largest prediction alone; 1: it runs all of them, and the layer is exactly
            one dense MLP of E * hidden_dim neurons. A buffer: `layer.tau = 0.5` moves it at run time.
        activation: any of dc.grouped_mlp. bias: whether there are b_in [E * hidden_dim] and b_out [H].
        router: a module that maps rows [T, H] to predicted norms [T, E] >= 0; a `NormRouter` if None.

    Experts are slices of one MLP and their outputs are summed unweighted, so that `convert.moefy` makes this layer of a
    trained one. Skipped are the experts that do not run, forward and backward, in training as in evaluation. The router
    gets no gradient from y: it learns the norms by `losses()["router_regression"]`, which in training computes every
    expert of the latest rows without gradient, or by `regression(x)`. `last_cost` is the share of the experts that ran.
    Where a prediction is NaN, every expert runs. Weights as in `BlockMLP`.

    Raises TypeError or ValueError on sizes, on a tau outside 0..1, on an x that is not [..., H] and on what the router
    gives.
    """

    _transient = (*BlockMLP._transient, "_rows")
    _rows: Tensor | None = None
    _checks = {"tau": expect_share}  # noqa: RUF012
    tau: Tensor

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        num_experts: int,
        tau: float = 0.5,
        *,
        activation: str = "gelu",
        bias: bool = True,
        router: nn.Module | None = None,
    ) -> None:
        for name, value in (("hidden_dim", hidden_dim), ("num_experts", num_experts)):
            expect_size(name, value)
        share = expect_share("tau", tau)
        super().__init__(dim, num_experts * hidden_dim, num_experts, activation=activation, bias=bias)
        self.router: nn.Module = NormRouter(dim, num_experts) if router is None else router
        self.register_buffer("tau", scalar(share))

    def forward(self, x: Tensor) -> Tensor:
        """Rows x [..., H] to rows [..., H]."""
        self.expect_rows(x)
        rows = x.reshape(math.prod(x.shape[:-1]), self.dim)
        norms = self.predicted(rows.detach()).detach()
        mask = ~(norms < (1 - self.tau) * norms.amax(-1, keepdim=True))
        learns = self.training and torch.is_grad_enabled() and not torch.compiler.is_compiling()
        return self.run_blocks(x, mask, _rows=rows.detach() if learns else None)

    def predicted(self, rows: Tensor) -> Tensor:
        """The router's norms [T, E] of rows [T, H], in float32 or wider."""
        norms = full_precision(self.router, rows)
        if norms.shape != (rows.shape[0], self.num_blocks):
            want = [rows.shape[0], self.num_blocks]
            raise ValueError(f"router: expected norms {want}, got {list(norms.shape)}")
        return norms

    @torch.no_grad()
    def norms(self, rows: Tensor) -> Tensor:
        """The norm of every expert's output, b_out left out: [T, E] of rows [T, H], in float32 or wider."""
        hidden = activations.hidden(
            F.linear(rows, self.w_in, self.b_in).unflatten(-1, (self.num_blocks, -1)), self.activation
        )
        _, w_out, _ = self.blocks()
        wide = torch.promote_types(rows.dtype, torch.float32)
        outputs = (F.linear(h, w) for h, w in zip(hidden.unbind(1), w_out.unbind(0), strict=True))
        return torch.stack([torch.linalg.vector_norm(y, dim=-1, dtype=wide) for y in outputs], -1)

    def regression(self, rows: Tensor, norms: Tensor | None = None) -> Tensor:
        """Mean squared error of the router's norms on rows [T, H], as a share of their mean square; 0 for no rows.

        norms: what `norms(rows)` gave before, if anything.
        """
        want = self.norms(rows) if norms is None else norms
        error = (self.predicted(rows) - want).square().sum()
        return error / want.square().sum().clamp(min=torch.finfo(want.dtype).tiny)

    def losses(self) -> dict[str, Tensor]:
        """router_regression, of the latest forward in training, if there was one: unweighted."""
        return {} if self._rows is None else {"router_regression": self.regression(self._rows)}

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, tau={shown(self.tau)}"


def fit_router(
    layer: DynamicKMoE,
    rows: Tensor,
    *,
    steps: int = 300,
    batch: int = 512,
    lr: float = 1e-3,
    report: Callable[[int, float], None] | None = None,
) -> float:
    """Fit a layer's router to the norms of its experts on rows [T, H], by Adam; nothing else changes.

    Args:
        steps, batch, lr: of the optimizer; rows are drawn with replacement from a generator of its own.
        report: called with (step, loss) where given.

    Returns the regression loss over all rows afterwards (0 is exact, 1 as good as predicting 0).
    """
    generator = torch.Generator("cpu").manual_seed(0)
    rows = rows.detach().to(layer.w_in.dtype)
    norms = layer.norms(rows)
    if isinstance(layer.router, NormRouter) and norms.numel():
        layer.router.scale.fill_(norms.mean())
    frozen = [(p, p.requires_grad) for p in layer.router.parameters()]
    for p, _ in frozen:
        p.requires_grad_(True)
    optimizer = torch.optim.Adam([p for p, _ in frozen], lr=lr)
    with torch.enable_grad():
        for step in range(steps if rows.shape[0] else 0):
            chosen = torch.randint(rows.shape[0], (batch,), generator=generator, device="cpu").to(rows.device)
            loss = layer.regression(rows[chosen], norms[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if report is not None:
                report(step, float(loss.detach()))
    optimizer.zero_grad()
    for p, trained in frozen:
        p.requires_grad_(trained)
    with torch.no_grad():
        return float(layer.regression(rows, norms))
