"""Hand-written convolution, ReLU, max-pooling, cross-entropy and optimizer kernels for PyTorch.

Change two imports, ``import fastnn.nn as nn`` and ``import fastnn.optim as optim``, and a program trains the same model
on them.
"""

from fastnn import backends, submodules  # noqa: F401
from fastnn.convert import ConversionReport, convert, revert
from fastnn.dispatch import backend

__version__ = "0.1.0"
__all__ = ["ConversionReport", "backend", "backends", "convert", "revert"]
