"""What a CUDA device tells of a call besides its time: the memory it takes, and how often the host waits for it."""

from __future__ import annotations

import warnings

import torch

from dyncore.measure.calls import Call, seeded


def peak_bytes(call: Call) -> int:
    """The most memory that a call allocates on its device, beside what was there before."""
    device = call.device
    seeded(call)  # workspaces that are made once
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    seeded(call)
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def host_syncs(call: Call) -> int:
    """How often one call waits for its device, as far as PyTorch sees."""
    mode = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            torch.cuda.set_sync_debug_mode("warn")
            call()
        finally:
            torch.cuda.set_sync_debug_mode(mode)
    return sum("synchronizing CUDA operation" in str(w.message) for w in caught)
