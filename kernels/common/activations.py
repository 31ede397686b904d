"""Elementwise activations of a fp32 block and their derivatives, for the epilogues of the Triton kernels.
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


@triton.jit
def activate_with_derivative(v, ACTIVATION: tl.constexpr):
    """(act(v), act'(v)) for a block v in fp32; relu'(0) = 0."""
    if ACTIVATION == "relu":
        value = tl.where(v <= 0, 0.0, v)
        slope = tl.where(v > 0, 1.0, 0.0)
    elif ACTIVATION == "relu2":
        positive = tl.where(v <= 0, 0.0, v)
        value = positive * positive
        slope = 2.0 * positive
    elif ACTIVATION == "gelu":
        share = 0.5 * (1.0 + tl.erf(v * 0.7071067811865476))
        value = v * share
        slope = share + v * 0.3989422804014327 * tl.exp(-0.5 * v * v)
    elif ACTIVATION == "gelu_tanh":
        share = tl.sigmoid(1.5957691216057308 * (v + 0.044715 * v * v * v))
        value = v * share
        slope = share + value * (1.0 - share) * 1.5957691216057308 * (1.0 + 0.134145 * v * v)
    elif ACTIVATION == "silu":
        share = tl.sigmoid(v)
        value = v * share
        slope = share + value * (1.0 - share)
    else:
        tl.static_assert(ACTIVATION == "none", "unknown activation")
        value = v
        slope = tl.full(v.shape, 1.0, tl.float32)
    return value, slope
