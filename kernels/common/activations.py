"""Elementwise activations of a fp32 block, for the epilogues of the Triton kernels.
Floor 0, shared by the kernels; a gated activation is one of these times the up half."""

import triton
import triton.language as tl

ELEMENTWISE = ("none", "relu", "relu2", "gelu", "gelu_tanh", "silu")


@triton.jit
def activate(v, ACTIVATION: tl.constexpr):
    """act(v) for a block v in fp32. NaN stays NaN, as in torch (so no maximum with 0, which drops it)."""
    if ACTIVATION == "relu":
        v = tl.where(v <= 0, 0.0, v)
    elif ACTIVATION == "relu2":
        v = tl.where(v <= 0, 0.0, v)
        v = v * v
    elif ACTIVATION == "gelu":
        v = 0.5 * v * (1.0 + tl.erf(v * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        # (1 + tanh z) / 2 = sigmoid(2 z): one exponential, and no cancellation below 0
        v = v * tl.sigmoid(1.5957691216057308 * (v + 0.044715 * v * v * v))
    elif ACTIVATION == "silu":
        v = v * tl.sigmoid(v)
    else:
        tl.static_assert(ACTIVATION == "none", "unknown activation")
    return v
