"""Cross-entropy: autograd and fake rules of ``fastnn::cross_entropy`` and ``cross_entropy_backward``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastnn.dispatch import forced, run
from fastnn.ops.autograd import Function, differentiable, register_fake


def _class_dim(input: Tensor) -> int:
    return 0 if input.dim() == 1 else 1


@register_fake("cross_entropy")
def _fake(
    input: Tensor, target: Tensor, weight: Tensor | None, reduction: int, ignore_index: int, label_smoothing: float
) -> tuple[Tensor, Tensor]:
    losses = input.new_empty([size for d, size in enumerate(input.shape) if d != _class_dim(input)])
    accumulator = torch.float64 if input.dtype == torch.float64 else torch.float32
    return (
        losses if reduction == 0 else input.new_empty(()),
        input.new_empty((3 * losses.numel() + 1,), dtype=accumulator),
    )


@register_fake("cross_entropy_backward")
def _fake_backward(grad_output: Tensor, input: Tensor, *args: Any) -> Tensor:
    return torch.empty_like(input)


def _gradient(
    grad_output: Tensor,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    stats: Tensor,
    reduction: int,
    ignore_index: int,
    label_smoothing: float,
) -> Tensor:
    """What ``fastnn::cross_entropy_backward`` computes, by torch's operators: with w_c the classes' weights and q_c the
    target's probabilities, ``grad_output * (softmax(input) * sum_c w_c q_c - w_c q_c)``."""
    dim = _class_dim(input)
    x, classes = input.to(stats.dtype), input.shape[dim]
    ignored = None
    if target.is_floating_point():
        q = target.to(x.dtype)
    else:
        index = target.long().unsqueeze(dim)  # of uint8, ignore_index may be no value
        ignored = index == ignore_index
        x = x.masked_fill(ignored, 0)  # whose zeros infinities would make NaN
        q = (index == torch.arange(classes, device=x.device).view(-1, *[1] * (x.dim() - 1 - dim))).to(x)
    label_smoothing = max(0.0, label_smoothing)
    q = q * (1 - label_smoothing) + label_smoothing / classes
    if weight is not None:
        q = q * weight.to(x.dtype).view(-1, *[1] * (x.dim() - 1 - dim))
    grad = grad_output.to(x.dtype)
    if reduction == 0:
        grad = grad.unsqueeze(dim)
    elif reduction == 1:
        grad = grad / stats[-1]
    result = grad * (x.softmax(dim) * q.sum(dim, keepdim=True) - q)
    return (result if ignored is None else result.masked_fill(ignored, 0)).to(input.dtype)


class CrossEntropyBackward(Function):
    """The gradient of the logits. Its own gradient is that of torch's operators: right, and not meant to be fast."""

    operator = "cross_entropy_backward"

    @staticmethod
    def save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:5])
        ctx.options = inputs[5:]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *differentiable_inputs, weight, stats = ctx.saved_tensors
        needed = ctx.needs_input_grad[:3]
        create_graph = torch.is_grad_enabled()
        with torch.enable_grad():
            # Aliases, so that an argument given twice still gets two gradients.
            grad_output, input, target = aliases = [
                t.view_as(t) if n else t for t, n in zip(differentiable_inputs, needed, strict=True)
            ]
            grad_input = _gradient(grad_output, input, target, weight, stats, *ctx.options)
        wanted = [t for t, n in zip(aliases, needed, strict=True) if n]
        found = iter(torch.autograd.grad(grad_input, wanted, grad, create_graph=create_graph, allow_unused=True))
        return *(next(found) if n else None for n in needed), *[None] * 5


class CrossEntropy(Function):
    """The loss alone: the statistics stay behind, which costs less than one more output."""

    operator = "cross_entropy"

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        output: Tensor
        output, stats = run("cross_entropy", *args)
        ctx.backend = forced()
        input, target, weight, *ctx.options = args
        ctx.save_for_backward(input, target, weight, stats)
        return output

    @staticmethod
    def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        input, target, weight, *ctx.options = inputs
        ctx.save_for_backward(input, target, weight, output[1])
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if grad_output is None:
            return (None,) * 6
        saved = input, _, weight, stats = ctx.saved_tensors
        grad_input = grad_target = None
        if ctx.needs_input_grad[0]:
            grad_input = cross_entropy_backward(grad_output, *saved, *ctx.options)
        if ctx.needs_input_grad[1]:
            grad_target = _target_gradient(grad_output, input, weight, stats[-1], *ctx.options)
        return grad_input, grad_target, None, None, None, None


def _target_gradient(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor | None,
    total_weight: Tensor,
    reduction: int,
    ignore_index: int,
    label_smoothing: float,
) -> Tensor:
    """Gradient of class probabilities: -grad_output * (1 - label_smoothing) * weight * log_softmax(input)."""
    dim = _class_dim(input)
    grad = grad_output.unsqueeze(dim) if reduction == 0 else grad_output
    if reduction == 1:
        grad = grad / total_weight.to(grad.dtype)
    if label_smoothing > 0:
        grad = grad * (1 - label_smoothing)
    if weight is not None:
        grad = grad * weight.view(-1, *[1] * (input.dim() - 1 - dim))
    return -grad * torch.log_softmax(input, dim)


cross_entropy_backward = differentiable("cross_entropy_backward", CrossEntropyBackward, in_torch=_gradient)
_cross_entropy = differentiable("cross_entropy", CrossEntropy)


def cross_entropy(*args: Any) -> Tensor:
    """The loss that ``torch.ops.fastnn.cross_entropy`` returns for these arguments, without the statistics."""
    result = _cross_entropy(*args)
    return result if isinstance(result, Tensor) else result[0]
