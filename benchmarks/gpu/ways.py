"""The ways to compute a case: dyncore's, PyTorch's, and those of other projects where they are installed.

A way is a function of the number of a set of buffers. What a way needs to know of the routing is made by the call.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import dyncore as dc
from benchmarks.gpu.cases import Inputs
from dyncore import activations

CUBLAS_SIZE = 8192  # the product whose rate the bars are shares of
# Other projects' kernels are called where they can be imported, under their own names.
PEERS = ("scattermoe", "sonicmoe", "vllm")


class Way(NamedTuple):
    """run: number of a set -> result. same: the case's function, so that values are compared and gradients taken;
    otherwise `flops` are its own."""

    run: Callable[[int], Tensor]
    same: bool = True
    flops: int | None = None


def installed_peers() -> dict[str, bool]:
    return {name: importlib.util.find_spec(name) is not None for name in PEERS}


def ways(inputs: Inputs) -> dict[str, Way]:
    return skipping_ways(inputs) if inputs.case.groups == 1 else expert_ways(inputs)


def compiled(function: Callable[..., Tensor], device: torch.device) -> Callable[..., Tensor]:
    """torch.compile of this shape alone; on a CPU, where only the program is tried, without generating code."""
    return torch.compile(function, dynamic=False, backend="inductor" if device.type == "cuda" else "eager")


def mlp(x: Tensor, w_in: Tensor, w_out: Tensor, activation: str) -> Tensor:
    return F.linear(activations.hidden(F.linear(x, w_in), activation), w_out)


# Token skipping ---------------------------------------------------------------------------------------------------


def skipping_ways(inputs: Inputs) -> dict[str, Way]:
    case, x, mask = inputs.case, inputs.x, inputs.mask
    act = case.activation
    plan, count, scores = inputs.plan(0), inputs.slots, mask.float()[None]
    w_in, w_out = ([w[0] for w in sets] for sets in (inputs.w_in, inputs.w_out))
    masked = compiled(masked_mlp, x[0].device)

    def ours(i: int, plan: dc.Plan) -> Tensor:
        return dc.grouped_mlp(x[i], inputs.w_in[i], inputs.w_out[i], plan=plan, activation=act)

    def gathered(i: int) -> Tensor:
        rows = dc.select_topk(scores, count).rows
        y = mlp(x[i].index_select(0, rows), w_in[i], w_out[i], act)
        return torch.zeros_like(x[i]).index_copy_(0, rows.long(), y)

    def naive(i: int) -> Tensor:
        index = mask.nonzero().squeeze(1)
        y = mlp(x[i].index_select(0, index), w_in[i], w_out[i], act)
        return torch.zeros_like(x[i]).index_add_(0, index, y)

    dense_flops = 2 * case.rows * (w_in[0].numel() + w_out[0].numel())
    return {
        "dyncore": Way(lambda i: ours(i, dc.select(mask))),  # the count lives on the device
        "dyncore_host": Way(lambda i: ours(i, dc.select_topk(scores, count))),  # the host knows it
        "dyncore_planned": Way(lambda i: ours(i, plan)),
        "dense": Way(lambda i: mlp(x[i], w_in[i], w_out[i], act), same=False, flops=dense_flops),
        "naive": Way(naive),
        "gathered": Way(gathered),  # cuBLAS on the rows of a plan whose count the host knows
        "masked_compiled": Way(lambda i: masked(x[i], w_in[i], w_out[i], mask, act)),
    }


def masked_mlp(x: Tensor, w_in: Tensor, w_out: Tensor, mask: Tensor, activation: str) -> Tensor:
    return torch.where(mask[:, None], mlp(x, w_in, w_out, activation), 0)


# Experts ----------------------------------------------------------------------------------------------------------


def expert_ways(inputs: Inputs) -> dict[str, Way]:
    case, x = inputs.case, inputs.x
    device = x[0].device
    plans = [inputs.plan(i) for i in range(inputs.sets)] if not case.backward else []

    def ours(i: int, plan: dc.Plan) -> Tensor:
        return dc.grouped_mlp(x[i], inputs.w_in[i], inputs.w_out[i], plan=plan, activation=case.activation)

    def rival(function: Callable[..., Tensor]) -> Way:
        return Way(lambda i: function(x[i], inputs.w_in[i], inputs.w_out[i], inputs.expert[i], inputs.gate[i]))

    found = {"dyncore": Way(lambda i: ours(i, inputs.plan(i)))}
    if not case.backward:
        found["dyncore_planned"] = Way(lambda i: ours(i, plans[i]))
        k = int(case.per_row)
        found["dyncore_router"] = Way(lambda i: ours(i, dc.route_topk(inputs.logits[i], k, normalize=True)))
    if not case.graph:  # it waits for the device, so no CUDA graph can hold it
        found["loop"] = rival(loop_over_experts)
    if hasattr(F, "grouped_mm") and case.dtype == torch.bfloat16:
        found["grouped_mm"] = rival(with_grouped_mm)
        found["grouped_mm_compiled"] = rival(compiled(with_grouped_mm, device))
        if device.type == "cuda":
            peers = {"scattermoe": scattermoe, "sonicmoe": sonicmoe} | ({} if case.backward else {"vllm": vllm})
            found |= {name: rival(function) for name, function in peers.items() if installed_peers()[name]}
    if not case.graph:
        n = CUBLAS_SIZE if device.type == "cuda" else 64
        a, b = (torch.randn(n, n, device=device, dtype=case.dtype) for _ in range(2))
        found["cublas"] = Way(lambda i: a @ b, same=False, flops=2 * n**3)
    return found


def loop_over_experts(x: Tensor, w_in: Tensor, w_out: Tensor, expert: Tensor, gate: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    for e, (wi, wo) in enumerate(zip(w_in.unbind(0), w_out.unbind(0), strict=True)):
        row, place = (expert == e).nonzero(as_tuple=True)
        y = mlp(x.index_select(0, row), wi, wo, "swiglu")
        out.index_add_(0, row, y * gate[row, place, None].to(x.dtype))
    return out


def with_grouped_mm(x: Tensor, w_in: Tensor, w_out: Tensor, expert: Tensor, gate: Tensor) -> Tensor:
    """Rows sorted by expert, two grouped products, and the slots of each row gathered back and summed."""
    rows, k = expert.shape
    key, order = expert.reshape(-1).sort(stable=True)
    ends = torch.searchsorted(key, torch.arange(1, w_in.shape[0] + 1, device=x.device)).int()
    hidden = F.grouped_mm(x.index_select(0, order // k), w_in.transpose(1, 2), offs=ends)
    y = F.grouped_mm(activations.hidden(hidden, "swiglu"), w_out.transpose(1, 2), offs=ends)
    slot = torch.empty_like(order).scatter_(0, order, torch.arange(rows * k, device=x.device))
    return (y.index_select(0, slot).view(rows, k, -1) * gate[..., None].to(x.dtype)).sum(1)


# Other projects' kernels, by what they export ---------------------------------------------------------------------


def _peer(module: str) -> Any:
    return importlib.import_module(module)


def scattermoe(x: Tensor, w_in: Tensor, w_out: Tensor, expert: Tensor, gate: Tensor) -> Tensor:
    peer = _peer("scattermoe.parallel_experts")
    index = peer.flatten_sort_count(expert, w_in.shape[0])
    hidden = peer.parallel_linear(x, w_in.transpose(1, 2), expert.shape[1], *index, grouped_out=True)
    hidden = activations.hidden(hidden, "swiglu")
    return peer.parallel_linear(hidden, w_out.transpose(1, 2), 1, *index, grouped_in=True, gates=gate.to(x.dtype))


def sonicmoe(x: Tensor, w_in: Tensor, w_out: Tensor, expert: Tensor, gate: Tensor) -> Tensor:
    peer = _peer("sonicmoe.functional")
    kind = _peer("sonicmoe.enums").ActivationType.SWIGLU
    row = torch.arange(x.shape[0], device=x.device, dtype=torch.int32).repeat_interleave(expert.shape[1])
    return peer.moe_general_routing_inputs(
        x,
        gate.reshape(-1),
        row,
        expert.reshape(-1).int(),
        w_in.permute(1, 2, 0),
        None,
        w_out.permute(1, 2, 0),
        None,
        E=w_in.shape[0],
        stream_id=torch.cuda.current_stream().cuda_stream,
        activation_type=kind,
        is_inference_mode_enabled=not torch.is_grad_enabled(),
        concat_layout=True,
    )[0]


def vllm(x: Tensor, w_in: Tensor, w_out: Tensor, expert: Tensor, gate: Tensor) -> Tensor:
    peer = _peer("vllm.model_executor.layers.fused_moe")
    return peer.fused_experts(x, w_in, w_out, gate, expert.int())


# Plans ------------------------------------------------------------------------------------------------------------


def plan_makers(rows: int, device: torch.device) -> dict[str, Callable[[], dc.Plan]]:
    """Plan making alone, in the sizes of the cases; the same plans on every device."""
    generator = torch.Generator().manual_seed(0)

    def rand(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator)

    sequence = min(rows, 4096)
    on_cpu = rand(rows) < 0.25, rand(rows // sequence, sequence), rand(rows, 16) < 0.25, rand(rows, 64)
    mask, scores, pairs, logits = (t.to(device) for t in on_cpu)
    gate, expert = (t.to(device) for t in on_cpu[-1].topk(8, dim=1))  # devices break ties as they like
    return {
        "select": lambda: dc.select(mask),
        "select_topk": lambda: dc.select_topk(scores, sequence // 4),
        "route": lambda: dc.route(expert, gate, num_groups=64),
        "route_topk": lambda: dc.route_topk(logits, 8, normalize=True),
        "route_mask": lambda: dc.route_mask(pairs),
    }
