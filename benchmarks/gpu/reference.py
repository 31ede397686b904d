"""What a case's values and gradients are: float64, from the definition, for some rows and every slot of one group."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks.gpu.cases import Inputs
from dyncore import activations

# Worst error over max(rms, |reference|) above which a way counts as wrong. Rivals add up in bf16, hence the room.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
ROWS = 8


def worst_error(got: Tensor, want: Tensor) -> float:
    """Largest error over max(rms, |want|); NaN where got has one."""
    scale = want.abs().clamp(min=max(float(want.square().mean().sqrt()), 1e-30))
    return float(((got.double() - want).abs() / scale).max())


class Reference:
    """The right results of a case on its first set of buffers."""

    def __init__(self, inputs: Inputs) -> None:
        self.inputs = inputs
        case = inputs.case
        self.rows = torch.linspace(0, case.rows - 1, min(ROWS, case.rows)).long().tolist()
        each = [self._row(t) for t in self.rows]
        self.out, self.dx, self.dgate = (torch.stack(parts) for parts in zip(*each, strict=True))
        if case.backward:
            expert = inputs.expert[0]
            self.group = int(expert.reshape(-1)[-1])
            self.dw_in, self.dw_out = self._weights(self.group)

    def _mlp(self, x: Tensor, w_in: Tensor, w_out: Tensor) -> Tensor:
        return activations.hidden(x @ w_in.t(), self.inputs.case.activation) @ w_out.t()

    def _wide(self, t: Tensor) -> Tensor:
        return t.detach().double().requires_grad_(self.inputs.case.backward)

    @torch.enable_grad()
    def _row(self, t: int) -> tuple[Tensor, Tensor, Tensor]:
        """(output, gradient of x, gradient of its gates) of row t."""
        inputs = self.inputs
        x, gate = self._wide(inputs.x[0][t]), self._wide(inputs.gate[0][t])
        out = torch.zeros_like(x)
        for e, weight in zip(inputs.expert[0][t].tolist(), gate, strict=True):
            if e >= 0:
                w_in, w_out = (w[0][e].detach().double() for w in (inputs.w_in, inputs.w_out))
                out = out + weight * self._mlp(x, w_in, w_out)
        if not inputs.case.backward:
            return out, x, gate
        dx, dgate = torch.autograd.grad(out, (x, gate), inputs.grad[t].double())
        return out.detach(), dx, dgate

    @torch.enable_grad()
    def _weights(self, group: int) -> tuple[Tensor, Tensor]:
        inputs = self.inputs
        row, place = (inputs.expert[0] == group).nonzero(as_tuple=True)
        w_in, w_out = self._wide(inputs.w_in[0][group]), self._wide(inputs.w_out[0][group])
        out = self._mlp(inputs.x[0][row].detach().double(), w_in, w_out)
        grad = inputs.gate[0][row, place, None].detach().double() * inputs.grad[row].double()
        dw_in, dw_out = torch.autograd.grad(out, (w_in, w_out), grad)
        return dw_in, dw_out

    def error(self, results: Sequence[Tensor]) -> float:
        """The worst error of out, or of out and the gradients of x, w_in, w_out and gate."""
        out, *grads = results
        pairs = [(out[self.rows], self.out)]
        if grads:
            dx, dw_in, dw_out, dgate = grads
            pairs += [(dx[self.rows], self.dx), (dgate[self.rows], self.dgate)]
            pairs += [(dw_in[self.group], self.dw_in), (dw_out[self.group], self.dw_out)]
        errors = [worst_error(got.detach(), want) for got, want in pairs]
        return math.nan if any(map(math.isnan, errors)) else max(errors)
