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


CLASSES = torch.arange(300) % 10


def ranked(compute, doubt):
    compute = dict(zip(who_is_hard.METHODS, compute, strict=True))
    return dc.measure.ranking(compute, references={"dense doubt": doubt}, permutations=0, bootstrap=20)


def test_the_answer_is_read_from_the_figures():
    torch.manual_seed(0)
    hard, doubt = torch.randn(2, 300)
    agreed = ranked([hard + 0.1 * torch.randn(2, 300) for _ in range(4)], doubt)
    said = who_is_hard.answer(agreed, hard > 1, CLASSES)
    assert "Yes, nearly as much as their own seeds allow" in said[0]
    assert said[4].count(" 100%") == 4
    assert "becomes 0.9" in said[3]
    apart = [torch.randn(300) + 0.3 * torch.randn(2, 300) for _ in range(3)]
    said = who_is_hard.answer(ranked([*apart, torch.randn(2, 300)], doubt), hard > 1, CLASSES)
    assert "? No: tau-b between two methods is" in said[0] or "? Hardly: " in said[0]
    assert said[1] == "Left out, as their own seeds do not agree: ACM."
    nothing = ranked([torch.randn(2, 300) for _ in range(4)], doubt)
    assert who_is_hard.answer(nothing, hard > 1, CLASSES)[0].startswith("Do they rank the images alike? That cannot")


def test_classes_explain_what_lies_between_them():
    values = torch.tensor([0.0, 0.0, 1.0, 1.0])
    assert who_is_hard.explained(values, torch.tensor([0, 0, 1, 1])) == pytest.approx(1)
    assert who_is_hard.explained(values, torch.tensor([0, 1, 0, 1])) == pytest.approx(0)


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
