"""The bench: right numbers first, then times; every file is written; what fails is said."""

import dataclasses
import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import dyncore as dc
from dyncore.bench import MECHANISMS, moe, points, relu_sparsity, token_skipping
from dyncore.bench.contest import Contest, Point, Variant, check, measure
from dyncore.bench.routing import load_routing
from dyncore.measure import read_results

pytest.importorskip("rich")
pytest.importorskip("matplotlib")
from dyncore import cli
from dyncore.bench import compare, run, table
from dyncore.report import read_document, report_page
from dyncore.report.summary import sentences

environment = importlib.import_module("dyncore.measure.environment")  # the name in dyncore.measure is the function

RELU = ("relu-down", "relu-mlp", "reglu-mlp")
QUICK = {"seconds": 0, "min_rounds": 2}


@pytest.fixture(scope="module")
def small_caches():
    """Few copies of cold weights, so that tests of many points stay small."""
    with pytest.MonkeyPatch.context() as patch:
        for module in ("dyncore.measure.timing", "dyncore.bench.relu_sparsity"):
            patch.setattr(f"{module}.last_level_cache", lambda: 2**16)
        yield


@pytest.fixture(scope="module")
def records(small_caches):
    """The tiny sweep."""
    measured = [measure(point, **QUICK) for point in points(size="tiny")]
    assert not [error for _, errors in measured for error in errors]
    return [record for record, _ in measured]


def test_every_mechanism_has_points_of_every_size_and_names_are_found():
    for name in MECHANISMS:
        assert all(point.mechanism == name for size in ("tiny", "quick", "full") for point in points([name], size))
    assert {p.mechanism for p in points()} == set(MECHANISMS)
    assert {p.dtype for p in points(dtype=torch.bfloat16)} == {torch.bfloat16}


def test_the_quick_sweep_holds_what_it_promises():
    labels = [str(point) for point in points()]
    for keep in ("0.125", "0.25", "0.5", "0.75", "1"):
        assert f"token-skipping random T=4096 H=1024 I=4096 float32 keep={keep} forward" in labels
    assert "moe random T=512 E=64 K=2 H=512 I=1024 float32 keep=0.03125 forward" in labels
    assert any("digits" in label and "moe" in label for label in labels)
    assert any("digits" in label and "token-skipping" in label for label in labels)
    assert any("forward+backward" in label for label in labels)
    for keep in ("1", "0.5", "0.2", "0.1", "0.05", "0.01"):
        assert f"relu-down uniform T=1 I=4096 N=1024 bfloat16 keep={keep} forward" in labels
        assert f"relu-mlp uniform T=512 H=512 I=2048 float32 keep={keep} forward+backward" in labels
    assert "relu-mlp beta T=1 H=1024 I=4096 float32 keep=0.1 forward" in labels


def test_flops_of_records_are_the_hand_counts(records):
    for record in records:
        if record["mechanism"] in RELU:
            continue
        s, factor = record["shape"], 3 if record["phase"] == "forward+backward" else 1
        slots = record["keep_ratio"] * s["T"] * s.get("E", 1)
        per_slot = 2 * s["H"] * s["I"] * (3 if record["mechanism"] == "moe" else 2)
        assert record["flops"]["executed"] == pytest.approx(factor * slots * per_slot)
        assert record["flops"]["dense"] == factor * s["T"] * s.get("E", 1) * per_slot


def test_flops_of_relu_points_are_those_of_neurons_that_are_on(small_caches):
    for mechanism, products in (("relu-down", (0, 1, 1, 1)), ("relu-mlp", (1, 1, 2, 4)), ("reglu-mlp", (1, 2, 3, 6))):
        for backward in (False, True):
            point = relu_sparsity.synthetic(mechanism, "uniform", 24, 32, 64, torch.float32, 0.25, backward=backward)
            contest = point.build()
            args = (*contest.inputs[0], *contest.variants["dyncore"].weights)
            with torch.no_grad():
                h = (
                    args[0]
                    if mechanism == "relu-down"
                    else torch.nn.functional.linear(args[0], args[1][:64], args[2][:64])
                )
            on, everything = int((h > 0).sum()), h.numel()
            made, skipping, dense, in_backward = products
            expected = made * everything + skipping * on
            if backward:
                expected += in_backward * on + (everything if mechanism == "relu-down" else 0)
            assert contest.flops("dyncore") == 2 * 32 * expected
            assert contest.flops("dense") == 2 * 32 * everything * dense * (3 if backward else 1)


def test_ratios_of_records_follow_from_their_medians(records):
    for record in records:
        ms = {name: variant["median_ms"] for name, variant in record["variants"].items()}
        assert record["wall_clock_speedup"] == pytest.approx(ms["dense"] / ms["dyncore"])
        assert record["against"] == pytest.approx({n: t / ms["dyncore"] for n, t in ms.items() if n != "dyncore"})
        assert record["flop_speedup"] == pytest.approx(record["flops"]["dense"] / record["flops"]["executed"])
        assert record["se"] == pytest.approx(record["wall_clock_speedup"] / record["flop_speedup"])
        assert all(len(v["samples_ns"]) >= 2 for v in record["variants"].values())
    json.dumps(records, allow_nan=False)


def rigged(**variants):
    """A point whose dyncore and dense variants double x, with more variants beside them."""
    double = Variant(lambda x, w: x * w, lambda x, w: x * w, (torch.tensor([2.0]),))
    contest = Contest(
        {"dyncore": double, "dense": double, **{n: dataclasses.replace(double, **v) for n, v in variants.items()}},
        [(torch.randn(16),)],
        cold=False,
    )
    return Point("rigged", "random", {"T": 16}, torch.float32, 1.0, lambda: contest)


def test_a_rival_with_wrong_numbers_has_no_time():
    record, errors = measure(rigged(naive={"run": lambda x, w: x * w * 1.001}), **QUICK)
    assert set(record["variants"]) == {"dyncore", "dense"}
    assert [e["variant"] for e in errors] == ["naive"]
    assert "output: largest error" in errors[0]["message"]


@pytest.mark.parametrize("name", ["dyncore", "dense"])
def test_no_record_is_made_of_wrong_numbers(name):
    record, errors = measure(rigged(**{name: {"run": lambda x, w: x * w + 0.01}}), **QUICK)
    assert record is None
    assert [e["variant"] for e in errors] == [name]


def test_in_sixteen_bits_dyncore_is_held_to_each_element_and_rivals_to_their_rms():
    def one_element_off(x, w):
        return torch.cat([(x * w)[:1] * 1.05, (x * w)[1:]])

    off = Variant(one_element_off, lambda x, w: x * w, (torch.ones(1, dtype=torch.bfloat16),))
    contest = Contest({"dyncore": off, "naive": off}, [(torch.ones(4096, dtype=torch.bfloat16),)], cold=False)
    _, wrong, _ = check(contest)
    assert set(wrong) == {"dyncore"}


def test_a_wrong_gradient_is_found():
    bent = lambda x, w: x * w + (x - x.detach()) * 0.01  # noqa: E731  right value, wrong gradient
    double = Variant(bent, lambda x, w: x * w, (torch.tensor([2.0]),))
    contest = Contest({"dyncore": double}, [(torch.randn(16),)], backward=True, cold=False)
    _, wrong, _ = check(contest)
    assert wrong["dyncore"].startswith("gradient 0: ")


def test_a_rival_that_cannot_run_is_unavailable_and_dyncore_failing_is_an_error():
    def fails(x, w):
        raise RuntimeError("not on this machine\nmore")

    record, errors = measure(rigged(grouped_mm={"run": fails}), **QUICK)
    assert record["unavailable"] == {"grouped_mm": "RuntimeError: not on this machine"}
    assert not errors
    record, errors = measure(rigged(dyncore={"run": fails}), **QUICK)
    assert record is None
    assert errors[0]["message"] == "RuntimeError: not on this machine"


def test_inputs_turn_with_the_round_and_weights_with_the_call(small_caches):
    masks = token_skipping.random_masks(64, 0.5)
    contest = token_skipping.contest(masks, 32, 128, torch.float32)
    arguments = contest.arguments()
    first, second, again = (arguments("dyncore", r) for r in (0, 1, 3))
    assert torch.equal(first[1], masks[0])
    assert torch.equal(second[1], masks[1])
    assert torch.equal(again[1], masks[0])
    weights = {a[2].data_ptr() for a in (first, second, again, arguments("naive", 0))}
    assert len(weights) == 4  # rivals share the rotation, so nobody finds another's weights in the cache


def test_masks_keep_the_exact_share_and_experts_are_distinct():
    assert {int(mask.sum()) for mask in token_skipping.random_masks(100, 0.125)} == {12}
    for expert in moe.random_experts(50, 8, 2):
        assert expert.shape == (50, 2)
        assert (expert[:, 0] != expert[:, 1]).all()


def test_a_skew_of_one_is_the_law_of_zipf():
    first = torch.cat(moe.random_experts(4096, 8, 1, skew=1.0))
    shares = torch.bincount(first.flatten(), minlength=8) / first.numel()
    expected = 1 / torch.arange(1, 9)
    assert torch.allclose(shares, expected / expected.sum(), atol=0.02)


def test_what_token_skipping_is_checked_against_is_the_mlp_where_the_mask_says_so():
    torch.manual_seed(0)
    weights = token_skipping.make_weights(8, 16, torch.float64)
    x, mask = torch.randn(20, 8).double(), torch.arange(20) % 3 == 0
    w_in, b_in, w_out, b_out = weights
    everywhere = x + torch.nn.functional.gelu(x @ w_in.t() + b_in) @ w_out.t() + b_out
    assert torch.allclose(token_skipping.naive(x, mask, *weights), torch.where(mask[:, None], everywhere, x))
    assert torch.allclose(token_skipping.dense(x, mask, *weights), everywhere)


def test_the_loop_and_the_dense_rival_of_moe_are_the_same_function():
    contest = moe.contest(moe.random_experts(20, 4, 2), 4, 8, 12, torch.float64)
    args = (*contest.inputs[0], *contest.variants["dyncore"].weights)
    assert torch.allclose(moe.naive(*args), moe.dense(*args))
    assert not torch.allclose(moe.naive(*args), torch.zeros(20, 8).double())


@pytest.fixture
def document(tmp_path):
    """A document of some records."""

    def make(records, **head):
        results = dc.measure.new_results("dyncore bench") | {"warnings": [], "records": records, **head}
        dc.measure.write_results(tmp_path / "results.json", results)
        return read_document(tmp_path / "results.json")

    return make


def test_the_page_holds_every_point_and_its_rivals(records, document):
    text = report_page([document(records)])
    assert text.count("<tr>") == len(records) + 1
    assert {"speedup", "keep", "rivals", "roofline"} == set(re.findall(r'id="figure-(\w+)"', text))
    for heading in ("naive", "grouped_mm", "equal FLOPs", "CSR", "own dense"):
        assert f"<th>vs {heading}</th>" in text
        assert f"<li>{heading}: " in text
    assert not re.findall(r"https?://", text)


def test_losing_points_are_shown_like_the_others(records, document):
    lost = json.loads(json.dumps(records[0]))
    lost["against"]["naive"], lost["wall_clock_speedup"] = 0.5, 0.25
    for variant in lost["variants"].values():
        variant["spread"] = 0.0
    lost["variants"]["naive"]["median_ms"] = lost["variants"]["dyncore"]["median_ms"] / 2
    assert "0.50" in table.cells(lost)
    assert "0.25" in table.cells(lost)
    (sentence,) = sentences(document([lost]).comparisons)
    assert "naive at 0 of 1 (median 0.50x)" in sentence


def test_a_contest_may_do_without_computing_everything(small_caches):
    point = moe.synthetic(20, 4, 8, 12, torch.float32, rivals=["naive", "own_equal_flops"])
    record, errors = measure(point, **QUICK)
    assert not errors
    assert set(record["against"]) == {"naive", "own_equal_flops"}
    assert [record[key] for key in ("wall_clock_speedup", "flop_speedup", "se", "rsr")] == [None] * 4
    assert record["flops"] == {"executed": 2 * 40 * 3 * 8 * 12, "dense": None}
    row = dict(zip(table.COLUMNS, table.cells(record), strict=True))
    assert row["dense ms"] == row["dense GFLOP"] == row["SE"] == row["time x"] == "-"
    assert row["vs naive"] != "-"


def test_the_loop_by_index_is_the_loop():
    contest = moe.contest(moe.random_experts(20, 4, 2), 4, 8, 12, torch.float64, backward=True)
    args = (*contest.inputs[0], *contest.variants["dyncore"].weights)
    for a, b in zip(contest.execute(moe.indexed, *args), contest.execute(moe.naive, *args), strict=True):
        assert torch.allclose(a, b)


@pytest.mark.parametrize(("noisy", "marked"), [("dyncore", "both"), ("naive", "naive"), ("dense", "dense")])
def test_ratios_of_samples_that_spread_widely_are_marked(records, noisy, marked):
    record = json.loads(json.dumps(records[0]))
    for name, variant in record["variants"].items():
        variant["spread"] = 0.31 if name == noisy else 0.3
    row = dict(zip(table.COLUMNS, table.cells(record), strict=True))
    assert row["time x"].endswith("~") == row["SE"].endswith("~") == (marked in ("both", "dense"))
    assert row["vs naive"].endswith("~") == (marked in ("both", "naive"))
    assert "~: samples of either side spread by more than 30%" in str(table.render([record])[-1].caption)


def test_a_busy_or_oversubscribed_machine_is_named_at_the_start_under_the_table_and_on_the_page(
    small_caches, monkeypatch, tmp_path, capsys
):
    monkeypatch.setattr(environment.os, "getloadavg", lambda: (100.04 * environment.os.cpu_count(), 0.0, 0.0))
    monkeypatch.setattr(environment, "usable_cores", lambda: torch.get_num_threads() - 1)
    monkeypatch.setattr(run, "points", lambda *args: [rigged()])
    assert cli.main(["bench", "--tiny", "--out", str(tmp_path)]) == 0
    results = read_results(tmp_path / "results.json")
    threads, load = torch.get_num_threads(), 100.04 * environment.os.cpu_count()
    assert results["warnings"] == [
        f"{threads} threads share {threads - 1} usable cores and wait for each other: ratios may be off",
        f"other programs keep this machine busy (load {load:.1f}): ratios may be off",
    ]
    out, err = capsys.readouterr()
    text = (tmp_path / "index.html").read_text()
    assert all(f"warning: {warning}\n" in out and f"warning: {warning}\n" in err for warning in results["warnings"])
    assert all(f"Warning: {warning}" in text for warning in results["warnings"])


def test_each_mechanism_has_a_table_without_the_columns_that_are_empty_there(records):
    tables = table.render(records)
    assert [t.title for t in tables] == list(MECHANISMS)
    headings = {t.title: [str(column.header).replace("\n", " ") for column in t.columns] for t in tables}
    assert "vs grouped_mm" in headings["moe"]
    assert "vs CSR" not in headings["moe"]
    assert "vs CSR" in headings["relu-mlp"]
    assert sum(t.row_count for t in tables) == len(records)


def test_the_table_says_what_the_rivals_are(records):
    (line,) = [line for line in str(table.render(records)[-1].caption).splitlines() if line.startswith("dense: ")]
    assert all(f"{heading}: " in line for heading in ("dense", "naive", "grouped_mm", "equal FLOPs"))


def test_a_quiet_machine_has_no_warnings(monkeypatch):
    monkeypatch.setattr(environment.os, "getloadavg", lambda: (environment.os.cpu_count() / 2, 99.0, 99.0))
    monkeypatch.setattr(environment, "usable_cores", torch.get_num_threads)
    assert environment.timing_warnings() == []


@pytest.mark.parametrize(("quota", "cores"), [("max 100000", 8), ("150000 100000", 2), ("900000 100000", 8), ("", 8)])
def test_usable_cores_are_those_of_the_affinity_or_of_the_quota(monkeypatch, tmp_path, quota, cores):
    (tmp_path / "cpu.max").write_text(quota)
    monkeypatch.setattr(environment, "_CPU_QUOTA", tmp_path / "cpu.max")
    monkeypatch.setattr(environment.os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    assert environment.usable_cores() == cores


def test_the_bench_ends_with_an_error_on_wrong_numbers(small_caches, monkeypatch, tmp_path, capsys):
    real = token_skipping.ours
    monkeypatch.setattr(token_skipping, "ours", lambda *args: real(*args) * 1.001)
    assert cli.main(["bench", "token-skipping", "--tiny", "--dtype", "fp32", "--out", str(tmp_path)]) == 1
    results = read_results(tmp_path / "results.json")
    assert not results["records"]
    assert {e["variant"] for e in results["errors"]} == {"dyncore"}
    assert "error: token-skipping" in capsys.readouterr().err


def test_routing_of_another_schema_or_size_is_refused(tmp_path):
    path = tmp_path / "routing.json"
    path.write_text('{"schema": "other"}')
    with pytest.raises(ValueError, match=r"path: expected a routing of schema dyncore\.routing/1"):
        load_routing(path)
    document = {"schema": "dyncore.routing/1", "source": "", "command": "", "width": 1, "expert_width": 1}
    path.write_text(json.dumps(document | {"layers": [{"name": "a", "rows": 17, "selected": "ff"}]}))
    with pytest.raises(ValueError, match="selected: expected the bits of 17 rows, got 8"):
        load_routing(path)
    layer = {"name": "a", "rows": 1, "groups": 2, "top_k": 1, "expert": "02"}
    path.write_text(json.dumps(document | {"layers": [layer]}))
    with pytest.raises(ValueError, match="expert: expected 1 x 1 indices below 2"):
        load_routing(path)


def test_the_benchmarks_run_under_pytest_and_leave_a_record_of_every_sample(tmp_path):
    pytest.importorskip("pytest_benchmark")
    root = Path(__file__).parents[1]
    command = [sys.executable, "-m", "pytest", "benchmarks/bench_gather_rows.py", "-k", "512 and 256", "-q"]
    command += ["--benchmark-only", "--benchmark-max-time=0.01", "--results", str(tmp_path)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    results = read_results(tmp_path / "gather_rows.json")
    assert results["command"] == "pytest benchmarks/bench_gather_rows.py --benchmark-only"
    (record,) = results["records"]
    counts = {name: len(variant["samples_ns"]) for name, variant in record["variants"].items()}
    assert counts["naive"] == counts["dense"] == counts["dyncore"] >= 5


def test_a_run_is_compared_with_an_earlier_one(records):
    quiet = json.loads(json.dumps(records))
    for record in quiet:
        for variant in record["variants"].values():
            variant["spread"] = 0.0
    today = json.loads(json.dumps(quiet))
    slower, faster, busy, new, *_ = today
    slower["variants"]["dyncore"]["median_ms"] *= 2
    slower["against"] = {name: x / 2 for name, x in slower["against"].items()}
    faster["variants"]["dyncore"]["median_ms"] /= 2
    faster["against"] = {name: x * 2 for name, x in faster["against"].items()}
    for variant in busy["variants"].values():  # a machine of half the speed
        variant["median_ms"] *= 2
    new["keep_ratio"] = 0.123
    found = compare.changes(quiet, today)
    assert [change["verdict"] for change in found[:3]] == ["slower", "faster", "same"]
    assert [change["speedup"] for change in found[:3]] == pytest.approx([0.5, 2.0, 0.5])
    assert {change["verdict"] for change in found[3:]} <= {"same"}
    assert len(found) == len(today) - 1
    (sentence,) = compare.sentences({"created": "then"}, found, len(today))
    assert f"{len(found)} of {len(today)} points" in sentence
    assert "1 faster, 1 slower" in sentence
    assert compare.table(found).row_count == 2
    (sentence,) = compare.sentences({"created": "then"}, [], 3)
    assert sentence.startswith("None of the 3 points is in the run of then")


def test_what_moved_within_its_spread_is_the_same(records):
    today = json.loads(json.dumps(records[:1]))
    today[0]["against"] = {name: x * 1.2 for name, x in today[0]["against"].items()}
    today[0]["variants"]["dyncore"]["spread"] = 0.3
    assert compare.changes(records[:1], today)[0]["verdict"] == "same"


def test_a_contest_moves_to_another_device_and_shared_weights_stay_shared(small_caches):
    contest = moe.contest(moe.random_experts(20, 4, 2), 4, 8, 12, torch.float32, backward=True)
    assert contest.to(torch.device("cpu")) is contest
    moved = contest.to(torch.device("meta"))
    assert moved.device.type == "meta"
    assert moved.variants["dyncore"].weights is moved.variants["naive"].weights
    assert all(t.is_meta for args in moved.inputs for t in args)
    leaves = [*moved.variants["dyncore"].weights, moved.inputs[0][0]]
    assert all(t.is_meta and t.requires_grad and t.is_leaf for t in leaves)
    assert not contest.inputs[0][0].is_meta
