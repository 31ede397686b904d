"""grouped_linear's kernels compiled ahead of time for GPUs that are not here: resources and instructions asserted.

The launcher runs for real, on CPU tensors, down to Triton's own specialisation of the arguments. There the launch is
caught and compiled for the architecture asked for, so that what is looked at is what a GPU would run.
"""

import os
import re
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("runs without TRITON_INTERPRET, in a process of its own", allow_module_level=True)

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.driver import driver

from dyncore.kernels import grouped_linear as kernels

# The least shared memory a program may use, in bytes, on the architectures that each key of CONFIGS stands for
SHARED_MEMORY = {80: 163 * 1024, 86: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}
# The tensor-core instructions; at BM = 16 Hopper and Blackwell have but Ampere's
TENSOR_CORES = {80: "HMMA", 86: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
GROUPS = 8
ROWS_PER_GROUP = {"few": 16, "some": 64, "many": 512}


class Binary(NamedTuple):
    name: str
    config: tuple[int, ...]
    shared: int
    stack: int
    sass: str

    def has(self, pattern: str) -> bool:
        return re.search(rf"\b{pattern}", self.sass) is not None


class Target:
    """The part of a Triton driver that a launch asks before it compiles; one device number an architecture."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch

    def get_current_stream(self, device: int) -> int:
        return 0


@pytest.fixture
def compile_for(monkeypatch, tmp_path):
    """compile_for(arch, call) -> the binaries of the kernels that call launches."""

    def run(arch: int, call) -> list[Binary]:
        launches = []

        def catch(*, fn, compile, **_):
            launches.append((fn.jit_function, compile))
            return True  # which ends the launch

        monkeypatch.setattr(driver, "_active", Target(arch))
        monkeypatch.setattr(triton.knobs.runtime, "jit_cache_hook", catch)
        call()
        return [build(arch, *launch) for launch in launches]

    def build(arch: int, function, spec) -> Binary:
        source = ASTSource(function, spec["signature"], spec["constants"], spec["configs"][0])
        options = {"num_warps": spec["num_warps"], "num_stages": spec["num_stages"]}
        compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
        cubin = tmp_path / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        sass = subprocess.check_output([TOOLS / "cuobjdump", "-sass", cubin], text=True)
        usage = subprocess.check_output([TOOLS / "cuobjdump", "-res-usage", cubin], text=True)
        stack = int(re.search(r"STACK:(\d+)", usage)[1]) + int(re.search(r"LOCAL:(\d+)", usage)[1])
        named = {function.arg_names[path[0]]: value for path, value in spec["constants"].items()}
        config = tuple(named[n] for n in ("BM", "BN", "BK") if n in named)
        return Binary(function.fn.__name__, config, compiled.metadata.shared, stack, sass)

    return run


def launch(arch, arithmetic, rows_per_group, k=256, n=512, scatter=True, dtype=torch.bfloat16, transposed=False):
    """A call of the real launcher; without scatter the pre-activation is saved, which is the longest epilogue."""
    slots = GROUPS * rows_per_group
    dtype = dtype if arithmetic == "half" else torch.float32
    x = torch.empty(slots, k, dtype=dtype)
    weight = torch.empty(GROUPS, k, n, dtype=dtype).transpose(1, 2)
    weight = weight if transposed else weight.contiguous()
    index = torch.zeros(slots + 1, dtype=torch.int32)
    plan = (index[:slots], index[: GROUPS + 1], torch.empty(slots), index, index[:slots])

    def call():
        kernels.grouped_linear(
            x, weight, torch.empty(GROUPS, n, dtype=dtype), *plan, "gelu", True, scatter, not scatter,
            arch=arch, tf32=arithmetic == "tf32",
        )  # fmt: skip

    return call


def check_fits(arch: int, binary: Binary) -> None:
    assert binary.shared <= SHARED_MEMORY[arch], f"{binary.name} {binary.config}: {binary.shared} bytes shared"
    assert binary.stack == 0, f"{binary.name} {binary.config}: {binary.stack} bytes of stack: registers spill"
    assert not binary.has(r"(STL|LDL)\b"), f"{binary.name} {binary.config}: local memory"


def check_tensor_cores(arch: int, arithmetic: str, binary: Binary) -> None:
    wanted = "HMMA" if binary.config[0] < 64 else TENSOR_CORES[arch]
    tensor_cores = [name for name in set(TENSOR_CORES.values()) if binary.has(name)]
    assert tensor_cores == ([] if arithmetic == "ieee" else [wanted])
    assert arithmetic != "ieee" or binary.has("FFMA")


def check_wide_loads(binary: Binary) -> None:
    """Rows and weights come 16 bytes a load; narrower loads into shared memory there are none."""
    copies = re.findall(r"\bLDGSTS\S*", binary.sass)
    assert copies
    assert all(".128" in c for c in copies), set(copies)


@pytest.mark.parametrize("scatter", [True, False], ids=["rows", "slots-saved"])
@pytest.mark.parametrize("size", ROWS_PER_GROUP)
@pytest.mark.parametrize("arithmetic", ["half", "tf32", "ieee"])
@pytest.mark.parametrize("arch", kernels.CONFIGS)
def test_every_configuration(compile_for, arch, arithmetic, size, scatter):
    rows = ROWS_PER_GROUP[size]
    product, *rest = compile_for(arch, launch(arch, arithmetic, rows, scatter=scatter))
    config = kernels.choose_config(arch, arithmetic, GROUPS * rows, GROUPS, True)
    assert product.config == config[:3]
    check_fits(arch, product)
    check_tensor_cores(arch, arithmetic, product)
    check_wide_loads(product)
    assert [b.name for b in rest] == (["combine_kernel"] if scatter else [])
    for combine in rest:
        check_fits(arch, combine)


@pytest.mark.parametrize("size", ["few", "many"])
@pytest.mark.parametrize("arithmetic", ["half", "tf32", "ieee"])
@pytest.mark.parametrize("arch", kernels.CONFIGS)
def test_odd_sizes(compile_for, arch, arithmetic, size):
    """Rows of 63 elements start anywhere: no wide loads, but neither spills, and tensor cores all the same."""
    rows = ROWS_PER_GROUP[size]
    (product,) = compile_for(arch, launch(arch, arithmetic, rows, k=63, n=101, scatter=False))
    assert product.config == kernels.choose_config(arch, arithmetic, GROUPS * rows, GROUPS, False)[:3]
    check_fits(arch, product)
    check_tensor_cores(arch, arithmetic, product)


@pytest.mark.parametrize("arch", kernels.CONFIGS)
def test_float16(compile_for, arch):
    product, _ = compile_for(arch, launch(arch, "half", 512, dtype=torch.float16))
    check_fits(arch, product)
    check_tensor_cores(arch, "half", product)
    check_wide_loads(product)


@pytest.mark.parametrize("arch", kernels.CONFIGS)
def test_weights_stored_by_columns(compile_for, arch):
    product, _ = compile_for(arch, launch(arch, "half", 512, transposed=True))
    check_fits(arch, product)
    check_tensor_cores(arch, "half", product)
    check_wide_loads(product)


@pytest.mark.parametrize("width", [4096, 63])
def test_combine(compile_for, width):
    _, combine = compile_for(90, launch(90, "half", 512, n=width))
    assert combine.name == "combine_kernel"
    check_fits(90, combine)
    wide = combine.has(r"LDG\.E(\.\w+)*\.128") and combine.has(r"STG\.E(\.\w+)*\.(128|64)")
    assert wide == (width == 4096)


@pytest.mark.parametrize(
    ("capability", "arch"),
    [
        ((8, 0), 80),
        ((8, 6), 86),
        ((8, 7), 80),
        ((8, 9), 86),
        ((9, 0), 90),
        ((10, 0), 100),
        ((10, 3), 100),
        ((12, 0), 86),
    ],
)
def test_architecture_of_a_compute_capability(capability, arch):
    assert kernels.architecture(capability) == arch


def test_aligned_tells_what_triton_will_see():
    x, weight = torch.empty(8, 64), torch.empty(2, 32, 64)
    assert kernels.aligned(x, weight)
    assert kernels.aligned(x, torch.empty(2, 64, 32).transpose(1, 2))
    assert kernels.aligned(x[::2], weight[:, ::2])
    assert not kernels.aligned(x[:, ::2], weight[:, :, :32])
    assert not kernels.aligned(torch.empty(8, 65)[:, :64], weight)
    assert not kernels.aligned(torch.empty(8 * 64 + 1)[1:].view(8, 64), weight)
    assert not kernels.aligned(x, torch.empty(2, 64, 33).transpose(1, 2)[:, :32])
    assert not kernels.aligned(x[:, :63], weight[:, :, :63])
