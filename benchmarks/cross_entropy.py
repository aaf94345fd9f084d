"""Cross-entropy with class indices: vocabularies of language models, ImageNet's classes, and a few digits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as native

from benchmarks.harness import Case, Settings, Variant, compiled, functional, ours_of, pass_function, with_graphs

# Times the logits must cross memory: read for the loss; read, and the gradient written.
LOGITS_MOVED = {"forward": 1, "backward": 2, "forward+backward": 3}


@dataclass(frozen=True)
class Layer:
    rows: int
    classes: int
    quick: bool = True

    @property
    def name(self) -> str:
        return f"{self.rows}x{self.classes}"


LAYERS = [
    Layer(4096, 32000, quick=False),
    Layer(1024, 128256, quick=False),
    Layer(512, 32000),
    Layer(256, 1000),
    Layer(8192, 10),
    Layer(64, 10),
]
GPU_LAYERS = [Layer(8192, 128256, quick=False)]  # what would take minutes on a CPU


def layers(settings: Settings) -> list[Layer]:
    all_layers = LAYERS + GPU_LAYERS if settings.device.type == "cuda" else LAYERS
    return [layer for layer in all_layers if layer.quick or not settings.quick]


def in_float64(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Mean loss and gradient, a block of rows at a time: the large shapes would take gigabytes at once."""
    loss = logits.new_zeros((), dtype=torch.float64)
    grad = torch.empty(logits.shape, dtype=torch.float64, device=logits.device)
    block = max(1, (1 << 22) // logits.shape[1])
    for begin in range(0, len(logits), block):
        rows = slice(begin, begin + block)
        x = logits[rows].double().requires_grad_()
        part = native.cross_entropy(x, target[rows], reduction="sum") / len(logits)
        (grad[rows],) = torch.autograd.grad(part, x)
        loss += part.detach()
    return loss, grad


def functions(settings: Settings) -> dict[str, Callable[..., Tensor]]:
    """What is measured, by name."""
    result = {"eager": native.cross_entropy, **ours_of("cross_entropy", functional("cross_entropy"), settings)}
    if settings.compile_all or settings.device.type == "cuda":
        result["compiled"] = compiled(native.cross_entropy, settings)
    return result


def cases(layer: Layer, dtype: torch.dtype, settings: Settings) -> Iterator[Case]:
    logits = (2 * torch.randn(layer.rows, layer.classes, device=settings.device)).to(dtype)
    target = torch.randint(layer.classes, (layer.rows,), device=settings.device)
    grad_output = torch.ones((), dtype=dtype, device=settings.device)
    loss, grad = in_float64(logits, target)
    reference = {"forward": [loss], "backward": [grad], "forward+backward": [loss, grad]}

    measured = functions(settings)
    for pass_name, wanted in reference.items():
        variants = []
        for name, function in measured.items():
            mine = logits.detach()  # the same memory, with a requires_grad of its own
            run = pass_function(pass_name, partial(function, mine, target), [mine], [], grad_output)
            variants.append(Variant(name, run, ours=name.startswith("fastnn")))
        yield Case(
            suite="cross_entropy",
            layer=layer.name,
            pass_name=pass_name,
            dtype=dtype,
            bound="bytes",
            flops=4 * logits.numel() * LOGITS_MOVED[pass_name],
            bytes=LOGITS_MOVED[pass_name] * logits.numel() * logits.element_size(),
            variants=with_graphs(variants, pass_name, settings),
            reference=wanted,
        )
