"""examples/digits.py: it learns, it skips, and what it records is what the bench replays."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

import dyncore as dc
from dyncore.bench.routing import load_routing, recorded, save_routing

pytest.importorskip("sklearn")
PATH = Path(__file__).parents[2] / "examples" / "digits.py"


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("digits_example", PATH)
    module = importlib.util.module_from_spec(spec)
    sys.modules["digits_example"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def data(example):
    return example.digits()


@pytest.mark.parametrize("name", ["dense", "mixture of depths", "mixture of experts"])
def test_a_few_epochs_reach_an_accuracy_far_above_chance(example, data, name):
    torch.manual_seed(0)
    model = example.MODELS[name]()
    example.train(model, data, epochs=4, batch=32)
    assert example.accuracy(model, data) > 0.6  # chance is 0.1


def test_dynamic_models_execute_the_flops_of_their_capacity(example, data):
    images = data.test[:32]
    rows, width = 32 * example.TOKENS, example.WIDTH
    flops = {name: dc.measure.flops(make().eval(), images) for name, make in example.MODELS.items()}
    dense_mlp = 2 * rows * 2 * 4 * width * width
    routed = 2 * rows * (2 * 2 * width * width + width * example.EXPERTS)  # two experts of width 64, and the router
    assert flops["dense"] - flops["mixture of experts"] == 2 * (dense_mlp - routed)
    products = 2 * rows * 12 * width * width  # attention projections and MLP of one block, of all tokens
    saved = flops["dense"] - flops["mixture of depths"] + 2 * 2 * rows * width  # less the routers
    assert saved >= 2 * 0.75 * products


def test_recorded_routing_is_read_back_as_it_was_chosen(example, data, tmp_path):
    models = {name: make().eval() for name, make in example.MODELS.items()}
    routing = example.record(models, data, "a command")
    save_routing(tmp_path / "routing.json", routing)
    again = load_routing(tmp_path / "routing.json")
    assert (again.command, again.width, again.expert_width) == ("a command", 64, 64)
    masks = [layer.mask for layer in again.layers if layer.mask is not None]
    experts = [layer.expert for layer in again.layers if layer.expert is not None]
    assert len(masks) == len(experts) == 2
    for mask in masks:  # 4 tokens of each image
        assert torch.equal(mask.view(-1, example.TOKENS).sum(1), torch.full((example.RECORDED_IMAGES,), 4))
    for layer, kept in zip(again.layers, routing.layers, strict=True):
        assert layer.name == kept.name
        for one, other in ((layer.mask, kept.mask), (layer.expert, kept.expert)):
            assert (one is None and other is None) or torch.equal(one, other)
    moe = models["mixture of experts"].blocks[3].mlp
    assert torch.equal(moe.last_plan.offsets.diff().long(), torch.bincount(experts[1].flatten(), minlength=8))


def test_the_shipped_routing_is_of_the_example_as_it_stands(example):
    routing = recorded()
    assert (routing.width, routing.expert_width) == (example.WIDTH, example.WIDTH)
    rows = example.RECORDED_IMAGES * example.TOKENS
    masks = [layer.mask for layer in routing.layers if layer.mask is not None]
    experts = [layer for layer in routing.layers if layer.expert is not None]
    assert len(masks) == len(experts) == example.DEPTH // 2
    assert all(int(mask.sum()) == example.CAPACITY * rows for mask in masks)
    assert all(layer.num_groups == example.EXPERTS and layer.expert.shape == (rows, 2) for layer in experts)
    assert all((layer.expert[:, 0] != layer.expert[:, 1]).all() for layer in experts)
