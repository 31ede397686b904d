"""Decoding with a KeyValueCache: a prefill and steps of any length give what one call on the whole sequence gives."""

import pytest
import torch

import dyncore as dc
from tests.nn.oracle import D, block, flops

B, S = 3, 12

CAUSAL = {
    "block": lambda: block(),
    "block_gqa": lambda: block(num_kv_heads=2),
    "block_no_rotary": lambda: block(rotary=False),
    "token_skip": lambda: dc.nn.TokenSkip(block(), dc.nn.ThresholdGate(D)),
    "token_skip_keys": lambda: dc.nn.TokenSkip(block(num_kv_heads=1), dc.nn.ThresholdGate(D), "all_keys"),
    "mod_predictor": lambda: dc.nn.MixtureOfDepths(block(), 0.5, inference="predictor"),
    "mod_threshold": lambda: dc.nn.MixtureOfDepths(block(), 0.5, inference="threshold"),
}


@pytest.mark.parametrize("mode", ["sparse", "masked", "auto"])
@pytest.mark.parametrize("name", CAUSAL)
def test_prefill_and_steps_equal_the_full_forward(name, mode):
    layers = [CAUSAL[name]().double().eval() for _ in range(2)]
    x = torch.randn(B, S, D, dtype=torch.float64)
    with dc.execution(mode), torch.no_grad():
        whole = layers[1](layers[0](x))
        for lengths in ([5] + [1] * 7, [1, 4, 4, 3]):
            caches = [dc.nn.KeyValueCache() for _ in layers]
            parts = []
            for part in x.split(lengths, dim=1):
                for layer, cache in zip(layers, caches, strict=True):
                    part = layer(part, cache=cache)
                parts.append(part)
            torch.testing.assert_close(torch.cat(parts, 1), whole)
            assert [cache.seen for cache in caches] == [S, S]


def test_a_token_that_is_skipped_leaves_no_key_and_runs_no_product():
    gate = dc.nn.ThresholdGate(D)
    layer, cache, x = dc.nn.TokenSkip(block(), gate).eval(), dc.nn.KeyValueCache(), torch.randn(1, 1, D)
    with torch.no_grad():
        gate.threshold = 1.0
        skipped = flops(lambda: layer(x, cache=cache))
        assert (len(cache), cache.seen) == (0, 1)
        gate.threshold = -1.0
        taken = flops(lambda: layer(x, cache=cache))
    assert (len(cache), cache.seen) == (1, 2)
    assert cache.positions.tolist() == [[1]]
    assert skipped == 2 * D  # the gate's own score
    assert taken > 100 * skipped


def test_samples_that_differ_share_a_cache():
    mask = torch.tensor([[True], [False]])
    layer, cache = dc.nn.TokenSkip(block(), lambda x: mask).eval(), dc.nn.KeyValueCache()
    with torch.no_grad():
        layer(torch.randn(2, 1, D), cache=cache)
    assert cache.live.tolist() == [[True], [False]]


def test_caches_that_do_not_fit_are_refused():
    cache, x = dc.nn.KeyValueCache(), torch.randn(2, 3, D)
    layer = dc.nn.MixtureOfDepths(block(), 0.5)
    with pytest.raises(
        ValueError, match=r"cache: expected None where tokens are compared with later ones.* in training"
    ):
        layer(x, cache=cache)
    with pytest.raises(ValueError, match="inference='topk'"):
        layer.eval()(x, cache=cache)
    block()(x, cache=cache)
    with pytest.raises(ValueError, match="cache: expected the batch of earlier calls, 2, got 1"):
        block()(x[:1], cache=cache)

    class Protocol(torch.nn.Module):
        def forward(self, x, positions=None, live=None):
            return x

    with pytest.raises(ValueError, match="cache: expected a block whose forward takes cache=, got Protocol"):
        dc.nn.TokenSkip(Protocol(), dc.nn.ThresholdGate(D))(x, cache=cache)


def test_a_cache_of_inference_mode_goes_on_outside_of_it():
    layer, x = dc.nn.TokenSkip(block(), dc.nn.ThresholdGate(D, -1.0)).eval(), torch.randn(B, S, D)
    cache = dc.nn.KeyValueCache()
    with torch.inference_mode():
        parts = [layer(x[:, :4], cache=cache), layer(x[:, 4:5], cache=cache)]
    with torch.no_grad():
        parts += [layer(x[:, i : i + 1], cache=cache) for i in range(5, S)]
        torch.testing.assert_close(torch.cat(parts, 1), layer(x))
