"""What the optimizers share: which groups the kernels take, and torch's own step for the others."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastnn.dispatch import _C, log_once, use_kernels


def kernels_wanted(op: str) -> bool:
    """Whether nothing that torch has switched on must see the step: the kernels are called past the dispatcher."""
    if torch.compiler.is_compiling() or not use_kernels(op):
        return False
    if torch._C._len_torch_dispatch_stack() > 0:
        log_once(op, "of an active TorchDispatchMode")
        return False
    return True


def params_and_grads(group: dict[str, Any]) -> tuple[list[Tensor], list[Tensor]]:
    """The group's parameters that have a gradient, and their gradients."""
    all_grads = [p.grad for p in group["params"]]
    grads = [g for g in all_grads if g is not None]
    if len(grads) == len(all_grads):
        return list(group["params"]), grads
    return [p for p, g in zip(group["params"], all_grads, strict=True) if g is not None], grads


def states_of(optimizer: torch.optim.Optimizer, params: list[Tensor]) -> list[dict[str, Any]]:
    """The parameters' states; for one that has none yet an empty dict, which is not stored."""
    state = optimizer.state
    # A look-up hashes, in Python, the tensor. Mostly the states lie in the parameters' order and need none.
    if len(state) == len(params) and all(map(operator.is_, state, params)):
        return list(state.values())
    return [state.get(p, {}) for p in params]


def native_step(cls: type[torch.optim.Optimizer], optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> None:
    """torch's own step of one group. The hooks around ``step`` have run already, so they are peeled off."""
    step: Any = cls.step
    if getattr(step, "hooked", False):
        step = step.__wrapped__
    groups = optimizer.param_groups
    optimizer.param_groups = [group]
    try:
        step(optimizer)
    finally:
        optimizer.param_groups = groups


def updated(op: str, kernel: Callable[..., None], *args: Any) -> bool:
    """Runs ``kernel`` on lists of tensors. False where it does not take one of them: nothing has changed then."""
    try:
        kernel(*args)
    except _C.NotCovered as refusal:
        log_once(op, str(refusal))
        return False
    return True
