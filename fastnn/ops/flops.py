"""What ``torch.utils.flop_counter`` counts for the convolutions: as much as for torch's."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

import torch

from fastnn import dispatch as dispatch  # registers the operators
from fastnn.ops.conv2d import output_size

COUNTER = "torch.utils.flop_counter"


def register(counter: Any) -> None:
    ops, formulas = torch.ops.fastnn, counter.flop_registry

    @counter.register_flop_formula([ops.conv2d, ops.conv2d_relu_max_pool2d])
    def forward(input: Any, weight: Any, bias: Any, *geometry: Any, out_shape: Any, **kwargs: Any) -> int:
        size = [input[0], weight[0], *output_size(input, weight, *geometry[:3])]
        return formulas[torch.ops.aten.convolution](input, weight, bias, *[None] * 3, False, out_val=size)

    @counter.register_flop_formula(ops.conv2d_backward)
    def backward(
        grad: Any, input: Any, weight: Any, relu: Any, code: Any, *options: Any, out_shape: Any, **kwargs: Any
    ) -> int:
        size = [input[0], weight[0], *output_size(input, weight, *options[:3])]
        arguments = (size, input, weight, *[None] * 4, False, None, None, options[-1])
        return formulas[torch.ops.aten.convolution_backward](*arguments, out_val=out_shape)


class _WhenImported(MetaPathFinder):
    """Registers the formulas when torch's counter is imported, which takes as long as all of fastnn."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        spec: Any = PathFinder.find_spec(fullname, path) if fullname == COUNTER else None
        if spec is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                register(module)

            spec.loader.exec_module = exec_module
        return spec


if COUNTER in sys.modules:
    register(sys.modules[COUNTER])
else:
    sys.meta_path.insert(0, _WhenImported())
