"""exits: confidence criteria, thresholds that move, thresholds for a budget, simulation."""

import copy
import math

import pytest
import torch
from torch import nn

from dyncore.nn import exits

INF = math.inf
CRITERIA = {
    "max": exits.MaxProbability,
    "entropy": exits.Entropy,
    "margin": exits.Margin,
    "patience": exits.Patience,
    "learned": lambda threshold=0.5: exits.Learned(5, threshold),
}


@pytest.fixture(params=CRITERIA)
def build(request):
    return CRITERIA[request.param]


def all_logits(num_exits=4, samples=33, dtype=torch.float32):
    return [torch.randn(samples, 5).to(dtype) * (k + 1) for k in range(num_exits)]


def test_confidences_follow_their_definitions():
    z = torch.tensor([[0.0, 0.0, 0.0], [100.0, 0.0, 0.0], [2.0, 1.0, -1.0]], dtype=torch.double)
    p = [math.exp(v) / (math.exp(2) + math.exp(1) + math.exp(-1)) for v in (2, 1, -1)]
    entropy = 1 + sum(v * math.log(v) for v in p) / math.log(3)
    for criterion, want in (
        (exits.MaxProbability(), [1 / 3, 1, p[0]]),
        (exits.Entropy(), [0, 1, entropy]),
        (exits.Margin(), [0, 1, p[0] - p[1]]),
    ):
        got, state = criterion(z)
        torch.testing.assert_close(got, torch.tensor(want, dtype=torch.double), rtol=1e-6, atol=1e-7)
        assert state is None


def test_patience_counts_exits_that_agree_in_a_row():
    predictions = [[0, 0, 1], [0, 1, 1], [0, 1, 0], [1, 1, 0]]  # exits x samples
    logits = [nn.functional.one_hot(torch.tensor(row), 3).float() for row in predictions]
    counts = exits.confidences(logits, exits.Patience())
    assert counts.tolist() == [[0, 0, 0], [1, 0, 1], [2, 1, 0], [0, 2, 1]]
    assert exits.simulate(logits, exits.Patience(1)).exit.tolist() == [1, 2, 1]


def test_learned_confidence_learns_which_answers_are_right():
    torch.manual_seed(0)
    logits = torch.randn(512, 5) * 3
    right = torch.softmax(logits, -1).amax(-1) > 0.7
    criterion = exits.Learned(5)
    optimizer = torch.optim.Adam(criterion.parameters(), lr=0.1)
    for _ in range(60):
        loss = nn.functional.binary_cross_entropy_with_logits(criterion.scores(logits), right.float())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    confidence, _ = criterion(logits)
    assert ((confidence >= criterion.threshold) == right).float().mean() > 0.9


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_confidence_is_computed_in_float32_or_wider(build, dtype):
    criterion = build()
    logits = torch.randn(7, 5).to(dtype)
    got, _ = criterion(logits)
    assert got.dtype in (torch.float32, torch.float64)
    want, _ = criterion(logits.double())
    torch.testing.assert_close(got.double(), want.double(), rtol=1e-5, atol=1e-6)


def test_moving_the_threshold_moves_the_exits_from_first_to_last(build):
    criterion, logits = build(), all_logits()
    buffer = criterion.threshold
    mean = []
    for threshold in (-INF, 0.1, 0.5, 0.9, 1.5, INF):
        criterion.threshold = threshold
        assert criterion.threshold is buffer
        mean.append(exits.simulate(logits, criterion).exit.double().mean())
    assert mean[0] == 0
    assert mean[-1] == 3
    assert mean == sorted(mean)
    assert len(set(mean)) > 2


def test_each_exit_may_have_its_own_threshold():
    criterion, logits = exits.MaxProbability([INF, -INF, 0.5]), all_logits()
    assert exits.simulate(logits, criterion).exit.tolist() == [1] * 33
    buffer = criterion.threshold
    criterion.threshold = torch.tensor([INF, INF, -INF])
    assert criterion.threshold is buffer
    assert exits.simulate(logits, criterion).exit.tolist() == [2] * 33
    criterion.threshold = -INF  # all of them
    assert criterion.threshold.tolist() == [-INF] * 3
    other = exits.MaxProbability(0.5)
    other.threshold = [0.1, 0.2, 0.3]
    torch.testing.assert_close(other.threshold, torch.tensor([0.1, 0.2, 0.3]))
    twin = copy.deepcopy(other)
    assert torch.equal(twin.threshold, other.threshold)
    assert twin.state_dict().keys() == {"threshold"}
    fresh = exits.MaxProbability()
    fresh.load_state_dict(other.state_dict())  # calibrated since it was built
    assert torch.equal(fresh.threshold, other.threshold)


def test_simulation_takes_the_first_exit_that_is_sure(build):
    criterion, logits = build(0.6), all_logits()
    surest = exits.confidences(logits, criterion)
    got = exits.simulate(logits, criterion, costs=[1, 2, 3, 4])
    for i in range(33):
        want = next((k for k in range(3) if surest[k, i] >= 0.6), 3)
        assert got.exit[i] == want
        assert torch.equal(got.logits[i], logits[want][i])
        assert got.cost[i] == (1, 3, 6, 10)[want]


def test_nan_never_leaves_early():
    logits = all_logits()
    for z in logits:
        z[5] = torch.nan
    for make in CRITERIA.values():
        if make is not exits.Patience:  # which looks at predictions alone
            assert exits.simulate(logits, make(0.2)).exit[5] == 3


@pytest.mark.parametrize("budget", [1.5, 4.0, 8.0, 9.9])
def test_thresholds_spend_the_budget(budget):
    logits, costs, criterion = all_logits(4, 2000), [1, 2, 3, 4], exits.MaxProbability()
    surest = exits.confidences(logits, criterion)
    criterion.threshold = exits.calibrate(surest, costs, budget)
    spent = exits.simulate(logits, criterion, costs)
    assert float(spent.cost.mean()) == pytest.approx(budget, abs=0.02)
    left = torch.bincount(spent.exit, minlength=4).double()
    ratios = left[1:] / left[:-1]  # geometric: the same share of those that come leaves everywhere
    assert (ratios / ratios[0] - 1).abs().max() < 0.05 or left.min() < 40


def test_a_budget_for_everything_and_one_for_nothing():
    surest = torch.rand(4, 50)
    assert exits.calibrate(surest, [1, 2, 3, 4], 10).tolist() == [INF] * 3
    cheapest = exits.calibrate(surest, [1, 2, 3, 4], 1.0)
    assert cheapest[0] <= surest[0].min()
    with pytest.raises(ValueError, match="budget: expected at least 1, the cost of the first exit, got"):
        exits.calibrate(surest, [1, 2, 3, 4], 0.5)


def test_calibration_is_not_disturbed_by_nan_and_ties():
    surest = torch.ones(3, 40)
    surest[:, :20] = torch.nan
    thresholds = exits.calibrate(surest, [1, 1, 1], 1.2)
    assert not thresholds.isnan().any()
    assert (thresholds > -INF).all()


@pytest.mark.parametrize("chained", [True, False])
def test_zero_time_waste_is_a_geometric_mean_of_what_is_known(chained):
    head = exits.ZeroTimeWaste(nn.Linear(6, 8), 8, 5).double()
    nn.init.normal_(head.weight)
    nn.init.normal_(head.bias)
    x = torch.randn(7, 6, dtype=torch.double)
    previous = torch.randn(7, 5, dtype=torch.double, requires_grad=True) if chained else None
    before = torch.zeros(7, 5, dtype=torch.double) if previous is None else torch.softmax(previous, -1).log()
    own = torch.softmax(torch.cat([head.features(x), before], 1) @ head.own.weight.t() + head.own.bias, -1)
    want = own ** head.weight[0] * before.exp() ** head.weight[1] * head.bias.exp()
    got = head(x, previous=previous)
    torch.testing.assert_close(got.exp(), want / want.sum(1, keepdim=True))
    got.square().sum().backward()
    assert previous is None or previous.grad is None  # exits do not disturb those before


LOGITS = [torch.zeros(3, 5)] * 2


def test_a_criterion_of_ones_own_may_have_a_threshold_for_each_exit():
    class Own:
        def __init__(self, threshold):
            self.threshold = threshold

        def __call__(self, logits, state):
            return torch.softmax(logits, -1).amax(-1)

    logits = [torch.tensor([[2.0, 0.0], [3.0, 0.0]])] * 3  # 0.88 and 0.95
    for threshold in ([0.9, 0.0], (0.9, 0.0), torch.tensor([0.9, 0.0])):
        assert exits.simulate(logits, Own(threshold)).exit.tolist() == [1, 0]
    with pytest.raises(IndexError, match="threshold: expected one for exit 1, got 1"):
        exits.simulate(logits, Own([0.9]))


BAD_CALLS = [
    (lambda: exits.MaxProbability([[0.5]]), ValueError, "threshold: expected a number or one for each exit but the last"),
    (lambda: exits.MaxProbability()(torch.zeros(3)), ValueError, "logits: expected shape [B, C], got [3]"),
    (lambda: exits.MaxProbability()([1.0]), TypeError, "logits: expected a Tensor, got list"),
    (lambda: exits.Margin()(torch.zeros(3, 1)), ValueError, "logits: expected at least 2 classes"),
    (lambda: exits.Learned("x"), TypeError, "score: expected an int >= 1, got str"),
    (lambda: exits.Learned(nn.Linear(5, 2))(torch.zeros(3, 5)), ValueError, "score: expected logits [3, 1], got shape [3, 2]"),
    (lambda: exits.MaxProbability([0.5]).threshold_of(1), IndexError, "threshold: expected one for exit 1, got 1"),
    (lambda: exits.simulate(LOGITS, lambda z, s: 3), TypeError, "criterion: expected a confidence [B], got int"),
    (lambda: exits.simulate(LOGITS, lambda z, s: z), ValueError, "criterion: expected a confidence [3], got shape [3, 5]"),
    (lambda: exits.simulate(LOGITS, lambda z, s: z[:, 0]), ValueError, "criterion: expected one with a threshold, got none"),
    (lambda: exits.simulate(LOGITS[0], exits.Margin()), ValueError, "logits: expected a sequence of tensors [B, C]"),
    (lambda: exits.simulate([LOGITS[0], torch.zeros(2, 5)], exits.Margin()), ValueError, "logits[1]: expected the shape of the first"),
    (lambda: exits.simulate(LOGITS, exits.Margin(), [1]), ValueError, "costs: expected 2 of them, one a stage, got 1"),
    (lambda: exits.simulate(LOGITS, exits.Margin(), [-1, 1]), ValueError, "costs: expected finite numbers >= 0"),
    (lambda: exits.simulate(LOGITS, exits.Margin(), [1, INF]), ValueError, "costs: expected finite numbers >= 0"),
    (lambda: exits.calibrate(torch.zeros(3), [1, 1, 1], 2), ValueError, "confidences: expected shape [K, N], got [3]"),
    (lambda: exits.ZeroTimeWaste(nn.Identity(), 0, 5), ValueError, "in_features: expected an int >= 1, got 0"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "kind", "message"), BAD_CALLS, ids=[m for _, _, m in BAD_CALLS])
def test_bad_calls_name_the_argument(call, kind, message):
    with pytest.raises(kind) as error:
        call()
    assert message in str(error.value)
