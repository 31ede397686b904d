"""Gates: what is open, how much it counts, what gradient comes back, and thresholds that move."""

import pytest
import torch
from torch import nn

import dyncore as dc
from tests.nn.oracle import D


def probabilities(gate, x):
    return torch.sigmoid(nn.functional.linear(x, gate.score.weight, gate.score.bias))[..., 0]


@pytest.mark.parametrize("number", [torch.tensor(0.25), nn.Parameter(torch.tensor(0.25)), torch.tensor(1)], ids=str)
def test_thresholds_and_temperatures_may_be_tensors_of_no_dimensions(number):
    for gate in (
        dc.nn.GumbelGate(D, number, number),
        dc.nn.HardConcreteGate(D, number, number),
        dc.nn.ChoiceGate(D, 2, number, number),
    ):
        for buffer in (gate.threshold, gate.temperature):
            assert float(buffer) == number.item()
            assert buffer.dtype == torch.float32
            assert not buffer.requires_grad


def test_threshold_opens_above_it_with_the_probability_as_scale():
    gate, x = dc.nn.ThresholdGate(D, 0.6), torch.randn(3, 50, D)
    mask, scale, count = gate(x)
    p = probabilities(gate, x)
    assert torch.equal(mask, p > 0.6)
    assert count is None
    torch.testing.assert_close(scale, p)


def test_straight_through_is_one_forward_and_soft_backward():
    gate, x = dc.nn.StraightThroughGate(D), torch.randn(40, D)
    mask, scale, _ = gate(x)
    assert torch.equal(scale, mask.float())
    weights = torch.randn(40)
    got = torch.autograd.grad((scale * weights).sum(), gate.score.weight)[0]
    want = torch.autograd.grad((probabilities(gate, x) * weights).sum(), gate.score.weight)[0]
    torch.testing.assert_close(got, want)


def test_no_weight_means_no_scale():
    assert dc.nn.ThresholdGate(D, weight="none")(torch.randn(4, D)).scale is None


@pytest.mark.parametrize("capacity", [0.25, 5, 0.0, 0, 1.0, 100])
def test_topk_opens_the_highest(capacity):
    gate, x = dc.nn.TopKGate(D, capacity), torch.randn(3, 20, D)
    mask, scale, count = gate(x)
    p = probabilities(gate, x)
    k = round(20 * capacity) if isinstance(capacity, float) else min(capacity, 20)
    assert count == k
    assert gate.capacity == capacity
    assert mask.sum(1).tolist() == [k] * 3
    for b in range(3):
        assert set(mask[b].nonzero()[:, 0].tolist()) == set(p[b].topk(k).indices.tolist())
    torch.testing.assert_close(scale, p)


def test_topk_of_samples_ranks_the_batch():
    gate = dc.nn.TopKGate(3, 2, pool=dc.nn.gates.pool_spatial)
    mask, _, count = gate(torch.randn(6, 3, 4, 4))
    assert mask.shape == (6,)
    assert int(mask.sum()) == count == 2


def test_gumbel_opens_with_the_probability_it_was_given_in_training_only():
    gate = dc.nn.GumbelGate(1)
    nn.init.constant_(gate.score.weight, 0.0)
    nn.init.constant_(gate.score.bias, 1.0)
    x = torch.zeros(20000, 1)
    frequency = float(gate(x).mask.float().mean())
    assert abs(frequency - torch.sigmoid(torch.tensor(1.0)).item()) < 0.015
    gate.eval()
    assert gate(x).mask.all()


def test_gumbel_gradient_is_that_of_the_tempered_sigmoid():
    gate, x = dc.nn.GumbelGate(D, temperature=0.5).eval(), torch.randn(30, D)
    got = torch.autograd.grad(gate(x).scale.sum(), gate.score.weight)[0]
    logits = gate.score(x)[:, 0]
    want = torch.autograd.grad(torch.sigmoid(logits / 0.5).sum(), gate.score.weight)[0]
    torch.testing.assert_close(got, want)


def test_lower_temperature_makes_samples_harder():
    gate, x = dc.nn.GumbelGate(D, weight="soft"), torch.randn(2000, D)
    spread = []
    for temperature in (2.0, 0.1):
        gate.temperature = temperature
        p = gate(x).scale
        spread.append(float((p * (1 - p)).detach().mean()))
    assert spread[1] < 0.25 * spread[0]


def test_two_logits_are_skip_and_keep():
    score = nn.Linear(D, 2)
    x = torch.randn(25, D)
    mask = dc.nn.ThresholdGate(score)(x).mask
    assert torch.equal(mask, torch.softmax(score(x), -1)[:, 1] > 0.5)


def test_thresholds_move_at_run_time_without_a_retrace():
    gate, x = dc.nn.ThresholdGate(D), torch.randn(200, D)
    layer = dc.nn.Skip(dc.nn.MLP(D, 24), gate)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    keep = []
    with torch.no_grad():
        for threshold in (0.0, 0.45, 0.55, 1.0):
            gate.threshold = threshold
            torch.testing.assert_close(compiled(x), layer(x))
            keep.append(float(layer.last_cost.mean()))
    assert keep[0] == 1.0
    assert keep[-1] == 0.0
    assert keep == sorted(keep, reverse=True)
    assert len(set(keep)) == 4
    assert len(graphs) == 1


SWEPT = {
    "threshold": lambda: dc.nn.ThresholdGate(D),
    "straight_through": lambda: dc.nn.StraightThroughGate(D),
    "gumbel": lambda: dc.nn.GumbelGate(D),
    "hard_concrete": lambda: dc.nn.HardConcreteGate(D),
    "choice": lambda: dc.nn.ChoiceGate(D, 3),
    "rectified": lambda: dc.nn.RectifiedGate(D, 3),
    "bernoulli": lambda: dc.nn.BernoulliPolicy(D),
    "policy": lambda: dc.nn.BernoulliPolicy(D, 3),
}


@pytest.mark.parametrize("name", SWEPT)
@torch.no_grad()
def test_the_threshold_of_every_gate_sweeps_its_layer_from_all_to_none(name):
    gate, x = SWEPT[name]().eval(), torch.randn(300, D) * 3
    modules = [nn.Linear(D, D) for _ in range(3)]
    if name in ("choice", "rectified"):
        layer = dc.nn.Branch(modules, gate)
    else:
        layer = dc.nn.PolicySkip(modules, gate) if name == "policy" else dc.nn.Skip(modules[0], gate)
    most = 1 / 3 if name == "choice" else 1.0  # it takes one of three
    keep = []
    for threshold in (-1.0, 0.0, 0.3, 0.5, 0.8, 1.0):
        gate.threshold = threshold
        layer(x)
        keep.append(float(layer.last_cost.mean()))
    assert keep[0] == pytest.approx(most)
    assert keep[-1] == 0.0
    assert keep == sorted(keep, reverse=True)
    assert len(set(keep)) >= 4


def test_hard_concrete_is_exactly_zero_and_one_at_times():
    gate = dc.nn.HardConcreteGate(1)
    nn.init.zeros_(gate.score.weight)
    nn.init.zeros_(gate.score.bias)
    x = torch.zeros(20000, 1)
    mask, z, _ = gate(x)
    assert torch.equal(mask, z > 0)
    assert 0.1 < float((z == 0).float().mean()) < 0.4
    assert 0.1 < float((z == 1).float().mean()) < 0.4
    assert 0.0 <= float(z.detach().min()) <= float(z.detach().max()) <= 1.0
    want = float(gate.open_probability(x[:1]).detach())
    assert float(mask.float().mean()) == pytest.approx(want, abs=0.015)


def test_hard_concrete_in_evaluation_is_the_clipped_stretched_sigmoid():
    gate, x = dc.nn.HardConcreteGate(D).eval(), torch.randn(200, D) * 4
    want = (probabilities(gate, x) * 1.2 - 0.1).clamp(0, 1)
    mask, z, _ = gate(x)
    torch.testing.assert_close(z, want)
    assert 0 < int((~mask).sum()) < 200
    got = torch.autograd.grad(gate.open_probability(x).mean(), gate.score.bias)[0]
    shifted = torch.sigmoid(gate.score(x)[:, 0] - 2 / 3 * torch.log(torch.tensor(0.1 / 1.1)))
    torch.testing.assert_close(got[0], (shifted * (1 - shifted)).mean().detach())


def test_a_choice_is_the_highest_logit_and_in_training_a_sample_of_the_softmax():
    gate = dc.nn.ChoiceGate(D, 3)
    x = torch.randn(1, D).expand(20000, D)
    p = gate.score(x[0]).softmax(0).detach()
    mask, weight = gate(x)
    torch.testing.assert_close(mask.float().mean(0), p, atol=0.015, rtol=0)
    torch.testing.assert_close(weight, mask.float())
    gate.eval()
    assert torch.equal(gate(x[:1]).mask[0], p == p.max())


def test_the_weight_of_a_choice_has_the_gradient_of_the_softmax():
    x, weights = torch.randn(40, D), torch.randn(40, 3)
    for weight in ("hard", "soft"):
        gate = dc.nn.ChoiceGate(D, 3, 0.5, weight=weight).eval()
        got = torch.autograd.grad((gate(x).weight * weights).sum(), gate.score.weight)[0]
        want = torch.autograd.grad(((gate.score(x) / 0.5).softmax(1) * weights).sum(), gate.score.weight)[0]
        torch.testing.assert_close(got, want)
    torch.testing.assert_close(gate(x).weight, (gate.score(x) / 0.5).softmax(1))


def test_a_choice_with_an_exit_may_take_none():
    gate, x = dc.nn.ChoiceGate(D, 2, exit=True).eval(), torch.randn(200, D)
    best = gate.score(x).argmax(1)
    mask = gate(x).mask
    assert mask.shape == (200, 2)
    assert torch.equal(mask.any(1), best != 2)
    assert 0 < int((best == 2).sum()) < 200


def test_a_rectified_gate_is_exactly_zero_where_its_logit_is_negative():
    gate, x = dc.nn.RectifiedGate(D, 3), torch.randn(50, D)
    mask, weight = gate(x)
    logits = gate.score(x)
    assert torch.equal(mask, logits > 0)
    torch.testing.assert_close(weight, logits.tanh().clamp(min=0))


def test_threshold_is_saved_with_the_model():
    gate, fresh = dc.nn.ThresholdGate(D), dc.nn.ThresholdGate(D)
    gate.threshold = 0.25
    fresh.load_state_dict(gate.state_dict())
    assert float(fresh.threshold) == 0.25
    assert "threshold=0.25" in repr(fresh)


def test_scores_are_float32_under_autocast_and_in_half_precision():
    gate, x = dc.nn.ThresholdGate(D), torch.randn(500, D).bfloat16()
    want = gate(x.float()).scale
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(gate(x).scale, want)
    half = dc.nn.ThresholdGate(D).bfloat16()
    got = half(x).scale
    assert got.dtype == torch.float32
    score = half.score
    torch.testing.assert_close(got, torch.sigmoid(x.float() @ score.weight.float()[0] + score.bias.float()))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: dc.nn.ThresholdGate("16"), TypeError, "score: expected a width .* got str"),
        (lambda: dc.nn.ThresholdGate(D, weight="x"), ValueError, "weight: expected one of hard, soft, none, got 'x'"),
        (lambda: dc.nn.GumbelGate(D, 0.0), ValueError, "temperature: expected a finite number > 0, got 0.0"),
        (lambda: dc.nn.TopKGate(D, 1.5), ValueError, "capacity: expected a float ratio in 0..1 .* got 1.5"),
        (lambda: dc.nn.TopKGate(D, float("nan")), ValueError, "capacity: expected a float ratio in 0..1 .* got nan"),
        (lambda: dc.nn.TopKGate(D, -1), ValueError, "capacity: expected .* an int count >= 0, got -1"),
        (lambda: dc.nn.TopKGate(D, True), TypeError, "capacity: expected a float ratio or an int count, got bool"),
        (lambda: dc.nn.HardConcreteGate(D, 0.0), ValueError, "temperature: expected a finite number > 0, got 0.0"),
        (lambda: dc.nn.HardConcreteGate(D, stretch=(0.0, 1.1)), ValueError, r"stretch: expected \(a, b\) with a < 0"),
        (lambda: dc.nn.ChoiceGate(D, 0), ValueError, "num_choices: expected an int >= 1, got 0"),
        (lambda: dc.nn.ChoiceGate(D, 2, -1.0), ValueError, "temperature: expected a finite number > 0, got -1.0"),
        (lambda: dc.nn.ChoiceGate(D, 2, weight="none"), ValueError, "weight: expected one of hard, soft, got 'none'"),
        (
            lambda: dc.nn.ChoiceGate(nn.Linear(D, 2), 2, exit=True)(torch.randn(4, D)),
            ValueError,
            r"score: expected logits \[..., 3\], got shape \[4, 2\]",
        ),
        (lambda: dc.nn.RectifiedGate("16", 2), TypeError, "score: expected a width .* got str"),
        (
            lambda: dc.nn.ThresholdGate(nn.Linear(D, 3))(torch.randn(4, D)),
            ValueError,
            r"score: expected logits \[..., 1\] or \[..., 2\], got shape \[4, 3\]",
        ),
        (lambda: dc.nn.ThresholdGate(D, "0.5"), TypeError, "threshold: expected a number, got str"),
        (lambda: dc.nn.ThresholdGate(D, float("nan")), ValueError, "threshold: expected a number, got nan"),
        (lambda: dc.nn.GumbelGate(D, float("inf")), ValueError, "temperature: expected a finite number > 0, got inf"),
        (lambda: dc.nn.HardConcreteGate(D, "a"), TypeError, "temperature: expected a number, got str"),
        (lambda: dc.nn.ChoiceGate(D, 2, "a"), TypeError, "temperature: expected a number, got str"),
        (lambda: dc.nn.RectifiedGate(D, 2, "a"), TypeError, "threshold: expected a number, got str"),
        (lambda: dc.nn.ThresholdGate(D, torch.tensor(True)), TypeError, "threshold: expected a number, got Tensor"),
        (lambda: dc.nn.StraightThroughGate(D, None), TypeError, "threshold: expected a number, got NoneType"),
        (lambda: dc.nn.GumbelGate(D, torch.ones(2)), TypeError, "temperature: expected a number, got Tensor"),
        (
            lambda: dc.nn.ThresholdGate(D)(torch.randn(4, 3)),
            ValueError,
            rf"score: expected rows of its width {D}, got shape \[4, 3\]",
        ),
        (
            lambda: dc.nn.TopKGate(nn.Sequential(nn.Linear(D, 4), nn.ReLU(), nn.Linear(4, 1)), 2)(torch.randn(2, 5, 3)),
            ValueError,
            rf"score: expected rows of its width {D}, got shape \[2, 5, 3\]",
        ),
        (
            lambda: dc.nn.ThresholdGate(D, pool=dc.nn.gates.pool_tokens)(torch.randn(4, 5, 3)),
            ValueError,
            rf"score: expected rows of its width {D}, got shape \[4, 3\]",
        ),
    ],
)
def test_bad_arguments_are_named(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    ("value", "error"), [(float("nan"), ValueError), ("a", TypeError), (None, TypeError), (True, TypeError)]
)
def test_what_is_no_number_does_not_become_a_threshold(value, error):
    layers = {
        "threshold": [dc.nn.ThresholdGate(4), dc.nn.GumbelGate(4), dc.nn.exits.MaxProbability()],
        "tau": [dc.nn.DynamicKMoE(4, 8, 2)],
        "epsilon": [dc.nn.AdaptiveDepth(torch.nn.Linear(4, 4), 4, 3)],
    }
    for name, modules in layers.items():
        for module in modules:
            before = float(getattr(module, name))
            with pytest.raises(error, match=f"{name}: expected a number"):
                setattr(module, name, value)
            assert float(getattr(module, name)) == before


@pytest.mark.parametrize("value", [-0.1, 1.1])
def test_a_share_outside_of_its_range_is_refused_at_run_time(value):
    for module, name in (
        (dc.nn.DynamicKMoE(4, 8, 2), "tau"),
        (dc.nn.AdaptiveDepth(torch.nn.Linear(4, 4), 4, 3), "epsilon"),
    ):
        with pytest.raises(ValueError, match=rf"{name}: expected a number in 0\.\.1, got {value}"):
            setattr(module, name, value)
        setattr(module, name, 0.25)
        assert float(getattr(module, name)) == 0.25
        setattr(module, name, torch.tensor(0.5))
        with pytest.raises(ValueError, match=rf"{name}: expected a number in 0\.\.1, got 5"):
            setattr(module, name, torch.tensor(5.0))
        assert float(getattr(module, name)) == 0.5


def test_an_exit_wants_at_least_one_threshold():
    with pytest.raises(ValueError, match="threshold: expected a number or one for each exit but the last"):
        dc.nn.exits.MaxProbability([])


MOVABLE = {
    "ThresholdGate": (lambda: dc.nn.ThresholdGate(D, 0.999), "threshold"),
    "GumbelGate": (lambda: dc.nn.GumbelGate(D, 0.999), "temperature"),
    "HardConcreteGate": (lambda: dc.nn.HardConcreteGate(D, 0.999), "temperature"),
    "ChoiceGate": (lambda: dc.nn.ChoiceGate(D, 2, 0.999), "temperature"),
    "CountGate": (lambda: dc.nn.CountGate(D, 2, temperature=0.999), "temperature"),
    "BernoulliPolicy": (lambda: dc.nn.BernoulliPolicy(D, alpha=0.999), "alpha"),
    "DynamicKMoE": (lambda: dc.nn.DynamicKMoE(D, 8, 2, 0.999), "tau"),
    "AdaptiveDepth": (lambda: dc.nn.AdaptiveDepth(nn.Linear(D, D), D, 3, epsilon=0.999), "epsilon"),
    "Hierarchy": (lambda: dc.nn.Hierarchy(nn.Linear(D, 1), [nn.Linear(D, 2)], [[0, 1]], 0.999), "threshold"),
    "MaxProbability": (lambda: dc.nn.exits.MaxProbability([0.999, 0.25]), "threshold"),
}


@pytest.mark.parametrize("kind", MOVABLE)
def test_thresholds_do_not_take_the_dtype_of_the_model(kind):
    make, name = MOVABLE[kind]
    default = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.bfloat16)  # as transformers does while it builds a model
        module = make()
    finally:
        torch.set_default_dtype(default)
    want = torch.tensor([0.999, 0.25] if kind == "MaxProbability" else 0.999)
    for cast in (torch.bfloat16, torch.float16, torch.float64):
        assert torch.equal(getattr(nn.Sequential(module).to(cast)[0], name), want)
    assert getattr(module.to("meta"), name).is_meta


@pytest.mark.parametrize("kind", [kind for kind in MOVABLE if kind != "MaxProbability"])
def test_tensors_are_checked_as_numbers_are(kind):
    make, name = MOVABLE[kind]
    module = make()
    buffer = getattr(module, name)
    for value, error in ((torch.ones(2), ValueError), (torch.tensor(float("nan")), ValueError), (True, TypeError)):
        with pytest.raises(error, match=f"{name}: expected a number"):
            setattr(module, name, value)
    setattr(module, name, torch.tensor(0.75, dtype=torch.float64))
    assert getattr(module, name) is buffer
    assert float(buffer) == 0.75
    if name == "temperature":
        for value in (0.0, -3.0, torch.tensor(0.0), float("inf")):
            with pytest.raises(ValueError, match="temperature: expected a finite number > 0"):
                module.temperature = value
    if name == "alpha":
        with pytest.raises(ValueError, match=r"alpha: expected a number in 0.5..1 \(0.5 excluded\), got 7"):
            module.alpha = 7
