"""import dyncore: silent, light, torch alone (torch's own FLOP counter imports triton where it is installed)."""

import subprocess
import sys

import pytest

import dyncore

PROBE = """
import time, torch
start = time.process_time()
import dyncore
seconds = time.process_time() - start
import sys
heavy = [m for m in ( "transformers", "matplotlib", "rich", "typer", "sklearn", "scipy",
                     "dyncore.nn", "dyncore.integrations", "dyncore.measure", "dyncore.convert", "dyncore.cli",
                     "torch._dynamo", "torch._inductor")
         if m in sys.modules]
print(seconds, *heavy, file=sys.stderr)
"""


def test_import_is_silent_light_and_fast():
    for _ in range(3):  # a busy machine may make one slow
        run = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, check=True)
        assert run.stdout == ""
        seconds, *heavy = run.stderr.split()
        assert heavy == []
        if float(seconds) < 0.3:
            return
    pytest.fail(f"{seconds} s")


def test_the_integrations_import_their_tools_when_called():
    probe = "import sys, dyncore; dyncore.integrations.transformers.describe; print([m for m in sys.modules if m.startswith('transformers')])"
    run = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert run.stdout == "[]\n"


def test_an_unknown_attribute_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'dyncore' has no attribute 'nothing'"):
        _ = dyncore.nothing
