"""Documents are what docs/results.schema.json and docs/results.md say."""

import json
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from dyncore.audit import audit
from dyncore.bench import points
from dyncore.bench.contest import measure
from dyncore.measure import activation_sparsity, new_results, ranking, savings, sweep
from dyncore.nn import Skip
from dyncore.report.documents import read_document
from tests.json_schema import ROOT, SCHEMA, check, problems

RESULTS = ROOT / "benchmarks" / "results"
OTHERS = (
    "dyncore.relu_lm/1",
    "dyncore.zoo/1",
    "dyncore.flops_overhead/1",
)  # of one script each, which says what it holds


@pytest.mark.parametrize("name", sorted(str(p.relative_to(RESULTS)) for p in RESULTS.rglob("*.json")))
def test_the_results_of_this_repository_fit(name):
    document = json.loads((RESULTS / name).read_text())
    if document["schema"] not in OTHERS:
        check(document)


def test_a_bench_fits():
    measured = [measure(point, seconds=0, min_rounds=2) for point in points(["moe"], size="tiny")[:2]]
    check(new_results("dyncore bench") | {"records": [record for record, _ in measured]})


def test_a_sweep_fits():
    some = {"keeps": (0.5,), "batches": (2,), "patterns": ("iid",), "masks": 1, "seconds": 1e-6, "min_rounds": 2}
    check(sweep(lambda gate: Skip(nn.Linear(8, 8), gate), lambda batch: torch.randn(batch, 4, 8), **some))


def test_an_audit_fits():
    relu = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16))
    check(audit(relu, torch.randn(8, 16), seconds=0.001).record())


def test_zeros_fit():
    relu = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16))
    check(activation_sparsity(relu, [torch.randn(8, 16)]).record())


def test_savings_fit(tmp_path):
    saved = savings(Skip(nn.Linear(8, 8), lambda x: x[:, 0] > 0), torch.randn(16, 8), seconds=0.01)
    assert saved.sweep is not None
    check(saved.record())
    check(savings(nn.ReLU(), torch.randn(4), seconds=0.01, min_rounds=1, details=False).record())
    saved.to_json(tmp_path / "saved.json")
    document = read_document(tmp_path / "saved.json")
    assert document.head["environment"]["versions"]["torch"] == torch.__version__
    assert document.comparisons


def test_a_ranking_fits():
    pytest.importorskip("scipy")
    check(ranking({"a": torch.randn(2, 20), "b": torch.randn(20)}, permutations=10).record())


def test_what_does_not_fit_is_found_by_its_path():
    document = json.loads((RESULTS / "pack.json").read_text())
    record = document["records"][0]
    record["se"], record["phase"], record["more"] = "fast", "sideways", 1
    del record["variants"]["dyncore"]["spread"]
    assert list(problems(document, SCHEMA["$defs"]["results"])) == [
        "document.records[0].phase: expected one of ['forward', 'forward+backward'], got 'sideways'",
        "document.records[0].variants.dyncore: 'spread' is missing",
        "document.records[0].se: expected number or null, got 'fast'",
        "document.records[0]: 'more' is not in the schema",
    ]


def test_the_page_says_what_every_field_is():
    page = Path(ROOT / "docs" / "results.md").read_text()
    for kind in ("results", "record", "audit", "layer", "timing", "environment", "savings"):
        for name, field in SCHEMA["$defs"][kind]["properties"].items():
            rows = re.findall(rf"^\| `{name}` \| (.*) \|$", page, re.M)
            known = kind == "audit" and name in SCHEMA["$defs"]["results"]["properties"]
            text = "" if known or field.keys() & {"$ref", "const"} else field["description"]
            assert any(text in row for row in rows), name
