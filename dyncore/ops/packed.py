"""Inference with packed weights: grouped_mlp on panels of its weights, which the CPU kernels then need not make.

Floor 3. Layers offer it as `pack()`; the ops keep nothing between calls.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dyncore import activations
from dyncore.backends import cpu
from dyncore.ops.autograd import wants_grad
from dyncore.ops.checks import any_autocast
from dyncore.ops.grouped_mlp import grouped_mlp
from dyncore.ops.masked import compute_masked
from dyncore.plan import Plan

_pack = torch.ops.dyncore.pack_weight.default
_forward = torch.ops.dyncore.grouped_mlp_packed.default


def _stamp(weight: Tensor) -> tuple[object, ...]:
    """What changes with a weight as far as PyTorch tells: not a write through `.data` or NumPy."""
    version = None if weight.is_inference() else weight._version
    return version, weight.data_ptr(), weight.dtype, weight.device, weight.shape, weight.stride()


class PackedMLP:
    """Panels of the weights of a grouped_mlp, for the instruction set in use.

    Args: w_in, w_out, activation: as for dc.grouped_mlp; CPU tensors in float32, bfloat16 or float16. Of others, and
    where the package has no compiled kernels, there are no panels (nbytes is 0), and `grouped_mlp_packed` is
    grouped_mlp.
    """

    def __init__(self, w_in: Tensor, w_out: Tensor, activation: str) -> None:
        self.activation = activation
        self.isa: str = cpu.isa()
        self._weights, self._stamps = (w_in, w_out), (_stamp(w_in), _stamp(w_out))
        with torch.no_grad():
            self.in_panels: Tensor = _pack(w_in.detach(), 2 if activation in activations.GATED else 1)
            self.out_panels: Tensor = _pack(w_out.detach(), 1)

    @property
    def nbytes(self) -> int:
        return self.in_panels.nbytes + self.out_panels.nbytes

    def fits(self, w_in: Tensor, w_out: Tensor) -> bool:
        """Whether these are the weights that were packed, unchanged since as far as PyTorch tells."""
        packed_in, packed_out = self._weights
        return w_in is packed_in and w_out is packed_out and (_stamp(w_in), _stamp(w_out)) == self._stamps


def grouped_mlp_packed(
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
    """grouped_mlp with packed weights; the same arguments, results and errors.

    The panels serve where no gradient is wanted, without autocast and in sparse execution; else the weights do.
    Raises RuntimeError where panels would be used and the weights are not those that were packed, ValueError where
    they were packed for another instruction set.
    """
    activation = packed.activation
    gated = activation in activations.GATED
    if (
        packed.nbytes == 0
        or any_autocast()
        or not cpu.grouped_mlp_fits(
            x, w_in, w_out, b_in, b_out, residual, plan.rows, plan.offsets, plan.num_rows, gated
        )
        or wants_grad(x, w_in, w_out, b_in, b_out, residual, plan.scale)
        or compute_masked(plan, "grouped_mlp", w_in, w_out)
    ):
        return grouped_mlp(x, w_in, w_out, b_in, b_out, plan=plan, activation=activation, residual=residual)
    if not packed.fits(w_in, w_out):
        raise RuntimeError("weights: expected those that were packed, got changed ones: pack() again, or unpack()")
    shape = x.shape
    if len(shape) != 2:
        x = x.reshape(plan.num_rows, shape[-1])
        residual = None if residual is None else residual.reshape(plan.num_rows, shape[-1])
    tensors = (plan.rows, plan.offsets, plan.scale, plan.row_offsets, plan.row_slots)
    panels = (packed.in_panels, packed.out_panels, packed.isa)
    out = _forward(x, w_in, w_out, b_in, b_out, residual, *tensors, activation, *panels)
    return out if len(shape) == 2 else out.view(shape)
