"""Triton kernels of the operators: for any GPU that Triton reaches, and no compiler of CUDA at hand.

Each ``fastnn/triton/<op>.py`` has a plain function for every operator of the op, with the arguments of its schema in
csrc/ops.cpp. Nothing here is loaded, nor Triton itself, before a call needs it.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

MINIMUM = (3, 6)  # the oldest that compiles every kernel; torch 2.11 brings it


@cache
def why_off(op: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the kernels of ``op`` cannot run on tensors of this device and dtype; None if they can: they were tried."""
    try:
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed"
        import triton

        version = tuple(map(int, re.findall(r"\d+", triton.__version__)[:2]))
        if version < MINIMUM:
            return f"triton {triton.__version__} is older than {'.'.join(map(str, MINIMUM))}"
        if device.type == "cpu" and not is_interpreted():
            return "CPU tensors need its interpreter, TRITON_INTERPRET=1"
        if device.type != "cpu" and is_interpreted():
            return "its interpreter, TRITON_INTERPRET=1, takes CPU tensors alone"
        from fastnn.triton.trial import is_right

        # The modes are those of the call that happens to be the first.
        with _disable_current_modes(), _current(device):
            if not is_right(op, device, dtype):
                return f"triton {triton.__version__} computes {op} wrong in {dtype}"
    except Exception as error:  # whatever a broken installation, or a kernel that does not compile, may do
        lines = str(error).strip().splitlines() or [""]
        text = " .. ".join(dict.fromkeys((lines[0], lines[-1])))  # Triton quotes source between the two
        return f"triton does not work here: {type(error).__name__}: {text}"
    return None


def is_interpreted() -> bool:
    """Whether the kernels run through Triton's interpreter: TRITON_INTERPRET=1 when they were first needed."""
    from triton.runtime.interpreter import InterpretedFunction

    return isinstance(importlib.import_module("fastnn.triton.relu").forward_kernel, InterpretedFunction)


def _current(device: torch.device) -> AbstractContextManager[Any]:
    """Makes it the one that Triton launches on."""
    return nullcontext() if device.type == "cpu" else torch.accelerator.device_index(device.index)


def first_tensor(args: tuple[Any, ...]) -> Tensor | None:
    """The first tensor of an operator's arguments; None of an empty list of parameters."""
    if isinstance(args[0], Tensor):
        return args[0]
    return args[0][0] if args[0] else None


@cache
def function(operator: str) -> Callable[..., Any]:
    """The function of ``torch.ops.fastnn.<operator>``; it runs on the device of its first tensor."""
    from fastnn.dispatch import OPERATORS

    op = next(op for op, operators in OPERATORS.items() if operator in operators)
    compute = getattr(importlib.import_module(f"fastnn.triton.{op}"), operator)

    def call(*args: Any) -> Any:
        first = first_tensor(args)
        if first is None:
            return None
        with _current(first.device):
            return compute(*args)

    return call
