"""Scores in full precision. That cuBLAS does what is asked of it is for tests/gpu; here a stand-in multiplies."""

import pytest
import torch

from dyncore.nn import full_precision as module
from dyncore.nn.full_precision import full_precision


@pytest.fixture
def one_product(monkeypatch):
    """CPU tensors take the CUDA path, in which torch.mm has float32 results of halves."""
    calls = []

    def mm(a, b, out_dtype):
        assert a.dtype == b.dtype != out_dtype
        calls.append(a.shape)
        return a.to(out_dtype) @ b.to(out_dtype)

    monkeypatch.setattr(module, "_widens", lambda x, weight: x.dtype != torch.float32)
    monkeypatch.setattr(torch, "mm", mm)
    return calls


def step(layer, x):
    """Scores, and first and second derivatives."""
    leaves = [t.requires_grad_() for t in (x, *layer.parameters())]
    out = full_precision(layer, x)
    grads = torch.autograd.grad(out.square().sum(), leaves, create_graph=True)
    squares = torch.stack([g.float().square().sum() for g in grads])
    return out, *grads, *torch.autograd.grad(squares.sum(), leaves)


@pytest.mark.parametrize("shape", [(7, 24), (2, 5, 24), (0, 24)], ids=str)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_one_product_of_halves_has_the_bits_of_their_casts(dtype, bias, shape, request):
    layer, x = torch.nn.Linear(24, 6, bias=bias).to(dtype), torch.randn(shape).to(dtype)
    want = step(layer, x.clone())
    calls = request.getfixturevalue("one_product")
    got = step(layer, x.clone())
    assert len(calls) == 1
    assert [g.dtype for g in got] == [w.dtype for w in want]
    first = len(got) // 2 + 1  # the result and its gradients
    assert all(torch.equal(g, w) for g, w in zip(got[:first], want[:first], strict=True))
    for g, w in zip(got[first:], want[first:], strict=True):  # gradients of rounded gradients are summed otherwise
        torch.testing.assert_close(g, w, rtol=2**-5, atol=2**-5 * float(w.abs().max()) if w.numel() else 0.0)


def test_neither_operand_is_kept_in_float32(one_product):
    layer, x = torch.nn.Linear(24, 6).bfloat16(), torch.randn(7, 24).bfloat16().requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.dtype) or t, lambda t: t):
        full_precision(layer, x)
    assert set(saved) == {torch.bfloat16}


def test_only_plain_tensors_of_a_capable_device_take_one_product(monkeypatch):
    class Wrapped(torch.Tensor):
        pass

    class OnCuda(torch.Tensor):
        is_cuda = True
        device = torch.device("cuda", 0)

    x, weight = torch.randn(3, 4).bfloat16().as_subclass(OnCuda), torch.randn(2, 4).bfloat16()
    monkeypatch.setattr(module, "_PLAIN", (*module._PLAIN, OnCuda))
    monkeypatch.setattr(module, "_device_widens", lambda index: index == 0)
    assert module._widens(x, weight)
    assert not module._widens(torch.randn(3, 4).bfloat16(), weight)  # on a CPU
    assert not module._widens(x.float(), weight.float())
    assert not module._widens(x, weight.float())
    assert not module._widens(x, weight.as_subclass(Wrapped))
    with torch.autograd.forward_ad.dual_level():
        assert not module._widens(x, weight)
    seen = []
    torch.func.vmap(lambda row: seen.append(module._widens(x, weight)) or row)(torch.ones(2))
    monkeypatch.setattr(module, "_device_widens", lambda index: False)
    assert seen == [False]
    assert not module._widens(x, weight)


def test_scores_that_take_their_width_from_their_input_are_computed():
    class Halves(torch.nn.Sequential):
        def forward(self, x):
            return super().forward(x[..., :4])

    x = torch.randn(3, 8)
    for layer in (
        torch.nn.LazyLinear(1),
        torch.nn.Sequential(torch.nn.LazyLinear(4), torch.nn.ReLU(), torch.nn.Linear(4, 1)),
        Halves(torch.nn.Linear(4, 1)),
    ):
        got = full_precision(layer, x)
        assert torch.equal(got, layer(x))
        assert got.shape == (3, 1)


def test_a_machine_without_cuda_takes_casts():
    if not torch.cuda.is_available():
        assert not module._device_widens(0)
