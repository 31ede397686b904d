"""Execution modes: set and restored, by thread, seen by torch.compile, never read by a backward."""

import threading

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import dyncore as dc
from dyncore.execution import mode, waits
from dyncore.ops.masked import compute_masked


def test_auto_is_the_default_and_modes_nest():
    assert mode() == "auto"
    with dc.execution("sparse") as outer:
        assert mode() == "sparse"
        with dc.execution("masked"), outer:  # one object may be entered twice
            assert mode() == "sparse"
        assert mode() == "sparse"
    assert mode() == "auto"


def test_the_mode_is_restored_after_an_error():
    with pytest.raises(KeyError), dc.execution("masked"):
        raise KeyError
    assert mode() == "auto"


def test_each_thread_has_its_own_mode():
    seen = []
    with dc.execution("masked"):
        thread = threading.Thread(target=lambda: seen.append(mode()))
        thread.start()
        thread.join()
    assert seen == ["auto"]


def test_an_unknown_mode_is_a_value_error():
    with pytest.raises(ValueError, match="mode: expected one of sparse, masked, auto, got 'dense'"):
        dc.execution("dense")
    with pytest.raises(TypeError, match="wait: expected a bool or None, got int"):
        dc.execution("sparse", wait=1)


def test_waiting_is_kept_by_a_checkpoint_and_ends_with_its_block():
    with dc.execution("masked", wait=True):
        _, again = dc.execution.context_fn()
        assert waits()
    assert not waits()
    with again:
        assert waits()
        assert mode() == "masked"
    assert not waits()


def flops(fn):
    with FlopCounterMode(display=False) as counter:
        fn()
    return counter.get_total_flops()


def test_backward_runs_in_the_mode_of_its_forward():
    x, w = torch.randn(10, 4, requires_grad=True), torch.randn(1, 4, 4, requires_grad=True)
    plan = dc.select(torch.arange(10) < 2)
    with dc.execution("sparse"):
        sparse = dc.grouped_linear(x, w, plan=plan)
    with dc.execution("masked"):
        masked = dc.grouped_linear(x, w, plan=plan)
        assert flops(lambda: sparse.sum().backward()) == 2 * 2 * 2 * 4 * 4
    assert flops(lambda: masked.sum().backward()) == 2 * 2 * 10 * 4 * 4


def test_a_compiled_function_follows_the_mode_it_is_called_in():
    w = torch.randn(1, 4, 4)
    graphs = []

    def record(graph, example_inputs):
        graphs.append({str(node.target) for node in graph.graph.nodes})
        return graph

    def run(x, mask):
        return dc.grouped_linear(x, w, plan=dc.select(mask))

    compiled = torch.compile(run, fullgraph=True, backend=record)
    x, mask = torch.randn(10, 4), torch.arange(10) < 2
    for name in ("sparse", "masked", "sparse"):
        with dc.execution(name):
            torch.testing.assert_close(compiled(x, mask), run(x, mask))
    assert ["dyncore.grouped_linear.default" in targets for targets in graphs] == [True, False]


@pytest.mark.parametrize(("device", "slots", "expected"), [("cpu", 30, False), ("meta", 30, True), ("meta", 29, False)])
def test_auto_computes_everything_where_that_is_known_to_be_faster(device, slots, expected):
    rows = torch.arange(slots, device=device, dtype=torch.int32)
    offsets = torch.zeros(2, device=device, dtype=torch.int32)
    weight = torch.empty(1, 4, 4, device=device)
    known = dc.Plan(rows, offsets, None, 30, rows, rows, exact=True)
    bound = dc.Plan(rows, offsets, None, 30, rows, rows, exact=False)
    assert compute_masked(known, "grouped_linear", weight) is expected
    assert not compute_masked(bound, "grouped_linear", weight)  # a static bound says nothing of what is live
