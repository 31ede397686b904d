"""examples/who_is_hard.py: it runs as it stands, on few images, and its sentences say what the figures say."""

import json

import pytest
import torch

import dyncore as dc

pytest.importorskip("sklearn")
pytest.importorskip("scipy.stats")
pytest.importorskip("matplotlib")
from examples import who_is_hard


def test_a_quick_run_writes_the_document_and_its_pictures(tmp_path, capsys):
    who_is_hard.main(["--quick", "--seeds", "2", "--out", str(tmp_path / "who")])
    document = json.loads((tmp_path / "who.json").read_text())
    assert document["schema"] == "dyncore.ranking/1"
    assert document["methods"][:4] == list(who_is_hard.METHODS)
    assert document["seeds"][:4] == [2] * 4
    assert "--quick" in document["command"]
    assert len(document["models"]) == 8
    assert all(0 <= model["accuracy"] <= 1 and 0.3 < model["share"] < 1.2 for model in document["models"])
    assert document["pictures"][0]["png"]
    for name in ("who.png", "who-ranks.png", "who-disputed.png"):
        assert (tmp_path / name).stat().st_size > 5000
    assert document["answer"][0] in capsys.readouterr().out


def made_up(common, noise):
    torch.manual_seed(0)
    hard, doubt = torch.randn(2, 300)
    compute = {name: common * hard + doubt + noise * torch.randn(2, 300) for name in who_is_hard.METHODS}
    return dc.measure.ranking(compute, references={"dense doubt": doubt}, permutations=50, bootstrap=0), hard > 1


def test_the_answer_is_read_from_the_figures():
    agreed, wrong = made_up(3.0, 0.3)
    said = who_is_hard.answer(agreed, wrong)
    assert "Yes, nearly as much as their own seeds allow" in said[0]
    assert "6 of 6 pairs above chance" in said[0]
    assert "it leaves 0.9" in said[3]
    assert all(int(text.split("%")[0].split()[-1]) > 90 for text in said[4].split(",")[:4])
    torch.manual_seed(1)
    apart = dc.measure.ranking(
        {name: torch.randn(300) + 0.3 * torch.randn(2, 300) for name in who_is_hard.METHODS},
        references={"dense doubt": torch.randn(300)},
        permutations=50,
        bootstrap=0,
    )
    assert "? No: tau-b between two methods is" in who_is_hard.answer(apart, wrong)[0]
    same = dc.measure.ranking({name: torch.ones(2, 300) for name in who_is_hard.METHODS}, bootstrap=0)
    assert "cannot be said" in who_is_hard.answer(same, wrong)[0]


def test_a_threshold_is_found_for_a_share_of_the_flops():
    torch.manual_seed(0)
    scale = who_is_hard.QUICK
    dense, data = who_is_hard.build(scale), who_is_hard.digits(size=who_is_hard.SIZE)
    method = who_is_hard.METHODS["dynamic-k MoE"]
    x = data.valid[0][:32]
    dc.convert.moefy(dense, who_is_hard.EXPERTS, data=x, router_dim=4, steps=20)
    model = dense.eval()
    method.move(model, 0.0)
    least = dc.measure.flops(model, x)
    method.move(model, 1.0)
    wanted = (least + dc.measure.flops(model, x)) / 2 / len(x)
    with torch.no_grad(), dc.execution("sparse"):
        who_is_hard.calibrate(method, model, x, wanted)
        assert dc.measure.flops(model, x) / len(x) == pytest.approx(wanted, rel=0.1)
