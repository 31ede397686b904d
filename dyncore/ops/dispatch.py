"""When an op may call its kernel straight. PyTorch's dispatcher stays the only registry, but with cold caches it takes
as long as the rest of a call on one row."""

from __future__ import annotations

import torch
from torch import Tensor

_Keys, _Key = torch._C.DispatchKeySet, torch._C.DispatchKey
_EAGER = (_Keys(_Key.BackendSelect) | _Keys(_Key.ADInplaceOrView)).raw_repr()
_INFERENCE = _Keys(_Key.BackendSelect).raw_repr()
_included = torch._C._dispatch_tls_local_include_set
_function_modes = torch._C._len_torch_function_stack
_profiled = torch.autograd._profiler_enabled  # pyright: ignore[reportPrivateImportUsage]


def unseen(*tensors: Tensor | None) -> bool:
    """Whether nothing is there to see an op on plain tensors go through PyTorch's dispatcher: no mode, function
    transform or tracer, no profiler of this thread, and no tensor whose values are the negative of its memory.

    A kernel may then be called without it, which takes half the time (cold, 55 us instead of 105)."""
    keys = _included().raw_repr()
    if not (keys == _EAGER or keys == _INFERENCE) or _function_modes() or _profiled():
        return False
    for t in tensors:
        if t is not None and t.is_neg():
            return False
    return True
