"""Max-pooling of an image network's activations, in both memory formats."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as native

from benchmarks.conv2d import LAYOUTS
from benchmarks.harness import Case, Settings, Variant, compiled, functional, ours_of, pass_function, with_graphs


@dataclass(frozen=True)
class Layer:
    channels: int
    size: int
    window: tuple[int, int, int] = (2, 2, 0)  # kernel_size, stride, padding
    batch: int = 64
    quick: bool = True

    @property
    def name(self) -> str:
        kernel, stride, _ = self.window
        return f"{kernel}x{kernel} s{stride} {self.channels}@{self.size}"


LAYERS = [
    Layer(32, 224, quick=False),
    Layer(64, 112, quick=False),
    Layer(64, 112, (3, 2, 1), batch=16),
    Layer(256, 14, batch=16),
]


def layers(settings: Settings) -> list[Layer]:
    return [layer for layer in LAYERS if layer.quick or not settings.quick]


def cases(layer: Layer, dtype: torch.dtype, settings: Settings) -> Iterator[Case]:
    x = torch.randn(layer.batch, layer.channels, layer.size, layer.size, device=settings.device).to(dtype)
    leaf = x.double().requires_grad_()
    output = native.max_pool2d(leaf, *layer.window)
    grad_output = torch.randn_like(output).to(dtype)
    (grad,) = torch.autograd.grad(output, leaf, grad_output.double())
    output = output.detach()
    reference = {"forward": [output], "backward": [grad], "forward+backward": [output, grad]}

    functions: dict[str, Callable[..., Tensor]] = {"eager": native.max_pool2d}
    functions |= ours_of("max_pool2d", functional("max_pool2d"), settings)
    if settings.compile_all:
        functions["compiled"] = compiled(native.max_pool2d, settings)
    moved = {"forward": x.numel() + output.numel(), "backward": x.numel() + output.numel()}
    moved["forward+backward"] = sum(moved.values())
    for pass_name, wanted in reference.items():
        variants = []
        for layout, memory_format in LAYOUTS.items():
            for name, function in functions.items():
                mine, dy = (t.clone(memory_format=memory_format) for t in (x, grad_output))
                run = pass_function(pass_name, partial(function, mine, *layer.window), [mine], [], dy)
                variants.append(Variant(f"{name} {layout}", run, ours=name.startswith("fastnn")))
        yield Case(
            suite="max_pool2d",
            layer=layer.name,
            pass_name=pass_name,
            dtype=dtype,
            bound="bytes",
            flops=x.numel(),
            bytes=moved[pass_name] * x.element_size(),
            variants=with_graphs(variants, pass_name, settings),
            reference=wanted,
        )
