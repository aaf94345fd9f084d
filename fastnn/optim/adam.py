"""Adam and AdamW."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastnn.dispatch import _C, log_once
from fastnn.optim.step import kernels_wanted, native_step, params_and_grads, states_of, updated


class Adam(torch.optim.Adam):
    """As :class:`torch.optim.Adam`: the same arguments, errors and ``state_dict``, interchangeable mid-training.

    A step is one pass over all the parameters of a group that have a gradient: float64, float32, bfloat16 or float16 on
    the CPU, of any shape and strides, with state of the same dtype (16-bit types are updated in float32 and rounded
    once). ``foreach`` and ``fused`` choose nothing, except that ``fused=True`` makes :class:`torch.amp.GradScaler`
    leave the unscaling to the step, as in torch. Groups with other parameters or gradients (complex, sparse, on another
    device, of a tensor subclass), ``capturable`` and ``differentiable`` ones are updated by torch.

    Raises:
        ValueError, TypeError, RuntimeError: what :class:`torch.optim.Adam` raises.
    """

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step. ``closure`` reevaluates the model and returns the loss, which is returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            if not self._fused_step(group):
                native_step(torch.optim.Adam, self, group)
        return loss

    def _fused_step(self, group: dict[str, Any]) -> bool:
        if not kernels_wanted("adam"):
            return False
        if group["capturable"] or group["differentiable"]:
            log_once("adam", "of capturable or differentiable")
            return False
        lr, (beta1, beta2) = group["lr"], group["betas"]
        if group["foreach"] and any(isinstance(x, Tensor) for x in (lr, beta1, beta2)):
            return False  # an error of torch's
        params, grads = params_and_grads(group)
        if not params:
            return True
        states = states_of(self, params)
        if not all(states):
            self._init_group(group, [], [], [], [], [], [])
            states = states_of(self, params)
        if bool(getattr(self, "found_inf", None) or 0):  # any number but 0
            return True
        grad_scale = getattr(self, "grad_scale", None)
        return updated(
            "adam",
            _C.adam_,
            params,
            grads,
            [s["exp_avg"] for s in states],
            [s["exp_avg_sq"] for s in states],
            [s["max_exp_avg_sq"] for s in states] if group["amsgrad"] else [],
            [s["step"] for s in states],
            float(lr),
            float(beta1),
            float(beta2),
            float(group["weight_decay"]),
            float(group["eps"]),
            bool(group["amsgrad"]),
            bool(group["maximize"]),
            bool(group["decoupled_weight_decay"]),
            None if grad_scale is None else float(grad_scale),
        )


class AdamW(Adam, torch.optim.AdamW):
    """As :class:`torch.optim.AdamW`; what :class:`Adam` says of its kernels holds here.

    Raises:
        ValueError, TypeError, RuntimeError: what :class:`torch.optim.AdamW` raises.
    """
