"""tree_route's kernel in Triton's interpreter, on the CPU, against the reference."""

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("runs under TRITON_INTERPRET=1, in a process of its own", allow_module_level=True)

from dyncore.backends import reference
from dyncore.backends import triton as backend
from tests.ops.test_tree_route import tree


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("rows", "dim", "depth"), [(37, 19, 3), (16, 128, 1), (5, 140, 2), (3, 4, 0), (0, 8, 2)])
def test_leaves_are_those_of_the_reference(rows, dim, depth, dtype):
    x, weight, bias = tree(rows, dim, depth, dtype)
    for b in (None, bias):
        assert torch.equal(backend.tree_route(x, weight, b), reference.tree_route(x, weight, b))


def test_strides():
    x, weight, bias = tree(20, 12, 3)
    want = reference.tree_route(x, weight, bias)
    assert torch.equal(backend.tree_route(x.t().contiguous().t(), weight.t().contiguous().t(), bias), want)
    apart = torch.zeros(7, 2)
    apart[:, 0] = bias
    assert torch.equal(backend.tree_route(x, weight, apart[:, 0]), want)
