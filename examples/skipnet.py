"""SkipNet (Wang 2018): a gate before each residual block lets an image through it or past it.

Trained once: first with gates that are hard forward and soft backward, then the gates alone by REINFORCE, which rewards
right answers and blocks left out. Then the gates' threshold is moved.

    python -m examples.skipnet
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dyncore.nn import BernoulliPolicy, Skip, StraightThroughGate, collect_costs, policies
from dyncore.nn.gates import pool_spatial
from dyncore.nn.losses import compute_target, reinforce
from examples import resnet
from examples.common import Result, clock, curve, main, mover, train

TARGET = 0.5  # of the blocks, for the gates that are trained softly
PRICE = 0.5  # of all blocks, in units of the cross-entropy, for REINFORCE
THRESHOLDS = (-1.0, 0.02, 0.1, 0.3, 0.5, 0.7, 0.9)

move = mover(BernoulliPolicy, "threshold")  # from which probability on an image goes through a block


def soft(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy, and the distance of the mean cost from its target."""
    return F.cross_entropy(model(x), y) + compute_target(collect_costs(model).values(), TARGET)


def sampled(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """REINFORCE on what blocks cost and what leaving them out does to the cross-entropy, which is minimised too."""

    def outcome() -> tuple[Tensor, Tensor]:
        loss = F.cross_entropy(model(x), y, reduction="none")
        cost = torch.stack([c.detach() for c in collect_costs(model).values()]).mean(0)
        return loss, -loss.detach() - PRICE * cost

    with torch.no_grad(), policies.greedy(model):
        _, baseline = outcome()
    loss, reward = outcome()
    return loss.mean() + reinforce(policies.log_probability(model), reward, baseline)


def run(quick: bool) -> Result:
    """The curve over thresholds of one trained model, beside the dense network trained alike."""
    data, epochs = resnet.images(quick)
    dense = train(resnet.dense(), data.train, epochs=epochs, batch=resnet.BATCH)
    gates = [StraightThroughGate(resnet.WIDTH, pool=pool_spatial) for _ in range(resnet.DEPTH)]
    skips = [Skip(resnet.block(), gate, returns="update") for gate in gates]
    model = train(resnet.ResNet(nn.Sequential(*skips)), data.train, epochs=epochs, batch=resnet.BATCH, loss=soft)
    for skip, gate in zip(skips, gates, strict=True):
        skip.gate = BernoulliPolicy(gate.score, pool=pool_spatial)
    train(model, data.train, epochs=-(-epochs // 2), batch=resnet.BATCH, loss=sampled, rate=1e-3)
    return Result("SkipNet", *curve(dense, model, move, THRESHOLDS, data.test, **clock(quick)))


if __name__ == "__main__":
    main(run, __doc__)
