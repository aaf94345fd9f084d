"""Convolution: the layers that image networks are made of, alone and with the ReLU and max-pool that follow them.

A row is fastnn in one layout; what it is compared with is native PyTorch in the better of both layouts, its tensors
converted ahead of time at no cost.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as native

from benchmarks.harness import Case, Settings, Variant, compiled, functional, ours_of, pass_function, with_graphs

LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
Fusion = Literal["", "relu", "relu+pool"]
OURS: dict[Fusion, str] = {"": "conv2d", "relu": "conv2d_relu", "relu+pool": "conv2d_relu_max_pool2d"}


@dataclass(frozen=True)
class Layer:
    """A convolution of ``batch`` square images with bias. The batch keeps a native pass below 0.3 s on two cores."""

    in_channels: int
    out_channels: int
    size: int
    kernel: int
    batch: int = 16
    stride: int = 1
    padding: int | None = None  # None: half the kernel
    groups: int = 1
    fusion: Fusion = ""
    quick: bool = False
    network: str = ""

    @property
    def pad(self) -> int:
        return self.kernel // 2 if self.padding is None else self.padding

    @property
    def out_size(self) -> int:
        return (self.size + 2 * self.pad - self.kernel) // self.stride + 1

    @property
    def name(self) -> str:
        kind = "depthwise " if self.groups == self.in_channels > 1 else f"{self.groups} groups " * (self.groups > 1)
        stride = f" s{self.stride}" if self.stride > 1 else ""
        channels = f"{self.in_channels}→{self.out_channels}@{self.size}"
        network, fusion = f"{self.network} " * bool(self.network), f" +{self.fusion}" * bool(self.fusion)
        return f"{network}{kind}{self.kernel}x{self.kernel}{stride} {channels}{fusion}"

    @property
    def flops(self) -> int:
        """Of one pass: forward, gradient of the input or gradient of the weight."""
        taps = self.kernel**2 * self.in_channels // self.groups
        return 2 * taps * self.batch * self.out_channels * self.out_size**2

    def moved(self, pass_name: str) -> int:
        """Elements a pass must read or write: input, weight and output, each once."""
        x = self.batch * self.in_channels * self.size**2
        w = self.kernel**2 * self.in_channels // self.groups * self.out_channels
        out = self.out_size // 2 if self.fusion == "relu+pool" else self.out_size
        y = self.batch * self.out_channels * out**2
        backward = x + w + y + (x + w)  # reads x, w, dy; writes dx, dw
        return {"backward": backward, "forward+backward": x + w + y + backward}.get(pass_name, x + w + y)


LAYERS = [
    Layer(64, 64, 56, 3, quick=True),
    Layer(128, 128, 28, 3),
    Layer(256, 256, 14, 3),
    Layer(512, 512, 7, 3),
    Layer(32, 64, 112, 3),
    Layer(3, 32, 224, 3),
    Layer(3, 64, 224, 7, stride=2),
    Layer(64, 256, 56, 1),
    Layer(256, 64, 56, 1),
    Layer(256, 1024, 14, 1, quick=True),
    Layer(144, 144, 56, 3, groups=144, quick=True),
    Layer(144, 144, 56, 3, groups=144, stride=2),
    Layer(128, 128, 56, 3, groups=32, quick=True),
    Layer(20, 50, 12, 5, batch=64, padding=0),
    Layer(1, 32, 28, 5, batch=64, quick=True),
    Layer(64, 64, 56, 3, fusion="relu"),
    Layer(64, 256, 56, 1, fusion="relu"),
    Layer(144, 144, 56, 3, groups=144, fusion="relu"),
    Layer(3, 32, 224, 3, fusion="relu+pool", quick=True),
    Layer(32, 64, 112, 3, fusion="relu+pool"),
    Layer(1, 32, 28, 5, batch=64, fusion="relu+pool"),
]

# ResNet-50's convolutions, each kind once: channels in and out, size, kernel and stride.
RESNET50 = [
    (3, 64, 224, 7, 2),
    *[(64, 64, 56, 1, 1), (64, 64, 56, 3, 1), (64, 256, 56, 1, 1), (256, 64, 56, 1, 1)],
    *[(256, 128, 56, 1, 1), (128, 128, 56, 3, 2), (256, 512, 56, 1, 2), (128, 512, 28, 1, 1), (512, 128, 28, 1, 1)],
    *[(128, 128, 28, 3, 1), (512, 256, 28, 1, 1), (256, 256, 28, 3, 2), (512, 1024, 28, 1, 2), (256, 1024, 14, 1, 1)],
    *[(1024, 256, 14, 1, 1), (256, 256, 14, 3, 1), (1024, 512, 14, 1, 1), (512, 512, 14, 3, 2), (1024, 2048, 14, 1, 2)],
    *[(512, 2048, 7, 1, 1), (2048, 512, 7, 1, 1), (512, 512, 7, 3, 1)],
]
FUSIONS: tuple[Fusion, ...] = ("", "relu")
GPU_LAYERS = [  # at a batch that fills a GPU
    Layer(c, k, size, kernel, batch=64, stride=stride, fusion=fusion, network="ResNet-50")
    for fusion in FUSIONS
    for c, k, size, kernel, stride in RESNET50
]


def layers(settings: Settings) -> list[Layer]:
    if settings.quick:
        return [replace(layer, batch=layer.batch // 4) for layer in LAYERS if layer.quick]
    if settings.device.type == "cuda":
        others = [replace(layer, batch=64, quick=False) for layer in LAYERS]
        return [*GPU_LAYERS, *(layer for layer in others if replace(layer, network="ResNet-50") not in GPU_LAYERS)]
    return LAYERS


def native_call(layer: Layer) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def call(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        y = native.conv2d(x, w, b, layer.stride, layer.pad, 1, layer.groups)
        if layer.fusion:
            y = native.relu(y)
        return native.max_pool2d(y, 2) if layer.fusion == "relu+pool" else y

    return call


def our_call(layer: Layer) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    function = functional(OURS[layer.fusion])
    return lambda x, w, b: function(x, w, b, layer.stride, layer.pad, 1, layer.groups)


def calls(layer: Layer, settings: Settings) -> dict[str, tuple[str, Callable[..., Tensor]]]:
    """What is measured, by name: its layout, and the call."""
    result = {}
    ours = ours_of("conv2d", our_call(layer), settings)
    for layout in LAYOUTS:
        result[f"eager {layout}"] = layout, native_call(layer)
        result |= {f"{name} {layout}": (layout, call) for name, call in ours.items()}
    # A compiled backward computes every gradient, whatever is asked for: those passes are left out.
    if settings.compile_all or layer.fusion == "relu+pool":
        result |= {f"compiled {layout}": (layout, compiled(native_call(layer), settings)) for layout in LAYOUTS}
    return result


def in_float64(
    layer: Layer, x: Tensor, w: Tensor, b: Tensor, grad_output: Callable[[Tensor], Tensor]
) -> tuple[Tensor, ...]:
    """Output, gradients of input, weight and bias, and the output gradient they belong to."""
    leaves = [t.double().requires_grad_() for t in (x, w, b)]
    output = native_call(layer)(*leaves)
    dy = grad_output(output)
    return (output.detach(), *torch.autograd.grad(output, leaves, dy.double()), dy)


def cases(layer: Layer, dtype: torch.dtype, settings: Settings) -> Iterator[Case]:
    fan_in = layer.kernel**2 * layer.in_channels // layer.groups
    x = torch.randn(layer.batch, layer.in_channels, layer.size, layer.size, device=settings.device).to(dtype)
    w = torch.randn(layer.out_channels, layer.in_channels // layer.groups, layer.kernel, layer.kernel)
    w = (w / fan_in**0.5).to(settings.device, dtype)
    b = torch.randn(layer.out_channels, device=settings.device).to(dtype)
    y, dx, dw, db, grad_output = in_float64(layer, x, w, b, lambda output: torch.randn_like(output).to(dtype))
    reference = {
        "forward": [y],
        "grad_input": [dx],
        "grad_weight": [dw, db],
        "backward": [dx, dw, db],
        "forward+backward": [y, dx, dw, db],
    }
    if settings.quick:
        reference = {name: reference[name] for name in ("forward", "backward", "forward+backward")}

    measured = calls(layer, settings)
    for pass_name, wanted in reference.items():
        variants = []
        for name, (layout, call) in measured.items():
            if name.startswith("compiled") and pass_name in ("grad_input", "grad_weight"):
                continue
            mine = [t.clone(memory_format=LAYOUTS[layout]) for t in (x, w)] + [b.clone()]
            dy = grad_output.contiguous(memory_format=LAYOUTS[layout])
            run = pass_function(pass_name, partial(call, *mine), mine[:1], mine[1:], dy)
            variants.append(Variant(name, run, ours=name.startswith("fastnn")))
        yield Case(
            suite="conv2d",
            layer=layer.name,
            pass_name=pass_name,
            dtype=dtype,
            bound="flops",
            flops=layer.flops * {"backward": 2, "forward+backward": 3}.get(pass_name, 1),
            bytes=layer.moved(pass_name) * x.element_size(),
            variants=with_graphs(variants, pass_name, settings),
            reference=wanted,
        )
