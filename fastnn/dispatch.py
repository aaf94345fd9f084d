"""Which implementation serves a call: the one place where that is decided.

A call that no kernel covers goes to native torch, which also raises torch's own errors for wrong arguments; one DEBUG
line in the ``fastnn`` logger says so, once per operator and reason.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastnn import _C as _C  # loading the library registers torch.ops.fastnn

logger = logging.getLogger("fastnn")

KERNEL_DTYPES = frozenset({torch.float64, torch.float32, torch.bfloat16, torch.float16})
BACKENDS = ("cpu", "torch")

_PLAIN_TYPES = frozenset({Tensor, torch.nn.Parameter})
_forced: ContextVar[str | None] = ContextVar("fastnn_backend", default=None)
_logged: set[tuple[str, str]] = set()


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Force the implementation of every fastnn call inside the ``with`` block (of this thread or task).

    Args:
        name: ``'cpu'`` for the compiled CPU kernels or ``'torch'`` for native PyTorch. A call the forced kernels do not
            cover still gives the native result.

    Raises:
        ValueError: ``name`` is none of these.
    """
    if name not in BACKENDS:
        raise ValueError(f"backend() got name={name!r}, expected one of {', '.join(map(repr, BACKENDS))}")
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


def forced() -> str | None:
    """The backend forced here, if one is. A compiled function keeps what this was when it was compiled."""
    return _forced.get()


# What torch.compiler.assume_constant_result sets, without that function's import of the whole compiler.
forced._dynamo_marked_constant = True  # type: ignore[attr-defined]


def log_once(op: str, reason: str) -> None:
    """One DEBUG line per operator and reason: why a call went to native torch. None while torch.compile traces."""
    if not torch.compiler.is_compiling() and (op, reason) not in _logged:
        _logged.add((op, reason))
        logger.debug("%s: native torch, because %s", op, reason)


def _why_not(tensor: object, dtype: torch.dtype | None) -> str:
    if not isinstance(tensor, Tensor):
        return "an argument is no tensor"
    if type(tensor) not in _PLAIN_TYPES:
        return f"of a {type(tensor).__name__} argument"
    if tensor.dtype not in KERNEL_DTYPES:
        return f"dtype {tensor.dtype} has no kernel"
    if not tensor.is_cpu:
        return f"device {tensor.device.type} has no kernel"
    if tensor.layout is not torch.strided:
        return f"layout {tensor.layout} has no kernel"
    return f"dtypes {dtype} and {tensor.dtype} are mixed"


def use_kernels(op: str, *tensors: Tensor | None) -> bool:
    """Whether fastnn's kernels serve a call of ``op`` on these floating-point arguments (None: not given).

    False sends the call to native torch: another dtype (or mixed ones), device, layout or tensor subclass, a
    torch.func transform, forward-mode AD, or ``backend('torch')``.
    """
    dtype: torch.dtype | None = None
    for tensor in tensors:  # in every call of every operator: one test an argument, the reasons only where it fails
        if tensor is None:
            continue
        if (
            type(tensor) in _PLAIN_TYPES
            and tensor.is_cpu
            and tensor.layout is torch.strided
            and (tensor.dtype is dtype or (dtype is None and tensor.dtype in KERNEL_DTYPES))
        ):
            dtype = tensor.dtype
            continue
        log_once(op, _why_not(tensor, dtype))
        return False
    if forced() == "torch":
        return False
    if torch._C._are_functorch_transforms_active():
        log_once(op, "of a torch.func transform")
        return False
    if forward_ad._current_level >= 0:
        log_once(op, "of forward-mode AD")
        return False
    return True
