"""What the optimizers share: which groups the kernels take, and torch's own step for the others."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from fastnn.dispatch import log_once

_PLAIN_TYPES = frozenset({Tensor, torch.nn.Parameter})


def params_and_grads(group: dict[str, Any]) -> tuple[list[Tensor], list[Tensor]]:
    """The group's parameters that have a gradient, and their gradients."""
    all_grads = [p.grad for p in group["params"]]
    grads = [g for g in all_grads if g is not None]
    if len(grads) == len(all_grads):
        return group["params"], grads
    return [p for p, g in zip(group["params"], all_grads, strict=True) if g is not None], grads


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


def all_plain(op: str, *lists: Iterable[Tensor]) -> bool:
    """Whether no tensor is of a subclass that might want to see the call (DTensor, ...)."""
    others = set(map(type, chain(*lists))) - _PLAIN_TYPES
    if others:
        log_once(op, f"of {', '.join(sorted(t.__name__ for t in others))} arguments")
    return not others


def updated(op: str, kernel: Callable[..., None], lists: list[list[Tensor]], *args: Any) -> bool:
    """Runs ``kernel`` on ``lists``, which it updates. False where it refuses, having changed nothing.

    Asking each tensor for its dtype, device and layout from Python would cost more than the update of a small one; the
    operator checks them all before its first write.
    """
    try:
        for tensors in lists:
            torch.autograd.graph.increment_version(tensors)
        kernel(*args)
    except RuntimeError as refusal:
        log_once(op, str(refusal).partition("\n")[0])
        return False
    return True
