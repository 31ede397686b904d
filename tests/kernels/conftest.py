"""Triton's interpreter and its ahead-of-time compiler cannot share a process: TRITON_INTERPRET says which one this is.

Three faults of the interpreter of Triton 3.6 are mended here, so that the kernels need not be written around them.
"""

import os

if os.environ.get("TRITON_INTERPRET") == "1":
    import numpy as np
    import torch
    import triton.language as tl
    from triton.runtime import interpreter

    _create_dot = interpreter.InterpreterBuilder.create_dot
    _cast = interpreter.InterpreterBuilder.cast_impl
    _patch_tensor = interpreter._patch_lang_tensor

    def _widened(handle):
        """bfloat16 is held as its bits, which tl.dot would multiply as integers: give it float32 instead."""
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        bits = handle.data.astype(np.uint32) << 16
        return interpreter.TensorHandle(bits.view(np.float32), tl.float32)

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        return _create_dot(self, _widened(a), _widened(b), d, input_precision, max_num_imprecise_acc)

    def patch_tensor(tensor, scope):
        """A loop bound is an array of one element, which numpy 2.4 no longer converts to an int by itself."""
        _patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    def cast_impl(self, src, dst_type):
        """float32 is cut to bfloat16 there; GPUs round to the nearest."""
        source, target = src.dtype.scalar, dst_type.scalar
        if source == tl.bfloat16 and target == tl.float32:
            return _widened(src)
        if source == tl.float32 and target == tl.bfloat16:
            rounded = torch.from_numpy(np.array(src.data)).bfloat16().view(torch.uint16)
            return interpreter.TensorHandle(rounded.numpy(), tl.bfloat16)
        return _cast(self, src, dst_type)

    interpreter.InterpreterBuilder.create_dot = create_dot
    interpreter.InterpreterBuilder.cast_impl = cast_impl
    interpreter._patch_lang_tensor = patch_tensor
