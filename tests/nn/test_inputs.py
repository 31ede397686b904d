"""What layers say of an x that does not fit: the argument, what was expected and what came."""

import pytest
import torch
from torch import nn

import dyncore as dc
from tests.nn.oracle import D

DEEP = {  # layers around modules that know nothing of dyncore, and what the error calls these
    "Skip": (lambda: dc.nn.Skip(nn.Linear(D, D), dc.nn.ThresholdGate(D, -1.0)), "module"),
    "TokenSkip": (
        lambda: dc.nn.TokenSkip(dc.nn.TransformerBlock(D, 1), dc.nn.ThresholdGate(D, -1.0)),
        "(norm_attention|q)",
    ),
    "MixtureOfDepths": (lambda: dc.nn.MixtureOfDepths(dc.nn.TransformerBlock(D, 1), 0.5), "(norm_attention|q)"),
    "TransformerBlock": (lambda: dc.nn.TransformerBlock(D, 1), "(norm_attention|q)"),
    "Attention": (lambda: dc.nn.Attention(D, 1), "q"),
    "MLP": (lambda: dc.nn.MLP(D, 8), "w_in"),
    "AdaptiveDepth": (lambda: dc.nn.AdaptiveDepth(nn.Linear(D, D), D, 3, tokens=True), r"blocks\[0\]"),
    "PolicySkip": (lambda: dc.nn.PolicySkip([nn.Linear(D, D)], dc.nn.BernoulliPolicy(D, 1, -1.0)), r"blocks\[0\]"),
    "Branch": (lambda: dc.nn.Branch([nn.Linear(D, D)], dc.nn.ChoiceGate(D, 1)), r"branches\[0\]"),
    "Hierarchy": (lambda: dc.nn.Hierarchy(nn.Linear(D, 1), [nn.Linear(D, 2)], [[0, 1]]), "coarse"),
    "EarlyExit": (lambda: dc.nn.EarlyExit([nn.Linear(D, D)], [nn.Linear(D, 3)]), r"stages\[0\]"),
    "Cascade": (lambda: dc.nn.Cascade([nn.Linear(D, 3)]), r"models\[0\]"),
}
FLAT = {  # layers with weights of their own
    "MoE": lambda: dc.nn.MoE(D, 8, 2),
    "SoftMoE": lambda: dc.nn.SoftMoE(D, 8, 2),
    "DynamicKMoE": lambda: dc.nn.DynamicKMoE(D, 8, 2),
    "DynamicWidthMLP": lambda: dc.nn.DynamicWidthMLP(D, 8, 2),
    "ACM": lambda: dc.nn.ACM(D, 2, 4),
    "ACMLinear": lambda: dc.nn.ACMLinear(D, 8, 1),
    "TreeMLP": lambda: dc.nn.TreeMLP(D, 8, 1),
}
LAYERS = {**{name: make for name, (make, _) in DEEP.items()}, **FLAT}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_another_dtype_than_the_layers_is_named(name, dtype):
    part = DEEP[name][1] if name in DEEP else "the weights"
    with pytest.raises(TypeError, match=f"x: expected the dtype of {part}, torch.float32, got {dtype}"):
        LAYERS[name]().eval()(torch.randn(2, 5, D, dtype=dtype))


@pytest.mark.parametrize("name", [name for name in LAYERS if name not in ("MLP", "EarlyExit", "Cascade")])
def test_what_is_no_floating_tensor_is_named(name):
    layer = LAYERS[name]().eval()
    for x, what in (
        ([1.0], "a Tensor, got list"),
        (None, "a Tensor, got NoneType"),
        (torch.ones(2, 5, D, dtype=torch.int64), "a floating dtype, got torch.int64"),
        (torch.ones(2, 5, D, dtype=torch.bool), "a floating dtype, got torch.bool"),
        (torch.randn(2, 5, D).to_sparse(), "a strided tensor, got torch.sparse_coo"),
    ):
        with pytest.raises(TypeError, match=f"x: expected {what}"):
            layer(x)


@pytest.mark.parametrize("name", LAYERS)
def test_another_width_or_device_is_a_value_error(name):
    layer = LAYERS[name]().eval()
    with pytest.raises(ValueError, match=rf"expected .*{D}\b.*, got"):
        layer(torch.randn(2, 5, D + 1))
    if name != "Attention":  # torch's products of a meta tensor and others are meta
        with pytest.raises(ValueError, match=r"expected .* on .*cpu.*, got .* on meta"):
            layer(torch.randn(2, 5, D, device="meta"))


def test_errors_of_modules_that_have_other_causes_stay_theirs():
    class Broken(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(()))

        def forward(self, x):
            raise RuntimeError("out of cheese")

    with pytest.raises(RuntimeError, match="out of cheese"):
        dc.nn.Skip(Broken(), dc.nn.ThresholdGate(D, -1.0))(torch.randn(3, D))


@pytest.mark.parametrize("name", LAYERS)
def test_autocast_takes_other_dtypes(name):
    layer, x = LAYERS[name]().eval(), torch.randn(2, 5, D)
    x = x[:, 0] if name in ("Hierarchy", "EarlyExit", "Cascade") else x
    with torch.autocast("cpu", dtype=torch.bfloat16):
        layer(x)
        layer(x.bfloat16())


COUNTED = {
    "DynamicKMoE": lambda keep: dc.nn.DynamicKMoE(D, 8, 2, keep),
    "DynamicWidthMLP": lambda keep: dc.nn.DynamicWidthMLP(D, 8, 2, dc.nn.BlockGate(D, 2, 1 - 2 * keep)),
    "ACM": lambda keep: dc.nn.ACM(D, 2, 4, dc.nn.CountGate(D, 2, 1 - 2 * keep)),
    "ACMLinear": lambda keep: dc.nn.ACMLinear(D, 8, 2, dc.nn.CountGate(D, 2, 1 - 2 * keep)),
}


@pytest.mark.parametrize("name", COUNTED)
def test_under_autocast_the_dtype_does_not_depend_on_what_is_skipped(name):
    x = torch.randn(9, D)
    for keep in (0.0, 0.3, 1.0):
        for mode in ("sparse", "masked", "auto"):
            for scaled in (False, True):
                layer = COUNTED[name](keep)
                with dc.execution(mode), torch.autocast("cpu", dtype=torch.bfloat16), torch.set_grad_enabled(scaled):
                    assert layer(x).dtype == torch.bfloat16, (keep, mode)


EXPORTED = {
    "Skip": lambda: dc.nn.Skip(nn.Linear(D, D), dc.nn.ThresholdGate(D)),
    "PolicySkip": lambda: dc.nn.PolicySkip([nn.Linear(D, D)] * 2, dc.nn.BernoulliPolicy(D, 2)),
    "Branch": lambda: dc.nn.Branch([nn.Linear(D, D)] * 2, dc.nn.ChoiceGate(D, 2)),
    "AdaptiveDepth": lambda: dc.nn.AdaptiveDepth(nn.Linear(D, D), D, 3, tokens=True),
}


@pytest.mark.parametrize("name", EXPORTED)
def test_layers_export_with_a_batch_of_any_size(name):
    layer = EXPORTED[name]().eval()
    batch = torch.export.Dim("batch", min=2, max=512)
    exported = torch.export.export(layer, (torch.randn(3, 6, D),), dynamic_shapes=({0: batch},)).module()
    x = torch.randn(5, 6, D)
    torch.testing.assert_close(exported(x), layer(x))
