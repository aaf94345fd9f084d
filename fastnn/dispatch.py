"""Which implementation serves a call: the one place where that is decided.

The order is: the compiled kernels for the tensors' device, else Triton's, else native torch. A call that no kernel
covers goes to native torch, which also raises torch's own errors for wrong arguments; one DEBUG line in the ``fastnn``
logger says so, once per operator and reason.
"""

from __future__ import annotations

import importlib
import logging
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastnn import _C as _C  # loading the library registers torch.ops.fastnn
from fastnn import triton

logger = logging.getLogger("fastnn")

KERNEL_DTYPES = frozenset({torch.float64, torch.float32, torch.bfloat16, torch.float16})
BACKENDS = ("cpu", "cuda", "triton", "torch")

# ---- the registry: what there is, and where it runs ----

# Every op, the name of its files in csrc/cpu and, where KERNELS below has it, in csrc/cuda and fastnn/triton, with its
# operators in csrc/ops.cpp.
OPERATORS = {
    "conv2d": ("conv2d", "conv2d_relu_max_pool2d", "conv2d_backward"),
    "relu": ("relu", "relu_", "relu_backward"),
    "max_pool2d": ("max_pool2d", "max_pool2d_backward"),
    "cross_entropy": ("cross_entropy", "cross_entropy_backward"),
    "adam": ("adam_",),
    "sgd": ("sgd_",),
}
# The backends that have kernels, the preferred one first: the device types they run on, and the ops they have.
DEVICES = {"cpu": ("cpu",), "cuda": ("cuda",), "triton": ("cuda", "xpu")}
_ON_GPUS = tuple(op for op in OPERATORS if op != "max_pool2d")
KERNELS = {"cpu": tuple(OPERATORS), "cuda": _ON_GPUS, "triton": _ON_GPUS}
# Triton's interpreter takes CPU tensors, slowly: it is for tests, and is used only where it is forced.
FORCED_DEVICES = {**DEVICES, "triton": (*DEVICES["triton"], "cpu")}


def _load_cuda() -> str | None:
    """Registers the CUDA kernels; or why there are none."""
    if torch.version.cuda is None:
        return "this torch is not a CUDA build"
    try:
        LIBRARIES["cuda"] = importlib.import_module("fastnn._C_cuda")
    except ModuleNotFoundError:
        return "this build has no CUDA kernels"
    except ImportError as error:
        return f"its library does not load: {error}"
    return None if torch.cuda.is_available() else "torch sees no CUDA device"


# The compiled kernels' own entry points, past the dispatcher, of the backends that have them.
LIBRARIES: dict[str, Any] = {"cpu": _C}
CUDA_OFF = _load_cuda()


def has_code_for(capability: tuple[int, int], architectures: str) -> bool:
    """Whether code compiled for ``architectures``, "8.0;9.0a;12.0+PTX" say, runs on a CUDA device of this capability.

    Machine code does on that minor version and later ones of the same major, PTX on all later devices; both of "a" on
    that one alone. A list with names in it ("Ampere") is taken to fit.
    """
    for architecture in re.split("[; ]+", architectures.strip()):
        parts = re.fullmatch(r"(\d+)\.(\d)(a?)(\+PTX)?", architecture)
        if parts is None:
            return True
        built = (int(parts[1]), int(parts[2]))
        if built == capability or (built < capability and not parts[3] and (parts[4] or built[0] == capability[0])):
            return True
    return False


def _why_cuda_off(device: torch.device) -> str | None:
    if CUDA_OFF is not None:
        return CUDA_OFF
    capability, architectures = torch.cuda.get_device_capability(device), LIBRARIES["cuda"].architectures
    if has_code_for(capability, architectures):
        return None
    return f"its kernels are compiled for {architectures}, and {device} is {'.'.join(map(str, capability))}"


NO_KERNEL = "it has no kernel of this op"


def why_off(backend: str, op: str, device: torch.device, dtype: torch.dtype = torch.float32) -> str | None:
    """Why the kernels of ``backend`` cannot serve ``op`` on tensors of this device and dtype; None if they can."""
    if op not in KERNELS[backend]:
        return NO_KERNEL
    if device.type not in FORCED_DEVICES[backend]:
        return f"it has no kernels for {device.type} tensors"
    if backend == "cuda":
        return _why_cuda_off(device)
    return triton.why_off(op, device, dtype) if backend == "triton" else None


# ---- the choice ----

PLAIN_TYPES = frozenset({Tensor, torch.nn.Parameter})
_logged: set[tuple[str, str]] = set()
_choices: dict[tuple[str, torch.device, torch.dtype, str | None], tuple[str, str]] = {}


def _checked(name: object, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source}{name!r}, expected one of {', '.join(map(repr, BACKENDS))}")
    return str(name)


_of_process = os.environ.get("FASTNN_BACKEND") or None
_forced: ContextVar[str | None] = ContextVar(
    "fastnn_backend", default=_of_process and _checked(_of_process, "FASTNN_BACKEND is ")
)


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Force the implementation of every fastnn call inside the ``with`` block (of this thread or task).

    The backward pass of such a call runs on the same implementation, wherever it is called. ``FASTNN_BACKEND`` forces
    one for a whole process. What :func:`torch.compile` compiles keeps the one that was forced when it did.

    Args:
        name: ``'cpu'`` or ``'cuda'`` for the compiled kernels, ``'triton'``, or ``'torch'`` for native PyTorch. A call
            that the forced kernels do not cover gives the native result. ``'triton'`` on CPU tensors is Triton's
            interpreter, and needs ``TRITON_INTERPRET=1`` in the environment.

    Raises:
        ValueError: ``name`` is none of these.
    """
    token = _forced.set(_checked(name, "backend() got name="))
    try:
        yield
    finally:
        _forced.reset(token)


def forced() -> str | None:
    """The backend forced here, if one is. A compiled function keeps what this was when it was compiled."""
    return _forced.get()


# What torch.compiler.assume_constant_result sets, without that function's import of the whole compiler.
forced._dynamo_marked_constant = True  # type: ignore[attr-defined]


@contextmanager
def forced_to(name: str | None) -> Iterator[None]:
    """Force what :func:`forced` returned elsewhere."""
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


def log_once(op: str, reason: str) -> None:
    """One DEBUG line per operator and reason: why a call went, or was compiled to go, to native torch."""
    if (op, reason) not in _logged:
        _logged.add((op, reason))
        logger.debug("%s: native torch, because %s", op, reason)


log_once._dynamo_marked_constant = True  # type: ignore[attr-defined]  # it runs while the compiler traces


def choice(call: str, device: torch.device, dtype: torch.dtype) -> tuple[str, str]:
    """The backend that serves ``call`` on tensors of this device and dtype, and why none but ``'torch'`` does."""
    name = forced()
    key = (call, device, dtype, name)
    if key not in _choices:
        op = next(op for op in OPERATORS if call.startswith(op))  # conv2d_relu is one of conv2d's
        candidates = [b for b in KERNELS if device.type in DEVICES[b]] if name is None else [name]
        reasons = {b: why_off(b, op, device, dtype) for b in candidates if b != "torch"}
        served = next((b for b, reason in reasons.items() if reason is None), None)
        if served is not None:
            _choices[key] = served, ""
        elif reasons:
            _choices[key] = "torch", "; ".join(f"{b} is off: {reason}" for b, reason in reasons.items())
        else:
            _choices[key] = "torch", "" if name == "torch" else f"device {device.type} has no kernel"
    return _choices[key]


choice._dynamo_marked_constant = True  # type: ignore[attr-defined]


_ON_CPU = (torch.device("cpu"), torch.float32)
# What every call asks, by short names: a small convolution takes as long as a hundred lookups.
is_compiling = torch.compiler.is_compiling
are_transforms_active = torch._C._are_functorch_transforms_active
_is_tracing = torch._C._is_tracing


def _kind(op: str, tensors: tuple[Tensor | None, ...]) -> tuple[torch.device, torch.dtype] | None:
    """The device and dtype of a call's tensors; None, logged, if no kernel takes them, whatever these are."""
    first: Tensor | None = None
    for number, tensor in enumerate(tensors):
        if tensor is None and number > 0:
            continue
        if not isinstance(tensor, Tensor):
            log_once(op, "an argument is no tensor")
        elif type(tensor) not in PLAIN_TYPES:
            log_once(op, f"of a {type(tensor).__name__} argument")
        elif tensor.dtype not in KERNEL_DTYPES:
            log_once(op, f"dtype {tensor.dtype} has no kernel")
        elif tensor.layout is not torch.strided:
            log_once(op, f"layout {tensor.layout} has no kernel")
        elif first is not None and tensor.device != first.device:
            log_once(op, f"devices {first.device} and {tensor.device} are mixed")
        elif first is not None and tensor.dtype is not first.dtype:
            log_once(op, f"dtypes {first.dtype} and {tensor.dtype} are mixed")
        else:
            first = first if first is not None else tensor
            continue
        return None
    return _ON_CPU if first is None else (first.device, first.dtype)


def use_kernels(op: str, *tensors: Tensor | None) -> bool:
    """Whether fastnn's kernels serve a call of ``op`` on these floating-point arguments, of which the first is
    required (None: not given).

    False sends the call to native torch: another dtype (or mixed ones), device, layout or tensor subclass, a
    torch.func transform, forward-mode AD, torch.jit.trace, or ``backend('torch')``.
    """
    # Mostly one question to C; the compiler cannot look into that, and asks in Python.
    compiling = is_compiling()
    plain = not compiling and _forced.get() is None and _C.are_plain(*tensors)
    kind = _ON_CPU if plain else _kind(op, tensors)
    if kind is None:
        return False
    if not compiling and _is_tracing():  # would record a call past the dispatcher as a constant
        log_once(op, "of torch.jit.trace")
        return False
    if are_transforms_active():
        log_once(op, "of a torch.func transform")
        return False
    if forward_ad._current_level >= 0:
        log_once(op, "of forward-mode AD")
        return False
    if not plain and (forced() is not None or kind[0].type != "cpu"):  # else the CPU's kernels, which are always there
        backend, reason = choice(op, *kind)
        if backend == "torch":
            if reason:
                log_once(op, reason)
            return False
    return True


# ---- the implementation ----

_operators: dict[str, Callable[..., Any]] = {}
# The device types, of those without compiled kernels, whose operators are Triton's.
TRITON_REGISTERED = {device_type for device_type in DEVICES["triton"] if device_type not in LIBRARIES}
_dispatch_modes = torch._C._len_torch_dispatch_stack
_function_modes = torch._C._len_torch_function_stack
profiler_enabled = torch._C._autograd._profiler_enabled
# Inside it a call goes straight to the device's kernel, past the Python rule that ops/autograd.py registers.
BelowAutograd = torch._C._AutoDispatchBelowAutograd


def kernel(operator: str, args: tuple[Any, ...]) -> Callable[..., Any]:
    """What computes ``torch.ops.fastnn.<operator>`` of these arguments: Triton's function where that is chosen, unless
    a mode or profiler can see the operator on the way; else what is registered for the tensors' device."""
    first = triton.first_tensor(args)
    if first is None or choice(operator, first.device, first.dtype)[0] != "triton":
        return _operators[operator]
    if not _dispatch_modes() and not profiler_enabled():
        return triton.function(operator)
    return overload(operator, first)


def overload(operator: str, tensor: Tensor) -> Callable[..., Any]:
    """The overload of ``torch.ops.fastnn.<operator>`` that is this call to what sees operators (the compiler, a mode, a
    profiler): ``triton`` where that is chosen and ``default`` is compiled kernels."""
    chosen = choice(operator, tensor.device, tensor.dtype)[0]
    name = "triton" if chosen == "triton" and tensor.device.type not in TRITON_REGISTERED else "default"
    return cast(Callable[..., Any], getattr(getattr(torch.ops.fastnn, operator), name))


def overloads(operator: str) -> list[str]:
    """The full names of both, or of the one there is."""
    has_triton = any(operator in OPERATORS[op] for op in KERNELS["triton"])
    return [f"fastnn::{operator}", *[f"fastnn::{operator}.triton"] * has_triton]


def run(operator: str, *args: Any) -> Any:
    """The implementation's result, below autograd: by the compiled kernels' own entry point, past torch's dispatcher,
    where there is one and nothing that watches operators there (a mode, a profiler) is on."""
    watched = _dispatch_modes() or _function_modes() or profiler_enabled() or _forced.get() == "triton"
    if args[0].is_cpu and not watched and (straight := getattr(LIBRARIES["cpu"], operator, None)) is not None:
        try:
            return straight(*args)
        except _C.NotCovered:  # only the dispatcher will do
            pass
    return run_dispatched(operator, *args)


def run_dispatched(operator: str, *args: Any) -> Any:
    """The same, always through the dispatcher."""
    with BelowAutograd():
        return kernel(operator, args)(*args)


def _register() -> None:
    """Triton's functions, as the operators of TRITON_REGISTERED and as an overload; nothing of Triton is loaded by
    this."""

    def loading(op: str, operator: str) -> Callable[..., Any]:
        def load_and_call(*args: Any) -> Any:
            tensor = triton.first_tensor(args)
            if tensor is not None and tensor.dtype in KERNEL_DTYPES:  # Triton's function itself refuses others
                reason = triton.why_off(op, tensor.device, tensor.dtype)
                if reason is not None:
                    raise NotImplementedError(f"fastnn::{operator}: no compiled kernels, and triton is off: {reason}")
            return triton.function(operator)(*args)

        return load_and_call

    # A step sends a table from the host, which a graph of the device would send as it was.
    tags = dict.fromkeys(("adam", "sgd"), (torch.Tag.cudagraph_unsafe,))
    for op, operators in OPERATORS.items():
        for operator in operators:
            default = _operators[operator] = getattr(torch.ops.fastnn, operator).default
            if op in KERNELS["triton"]:
                name, function = f"fastnn::{operator}", loading(op, operator)
                torch.library.define(f"{name}.triton", str(default._schema).removeprefix(name), tags=tags.get(op, ()))
                torch.library.impl(f"{name}.triton", FORCED_DEVICES["triton"], function)
                for device_type in TRITON_REGISTERED:
                    torch.library.impl(name, device_type, function)


_register()
