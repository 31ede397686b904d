"""Layers on a device: how many kernels a forward launches, and scores in full precision."""

import pytest
import torch

import dyncore as dc
from benchmarks.gpu.measure import device_work
from dyncore.nn.full_precision import full_precision
from tests.gpu.tools import DEVICE, no_waiting
from tests.support import assert_values

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("rows", [64, 2048])
def test_a_whole_moe_layer_takes_six_kernels(rows):
    layer = dc.nn.MoE(512, 256, 64, 8).to(DEVICE, torch.bfloat16)
    x = torch.randn(rows, 512, device=DEVICE, dtype=torch.bfloat16)
    with torch.no_grad():
        layer(x)  # compiles
        with no_waiting():
            layer(x)
        kernels = device_work(lambda: layer(x), torch.device(DEVICE))
    own = [kernel for kernel in kernels if "splitk" not in str(kernel).lower()]  # cuBLAS may split the router's depth
    assert len(own) <= 6, kernels


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_scores_of_halves_are_made_in_float32(dtype, bias):
    layer = torch.nn.Linear(2048, 64, bias=bias).to(DEVICE, dtype)
    x = torch.randn(3, 70, 2048, device=DEVICE, dtype=dtype, requires_grad=True)
    out = full_precision(layer, x)
    grad = torch.randn_like(out)
    grads = torch.autograd.grad(out, [x, *layer.parameters()], grad)
    wide, wide_x = torch.nn.Linear(2048, 64, bias=bias).double(), x.detach().cpu().double().requires_grad_()
    wide.load_state_dict({name: t.cpu().double() for name, t in layer.state_dict().items()})
    want = wide(wide_x)
    assert out.dtype == torch.float32
    assert_values(out.cpu(), want)
    for got, exact in zip(
        grads, torch.autograd.grad(want, [wide_x, *wide.parameters()], grad.cpu().double()), strict=True
    ):
        torch.testing.assert_close(
            got.cpu().double(), exact, rtol=2**-7 if dtype == torch.bfloat16 else 2**-10, atol=1e-4
        )


@torch.no_grad()
def test_the_live_rows_alone_are_computed_where_the_host_waits():
    seen = []
    module = torch.nn.Linear(64, 64).to(DEVICE)
    module.register_forward_hook(lambda module, args, out: seen.append(len(args[0])))
    mask, x = torch.arange(256, device=DEVICE) % 4 == 0, torch.randn(256, 64, device=DEVICE)
    layer = dc.nn.Skip(module, lambda x: mask)
    with no_waiting():
        want = layer(x)
    with dc.execution(wait=True):
        assert_values(layer(x), want.cpu().double())
    assert seen == [256, 64]
