"""torch's matmul as an executor of the cpu backend: a table that always prefers it passes the tests of the ops."""

import pytest
import torch

import dyncore as dc
from dyncore.backends import cpu, torch_matmul
from dyncore.break_even import Grid, Table, use
from tests.ops import test_grouped_linear as linear
from tests.ops import test_grouped_mlp as mlp

pytestmark = pytest.mark.skipif(not cpu.available, reason="executors are of the cpu backend")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ALWAYS = Table(
    executors={(op, dtype): Grid({(1, 1): (1.0, 2.0)}) for op in ("grouped_linear", "grouped_mlp") for dtype in DTYPES}
)


@pytest.fixture(autouse=True)
def preferred():
    with use(ALWAYS):
        yield


class TestGroupedLinear:
    test_values = staticmethod(linear.test_values_and_gradients_equal_the_oracle)
    test_every_kind_of_plan = staticmethod(linear.test_every_kind_of_plan)
    test_every_activation = staticmethod(linear.test_every_activation)
    test_odd_sizes = staticmethod(linear.test_odd_sizes_without_bias_and_scale)
    test_padding = staticmethod(linear.test_padding_slots_are_never_read_and_come_out_as_zero)
    test_two_linears = staticmethod(linear.test_two_linears_by_slots_equal_the_mlp)
    test_flops = staticmethod(linear.test_flops_are_those_of_live_slots)
    test_nan_in_weights = staticmethod(linear.test_nan_in_the_weights_of_a_group_without_rows_reaches_nothing)
    test_rows_outside = staticmethod(linear.test_a_row_outside_x_is_an_index_error)
    test_bad_offsets = staticmethod(linear.test_bad_offsets_are_a_value_error)


class TestGroupedMLP:
    test_values = staticmethod(mlp.test_values_and_gradients_equal_the_oracle)
    test_every_kind_of_plan = staticmethod(mlp.test_every_kind_of_plan)
    test_odd_sizes = staticmethod(mlp.test_odd_sizes)
    test_scale = staticmethod(mlp.test_scale_of_any_float_dtype_and_no_biases)
    test_nan_in_rows = staticmethod(mlp.test_unselected_rows_may_hold_nan)
    test_residual = staticmethod(mlp.test_a_row_without_a_slot_gives_exactly_its_residual)
    test_strides = staticmethod(mlp.test_strided_and_expanded_inputs_and_gradients)
    test_no_rows = staticmethod(mlp.test_no_rows_or_no_slots)
    test_saved = staticmethod(mlp.test_saved_for_backward_are_the_inputs_the_plan_and_the_pre_activation)
    test_autocast = staticmethod(mlp.test_autocast_computes_in_its_dtype_as_linear_does)
    test_nan_in_weights = staticmethod(mlp.test_nan_in_the_weights_of_a_group_without_rows_reaches_nothing)


def test_opcheck():
    """With and without what a backward needs; the schema and the other backends are those of our kernels."""
    for by_rows in (True, False):
        linear.test_opcheck(by_rows, by_rows)
    for save in (True, False):
        mlp.test_opcheck(save, torch.bfloat16)


@pytest.mark.parametrize("op", ["grouped_linear", "grouped_mlp"])
@pytest.mark.parametrize("grad", [False, True])
def test_the_table_decides_whose_matmul_runs(op, grad, monkeypatch):
    calls = []
    own = getattr(torch_matmul, op)
    monkeypatch.setattr(torch_matmul, op, lambda *args: calls.append(op) or own(*args))
    x, weights = torch.randn(20, 8, requires_grad=grad), [torch.randn(2, 8, 8)] * (1 + (op == "grouped_mlp"))
    plan = dc.route(torch.arange(20)[:, None] % 2, num_groups=2)
    preferred = getattr(dc, op)(x, *weights, plan=plan)
    assert calls == [op]
    with use(Table()):
        torch.testing.assert_close(getattr(dc, op)(x, *weights, plan=plan), preferred)
    assert calls == [op]


def test_a_gradient_may_be_asked_of_what_torch_computed_forward():
    x, w = torch.randn(20, 8, requires_grad=True), torch.randn(2, 8, 8, requires_grad=True)
    plan = dc.route(torch.arange(20)[:, None] % 2, torch.rand(20, 1), num_groups=2)
    grads = []
    for table in (ALWAYS, Table()):
        with use(table):
            out = dc.grouped_mlp(x, w, w, plan=plan, activation="silu")
            grads.append(torch.autograd.grad(out.square().sum(), [x, w]))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_padding_slots_of_the_saved_pre_activation_are_zero():
    rows, offsets, row_offsets, row_slots = torch.ops.dyncore.plan_mask(torch.tensor([True] * 4 + [False] * 60), 64)
    x, w = torch.ones(64, 256), torch.ones(1, 256, 256)
    dirt = [torch.full((64, 256), 7.0) for _ in range(20)]
    del dirt
    plan = (rows, offsets, None, row_offsets, row_slots)
    _, pre = torch.ops.dyncore.grouped_mlp(x, w, w, None, None, None, *plan, "gelu", True)
    assert pre[4:].eq(0).all()
