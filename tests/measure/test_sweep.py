"""The sweep: every point is forced exactly, counted, checked and timed; what fails is said, the rest stands."""

import json

import pytest
import torch
from torch import nn

from dyncore.execution import mode
from dyncore.measure import read_results, sweep, write_results
from dyncore.nn import Skip, TokenSkip, TransformerBlock

QUICK = {"seconds": 1e-6, "min_rounds": 2, "masks": 2}


def layer(gate):
    torch.manual_seed(0)
    return Skip(nn.Linear(16, 16, bias=False), gate)


def inputs(batch):
    return torch.randn(batch, 8, 16)


@pytest.fixture(scope="module")
def results():
    recorded = torch.arange(64) % 4 == 0
    sizes = {"keeps": (0.25, 0.5, 1.0), "batches": (1, 4), "granularities": ("row", 4, "sample")}
    return sweep(layer, inputs, **sizes, recorded=recorded, name="a skip", **QUICK)


def points(results, **of):
    return [r for r in results["records"] if all(r[name] == value for name, value in of.items())]


def test_every_combination_is_a_record(results):
    assert results["schema"] == "dyncore.results/1"
    assert not results["errors"]
    of = points(results, input="clustered", granularity="row")
    assert [(r["shape"]["B"], r["keep_ratio"]) for r in of] == [(b, k) for b in (1, 4) for k in (0.25, 0.5, 1.0)]
    assert {r["input"] for r in results["records"]} == {"iid", "clustered", "correlated", "adversarial", "recorded"}
    assert {r["mechanism"] for r in results["records"]} == {"a skip"}


def test_shares_that_round_to_the_same_count_are_measured_once(results):
    whole = points(results, input="iid", granularity="sample")
    assert [(r["shape"]["B"], r["keep_ratio"]) for r in whole] == [(1, 1.0), (4, 0.25), (4, 0.5), (4, 1.0)]
    tiles = points(results, input="iid", granularity="tile of 4")
    assert [r["keep_ratio"] for r in tiles if r["shape"]["B"] == 1] == [0.5, 1.0]


def test_flops_are_those_of_the_rows_that_are_kept(results):
    for r in results["records"]:
        everything = 2 * r["shape"]["B"] * 8 * 16 * 16
        assert r["flops"] == {"executed": round(r["keep_ratio"] * everything), "dense": everything}
        assert r["flop_speedup"] == pytest.approx(1 / r["keep_ratio"])
        assert r["against"] == {"dense": r["wall_clock_speedup"]}
        assert all(len(variant["samples_ns"]) >= 2 for variant in r["variants"].values())


def test_a_recorded_pattern_has_its_own_share(results):
    of = points(results, input="recorded")
    assert [(r["shape"]["B"], r["keep_ratio"], r["granularity"]) for r in of] == [(1, 0.25, "row"), (4, 0.25, "row")]


def test_the_document_is_written_read_and_drawn(results, tmp_path):
    pytest.importorskip("matplotlib")
    from dyncore.report import read_document, report_page

    write_results(tmp_path / "sweep.json", results)
    assert read_results(tmp_path / "sweep.json") == json.loads(json.dumps(results))
    text = report_page([read_document(tmp_path / "sweep.json")])
    assert 'id="figure-keep"' in text
    assert 'id="figure-patterns"' in text
    assert "clustered by tile of 4 B=4 S=8 H=16" in text


def test_pandas_reads_the_records(results):
    pandas = pytest.importorskip("pandas")
    table = pandas.json_normalize(results["records"])
    assert len(table) == len(results["records"])
    assert table["variants.dyncore.median_ms"].gt(0).all()
    assert {"input", "granularity", "keep_ratio", "shape.B", "flops.executed"} <= set(table.columns)


def test_masks_turn_from_round_to_round_and_attention_takes_its_gate():
    seen = []

    def make(gate):
        def watched(x):
            seen.append(gate(x))
            return seen[-1]

        return TokenSkip(TransformerBlock(16, 2), watched).eval()

    only = {"keeps": (0.5,), "batches": (2,), "patterns": ("iid",)}
    results = sweep(make, inputs, **only, **QUICK)
    assert [r["mechanism"] for r in results["records"]] == ["TokenSkip"]
    assert len({tuple(mask.flatten().tolist()) for mask in seen}) == 2
    assert {tuple(mask.shape) for mask in seen} == {(2, 8)}


def test_timed_rounds_take_the_masks_in_turn():
    class Seeing(nn.Module):
        def __init__(self, gate):
            super().__init__()
            self.gate, self.seen = gate, []
            made.append(self)

        def forward(self, x):
            self.seen.append(tuple(self.gate(x).flatten().tolist()))
            return x

    made: list[Seeing] = []
    only = {"keeps": (0.5,), "batches": (4,), "patterns": ("iid",), "masks": 3, "min_rounds": 6, "seconds": 1e-6}
    assert not sweep(Seeing, inputs, **only)["errors"]
    (module,) = made
    assert len(set(module.seen[-12:])) == 3  # six rounds of two variants


def test_without_a_twin_the_baseline_is_made_of_the_layer_or_masked(results):
    assert {r["baseline"] for r in results["records"]} == {"dense"}

    class Own(nn.Module):
        def __init__(self, gate):
            super().__init__()
            self.gate = gate

        def forward(self, x):
            return x * self.gate(x)[..., None]

    only = {"keeps": (0.5,), "batches": (2,), "patterns": ("iid",)}
    assert [r["baseline"] for r in sweep(Own, inputs, **only, **QUICK)["records"]] == ["masked"]


def test_inputs_that_fail_and_gates_that_nobody_asks_are_errors():
    def small(batch):
        if batch > 1:
            raise MemoryError("too many")
        return inputs(batch)

    only = {"keeps": (0.5,), "patterns": ("iid",)}
    results = sweep(layer, small, batches=(1, 4), **only, **QUICK)
    assert len(results["records"]) == 1
    assert results["errors"] == [{"point": "batch 4", "variant": "dyncore", "message": "MemoryError: too many"}]
    with pytest.warns(
        UserWarning, match="every point failed, the first by ValueError: make: expected a layer that asks"
    ):
        sweep(lambda gate: nn.Linear(16, 16), inputs, batches=(2,), **only, **QUICK)


def test_rows_of_other_inputs_are_samples_and_a_twin_is_the_baseline():
    twin = nn.Linear(16, 16)
    only = {"keeps": (0.5,), "batches": (8,), "patterns": ("adversarial",)}
    results = sweep(layer, lambda n: torch.randn(n, 16, requires_grad=True), dense=twin, backward=True, **only, **QUICK)
    (record,) = results["records"]
    assert record["shape"] == {"T": 8, "H": 16}
    assert (record["baseline"], record["phase"]) == ("dense", "forward+backward")
    assert record["flops"] == {"executed": 3 * 2 * 4 * 16 * 16, "dense": 3 * 2 * 8 * 16 * 16}
    assert twin.weight.grad is None


def test_wrong_numbers_are_errors_and_the_others_stand():
    class Wrong(nn.Module):
        def __init__(self, gate):
            super().__init__()
            self.gate = gate

        def forward(self, x):
            return x + (mode() == "masked") * (self.gate.keep < 0.5)

    only = {"keeps": (0.25, 0.5), "batches": (2,), "patterns": ("iid",)}
    results = sweep(Wrong, inputs, **only, **QUICK)
    assert [r["keep_ratio"] for r in results["records"]] == [0.5]
    (error,) = results["errors"]
    assert error["point"] == "iid by row, batch 2, keep 0.25"
    assert "sparse and masked execution differ" in error["message"]


def test_ctrl_c_keeps_what_was_measured():
    def stop(text):
        if "keep 0.5" in text:
            raise KeyboardInterrupt

    only = {"keeps": (0.25, 0.5), "batches": (2,), "patterns": ("iid",)}
    results = sweep(layer, inputs, progress=stop, **only, **QUICK)
    assert results["interrupted"]
    assert [r["keep_ratio"] for r in results["records"]] == [0.25]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"keeps": (0.0,)}, "keeps: expected shares above 0, up to 1, got 0.0"),
        ({"keeps": ()}, "keeps: expected at least one, got none"),
        ({"batches": (0,)}, "batches: expected whole numbers >= 1, got 0"),
        ({"patterns": ("zigzag",)}, "patterns: expected some of iid, clustered, correlated, adversarial, got 'zigzag'"),
        ({"granularities": ("page",)}, 'granularities: expected "row", "sample" or the rows of a tile, got \'page\''),
        ({"keeps": 0.5}, "keeps: expected a list or tuple of shares above 0, up to 1, got float"),
        ({"patterns": "iid"}, "patterns: expected a list or tuple of some of iid, .*, got str"),
        ({"min_rounds": 0}, "min_rounds: expected a whole number >= 1, got 0"),
        ({"recorded": torch.ones(0, dtype=torch.bool)}, "recorded: expected a mask of one row at least, got none"),
        ({"masks": 0}, "masks: expected a whole number >= 1, got 0"),
        ({"seconds": 0}, "seconds: expected a number above 0, got 0"),
        ({"recorded": torch.ones(3)}, r"recorded: expected a bool tensor, got torch\.float32"),
        ({"dense": 3}, "dense: expected a callable, got int"),
    ],
)
def test_bad_arguments_are_named(more, message):
    with pytest.raises((TypeError, ValueError), match=message):
        sweep(layer, inputs, **more)


def test_a_layer_in_the_place_of_what_makes_it_is_refused():
    with pytest.raises(
        TypeError, match=r"make: expected a function of a gate, `lambda gate: Skip\(..., gate\)`, got a"
    ):
        sweep(layer(lambda x: x[..., 0] > 0), inputs, **QUICK)


def test_inputs_without_rows_are_refused():
    with pytest.raises(ValueError, match="inputs: expected a tensor, or arguments of which the first holds the rows"):
        sweep(layer, lambda batch: batch, **QUICK)
