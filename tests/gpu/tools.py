"""What the GPU tests share."""

import contextlib

import torch

import dyncore as dc

DEVICE = "cuda"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@contextlib.contextmanager
def no_waiting():
    """Any wait of the host for the device is an error."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def captured(run):
    """(graph, result) of run captured as a CUDA graph, after one run that compiles."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()
    return graph, result


def wide(tensors):
    return [None if t is None else t.detach().double() for t in tensors]


def on_gpu(tensors):
    return [None if t is None else t.detach().to(DEVICE) for t in tensors]


def with_scale(plan, scale):
    """The plan with this scale, a leaf."""
    return dc.Plan(plan.rows, plan.offsets, scale, plan.num_rows, plan.row_offsets, plan.row_slots, plan.exact)
