"""`dyncore tune --device cuda` in Triton's interpreter: every tiling it may choose gives the right numbers."""

import json
import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("runs under TRITON_INTERPRET=1, in a process of its own", allow_module_level=True)

from dyncore import tilings, tune_cuda
from dyncore.kernels.common import configs
from dyncore.kernels.common.candidates import candidates
from dyncore.measure.timing import Timing

HERE = {"device": "none", "capability": "9.0", "multiprocessors": "2", "triton": "3", "dyncore": "1"}
# Tiles are never full
SMALL = tune_cuda.Effort(("half",), {1: (2, 5), 17: (1, 20), 97: (1, 100)}, {1: 48}, 80, 0.0)


def target(arithmetic):
    return configs.Target(90, 2, arithmetic == "tf32")


def reference(key, tensors):
    """The made-up problem in float64; rows and scales are those that its generator draws."""
    groups, rows = SMALL.rows[key.rows]
    torch.manual_seed(1)
    source = torch.randperm(groups * rows).view(groups, rows).sort(1)[0].flatten()
    scale = torch.rand(groups * rows).double()[:, None]
    a, b, *more = (t.double() for t in tensors)
    if key.kernel == "weight_gradient":
        return [torch.einsum("gan,gak->gnk", a.view(groups, rows, -1), b[source].view(groups, rows, -1))]
    x = (a if key.kernel == "product_transposed" else a[source]).view(groups, rows, -1)
    weight = b.transpose(1, 2) if key.kernel in ("product_transposed", "product_backward") else b
    y = (x @ weight.transpose(1, 2)).flatten(0, 1)
    if key.kernel == "product_gated":
        gate, up = y.chunk(2, 1)
        return [torch.nn.functional.silu(gate) * up]
    if key.kernel == "product_backward":
        gate, up = (t.requires_grad_() for t in more[0].chunk(2, 1))
        hidden = torch.nn.functional.silu(gate) * up
        gradients = torch.autograd.grad(hidden, (gate, up), scale * y)
        return [torch.cat(gradients, 1), (scale * hidden).detach(), (y * hidden).sum(1).detach()]
    return [scale * y if key.kernel == "product" else y]


@pytest.mark.parametrize("kernel", configs.KERNELS)
def test_every_candidate_computes_what_the_reference_does(kernel):
    for key in tune_cuda.cells(SMALL):
        if key.kernel != kernel:
            continue
        torch.manual_seed(1)
        made = tune_cuda.problem(key, SMALL, torch.device("cpu"))
        want = reference(key, made.tensors)
        for config in candidates(target("half"), key):
            got = made.call(target("half")._replace(tuned={key: config}), *made.tensors)
            for g, w in zip(got, want, strict=True):
                g = g.double()
                assert tune_cuda._error(g if g.shape == w.shape else g.sum(0), w) < 2e-2, config


def test_tune_finds_every_candidate_right(tmp_path, monkeypatch):
    monkeypatch.setenv("DYNCORE_CACHE", str(tmp_path))
    one = tune_cuda.dataclasses.replace(SMALL, arithmetics=("ieee",), rows={1: (2, 5)})
    tried = []

    def timer(ways, copies, seconds):
        tried.append(list(ways))
        return {name: Timing((len(ways) - n,)) for n, name in enumerate(ways)}  # the last is the fastest

    assert tune_cuda.measure(one, target, torch.device("cpu"), HERE, timer) == 0
    document = json.loads(tilings.path("none").read_text())
    for key, names in zip(tune_cuda.cells(one), tried, strict=True):
        assert names == [tune_cuda.label(config) for config in candidates(target("ieee"), key)]
    chosen = tilings.parse(document)
    assert chosen == {key: candidates(target("ieee"), key)[-1] for key in tune_cuda.cells(one)}
