"""import dyncore: silent, light, torch alone (torch's own FLOP counter imports triton where it is installed)."""

import subprocess
import sys

PROBE = """
import time, torch
start = time.process_time()
import dyncore
seconds = time.process_time() - start
import sys
heavy = [m for m in ( "transformers", "matplotlib", "rich", "typer", "sklearn", "scipy",
                     "dyncore.nn", "dyncore.measure", "dyncore.cli", "torch._dynamo", "torch._inductor")
         if m in sys.modules]
print(seconds, *heavy, file=sys.stderr)
"""


def test_import_is_silent_light_and_fast():
    runs = [subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, check=True) for _ in range(3)]
    for run in runs:
        assert run.stdout == ""
        _, *heavy = run.stderr.split()
        assert heavy == []
    assert min(float(run.stderr.split()[0]) for run in runs) < 0.3


def test_an_unknown_attribute_is_an_attribute_error():
    run = subprocess.run([sys.executable, "-c", "import dyncore; dyncore.nothing"], capture_output=True, text=True)
    assert "AttributeError: module 'dyncore' has no attribute 'nothing'" in run.stderr
