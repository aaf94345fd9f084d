"""ReLU: new tensor and in place, at the sizes of an image network's activations and of a small hidden layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as native

from benchmarks.harness import Case, Settings, Variant, compiled, functional, ours_of, pass_function, with_graphs

# Tensors read or written by each pass: x -> y; dy, y -> dx.
TENSORS_MOVED = {"forward": 2, "backward": 3, "forward+backward": 5}


@dataclass(frozen=True)
class Layer:
    shape: tuple[int, ...]
    inplace: bool = False
    quick: bool = True

    @property
    def name(self) -> str:
        return "x".join(map(str, self.shape)) + (" in place" if self.inplace else "")


LAYERS = [
    Layer((64, 32, 224, 224), quick=False),
    Layer((16, 64, 112, 112)),
    Layer((16, 64, 112, 112), inplace=True),
    Layer((64, 128)),
]
GPU_LAYERS = [  # what would take minutes on a CPU
    Layer((256, 64, 128, 128), quick=False),
    Layer((256, 64, 128, 128), inplace=True, quick=False),
]


def layers(settings: Settings) -> list[Layer]:
    all_layers = LAYERS + GPU_LAYERS if settings.device.type == "cuda" else LAYERS
    return [layer for layer in all_layers if layer.quick or not settings.quick]


def functions(settings: Settings) -> dict[str, Callable[..., Tensor]]:
    """What is measured, by name."""
    result = {"eager": native.relu, **ours_of("relu", functional("relu"), settings)}
    if settings.compile_all or settings.device.type == "cuda":
        result["compiled"] = compiled(native.relu, settings)
    return result


def cases(layer: Layer, dtype: torch.dtype, settings: Settings) -> Iterator[Case]:
    x = torch.randn(layer.shape, device=settings.device).to(dtype)
    grad_output = torch.randn(layer.shape, device=settings.device).to(dtype)
    output = native.relu(x.double())
    grad = grad_output.double() * (x > 0)
    reference = {"forward": [output], "backward": [grad], "forward+backward": [output, grad]}
    if layer.inplace:
        reference = {"forward": [output]}

    measured = functions(settings)
    for pass_name, wanted in reference.items():
        variants = []
        for name, function in measured.items():
            mine = x.clone()
            forward = partial(function, mine, inplace=layer.inplace)
            run = pass_function(pass_name, forward, [mine], [], grad_output)
            variants.append(Variant(name, run, ours=name.startswith("fastnn")))
        moved = TENSORS_MOVED[pass_name] * x.numel()
        yield Case(
            suite="relu",
            layer=layer.name,
            pass_name=pass_name,
            dtype=dtype,
            bound="bytes",
            flops=x.numel(),
            bytes=moved * x.element_size(),
            variants=with_graphs(variants, pass_name, settings),
            reference=wanted,
        )
