"""dc.measure.flops against counts made by hand: 2 per multiply-add, live slots alone, forward and backward."""

import pytest
import torch

import dyncore as dc

T, H, INNER, G, N = 12, 6, 10, 3, 8
MASK = torch.arange(T) % 3 == 0  # 4 live rows
EXPERT = torch.tensor([[t % G, (t + 1) % G] if t % 2 else [t % G, -1] for t in range(T)])  # 18 slots


def tensor(*shape, grad=False):
    return torch.randn(shape, requires_grad=grad)


def test_moving_rows_is_free():
    plan = dc.select(MASK)
    assert dc.measure.flops(lambda: dc.scatter_rows(dc.gather_rows(tensor(T, H), plan), plan)) == 0


@pytest.mark.parametrize("form", [(True, True), (True, False), (False, True), (False, False)])
def test_grouped_linear_forward_counts_live_slots(form):
    gather, scatter = form
    plan = dc.route(EXPERT, num_groups=G)
    x = tensor(T if gather else 18, H)
    linear = lambda: dc.grouped_linear(x, tensor(G, N, H), plan=plan, gather=gather, scatter=scatter)  # noqa: E731
    assert dc.measure.flops(linear) == 2 * 18 * H * N


@pytest.mark.parametrize(("grad_x", "grad_w"), [(True, True), (True, False), (False, True)])
def test_grouped_linear_backward_counts_the_gradients_that_are_needed(grad_x, grad_w):
    plan = dc.select(MASK)
    x, w = tensor(T, H, grad=grad_x), tensor(1, N, H, grad=grad_w)
    counted = dc.measure.flops(lambda: dc.grouped_linear(x, w, plan=plan).sum().backward())
    assert counted == 2 * 4 * H * N * (1 + grad_x + grad_w)


@pytest.mark.parametrize(("activation", "inner"), [("gelu", INNER), ("swiglu", 2 * INNER)])
def test_grouped_mlp_counts_both_products_forward_and_twice_that_backward(activation, inner):
    plan = dc.route(EXPERT, tensor(T, 2), num_groups=G)
    x, w_in, w_out = tensor(T, H, grad=True), tensor(G, inner, H, grad=True), tensor(G, H, INNER, grad=True)
    forward = 2 * 18 * (inner * H + H * INNER)
    run = lambda: dc.grouped_mlp(x, w_in, w_out, plan=plan, activation=activation)  # noqa: E731
    with torch.no_grad():
        assert dc.measure.flops(run) == forward
    assert dc.measure.flops(lambda: run().sum().backward()) == 3 * forward


def test_frozen_weights_leave_their_products_out_of_the_backward_count():
    x, w_in, w_out = tensor(T, H, grad=True), tensor(1, INNER, H), tensor(1, H, INNER)
    run = lambda: dc.grouped_mlp(x, w_in, w_out, plan=dc.select(MASK)).sum().backward()  # noqa: E731
    assert dc.measure.flops(run) == 2 * 4 * (2 * INNER * H) * 2


def test_torch_s_product_of_groups_counts_forward_and_backward():
    x, w = torch.randn(24, 16, requires_grad=True), torch.randn(3, 16, 32, requires_grad=True)
    offsets = torch.tensor([8, 16, 24], dtype=torch.int32)
    run = lambda: torch.nn.functional.grouped_mm(x, w, offs=offsets)  # noqa: E731
    with torch.no_grad():
        assert dc.measure.flops(run) == 2 * 24 * 16 * 32
    assert dc.measure.flops(lambda: run().square().sum().backward()) == 3 * 2 * 24 * 16 * 32


def test_masked_execution_counts_every_row_with_every_group():
    plan = dc.route(EXPERT, num_groups=G)
    run = lambda: dc.grouped_mlp(tensor(T, H), tensor(G, INNER, H), tensor(G, H, INNER), plan=plan)  # noqa: E731
    with dc.execution("masked"):
        assert dc.measure.flops(run) == 2 * T * G * (2 * INNER * H)


def test_no_slot_is_no_flop():
    plan = dc.select(torch.zeros(T, dtype=torch.bool))
    assert (
        dc.measure.flops(lambda: dc.grouped_mlp(tensor(T, H), tensor(1, INNER, H), tensor(1, H, INNER), plan=plan)) == 0
    )


def test_a_module_is_counted_with_its_inputs():
    assert dc.measure.flops(torch.nn.Linear(H, N), tensor(T, H)) == 2 * T * H * N


def test_what_cannot_be_called_is_refused():
    with pytest.raises(TypeError, match="fn: expected a module or another callable, got Tensor"):
        dc.measure.flops(tensor(T, H))
