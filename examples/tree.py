"""Fast feedforward networks (Belcak 2023): every MLP as a tree of decisions, of whose leaves each token runs one.

A tree has no threshold: its depth says what it costs. So the points are networks of their own, each trained like the
dense one, whose leaves together are as wide as the dense MLP.

    python -m examples.tree
"""

from __future__ import annotations

from torch import Tensor, nn

from dyncore.nn import TreeMLP
from examples import mixer
from examples.common import Result, clock, curve, main, train
from examples.mixer import Mixer, images

DEPTHS = (0, 2, 4)


class Forest(nn.Module):
    """Networks with trees of each depth, of which one answers."""

    def __init__(self) -> None:
        super().__init__()
        self.networks = nn.ModuleList(Mixer(self.tree(depth)) for depth in DEPTHS)
        self.depth = DEPTHS[0]

    @staticmethod
    def tree(depth: int):
        """Makes MLPs of one leaf after `depth` turns; training runs that leaf alone, too."""
        return lambda: TreeMLP(mixer.WIDTH, depth, mixer.HIDDEN >> depth, activation="relu", soft=False)

    def forward(self, images: Tensor) -> Tensor:
        return self.networks[DEPTHS.index(self.depth)](images)


def move(model: nn.Module, depth: float) -> None:
    model.depth = int(depth)  # type: ignore[assignment]


def run(quick: bool) -> Result:
    """A point for each depth, beside the dense network."""
    data, epochs = images(quick)
    dense = train(Mixer(), data.train, epochs=epochs)
    forest = Forest()
    for network in forest.networks:
        train(network, data.train, epochs=epochs)
    points = curve(dense, forest.eval(), move, DEPTHS, data.test, **clock(quick))
    return Result(
        "Fast feedforward trees", *points, note="threshold: the depth of the trees; each is a network of its own"
    )


if __name__ == "__main__":
    main(run, __doc__)
