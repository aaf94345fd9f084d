"""Conv2d: autograd and fake rules of ``fastnn::conv2d``, ``conv2d_relu_max_pool2d`` and ``conv2d_backward``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastnn.ops import max_pool2d
from fastnn.ops.autograd import Function, differentiable, register_fake
from fastnn.ops.relu import relu_backward

Ints = list[int]
Shape = Sequence[int]


def output_size(input: Shape, weight: Shape, stride: Ints, padding: Ints, dilation: Ints) -> list[int]:
    """Height and width of the result of a convolution of these shapes; padding is (top, left, bottom, right)."""
    sizes, kernel = input[-2:], weight[-2:]
    return [
        (sizes[d] + padding[d] + padding[d + 2] - dilation[d] * (kernel[d] - 1) - 1) // stride[d] + 1 for d in range(2)
    ]


MAX_COUNT = 2**30


def is_countable(input: Shape, weight: Shape, padding: Ints) -> bool:
    """Whether a GPU's kernels take a convolution of these shapes: they count the positions of a padded plane, and what
    one result is summed over, in 31 bits (offsets in 64)."""
    height, width = (input[-2:][d] + padding[d] + padding[d + 2] for d in range(2))
    return max(height * width, math.prod(weight[1:])) < MAX_COUNT


def _memory_format(input: Tensor, weight: Tensor) -> torch.memory_format:
    either = (torch._prims_common.suggest_memory_format(t) for t in (input, weight))
    return torch.channels_last if torch.channels_last in either else torch.contiguous_format


@register_fake("conv2d")
def _conv2d_fake(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Ints,
    padding: Ints,
    dilation: Ints,
    groups: int,
    relu: bool,
) -> Tensor:
    size = output_size(input.shape, weight.shape, stride, padding, dilation)
    return input.new_empty([input.shape[0], weight.shape[0], *size]).to(memory_format=_memory_format(input, weight))


@register_fake("conv2d_relu_max_pool2d")
def _conv2d_relu_max_pool2d_fake(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Ints,
    padding: Ints,
    dilation: Ints,
    groups: int,
    pool_kernel_size: Ints,
    pool_stride: Ints,
) -> tuple[Tensor, Tensor]:
    size = output_size(input.shape, weight.shape, stride, padding, dilation)
    pooled = [(size[d] - pool_kernel_size[d]) // pool_stride[d] + 1 for d in range(2)]
    output = input.new_empty([input.shape[0], weight.shape[0], *pooled]).to(memory_format=_memory_format(input, weight))
    return output, torch.empty_like(output, dtype=torch.uint8)


@register_fake("conv2d_backward")
def _conv2d_backward_fake(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    relu_output: Tensor | None,
    pool_code: Tensor | None,
    stride: Ints,
    padding: Ints,
    dilation: Ints,
    groups: int,
    pool_kernel_size: Ints,
    pool_stride: Ints,
    output_mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    none = input.new_empty([0])
    return (
        input.new_empty(input.shape).to(memory_format=_memory_format(input, weight)) if output_mask[0] else none,
        weight.new_empty(weight.shape) if output_mask[1] else none.clone(),
        weight.new_empty([weight.shape[0]]) if output_mask[2] else none.clone(),
    )


class Conv2dBackward(Function):
    """The gradients of input, weight and bias: bilinear, so their own gradients are convolutions again."""

    operator = "conv2d_backward"

    @staticmethod
    def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        grad_output, input, weight, relu_output, pool_code, *ctx.geometry, pool_kernel, pool_stride, mask = inputs
        ctx.save_for_backward(grad_output, input, weight, relu_output, pool_code)
        ctx.pool, ctx.mask = (pool_kernel, pool_stride), mask
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(t for t, wanted in zip(output, mask, strict=True) if not wanted))

    @staticmethod
    def backward(
        ctx: Any, grad_input: Tensor | None, grad_weight: Tensor | None, grad_bias: Tensor | None
    ) -> tuple[Any, ...]:
        grad_output, input, weight, relu_output, pool_code = ctx.saved_tensors
        stride, padding, dilation, groups = ctx.geometry
        geometry = (stride, padding, dilation, groups)
        grad_input, grad_weight, grad_bias = (
            g if wanted else None for g, wanted in zip((grad_input, grad_weight, grad_bias), ctx.mask, strict=True)
        )
        # What the masks let through, as a plain gradient of the convolution's result.
        plain = _unmask(grad_output, input, weight, relu_output, pool_code, geometry, ctx.pool)
        no_pool: tuple[Ints, Ints] = ([], [])
        of_grad_output = of_input = of_weight = None
        if ctx.needs_input_grad[0]:
            terms = []
            if grad_input is not None:
                terms.append(conv2d(grad_input, weight, None, *geometry, False))
            if grad_weight is not None:
                terms.append(conv2d(input, grad_weight, None, *geometry, False))
            if grad_bias is not None:
                terms.append(grad_bias.view(1, -1, 1, 1).expand_as(plain))
            if terms:
                of_grad_output = sum(terms[1:], terms[0])
                of_grad_output = _mask(of_grad_output, relu_output, pool_code, ctx.pool)
        if ctx.needs_input_grad[1] and grad_weight is not None:
            of_input = conv2d_backward(
                plain, input, grad_weight, None, None, *geometry, *no_pool, [True, False, False]
            )[0]
        if ctx.needs_input_grad[2] and grad_input is not None:
            of_weight = conv2d_backward(
                plain, grad_input, weight, None, None, *geometry, *no_pool, [False, True, False]
            )[1]
        return (of_grad_output, of_input, of_weight, *[None] * 9)


def _unmask(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    relu_output: Tensor | None,
    code: Tensor | None,
    geometry: tuple[Any, ...],
    pool: tuple[Ints, Ints],
) -> Tensor:
    """The gradient before ReLU (and max-pool), by differentiable operations."""
    if relu_output is not None and code is None:
        return relu_backward(grad_output, relu_output)
    if code is None:
        return grad_output
    size = output_size(input.shape, weight.shape, *geometry[:3])
    return max_pool2d.spread(grad_output, code, size, *pool, [0, 0], [1, 1])


def _mask(grad: Tensor, relu_output: Tensor | None, code: Tensor | None, pool: tuple[Ints, Ints]) -> Tensor:
    """The transpose of ``_unmask``."""
    if relu_output is not None and code is None:
        return relu_backward(grad, relu_output)
    if code is None:
        return grad
    return max_pool2d.gather(grad, code, *pool, [0, 0], [1, 1])


def _padded(input: Tensor, padding: Ints) -> Tensor:
    top, left, bottom, right = padding
    return torch.nn.functional.pad(input, (left, right, top, bottom))


def _conv2d_in_torch(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Ints,
    padding: Ints,
    dilation: Ints,
    groups: int,
    relu: bool,
) -> Tensor:
    result = torch.conv2d(_padded(input, padding), weight, bias, stride, 0, dilation, groups)
    return result.relu() if relu else result


def _conv2d_backward_in_torch(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    relu_output: Tensor | None,
    pool_code: Tensor | None,
    stride: Ints,
    padding: Ints,
    dilation: Ints,
    groups: int,
    pool_kernel_size: Ints,
    pool_stride: Ints,
    output_mask: list[bool],
) -> tuple[Tensor | None, ...]:
    geometry = (stride, padding, dilation, groups)
    grad = _unmask(grad_output, input, weight, relu_output, pool_code, geometry, (pool_kernel_size, pool_stride))
    grad_input, *others = torch.ops.aten.convolution_backward(
        grad, _padded(input, padding), weight, [weight.shape[0]], stride, [0, 0], dilation, False, [0, 0], groups,
        output_mask,
    )  # fmt: skip
    if output_mask[0]:
        grad_input = _padded(grad_input, [-p for p in padding])
    return grad_input, *others


class Conv2d(Function):
    """``fastnn::conv2d``; saves input and weight, and where ReLU is fused its result."""

    operator = "conv2d"

    @staticmethod
    def save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        input, weight, _, *ctx.geometry, relu = inputs
        ctx.save_for_backward(input, weight, output if relu else None)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        input, weight, relu_output = ctx.saved_tensors
        grads = _gradients(ctx, grad, input, weight, relu_output, None, [], [])
        return (*grads, *[None] * 5)


class Conv2dReLUMaxPool2d(Function):
    """``fastnn::conv2d_relu_max_pool2d``; saves input, weight and one byte a pooled element."""

    operator = "conv2d_relu_max_pool2d"

    @staticmethod
    def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        input, weight, _, *ctx.geometry, pool_kernel_size, pool_stride = inputs
        ctx.pool = (pool_kernel_size, pool_stride)
        ctx.save_for_backward(input, weight, output[1])
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Any, ...]:
        input, weight, code = ctx.saved_tensors
        grads = _gradients(ctx, grad, input, weight, None, code, *ctx.pool)
        return (*grads, *[None] * 6)


def _gradients(
    ctx: Any,
    grad: Tensor,
    input: Tensor,
    weight: Tensor,
    relu_output: Tensor | None,
    code: Tensor | None,
    pool_kernel_size: Ints,
    pool_stride: Ints,
) -> list[Tensor | None]:
    mask = list(ctx.needs_input_grad[:3])
    grads = conv2d_backward(grad, input, weight, relu_output, code, *ctx.geometry, pool_kernel_size, pool_stride, mask)
    return [g if wanted else None for g, wanted in zip(grads, mask, strict=True)]


conv2d_backward = differentiable("conv2d_backward", Conv2dBackward, in_torch=_conv2d_backward_in_torch)
conv2d = differentiable("conv2d", Conv2d, in_torch=_conv2d_in_torch)
conv2d_relu_max_pool2d = differentiable("conv2d_relu_max_pool2d", Conv2dReLUMaxPool2d)
