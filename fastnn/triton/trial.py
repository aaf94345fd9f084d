"""The smallest calls that run the kernels of an op, with results that are known: what is tried before the first call of
a dtype on a device.

Each kernel is tried with all that it may do: the matrix units where the dtype has them, the largest blocks, every
optional operand. Whatever Triton refuses to compile for the device shows here, before any call depends on it.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from fastnn.triton.adam import adam_
from fastnn.triton.conv2d import MAX_COLUMNS, conv2d_backward, conv2d_relu_max_pool2d
from fastnn.triton.cross_entropy import SUM, cross_entropy, cross_entropy_backward
from fastnn.triton.relu import relu, relu_backward
from fastnn.triton.sgd import sgd_

# A function makes a tensor of ones of a shape; an op returns the sums to expect of some results.
Ones = Callable[..., Tensor]
Sums = list[tuple[Tensor, float]]
TOLERANCE = 1e-2  # what rounding to 16 bits may change


def _conv2d(ones: Ones) -> Sums:
    channels = MAX_COLUMNS
    x, weight = ones(1, channels, 2, 2), ones(channels, channels, 1, 1)
    geometry = ([1, 1], [0, 0, 0, 0], [1, 1], 1)
    pool = ([2, 2], [2, 2])
    pooled, code = conv2d_relu_max_pool2d(x, weight, ones(channels), *geometry, *pool)
    grads = conv2d_backward(ones(*pooled.shape), x, weight, None, code, *geometry, *pool, [True, True, True])
    of_results = channels * (channels + 1)
    # Of a window's four equal elements the first has the gradient.
    return [(pooled, of_results), *zip(grads, (channels**2, channels**2, channels), strict=True)]


def _relu(ones: Ones) -> Sums:
    below, above = relu(-ones(1)), relu(ones(1))
    return [(below, 0), (above, 1), (relu_backward(ones(1), below), 0), (relu_backward(ones(1), above), 1)]


def _cross_entropy(ones: Ones) -> Sums:
    x, weight, target = ones(1, 2), ones(2), ones(1).to(torch.int64)
    options = (SUM, -100, 0.5)
    loss, stats = cross_entropy(x, target, weight, *options)
    grad = cross_entropy_backward(ones(), x, target, weight, stats, *options)
    return [(loss, math.log(2)), (grad[:, 0], 0.25), (grad[:, 1], -0.25)]


def _adam(ones: Ones) -> Sums:
    p, g, m, v, v_max = ([ones(1)] for _ in range(5))
    lr, beta1, beta2, weight_decay, eps = 1.0, 0.5, 0.75, 0.5, 0.0
    for state in (m, v, v_max):
        state[0].zero_()
    adam_(p, g, m, v, v_max, [torch.zeros(())], lr, beta1, beta2, weight_decay, eps, True, True, True, 1.0)
    return [(p[0], 1.5), (m[0], -0.5), (v[0], 0.25), (v_max[0], 0.25)]


def _sgd(ones: Ones) -> Sums:
    p, g, b = ([ones(1)] for _ in range(3))
    lr, momentum, dampening, weight_decay = 0.5, 0.5, 0.5, 1.0
    sgd_(p, g, b, [], lr, momentum, dampening, weight_decay, True, False, False, 1.0)
    return [(p[0], -0.375), (b[0], 1.5)]


TRIALS: dict[str, Callable[[Ones], Sums]] = {
    "conv2d": _conv2d,
    "relu": _relu,
    "cross_entropy": _cross_entropy,
    "adam": _adam,
    "sgd": _sgd,
}


def is_right(op: str, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernels of ``op`` compute what they should there; raises what Triton raises where they do not run."""
    sums = TRIALS[op](lambda *shape: torch.ones(shape, device=device, dtype=dtype))
    # A device's float64, which it may lack, is not needed for this.
    return all(math.isclose(result.float().sum().item(), value, abs_tol=TOLERANCE) for result, value in sums)
