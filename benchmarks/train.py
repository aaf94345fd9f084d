"""One whole training step of the example program: zero_grad, forward, loss, backward, Adam.

In a 16-bit dtype the parameters are float32 and the step is what AMP makes of it, native's and ours.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

import fastnn
import fastnn.nn
import fastnn.optim
from benchmarks.conv2d import LAYOUTS
from benchmarks.harness import Case, Settings, Variant, compiled, graphed, ours_of, own, undo_steps
from examples.compare import load_program

ADAM: dict[str, dict[str, Any]] = {"foreach": {"foreach": True}, "fused": {"fused": True}}
# fastnn's ways: layout, and whether `fastnn.convert` has been at the model.
OURS = {
    "imports changed": ("NCHW", False),
    "converted": ("NCHW", True),
    "converted, channels_last": ("channels_last", True),
}
CLASSES = 10


@dataclass(frozen=True)
class Layer:
    """The example's network on a batch of square images."""

    batch: int
    size: int = 224

    @property
    def name(self) -> str:
        return f"example program, batch {self.batch}"

    @property
    def flops(self) -> int:
        """Of a step: every layer forward and weight gradient, and input gradients of all but the first."""
        s = self.size
        first, second = 2 * 27 * 32 * s**2, 2 * 288 * 64 * (s // 2) ** 2
        linear = 2 * (64 * (s // 4) ** 2 * 128 + 128 * CLASSES)
        return self.batch * (2 * first + 3 * second + 3 * linear)

    @property
    def moved(self) -> int:
        """Elements a step must read or write: images and pooled activations forward and backward, and for each
        parameter its two reads, its gradient, and Adam's seven."""
        s = self.size
        activations = 32 * (s // 2) ** 2 + 64 * (s // 4) ** 2
        parameters = 64 * (s // 4) ** 2 * 128
        return self.batch * (2 * 3 * s**2 + 5 * activations) + 10 * parameters


def layers(settings: Settings) -> list[Layer]:
    if settings.quick:
        return [Layer(batch=16)]
    return [Layer(batch=batch) for batch in ((64, 256) if settings.device.type == "cuda" else (64,))]


def in_layout(model: torch.nn.Module, layout: str) -> torch.nn.Module:
    return model.to(memory_format=LAYOUTS[layout])  # type: ignore[call-overload]


def stepper(
    model: torch.nn.Module,
    forward: Callable[[Tensor], Tensor],
    criterion: Callable[[Tensor, Tensor], Tensor],
    optimizer: torch.optim.Optimizer,
    images: Tensor,
    target: Tensor,
    amp: torch.dtype | None = None,
    graph: bool = False,
) -> Callable[[], Sequence[Tensor]]:
    """A function that takes one training step and returns the loss and every gradient. ``graph``: as a CUDA graph."""

    def run() -> Sequence[Tensor]:
        optimizer.zero_grad()
        with torch.autocast(images.device.type, amp, enabled=amp is not None):
            loss = criterion(forward(images), target)
        loss.backward()
        optimizer.step()
        return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]

    return graphed(run, undo_steps(optimizer)) if graph else run


def in_float64(model: torch.nn.Module, images: Tensor, target: Tensor) -> list[Tensor]:
    """Loss and gradients of the whole batch, summed over slices of it to save memory."""
    model = copy.deepcopy(model).double()
    loss = torch.zeros((), dtype=torch.float64, device=images.device)
    for x, t in zip(images.split(8), target.split(8), strict=True):
        part = torch.nn.functional.cross_entropy(model(x.double()), t, reduction="sum") / len(images)
        part.backward()
        loss += part.detach()
    return [loss, *(p.grad for p in model.parameters() if p.grad is not None)]


def cases(layer: Layer, dtype: torch.dtype, settings: Settings) -> Iterator[Case]:
    for name in ("Conv2d", "ReLU", "CrossEntropyLoss"):
        own(name, fastnn.nn, torch.nn)
    our_adam, convert = own("Adam", fastnn.optim, torch.optim), own("convert", fastnn, torch)
    amp = dtype if dtype in (torch.bfloat16, torch.float16) else None
    stored = torch.float32 if amp else dtype
    images = torch.randn(layer.batch, 3, layer.size, layer.size, device=settings.device).to(stored)
    target = torch.randint(CLASSES, (layer.batch,), device=settings.device)
    initial = load_program(native=True).CNN(layer.size, CLASSES).to(settings.device, stored)
    program = load_program(native=False)
    reference = in_float64(initial, images, target)

    def native(layout: str, adam: str, compile_it: bool, graph: bool = False) -> Callable[[], Sequence[Tensor]]:
        model = in_layout(copy.deepcopy(initial), layout)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, capturable=graph, **ADAM[adam])
        forward = compiled(model, settings) if compile_it else model
        x = images.contiguous(memory_format=LAYOUTS[layout])
        return stepper(model, forward, torch.nn.CrossEntropyLoss(), optimizer, x, target, amp, graph)

    def ours(layout: str, converted: bool, graph: bool = False) -> Callable[[], Sequence[Tensor]]:
        model = in_layout(program.CNN(layer.size, CLASSES).to(settings.device, stored), layout)
        model.load_state_dict(initial.state_dict())
        if converted:
            convert(model)
        optimizer = our_adam(model.parameters(), lr=1e-3, capturable=graph)
        x = images.contiguous(memory_format=LAYOUTS[layout])
        return stepper(model, model, fastnn.nn.CrossEntropyLoss(), optimizer, x, target, amp, graph)

    variants = [
        Variant(f"eager {layout}, {adam}", native(layout, adam, compile_it=False))
        for layout in LAYOUTS
        for adam in ADAM
    ]
    variants += [Variant(f"compiled {layout}, fused", native(layout, "fused", compile_it=True)) for layout in LAYOUTS]
    if settings.device.type == "cuda":
        variants += [
            Variant(f"graph of {how} {layout}, fused", native(layout, "fused", compile_it, graph=True), graph=True)
            for how, compile_it in (("eager", False), ("compiled", True))
            for layout in LAYOUTS
        ]
    for name, call in ours_of("conv2d", lambda step: step(), settings).items():
        variants += [Variant(f"{name}, {how}", partial(call, ours(*way)), ours=True) for how, way in OURS.items()]
        if name == "fastnn cuda":  # Triton's Adam takes a table from the host: no graph
            variants += [
                Variant(f"graph of {name}, {how}", partial(call, ours(*way, graph=True)), ours=True, graph=True)
                for how, way in OURS.items()
            ]
    yield Case(
        suite="train",
        layer=layer.name,
        pass_name="step",
        dtype=dtype,
        bound="flops",
        flops=layer.flops,
        bytes=layer.moved * images.element_size(),
        variants=variants,
        reference=reference,
    )
