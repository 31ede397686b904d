"""BernoulliPolicy, its REINFORCE, and PolicySkip: each row through the blocks that its policy took."""

import copy
import pickle

import pytest
import torch
from torch import nn

import dyncore as dc
from dyncore.nn import policies
from tests.nn.oracle import D, chain, flops, run

MODES = ("sparse", "masked", "auto")
ROW = 2 * 2 * D * 24  # FLOPs of one row in one module of `chain`
K = 4


def says(decision):
    return lambda x: decision


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("returns", ["output", "update"])
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@torch.no_grad()
def test_rows_go_through_the_blocks_of_their_policy(mode, returns, weighted):
    x, mask = torch.randn(3, 8, D, dtype=torch.float64), torch.rand(3, 8, K) > 0.5
    mask[0, 0], mask[0, 1], mask[:, :, 2] = False, True, True  # nothing, everything, and a block that all take
    scale = torch.rand(3, 8, K, dtype=torch.float64) if weighted else None
    layer = dc.nn.PolicySkip(chain(K), says((mask, scale)), returns=returns).double()
    before = x.clone()
    with dc.execution(mode):
        got = layer(x)
    assert torch.equal(x, before)
    want = x.clone()
    for k, block in enumerate(layer.blocks):
        y, g = block(want), 1 if scale is None else scale[..., k, None]
        y = want + g * y if returns == "update" else want + g * (y - want)
        want = torch.where(mask[..., k, None], y, want)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(layer.last_cost.float(), mask.float().mean(-1))


@pytest.mark.parametrize("mode", MODES)
@torch.no_grad()
def test_all_blocks_are_exactly_the_chain_and_none_the_identity(mode):
    x = torch.randn(9, D)
    layer = dc.nn.PolicySkip(chain(K), dc.nn.BernoulliPolicy(D, K, threshold=-1.0), returns="output").eval()
    with dc.execution(mode):
        assert torch.equal(layer(x), nn.Sequential(*layer.blocks)(x))
        assert bool((layer.last_cost == 1).all())
        layer.policy.threshold = 1.0
        x[2] = float("nan")
        out = layer(x)
    assert torch.equal(out[[0, 1, 3]], x[[0, 1, 3]])
    assert out[2].isnan().all()
    assert not layer.last_cost.any()


def test_flops_are_those_of_the_slots():
    x, mask = torch.randn(20, D), torch.rand(20, K) > 0.6
    layer = dc.nn.PolicySkip(chain(K), says(mask))
    assert flops(lambda: layer(x)) == int(mask.sum()) * ROW
    assert flops(lambda: layer(x), "masked") == 20 * K * ROW
    assert layer.last_plan.num_slots == int(mask.sum())


@pytest.mark.parametrize("mode", MODES)
def test_rows_that_take_nothing_may_hold_nan(mode):
    x, mask = torch.randn(12, D), torch.rand(12, K) > 0.5
    mask[[3, 7]] = False
    scale = torch.rand(12, K)
    blocks = chain(K)
    clean = run(dc.nn.PolicySkip(blocks, says((mask, scale))), x, mode)
    x[[3, 7]], scale[[3, 7]] = float("nan"), float("nan")
    dirty = run(dc.nn.PolicySkip(blocks, says((mask, scale))), x, mode)
    rest = ~x.isnan().any(1)
    assert dirty.out[~rest].isnan().all()
    torch.testing.assert_close(dirty.out[rest], clean.out[rest])
    for name, grad in dirty.grads.items():
        torch.testing.assert_close(grad, clean.grads[name], msg=name)


@pytest.mark.parametrize("grad", [False, True])
def test_samples_of_any_shape_keep_the_input_as_it_was(grad):
    x = torch.randn(6, 3, 5, 4, requires_grad=grad)
    before = x.detach().clone()
    blocks = [nn.Identity(), nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1)]
    mask = torch.tensor([[True, False, True], [True, True, False]]).repeat(3, 1)
    layer = dc.nn.PolicySkip(blocks, says(mask), returns="output")
    with torch.set_grad_enabled(grad):
        got = layer(x)
    torch.testing.assert_close(got[0], blocks[2](x[:1])[0])
    torch.testing.assert_close(got[1], blocks[1](x[1:2])[0])
    assert torch.equal(x.detach(), before)


def test_actions_given_are_taken_without_asking_the_policy():
    layer, x = dc.nn.PolicySkip(chain(K), dc.nn.BernoulliPolicy(D, K)), torch.randn(5, D)
    layer(x, torch.zeros(5, K, dtype=torch.bool))
    assert not layer.last_cost.any()
    assert layer.policy.last_probability is None


def test_a_policy_samples_in_training_and_decides_in_evaluation():
    policy = dc.nn.BernoulliPolicy(D, K)
    x = torch.randn(1, D).expand(20000, D)
    s = torch.sigmoid(policy.score(x[0]))
    torch.testing.assert_close(policy(x).float().mean(0), s.detach(), atol=0.015, rtol=0)
    policy.alpha = 0.8
    torch.testing.assert_close(policy(x).float().mean(0), (0.2 + 0.6 * s).detach(), atol=0.015, rtol=0)
    with policies.greedy(policy):
        assert torch.equal(policy(x)[0], s > 0.5)
    assert policy.sampling
    policy.eval()
    assert torch.equal(policy(x)[0], s > 0.5)
    policy.threshold = 0.0
    assert policy(x).all()


def test_log_probability_is_that_of_the_actions_taken():
    policy, x = dc.nn.BernoulliPolicy(D, K, alpha=0.9), torch.randn(30, D)
    taken = policy(x)
    s = torch.sigmoid(policy.score(x))
    s = 0.9 * s + 0.1 * (1 - s)
    want = torch.where(taken, s, 1 - s).log().sum(1)
    torch.testing.assert_close(policy.last_log_probability, want)
    torch.testing.assert_close(policies.log_probability(policy), want)
    torch.testing.assert_close(policy.last_probability, s)
    with policies.greedy(policy):
        policy(x)
    torch.testing.assert_close(policies.log_probability(policy), want)  # of the sampled actions, as before


def test_policies_of_a_model_and_of_tokens_are_summed_for_each_sample():
    gates = [dc.nn.BernoulliPolicy(D), dc.nn.BernoulliPolicy(D)]
    model, x = nn.Sequential(*(dc.nn.Skip(m, g) for m, g in zip(chain(2), gates, strict=True))), torch.randn(4, 6, D)
    model(x)
    assert [tuple(g.last_log_probability.shape) for g in gates] == [(4, 6)] * 2
    want = sum(g.last_log_probability.sum(1) for g in gates)
    torch.testing.assert_close(policies.log_probability(model), want)
    assert model[0].last_plan.num_rows == 24


def test_reinforce_finds_the_blocks_that_help():
    torch.manual_seed(0)
    policy, x = dc.nn.BernoulliPolicy(D, K, alpha=0.9), torch.randn(64, D)
    wanted = torch.tensor([True, False, True, False]).expand(64, K)
    optimizer = torch.optim.Adam(policy.parameters(), lr=0.05)

    def reward(actions):
        return (actions == wanted).float().mean(1)

    for _ in range(120):
        earned = reward(policy(x))
        with torch.no_grad(), policies.greedy(policy):
            baseline = reward(policy(x))
        optimizer.zero_grad()
        dc.nn.losses.reinforce(policies.log_probability(policy), earned, baseline).backward()
        optimizer.step()
    assert float(reward(policy.eval()(x)).mean()) > 0.95


def test_sparse_reward_follows_the_paper():
    actions = torch.tensor([[True, True, False, False], [True] * 4, [False] * 4, [True, False, False, False]])
    got = policies.sparse_reward(actions, torch.tensor([True, True, True, False]), 5.0)
    assert got.tolist() == [0.75, 0.0, 1.0, -5.0]


def test_copies_and_pickles_after_a_forward():
    layer, x = dc.nn.PolicySkip(chain(K), dc.nn.BernoulliPolicy(D, K)), torch.randn(5, D)
    layer(x)
    layer.eval()
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert twin.policy.last_log_probability is None
        assert twin.policy.last_probability is None
        assert torch.equal(twin(x), layer(x))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: dc.nn.PolicySkip([], says(0)), ValueError, "blocks: expected at least one module, got none"),
        (lambda: dc.nn.PolicySkip([None], says(0)), TypeError, r"blocks\[0\]: expected a callable, got NoneType"),
        (lambda: dc.nn.PolicySkip(chain(2), 1), TypeError, "policy: expected a callable, got int"),
        (
            lambda: dc.nn.PolicySkip(chain(2), says(0), returns="x"),
            ValueError,
            "returns: expected one of output, update",
        ),
        (
            lambda: dc.nn.PolicySkip(chain(2), dc.nn.BernoulliPolicy(D, 3))(torch.randn(4, D)),
            ValueError,
            r"policy: expected shape \[\.\.\., 2\] .* got \[4, 3\]",
        ),
        (
            lambda: dc.nn.PolicySkip([nn.Linear(D, 3)], dc.nn.BernoulliPolicy(D, 1, -1.0).eval())(torch.randn(4, D)),
            ValueError,
            r"blocks\[0\]: expected an output of the shape of its input, \[4, 16\], got \[4, 3\]",
        ),
        (lambda: dc.nn.BernoulliPolicy("x"), TypeError, "score: expected a width .* got str"),
        (lambda: dc.nn.BernoulliPolicy(D, 0), ValueError, "num_actions: expected an int >= 1, got 0"),
        (lambda: dc.nn.BernoulliPolicy(D, 2, alpha=0.5), ValueError, "alpha: expected a number in 0.5..1"),
        (
            lambda: dc.nn.BernoulliPolicy(nn.Linear(D, 3), 2)(torch.randn(4, D)),
            ValueError,
            r"score: expected logits \[\.\.\., 2\], got shape \[4, 3\]",
        ),
        (
            lambda: policies.log_probability(nn.Linear(2, 2)),
            ValueError,
            "model: expected one with a BernoulliPolicy in it",
        ),
        (
            lambda: policies.log_probability(dc.nn.BernoulliPolicy(D)),
            ValueError,
            "model: expected policies that have run",
        ),
        (
            lambda: policies.sparse_reward(torch.ones(4, 2) > 0, torch.ones(3) > 0, 1.0),
            ValueError,
            r"right: expected one for each row of actions \[4, 2\], got \[3\]",
        ),
    ],
)
def test_bad_arguments_are_named(make, error, message):
    with pytest.raises(error, match=message):
        make()
