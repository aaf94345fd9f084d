"""Triton kernels of the operators: for any GPU that Triton reaches, and no compiler of CUDA at hand.

Each ``fastnn/triton/<op>.py`` has a plain function for every operator of the op, with the arguments of its schema in
csrc/ops.cpp. Nothing here is loaded, nor Triton itself, before a call needs it.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor

MINIMUM = (3, 6)  # the oldest that compiles every kernel; torch 2.11 brings it


@cache
def why_off(device_type: str) -> str | None:
    """Why the kernels cannot run on tensors of ``device_type``; None if they can: one has been tried."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    try:
        import triton

        version = tuple(map(int, re.findall(r"\d+", triton.__version__)[:2]))
        if version < MINIMUM:
            return f"triton {triton.__version__} is older than {'.'.join(map(str, MINIMUM))}"
        if device_type == "cpu" and not is_interpreted():
            return "CPU tensors need its interpreter, TRITON_INTERPRET=1"
        one = torch.ones(1, device=device_type)
        if function("relu")(one).item() != 1:
            return f"triton {triton.__version__} computes relu(1) wrong"
    except Exception as error:  # whatever a broken installation may do
        return f"triton does not work here: {type(error).__name__}: {error}".splitlines()[0]
    return None


def is_interpreted() -> bool:
    """Whether the kernels run through Triton's interpreter: TRITON_INTERPRET=1 when they were first needed."""
    from triton.runtime.interpreter import InterpretedFunction

    return isinstance(importlib.import_module("fastnn.triton.relu").forward_kernel, InterpretedFunction)


@cache
def function(operator: str) -> Callable[..., Any]:
    """The function of ``torch.ops.fastnn.<operator>``; it runs on the device of its first tensor."""
    from fastnn.dispatch import OPERATORS

    op = next(op for op, operators in OPERATORS.items() if operator in operators)
    compute = getattr(importlib.import_module(f"fastnn.triton.{op}"), operator)

    def call(*args: Any) -> Any:
        first = args[0] if isinstance(args[0], Tensor) else args[0][0] if args[0] else None
        if first is None:  # an empty list of parameters
            return None
        with nullcontext() if first.is_cpu else torch.accelerator.device_index(first.device.index):
            return compute(*args)

    return call
