"""``fastnn.convert(model)``: an existing model on fastnn's modules, with Conv2d → ReLU (→ MaxPool2d) run as one op.

The user's forward keeps running, and no module changes its meaning. A convolution that is to be fused computes the ReLU
and the max-pool along with itself, and returns an `_Ahead`: a stand-in for its own result which knows what was done
already. The ReLU and max-pool calls that the model makes next, as modules or as functions, take that result as it is;
anything else done to the stand-in (a branch of forward that the trace never saw) computes the plain convolution
after all. So torch.fx decides only where fusing pays; the results do not depend on what it saw. A BatchNorm2d that is
to be folded is one more such step: its Parameters and buffers stay, and the convolution's weights with them.
"""

from __future__ import annotations

import copy
import functools
import gc
import os
import random
import sys
import traceback
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, fx
from torch import nn as native
from torch.nn import functional as native_functional
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.modules.module import _has_any_global_hook
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized
from torch.utils._pytree import tree_map_only

import fastnn.nn.functional as F
from fastnn import nn, optim
from fastnn.dispatch import use_kernels
from fastnn.nn.layers import HOOKS, convolve, fusable_pool, fusable_pool_of, hooked

_SWAPS: dict[type, type] = {
    native.Conv2d: nn.Conv2d,
    native.ReLU: nn.ReLU,
    native.MaxPool2d: nn.MaxPool2d,
    native.CrossEntropyLoss: nn.CrossEntropyLoss,
}
_OPERATORS = tuple(getattr(torch.ops.aten, op).default for op in ("conv2d", "max_pool2d", "cross_entropy_loss"))
_OPTIMIZERS: dict[type, type] = {
    torch.optim.Adam: optim.Adam,
    torch.optim.AdamW: optim.AdamW,
    torch.optim.SGD: optim.SGD,
}


@dataclass
class ConversionReport:
    """What :func:`convert` did, each entry a module's name (``(model)`` for the model itself) and what about it.

    Attributes:
        swapped: the modules whose class is now fastnn's, and that class.
        fused: the convolutions that take over what follows them, and what that is.
        left_alone: what could have been swapped or fused and was not, and why; functions of torch's that fastnn has too
            are seen where torch.fx traced the call.
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


def convert(model: native.Module | torch.optim.Optimizer, *, fold_batch_norm: bool = False) -> ConversionReport:
    """Puts a model or an optimizer on fastnn's kernels, in place: the same Parameters, hooks, state and results.

    Every module whose class is exactly ``torch.nn.Conv2d``, ``ReLU``, ``MaxPool2d`` or ``CrossEntropyLoss`` becomes
    fastnn's of that name (a subclass of it). Where torch.fx shows that a Conv2d's result goes nowhere but into a ReLU,
    or into a ReLU and a max-pool in either order, they run as one op, whether they are called as modules or as
    functions. The max-pool must have no padding, dilation, ceil_mode or return_indices, and a window of at most 255
    elements. A result that a hook sees is not fused, hooks registered later included; under torch.compile nothing is.

    ``forward`` is run once, on a copy that shares the Parameters, with symbolic arguments. Where it cannot be traced as
    a whole (control flow that depends on data), those of its submodules are. A model may be wrapped
    (DistributedDataParallel, ``fully_shard``, ``torch.compile``) before or after.

    A ``torch.optim.Adam``, ``AdamW`` or ``SGD`` becomes fastnn's of that name, with its state, groups, hooks and the
    schedulers that step it. :func:`revert` undoes all of this.

    Args:
        model: a model, a loss or an optimizer.
        fold_batch_norm: in eval mode, also run a BatchNorm2d that follows a Conv2d as part of it, on weights that the
            running statistics are multiplied into. Their own tensors, and what train mode computes, stay as they are.

    Returns:
        ConversionReport: what was swapped, fused, and left alone with the reason; ``print`` it for a table.

    Raises:
        TypeError: ``model`` is neither a module nor an optimizer.
        RuntimeError: ``fold_batch_norm`` of a model in training mode.
    """
    report = ConversionReport()
    if isinstance(model, torch.optim.Optimizer):
        _convert_optimizer(model, report)
        return report
    if not isinstance(model, native.Module):
        raise TypeError(f"convert() expects a torch.nn.Module or a torch.optim.Optimizer, got {type(model).__name__}")
    names = {module: name or "(model)" for name, module in model.named_modules()}
    if fold_batch_norm:
        training = [
            name for module, name in names.items() if isinstance(module, native.BatchNorm2d) and module.training
        ]
        if training:
            raise RuntimeError(
                f"convert(fold_batch_norm=True) folds running statistics, but {training[0]} is in training mode, which "
                "does not use them: call model.eval() first"
            )
    for module, name in names.items():
        cls = _own_class(type(module))
        if cls in _SWAPS:
            _set_class(module, _SWAPS[cls])
            report.swapped.append((name, f"fastnn.nn.{cls.__name__}"))
        elif isinstance(module, tuple(_SWAPS)) and not isinstance(module, tuple(_SWAPS.values())):
            lazy = isinstance(module, LazyModuleMixin)
            why = "it is lazy: run the model once first" if lazy else f"its class {cls.__name__} is not torch.nn's own"
            report.left_alone.append((name, why))
        elif isinstance(module, _ConvNd) and not isinstance(module, native.Conv2d):
            report.left_alone.append((name, f"fastnn has no kernel for {cls.__name__}"))
        elif isinstance(module, torch.jit.ScriptModule) and module.original_name in {cls.__name__ for cls in _SWAPS}:
            report.left_alone.append((name, "TorchScript runs torch's operators"))
        elif isinstance(module, fx.GraphModule) and any(node.target in _OPERATORS for node in module.graph.nodes):
            report.left_alone.append((name, "its graph calls torch's operators: convert what it was made from"))
    search = _Search(names, fold_batch_norm, report)
    search.look_through(model)
    search.fuse()
    return report


def revert(model: native.Module | torch.optim.Optimizer) -> None:
    """Undoes :func:`convert`: every module and optimizer that it changed gets back the class it had.

    Parameters, buffers, hooks, state and ``state_dict`` keys are those that are there now; nothing is copied. A folded
    BatchNorm2d runs by itself again, as its tensors and the convolution's were never changed. What convert did not
    change, fastnn's own modules included, stays.

    Raises:
        TypeError: ``model`` is neither a module nor an optimizer.
        ValueError: an SGD whose groups were set to ``lr_in_velocity=True`` since, which torch's SGD does not have.
    """
    if isinstance(model, torch.optim.Optimizer):
        _revert_optimizer(model)
        return
    if not isinstance(model, native.Module):
        raise TypeError(f"revert() expects a torch.nn.Module or a torch.optim.Optimizer, got {type(model).__name__}")
    for module in model.modules():
        attributes = vars(module)
        if _BEFORE in attributes:
            before, after = attributes.pop(_BEFORE)
            unchanged = type(module) is after
            module.__class__ = before if unchanged else _with_own_class(type(module), _own_class(before))
            for name in FusedConv2d.__annotations__:
                attributes.pop(name, None)


# ---- classes ----

_BEFORE = "_class_before_fastnn_convert"  # of an optimizer; of a module, with the class that convert gave it


def _own_class(cls: type) -> type:
    """A module's class under those that torch makes around it at run time (``fully_shard``, ``parametrize``)."""
    while (
        cls.__module__.startswith("torch.")
        and not hasattr(sys.modules.get(cls.__module__), cls.__name__)
        and "forward" not in vars(cls)
    ):
        cls = cls.__bases__[-1]
    return cls


def _with_own_class(cls: type, new: type) -> type:
    """``cls`` with ``new`` as its own class, inside what torch made around the one it has."""
    own = _own_class(cls)
    if cls is own:
        return new
    *mixins, base = cls.__bases__
    name = cls.__name__.replace(own.__name__, new.__name__)
    return type(name, (*mixins, _with_own_class(base, new)), dict(vars(cls)))


def _set_class(module: native.Module, new: type) -> None:
    before, _ = vars(module).get(_BEFORE, (type(module), None))
    module.__class__ = _with_own_class(type(module), new)
    vars(module)[_BEFORE] = before, type(module)


# ---- optimizers ----


def _convert_optimizer(optimizer: torch.optim.Optimizer, report: ConversionReport) -> None:
    cls, name = type(optimizer), "(optimizer)"
    if cls in _OPTIMIZERS:
        if "step" in vars(optimizer) and not hasattr(optimizer.step, "_wrapped_by_lr_sched"):
            report.left_alone.append((name, "its step was replaced"))
            return
        _set_optimizer_class(optimizer, _OPTIMIZERS[cls])
        vars(optimizer)[_BEFORE] = cls
        report.swapped.append((name, f"fastnn.optim.{cls.__name__}"))
    elif cls not in _OPTIMIZERS.values():
        report.left_alone.append((name, f"fastnn has no kernel for {cls.__name__}, or its class is not torch.optim's"))


def _revert_optimizer(optimizer: torch.optim.Optimizer) -> None:
    if _BEFORE not in vars(optimizer):
        return
    options = (optimizer.defaults, *optimizer.param_groups)
    if any(each.get("lr_in_velocity") for each in options):
        raise ValueError("revert() got an SGD with lr_in_velocity=True, a form of momentum that torch's SGD lacks")
    for each in options:
        each.pop("lr_in_velocity", None)
    _set_optimizer_class(optimizer, vars(optimizer).pop(_BEFORE))


def _set_optimizer_class(optimizer: torch.optim.Optimizer, cls: type[torch.optim.Optimizer]) -> None:
    optimizer.__class__ = cls
    optimizer.__setstate__({})  # as unpickling does: the hooks around step, and the options that cls adds
    if "step" not in vars(optimizer):
        return
    # A scheduler has put a function of its own, which notes that it was called, around the step of the class before.
    reference, step = weakref.ref(optimizer), cls.step

    @functools.wraps(step)
    def noted(*args: Any, **kwargs: Any) -> Any:
        this: Any = reference()
        this._opt_called = True
        return step(this, *args, **kwargs)

    noted._wrapped_by_lr_sched = True  # type: ignore[attr-defined]
    optimizer.step = noted  # type: ignore[method-assign]


# ---- the steps that a convolution can take over ----


class _Step(NamedTuple):
    """A call that a convolution can take over.

    ``pool``: kernel_size and stride, where it is a max-pool. ``norm``: which tensors, by ``id``, and which eps, where
    it is a batch normalization by running statistics.
    """

    name: str
    pool: tuple[tuple[int, int], ...] = ()
    norm: tuple[float, ...] = ()

    def __str__(self) -> str:
        return f"{self.name}(kernel_size={self.pool[0]}, stride={self.pool[1]})" if self.pool else self.name


_RELU = _Step("ReLU")
_RELUS_IN_PLACE = (torch.relu_, Tensor.relu_, F.relu_)
_RELUS = (native_functional.relu, torch.relu, Tensor.relu, F.relu, *_RELUS_IN_PLACE)
_IDENTITY = _Step("Identity")  # of the search only: it returns the very tensor it is given
_MAX_POOLS = (native_functional.max_pool2d, torch.max_pool2d, F.max_pool2d)
_FUNCTIONS = {
    "conv2d": (native_functional.conv2d, torch.conv2d),
    "relu": _RELUS,
    "max_pool2d": _MAX_POOLS,
    "cross_entropy": (native_functional.cross_entropy,),
}
_OTHER_MAX_POOL = _Step(f"a max-pool with padding, dilation, ceil_mode, indices or over {F.MAX_POOL2D_WINDOW} elements")


def _max_pool(pool: tuple[tuple[int, int], ...] | None) -> _Step:
    return _Step("MaxPool2d", pool) if pool else _OTHER_MAX_POOL


def _batch_norm(
    running_mean: Any,
    running_var: Any,
    weight: Any = None,
    bias: Any = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> _Step | None:
    if training or running_mean is None or running_var is None:
        return None
    return _Step("BatchNorm2d", norm=(*map(id, (running_mean, running_var, weight, bias)), eps))


def _step_of_call(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Step | None:
    """The step that ``function(x, *args, **kwargs)`` is, if it is one."""
    if function in _RELUS:
        return _RELU
    if function in _MAX_POOLS:
        try:
            return _max_pool(fusable_pool(*args, **kwargs))
        except TypeError:  # wrong arguments: torch's own error comes when the call is made
            return _OTHER_MAX_POOL
    if function is native_functional.batch_norm:
        return _batch_norm(*args, **kwargs)
    return None


def _step_of_module(module: native.Module) -> _Step | None:
    cls = _own_class(type(module))
    if cls in (native.ReLU, nn.ReLU):
        return _RELU
    if cls in (native.MaxPool2d, nn.MaxPool2d):
        return _max_pool(fusable_pool_of(cast(native.MaxPool2d, module)))
    if cls is native.Identity:
        return _IDENTITY
    if cls is native.BatchNorm2d:
        norm: Any = module
        tensors = (norm.running_mean, norm.running_var, norm.weight, norm.bias)
        return _batch_norm(*tensors, training=norm.training, eps=norm.eps)
    return None


# ---- what runs ----


class Fusion(NamedTuple):
    """What a convolution's result goes through in the model's forward.

    Attributes:
        norm: the BatchNorm2d that comes first, if one is to be folded.
        steps: a ReLU, or a ReLU and a max-pool in either order, which is the same function, as ReLU does not change
            which element is the largest. There may be none after a BatchNorm2d.
        passes_through: the modules from the convolution to the last step, whose hooks would see what is not there when
            they run as one op.
    """

    norm: tuple[native.BatchNorm2d, ...] = ()
    steps: tuple[_Step, ...] = ()
    passes_through: tuple[native.Module, ...] = ()

    def __str__(self) -> str:
        return " → ".join(["Conv2d", *("BatchNorm2d" for _ in self.norm), *map(str, self.steps)])


class FusedConv2d(nn.Conv2d):
    """A Conv2d of a converted model that computes what comes after it along with itself."""

    _fusion: Fusion
    _folded: tuple[Any, list[Tensor], tuple[Tensor, Tensor]] | None

    def forward(self, input: Tensor) -> Tensor:
        norms, steps, passes_through = self._fusion
        if (
            torch.compiler.is_compiling()
            or _has_any_global_hook()
            or hooked(passes_through)
            or "parametrizations" in self._modules  # its weight, computed at each use, may be needed twice
            or "_conv_forward" in vars(self)  # one of its own
            or not use_kernels("conv2d_relu", input)
        ):
            return super().forward(input)
        pool = [argument for step in steps for argument in step.pool]
        operator = F.conv2d_relu_max_pool2d if pool else F.conv2d_relu if steps else F.conv2d
        weight, bias = self.weight, self.bias
        for norm in norms:
            step = _step_of_module(norm)
            if step is None or not use_kernels("conv2d_relu", *self._folding()):
                return super().forward(input)
            weight, bias = self._fold()
            steps = (step, *steps)
        result = convolve(self, operator, input, weight, bias, *pool)
        return _Ahead(result, steps, self._unfused(input))

    def train(self, mode: bool = True) -> FusedConv2d:
        self._folded = None  # the weights may have changed in ways that do not count as a version (``.data``)
        return super().train(mode)

    def _folding(self) -> list[Tensor]:
        """The tensors that the folded weight and bias are made of."""
        (norm,) = self._fusion.norm
        tensors = (self.weight, self.bias, norm.weight, norm.bias, norm.running_mean, norm.running_var)
        return [tensor for tensor in tensors if tensor is not None]

    def _fold(self) -> tuple[Tensor, Tensor]:
        """Weight and bias with the BatchNorm2d multiplied in; kept for the next call unless they carry a gradient."""
        (norm,) = self._fusion.norm
        tensors = self._folding()
        if norm.num_batches_tracked is not None:  # training changes the running statistics past their own versions
            tensors.append(norm.num_batches_tracked)
        if any(tensor.is_inference() or (tensor.requires_grad and torch.is_grad_enabled()) for tensor in tensors):
            return self._compute_fold()
        key = (norm.eps, *((tensor.data_ptr(), tensor._version) for tensor in tensors))
        if self._folded is None or self._folded[0] != key:
            with torch.inference_mode(False), torch.no_grad():  # what is kept may meet a gradient in a later call
                # The aliases keep other tensors from coming to lie at the same addresses.
                self._folded = key, [tensor.detach() for tensor in tensors], self._compute_fold()
        return self._folded[2]

    def _compute_fold(self) -> tuple[Tensor, Tensor]:
        norm: Any = self._fusion.norm[0]
        dtype, exact = self.weight.dtype, torch.promote_types(self.weight.dtype, torch.float32)
        scale = (norm.running_var.to(exact) + norm.eps).rsqrt()
        if norm.weight is not None:
            scale = scale * norm.weight
        shift = -norm.running_mean.to(exact)
        if self.bias is not None:
            shift = shift + self.bias
        shift = shift * scale
        if norm.bias is not None:
            shift = shift + norm.bias
        return (self.weight * scale.view(-1, 1, 1, 1)).to(dtype), shift.to(dtype)

    def _unfused(self, input: Tensor) -> Callable[[], Tensor]:
        device = input.device.type
        autocast = (device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))
        weight, bias = self.weight, self.bias
        versions = [(t, t._version) for t in (input, weight, bias) if t is not None and not t.is_inference()]

        def compute() -> Tensor:
            if any(tensor._version != version for tensor, version in versions):
                raise RuntimeError(
                    "the input, weight or bias of a fused convolution was modified before the plain result was needed"
                )
            with torch.autocast(*autocast):
                return self._conv_forward(input, weight, bias)

        return compute

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, runs {self._fusion}"


_TAKEN_PAST = (
    "the unfinished result of a convolution that fastnn.convert fused: an autograd.Function or a reentrant checkpoint "
    "took it past __torch_function__; call fastnn.revert on that convolution"
)


def _refuse_gradient(grad: Tensor) -> None:
    raise RuntimeError(f"a gradient reached {_TAKEN_PAST}")


class _Ahead(Tensor):
    """Stands for a tensor of which ``steps`` are still to be called, while ``result`` is what they will give.

    It has no storage and no history, so whatever gets past ``__torch_function__`` fails instead of reading a wrong
    value or losing a gradient.
    """

    result: Tensor
    steps: tuple[_Step, ...]
    _plain: Callable[[], Tensor]

    # What is the same of the result and of what it is made of.
    _COMMON = (Tensor.dim, Tensor.ndim.__get__, Tensor.dtype.__get__, Tensor.device.__get__)  # type: ignore[attr-defined]

    @staticmethod
    def __new__(cls, result: Tensor, steps: tuple[_Step, ...], plain: Callable[[], Tensor]) -> _Ahead:
        dtype, device, requires_grad = result.dtype, result.device, result.requires_grad
        return Tensor._make_wrapper_subclass(cls, result.shape, dtype=dtype, device=device, requires_grad=requires_grad)

    def __init__(self, result: Tensor, steps: tuple[_Step, ...], plain: Callable[[], Tensor]) -> None:
        self.result = result
        self.steps = steps
        self._plain = plain
        self._grad_mode = torch.is_grad_enabled()
        if result.requires_grad:
            with torch._C.DisableTorchFunctionSubclass():
                self.register_hook(_refuse_gradient)

    def _refuse_lost_history(self) -> None:
        """Raises where an autograd.Function put itself behind this tensor alone, and not behind what it stands for."""
        with torch._C.DisableTorchFunctionSubclass():
            if self.requires_grad and not self.result.requires_grad:
                raise RuntimeError(f"a gradient would not reach {_TAKEN_PAST}")

    def plain(self) -> Tensor:
        """The tensor itself, computed when it is first asked for, with the grad mode of where it was made."""
        self._refuse_lost_history()
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
        # What is compiled alone starts from the plain result: it could not guard on a stand-in that it changes.
        if isinstance(first, _Ahead) and not torch.compiler.is_compiling():
            if first.steps[:1] == (_step_of_call(func, args[1:], kwargs),):
                return first._advance(func, args[1:], kwargs)
            if func in cls._COMMON:
                return func(first.result)
        args, kwargs = tree_map_only(_Ahead, _Ahead.plain, (args, kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise RuntimeError(
            f"{func} was called on the unfinished result of a convolution that fastnn.convert fused, past "
            "__torch_function__; call fastnn.revert on that convolution"
        )

    def _advance(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """What the next step gives: the finished result after the last one, else a stand-in with one step less."""
        self._refuse_lost_history()
        steps = self.steps[1:]
        result = self.result if torch.is_grad_enabled() else self.result.detach()
        if func in _RELUS_IN_PLACE or kwargs.get("inplace") or (func in _RELUS and args[:1] == (True,)):
            before = self._plain
            self._plain = (lambda: func(before(), *args, **kwargs)) if steps else lambda: result
            self.steps = steps
            return self if steps else result
        return _Ahead(result, steps, lambda: func(self.plain(), *args, **kwargs)) if steps else result


# ---- where to fuse ----


def _is_opaque(module: native.Module) -> bool:
    """Whether its forward is torch's own: a layer, a container that has none, or a wrapper that is not to be traced."""
    own = _own_class(type(module))
    return own.__module__.startswith(("torch.", "fastnn.")) and not isinstance(
        module, (native.Sequential, fx.GraphModule)
    )


_NOT_THE_USERS = (os.path.join(os.path.dirname(torch.__file__), ""), __file__)  # torchvision is one of the users


class _Tracer(fx.Tracer):
    """Notes where each call was made, and whose results outlive forward."""

    def __init__(self) -> None:
        super().__init__()
        self._results: list[tuple[fx.Node, weakref.ref[fx.Proxy]]] = []

    def proxy(self, node: fx.Node) -> fx.Proxy:
        proxy = super().proxy(node)
        self._results.append((node, weakref.ref(proxy)))
        return proxy

    def trace(self, *args: Any, **kwargs: Any) -> fx.Graph:
        graph = super().trace(*args, **kwargs)
        if any(proxy() is not None for _, proxy in self._results):
            gc.collect()  # of those left, some are only part of a cycle
        for node, proxy in self._results:
            if proxy() is not None:
                node.meta["stored"] = True
        return graph

    def is_leaf_module(self, m: native.Module, module_qualified_name: str) -> bool:
        return _is_opaque(m)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(*args, **kwargs)
        frame = sys._getframe()
        while frame.f_back is not None and frame.f_code.co_filename.startswith(_NOT_THE_USERS):
            frame = frame.f_back
        node.meta["where"] = frame.f_code.co_filename, frame.f_lineno
        return node


def _trace(model: native.Module) -> fx.Graph:
    """The graph of a copy that shares the Parameters and has no hooks: forward may store symbolic values in the modules
    it runs on, and change their other tensors."""
    modules = list(model.modules())
    twins = {id(module): object.__new__(type(module)) for module in modules}
    memo: dict[int, Any] = dict(twins)
    for module in modules:
        held = (*module._parameters.values(), *module._buffers.values(), *vars(module).values())
        for value in held:
            if isinstance(value, native.Parameter):
                memo[id(value)] = value
            elif isinstance(value, Tensor) and not is_lazy(value):
                # deepcopy may refuse it, or copy it with its storage
                memo[id(value)] = value.detach().clone()
    for module in modules:
        twin = vars(twins[id(module)])
        for name, value in vars(module).items():
            if name in HOOKS:
                twin[name] = type(value)()
            elif name != "_compiled_call_impl":
                try:
                    twin[name] = copy.deepcopy(value, memo)
                except Exception:  # a lock, a process group, ..: the copy does with the same one
                    twin[name] = value
    pythons, numpys = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            return _Tracer().trace(twins[id(model)])
    finally:
        random.setstate(pythons)
        np.random.set_state(numpys)


def _why_untraceable(error: Exception) -> str:
    """The error's first line, and the line of the user's code that led to it."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(_NOT_THE_USERS)]
    where = f" ({os.path.basename(frames[-1].filename)}:{frames[-1].lineno})" if frames else ""
    return f"torch.fx cannot trace it{where}: {(str(error) or type(error).__name__).splitlines()[0]}"


def _function_of_node(node: fx.Node) -> Any:
    return getattr(Tensor, str(node.target), None) if node.op == "call_method" else node.target


def _step_of_node(node: fx.Node, operand: fx.Node, module: native.Module | None) -> _Step | None:
    """The step that ``node``, a call of ``module`` if that is given, takes from ``operand``, if it is one."""
    if node.args[:1] != (operand,):
        return None
    if module is not None:
        return _step_of_module(module)
    step = _step_of_call(_function_of_node(node), node.args[1:], node.kwargs)
    return None if step is not None and step.norm else step  # whose tensors are not known


class _Chain(NamedTuple):
    """What a convolution's result goes through in one call, and why there is no more of it."""

    fusion: Fusion
    stopped: str
    leaves: bool  # the traced part, so that what is to come is not known
    taken: tuple[fx.Node, ...]  # the calls of the steps


@dataclass
class _Search:
    """The search of one `convert` for what to fuse."""

    names: dict[native.Module, str]
    fold: bool
    report: ConversionReport
    chains: dict[native.Module, list[_Chain]] = field(default_factory=dict)
    seen: set[native.Module] = field(default_factory=set)
    functions: dict[tuple[str, str], list[fx.Node]] = field(default_factory=dict)  # by module's and function's name

    def look_through(self, part: native.Module) -> bool:
        """Follows the convolutions in ``part``, in its graph or, where it has none, in those of its children; returns
        whether the result of one leaves it for something not seen yet."""
        if part in self.seen or not any(_own_class(type(module)) is nn.Conv2d for module in part.modules()):
            return False
        self.seen.add(part)
        if isinstance(part, native.Conv2d):
            return True
        if not _is_opaque(part):
            try:
                graph = _trace(part)
            except Exception as error:  # forward is the user's code: anything may come
                why = _why_untraceable(error)
            else:
                return self._follow_all(part, graph)
        leaves = [self.look_through(child) for child in part.children()]
        if any(leaves) and not _is_opaque(part):
            self.report.left_alone.append((self.names[part], why))
            return False
        return any(leaves)

    def _follow_all(self, part: native.Module, graph: fx.Graph) -> bool:
        leaves = False
        for node in graph.nodes:
            if node.op != "call_module":
                self._note_function(node, part)
                continue
            module = part.get_submodule(node.target)
            if _own_class(type(module)) is nn.Conv2d:
                chain = self._follow(node, part)
                self.chains.setdefault(module, []).append(chain)
                leaves = leaves or chain.leaves
            else:  # a wrapper, if there is a convolution in it
                self.look_through(module)
        return leaves

    def _note_function(self, node: fx.Node, part: native.Module) -> None:
        """Notes a call of a function of torch's that fastnn has too. fastnn's, given a symbolic value, call torch's."""
        op = next((op for op, functions in _FUNCTIONS.items() if _function_of_node(node) in functions), None)
        if op is None or node.meta["where"][0] == F.__file__:
            return
        within = [path for path, _ in node.meta.get("nn_module_stack", {}).values()]
        module = part.get_submodule(within[-1] if within else "")
        if not isinstance(module, tuple(_SWAPS)):
            self.functions.setdefault((self.names[module], op), []).append(node)

    def _follow(self, node: fx.Node, part: native.Module) -> _Chain:
        def called(node: fx.Node) -> native.Module | None:
            return part.get_submodule(str(node.target)) if node.op == "call_module" else None

        def containers(node: fx.Node) -> set[native.Module]:
            """The modules that the node's call lies in, its own included if it calls one."""
            return {part.get_submodule(path) for path, _ in node.meta.get("nn_module_stack", {}).values()}

        conv: Any = called(node)
        norm: tuple[native.BatchNorm2d, ...] = ()
        steps: list[_Step] = []
        passed = {conv}
        taken: list[fx.Node] = []
        stopped = ""
        while not stopped:
            found = ((user, _step_of_node(user, node, called(user))) for user in node.users)
            user, step = next(((user, step) for user, step in found if step is not None), (None, None))
            if user is None or step is None or step.name in (taken.name for taken in steps):
                break
            if step.norm and not (self.fold and not norm and not steps):
                break
            crossed = containers(node) ^ containers(user)
            seen_by = [name for module, name in self.names.items() if module in crossed | passed and hooked([module])]
            if step == _IDENTITY and len(node.users) > 1:
                break
            if step == _OTHER_MAX_POOL:
                stopped = f"{step} is not fused"
            elif len(node.users) > 1:
                stopped = f"what goes into {step} is used elsewhere too"
            elif "stored" in node.meta:
                stopped = f"what goes into {step} is stored by forward"
            elif is_parametrized(conv):
                stopped = f"it is parametrized, and {step} is not fused with a weight that is computed at each use"
            elif "_conv_forward" in vars(conv):
                stopped = f"its _conv_forward was replaced, and {step} is not fused with another function"
            elif seen_by:
                stopped = f"a hook on {seen_by[0]}, or its compiler, may see what goes into {step}"
            else:
                if step.norm:
                    norm = (cast(native.BatchNorm2d, called(user)),)
                elif step != _IDENTITY:
                    steps.append(step)
                passed |= crossed
                taken.append(user)
                node = user
        leaves = not stopped and len(steps) < 2 and any(user.op == "output" for user in node.users)
        through = tuple(module for module in self.names if module in passed)
        return _Chain(Fusion(norm, tuple(steps) if _RELU in steps else (), through), stopped, leaves, tuple(taken))

    def fuse(self) -> None:
        fused: set[fx.Node] = set()
        for module, chains in self.chains.items():
            conv: Any = module
            (norm, steps, _), stopped, *_ = chains[0]
            through = {each: None for chain in chains for each in chain.fusion.passes_through}
            fusion = Fusion(norm, steps, tuple(through))
            if any(chain.fusion[:2] != fusion[:2] for chain in chains):
                fusion, stopped = Fusion(), f"called {len(chains)} times, and its results go on differently"
            if fusion.norm or fusion.steps:
                _set_class(conv, FusedConv2d)
                conv._fusion, conv._folded = fusion, None
                self.report.fused.append((self.names[conv], str(fusion)))
            if fusion.steps:
                fused.update(*(chain.taken for chain in chains))
            if stopped:
                self.report.left_alone.append((self.names[conv], stopped))
        for (name, op), nodes in self.functions.items():
            places = [node.meta["where"] for node in nodes if node not in fused]
            if places:
                where = f"{os.path.basename(places[0][0])}:{places[0][1]}"
                times = f", {len(places)} calls" if len(places) > 1 else ""
                why = f"its forward calls torch's {op} ({where}{times}): call fastnn.nn.functional's"
                self.report.left_alone.append((name, why))
