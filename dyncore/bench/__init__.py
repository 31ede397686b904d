"""dyncore.bench: the main job, `dyncore bench`: mechanisms against their rivals, on synthetic and on recorded input.

Floor 5. Points are described in one file a mechanism (token_skipping.py, moe.py), checked and timed in contest.py,
swept in run.py and shown by table.py, plots.py and page.py. The last three need the extra dyncore[bench].
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dyncore.bench import moe, token_skipping
from dyncore.bench.contest import Contest, Point, Variant, measure

__all__ = ["MECHANISMS", "Contest", "Point", "Variant", "measure", "points"]

MECHANISMS = {module.NAME: module.points for module in (token_skipping, moe)}


def points(names: Sequence[str] = (), size: str = "quick", dtype: torch.dtype | None = None) -> list[Point]:
    """The points of the named mechanisms (default: all) at `size` "tiny", "quick" or "full", of one dtype if given."""
    chosen = [point for name in names or MECHANISMS for point in MECHANISMS[name](size)]
    return [point for point in chosen if dtype in (None, point.dtype)]
