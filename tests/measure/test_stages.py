"""Stages of a call, the bytes that it moves, its memory."""

import sys
import time

import pytest
import torch
from torch import nn

import dyncore as dc
from dyncore.measure.calls import Call
from dyncore.measure.stages import CALLING, STAGES, profile
from dyncore.measure.timing import Interleaved

environment_module = sys.modules["dyncore.measure.environment"]  # the package has a function of that name
SHORT = {"seconds": 1e-9, "min_rounds": 1}
QUICK = {**SHORT, "details": False}


def profiled(module, *inputs, backward=False):
    return profile(Call(module, inputs, {}, "sparse", backward))


def test_a_dear_gate_is_time_spent_deciding():
    gate = nn.Sequential(nn.Linear(64, 2048), nn.ReLU(), nn.Linear(2048, 1))
    found = profiled(dc.nn.Skip(nn.Linear(64, 64), dc.nn.ThresholdGate(gate)).eval(), torch.randn(512, 64))
    assert found.stages["deciding"] > 0.5
    assert sum(found.stages.values()) == pytest.approx(1)


def test_the_stages_of_a_layer_that_moves_its_rows():
    module = nn.Sequential(nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 64))
    found = profiled(dc.nn.Skip(module, lambda x: x[:, 0] > 0), torch.randn(512, 64))
    assert list(found.stages) == [*STAGES, CALLING]
    assert all(found.stages[stage] > 0 for stage in STAGES)
    assert found.stages["computing"] == max(found.stages.values())
    assert found.ops >= 2


def test_a_module_without_skipping_computes_alone():
    found = profiled(nn.Linear(64, 64), torch.randn(128, 64))
    assert {name for name, share in found.stages.items() if share} - {CALLING} == {"computing"}
    assert found.ops == 0


def test_time_between_the_ops_is_a_stage_of_its_own():
    linear = nn.Linear(8, 8)
    found = profiled(lambda x: (linear(x), time.sleep(0.02))[0], torch.randn(4, 8))
    assert found.stages[CALLING] > 0.9


def test_stages_are_shares_of_a_call_of_that_moment(monkeypatch):
    monkeypatch.setattr(Interleaved, "_time", lambda self, name, round: 10**9)  # a machine that was busy just before
    saved = dc.measure.savings(lambda x: x @ x @ x, torch.randn(256, 256), baselines=("masked",), **SHORT)
    assert saved.timings["sparse"].median == 1
    assert saved.stages["computing"] > 0.1


def test_a_backward_is_profiled_by_the_names_of_its_ops():
    layer = dc.nn.Skip(nn.Linear(64, 64), lambda x: x[:, 0] > 0)
    found = profiled(layer, torch.randn(128, 64, requires_grad=True), backward=True)
    assert found.stages["scattering"] > 0
    assert layer.module.weight.grad is None


def test_bytes_are_those_that_ops_read_and_write():
    found = profiled(nn.Linear(64, 32), torch.randn(128, 64))
    assert found.bytes == 4 * (128 * 64 + 64 * 32 + 32 + 128 * 32)


def test_weights_of_groups_that_no_row_comes_to_are_not_read():
    w_in, w_out, x = torch.randn(4, 8, 16), torch.randn(4, 16, 8), torch.randn(10, 16)
    counts = []
    for expert in (torch.zeros(10, 1, dtype=torch.int64), (torch.arange(10) % 4)[:, None]):
        plan = dc.route(expert, num_groups=4)
        counts.append(profiled(lambda x, plan=plan: dc.grouped_mlp(x, w_in, w_out, plan=plan), x).bytes)
    assert counts[1] - counts[0] == 4 * 3 * 2 * 8 * 16


def test_peak_memory_is_of_tensors_alive_at_one_time():
    def chain(x):
        return (x + 1).relu().sum()  # two of x's size at most, beside x

    assert profiled(chain, torch.randn(1000)).peak_bytes == 2 * 4000
