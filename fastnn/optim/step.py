"""The step that the optimizers share: each group by the kernels, or by torch where these do not take it."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from fastnn.dispatch import _C, LIBRARIES, choice, log_once, use_kernels
from fastnn.ops.autograd import run


class Numbers(NamedTuple):
    """What a step is told by numbers that may be tensors. Kernels that run on the parameters' device read them there,
    so that the host need not wait."""

    lr: float | Tensor
    grad_scale: float | Tensor | None
    found_inf: float | Tensor | None

    def on_host(self) -> Numbers:
        """The same without tensors."""
        lr, *others = self
        return Numbers(float(lr), *(None if x is None else float(x) for x in others))

    def on_device(self, device: torch.device) -> list[Tensor | None]:
        """Those that are tensors there."""
        return [x if isinstance(x, Tensor) and x.device == device else None for x in self]

    @property
    def skip(self) -> bool:
        """Whether the host knows that the step is to be left out: found_inf is any number but 0."""
        return not isinstance(self.found_inf, Tensor) and bool(self.found_inf or 0)


class FusedStep(torch.optim.Optimizer):
    """The first base of an optimizer on the kernels, before the torch class whose step it replaces."""

    _op: ClassVar[str]
    _native: ClassVar[type[torch.optim.Optimizer]]

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step. ``closure`` reevaluates the model and returns the loss, which is returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            if not self._fused_step(group):
                self._native_step(group)
        return loss

    def _fused_step(self, group: dict[str, Any]) -> bool:
        """Whether the kernels made the group's step; where not, nothing has changed."""
        if torch.compiler.is_compiling():
            return False
        params, grads = params_and_grads(group)
        if not use_kernels(self._op, *params[:1]):  # of the others the kernels themselves say whether they take them
            return False
        if torch._C._len_torch_dispatch_stack() > 0:  # the kernels are called past the dispatcher
            log_once(self._op, "of an active TorchDispatchMode")
            return False
        if not params:
            return True
        on_device = library_of(self._op, params) not in (None, _C)
        for option in ("differentiable",) if on_device else ("capturable", "differentiable"):
            if group.get(option):
                log_once(self._op, f"of {option}=True")
                return False
        if on_device:
            # torch's own step asks this first; 2.13 has renamed it.
            getattr(self, "_accelerator_graph_capture_health_check", self._cuda_graph_capture_health_check)()
        numbers = Numbers(group["lr"], getattr(self, "grad_scale", None), getattr(self, "found_inf", None))
        return self._update(group, params, grads, numbers if on_device else numbers.on_host())

    def _update(self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor], numbers: Numbers) -> bool:
        """`_fused_step` of a group that the kernels may take."""
        raise NotImplementedError

    def _native_step(self, group: dict[str, Any]) -> None:
        """torch's own step of one group. The hooks around ``step`` have run already, so they are peeled off."""
        step: Any = self._native.step
        if getattr(step, "hooked", False):
            step = step.__wrapped__
        groups = self.param_groups
        self.param_groups = [group]
        try:
            step(self)
        finally:
            self.param_groups = groups


def params_and_grads(group: dict[str, Any]) -> tuple[list[Tensor], list[Tensor]]:
    """The group's parameters that have a gradient, and their gradients."""
    all_grads = [p.grad for p in group["params"]]
    grads = [g for g in all_grads if g is not None]
    if len(grads) == len(all_grads):
        return list(group["params"]), grads
    return [p for p, g in zip(group["params"], all_grads, strict=True) if g is not None], grads


def states_of(optimizer: torch.optim.Optimizer, params: list[Tensor]) -> list[dict[str, Any]]:
    """The parameters' states; for one that has none yet an empty dict, which is not stored."""
    state = optimizer.state
    # A look-up hashes, in Python, the tensor. Mostly the states lie in the parameters' order and need none.
    if len(state) == len(params) and all(map(operator.is_, state, params)):
        return list(state.values())
    return [state.get(p, {}) for p in params]


def library_of(op: str, params: list[Tensor]) -> Any:
    """The module of compiled kernels that serves these parameters, or None."""
    return LIBRARIES.get(choice(op, params[0].device.type)[0])


def updated(op: str, lists: list[Any], numbers: Numbers, *args: Any) -> bool:
    """Runs the operator of ``op`` on ``lists``, the parameters and gradients first, ``numbers.lr`` and ``args``. False
    where its kernels do not take one of the tensors: nothing has changed then."""
    params, grads, *_ = lists
    library = library_of(op, params)
    tensors = [None] * 3 if library in (None, _C) else numbers.on_device(params[0].device)
    lr, grad_scale, _ = (None if t is not None else x for x, t in zip(numbers, tensors, strict=True))
    call = [*lists, float(lr or 0), *args, None if grad_scale is None else float(grad_scale)]
    refusals = (_C.NotCovered,) if library is None else (_C.NotCovered, library.NotCovered)
    try:
        if library is None:
            run(f"{op}_", *call)
        else:  # straight from the lists, past the dispatcher; it counts the versions too
            getattr(library, f"{op}_")(*call, *([] if library is _C else tensors))
    except refusals as refusal:
        log_once(op, str(refusal))
        return False
    if library is None:
        for changed in (params, [] if numbers.grad_scale is None else grads, *lists[2:]):
            if changed and isinstance(changed[0], Tensor):
                torch.autograd.graph.increment_version(changed)
    return True
