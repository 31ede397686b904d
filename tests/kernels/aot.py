"""Kernels compiled ahead of time for GPUs that are not here, and what their machine code must show.

A launcher runs for real, on CPU tensors, down to Triton's own specialisation of the arguments. There the launch is
caught and compiled for the architecture asked for, so that what is looked at is what a GPU would run.
"""

import json
import re
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.driver import driver

from dyncore.kernels.common.configs import CONFIGS, Target

# The least shared memory of a multiprocessor and of a program, in bytes, on the architectures of each key of CONFIGS
SHARED_MEMORY = {80: (164 * 1024, 163 * 1024), 86: (100 * 1024, 99 * 1024), 90: (228 * 1024, 227 * 1024)}
SHARED_MEMORY[100] = SHARED_MEMORY[90]
# float32 on the FMA units is compiled for the oldest and for Hopper: it has the same tilings everywhere
COMBINATIONS = [(a, b) for a in CONFIGS for b in ("half", "tf32", "ieee") if b != "ieee" or a in (80, 90)]
# The tensor-core instructions; at BM = 16 Hopper and Blackwell have but Ampere's
TENSOR_CORES = {80: "HMMA", 86: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def target(arch: int, arithmetic: str = "half") -> Target:
    return Target(arch, 132, arithmetic == "tf32")


class Binary(NamedTuple):
    name: str
    constants: dict
    warps: int
    shared: int
    registers: int
    stack: int
    sass: str

    @property
    def label(self) -> str:
        return f"{self.name} {[self.constants.get(n) for n in ('BM', 'BN', 'BK')]}"

    def has(self, pattern: str) -> bool:
        return re.search(rf"\b{pattern}", self.sass) is not None


class Driver:
    """The part of a Triton driver that a launch asks before it compiles; one device number an architecture."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_for(
    arch: int, call: Callable[[], object], only: tuple[str, ...] | None = None, first: int | None = None
) -> list[Binary]:
    """The binaries of the kernels that `call` launches, in order; `only` those named, without "_kernel", and of them
    the `first` so many."""
    launches = []

    def catch(*, fn, compile, **_):
        launches.append((fn.jit_function, compile))
        return True  # which ends the launch

    with mock.patch.object(driver, "_active", Driver(arch)):
        with mock.patch.object(triton.knobs.runtime, "jit_cache_hook", catch):
            call()
        wanted = [(f, spec) for f, spec in launches if only is None or f.fn.__name__.removesuffix("_kernel") in only]
        return [_build(arch, *launch) for launch in wanted[:first]]


_built: dict = {}


def _maxnreg(spec) -> int | None:
    return json.loads(spec["specialization_data"])["options"]["maxnreg"]


def _build(arch: int, function, spec) -> Binary:
    key = (arch, function.fn.__name__, str(sorted(spec["signature"].items())), str(sorted(spec["constants"].items())))
    key += (str(spec["configs"][0]), spec["num_warps"], spec["num_stages"], _maxnreg(spec))
    if key not in _built:
        _built[key] = _compile(arch, function, spec)
    return _built[key]


def _compile(arch: int, function, spec) -> Binary:
    source = ASTSource(function, spec["signature"], spec["constants"], spec["configs"][0])
    options = {"num_warps": spec["num_warps"], "num_stages": spec["num_stages"], "maxnreg": _maxnreg(spec)}
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        sass = subprocess.check_output([TOOLS / "cuobjdump", "-sass", cubin.name], text=True)
        usage = subprocess.check_output([TOOLS / "cuobjdump", "-res-usage", cubin.name], text=True)

    def used(what: str) -> int:
        return int(re.search(rf"{what}:(\d+)", usage)[1])

    constants = {function.arg_names[path[0]]: value for path, value in spec["constants"].items()}
    return Binary(
        function.fn.__name__, constants, spec["num_warps"], compiled.metadata.shared, used("REG"),
        used("STACK") + used("LOCAL"), sass,
    )  # fmt: skip


def check_fits(arch: int, binary: Binary, resident: int = 1) -> None:
    """No spills, and `resident` programs on a multiprocessor."""
    whole, most = SHARED_MEMORY[arch]
    assert binary.shared <= most, f"{binary.label}: {binary.shared} bytes shared"
    assert (binary.shared + 1024) * resident <= whole, f"{binary.label}: {binary.shared} bytes shared x {resident}"
    registers = -(-binary.registers // 8) * 8 * 32 * binary.warps
    assert registers * resident <= 65536, f"{binary.label}: {binary.registers} registers x {resident}"
    assert binary.stack == 0, f"{binary.label}: {binary.stack} bytes of stack: registers spill"
    assert not binary.has(r"(STL|LDL)\b"), f"{binary.label}: local memory"


def check_tensor_cores(arch: int, arithmetic: str, binary: Binary) -> None:
    wanted = "HMMA" if binary.constants["BM"] < 64 else TENSOR_CORES[arch]
    tensor_cores = [name for name in set(TENSOR_CORES.values()) if binary.has(name)]
    assert tensor_cores == ([] if arithmetic == "ieee" else [wanted]), f"{binary.label}: {tensor_cores}"
    assert arithmetic != "ieee" or binary.has("FFMA")


def check_wide_copies(binary: Binary) -> None:
    """Rows and weights come 16 bytes a load; narrower loads into shared memory there are none."""
    copies = re.findall(r"\bLDGSTS\S*", binary.sass)
    assert copies, f"{binary.label}: nothing is copied asynchronously"
    assert all(".128" in c for c in copies), f"{binary.label}: {set(copies)}"


def check_wide_stores(binary: Binary) -> None:
    stores = re.findall(r"\bSTG\.\S*", binary.sass)
    assert stores
    assert all(".128" in s for s in stores), f"{binary.label}: {set(stores)}"
