"""How an operator gets its gradient.

``torch.autograd.Function`` around the operator is the fast way to differentiate it from Python (6 µs a call against 11
for ``torch.library.register_autograd``), and the operator itself, called raw, must differentiate too. Both share one
pair of ``save`` and ``backward``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastnn.dispatch import (
    BelowAutograd,
    are_transforms_active,
    forced,
    forced_to,
    is_compiling,
    overload,
    overloads,
    run,
)


class Function(torch.autograd.Function):
    """An operator with its gradient: ``save`` keeps on ``ctx`` what ``backward`` needs of the arguments and the result.

    Backward runs on the backend that forward was forced to, wherever it is called: autograd has threads of its own for
    GPUs. Forward and ``save`` in one, as here, cost a call less than torch's ``setup_context``.
    """

    operator: ClassVar[str]

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        operator, save, own_backward = cls.operator, cls.save, cls.backward

        def forward(ctx: Any, *args: Any) -> Any:
            output = run(operator, *args)
            ctx.backend = forced()
            save(ctx, args, output)
            return output

        def backward(ctx: Any, *grads: Any) -> Any:
            name = getattr(ctx, "backend", None)
            if name == forced():
                return own_backward(ctx, *grads)
            with forced_to(name):
                return own_backward(ctx, *grads)

        if "forward" not in vars(cls):
            cls.forward = staticmethod(forward)  # type: ignore[method-assign]
        if "backward" in vars(cls):
            cls.backward = staticmethod(functools.wraps(own_backward)(backward))  # type: ignore[method-assign]

    @staticmethod
    def save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        raise NotImplementedError


def needs_grad(*args: Any) -> bool:
    """Whether a call with these arguments has to be recorded by autograd."""
    if torch.is_grad_enabled():
        for argument in args:
            if getattr(argument, "requires_grad", False):
                return True
    return False


def refuse_tangents(name: str, args: Any) -> None:
    """Raises where a raw call would drop the tangents of its arguments."""
    if forward_ad._current_level < 0:
        return
    for argument in torch.utils._pytree.tree_leaves(args):
        dual = isinstance(argument, Tensor) and argument.is_floating_point()
        if dual and forward_ad.unpack_dual(argument).tangent is not None:
            raise NotImplementedError(
                f"torch.ops.fastnn.{name} has no forward-mode derivative and an argument has a tangent; "
                "use fastnn.nn.functional"
            )


class _RefusingTangents(torch.library.Library):
    """Registers what it is given behind ``refuse_tangents``: ``register_autograd`` knows nothing of forward mode."""

    def impl(self, op_name: str, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        def checked(keyset: Any, *op_args: Any, **op_kwargs: Any) -> Any:
            refuse_tangents(op_name, op_args)
            return fn(keyset, *op_args, **op_kwargs)

        super().impl(op_name, checked, *args, **kwargs)


def register_fake(operator: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorates the rule of ``torch.ops.fastnn.<operator>`` for fake and meta tensors."""

    def register(rule: Callable[..., Any]) -> Callable[..., Any]:
        for full_name in overloads(operator):
            torch.library.register_fake(full_name, rule)
        return rule

    return register


_library = _RefusingTangents("fastnn", "FRAGMENT")


def differentiable(
    name: str, function: type[Function], in_torch: Callable[..., Any] | None = None
) -> Callable[..., Any]:
    """Makes ``torch.ops.fastnn.<name>`` differentiable by ``function`` and returns the fast way to call it.

    ``function`` takes the operator's own arguments, positionally. ``in_torch``, of an operator that a backward calls,
    is the same by torch's operators, which have batching rules and forward-mode derivatives: a graph that was recorded
    outside of a transform may be walked inside of one.
    """

    def save_of_triton(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.backend = "triton"
        function.save(ctx, inputs, output)

    for full_name, save in zip(overloads(name), (function.save, save_of_triton), strict=False):
        torch.library.register_autograd(full_name, function.backward, setup_context=save, lib=_library)
    schema = getattr(torch.ops.fastnn, name).default._schema
    tensors = sum("Tensor" in str(argument.type) for argument in schema.arguments)
    # Function.apply itself first binds the arguments by inspect.signature, ten times the cost of all the rest.
    apply = super(torch.autograd.Function, function).apply  # type: ignore[misc]

    def call(*args: Any) -> Any:
        if is_compiling():
            return overload(name, args[0])(*args)
        if in_torch is not None and (are_transforms_active() or forward_ad._current_level >= 0):
            return in_torch(*args)
        if torch.is_grad_enabled():
            for tensor in args[:tensors]:
                if tensor is not None and tensor.requires_grad:
                    return apply(*args)
        return run(name, *args)

    call.__name__ = call.__qualname__ = name
    return call


def not_differentiable(name: str) -> Callable[..., Any]:
    """Makes a raw ``torch.ops.fastnn.<name>`` raise where autograd would have to record it, instead of silently
    cutting the graph, and returns the operator's call past that check."""

    def raise_if_recorded(op: Any, *args: Any) -> Any:
        refuse_tangents(name, args)
        if needs_grad(*torch.utils._pytree.tree_leaves(args)):
            raise RuntimeError(
                f"torch.ops.fastnn.{name} is not differentiable and an argument requires grad; "
                "call it under torch.no_grad(), or use fastnn.nn.functional or fastnn.optim"
            )
        with BelowAutograd():
            return op(*args)

    for full_name in overloads(name):
        op = getattr(getattr(torch.ops.fastnn, name), full_name.partition(".")[2] or "default")
        torch.library.impl(full_name, "Autograd", functools.partial(raise_if_recorded, op))

    def call(*args: Any) -> Any:
        return run(name, *args)

    call.__name__ = call.__qualname__ = name
    return call
