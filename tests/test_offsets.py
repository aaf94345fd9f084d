"""Tensors whose elements lie more than 2**31 elements apart: offsets are counted in 64 bits, by compiled kernels and by
Triton's. Of the memory in between nothing is touched."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch import Tensor
from torch.nn import functional as native

import fastnn.nn.functional as F

FAR = 2**31
DTYPE = torch.float16


@pytest.fixture
def memory(backend: str) -> Tensor:
    try:
        return torch.empty(FAR + 4096, dtype=DTYPE)
    except RuntimeError:
        pytest.skip("4 GiB cannot be had, not even of addresses")


def integers(*shape: int) -> Tensor:
    """So small that every sum of their products is exact."""
    return torch.randint(-2, 3, shape).to(DTYPE)


def spread(values: Tensor, dim: int, memory: Tensor) -> Tensor:
    """The values, the last along ``dim`` more than 2**31 elements behind the first."""
    strides = list(values.stride())
    strides[dim] = -(-(FAR + 1) // (values.shape[dim] - 1))
    assert strides[dim] > values.numel()  # so no two share memory
    return memory.as_strided(values.shape, strides).copy_(values)


def result_and_gradients(function, inputs, grad_output):
    leaves = [t.detach().requires_grad_() for t in inputs]
    output = function(*leaves)
    return [output.detach(), *torch.autograd.grad(output, leaves, grad_output)]


@pytest.mark.parametrize("spread_gradient", [False, True], ids=["input", "gradient"])
@pytest.mark.parametrize("dim", range(4))
def test_conv2d(backend, memory, dim, spread_gradient):
    x, weight, grad = integers(2, 3, 5, 6), integers(4, 3, 3, 3), integers(2, 4, 5, 6)
    expected = result_and_gradients(
        lambda x, weight: native.conv2d(x, weight, padding=1), (x.double(), weight.double()), grad.double()
    )
    if spread_gradient:
        grad = spread(grad, dim, memory)
    else:
        x = spread(x, dim, memory)
    results = result_and_gradients(lambda x, weight: F.conv2d(x, weight, padding=1), (x, weight), grad)
    for result, exact in zip(results, expected, strict=True):
        assert torch.equal(result.double(), exact)


@pytest.mark.parametrize("dim", [2, 3])
def test_pooling_window(backend, memory, monkeypatch, dim):
    """Of a window's own elements: Triton pools what the convolution left in memory."""
    if backend != "triton":
        pytest.skip("the compiled kernels pool what they have just convolved")
    conv2d = importlib.import_module("fastnn.triton.conv2d")
    shape = (1, 2, 9, 1) if dim == 2 else (1, 2, 1, 9)
    convolved = spread(torch.arange(18.0).view(shape), dim, memory)
    monkeypatch.setattr(conv2d, "_forward", lambda *_, **__: convolved)
    x, weight, window = torch.ones(shape, dtype=DTYPE), torch.ones(2, 2, 1, 1, dtype=DTYPE), list(shape[2:])
    pooled, _ = conv2d.conv2d_relu_max_pool2d(x, weight, None, [1, 1], [0] * 4, [1, 1], 1, window, window)
    assert pooled.flatten().tolist() == [8, 17]


@pytest.mark.parametrize("dim", range(3))
def test_cross_entropy(backend, memory, dim):
    x, target = integers(3, 4, 2), torch.tensor([[0, 3], [2, 1], [1, 1]])
    expected = result_and_gradients(
        lambda x: native.cross_entropy(x, target), (x.double(),), torch.tensor(1.0).double()
    )
    x = spread(x, dim, memory)
    results = result_and_gradients(lambda x: F.cross_entropy(x, target), (x,), torch.tensor(1.0).to(DTYPE))
    for result, exact in zip(results, expected, strict=True):
        torch.testing.assert_close(result.double(), exact, rtol=2**-9, atol=2**-14)
