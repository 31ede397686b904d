"""sparse_mlp: one row, many rows and a training step, against torch's dense, indexed and CSR MLPs and our dense one."""

import pytest
import torch

from dyncore.bench.relu_sparsity import GATED, MLP, synthetic

BF16, F32 = torch.bfloat16, torch.float32

POINTS = [
    *(synthetic(mechanism, "uniform", 1, 2048, 8192, F32, 0.1) for mechanism in (MLP, GATED)),
    *(synthetic(MLP, "beta", 512, 1024, 4096, dtype, 0.1) for dtype in (F32, BF16)),
    synthetic(GATED, "beta", 512, 1024, 4096, F32, 0.1),
    *(synthetic(MLP, "beta", 1024, 1024, 4096, dtype, 0.1, backward=True) for dtype in (F32, BF16)),
    synthetic(MLP, "uniform", 1024, 1024, 4096, F32, 0.5, backward=True, rivals=("dense", "own")),
]


@pytest.mark.parametrize("point", POINTS, ids=str)
def test_sparse_mlp(contest, point):
    contest(point)
