"""Clusters of one size: k-means whose clusters hold equally many points, for experts of equal width."""

from __future__ import annotations

import torch
from torch import Tensor


def assign(costs: Tensor, size: int) -> Tensor:
    """The cluster [N] of each point by costs [N, K], N = K * size, each cluster taking `size` points.

    Deferred acceptance (Gale, Shapley 1962): points ask the clusters in the order of their costs, a cluster keeps the
    cheapest of those that ask. Stable: no point and cluster would both rather have one another.
    """
    points, clusters = costs.shape
    wishes = costs.argsort(1)
    asked = torch.zeros(points, dtype=torch.int64)
    while True:
        cluster = wishes.gather(1, asked[:, None])[:, 0]
        price = costs.gather(1, cluster[:, None])[:, 0]
        order = price.argsort(stable=True)
        order = order[cluster[order].argsort(stable=True)]  # by cluster, then by price
        begin = torch.searchsorted(cluster[order], torch.arange(clusters))
        place = torch.arange(points) - begin[cluster[order]]
        refused = order[place >= size]
        if len(refused) == 0:
            return cluster
        asked[refused] += 1


@torch.no_grad()
def balanced_clusters(points: Tensor, count: int, *, steps: int = 20) -> Tensor:
    """int64 [N]: the points, cluster after cluster, in their own order within one (balanced k-means; MoEfication,
    Zhang 2022).

    Args:
        points: [N, D]; count: of clusters, a divisor of N. steps: of k-means at most.

    The same points give the same clusters. Raises ValueError on a count that does not divide N.
    """
    if count < 1 or len(points) % count:
        raise ValueError(f"count: expected a divisor of {len(points)} points, got {count}")
    points = points.detach().to("cpu", torch.float32)
    size = len(points) // count
    chosen = [0]  # centres far from one another
    nearest = torch.cdist(points, points[:1])[:, 0]
    while len(chosen) < count:
        chosen.append(int(nearest.argmax()))
        nearest = torch.minimum(nearest, torch.cdist(points, points[chosen[-1:]])[:, 0])
    centres = points[chosen]
    cluster = assign(torch.cdist(points, centres), size)
    for _ in range(steps):
        order = cluster.argsort(stable=True)
        centres = points[order].view(count, size, -1).mean(1)
        again = assign(torch.cdist(points, centres), size)
        if torch.equal(again, cluster):
            break
        cluster = again
    return cluster.argsort(stable=True)
