"""Max-pooling: autograd and fake rules of ``fastnn::max_pool2d`` and ``max_pool2d_backward``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastnn.ops.autograd import Function, differentiable, register_fake

Ints = list[int]

NO_ELEMENT = 255  # the code of a pooled element that no element of its window gets a gradient from


def output_size(input: Ints, kernel: Ints, stride: Ints, padding: Ints, dilation: Ints, ceil_mode: bool) -> Ints:
    """Height and width of what max-pooling makes of such a height and width: torch's ``pooling_output_shape``."""
    sizes = []
    for d in range(2):
        room = input[d] + 2 * padding[d] - dilation[d] * (kernel[d] - 1) - 1
        size = (room + (stride[d] - 1 if ceil_mode else 0)) // stride[d] + 1
        # A window may hang over the end, but must begin before it.
        sizes.append(size - 1 if ceil_mode and (size - 1) * stride[d] >= input[d] + padding[d] else size)
    return sizes


def chosen(
    code: Tensor, width: int, kernel: Ints, stride: Ints, padding: Ints, dilation: Ints
) -> tuple[Tensor, Tensor]:
    """Flat index into planes ``width`` wide of the element that each pooled one is, and whether it is any."""
    some = code != NO_ELEMENT
    element = torch.where(some, code, 0).to(torch.int64)
    rows = torch.arange(code.shape[2], device=code.device).view(-1, 1) * stride[0] - padding[0]
    cols = torch.arange(code.shape[3], device=code.device) * stride[1] - padding[1]
    rows = rows + element // kernel[1] * dilation[0]
    cols = cols + element % kernel[1] * dilation[1]
    return torch.where(some, rows * width + cols, 0).flatten(2), some


def spread(grad: Tensor, code: Tensor, size: Ints, *geometry: Ints) -> Tensor:
    """The gradient of what was pooled, by differentiable operations."""
    index, some = chosen(code, size[1], *geometry)
    zeros = grad.new_zeros([*grad.shape[:2], size[0] * size[1]])
    return zeros.scatter_add(2, index, (grad * some).reshape(index.shape)).view(*grad.shape[:2], *size)


def gather(input: Tensor, code: Tensor, *geometry: Ints) -> Tensor:
    """The transpose of ``spread``."""
    index, some = chosen(code, input.shape[3], *geometry)
    return input.reshape(*input.shape[:2], input.shape[2] * input.shape[3]).gather(2, index).view(code.shape) * some


@register_fake("max_pool2d")
def _max_pool2d_fake(
    self: Tensor, kernel_size: Ints, stride: Ints, padding: Ints, dilation: Ints, ceil_mode: bool
) -> tuple[Tensor, Tensor]:
    size = output_size([*self.shape[2:]], kernel_size, stride, padding, dilation, ceil_mode)
    memory_format = torch._prims_common.suggest_memory_format(self)
    output = self.new_empty([*self.shape[:2], *size]).to(memory_format=memory_format)
    return output, torch.empty_like(output, dtype=torch.uint8)


@register_fake("max_pool2d_backward")
def _max_pool2d_backward_fake(grad_output: Tensor, code: Tensor, input_size: Ints, *geometry: Ints) -> Tensor:
    memory_format = torch._prims_common.suggest_memory_format(code)
    return grad_output.new_empty([*code.shape[:2], *input_size]).to(memory_format=memory_format)


class MaxPool2dBackward(Function):
    """Linear in grad_output: its gradient is the elements that were chosen."""

    operator = "max_pool2d_backward"

    @staticmethod
    def save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])
        ctx.geometry = inputs[3:]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        (code,) = ctx.saved_tensors
        return (gather(grad, code, *ctx.geometry), *[None] * 6)


class MaxPool2d(Function):
    """``fastnn::max_pool2d``; saves one byte a pooled element."""

    operator = "max_pool2d"

    @staticmethod
    def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        input, *ctx.geometry, _ = inputs
        ctx.size = list(input.shape[2:])
        ctx.save_for_backward(output[1])
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Any, ...]:
        (code,) = ctx.saved_tensors
        return (max_pool2d_backward(grad, code, ctx.size, *ctx.geometry), *[None] * 5)


max_pool2d_backward = differentiable("max_pool2d_backward", MaxPool2dBackward, in_torch=spread)
max_pool2d = differentiable("max_pool2d", MaxPool2d)
