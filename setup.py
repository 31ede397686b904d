"""Builds the compiled module dyncore._C with CMake and Ninja; everything declarative stands in pyproject.toml."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


class CMakeBuild(build_ext):
    """One extension, one CMake project."""

    def build_extension(self, ext: Extension) -> None:
        compiler = os.environ.get("CXX", "").split(" ")[0] or "c++"
        if not any(shutil.which(name) for name in (compiler, "g++", "clang++")):
            raise SystemExit(
                f"dyncore needs a C++17 compiler with OpenMP and found none (looked for {compiler}, g++, clang++). "
                "Install one (Debian, Ubuntu: apt-get install g++) or point CXX at it."
            )
        import pybind11

        target = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build = Path(self.build_temp).resolve()
        if self.editable_mode:  # a folder that is thrown away, so that every rebuild would begin from nothing
            build = ROOT / "build" / f"temp.{self.plat_name}-{sys.implementation.cache_tag}"
        build.mkdir(parents=True, exist_ok=True)
        (build / "CMakeCache.txt").unlink(missing_ok=True)  # of tools that went with an isolated build's environment
        cuda = os.environ.get("DYNCORE_CUDA") or "auto"
        if cuda not in ("auto", "0", "1"):
            raise SystemExit(f"DYNCORE_CUDA: expected auto, 0 or 1, got {cuda!r}")
        configure = [
            "cmake",
            "-S",
            str(ROOT),
            "-B",
            str(build),
            "-G",
            "Ninja",
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DDYNCORE_CUDA={cuda}",
        ]
        subprocess.run(configure, check=True)
        jobs = os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL") or str(os.cpu_count() or 1)
        subprocess.run(["cmake", "--build", str(build), "--parallel", jobs], check=True)


setup(
    ext_modules=[Extension("dyncore._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
