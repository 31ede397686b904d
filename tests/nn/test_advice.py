"""What reports say of a model without zeros: its activations, and what could skip instead."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dyncore as dc
from dyncore.nn.advice import activations_of, advice


class Own(nn.Module):
    """An MLP that holds its activation as a function."""

    def __init__(self, act_fn):
        super().__init__()
        self.up, self.down, self.act_fn = nn.Linear(8, 16), nn.Linear(16, 8), act_fn

    def forward(self, x):
        return self.down(self.act_fn(self.up(x)))


class Experts(nn.Module):
    """As those of transformers are marked."""

    is_concatenated, is_transposed, has_bias, has_gate = True, False, False, True

    def __init__(self, implementation):
        super().__init__()
        self.config = SimpleNamespace(_experts_implementation=implementation)
        self.act_fn = nn.SiLU()

    def forward(self, x):
        return x


MODELS = {
    "gelu": lambda: nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)),
    "silu": lambda: Own(F.silu),
    "gelu, gelu_tanh": lambda: nn.Sequential(Own(nn.GELU()), Own(nn.GELU("tanh"))),
}


@pytest.mark.parametrize("names", MODELS)
def test_reports_on_a_model_without_zeros_name_its_activations(names):
    model = MODELS[names]()
    assert ", ".join(activations_of(model)) == names
    told = f"no ReLU found (activations found: {names}): none of these makes zeros. Rows can be skipped, by nn.Skip, "
    assert told in str(dc.measure.activation_sparsity(model, [torch.randn(4, 8)]))
    assert told in repr(dc.convert.relu_sparse(model))


@pytest.mark.parametrize(
    ("acts", "told"),
    [
        ([nn.Hardswish()], "(activations found: hardswish): the zeros of hardswish are not skipped."),
        ([nn.GELU(), nn.ReLU6()], "(activations found: gelu, relu6): the zeros of relu6 are not skipped."),
        ([F.hardsigmoid, F.silu], "(activations found: hardsigmoid, silu): the zeros of hardsigmoid are not skipped."),
    ],
)
def test_advice_names_activations_whose_zeros_are_not_skipped(acts, told):
    got = advice(nn.Sequential(*(Own(act) for act in acts)))
    assert f"no activation whose zeros are skipped found {told} Rows can" in got


def test_other_activations_are_not_taken_for_those_whose_names_they_contain():
    quick = type("QuickGELUActivation", (nn.Module,), {"forward": lambda self, x: x * torch.sigmoid(1.702 * x)})
    assert activations_of(nn.Sequential(Own(quick()), Own(lambda x: x))) == []
    swapped = dc.convert.relu_sparse(nn.Sequential(nn.Linear(8, 16), quick(), nn.Linear(16, 8)))
    assert "QuickGELUActivation" in repr(swapped)


def test_a_property_that_raises_does_not_break_the_report():
    class Raises(nn.Linear):
        @property
        def act(self):
            raise RuntimeError("not built")

    assert activations_of(nn.Sequential(Raises(8, 8), nn.GELU())) == ["gelu"]


@pytest.mark.parametrize(("implementation", "told"), [(None, True), ("eager", True), ("dyncore", False)])
def test_reports_on_experts_of_transformers_say_what_makes_them_skip(implementation, told):
    model = nn.Sequential(nn.Linear(8, 8), Experts(implementation))
    for report in (dc.measure.activation_sparsity(model, [torch.randn(4, 8)]), dc.convert.relu_sparse(model)):
        assert ('model.set_experts_implementation("dyncore")' in str(report)) == told


def test_there_is_no_advice_where_something_skips():
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
    assert advice(model) == ""
    assert dc.measure.activation_sparsity(model, [torch.randn(4, 8)]).advice == ""
    model = nn.Sequential(model, Own(F.gelu))
    assert dc.convert.relu_sparse(model).advice == ""
    assert dc.convert.relu_sparse(model).advice == ""  # all that could be is swapped already
