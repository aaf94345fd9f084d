"""Triton's interpreter as the tests need it: it runs the kernels' source on CPU tensors, wherever there is no GPU."""

import contextlib
import warnings

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

import fastnn.triton
from fastnn import dispatch
from fastnn.dispatch import KERNELS, OPERATORS


@contextlib.contextmanager
def as_cpu_kernels():
    """Registers Triton's functions as the CPU's, so that raw torch.ops.fastnn calls reach them too."""
    with torch.library._scoped_library("fastnn", "IMPL") as library, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Warning only once for all operators")
        for op in KERNELS["triton"]:
            for operator in OPERATORS[op]:
                library.impl(operator, fastnn.triton.function(operator), "CPU")
        dispatch.TRITON_REGISTERED.add("cpu")
        try:
            with np.errstate(all="ignore"):  # infinities and NaN are what some tests are about
                yield
        finally:
            dispatch.TRITON_REGISTERED.discard("cpu")


# ---- repairs (Triton 3.9). The interpreter rounds float32 to bfloat16 towards zero, and tl.dot multiplies the bits of
# bfloat16; a GPU rounds to nearest, ties to even, and that is what the kernels are written for. And it patches
# triton.language anew, 5 ms each time, for every function that a kernel calls.


def to_float32(bits):
    return (bits.astype(np.uint32) << 16).view(np.float32)


def to_bfloat16(values):
    bits = np.ascontiguousarray(values).view(np.uint32)
    rounded = (bits.astype(np.uint64) + 0x7FFF + (bits >> 16 & 1)) >> 16
    return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16)


def repair():
    cast, dot, patch_language = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot, interpreter._patch_lang
    patched = {}  # by the globals of the functions called: those of one module share them

    def cast_impl(self, src, dst_type):
        source, target = src.dtype.scalar, dst_type.scalar
        if (source, target) == (tl.bfloat16, tl.float32):
            return TensorHandle(to_float32(src.data), tl.float32)
        if (source, target) == (tl.float32, tl.bfloat16):
            return TensorHandle(to_bfloat16(src.data), tl.bfloat16)
        return cast(self, src, dst_type)

    def create_dot(self, a, b, *args):
        wide = [TensorHandle(to_float32(t.data), tl.float32) if t.dtype.scalar == tl.bfloat16 else t for t in (a, b)]
        return dot(self, *wide, *args)

    def restore_all():
        while patched:
            patched.popitem()[1].restore()

    def patch_once(fn):
        scope = interpreter._LangPatchScope()
        if not patched:
            scope.restore = restore_all  # the kernel's own scope: the last to be left
        if id(fn.__globals__) not in patched:
            patched[id(fn.__globals__)] = patch_language(fn)
        return scope

    interpreter._patch_lang = patch_once
    InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot = cast_impl, create_dot
