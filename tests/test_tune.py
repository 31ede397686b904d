"""Break-evens: nearest sizes, who wins by a made-up table, files that are of no use, and the command that measures."""

import itertools
import json
import math
import os
import subprocess
import sys
import warnings

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import dyncore as dc
from dyncore import break_even, tune
from dyncore.backends import cpu
from dyncore.break_even import NEVER, Grid, Table, masked_from, torch_is_faster, use

TINY = tune.Effort(rows=(2, 8), widths=(16,), masked_rows=(8,), masked_widths=(16,), seconds=0.0)
BF16 = torch.bfloat16


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty cache folder, and a process that has read nothing yet."""
    monkeypatch.setenv("DYNCORE_CACHE", str(tmp_path))
    monkeypatch.setattr(break_even, "_tables", None)
    monkeypatch.setattr(break_even, "_idle", False)
    monkeypatch.setattr("dyncore.measure.timing.last_level_cache", lambda: 2**12)  # few copies of cold weights
    return tmp_path


def document(**changes):
    """A table in which torch's matmul wins from 64 rows a group on, and computing everything from density 0.5."""
    cell = {"op": "grouped_linear", "dtype": "bfloat16", "weights": 1024}
    record = {
        "executors": [{**cell, "rows": 16, "ours": 9.0, "torch": 3.0}, {**cell, "rows": 256, "ours": 2.0, "torch": 8.0}],
        "masked": [{**cell, "rows": 20, "density": 0.5}, {**cell, "rows": 320, "density": None}],
        "dense": [{**cell, "op": "sparse_linear", "rows": 20, "density": 0.3}, {**cell, "op": "sparse_linear", "rows": 320, "density": None}],
    }  # fmt: skip
    threads = {str(torch.get_num_threads()): record}
    return {"schema": break_even.SCHEMA, "machine": break_even.machine(), "threads": threads} | changes


def write(folder, content):
    (folder / "tune.json").write_text(content if isinstance(content, str) else json.dumps(content))


def offsets(*sizes):
    return torch.tensor([0, *itertools.accumulate(sizes)], dtype=torch.int32)


WEIGHT = torch.empty(2, 32, 32, dtype=BF16)
BY_NEURON = WEIGHT[0].t()


def test_sizes_between_those_measured_take_the_nearest_by_ratio():
    grid = Grid({(rows, weights): (rows, weights) for rows in (8, 512) for weights in (100, 10000)})
    assert grid.at(1, 1) == (8, 100)
    assert grid.at(63, 999) == (8, 100)
    assert grid.at(65, 1001) == (512, 10000)
    assert grid.at(10**9, 10**12) == (512, 10000)


def test_the_whole_call_goes_to_who_does_all_its_groups_sooner(folder):
    write(folder, document())
    assert break_even.tuned()
    assert not torch_is_faster("grouped_linear", BF16, offsets(10, 10), WEIGHT)
    assert torch_is_faster("grouped_linear", BF16, offsets(100, 200), WEIGHT)
    assert torch_is_faster("grouped_linear", BF16, offsets(10, 200), WEIGHT)  # 10 / 3 + 200 / 8 < 10 / 9 + 200 / 2
    assert not torch_is_faster("grouped_linear", BF16, offsets(*[16] * 60, 100), torch.empty(61, 32, 32))
    assert not torch_is_faster("grouped_linear", BF16, offsets(0, 0), WEIGHT)
    assert not torch_is_faster("grouped_linear", torch.float32, offsets(200, 200), WEIGHT)
    assert not torch_is_faster("grouped_mlp", BF16, offsets(200, 200), WEIGHT)


def test_five_percent_are_not_worth_a_change():
    for torchs, wins in ((1.0, False), (1.04, False), (1.06, True)):
        with use(Table(executors={("grouped_mlp", BF16): Grid({(1, 1): (1.0, torchs)})})):
            assert torch_is_faster("grouped_mlp", BF16, offsets(5, 6), WEIGHT, WEIGHT) is wins


def flops(fn):
    with FlopCounterMode(display=False) as counter:
        fn()
    return counter.get_total_flops()


def test_auto_computes_everything_from_the_density_that_the_table_says(folder):
    write(folder, document())
    x, w = torch.randn(20, 32).to(BF16), torch.randn(1, 32, 32).to(BF16)
    few, many = dc.select(torch.arange(20) < 9), dc.select(torch.arange(20) < 10)
    product = 2 * 32 * 32
    assert flops(lambda: dc.grouped_linear(x, w, plan=few)) == 9 * product
    assert flops(lambda: dc.grouped_linear(x, w, plan=many)) == 20 * product
    assert flops(lambda: dc.grouped_linear(x.float(), w.float(), plan=many)) == 10 * product
    assert flops(lambda: dc.grouped_linear(x.repeat(16, 1), w, plan=dc.select(torch.ones(320) > 0))) == 320 * product
    with dc.execution("sparse"):
        sparse = dc.grouped_linear(x, w, plan=many)
        assert flops(lambda: dc.grouped_linear(x, w, plan=many)) == 10 * product
    torch.testing.assert_close(dc.grouped_linear(x, w, plan=many), sparse)
    assert masked_from("cpu", "grouped_linear", 320, [w]) == NEVER
    assert masked_from("cuda", "grouped_linear", 20, [w]) == NEVER
    assert masked_from("mps", "grouped_linear", 20, [w]) == 1.0


def test_a_compiled_function_does_not_ask_the_table(folder):
    write(folder, document())
    x, w = torch.randn(1, 20, 32).to(BF16), torch.randn(1, 32, 32).to(BF16)

    def run(x):
        return dc.grouped_linear(x, w, plan=dc.select_topk(x[..., 0], 20))

    compiled = torch.compile(run, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), run(x))


def test_no_file_means_the_defaults_and_no_warning(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert break_even.current() == Table()
    assert not break_even.tuned()
    assert break_even._idle
    assert masked_from("cpu", "grouped_linear", 20, [WEIGHT]) == math.inf


BAD = {
    "not JSON": "{",
    "brackets without end": "[" * 200_000,
    "a rate past every float": document(threads={"1": {"masked": [], "dense": [], "executors": [
        {"op": "grouped_mlp", "dtype": "float32", "rows": 1, "weights": 1, "ours": 10**400, "torch": 1}]}}),
    "not text": b"\xff\xfe".decode("latin1"),
    "another schema": {"schema": "dyncore.tune/0"},
    "a list": [],
    "no machine": {"schema": break_even.SCHEMA},
    "no threads": {"schema": break_even.SCHEMA, "machine": break_even.machine()},
    "threads of another kind": document(threads=[1]),
    "another machine": document(machine=break_even.machine() | {"cpu": "Z80"}),
    "other kernels": document(machine=break_even.machine() | {"dyncore": "0.0.1"}),
    "no cells": document(threads={"1": {}}),
    "a dtype that is none": document(threads={"1": {"executors": [], "dense": [], "masked": [
        {"op": "grouped_mlp", "dtype": "nn", "rows": 1, "weights": 1, "density": 1.0}]}}),
    "a rate of 0": document(threads={"1": {"masked": [], "dense": [], "executors": [
        {"op": "grouped_mlp", "dtype": "float32", "rows": 1, "weights": 1, "ours": 0, "torch": 1}]}}),
    "a size of 0": document(threads={"1": {"masked": [], "dense": [], "executors": [
        {"op": "grouped_mlp", "dtype": "float32", "rows": 0, "weights": 1, "ours": 1, "torch": 1}]}}),
}  # fmt: skip


@pytest.mark.parametrize("content", BAD.values(), ids=BAD.keys())
def test_a_file_of_no_use_means_the_defaults_and_one_warning(folder, content):
    write(folder, content)
    x, w = torch.randn(3, 4), torch.randn(1, 4, 4)
    plan = dc.select(torch.ones(3, dtype=torch.bool))
    with pytest.warns(UserWarning, match=r"tune.json .*: the defaults serve; python -m dyncore tune") as caught:
        [dc.grouped_linear(x, w, plan=plan) for _ in range(3)]
    assert len(caught) == 1
    assert not break_even.tuned()


def test_the_warning_says_what_differs(folder):
    write(folder, document(machine=break_even.machine() | {"cpu": "Z80", "torch": "1.0"}))
    with pytest.warns(UserWarning, match=r"was measured with cpu Z80, here .*; torch 1\.0, here "):
        break_even.current()


def test_a_folder_in_the_place_of_the_file_is_a_file_of_no_use(folder):
    (folder / "tune.json").mkdir()
    with pytest.warns(UserWarning, match="cannot be read"):
        break_even.current()


def test_a_table_serves_its_number_of_threads_alone(folder):
    threads = torch.get_num_threads()
    write(folder, document())
    try:
        torch.set_num_threads(threads + 1)
        assert not break_even.tuned()
        assert not torch_is_faster("grouped_linear", BF16, offsets(300, 300), WEIGHT)
        torch.set_num_threads(threads)
        assert torch_is_faster("grouped_linear", BF16, offsets(300, 300), WEIGHT)
    finally:
        torch.set_num_threads(threads)


def test_the_file_is_read_once(folder):
    write(folder, document())
    assert break_even.tuned()
    write(folder, "{")
    assert break_even.tuned()


@pytest.mark.parametrize(
    ("own", "shared", "expected"),
    [
        ("/own", "/shared", "/own/tune.json"),
        ("", "/shared", "/shared/dyncore/tune.json"),
        ("", "relative", "/home/u/.cache/dyncore/tune.json"),
        ("", "", "/home/u/.cache/dyncore/tune.json"),
    ],
)
def test_the_environment_says_where_the_table_is(own, shared, expected, monkeypatch):
    for name, value in (("DYNCORE_CACHE", own), ("XDG_CACHE_HOME", shared), ("HOME", "/home/u")):
        monkeypatch.setenv(name, value)
    assert str(break_even.path()) == expected


def test_with_matrix_units_large_bfloat16_groups_go_to_torch_by_default(folder, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True})
    break_even._default.cache_clear()
    try:
        large, small = torch.empty(2, 1024, 1024, dtype=BF16), torch.empty(2, 64, 64, dtype=BF16)
        assert torch_is_faster("grouped_linear", BF16, offsets(200, 300), large)
        assert torch_is_faster("grouped_mlp", BF16, offsets(200, 300), large, large)
        assert not torch_is_faster("grouped_linear", BF16, offsets(20, 30), large)
        assert not torch_is_faster("grouped_linear", BF16, offsets(200, 300), small)
        assert not torch_is_faster("grouped_linear", torch.float32, offsets(200, 300), large)
    finally:
        break_even._default.cache_clear()


# The command ----------------------------------------------------------------------------------------------------------

needs_kernels = pytest.mark.skipif(not cpu.available, reason="nothing to choose from")


@needs_kernels
def test_tune_prints_and_writes_what_is_read_then(folder, capsys):
    assert tune.run(TINY, force=True) == 0
    out = capsys.readouterr().out
    (record,) = json.loads((folder / "tune.json").read_text())["threads"].values()
    cells = len(tune.OPS) * len(tune.DTYPES)
    assert len(record["executors"]) == 2 * cells
    assert len(record["masked"]) == cells
    assert len(record["dense"]) == 2 * len(tune.DTYPES)
    assert all(cell["ours"] > 0 < cell["torch"] for cell in record["executors"])
    assert out.count("grouped_mlp ") == out.count("grouped_linear ") == 3 * cells // 2
    assert f"Written to {folder / 'tune.json'}" in out
    assert break_even.tuned()


@needs_kernels
def test_tune_keeps_what_was_measured_with_other_thread_counts_on_this_machine(folder):
    threads = torch.get_num_threads()
    for others, kept in (
        (document(threads={"77": {"masked": [], "executors": [], "dense": []}}), True),
        ({"schema": "?"}, False),
    ):
        write(folder, others)
        assert tune.run(TINY, force=True) == 0
        measured = json.loads((folder / "tune.json").read_text())["threads"]
        assert set(measured) == {str(threads)} | ({"77"} if kept else set())


@needs_kernels
def test_tune_says_where_it_cannot_write(folder, monkeypatch, capsys):
    (folder / "file").touch()
    monkeypatch.setenv("DYNCORE_CACHE", str(folder / "file"))
    assert tune.run(TINY) == 1
    assert "cannot make the folder" in capsys.readouterr().err
    monkeypatch.setenv("DYNCORE_CACHE", str(folder))
    (folder / "tune.json").mkdir()
    assert tune.run(TINY, force=True) == 1
    assert "cannot write" in capsys.readouterr().err


@needs_kernels
@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize(("spread", "noisy"), [(0.2, False), (0.3, True)])
def test_times_of_a_busy_machine_are_written_when_forced_alone(folder, monkeypatch, capsys, spread, noisy, force):
    samples = [round(1000 * (1 + spread * x)) for x in (-1, -0.5, 0, 0.5, 1)]  # quartiles half the spread away
    monkeypatch.setattr(tune, "_rounds", lambda ways, *args: {name: tune.Timing(tuple(samples)) for name in ways})
    refused = noisy and not force
    assert tune.run(TINY, force=force) == int(refused)
    assert (folder / "tune.json").exists() != refused
    assert ("a quarter of the times vary by 30% and more" in capsys.readouterr().err) == refused


def test_the_density_is_where_skipping_stops_being_faster(monkeypatch):
    def masked(times, everything):
        timings = dict(zip(map(str, tune._DENSITIES), times, strict=True)) | {"masked": everything}
        made_up = {name: tune.Timing((round(ms * 1e6),)) for name, ms in timings.items()}
        monkeypatch.setattr(tune, "_rounds", lambda *args: made_up)
        return tune.masked_cell("grouped_linear", torch.float32, 8, 16, 0.0)["density"]

    assert masked([1.0, 2.0, 3.0], 3.0 / 1.04) is None
    assert masked([1.0, 2.0, 3.0], 2.0 / 1.05) == pytest.approx(0.75)
    assert masked([1.0, 2.0, 3.0], 2.5 / 1.05) == pytest.approx(0.875)
    assert masked([1.0, 2.0, 3.0], 0.5) == 0.5


def test_the_density_of_non_zeros_is_where_lists_stop_being_faster(monkeypatch):
    def dense(times, everything):
        timings = dict(zip(map(str, tune._NONZEROS), times, strict=True)) | {"dense": everything}
        made_up = {name: tune.Timing((round(ms * 1e6),)) for name, ms in timings.items()}
        monkeypatch.setattr(tune, "_rounds", lambda *args: made_up)
        return tune.dense_cell(torch.float32, 8, 16, 0.0)["density"]

    assert dense([1.0, 2.0, 3.0, 4.0], 4.0) is None
    assert dense([1.0, 2.0, 3.0, 4.0], 2.5) == pytest.approx(0.325)
    assert dense([1.0, 2.0, 3.0, 4.0], 0.5) == 0.1


def test_the_table_says_from_which_density_a_sparse_op_is_dense(folder):
    def edge(rows, weight=BY_NEURON, device="cpu"):
        return break_even.dense_from(device, "sparse_linear", rows, [weight])

    assert edge(20) == edge(64) == break_even._DENSE_FROM[BF16]
    break_even._tables, break_even._idle = None, False
    write(folder, document())
    assert edge(20) == 0.3
    assert edge(320) == edge(1) == NEVER
    row_major = WEIGHT[0]
    assert edge(20, row_major) == edge(1, row_major) == 0.0
    assert edge(320, row_major) == NEVER
    assert edge(20, device="cuda") is None
    assert edge(20, torch.empty(32, 32, dtype=torch.float64)) is None


def test_tune_needs_torch_alone(tmp_path):
    code = "import sys\nfor p in ('rich', 'matplotlib', 'numpy', 'triton'): sys.modules[p] = None\n"
    code += "import dyncore.measure.timing as timing\nfrom dyncore import cli, tune\ntiming.last_level_cache = lambda: 2**12\n"
    code += "tune.QUICK = tune.Effort((2,), (16,), (8,), (16,), 0.0)\nsys.exit(cli.main(['tune', '--quick', '--threads', '1', '--force']))"
    environment = os.environ | {"DYNCORE_CACHE": str(tmp_path / "new" / "folder")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, env=environment)
    if cpu.available:
        assert done.returncode == 0, done.stderr
        assert list(json.loads((tmp_path / "new" / "folder" / "tune.json").read_text())["threads"]) == ["1"]
    else:
        assert "nothing to choose from" in done.stderr
