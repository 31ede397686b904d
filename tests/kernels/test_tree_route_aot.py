"""tree_route's kernel, compiled for GPUs that are not here: it fits, and rows are read 16 bytes at a time."""

import os
import re

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("compiles, which Triton's interpreter's process cannot", allow_module_level=True)

from dyncore.kernels import tree_route as kernels
from tests.kernels.aot import check_fits, compile_for


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("arch", [80, 90])
def test_the_kernel_fits_eight_times_and_reads_wide(arch, dtype):
    x, weight, bias = (torch.zeros(shape, dtype=dtype) for shape in ((64, 512), (15, 512), (15,)))
    (binary,) = compile_for(arch, lambda: kernels.tree_route(x, weight, bias))
    check_fits(arch, binary, resident=8)
    assert re.search(r"\bLDG\.\S*128", binary.sass), "no load is 16 bytes wide"
