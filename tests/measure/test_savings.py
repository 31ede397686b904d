"""The arithmetic of savings, and savings of a small dynamic model."""

import pytest
import torch
from torch import nn

import dyncore as dc
from dyncore.execution import mode
from dyncore.measure import Savings, Timing, break_even, realised_saving, scaling_efficiency


def test_se_is_one_where_time_falls_as_flops_do():
    assert scaling_efficiency(4.0, 4.0) == 1
    assert scaling_efficiency(1.5, 3.0) == 0.5


def test_rsr_is_the_share_of_time_saved_over_the_share_of_flops_saved():
    assert realised_saving(6.0, 10.0, 2.0, 10.0) == pytest.approx(0.4 / 0.8)
    assert realised_saving(12.0, 10.0, 5.0, 10.0) == pytest.approx(-0.4)
    assert realised_saving(10.0, 10.0, 10.0, 10.0) is None


def test_break_even_lies_between_the_points_around_it():
    assert break_even([0.25, 0.5, 1.0], [2.0, 4.0, 12.0], 8.0) == pytest.approx(0.75)
    assert break_even([1.0, 0.25, 0.5], [12.0, 2.0, 4.0], 8.0) == pytest.approx(0.75)  # in any order


def test_break_even_at_the_ends_of_the_sweep():
    assert break_even([0.25, 1.0], [1.0, 2.0], 8.0) == 1.0
    assert break_even([0.25, 1.0], [9.0, 10.0], 8.0) is None
    with pytest.raises(ValueError, match="times: expected one for each of the 2 keep ratios"):
        break_even([0.25, 1.0], [9.0], 8.0)


def test_ratios_are_against_dense_where_it_is_given():
    timings = {"sparse": Timing((20,)), "masked": Timing((100,)), "dense": Timing((60,))}
    saved = Savings({"sparse": 25, "masked": 100, "dense": 100}, timings, "dense")
    assert (saved.flop_speedup, saved.wall_clock_speedup) == (4.0, pytest.approx(3.0))
    assert saved.se == pytest.approx(0.75)
    assert saved.rsr == pytest.approx((2 / 3) / 0.75)
    assert saved.record()["timings"]["masked"]["samples_ns"] == [100]
    assert "against dense: FLOPs 4.00x, wall clock 3.00x, SE 0.75, RSR 0.89" in str(saved)


class Skipping(nn.Module):
    """An MLP on the first quarter of the rows."""

    def __init__(self):
        super().__init__()
        self.w_in, self.w_out = nn.Parameter(torch.randn(1, 32, 16)), nn.Parameter(torch.randn(1, 16, 32))

    def forward(self, x):
        plan = dc.select(torch.arange(x.shape[0]) < x.shape[0] // 4)
        return {"y": dc.grouped_mlp(x, self.w_in, self.w_out, plan=plan), "note": "not a tensor"}


def test_savings_of_a_module_counts_each_execution():
    saved = dc.measure.savings(Skipping(), torch.randn(64, 16), seconds=1e-9, min_rounds=2)
    assert saved.flops == {"sparse": 16 * 4 * 16 * 32, "masked": 64 * 4 * 16 * 32, "naive": 16 * 4 * 16 * 32}
    assert saved.flop_speedup == 4
    assert saved.baseline == "masked"
    assert all(len(t.samples_ns) == 2 for t in saved.timings.values())


def test_savings_with_backward_counts_three_times_the_forward_for_weights_and_inputs():
    x = torch.randn(64, 16, requires_grad=True)
    saved = dc.measure.savings(Skipping(), x, backward=True, seconds=1e-9, min_rounds=1)
    assert saved.flops["sparse"] == 3 * 16 * 4 * 16 * 32
    assert x.grad is None  # measuring leaves no trace


@pytest.mark.parametrize(("where", "backward"), [("whole", True), ("inside", True), ("in place", False)])
def test_savings_of_compiled_code_count_what_eager_code_executes(where, backward):
    torch._dynamo.reset()
    x, module = torch.randn(64, 16), nn.Sequential(dc.nn.MoE(16, 24, 4), nn.Linear(16, 16))
    compiled, options = module, {"fullgraph": True, "backend": "aot_eager"}
    if where == "whole":
        compiled = torch.compile(module, **options)
    elif where == "inside":
        compiled = nn.Sequential(torch.compile(module[0], **options), module[1])
    quick = {"backward": backward, "baselines": ("masked",), "seconds": 1e-9, "min_rounds": 1, "details": False}
    want = dc.measure.savings(module, x, **quick).flops
    if where == "in place":
        module.compile(**options)
    assert dc.measure.savings(compiled, x, **quick).flops == want
    assert want["sparse"] * 1.5 < want["masked"]


def test_savings_against_a_dense_twin():
    twin = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
    saved = dc.measure.savings(Skipping(), torch.randn(64, 16), dense=twin, seconds=1e-9, min_rounds=1)
    assert saved.baseline == "dense"
    assert saved.flops["dense"] == 64 * 4 * 16 * 32


def test_no_saving_is_reported_on_wrong_numbers():
    wrong = lambda x: x * 1.001 if mode() == "sparse" else x  # noqa: E731
    with pytest.raises(ValueError, match="module: output 0 differs between sparse and masked execution: largest error"):
        dc.measure.savings(wrong, torch.randn(8))
    with pytest.raises(ValueError, match=r"dropout in training mode.*mixes rows.*BatchNorm.*positions=.*live="):
        dc.measure.savings(wrong, torch.randn(8))
    assert dc.measure.savings(wrong, torch.randn(8), seconds=1e-9, min_rounds=1, tolerance=0.01)


def test_noise_is_the_same_in_each_mode_and_the_random_state_is_left_alone():
    before = torch.get_rng_state()
    with torch.random.fork_rng():
        dc.measure.savings(lambda x: torch.nn.functional.dropout(x), torch.randn(8), seconds=1e-9, min_rounds=1)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("seconds", [0, -1.0, float("nan")])
def test_no_time_to_measure_in_is_refused(seconds):
    with pytest.raises(ValueError, match=f"seconds: expected a number above 0, got {seconds}"):
        dc.measure.savings(Skipping(), torch.randn(8, 16), seconds=seconds)


def test_where_nothing_was_skipped_there_is_no_scaling_efficiency_to_show():
    timings = {"sparse": Timing((20, 20)), "masked": Timing((30, 60))}
    text = str(Savings({"sparse": 1000, "masked": 1001}, timings, "masked"))
    assert "FLOPs 1.00x, wall clock 2.25x, SE - (nothing was skipped), RSR -" in text
    assert "ms ±33%" in text
    skipped = str(Savings({"sparse": 1000, "masked": 1010}, timings, "masked"))
    assert "SE 2.23, RSR 56.11" in skipped


def test_added_flops_are_no_saving():
    timings = {"sparse": Timing((50, 50)), "masked": Timing((20, 20))}
    text = str(Savings({"sparse": 1200, "masked": 1000}, timings, "masked"))
    assert "FLOPs 0.83x, wall clock 0.40x, SE - (more FLOPs than the baseline's), RSR -" in text


def test_what_cannot_be_called_is_refused():
    with pytest.raises(TypeError, match="module: expected a module or another callable, got int"):
        dc.measure.savings(3, torch.randn(8))
    with pytest.raises(TypeError, match="dense: expected a module or another callable, got int"):
        dc.measure.savings(Skipping(), torch.randn(8, 16), dense=3)
