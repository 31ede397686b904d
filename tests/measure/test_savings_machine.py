"""What savings needs of the machine: noise, other programs, cold caches, ceilings, energy."""

import itertools
import sys
import types
import warnings

import pytest
import torch

import dyncore as dc
from dyncore.measure import Timing, energy, on_gpu
from dyncore.measure.calls import Call
from dyncore.measure.ceilings import ceilings
from dyncore.measure.timing import InterleavedCold, ratio_interval
from tests.measure.made import saved_with

environment_module = sys.modules["dyncore.measure.environment"]  # the package has a function of that name
SHORT = {"seconds": 1e-9, "min_rounds": 1}
QUICK = {**SHORT, "details": False}


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
