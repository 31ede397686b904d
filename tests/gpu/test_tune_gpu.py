"""`dyncore tune` on a CUDA device, a few buckets of it: `pytest -m gpu`."""

import dataclasses
import json

import pytest
import torch

import dyncore as dc
from dyncore import tilings, tune_cuda
from tests.gpu.tools import DEVICE
from tests.support import assert_values

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: PyTorch finds none"),
]

LITTLE = dataclasses.replace(
    tune_cuda.QUICK, rows={1: (4, 8), 97: (2, 128)}, depths={1: 256}, columns=512, seconds=0.01
)


def test_a_table_is_measured_written_and_taken(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("DYNCORE_CACHE", str(tmp_path))
    monkeypatch.setattr(tilings, "_tables", {})
    assert tune_cuda.run(LITTLE) == 0
    cells = json.loads(tilings.path(torch.cuda.get_device_name(0)).read_text())["cells"]
    assert len(cells) == 10
    for cell in cells:
        rates = [rate for rate in cell["tflops"].values() if isinstance(rate, float)]
        assert len(rates) >= 2, cell["tflops"]
        assert not [why for why in cell["tflops"].values() if "wrong" in str(why)], cell
    assert len(tilings.current(0)) == 10
    x, weight = torch.randn(250, 256, device=DEVICE), torch.randn(2, 512, 256, device=DEVICE)
    plan = dc.route(torch.arange(250, device=DEVICE)[:, None] % 2, num_groups=2)
    with dc.execution("sparse"):
        first, again = (dc.grouped_linear(x.bfloat16(), weight.bfloat16(), plan=plan) for _ in range(2))
    with dc.execution("masked"):
        want = dc.grouped_linear(x.bfloat16().double(), weight.bfloat16().double(), plan=plan)
    assert torch.equal(first, again)
    assert_values(first.cpu(), want.cpu())
