"""Adam: the rules of ``fastnn::adam_``, one step of many parameters in place."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

from fastnn import dispatch as dispatch  # registers the operators
from fastnn.ops.autograd import not_differentiable


def _fake(params: list[Tensor], *args: Any) -> None:
    # This rule is also the kernel of plain meta tensors, and a step of those is torch's to make.
    if params and not is_fake(params[0]):
        raise NotImplementedError("fastnn::adam_: meta tensors have no kernel")


torch.library.register_fake("fastnn::adam_", _fake)
not_differentiable("adam_")
