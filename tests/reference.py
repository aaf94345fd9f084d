"""What the tests compare with: float64 results, errors in units of rounding, and the layouts a tensor can come in; and
which combinations of parameters they try."""

from collections.abc import Callable, Iterable, Sequence
from itertools import combinations, product
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor


def mostly_big(cases: Iterable[Any], *kept: int, emulated: bool = False) -> list[Any]:
    """The cases as a test's parameters, all but those at the positions ``kept`` marked as big."""
    big = pytest.mark.big(emulated=emulated)
    return [case if i in kept else pytest.param(case, marks=big) for i, case in enumerate(cases)]


def pairwise(*parameters: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Of all combinations a few, in which each value of a parameter meets each value of every other parameter."""

    def pairs(case: tuple[int, ...]) -> set[tuple[tuple[int, int], ...]]:
        return set(combinations(enumerate(case), 2))

    every = list(product(*(range(len(values)) for values in parameters)))
    missing, chosen = set().union(*map(pairs, every)), []
    while missing:
        chosen.append(max(every, key=lambda case: len(pairs(case) & missing)))
        missing -= pairs(chosen[-1])
    return [tuple(values[i] for values, i in zip(parameters, case, strict=True)) for case in chosen]


FLOATING = [torch.float64, torch.float32, torch.bfloat16, torch.float16]

# How much worse than native's an error may be, in units of the dtype's eps and of the sum of the absolute values of
# what was added up. A 16-bit result is rounded once at its end, the wider ones at every addition, in an order of their
# own (a plain loop over n terms is off by about sqrt(n) eps where they all have one sign).
SLACK = {torch.float64: 16, torch.float32: 16, torch.bfloat16: 1, torch.float16: 1}


def allow_tf32(allowed: bool) -> None:
    """torch.backends.cudnn.allow_tf32 = allowed, which torch's own test utilities forbid once they are imported."""
    torch._C._set_cudnn_allow_tf32(allowed)


def to_float64(tensor: Tensor | None) -> Tensor | None:
    """A contiguous float64 copy outside of any graph."""
    return None if tensor is None else tensor.detach().to(torch.float64, memory_format=torch.contiguous_format)


def values_and_gradients(
    function: Callable[..., Tensor], inputs: tuple[Tensor | None, ...], grad_output: Tensor
) -> list[Tensor]:
    """The result of ``function(*inputs)``, then the gradient of every input that is not None."""
    leaves = [None if t is None else t.detach().requires_grad_() for t in inputs]
    output = function(*leaves)
    return [output.detach(), *torch.autograd.grad(output, [t for t in leaves if t is not None], grad_output)]


def error(actual: Tensor, exact: Tensor, magnitude: Tensor) -> float:
    """The largest error of ``actual`` relative to the largest ``magnitude`` (the same sums over absolute values)."""
    if actual.numel() == 0:
        return 0.0
    scale = magnitude.max().clamp_min(torch.finfo(actual.dtype).tiny)
    return float((actual.to(torch.float64) - exact).abs().max() / scale)


def assert_bitwise_equal(actual: Tensor, expected: Tensor, what: str = "") -> None:
    """Equal bit for bit, except that any NaN equals any other."""
    assert actual.dtype is expected.dtype, what
    assert actual.shape == expected.shape, what
    same = (actual == expected) & (actual.signbit() == expected.signbit()) | actual.isnan() & expected.isnan()
    assert same.all(), f"{what}: {int((~same).sum())} of {same.numel()} elements differ, first at {first(~same)}"


def first(mask: Tensor) -> list[int]:
    return mask.nonzero()[0].tolist()


def _channels_last(t: Tensor) -> Tensor:
    return (
        t.contiguous(memory_format=torch.channels_last)
        if t.dim() == 4
        else t.movedim(0, -1).contiguous().movedim(-1, 0)
    )


def _transposed(t: Tensor) -> Tensor:
    return t.mT.contiguous().mT


def _sliced(t: Tensor) -> Tensor:
    """Every second element of a buffer filled with NaN between."""
    buffer = torch.full([2 * size + 1 for size in t.shape], float("nan"), dtype=t.dtype)
    view = buffer[tuple(slice(1, None, 2) for _ in t.shape)]
    return view.copy_(t)


def _offset(t: Tensor) -> Tensor:
    """Dense, but starting one element into its buffer, so that no vector of it is aligned."""
    buffer = torch.full([t.numel() + 2], float("nan"), dtype=t.dtype)
    return buffer[1:-1].view(t.shape).copy_(t)


def _expanded(t: Tensor) -> Tensor:
    """The first entry of the leading dimension, repeated with stride 0."""
    return t[:1].expand_as(t)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t,
    "channels_last": _channels_last,
    "transposed": _transposed,
    "sliced": _sliced,
    "offset": _offset,
    "expanded": _expanded,
}


def conv2d_numpy(
    input: np.ndarray,
    weight: np.ndarray,
    bias: np.ndarray | None,
    grad_output: np.ndarray | None,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
) -> tuple[np.ndarray, ...]:
    """conv2d by its definition, one kernel element at a time; (output, grad_input, grad_weight, grad_bias)."""
    (ph, pw), (sh, sw), (dh, dw) = padding, stride, dilation
    padded = np.pad(input, ((0, 0), (0, 0), (ph, ph), (pw, pw)))
    batch, channels, height, width = padded.shape
    out_channels, _, kh, kw = weight.shape
    oh = (height - dh * (kh - 1) - 1) // sh + 1
    ow = (width - dw * (kw - 1) - 1) // sw + 1
    x = padded.reshape(batch, groups, channels // groups, height, width)
    w = weight.reshape(groups, out_channels // groups, channels // groups, kh, kw)
    y = np.zeros((batch, groups, out_channels // groups, oh, ow))
    g = np.ones_like(y) if grad_output is None else grad_output.reshape(y.shape)
    grad_x, grad_w = np.zeros_like(x), np.zeros_like(w)
    for i in range(kh):
        for j in range(kw):
            rows = slice(i * dh, i * dh + (oh - 1) * sh + 1, sh)
            columns = slice(j * dw, j * dw + (ow - 1) * sw + 1, sw)
            window = x[..., rows, columns]
            y += np.einsum("bgchw,gkc->bgkhw", window, w[..., i, j])
            grad_x[..., rows, columns] += np.einsum("bgkhw,gkc->bgchw", g, w[..., i, j])
            grad_w[..., i, j] = np.einsum("bgkhw,bgchw->gkc", g, window)
    output = y.reshape(batch, out_channels, oh, ow)
    if bias is not None:
        output = output + bias[:, None, None]
    grad_input = grad_x.reshape(padded.shape)[..., ph : height - ph, pw : width - pw]
    return output, grad_input, grad_w.reshape(weight.shape), g.reshape(output.shape).sum((0, 2, 3))
