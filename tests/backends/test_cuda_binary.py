"""The CUDA kernels as they were compiled: for which devices, with how many registers, and how wide they load. The build
itself fails on a warning or a spilled register where nvcc is 13.0.
"""

import ctypes
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dyncore.backends import cpu

ROOT = Path(__file__).resolve().parents[2]
KERNELS = (
    "count_items",
    "place_items",
    "choose_groups",
    "select_best",
    "find_rows",
    "copy_rows",
    "combine",
    "combine_backward",
)
ARCHITECTURES = ("sm_80", "sm_90a")

needs_kernels = pytest.mark.skipif(
    not hasattr(cpu.native, "cuda"), reason="dyncore was built without CUDA kernels (DYNCORE_CUDA)"
)


def cuobjdump(*options) -> str:
    triton = pytest.importorskip("triton")
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([tool, *options, cpu.native.__file__], capture_output=True, text=True, check=True).stdout


def kernel_of(mangled: str) -> str:
    """The kernel's name and, where it has one, the word it moves: copy_rows(16)."""
    name = next((k for k in sorted(KERNELS, key=len, reverse=True) if f"{len(k)}{k}" in mangled), mangled)
    return name + "(16)" * ("5uint4" in mangled)


@pytest.fixture(scope="module")
def sass() -> dict[tuple[str, str], list[str]]:
    """(architecture, kernel) -> the instructions of each of its functions."""
    found: dict[tuple[str, str], list[str]] = {}
    arch = ""
    for part in re.split(r"^(?=arch = |\s+Function : )", cuobjdump("-sass"), flags=re.MULTILINE):
        if part.startswith("arch = "):
            arch = part.split()[2]
        elif "Function : " in part:
            found.setdefault((arch, kernel_of(part.split()[2])), []).append(part)
    return found


@needs_kernels
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("kernel", KERNELS)
def test_every_kernel_is_there_for_every_architecture(sass, kernel, arch):
    assert any(a == arch and k.split("(")[0] == kernel for a, k in sass)


@needs_kernels
def test_later_devices_have_ptx():
    assert "sm_80.ptx" in cuobjdump("--list-ptx")


@needs_kernels
def test_no_kernel_spills():
    usage = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", cuobjdump("-res-usage"))
    assert len(usage) >= 2 * len(KERNELS)
    for name, registers, stack, shared, local in usage:
        assert (int(stack), int(local)) == (0, 0), name
        assert int(registers) <= 128, name  # 16 warps a multiprocessor at least
        assert int(shared) <= 4096, name  # the dynamic part, up to 40 KB, comes beside it


@needs_kernels
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize(("kernel", "in_flight"), [("copy_rows", 4), ("combine", 4), ("combine_backward", 2)])
def test_aligned_rows_move_16_bytes_at_a_time(sass, kernel, in_flight, arch):
    for code in sass[arch, f"{kernel}(16)"]:
        loads = re.findall(r"\bLDG\S*", code)
        assert sum(".128" in name for name in loads) >= in_flight
        assert re.search(r"\bSTG\S*\.128", code)
        assert not any(".U16" in name or ".U8" in name for name in loads)  # nothing but indices and scales


@needs_kernels
def test_the_runtime_is_inside_and_hidden():
    """Another copy of it, of another version, may have been loaded by torch: neither may take the other's calls."""
    library = ctypes.CDLL(cpu.native.__file__)
    for symbol in ("cudaLaunchKernelExC", "cudaMemsetAsync", "__cudaRegisterFatBinary"):
        assert not hasattr(library, symbol), symbol


# The build's decision -------------------------------------------------------------------------------------------------


def configure(build, cuda):
    """CMake alone, on a machine without nvcc."""
    import pybind11

    defines = {"DYNCORE_CUDA": cuda, "Python_EXECUTABLE": sys.executable, "pybind11_DIR": pybind11.get_cmake_dir()}
    return subprocess.run(
        ["cmake", "-S", ROOT, "-B", build, "-G", "Ninja", *(f"-D{k}={v}" for k, v in defines.items())],
        capture_output=True, text=True, env=os.environ | {"CUDACXX": "/nowhere/nvcc"},
    )  # fmt: skip


@pytest.mark.skipif(shutil.which("cmake") is None or shutil.which("ninja") is None, reason="needs cmake and ninja")
def test_without_nvcc_auto_says_so_and_1_fails(tmp_path):
    auto = configure(tmp_path, "auto")
    assert auto.returncode == 0, auto.stderr
    assert auto.stdout.count("dyncore: no CUDA kernels: no nvcc was found") == 1
    forced = configure(tmp_path, "1")
    assert forced.returncode != 0
    assert "DYNCORE_CUDA=1, but CUDA kernels cannot be built: no nvcc was found" in " ".join(forced.stderr.split())


def test_an_unknown_choice_is_refused():
    done = subprocess.run(
        [sys.executable, "setup.py", "build_ext"], cwd=ROOT, capture_output=True, text=True,
        env=os.environ | {"DYNCORE_CUDA": "yes"},
    )  # fmt: skip
    assert done.returncode != 0
    assert "DYNCORE_CUDA: expected auto, 0 or 1, got 'yes'" in done.stderr
