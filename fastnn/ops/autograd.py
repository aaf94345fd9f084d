"""How an operator gets its gradient.

``torch.autograd.Function`` around the operator is the fast way to differentiate it from Python (6 µs a call against 11
for ``torch.library.register_autograd``), and the operator itself, called raw, must differentiate too. Both share one
pair of ``setup_context`` and ``backward``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

# Inside it a call goes straight to the device's kernel, past the Python rule that `differentiable` registers.
BelowAutograd = torch._C._AutoDispatchBelowAutograd


def needs_grad(*args: Any) -> bool:
    """Whether a call with these arguments has to be recorded by autograd."""
    for argument in args:
        if getattr(argument, "requires_grad", False):
            return torch.is_grad_enabled()
    return False


def differentiable(
    name: str, function: type[torch.autograd.Function], setup_context: Callable[..., None] | None = None
) -> Callable[..., Any]:
    """Makes ``torch.ops.fastnn.<name>`` differentiable by ``function`` and returns the fast way to call it.

    ``function`` takes the operator's own arguments, positionally; its ``forward`` runs the operator ``BelowAutograd``.
    ``setup_context`` is the operator's own where ``function`` does not return, as an output, all that it saves.
    """
    op = getattr(torch.ops.fastnn, name).default
    setup_context = setup_context or function.setup_context
    torch.library.register_autograd(f"fastnn::{name}", function.backward, setup_context=setup_context)
    # Function.apply itself first binds the arguments by inspect.signature, ten times the cost of all the rest.
    apply = super(torch.autograd.Function, function).apply  # type: ignore[misc]

    def call(*args: Any) -> Any:
        if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
            return op(*args)
        if needs_grad(*args):
            return apply(*args)
        with BelowAutograd():
            return op(*args)

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
        with BelowAutograd():
            return op(*args)

    call.__name__ = call.__qualname__ = name
    return call
