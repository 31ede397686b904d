"""moefy: the dense MLPs of a trained model split into experts, of which each row runs those that its router expects to
matter (D2DMoE, Szatkowski 2024)."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import nn

from dyncore import activations
from dyncore.convert.clusters import balanced_clusters
from dyncore.convert.mlps import Report, find_mlps, rows_seen
from dyncore.convert.relu_sparse import Kept, Swap
from dyncore.nn.base import expect_callable, expect_size
from dyncore.nn.dynamic_k import DynamicKMoE, NormRouter, fit_router


def moefy(
    model: nn.Module,
    num_experts: int = 16,
    data: object = None,
    *,
    tau: float = 1.0,
    router_dim: int = 128,
    steps: int = 300,
    progress: Callable[[int, int, str], None] | None = None,
) -> Report:
    """Split every dense MLP of a model, plain or gated, into an `nn.DynamicKMoE`, in place.

    Neurons whose input weights point the same way make an expert (balanced k-means, as MoEfication, Zhang 2022); its
    router learns on `data` to predict the norms of the experts' outputs. With tau = 1 every expert runs, and the model
    computes what it did, up to the order of sums; `layer.tau = 0.3` on the layers, or on all of them at once

        for layer in model.modules():
            if isinstance(layer, dc.nn.DynamicKMoE):
                layer.tau = 0.3

    trades accuracy for compute. How well depends on how sparse the hidden activations are: D2DMoE first trains the
    dense model on with `losses.square_hoyer` of them; without that, expect little.

    Args:
        model: any module. Known are MLPs of two or three nn.Linear under the names in use (GPT, OPT, Llama, Mistral,
            Qwen, T5, BERT, ViT and their kin) or in a Sequential(Linear, activation, Linear), and torch.nn's
            transformer layers. Parameters keep their values, dtype and requires_grad, but not their names.
        num_experts: E; an MLP of another width than a multiple of it is kept.
        data: what the model is called with (a tensor, or a mapping of keyword arguments), or an iterable of such
            batches; a few thousand rows do. None: routers stay untrained, and tau has to stay 1 until they are.
        tau: of the new layers. router_dim, steps: width of the routers, and steps of Adam that each is trained.
        progress: called with (MLPs done, of how many, name of the latest) after each, which takes seconds.

    Returns a Report of what was split, with each router's error (0 is exact, 1 as good as none) and FLOPs, and of what
    looks like an MLP and was kept, and why. Warns where a router costs as much as its experts can save. Convert before
    wrapping the model or making an optimizer. Dropouts inside of an MLP are gone. Raises TypeError where `model` is no
    module, ValueError on sizes, on tau < 1 without data and on data that misses an MLP.
    """
    for name, value in (("num_experts", num_experts), ("router_dim", router_dim), ("steps", steps)):
        expect_size(name, value)
    if data is None and tau != 1:
        raise ValueError(f"tau: expected 1 without data, for routers that have learnt nothing, got {tau}")
    if progress is not None:
        expect_callable("progress", progress)
    found, kept = find_mlps(model)
    fits = [f for f in found if f.weights.w_out.shape[1] % num_experts == 0]
    for f in found:
        if f.weights.w_out.shape[1] % num_experts:
            width = f.weights.w_out.shape[1]
            kept.append(Kept(f.name, f.was, f"expected a width that {num_experts} experts can share, got {width}"))
    rows = None if data is None or not fits else rows_seen(model, data, [f.probe for f in fits])
    swapped: list[Swap] = []
    useless: list[str] = []
    for i, f in enumerate(fits):
        weights = f.weights
        dim, hidden_dim = weights.w_out.shape
        gated = weights.activation in activations.GATED
        neurons = weights.w_in[:hidden_dim] if gated else weights.w_in
        router = NormRouter(dim, num_experts, router_dim)
        width = hidden_dim // num_experts
        layer = DynamicKMoE(dim, width, num_experts, tau, activation=weights.activation, router=router)
        layer.fill(weights, balanced_clusters(neurons, num_experts))
        router.to(dtype=torch.promote_types(weights.w_out.dtype, torch.float32))
        layer.train(f.probe.training)
        error = None if rows is None else fit_router(layer, rows[i], steps=steps)
        learnt = "untrained" if error is None else f"error {error:.2g}"
        price = router_dim * (dim + num_experts) / (weights.w_in.numel() + weights.w_out.numel())
        if price + 1 / num_experts >= 1:
            useless.append(f"{f.name} ({price:.0%})")
        swapped.append(f.swap(layer, f"{num_experts} experts of {width}, router {learnt}, {price:.0%} of its FLOPs"))
        if progress is not None:
            progress(i + 1, len(fits), f.name)
    if useless:
        warnings.warn(
            f"moefy: a router of width {router_dim} costs as much as its experts can save, or more, in "
            f"{', '.join(useless)} of the MLP's FLOPs: take a smaller router_dim, or leave these MLPs dense",
            stacklevel=2,
        )
    return Report("moefy", tuple(swapped), tuple(kept))
