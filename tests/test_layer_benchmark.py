"""benchmarks/layers: what it counts, what it forces, and that it notices a layer that is wrong."""

import dataclasses

import pytest
import torch
from torch import nn

from benchmarks.layers import Forced, Mechanism
from benchmarks.layers import __main__ as program
from dyncore.measure import read_results
from dyncore.nn import MLP, Skip


def mechanism(at=None) -> Mechanism:
    torch.manual_seed(0)
    skip = at or (lambda keep: Skip(MLP(8, 16), Forced(keep)))
    return Mechanism("Skip", lambda: MLP(8, 16), skip, lambda one: (torch.randn(1 if one else 64, 8),))


@pytest.mark.parametrize("keep", [0.0, 0.25, 0.5, 1.0])
def test_forced_rows_are_a_share_on_average_and_repeat_after_a_restart(keep):
    gate = Forced(keep)
    x = torch.randn(64, 3)
    first = gate(x)
    assert abs(int(first.sum()) - 64 * keep) <= 2
    singles = torch.cat([gate(x[:1]) for _ in range(200)])
    assert abs(float(singles.float().mean()) - keep) <= 0.02
    gate.restart()
    assert torch.equal(gate(x), first)
    assert Forced(0.5, dims=2)(torch.randn(2, 5, 3)).shape == (2, 5)


def test_records_hold_flops_and_ratios_of_each_share():
    records, errors = program.measure(mechanism(), seconds=0.02)
    assert not errors
    dense = 2 * 64 * 2 * 8 * 16
    assert {r["flops"]["dense"] for r in records} == {dense}
    for r in records:
        assert abs(r["flops"]["executed"] - r["keep_ratio"] * dense) <= 2 * dense / 64
        ratio = r["variants"]["dense"]["median_ms"] / r["variants"]["dyncore"]["median_ms"]
        assert r["wall_clock_speedup"] == pytest.approx(ratio)
    assert [r["keep_ratio"] for r in records] == [1.0, 0.75, 0.5, 0.25, 0.1, 0.0]


def test_bars_are_judged_by_the_records():
    records, _ = program.measure(mechanism(), seconds=0.02)
    for place, r in enumerate(records):
        r["variants"]["dyncore"]["median_ms"] = 6.0 - place
        r["se"], r["wall_clock_speedup"] = 0.8, 0.97
    assert all(program.bars(records)["met"].values())
    records[1]["variants"]["dyncore"]["median_ms"] = 6.0
    records[3]["se"], records[0]["wall_clock_speedup"] = 0.79, 0.96
    assert not any(program.bars(records)["met"].values())


def test_a_layer_that_differs_between_executions_is_an_error(tmp_path, monkeypatch):
    class Wrong(nn.Module):
        def forward(self, x):
            return x + (program.mode() == "masked")

    monkeypatch.setattr(program, "mechanisms", lambda: iter([mechanism(lambda keep: Wrong())]))
    out = tmp_path / "layers.json"
    assert program.main(["--out", str(out), "--seconds", "0.01"]) == 1
    assert "sparse and masked" in read_results(out)["errors"][0]["message"]


def test_a_run_of_one_mechanism_keeps_the_records_of_the_others(tmp_path, monkeypatch):
    both = [mechanism(), dataclasses.replace(mechanism(), name="Other")]
    monkeypatch.setattr(program, "mechanisms", lambda: iter(both))
    out = tmp_path / "layers.json"
    assert program.main(["--out", str(out), "--seconds", "0.01"]) == 0
    assert program.main(["--out", str(out), "--seconds", "0.01", "--only", "Skip"]) == 0
    results = read_results(out)
    assert [r["mechanism"] for r in results["records"]] == ["Other"] * 6 + ["Skip"] * 6
    assert [bar["mechanism"] for bar in results["bars"]] == ["Other", "Skip"]


def test_every_family_names_its_mechanisms_once():
    names = [m.name for m in program.mechanisms()]
    assert names
    assert len(names) == len(set(names))
