"""How many kernels a layer's forward launches on a CUDA device, counted on fake tensors that say they are on one: every
ATen op that is no view and no allocation is taken for a kernel, dyncore's own ops for as many as docs/cuda.md and
docs/triton.md say.
"""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import dyncore as dc
from dyncore.nn import full_precision

# at most, but for what splits few rows of one narrow group; tests/kernels and csrc/tests hold the kernels to these
OWN = {
    "plan_mask": 2,
    "plan_mask_sources": 2,
    "plan_route": 2,
    "plan_route_topk": 2,
    "plan_topk": 1,
    "gather_rows": 1,
    "scatter_rows": 1,
    "grouped_linear": 2,
    "grouped_mlp": 3,
}
NO_KERNEL = {"empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided", "_unsafe_view", "promote_types"}


class Launches(TorchDispatchMode):
    """Names of the ops that launch kernels, each as often as it launches one."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        namespace, name = func._schema.name.split("::")
        if namespace == "dyncore":
            self.names += [name] * OWN[name]
        elif namespace == "aten" and not func.is_view and name not in NO_KERNEL:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def a_gpu(monkeypatch):
    """Fake tensors are on a device whose cuBLAS multiplies halves to float32, and whose memory nobody fills."""
    monkeypatch.setattr(FakeTensor, "is_cuda", True, raising=False)
    monkeypatch.setattr(FakeTensor, "is_cpu", False, raising=False)
    monkeypatch.setattr(full_precision, "_device_widens", lambda index: True)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)


def launched(build, shape, dtype=torch.bfloat16, grad=False):
    """What a forward of build() on fake CUDA rows of this shape launches."""
    with torch.device("meta"):
        layer = build().to(dtype)
    with FakeTensorMode(), torch.set_grad_enabled(grad):
        layer._apply(lambda t: torch.empty(t.shape, dtype=t.dtype))
        x = torch.empty(shape, dtype=dtype)
        with Launches() as launches:
            out = layer(x)
        assert (out.shape, out.dtype, out.requires_grad) == (x.shape, dtype, grad)
    return launches.names


MOE = ["mm", *["plan_route_topk"] * 2, *["grouped_mlp"] * 3]


@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("shape", [(64, 2048), (4, 4096, 2048)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_a_whole_moe_layer_takes_six_kernels(dtype, shape, grad):
    assert launched(lambda: dc.nn.MoE(2048, 1024, 64, 8), shape, dtype, grad) == MOE


def test_the_bias_of_a_router_takes_one_more():
    names = launched(lambda: dc.nn.MoE(64, 32, 8, 2, router=torch.nn.Linear(64, 8)), (5, 64))
    assert names == ["mm", "add", *MOE[1:]]


def test_weights_of_a_mask_take_one_kernel_more():
    with FakeTensorMode():
        mask, weight = torch.empty(90, 8, dtype=torch.bool), torch.empty(90, 8)
        with Launches() as launches:
            plan = dc.route_mask(mask, weight)
    assert plan.scale is not None
    assert plan.scale.shape == (720,)
    assert launches.names == ["plan_mask_sources", "plan_mask_sources", "index_select"]


MLP = ["addmm", "gelu", "addmm"]
SKIPS = {
    "a threshold, update": (
        lambda: dc.nn.Skip(dc.nn.MLP(64, 128), dc.nn.ThresholdGate(64), returns="update"),
        ["mm", "add", "sigmoid", "gt", "plan_mask", "plan_mask", "index_select", "gather_rows", *MLP, "scatter_rows"],
    ),
    "a count, output": (
        lambda: dc.nn.Skip(dc.nn.MLP(64, 128), dc.nn.TopKGate(64, 0.25, weight="none")),
        ["mm", "add", "plan_topk", "gt", "_to_copy", "plan_topk", "gather_rows", *MLP, "_to_copy", "index_copy"],
    ),
    "mixture of depths, update": (
        lambda: dc.nn.MixtureOfDepths(dc.nn.MLP(64, 128), 0.25, returns="update"),
        ["mm", "plan_topk", "index_select", "gt", "gather_rows", "remainder", *MLP, "scatter_rows"],
    ),
}


@pytest.mark.parametrize(("build", "kernels"), SKIPS.values(), ids=SKIPS)
def test_layers_that_skip_launch_what_their_results_need(build, kernels):
    assert launched(build, (2, 32, 64)) == kernels
