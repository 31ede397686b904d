"""sparse_linear: the down product after a ReLU, against torch's dense, indexed and CSR ones and our own dense one."""

import pytest
import torch

from dyncore.bench.relu_sparsity import DOWN, synthetic

BF16, F32 = torch.bfloat16, torch.float32
WITH_GRADIENTS = ("dense", "csr", "own")  # indexing loses the gradient of the neurons that are off

POINTS = [
    *(synthetic(DOWN, "uniform", 1, 2048, 8192, dtype, 0.1) for dtype in (F32, BF16)),
    synthetic(DOWN, "beta", 64, 2048, 8192, F32, 0.05),
    *(synthetic(DOWN, "beta", 512, 2048, 8192, dtype, 0.1) for dtype in (F32, BF16)),
    synthetic(DOWN, "uniform", 512, 2048, 8192, F32, 0.5, rivals=("dense", "naive", "own")),
    synthetic(DOWN, "beta", 512, 1024, 4096, F32, 0.1, backward=True, rivals=WITH_GRADIENTS),
]


@pytest.mark.parametrize("point", POINTS, ids=str)
def test_sparse_linear(contest, point):
    contest(point)
