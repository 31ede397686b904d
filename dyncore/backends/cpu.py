"""The cpu backend (bootstrap: everything by the reference until the C++ kernels are bound)."""

from dyncore.backends.reference import *  # noqa: F403


def count_mask(mask):
    return int(mask.sum())


def count_route(expert, num_groups):
    return int((expert >= 0).sum())
