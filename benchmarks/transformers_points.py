"""Experts of transformers models under each implementation that runs on a CPU: "dyncore" and those it ships.

The experts module is a class of transformers, called as its models call it; what is timed is one layer's experts.
Needs the extra dyncore[transformers].
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dyncore.bench import moe
from dyncore.bench.contest import Contest, Point, Variant

GROUPS, TOP_K, WIDTH, HIDDEN = 64, 8, 512, 256
RIVALS = ("eager", "batched_mm", "grouped_mm")  # transformers' "deepgemm" and "sonicmoe" need a GPU


def experts(kind: str, **sizes: object) -> Any:
    """An experts module without weights; `kind` as in "qwen3_moe.Qwen3MoeExperts"."""
    from dyncore.integrations import transformers

    transformers.register()
    family, name = kind.split(".")
    config = SimpleNamespace(_experts_implementation=None, **sizes)
    with torch.device("meta"):
        return getattr(importlib.import_module(f"transformers.models.{family}.modeling_{family}"), name)(config)


def _layer(module: Any, names: Sequence[str], implementation: str) -> Callable[..., Tensor]:
    def run(x: Tensor, expert: Tensor, weight: Tensor, *weights: Tensor) -> Tensor:
        module._parameters.update(zip(names, weights, strict=True))
        module.config._experts_implementation = implementation
        return module.forward(x, expert, weight)  # a FLOP counter hooks calls of modules, which autograd.grad refuses

    return run


def _swiglu(dtype: torch.dtype) -> tuple[Any, tuple[str, ...], tuple[Tensor, ...], Callable[..., Tensor]]:
    """The layout of most families: gate_up_proj [E, 2I, H], down_proj [E, H, I]."""
    sizes = {"num_experts": GROUPS, "hidden_size": WIDTH, "moe_intermediate_size": HIDDEN, "hidden_act": "silu"}
    weights = moe.make_weights(GROUPS, WIDTH, HIDDEN, dtype)
    return experts("qwen3_moe.Qwen3MoeExperts", **sizes), ("gate_up_proj", "down_proj"), weights, moe.naive


def _gpt_oss(dtype: torch.dtype) -> tuple[Any, tuple[str, ...], tuple[Tensor, ...], Callable[..., Tensor]]:
    """gpt-oss: transposed, gate and up interleaved, biases, a gate of its own."""
    sizes = {"num_local_experts": GROUPS, "hidden_size": WIDTH, "intermediate_size": HIDDEN}
    module = experts("gpt_oss.GptOssExperts", **sizes, swiglu_alpha=1.702, swiglu_limit=7.0)
    weights = [w.transpose(1, 2).contiguous() for w in moe.make_weights(GROUPS, WIDTH, HIDDEN, dtype)]
    biases = [torch.randn(GROUPS, 2 * HIDDEN), torch.randn(GROUPS, WIDTH)]
    names = ("gate_up_proj", "down_proj", "gate_up_proj_bias", "down_proj_bias")
    return module, names, (*weights, *(b.to(dtype) for b in biases)), _gpt_oss_truth


def _gpt_oss_truth(x: Tensor, expert: Tensor, weight: Tensor, *weights: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    for e, (w_in, w_out, b_in, b_out) in enumerate(zip(*(w.unbind(0) for w in weights), strict=True)):
        row, choice = (expert == e).nonzero(as_tuple=True)
        pre = torch.addmm(b_in, x[row], w_in)
        gate, up = pre[:, ::2].clamp(max=7.0), pre[:, 1::2].clamp(-7.0, 7.0)
        hidden = (up + 1) * F.silu(1.702 * gate) / 1.702
        out = out.index_add(0, row, torch.addmm(b_out, hidden, w_out) * weight[row, choice, None])
    return out


LAYERS = {"swiglu": _swiglu, "gpt-oss": _gpt_oss}


def contest(layer: str, rows: int, dtype: torch.dtype, backward: bool) -> Contest:
    module, names, weights, truth = LAYERS[layer](dtype)
    weights = tuple(t.detach() for t in weights)
    inputs = []
    for expert in moe.random_experts(rows, GROUPS, TOP_K):
        x, weight = torch.randn(rows, WIDTH), torch.randn(rows, TOP_K).softmax(-1)
        inputs.append((x.to(dtype), expert, weight.to(dtype)))
    rivals = RIVALS
    if rows > 8:  # batched_mm gathers the weights of every slot, 6 GB in float32; eager's backward takes seconds
        rivals = ("grouped_mm",) if backward else ("eager", "grouped_mm")
    variants = {name: Variant(_layer(module, names, name), truth, weights) for name in ("dyncore", *rivals)}
    return Contest(variants, inputs, backward)


def points() -> Iterator[Point]:
    """T=1 and 8 as in decoding, 512 as in a prompt or a training step."""
    for layer, dtypes in (
        ("swiglu", (torch.float32, torch.bfloat16, torch.float16)),
        ("gpt-oss", (torch.float32, torch.bfloat16)),
    ):
        for dtype in dtypes:
            for backward in (False, True):
                for rows in (1, 8, 512):
                    shape = {"T": rows, "E": GROUPS, "K": TOP_K, "H": WIDTH, "I": HIDDEN}
                    build = functools.partial(contest, layer, rows, dtype, backward)
                    yield Point("transformers", layer, shape, dtype, TOP_K / GROUPS, build, backward)
