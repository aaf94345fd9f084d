"""What the kernels' functions share: checks of their arguments, accumulators, and memory in a given order.

The Python layer sends what the kernels do not cover to native torch, so the checks only speak to callers of the raw
``torch.ops.fastnn`` operators; they are those of csrc/common/check.h.
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def check(condition: bool, text: str) -> None:
    if not condition:
        raise RuntimeError(text)


def check_dtype(tensor: Tensor, op: str, name: str) -> None:
    check(
        tensor.dtype in DTYPES,
        f"{op}: {name} has dtype {tensor.dtype}, expected float64, float32, bfloat16 or float16",
    )


def check_same_dtype(tensor: Tensor, reference: Tensor, op: str, name: str) -> None:
    check(tensor.dtype is reference.dtype, f"{op}: {name} has dtype {tensor.dtype}, expected {reference.dtype}")


def check_same_shape(tensor: Tensor, reference: Tensor, op: str, name: str) -> None:
    check(
        tensor.shape == reference.shape,
        f"{op}: {name} has shape {list(tensor.shape)}, expected {list(reference.shape)}",
    )


def check_dim(tensor: Tensor, dim: int, op: str, name: str) -> None:
    check(tensor.dim() == dim, f"{op}: {name} has shape {list(tensor.shape)}, expected {dim} dimensions")


def accumulator(tensor: Tensor) -> tl.dtype:
    """The type a kernel computes in: float64 for float64, float32 for all others."""
    return tl.float64 if tensor.dtype is torch.float64 else tl.float32


def accumulator_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype is torch.float64 else torch.float32


def in_order_of(reference: Tensor, tensor: Tensor) -> Tensor:
    """``tensor``, or a copy, with the strides of the dense ``reference``: both can then be walked as they lie."""
    if tensor.stride() == reference.stride():
        return tensor
    return torch.empty_like(reference, dtype=tensor.dtype).copy_(tensor)
