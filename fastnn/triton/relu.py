"""ReLU and its gradient, elementwise.

Blocking: BLOCK elements a program, the tail masked. Tensors are walked as they lie in memory; one with gaps or of other
strides than the result is gathered into the result's order first.
Bytes: forward reads and writes each element once, backward reads two and writes one; one compare and one select an
element, so memory-bound on every GPU.
Torch's conventions: NaN passes through both ways (the gradient's mask is ``not (y <= 0)``), and -0 stays -0, as on the
CPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastnn.triton.arguments import accumulator, check_dtype, check_same_dtype, check_same_shape, in_order_of

# 4 warps at 8 elements a thread: 16-byte accesses in 16-bit types, two or four of them in the wider ones.
BLOCK = 1024


@triton.jit
def forward_kernel(x_ptr, y_ptr, count, ACC: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = i < count
    x = tl.load(x_ptr + i, mask=mask)
    tl.store(y_ptr + i, tl.where(x.to(ACC) < 0, 0.0, x), mask=mask)


@triton.jit
def backward_kernel(grad_y_ptr, y_ptr, grad_x_ptr, count, ACC: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = i < count
    grad = tl.load(grad_y_ptr + i, mask=mask)
    y = tl.load(y_ptr + i, mask=mask)
    tl.store(grad_x_ptr + i, tl.where(y.to(ACC) <= 0, 0.0, grad), mask=mask)


def _launch(kernel: triton.JITFunction, *tensors: Tensor) -> None:
    count = tensors[0].numel()
    if count > 0:
        kernel[(triton.cdiv(count, BLOCK),)](*tensors, count, ACC=accumulator(tensors[0]), BLOCK=BLOCK)


def relu(self: Tensor) -> Tensor:
    check_dtype(self, "relu", "self")
    out = torch.empty_like(self)
    _launch(forward_kernel, in_order_of(out, self), out)
    return out


def relu_(self: Tensor) -> None:
    check_dtype(self, "relu_", "self")
    out = torch.empty_like(self)
    if out.stride() == self.stride():
        _launch(forward_kernel, self, self)
    else:
        self.copy_(relu(self))


def relu_backward(grad_output: Tensor, result: Tensor) -> Tensor:
    check_same_dtype(grad_output, result, "relu_backward", "grad_output")
    check_same_shape(grad_output, result, "relu_backward", "grad_output")
    check_dtype(result, "relu_backward", "result")
    grad_input = torch.empty_like(result)
    _launch(backward_kernel, in_order_of(grad_input, grad_output), in_order_of(grad_input, result), grad_input)
    return grad_input
