"""measure.ranking: agreement of rankings by compute, against definitions written out, and what its tables say."""

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
    found = dc.measure.ranking({"a": a, "b": b}, q=0.25, permutations=0)
    assert found.tau[0, 1] == pytest.approx(tau_b(a, b))
    ranks = [torch.stack([(x < v).sum() + ((x == v).sum() + 1) / 2 for v in x]) for x in (a, b)]
    assert found.rho[0, 1] == pytest.approx(float(torch.corrcoef(torch.stack(ranks))[0, 1]), abs=1e-6)
    assert found.tau[1, 0] == found.tau[0, 1]
    assert found.p_value.isnan().all()
    assert found.tau.diagonal().isnan().all()  # one seed has no ceiling


def test_overlap_is_the_share_of_the_most_expensive_with_ties_drawn_at_random():
    a = torch.arange(20.0)
    for b, want in ((a, 1.0), (-a, 0.0), (torch.where(a >= 17, 99.0, -a), 0.75)):
        assert dc.measure.ranking({"a": a, "b": b}, q=0.2, permutations=0).overlap[0, 1] == pytest.approx(want)
    tied = torch.where(a >= 10, 1.0, 0.0)  # 4 of 10 at random, all of which lie above a's 4
    assert dc.measure.ranking({"a": a, "b": tied}, q=0.2, permutations=0).overlap[0, 1] == pytest.approx(0.4)


def test_seeds_give_the_noise_ceiling_and_what_is_left_of_it():
    torch.manual_seed(3)
    hard = torch.randn(400)
    noisy = {name: hard + s * torch.randn(3, 400) for name, s in (("a", 0.3), ("b", 1.0))}
    noisy["other"] = torch.randn(2, 400)
    found = dc.measure.ranking(noisy, permutations=200)
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
        float(dc.measure.ranking({"a": torch.randn(30), "b": torch.randn(30)}, permutations=99, seed=i).p_value[0, 1])
        for i in range(100)
    ]
    assert 0.02 <= sum(v <= 0.1 for v in p) / 100 <= 0.2


def test_a_method_that_spends_the_same_on_all_has_no_ranking():
    found = dc.measure.ranking({"a": torch.ones(9), "b": torch.arange(9)})
    assert found.tau[0, 1].isnan()
    assert found.p_value[0, 1].isnan()
    assert found.record()["rho"][0][1] is None
    assert "-" in str(found)


def test_table_record_and_plots(tmp_path):
    pytest.importorskip("matplotlib")
    found = dc.measure.ranking({"exits": torch.randn(2, 50), "halting": torch.randn(2, 50)}, permutations=50)
    text = str(found)
    assert "overlap@0.1" in text
    assert "its own seeds" in text
    assert "50 examples" in text
    found.to_json(tmp_path / "r.json")
    record = json.loads((tmp_path / "r.json").read_text())
    assert record["schema"] == "dyncore.ranking/1"
    assert record["tau"][0][1] == pytest.approx(float(found.tau[0, 1]))
    for dark in (False, True):
        found.plot(tmp_path / "heat.png", dark=dark)
        found.plot_ranks(tmp_path / "ranks.png", "exits", "halting", dark=dark)
    assert (tmp_path / "heat.png").stat().st_size > 5000
    assert (tmp_path / "ranks.png").stat().st_size > 5000
    with pytest.raises(ValueError, match="second: expected one of exits, halting, got 'gates'"):
        found.plot_ranks(tmp_path / "x.png", "exits", "gates")


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
    (lambda: dc.measure.ranking({"a": torch.ones(3)}, permutations=-1), ValueError, "permutations: expected a number >= 0, got -1"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "kind", "message"), BAD_CALLS, ids=[m for _, _, m in BAD_CALLS])
def test_bad_calls_name_the_argument(call, kind, message):
    with pytest.raises(kind) as error:
        call()
    assert message in str(error.value)
