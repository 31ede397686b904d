"""Layers under torch.compile's default backend, forward and backward in generated code. (The tests of each layer trace
with "aot_eager", which makes the same graphs and costs a tenth.)"""

import pytest
import torch
from torch import nn

import dyncore as dc

D = 16
LAYERS = {
    "skip": lambda: dc.nn.Skip(nn.Linear(D, D), dc.nn.StraightThroughGate(D)),
    "mixture_of_depths": lambda: dc.nn.MixtureOfDepths(nn.Linear(D, D), 0.25, weight="sigmoid"),
    "moe": lambda: dc.nn.MoE(D, 24, num_experts=4, shared_experts=1),
    "sparse_mlp": lambda: dc.nn.SparseMLP(D, 48, activation="reglu"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYERS)
def test_generated_code_gives_the_same_values_and_gradients_for_every_mask(name):
    layer = LAYERS[name]()
    parameters = list(layer.parameters())
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(2):
            x = torch.randn(3, 13, D, requires_grad=True)
            got, want = compiled(x), layer(x)
            torch.testing.assert_close(got, want)
            weights = torch.randn_like(want)
            for a, b in zip(
                torch.autograd.grad(got, [x, *parameters], weights),
                torch.autograd.grad(want, [x, *parameters], weights),
                strict=True,
            ):
                torch.testing.assert_close(a, b)
