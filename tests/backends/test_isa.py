"""How the compiled module is loaded: instruction set, OpenMP runtime, and life without it."""

import os
import subprocess
import sys

import pytest

from dyncore.backends import cpu

needs_module = pytest.mark.skipif(not cpu.available, reason=cpu.reason)


def python(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environment}, check=False
    )


@needs_module
def test_the_environment_chooses_the_instruction_set_and_the_best_is_the_default(monkeypatch):
    names, before = cpu.native.supported_isas(), cpu.isa()
    try:
        for value, name in [*((name, name) for name in names), ("", names[-1])]:
            monkeypatch.setenv("DYNCORE_CPU_ISA", value)
            cpu._load()
            assert cpu.isa() == name
    finally:
        cpu.native.select_isa(before)


@needs_module
def test_an_import_heeds_the_environment():
    done = python("from dyncore.backends import cpu; print(cpu.isa())", DYNCORE_CPU_ISA="baseline")
    assert done.stdout.strip() == "baseline", done.stderr


@needs_module
def test_an_unknown_instruction_set_is_refused():
    done = python("import dyncore", DYNCORE_CPU_ISA="avx1024")
    assert done.returncode != 0
    assert "DYNCORE_CPU_ISA: expected one of baseline" in done.stderr
    assert "got 'avx1024'" in done.stderr


@needs_module
@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="needs /proc/self/maps")
def test_one_openmp_runtime_is_loaded():
    code = (
        "import torch, dyncore\n"
        "plan = dyncore.route(torch.randint(0, 4, (512, 2)), num_groups=4)\n"
        "w = torch.randn(4, 256, 256)\n"
        "with dyncore.execution('sparse'):\n"
        "    dyncore.grouped_linear(torch.randn(512, 256), w, plan=plan)\n"
        "files = {line.split()[-1] for line in open('/proc/self/maps') if '.so' in line}\n"
        "names = {f.rpartition('/')[2].split('.')[0].split('-')[0] for f in files}\n"
        "print(sorted(n for n in names if n in ('libgomp', 'libomp', 'libiomp5')))\n"
        "print(len([f for f in files if f.rpartition('/')[2].startswith(('libgomp', 'libomp', 'libiomp5'))]))\n"
    )
    done = python(code, OMP_NUM_THREADS="2")
    assert done.stdout.split()[-1] == "1", done.stdout + done.stderr


@needs_module
def test_a_module_that_was_built_from_other_sources_is_refused(monkeypatch):
    assert cpu.native.interface == cpu.INTERFACE
    monkeypatch.setattr(cpu, "INTERFACE", cpu.INTERFACE + 1)
    native, reason = cpu._load()
    assert native is None
    assert reason.startswith("dyncore._C was built from other sources (interface ")
    assert reason.endswith("rebuild it with pip install -e .")


def test_without_the_compiled_module_the_reference_serves():
    code = (
        "import sys, torch\n"
        "sys.modules['dyncore._C'] = None\n"
        "import dyncore\n"
        "from dyncore.backends import cpu\n"
        "assert not cpu.available and 'dyncore._C' in cpu.reason, cpu.reason\n"
        "plan = dyncore.select(torch.tensor([True, False, True]))\n"
        "x = torch.randn(3, 4)\n"
        "with dyncore.execution('sparse'):\n"
        "    out = dyncore.grouped_linear(x, torch.eye(4)[None], plan=plan)\n"
        "assert torch.equal(out, x * torch.tensor([[1.0], [0.0], [1.0]]))\n"
        "print(cpu.isa())\n"
    )
    done = python(code)
    assert done.stdout.strip() == "none", done.stderr
