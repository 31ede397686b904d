"""What all points of a mechanism come to, in one sentence."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from dyncore.report.documents import Comparison, by_mechanism
from dyncore.report.rivals import heading, rivals_of

_SAVED = 1.005  # from this FLOP speed-up on FLOPs were saved


def sentences(points: Sequence[Comparison]) -> list[str]:
    """One for each mechanism that has rivals: at how many points it was faster than each, and what a saved FLOP was
    worth. Points whose gates were forced take no part."""
    said: list[str] = []
    for mechanism, of in by_mechanism([c for c in points if not c.forced]).items():
        counts: list[str] = []
        for rival in rivals_of(of):
            speedups = [c.against[rival] for c in of if rival in c.against]
            wins = sum(s > 1 for s in speedups)
            counts.append(f"{heading(rival)} at {wins} of {len(speedups)} (median {statistics.median(speedups):.2f}x)")
        if not counts:
            continue
        se = [c.speedup / c.flop_speedup for c in of if c.speedup and c.flop_speedup and c.flop_speedup > _SAVED]
        worth = f"; SE {statistics.median(se):.2f} in the median, {min(se):.2f} to {max(se):.2f}" if se else ""
        noisy = sum(c.noisy for c in of)
        doubt = f"; at {noisy} of them samples spread widely, which says little" if noisy else ""
        said.append(f"{mechanism}: faster than {', '.join(counts)}{worth}{doubt}.")
    return said
