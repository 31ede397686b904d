"""AdaptiveDepth: who halts when, what the mean of the states is, and that nothing after it is computed."""

import copy
import pickle

import pytest
import torch
from torch import nn

import dyncore as dc
from tests.nn.oracle import D, block, block_on, chain, flops, run

MODES = ("sparse", "masked", "auto")
CHAIN = 2 * 2 * D * 24  # FLOPs of one row in one module of `chain`


class Told(nn.Module):
    """Halting logits that depend on the row alone: its feature 0 is the step (from 1) at which to halt, h = 1 there."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self.step = step

    def forward(self, x):
        return torch.where(x[..., :1].round() == self.step, torch.inf, -torch.inf)


class Keeps(nn.Module):
    """A module that leaves feature 0 alone."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x):
        return torch.cat([x[..., :1], self.module(x)[..., 1:]], -1)


def told(steps: list[int], length: int = 5, **options):
    """(a layer whose row i halts after steps[i], its input)."""
    x = torch.randn(len(steps), D, dtype=torch.float64)
    x[:, 0] = torch.tensor(steps)
    blocks = [Keeps(module) for module in chain(length)]
    halts = [Told(n) for n in range(1, length)]
    return dc.nn.AdaptiveDepth(blocks, halts, **options).double(), x


def by_hand(layer, x, epsilon):
    """ACT of one row at a time: (y, N, R)."""
    out, taken, rest = [], [], []
    for row in x:
        state, total, mean = row[None], 0.0, 0.0
        for n in range(layer.num_steps):
            state = layer.blocks[min(n, len(layer.blocks) - 1)](state)
            h = torch.sigmoid(layer.halt[min(n, len(layer.halt) - 1)].logits(state))[0]
            if n == layer.num_steps - 1 or float((total + h).detach()) >= 1 - epsilon:
                mean = mean + (1 - total) * state[0]
                break
            total, mean = total + h, mean + h * state[0]
        out.append(mean)
        taken.append(n + 1)
        rest.append(1 - total)
    return (
        torch.stack(out),
        torch.tensor(taken),
        torch.stack([torch.as_tensor(r, dtype=x.dtype).detach() for r in rest]),
    )


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shared", [False, True], ids=["blocks", "one_block"])
@torch.no_grad()
def test_act_follows_the_paper(mode, shared):
    halt = dc.nn.FeatureScore(0, 6.0, -1.0)
    layer = dc.nn.AdaptiveDepth(chain(1)[0], halt, 6) if shared else dc.nn.AdaptiveDepth(chain(6), halt)
    layer, x = layer.double(), torch.randn(40, D, dtype=torch.float64)
    layer.epsilon = 0.2
    want, steps, remainder = by_hand(layer, x, 0.2)
    with dc.execution(mode):
        torch.testing.assert_close(layer(x), want)
    assert steps.unique().numel() > 2
    assert torch.equal(layer.last_plan.row_offsets.diff().long(), steps)
    torch.testing.assert_close(layer.last_cost.double(), steps.double() / 6)
    torch.testing.assert_close(layer.losses()["ponder"], (steps + remainder).mean())


def test_the_ponder_cost_has_the_gradient_of_the_remainder():
    layer, x = dc.nn.AdaptiveDepth(chain(4), D, epsilon=0.3).double(), torch.randn(9, D, dtype=torch.float64)
    layer(x)
    (got,) = torch.autograd.grad(layer.losses()["ponder"], layer.halt[0].score.bias, retain_graph=True)
    (cost,) = torch.autograd.grad(layer.last_cost.mean(), layer.halt[0].score.bias)
    step = 1e-6
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            layer.halt[0].score.bias += sign * step
            layer(x)
            values.append(layer.losses()["ponder"])
            layer.halt[0].score.bias -= sign * step
    torch.testing.assert_close(got[0], (values[0] - values[1]) / (2 * step))  # no row changes its number of steps
    assert float(got) < 0  # a higher score leaves less to ponder
    torch.testing.assert_close(cost, got / 4)


@pytest.mark.parametrize("mode", MODES)
def test_halting_at_once_is_the_first_block_and_never_is_all_of_them(mode):
    layer, x = dc.nn.AdaptiveDepth(chain(4), nn.Linear(D, 1)), torch.randn(7, D)
    nn.init.zeros_(layer.halt[0].score.weight)
    nn.init.constant_(layer.halt[0].score.bias, -1e4)  # h is exactly 0
    dense = nn.Sequential(*layer.blocks)
    with dc.execution(mode), torch.no_grad():
        assert torch.equal(layer(x), dense(x))
        assert bool((layer.last_cost == 1).all())
        layer.epsilon = 1.0
        assert torch.equal(layer(x), layer.blocks[0](x))
        assert bool((layer.last_cost == 0.25).all())


def test_flops_are_those_of_the_steps_taken():
    steps = [1, 3, 3, 5, 2, 5, 1, 1]
    layer, x = told(steps)
    assert flops(lambda: layer(x)) == sum(steps) * CHAIN
    assert flops(lambda: layer(x), "masked") == 5 * len(steps) * CHAIN
    assert (layer.last_cost * 5).round().int().tolist() == steps
    x.requires_grad_()
    assert flops(lambda: layer(x).sum().backward()) == 3 * sum(steps) * CHAIN


def test_blocks_after_the_last_to_halt_are_not_called_but_get_a_gradient():
    layer, x = told([1, 2, 2])
    layer.blocks[2].forward = None
    grads = run(layer, x).grads
    assert not grads["blocks.3.module.0.weight"].any()
    assert grads["blocks.1.module.0.weight"].any()


@pytest.mark.parametrize("mode", MODES)
def test_rows_that_have_halted_may_hold_nan(mode):
    layer, x = told([1, 3, 5, 2])
    weights = torch.randn(4, D)
    clean = run(layer, x, mode, weights)
    spoiled = x.clone()
    spoiled[0, 1:] = float("nan")  # halts after the first step
    dirty = run(layer, spoiled, mode, weights)
    assert dirty.out[0, 1:].isnan().all()
    torch.testing.assert_close(dirty.out[1:], clean.out[1:])
    torch.testing.assert_close(dirty.grads["x"][1:], clean.grads["x"][1:])
    for name, grad in dirty.grads.items():
        if name != "x" and not name.startswith("blocks.0"):
            torch.testing.assert_close(grad, clean.grads[name], msg=name)


@pytest.mark.parametrize("mode", MODES)
def test_samples_of_any_shape_halt(mode):
    blocks = [nn.Conv2d(3, 3, 3, padding=1) for _ in range(4)]
    pool = dc.nn.gates.pool_spatial
    layer = dc.nn.AdaptiveDepth(blocks, 3, epsilon=0.3, pool=pool).double()
    nn.init.constant_(layer.halt[0].score.weight, 5.0)
    x = torch.randn(12, 3, 6, 5, dtype=torch.float64) * torch.linspace(0, 2, 12).view(-1, 1, 1, 1).double()
    x = x + torch.randn(12, 3, 1, 1, dtype=torch.float64)
    with dc.execution(mode):
        got = layer(x)
    want, steps, _ = by_hand(layer, x, 0.3)
    assert steps.unique().numel() > 1
    torch.testing.assert_close(got, want.view_as(x))
    assert torch.equal(layer.last_plan.row_offsets.diff().long(), steps)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("attention", ["selected", "all_keys"])
def test_tokens_that_halt_are_left_out_of_attention_or_stay_as_keys(mode, attention):
    halt = dc.nn.FeatureScore(0, 4.0, 0.0)
    layer = dc.nn.AdaptiveDepth([block() for _ in range(3)], halt, epsilon=0.2, tokens=True, attention=attention)
    layer, x = layer.double(), torch.randn(3, 8, D, dtype=torch.float64)
    with dc.execution(mode):
        got = layer(x)
    for b in range(3):
        state, live, total, mean = x[b].clone(), torch.ones(8, dtype=torch.bool), torch.zeros(8), torch.zeros(8, D)
        total, mean = total.double(), mean.double()
        for n in range(3):
            chosen = live.nonzero()[:, 0].tolist()
            if not chosen:
                break
            state = state.clone()
            state[chosen] = block_on(layer.blocks[n], state, chosen, attention == "all_keys")
            h = torch.sigmoid(4 * state[:, 0])
            halted = (total + h >= 0.8) | (n == 2)
            share = torch.where(halted, 1 - total, h)
            mean = mean + torch.where(live, share, 0)[:, None] * state
            total, live = total + h, live & ~halted
        torch.testing.assert_close(got[b], mean)
    assert layer.last_cost.shape == (3, 8)
    assert 1 / 3 < float(layer.last_cost.detach().mean()) < 1


def test_attention_of_halted_tokens_is_not_computed():
    blocks = [dc.nn.TransformerBlock(D, 2, causal=False) for _ in range(3)]  # of a causal one, half of the pairs count
    layer = dc.nn.AdaptiveDepth(blocks, dc.nn.FeatureScore(0, 0.0, 0.0), tokens=True)
    x = torch.randn(2, 8, D)
    layer.epsilon = 1.0
    assert 3 * flops(lambda: layer(x)) == flops(lambda: layer(x), "masked")


@pytest.mark.parametrize("mode", MODES)
def test_positions_halt_by_themselves(mode):
    blocks = [nn.Sequential(nn.Conv2d(D, 24, 1), nn.Tanh(), nn.Conv2d(24, D, 1)) for _ in range(4)]
    layer = dc.nn.AdaptiveDepth(blocks, dc.nn.FeatureScore(0, 30.0, 0.0), spatial=True).double()
    x = torch.randn(2, D, 5, 3, dtype=torch.float64)
    with dc.execution(mode):
        got = layer(x)
    linear = copy.deepcopy(layer)
    linear.spatial = False
    for sequence in linear.blocks:
        for i in (0, 2):
            twin = nn.Linear(sequence[i].in_channels, sequence[i].out_channels).double()
            twin.weight.data, twin.bias.data = sequence[i].weight.data[:, :, 0, 0], sequence[i].bias.data
            sequence[i] = twin
    rows = x.permute(0, 2, 3, 1).reshape(-1, D)
    want, steps, _ = by_hand(linear, rows, 0.01)
    torch.testing.assert_close(got, want.view(2, 5, 3, D).permute(0, 3, 1, 2))
    assert steps.unique().numel() > 1
    assert torch.equal((layer.last_cost.flatten() * 4).round().long(), steps)
    assert flops(lambda: layer(x)) == int(steps.sum()) * CHAIN


class Convolved(nn.Module):
    """x + conv(x) where the mask says so."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(D, D, 3, padding=1)

    def forward(self, x, mask):
        self.seen = mask
        return x + torch.where(mask[:, None], torch.tanh(self.conv(x)), 0)


def test_many_positions_are_seen_as_lines_and_none_of_the_spare_comes_back():
    layer = dc.nn.AdaptiveDepth([nn.Conv2d(D, D, 1) for _ in range(3)], dc.nn.FeatureScore(0, 10.0, 0.0), spatial=True)
    x, seen = torch.randn(2, D, 17, 13), []
    layer.double().blocks[0].register_forward_hook(lambda module, args, y: seen.append(args[0].shape))
    for training in (False, True):
        masked, auto = (run(layer.train(training), x.double(), mode) for mode in ("masked", "auto"))
        torch.testing.assert_close(auto.out, masked.out)
        for name, grad in masked.grads.items():
            torch.testing.assert_close(auto.grads[name], grad, msg=name)
    assert [1, D, 14, 32] in [list(shape) for shape in seen]


def test_blocks_that_take_a_mask_see_the_whole_map():
    layer = dc.nn.AdaptiveDepth([Convolved() for _ in range(3)], dc.nn.FeatureScore(0, 10.0, 0.0), spatial=True)
    layer, x = layer.double(), torch.randn(2, D, 6, 6, dtype=torch.float64)
    with dc.execution("sparse"):
        got = layer(x)
    state, live, total, mean = x, torch.ones(2, 6, 6, dtype=torch.bool), torch.zeros(2, 6, 6).double(), 0.0
    for n, body in enumerate(layer.blocks):
        assert torch.equal(body.seen, live)
        state = torch.where(live[:, None], state + torch.tanh(body.conv(state)), state)
        h = torch.sigmoid(10 * state[:, 0])
        halted = (total + h >= 0.99) | (n == 2)
        mean = mean + (live * torch.where(halted, 1 - total, h))[:, None] * state
        total, live = total + h, live & ~halted
    torch.testing.assert_close(got, mean)


def test_ponder_net_trains_on_the_states_of_all_steps():
    layer, x = dc.nn.AdaptiveDepth(chain(4), D, halting="ponder", prior=0.4).double(), torch.randn(9, D).double()
    states = layer(x)
    state, left = x, torch.ones(9).double()
    for n in range(4):
        state = layer.blocks[n](state)
        torch.testing.assert_close(states[n], state)
        h = torch.sigmoid(layer.halt[0].logits(state)) if n < 3 else torch.ones(9).double()
        torch.testing.assert_close(layer.last_halting[n], left * h)
        left = left * (1 - h)
    assert bool((layer.last_cost == 1).all())
    want = dc.nn.losses.ponder_kl(layer.last_halting, 0.4)
    torch.testing.assert_close(layer.losses()["ponder_kl"], want)
    losses = dc.nn.losses.expected(states.square().mean(-1), layer.last_halting) + want
    losses.backward()
    assert all(p.grad.any() for p in layer.parameters())


@pytest.mark.parametrize("mode", MODES)
@torch.no_grad()
def test_ponder_net_answers_with_the_state_at_the_quantile(mode):
    layer = dc.nn.AdaptiveDepth(chain(5), dc.nn.FeatureScore(0, 8.0, -1.0), halting="ponder").double()
    x = torch.randn(30, D, dtype=torch.float64)
    states, halting = layer(x), layer.last_halting
    layer.eval()
    used = []
    for epsilon in (0.9, 0.5, 0.1):
        layer.epsilon = epsilon
        index = torch.searchsorted(halting.cumsum(0).t().contiguous(), torch.full((30, 1), 1 - epsilon).double())[:, 0]
        with dc.execution(mode):
            got = layer(x)
        torch.testing.assert_close(got, states[index.clamp(max=4), torch.arange(30)])
        used.append(float(layer.last_cost.mean()))
    assert used[0] < used[1] < used[2]
    assert layer.losses() == {}


@torch.no_grad()
def test_ponder_net_samples_its_halting_step():
    layer = dc.nn.AdaptiveDepth(chain(4), dc.nn.FeatureScore(0, 0.0, -0.5), halting="ponder", sample=True)
    x = torch.randn(1, D).expand(20000, D)
    layer.train()
    layer(x[:1])
    want = layer.last_halting[:, 0]
    layer.eval()
    layer(x)
    found = (layer.last_cost * 4).round().long().bincount(minlength=5)[1:] / 20000
    torch.testing.assert_close(found, want, atol=0.015, rtol=0)


@torch.no_grad()
def test_epsilon_traces_the_curve_of_one_layer_without_a_retrace():
    layer, x = dc.nn.AdaptiveDepth(chain(4), dc.nn.FeatureScore(0, 8.0, -2.5)), torch.randn(50, D)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    costs = []
    for epsilon in (1.0, 0.7, 0.4, 0.1, 0.0):
        layer.epsilon = epsilon
        torch.testing.assert_close(compiled(x), layer(x))
        costs.append(float(layer.last_cost.mean()))
    assert costs == sorted(costs)
    assert len(set(costs)) == 5
    assert costs[0] == 0.25
    assert costs[-1] > 0.6
    assert len(graphs) == 1


@pytest.mark.parametrize("kind", ["positions", "mask", "all_keys", "ponder"])
@torch.no_grad()
def test_compiles_into_one_graph(kind):
    score, x = dc.nn.FeatureScore(0, 10.0, 0.0), torch.randn(2, D, 4, 3)
    if kind == "positions":
        layer = dc.nn.AdaptiveDepth([nn.Conv2d(D, D, 1) for _ in range(3)], score, spatial=True)
    elif kind == "mask":
        layer = dc.nn.AdaptiveDepth([Convolved() for _ in range(3)], score, spatial=True)
    elif kind == "all_keys":
        x = torch.randn(2, 5, D)
        layer = dc.nn.AdaptiveDepth([block() for _ in range(2)], score, tokens=True, attention="all_keys")
    else:
        x = torch.randn(7, D)
        layer = dc.nn.AdaptiveDepth(chain(3), score, halting="ponder").eval()
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), layer(x))
    assert 0 < float(layer.last_cost.mean()) < 1


def test_the_ponder_cost_teaches_to_halt_earlier():
    layer, x = dc.nn.AdaptiveDepth(chain(6), D), torch.randn(64, D)
    nn.init.constant_(layer.halt[0].score.bias, -3.0)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.02)
    costs = []
    for _ in range(40):
        layer(x)
        costs.append(float(layer.last_cost.detach().mean()))
        optimizer.zero_grad()
        layer.losses()["ponder"].backward()
        optimizer.step()
    assert costs[0] == 1.0
    assert costs[-1] < 0.6


@pytest.mark.parametrize("options", [{}, {"halting": "ponder"}, {"tokens": True}], ids=str)
def test_no_rows_at_all(options):
    layer = dc.nn.AdaptiveDepth([nn.BatchNorm1d(D) for _ in range(3)], D, **options).eval()
    shape = (0, 5, D) if options.get("tokens") else (0, D)
    for mode in MODES:
        got = run(layer, torch.randn(shape), mode)
        assert got.out.shape == shape
        assert layer.last_cost.shape == shape[:-1]
        assert all(grad is None or not grad.any() for grad in got.grads.values())


def test_copies_and_pickles_after_a_forward():
    layer, x = dc.nn.AdaptiveDepth(chain(3), D, halting="ponder"), torch.randn(5, D)
    want = layer(x)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert twin.last_halting is None
        assert twin.losses() == {}
        assert torch.equal(twin(x), want)


def test_costs_weigh_the_steps():
    layer, x = told([1, 2, 5], costs=[4, 1, 1, 1, 1])
    layer(x)
    torch.testing.assert_close(layer.last_cost, torch.tensor([0.5, 0.625, 1.0]).double(), check_dtype=False)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: dc.nn.AdaptiveDepth(chain(3), D, 3),
            ValueError,
            "max_steps: expected a number for one repeated block",
        ),
        (lambda: dc.nn.AdaptiveDepth(nn.Identity(), D), ValueError, "max_steps: expected a number .* got None"),
        (lambda: dc.nn.AdaptiveDepth(nn.Identity(), D, 0), ValueError, "max_steps: expected an int >= 1, got 0"),
        (lambda: dc.nn.AdaptiveDepth([], D), ValueError, "blocks: expected at least one module, got none"),
        (lambda: dc.nn.AdaptiveDepth([None], D), TypeError, r"blocks\[0\]: expected a callable, got NoneType"),
        (lambda: dc.nn.AdaptiveDepth(chain(4), chain(2)), ValueError, "halt: expected one score or 3 of them, got 2"),
        (lambda: dc.nn.AdaptiveDepth(chain(3), "16"), TypeError, "score: expected a width .* got str"),
        (lambda: dc.nn.AdaptiveDepth(chain(3), D, halting="x"), ValueError, "halting: expected one of act, ponder"),
        (lambda: dc.nn.AdaptiveDepth(chain(3), D, epsilon=-0.1), ValueError, "epsilon: expected a number in 0..1, got"),
        (lambda: dc.nn.AdaptiveDepth(chain(3), D, prior=0.0), ValueError, "prior: expected a number in 0..1"),
        (
            lambda: dc.nn.AdaptiveDepth(chain(3), D, costs=[1]),
            ValueError,
            "costs: expected 3 of them, one a module, got",
        ),
        (
            lambda: dc.nn.AdaptiveDepth(chain(3), D, tokens=True, spatial=True),
            ValueError,
            "spatial: expected rows that are tokens or positions, got both",
        ),
        (
            lambda: dc.nn.AdaptiveDepth([nn.TransformerEncoderLayer(D, 4)], D, tokens=True),
            ValueError,
            "blocks: expected blocks that treat rows one by one or take positions= and live=, got MultiheadAttention in",
        ),
        (
            lambda: dc.nn.AdaptiveDepth([nn.Conv2d(D, D, 3, padding=1)], D, spatial=True),
            ValueError,
            "blocks: expected blocks that treat rows one by one or take mask=, got Conv2d in Conv2d",
        ),
        (
            lambda: dc.nn.AdaptiveDepth(chain(2), D, tokens=True, attention="all_keys"),
            ValueError,
            "blocks: expected blocks that take positions= and live= and context= for all_keys, got 2 others",
        ),
        (
            lambda: dc.nn.AdaptiveDepth([block(), *chain(1)], D, tokens=True),
            ValueError,
            "blocks: expected all of them to take positions= and live= or none, got 1 others",
        ),
        (
            lambda: dc.nn.AdaptiveDepth(chain(3), D)(torch.randn(4, 5, D)),
            ValueError,
            r"halt: expected logits \[4, 1\], got \[4, 5, 1\] \(where x is \[B, S, D\], tokens=True lets tokens halt",
        ),
        (
            lambda: dc.nn.AdaptiveDepth([nn.Linear(D, 3), nn.Linear(3, D)], D)(torch.randn(4, D)),
            ValueError,
            r"blocks\[0\]: expected an output of the shape of its input, \[4, 16\], got \[4, 3\]",
        ),
        (
            lambda: dc.nn.AdaptiveDepth(chain(3), D, tokens=True)(torch.randn(4, D)),
            ValueError,
            r"x: expected shape \[B, S, D\], got \[4, 16\]",
        ),
    ],
)
def test_bad_arguments_are_named(make, error, message):
    with pytest.raises(error, match=message):
        make()
