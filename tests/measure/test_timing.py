"""Timing on a fake clock: order of the rounds, medians, spread, cold weights."""

import itertools

import pytest
import torch

from dyncore.measure import Interleaved, Timing, cold_copies
from dyncore.measure.timing import InterleavedOnDevice


class Clock:
    """Nanoseconds that pass only when work is done."""

    def __init__(self):
        self.now = 0

    def __call__(self):
        return self.now

    def work(self, nanoseconds):
        self.now += nanoseconds


def test_every_variant_runs_once_a_round_from_a_start_that_moves():
    clock, calls = Clock(), []
    timer = Interleaved({name: lambda name=name: calls.append(name) for name in "abc"}, clock=clock)
    for _ in range(4):
        timer.round()
    assert "".join(calls) == "abc" + "bca" + "cab" + "abc"


def test_on_a_device_a_sample_lies_between_two_events_behind_a_sleep(monkeypatch):
    log, device = [], Clock()

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            log.append("record")
            self.at = device.now

        def synchronize(self):
            log.append("synchronize")

        def elapsed_time(self, end):
            return (end.at - self.at) / 1e6

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: (log.append("sleep"), device.work(10**6)))
    timer = InterleavedOnDevice(
        {"a": lambda ns: (log.append("a"), device.work(ns))}, arguments=lambda n, r: (2500 + r,)
    )
    timer.round()
    timer.round()
    assert log == ["sleep", "record", "a", "record", "synchronize"] * 2
    assert timer.timings()["a"].samples_ns == (2500, 2501)


def test_samples_are_what_the_clock_says_and_medians_are_robust():
    clock = Clock()
    slow_once = itertools.chain([10, 20, 9000], itertools.repeat(30))
    timer = Interleaved({"steady": lambda: clock.work(100), "rough": lambda: clock.work(next(slow_once))}, clock=clock)
    timings = timer.run(seconds=0, min_rounds=4, warm_up=0)
    assert timings["steady"].samples_ns == (100,) * 4
    assert timings["rough"].samples_ns == (10, 20, 9000, 30)
    assert timings["rough"].median == pytest.approx(25e-9)
    assert timings["steady"].spread == 0


def test_a_machine_that_slows_down_slows_all_variants_alike():
    clock, drift = Clock(), itertools.count(1)

    def work():
        clock.work(1000 + next(drift))

    timings = Interleaved({"a": work, "b": work}, clock=clock).run(seconds=0, min_rounds=10, warm_up=0)
    assert timings["a"].median == pytest.approx(timings["b"].median, rel=1e-3)
    assert max(timings["a"].samples_ns) > min(timings["b"].samples_ns)


def test_warm_up_is_run_and_not_kept():
    clock, seen = Clock(), []

    def arguments(name, round):
        seen.append(round)
        return ()

    timer = Interleaved({"a": lambda: clock.work(1)}, arguments=arguments, clock=clock)
    timings = timer.run(seconds=0, min_rounds=3, warm_up=2)
    assert seen == [-2, -1, 0, 1, 2]
    assert len(timings["a"].samples_ns) == 3


def test_rounds_go_on_until_the_time_is_over():
    clock = Clock()
    timer = Interleaved({"a": lambda: clock.work(10**8)}, clock=clock)
    assert len(timer.run(seconds=1.0, min_rounds=2, warm_up=0)["a"].samples_ns) == 10
    timer = Interleaved({"a": lambda: clock.work(10**8)}, clock=clock)
    assert len(timer.run(seconds=1.0, min_rounds=2, max_rounds=4, warm_up=0)["a"].samples_ns) == 4
    timer = Interleaved({"a": lambda: clock.work(10**9)}, clock=clock)
    assert len(timer.run(seconds=1.0, min_rounds=3, warm_up=0)["a"].samples_ns) == 3


def test_past_the_limit_three_rounds_are_enough():
    clock = Clock()
    timer = Interleaved({"a": lambda: clock.work(10**9)}, clock=clock)
    assert len(timer.run(seconds=0.1, min_rounds=9, limit=2.0, warm_up=0)["a"].samples_ns) == 3
    timer = Interleaved({"a": lambda: clock.work(10**9)}, clock=clock)
    assert len(timer.run(seconds=0.1, min_rounds=9, limit=5.0, warm_up=0)["a"].samples_ns) == 5
    timer = Interleaved({"a": lambda: clock.work(10**9)}, clock=clock)
    assert len(timer.run(seconds=0.1, min_rounds=1, limit=0.0, warm_up=0)["a"].samples_ns) == 1


def test_arguments_are_made_outside_the_timed_region():
    clock = Clock()

    def arguments(name, round):
        clock.work(10**6)
        return (round,)

    timer = Interleaved({"a": lambda round: clock.work(5 + round)}, arguments=arguments, clock=clock)
    assert timer.run(seconds=0, min_rounds=2, warm_up=0)["a"].samples_ns == (5, 6)


def test_the_device_is_waited_for_before_each_reading():
    events = []
    timer = Interleaved(
        {"a": lambda: events.append("run")},
        synchronize=lambda: events.append("wait"),
        clock=lambda: events.append("read") or 0,
    )
    timer.round()
    assert events == ["wait", "read", "run", "wait", "read"]


def test_spread_is_the_interquartile_range_over_the_median():
    assert Timing((100, 200, 300, 400, 500)).spread == pytest.approx(200 / 300)
    assert Timing((100,)).spread == 0
    assert Timing((1_500_000,)).record() == {"median_ms": 1.5, "spread": 0.0, "samples_ns": [1_500_000]}


def test_cold_copies_exceed_the_cache_twice_and_are_equal():
    weights = (torch.randn(100), torch.randn(50, dtype=torch.float64, requires_grad=True))  # 800 bytes
    copies = cold_copies(weights, cache_bytes=1000)
    assert len(copies) == 3
    assert copies[0] is weights
    assert len({c[0].data_ptr() for c in copies}) == 3
    assert all(torch.equal(a, b) for c in copies for a, b in zip(c, weights, strict=True))
    assert all(c[1].requires_grad and c[1].is_leaf and not c[0].requires_grad for c in copies)


def test_weights_larger_than_two_caches_need_no_copy():
    assert len(cold_copies(torch.randn(1000), cache_bytes=1000)) == 1
    assert len(cold_copies((), cache_bytes=1000)) == 1


def test_counts_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="variants: expected at least one"):
        Interleaved({})
    with pytest.raises(ValueError, match=r"min_rounds: expected 1\.\.max_rounds=4, got 5"):
        Interleaved({"a": list}).run(min_rounds=5, max_rounds=4)
    with pytest.raises(ValueError, match="warm_up: expected a number >= 0, got -1"):
        Interleaved({"a": list}).run(warm_up=-1)
    with pytest.raises(ValueError, match="samples_ns: expected at least one sample"):
        Timing(())
