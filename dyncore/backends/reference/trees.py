"""The reference backend's trees: which leaf each row reaches."""

from __future__ import annotations

import torch
from torch import Tensor


def tree_route(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    nodes = weight.shape[0]
    node = torch.zeros(x.shape[0], dtype=torch.int64, device=x.device)
    for _ in range((nodes + 1).bit_length() - 1):
        score = (x.to(wide) * weight[node].to(wide)).sum(1)
        if bias is not None:
            score = score + bias[node].to(wide)
        node = 2 * node + 1 + (score > 0)
    return (node - nodes).int()
