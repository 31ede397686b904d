"""TokenDrop and TokenMerge: which tokens go on, what the others cost, and the way back."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dyncore as dc
from tests.nn.oracle import D, block, flops

MODES = ("sparse", "masked", "auto")
B, S = 3, 11


class Score(nn.Module):
    """Says what it was told."""

    def __init__(self, logits):
        super().__init__()
        self.logits = logits

    def forward(self, x):
        return self.logits[..., None]


@pytest.mark.parametrize("mode", MODES)
def test_the_best_tokens_are_kept_in_order_with_the_first(mode):
    x, logits = torch.randn(B, S, D), torch.randn(B, S)
    layer = dc.nn.TokenDrop(4, Score(logits)).eval()
    with dc.execution(mode):
        out = layer(x)
    for b in range(B):
        chosen = [0, *sorted((logits[b, 1:].topk(4).indices + 1).tolist())]
        assert torch.equal(out[b], x[b, chosen])
        assert torch.equal(layer.gather(torch.arange(S).expand(B, S))[b], torch.tensor(chosen))
        assert layer.last_cost[b].nonzero().flatten().tolist() == chosen


@pytest.mark.parametrize("weight", ["hard", "soft", "none"])
def test_kept_tokens_teach_the_score(weight):
    x, logits = torch.randn(B, S, D), torch.randn(B, S, requires_grad=True)
    layer = dc.nn.TokenDrop(4, Score(logits), weight=weight).eval()
    out = layer(x)
    p = torch.sigmoid(logits.detach())
    p[:, 0] = 1
    kept, plain = layer.gather(p), layer.gather(x)
    torch.testing.assert_close(out.detach(), plain * kept[..., None] if weight == "soft" else plain)
    if weight == "none":
        assert not out.requires_grad
        return
    (got,) = torch.autograd.grad(out.sum(), logits)
    want = torch.zeros(B, S)
    dp = layer.restore(plain.sum(-1), want) * p * (1 - p)
    dp[:, 0] = 0
    torch.testing.assert_close(got, dp)


def test_gradient_reaches_x_at_kept_tokens_alone():
    x = torch.randn(B, S, D, requires_grad=True)
    layer = dc.nn.TokenDrop(0.5, D)
    layer(x).sum().backward()
    assert torch.equal(x.grad.abs().sum(-1) > 0, layer.last_cost.detach() > 0)


def test_training_draws_by_score_and_evaluation_takes_the_best():
    torch.manual_seed(1)
    logits = torch.tensor([3.0, 0.0, 0.0, -3.0]).expand(2000, 4)
    layer = dc.nn.TokenDrop(1, Score(logits), keep_first=0)
    layer(torch.randn(2000, 4, D))
    share = layer.last_cost.mean(0)  # Gumbel top-1 is a draw from the softmax
    torch.testing.assert_close(share, logits[0].softmax(0), atol=0.03, rtol=0)
    layer.eval()(torch.randn(2000, 4, D))
    assert layer.last_cost.mean(0).tolist() == [1, 0, 0, 0]


@pytest.mark.parametrize("mode", MODES)
def test_keep_all_is_exactly_x_and_keep_none_the_first_token(mode):
    x = torch.randn(B, S, D)
    with dc.execution(mode):
        assert torch.equal(dc.nn.TokenDrop(1.0, D)(x), x)
        assert torch.equal(dc.nn.TokenDrop(0.0, D)(x), x[:, :1])
        assert dc.nn.TokenDrop(0, D, keep_first=0)(x).shape == (B, 0, D)
        assert dc.nn.TokenMerge(0)(x) is x


def test_dropped_tokens_may_hold_nan():
    x, logits = torch.randn(B, S, D), torch.randn(B, S)
    layer = dc.nn.TokenDrop(4, Score(torch.where(logits < 0, torch.nan, logits))).eval()
    layer(x)
    dead = layer.last_cost == 0
    dirty = torch.where(dead[..., None], torch.nan, x).requires_grad_()
    out = layer(dirty)
    assert torch.equal(out, layer.gather(x))
    out.sum().backward()
    assert not dirty.grad[dead].any()


@pytest.mark.parametrize(
    "make", [lambda k: dc.nn.TokenDrop(k, D), lambda k: dc.nn.TokenMerge((1 - k) / 2)], ids=["drop", "merge"]
)
def test_flops_of_the_layers_behind_fall_with_the_tokens(make):
    x = torch.randn(2, 65, D)
    tail = block(causal=False)
    counts = []
    for keep in (0.0, 0.25, 0.5, 1.0):
        layer = make(keep)
        count = layer(x).shape[1]
        whole = flops(lambda layer=layer: tail(layer(x)))
        assert whole == flops(lambda layer=layer: layer(x)) + flops(lambda n=count: tail(x[:, :n]))
        counts.append((count, whole))
    assert counts == sorted(counts)


def test_merging_follows_the_paper():
    x, r, first = torch.randn(B, S, D, dtype=torch.float64), 3, 1
    layer = dc.nn.TokenMerge(r)
    out = layer(x)
    for b in range(B):
        unit = F.normalize(x[b], dim=-1)
        pairs = {}
        for i in range(0, S, 2):
            if i >= first:
                similar = {j: float(unit[i] @ unit[j]) for j in range(1, S, 2)}
                j = max(similar, key=similar.get)
                pairs[i] = (similar[j], j)
        merged = sorted(pairs, key=lambda i: -pairs[i][0])[:r]
        groups = {t: [t] for t in range(S) if t not in merged}
        for i in merged:
            groups[pairs[i][1]].append(i)
        want = torch.stack([x[b, members].mean(0) for members in groups.values()])
        torch.testing.assert_close(out[b], want)
        assert layer.last_sizes[b].tolist() == [len(members) for members in groups.values()]
        back = layer.unmerge(out)[b]
        for place, members in enumerate(groups.values()):
            assert all(torch.equal(back[t], out[b, place]) for t in members)
        assert layer.last_cost[b].tolist() == [float(t in groups) for t in range(S)]


def test_sizes_add_up_over_several_merges_and_means_stay_means():
    x = torch.randn(B, S, D, dtype=torch.float64)
    first, second = dc.nn.TokenMerge(4), dc.nn.TokenMerge(0.25)
    y = second(first(x), first.last_sizes)
    assert torch.equal(second.last_sizes.sum(1), torch.full((B,), float(S), dtype=torch.float64))
    torch.testing.assert_close((y * second.last_sizes[..., None]).sum(1), x.sum(1))
    everywhere = first.unmerge(second.unmerge(y))
    assert everywhere.shape == x.shape
    torch.testing.assert_close(everywhere.sum(1), x.sum(1))


def test_a_block_attends_to_merged_tokens_as_often_as_they_stand_for_one():
    layer, dense = dc.nn.TokenMerge(3), block(causal=False, rotary=False).double()
    x = torch.randn(B, S, D, dtype=torch.float64)
    y = layer(x)
    torch.testing.assert_close(layer.unmerge(dense(y, sizes=layer.last_sizes)), dense(layer.unmerge(y)))


def test_gradients_of_merging_are_those_of_the_means():
    x = torch.randn(B, S, D, dtype=torch.float64, requires_grad=True)
    layer = dc.nn.TokenMerge(4)
    grad = torch.randn(B, S - 4, D, dtype=torch.float64)
    (got,) = torch.autograd.grad(layer(x), x, grad)
    torch.testing.assert_close(got, layer.unmerge(grad / layer.last_sizes[..., None]))


def test_first_tokens_are_merged_with_none():
    x = torch.randn(1, 1, D).expand(B, S, D).contiguous()  # all alike
    for first in (0, 1, 2, 3, S):
        layer = dc.nn.TokenMerge(S, keep_first=first)
        layer(x)
        assert layer.last_sizes[:, :first].eq(1).all()
        assert layer.last_sizes.sum().item() == B * S


LAYERS = {
    "drop": lambda: dc.nn.TokenDrop(0.5, D),
    "merge": lambda: dc.nn.TokenMerge(3),
    "local_global": lambda: dc.nn.TokenDrop(3, dc.nn.LocalGlobalScore(D)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_modes_agree_and_one_graph_serves_training(name):
    layer, x = LAYERS[name]().eval(), torch.randn(B, S, D)
    model = nn.Sequential(nn.Linear(D, D), layer)
    grads = []
    for mode in MODES:
        model.zero_grad()
        with dc.execution(mode):
            model(x).square().sum().backward()
        grads.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    torch._dynamo.reset()
    model.zero_grad()
    torch.compile(model, fullgraph=True, backend="aot_eager")(x).square().sum().backward()
    grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    for other in grads[1:]:
        assert other.keys() == grads[0].keys()
        for key, grad in other.items():
            torch.testing.assert_close(grad, grads[0][key], rtol=1e-3, atol=1e-3 * float(grad.abs().max()))


@pytest.mark.parametrize("name", LAYERS)
def test_copies_pickles_and_empty_batches(name):
    layer, x = LAYERS[name]().eval(), torch.randn(B, S, D)
    want = layer(x)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert twin.last_plan is None
        assert torch.equal(twin(x), want)
    for shape in ((0, S, D), (B, 0, D)):
        empty = layer(torch.randn(shape))
        assert empty.shape[0] == shape[0]
        assert layer.last_cost.shape == shape[:2]
        if name == "merge":
            assert layer.unmerge(empty).shape == shape
        else:
            assert layer.gather(torch.ones(shape[:2])).shape == empty.shape[:2]


@pytest.mark.parametrize("name", LAYERS)
def test_exports_without_leaving_a_trace(name):
    layer, x = LAYERS[name]().eval(), torch.randn(B, S, D)
    exported = torch.export.export(layer, (x,)).module()
    assert (layer.last_plan, layer.last_cost) == (None, None)
    torch.testing.assert_close(exported(x), layer(x))


def test_amounts_move_at_run_time():
    drop, merge, x = dc.nn.TokenDrop(0.5, D), dc.nn.TokenMerge(0.25), torch.randn(1, 33, D)
    drop.keep, merge.r = 0.25, 2
    assert (drop(x).shape[1], merge(x).shape[1]) == (1 + 8, 31)


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match=r"keep: expected a float ratio in 0\.\.1 or an int count >= 0, got 1\.5"):
        dc.nn.TokenDrop(1.5, D)
    with pytest.raises(TypeError, match="r: expected a float ratio or an int count, got str"):
        dc.nn.TokenMerge("a")
    with pytest.raises(ValueError, match="keep_first: expected an int >= 0, got -1"):
        dc.nn.TokenMerge(2, keep_first=-1)
    with pytest.raises(ValueError, match=r"x: expected shape \[B, S, D\], got \[4, 16\]"):
        dc.nn.TokenDrop(2, D)(torch.randn(4, D))
    with pytest.raises(ValueError, match=r"sizes: expected shape \[2, 5\], got \[2, 4\]"):
        dc.nn.TokenMerge(1)(torch.randn(2, 5, D), torch.ones(2, 4))
    with pytest.raises(ValueError, match="TokenDrop: expected a forward before"):
        dc.nn.TokenDrop(2, D).gather(torch.ones(2, 5))
    with pytest.raises(ValueError, match="TokenMerge: expected a forward before"):
        dc.nn.TokenMerge(2).unmerge(torch.ones(2, 5))
