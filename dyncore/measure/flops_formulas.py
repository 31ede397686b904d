"""FLOP formulas of torch's own ops that torch has none for, or a wrong one, and the names of those left without.

2 per multiply-add. A formula is called with the op's arguments and out_val, its result; None says that it cannot tell.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import conv_flop_count, flop_registry, sdpa_backward_flop_count, sdpa_flop_count

Formula = Callable[..., int | None]

# torch.ops.aten.<name> of PyTorch 2.11 to 2.14 that multiply matrices, or do work of that order, and have no formula:
# reported as uncounted. Others of aten move or transform elements, or are made of ops that are counted.
_HEAVY = frozenset(
    """
    _cholesky_solve_helper _compute_linear_combination _conv_depthwise2d _cslt_sparse_mm _cudnn_attention_backward
    _cudnn_attention_forward _dyn_quant_matmul_4bit _flash_attention_forward_no_dropout_inplace _fft_c2c _fft_c2r
    _fft_r2c _mixed_dtypes_linear _nnpack_spatial_convolution
    _scaled_dot_product_fused_attention_overrideable _scaled_dot_product_fused_attention_overrideable_backward
    _sparse_mm_reduce_impl_backward _sparse_semi_structured_addmm _sparse_semi_structured_linear
    _sparse_semi_structured_mm _sparse_sparse_matmul _spsolve _triton_multi_head_attention _triton_scaled_dot_attention
    _weight_int4pack_mm _weight_int4pack_mm_for_cpu _weight_int4pack_mm_with_scales_and_zeros _weight_int8pack_mm
    _wrapped_quantized_linear_prepacked cholesky cholesky_inverse conv_depthwise3d conv_tbc_backward
    convolution_backward_overrideable cudnn_convolution_add_relu cudnn_convolution_relu cudnn_convolution_transpose
    geqrf hspmm linear_backward matmul_backward miopen_convolution miopen_convolution_add_relu miopen_convolution_relu
    miopen_convolution_transpose miopen_depthwise_convolution miopen_rnn miopen_rnn_backward mkldnn_convolution
    mkldnn_linear mkldnn_linear_backward_input mkldnn_linear_backward_weights ormqr quantized_gru quantized_lstm
    slow_conv3d_forward slow_conv_dilated2d slow_conv_dilated3d slow_conv_transpose2d slow_conv_transpose3d sspaddmm
    triangular_solve
    """.split()
)
_LIGHT_LINALG = frozenset("_linalg_check_errors linalg__powsum linalg_cross linalg_diagonal linalg_vector_norm".split())
# Namespaces of ops that move or transform elements, compute nothing, or (dyncore) have a formula wherever one is due.
_LIGHT = frozenset(
    """
    _c10d_functional _c10d_functional_autograd _dtensor aten c10d debug_mode_ops debugprims dyncore export
    inductor_prims prim prims profiler quantized_decomposed rngprims
    """.split()
)


def formula_of(op: Any) -> Formula | None:
    """The formula of an op (an OpOverloadPacket, or a higher-order operator)."""
    return _FORMULAS.get(op) or flop_registry.get(op)


def is_light(name: str) -> bool:
    """Whether an op without a formula, by its name "namespace::op", counts as 0 FLOPs rather than as uncounted."""
    namespace, _, op = name.partition("::")
    if namespace == "aten":
        op = op.removesuffix("_")
        linear_algebra = op.startswith(("linalg_", "_linalg_")) and op not in _LIGHT_LINALG
        return not (linear_algebra or op in _HEAVY)
    return namespace in _LIGHT


# Products of matrices -------------------------------------------------------------------------------------------------


def _stored(t: Tensor) -> int:
    """Elements that a product reads: of a sparse tensor those that it stores."""
    if t.layout is torch.strided:
        return t.numel()
    return (t._values() if t.layout is torch.sparse_coo else t.values()).numel()


def _mm(a: Tensor, b: Tensor, *args: Any, **kwargs: Any) -> int | None:
    """a [..., M, K] and b [..., K, N]; one of them may be sparse."""
    if a.is_nested or b.is_nested:
        return None
    if a.layout is not torch.strided:
        return 2 * _stored(a) * b.shape[-1] if b.layout is torch.strided else None
    return 2 * _stored(b) * a.shape[-2]


def _addmm(self: Tensor, a: Tensor, b: Tensor, *args: Any, **kwargs: Any) -> int | None:
    return _mm(a, b)


def _foreach_mm(a: Sequence[Tensor], b: Sequence[Tensor], *args: Any, **kwargs: Any) -> int:
    return sum(2 * x.numel() * y.shape[-1] for x, y in zip(a, b, strict=True))


def _mv(a: Tensor, b: Tensor, *args: Any, **kwargs: Any) -> int:
    """A matrix and a vector, or two vectors."""
    return 2 * _stored(a)


def _addmv(self: Tensor, a: Tensor, b: Tensor, *args: Any, **kwargs: Any) -> int:
    return _mv(a, b)


def _grouped_mm(a: Tensor, b: Tensor, *args: Any, **kwargs: Any) -> int:
    """A matrix product of each group: groups are a dimension where both operands or one has three, or cut the
    dimension along which both are summed; every row of the ragged operand is taken for live."""
    groups = a.shape[0] if a.dim() == b.dim() == 3 else 1
    return 2 * groups * a.shape[-2] * a.shape[-1] * b.shape[-1]


def _sampled_addmm(self: Tensor, a: Tensor, b: Tensor, *args: Any, **kwargs: Any) -> int:
    """a @ b where the sparse `self` stores elements."""
    return 2 * _stored(self) * a.shape[-1]


def _sparse_mm_reduce(self: Tensor, other: Tensor, *args: Any, **kwargs: Any) -> int:
    return 2 * _stored(self) * other.shape[-1]


def _trilinear(
    a: Tensor,
    b: Tensor,
    c: Tensor,
    expand_a: Sequence[int],
    expand_b: Sequence[int],
    expand_c: Sequence[int],
    sumdim: Sequence[int],
    unroll_dim: int = 1,
    **kwargs: Any,
) -> int:
    """a and b first, summed over what c has not, then that with c, for each index of unroll_dim: as torch computes
    nn.Bilinear and its gradients."""
    a, b, c = (_unsqueezed(t, dims) for t, dims in ((a, expand_a), (b, expand_b), (c, expand_c)))
    both = [max(sizes) for sizes in zip(a.shape, b.shape, strict=True)]
    both[unroll_dim] = max(both[unroll_dim], c.shape[unroll_dim])
    first = [1 if dim in sumdim and dim in expand_c else size for dim, size in enumerate(both)]
    second = math.prod(max(sizes) for sizes in zip(first, c.shape, strict=True))
    return 2 * (math.prod(both) + second)


def _unsqueezed(t: Tensor, dims: Sequence[int]) -> Tensor:
    for dim in dims:
        t = t.unsqueeze(dim)
    return t


def _cdist(a: Tensor, b: Tensor, *args: Any, **kwargs: Any) -> int:
    """Distances of rows a [..., P, D] and b [..., R, D], as a matrix product has them."""
    batch = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    return 2 * math.prod(batch) * a.shape[-2] * b.shape[-2] * a.shape[-1]


def _cdist_backward(grad: Tensor, a: Tensor, b: Tensor, *args: Any, **kwargs: Any) -> int:
    return _cdist(a, b)


# Convolutions ---------------------------------------------------------------------------------------------------------


def _convolution_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias_sizes: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    transposed: bool,
    output_padding: Any,
    groups: int,
    output_mask: Sequence[bool],
    *args: Any,
    **kwargs: Any,
) -> int:
    """Each gradient multiplies what the forward pass multiplied. (torch's own formula forgets groups.)"""
    forward = conv_flop_count(list(x.shape), list(weight.shape), list(grad.shape), transposed)
    return forward * (bool(output_mask[0]) + bool(output_mask[1]))


def _conv_tbc(x: Tensor, weight: Tensor, bias: Tensor, *args: Any, out_val: Tensor, **kwargs: Any) -> int:
    """x [T, B, C], weight [width, C, N]."""
    return 2 * out_val.shape[0] * out_val.shape[1] * weight.numel()


# Attention ------------------------------------------------------------------------------------------------------------


def _sdpa(q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> int:
    return sdpa_flop_count(q.shape, k.shape, v.shape)


def _sdpa_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> int:
    return sdpa_backward_flop_count(grad.shape, q.shape, k.shape, v.shape)


def _tokens(x: Tensor) -> tuple[int, int, int]:
    """Tokens of x [B, S, D], B, and the longest S; of a nested tensor those that it holds."""
    if not x.is_nested:
        return x.shape[0] * x.shape[1], x.shape[0], x.shape[1]
    lengths = x._nested_tensor_size()[:, 0]
    return int(lengths.sum()), len(lengths), int(lengths.max()) if len(lengths) else 0


def _multi_head_attention(
    q: Tensor, k: Tensor, v: Tensor, embed_dim: int, num_heads: int, *args: Any, **kwargs: Any
) -> int:
    """Four projections of the tokens there are, and attention, in which a nested tensor's are padded to the longest."""
    (queries, batch, longest), (keys, _, longest_key) = _tokens(q), _tokens(k)
    projections = 2 * (queries + keys) * embed_dim * embed_dim
    return 2 * (projections + 2 * batch * longest * longest_key * embed_dim)


def _encoder_layer(src: Tensor, embed_dim: int, num_heads: int, *args: Any, **kwargs: Any) -> int:
    """torch.nn.TransformerEncoderLayer's fast path in evaluation."""
    hidden = args[11].shape[0]  # ffn_weight_1 [I, D]
    mlp = 2 * _tokens(src)[0] * 2 * embed_dim * hidden
    return _multi_head_attention(src, src, src, embed_dim, num_heads) + mlp


# Recurrent layers -----------------------------------------------------------------------------------------------------


def _recurrent(x: Tensor, weights: Sequence[Tensor]) -> int:
    """Every step multiplies every matrix; x [..., I] holds the steps."""
    return 2 * math.prod(x.shape[:-1]) * sum(w.numel() for w in weights if w.dim() == 2)


def _mkldnn_rnn(x: Tensor, w_in: Tensor, w_hidden: Tensor, *args: Any, **kwargs: Any) -> int:
    return _recurrent(x, (w_in, w_hidden))


def _mkldnn_rnn_backward(x: Tensor, w_in: Tensor, w_hidden: Tensor, *args: Any, **kwargs: Any) -> int:
    return 2 * _recurrent(x, (w_in, w_hidden))


def _cudnn_rnn(x: Tensor, weights: Sequence[Tensor], *args: Any, **kwargs: Any) -> int:
    return _recurrent(x, weights)


def _cudnn_rnn_backward(x: Tensor, weights: Sequence[Tensor], *args: Any, **kwargs: Any) -> int:
    return _recurrent(x, weights) * (1 + bool(args[-1][3]))  # output_mask: whether the weights want gradients


_BY_NAME: dict[str, Formula] = {
    "_addmm_activation": _addmm,
    "_cdist_backward": _cdist_backward,
    "_cdist_forward": _cdist,
    "_cudnn_rnn": _cudnn_rnn,
    "_cudnn_rnn_backward": _cudnn_rnn_backward,
    "_euclidean_dist": _cdist,
    "_foreach_mm": _foreach_mm,
    "_grouped_mm": _grouped_mm,
    "_int_mm": _mm,
    "_native_multi_head_attention": _multi_head_attention,
    "_scaled_dot_product_flash_attention_for_cpu": _sdpa,
    "_scaled_dot_product_flash_attention_for_cpu_backward": _sdpa_backward,
    "_scaled_grouped_mm": _grouped_mm,
    "_scaled_grouped_mm_v2": _grouped_mm,
    "_scaled_mm_v2": _mm,
    "_sparse_addmm": _addmm,
    "_sparse_mm_reduce_impl": _sparse_mm_reduce,
    "_transformer_encoder_layer_fwd": _encoder_layer,
    "_trilinear": _trilinear,
    "addbmm": _addmm,
    "addbmm_": _addmm,
    "addmm": _addmm,
    "addmm_": _addmm,
    "addmv": _addmv,
    "addmv_": _addmv,
    "baddbmm_": _addmm,
    "bmm": _mm,
    "conv_tbc": _conv_tbc,
    "convolution_backward": _convolution_backward,
    "dot": _mv,
    "mkldnn_rnn_layer": _mkldnn_rnn,
    "mkldnn_rnn_layer_backward": _mkldnn_rnn_backward,
    "mm": _mm,
    "mv": _mv,
    "sparse_sampled_addmm": _sampled_addmm,
    "vdot": _mv,
}
# of an op that this PyTorch has not, nothing is called
_FORMULAS: dict[Any, Formula] = {
    getattr(torch.ops.aten, name): formula for name, formula in _BY_NAME.items() if hasattr(torch.ops.aten, name)
}
