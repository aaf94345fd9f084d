"""``python -m fastnn``: what is built, which backend serves which op on this machine, and whether it computes right.

Every available backend is compared with native PyTorch, in about a second; the exit status is 1 if one differs.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import fastnn
import fastnn.nn.functional as F
import fastnn.optim
from fastnn import _C
from fastnn.dispatch import CUDA_OFF, DEVICES, FORCED_DEVICES, KERNELS, OPERATORS, forced, why_off


def facts() -> dict[str, Any]:
    """What is installed and built, and what is in use of it."""
    try:
        triton_version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton_version = "not installed"
    available = _C.available_isas()
    cuda = sys.modules.get("fastnn._C_cuda")
    return {
        "fastnn": f"{fastnn.__version__}, compiled by {_C.compiler} with torch {_C.torch_built_with}",
        "python": f"{platform.python_version()} on {sys.platform} {platform.machine()}",
        "torch": torch.__version__,
        "triton": triton_version,
        "cuda": f"off: {CUDA_OFF}" if cuda is None else f"kernels compiled for {cuda.architectures}",
        "instruction sets": {
            isa: "in use" if isa == _C.isa() else "available" if isa in available else "off: this CPU does not have it"
            for isa in _C.built_isas()
        },
        "threads": _C.num_threads(),
        "variables": {name: os.environ[name] for name in ("FASTNN_BACKEND", "FASTNN_CPU_ISA") if name in os.environ},
    }


def device_of(backend: str) -> torch.device:
    """The device that ``backend`` would run on here."""
    here = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    return here if here.type in FORCED_DEVICES[backend] else torch.device(FORCED_DEVICES[backend][0])


def table() -> dict[str, dict[str, str]]:
    """Per op and backend ``'available'``, or why not."""
    return {
        op: {
            backend: "available" if reason is None else f"off: {reason}"
            for backend in KERNELS
            for reason in [why_off(backend, op, device_of(backend))]
        }
        for op in OPERATORS
    }


def markdown() -> str:
    """The registry as docs/backends.md shows it: what has kernels, whatever this machine has."""
    lines = ["| op | " + " | ".join(f"`{backend}`" for backend in KERNELS) + " |", "|---" * (len(KERNELS) + 1) + "|"]
    for op in OPERATORS:
        lines.append(f"| {op} | " + " | ".join("kernels" if op in KERNELS[b] else "" for b in KERNELS) + " |")
    lines.append("| on tensors of | " + " | ".join(", ".join(DEVICES[b]) for b in KERNELS) + " |")
    return "\n".join(lines)


# ---- the self-test: per op, results and gradients to be compared with native's ----


def _with_gradients(function: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
    leaves = [t.requires_grad_() for t in inputs]
    output = function(*leaves)
    return [output, *torch.autograd.grad(output.square().sum(), leaves)]


def _conv2d(draw: Callable[..., Tensor]) -> list[Tensor]:
    inputs = [draw(2, 4, 9, 11), draw(6, 2, 3, 3), draw(6)]
    plain = _with_gradients(lambda x, w, b: F.conv2d(x, w, b, stride=(1, 2), padding=1, groups=2), *inputs)
    pooled = _with_gradients(lambda x, w, b: F.conv2d_relu_max_pool2d(x, w, b, padding=1, groups=2), *inputs)
    return plain + pooled


def _relu(draw: Callable[..., Tensor]) -> list[Tensor]:
    return _with_gradients(F.relu, draw(3, 1001))


def _max_pool2d(draw: Callable[..., Tensor]) -> list[Tensor]:
    return _with_gradients(lambda x: F.max_pool2d(x, 3, 2, padding=1), draw(2, 5, 19, 23))


def _cross_entropy(draw: Callable[..., Tensor]) -> list[Tensor]:
    x = draw(8, 50)
    return _with_gradients(lambda x: F.cross_entropy(x, x.argmin(1), label_smoothing=0.1), x)


def _optimizer(cls: Callable[..., torch.optim.Optimizer], draw: Callable[..., Tensor]) -> list[Tensor]:
    params = [torch.nn.Parameter(draw(*shape)) for shape in ((5, 7), (33,))]
    optimizer = cls(params)
    for _ in range(2):
        for p in params:
            p.grad = draw(*p.shape)
        optimizer.step()
    return [p.detach() for p in params]


SELF_TEST: dict[str, Callable[[Callable[..., Tensor]], list[Tensor]]] = {
    "conv2d": _conv2d,
    "relu": _relu,
    "max_pool2d": _max_pool2d,
    "cross_entropy": _cross_entropy,
    "adam": lambda draw: _optimizer(lambda p: fastnn.optim.Adam(p, lr=0.1, weight_decay=0.1, amsgrad=True), draw),
    "sgd": lambda draw: _optimizer(lambda p: fastnn.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True), draw),
}


def self_test(backend: str, op: str) -> str:
    """``'as native'``, or how ``backend`` differs from native PyTorch in ``op``."""
    device = device_of(backend)
    results = []
    try:
        for name in ("torch", backend):
            generator = torch.Generator().manual_seed(0)
            with fastnn.backend(name):
                draw = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64).to(device)  # noqa: B023, E731
                results.append(SELF_TEST[op](draw))
        torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)
    except Exception as error:  # whatever a broken backend may do
        return f"DIFFERS: {type(error).__name__}: {str(error).strip().splitlines()[0]}"
    return "as native"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m fastnn", description=__doc__)
    parser.add_argument("--json", action="store_true", help="the same for machines")
    parser.add_argument("--markdown", action="store_true", help="the table of docs/backends.md, and nothing else")
    arguments = parser.parse_args()
    as_json = arguments.json
    if arguments.markdown:
        print(markdown())
        return 0
    support = table()
    tests = {
        op: {backend: self_test(backend, op) for backend, state in states.items() if state == "available"}
        for op, states in support.items()
    }
    failed = any(result != "as native" for results in tests.values() for result in results.values())
    if as_json:
        print(json.dumps({**facts(), "forced": forced(), "support": support, "self-test": tests}, indent=2))
        return int(failed)
    for name, value in facts().items():
        if isinstance(value, dict):
            value = ", ".join(f"{key}: {what}" for key, what in value.items()) or "none set"
        print(f"{name:<17} {value}")
    print(f"\n{'op':<15} backend  state")
    for op, states in support.items():
        for backend, state in states.items():
            result = f", {tests[op][backend]}" if backend in tests[op] else ""
            print(f"{op:<15} {backend:<8} {state}{result}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
