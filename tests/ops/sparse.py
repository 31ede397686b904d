"""What the tests of the sparse ops share: problems of a chosen density, and the float64 oracle with torch's autograd.

Inputs of the first product are short binary fractions, so that every pre-activation is exact in float32 too: which
neurons are on does not hang on the order of a sum, and exact zeros occur.
"""

from __future__ import annotations

import torch
from torch import Tensor

import dyncore as dc
from tests.support import act, assert_gradients, assert_values

ACTIVATIONS = ("relu", "relu2", "reglu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NAMES = ("x", "w_in", "w_out", "b_in", "b_out")


def fractions(*shape: int) -> Tensor:
    """Standard normal numbers to the nearest eighth, within 3."""
    return (torch.randn(shape) * 8).round().clamp(-24, 24) / 8


def neuron_major(weight: Tensor) -> Tensor:
    """The same [H, I] weight with the H numbers of a neuron side by side in memory."""
    return weight.detach().t().contiguous().t().requires_grad_(weight.requires_grad)


def problem(
    rows=37, width=33, inner=71, activation="relu", dtype=torch.float32, biased=True, shift=0.0, major=False
) -> dict[str, Tensor | None]:
    """Leaves that require grad; `shift` lowers the (gate's) pre-activations by so many of their standard deviations."""
    wide = 2 * inner if activation == "reglu" else inner
    step = 2.0 ** -round(torch.tensor(float(width)).log2().item() / 2)  # a power of two near 1 / sqrt(width)
    b_in = fractions(wide)
    b_in[:inner] -= round(shift * 8 * step * width**0.5) / 8
    p = {
        "x": fractions(rows, width),
        "w_in": fractions(wide, width) * step,
        "w_out": torch.randn(width, inner) * max(inner, 1) ** -0.5,
        "b_in": b_in if biased else None,
        "b_out": torch.randn(width) if biased else None,
    }
    p = {name: None if t is None else t.to(dtype).requires_grad_() for name, t in p.items()}
    if major:
        p["w_out"] = neuron_major(p["w_out"])
    return p


def wide_copy(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.detach().double().requires_grad_()


def oracle(q: dict[str, Tensor | None], activation: str) -> Tensor:
    h = q["x"] @ q["w_in"].t()
    h = act(h if q["b_in"] is None else h + q["b_in"], activation)
    y = h @ q["w_out"].t()
    return y if q["b_out"] is None else y + q["b_out"]


def run(p: dict[str, Tensor | None], activation: str = "relu", **options) -> Tensor:
    return dc.sparse_mlp(p["x"], p["w_in"], p["w_out"], p["b_in"], p["b_out"], activation=activation, **options)


def grads(out: Tensor, p: dict[str, Tensor | None], grad: Tensor) -> dict[str, Tensor]:
    """By name; zero where the graph does not reach a tensor."""
    leaves = {name: t for name, t in p.items() if t is not None and t.requires_grad}
    return dict(zip(leaves, torch.autograd.grad(out, list(leaves.values()), grad, materialize_grads=True), strict=True))


def check(p: dict[str, Tensor | None], activation: str = "relu", mode: str = "sparse", **options) -> None:
    """Values and all gradients of sparse_mlp against the oracle's, and the layout of the weights' gradients."""
    with dc.execution(mode):
        out = run(p, activation, **options)
    q = {name: wide_copy(t) for name, t in p.items()}
    want = oracle(q, activation)
    assert out.dtype == p["x"].dtype
    assert_values(out, want)
    grad = torch.randn(out.shape).to(out.dtype)
    got, expected = grads(out, p, grad), grads(want, q, grad.double())
    for name, g in got.items():
        assert g.dtype == p[name].dtype
        assert_gradients(g, expected[name], out.dtype, name)
    if mode == "sparse":
        assert got["w_out"].stride() == torch.empty_like(p["w_out"]).stride()
