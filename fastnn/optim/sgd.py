"""SGD."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.sgd import sgd as native_sgd

from fastnn.optim.step import FusedStep, Numbers, states_of, updated


class SGD(FusedStep, torch.optim.SGD):
    """As :class:`torch.optim.SGD`: the same arguments, errors and ``state_dict``, interchangeable mid-training, and one
    keyword more.

    A step is one pass over all the parameters of a group that have a gradient: float64, float32, bfloat16 or float16 on
    the CPU or a CUDA device, of any shape and strides, with buffers of the same dtype (16-bit types are updated in
    float32 and rounded once). ``foreach`` and ``fused`` choose nothing, except that ``fused=True`` makes
    :class:`torch.amp.GradScaler` leave the unscaling to the step, as in torch. Of a DTensor each process steps its own
    shard. Groups with other parameters or gradients (complex, sparse, on another device, of another tensor subclass)
    and ``differentiable`` ones are updated by torch. A compiled step follows ``lr``, and each new value of another
    option compiles it anew, as for :class:`Adam`.

    Args:
        lr_in_velocity: ``True`` gives the classical form ``v = momentum * v - lr * g; p = p + v`` (first step:
            ``v = -lr * g``; dampening, weight decay, maximize and nesterov act on ``g`` and ``v`` as they do in torch's
            form, ``b = momentum * b + g; p = p - lr * b``). At a constant ``lr`` both give the same parameters; when
            ``lr`` changes, the velocity keeps the steps it has already taken in. ``momentum_buffer`` holds ``v``, that
            is ``-lr`` times torch's ``b``: to carry a state from one form to the other, multiply or divide by
            ``-lr``. The keyword is a group option and is saved with the others; a state_dict of
            :class:`torch.optim.SGD` has no such option, and loading it sets the form its buffers are in, ``False``.

    Raises:
        ValueError, TypeError, RuntimeError: what :class:`torch.optim.SGD` raises.
    """

    _op = "sgd"
    _native = torch.optim.SGD

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float | Tensor = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        lr_in_velocity: bool = False,
    ) -> None:
        super().__init__(
            params,
            lr,
            momentum,
            dampening,
            weight_decay,
            nesterov,
            maximize=maximize,
            foreach=foreach,
            differentiable=differentiable,
            fused=fused,
        )
        self.defaults["lr_in_velocity"] = lr_in_velocity
        for group in self.param_groups:
            group.setdefault("lr_in_velocity", lr_in_velocity)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.defaults.setdefault("lr_in_velocity", False)
        for group in self.param_groups:
            group.setdefault("lr_in_velocity", False)

    def _update(self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor], numbers: Numbers) -> bool:
        buffers: list[Tensor | None] = []
        first_steps: list[int] = []
        if group["momentum"] != 0:
            states = states_of(self, params)
            buffers = [s.get("momentum_buffer") for s in states]
            first_steps = [i for i, b in enumerate(buffers) if b is None]
        # The device may skip this step, and the host not know: to its kernels a buffer of -0 says that none was made.
        may_skip = any(number is not None for number in numbers.on_device[2:])
        if not numbers.skipped:
            for i in first_steps:
                buffers[i] = torch.full_like(params[i], -0.0) if may_skip else torch.empty_like(params[i])
            options = (
                [] if may_skip else first_steps,
                numbers.lr,
                float(group["momentum"]),
                float(group["dampening"]),
                float(group["weight_decay"]),
                bool(group["nesterov"]),
                bool(group["maximize"]),
                bool(group["lr_in_velocity"]),
                numbers.grad_scale,
            )
            if not updated("sgd", [params, grads, buffers], options, numbers, self._known(group)):
                return False
        for i in first_steps:
            self.state[params[i]]["momentum_buffer"] = buffers[i]
        return True

    def _native_step(self, group: dict[str, Any]) -> None:
        if group["lr_in_velocity"]:
            self._native_step_with_lr_in_velocity(group)
        else:
            super()._native_step(group)

    def _native_step_with_lr_in_velocity(self, group: dict[str, Any]) -> None:
        """torch's step at lr -1 with every gradient times -lr is v = momentum v - lr g, p = p + v."""
        params: list[Tensor] = []
        grads: list[Tensor] = []
        buffers: list[Tensor | None] = []
        has_sparse_grad = self._init_group(group, params, grads, buffers)
        with torch.set_grad_enabled(group["differentiable"]):
            native_sgd(
                params,
                [g * -group["lr"] for g in grads],
                buffers,
                weight_decay=-group["lr"] * group["weight_decay"],
                momentum=group["momentum"],
                lr=-1.0,
                dampening=group["dampening"],
                nesterov=group["nesterov"],
                maximize=group["maximize"],
                has_sparse_grad=has_sparse_grad,
                foreach=group["foreach"],
                fused=group["fused"],
                grad_scale=getattr(self, "grad_scale", None),
                found_inf=getattr(self, "found_inf", None),
            )
        if group["momentum"] != 0:
            for p, buffer in zip(params, buffers, strict=True):
                self.state[p]["momentum_buffer"] = buffer
