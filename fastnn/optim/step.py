"""The step that the optimizers share: each group by the kernels, or by torch where these do not take it."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from itertools import zip_longest
from typing import Any, ClassVar, NamedTuple, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from fastnn.dispatch import _C, LIBRARIES, choice, log_once, overload, profiler_enabled, run_dispatched, use_kernels


class Numbers(NamedTuple):
    """What a step is told by numbers that may be tensors: as far as the host knows them, and, for kernels that read
    them there so that the host need not wait, as tensors on the parameters' device."""

    lr: float
    grad_scale: float | None
    skipped: bool  # found_inf is any number but 0: the state is made, but not stepped
    on_device: tuple[Tensor | None, ...]  # lr, grad_scale, found_inf; empty for kernels that take none

    @property
    def scaled(self) -> bool:
        """Whether the gradients change: they are divided by grad_scale."""
        return any(scale is not None for scale in (self.grad_scale, *self.on_device[1:2]))

    @classmethod
    def of(cls, lr: Any, grad_scale: Any, found_inf: Any, device: torch.device | None) -> Numbers:
        """``device``: where the kernels read tensors, if they do."""
        if device is None:
            return cls(float(lr), None if grad_scale is None else float(grad_scale), bool(found_inf or 0), ())
        numbers = (lr, grad_scale, found_inf)
        there = tuple(x if isinstance(x, Tensor) and x.device == device else None for x in numbers)
        lr, grad_scale, found_inf = (x if tensor is None else None for x, tensor in zip(numbers, there, strict=True))
        return cls.of(lr or 0, grad_scale, found_inf, None)._replace(on_device=there)


KNOWN: WeakKeyDictionary[torch.optim.Optimizer, dict[int, dict[str, Any]]] = WeakKeyDictionary()


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
        params, grads = params_and_grads(group)
        # Of the others the kernels themselves say whether they take them.
        if not use_kernels(self._op, *map(shard_of, params[:1])):
            return False
        compiling = torch.compiler.is_compiling()
        if not compiling and torch._C._len_torch_dispatch_stack() > 0:  # the kernels are called past the dispatcher
            log_once(self._op, "of an active TorchDispatchMode")
            return False
        if not params:
            return True
        library = None if compiling else library_of(self._op, params)
        on_device = not compiling and library is not _C  # where kernels read numbers: the CPU's take them from the host
        # Triton's also take a table from the host: no graph of a device.
        capturable = compiling or (on_device and library is not None)
        for option in ("differentiable", "capturable"):
            if group.get(option) and not (option == "capturable" and capturable):
                log_once(self._op, f"of {option}=True")
                return False
        if compiling and not all(map(use_kernels, [self._op] * len(params), params, grads)):
            return False
        if on_device and "capturable" in group:  # SGD's steps may always be captured, and have no such option
            # torch's own step asks this first; 2.13 has renamed it.
            getattr(self, "_accelerator_graph_capture_health_check", self._cuda_graph_capture_health_check)()
        lr, grad_scale, found_inf = group["lr"], getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        device = params[0].device if on_device else None
        if compiling and grad_scale is found_inf is None:
            # A number would be a constant of the graph, which each change of it compiles anew.
            device = params[0].device
            lr = lr if isinstance(lr, Tensor) else lr * torch.ones((), dtype=torch.float64, device=device)
            if lr.device != device:
                log_once(self._op, f"of lr on {lr.device} and parameters on {device}")
                return False
        return self._update(group, params, grads, Numbers.of(lr, grad_scale, found_inf, device))

    def _update(self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor], numbers: Numbers) -> bool:
        """`_fused_step` of a group that the kernels may take."""
        raise NotImplementedError

    def _known(self, group: dict[str, Any]) -> dict[str, Any]:
        """What `updated` keeps of a group. No option of it, and no state: neither saved nor copied."""
        if torch.compiler.is_compiling():
            return {}
        return KNOWN.setdefault(self, {}).setdefault(id(group), {})

    def _native_step(self, group: dict[str, Any]) -> None:
        """torch's own step of one group. The hooks around ``step`` have run already, so they are peeled off."""
        step: Any = self._native.step
        if getattr(step, "hooked", False):
            step = step.__wrapped__
        groups = list(self.param_groups)
        self.param_groups[:] = [group]  # in place: torch 2.11 cannot compile a new value of the attribute
        try:
            step(self)
        finally:
            self.param_groups[:] = groups


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


def shard_of(tensor: Any) -> Any:
    """What this process holds of a DTensor; anything else as it is."""
    if not hasattr(tensor, "to_local"):
        return tensor
    with torch.no_grad():
        return tensor.to_local()


def sharded_alike(lists: Sequence[Sequence[Any]]) -> bool:
    """Whether the step of the shards is the step of the whole: the DTensors of each parameter are laid out alike, and
    none is a sum still to be made."""
    for tensors in zip_longest(*lists):
        layouts = {(t.device_mesh, t.placements) for t in tensors if hasattr(t, "to_local")}
        if len(layouts) > 1 or any(placement.is_partial() for _, placements in layouts for placement in placements):
            return False
    return True


def library_of(op: str, params: list[Tensor]) -> Any:
    """The module whose kernels serve these parameters past the dispatcher, if there is one."""
    return LIBRARIES.get(choice(op, params[0].device, params[0].dtype)[0])


def updated(
    op: str,
    lists: Sequence[Sequence[Tensor | None]],
    options: tuple[Any, ...],
    numbers: Numbers,
    known: dict[str, Any],
) -> bool:
    """Runs the kernel on lists of tensors, the parameters first. False where it does not take one of them: nothing has
    changed then. ``known``: what the kernels' glue keeps of these lists from one step to the next."""
    if torch.compiler.is_compiling():
        with torch.no_grad():
            overload(f"{op}_", cast(Tensor, lists[0][0]))(*lists, *options, *numbers.on_device)
        return True
    params = cast(list[Tensor], lists[0])
    if hasattr(params[0], "to_local"):
        if not sharded_alike(lists):
            log_once(op, "the DTensors of a parameter differ in mesh or placements, or one is partial")
            return False
        if not updated(op, [list(map(shard_of, tensors)) for tensors in lists], options, numbers, {}):
            return False
        increment_versions(lists, numbers)
        return True
    library = library_of(op, params)
    if library is None:  # Triton's kernels, which a device may not take in every dtype
        for dtype in {p.dtype for p in params}:
            name, reason = choice(op, params[0].device, dtype)
            if name == "torch":
                log_once(op, reason)
                return False
    try:
        if library is not None and not profiler_enabled():  # straight from the lists, past the dispatcher
            getattr(library, f"{op}_")(*lists, *options, *numbers.on_device, known)
            return True
        if any(tensor is not None and tensor.is_neg() for tensors in lists for tensor in tensors):
            log_once(op, "of a lazily negated tensor")  # which the dispatcher cannot write
            return False
        run_dispatched(f"{op}_", *lists, *options, *numbers.on_device)
    except (library or _C).NotCovered as refusal:
        log_once(op, str(refusal))
        return False
    increment_versions(lists, numbers)
    return True


def increment_versions(lists: Sequence[Sequence[Tensor | None]], numbers: Numbers) -> None:
    """Tells autograd what a step of these lists has written: not the gradients, which are the second, unless they were
    divided by grad_scale."""
    params, grads, *states = lists
    for written in (params, *([grads] if numbers.scaled else []), *states):
        torch.autograd.graph.increment_version(cast(Sequence[Tensor], written))
