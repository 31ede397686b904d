"""MixtureOfDepths and TokenSkip: the chosen tokens, attention by original position, causality, what falls away."""

import pytest
import torch
from torch import nn

import dyncore as dc
from tests.nn.oracle import LAYERS, D, Fixed, block, block_on, flops, run

MODES = ("sparse", "masked", "auto")
B, S = 3, 11


def tokens(*shape):
    return torch.randn(*(shape or (B, S, D)), dtype=torch.float64)


def ragged():
    """Most of one sequence, none of the next, some of the third."""
    mask = torch.zeros(B, S, dtype=torch.bool)
    mask[0, 3:] = True
    mask[2, [1, 4, 5, 9]] = True
    return mask


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
def test_mixture_of_depths_follows_the_paper(mode, causal):
    layer, x = dc.nn.MixtureOfDepths(block(causal=causal), 4).double(), tokens()
    with dc.execution(mode):
        got = layer(x)
    scores = x @ layer.router.weight[0]
    want = x.clone()
    for b in range(B):
        chosen = sorted(scores[b].topk(4).indices.tolist())
        update = block_on(layer.block, x[b], chosen) - x[b, chosen]
        want[b, chosen] = x[b, chosen] + scores[b, chosen, None] * update
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("weight", ["linear", "sigmoid", "tanh"])
def test_mixture_of_depths_weighs_an_update_by_the_router(weight):
    mlp, x = dc.nn.MLP(D, 24).double(), tokens()
    layer = dc.nn.MixtureOfDepths(mlp, 0.5, weight=weight, returns="update").double()
    scores = x @ layer.router.weight[0]
    r = {"linear": scores, "sigmoid": scores.sigmoid(), "tanh": scores.tanh()}[weight]
    chosen = torch.zeros(B, S, dtype=torch.bool).scatter(1, scores.topk(6, dim=1).indices, True)
    torch.testing.assert_close(layer(x), torch.where(chosen[..., None], x + r[..., None] * mlp(x), x))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("attention", ["selected", "all_keys"])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
def test_token_skip_attends_within_its_sequence_by_original_position(mode, attention, causal):
    x, mask, g = tokens(), ragged(), torch.rand(B, S, dtype=torch.float64)
    layer = dc.nn.TokenSkip(block(causal=causal), Fixed(mask, g), attention).double()
    with dc.execution(mode):
        got = layer(x)
    want = x.clone()
    for b in range(B):
        chosen = mask[b].nonzero()[:, 0].tolist()
        if chosen:
            y = block_on(layer.block, x[b], chosen, attention == "all_keys")
            want[b, chosen] = x[b, chosen] + g[b, chosen, None] * (y - x[b, chosen])
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("attention", ["selected", "all_keys"])
def test_ragged_gradients_equal_the_masked_ones(attention):
    x, mask = tokens(), ragged()
    scale = torch.rand(B, S, dtype=torch.float64, requires_grad=True)
    layer = dc.nn.TokenSkip(block(), Fixed(mask, scale), attention).double()
    grads = []
    for mode in ("sparse", "masked"):
        scale.grad = None
        grads.append({**run(layer, x, mode).grads, "scale": scale.grad})
    for name, grad in grads[0].items():
        torch.testing.assert_close(grad, grads[1][name], msg=name)
    assert not grads[0]["scale"][~mask].any()
    assert grads[0]["scale"][mask].all()


@pytest.mark.parametrize("mode", MODES)
def test_keep_one_is_exactly_the_dense_block(mode):
    x = torch.randn(B, S, D)
    dense = block()
    with dc.execution(mode), torch.no_grad():
        want = dense(x)
        everyone = torch.ones(B, S, dtype=torch.bool)
        assert torch.equal(dc.nn.TokenSkip(dense, Fixed(everyone))(x), want)
        assert torch.equal(dc.nn.TokenSkip(dense, Fixed(everyone), "all_keys")(x), want)
        assert torch.equal(dc.nn.TokenSkip(dense, dc.nn.StraightThroughGate(D, -1.0))(x), want)
        router = nn.Linear(D, 1)
        nn.init.zeros_(router.weight)
        nn.init.ones_(router.bias)
        assert torch.equal(dc.nn.MixtureOfDepths(dense, 1.0, router=router)(x), want)


@pytest.mark.parametrize("mode", MODES)
def test_keep_none_is_exactly_the_identity(mode):
    x = torch.randn(B, S, D)
    nobody = torch.zeros(B, S, dtype=torch.bool)
    for layer in (
        dc.nn.TokenSkip(block(), Fixed(nobody)),
        dc.nn.TokenSkip(block(), Fixed(nobody, torch.rand(B, S)), "all_keys"),
        dc.nn.TokenSkip(block(), dc.nn.TopKGate(D, 0)),
        dc.nn.MixtureOfDepths(block(), 0),
        dc.nn.MixtureOfDepths(block(), 0.0, returns="update"),
    ):
        got = run(layer, x, mode, torch.ones(x.shape))
        assert torch.equal(got.out, x)
        assert torch.equal(got.grads["x"], torch.ones_like(x))
        assert all(grad is not None and not grad.any() for name, grad in got.grads.items() if name != "x")


@pytest.mark.parametrize("mode", MODES)
def test_tokens_passed_by_may_hold_nan(mode):
    x, mask, nan = torch.randn(B, S, D), ragged(), float("nan")
    g = torch.rand(B, S)
    dense = block()
    clean = run(dc.nn.TokenSkip(dense, Fixed(mask, g)), x, mode)
    layer = dc.nn.TokenSkip(dense, Fixed(mask, torch.where(mask, g, nan)))
    dirty = run(layer, torch.where(mask[..., None], x, nan), mode)
    assert dirty.out[~mask].isnan().all()
    assert torch.equal(dirty.out[mask], clean.out[mask])
    for name, grad in dirty.grads.items():
        torch.testing.assert_close(grad, clean.grads[name])


CAUSAL = {
    "token_skip": lambda: dc.nn.TokenSkip(block(), dc.nn.ThresholdGate(D)),
    "token_skip_keys": lambda: dc.nn.TokenSkip(block(), dc.nn.ThresholdGate(D), "all_keys"),
    "mod_predictor": lambda: dc.nn.MixtureOfDepths(block(), 0.5, inference="predictor").eval(),
    "mod_threshold": lambda: dc.nn.MixtureOfDepths(block(), 0.5, inference="threshold").eval(),
    "skip": LAYERS["skip"],
    "moe": LAYERS["moe"],
}


@pytest.mark.parametrize("name", CAUSAL)
@pytest.mark.parametrize("mode", MODES)
def test_a_later_token_never_changes_an_earlier_output(name, mode):
    layer, x = CAUSAL[name]().double(), tokens()
    with dc.execution(mode), torch.no_grad():
        before = layer(x)
        for changed in (1, S // 2, S - 1):
            later = x.clone()
            later[:, changed:] = 5 * torch.randn_like(later[:, changed:])
            after = layer(later)
            torch.testing.assert_close(after[:, :changed], before[:, :changed], rtol=1e-10, atol=1e-10)
            assert not torch.equal(after[:, changed:], before[:, changed:])


def test_topk_inference_is_not_causal_and_says_so():
    layer, x = dc.nn.MixtureOfDepths(block(), 0.3).double().eval(), tokens(1, 30, D)
    later = x.clone()
    later[:, 15:] = 10 * torch.randn_like(later[:, 15:])
    assert not torch.allclose(layer(later)[:, :15], layer(x)[:, :15])
    assert "not causal" in dc.nn.MixtureOfDepths.__doc__


def test_flops_of_mixture_of_depths_are_the_router_and_the_block_on_k_tokens():
    layer, x = dc.nn.MixtureOfDepths(block(), 4), torch.randn(B, S, D)
    dense = flops(lambda: layer.block(x[:, :4]))
    assert flops(lambda: layer(x)) == 2 * B * S * D + dense
    projections, mlp = 2 * 4 * D * D, 2 * 2 * D * 4 * D
    heads = torch.randn(B, 4, 4, D // 4)
    assert dense == B * 4 * (projections + mlp) + flops(lambda: dc.attention(heads, heads, heads))


def test_flops_fall_with_the_tokens_kept():
    x, dense = torch.randn(2, 64, D), block()
    for make in (
        lambda k: dc.nn.MixtureOfDepths(dense, k),
        lambda k: dc.nn.TokenSkip(dense, dc.nn.TopKGate(D, k)),
        lambda k: dc.nn.TokenSkip(dense, Fixed(torch.arange(64).lt(int(64 * k)).expand(2, 64))),
        lambda k: dc.nn.TokenSkip(dense, Fixed(torch.arange(64).lt(int(64 * k)).expand(2, 64)), "all_keys"),
    ):
        layers = [make(k) for k in (0.0, 0.125, 0.25, 0.5, 1.0)]
        counts = [flops(lambda layer=layer: layer(x)) for layer in layers]
        assert counts == sorted(set(counts))
        assert counts[2] < 0.5 * counts[4]


def test_kept_keys_cost_their_projection_and_skipped_ones_do_not():
    mask = torch.zeros(1, 64, dtype=torch.bool)
    mask[0, ::8] = True
    x, dense = torch.randn(1, 64, D), block()
    selected = flops(lambda: dc.nn.TokenSkip(dense, Fixed(mask))(x))
    all_keys = flops(lambda: dc.nn.TokenSkip(dense, Fixed(mask), "all_keys")(x))
    q, k, at = torch.randn(1, 4, 8, D // 4), torch.randn(1, 4, 64, D // 4), torch.arange(0, 64, 8)
    more = flops(lambda: dc.attention(q, k, k, q_positions=at)) - flops(lambda: dc.attention(q, q, q))
    assert all_keys - selected == 2 * (64 - 8) * D * 2 * D + more


def test_cost_of_a_token_is_whether_it_ran_and_teaches_the_gate():
    x, gate = tokens(), dc.nn.StraightThroughGate(D).double()
    layer = dc.nn.TokenSkip(block(), gate).double()
    layer(x)
    assert torch.equal(layer.last_cost.detach(), (torch.sigmoid(gate.logits(x)) > 0.5).double())
    got = torch.autograd.grad(dc.nn.losses.compute_target(layer.last_cost, 0.0), gate.score.weight)[0]
    keep = layer.last_cost.detach().mean()
    want = torch.autograd.grad(2 * keep * torch.sigmoid(gate.logits(x)).mean(), gate.score.weight)[0]
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("inference", ["predictor", "threshold"])
def test_the_auxiliary_loss_teaches_who_will_be_chosen(inference):
    x = torch.randn(8, 32, D)
    layer = dc.nn.MixtureOfDepths(block(), 0.25, inference=inference)
    if inference == "threshold":  # a router that can shift its scores to both sides of zero
        layer.router = nn.Linear(D, 1)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.02)
    for _ in range(150):
        layer(x)
        assert set(layer.losses()) == {inference}
        optimizer.zero_grad()
        layer.losses()[inference].backward()
        optimizer.step()
    with torch.no_grad():
        layer(x)
        chosen = layer.last_cost.bool()
        layer.eval()
        layer(x)
    assert (layer.last_cost.bool() == chosen).float().mean() > 0.97
    assert layer.losses() == {inference: layer._auxiliary}


def test_the_predictor_has_no_gradient_to_x():
    x = torch.randn(2, 8, D, requires_grad=True)
    layer = dc.nn.MixtureOfDepths(block(), 0.25, inference="predictor")
    layer(x)
    layer.losses()["predictor"].backward()
    assert x.grad is None
    assert layer.router.weight.grad is None
    assert layer.predictor[0].weight.grad.any()


def test_threshold_of_inference_moves_at_run_time():
    layer, x = dc.nn.MixtureOfDepths(block(), 0.25, inference="threshold").eval(), torch.randn(4, 32, D)
    keep = []
    for threshold in (0.0, 0.4, 0.5, 0.6, 1.0):
        layer.threshold = threshold
        layer(x)
        keep.append(float(layer.last_cost.detach().mean()))
    assert keep[0] == 1.0
    assert keep[-1] == 0.0
    assert keep == sorted(keep, reverse=True)


def test_capacity_is_a_ratio_or_a_count():
    for capacity, length, k in (
        (0.25, 13, 3),
        (0.1, 30, 3),
        (5, 13, 5),
        (5, 3, 3),
        (1.0, 7, 7),
        (1, 7, 1),
        (0.5, 5, 3),
    ):
        layer = dc.nn.MixtureOfDepths(block(), capacity)
        layer(torch.randn(2, length, D))
        assert layer.last_plan.num_slots == 2 * k, (capacity, length)


def test_a_block_of_plain_torch_serves_mixture_of_depths():
    encoder = nn.TransformerEncoderLayer(D, 4, 32, dropout=0.0, batch_first=True)
    layer, x = dc.nn.MixtureOfDepths(encoder, 4), torch.randn(B, S, D)
    scores = x @ layer.router.weight[0]
    want = x.clone()
    for b in range(B):
        chosen = sorted(scores[b].topk(4).indices.tolist())
        want[b, chosen] += scores[b, chosen, None] * (encoder(x[b : b + 1, chosen])[0] - x[b, chosen])
    torch.testing.assert_close(layer(x), want)


class Swallowing(nn.Module):
    """As blocks of transformers: any keyword is taken and most are not looked at."""

    def forward(self, x, **kwargs):
        return x


def test_blocks_that_do_not_fit_are_refused():
    with pytest.raises(
        ValueError, match="block: expected a block whose forward takes positions=, got Linear"
    ) as refused:
        dc.nn.TokenSkip(nn.Linear(D, D), dc.nn.ThresholdGate(D))
    assert "see dyncore.nn.attention for the token protocol" in str(refused.value)
    assert "a block that treats tokens one by one goes into Skip" in str(refused.value)
    with pytest.raises(ValueError, match="block: expected a block whose forward takes positions=, got Swallowing"):
        dc.nn.TokenSkip(Swallowing(), dc.nn.ThresholdGate(D))
    with pytest.raises(
        ValueError, match=r"block: expected a module that takes \[B, S, D\], got one with batch_first=False"
    ):
        dc.nn.MixtureOfDepths(nn.TransformerEncoderLayer(D, 4, 32), 4)
    with pytest.raises(ValueError, match=r"block: expected .* positions= and live= for inference='threshold', got MLP"):
        dc.nn.MixtureOfDepths(dc.nn.MLP(D, D), 0.5, inference="threshold")
    with pytest.raises(ValueError, match=r"block: expected an output of the shape of its input, \[2, 4, 16\]"):
        dc.nn.MixtureOfDepths(nn.Linear(D, 3), 4)(torch.randn(2, 8, D))
    with pytest.raises(ValueError, match="dim: expected the model width"):
        dc.nn.MixtureOfDepths(nn.Identity(), 0.5)


def test_bad_arguments_are_named():
    layer = dc.nn.MixtureOfDepths(block(), 0.5)
    with pytest.raises(ValueError, match=r"x: expected shape \[B, S, D\], got \[4, 16\]"):
        layer(torch.randn(4, D))
    with pytest.raises(TypeError, match="x: expected a Tensor, got list"):
        layer([1.0])
    with pytest.raises(ValueError, match=r"capacity: expected a float ratio in 0\.\.1 or an int count >= 0, got 1\.25"):
        dc.nn.MixtureOfDepths(block(), 1.25)
    with pytest.raises(ValueError, match="inference: expected one of topk, predictor, threshold, got 'best'"):
        dc.nn.MixtureOfDepths(block(), 0.5, inference="best")
    layer.inference = "predictor"
    with pytest.raises(ValueError, match="inference: expected a layer built with inference='predictor'"):
        layer.eval()(torch.randn(2, 4, D))
    with pytest.raises(ValueError, match="attention: expected one of selected, all_keys, got 'none'"):
        dc.nn.TokenSkip(block(), dc.nn.ThresholdGate(D), "none")
    with pytest.raises(ValueError, match=r"gate: expected a mask \[B, S\], got shape \[2\]"):
        dc.nn.TokenSkip(block(), Fixed(torch.ones(2, dtype=torch.bool)))(torch.randn(2, 4, D))
    with pytest.raises(ValueError, match="num_heads: expected a divisor of dim=16, got 3"):
        dc.nn.Attention(D, 3)
    with pytest.raises(ValueError, match="num_heads: expected an even head width for rotary, got 1"):
        dc.nn.Attention(D, D)


def test_a_block_whose_mlp_is_empty_has_none():
    block = dc.nn.TransformerBlock(8, 2, mlp=nn.Sequential())
    assert isinstance(block.mlp, nn.Sequential)
