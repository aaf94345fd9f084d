"""All of ``torch.nn.functional``, with ``conv2d``, ``relu`` and ``cross_entropy`` on fastnn's kernels."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as native
from torch.nn.functional import *  # noqa: F403

from fastnn import ops as ops
from fastnn.dispatch import use_kernels
from fastnn.ops import relu as _relu


def __getattr__(name: str) -> object:
    return getattr(native, name)


def relu(input: Tensor, inplace: bool = False) -> Tensor:
    """``max(input, 0)`` elementwise, NaN kept. As :func:`torch.nn.functional.relu`.

    Args:
        input: any shape and strides; float64, float32, bfloat16 or float16 on fastnn's kernels, others natively.
        inplace: write the result into ``input``.
    """
    if not use_kernels("relu", input):
        return native.relu(input, inplace)
    return _relu.relu_(input) if inplace else _relu.relu(input)


def relu_(input: Tensor) -> Tensor:
    """``relu(input, inplace=True)``."""
    return relu(input, inplace=True)
