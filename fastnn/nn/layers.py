"""The modules over fastnn's convolution, ReLU and max-pooling. Each is a subclass of its ``torch.nn`` counterpart with
the same signature and state_dict keys, so ``isinstance`` checks and saved weights carry over both ways."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import FunctionType
from typing import Any, Literal

from torch import Tensor, nn
from torch.jit import is_scripting  # type: ignore[attr-defined]
from torch.nn import functional as native
from torch.nn.modules.module import _has_any_global_hook

from fastnn.dispatch import use_kernels
from fastnn.nn import functional as F

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_SEERS = (*HOOKS, "_compiled_call_impl")


def hooked(modules: Iterable[nn.Module]) -> bool:
    """Whether a hook, or a compiler that has one of the modules to itself, takes what goes in and out of it."""
    return any(getattr(module, hooks) for module in modules for hooks in _SEERS)


def named(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
    """A method of torch's under another name, by which TorchScript compiles it beside the one that replaces it here."""
    return FunctionType(method.__code__, method.__globals__, name)


def fusable_pool(
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> tuple[tuple[int, int], tuple[int, int]] | None:
    """Window and stride of a max-pool with these arguments; None if a convolution cannot take it over."""
    window = F._pair(kernel_size)
    step = F.pool_step(window, stride)
    if window is None or step is None or window[0] * window[1] > F.MAX_POOL2D_WINDOW:
        return None
    if ceil_mode is not False or return_indices is not False:
        return None
    plain = F._pair(padding) == [0, 0] and F._pair(dilation) == [1, 1]
    return ((window[0], window[1]), (step[0], step[1])) if plain else None


def fusable_pool_of(module: nn.MaxPool2d) -> tuple[tuple[int, int], tuple[int, int]] | None:
    """``fusable_pool`` of the module's arguments."""
    names = ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")
    return fusable_pool(*(getattr(module, name) for name in names))


def convolve(
    module: nn.Conv2d, operator: Callable[..., Tensor], input: Tensor, weight: Tensor, bias: Tensor | None, *pool: Any
) -> Tensor:
    """``operator``, one of ``fastnn.nn.functional``'s, with the module's arguments; padding_mode is applied first."""
    padding: Any = module.padding
    if module.padding_mode != "zeros":
        input = F.pad(input, module._reversed_padding_repeated_twice, mode=module.padding_mode)
        padding = 0
    return operator(input, weight, bias, module.stride, padding, module.dilation, module.groups, *pool)


class Conv2d(nn.Conv2d):
    """:class:`torch.nn.Conv2d` on fastnn's kernels: ``(N, C_in, H, W)`` or ``(C_in, H, W)`` in, the same rank out.

    float64, float32, bfloat16 and float16 run on the kernels, other dtypes natively; every ``padding_mode`` and both
    memory formats are covered. Raises what :class:`torch.nn.Conv2d` raises.
    """

    _native_conv_forward = named("_native_conv_forward", nn.Conv2d._conv_forward)

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if not is_scripting():
            return convolve(self, F.conv2d, input, weight, bias)
        return self._native_conv_forward(input, weight, bias)


class LazyConv2d(nn.LazyConv2d):
    """:class:`torch.nn.LazyConv2d` that becomes fastnn's Conv2d at its first call."""

    cls_to_become = Conv2d


class ReLU(nn.ReLU):
    """:class:`torch.nn.ReLU` on fastnn's kernels: any shape and strides, in place if ``inplace``."""

    _native_forward = named("_native_forward", nn.ReLU.forward)

    def forward(self, input: Tensor) -> Tensor:
        if not is_scripting():
            return F.relu(input, self.inplace)
        return self._native_forward(input)


class MaxPool2d(nn.MaxPool2d):
    """:class:`torch.nn.MaxPool2d` on fastnn's kernels: ``(N, C, H, W)`` or ``(C, H, W)`` in, the same rank out.

    float64, float32, bfloat16 and float16 run on the kernels, on the CPU; ``return_indices`` goes to native torch.
    """

    _native_forward = named("_native_forward", nn.MaxPool2d.forward)

    # TorchScript finds out what it returns, which depends on return_indices.
    def forward(self, input: Tensor):  # type: ignore[no-untyped-def]
        if not is_scripting():
            max_pool2d: Any = F.max_pool2d
            window = (self.kernel_size, self.stride, self.padding, self.dilation)
            return max_pool2d(input, *window, ceil_mode=self.ceil_mode, return_indices=self.return_indices)
        return self._native_forward(input)


class ConvReLU2d(Conv2d):
    """``ReLU(Conv2d(input))`` in one pass: what :class:`torch.nn.Conv2d` followed by :class:`torch.nn.ReLU` computes.

    Arguments, shapes, dtypes, state_dict keys and errors are those of :class:`torch.nn.Conv2d`.
    """

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if not is_scripting():
            return convolve(self, F.conv2d_relu, input, weight, bias)
        return native.relu(self._native_conv_forward(input, weight, bias))


class ConvReLUMaxPool2d(Conv2d):
    """``MaxPool2d(ReLU(Conv2d(input)))`` in one pass that keeps one byte an output element for backward.

    Arguments, state_dict keys and errors are those of :class:`torch.nn.Conv2d`, then those of
    :class:`torch.nn.MaxPool2d`.

    Args:
        pool_kernel_size: the pooling window, an int or a pair.
        pool_stride: its stride; ``pool_kernel_size`` by default.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: str | int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: Literal["zeros", "reflect", "replicate", "circular"] = "zeros",
        pool_kernel_size: int | tuple[int, int] = 2,
        pool_stride: int | tuple[int, int] | None = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype
        )
        self.pool_kernel_size = pool_kernel_size
        self.pool_stride = pool_kernel_size if pool_stride is None else pool_stride

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if not is_scripting():
            pool = (self.pool_kernel_size, self.pool_stride)
            return convolve(self, F.conv2d_relu_max_pool2d, input, weight, bias, *pool)
        result = native.relu(self._native_conv_forward(input, weight, bias))
        return native.max_pool2d(result, self.pool_kernel_size, self.pool_stride)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, pool_kernel_size={self.pool_kernel_size}, pool_stride={self.pool_stride}"


class Sequential(nn.Sequential):
    """:class:`torch.nn.Sequential` that runs a Conv2d, the ReLU behind it and the MaxPool2d behind that as one op.

    Nothing but a hook can see what is between them: where one is on any of them, or on every module, they run one by
    one.
    """

    def forward(self, input: Tensor) -> Tensor:
        if not is_scripting():
            return _run(list(self), input)
        for module in self:
            input = module(input)
        return input


def _run(modules: list[nn.Module], input: Tensor) -> Tensor:
    """The modules one after another on ``input``, as one op where they are Conv2d, ReLU (and MaxPool2d)."""
    done = 0
    while done < len(modules):
        conv, *others = modules[done : done + 3]
        kinds = [type(module) for module in others]
        pool = fusable_pool_of(others[1]) if kinds == [ReLU, MaxPool2d] else None  # type: ignore[arg-type]
        layers = [conv, *others[: 2 if pool else 1]]
        if (
            type(conv) is Conv2d
            and kinds[:1] == [ReLU]
            and type(input) is Tensor
            and not (_has_any_global_hook() or hooked(layers))
            and not any({"forward", "_conv_forward"} & vars(module).keys() for module in layers)
            and use_kernels("conv2d_relu", input)
        ):
            operator = F.conv2d_relu_max_pool2d if pool else F.conv2d_relu
            input = convolve(conv, operator, input, conv.weight, conv.bias, *pool or ())
            done += len(layers)
        else:
            input = conv(input)
            done += 1
    return input
