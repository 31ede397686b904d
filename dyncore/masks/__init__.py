"""dyncore.masks: which neurons of a ReLU layer fire: realistic generators, and recordings to replay.

Floor 4, torch alone. A mask is bool [T, I]: T rows (tokens), I neurons, True where the activation is not zero.
"""

from dyncore.masks.generators import PRESETS, activations, beta, uniform
from dyncore.masks.recordings import Recording, load, replay, save

__all__ = ["PRESETS", "Recording", "activations", "beta", "load", "replay", "save", "uniform"]
