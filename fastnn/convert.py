"""``fastnn.convert(model)``: an existing model on fastnn's modules, with Conv2d → ReLU (→ MaxPool2d) run as one op.

The user's forward keeps running, and no module changes its meaning. A convolution that is to be fused computes the ReLU
and the max-pool along with itself, and returns an `_Ahead`: a stand-in for its own result which knows what was done
already. The ReLU and max-pool calls that the model makes next, as modules or as functions, take that result as it is;
anything else done to the stand-in (a branch of forward that the trace never saw) computes the plain convolution
after all. So torch.fx decides only where fusing pays; the results do not depend on what it saw.
"""

from __future__ import annotations

import copy
import os
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch import nn as native
from torch.nn import functional as native_functional
from torch.nn.modules.module import _has_any_global_hook
from torch.utils._pytree import tree_map_only

import fastnn.nn.functional as F
from fastnn import nn
from fastnn.dispatch import use_kernels
from fastnn.nn.modules import convolve

_SWAPS: dict[type[native.Module], type[native.Module]] = {
    native.Conv2d: nn.Conv2d,
    native.ReLU: nn.ReLU,
    native.CrossEntropyLoss: nn.CrossEntropyLoss,
}


@dataclass
class ConversionReport:
    """What :func:`convert` did, each entry a module's name (``(model)`` for the model itself) and what about it.

    Attributes:
        swapped: the modules whose class is now fastnn's, and that class.
        fused: the convolutions that take over what follows them, and what that is.
        left_alone: what could have been swapped or fused and was not, and why.
    """

    swapped: list[tuple[str, str]] = field(default_factory=list)
    fused: list[tuple[str, str]] = field(default_factory=list)
    left_alone: list[tuple[str, str]] = field(default_factory=list)

    def __str__(self) -> str:
        sections = {"swapped": self.swapped, "fused": self.fused, "left alone": self.left_alone}
        width = max((len(name) for entries in sections.values() for name, _ in entries), default=0)
        lines = ["fastnn.convert: " + ", ".join(f"{len(entries)} {title}" for title, entries in sections.items())]
        for title, entries in sections.items():
            lines += [f"  {title:<10}  {name:<{width}}  {what}" for name, what in entries]
        return "\n".join(lines)


def convert(model: native.Module) -> ConversionReport:
    """Puts ``model`` on fastnn's kernels, in place: the same modules, Parameters, hooks, state_dict keys and results.

    Every module whose class is exactly ``torch.nn.Conv2d``, ``ReLU`` or ``CrossEntropyLoss`` becomes fastnn's of that
    name (a subclass of it). Where torch.fx shows that a Conv2d's result goes nowhere but into a ReLU, or into a ReLU
    and a max-pool in either order, they run as one op, whether they are called as modules or as functions. The max-pool
    must have no padding, dilation, ceil_mode or return_indices, and a window of at most 15 by 15. A result that a hook
    sees is not fused, hooks registered later included; under torch.compile nothing is.

    ``forward`` is run once, on a copy that shares the Parameters and buffers, with symbolic arguments. If it cannot be
    traced as a whole (control flow that depends on data), the report says where; parts of the model can still be
    converted one by one, ``fastnn.convert(model.features)``.

    Returns:
        ConversionReport: what was swapped, fused, and left alone with the reason; ``print`` it for a table.

    Raises:
        TypeError: ``model`` is no ``torch.nn.Module``.
    """
    if not isinstance(model, native.Module):
        raise TypeError(f"convert() expects a torch.nn.Module, got {type(model).__name__}")
    report = ConversionReport()
    for name, module in model.named_modules():
        cls = type(module)
        if cls in _SWAPS:
            module.__class__ = _SWAPS[cls]
            report.swapped.append((name or "(model)", f"fastnn.nn.{cls.__name__}"))
        elif isinstance(module, tuple(_SWAPS)) and not isinstance(module, tuple(_SWAPS.values())):
            report.left_alone.append((name or "(model)", f"its class {cls.__name__} is not torch.nn's own"))
    if any(type(module) is nn.Conv2d for module in model.modules()):
        _fuse(model, report)
    return report


class _Step(NamedTuple):
    """A call that a convolution can take over; ``pool``: kernel_size and stride, where it is a max-pool."""

    name: str
    pool: tuple[tuple[int, int], ...] = ()

    def __str__(self) -> str:
        return f"{self.name}(kernel_size={self.pool[0]}, stride={self.pool[1]})" if self.pool else self.name


_RELU = _Step("ReLU")
_RELUS_IN_PLACE = (torch.relu_, Tensor.relu_, F.relu_)
_RELUS = (native_functional.relu, torch.relu, Tensor.relu, F.relu, *_RELUS_IN_PLACE)
_MAX_POOLS = (native_functional.max_pool2d, torch.max_pool2d)
_LARGEST_WINDOW = 15
_OTHER_MAX_POOL = _Step(f"a max-pool with padding, dilation, ceil_mode, indices or a window over {_LARGEST_WINDOW}")


def _pair(value: Any) -> tuple[int, int] | None:
    pair = (value, value) if isinstance(value, int) else tuple(value) if isinstance(value, (tuple, list)) else ()
    return pair * (2 // len(pair)) if len(pair) in (1, 2) and all(type(v) is int for v in pair) else None


def _max_pool(
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> _Step:
    window = _pair(kernel_size)
    step = window if stride in (None, (), []) else _pair(stride)
    if window is None or step is None or max(window) > _LARGEST_WINDOW or ceil_mode or return_indices:
        return _OTHER_MAX_POOL
    if _pair(padding) != (0, 0) or _pair(dilation) != (1, 1):
        return _OTHER_MAX_POOL
    return _Step("MaxPool2d", (window, step))


def _step_of_call(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Step | None:
    """The step that ``function(x, *args, **kwargs)`` is, if it is one."""
    if function in _RELUS:
        return _RELU
    if function in _MAX_POOLS:
        try:
            return _max_pool(*args, **kwargs)
        except TypeError:  # wrong arguments: torch's own error comes when the call is made
            return _OTHER_MAX_POOL
    return None


def _step_of_module(module: native.Module) -> _Step | None:
    if type(module) in (native.ReLU, nn.ReLU):
        return _RELU
    if type(module) is native.MaxPool2d:
        arguments = ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")
        return _max_pool(*(getattr(module, name) for name in arguments))
    return None


def _hooks(module: native.Module) -> tuple[dict[int, Any], ...]:
    return module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks


def _hooked(modules: Iterable[native.Module]) -> bool:
    return any(any(_hooks(module)) for module in modules)


class FusedConv2d(nn.Conv2d):
    """A Conv2d of a converted model whose result goes through ``steps`` in the model's forward: a ReLU, or a ReLU and a
    max-pool in either order, which is the same function, as ReLU does not change which element is the largest.

    ``passes_through``: the modules from the convolution to the last step, whose hooks would see what is not there when
    they run as one op.
    """

    steps: tuple[_Step, ...]
    passes_through: tuple[native.Module, ...]

    def forward(self, input: Tensor) -> Tensor:
        if (
            torch.compiler.is_compiling()
            or _has_any_global_hook()
            or _hooked(self.passes_through)
            or not use_kernels("conv2d_relu", input)
        ):
            return super().forward(input)
        pool = [argument for step in self.steps for argument in step.pool]
        operator = F.conv2d_relu_max_pool2d if pool else F.conv2d_relu
        result = convolve(self, operator, input, self.weight, self.bias, *pool)
        return _Ahead(result, self.steps, self._unfused(input))

    def _unfused(self, input: Tensor) -> Callable[[], Tensor]:
        device = input.device.type
        autocast = (device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))
        version = None if input.is_inference() else input._version

        def compute() -> Tensor:
            if version is not None and input._version != version:
                raise RuntimeError("the input of a fused convolution was modified before the plain result was needed")
            with torch.autocast(*autocast):
                return nn.Conv2d.forward(self, input)

        return compute

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, then {', '.join(map(str, self.steps))}"


class _Ahead(Tensor):
    """Stands for a tensor of which ``steps`` are still to be called, while ``result`` is what they will give.

    It has no storage, so whatever gets past ``__torch_function__`` fails instead of reading a wrong value.
    """

    result: Tensor
    steps: tuple[_Step, ...]
    _plain: Callable[[], Tensor]

    @staticmethod
    def __new__(cls, result: Tensor, steps: tuple[_Step, ...], plain: Callable[[], Tensor]) -> _Ahead:
        return Tensor._make_wrapper_subclass(cls, result.shape, dtype=result.dtype, device=result.device)

    def __init__(self, result: Tensor, steps: tuple[_Step, ...], plain: Callable[[], Tensor]) -> None:
        self.result = result
        self.steps = steps
        self._plain = plain
        self._grad_mode = torch.is_grad_enabled()

    def plain(self) -> Tensor:
        """The tensor itself, computed when it is first asked for, with the grad mode of where it was made."""
        with torch.set_grad_enabled(self._grad_mode):
            value = self._plain()
        self.steps = ()  # from now on it is the value that in-place calls have to change
        self._plain = lambda: value
        return value

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        first = args[0] if args else None
        if isinstance(first, _Ahead) and first.steps[:1] == (_step_of_call(func, args[1:], kwargs),):
            return first._advance(func, args[1:], kwargs)
        args, kwargs = tree_map_only(_Ahead, _Ahead.plain, (args, kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise RuntimeError(
            f"{func} was called on the unfinished result of a convolution that fastnn.convert fused, past "
            "__torch_function__; convert the model with a forward that shows this use of it"
        )

    def _advance(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """What the next step gives: the finished result after the last one, else a stand-in with one step less."""
        steps = self.steps[1:]
        result = self.result if torch.is_grad_enabled() else self.result.detach()
        if func in _RELUS_IN_PLACE or kwargs.get("inplace") or args[:1] == (True,):
            before = self._plain
            self._plain = (lambda: func(before(), *args, **kwargs)) if steps else lambda: result
            self.steps = steps
            return self if steps else result
        return _Ahead(result, steps, lambda: func(self.plain(), *args, **kwargs)) if steps else result


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: native.Module, module_qualified_name: str) -> bool:
        return type(m).__module__.startswith("fastnn.") or super().is_leaf_module(m, module_qualified_name)


def _trace(model: native.Module) -> fx.Graph:
    """The graph of a copy without hooks: forward may store symbolic values in the modules it runs on."""
    held = (tensor for module in model.modules() for tensor in vars(module).values() if isinstance(tensor, Tensor))
    shared = {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers(), held)}
    twin = copy.deepcopy(model, shared)
    for module in twin.modules():
        for hooks in _hooks(module):
            hooks.clear()
    return _Tracer().trace(twin)


def _why_untraceable(error: Exception) -> str:
    """The error's first line, and the line of the user's code that led to it."""
    ours = (os.path.dirname(torch.__file__), __file__)
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(ours)]
    where = f" ({os.path.basename(frames[-1].filename)}:{frames[-1].lineno})" if frames else ""
    return f"torch.fx cannot trace it{where}: {(str(error) or type(error).__name__).splitlines()[0]}"


def _step_of_node(node: fx.Node, operand: fx.Node, model: native.Module) -> _Step | None:
    """The step that ``node`` takes from ``operand``, if it is one."""
    if node.args[:1] != (operand,):
        return None
    if node.op == "call_module":
        return _step_of_module(model.get_submodule(str(node.target)))
    function = getattr(Tensor, str(node.target), None) if node.op == "call_method" else node.target
    return _step_of_call(function, node.args[1:], node.kwargs)


def _containers(node: fx.Node) -> set[str]:
    """The names of the modules that a node's call lies in, its own included if it calls one."""
    return {path for path, _ in node.meta.get("nn_module_stack", {}).values()}


class _Chain(NamedTuple):
    """The steps that take a convolution's result, the modules it passes through, and why there are no more of them."""

    steps: tuple[_Step, ...]
    passes_through: set[str]
    stopped: str


def _follow(node: fx.Node, model: native.Module) -> _Chain:
    steps: list[_Step] = []
    passed = {str(node.target)}
    stopped = ""
    while not stopped:
        candidates = {user: _step_of_node(user, node, model) for user in node.users}
        step = next((step for step in candidates.values() if step is not None), None)
        if step is None or step.name in (taken.name for taken in steps):
            break
        (user, *others) = candidates
        crossed = _containers(node) ^ _containers(user)
        hooked = [name for name in sorted(crossed | passed) if _hooked([model.get_submodule(name)])]
        if step == _OTHER_MAX_POOL:
            stopped = f"{step} is not fused"
        elif others:
            stopped = f"what goes into {step} is used elsewhere too"
        elif hooked:
            stopped = f"a hook on {hooked[0]} may see what goes into {step}"
        else:
            steps.append(step)
            passed |= crossed
            node = user
    return _Chain(tuple(steps) if _RELU in steps else (), passed, stopped)


def _fuse(model: native.Module, report: ConversionReport) -> None:
    try:
        graph = _trace(model)
    except Exception as error:  # forward is the user's code, and deepcopy runs more of it: anything may come
        report.left_alone.append(("(model)", _why_untraceable(error)))
        return
    calls: dict[str, list[_Chain]] = {}
    for node in graph.nodes:
        if node.op == "call_module" and type(model.get_submodule(node.target)) is nn.Conv2d:
            calls.setdefault(node.target, []).append(_follow(node, model))
    for name, chains in calls.items():
        steps, _, stopped = chains[0]
        if any(other.steps != steps for other in chains):
            steps, stopped = (), f"called {len(chains)} times, and its results go on differently"
        if steps:
            passed = set[str]().union(*(each.passes_through for each in chains))
            conv: Any = model.get_submodule(name)
            conv.__class__ = FusedConv2d
            conv.steps = steps
            conv.passes_through = tuple(model.get_submodule(each) for each in sorted(passed))
            report.fused.append((name, " → ".join(["Conv2d", *map(str, steps)])))
        if stopped:
            report.left_alone.append((name, stopped))
