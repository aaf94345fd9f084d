"""How an operator gets its gradient.

``torch.autograd.Function`` around the operator is the fast way to differentiate it from Python (6 µs a call against 11
for ``torch.library.register_autograd``), and the operator itself, called raw, must differentiate too. Both share one
pair of ``setup_context`` and ``backward``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import forward_ad

from fastnn.dispatch import forced, forced_to, kernel

# Inside it a call goes straight to the device's kernel, past the Python rule that `differentiable` registers.
BelowAutograd = torch._C._AutoDispatchBelowAutograd


def run(operator: str, *args: Any) -> Any:
    """The operator's implementation of this call, below autograd."""
    with BelowAutograd():
        return kernel(operator)(*args)


class Function(torch.autograd.Function):
    """One whose backward runs on the backend that forward was forced to, wherever it is called: autograd has threads of
    its own for GPUs."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()

        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            ctx.backend = forced()
            own_setup_context(ctx, inputs, output)

        def backward(ctx: Any, *grads: Any) -> Any:
            name = getattr(ctx, "backend", None)
            if name == forced():
                return own_backward(ctx, *grads)
            with forced_to(name):
                return own_backward(ctx, *grads)

        own = vars(cls)
        if "setup_context" in own:
            own_setup_context = cls.setup_context
            cls.setup_context = staticmethod(functools.wraps(own_setup_context)(setup_context))  # type: ignore[method-assign]
        if "backward" in own:
            own_backward = cls.backward
            cls.backward = staticmethod(functools.wraps(own_backward)(backward))  # type: ignore[method-assign]


def needs_grad(*args: Any) -> bool:
    """Whether a call with these arguments has to be recorded by autograd."""
    for argument in args:
        if getattr(argument, "requires_grad", False):
            return torch.is_grad_enabled()
    return False


def differentiable(
    name: str,
    function: type[Function],
    setup_context: Callable[..., None] | None = None,
    in_torch: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """Makes ``torch.ops.fastnn.<name>`` differentiable by ``function`` and returns the fast way to call it.

    ``function`` takes the operator's own arguments, positionally; its ``forward`` has to ``run`` the operator.
    ``setup_context`` is the operator's own where ``function`` does not return, as an output, all that it saves.
    ``in_torch``, of an operator that a backward calls, is the same by torch's operators, which have batching rules and
    forward-mode derivatives: a graph that was recorded outside of a transform may be walked inside of one.
    """
    op = getattr(torch.ops.fastnn, name).default
    setup_context = setup_context or function.setup_context
    torch.library.register_autograd(f"fastnn::{name}", function.backward, setup_context=setup_context)
    # Function.apply itself first binds the arguments by inspect.signature, ten times the cost of all the rest.
    apply = super(torch.autograd.Function, function).apply  # type: ignore[misc]

    def call(*args: Any) -> Any:
        if torch.compiler.is_compiling():
            return op(*args)
        if in_torch is not None and (torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0):
            return in_torch(*args)
        if needs_grad(*args):
            return apply(*args)
        with BelowAutograd():
            return kernel(name)(*args)

    call.__name__ = call.__qualname__ = name
    return call


def not_differentiable(name: str) -> Callable[..., Any]:
    """Makes a raw ``torch.ops.fastnn.<name>`` raise where autograd would have to record it, instead of silently
    cutting the graph, and returns the operator's call past that check."""
    op = getattr(torch.ops.fastnn, name).default

    def raise_if_recorded(*args: Any) -> Any:
        flat = torch.utils._pytree.tree_leaves(args)
        if needs_grad(*flat):
            raise RuntimeError(
                f"torch.ops.fastnn.{name} is not differentiable and an argument requires grad; "
                "call it under torch.no_grad(), or use fastnn.nn.functional or fastnn.optim"
            )
        with BelowAutograd():
            return op(*args)

    torch.library.impl(f"fastnn::{name}", "Autograd", raise_if_recorded)

    def call(*args: Any) -> Any:
        return run(name, *args)

    call.__name__ = call.__qualname__ = name
    return call
