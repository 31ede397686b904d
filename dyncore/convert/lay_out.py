"""lay_out: how all weights that skip are stored in a model."""

from __future__ import annotations

from torch import nn

from dyncore.nn.sparse_mlp import SparseLinear


def lay_out(model: nn.Module, *, neuron_major: bool) -> int:
    """Store the weights that skip of a whole model neuron by neuron, as they are made, or row by row, contiguous.

    For what refuses Parameters with strides (1, N): FSDP, torch.nn.utils.parameters_to_vector, safetensors by itself.
    Numbers, shapes, names and Parameters stay; with few rows, row-major weights are read in full.

    Returns how many layers were laid out. Raises TypeError where `model` is no module or `neuron_major` no bool.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a module, got {type(model).__name__}")
    if not isinstance(neuron_major, bool):
        raise TypeError(f"neuron_major: expected a bool, got {type(neuron_major).__name__}")
    layers = [module for module in model.modules() if isinstance(module, SparseLinear)]
    for layer in layers:
        layer.lay_out(neuron_major)
    return len(layers)
