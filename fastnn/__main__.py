"""``python -m fastnn``: what is built, which backend serves which op on this machine, and whether it computes right.

Every available backend is compared with native PyTorch in each dtype, in about a second (Triton on a GPU takes longer
the first time: it compiles); the exit status is 1 if one differs.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

import fastnn
import fastnn.nn.functional as F
import fastnn.optim
from fastnn import _C
from fastnn.dispatch import CUDA_OFF, DEVICES, FORCED_DEVICES, KERNEL_DTYPES, KERNELS, OPERATORS, forced, why_off

DTYPES = sorted(KERNEL_DTYPES, key=str)


def triton_version() -> str:
    """What the module says: packages of AMD's and Intel's have other names than it."""
    try:
        return str(importlib.import_module("triton").__version__)
    except Exception as error:  # whatever a broken installation may do
        if isinstance(error, ModuleNotFoundError) and error.name == "triton":
            return "not installed"
        return f"does not load: {type(error).__name__}: {error}"


def facts() -> dict[str, Any]:
    """What is installed and built, and what is in use of it."""
    available = _C.available_isas()
    cuda = sys.modules.get("fastnn._C_cuda")
    return {
        "fastnn": f"{fastnn.__version__}, compiled by {_C.compiler} with torch {_C.torch_built_with}",
        "python": f"{platform.python_version()} on {sys.platform} {platform.machine()}",
        "torch": torch.__version__,
        "triton": triton_version(),
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


def reasons(backend: str, op: str) -> dict[torch.dtype, str | None]:
    """Per dtype why ``backend`` cannot serve ``op`` here; None if it can."""
    return {dtype: why_off(backend, op, device_of(backend), dtype) for dtype in DTYPES}


def table() -> dict[str, dict[str, str]]:
    """Per op and backend ``'available'``, or why not, or for which dtypes not."""

    def state(why: dict[torch.dtype, str | None]) -> str:
        off = {dtype: reason for dtype, reason in why.items() if reason is not None}
        if len(off) == len(why):
            return f"off: {next(iter(off.values()))}"
        return "; ".join(["available", *(f"off for {dtype}: {reason}" for dtype, reason in off.items())])

    return {op: {backend: state(reasons(backend, op)) for backend in KERNELS} for op in OPERATORS}


def markdown() -> str:
    """The registry as docs/backends.md shows it: what has kernels, whatever this machine has."""
    lines = ["| op | " + " | ".join(f"`{backend}`" for backend in KERNELS) + " |", "|---" * (len(KERNELS) + 1) + "|"]
    for op in OPERATORS:
        lines.append(f"| {op} | " + " | ".join("kernels" if op in KERNELS[b] else "" for b in KERNELS) + " |")
    lines.append("| on tensors of | " + " | ".join(", ".join(DEVICES[b]) for b in KERNELS) + " |")
    return "\n".join(lines)


# ---- the self-test: per op, results and gradients to be compared with native's in float64 ----
# The sizes are no multiples of any vector or block, and larger than one of them.

Draw = Callable[..., Tensor]


def _with_gradients(function: Callable[..., Tensor], draw: Draw, *inputs: Tensor) -> list[Tensor]:
    leaves = [t.requires_grad_() for t in inputs]
    output = function(*leaves)
    return [output, *torch.autograd.grad(output, leaves, draw(*output.shape))]


def _conv2d(draw: Draw) -> list[Tensor]:
    inputs = [draw(1, 20, 17, 13), draw(66, 20, 3, 3), draw(66)]  # wide enough for matrix units
    plain = _with_gradients(lambda x, w, b: F.conv2d(x, w, b, stride=(1, 2), padding=1), draw, *inputs)
    inputs = [draw(2, 3, 19, 23), draw(9, 1, 3, 3), draw(9)]
    pooled = _with_gradients(lambda x, w, b: F.conv2d_relu_max_pool2d(x, w, b, padding=1, groups=3), draw, *inputs)
    return plain + pooled


def _relu(draw: Draw) -> list[Tensor]:
    return _with_gradients(F.relu, draw, draw(3, 1001))


def _max_pool2d(draw: Draw) -> list[Tensor]:
    return _with_gradients(lambda x: F.max_pool2d(x, 3, 2, padding=1), draw, draw(2, 5, 19, 23))


def _cross_entropy(draw: Draw) -> list[Tensor]:
    def results(rows: int, classes: int, **options: Any) -> list[Tensor]:
        x = draw(rows, classes)
        target = torch.arange(rows, device=x.device) * 7 % classes
        return _with_gradients(lambda x: F.cross_entropy(x, target, **options), draw, x)

    return results(133, 35, reduction="none") + results(3, 5003, label_smoothing=0.1)


def _optimizer(cls: Callable[..., torch.optim.Optimizer], draw: Draw) -> list[Tensor]:
    params = [torch.nn.Parameter(draw(*shape)) for shape in ((5, 7), (2051,))]
    optimizer = cls(params)
    for _ in range(2):
        for p in params:
            p.grad = draw(*p.shape)
        optimizer.step()
    return [p.detach() for p in params]


SELF_TEST: dict[str, Callable[[Draw], list[Tensor]]] = {
    "conv2d": _conv2d,
    "relu": _relu,
    "max_pool2d": _max_pool2d,
    "cross_entropy": _cross_entropy,
    "adam": lambda draw: _optimizer(lambda p: fastnn.optim.Adam(p, lr=0.1, weight_decay=0.1, amsgrad=True), draw),
    "sgd": lambda draw: _optimizer(lambda p: fastnn.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True), draw),
}


def _drawing(values: torch.dtype, device: torch.device, dtype: torch.dtype) -> Draw:
    """A function that draws what a test in the dtype ``values`` is about, as tensors of this device and dtype: normal
    numbers in float64. In the others small whole numbers, whose products and sums float32 and TF32 hold exactly: so a
    convolution's results are rounded once, at their end, and max-pooling finds the same element everywhere."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        drawn = torch.randn(shape, generator=generator, dtype=torch.float64)
        return (drawn if values is torch.float64 else drawn.round()).to(device, dtype)

    return draw


def tolerance(dtype: torch.dtype) -> float:
    """How far a result may be from float64's, of the largest in its tensor: 16-bit results (a loss and then its
    gradient, a state and then its parameter) are rounded twice, the wider ones at every addition of a sum."""
    return torch.finfo(dtype).eps * (2 if dtype.itemsize == 2 else 32)


@contextmanager
def native_refused() -> Iterator[None]:
    """Inside the block the native counterpart of every op raises."""
    functions = [(torch.nn.functional, op) for op in ("conv2d", "relu", "max_pool2d", "cross_entropy")]
    places = [*functions, (torch.optim.Adam, "step"), (torch.optim.SGD, "step")]
    originals = [getattr(owner, name) for owner, name in places]

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("it went to native torch")

    for owner, name in places:
        setattr(owner, name, refuse)
    try:
        yield
    finally:
        for (owner, name), original in zip(places, originals, strict=True):
            setattr(owner, name, original)


def self_test(backend: str, op: str) -> str:
    """``'as native'``, or how ``backend`` differs from native PyTorch in ``op``, in a dtype that it serves."""
    cpu = torch.device("cpu")
    for dtype in [dtype for dtype, reason in reasons(backend, op).items() if reason is None]:
        try:
            with fastnn.backend("torch"):
                expected = SELF_TEST[op](_drawing(dtype, cpu, torch.float64))
            with fastnn.backend(backend), native_refused():
                results = SELF_TEST[op](_drawing(dtype, device_of(backend), dtype))
            for result, exact in zip(results, expected, strict=True):
                atol = tolerance(dtype) * exact.abs().max().item()
                torch.testing.assert_close(result.to(cpu, torch.float64), exact, rtol=0, atol=atol)
        except Exception as error:  # whatever a broken backend may do
            return f"DIFFERS in {dtype}: {type(error).__name__}: {str(error).strip().splitlines()[0]}"
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
        op: {backend: self_test(backend, op) for backend, state in states.items() if state.startswith("available")}
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
            result = f"; {tests[op][backend]}" if backend in tests[op] else ""
            print(f"{op:<15} {backend:<8} {state}{result}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
