"""BlockDrop (Wu 2018): a policy network looks at an image once and picks the residual blocks it goes through.

The residual network is trained first. Then the policy learns by self-critical REINFORCE, its reward being
1 - (share of the blocks)^2 for a right answer and -gamma for a wrong one, while the network learns to do with less.
Then the policy's threshold is moved.

    python -m examples.blockdrop
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dyncore.nn import BernoulliPolicy, PolicySkip, policies
from dyncore.nn.gates import pool_spatial
from dyncore.nn.losses import reinforce
from examples import resnet
from examples.common import Result, clock, curve, main, train

GAMMA = 2.0
THRESHOLDS = (-1.0, 1e-4, 1e-3, 0.01, 0.5, 0.99, 0.999, 0.9999)  # policies come to be sure


class Policy(nn.Module):
    """Logits [B, DEPTH] from the features of the stem, by a convolution on a quarter of the positions."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(resnet.WIDTH, resnet.WIDTH, 3, stride=2, padding=1)
        self.head = nn.Linear(resnet.WIDTH, resnet.DEPTH)
        nn.init.constant_(self.head.bias, 2.0)  # it begins with most blocks

    def forward(self, x: Tensor) -> Tensor:
        return self.head(pool_spatial(self.conv(x).relu()))


def loss(model: resnet.ResNet, x: Tensor, y: Tensor) -> Tensor:
    """REINFORCE with the reward of the paper, and the cross-entropy of the answer."""

    def outcome() -> tuple[Tensor, Tensor]:
        logits = model(x)
        cost = model.chain.last_cost
        reward = torch.where(logits.argmax(1) == y, 1 - cost.square(), -GAMMA)
        return logits, reward

    with torch.no_grad(), policies.greedy(model):
        _, baseline = outcome()
    logits, reward = outcome()
    return F.cross_entropy(logits, y) + reinforce(policies.log_probability(model), reward, baseline)


def move(model: resnet.ResNet, threshold: float) -> None:
    """Set from which probability on a block is taken."""
    model.chain.policy.threshold = threshold


def run(quick: bool) -> Result:
    """The curve over thresholds of one trained policy, beside the network it was trained for."""
    data, epochs = resnet.images(quick)
    dense = train(resnet.dense(), data.train, epochs=epochs, batch=resnet.BATCH)
    model = copy.deepcopy(dense)
    policy = BernoulliPolicy(Policy(), resnet.DEPTH, alpha=0.9)
    model.chain = PolicySkip([residual.body for residual in model.chain], policy)
    train(model, data.train, epochs=epochs, batch=resnet.BATCH, loss=loss, rate=2e-3)
    return Result("BlockDrop", *curve(dense, model, move, THRESHOLDS, data.test, **clock(quick)))


if __name__ == "__main__":
    main(run, __doc__)
