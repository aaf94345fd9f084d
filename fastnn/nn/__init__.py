"""All of ``torch.nn``, with ``Conv2d``, ``ReLU`` and ``CrossEntropyLoss`` on fastnn's kernels, and the fused
``ConvReLU2d`` and ``ConvReLUMaxPool2d``."""

from torch import nn as _native
from torch.nn import *  # noqa: F403

from fastnn.nn import functional as functional
from fastnn.nn.loss import CrossEntropyLoss as CrossEntropyLoss


def __getattr__(name: str) -> object:
    return getattr(_native, name)
