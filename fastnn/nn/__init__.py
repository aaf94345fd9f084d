"""All of ``torch.nn``, with ``Conv2d``, ``ReLU``, ``MaxPool2d`` and ``CrossEntropyLoss`` on fastnn's kernels,
a ``Sequential`` that fuses them, and the fused ``ConvReLU2d`` and ``ConvReLUMaxPool2d``."""

from typing import TYPE_CHECKING

from torch import nn as _native

if TYPE_CHECKING:
    from fastnn.nn import functional as functional
else:
    from torch.nn import *  # noqa: F403

    # Not as above: that would find torch's, which the star brought in.
    import fastnn.nn.functional as functional  # noqa: F401
from fastnn.nn.layers import Conv2d as Conv2d
from fastnn.nn.layers import ConvReLU2d as ConvReLU2d
from fastnn.nn.layers import ConvReLUMaxPool2d as ConvReLUMaxPool2d
from fastnn.nn.layers import LazyConv2d as LazyConv2d
from fastnn.nn.layers import MaxPool2d as MaxPool2d
from fastnn.nn.layers import ReLU as ReLU
from fastnn.nn.layers import Sequential as Sequential
from fastnn.nn.loss import CrossEntropyLoss as CrossEntropyLoss

if TYPE_CHECKING:  # which keeps the first of what has one name, and is told what the star leaves out
    from torch.nn import *  # type: ignore[assignment]  # noqa: F403
    from torch.nn import common_types as common_types
    from torch.nn import intrinsic as intrinsic
    from torch.nn import qat as qat
    from torch.nn import quantizable as quantizable
    from torch.nn import quantized as quantized
else:

    def __getattr__(name: str) -> object:
        return getattr(_native, name)
