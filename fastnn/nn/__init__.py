"""All of ``torch.nn``, with ``Conv2d``, ``ReLU``, ``MaxPool2d`` and ``CrossEntropyLoss`` on fastnn's kernels,
a ``Sequential`` that fuses them, and the fused ``ConvReLU2d`` and ``ConvReLUMaxPool2d``."""

from typing import TYPE_CHECKING

from torch import nn as _native
from torch.nn import *  # noqa: F403

# Not `from fastnn.nn import functional`: that would find torch's, which the line above brought in.
import fastnn.nn.functional as functional  # noqa: F401
from fastnn.nn.loss import CrossEntropyLoss as CrossEntropyLoss
from fastnn.nn.modules import Conv2d as Conv2d
from fastnn.nn.modules import ConvReLU2d as ConvReLU2d
from fastnn.nn.modules import ConvReLUMaxPool2d as ConvReLUMaxPool2d
from fastnn.nn.modules import MaxPool2d as MaxPool2d
from fastnn.nn.modules import ReLU as ReLU
from fastnn.nn.modules import Sequential as Sequential

if TYPE_CHECKING:  # what the star leaves out
    from torch.nn import common_types as common_types
    from torch.nn import intrinsic as intrinsic
    from torch.nn import qat as qat
    from torch.nn import quantizable as quantizable
    from torch.nn import quantized as quantized
else:

    def __getattr__(name: str) -> object:
        return getattr(_native, name)
