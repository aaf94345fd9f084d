"""What the optimizers' operators have in common."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

from fastnn.ops.autograd import not_differentiable, register_fake


def register_step(name: str) -> None:
    """The rules of ``fastnn::<name>``, one step of many parameters in place."""

    def fake(params: list[Tensor], *args: Any) -> None:
        # This rule is also the kernel of plain meta tensors, and a step of those is torch's to make.
        if params and not is_fake(params[0]):
            raise NotImplementedError(f"fastnn::{name}: meta tensors have no kernel")

    register_fake(name)(fake)
    not_differentiable(name)
