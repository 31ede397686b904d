"""benchmarks.gpu at tiny sizes on the CPU: everything but the GPU, so that an unattended run on one does not fail."""

import json
import math
import operator
import os
import statistics
import sys
import tarfile
import time
from types import SimpleNamespace

import pytest
import torch

from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import bars, measure, processes
from benchmarks.gpu.cases import CASES, Inputs
from benchmarks.gpu.reference import TOLERANCE, Reference
from benchmarks.gpu.ways import Way, ways

CPU = torch.device("cpu")
TINY = {(c.part, c.label): c.tiny() for c in CASES}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(exit code, folder, results) of a whole run."""
    out = tmp_path_factory.mktemp("results")
    code = gpu.main(["--out", str(out), "--device", "cpu", "--quick"])
    return code, out, json.loads((out / "results.json").read_text())


def test_every_part_leaves_samples_and_an_archive(run):
    code, out, results = run
    assert code == 0
    assert {"commit", "gpu", "versions", "backends", "peers", "time"} <= results["machine"].keys()
    assert {r["part"] for r in results["records"]} == set(gpu.PARTS) - {"tests"}
    for r in results["records"]:
        assert len(r["samples_ms"]) >= measure.ROUNDS[0]
        assert r["ms"] == statistics.median(r["samples_ms"]) > 0
    with tarfile.open(out / "dyncore-gpu.tar.gz") as tar:
        assert {"results.json", "summary.txt"} <= set(tar.getnames())


def test_every_case_times_dyncore_and_its_rivals(run):
    def timed(part, label):
        return {r["way"] for r in run[2]["records"] if (r["part"], r["label"]) == (part, label)}

    ours, rivals = {"dyncore", "dyncore_planned", "dyncore_router"}, {"grouped_mm", "grouped_mm_compiled"}
    skipping = {"dyncore", "dyncore_planned", "dyncore_host", "dense", "naive", "gathered", "masked_compiled"}
    assert timed("token_skip", "keep=0.25") == skipping
    assert timed("moe", "E=64 k=8") == ours | rivals | {"loop", "cublas"}
    assert timed("moe", "E=8 k=2 training") == {"dyncore", "loop", "cublas"} | rivals
    assert timed("few_rows", "E=128 k=8 T=64") == ours | rivals
    assert timed("layer", "T=64") == {"dyncore", "dyncore_graph", "host"}


def test_the_tilings_are_tuned_when_asked_for_alone(tmp_path, monkeypatch):
    started = []

    def tune(command, log, limit):
        started.append(command)
        log.write_text("Written to a file\n")
        (tmp_path / "tilings-x.json").write_text("{}")
        return 0

    monkeypatch.setattr(processes, "run_command", tune)
    record = processes.run_tune(tmp_path, 60.0)
    assert (record["part"], record["code"], record["summary"]) == ("tune", 0, "Written to a file")
    assert started[0][1] == f"DYNCORE_CACHE={tmp_path}"
    assert gpu.main(["--out", str(tmp_path), "--device", "cpu", "--quick", "--part", "tune"]) == 0
    with tarfile.open(tmp_path / "dyncore-gpu.tar.gz") as tar:
        assert {"tilings-x.json", "tune.log"} <= set(tar.getnames())


def test_flops_are_those_of_the_live_slots(run):
    def flops(part, label, way):
        (r,) = (r for r in run[2]["records"] if (r["part"], r["label"], r["way"]) == (part, label, way))
        assert r["tflops"] == pytest.approx(r["flops"] / r["ms"] / 1e9)
        return r["flops"]

    assert flops("token_skip", "keep=0.25", "naive") == 2 * 12 * 2 * 32 * 48
    assert flops("token_skip", "keep=0.25", "dense") == 2 * 48 * 2 * 32 * 48
    assert flops("moe", "E=8 k=2", "dyncore") == 2 * 96 * 3 * 32 * 48
    assert flops("moe", "E=8 k=2 training", "dyncore") == 3 * 2 * 96 * 3 * 32 * 48
    assert flops("moe", "E=8 k=2 training", "cublas") == 2 * 64**3


def test_every_bar_but_those_of_absent_peers_is_judged(run):
    unmeasured = [v["text"] for v in run[2]["bars"] if v["met"] is None]
    assert len(unmeasured) == 2
    assert all("ScatterMoE" in text for text in unmeasured)
    last = (run[1] / "summary.txt").read_text().splitlines()[-len(bars.BARS) - 1 :]
    assert [line.split()[0] for line in last] == ["bar"] * len(bars.BARS) + [last[-1].split()[0]]
    assert last[-1].endswith("ok")


def test_all_is_over_before_nine_minutes():
    assert gpu.PREPARED + gpu.SANITIZING < gpu.MEASURED <= 540 - 30


# Values -----------------------------------------------------------------------------------------------------------


def results(inputs, way="dyncore"):
    with torch.set_grad_enabled(inputs.case.backward):
        return measure.results_of(inputs, ways(inputs)[way])(0)


@pytest.mark.parametrize("part", [0, 1, 2, 3, 4])
def test_an_error_in_any_result_is_seen(part):
    inputs = Inputs(TINY["moe", "E=8 k=2 training"], CPU)
    reference, found = Reference(inputs), results(inputs)
    assert reference.error(found) <= TOLERANCE[torch.bfloat16]
    where = reference.group if part in (2, 3) else 0
    for wrong in (found[part][where].abs().max() * 2, math.nan):
        broken = [t.detach().clone() for t in found]
        broken[part][where].view(-1)[0] += wrong
        assert not reference.error(broken) <= TOLERANCE[torch.bfloat16]


def test_a_way_with_wrong_values_is_not_timed(monkeypatch):
    def spoilt(inputs):
        right = ways(inputs)
        return right | {"naive": Way(lambda i: right["naive"].run(i) + 1)}

    monkeypatch.setattr(measure, "ways", spoilt)
    records = measure.measure_case(TINY["token_skip", "keep=0.5"], CPU, 0.01)
    (naive,) = (r for r in records if r["way"] == "naive")
    assert "wrong values" in naive["left_out"]
    assert "ms" not in naive


def test_a_rival_that_raises_is_left_out(monkeypatch):
    def broken(i):
        raise NotImplementedError("not on this machine")

    monkeypatch.setattr(measure, "ways", lambda inputs: {"rival": Way(broken), "dyncore": ways(inputs)["dyncore"]})
    records = measure.measure_case(TINY["moe", "E=8 k=2"], CPU, 0.01)
    assert [(r["way"], "ms" in r) for r in records] == [("rival", False), ("dyncore", True)]
    assert "not on this machine" in records[0]["left_out"]
    assert not gpu.has_failed(records)


def test_a_wrong_plan_is_not_timed(monkeypatch):
    makers, of_the_device = measure.plan_makers, iter([True, False])  # then those that are right

    def spoilt(rows, device):
        found = makers(rows, device)
        return found | {"select": found["route"]} if next(of_the_device) else found

    monkeypatch.setattr(measure, "plan_makers", spoilt)
    records = measure.measure_plans(True, CPU, 0.01)
    assert [r["label"] for r in records if "left_out" in r] == ["select"]
    assert gpu.has_failed(records)


# Processes --------------------------------------------------------------------------------------------------------


def test_a_worker_outlives_what_its_calls_do_to_it():
    worker = processes.Worker()
    try:
        with pytest.raises(processes.Failed, match="ZeroDivisionError"):
            worker.run(operator.truediv, 1, 0, limit=60)
        assert worker.run(operator.add, 1, 2, limit=60) == 3
        with pytest.raises(processes.Failed, match="ended with code 7"):
            worker.run(os._exit, 7, limit=60)
        with pytest.raises(processes.Failed, match="stopped after"):
            worker.run(time.sleep, 60, limit=0.1)
    finally:
        worker.close()


def test_a_measurement_that_fails_fails_the_run_but_not_the_others(tmp_path):
    jobs = [processes.Job("moe", "broken", operator.truediv, ()), *gpu.all_jobs(["peaks"], quick=True)]
    found = {"quick": True, "records": []}
    gpu.measure(jobs, CPU, time.monotonic() + 60, tmp_path, found)
    assert [(r["label"], "ms" in r) for r in found["records"]] == [("broken", False), ("product", True), ("copy", True)]
    assert "TypeError" in found["records"][0]["left_out"]
    assert gpu.has_failed(found["records"])
    assert not gpu.has_failed(found["records"][1:])


def test_where_no_time_is_left_it_says_so(tmp_path):
    found = {"quick": True, "records": []}
    gpu.measure(gpu.all_jobs(["plans"], quick=True), CPU, time.monotonic(), tmp_path, found)
    assert [r["left_out"] for r in found["records"]] == ["no time was left"]
    assert json.loads((tmp_path / "results.json").read_text()) == found


def test_a_command_is_killed_with_all_that_it_started(tmp_path):
    log = tmp_path / "log"
    assert processes.run_command(["sh", "-c", "echo out; exit 3"], log, 10) == 3
    assert log.read_text() == "out\n"
    late = "sleep 1; echo late"
    assert processes.run_command(["sh", "-c", f"({late}) & echo early; wait"], log, 0.3) is None
    time.sleep(1)
    assert log.read_text() == "early\n"


def test_a_sanitizer_that_is_missing_slow_or_unhappy(monkeypatch, tmp_path):
    tool = tmp_path / "compute-sanitizer"

    def run(script, limit=10.0):
        tool.write_text(f"#!/bin/sh\n{script}\n")
        tool.chmod(0o755)
        return processes.run_sanitizer(tmp_path, "memcheck", limit)

    monkeypatch.setattr(processes.shutil, "which", lambda name: None)
    assert "not installed" in run("")["left_out"]
    monkeypatch.setattr(processes.shutil, "which", lambda name: str(tool))
    assert run('echo "========= ERROR SUMMARY: 3 errors"; exit 9')["code"] == 9
    clean = run('echo "========= ERROR SUMMARY: 0 errors"')
    assert (clean["code"], clean["summary"]) == (0, "ERROR SUMMARY: 0 errors")
    assert "ERROR SUMMARY" in (tmp_path / "memcheck.log").read_text()
    assert "stopped" in run("exec sleep 5", 0.1)["left_out"]


def test_tests_and_sanitizers_are_prepared_beside_the_caches(monkeypatch, tmp_path):
    def run_command(command, log, limit):
        assert 0 < limit <= 60
        log.write_text(f"{command[0]}\n== ERROR SUMMARY: 0 errors")
        return 1 if command[0] == sys.executable else 0

    monkeypatch.setattr(processes, "run_command", run_command)
    monkeypatch.setattr(processes.shutil, "which", lambda name: name)
    records = gpu.prepare([], True, CPU, tmp_path, time.monotonic() + 60)
    assert [(r["label"], r["code"]) for r in records] == [
        ("pytest -m gpu", 1), *((tool, 0) for tool in processes.SANITIZERS)
    ]  # fmt: skip
    assert sorted(p.name for p in tmp_path.iterdir()) == ["sanitizers.log", "tests.log"]
    assert gpu.has_failed(records)


# What only a CUDA device does, by fakes ----------------------------------------------------------------------------


def test_samples_on_a_device_are_taken_between_events_behind_a_sleep(monkeypatch):
    log = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            log.append("event")

        def synchronize(self):
            log.append("wait")

        def elapsed_time(self, end):
            return 2.0

    assert hasattr(torch.cuda, "_sleep")
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: log.append("sleep"))
    calls = {"a": lambda i: log.append(f"a{i}"), "b": lambda i: log.append(f"b{i}")}
    samples = measure.interleave(calls, 2, torch.device("cuda"), 0.0)
    assert samples == {"a": [2.0] * 5, "b": [2.0] * 5}
    assert log[:5] == ["sleep", "event", "a0", "event", "wait"]
    warm, timed = log[2:20:5], log[22::5]
    assert warm == ["a0", "b0", "a1", "b1"]
    assert timed == ["a0", "b0", "b1", "a1", "a0", "b0", "b1", "a1", "a0", "b0"]


def test_kernels_copies_and_fills_are_counted_and_nothing_else(monkeypatch):
    kinds = ["kernel", "gpu_memcpy", "gpu_memset", "cuda_runtime", "gpu_user_annotation", "cpu_op"]
    events = [{"name": kind, "cat": kind, "dur": 1.5} for kind in kinds] + [{"ph": "M"}]

    class Profile:
        def __init__(self, activities):
            assert activities == [measure.ProfilerActivity.CUDA]

        def __enter__(self):
            return self

        def __exit__(self, *exception):
            return None

        def export_chrome_trace(self, path):
            with open(path, "w") as file:
                json.dump({"traceEvents": events}, file)

    monkeypatch.setattr(measure, "profile", Profile)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    found = measure.device_work(lambda: None, torch.device("cuda"))
    assert found == [(kind, 1.5) for kind in kinds[:3]]
    events.clear()
    with pytest.raises(RuntimeError, match="no kernel"):
        measure.device_work(lambda: None, torch.device("cuda"))


# Bars -------------------------------------------------------------------------------------------------------------


def verdict(text, **timed):
    """The verdict of the bar of this text on records "part/label/way" -> ms or fields."""
    records = []
    for where, fields in timed["records"].items():
        part, label, way = where.split("/")
        fields = fields if isinstance(fields, dict) else {"ms": fields}
        records.append({"part": part, "label": label, "way": way, "tflops": 1.0} | fields)
    (found,) = (v for v in bars.judge(records) if v["text"] == text)
    return SimpleNamespace(**found)


@pytest.mark.parametrize(
    ("text", "records", "value", "met"),
    [
        (
            "MoE T=16k E=64 k=8 H=2048 I=1024 forward+backward: share of cuBLAS's rate",
            {"moe/E=64 k=8 training/dyncore": {"ms": 1, "tflops": 420}, "moe/E=64 k=8 training/cublas": {"ms": 1, "tflops": 800}},
            0.525,
            True,
        ),
        (
            "MoE T=16k E=8 k=2 H=4096 I=14336 forward: times as fast as grouped_mm, compiled or not",
            {"moe/E=8 k=2/dyncore": 10, "moe/E=8 k=2/grouped_mm": 12, "moe/E=8 k=2/grouped_mm_compiled": 10.5},
            1.05,
            False,
        ),
        ("few rows E=128 k=8 H=2816 I=704 T=64, graph, plan included: us", {"few_rows/E=128 k=8 T=64/dyncore": 0.41}, 410, True),
        ("few rows E=128 k=8 H=2816 I=704 T=1, graph, plan included: us", {"few_rows/E=128 k=8 T=64/dyncore": 0.41}, None, None),
        (
            "token-skip MLP T=16k H=4096 I=16384 keep=0.25: SE",
            {"token_skip/keep=0.25/dyncore": {"ms": 2, "slots": 4, "rows": 16}, "token_skip/keep=0.25/dense": 6.8},
            0.85,
            False,
        ),
        (
            "token-skip MLP keep=1, count known on the host: time over dense cuBLAS MLP",
            {"token_skip/keep=1/dyncore_host": 5.1, "token_skip/keep=1/dense": 5},
            1.02,
            True,
        ),
        ("plan making, route, T=16k: us", {"plans/route/dyncore": 0.031}, 31, False),
        ("nn.MoE forward T=64: kernels", {"layer/T=64/dyncore": {"ms": 1, "kernels": 6}}, 6, True),
        (
            "nn.MoE forward T=64: graph replay besides its kernels, us",
            {"layer/T=64/dyncore_graph": {"ms": 0.1, "kernels_ms": 0.085}},
            15,
            False,
        ),
    ],
)  # fmt: skip
def test_a_bar_is_judged_on_its_records(text, records, value, met):
    found = verdict(text, records=records)
    assert found.met is met
    assert found.value == (value if value is None else pytest.approx(value))


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here")
def test_without_a_gpu_it_says_so_and_fails(tmp_path, capsys):
    assert gpu.main(["--out", str(tmp_path / "new")]) == 2
    assert "no CUDA device was found" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
