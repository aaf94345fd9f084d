"""Adam and AdamW."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastnn.dispatch import log_once
from fastnn.optim.step import FusedStep, Numbers, states_of, updated


class Adam(FusedStep, torch.optim.Adam):
    """As :class:`torch.optim.Adam`: the same arguments, errors and ``state_dict``, interchangeable mid-training.

    A step is one pass over all the parameters of a group that have a gradient: float64, float32, bfloat16 or float16 on
    the CPU or a CUDA device, of any shape and strides, with state of the same dtype (16-bit types are updated in
    float32 and rounded once). ``foreach`` and ``fused`` choose nothing, except that ``fused=True`` makes
    :class:`torch.amp.GradScaler` leave the unscaling to the step, as in torch. Of a DTensor each process steps its own
    shard. Groups with other parameters or gradients (complex, sparse, on another device, of another tensor subclass),
    those whose betas lie in a device's memory, ``differentiable`` ones and, on the CPU, ``capturable`` ones are updated
    by torch. A compiled step follows ``lr``; each new value of another option compiles it anew, as it mostly does
    torch's: give ``OneCycleLR`` and ``CyclicLR`` ``cycle_momentum=False`` there.

    Raises:
        ValueError, TypeError, RuntimeError: what :class:`torch.optim.Adam` raises.
    """

    _op = "adam"
    _native = torch.optim.Adam

    def _update(self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor], numbers: Numbers) -> bool:
        lr, (beta1, beta2) = group["lr"], group["betas"]
        if group["foreach"] and any(isinstance(x, Tensor) for x in (lr, beta1, beta2)):
            log_once("adam", "of foreach=True with a tensor for lr or betas")  # which torch may refuse
            return False
        if any(isinstance(beta, Tensor) and not beta.is_cpu for beta in (beta1, beta2)):
            log_once("adam", "of betas in a device's memory")  # the kernels take them from the host, which would wait
            return False
        if torch.compiler.is_compiling():  # the compiler knows where these come from
            lists: list[list[Tensor]] = [[], [], [], [], [], []]
            self._init_group(group, *lists)
        else:
            states = states_of(self, params)
            if not all(states):
                self._init_group(group, [], [], [], [], [], [])
                states = states_of(self, params)
            lists = [
                params,
                grads,
                [s["exp_avg"] for s in states],
                [s["exp_avg_sq"] for s in states],
                [s["max_exp_avg_sq"] for s in states] if group["amsgrad"] else [],
                [s["step"] for s in states],
            ]
        options = (
            numbers.lr,
            float(beta1),
            float(beta2),
            float(group["weight_decay"]),
            float(group["eps"]),
            bool(group["amsgrad"]),
            bool(group["maximize"]),
            bool(group["decoupled_weight_decay"]),
            numbers.grad_scale,
        )
        return numbers.skipped or updated("adam", lists, options, numbers, self._known(group))


class AdamW(Adam, torch.optim.AdamW):
    """As :class:`torch.optim.AdamW`; what :class:`Adam` says of its kernels holds here.

    Raises:
        ValueError, TypeError, RuntimeError: what :class:`torch.optim.AdamW` raises.
    """
