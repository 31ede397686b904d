"""What the backends' tests share: the C++ kernels in each instruction set that this machine has."""

import pytest

from dyncore.backends import cpu


@pytest.fixture(params=cpu._native.supported_isas() if cpu.available else ["none"])
def isa(request):
    before = cpu.isa()
    cpu._native.select_isa(request.param)
    yield request.param
    cpu._native.select_isa(before)
