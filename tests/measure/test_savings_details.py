"""What stands beside the ratios of savings: stages, bytes, memory, ceilings, energy, one sample, noise; and bad input."""

import dataclasses
import itertools
import json
import sys
import time
import types
import warnings

import pytest
import torch
from torch import nn

import dyncore as dc
from dyncore.execution import mode
from dyncore.measure import GateSweep, Savings, SavingsError, Timing, energy, on_gpu
from dyncore.measure.calls import Call, tensors
from dyncore.measure.ceilings import ceilings
from dyncore.measure.row_masks import masked_layers
from dyncore.measure.stages import CALLING, STAGES, profile
from dyncore.measure.timing import Interleaved, InterleavedCold, ratio_interval

environment_module = sys.modules["dyncore.measure.environment"]  # the package has a function of that name
SHORT = {"seconds": 1e-9, "min_rounds": 1}
QUICK = {**SHORT, "details": False}


def profiled(module, *inputs, backward=False):
    return profile(Call(module, inputs, {}, "sparse", backward))


# Stages, bytes, memory


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


# Timing, ceilings, energy


def test_the_interval_of_a_ratio_holds_it_and_says_how_far_it_is_known():
    generator = torch.Generator().manual_seed(3)
    noise = (1 + 0.1 * torch.rand(40, generator=generator)).tolist()
    slow, fast = Timing(tuple(int(3e6 * n) for n in noise)), Timing(tuple(int(1e6 * n) for n in reversed(noise)))
    low, high = ratio_interval(slow, fast)
    assert low < 3 < high
    assert high - low < 0.3
    assert ratio_interval(slow, fast) == (low, high)
    assert ratio_interval(Timing((1, 2, 3, 4)), fast) is None


def test_what_slows_a_whole_round_down_widens_no_interval():
    drift = [int(1e6 * (1 + i % 5)) for i in range(40)]
    assert ratio_interval(Timing(tuple(2 * t for t in drift)), Timing(tuple(drift))) == (2.0, 2.0)


def test_the_work_of_others_is_that_of_all_cores_without_ones_own(monkeypatch, tmp_path):
    stat, seconds = tmp_path / "stat", [(0.0, 10.0), (1.0, 12.0), (1.5, 14.0), (1.5, 14.05)]
    stat.write_text("cpu  100 0 100 5000 7 0 0 0 0 0\ncpu0 1 2 3\n")
    own, clock = zip(*seconds, strict=True)
    monkeypatch.setattr(environment_module, "_STAT", stat)
    monkeypatch.setattr(environment_module.os, "sysconf", lambda name: 100)
    monkeypatch.setattr(environment_module.os, "cpu_count", lambda: 2)
    monkeypatch.setattr(environment_module.time, "process_time", iter(own).__next__)
    monkeypatch.setattr(environment_module.time, "perf_counter", iter(clock).__next__)
    others = environment_module.OtherWork()
    stat.write_text("cpu  200 50 150 9000 9 0 0 100 0 0\ncpu0 1 2 3\n")  # 3 s of work, 1 of them ours, in 2 s
    assert others.cores() == 1.0
    stat.write_text("cpu  250 0 150 9000 9 0 0 0 0 0\n")
    assert others.warning() is None  # 2 s of work, 1.5 of them ours, in 4 s: 0.125 of 2 cores
    assert others.cores() is not None
    stat.unlink()
    assert others.cores() is None
    assert environment_module.OtherWork().warning() is None


def test_work_of_others_is_told(monkeypatch):
    monkeypatch.setattr(environment_module.OtherWork, "cores", lambda self: 1.7)
    monkeypatch.setattr(environment_module.os, "cpu_count", lambda: 2)
    saved = dc.measure.savings(lambda x: x + 1, torch.randn(4), **QUICK)
    assert "other programs kept 1.7 of 2 cores busy during the timing: ratios may be off" in saved.warnings


def saved_with(sparse, masked, flops=(25, 100)):
    return Savings(
        {"sparse": flops[0], "masked": flops[1]}, {"sparse": Timing(sparse), "masked": Timing(masked)}, "masked"
    )


def test_a_difference_within_the_noise_is_called_so():
    rough = tuple(100 + 40 * (i % 7) for i in range(20))
    saved = saved_with(rough, rough[::-1])
    assert saved.noise.startswith("within noise: the wall-clock speed-up lies in ")
    assert saved.noise in str(saved)
    noisy = saved_with(tuple(t // 4 for t in rough), rough[::-1])
    assert noisy.noise.startswith("noisy: SE is known to ±")
    assert saved_with((100,) * 20, (300,) * 20).noise is None
    assert saved_with((100,) * 20, (300,) * 20).interval == (3.0, 3.0)
    assert (
        saved_with((100,), (300,)).noise
        == "noise is not known: 1 round alone; SE may be far off, more seconds would say"
    )
    few = saved_with((1, 9, 30), (5, 50, 90))
    assert few.noise == "noise is not known: 3 rounds alone; SE may be far off, more seconds would say"
    assert few.noise in str(few)


def test_where_all_was_skipped_or_nothing_multiplies_there_is_no_se():
    all_skipped = saved_with((100,) * 5, (300,) * 5, flops=(0, 100))
    assert all_skipped.se is None
    assert all_skipped.record()["se"] is None
    assert all_skipped.record()["flop_speedup"] is None
    assert "FLOPs all skipped, wall clock 3.00x, SE - (nothing was executed)" in str(all_skipped)
    nothing = saved_with((100, 100, 130) * 5, (100, 130, 100) * 5, flops=(0, 0))
    assert (nothing.flop_speedup, nothing.rsr) == (1.0, None)
    assert "FLOPs 1.00x" in str(nothing)
    assert "SE - (no matrix products are counted)" in str(nothing)
    assert "within noise" not in str(nothing)
    added = saved_with((100,) * 5, (100,) * 5, flops=(100, 0))
    assert (added.flop_speedup, added.se, added.rsr) == (0.0, None, None)
    assert "FLOPs 0.00x" in str(added)


def test_on_a_gpu_samples_are_cold_and_lie_between_events(monkeypatch):
    log = []

    class Event:
        def __init__(self, enable_timing):
            pass

        def record(self):
            log.append("record")

        def synchronize(self):
            log.append("wait")

        def elapsed_time(self, end):
            return 0.5

    class Swept:
        def zero_(self):
            log.append("sweep")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: log.append("synchronize"))
    timer = InterleavedCold({"a": lambda: log.append("a")})
    timer._swept = Swept()
    timer.round()
    assert log == ["synchronize", "sweep", "record", "a", "record", "wait"]
    assert timer.timings()["a"].samples_ns == (500_000,)


def test_on_a_cpu_caches_are_swept_before_a_sample_where_asked_for(monkeypatch):
    module = sys.modules["dyncore.measure.timing"]
    monkeypatch.setattr(module, "last_level_cache", lambda: 1000)
    buffers, zeros = [], torch.zeros
    monkeypatch.setattr(
        module.torch, "zeros", lambda *args, **kwargs: buffers.append(zeros(*args, **kwargs)) or buffers[0]
    )
    seen = []
    timer = module.timer(
        {"a": lambda n: seen.append((n, int(buffers[0][-1])))}, torch.device("cpu"), lambda name, r: (r,), cold=True
    )
    timer.round()
    timer.round()
    assert buffers[0].shape == (2000,)
    assert seen == [(0, 1), (1, 2)]


def test_host_syncs_are_torchs_warnings(monkeypatch):
    modes = ["default"]
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)

    def module():
        warnings.warn("called a synchronizing CUDA operation", UserWarning, stacklevel=2)
        warnings.warn("something else", UserWarning, stacklevel=2)
        return torch.zeros(1)

    assert on_gpu.host_syncs(Call(module, (), {})) == 1
    assert modes == ["default", "warn", 0]


def test_ceilings_are_measured_once(monkeypatch):
    monkeypatch.setattr("dyncore.measure.ceilings._SECONDS", 0.01)
    found = ceilings(torch.device("cpu"), torch.float64)
    assert found.gflops > 0
    assert found.gbs > 0
    assert ceilings(torch.device("cpu"), torch.float64) is found


def test_ceilings_are_2_flops_a_multiply_add_and_bytes_both_ways(monkeypatch):
    module = sys.modules["dyncore.measure.ceilings"]
    monkeypatch.setattr(module, "_shortest", lambda run, device: 1.0)
    monkeypatch.setattr(module, "last_level_cache", lambda: 1000)
    found = module._measured.__wrapped__(torch.device("cpu"), torch.float32, 1)
    assert found == (2 * 768**3 / 1e9, 2 * 2**26 / 1e9)


def package(root, number, microjoules):
    folder = root / f"intel-rapl:{number}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "max_energy_range_uj").write_text("999999\n")
    (folder / "energy_uj").write_text(f"{microjoules}\n")
    return folder / "energy_uj"


def test_joules_are_the_counters_of_all_packages_over_the_runs(monkeypatch, tmp_path):
    files = package(tmp_path, 0, 999_000), package(tmp_path, 1, 5_000)
    (tmp_path / "intel-rapl:0:0").mkdir()  # a part of package 0
    monkeypatch.setattr(energy, "_POWERCAP", tmp_path)
    used = itertools.count(1)

    def run():
        n = next(used)
        files[0].write_text(str((999_000 + 3_000 * n) % 1_000_000))  # starts again at 0
        files[1].write_text(str(5_000 + 1_000 * n))

    assert energy.joules(run, torch.device("cpu"), 0.0) == pytest.approx(4_000e-6)
    assert next(used) == 4


def test_no_energy_without_counters_and_the_reason_is_said(monkeypatch, tmp_path):
    monkeypatch.setattr(energy, "_POWERCAP", tmp_path / "nothing")
    with pytest.raises(energy.NoMeter, match="shows no RAPL counters"):
        energy.meter(torch.device("cpu"))
    package(tmp_path, 0, 0).write_text("not a number")
    monkeypatch.setattr(energy, "_POWERCAP", tmp_path)
    with pytest.raises(energy.NoMeter, match="RAPL counters cannot be read"):
        energy.meter(torch.device("cpu"))
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with pytest.raises(energy.NoMeter, match="nvidia-ml-py, which is not installed"):
        energy.meter(torch.device("cuda"))


def test_a_gpu_tells_its_energy_by_nvml(monkeypatch):
    spent = itertools.count(1000, 500)
    nvml = types.SimpleNamespace(
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID={"GPU-1234": 7}.__getitem__,
        nvmlDeviceGetTotalEnergyConsumption=lambda handle: next(spent) if handle == 7 else None,
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: types.SimpleNamespace(uuid="1234"))
    read = energy.meter(torch.device("cuda"))
    assert (read(), read()) == (1.5, 2.0)


# The whole record


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


# What looks dynamic, and bad input


class Fake(nn.Module):
    def __init__(self):
        super().__init__()
        self.f = nn.Linear(16, 16)

    def forward(self, x):
        return x + (torch.arange(len(x)) % 4 == 0)[:, None] * self.f(x)


def test_a_masked_layer_is_exposed():
    saved = dc.measure.savings(nn.Sequential(Fake()), torch.randn(16, 16), **QUICK)
    assert saved.flop_speedup == 1
    assert saved.notes[0].startswith(
        "0.f (Linear) computes every row, and a mask then makes 0 of 75% of them: its FLOP"
    )
    assert "speed-up is 1.0 and it saves nothing" in str(saved)


class Spelled(nn.Module):
    """A layer and a way to multiply what it computes by a mask."""

    def __init__(self, layer, way):
        super().__init__()
        self.layer, self.way = layer, way

    def forward(self, x):
        return self.way(self.layer, x)


def rows(x):
    return (torch.arange(len(x)) % 4 == 0).float()[:, None]


def places(x):
    return (torch.arange(x[0, 0].numel()) % 4 == 0).float().view(1, 1, *x.shape[2:]).expand(len(x), -1, -1, -1)


def zeroed(f, x):
    y = f(x)
    y[rows(x)[:, 0] == 0] = 0.0
    return x + y


SPELLINGS = {
    "after an activation": lambda f, x: x + rows(x) * nn.functional.relu(f(x)),
    "of the difference": lambda f, x: x + rows(x) * (f(x) - x),
    "of the sum": lambda f, x: (x + f(x)) * rows(x) + x * (1 - rows(x)),
    "lerp": lambda f, x: torch.lerp(x, f(x), rows(x)),
    "addcmul": lambda f, x: torch.addcmul(x, rows(x), f(x)),
    "rows set to 0": zeroed,
    "of a view": lambda f, x: (f(x).view(4, 4, 8) * rows(x).view(4, 4, 1)).view(16, 8),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_mask_is_seen_however_it_is_spelled(spelling):
    (masked,) = masked_layers(Call(Spelled(nn.Linear(8, 8), SPELLINGS[spelling]), (torch.randn(16, 8),), {}))
    assert masked.layer == "layer"
    assert masked.what == "rows"
    assert masked.mask.double().mean() == 0.25


def test_a_block_that_ends_in_an_activation_is_named_by_what_computes():
    model = nn.Sequential(nn.Linear(8, 8), Spelled(nn.ReLU(), lambda f, x: f(x) * rows(x)))
    assert [masked.layer for masked in masked_layers(Call(model, (torch.randn(16, 8),), {}))] == ["0"]


def test_masks_of_places_and_channels_are_told():
    fake = Spelled(nn.Conv2d(4, 4, 3, padding=1), lambda f, x: x + places(x) * f(x))
    saved = dc.measure.savings(fake, torch.randn(2, 4, 4, 4), **QUICK)
    assert saved.notes[0].startswith("layer (Conv2d) computes every place, and a mask then makes 0 of 75% of them")
    narrow = Spelled(nn.Linear(8, 8), lambda f, x: (torch.arange(8) < 2) * f(x))
    saved = dc.measure.savings(narrow, torch.randn(4, 8), **QUICK)
    assert saved.notes[0].startswith("layer (Linear) computes every channel, and a mask then makes 0 of 75% of them")


def test_what_is_no_mask_of_a_layer_is_none():
    gain = nn.Parameter(torch.zeros(8))  # as residual blocks start with
    for way in (
        lambda f, x: x + gain * f(x),
        lambda f, x: f(x).masked_fill(rows(x) == 0, -torch.inf),
        lambda f, x: f(x) * nn.functional.relu(x),
        lambda f, x: rows(x) * (f(x).t() @ f(x))[:1],
    ):
        assert masked_layers(Call(Spelled(nn.Linear(8, 8), way), (torch.randn(16, 8),), {})) == []


def test_masked_layers_alike_share_a_sentence():
    saved = dc.measure.savings(nn.Sequential(*[Fake() for _ in range(8)]), torch.randn(16, 16), **QUICK)
    (note,) = saved.notes
    assert note.startswith("0.f (Linear), 1.f (Linear), 2.f (Linear) and 5 more compute every row, and a mask then")


def test_a_layer_that_skips_is_not_taken_for_a_masked_one():
    saved = dc.measure.savings(dc.nn.Skip(nn.Linear(8, 8), lambda x: x[:, 0] > 0), torch.randn(16, 8), **QUICK)
    assert saved.notes == []


def test_a_module_without_a_dynamic_layer_is_measured_and_told():
    saved = dc.measure.savings(nn.Sequential(nn.Linear(8, 8)), torch.randn(16, 8), **SHORT)
    assert saved.notes == ["nothing in it is dynamic: it calls no op of dyncore, and there is nothing to skip"]
    assert saved.flops == {"sparse": 16 * 2 * 64, "masked": 16 * 2 * 64}
    assert set(saved.unavailable) >= {"dense", "naive", "smaller", "break_even"}
    assert "dense   not measured: no layer of dyncore.nn in it to replace" in str(saved)


class Failing(nn.Module):
    def __init__(self, error, where="sparse"):
        super().__init__()
        self.error, self.where = error, where

    def forward(self, x):
        if mode() == self.where:
            raise self.error
        return x


def test_a_module_that_fails_is_named():
    model = nn.Sequential(nn.Linear(8, 8), nn.Sequential(Failing(IndexError("no such row"))))
    with pytest.raises(SavingsError, match=r"module: failed in 1\.0 \(Failing\): IndexError: no such row") as caught:
        dc.measure.savings(model, torch.randn(4, 8), **QUICK)
    assert isinstance(caught.value, ValueError)
    assert caught.value.partial["errors"][0]["message"].endswith("IndexError: no such row")
    assert isinstance(caught.value.__cause__, IndexError)


def test_a_gpu_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    model = nn.Sequential(Failing(AssertionError("Torch not compiled with CUDA enabled")))
    with pytest.raises(SavingsError, match=r"failed in 0 \(Failing\): .* \(it wants a GPU, and there is none here\)"):
        dc.measure.savings(model, torch.randn(4, 8), **QUICK)


def test_where_masked_execution_fails_the_dense_twin_stands():
    model = nn.Sequential(
        Failing(RuntimeError("no mask"), "masked"), dc.nn.Skip(nn.Linear(8, 8), lambda x: x[:, 0] > 0)
    )
    saved = dc.measure.savings(model, torch.randn(16, 8), dense=nn.Linear(8, 8), **QUICK)
    assert saved.baseline == "dense"
    assert saved.unavailable["masked"] == "masked execution failed in 0 (Failing): RuntimeError: no mask"
    assert saved.errors[0]["variant"] == "masked"


def test_without_any_baseline_there_is_nothing_to_report():
    with pytest.raises(SavingsError, match=r"module: nothing to compare with: .*no mask"):
        dc.measure.savings(Failing(RuntimeError("no mask"), "masked"), torch.randn(16, 8), **QUICK)


def test_a_dense_twin_that_fails_is_named():
    with pytest.raises(SavingsError, match=r"dense: failed in Linear: RuntimeError"):
        dc.measure.savings(nn.Linear(8, 8), torch.randn(4, 8), dense=nn.Linear(9, 9), **QUICK)


class Differing(nn.Module):
    def __init__(self, change):
        super().__init__()
        self.change = change
        self.weight = nn.Parameter(torch.ones(8))

    def forward(self, x):
        return self.change(x * self.weight) if mode() == "sparse" else x * self.weight


def test_the_first_layer_that_differs_between_modes_is_named():
    model = nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8), Differing(lambda x: x + 1)), nn.Linear(8, 8))
    text = r"module: output 0 differs between sparse and masked execution \(the first layer to differ: 1\.1 \(Differing\)\)"
    with pytest.raises(SavingsError, match=text) as caught:
        dc.measure.savings(model, torch.randn(4, 8), **QUICK)
    assert caught.value.partial["flops"]["sparse"] == 4 * 3 * 2 * 64


def test_what_differs_inside_of_a_dynamic_layer_is_named_by_it():
    layer = dc.nn.Skip(nn.BatchNorm1d(8), lambda x: x[:, 0] > 0)
    with pytest.raises(SavingsError, match=r"the first layer to differ: 1 \(Skip\)"):
        dc.measure.savings(nn.Sequential(nn.Linear(8, 8), layer), torch.randn(32, 8), **QUICK)


def test_a_shape_that_changes_between_modes_is_said():
    with pytest.raises(SavingsError, match=r"output 0 differs .*Differing.* shape \[3, 8\], expected \[4, 8\]"):
        dc.measure.savings(Differing(lambda x: x[:3]), torch.randn(4, 8), **QUICK)
    with pytest.raises(SavingsError, match=r"module: 2 outputs, expected 1"):
        dc.measure.savings(lambda x: (x, x) if mode() == "sparse" else x, torch.randn(4, 8), **QUICK)


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad


def test_a_gradient_that_differs_is_named_by_its_parameter():
    model = nn.Sequential(Differing(Doubled.apply))
    with pytest.raises(SavingsError, match=r"gradient 0 of 0\.weight differs between sparse and masked execution"):
        dc.measure.savings(model, torch.randn(4, 8), backward=True, **QUICK)


@dataclasses.dataclass
class Output:
    hidden: torch.Tensor
    more: tuple


def test_outputs_of_any_kind_are_compared():
    def module(x):
        return Output(x, ({"y": x * (1.5 if mode() == "sparse" else 1)},))

    assert len(tensors(module(torch.ones(2)))) == 2
    with pytest.raises(SavingsError, match="module: output 1 differs"):
        dc.measure.savings(module, torch.randn(4), **QUICK)


@torch.library.custom_op("dyncore_tests_savings::twice", mutates_args=())
def twice(x: torch.Tensor) -> torch.Tensor:
    return 2 * x


def test_an_op_that_nobody_can_count_is_told():
    saved = dc.measure.savings(twice, torch.randn(4, 4), **SHORT)
    assert saved.uncounted == {"dyncore_tests_savings::twice": 1}
    assert "uncounted: dyncore_tests_savings::twice (1x): FLOPs not known" in str(saved)
    assert saved.stages["computing"] > 0


def test_an_output_without_tensors_is_told():
    saved = dc.measure.savings(lambda x: "done", torch.randn(4), **QUICK)
    assert saved.notes[0] == "the module returns no tensors that are known of: its numbers are not compared"
