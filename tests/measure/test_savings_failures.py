"""What looks dynamic and is not, and bad input: the layer is named, what was measured stands."""

import dataclasses
import sys

import pytest
import torch
from torch import nn

import dyncore as dc
from dyncore.execution import mode
from dyncore.measure import SavingsError
from dyncore.measure.calls import Call, tensors
from dyncore.measure.masked_layers import masked_layers

environment_module = sys.modules["dyncore.measure.environment"]  # the package has a function of that name
SHORT = {"seconds": 1e-9, "min_rounds": 1}
QUICK = {**SHORT, "details": False}


class Fake(nn.Module):
    def __init__(self):
        super().__init__()
        self.f = nn.Linear(16, 16)

    def forward(self, x):
        return x + (torch.arange(len(x)) % 4 == 0)[:, None] * self.f(x)


def test_a_masked_layer_is_exposed():
    saved = dc.measure.savings(nn.Sequential(Fake()), torch.randn(16, 16), **QUICK)
    assert saved.flop_speedup == 1
    assert saved.notes[0].startswith(
        "0.f (Linear) computes every row, and a mask then makes 0 of 75% of them: its FLOP"
    )
    assert "speed-up is 1.0 and it saves nothing" in str(saved)


class Spelled(nn.Module):
    """A layer and a way to multiply what it computes by a mask."""

    def __init__(self, layer, way):
        super().__init__()
        self.layer, self.way = layer, way

    def forward(self, x):
        return self.way(self.layer, x)


def rows(x):
    return (torch.arange(len(x)) % 4 == 0).float()[:, None]


def places(x):
    return (torch.arange(x[0, 0].numel()) % 4 == 0).float().view(1, 1, *x.shape[2:]).expand(len(x), -1, -1, -1)


def zeroed(f, x):
    y = f(x)
    y[rows(x)[:, 0] == 0] = 0.0
    return x + y


SPELLINGS = {
    "after an activation": lambda f, x: x + rows(x) * nn.functional.relu(f(x)),
    "of the difference": lambda f, x: x + rows(x) * (f(x) - x),
    "of the sum": lambda f, x: (x + f(x)) * rows(x) + x * (1 - rows(x)),
    "lerp": lambda f, x: torch.lerp(x, f(x), rows(x)),
    "addcmul": lambda f, x: torch.addcmul(x, rows(x), f(x)),
    "rows set to 0": zeroed,
    "of a view": lambda f, x: (f(x).view(4, 4, 8) * rows(x).view(4, 4, 1)).view(16, 8),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_mask_is_seen_however_it_is_spelled(spelling):
    (masked,) = masked_layers(Call(Spelled(nn.Linear(8, 8), SPELLINGS[spelling]), (torch.randn(16, 8),), {}))
    assert masked.layer == "layer"
    assert masked.what == "rows"
    assert masked.mask.double().mean() == 0.25


def test_a_block_that_ends_in_an_activation_is_named_by_what_computes():
    model = nn.Sequential(nn.Linear(8, 8), Spelled(nn.ReLU(), lambda f, x: f(x) * rows(x)))
    assert [masked.layer for masked in masked_layers(Call(model, (torch.randn(16, 8),), {}))] == ["0"]


def test_masks_of_places_and_channels_are_told():
    fake = Spelled(nn.Conv2d(4, 4, 3, padding=1), lambda f, x: x + places(x) * f(x))
    saved = dc.measure.savings(fake, torch.randn(2, 4, 4, 4), **QUICK)
    assert saved.notes[0].startswith("layer (Conv2d) computes every place, and a mask then makes 0 of 75% of them")
    narrow = Spelled(nn.Linear(8, 8), lambda f, x: (torch.arange(8) < 2) * f(x))
    saved = dc.measure.savings(narrow, torch.randn(4, 8), **QUICK)
    assert saved.notes[0].startswith("layer (Linear) computes every channel, and a mask then makes 0 of 75% of them")


def test_what_is_no_mask_of_a_layer_is_none():
    gain = nn.Parameter(torch.zeros(8))  # as residual blocks start with
    for way in (
        lambda f, x: x + gain * f(x),
        lambda f, x: f(x).masked_fill(rows(x) == 0, -torch.inf),
        lambda f, x: f(x) * nn.functional.relu(x),
        lambda f, x: rows(x) * (f(x).t() @ f(x))[:1],
    ):
        assert masked_layers(Call(Spelled(nn.Linear(8, 8), way), (torch.randn(16, 8),), {})) == []


def test_masked_layers_alike_share_a_sentence():
    saved = dc.measure.savings(nn.Sequential(*[Fake() for _ in range(8)]), torch.randn(16, 16), **QUICK)
    (note,) = saved.notes
    assert note.startswith("0.f (Linear), 1.f (Linear), 2.f (Linear) and 5 more compute every row, and a mask then")


def test_a_layer_that_skips_is_not_taken_for_a_masked_one():
    saved = dc.measure.savings(dc.nn.Skip(nn.Linear(8, 8), lambda x: x[:, 0] > 0), torch.randn(16, 8), **QUICK)
    assert saved.notes == []


def test_a_module_without_a_dynamic_layer_is_measured_and_told():
    saved = dc.measure.savings(nn.Sequential(nn.Linear(8, 8)), torch.randn(16, 8), **SHORT)
    assert saved.notes == ["nothing in it is dynamic: it calls no op of dyncore, and there is nothing to skip"]
    assert saved.flops == {"sparse": 16 * 2 * 64, "masked": 16 * 2 * 64}
    assert set(saved.unavailable) >= {"dense", "naive", "smaller", "break_even"}
    assert "dense   not measured: no layer of dyncore.nn in it to replace" in str(saved)


class Failing(nn.Module):
    def __init__(self, error, where="sparse"):
        super().__init__()
        self.error, self.where = error, where

    def forward(self, x):
        if mode() == self.where:
            raise self.error
        return x


def test_a_module_that_fails_is_named():
    model = nn.Sequential(nn.Linear(8, 8), nn.Sequential(Failing(IndexError("no such row"))))
    with pytest.raises(SavingsError, match=r"module: failed in 1\.0 \(Failing\): IndexError: no such row") as caught:
        dc.measure.savings(model, torch.randn(4, 8), **QUICK)
    assert isinstance(caught.value, ValueError)
    assert caught.value.partial["errors"][0]["message"].endswith("IndexError: no such row")
    assert isinstance(caught.value.__cause__, IndexError)


def test_a_gpu_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    model = nn.Sequential(Failing(AssertionError("Torch not compiled with CUDA enabled")))
    with pytest.raises(SavingsError, match=r"failed in 0 \(Failing\): .* \(it wants a GPU, and there is none here\)"):
        dc.measure.savings(model, torch.randn(4, 8), **QUICK)


def test_where_masked_execution_fails_the_dense_twin_stands():
    model = nn.Sequential(
        Failing(RuntimeError("no mask"), "masked"), dc.nn.Skip(nn.Linear(8, 8), lambda x: x[:, 0] > 0)
    )
    saved = dc.measure.savings(model, torch.randn(16, 8), dense=nn.Linear(8, 8), **QUICK)
    assert saved.baseline == "dense"
    assert saved.unavailable["masked"] == "masked execution failed in 0 (Failing): RuntimeError: no mask"
    assert saved.errors[0]["variant"] == "masked"


def test_without_any_baseline_there_is_nothing_to_report():
    with pytest.raises(SavingsError, match=r"module: nothing to compare with: .*no mask"):
        dc.measure.savings(Failing(RuntimeError("no mask"), "masked"), torch.randn(16, 8), **QUICK)


def test_a_dense_twin_that_fails_is_named():
    with pytest.raises(SavingsError, match=r"dense: failed in Linear: RuntimeError"):
        dc.measure.savings(nn.Linear(8, 8), torch.randn(4, 8), dense=nn.Linear(9, 9), **QUICK)


class Differing(nn.Module):
    def __init__(self, change):
        super().__init__()
        self.change = change
        self.weight = nn.Parameter(torch.ones(8))

    def forward(self, x):
        return self.change(x * self.weight) if mode() == "sparse" else x * self.weight


def test_the_first_layer_that_differs_between_modes_is_named():
    model = nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8), Differing(lambda x: x + 1)), nn.Linear(8, 8))
    text = r"module: output 0 differs between sparse and masked execution \(the first layer to differ: 1\.1 \(Differing\)\)"
    with pytest.raises(SavingsError, match=text) as caught:
        dc.measure.savings(model, torch.randn(4, 8), **QUICK)
    assert caught.value.partial["flops"]["sparse"] == 4 * 3 * 2 * 64


def test_what_differs_inside_of_a_dynamic_layer_is_named_by_it():
    layer = dc.nn.Skip(nn.BatchNorm1d(8), lambda x: x[:, 0] > 0)
    with pytest.raises(SavingsError, match=r"the first layer to differ: 1 \(Skip\)"):
        dc.measure.savings(nn.Sequential(nn.Linear(8, 8), layer), torch.randn(32, 8), **QUICK)


def test_a_shape_that_changes_between_modes_is_said():
    with pytest.raises(SavingsError, match=r"output 0 differs .*Differing.* shape \[3, 8\], expected \[4, 8\]"):
        dc.measure.savings(Differing(lambda x: x[:3]), torch.randn(4, 8), **QUICK)
    with pytest.raises(SavingsError, match=r"module: 2 outputs, expected 1"):
        dc.measure.savings(lambda x: (x, x) if mode() == "sparse" else x, torch.randn(4, 8), **QUICK)


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad


def test_a_gradient_that_differs_is_named_by_its_parameter():
    model = nn.Sequential(Differing(Doubled.apply))
    with pytest.raises(SavingsError, match=r"gradient 0 of 0\.weight differs between sparse and masked execution"):
        dc.measure.savings(model, torch.randn(4, 8), backward=True, **QUICK)


@dataclasses.dataclass
class Output:
    hidden: torch.Tensor
    more: tuple


def test_outputs_of_any_kind_are_compared():
    def module(x):
        return Output(x, ({"y": x * (1.5 if mode() == "sparse" else 1)},))

    assert len(tensors(module(torch.ones(2)))) == 2
    with pytest.raises(SavingsError, match="module: output 1 differs"):
        dc.measure.savings(module, torch.randn(4), **QUICK)


@torch.library.custom_op("dyncore_tests_savings::twice", mutates_args=())
def twice(x: torch.Tensor) -> torch.Tensor:
    return 2 * x


def test_an_op_that_nobody_can_count_is_told():
    saved = dc.measure.savings(twice, torch.randn(4, 4), **SHORT)
    assert saved.uncounted == {"dyncore_tests_savings::twice": 1}
    assert "uncounted: dyncore_tests_savings::twice (1x): FLOPs not known" in str(saved)
    assert saved.stages["computing"] > 0


def test_an_output_without_tensors_is_told():
    saved = dc.measure.savings(lambda x: "done", torch.randn(4), **QUICK)
    assert saved.notes[0] == "the module returns no tensors that are known of: its numbers are not compared"
