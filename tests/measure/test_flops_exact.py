"""FLOPs of every public op and layer, forward and backward, against products counted by hand from their plans."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dyncore as dc
from tests.nn.oracle import Fixed

B, S, D, WIDE, G, C = 3, 8, 8, 12, 4, 5  # samples, tokens, width, hidden width, groups, classes
T = B * S
MASK = torch.arange(T) % 3 == 0


class Work(NamedTuple):
    """FLOPs of the forward and of the backward pass."""

    forward: int
    backward: int

    def __add__(self, other):
        return Work(self.forward + other.forward, self.backward + other.backward)


NONE = Work(0, 0)


def product(rows, depth, width, gradients=2):
    """[rows, depth] by [depth, width], and in the backward pass the same for each gradient."""
    return Work(2 * rows * depth * width, gradients * 2 * rows * depth * width)


def mlp(rows, hidden=WIDE):
    return product(rows, D, hidden) + product(rows, hidden, D)


def attended(pairs):
    """Scores and what they weigh; backward the scores again, and the gradients of scores, q, k and v. All heads."""
    return Work(2 * 2 * pairs * D, 5 * 2 * pairs * D)


def causal(count):
    return count * (count + 1) // 2


def block(rows, pairs):
    return product(rows, D, 4 * D) + attended(pairs) + mlp(rows)


def a_block():
    return dc.nn.TransformerBlock(D, 2, WIDE)


def tensor(*shape):
    return torch.randn(shape, requires_grad=True)


def slots(layer):
    return layer.last_plan.num_slots


def by_group(layer):
    return layer.last_plan.offsets.diff().tolist()


Case = Callable[[], tuple[Callable[[], Tensor], Callable[[], Work]]]
OPS: dict[str, dict[str, Case]] = {}
LAYERS: dict[str, dict[str, Case]] = {}


def op(name, how=""):
    return lambda case: OPS.setdefault(name, {}).setdefault(how or "plain", case)


def layer(name, how=""):
    return lambda case: LAYERS.setdefault(name, {}).setdefault(how or "plain", case)


def of(build, x, want):
    """A case of a layer: what it is, its input, and the products that it makes, counted after it ran."""

    def case():
        made, given = build().eval(), x()
        return lambda: made(given), lambda: want(made, given)

    return case


def rows():
    return tensor(T, D)


def tokens():
    return tensor(B, S, D)


# Ops ------------------------------------------------------------------------------------------------------------------


def routed():
    expert = torch.arange(2 * T).view(T, 2) % (G + 1) - 1  # -1: nowhere
    plan = dc.route(expert, tensor(T, 2), num_groups=G)
    return plan, int((expert >= 0).sum())


@op("gather_rows")
def _():
    return lambda: dc.gather_rows(tensor(T, D), dc.select(MASK)), lambda: NONE


@op("scatter_rows")
def _():
    plan, live = routed()
    return lambda: dc.scatter_rows(tensor(live, D), plan), lambda: NONE


@op("compact")
def _():
    return lambda: dc.compact(tensor(T, D), dc.select(MASK)), lambda: NONE


@op("expand")
def _():
    plan = dc.select(MASK)
    return lambda: dc.expand(tensor(int(MASK.sum()), D), plan, tensor(T, D)), lambda: NONE


@op("grouped_linear")
def _():
    plan, live = routed()
    return lambda: dc.grouped_linear(tensor(T, D), tensor(G, WIDE, D), plan=plan), lambda: product(live, D, WIDE)


@op("grouped_linear", "of slots to slots, the weight frozen")
def _():
    plan, live = routed()
    run = lambda: dc.grouped_linear(  # noqa: E731
        tensor(live, D), torch.randn(G, WIDE, D), plan=plan, gather=False, scatter=False
    )
    return run, lambda: product(live, D, WIDE, gradients=1)


@op("grouped_mlp")
def _():
    plan, live = routed()
    run = lambda: dc.grouped_mlp(tensor(T, D), tensor(G, WIDE, D), tensor(G, D, WIDE), plan=plan)  # noqa: E731
    return run, lambda: mlp(live)


@op("grouped_mlp", "gated, of x alone")
def _():
    plan = dc.select(MASK)
    live = int(MASK.sum())
    run = lambda: dc.grouped_mlp(  # noqa: E731
        tensor(T, D), torch.randn(1, 2 * WIDE, D), torch.randn(1, D, WIDE), plan=plan, activation="swiglu"
    )
    return run, lambda: product(live, D, 2 * WIDE, gradients=1) + product(live, WIDE, D, gradients=1)


@op("sparse_linear")
def _():
    h = torch.randn(T, WIDE).relu().requires_grad_()
    on = int((h > 0).sum())
    # every h has a gradient, of those that are 0, too
    want = Work(2 * on * D, 2 * T * WIDE * D + 2 * on * D)
    return lambda: dc.sparse_linear(h, tensor(D, WIDE)), lambda: want


@op("sparse_mlp")
def _():
    x, w_in = tensor(T, D), tensor(WIDE, D)
    on = int((x @ w_in.t() > 0).sum())
    run = lambda: dc.sparse_mlp(x, w_in, tensor(D, WIDE))  # noqa: E731
    return run, lambda: Work(2 * T * WIDE * D + 2 * on * D, 4 * 2 * on * D)


@op("sparse_mlp", "gated")
def _():
    x, w_in = tensor(T, D), tensor(2 * WIDE, D)
    on = int((x @ w_in[:WIDE].t() > 0).sum())
    run = lambda: dc.sparse_mlp(x, w_in, tensor(D, WIDE), activation="reglu")  # noqa: E731
    return run, lambda: Work(2 * T * WIDE * D + 2 * 2 * on * D, 6 * 2 * on * D)


@op("attention", "every pair")
def _():
    q, k, v = (tensor(B, 2, S, D // 2) for _ in range(3))
    return lambda: dc.attention(q, k, v, causal=False), lambda: attended(B * S * S)


@op("attention", "causal, by position, some left out")
def _():
    q, k, v = (tensor(B, 2, S, D // 2) for _ in range(3))
    places = torch.arange(0, 2 * S, 2).expand(B, S)
    live = torch.arange(S) != 3
    at, seen = places[0].tolist(), live.tolist()
    pairs = sum(b <= a and seen[i] and seen[j] for i, a in enumerate(at) for j, b in enumerate(at))
    marks = {"q_positions": places, "k_positions": places, "q_live": live.expand(B, S), "k_live": live.expand(B, S)}
    return lambda: dc.attention(q, k, v, causal=True, **marks), lambda: attended(B * pairs)


@op("tree_route")
def _():
    run = lambda: dc.tree_route(tensor(T, D), tensor(7, D)).float().requires_grad_()  # noqa: E731
    return run, lambda: Work(2 * T * 3 * D, 0)


# Gates and scores -----------------------------------------------------------------------------------------------------

for name, gate, outputs in (
    ("ThresholdGate", lambda: dc.nn.ThresholdGate(D), 1),
    ("StraightThroughGate", lambda: dc.nn.StraightThroughGate(D), 1),
    ("GumbelGate", lambda: dc.nn.GumbelGate(D), 1),
    ("HardConcreteGate", lambda: dc.nn.HardConcreteGate(D), 1),
    ("TopKGate", lambda: dc.nn.TopKGate(D, 0.5), 1),
    ("BlockGate", lambda: dc.nn.BlockGate(D, G), G),
    ("CountGate", lambda: dc.nn.CountGate(D, G), G + 1),
    ("ChoiceGate", lambda: dc.nn.ChoiceGate(D, G), G),
    ("RectifiedGate", lambda: dc.nn.RectifiedGate(D, G), G),
):

    @layer(name)
    def _(gate=gate, outputs=outputs):
        made = gate().eval()
        return lambda: made(rows())[1], lambda: product(T, D, outputs)


@layer("BernoulliPolicy")
def _():
    policy = dc.nn.BernoulliPolicy(D, G).eval()

    def run():
        policy(rows())
        return policy.last_log_probability

    return run, lambda: product(T, D, G)


layer("NormRouter")(
    of(lambda: dc.nn.NormRouter(D, G, WIDE), rows, lambda *_: product(T, D, WIDE) + product(T, WIDE, G))
)
layer("FeatureScore")(of(dc.nn.FeatureScore, rows, lambda *_: NONE))
layer("LocalGlobalScore")(
    of(
        lambda: dc.nn.LocalGlobalScore(D),
        tokens,
        lambda *_: product(T, D, D) + product(T, D, D // 2) + product(T, D // 2, 1),
    )
)

# Dense parts ----------------------------------------------------------------------------------------------------------

layer("MLP")(of(lambda: dc.nn.MLP(D, WIDE), rows, lambda *_: mlp(T)))
layer("MLP", "gated")(
    of(
        lambda: dc.nn.MLP(D, WIDE, activation="swiglu"),
        rows,
        lambda *_: product(T, D, 2 * WIDE) + product(T, WIDE, D),
    )
)
layer("Attention")(of(lambda: dc.nn.Attention(D, 2), tokens, lambda *_: product(T, D, 4 * D) + attended(B * causal(S))))
layer("Attention", "of few keys' heads")(
    of(
        lambda: dc.nn.Attention(D, 2, causal=False, num_kv_heads=1),
        tokens,
        lambda *_: product(T, D, 3 * D) + attended(B * S * S),
    )
)
layer("TransformerBlock")(of(a_block, tokens, lambda *_: block(T, B * causal(S))))

# Layers that skip rows ------------------------------------------------------------------------------------------------

layer("Skip")(
    of(
        lambda: dc.nn.Skip(dc.nn.MLP(D, WIDE), dc.nn.StraightThroughGate(D)),
        rows,
        lambda made, _: product(T, D, 1) + mlp(slots(made)),
    )
)
layer("MixtureOfDepths")(
    of(
        lambda: dc.nn.MixtureOfDepths(a_block(), 3),
        tokens,
        lambda *_: product(T, D, 1) + block(3 * B, B * causal(3)),
    )
)


def token_skip(attention):
    counts = [5, 2, 3]
    mask = torch.stack([torch.arange(S) % 2 == 0 if n > 4 else torch.arange(S) < n for n in counts])
    mask[0, 1] = True  # 0 1 2 4 6
    counts[0] = int(mask[0].sum())

    def want(made, x):
        if attention == "selected":  # padded to the longest sequence, in all but the pairs
            return block(B * max(counts), sum(map(causal, counts)))
        own = product(B * max(counts), D, 2 * D) + mlp(B * max(counts))
        pairs = sum(place + 1 for row in mask for place in row.nonzero()[:, 0].tolist())
        return own + product(T, D, 2 * D) + attended(pairs)  # keys and values of every token

    return of(lambda: dc.nn.TokenSkip(a_block(), Fixed(mask), attention), tokens, want)


layer("TokenSkip")(token_skip("selected"))
layer("TokenSkip", "all keys")(token_skip("all_keys"))
layer("TokenDrop")(of(lambda: dc.nn.TokenDrop(0.5, D), tokens, lambda *_: product(T, D, 1)))
layer("TokenMerge")(of(lambda: dc.nn.TokenMerge(2), tokens, lambda *_: product(B * S // 2, D, S // 2, gradients=0)))

# Layers of groups -----------------------------------------------------------------------------------------------------


def gated(count, hidden=WIDE):
    return product(count, D, 2 * hidden) + product(count, hidden, D)


layer("MoE")(
    of(
        lambda: dc.nn.MoE(D, WIDE, G, 2, shared_experts=1),
        tokens,
        lambda made, _: product(T, D, G) + gated(2 * T) + gated(T),
    )
)
layer("MoE", "with a capacity")(
    of(
        lambda: dc.nn.MoE(D, WIDE, G, 2, capacity=0.5, activation="gelu"),
        rows,
        lambda made, _: product(T, D, G) + mlp(slots(made)),
    )
)
layer("DynamicKMoE")(
    of(
        lambda: dc.nn.DynamicKMoE(D, WIDE, G, 0.2, router=dc.nn.NormRouter(D, G, 6)),
        rows,  # the router learns by a loss of its own
        lambda made, _: product(T, D, 6, gradients=0) + product(T, 6, G, gradients=0) + mlp(slots(made)),
    )
)
layer("DynamicWidthMLP")(
    of(
        lambda: dc.nn.DynamicWidthMLP(D, WIDE, G),
        rows,
        lambda made, _: product(T, D, G) + mlp(slots(made), WIDE // G),
    )
)
layer("ACM")(of(lambda: dc.nn.ACM(D, G, 6), rows, lambda made, _: product(T, D, G + 1) + mlp(slots(made), 6)))
layer("ACMLinear")(
    of(
        lambda: dc.nn.ACMLinear(D, WIDE, G),
        rows,
        lambda made, _: product(T, D, G + 1) + product(slots(made), D // G, WIDE),
    )
)


class SomeBlocks(dc.nn.dynamic_width.BlockMLP):
    def forward(self, x):
        return self.run_blocks(x, MASK[:, None].expand(T, G))


layer("BlockMLP")(of(lambda: SomeBlocks(D, WIDE, G), rows, lambda made, _: mlp(int(MASK.sum()))))
layer("SoftMoE")(
    of(
        lambda: dc.nn.SoftMoE(D, WIDE, G, 2),
        tokens,
        lambda *_: product(T, D, 2 * G) + product(T, 2 * G, D) + mlp(B * 2 * G) + product(T, 2 * G, D),
    )
)
layer("TreeMLP")(
    of(
        lambda: dc.nn.TreeMLP(D, 2, WIDE),
        rows,  # the way down, and with gradients every node's turn
        lambda *_: product(T, 2, D, gradients=0) + product(T, D, 3) + mlp(T),
    )
)
layer("SparseLinear")(
    of(
        lambda: dc.nn.SparseLinear(D, WIDE),
        lambda: torch.randn(T, D).relu().requires_grad_(),
        lambda made, x: Work(2 * int((x > 0).sum()) * WIDE, 2 * T * D * WIDE + 2 * int((x > 0).sum()) * WIDE),
    )
)


layer("Branch")(
    of(
        lambda: dc.nn.Branch([dc.nn.MLP(D, WIDE) for _ in range(G)], dc.nn.RectifiedGate(D, G)),
        rows,
        lambda made, _: product(T, D, G) + mlp(slots(made)),
    )
)
layer("Hierarchy")(
    of(
        lambda: dc.nn.Hierarchy(nn.Linear(D, 2), [nn.Linear(D, 2), nn.Linear(D, 3)], [[0, 1], [2, 3, 4]], 0.8),
        rows,
        lambda made, _: product(T, D, 2) + product(by_group(made)[0], D, 2) + product(by_group(made)[1], D, 3),
    )
)
layer("PolicySkip")(
    of(
        lambda: dc.nn.PolicySkip([dc.nn.MLP(D, WIDE) for _ in range(G)], dc.nn.RectifiedGate(D, G)),
        rows,
        lambda made, _: product(T, D, G) + mlp(slots(made)),
    )
)

# Layers that end early ------------------------------------------------------------------------------------------------


def halting(made, x):
    """A score after each step but the last; who stops after one still had it scored."""
    steps = by_group(made)
    return mlp(sum(steps)) + product(sum(steps[:-1]), D, 1)


layer("AdaptiveDepth")(
    of(lambda: dc.nn.AdaptiveDepth([dc.nn.MLP(D, WIDE) for _ in range(3)], D, epsilon=0.45), rows, halting)
)


def exits(made, x):
    first, second, third = by_group(made)
    assert first > second > third > 0
    return product(first + second + third, D, D) + product(first + second + third, D, C)


def early_exit():
    made = dc.nn.EarlyExit([nn.Linear(D, D) for _ in range(3)], [nn.Linear(D, C) for _ in range(3)])
    made.threshold = [0.28, 0.25]
    return made


layer("EarlyExit")(of(early_exit, rows, exits))


def with_exits():
    model = nn.Sequential(*[nn.Linear(D, D) for _ in range(3)], nn.Linear(D, C))
    heads = [nn.Linear(D, C) for _ in range(2)]
    return dc.nn.WithExits(model, ["0", "1"], heads, dc.nn.exits.MaxProbability(0.28))


layer("WithExits")(of(with_exits, rows, exits))
layer("Cascade")(
    of(
        lambda: dc.nn.Cascade([nn.Linear(D, C), nn.Linear(D, C)], dc.nn.exits.Margin(0.1)),
        rows,
        lambda made, _: product(slots(made), D, C),
    )
)


@layer("SparseMLP")
def _():
    made, x = dc.nn.SparseMLP(D, WIDE).eval(), rows()
    on = int((F.linear(x, made.w_in.weight, made.w_in.bias) > 0).sum())
    return lambda: made(x), lambda: Work(2 * T * D * WIDE + 2 * on * D, 4 * 2 * on * D)


CASES = {f"{name}-{how}": case for kind in (OPS, LAYERS) for name, cases in kind.items() for how, case in cases.items()}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_flops_are_those_counted_by_hand(case):
    torch.manual_seed(0)
    with dc.execution("sparse"):
        run, want = case()
        found = dc.measure.flops(lambda: run().sum().backward())
        assert (found - found.backward, found.backward) == want()
        assert found.uncounted == {}


def test_every_public_op_and_layer_is_counted_here():
    assert set(OPS) == set(dc.ops.__all__)
    layers = {
        name for name in dc.nn.__all__ if isinstance(kind := getattr(dc.nn, name), type) and issubclass(kind, nn.Module)
    }
    bases = {"DynamicLayer", "ExitLayer"}
    assert set(LAYERS) == layers - bases


def test_every_registered_op_has_a_formula_or_moves_rows():
    from torch.utils.flop_counter import flop_registry

    moving = ("gather_rows", "scatter_rows", "plan_", "pack_weight")
    for name in torch._C._dispatch_get_all_op_names():
        namespace, _, op = name.partition("::")
        if namespace == "dyncore" and not op.startswith(moving):
            assert getattr(torch.ops.dyncore, op.partition(".")[0]) in flop_registry, name
