"""D2DMoE (Szatkowski 2024): a trained network's MLPs made sparse, split into experts, and run as far as a router says.

Trained densely, then on with a loss that makes its hidden activations sparse (square Hoyer); `convert.moefy` splits
each MLP into 16 experts and fits the routers. Then tau is moved.

    python -m examples.moe_dynamic_k
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dyncore as dc
from dyncore.nn import MLP, DynamicKMoE, losses
from examples.common import Result, clock, curve, main, mover, train
from examples.mixer import Mixer, images

EXPERTS = 16
TAUS = (1.0, 0.99, 0.97, 0.95, 0.9, 0.8, 0.0)
SPARSITY = 0.03  # weight of the loss
ROUTER = 32  # width of the routers: 128, the usual, would take an eighth of these small MLPs' work

move = mover(DynamicKMoE, "tau")


def sparse_loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy, and how many hidden activations are not small."""
    hidden: list[Tensor] = []
    hooks = [
        module.w_in.register_forward_hook(lambda layer, args, pre: hidden.append(torch.relu(pre)))
        for module in model.modules()
        if isinstance(module, MLP)
    ]
    loss = F.cross_entropy(model(x), y)
    for hook in hooks:
        hook.remove()
    return loss + SPARSITY * sum(losses.square_hoyer(h) for h in hidden) / len(hidden)


def run(quick: bool) -> Result:
    """The curve over tau of one converted model, beside the dense network that it was made of."""
    data, epochs = images(quick)
    model = train(Mixer(), data.train, epochs=epochs)
    dense = copy.deepcopy(model)
    train(model, data.train, epochs=epochs, loss=sparse_loss, rate=1e-3)
    dc.convert.moefy(model, EXPERTS, data=data.train[0], router_dim=ROUTER, steps=5 if quick else 600)
    points = curve(dense, model.eval(), move, TAUS, data.test, **clock(quick))
    return Result("D2DMoE", *points, note="threshold: tau; at 1 every expert runs, and the router besides")


if __name__ == "__main__":
    main(run, __doc__)
