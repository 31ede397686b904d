"""What measure.activation_sparsity found, as a table, as JSON and as a picture."""

import json

import pytest
import torch

from dyncore import break_even
from dyncore.measure import activation_sparsity
from tests.measure.test_activation_sparsity import Block, Given


def test_the_report_is_a_table_a_json_and_a_picture(tmp_path):
    pytest.importorskip("matplotlib")
    report = activation_sparsity(Block(), [torch.randn(4, 64, 8)])
    text = str(report)
    assert [line.split()[0] for line in text.splitlines()[:-3]] == ["layer", *report.layers]
    assert len({len(line) for line in text.splitlines()[:-3]}) == 1
    fc2 = report.layers["fc2"]
    assert f"{fc2.zero_fraction:.1%}" in text.splitlines()[2]
    report.to_json(tmp_path / "report.json")
    document = json.loads((tmp_path / "report.json").read_text())
    assert document["schema"] == "dyncore.activation_sparsity/1"
    assert document["environment"]["versions"]["torch"] == torch.__version__
    first = document["records"][1]
    assert first["layer"] == "fc2"
    assert first["zero_fraction"] == pytest.approx(fc2.zero_fraction)
    assert len(first["neuron_rate_quantiles"]) == 101
    assert first["neuron_rate_quantiles"] == sorted(first["neuron_rate_quantiles"])
    assert first["union"]["128"] == fc2.union[128]
    assert first["verdict"]["training"]["speedup"] == pytest.approx(fc2.verdict.speedups["training"])
    for dark in (False, True):
        report.plot(tmp_path / "report.png", dark=dark)
        assert (tmp_path / "report.png").read_bytes()[:4] == b"\x89PNG"


def test_the_report_says_what_its_speedups_are_and_whose_break_evens_served():
    report = activation_sparsity(Block(), [torch.randn(4, 64, 8)])
    assert "from counts of products alone: calls cost more where layers are small" in str(report)
    assert str(report).endswith("break-evens: defaults; dyncore tune measures this machine's")
    assert report.record()["break_evens"] == "defaults"
    with break_even.use(break_even.Table()):
        assert str(report).endswith("break-evens: measured on this machine by dyncore tune")
        assert report.record()["break_evens"] == "measured"


@pytest.mark.parametrize(
    ("names", "short"),
    [
        ([f"model.decoder.layers.{i}.fc2" for i in (0, 1, 10)], ["0", "1", "10"]),
        (["encoder.0.wo", "decoder.0.wo"], ["encoder", "decoder"]),
        (["ff", "ff.wo"], ["ff", "ff.wo"]),
        (["a.b.c"], ["a.b.c"]),
        (["layers.0.a", "layers.0.b"], ["a", "b"]),
        (["x" * 30, "y"], ["…" + "x" * 23, "y"]),
    ],
)
def test_names_in_a_picture_are_what_tells_layers_apart(names, short):
    pytest.importorskip("matplotlib")
    from dyncore.measure.sparsity_plots import short_names

    assert short_names(names) == short


def test_layers_in_which_nothing_fires_or_rows_are_few_are_drawn_too(tmp_path):
    pytest.importorskip("matplotlib")
    report = activation_sparsity(Given(6), [torch.zeros(3, 6)], layers=["down"])
    report.plot(tmp_path / "report.png")
    report.to_json(tmp_path / "report.json")
    assert "100.0%" in str(report)


def test_a_model_without_zeros_has_nothing_to_plot(tmp_path):
    report = activation_sparsity(Given(6), [torch.ones(3, 6)])
    assert str(report) == "no layer was watched\ndown: 0.0% zeros at its first call, watched from 10.0%"
    with pytest.raises(ValueError, match="plot: expected at least one watched layer, got none"):
        report.plot(tmp_path / "report.png")


def test_a_report_of_nothing_says_why():
    assert str(activation_sparsity(torch.nn.ReLU(), [torch.ones(3, 6)])) == (
        "no layer was watched: no nn.Linear and no module that fuses one was found, or none was chosen"
    )
    assert str(activation_sparsity(Given(6), [torch.ones(0, 6)])) == "no layer was watched\ndown: called with no rows"
