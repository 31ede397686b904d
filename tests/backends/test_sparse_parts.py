"""sparse_mlp's hidden activation has room for so many elements at a time: more rows are computed part by part."""

import pytest
import torch

from dyncore.backends import cpu, cpu_sparse
from tests.support import assert_values

pytestmark = pytest.mark.skipif(not cpu.available, reason="no kernels")


@pytest.mark.parametrize("activation", ["relu", "reglu"])
def test_rows_computed_in_parts_are_those_computed_at_once(monkeypatch, activation):
    width = 96 if activation == "reglu" else 48
    x, w_in, w_out = torch.randn(101, 20), torch.randn(width, 20), torch.randn(20, 48)

    def run():
        return cpu_sparse.sparse_mlp(x, w_in, w_out, None, None, activation, 0.4, "compressed", -1)

    want = run()
    monkeypatch.setattr(cpu_sparse, "_ROOM", 30 * width)
    calls = []
    native = cpu_sparse.native.sparse_mlp
    monkeypatch.setattr(cpu_sparse.native, "sparse_mlp", lambda *args: (calls.append(args[0].shape[0]), native(*args)))
    got = run()
    assert calls == [30, 30, 30, 11]
    for g, w in zip(got, want, strict=True):
        if w.is_floating_point():
            assert_values(g, w.double(), torch.float32)
        else:
            assert torch.equal(g, w)


def test_a_save_of_another_name_is_refused():
    with pytest.raises(ValueError, match="save: expected none, compressed or dense, got 'all'"):
        cpu_sparse.sparse_mlp(torch.ones(1, 2), torch.ones(3, 2), torch.ones(2, 3), None, None, "relu", 0.4, "all", -1)
