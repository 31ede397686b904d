"""The whole record of savings: what stands beside the ratios, what an interrupt leaves, what is given back."""

import dataclasses
import itertools
import json
import sys
import time

import pytest
import torch
from torch import nn

import dyncore as dc
from dyncore.measure import GateSweep, SavingsError, Timing
from dyncore.measure.stages import CALLING, STAGES
from dyncore.measure.timing import Interleaved
from tests.measure.made import saved_with

environment_module = sys.modules["dyncore.measure.environment"]  # the package has a function of that name
SHORT = {"seconds": 1e-9, "min_rounds": 1}
QUICK = {**SHORT, "details": False}


@pytest.fixture(scope="module")
def whole():
    torch.manual_seed(0)
    layer = dc.nn.MixtureOfDepths(dc.nn.TransformerBlock(32, 2), capacity=0.25)
    return dc.measure.savings(layer.eval(), torch.randn(8, 16, 32), seconds=0.05)


def test_a_record_holds_all_baselines_and_details(whole):
    assert set(whole.flops) == set(whole.timings) == {"sparse", "masked", "dense", "naive", "smaller"}
    assert whole.baseline == "dense"
    assert whole.made["dense"] == "MixtureOfDepths replaced by dense modules"
    assert whole.flops["smaller"] == pytest.approx(whole.flops["sparse"], rel=0.03)
    assert whole.sweep.keep == (0.1, 0.25, 0.5, 0.75, 1.0)
    assert whole.overhead == whole.sweep.overhead
    assert whole.stages["computing"] > 0
    assert 0 < whole.peak_bytes["sparse"] < whole.peak_bytes["dense"]
    assert set(whole.batch_1) == {"sparse", "dense"}
    assert whole.errors == []
    assert whole.ceilings.gflops > whole.gflops > 0
    assert set(whole.unavailable) <= {"joules"}


def test_a_record_is_json_and_says_what_it_was_made_of(whole):
    record = json.loads(json.dumps(whole.record(), allow_nan=False))
    assert record["name"] == "MixtureOfDepths"
    assert record["dtype"] == "float32"
    assert record["phase"] == "forward"
    assert record["by_module"]["sparse"]["block"] == record["flops"]["sparse"] - 2 * 8 * 16 * 32  # of the router
    assert record["against"]["smaller"] == whole.timings["smaller"].median / whole.timings["sparse"].median
    assert record["sweep"]["keep"] == list(whole.sweep.keep)
    assert set(record["stages"]) == {*STAGES, CALLING}


def test_a_record_prints_what_stands_beside_the_ratios(whole):
    text = str(whole)
    for line in ("break-even: ", "time: ", "rate: ", "memory: sparse ", "one sample: sparse ", "the dense twin on "):
        assert line in text


def test_the_sweep_says_where_skipping_pays_and_what_it_costs_at_1():
    sweep = GateSweep((0.5, 1.0), (Timing((50,)), Timing((150,))), Timing((100,)))
    assert sweep.break_even == pytest.approx(0.75)
    assert sweep.overhead == pytest.approx(0.5)
    saved = dataclasses.replace(saved_with((50,), (100,)), sweep=sweep)
    assert "break-even: pays up to a share of 75%; +50% time where nothing is skipped" in str(saved)
    slow = GateSweep((0.5, 1.0), (Timing((110,)), Timing((150,))), Timing((100,)))
    assert "break-even: slower at every share" in str(dataclasses.replace(saved, sweep=slow))


def test_savings_of_a_mixture_of_depths_take_less_than_a_minute():
    blocks = [dc.nn.MixtureOfDepths(dc.nn.TransformerBlock(64, 4), capacity=0.25) for _ in range(2)]
    start = time.monotonic()
    dc.measure.savings(nn.Sequential(*blocks).eval(), torch.randn(4, 64, 64), seconds=0.2)
    assert time.monotonic() - start < 60


def test_one_sample_alone_is_the_first_of_each_input():
    seen = []

    def module(x, y):
        seen.append((x.shape[0], y.shape[0]))
        return x + y[: len(x)]

    saved = dc.measure.savings(module, torch.randn(4, 3), torch.randn(4, 3), **SHORT)
    assert set(saved.batch_1) == {"sparse", "masked"}
    assert (1, 1) in seen
    one = dc.measure.savings(module, torch.randn(1, 3), torch.randn(1, 3), **SHORT)
    assert one.unavailable["batch_1"] == "the batch is one sample already"


def test_what_was_measured_before_an_interrupt_stands():
    def module(x):
        if len(x) == 1:
            raise KeyboardInterrupt
        return x @ x.t()

    saved = dc.measure.savings(module, torch.randn(16, 8), **SHORT)
    assert saved.stages["computing"] > 0
    assert saved.batch_1 == {}
    assert saved.warnings[-1] == "interrupted: what is missing here was not measured"


@pytest.mark.parametrize("timed", [2, 5, 6])
def test_an_interrupt_keeps_the_rounds_before_it(monkeypatch, timed):
    calls = itertools.count()

    def interrupted(self, name, round):
        if next(calls) == 2 + timed:  # a round of warming up comes first
            raise KeyboardInterrupt
        return 100

    monkeypatch.setattr(Interleaved, "_time", interrupted)
    saved = dc.measure.savings(lambda x: x @ x, torch.randn(8, 8), seconds=0.01)
    assert [len(t.samples_ns) for t in saved.timings.values()] == [timed // 2] * 2
    assert saved.warnings[-1] == "interrupted: what is missing here was not measured"
    assert saved.sweep is None
    assert not saved.stages


def test_an_interrupt_before_all_were_timed_keeps_the_flops():
    calls = itertools.count()

    def module(x):
        if next(calls) == 4:
            raise KeyboardInterrupt
        return x @ x

    with pytest.raises(SavingsError, match="module: interrupted before each execution was timed") as caught:
        dc.measure.savings(module, torch.randn(8, 8), seconds=0.01)
    assert caught.value.partial["flops"]["sparse"] == 2 * 8**3
    assert isinstance(caught.value.__cause__, KeyboardInterrupt)


def test_a_module_that_takes_no_single_sample_keeps_the_rest():
    def module(x):
        if len(x) == 1:
            raise RuntimeError("more than 1 value per channel, please")
        return x + 1

    saved = dc.measure.savings(module, torch.randn(4, 3), **SHORT)
    assert saved.unavailable["batch_1"] == "one sample alone fails: RuntimeError: more than 1 value per channel, please"
    assert saved.errors == []


def test_buffers_that_forwards_change_are_given_back():
    norm = nn.BatchNorm1d(8)
    dc.measure.savings(norm, torch.randn(16, 8), dense=norm, **QUICK)
    assert int(norm.num_batches_tracked) == 0
    assert norm.running_mean.count_nonzero() == 0


class Counting(nn.Module):
    """With a state that each call replaces."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls = self.calls + 1
        return x + self.calls


def test_a_state_that_forwards_replace_is_given_back():
    module = Counting()
    state = module.calls
    saved = dc.measure.savings(module, torch.randn(4, 8), **QUICK)
    assert set(saved.timings) == {"sparse", "masked"}
    assert module.calls is state
    assert int(state) == 0


def test_an_input_that_is_changed_in_place_is_refused_and_given_back():
    x = torch.randn(4, 8)
    before = x.clone()
    with pytest.raises(SavingsError, match="module: it changes its input in place"):
        dc.measure.savings(nn.Sequential(nn.ReLU(inplace=True), nn.Linear(8, 8)), x, **QUICK)
    assert torch.equal(x, before)


def test_timing_goes_on_where_the_ratio_is_not_known(monkeypatch):
    intervals = iter([(0.5, 1.5), (0.99, 1.01), None])
    monkeypatch.setattr(sys.modules["dyncore.measure.savings"], "ratio_interval", lambda *timings: next(intervals))
    seconds = []

    def run(self, **options):
        seconds.append(options["seconds"])
        self.rounds += 5
        for samples in self.samples.values():
            samples += [100] * 5
        return self.timings()

    monkeypatch.setattr(Interleaved, "run", run)
    saved = dc.measure.savings(lambda x: x + 1, torch.randn(4), seconds=4.0, details=False)
    assert seconds == [4.0, 2.0]
    assert len(saved.timings["sparse"].samples_ns) == 10


def test_energy_is_of_one_sample(monkeypatch):
    monkeypatch.setattr(sys.modules["dyncore.measure.savings"], "joules", lambda run, device, seconds: 8.0)
    assert dc.measure.savings(lambda x: x + 1, torch.randn(4), **SHORT).joules == {"sparse": 2.0, "masked": 2.0}


@pytest.mark.parametrize(("spread", "noisy"), [(0.03, False), (0.08, True)])
def test_noise_is_told_from_5_percent_on(monkeypatch, spread, noisy):
    monkeypatch.setattr(
        sys.modules["dyncore.measure.savings_record"], "ratio_interval", lambda *t: (3 * (1 - spread), 3 * (1 + spread))
    )
    assert (saved_with((100,), (300,)).noise is not None) == noisy


def test_keyword_arguments_are_those_of_the_module():
    saved = dc.measure.savings(lambda x, scale: x * scale, torch.randn(4), kwargs={"scale": 2.0}, **QUICK)
    assert set(saved.timings) == {"sparse", "masked"}


def test_chosen_baselines_alone_are_measured():
    layer = dc.nn.Skip(nn.Linear(8, 8), lambda x: x[:, 0] > 0)
    saved = dc.measure.savings(layer, torch.randn(16, 8), baselines=("dense",), **QUICK)
    assert set(saved.timings) == {"sparse", "dense"}
    with pytest.raises(ValueError, match=r"baselines: expected some of dense, .*, got \['fast'\]"):
        dc.measure.savings(layer, torch.randn(16, 8), baselines=["fast"])
