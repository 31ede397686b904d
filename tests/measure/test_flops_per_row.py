"""flops(per_row=True): what each sample costs, of which the truth is a batch of it alone."""

import dataclasses

import pytest
import torch
from torch import nn

import dyncore as dc

B, D, CLASSES = 12, 8, 3


def exits():
    stages = [nn.Sequential(nn.Linear(D, D), nn.ReLU()) for _ in range(3)]
    stages[1] = dc.nn.Skip(nn.Linear(D, D), dc.nn.ThresholdGate(D))  # a layer in a stage
    model = dc.nn.EarlyExit(stages, [nn.Linear(D, CLASSES) for _ in stages])
    model.threshold = 0.4
    return model


def tokens(layer):
    return nn.Sequential(layer, nn.Flatten(), nn.Linear(6 * D, CLASSES))


MODELS = {
    "EarlyExit": (exits, (B, D)),
    "DynamicKMoE": (lambda: tokens(dc.nn.DynamicKMoE(D, 4, 4, 0.3)), (B, 6, D)),
    "TokenSkip": (lambda: tokens(dc.nn.TokenSkip(dc.nn.TransformerBlock(D, 2), dc.nn.ThresholdGate(D))), (B, 6, D)),
    "ACM": (lambda: tokens(dc.nn.ACM(D, 4, 4)), (B, 6, D)),
}


@pytest.mark.parametrize("name", MODELS)
def test_each_sample_costs_what_it_costs_alone(name):
    build, shape = MODELS[name]
    torch.manual_seed(0)
    model, x = build().eval(), torch.randn(shape)
    with torch.no_grad(), dc.execution("sparse"):
        found = dc.measure.flops(model, x, per_row=True)
        alone = [dc.measure.flops(model, x[i : i + 1]) for i in range(B)]
        together = dc.measure.flops(model, x)
    assert found.dtype == torch.float64
    assert found.tolist() == alone
    assert len(set(alone)) > 1
    if name == "TokenSkip":  # sequences are padded to the longest
        assert found.sum() < together
    else:
        assert found.sum() == together


def test_records_of_layers_are_those_of_the_batch():
    model = exits().eval()
    dc.measure.flops(model, torch.randn(B, D), per_row=True)
    assert len(model.last_exit) == B


def test_tensors_of_the_batch_are_split_and_others_are_given_whole():
    seen = []

    def fn(batch, *, shared):
        seen.append((batch["x"].shape[0], batch["mask"].shape[0], shared.shape[0]))
        return batch["x"] @ shared

    found = dc.measure.flops(
        fn, {"x": torch.randn(3, D), "mask": torch.ones(3, 2)}, shared=torch.randn(D, 2), per_row=True
    )
    assert found.tolist() == [2 * D * 2] * 3
    assert seen == [(1, 1, D)] * 3 + [(3, 3, D)]


def test_an_empty_batch_has_no_rows():
    assert dc.measure.flops(nn.Linear(D, D), torch.randn(0, D), per_row=True).shape == (0,)


def test_a_choice_among_the_samples_of_a_batch_is_refused():
    torch.manual_seed(0)
    model = dc.nn.Skip(nn.Linear(D, D), dc.nn.TopKGate(D, 0.25)).eval()
    with pytest.raises(ValueError, match=r"fn: expected one that treats samples apart .* alone for \d+ of 12"):
        dc.measure.flops(model, torch.randn(B, D), per_row=True)


def test_noise_is_refused():
    with pytest.raises(ValueError, match="treats samples apart"):
        dc.measure.flops(nn.Sequential(nn.Linear(D, D), nn.Dropout()), torch.randn(B, D), per_row=True)


def test_a_sample_or_two_may_decide_otherwise_alone():
    def fn(x):
        return x + (len(x) == 1) * (x[:, :1] > 2.9)

    x = torch.zeros(B, D)
    x[0] = 3
    assert dc.measure.flops(fn, x, per_row=True).tolist() == [0] * B


def test_without_a_tensor_there_is_no_row():
    with pytest.raises(TypeError, match=r"inputs: expected a tensor \[B, ...\]"):
        dc.measure.flops(lambda: None, per_row=True)


@dataclasses.dataclass
class Output:
    y: torch.Tensor


def test_samples_that_are_mixed_are_seen_in_a_dataclass():
    with pytest.raises(ValueError, match="treats samples apart"):
        dc.measure.flops(lambda x: Output(x - x.mean(0)), torch.randn(8, D), per_row=True)


def test_of_two_samples_none_may_differ():
    def fn(x):
        return x * (x.norm(dim=1, keepdim=True) == x.norm(dim=1).max())

    with pytest.raises(ValueError, match="other outputs alone for 1 of 2"):
        dc.measure.flops(fn, torch.tensor([[1.0, 2.0], [3.0, 4.0]]), per_row=True)


def test_a_module_in_training_is_named_and_left_as_it_was():
    with pytest.raises(ValueError, match=r"fn: expected a module in evaluation .* got one in training that fails"):
        dc.measure.flops(nn.BatchNorm1d(D), torch.randn(4, D), per_row=True)
    model = nn.BatchNorm2d(D)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="treats samples apart"):
        dc.measure.flops(model, torch.randn(4, D, 2, 2), per_row=True)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
