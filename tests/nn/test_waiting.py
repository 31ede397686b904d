"""execution(wait=True): where tensors are not on the host, layers that need a count of live rows wait for it.

The stand-in for an accelerator is a host that may not look at a CPU tensor; tests/gpu has the real one.
"""

import pytest
import torch
from torch import nn

import dyncore as dc
from dyncore.nn import FeatureScore
from dyncore.nn.exits import Margin
from tests.nn.oracle import D, flops
from tests.support import assert_values

MASK = torch.arange(12) % 4 == 0  # a quarter
CHOICE = torch.where(MASK, 0, -1)


def heads(count):
    return [nn.Linear(D, 2) for _ in range(count)]


LAYERS = {
    "skip": lambda: dc.nn.Skip(dc.nn.MLP(D, 24), lambda x: MASK),
    "branch": lambda: dc.nn.Branch([dc.nn.MLP(D, 24)], lambda x: CHOICE),
    "policy_skip": lambda: dc.nn.PolicySkip([dc.nn.MLP(D, 24)], lambda x: MASK[:, None]),
    "early_exit": lambda: dc.nn.EarlyExit([dc.nn.MLP(D, 24), dc.nn.MLP(D, 24)], heads(2), Margin(0.04)),
    "cascade": lambda: dc.nn.Cascade(
        [nn.Sequential(dc.nn.MLP(D, 24), nn.Linear(D, 2)) for _ in range(2)], Margin(0.04)
    ),
    "adaptive_depth": lambda: dc.nn.AdaptiveDepth([dc.nn.MLP(D, 24) for _ in range(3)], FeatureScore(0, 8.0, 0.0)),
}


@pytest.fixture(params=LAYERS)
def layer(request):
    torch.manual_seed(0)
    return LAYERS[request.param]().eval()


@torch.no_grad()
def test_the_live_rows_alone_are_computed_where_the_host_waits(layer, monkeypatch):
    x = torch.randn(12, D)
    want, fewest = layer(x), flops(lambda: layer(x))
    monkeypatch.setattr("dyncore.plan.is_eager_cpu", lambda t: False)
    assert not dc.select(MASK).exact
    assert flops(lambda: layer(x)) > fewest
    assert_values(layer(x), want)
    with dc.execution(wait=True):
        assert flops(lambda: layer(x)) == fewest
        assert torch.equal(layer(x), want)
        with dc.execution("sparse"):  # a mode inside changes nothing of it
            assert flops(lambda: layer(x)) == fewest
        with dc.execution(wait=False):
            assert flops(lambda: layer(x)) > fewest


def test_tokens_of_a_mask_are_padded_to_the_longest_count_where_the_host_waits(monkeypatch):
    block, x = dc.nn.TransformerBlock(D, 2), torch.randn(2, 6, D)
    layer = dc.nn.TokenSkip(block, lambda x: MASK.view(2, 6), attention="selected")
    want, fewest = layer(x), flops(lambda: layer(x))
    monkeypatch.setattr("dyncore.plan.is_eager_cpu", lambda t: False)
    assert flops(lambda: layer(x)) > fewest
    with dc.execution(wait=True):
        assert flops(lambda: layer(x)) == fewest
        assert_values(layer(x), want)


def test_plans_have_no_padding_where_the_host_waits(monkeypatch):
    mask, expert = torch.rand(7, 3) < 0.5, torch.randint(-1, 3, (7, 2))
    want = dc.select(mask[:, 0]), dc.route_mask(mask), dc.route_mask(mask, mask.float()), dc.route(expert, num_groups=3)
    monkeypatch.setattr("dyncore.plan.is_eager_cpu", lambda t: False)
    with dc.execution(wait=True):
        got = (
            dc.select(mask[:, 0]),
            dc.route_mask(mask),
            dc.route_mask(mask, mask.float()),
            dc.route(expert, num_groups=3),
        )
        with pytest.raises(ValueError, match="max_slots: the mask has"):
            dc.route_mask(torch.ones(7, 3, dtype=torch.bool), max_slots=20)
    for plan, other in zip(got, want, strict=True):
        assert plan.exact
        assert torch.equal(plan.rows, other.rows)
        assert torch.equal(plan.row_slots, other.row_slots)
    assert not dc.select(mask[:, 0]).exact


def test_nothing_waits_while_a_graph_is_traced():
    layer, x = dc.nn.Skip(dc.nn.MLP(D, 24), lambda x: MASK), torch.randn(12, D)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with dc.execution(wait=True):
        assert_values(compiled(x), layer(x))
