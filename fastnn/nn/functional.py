"""All of ``torch.nn.functional``, with ``conv2d``, ``relu``, ``max_pool2d`` and ``cross_entropy`` on fastnn's
kernels."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, TypeGuard

import numpy as np
import torch
from torch import Tensor
from torch.nn import _reduction as _Reduction
from torch.nn import functional as native
from torch.overrides import handle_torch_function, has_torch_function_unary

if TYPE_CHECKING:
    from torch.nn.functional import max_pool2d as max_pool2d  # whose overloads are ours too
else:
    from torch.nn.functional import *  # noqa: F403

from fastnn import ops as _ops
from fastnn.dispatch import _C, PLAIN_TYPES, forced, is_compiling, log_once, use_kernels

UNTAKEN = "the kernels do not take these arguments"  # which may be wrong: native torch then raises

IntPair = int | tuple[int, ...] | list[int]

# A strided convolution splits its input into stride_h * stride_w phases; csrc/cpu/kernels/conv2d.h holds as many.
MAX_CONV2D_PHASES = 64

MAX_POOL2D_WINDOW = _ops.max_pool2d.NO_ELEMENT  # elements: their numbers, and that one for none, fit into a byte

# Up to here a ReLU takes some microseconds, as long as a call through autograd.Function, and a cross-entropy's forward
# and backward pass together take no longer in native torch than in the kernels (docs/benchmarks.md).
MAX_FEW_ELEMENTS = 16 * 1024
MAX_FEW_LOGITS = 8 * 1024


if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        return getattr(native, name)


def _autocast(*args: Any, to: torch.dtype | None = None) -> Any:
    """What autocast, if it is on for the first argument's device, does to the arguments of an operator that it runs in
    ``to`` (None: its own dtype)."""
    on_cpu = not isinstance(args[0], Tensor) or args[0].is_cpu
    device_type = "cpu" if on_cpu else args[0].device.type
    if not (on_cpu or torch.amp.is_autocast_available(device_type)) or not torch.is_autocast_enabled(device_type):
        return args
    dtype = to or torch.get_autocast_dtype(device_type)

    def cast(arg: Any) -> Any:
        low = isinstance(arg, Tensor) and arg.is_floating_point() and arg.dtype is not torch.float64
        return arg.to(dtype) if low and arg.device.type == device_type else arg

    return map(cast, args)


def relu(input: Tensor, inplace: bool = False) -> Tensor:
    """``max(input, 0)`` elementwise, NaN kept. As :func:`torch.nn.functional.relu`.

    Args:
        input: any shape and strides; float64, float32, bfloat16 or float16 on fastnn's kernels, others natively, and so
            are tensors of up to 16384 elements, unless :func:`fastnn.backend` forces the kernels.
        inplace: write the result into ``input``.
    """
    if _overrides(input):
        return handle_torch_function(native.relu, (input,), input, inplace=inplace)
    if is_compiling():  # which could not fuse an operator of ours
        log_once("relu", "torch.compile fuses its own into what stands beside it")
        return native.relu(input, inplace)
    if _few("relu", input, MAX_FEW_ELEMENTS) or not use_kernels("relu", input):
        return native.relu(input, inplace)
    if inplace and (input.is_neg() or not _writable(input)):  # a copy stands in for what is negated lazily
        log_once("relu", UNTAKEN)
        return native.relu(input, inplace)
    return _ops.relu.relu_(input) if inplace else _ops.relu.relu(input)


def _overrides(input: object) -> bool:
    """Whether ``input`` has torch's own protocol, which fastnn.convert and torch.fx build on. A TorchFunctionMode, as
    every ``torch.device`` context and default device is, sees a call of native torch alone."""
    return type(input) not in PLAIN_TYPES and has_torch_function_unary(input)


def _few(op: str, input: Tensor, most: int) -> bool:
    """Whether a call is native torch's for being small: it is as exact there, and costs less."""
    few = forced() is None and isinstance(input, Tensor) and input.numel() <= most
    if few:
        log_once(op, f"a small tensor, of up to {most} elements, takes less time there")
    return few


def _writable(input: Tensor) -> bool:
    """Whether torch lets ``input`` be written in place; where not, native torch says why."""
    if input.requires_grad and input.is_leaf and torch.is_grad_enabled():
        return False
    if input.is_inference() and not torch.is_inference_mode_enabled():
        return False
    return input.is_contiguous() or torch._debug_has_internal_overlap(input) != 1


def relu_(input: Tensor) -> Tensor:
    """``relu(input, inplace=True)``."""
    return relu(input, inplace=True)


def _is_sequence(value: object) -> TypeGuard[tuple[Any, ...] | list[Any]]:
    return isinstance(value, (tuple, list))


def _pair(value: object) -> list[int] | None:
    """Two ints of an int, or of a sequence of one or two; None for anything else, which native torch will refuse, and
    for ints over 31 bits, which it mostly will."""
    values: Any = value if _is_sequence(value) else [value]
    values = [int(v) if isinstance(v, np.integer) else v for v in values]
    if 1 <= len(values) <= 2 and all(type(v) is int and abs(v) < 2**31 for v in values):
        return [*values, *values][:2]
    return None


def pool_step(window: list[int] | None, stride: object) -> list[int] | None:
    """``_pair`` of a max-pool's stride, which is the window where it is left out."""
    return window if stride is None or (_is_sequence(stride) and not stride) else _pair(stride)


Geometry = tuple[list[int], list[int], list[int], int]


def _geometry(
    input: torch.Size,
    weight: torch.Size,
    bias: torch.Size | None,
    options: tuple[IntPair, str | IntPair, IntPair, int],
) -> Geometry | None:
    """Stride, (top, left, bottom, right) padding, dilation and groups as the operators take them, of a convolution of
    tensors of these shapes; None for a wrong one."""
    stride, padding, dilation, groups = options
    if len(weight) != 4 or len(input) not in (3, 4):
        return None
    strides, dilations = _pair(stride), _pair(dilation)
    if strides is None or dilations is None or min(strides) < 1 or min(dilations) < 1:
        return None
    if type(groups) is not int or groups < 1:
        return None
    out_channels, in_channels, *kernel = weight
    if isinstance(padding, str):
        if padding not in ("same", "valid") or (padding == "same" and strides != [1, 1]):
            return None
        total = [d * (k - 1) if padding == "same" else 0 for d, k in zip(dilations, kernel, strict=True)]
        pads = [t // 2 for t in total] + [t - t // 2 for t in total]
    else:
        pair = _pair(padding)
        if pair is None or min(pair) < 0:
            return None
        pads = pair + pair
    if input[-3] != in_channels * groups or out_channels % groups or 0 in weight:
        return None
    if bias is not None and (len(bias) != 1 or bias[0] != out_channels):
        return None
    if min(_ops.conv2d.output_size(input, weight, strides, pads, dilations)) < 1:
        return None
    return strides, pads, dilations, groups


_cached_geometry = functools.lru_cache(_geometry)


def _conv_geometry(
    op: str, input: Tensor, weight: Tensor, bias: Tensor | None, options: tuple[Any, ...]
) -> Geometry | None:
    """What ``_geometry`` finds; None where the call is not fastnn's to serve, a wrong one included: native torch then
    raises its own error."""
    if weight is None or not use_kernels(op, input, weight, bias):
        return None
    # A float would find its int in the cache, and torch refuses it.
    cached = not is_compiling() and _C.are_ints(*options)
    find = _cached_geometry if cached else _geometry
    geometry = find(input.shape, weight.shape, None if bias is None else bias.shape, options)
    if geometry is None:
        log_once(op, UNTAKEN)
        return None
    if geometry[0][0] * geometry[0][1] > MAX_CONV2D_PHASES:
        log_once(op, f"stride {tuple(geometry[0])} is larger than the kernels take")
        return None
    on_gpu = not input.is_cpu or forced() == "triton"
    if on_gpu and not _ops.conv2d.is_countable(input.shape, weight.shape, geometry[1]):
        log_once(op, "an image or a weight is larger than the kernels of GPUs take")
        return None
    return geometry


def _conv2d(
    op: str, relu: bool, input: Tensor, weight: Tensor, bias: Tensor | None, options: tuple[Any, ...]
) -> Tensor:
    """``conv2d`` or, with ``relu``, ``conv2d_relu``; ``options`` from stride on."""
    if torch._C._is_any_autocast_enabled():
        input, weight, bias = _autocast(input, weight, bias)
    geometry = _conv_geometry(op, input, weight, bias, options)
    if geometry is None:
        result = native.conv2d(input, weight, bias, *options)
        return native.relu(result) if relu else result
    if input.dim() == 4:
        return _ops.conv2d.conv2d(input, weight, bias, *geometry, relu)
    return _ops.conv2d.conv2d(input.unsqueeze(0), weight, bias, *geometry, relu).squeeze(0)


def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: IntPair = 1,
    padding: str | IntPair = 0,
    dilation: IntPair = 1,
    groups: int = 1,
) -> Tensor:
    """2-D convolution. As :func:`torch.nn.functional.conv2d`.

    Args:
        input: (N, C, H, W) or (C, H, W), any strides; float64, float32, bfloat16 or float16 on fastnn's kernels.
        weight: (K, C / groups, R, S), of the dtype of ``input``.
        bias: (K,) or None.
        stride, dilation: an int or two, rows first.
        padding: an int or two, ``'valid'`` or ``'same'``.
        groups: divides C and K.

    Returns:
        (N, K, H', W') or (K, H', W'), channels_last if ``input`` or ``weight`` is.

    Raises:
        RuntimeError: shapes that do not fit together, as torch raises it.
    """
    return _conv2d("conv2d", False, input, weight, bias, (stride, padding, dilation, groups))


def conv2d_relu(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: IntPair = 1,
    padding: str | IntPair = 0,
    dilation: IntPair = 1,
    groups: int = 1,
) -> Tensor:
    """``relu(conv2d(...))`` in one pass; arguments and errors of :func:`conv2d`."""
    return _conv2d("conv2d_relu", True, input, weight, bias, (stride, padding, dilation, groups))


def conv2d_relu_max_pool2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: IntPair = 1,
    padding: str | IntPair = 0,
    dilation: IntPair = 1,
    groups: int = 1,
    pool_kernel_size: IntPair = 2,
    pool_stride: IntPair | None = None,
) -> Tensor:
    """``max_pool2d(relu(conv2d(...)), pool_kernel_size, pool_stride)`` in one pass.

    The convolution's result is never in memory as a whole, and backward keeps one byte an element of the pooled result:
    which element of its window it was.

    Args:
        pool_kernel_size: the window, an int or two, rows first.
        pool_stride: an int or two; None: ``pool_kernel_size``.

    The other arguments, the result's memory format and the errors are those of :func:`conv2d`.
    """
    if torch._C._is_any_autocast_enabled():
        input, weight, bias = _autocast(input, weight, bias)
    op = "conv2d_relu_max_pool2d"
    geometry = _conv_geometry(op, input, weight, bias, (stride, padding, dilation, groups))
    window = _pair(pool_kernel_size)
    step = pool_step(window, pool_stride)
    if geometry is not None:
        size = _ops.conv2d.output_size(input.shape, weight.shape, *geometry[:3])
        if window is None or step is None:
            log_once(op, UNTAKEN)
        elif window[0] * window[1] > MAX_POOL2D_WINDOW:
            log_once(op, f"a {window[0]} x {window[1]} window has over {MAX_POOL2D_WINDOW} elements")
        elif min(window + step) > 0 and window[0] <= size[0] and window[1] <= size[1]:  # else torch raises
            batch = input if input.dim() == 4 else input.unsqueeze(0)
            output, _ = _ops.conv2d.conv2d_relu_max_pool2d(batch, weight, bias, *geometry, window, step)
            return output if input.dim() == 4 else output.squeeze(0)
    result = native.relu(native.conv2d(input, weight, bias, stride, padding, dilation, groups))
    return native.max_pool2d(result, pool_kernel_size, pool_stride)


def _pool_geometry(
    input: Tensor, kernel_size: IntPair, stride: IntPair | None, padding: IntPair, dilation: IntPair, ceil_mode: bool
) -> tuple[list[int], ...] | None:
    """Kernel size, stride, padding and dilation as the operator takes them; None where the call is not fastnn's to
    serve, a wrong one included: native torch then raises its own error."""
    window = _pair(kernel_size)
    step = pool_step(window, stride)
    pads, dilations = _pair(padding), _pair(dilation)
    if not use_kernels("max_pool2d", input):
        return None
    if (
        window is None
        or step is None
        or pads is None
        or dilations is None
        or type(ceil_mode) is not bool
        or min(window + step + dilations) < 1
        or min(pads) < 0
        or input.dim() not in (3, 4)
        or 0 in input.shape[-3:]
        or any(pads[d] > window[d] // 2 for d in range(2))
        or min(_ops.max_pool2d.output_size([*input.shape[-2:]], window, step, pads, dilations, ceil_mode)) < 1
    ):
        log_once("max_pool2d", UNTAKEN)
        return None
    if window[0] * window[1] > MAX_POOL2D_WINDOW:
        log_once("max_pool2d", f"a {window[0]} x {window[1]} window has over {MAX_POOL2D_WINDOW} elements")
        return None
    return window, step, pads, dilations


def max_pool2d(
    input: Tensor,
    kernel_size: IntPair,
    stride: IntPair | None = None,
    padding: IntPair = 0,
    dilation: IntPair = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Any:
    """The largest element of each window. As :func:`torch.nn.functional.max_pool2d`.

    Backward keeps one byte an element of the result, where native torch keeps eight and the input.

    Args:
        input: (N, C, H, W) or (C, H, W), any strides; float64, float32, bfloat16 or float16 on fastnn's kernels (on the
            CPU), others natively.
        kernel_size: the window, an int or two, rows first; natively where it has over 255 elements.
        stride: an int or two; None: ``kernel_size``.
        padding: an int or two, at most half a window: infinitely negative elements on all sides.
        dilation: an int or two.
        ceil_mode: whether windows may hang over the lower and right end.
        return_indices: also return where the elements were, natively.

    Returns:
        (N, C, H', W') or (C, H', W'), channels_last if ``input`` is; with ``return_indices`` a pair.

    Raises:
        RuntimeError: as torch raises it.
    """
    if return_indices:
        log_once("max_pool2d", "of return_indices=True")
    elif not _overrides(input):
        geometry = _pool_geometry(input, kernel_size, stride, padding, dilation, ceil_mode)
        if geometry is not None:
            batch = input if input.dim() == 4 else input.unsqueeze(0)
            output, _ = _ops.max_pool2d.max_pool2d(batch, *geometry, ceil_mode)
            return output if input.dim() == 4 else output.squeeze(0)
    pool: Any = native.max_pool2d
    return pool(input, kernel_size, stride, padding, dilation, ceil_mode, return_indices)


def _few_logits(input: Tensor, target: Tensor, label_smoothing: float) -> bool:
    """Whether cross-entropy is native torch's for being small. Label smoothing and class probabilities take it several
    operators, and 16-bit logits it rounds on the way."""
    return (
        not is_compiling()
        and isinstance(label_smoothing, (int, float))
        and not label_smoothing
        and isinstance(target, Tensor)
        and not target.is_floating_point()
        and getattr(input, "dtype", None) in (torch.float32, torch.float64)
        and _few("cross_entropy", input, MAX_FEW_LOGITS)
    )


def _cross_entropy_covers(
    input: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, label_smoothing: float
) -> bool:
    """Whether the kernels take these arguments; whatever native torch refuses, they do not."""
    if not isinstance(target, Tensor):
        log_once("cross_entropy", UNTAKEN)
        return False
    probabilities = target.is_floating_point()
    if not use_kernels("cross_entropy", input, weight, target if probabilities else None):
        return False
    shape, target_shape = input.shape, target.shape
    dim = len(shape)
    classes = shape[1] if dim > 1 else shape[0] if dim == 1 else 0
    fits = classes > 0 and type(ignore_index) is int and -(2**63) <= ignore_index < 2**63
    fits = fits and isinstance(label_smoothing, (int, float)) and label_smoothing <= 1
    if weight is not None:
        fits = fits and weight.shape == (classes,) and not (weight.requires_grad and torch.is_grad_enabled())
    if probabilities:
        fits = fits and target_shape == shape and ignore_index < 0
    else:
        rows = target_shape[:1] == shape[:1] and target_shape[1:] == shape[2:] if dim > 1 else len(target_shape) == 0
        fits = fits and rows and type(target) is Tensor and target.layout is torch.strided
        fits = fits and (target.is_cpu if input.is_cpu else target.device == input.device)
        if target.dtype is torch.uint8:  # native torch takes it in only some of its paths
            fits = fits and dim <= 2 and not (weight is not None and label_smoothing > 0)
        else:
            fits = fits and target.dtype is torch.int64
    if not fits:
        log_once("cross_entropy", UNTAKEN)
    return fits


def _legacy_reduction(size_average: bool | None, reduce: bool | None) -> str:
    return _Reduction.legacy_get_string(size_average, reduce)


_legacy_reduction._dynamo_marked_constant = True  # type: ignore[attr-defined]  # its warning comes at compile time


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """Cross-entropy between logits and a target. As :func:`torch.nn.functional.cross_entropy`.

    One pass over the logits, keeping three values a row; backward writes the gradient straight from the logits.
    The gradient of an ignored row is 0 whatever its logits (native torch makes NaN of infinities there). Logits that
    were changed in place make backward raise (native torch keeps log-probabilities of its own).
    Up to 8192 float32 or float64 logits with class indices and no label smoothing are native torch's, which takes less
    time for them, unless :func:`fastnn.backend` forces the kernels.

    Args:
        input: logits, (C,), (N, C) or (N, C, d1, ..), any strides; float64, float32, bfloat16 or float16 on fastnn's
            kernels, others natively.
        target: class indices, shaped like ``input`` without C, int64 (or uint8 where ``input`` is (C,) or (N, C));
            or class probabilities, of the shape and dtype of ``input``.
        weight: a weight a class, (C,).
        size_average, reduce: deprecated; see ``reduction``.
        ignore_index: the class index of targets that do not count.
        reduction: ``'none'``, ``'mean'`` (over the weights of the targets that count; over N for probabilities) or
            ``'sum'``.
        label_smoothing: the share, in [0, 1], of the target that is spread evenly over all classes.

    Raises:
        IndexError: a class index is out of range.
        RuntimeError, ValueError: as native torch, in its words.
    """
    few = _few_logits(input, target, label_smoothing)
    if not few and torch._C._is_any_autocast_enabled():
        input, target, weight = _autocast(input, target, weight, to=torch.float32)
    if few or not _cross_entropy_covers(input, target, weight, ignore_index, label_smoothing):
        return native.cross_entropy(
            input, target, weight, size_average, ignore_index, reduce, reduction, label_smoothing
        )
    if size_average is not None or reduce is not None:
        reduction = _legacy_reduction(size_average, reduce)
    options = (_Reduction.get_enum(reduction), ignore_index, label_smoothing)
    return _ops.cross_entropy.cross_entropy(input, target, weight, *options)


if TYPE_CHECKING:  # which keeps the first of what has one name
    from torch.nn.functional import *  # noqa: F403
