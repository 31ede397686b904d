"""dyncore.masks: which neurons of a ReLU layer fire, and which rows a gate keeps: generators, recordings to replay.

Floor 4, torch alone. A mask of neurons is bool [T, I]: T rows (tokens), True where the activation is not zero. A mask
of rows is bool [B, S]: True where a row is kept.
"""

from dyncore.masks.generators import PRESETS, activations, beta, uniform
from dyncore.masks.recordings import Recording, load, replay, save
from dyncore.masks.rows import ROW_PATTERNS, row_mask

__all__ = [
    "PRESETS",
    "ROW_PATTERNS",
    "Recording",
    "activations",
    "beta",
    "load",
    "replay",
    "row_mask",
    "save",
    "uniform",
]
