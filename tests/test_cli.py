"""The command line, run as a user runs it."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

import dyncore
from dyncore import break_even
from dyncore.cli import main
from dyncore.measure import read_results

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


def run(*args, command=(sys.executable, "-m", "dyncore"), **kwargs):
    return subprocess.run([*command, *args], capture_output=True, text=True, timeout=300, env=ENVIRONMENT, **kwargs)


def heed_ctrl_c():
    """A shell's background job starts with SIGINT ignored, which Python and its children then keep."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def without(packages, *args):
    """`dyncore *args` where `packages` cannot be imported."""
    code = f"import sys\nfor p in {packages!r}: sys.modules[p] = None\n"
    code += f"from dyncore.cli import main\nsys.exit(main({list(args)!r}))"
    return run(command=(sys.executable, "-c", code))


def test_env_says_versions_threads_and_every_backend():
    done = run("env")
    assert done.returncode == 0
    for word in (dyncore.__version__, torch.__version__, "instruction set", "threads", "GPU"):
        assert word in done.stdout
    for backend in ("reference", "cpu", "cuda", "triton"):
        (line,) = [line for line in done.stdout.splitlines() if line.startswith(f"backend {backend}")]
        assert "available" in line
        assert "not available" not in line or ":" in line  # with its reason


def test_env_as_json():
    env = json.loads(run("env", "--json").stdout)
    assert env["versions"]["dyncore"] == dyncore.__version__
    assert env["threads"] == 1


@pytest.mark.parametrize(
    ("measured", "says"),
    [
        ([], "defaults; dyncore tune measures this machine's"),
        ([1], "measured, for 1 thread"),
        ([1, 4], "measured, for 1 thread (and for 4)"),
        ([2, 4], "defaults, for the table is of 2 and 4 threads, and 1 is in use; dyncore tune measures it"),
    ],
)
def test_env_says_for_how_many_threads_break_evens_were_measured(measured, says, tmp_path, monkeypatch, capsys):
    record = {"masked": [], "executors": [], "dense": []}
    table = {"schema": break_even.SCHEMA, "machine": break_even.machine(), "threads": dict.fromkeys(measured, record)}
    (tmp_path / "tune.json").write_text(json.dumps(table))
    monkeypatch.setenv("DYNCORE_CACHE", str(tmp_path))
    monkeypatch.setattr(break_even, "_tables", None)
    monkeypatch.setattr(break_even, "_idle", False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert main(["env"]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("break-evens ")]
    assert line.split(maxsplit=1)[1] == says


def test_env_needs_torch_alone():
    done = without(["rich", "matplotlib", "sklearn", "typer", "numpy", "triton", "dyncore._C"], "env")
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("backend cpu")]
    assert "not available: " in line


@pytest.mark.parametrize("missing", [["rich"], ["matplotlib"], ["rich", "matplotlib"]])
def test_bench_names_the_pip_command_of_a_missing_extra(missing):
    done = without(missing, "bench", "--tiny")
    assert done.returncode == 1
    assert done.stderr == f"dyncore bench needs {' and '.join(missing)}: pip install 'dyncore[bench]'\n"


def test_help_has_examples_and_all_options():
    done = run("bench", "--help")
    assert done.returncode == 0
    for word in ("--quick", "--full", "--device", "--threads", "--dtype", "--out", "moe", "examples:", "Ctrl-C"):
        assert word in done.stdout
    assert "--tiny" not in done.stdout


@pytest.mark.parametrize("command", [[], ["env"], ["bench"], ["audit"], ["report"], ["tune"]])
def test_every_help_ends_with_examples_that_can_be_copied(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    with pytest.raises(SystemExit) as done:
        main([*command, "--help"])
    out = capsys.readouterr().out
    shown = out[out.index("examples:\n") :].splitlines()[1:]
    assert done.value.code == 0
    assert len(shown) >= 2
    assert all(line.startswith("  " + " ".join(["dyncore", *command])) for line in shown)


def test_help_of_tune_has_an_example_of_each_device(capsys):
    with pytest.raises(SystemExit):
        main(["tune", "--help"])
    out = capsys.readouterr().out
    for word in (
        "--device",
        "DYNCORE_CACHE",
        "dyncore tune --threads 1",
        "dyncore tune --device cuda:0 --quick",
        "Ctrl-C",
    ):
        assert word in " ".join(out.split())


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["bench", "cooking"], "unknown name 'cooking', expected token-skipping or moe"),
        (["bench", "--threads", "0"], "argument --threads: expected a whole number >= 1, got '0'"),
        (["bench", "--threads", "two"], "argument --threads: expected a whole number >= 1, got 'two'"),
        (["bench", "--dtype", "int8"], "argument --dtype: expected one of float32, fp32, bfloat16, bf16, got 'int8'"),
        (["bench", "--seconds", "-1"], "argument --seconds: expected a number above 0, got '-1'"),
        (["bench", "--seconds", "nan"], "argument --seconds: expected a number above 0, got 'nan'"),
        (["bench", "--device", "tpu"], "argument --device: expected cpu, cuda or cuda:<number>, got 'tpu'"),
        (["bench", "--device", "cuda:99"], "argument --device: expected a device that is there, PyTorch finds "),
        (["bench", "--quick", "--full"], "argument --full: not allowed with argument --quick"),
        (["bench", "--out", __file__], "argument --out: expected a folder, "),
        (["bench", "--tiny", "--out", ""], "argument --out: expected a folder, got ''"),
        (
            ["bench", "--tiny", "--out", "/proc/nope"],
            "argument --out: cannot make the folder '/proc/nope': No such file or",
        ),
        (["bench", "--tiny", "--out", f"{__file__}/x"], f"cannot make the folder '{__file__}/x': Not a directory"),
        (["bench", "--tiny", "--out", "x" * 300], "xxx': File name too long"),
        (["bench", "--tiny", "--compare", "/nope.json"], "argument --compare: cannot read '/nope.json': No such file"),
        (["bench", "--tiny", "--compare", __file__], f"argument --compare: {__file__} is not JSON"),
        (["tune", "--device", "cuda", "--force"], "argument --force: not allowed with a CUDA device"),
        (["tune", "--device", "tpu"], "argument --device: expected cpu, cuda or cuda:<number>, got 'tpu'"),
        (["tune", "--device", "cuda:x"], "argument --device: expected cpu, cuda or cuda:<number>, got 'cuda:x'"),
        (["tune", "--device", "cuda", "--threads", "2"], "argument --threads: not allowed with a CUDA device"),
        (["sing"], "argument command: invalid choice: 'sing'"),
        ([], "the following arguments are required: command"),
    ],
)
def test_bad_arguments_are_one_line_and_status_2(args, message, capsys):
    with pytest.raises(SystemExit) as done:
        main(args)
    assert done.value.code == 2
    out, err = capsys.readouterr()
    assert message in err
    assert (out, err.count("\n")) == ("", 1)


def test_a_shell_sees_the_status_and_the_line():
    done = run("sing")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)


@pytest.mark.parametrize("args", [["env"], ["--help"]])
def test_a_reader_that_leaves_early_gets_no_traceback(args):
    """As in `dyncore env | head -0`: the pipe has no reader by the time of the first write."""
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "dyncore", *args]
    try:
        buffered = ENVIRONMENT | {"PYTHONUNBUFFERED": ""}  # argparse ignores what fails in its own write
        done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=300, env=buffered)
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


def test_ctrl_c_while_the_parts_of_a_command_are_imported_is_quiet():
    code = (
        "import builtins, os, signal, sys\n"
        "from dyncore.cli import main\n"
        "real = builtins.__import__\n"
        "def interrupted(name, *args):\n"
        "    if name == 'dyncore.measure': os.kill(os.getpid(), signal.SIGINT)\n"
        "    return real(name, *args)\n"
        "builtins.__import__ = interrupted\n"
        "sys.exit(main(['env']))"
    )
    done = run(command=(sys.executable, "-c", code), preexec_fn=heed_ctrl_c)
    assert (done.returncode, done.stderr) == (130, "Interrupted\n")


def test_the_version_is_the_packages():
    done = run("--version")
    assert (done.returncode, done.stdout) == (0, f"dyncore {dyncore.__version__}\n")


def test_a_bench_from_end_to_end_writes_all_files_and_a_table(tmp_path):
    pytest.importorskip("matplotlib")
    out = tmp_path / "new" / "folder"
    done = run("bench", "--tiny", "--threads", "1", "--out", str(out))
    assert done.returncode == 0, done.stderr
    assert {p.name for p in out.iterdir()} == {"results.json", "index.html"}
    results = read_results(out / "results.json")
    assert results["command"].startswith("dyncore bench --tiny --threads 1")
    assert results["environment"]["threads"] == 1
    assert not results["interrupted"]
    assert {r["mechanism"] for r in results["records"]} == {
        "token-skipping", "moe", "relu-down", "relu-mlp", "reglu-mlp",
    }  # fmt: skip
    assert {r["input"] for r in results["records"]} == {"random", "clustered", "digits", "uniform", "beta"}
    assert done.stdout.count("token-skipping") == 2  # the title of its table and a sentence
    assert "beta state" not in done.stderr  # torch's word on its sparse tensors
    assert "faster than dense" in done.stdout
    assert str(out / "index.html") in done.stdout


def test_results_are_written_over_when_forced_alone(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    asked = []
    monkeypatch.setattr("dyncore.bench.run.run", lambda options: asked.append(options.out) or 0)
    args = ["bench", "moe", "--tiny", "--out", str(tmp_path)]
    assert main(args) == 0
    (tmp_path / "results.json").write_text("{}")
    with pytest.raises(SystemExit):
        main(args)
    assert f"folder '{tmp_path}' holds results, which --force would write over" in capsys.readouterr().err
    assert main([*args, "--force"]) == 0
    assert asked == [tmp_path] * 2


def test_names_and_dtype_choose_points_and_a_second_run_is_compared_with_the_first(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    done = run("bench", "moe", "--tiny", "--dtype", "bf16", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "bench-results").iterdir()
    results = read_results(folder / "results.json")
    assert {(r["mechanism"], r["dtype"]) for r in results["records"]} == {("moe", "bfloat16")}
    old, new = folder / "results.json", tmp_path / "new"
    again = ["bench", "moe", "--tiny", "--dtype", "bf16", "--seconds", "0.001", "--out", str(new)]
    assert main([*again, "--compare", str(old)]) == 0
    count = len(results["records"])
    assert f"{count} of {count} points are in the run of {results['created']}" in capsys.readouterr().out
    compared = read_results(new / "results.json")["compared"]
    assert compared["with"] == results["created"]
    assert len(compared["points"]) == count


def test_ctrl_c_keeps_what_was_measured(tmp_path):
    pytest.importorskip("matplotlib")
    command = [sys.executable, "-m", "dyncore", "bench", "moe", "--tiny", "--seconds", "2", "--out", str(tmp_path)]
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT, preexec_fn=heed_ctrl_c
    ) as process:
        deadline = time.monotonic() + 120
        while not (tmp_path / "results.json").exists():
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    results = read_results(tmp_path / "results.json")
    assert results["interrupted"]
    assert 1 <= len(results["records"]) < 4
    assert f"Interrupted after {len(results['records'])} of 4 points; what was measured is in" in err
    assert "Traceback" not in err
    assert "moe" in out
    assert (tmp_path / "index.html").exists()
