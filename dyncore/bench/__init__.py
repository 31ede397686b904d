"""dyncore.bench: the main job, `dyncore bench`: mechanisms against their rivals, on synthetic and on recorded input.

Floor 5. Points are described in token_skipping.py, moe.py and relu_sparsity.py, checked and timed in contest.py, swept
in run.py and shown by table.py and dyncore.report, which need the extra dyncore[bench].
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dyncore.bench import moe, relu_sparsity, token_skipping
from dyncore.bench.contest import Contest, Point, Variant, measure

__all__ = ["MECHANISMS", "Contest", "Point", "Variant", "measure", "points"]

MECHANISMS = {
    token_skipping.NAME: token_skipping.points,
    moe.NAME: moe.points,
    relu_sparsity.DOWN: relu_sparsity.down_points,
    relu_sparsity.MLP: relu_sparsity.mlp_points,
    relu_sparsity.GATED: relu_sparsity.gated_points,
}


def points(names: Sequence[str] = (), size: str = "quick", dtype: torch.dtype | None = None) -> list[Point]:
    """The points of the named mechanisms (default: all) at `size` "tiny", "quick" or "full", of one dtype if given."""
    chosen = [point for name in names or MECHANISMS for point in MECHANISMS[name](size)]
    return [point for point in chosen if dtype in (None, point.dtype)]
