"""What every test runs under: no table of break-evens, and uninitialised memory filled, so that a read of it shows."""

import pytest
import torch

from dyncore.backends import cpu


@pytest.fixture(autouse=True, scope="session")
def no_table(tmp_path_factory):
    """A table that the user has made with `dyncore tune` changes no test; none was read while tests were collected."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DYNCORE_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setattr("dyncore.break_even._tables", None)
        patch.setattr("dyncore.break_even._idle", False)
        yield


@pytest.fixture(autouse=True)
def poisoned_memory():
    """torch.empty holds NaN (the largest number for integers) while algorithms are deterministic."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(params=cpu.native.supported_isas() if cpu.available else ["none"])
def isa(request):
    """The C++ kernels in each instruction set that this machine has."""
    before = cpu.isa()
    cpu.native.select_isa(request.param)
    yield request.param
    cpu.native.select_isa(before)
