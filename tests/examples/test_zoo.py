"""examples/zoo.py: its table says what the curves hold, and a run of some examples keeps the others."""

from pathlib import Path

import pytest

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
from examples import zoo
from examples.common import SMOKE, Point, Result


def made_up(name: str) -> Result:
    dense = Point(None, 0.95, 8e6, 2.0, 4.0)
    return Result(name, dense, [Point(0.5, 0.9, 4e6, 1.25, 2.0), Point(0.1, 0.8, 0.0, 0.5, 1.0)], "why")


def test_the_table_has_ratios_to_the_dense_network():
    text = zoo.markdown([made_up("Skip")])
    assert "| Skip | 0.5 | 90.0% | 95.0% | 2.00x | 1.60x | 0.80 | 2.00x |" in text
    assert "- Skip: why" in text


def test_the_summary_has_the_fastest_point_that_is_as_good_as_dense():
    dense = Point(None, 0.95, 8e6, 2.0, 4.0)
    close, fast = Point(0.5, 0.945, 4e6, 1.25, 2.0), Point(0.3, 0.945, 2e6, 1.0, 1.5)
    points = [Point(0.9, 0.96, 8e6, 2.1, 4.0), close, fast, Point(0.1, 0.93, 1e6, 0.5, 1.0)]
    assert zoo.kept(Result("Skip", dense, points)) == fast
    assert zoo.kept(Result("Skip", dense, points[3:])) is None


def test_curves_are_written_merged_and_read_back(tmp_path, monkeypatch):
    monkeypatch.setattr(zoo, "NAMES", ("first", "second"))
    monkeypatch.setattr(zoo, "run", lambda name, quick: made_up(f"{name}, {quick}"))
    out = tmp_path / "zoo"
    zoo.main(["--quick", "--out", str(out)])
    zoo.main(["--only", "second", "--out", str(out)])
    records = zoo.read(out.with_suffix(".json"))
    assert [record["example"] for record in records] == ["first", "second"]
    assert zoo.as_result(records[0]) == made_up("first, True")
    assert out.with_suffix(".png").stat().st_size > 1000
    assert "second, False" in out.with_suffix(".md").read_text()


def test_the_records_are_shown_and_quoted_as_they_stand():
    records = zoo.read(zoo.DEFAULT.with_suffix(".json"))
    assert [record["example"] for record in records] == list(zoo.NAMES)
    results = [zoo.as_result(record) for record in records]
    assert not any(SMOKE in result.note for result in results)
    text = zoo.markdown(results)
    assert zoo.DEFAULT.with_suffix(".md").read_text() == text
    rows = {line for line in text.splitlines() if line.startswith("| ") and "x |" in line}
    docs = Path(__file__).parents[2] / "docs"
    quoted = [
        line
        for page in docs.glob("*.md")
        for line in page.read_text().splitlines()
        if line.startswith(tuple(f"| {result.name} |" for result in results)) and "x |" in line
    ]
    assert len(quoted) > len(results)
    assert set(quoted) <= rows
