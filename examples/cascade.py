"""A cascade: a small network answers what it is sure of, a middle one most of the rest, a large one what is left.

Each is trained by itself. The margin p1 - p2 decides, as in Big/Little (Park 2015); the large one alone is the dense
network. A cascade runs the small ones in vain wherever they are not sure.

    python -m examples.cascade
"""

from __future__ import annotations

from torch import nn

from dyncore.nn import Cascade, exits
from examples.common import CLASSES, Result, main, train
from examples.exiting import conv, images, result

SIZE = 24
NETWORKS = ((16, 1), (32, 2), (96, 3))  # channels, layers after the first
THRESHOLDS = (1.01, 0.99, 0.95, 0.8, 0.5, 0.2, 0.0)


def network(channels: int, layers: int) -> nn.Module:
    parts: list[nn.Module] = [conv(1, channels, 2), *(conv(channels, channels) for _ in range(layers))]
    parts += [conv(channels, 2 * channels, 2), nn.AdaptiveAvgPool2d(2), nn.Flatten()]
    return nn.Sequential(*parts, nn.Linear(8 * channels, CLASSES))


def run(quick: bool) -> Result:
    data = images(quick, SIZE)
    networks = [network(channels, layers) for channels, layers in NETWORKS]
    for model in networks:
        train(model, data.train, epochs=1 if quick else 12)
    model = Cascade(networks, exits.Margin()).eval()
    note = "Dense is the largest of the three networks alone; at a threshold above 1 all three run on every image."
    return result("Cascade", networks[-1], model, THRESHOLDS, data, quick, note=note)


if __name__ == "__main__":
    main(run, __doc__)
