"""The loss modules on fastnn's kernels."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.jit import is_scripting  # type: ignore[attr-defined]

from fastnn.nn import functional as F
from fastnn.nn.layers import named


class CrossEntropyLoss(torch.nn.CrossEntropyLoss):
    """Cross-entropy between logits and class indices or class probabilities. As :class:`torch.nn.CrossEntropyLoss`:
    the same arguments, state_dict and results, computed by :func:`fastnn.nn.functional.cross_entropy`."""

    _native_forward = named("_native_forward", torch.nn.CrossEntropyLoss.forward)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        if not is_scripting():
            return F.cross_entropy(
                input,
                target,
                weight=self.weight,
                ignore_index=self.ignore_index,
                reduction=self.reduction,
                label_smoothing=self.label_smoothing,
            )
        return self._native_forward(input, target)
