"""The bars: means, worst points and verdicts on made-up records; every part's jobs; pieces of a run put together."""

import functools
import json

import pytest
import torch

from benchmarks import bar_points, bars, transformers_points
from benchmarks.bar_rules import BARS, geometric_mean, judge, point_name
from dyncore.bench import relu_sparsity
from dyncore.bench.contest import Contest, Variant
from dyncore.measure import read_results


def made_up(mechanism="token-skipping", *, T=512, keep=0.25, dtype="float32", phase="forward", ours=1.0, **more):
    """A record in which dyncore takes `ours` ms and each rival what `more` says."""
    rivals = {name: ms for name, ms in more.items() if isinstance(ms, float)}
    record = {
        "mechanism": mechanism,
        "input": more.get("input", "random"),
        "shape": {"T": T, **more.get("shape", {})},
        "dtype": dtype,
        "phase": phase,
        "keep_ratio": keep,
        "threads": more.get("threads", 2),
        "flops": {"executed": 2 * 10**9, "dense": None},
        "flop_speedup": 1 / keep,
        "se": rivals["dense"] / ours * keep if "dense" in rivals else None,
        "variants": {name: {"median_ms": ms} for name, ms in {"dyncore": ours, **rivals}.items()},
    }
    return record | {key: more[key] for key in ("bytes", "saved_bytes") if key in more}


def verdict(start, records):
    (bar,) = [bar for bar in BARS if bar.text.startswith(start)]
    return judge(bar, records)


def test_a_mean_bar_takes_the_geometric_mean_and_names_its_worst_point():
    assert geometric_mean([0.5, 2.0, 8.0]) == pytest.approx(2.0)
    records = [made_up(T=4096, dense=4.0 * se) for se in (0.5, 2.0)] + [made_up(T=64, dense=4.0 * 0.7)]
    found = verdict("token skipping: SE against dense, geometric mean", records)
    assert found.value == pytest.approx((0.5 * 2.0 * 0.7) ** (1 / 3))
    assert not found.met
    assert found.points == 3
    assert found.worst == "token-skipping random T=4096 float32 keep=0.25 threads=2"
    assert found.worst_value == pytest.approx(0.5)
    assert verdict("token skipping: the same, T >= 512", records).value == pytest.approx(1.0)


def test_a_bar_of_every_point_takes_the_worst_one():
    records = [made_up(dense=8.0), made_up(T=64, dense=4.0 * 0.69)]
    found = verdict("token skipping: SE against dense, no point below 0.7", records)
    assert (found.value, found.met) == (pytest.approx(0.69), False)
    assert verdict("token skipping: SE against dense, no point below 0.7", records[:1]).met


def test_a_bar_nobody_measured_is_not_met():
    found = judge(BARS[0], [])
    assert (found.value, found.met, found.points) == (None, False, 0)
    assert "1 bars are not measured yet" in bars.report([found])


def test_own_se_counts_points_of_enough_live_rows():
    start = "token skipping: SE against own keep=1"
    few, many = made_up(T=64, keep=0.5, own=1.0), made_up(T=512, keep=0.5, own=1.9)
    assert verdict(start, [few]).value is None
    found = verdict(start, [few, many])
    assert (found.value, found.met, found.points) == (pytest.approx(0.95), True, 1)


def test_keep_all_is_judged_apart_from_skipping():
    records = [made_up(keep=1, dense=1.2, naive=1.1), made_up(keep=0.5, dense=0.1, naive=1.0)]
    found = verdict("token skipping: keep=1 over dense, no point", records)
    assert (found.value, found.met, found.points) == (pytest.approx(1.2), True, 1)
    assert verdict("token skipping: never slower than naive", records).points == 2


def test_moe_is_judged_against_the_faster_rival_at_its_sizes():
    shape = {"E": 64, "K": 2}
    records = [
        made_up("moe", T=64, shape=shape, naive=3.0, grouped_mm=2.4),
        made_up("moe", T=8, shape=shape, naive=2.1, grouped_mm=2.5),
        made_up("moe", T=512, shape={"E": 8}, naive=1.2, grouped_mm=1.16),
        made_up("moe", T=512, shape=shape, dtype="bfloat16", naive=0.1, grouped_mm=0.1),
        made_up("moe", T=512, shape=shape, phase="forward+backward", grouped_mm=0.1, indexed=6.0),
    ]
    assert verdict("MoE fp32 E=64 T=64, 512", records).value == pytest.approx(2.4)
    assert verdict("MoE fp32 E=64 T=8", records).met
    assert verdict("MoE fp32: >= 1.15x everywhere", records).met
    assert verdict("MoE fp32: geometric mean", records).points == 3
    assert verdict("MoE bf16: geometric mean", records).value == pytest.approx(0.1)
    assert verdict("MoE fp32 forward+backward: geometric mean", records).value == pytest.approx(0.1)
    assert verdict("MoE fp32 forward+backward, E=64", records).value == pytest.approx(6.0)


def test_bandwidth_is_held_against_the_fastest_read():
    record = made_up("stream", T=1, bytes=10**6, read_sum=0.9, read_max=0.7)
    assert verdict("T <= 4", [record]).value == pytest.approx(0.7)


def test_products_are_judged_per_core_and_calls_in_microseconds():
    one, two = made_up("product", threads=1, ours=20.0), made_up("product", threads=2, ours=9.0)
    found = verdict("large products fp32", [one, two])
    assert (found.value, found.met) == (pytest.approx(100.0), True)
    calls = [made_up("overhead", input="select", ours=0.007), made_up("overhead", input="select", T=9, ours=0.009)]
    found = verdict("call of select", calls)
    assert (found.value, found.met) == (pytest.approx(9.0), False)
    assert found.worst.startswith("overhead select T=9")


def test_relu_bars_ask_each_share_of_zeros_for_its_own_speed_up():
    times = {0.5: 1.0, 0.1: 9.9, 0.05: 18.0}
    records = [made_up("relu-down", T=1, keep=keep, dense=x, own=7.0) for keep, x in times.items()]
    found = verdict("ReLU down fp32 T=1, 90% zeros: >= 10x dense", records)
    assert (found.value, found.met, found.points) == (pytest.approx(9.9), False, 1)
    assert verdict("ReLU down fp32 T=1, 95% zeros: >= 18x dense", records).met
    assert verdict("ReLU down fp32 T=1, 90% zeros: >= 7x own dense", records).met
    assert verdict("ReLU down bf16 T=1, 90% zeros", records).value is None
    found = verdict("ReLU down, 0-50% zeros: never below 0.97x dense", records)
    assert (found.value, found.points) == (pytest.approx(1.0), 1)


def test_a_mlp_at_one_row_is_held_against_what_skipping_alone_could_save():
    record = made_up("relu-mlp", T=1, keep=0.1, dense=3.6, own=1.8) | {"flop_speedup": 2.0, "se": 1.8}
    assert verdict("ReLU MLP T=1, 80-99% zeros: >= 0.9 of 2/(1+density) over own", [record]).value == pytest.approx(0.9)
    assert verdict("ReLU MLP T=1, 80-99% zeros: >= 0.9 of 2/(1+density) over dense", [record]).value == 1.8
    assert verdict("ReGLU MLP T=1, 80-99% zeros: >= 0.85 of 3/(1+2 density) over dense", [record]).value is None


def test_training_is_judged_by_time_and_by_what_it_keeps():
    shape = {"H": 1024, "I": 1000}
    step = {"T": 100, "shape": shape, "phase": "forward+backward"}
    records = [
        made_up("relu-mlp", keep=1.0, dense=0.96, **step),
        made_up("relu-mlp", keep=0.1, dense=2.3, saved_bytes=50_000, **step),
        made_up("relu-mlp", keep=0.1, dense=9.0, T=1),
    ]
    assert verdict("ReLU MLP training, 90% zeros: >= 2.2x dense", records).value == pytest.approx(2.3)
    found = verdict("ReLU MLP training: never below 0.97x dense", records)
    assert (found.value, found.met, found.points) == (pytest.approx(0.96), False, 2)
    found = verdict("ReLU MLP saves >= 7x fewer bytes, 90% zeros", records)
    assert (found.value, found.met, found.points) == (pytest.approx(8.0), True, 1)
    assert verdict("ReLU MLP saves >= 11x", records).value is None


def test_experts_are_judged_against_the_fastest_that_transformers_ships():
    shape = {"E": 64}
    records = [
        made_up("transformers", input="swiglu", T=512, shape=shape, eager=9.0, grouped_mm=1.9),
        made_up("transformers", input="swiglu", T=8, shape=shape, eager=9.0, grouped_mm=2.0, batched_mm=1.5),
        made_up("transformers", input="swiglu", T=1, shape=shape, dtype="bfloat16", grouped_mm=1.2),
        made_up("transformers", input="gpt-oss", T=1, shape=shape, grouped_mm=0.9),
    ]
    assert verdict("transformers experts, forward, fp32 T=512", records).value == pytest.approx(1.9)
    found = verdict("transformers experts, forward, T=1, 8", records)
    assert (found.value, found.met, found.points) == (pytest.approx(1.2), True, 2)
    assert not verdict("transformers experts, forward, gpt-oss", records).met
    assert verdict("transformers experts, forward+backward, fp16", records).value is None


@pytest.mark.parametrize("layer", ["swiglu", "gpt-oss"])
def test_experts_of_transformers_give_right_numbers(layer):
    pytest.importorskip("transformers")
    point = next(p for p in transformers_points.points() if p.input == layer)
    record, errors = bars.run(bar_points.Job(point, min_rounds=1), 0.0)
    assert not errors
    assert record["variants"].keys() == {"dyncore", "eager", "batched_mm", "grouped_mm"}
    assert record["flops"]["executed"] == 2 * 8 * 3 * 512 * 256


def test_saved_bytes_are_those_of_storages_besides_inputs():
    def kept(scale, x, w):
        y = (x * w) * scale  # x and w are given; the product, times something that needs a gradient, is kept
        return y * y[:1]

    given = torch.ones(1, requires_grad=True)
    run = functools.partial(kept, given)
    variant = Variant(run, run, (torch.ones(1, 64),))
    contest = Contest({"dyncore": variant}, [(torch.ones(8, 64),)], backward=True, cold=False)
    product, scaled, scale = 4 * 8 * 64, 4 * 8 * 64, 4
    assert bars.saved_bytes(contest) == product + scaled + scale


def test_a_training_step_keeps_a_bit_a_neuron_and_the_values_that_are_on():
    point = relu_sparsity.synthetic("relu-mlp", "uniform", 64, 32, 256, torch.float32, 0.25, backward=True)
    record, errors = bars.run(bar_points.Job(point, min_rounds=2, saved=True), 0.0)
    assert not errors
    contest = point.build()
    (x,), (w_in, b_in, _) = contest.inputs[0], contest.variants["dyncore"].weights
    on = int((torch.nn.functional.linear(x, w_in, b_in) > 0).sum())
    assert record["saved_bytes"] == 64 * 256 // 8 + 4 * on + 8 * 65  # mask, values, row offsets
    assert "fewer bytes saved" in bars.one_line(record)


def test_every_job_falls_under_a_bar_and_has_a_name_of_its_own():
    jobs = {part: list(make()) for part, make in bar_points.PARTS.items()}
    assert {part: len(found) for part, found in jobs.items()} == {
        "token": 60, "moe": 46, "backward": 33, "stream": 12, "product": 6 * len({1, torch.get_num_threads()}), "overhead": 3,
        "relu": 51, "transformers": 30,
    }  # fmt: skip
    names = [(str(job.point), job.threads) for found in jobs.values() for job in found]
    assert len(set(names)) == len(names)
    for job in (job for found in jobs.values() for job in found):
        point = job.point
        phase = "forward+backward" if point.backward else "forward"
        dtype = str(point.dtype).removeprefix("torch.")
        record = made_up(
            point.mechanism, input=point.input, dtype=dtype, phase=phase, keep=point.keep_ratio, shape=point.shape,
            T=point.shape["T"],
        )  # fmt: skip
        assert any(bar.over(record) for bar in BARS), point


def test_a_run_writes_records_of_one_call_and_verdicts_and_keeps_other_points(tmp_path, capsys):
    path = tmp_path / "bars.json"
    arguments = ["--part", "overhead", "--seconds", "0.01", "--out", str(path)]
    assert bars.main([*arguments, "--only", "select"]) == 0
    (record,) = read_results(path)["records"]
    assert record["variants"]["dyncore"]["median_ms"] < 1  # of one call, not of fifty
    assert record["variants"]["dyncore"]["samples_ns"][0] < 1e6
    assert bars.main([*arguments, "--only", "grouped_mlp"]) == 0
    assert bars.main([*arguments, "--only", "grouped_mlp"]) == 0
    results = read_results(path)
    assert [r["input"] for r in results["records"]] == ["select", "grouped_mlp"]
    assert {v["text"]: v["points"] for v in results["bars"]}["call of select, tiny: <= 8 us"] == 1
    assert "call of grouped_mlp, tiny: <= 15 us" in capsys.readouterr().out
    document = json.loads(path.read_text())
    document["environment"]["cpu"] = "another"
    path.write_text(json.dumps(document))
    assert bars.main([*arguments, "--only", "select"]) == 0
    assert [r["input"] for r in read_results(path)["records"]] == ["select"]


def test_streams_and_products_give_right_numbers_and_are_counted():
    jobs = [job for job in bar_points.stream() if job.point.dtype == torch.bfloat16 and job.point.shape["E"] == 8]
    record, errors = bars.run(jobs[0], 0.0)
    assert not errors
    assert record["bytes"] == 2 * 3 * 1024 * 2048 * 2  # two experts, three matrices
    assert set(record["variants"]) == {"dyncore", "read_sum", "read_max"}
    assert "of a plain read" in bars.one_line(record)


def test_bars_are_as_they_are_written():
    for bar in BARS:
        assert f">= {bar.bound:g}" in bar.text or f"<= {bar.bound:g}" in bar.text or f"below {bar.bound:g}" in bar.text
    assert point_name(made_up()) == "token-skipping random T=512 float32 keep=0.25 threads=2"
