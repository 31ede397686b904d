"""Registration of every op with PyTorch's dispatcher, which is the only backend registry.

CPU tensors go to `cpu` (C++, else the reference), CUDA tensors to `cuda` (CUDA C++), else `triton`, else `reference`,
every other device to `reference`, fake tensors to `meta`. Ops registered here know nothing of autograd; `dyncore.ops`
adds it.
"""

from __future__ import annotations

import torch

from dyncore.backends import cpu, cpu_attention, cpu_sparse, cuda, meta, reference

_PLAN = "Tensor rows, Tensor offsets, Tensor? scale, Tensor row_offsets, Tensor row_slots"
_PAIRS = (
    "Tensor? q_positions, Tensor? k_positions, Tensor? q_live, Tensor? k_live, Tensor? bias, bool causal, float scale"
)

SCHEMAS = {
    # mask [T, G], or [T]: one group. sources: the flat index into the mask of each slot, 0 for padding
    "plan_mask": "(Tensor mask, SymInt capacity) -> (Tensor, Tensor, Tensor, Tensor)",
    "plan_mask_sources": "(Tensor mask, SymInt capacity) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    "plan_route": "(Tensor expert, int num_groups, SymInt capacity) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    # the plan, then sources, scale (the weights) and expert [T, k]
    "plan_route_topk": "(Tensor logits, int k, bool normalize) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    "plan_topk": "(Tensor scores, SymInt k) -> (Tensor, Tensor, Tensor, Tensor)",
    "plan_inverse": "(Tensor rows, Tensor offsets, SymInt num_rows) -> (Tensor, Tensor)",
    "gather_rows": "(Tensor x, Tensor rows, Tensor offsets) -> Tensor",
    "scatter_rows": f"(Tensor y, Tensor? base, {_PLAN}) -> Tensor",
    "scatter_rows_backward": f"(Tensor grad, Tensor y, {_PLAN}, bool[] needs) -> (Tensor, Tensor)",
    "grouped_linear": f"(Tensor x, Tensor weight, Tensor? bias, {_PLAN}, str activation, bool gather, bool scatter, "
    "bool save) -> (Tensor, Tensor)",
    "grouped_linear_backward": f"(Tensor grad, Tensor x, Tensor weight, Tensor? bias, Tensor pre, {_PLAN}, "
    "str activation, bool gather, bool scatter, bool[] needs) -> (Tensor, Tensor, Tensor, Tensor)",
    "grouped_mlp": "(Tensor x, Tensor w_in, Tensor w_out, Tensor? b_in, Tensor? b_out, Tensor? residual, "
    f"{_PLAN}, str activation, bool save) -> (Tensor, Tensor)",
    # inference with panels of the weights, which pack_weight made for an instruction set; parts: 2 halves where gated
    "pack_weight": "(Tensor weight, int parts) -> Tensor",
    "grouped_mlp_packed": "(Tensor x, Tensor w_in, Tensor w_out, Tensor? b_in, Tensor? b_out, Tensor? residual, "
    f"{_PLAN}, str activation, Tensor in_panels, Tensor out_panels, str packed_isa) -> Tensor",
    "grouped_mlp_backward": "(Tensor grad, Tensor x, Tensor w_in, Tensor w_out, Tensor? b_in, Tensor? b_out, "
    f"Tensor pre, {_PLAN}, str activation, bool[] needs) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    # weight [2^depth - 1, D]: the nodes of a tree in heap order; int32 leaves of the rows x [T, D]
    "tree_route": "(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    # heads [B, heads, tokens, width], int32 positions, bool marks, bias [B, M] in float32: the result, and log2 of each
    # query's denominator [B, heads, N]
    "attention": f"(Tensor q, Tensor k, Tensor v, {_PAIRS}) -> (Tensor, Tensor)",
    "attention_backward": f"(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor logarithm, {_PAIRS}, "
    "bool[] needs) -> (Tensor, Tensor, Tensor)",
    # h [T, I], weight [N, I] of any strides. dense_from: the density of non-zeros from which products are dense
    "sparse_linear": "(Tensor h, Tensor weight, Tensor? bias, float dense_from) -> Tensor",
    "sparse_linear_backward": "(Tensor grad, Tensor h, Tensor weight, float dense_from, bool[] needs) "
    "-> (Tensor, Tensor, Tensor)",
    # the result and what save names: "none", "compressed" (mask, values, row_offsets) or "dense" (pre); the rest is
    # empty. values are as many as there are non-zeros where capacity is -1, else capacity
    "sparse_mlp": "(Tensor x, Tensor w_in, Tensor w_out, Tensor? b_in, Tensor? b_out, str activation, "
    "float dense_from, str save, SymInt capacity) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    "sparse_hidden": "(Tensor x, Tensor w_in, Tensor? b_in, str activation, float dense_from, SymInt capacity) "
    "-> (Tensor, Tensor, Tensor)",
    "sparse_mlp_backward": "(Tensor grad, Tensor x, Tensor w_in, Tensor w_out, Tensor mask, Tensor values, "
    "Tensor row_offsets, Tensor pre, str activation, float dense_from, bool[] needs) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
}

_library = torch.library.Library("dyncore", "DEF")

_CPU = {"sparse": cpu_sparse, "attention": cpu_attention}

for _name, _schema in SCHEMAS.items():
    _library.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(_name, getattr(reference, _name), "CompositeExplicitAutograd")
    _library.impl(_name, getattr(_CPU.get(_name.split("_")[0], cpu), _name), "CPU")
    _library.impl(_name, getattr(cuda, _name, None) or cuda.elsewhere(_name), "CUDA")
    _library.impl(_name, getattr(meta, _name), "Meta")
