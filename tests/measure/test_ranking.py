"""measure.ranking: agreement of rankings by compute, against definitions written out, and what its tables say."""

import base64
import io
import json
import math
import sys

import pytest
import torch

import dyncore as dc

scipy = pytest.importorskip("scipy.stats")


def tau_b(a, b):
    """By all pairs, each counted twice."""
    x, y = ((v[:, None] - v[None, :]).sign() for v in (a, b))
    return float((x * y).sum() / ((x != 0).sum() * (y != 0).sum()).sqrt())


def test_the_measures_are_their_definitions():
    a, b = torch.randint(0, 5, (2, 40)).float()
    found = dc.measure.ranking({"a": a, "b": b}, q=0.25, permutations=0, bootstrap=0)
    assert found.tau[0, 1] == pytest.approx(tau_b(a, b))
    ranks = [torch.stack([(x < v).sum() + ((x == v).sum() + 1) / 2 for v in x]) for x in (a, b)]
    assert found.rho[0, 1] == pytest.approx(float(torch.corrcoef(torch.stack(ranks))[0, 1]), abs=1e-6)
    assert found.tau[1, 0] == found.tau[0, 1]
    assert found.p_value.isnan().all()
    assert found.tau.diagonal().isnan().all()  # one seed has no ceiling


def test_overlap_is_the_share_of_the_most_expensive_with_ties_drawn_at_random():
    a = torch.arange(20.0)
    for b, want in ((a, 1.0), (-a, 0.0), (torch.where(a >= 17, 99.0, -a), 0.75)):
        assert dc.measure.ranking({"a": a, "b": b}, q=0.2, permutations=0, bootstrap=0).overlap[0, 1] == pytest.approx(
            want
        )
    tied = torch.where(a >= 10, 1.0, 0.0)  # 4 of 10 at random, all of which lie above a's 4
    assert dc.measure.ranking({"a": a, "b": tied}, q=0.2, permutations=0, bootstrap=0).overlap[0, 1] == pytest.approx(
        0.4
    )


def test_seeds_give_the_noise_ceiling_and_what_is_left_of_it():
    torch.manual_seed(3)
    hard = torch.randn(400)
    noisy = {name: hard + s * torch.randn(3, 400) for name, s in (("a", 0.3), ("b", 1.0))}
    noisy["other"] = torch.randn(2, 400)
    found = dc.measure.ranking(noisy, permutations=200, bootstrap=0)
    assert found.seeds == (3, 3, 2)
    pairs = [tau_b(noisy["b"][i], noisy["b"][j]) for i, j in ((0, 1), (0, 2), (1, 2))]
    assert found.tau[1, 1] == pytest.approx(sum(pairs) / 3)
    across = [tau_b(x, y) for x in noisy["a"] for y in noisy["b"]]
    assert found.tau[0, 1] == pytest.approx(sum(across) / 9)
    assert found.tau[0, 0] > found.tau[0, 1] > found.tau[1, 1]
    assert found.corrected[0, 1] == pytest.approx(1, abs=0.1)  # they differ by their noise alone
    assert found.p_value[0, 1] == pytest.approx(1 / 201)
    assert found.p_value[0, 2] > 0.02
    assert found.mean_ranks.min() >= 0
    assert found.mean_ranks.max() <= 1


def test_the_permutation_test_rejects_as_often_as_it_says():
    torch.manual_seed(0)
    p = [
        float(
            dc.measure.ranking(
                {"a": torch.randn(30), "b": torch.randn(30)}, permutations=99, bootstrap=0, seed=i
            ).p_value[0, 1]
        )
        for i in range(100)
    ]
    assert 0.02 <= sum(v <= 0.1 for v in p) / 100 <= 0.2


def test_a_method_that_spends_the_same_on_all_has_no_ranking():
    found = dc.measure.ranking({"a": torch.ones(9), "b": torch.arange(9)}, bootstrap=20)
    assert found.tau[0, 1].isnan()
    assert found.p_value[0, 1].isnan()
    assert found.record()["rho"][0][1] is None
    assert found.record()["intervals"]["tau"][1][0][1] is None
    assert found.distinct == (1, 9)
    assert "mostly ties, with so many different values: a 1" in str(found)
    assert str(found).splitlines()[-1].startswith("of ceiling: tau-b over that of each method's own seeds; overlap: ")
    assert "-" in str(found)


def test_the_tail_is_kendalls_tau_weighted_by_rank():
    a, b = torch.randperm(12).double(), torch.randperm(12).double()

    def by_ranks_of(values):
        weight = 1 / (1 + (-values).argsort().argsort().double())  # 1 for the most expensive, then 1/2, 1/3, ...
        weights = weight[:, None] + weight[None, :]
        agree = (a[:, None] - a).sign() * (b[:, None] - b).sign()
        return float((weights * agree).sum() / (weights * (1 - torch.eye(12))).sum())

    found = dc.measure.ranking({"a": a, "b": b}, permutations=0, bootstrap=0)
    assert found.tail[0, 1] == pytest.approx((by_ranks_of(a) + by_ranks_of(b)) / 2)
    late = torch.arange(30.0)
    early = late.clone()
    late[:2], early[-2:] = late[:2].flip(0), early[-2:].flip(0)  # one swap, at the cheap end or at the dear one
    found = dc.measure.ranking({"a": torch.arange(30.0), "late": late, "early": early}, permutations=0, bootstrap=0)
    assert found.tau[0, 1] == found.tau[0, 2]
    assert found.tail[0, 1] > found.tail[0, 2] + 0.02


def test_what_seeds_share_is_no_agreement():
    torch.manual_seed(0)
    of_seed = torch.randn(3, 200)  # of the dense network of a seed: all that the methods have in common
    compute = {"a": of_seed + 0.1 * torch.randn(3, 200), "b": of_seed + 0.1 * torch.randn(3, 200)}
    ink = torch.randn(200)
    naive = dc.measure.ranking(compute, references={"ink": ink}, permutations=200, bootstrap=0)
    found = dc.measure.ranking(compute, references={"ink": ink}, shared_seeds=True, permutations=200, bootstrap=0)
    assert naive.tau[0, 1] > 0.2
    assert naive.p_value[0, 1] < 0.01
    across = [tau_b(compute["a"][i], compute["b"][j]) for i in range(3) for j in range(3) if i != j]
    assert found.tau[0, 1] == pytest.approx(sum(across) / 6)
    assert abs(found.tau[0, 1]) < 0.1
    assert found.p_value[0, 1] > 0.01
    assert found.tau[0, 2] == pytest.approx(sum(tau_b(row, ink) for row in compute["a"]) / 3)


def test_the_permutation_test_of_shared_seeds_rejects_as_often_as_it_says():
    torch.manual_seed(0)
    p = []
    for i in range(60):
        of_seed = torch.randn(3, 40)
        p.append(
            dc.measure.ranking({"a": of_seed, "b": of_seed}, shared_seeds=True, permutations=39, bootstrap=0, seed=i)
        )
    assert sum(float(found.p_value[0, 1]) <= 0.1 for found in p) <= 10


def test_a_method_whose_seeds_agree_by_chance_has_no_share_of_its_ceiling():
    torch.manual_seed(0)
    a = torch.randn(60) + 0.5 * torch.randn(3, 60)
    compute = [{"a": a, "noise": torch.randn(3, 60)} for _ in range(30)]
    found = [dc.measure.ranking(c, permutations=0, bootstrap=40, seed=i) for i, c in enumerate(compute)]
    assert all(bool(f.repeatable[0]) for f in found)
    assert sum(float(f.tau[1, 1]) > 0 for f in found) > 8
    assert sum(bool(f.repeatable[1]) for f in found) <= 4
    for f in found:
        assert f.corrected[0, 1].isnan() == ~f.repeatable[1]


def test_seeds_that_agree_with_opposite_signs_do_not_agree():
    torch.manual_seed(0)
    a = torch.randn(200)
    compute = {"a": torch.stack([a, a]), "b": torch.stack([a, -a])}
    found = dc.measure.ranking(compute, shared_seeds=True, permutations=50, bootstrap=0)
    assert found.p_value[0, 1] == 1


def test_a_reference_that_explains_all_leaves_nothing():
    torch.manual_seed(0)
    cause = torch.randn(500)
    compute = {name: cause + 0.5 * torch.randn(4, 500) for name in "ab"}
    references = {"cause": cause, "else": torch.randn(500)}
    found = dc.measure.ranking(compute, references=references, permutations=0, bootstrap=0)
    assert found.methods == ("a", "b", "cause", "else")
    assert found.references == ("cause", "else")
    assert abs(found.given("cause")[0, 1]) < 0.15
    assert found.given("else")[0, 1] > 0.8
    assert found.given("cause")[2].isnan().all()
    assert "cause" in str(found)
    assert not any(line.startswith("cause") and "else" in line for line in str(found).splitlines())


def test_intervals_hold_the_truth_as_often_as_they_say():
    torch.manual_seed(0)
    truth = 2 / math.pi * math.asin(0.6)  # Kendall's tau of two normal variables correlated by 0.6
    held = 0
    for i in range(40):
        a = torch.randn(60)
        compute = {"a": a, "b": 0.6 * a + 0.8 * torch.randn(60)}
        limits = dc.measure.ranking(compute, permutations=0, bootstrap=60, seed=i).intervals["tau"][:, 0, 1]
        held += bool(limits[0] < truth < limits[1])
    assert held >= 32  # 38 of 40 expected; 60 draws make the limits themselves uncertain


def test_fewer_draws_than_examples_make_intervals_as_narrow(monkeypatch):
    torch.manual_seed(0)
    a = torch.randn(2, 400)
    compute = {"a": a, "b": a + torch.randn(2, 400)}
    whole = dc.measure.ranking(compute, permutations=0).intervals
    monkeypatch.setattr("dyncore.measure.ranking_statistics.MOST_DRAWN", 100)
    some = dc.measure.ranking(compute, permutations=0).intervals
    for name in ("tau", "rho"):
        width, other = (float(limits[name][1, 0, 1] - limits[name][0, 0, 1]) for limits in (whole, some))
        assert other == pytest.approx(width, rel=0.3)
        assert some[name][:, 0, 1].mean() == pytest.approx(float(whole[name][:, 0, 1].mean()), abs=0.02)


def test_the_most_disputed_are_those_whose_ranks_lie_farthest_apart():
    a = torch.arange(50.0)
    b = a.clone()
    b[3], b[48] = 49.5, 20.5
    found = dc.measure.ranking({"a": a, "b": b}, references={"not asked": -a}, permutations=0, bootstrap=0)
    assert found.disputed(2).tolist() == [3, 48]
    assert len(found.disputed(99)) == 50
    with pytest.raises(ValueError, match="count: expected a number >= 1, got 0"):
        found.disputed(0)


def test_table_record_and_plots(tmp_path):
    pytest.importorskip("matplotlib")
    compute = {"exits": torch.randn(2, 50), "halting": torch.randn(2, 50)}
    found = dc.measure.ranking(compute, references={"loss": torch.randn(50)}, permutations=50, bootstrap=20)
    text = str(found)
    assert "overlap@0.1" in text
    assert "its own seeds" in text
    assert "50 examples" in text
    images, labels = torch.rand(50, 1, 8, 6), [f"of class {i}" for i in range(50)]
    found.to_json(tmp_path / "r.json", images, labels)
    record = json.loads((tmp_path / "r.json").read_text())
    assert record["schema"] == "dyncore.ranking/1"
    assert record["tau"][0][1] == pytest.approx(float(found.tau[0, 1]))
    assert record["intervals"]["rho"][0][0][1] == pytest.approx(float(found.intervals["rho"][0, 0, 1]))
    assert len(record["mean_ranks"]) == 3
    first = record["pictures"][0]
    assert first["example"] == int(found.disputed(1))
    assert first["label"] == f"of class {first['example']}"
    assert first["ranks"]["halting"] == pytest.approx(float(found.mean_ranks[1, first["example"]]))
    assert list(first["ranks"]) == ["exits", "halting"]
    pixels = pytest.importorskip("matplotlib.image").imread(io.BytesIO(base64.b64decode(first["png"])))
    assert torch.from_numpy(pixels[..., 0]).allclose(images[first["example"], 0], atol=1 / 255)
    for dark in (False, True):
        found.plot(tmp_path / "heat.png", dark=dark)
    found.plot_ranks(tmp_path / "ranks.png", "exits", "halting", dark=True)
    found.plot_ranks(tmp_path / "all.png")
    found.plot_disputed(tmp_path / "disputed.png", images.expand(-1, 3, -1, -1), count=5, dark=True)
    for name in ("heat", "ranks", "all", "disputed"):
        assert (tmp_path / f"{name}.png").stat().st_size > 5000
    with pytest.raises(ValueError, match="second: expected one of exits, halting, loss, got 'gates'"):
        found.plot_ranks(tmp_path / "x.png", "exits", "gates")
    with pytest.raises(ValueError, match="images: expected images of the 50 examples"):
        found.plot_disputed(tmp_path / "x.png", images[:9])
    with pytest.raises(ValueError, match="labels: expected 50 of them, one an example, got 1"):
        found.record(images, ["1"])


def test_a_document_of_many_examples_holds_the_ranks_of_some():
    found = dc.measure.ranking({"a": torch.arange(4500), "b": -torch.arange(4500)}, permutations=0, bootstrap=0)
    ranks = found.record()["mean_ranks"]
    assert [len(row) for row in ranks] == [1500, 1500]
    assert ranks[0][1] == pytest.approx(3 / 4499, abs=1e-4)


def test_a_missing_library_is_named_with_what_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.stats", None)
    with pytest.raises(ImportError, match=r'measure.ranking needs scipy: pip install "dyncore\[bench\]"'):
        dc.measure.ranking({"a": torch.arange(4)})


BAD_CALLS = [
    (lambda: dc.measure.ranking([torch.ones(3)]), TypeError, "compute: expected a dict of tensors by method, got list"),
    (lambda: dc.measure.ranking({}), ValueError, "compute: expected at least one method"),
    (lambda: dc.measure.ranking({"a": [1, 2]}), TypeError, "compute: expected tensors, got list for 'a'"),
    (lambda: dc.measure.ranking({"a": torch.ones(1, 2, 3)}), ValueError, "compute: expected shape [N] or [seeds, N], got [1, 2, 3] for 'a'"),
    (lambda: dc.measure.ranking({"a": torch.ones(3), "b": torch.ones(4)}), ValueError, "compute: expected the same examples, at least 2, got 4 for 'b'"),
    (lambda: dc.measure.ranking({"a": torch.tensor([1.0, math.nan])}), ValueError, "compute: expected numbers, got NaN for 'a'"),
    (lambda: dc.measure.ranking({"a": torch.ones(3)}, q=0.0), ValueError, "q: expected a share in 0..1, got 0.0"),
    (lambda: dc.measure.ranking({"a": torch.ones(3)}, references={"b": torch.ones(4)}), ValueError, "references: expected the same examples, at least 2, got 4 for 'b'"),
    (lambda: dc.measure.ranking({"a": torch.ones(3)}, references={"a": torch.ones(3)}), ValueError, "references: expected other names than those of compute, got 'a'"),
    (lambda: dc.measure.ranking({"a": torch.ones(3)}, references=[1]), TypeError, "references: expected a dict of tensors by method, got list"),
    (lambda: dc.measure.ranking({"a": torch.ones(3)}, bootstrap=-1), ValueError, "bootstrap: expected a number >= 0, got -1"),
    (lambda: dc.measure.ranking({"a": torch.arange(3)}, bootstrap=0).given("b"), ValueError, "reference: expected one of a, got 'b'"),
    (lambda: dc.measure.ranking({"a": torch.arange(3)}, bootstrap=0).plot_ranks("x.png"), ValueError, "first: expected two methods to draw, got 1"),
    (lambda: dc.measure.ranking({"a": torch.ones(3)}, permutations=-1), ValueError, "permutations: expected a number >= 0, got -1"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "kind", "message"), BAD_CALLS, ids=[m for _, _, m in BAD_CALLS])
def test_bad_calls_name_the_argument(call, kind, message):
    with pytest.raises(kind) as error:
        call()
    assert message in str(error.value)
