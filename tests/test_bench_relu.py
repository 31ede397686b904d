"""The bench's ReLU points: densities as promised, exact pre-activations, cold weights, recorded masks replayed."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from dyncore import masks
from dyncore.bench import points
from dyncore.bench import relu_sparsity as relu
from dyncore.bench.contest import check, measure

QUICK = {"seconds": 0, "min_rounds": 2}


@pytest.fixture(autouse=True)
def small_caches(monkeypatch):
    for module in ("dyncore.measure.timing", "dyncore.bench.relu_sparsity"):
        monkeypatch.setattr(f"{module}.last_level_cache", lambda: 2**16)


def on(mechanism, contest, x):
    """bool [T, I]: which neurons of an input are on."""
    if mechanism == relu.DOWN:
        return x > 0
    w_in, b_in, w_out = contest.variants["dyncore"].weights
    hidden = w_out.shape[1]
    return F.linear(x, w_in[:hidden], b_in[:hidden]) > 0


@pytest.mark.parametrize("mechanism", [relu.DOWN, relu.MLP, relu.GATED])
@pytest.mark.parametrize("source", ["uniform", "beta"])
@pytest.mark.parametrize("rows", [1, 256])
def test_every_input_has_the_density_of_its_point(mechanism, source, rows):
    for keep in (0.05, 0.5):
        contest = relu.synthetic(mechanism, source, rows, 64, 1024, torch.float32, keep).build()
        assert len(contest.inputs) == 3
        densities = [float(on(mechanism, contest, x).float().mean()) for (x,) in contest.inputs]
        assert densities == pytest.approx([keep] * 3, rel=0.15)


def test_beta_masks_have_hot_and_cold_neurons_and_uniform_ones_have_not():
    rates = {}
    for source in ("uniform", "beta"):
        contest = relu.synthetic(relu.MLP, source, 256, 64, 1024, torch.float32, 0.1).build()
        rates[source] = torch.cat([on(relu.MLP, contest, x) for (x,) in contest.inputs]).float().mean(0)
    assert rates["uniform"].max() < 0.3
    assert rates["beta"].max() > 0.5
    assert (rates["beta"] == 0).float().mean() > 0.1


@pytest.mark.parametrize("mechanism", [relu.MLP, relu.GATED])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [64, 2048])
def test_rounding_turns_no_neuron_on_or_off(mechanism, dtype, width):
    contest = relu.synthetic(mechanism, "uniform", 32, width, 96, dtype, 0.5).build()
    w_in, b_in, _ = contest.variants["dyncore"].weights
    x = contest.inputs[0][0]
    exact = F.linear(x.double(), w_in[:96].double(), b_in[:96].double())
    assert torch.equal(F.linear(x.float(), w_in[:96].float(), b_in[:96].float()).double(), exact)


def test_decode_reads_cold_weights_and_rivals_have_the_layout_that_suits_them():
    contest = relu.synthetic(relu.DOWN, "uniform", 1, 32, 64, torch.float32, 0.5).build()
    arguments = contest.arguments()
    ours = {arguments("dyncore", r)[1].data_ptr() for r in range(8)}
    assert len(ours) >= 4
    strides = {name: variant.weights[-1].stride() for name, variant in contest.variants.items()}
    assert strides["dyncore"] == strides["naive"] == strides["csr"] == (1, 32)
    assert strides["dense"] == strides["own"] == (64, 1)
    assert arguments("dyncore", 0)[1].stride() == (1, 32)


def test_a_rival_that_stores_its_weights_otherwise_is_held_to_the_same_truth():
    contest = relu.synthetic(relu.DOWN, "uniform", 8, 32, 64, torch.float32, 0.5).build()
    wrong = dataclasses.replace(contest.variants["dense"], run=lambda h, w: F.linear(h, w) * 1.001)
    other = dataclasses.replace(contest.variants["own"], weights=(contest.variants["own"].weights[0] * 2,))
    _, found, unavailable = check(
        dataclasses.replace(contest, variants=contest.variants | {"dense": wrong, "own": other})
    )
    assert set(found) == {"dense"}  # and twice the weights give twice the numbers
    assert not unavailable


def test_csr_is_unavailable_in_sixteen_bits_and_the_page_can_say_why():
    record, errors = measure(relu.synthetic(relu.DOWN, "uniform", 8, 32, 64, torch.bfloat16, 0.25), **QUICK)
    assert not errors
    assert set(record["against"]) == {"dense", "naive", "own"}
    assert "BFloat16" in record["unavailable"]["csr"]


def test_recorded_masks_are_replayed_where_there_are_some(tmp_path, monkeypatch):
    monkeypatch.setattr(relu, "RECORDING", tmp_path / "none")
    assert not any(point.input == "recorded" for point in points([relu.DOWN, relu.MLP]))
    generator = torch.Generator().manual_seed(0)
    layers = {f"{density}": masks.uniform(64, 48, density=density, generator=generator) for density in (0.9, 0.1, 0.3)}
    masks.save(tmp_path / "masks.bin", layers, source="made up")
    monkeypatch.setattr(relu, "RECORDING", tmp_path / "masks.bin")
    relu.recorded.cache_clear()
    try:
        found = [point for point in points([relu.DOWN, relu.MLP]) if point.input == "recorded"]
        assert {(p.mechanism, p.shape["T"], p.backward) for p in found} == {
            ("relu-down", 1, False), ("relu-down", 512, False),
            ("relu-mlp", 1, False), ("relu-mlp", 512, False), ("relu-mlp", 512, True),
        }  # fmt: skip
        assert found[0].keep_ratio == float(layers["0.3"].float().mean())  # the layer of median density
        contest = relu.synthetic(relu.DOWN, "recorded", 32, 16, 96, torch.float32).build()
        replayed = masks.replay(layers["0.3"], 32, 96)
        assert torch.equal(contest.inputs[0][0] > 0, replayed)
        whole = relu.synthetic(relu.DOWN, "recorded", 64, 16, 96, torch.float32).build().inputs
        assert not torch.equal(whole[0][0] > 0, whole[1][0] > 0)  # the recorded rows from elsewhere on
        record, errors = measure(relu.synthetic(relu.MLP, "recorded", 32, 16, 96, torch.float32), **QUICK)
        assert not errors
        assert record["input"] == "recorded"
    finally:
        relu.recorded.cache_clear()
