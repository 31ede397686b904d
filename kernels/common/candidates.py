"""The tilings that `dyncore tune` measures on a device: for each bucket the built-in one and a few that might beat it.
Floor 0. All were compiled for their architecture and fit it without spilling a register (tests/kernels compile some).

They vary what counts of bytes cannot settle: the tile's shape at equal bytes, the depth of a step against the number of
steps in flight, one program of eight warps or two of four on a multiprocessor.
"""

from __future__ import annotations

from .configs import FEW, SOME, Config, Key, Target, choose_config
from .product_backward import choose_roomy_config
from .weight_gradient import choose_gradient_config

# architecture -> (to FEW rows a group, to SOME, above), in 16 bits; float32 on tensor cores takes steps of half the
# depth, so of as many bytes.
_HOPPER: tuple[list[Config], ...] = (
    [
        Config(16, 64, 128, 4, 4, 3),
        Config(16, 128, 64, 4, 4, 3),
        Config(16, 128, 128, 4, 3, 2),
        Config(16, 32, 256, 4, 4, 2),
    ],
    [
        Config(64, 128, 64, 4, 4, 2),
        Config(64, 64, 64, 4, 4, 3),
        Config(64, 64, 128, 4, 3, 2),
        Config(64, 256, 64, 8, 4, 1),
        Config(32, 128, 64, 4, 4, 2),
    ],
    [
        Config(128, 128, 64, 4, 3, 2),
        Config(128, 128, 64, 8, 4, 1),
        Config(128, 256, 64, 8, 4, 1),
        Config(128, 256, 64, 8, 3, 1),
        Config(256, 128, 64, 8, 4, 1),
        Config(64, 256, 64, 4, 4, 1),
    ],
)
_PRODUCTS = {
    80: (
        [
            Config(16, 64, 128, 4, 4, 2),
            Config(16, 128, 64, 4, 4, 2),
            Config(16, 64, 64, 4, 6, 2),
            Config(16, 32, 256, 4, 3, 2),
        ],
        [
            Config(64, 128, 64, 4, 3, 2),
            Config(64, 128, 32, 4, 4, 2),
            Config(64, 64, 64, 4, 4, 2),
            Config(32, 128, 64, 4, 3, 2),
        ],
        [
            Config(128, 128, 64, 8, 4, 1),
            Config(128, 128, 32, 8, 4, 2),
            Config(128, 256, 32, 8, 4, 1),
            Config(128, 256, 64, 8, 3, 1),
            Config(128, 64, 64, 4, 3, 2),
        ],
    ),
    86: (
        [
            Config(16, 64, 64, 4, 4, 2),
            Config(16, 64, 128, 4, 4, 1),
            Config(16, 128, 32, 4, 4, 2),
            Config(16, 64, 64, 4, 3, 3),
        ],
        [
            Config(64, 128, 32, 4, 4, 2),
            Config(64, 64, 64, 4, 3, 2),
            Config(64, 128, 64, 4, 3, 1),
            Config(32, 128, 32, 4, 4, 2),
        ],
        [
            Config(64, 128, 32, 4, 4, 2),
            Config(128, 128, 32, 8, 3, 2),
            Config(128, 128, 64, 8, 3, 1),
            Config(64, 256, 32, 8, 4, 1),
        ],
    ),
    90: _HOPPER,
    100: _HOPPER,
}
_PRODUCTS_IEEE = (
    [Config(16, 64, 32, 4, 3, 4), Config(16, 32, 64, 4, 3, 4), Config(16, 128, 32, 4, 3, 2)],
    [Config(64, 64, 16, 8, 3, 2), Config(32, 64, 32, 4, 3, 3)],
    [Config(64, 64, 16, 8, 3, 2), Config(64, 128, 16, 8, 3, 1), Config(128, 128, 16, 8, 3, 1)],
)
# The product that goes back through an activation, from 64 rows a tile on
_BACKWARD = [
    Config(64, 64, 64, 4, 3, 2),
    Config(64, 128, 64, 8, 3, 1),
    Config(128, 64, 64, 8, 3, 1),
    Config(128, 128, 64, 8, 3, 1),
]
_BACKWARD_IEEE = [Config(64, 64, 16, 4, 3, 2), Config(64, 64, 16, 4, 3, 1)]
# Gradients of weights: a step is slots. With few a group, shorter steps waste less.
_GRADIENTS_HOPPER = [
    Config(128, 256, 64, 8, 4, 1),
    Config(256, 128, 64, 8, 4, 1),
    Config(128, 128, 64, 8, 4, 1),
    Config(128, 128, 64, 4, 3, 2),
    Config(64, 128, 32, 4, 4, 2),
]
_GRADIENTS = {
    80: [
        Config(128, 128, 32, 8, 4, 1),
        Config(128, 128, 64, 8, 3, 1),
        Config(64, 128, 32, 4, 4, 2),
    ],
    86: [
        Config(64, 128, 32, 4, 4, 2),
        Config(128, 128, 32, 8, 3, 1),
        Config(64, 64, 32, 4, 4, 2),
    ],
    90: _GRADIENTS_HOPPER,
    100: _GRADIENTS_HOPPER,
}
_GRADIENTS_IEEE = [Config(128, 64, 16, 8, 3, 1)]
# What spills registers in one kernel alone, or on one architecture; tf32 is what has half the depth
_SPILLS = {
    (80, "product_gated", Config(128, 256, 64, 8, 3, 1)),
    (86, "product_transposed", Config(128, 128, 32, 8, 3, 2)),
    (90, "product_backward", Config(128, 128, 32, 8, 3, 1)),
    (100, "product", Config(256, 128, 32, 8, 4, 1)),
    (100, "product", Config(64, 256, 32, 4, 4, 1)),
    (100, "product_gated", Config(128, 128, 64, 8, 4, 1)),
    (100, "product_gated", Config(256, 128, 64, 8, 4, 1)),
    (100, "product_gated", Config(256, 128, 32, 8, 4, 1)),
    (100, "product_gated", Config(64, 256, 32, 4, 4, 1)),
    (100, "product_transposed", Config(64, 256, 64, 8, 4, 1)),
    (100, "product_backward", Config(128, 128, 32, 8, 3, 1)),
    (100, "weight_gradient", Config(128, 128, 32, 4, 3, 2)),
    (100, "weight_gradient", Config(128, 256, 32, 8, 4, 1)),
    (100, "weight_gradient", Config(256, 128, 32, 8, 4, 1)),
}


def built_in(target: Target, key: Key) -> Config:
    """What a launch takes without a table."""
    target = target._replace(tuned={})
    if key.kernel == "weight_gradient":
        return choose_gradient_config(target, key, True)
    if key.kernel == "product_backward":
        return choose_roomy_config(target, key, True)
    return choose_config(target, key, True)


def candidates(target: Target, key: Key) -> list[Config]:
    """The built-in tiling of a bucket, then its rivals."""
    ieee = key.arithmetic == "ieee"
    size = 0 if key.rows <= FEW else 1 if key.rows <= SOME else 2
    if key.kernel == "weight_gradient":
        rivals = _GRADIENTS_IEEE if ieee else _GRADIENTS[target.arch]
    elif key.kernel == "product_backward" and size > 0:
        rivals = _BACKWARD_IEEE if ieee else _BACKWARD
    else:
        rivals = _PRODUCTS_IEEE[size] if ieee else _PRODUCTS[target.arch][size]
    if key.arithmetic == "tf32":
        rivals = [config._replace(BK=config.BK // 2) for config in rivals]
    fitting = [config for config in rivals if (target.arch, key.kernel, config) not in _SPILLS]
    return list(dict.fromkeys([built_in(target, key), *fitting]))
