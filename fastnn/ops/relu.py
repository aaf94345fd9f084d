"""ReLU: autograd and fake rules of ``fastnn::relu``, ``relu_`` and ``relu_backward``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastnn.dispatch import forced
from fastnn.ops.autograd import Function, differentiable, needs_grad, not_differentiable, register_fake

register_fake("relu")(torch.empty_like)
register_fake("relu_")(lambda self: None)
register_fake("relu_backward")(lambda grad_output, result: torch.empty_like(result))


class ReLUBackward(Function):
    """grad_output where not (result <= 0), else 0: linear in grad_output, so its own gradient is itself."""

    operator = "relu_backward"

    @staticmethod
    def save(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (result,) = ctx.saved_tensors
        return relu_backward(grad, result), None


class ReLU(Function):
    operator = "relu"

    @staticmethod
    def save(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (result,) = ctx.saved_tensors
        return relu_backward(grad, result)


class ReLUInPlace(ReLU):
    operator = "relu_"

    @staticmethod
    def forward(ctx: Any, input: Tensor) -> Tensor:
        _relu_(input)
        ctx.backend = forced()
        ctx.mark_dirty(input)
        ctx.save_for_backward(input)
        return input


relu_backward = differentiable(
    "relu_backward", ReLUBackward, in_torch=lambda grad, result: torch.ops.aten.threshold_backward(grad, result, 0)
)
relu = differentiable("relu", ReLU)
_relu_ = not_differentiable("relu_")


def relu_(input: Tensor) -> Tensor:
    """ReLU into ``input`` itself, recorded by autograd; returns ``input``."""
    if needs_grad(input):
        return ReLUInPlace.apply(input)
    _relu_(input)
    torch.autograd.graph.increment_version(input)
    return input
