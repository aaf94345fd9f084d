"""The modules over fastnn's convolution, ReLU and max-pooling. Each is a subclass of its ``torch.nn`` counterpart with
the same signature and state_dict keys, so ``isinstance`` checks and saved weights carry over both ways."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from torch import Tensor, nn

from fastnn.nn import functional as F


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

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return convolve(self, F.conv2d, input, weight, bias)


class ReLU(nn.ReLU):
    """:class:`torch.nn.ReLU` on fastnn's kernels: any shape and strides, in place if ``inplace``."""

    def forward(self, input: Tensor) -> Tensor:
        return F.relu(input, self.inplace)


class MaxPool2d(nn.MaxPool2d):
    """:class:`torch.nn.MaxPool2d` on fastnn's kernels: ``(N, C, H, W)`` or ``(C, H, W)`` in, the same rank out.

    float64, float32, bfloat16 and float16 run on the kernels, on the CPU; ``return_indices`` goes to native torch.
    """

    def forward(self, input: Tensor) -> Any:
        max_pool2d: Any = F.max_pool2d
        window = (self.kernel_size, self.stride, self.padding, self.dilation)
        return max_pool2d(input, *window, ceil_mode=self.ceil_mode, return_indices=self.return_indices)


class ConvReLU2d(Conv2d):
    """``ReLU(Conv2d(input))`` in one pass: what :class:`torch.nn.Conv2d` followed by :class:`torch.nn.ReLU` computes.

    Arguments, shapes, dtypes, state_dict keys and errors are those of :class:`torch.nn.Conv2d`.
    """

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return convolve(self, F.conv2d_relu, input, weight, bias)


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
        pool = (self.pool_kernel_size, self.pool_stride)
        return convolve(self, F.conv2d_relu_max_pool2d, input, weight, bias, *pool)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, pool_kernel_size={self.pool_kernel_size}, pool_stride={self.pool_stride}"
