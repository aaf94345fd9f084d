"""A whole optimizer step, Python included: few large parameters, many small ones, and the example program's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

import fastnn.optim
from benchmarks.harness import Case, Settings, Variant, graphed, ours_of, own, undo_steps

NATIVE = {"loop": {"foreach": False}, "foreach": {"foreach": True}, "fused": {"fused": True}}
# Steps as large as the parameters, so that a wrong one shows.
ARGUMENTS: dict[str, dict[str, Any]] = {"Adam": {"lr": 1e-2}, "SGD": {"lr": 1e-2, "momentum": 0.9}}
# What a step in a CUDA graph takes besides: Adam's counts its steps on the device.
IN_GRAPH: dict[str, dict[str, Any]] = {"Adam": {"capturable": True}, "SGD": {}}
# Tensors that a step reads or writes: parameter, moments or velocity both ways, and the gradient.
TENSORS_MOVED = {"Adam": 7, "SGD": 5}
FLOPS = {"Adam": 12, "SGD": 4}
EXAMPLE = ((32, 3, 3, 3), (32,), (64, 32, 3, 3), (64,), (128, 64 * 56 * 56), (128,), (10, 128), (10,))


@dataclass(frozen=True)
class Layer:
    optimizer: str
    what: str
    shapes: tuple[tuple[int, ...], ...]
    quick: bool = True

    @property
    def name(self) -> str:
        return f"{self.optimizer}, {self.what}"


LAYERS = [
    layer
    for optimizer in ARGUMENTS
    for layer in (
        Layer(optimizer, "4 of 4096²", ((4096, 4096),) * 4, quick=False),
        Layer(optimizer, "4 of 1024²", ((1024, 1024),) * 4),
        Layer(optimizer, "1000 of 256", ((256,),) * 1000),
        Layer(optimizer, "5000 of 64", ((64,),) * 5000),
        Layer(optimizer, "the example's parameters", EXAMPLE, quick=False),
    )
]


def layers(settings: Settings) -> list[Layer]:
    return [layer for layer in LAYERS if layer.quick or not settings.quick]


def stepper(
    kind: Callable[..., Any], values: list[Tensor], grads: list[Tensor], graph: bool = False, **arguments: Any
) -> Callable[[], Sequence[Tensor]]:
    """A function that steps parameters of its own and returns them; the gradients are the same every time. ``graph``:
    as a CUDA graph."""
    parameters = [torch.nn.Parameter(v.clone()) for v in values]
    for parameter, grad in zip(parameters, grads, strict=True):
        parameter.grad = grad
    optimizer = kind(parameters, **arguments)

    def run() -> Sequence[Tensor]:
        optimizer.step()
        return parameters

    return graphed(run, undo_steps(optimizer)) if graph else run


def cases(layer: Layer, dtype: torch.dtype, settings: Settings) -> Iterator[Case]:
    ours = own(layer.optimizer, fastnn.optim, torch.optim)
    theirs, arguments = getattr(torch.optim, layer.optimizer), ARGUMENTS[layer.optimizer]
    values = [(1e-2 * torch.randn(s, device=settings.device)).to(dtype) for s in layer.shapes]
    grads = [torch.randn(s, device=settings.device).to(dtype) for s in layer.shapes]
    elements = sum(v.numel() for v in values)
    reference = stepper(theirs, [v.double() for v in values], [g.double() for g in grads], **arguments)()

    variants = [Variant(name, stepper(theirs, values, grads, **arguments, **flags)) for name, flags in NATIVE.items()]
    for name, call in ours_of(layer.optimizer.lower(), lambda step: step(), settings).items():
        variants.append(Variant(name, partial(call, stepper(ours, values, grads, **arguments)), ours=True))
    if settings.device.type == "cuda":
        arguments = arguments | IN_GRAPH[layer.optimizer]
        for name in ("foreach", "fused"):
            step = stepper(theirs, values, grads, graph=True, **arguments, **NATIVE[name])
            variants.append(Variant(f"graph of {name}", step, graph=True))
        for name, call in ours_of(layer.optimizer.lower(), lambda step: step(), settings).items():
            if name == "fastnn cuda":  # Triton's steps take a table from the host: no graph
                step = stepper(ours, values, grads, graph=True, **arguments)
                variants.append(Variant(f"graph of {name}", partial(call, step), ours=True, graph=True))
    yield Case(
        suite="optim",
        layer=layer.name,
        pass_name="step",
        dtype=dtype,
        bound="bytes",
        flops=FLOPS[layer.optimizer] * elements,
        bytes=TENSORS_MOVED[layer.optimizer] * elements * values[0].element_size(),
        variants=variants,
        reference=[r.detach() for r in reference],
    )
