"""Savings of given samples, for what is said of them."""

from dyncore.measure import Savings, Timing


def saved_with(sparse, masked, flops=(25, 100)):
    return Savings(
        {"sparse": flops[0], "masked": flops[1]}, {"sparse": Timing(sparse), "masked": Timing(masked)}, "masked"
    )
