"""examples/relu_lm.py: both models learn the same, the zeros grow, and what it records is what its neurons do."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from dyncore import masks

PATH = Path(__file__).parents[2] / "examples" / "relu_lm.py"


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("relu_lm_example", PATH)
    module = importlib.util.module_from_spec(spec)
    sys.modules["relu_lm_example"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def text(example):
    return example.python_text(2**19)


@pytest.fixture(scope="module")
def sizes(example):
    return example.Sizes(dim=32, hidden=256, heads=2, depth=2, batch=4, length=32)


@pytest.fixture(scope="module", params=["l1", "hoyer"])
def outcome(request, example, text, sizes):
    torch.manual_seed(0)
    strength = 10 * example.STRENGTHS[request.param]  # the training is short
    settings = example.Settings(request.param, strength, steps=60, points=3, decode_seconds=0.01)
    return example.run(text, sizes, settings, record_rows=70)


def test_the_sparse_model_learns_what_its_dense_twin_learns(outcome):
    losses = [torch.tensor(outcome.losses[name]) for name in ("sparse", "dense")]
    assert (losses[0] - losses[1]).abs().max() < 1e-3
    assert losses[0][-10:].mean() < losses[0][:10].mean() - 0.5
    last = outcome.points[-1]["held_out_loss"]
    assert last["sparse"] == pytest.approx(last["dense"], abs=1e-3)


def test_zeros_grow_and_flops_fall(outcome):
    zeros = [point["zeros"] for point in outcome.points]
    assert zeros[0] < zeros[-1]
    assert zeros[-1] > 0.7
    assert outcome.flops["sparse"] < outcome.flops["dense"]
    assert all(point["step_ms"]["sparse"] > 0 and point["token_ms"]["dense"] > 0 for point in outcome.points)


def test_recorded_masks_are_those_of_the_trained_model(outcome, example, text, sizes):
    model = outcome.models["sparse"].eval()
    windows, _ = next(example.batches(example.split(text)[1], sizes, 0))
    seen = {}
    for i, block in enumerate(model.blocks):
        block.mlp.register_forward_pre_hook(
            lambda m, args, i=i: seen.update({f"blocks.{i}.mlp": m.hidden(args[0]) > 0})
        )
    with torch.no_grad():
        model(windows)
    assert seen.keys() == outcome.sparsity.masks.keys()
    for name, mask in outcome.sparsity.masks.items():
        assert torch.equal(mask, seen[name].flatten(0, 1)[:70])


def test_the_norm_is_one_more_output_of_the_fused_op(example):
    x, w_in, w_out = torch.randn(5, 7, 12), torch.randn(40, 12), torch.randn(12, 40)
    b_in, b_out = torch.randn(40), torch.randn(12)
    leaves = [t.requires_grad_() for t in (x, w_in, w_out, b_in, b_out)]
    y, norm = example.with_l1(*leaves)
    h = F.relu(F.linear(x, w_in, b_in))
    torch.testing.assert_close(y, F.linear(h, w_out, b_out), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(norm, h.abs().sum(-1), atol=1e-4, rtol=1e-4)
    grad = torch.randn_like(y)
    got = torch.autograd.grad((y * grad).sum() + 3 * norm.square().mean(), leaves)
    want = torch.autograd.grad((F.linear(h, w_out, b_out) * grad).sum() + 3 * h.sum(-1).square().mean(), leaves)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-3)


def test_hoyer_is_one_over_the_width_for_one_neuron_and_one_for_equal_ones(example):
    one = torch.zeros(3, 8)
    one[:, 2] = torch.tensor([0.1, 1.0, 7.0])
    assert example.hoyer(one).item() == pytest.approx(1 / 8)
    assert example.hoyer(torch.full((3, 8), 0.3)).item() == pytest.approx(1)
    assert example.hoyer(torch.zeros(3, 8)).item() == 0


@pytest.mark.parametrize("name", ["ReluMLP", "DenseMLP"])
def test_decoding_with_a_cache_continues_as_the_whole_model_would(example, sizes, name):
    model = example.LanguageModel(sizes, getattr(example, name), "l1").eval()
    tokens = torch.randint(example.VOCABULARY, (1, 9))
    decoded = model.decode(tokens, 12)
    for _ in range(12):
        tokens = torch.cat([tokens, model(tokens)[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(tokens[:, 9:], decoded)


def test_the_text_is_ascii_and_no_piece_is_both_trained_on_and_held_out(example, text):
    assert int(text.max()) < example.VOCABULARY
    assert len(text) == 2**19
    training, held_out = example.split(text)
    assert len(held_out) == len(text) // 16
    assert torch.equal(held_out[: example.PIECE], text[15 * example.PIECE : 16 * example.PIECE])
    assert torch.equal(training[15 * example.PIECE :][: example.PIECE], text[16 * example.PIECE : 17 * example.PIECE])


def test_the_command_writes_its_figures_and_masks(tmp_path):
    command = [sys.executable, str(PATH), "--quick", "--steps", "4", "--json", str(tmp_path / "r.json")]
    command += ["--record", str(tmp_path / "masks"), "--rows", "100"]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "largest difference of the two losses" in output
    document = json.loads((tmp_path / "r.json").read_text())
    assert document["schema"] == "dyncore.relu_lm/1"
    assert [point["step"] for point in document["points"]] == [1, 3, 4]
    assert len(document["losses"]["dense"]) == 4
    recording = masks.load(tmp_path / "masks")
    assert list(recording.layers) == [record["layer"] for record in document["records"]]
    assert all(mask.shape == (100, 512) for mask in recording.layers.values())
    assert recording.command == document["command"]
