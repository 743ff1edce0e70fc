"""Without a GPU the Triton kernels run in Triton's interpreter: numpy on the CPU, asked for before triton loads."""

import dataclasses
import os

import pytest
import torch

INTERPRETED = not torch.cuda.is_available()
if INTERPRETED:
    os.environ["TRITON_INTERPRET"] = "1"


def mend_interpreter():
    """The interpreter keeps bf16 as uint16 bit patterns, and silently multiplies the patterns in tl.dot and truncates
    fp32 to bf16 where a GPU rounds to nearest even. Loops with a runtime bound fail in triton 3.6 with numpy >= 2.4.
    Every call of one jitted function by another patches triton.language anew, half of all the time: once is enough. And
    every sum and product of integers is computed again in int64 for an assertion that is off (debug is): a third of it.

    Private API, the same in triton 3.6 and 3.9; test_kernels.py::test_interpreter_is_mended notices if it moves.
    """
    import numpy as np
    import triton.language as tl
    import triton.runtime.interpreter as interpreter

    plain_dot, plain_convert = interpreter.InterpreterBuilder.create_dot, interpreter._convert_float
    plain_patch = interpreter._patch_lang_tensor

    def as_fp32(x):
        bits = np.ascontiguousarray(x.data)
        return (bits.astype(np.uint32) << 16).view(np.float32) if x.dtype.scalar == tl.bfloat16 else bits

    def dot(self, a, b, d, *precision):
        if tl.bfloat16 not in (a.dtype.scalar, b.dtype.scalar):
            return plain_dot(self, a, b, d, *precision)
        product = np.matmul(as_fp32(a), as_fp32(b)).astype(d.data.dtype)
        return interpreter.TensorHandle(product + d.data, d.dtype.scalar)

    def convert(x, source, target, rounding):
        if (source, target, rounding) != (tl.float32, tl.bfloat16, None):
            return plain_convert(x, source, target, rounding)
        bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32).astype(np.uint64)
        rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16  # half a bf16 step, a little less where the last bit is even
        return np.where(np.isnan(x), 0x7FC0, rounded).astype(np.uint16)

    def patch(tensor, scope):
        plain_patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.reshape(-1)[0]))

    patched = set()

    def call(self, *args, **kwargs):
        if id(self.fn.__globals__) not in patched:
            interpreter._patch_lang(self.fn)
            patched.add(id(self.fn.__globals__))
        return self.rewrite()(*args, **kwargs)

    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
    interpreter.InterpretedFunction.__call__ = call
    interpreter.InterpreterBuilder.create_dot = dot
    interpreter._convert_float = convert
    interpreter._patch_lang_tensor = patch


@pytest.fixture(scope="session")
def triton_device():
    """Where the kernels run: the GPU, or the CPU by way of the mended interpreter. Skips without triton."""
    pytest.importorskip("triton")
    if INTERPRETED:
        mend_interpreter()
    return "cpu" if INTERPRETED else "cuda"
