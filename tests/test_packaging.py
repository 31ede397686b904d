"""An sdist, a wheel from it and a wheel from the tree: complete, and importable away from the repository."""

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

PROBE = """
import torch, dyncore as dc, importlib.util, sys
from dyncore.backends import cpu
assert sys.argv[1] in dc.__file__, dc.__file__
assert cpu.available, cpu.reason
assert importlib.util.find_spec("dyncore.kernels.grouped_linear") is not None
from dyncore.bench.routing import recorded
assert recorded().layers  # data files are there
x = torch.randn(8, 4)
print(dc.gather_rows(x, dc.select(torch.arange(8) < 3)).shape[0])
"""


def run(*command, cwd=ROOT, **env):
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, env={**os.environ, **env})
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def build_wheel(source, out, **env):
    # the tools of this Python's environment, for the system's ninja would not take over what another has built
    env["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    command = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "-q", "-w", str(out), "."]
    run(*command, cwd=source, **env)
    (wheel,) = out.glob("dyncore-*.whl")
    return wheel


def import_from(wheel, folder):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
        names = archive.namelist()
    assert run(sys.executable, "-c", PROBE, str(folder), cwd=folder.parent, PYTHONPATH=str(folder)).strip() == "3"
    return {n for n in names if ".dist-info/" not in n}


@pytest.mark.slow
def test_an_sdist_and_wheels_hold_everything_and_import(tmp_path):
    run(sys.executable, "-m", "build", "--sdist", "--no-isolation", "-o", str(tmp_path), ".")
    (sdist,) = tmp_path.glob("dyncore-*.tar.gz")
    with tarfile.open(sdist) as archive:
        safely = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}  # not before Python 3.11.4
        archive.extractall(tmp_path / "source", **safely)
        assert any(name.endswith("csrc/cuda/plan_mask.cu") for name in archive.getnames())
    (source,) = (tmp_path / "source").iterdir()
    hasty = tmp_path / "hasty"  # what is asked here needs neither optimised kernels nor all of them
    hasty.write_text('#!/bin/sh\ncase "$*" in *-mavx512f*) exit 1; esac\nexec "$@" -Og\n')
    hasty.chmod(0o755)
    wheel = build_wheel(source, tmp_path / "wheel", CMAKE_CXX_COMPILER_LAUNCHER=str(hasty), DYNCORE_CUDA="0")
    from_sdist = import_from(wheel, tmp_path / "installed")
    from_tree = import_from(build_wheel(ROOT, tmp_path / "tree_wheel"), tmp_path / "tree_installed")
    assert from_sdist == from_tree
    tracked = run("git", "ls-files", "dyncore", "kernels").split() if (ROOT / ".git").exists() else []
    modules = {f"dyncore/{n}" if n.startswith("kernels/") else n for n in tracked if n.endswith((".py", "py.typed"))}
    assert modules <= from_tree
