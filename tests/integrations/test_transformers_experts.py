"""Experts modules of every layout that transformers knows, without a model around them; what is refused, and how."""

import inspect
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dyncore.integrations import transformers as integration
from tests.support import assert_gradients, assert_values

pytest.importorskip("transformers")
from transformers.activations import ACT2FN
from transformers.integrations.moe import use_experts_implementation

integration.register()
EXPERTS, WIDTH, INNER = 5, 20, 12


def experts_class(own_gate=False, **layout):
    """A class as models define it: its own forward is the eager one, in the dtype of what it is given."""

    class Experts(nn.Module):
        def __init__(self, config):
            super().__init__()
            self.num_experts = EXPERTS
            gated, transposed = layout.get("has_gate", True), layout.get("is_transposed", False)
            inner = 2 * INNER if gated else INNER
            up = "gate_up_proj" if gated else "up_proj"
            for name, n, k in ((up, inner, WIDTH), ("down_proj", WIDTH, INNER)):
                setattr(
                    self, name, nn.Parameter(torch.randn(EXPERTS, k, n) if transposed else torch.randn(EXPERTS, n, k))
                )
                if layout.get("has_bias"):
                    setattr(self, f"{name}_bias", nn.Parameter(torch.randn(EXPERTS, n)))
            self.act_fn = config.act_fn
            if layout.get("has_post_expert_norm"):
                self.post_expert_norm = nn.RMSNorm(WIDTH)

        def forward(self, x, index, weight):
            out = torch.zeros_like(x)
            up = "gate_up_proj" if self.has_gate else "up_proj"
            for e in range(EXPERTS):
                row, choice = (index == e).nonzero(as_tuple=True)
                y = x[row]
                for name in (up, "down_proj"):
                    w = getattr(self, name)[e]
                    bias = getattr(self, f"{name}_bias")[e] if self.has_bias else None
                    y = F.linear(y, w.t() if self.is_transposed else w, bias)
                    if name == up:
                        y = self._apply_gate(y) if self.has_gate else self.act_fn(y)
                if layout.get("has_post_expert_norm"):
                    y = self.post_expert_norm(y)
                out = out.index_add(0, row, (y * weight[row, choice, None]).to(out.dtype))
            return out

    if own_gate:

        def _apply_gate(self, gate_up):
            gate, up = (gate_up[..., ::2], gate_up[..., 1::2]) if not self.is_concatenated else gate_up.chunk(2, -1)
            return (up.clamp(-2, 2) + 1) * gate.clamp(max=2) * torch.sigmoid(1.7 * gate)

        Experts._apply_gate = _apply_gate
    return use_experts_implementation(**layout)(Experts)


def make(act_fn=None, **options):
    for name in options.keys() - {"own_gate"} - inspect.signature(use_experts_implementation).parameters.keys():
        pytest.skip(f"this version of transformers has no {name}")
    config = SimpleNamespace(act_fn=ACT2FN["silu"] if act_fn is None else act_fn, _experts_implementation="eager")
    return experts_class(**options)(config)


def draw(rows=33, top_k=3, experts=EXPERTS):
    return torch.randn(rows, WIDTH), torch.rand(rows, experts).topk(top_k).indices, torch.rand(rows, top_k)


def results(module, implementation, x, index, weight, dtype=torch.float64, weight_dtype=None):
    """[output, gradients of x, weight and the parameters] in `dtype`, the router's weights in their own."""
    module.to(dtype).zero_grad()
    module.config._experts_implementation = implementation
    x, weight = x.to(dtype).requires_grad_(), weight.to(weight_dtype or dtype).requires_grad_()
    out = module(x, index, weight)
    parameters = list(module.parameters())
    torch.manual_seed(1)
    cotangent = torch.randn(out.shape, dtype=torch.float64).to(out.dtype)
    return [out, *torch.autograd.grad(out, [x, weight, *parameters], cotangent)]


LAYOUTS = {
    "gate first": {},
    "transposed": {"is_transposed": True},
    "biases": {"has_bias": True},
    "transposed, biases": {"is_transposed": True, "has_bias": True},
    "interleaved": {"is_transposed": True, "has_bias": True, "is_concatenated": False, "own_gate": True},
    "own gate": {"own_gate": True, "has_bias": True},
    "no gate": {"has_gate": False},
    "no gate, transposed, biases": {"has_gate": False, "is_transposed": True, "has_bias": True},
    "post norm": {"has_post_expert_norm": True, "has_bias": True},
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_in_every_dtype(layout, dtype):
    module, inputs = make(**LAYOUTS[layout]).to(dtype), draw()
    x, index, weight = inputs[0].to(dtype), inputs[1], inputs[2]
    weight_dtype = torch.float64 if dtype == torch.float64 else torch.float32  # as routers have it
    got = results(module, "dyncore", x, index, weight, dtype, weight_dtype)
    want = results(module, "eager", x, index, weight.to(weight_dtype))
    assert (got[0].dtype, got[2].dtype) == (dtype, weight_dtype)
    if integration._fused(module) is None and dtype in (torch.bfloat16, torch.float16):
        if not LAYOUTS[layout].get("has_post_expert_norm"):
            assert_values(got[0], want[0], dtype)
        # what goes from an op to torch and back is rounded more often than within one op, here as in eager
        rivals = results(module, "eager", x, index, weight, dtype, weight_dtype)
        for a, b, rival in zip(got, want, rivals, strict=True):
            assert rms_error(a, b) <= 1.1 * rms_error(rival, b)
        return
    assert_values(got[0], want[0], dtype)
    for a, b in zip(got[1:], want[1:], strict=True):
        assert_gradients(a, b, dtype)


def rms_error(got, want):
    return float((got - want).detach().square().mean().sqrt())


ACTIVATIONS = {
    "silu": ("swiglu", "silu"),
    "swish": ("swiglu", "silu"),
    "relu": ("reglu", "relu"),
    "gelu": ("geglu", "gelu"),
    "gelu_new": (None, "gelu_tanh"),
    "gelu_pytorch_tanh": (None, "gelu_tanh"),
    "relu2": (None, "relu2"),
    "gelu_python": (None, None),
    "quick_gelu": (None, None),
    "tanh": (None, None),
}
FUNCTIONS = {F.silu: ("swiglu", "silu"), F.gelu: ("geglu", "gelu"), torch.relu: ("reglu", "relu"), F.tanh: (None, None)}


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("act", [*ACTIVATIONS, *FUNCTIONS], ids=lambda a: a if isinstance(a, str) else a.__name__)
def test_activations_that_the_kernels_have_are_fused_and_the_others_right(act, gated):
    expected = (ACTIVATIONS | FUNCTIONS)[act][0 if gated else 1]
    module, inputs = make(ACT2FN[act] if isinstance(act, str) else act, has_gate=gated), draw()
    assert integration._fused(module) == expected
    got, want = (results(module, name, *inputs, torch.float32) for name in ("dyncore", "eager"))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_what_hangs_on_an_activation_still_sees_it():
    module, inputs, seen = make(), draw(), []
    assert integration._fused(module) == "swiglu"
    module.act_fn.register_forward_hook(lambda m, args, out: seen.append(out.shape))
    results(module, "dyncore", *inputs, torch.float32)
    assert seen == [(99, INNER)]
    module = make()
    module._apply_gate = lambda gate_up: 0 * gate_up[..., :INNER]  # an instance's own
    assert not results(module, "dyncore", *inputs, torch.float32)[0].any()
    module = make()
    module.act_fn.forward = torch.zeros_like
    assert not results(module, "dyncore", *inputs, torch.float32)[0].any()


@pytest.mark.parametrize("layout", ["gate first", "interleaved", "post norm"])
@pytest.mark.parametrize("parallel", [False, True])
def test_indices_past_the_last_expert_are_nowhere(layout, parallel):
    module, (x, index, weight) = make(**LAYOUTS[layout]), draw(experts=2 * EXPERTS)
    index = index.clamp(max=EXPERTS)  # half of the experts are another rank's
    assert (index == EXPERTS).all(1).any()
    weight = weight.masked_fill(index == EXPERTS, 0)
    module._is_expert_parallel = parallel
    got = results(module, "dyncore", x, index, weight, torch.float32)
    assert not got[0][(index == EXPERTS).all(1)].any()
    assert not got[2][index == EXPERTS].any()
    rivals = ["eager"] + ["grouped_mm", "batched_mm"] * (parallel and layout == "gate first")
    for rival in rivals:
        for a, b in zip(got, results(module, rival, x, index, weight, torch.float32), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_rows_and_leading_dimensions(layout):
    module = make(**LAYOUTS[layout])
    got = results(module, "dyncore", *draw(rows=0), torch.float32)
    assert got[0].shape == (0, WIDTH)
    assert not any(g.any() for g in got)
    x, index, weight = draw(rows=6)
    want = results(module, "dyncore", x, index, weight, torch.float32)[0]
    shaped = [t.view(2, 3, -1) for t in (x, index, weight)]
    assert torch.equal(results(module, "dyncore", *shaped, torch.float32)[0], want.view(2, 3, WIDTH))


def test_rows_of_another_dtype_than_the_weights_keep_theirs():
    module, (x, index, weight) = make().bfloat16(), draw()
    module.config._experts_implementation = "dyncore"
    got = module(x, index, weight)
    assert got.dtype == torch.float32
    assert torch.equal(got, module(x.bfloat16(), index, weight).float())


def test_an_option_that_a_later_version_has_is_left_to_transformers(monkeypatch):
    monkeypatch.setattr(integration._transformers, "unknown", {"has_pre_norm": False})
    monkeypatch.setattr(integration, "_warned", set())
    module, inputs = make(), draw()
    assert list(integration.describe(module).values()) == ["eager is set; dyncore would: grouped_mlp, swiglu"]
    module.has_pre_norm = False
    want = results(module, "dyncore", *inputs, torch.float32)
    module.has_pre_norm = True
    module.config._experts_implementation = "dyncore"
    assert list(integration.describe(module).values()) == [
        "transformers' grouped_mm: has_pre_norm=True is unknown to it"
    ]
    with pytest.warns(UserWarning, match="does not compute Experts, since has_pre_norm=True is unknown to it"):
        got = results(module, "dyncore", *inputs, torch.float32)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    results(module, "dyncore", *inputs, torch.float32)  # says so once


def test_weights_that_are_no_plain_tensors_are_left_to_transformers():
    from torch.testing._internal.two_tensor import TwoTensor

    module = make()
    module.gate_up_proj = nn.Parameter(TwoTensor(module.gate_up_proj.data, module.gate_up_proj.data))
    module.config._experts_implementation = "dyncore"
    assert list(integration.describe(module).values()) == [
        "transformers' grouped_mm: its weights are of type TwoTensor"
    ]


def test_errors_name_what_is_wrong():
    module, (x, index, weight) = make(), draw()
    module.config._experts_implementation = "dyncore"
    with pytest.raises(ValueError, match="weight: expected shape"):
        module(x, index, weight[:, :2])
    module.double()
    module.down_proj = nn.Parameter(module.down_proj.detach().float())
    with pytest.raises(TypeError, match="w_out: expected the dtype of x"):
        module(x, index, weight)


def test_registering_again_changes_nothing():
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    before = ALL_EXPERTS_FUNCTIONS["dyncore"]
    integration.register()
    assert ALL_EXPERTS_FUNCTIONS["dyncore"] is before is integration.experts_forward
    assert ALL_EXPERTS_FUNCTIONS.valid_keys().count("dyncore") == 1


@pytest.mark.parametrize("missing", ["transformers", "transformers.integrations.moe", "_default_apply_gate", "options"])
def test_a_missing_or_other_transformers_says_what_to_install(missing, monkeypatch):
    monkeypatch.setattr(integration, "_transformers", None)
    moe = sys.modules["transformers.integrations.moe"]
    if missing == "_default_apply_gate":
        monkeypatch.delattr(moe, missing)
    elif missing == "options":
        monkeypatch.setattr(moe, "use_experts_implementation", lambda experts_class: experts_class)
    else:
        monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(
        ImportError, match=r'needs .*transformers.*: pip install --upgrade "dyncore\[transformers\]"$'
    ) as e:
        integration.register()
    assert ("5.18 or later" in str(e.value)) == (missing != "transformers")
