"""The report: read back as HTML, and looked at by a browser where there is one."""

import copy
import functools
import html.parser
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import nn

from dyncore.audit import audit
from dyncore.cli import main
from dyncore.measure import savings
from dyncore.nn import Skip

pytest.importorskip("matplotlib")
from dyncore.report import read_document, report_page, write_report
from dyncore.report.documents import curves
from dyncore.report.rivals import zeros_figure

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"
OTHERS = ("dyncore.zoo/1", "dyncore.flops_overhead/1")  # a report draws nothing of them
DRAWN = ("speedup", "keep", "zeros", "rivals", "roofline", "stages", "sparsity", "ranks")
FIGURES = (*DRAWN, "ranking", "disputed")
PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR4nGNgYGBgAAAABQABpfZFQAAAAABJRU5ErkJggg=="  # black
VOID = {"meta", "link", "br", "img", "path", "use", "input"}
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)


class Parsed(html.parser.HTMLParser):
    """Tags that match, ids that are unique, every attribute and all text."""

    def __init__(self, text):
        super().__init__()
        self.open, self.ids, self.attributes, self.tags, self.text = [], [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        self.ids += [value for name, value in attrs if name == "id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def results(keeps=(0.25, 0.5, 1.0), dense_ms=1.0, **more):
    """A document as dyncore bench writes it; dyncore is faster than dense below a share of 0.8."""
    records = [
        {
            "mechanism": "token-skipping",
            "input": "random <b>",
            "shape": {"T": 512, "H": 64, "I": 256},
            "dtype": "float32",
            "phase": "forward",
            "keep_ratio": keep,
            "flops": {"executed": int(keep * 4 * 512 * 64 * 256), "dense": 4 * 512 * 64 * 256},
            "variants": {
                "dyncore": {"median_ms": 1.25 * keep, "spread": 0.02, "samples_ns": [1]},
                "dense": {"median_ms": dense_ms, "spread": 0.01, "samples_ns": [1]},
                "naive": {"median_ms": 2.0 * keep, "spread": 0.01, "samples_ns": [1]},
            },
            "stages": {"deciding": 0.1, "gathering": 0.2, "computing": 0.6, "scattering": 0.1},
        }
        for keep in keeps
    ]
    head = {"schema": "dyncore.results/1", "created": "2026-01-01", "command": "dyncore bench <i>", "errors": []}
    return {**head, "warnings": [], "interrupted": False, "environment": {}, "records": records, **more}


def zeros():
    record = {"layer": "mlp", "zero_fraction": 0.9, "neuron_rate_quantiles": [i / 1000 for i in range(101)]}
    return {"schema": "dyncore.activation_sparsity/1", "records": [{**record, "histogram": [0] * 17 + [1, 2, 3]}]}


def ranking():
    tau = [[0.8, 0.3], [0.3, None]]
    ranks = [[i / 99 for i in range(100)], [1 - i / 99 for i in range(100)]]
    shown = [{"example": 7, "label": d, "png": PIXEL, "ranks": {"exit": 0.1, "moe": 0.9}} for d in ("<3>", 8, None)]
    more = {"mean_ranks": ranks, "pictures": shown}
    return {"schema": "dyncore.ranking/1", "methods": ["exit", "moe"], "examples": 100, "tau": tau, **more}


def written(folder, document, name="results.json"):
    path = folder / name
    path.write_text(document if isinstance(document, str) else json.dumps(document))
    return path


@pytest.fixture
def write(tmp_path):
    return functools.partial(written, tmp_path)


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    folder = tmp_path_factory.mktemp("everything")
    torch.manual_seed(0)
    relu = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16))
    audit(relu, torch.randn(8, 16), seconds=0.001).to_json(folder / "audit.json")
    documents = {
        "results.json": results(),
        "relu.json": results((0.01, 0.1, 0.5, 1.0)),
        "zeros.json": zeros(),
        "ranking.json": ranking(),
    }
    paths = [written(folder, document, name) for name, document in documents.items()]
    out = folder / "report.html"
    write_report([*paths, folder / "audit.json"], out)
    return out


def test_every_figure_is_there_and_the_page_is_sound(everything):
    text = everything.read_text()
    page = Parsed(text)
    assert page.open == []
    assert len(page.ids) == len(set(page.ids))
    assert {f"figure-{name}" for name in FIGURES} <= set(page.ids)
    assert page.tags.count("svg") == len(DRAWN)
    assert 'name="viewport"' in text
    assert "prefers-color-scheme: dark" in text


def test_nothing_is_fetched_and_nothing_runs(everything):
    text = everything.read_text()
    page = Parsed(text)
    assert "http" not in text
    assert "@import" not in text
    assert "script" not in page.tags
    for name, value in page.attributes:
        if name in ("href", "src", "xlink:href"):
            assert value.startswith(("#", "data:"))
    references = re.findall(r'(?:url\(|href=")#([^)"]+)', text)
    assert references
    assert set(references) <= set(page.ids)


def test_colours_are_those_of_the_page(everything):
    text = everything.read_text()
    assert "var(--ink)" in text
    for colour in ("#ffffff", "#1f2328", "#000000"):
        assert colour not in text[text.index("</style>") :]


def test_what_files_say_is_text_and_no_markup(write):
    page = Parsed(report_page([read_document(write(results(errors=[{"point": "<b>", "message": "<script>"}])))]))
    assert "b" not in page.tags
    assert "i" not in page.tags
    assert "script" not in page.tags
    assert "dyncore bench <i>" in page.text


def test_the_summary_counts_points(write):
    text = report_page([read_document(write(results()))])
    said = "token-skipping: faster than dense at 2 of 3 (median 1.60x), naive at 3 of 3 (median 1.60x); SE 0.80 in the"
    assert said in text


@pytest.mark.parametrize(
    ("dense_ms", "kept", "left_out"),
    [
        (1.0, "break-even at 0.80", "faster from 20% on"),
        (2.0, "faster everywhere", "faster at each point"),
        (0.01, "slower everywhere", "slower at each point"),
    ],
)
def test_a_break_even_is_named_where_the_curves_cross_alone(dense_ms, kept, left_out, write):
    assert kept in report_page([read_document(write(results(dense_ms=dense_ms)))])
    few = read_document(write(results((0.05, 0.5, 1.0), dense_ms=dense_ms)))
    (axes,) = zeros_figure([few]).axes
    assert axes.get_legend_handles_labels()[1][0] == f"random <b>, float32: {left_out}"


def test_rivals_that_could_not_run_are_named_with_the_reason(write):
    document = results()
    document["records"][0]["unavailable"] = {"csr": "NotImplementedError: bf16"}
    assert "<li>CSR: NotImplementedError: bf16</li>" in report_page([read_document(write(document))])


def test_warnings_errors_bars_and_an_interruption_are_said(write):
    document = results(
        warnings=["busy"],
        interrupted=True,
        errors=[{"point": "p", "variant": "v", "message": "wrong"}],
        bars=[{"text": "fast", "value": 2.0, "met": True}, {"text": "faster", "value": 1.0, "met": False}],
    )
    text = report_page([read_document(write(document))])
    for words in ("Warning: busy", "Interrupted", "p: v: wrong", "1 of 2 bars met"):
        assert words in text


def test_curves_of_two_files_are_not_mixed(write):
    documents = [read_document(write(results(), name)) for name in ("a.json", "b.json")]
    assert len(curves([c for d in documents for c in d.comparisons], sparse=False)) == 2
    assert curves(read_document(write(results((0.5, 1.0)))).comparisons, sparse=False) == {}


def test_without_data_a_figure_is_left_out(write):
    bare = {name: value for name, value in ranking().items() if name not in ("mean_ranks", "pictures")}
    page = Parsed(report_page([read_document(write(bare))]))
    assert [name for name in page.ids if name.startswith("figure-")] == ["figure-ranking"]


def test_disputed_examples_are_pictures_with_their_ranks(everything):
    text = everything.read_text()
    assert text.count("<img ") == 3
    for words in ('alt="&lt;3&gt;, no. 7"', 'alt="no. 7"', "<span>exit 0.10</span><span>moe 0.90</span>"):
        assert words in text


def test_the_roof_is_what_was_measured_beside_the_points(write):
    document = results()
    assert "highest here: " in report_page([read_document(write(document))])
    document["records"][0]["ceilings"] = {"gflops": 123.0, "gbs": 45.0}
    assert "measured beside: 123 GFLOP/s, 45 GB/s" in report_page([read_document(write(document))])


def test_the_sweep_of_savings_is_a_curve_with_its_break_even(write):
    record = {
        "module": "Skip",
        "dtype": "float32",
        "baseline": "masked",
        "flops": {"sparse": 1, "masked": 2},
        "timings": {name: {"median_ms": 1.0, "spread": 0.0} for name in ("sparse", "masked")},
        "sweep": {
            "keep": [0.25, 0.5, 1.0],
            "timings": [{"median_ms": ms, "spread": 0.0} for ms in (0.5, 0.75, 1.25)],
            "baseline": {"median_ms": 1.0},
        },
    }
    text = report_page([read_document(write(record))])
    assert "savings of Skip: break-even at 0.75" in text
    assert "<li>savings of Skip: faster than masked at 0 of 1 (median 1.00x); SE 0.50" in text  # one sentence
    assert "faster than dense" not in text
    assert "1 (masked)" in text
    assert "Skip, gates forced, float32" in text


def test_what_savings_says_beside_its_times_is_in_the_page(write):
    record = {
        "module": "Fake",
        "baseline": "dense",
        "flops": {"sparse": 2, "dense": 2},
        "timings": {name: {"median_ms": 1.0, "spread": 0.9} for name in ("sparse", "dense")},
        "interval": [0.5, 2.0],
        "overhead": 0.25,
        "break_even": 0.5,
        "batch_1": {"sparse": {"median_ms": 0.25}},
        "peak_bytes": {"sparse": 2_000_000},
        "joules": {"dense": 3.0},
        "uncounted": {"mylib::kernel": 2},
        "noise": "noisy <so>",
        "notes": ["computed in full, then multiplied by a mask"],
    }
    text = report_page([read_document(write(record))])
    for words in (
        "over dense, with 95%: 0.50 to 2.00x",
        "up to a share of 50%; +25% time where nothing is skipped",
        "One sample alone: sparse 0.25 ms",
        "Memory: sparse 2 MB",
        "Energy of a sample: dense 3 J",
        "mylib::kernel x2",
        "noisy &lt;so&gt;",
        "computed in full, then multiplied by a mask",
        "at 1 of them samples spread widely",
    ):
        assert words in text


def test_a_sweep_without_a_twin_is_against_masked_execution(write):
    document = results()
    for record in document["records"]:
        record["baseline"] = "masked"
    points = read_document(write(document)).comparisons
    assert [point.baseline for point in points] == ["masked"] * 3
    text = report_page([read_document(write(document))])
    assert "faster than masked at 2 of 3" in text
    assert "faster than dense" not in text


def test_ranks_of_references_are_not_drawn_and_an_answer_is_said(write):
    document = ranking()
    for name in ("tau", "mean_ranks"):
        document[name] = [*document[name], document[name][0]]
    told = {"methods": ["exit", "moe", "ink"], "references": ["ink"], "answer": ["In part <so>."]}
    text = report_page([read_document(write(document | told))])
    assert "In part &lt;so&gt;." in text
    assert "rank by moe" in text
    assert "rank by ink" not in text


def test_savings_are_drawn(write):
    skip = Skip(nn.Linear(16, 16), lambda x: torch.arange(x.shape[0]) % 2 == 0)
    record = savings(skip, torch.randn(64, 16), seconds=0.01).record()
    point, *forced = read_document(write(record)).comparisons
    assert point.flop_speedup == 2.0
    assert point.speedup == pytest.approx(record["wall_clock_speedup"])
    assert [other.keep for other in forced] == record["sweep"]["keep"]


def test_the_results_of_this_repository_are_understood():
    documents = [read_document(path) for path in sorted(RESULTS.rglob("*.json"))]
    assert all(d.comparisons or d.zeros or d.ranking for d in documents if d.head["schema"] not in OTHERS)
    page = Parsed(report_page(documents))
    assert page.open == []
    assert {"figure-speedup", "figure-keep", "figure-zeros", "figure-rivals", "figure-roofline"} <= set(page.ids)


def test_a_command_writes_the_file_and_says_where(write, tmp_path, capsys):
    out = tmp_path / "page.html"
    assert main(["report", str(write(results())), "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"Report: {out}\n"
    assert out.read_text().startswith("<!doctype html>")


def test_figures_are_written_as_pictures_too(write, tmp_path):
    folder = tmp_path / "new" / "folder"
    assert main(["report", str(write(results())), "--out", str(tmp_path / "r.html"), "--pictures", str(folder)]) == 0
    assert {p.name for p in folder.iterdir()} == {
        f"{n}.png" for n in ("speedup", "keep", "rivals", "roofline", "stages")
    }
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in folder.iterdir())


def broken():
    document = copy.deepcopy(results())
    del document["records"][0]["mechanism"]
    return document


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "argument results: cannot read"),
        ("hello", "argument results: expected JSON in"),
        ("[]", "argument results: expected a document that dyncore wrote"),
        ({"schema": "other/1"}, "has the schema 'other/1'"),
        (broken(), "argument results: expected all of dyncore.results/1 in"),
    ],
)
def test_bad_files_are_one_line_and_status_2(content, message, write, tmp_path, capsys):
    path = tmp_path / "none.json" if content is None else write(content)
    with pytest.raises(SystemExit) as done:
        main(["report", str(path), "--out", str(tmp_path / "r.html")])
    out, err = capsys.readouterr()
    assert (done.value.code, out, err.count("\n")) == (2, "", 1)
    assert message in err
    assert not (tmp_path / "r.html").exists()


def browse(path, tmp_path):
    """(the page after a browser has laid it out 500 pixels wide, what it complained of)."""
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--window-size=500,900", "--enable-logging=stderr"]
    command = [CHROMIUM, *options, f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", path.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
def test_a_browser_draws_every_figure_without_complaint(everything, tmp_path):
    text = everything.read_text()
    probe = """<script>
        const boxes = [...document.querySelectorAll("figure")].map(f => [f.id, f.lastElementChild.getBoundingClientRect()])
        const shown = Object.fromEntries(boxes.map(([id, b]) => [id, [b.width, b.height]]))
        const root = document.documentElement
        document.title = JSON.stringify({shown, wide: root.scrollWidth > root.clientWidth})
        </script>"""
    probed = tmp_path / "probed.html"
    probed.write_text(text.replace("</body>", f"{probe}</body>"))
    dom, complaints = browse(probed, tmp_path)
    assert complaints == []
    found = json.loads(re.search(r"<title>(.*?)</title>", dom).group(1))
    assert set(found["shown"]) == {f"figure-{name}" for name in FIGURES}
    for name, (width, height) in found["shown"].items():
        assert 300 < width <= 500, name
        assert height > 50, name
    assert not found["wide"]  # tables scroll by themselves
    probed.write_text("<script>throw new Error('seen')</script>")
    assert any("seen" in line for line in browse(probed, tmp_path)[1])
