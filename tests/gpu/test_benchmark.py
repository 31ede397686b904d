"""benchmarks.gpu at tiny sizes on the CPU: everything but the GPU, so that an unattended run on one does not fail."""

import json
import statistics
import tarfile

import pytest
import torch

from benchmarks import gpu
from benchmarks.gpu_cases import CASES, Inputs, error, ways

CPU = torch.device("cpu")
TINY = [c.tiny() for c in CASES]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(exit code, folder) of a whole run."""
    out = tmp_path_factory.mktemp("results")
    return gpu.main(["--out", str(out), "--device", "cpu", "--quick"]), out


def test_every_part_leaves_samples_and_an_archive(run):
    code, out = run
    results = json.loads((out / "results.json").read_text())
    assert code == 0
    assert {"commit", "device", "torch", "triton", "time"} <= results["machine"].keys()
    assert {r["part"] for r in results["records"]} == set(gpu.PARTS) - {"tests"}
    for r in results["records"]:
        if "left_out" not in r:
            assert len(r["samples_ms"]) >= gpu.ROUNDS[0]
            assert r["ms"] == statistics.median(r["samples_ms"]) > 0
    with tarfile.open(out / "dyncore-gpu.tar.gz") as tar:
        assert {"results.json", "summary.txt"} <= set(tar.getnames())


def test_every_case_times_dyncore_and_its_rivals(run):
    records = json.loads((run[1] / "results.json").read_text())["records"]
    for part, rivals in (("token_skip", {"dense", "naive"}), ("moe", {"dense", "loop", "grouped_mm"})):
        timed = {r["way"] for r in records if r["part"] == part and "ms" in r}
        assert timed == {"dyncore", "dyncore_planned"} | rivals
    graphs = [r for r in records if r["part"] == "few_rows" and r["way"] == "loop"]
    assert graphs
    assert all("waits for the device" in r["left_out"] for r in graphs)


def test_flops_are_those_of_the_live_slots(run):
    records = json.loads((run[1] / "results.json").read_text())["records"]
    quarter = next(r for r in records if r["part"] == "token_skip" and "keep=0.25" in r["case"] and r["way"] == "naive")
    assert quarter["flops"] == 2 * 12 * 32 * 48
    assert quarter["tflops"] == pytest.approx(quarter["flops"] / quarter["ms"] / 1e9)
    dense = next(r for r in records if r["case"] == quarter["case"] and r["way"] == "dense")
    assert dense["flops"] == 2 * 48 * 32 * 48


def test_one_part_alone(tmp_path):
    assert gpu.main(["--out", str(tmp_path), "--device", "cpu", "--quick", "--part", "plans"]) == 0
    records = json.loads((tmp_path / "results.json").read_text())["records"]
    assert {r["part"] for r in records} == {"plans"}


@pytest.mark.parametrize("case", dict.fromkeys(TINY), ids=lambda c: c.name)
def test_all_ways_agree(case):
    inputs = Inputs(case, CPU)
    for way, call in ways(inputs).items():
        assert way == "dense" or error(inputs, call(0), samples=case.rows) <= gpu.TOLERANCE[case.dtype]


def test_an_error_is_seen():
    inputs = Inputs(TINY[-1], CPU)
    out = ways(inputs)["dyncore"](0)
    assert error(inputs, out + out.abs().max() / 2) > gpu.TOLERANCE[torch.bfloat16]
    out[0, 0] = float("nan")
    assert not error(inputs, out) <= gpu.TOLERANCE[torch.bfloat16]


def test_a_way_with_wrong_values_is_not_timed(monkeypatch):
    monkeypatch.setattr(gpu, "ways", lambda inputs: {**ways(inputs), "naive": lambda i: ways(inputs)["naive"](i) + 1})
    records = gpu.measure_case(TINY[0], CPU, 0.01)
    (naive,) = (r for r in records if r["way"] == "naive")
    assert "wrong values" in naive["left_out"]
    assert "ms" not in naive


def test_a_rival_that_raises_is_left_out(monkeypatch):
    def broken(i):
        raise NotImplementedError("not on this machine")

    monkeypatch.setattr(gpu, "ways", lambda inputs: {"dyncore": ways(inputs)["dyncore"], "rival": broken})
    records = gpu.measure_case(TINY[0], CPU, 0.01)
    assert [(r["way"], "ms" in r) for r in records] == [("rival", False), ("dyncore", True)]
    assert "not on this machine" in records[0]["left_out"]


def test_a_failure_of_dyncore_fails_the_run_but_not_the_other_cases(monkeypatch, tmp_path):
    real = gpu.measure_case

    def failing(case, *rest):
        if case.part == "moe":
            raise RuntimeError("out of memory")
        return real(case, *rest)

    monkeypatch.setattr(gpu, "measure_case", failing)
    assert gpu.main(["--out", str(tmp_path), "--device", "cpu", "--quick"]) == 1
    records = json.loads((tmp_path / "results.json").read_text())["records"]
    assert all("out of memory" in r["left_out"] for r in records if r["part"] == "moe")
    assert any("ms" in r for r in records if r["part"] == "few_rows")


def test_a_sanitizer_that_is_missing_slow_or_unhappy(monkeypatch, tmp_path):
    tool = tmp_path / "compute-sanitizer"

    def run(script):
        tool.write_text(f"#!/bin/sh\n{script}\n")
        tool.chmod(0o755)
        return gpu.run_sanitizer(tmp_path, "memcheck")

    monkeypatch.setattr(gpu.shutil, "which", lambda name: None)
    assert "not installed" in run("")["left_out"]
    monkeypatch.setattr(gpu.shutil, "which", lambda name: str(tool))
    assert run('echo "========= ERROR SUMMARY: 3 errors"; exit 9')["code"] == 9
    clean = run('echo "========= ERROR SUMMARY: 0 errors"')
    assert (clean["code"], clean["summary"]) == (0, "ERROR SUMMARY: 0 errors")
    assert "ERROR SUMMARY" in (tmp_path / "memcheck.log").read_text()
    monkeypatch.setattr(gpu, "SANITIZER_SECONDS", 0.1)
    assert "stopped" in run("exec sleep 5")["left_out"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here")
def test_without_a_gpu_it_says_so_and_fails(tmp_path, capsys):
    assert gpu.main(["--out", str(tmp_path / "new")]) == 2
    assert "no CUDA device was found" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
