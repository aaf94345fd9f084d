"""What a call costs beside its arithmetic: each function on a tensor so small that nothing else takes time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as native

from benchmarks.harness import Case, Settings, Variant, functional, pass_function

PASSES = ("forward", "recorded forward", "forward+backward")


@dataclass(frozen=True)
class Layer:
    name: str
    shapes: tuple[tuple[int, ...], ...]  # of the arguments that have a gradient
    classes: int = 0  # of class indices, one a row, that follow them


LAYERS = [
    Layer("conv2d", ((1, 3, 8, 8), (4, 3, 3, 3), (4,))),
    Layer("relu", ((8,),)),
    Layer("cross_entropy", ((2, 10),), classes=10),
]


def layers(settings: Settings) -> list[Layer]:
    return LAYERS


def as_list(call: Callable[[], Tensor]) -> Sequence[Tensor]:
    return [call()]


def cases(layer: Layer, dtype: torch.dtype, settings: Settings) -> Iterator[Case]:
    arguments = [torch.randn(shape, device=settings.device).to(dtype) for shape in layer.shapes]
    rows = len(arguments[0])
    target = [torch.arange(rows, device=settings.device) % layer.classes] if layer.classes else []
    functions = {"eager": getattr(native, layer.name), "fastnn": functional(layer.name)}
    leaves = [a.double().requires_grad_() for a in arguments]
    output = functions["eager"](*leaves, *target)
    dy = torch.ones_like(output)
    exact = [output.detach(), *torch.autograd.grad(output, leaves, dy)]
    for pass_name in PASSES:
        variants = []
        run: Callable[[], Sequence[Tensor]]
        for name, function in functions.items():
            mine = [a.clone() for a in arguments]
            call = partial(function, *mine, *target)
            if pass_name == "recorded forward":  # the graph is made, and not walked
                for leaf in mine:
                    leaf.requires_grad_()
                run = partial(as_list, call)
            else:
                run = pass_function(pass_name, call, mine, [], dy.to(dtype))
            variants.append(Variant(name, run, ours=name == "fastnn"))
        yield Case(
            suite="overhead",
            layer=layer.name,
            pass_name=pass_name,
            dtype=dtype,
            bound="bytes",
            flops=0,
            bytes=sum(a.nbytes for a in arguments),
            variants=variants,
            reference=exact if pass_name == "forward+backward" else exact[:1],
        )
