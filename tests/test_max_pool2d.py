"""max_pool2d against native bit for bit, finite differences and torch's own samples."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import BACKENDS
from hypothesis import given
from hypothesis import strategies as st
from reference import FLOATING, LAYOUTS, assert_bitwise_equal
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional as native
from wheel import module_info, older_module_tests, op_info, raised

import fastnn.nn
import fastnn.nn.functional as F

# The CPU alone has kernels of it.
pytestmark = [
    pytest.mark.kernels,
    pytest.mark.parametrize("backend", [b for b in BACKENDS if b.startswith("cpu")], indirect=True),
]

# Ties, both zeros, NaN and infinities: which element a window chooses shows in the gradient.
VALUES = torch.tensor([-1.0, -0.0, 0.0, 1.0, 2.0, 3.0, float("inf"), -float("inf"), -float("inf"), float("nan")])


def gradient(function: Callable[..., Tensor], x: Tensor, grad_output: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    leaf = x.detach().requires_grad_()
    output = function(leaf, *args)
    return output.detach(), torch.autograd.grad(output, leaf, grad_output)[0]


def small_integers(shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Gradients whose sums are exact in every dtype."""
    return torch.randint(-3, 4, shape).to(dtype)


def assert_is_natives(x: Tensor, args: tuple[Any, ...], grad_layout: str = "contiguous") -> None:
    exact = native.max_pool2d(x, *args)
    grad_output = LAYOUTS[grad_layout](small_integers(exact.shape, x.dtype))
    ours, grad = gradient(F.max_pool2d, x, grad_output, *args)
    assert_bitwise_equal(ours, exact, "output")
    _, exact_grad = gradient(native.max_pool2d, x.double(), grad_output.double(), *args)
    assert torch.equal(grad.double(), exact_grad), f"gradient differs first at {(grad != exact_grad).nonzero()[:1]}"


@st.composite
def calls(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[Any, ...]]:
    """Shapes and the arguments from kernel_size on that native takes."""
    pairs = lambda low, high: tuple(draw(st.integers(low, high)) for _ in range(2))  # noqa: E731
    kernel, stride, dilation = pairs(1, 4), pairs(1, 4), pairs(1, 3)
    extent = [(kernel[d] - 1) * dilation[d] + 1 for d in range(2)]
    padding = tuple(draw(st.integers(0, kernel[d] // 2)) for d in range(2))
    # With more elements than the dilation, every window has one: native writes out of bounds where one has none.
    least = [max(dilation[d], extent[d] - 2 * padding[d]) for d in range(2)]
    sizes = [draw(st.integers(least[d], 12) | st.sampled_from([17, 31, 40])) for d in range(2)]
    channels = draw(st.sampled_from([1, 2, 3, 8, 17]))
    return (draw(st.integers(0, 2)), channels, *sizes), (kernel, stride, padding, dilation, draw(st.booleans()))


layouts = st.sampled_from(sorted(LAYOUTS))


@given(call=calls(), dtype=st.sampled_from(FLOATING), layout=layouts, grad_layout=layouts, seed=st.integers(0, 99))
def test_is_natives_bit_for_bit(backend, call, dtype, layout, grad_layout, seed):
    torch.manual_seed(seed)
    shape, args = call
    x = LAYOUTS[layout](VALUES.to(dtype)[torch.randint(len(VALUES), shape)])
    assert_is_natives(x, args, grad_layout)


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "offset"])
@pytest.mark.parametrize("args", [(2,), (3, 2, 1), (3, 1, 1), ((2, 3), (2, 1)), (2, 2, 0, 1, True)], ids=str)
def test_large_and_odd(backend, args, layout, dtype):
    """More than one thread takes, and a tail in every direction."""
    assert_is_natives(LAYOUTS[layout](torch.randn(3, 35, 47, 45).to(dtype)), args)


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
def test_every_width(backend, dtype):
    """Every tail of every vector width, and nothing read or written beside it."""
    for width in range(1, 40):
        x = torch.full((3, 4, width + 2), float("nan"), dtype=dtype)[..., 1:-1].copy_(torch.randn(3, 4, width))
        for args in ((2, 2, 1), (3, 1, 1), (1,)):
            assert_is_natives(x, args)
        if width > 1:  # windows side by side, also over an odd number of rows
            assert_is_natives(x, (2,))
            assert_is_natives(torch.randn(3, 6, width).to(dtype), (2,))


def test_many_short_rows(backend):
    """Of more planes than one thread takes, an odd number of rows each."""
    assert_is_natives(torch.randn(50, 41, 6, 14), (2,))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("args", [(2,), (3, 2, 1), ((3, 2), (1, 3), (0, 1), (2, 1), True)], ids=str)
def test_derivatives(backend, args, layout):
    shape = (2, 3, 7, 9)
    base = torch.randperm(2 * 3 * 7 * 9).view(shape).double().requires_grad_()  # no ties, which have no derivative
    if layout == "expanded":
        base = base[:1].detach().requires_grad_()
    function = lambda t: F.max_pool2d(LAYOUTS[layout](t.expand(shape)) if layout != "sliced" else t[:, ::2], *args)  # noqa: E731
    if layout == "offset":
        function = lambda t: F.max_pool2d((t * 1)[:, 1:], *args)  # noqa: E731
    assert gradcheck(function, base)
    assert gradgradcheck(function, base)


def test_a_window_without_an_element(backend):
    """Dilated over an input smaller than its gaps: minus infinity, and no gradient."""
    for memory_format in (torch.contiguous_format, torch.channels_last):
        x = torch.ones(1, 2, 3, 3).contiguous(memory_format=memory_format)
        args = ((2, 1), 1, (1, 0), (4, 1))
        output, grad = gradient(F.max_pool2d, x, torch.ones(1, 2, 1, 3), *args)
        assert torch.equal(output, torch.full((1, 2, 1, 3), -float("inf")))
        assert torch.equal(grad, torch.zeros(1, 2, 3, 3))
    leaf = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(F.max_pool2d(leaf, *args).sum(), leaf, create_graph=True)
    assert torch.equal(grad, torch.zeros(1, 2, 3, 3))


def test_unbatched_and_the_memory_format(backend):
    x = torch.randn(3, 8, 9)
    assert_bitwise_equal(F.max_pool2d(x, 2), native.max_pool2d(x, 2))
    for memory_format in (torch.contiguous_format, torch.channels_last):
        y = torch.randn(2, 3, 8, 9).contiguous(memory_format=memory_format)
        assert F.max_pool2d(y, 2).stride() == native.max_pool2d(y, 2).stride()


def test_saves_one_byte_an_element(backend):
    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = F.max_pool2d(x, 2)
    assert [(t.dtype, t.shape) for t in saved] == [(torch.uint8, y.shape)]


@pytest.mark.expects_native
@pytest.mark.parametrize(
    ("shape", "args"),
    [
        ((2, 3, 8, 8), (0,)),
        ((2, 3, 8, 8), (2, 0)),
        ((2, 3, 8, 8), (2, 2, 2)),
        ((2, 3, 8, 8), (2, 2, -1)),
        ((2, 3, 8, 8), (2, 2, 0, 0)),
        ((2, 3, 8, 8), (9,)),
        ((2, 3, 8, 8), ((2, 2, 2),)),
        ((2, 3, 8, 8), ("2",)),
        ((2, 3, 8, 8), (2.0,)),
        ((2, 0, 8, 8), (2,)),
        ((2, 3, 0, 8), (2,)),
        ((8, 8), (2,)),
        ((1, 2, 3, 8, 8), (2,)),
        *(((2, 3, 8, 8), (2, 2, 0, 1, mode)) for mode in (1, None, "x", (1, "a"), torch.ones(2))),
        ((2, 3, 8, 8), (2, 2**31)),
        ((2, 3, 8, 8), (2, 2**64)),
    ],
    ids=str,
)
def test_misuse_raises_what_native_raises(backend, shape, args):
    x = torch.randn(shape)
    assert raised(F.max_pool2d, x, *args) == raised(native.max_pool2d, x, *args)


@pytest.mark.expects_native
def test_what_native_serves(backend):
    x = torch.randn(1, 2, 20, 20)
    for o, e in zip(F.max_pool2d(x, 2, return_indices=True), native.max_pool2d(x, 2, return_indices=True), strict=True):
        assert torch.equal(o, e)
    assert torch.equal(F.max_pool2d(x, 16), native.max_pool2d(x, 16))
    integers = torch.arange(32).view(1, 2, 4, 4)
    assert torch.equal(F.max_pool2d(integers, 2), native.max_pool2d(integers, 2))
    assert F.max_pool2d(x.to("meta"), 2).shape == (1, 2, 10, 10)


# ---- the raw operators ----

GEOMETRY = ([3, 2], [2, 1], [1, 0], [1, 2])


@pytest.mark.one_tier
@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
def test_opcheck(backend, requires_grad, layout):
    x = LAYOUTS[layout](torch.randn(2, 3, 7, 8, dtype=torch.float64)).requires_grad_(requires_grad)
    torch.library.opcheck(torch.ops.fastnn.max_pool2d.default, (x, *GEOMETRY, True))
    y, code = torch.ops.fastnn.max_pool2d(x.detach(), *GEOMETRY, True)
    torch.library.opcheck(torch.ops.fastnn.max_pool2d_backward.default, (y, code, [7, 8], *GEOMETRY))


def test_raw_operator_differentiates(backend):
    x = torch.randn(2, 3, 7, 8, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda t: torch.ops.fastnn.max_pool2d(t, *GEOMETRY, False)[0], (x,))
    y, code = torch.ops.fastnn.max_pool2d(x.detach(), *GEOMETRY, False)
    backward = lambda g: torch.ops.fastnn.max_pool2d_backward(g, code, [7, 8], *GEOMETRY)  # noqa: E731
    assert gradcheck(backward, (y.requires_grad_(),))


def test_raw_operator_refuses_wrong_arguments(backend):
    x, square = torch.randn(2, 3, 7, 8), ([2, 2], [2, 2], [0, 0], [1, 1])
    op, backward = torch.ops.fastnn.max_pool2d, torch.ops.fastnn.max_pool2d_backward
    y, code = op(x, *square, False)
    for match, call in {
        "self has dtype": lambda: op(x.int(), *square, False),
        "expected 4 dimensions": lambda: op(x[0], *square, False),
        "expected 2 values each": lambda: op(x, [2], *square[1:], False),
        "must be positive": lambda: op(x, [2, 0], *square[1:], False),
        "padding is 2, expected at most half": lambda: op(x, *square[:2], [2, 0], [1, 1], False),
        "expected at most 255": lambda: op(x, [16, 16], *square[1:], False),
        "smaller than a window": lambda: op(x, [9, 9], *square[1:], False),
        "code has dtype": lambda: backward(y, code.int(), [7, 8], *square),
        "code has shape": lambda: backward(y, code[:1], [7, 8], *square),
        "expected 2 values of input_size": lambda: backward(y, code, [7], *square),
        "too large for an input of 3 x 8": lambda: backward(y, code, [3, 8], *square),
    }.items():
        with pytest.raises(RuntimeError, match=match):
            call()


def test_no_code_writes_out_of_bounds(backend):
    """Codes that forward never gives, of elements that lie outside, are ignored."""
    for memory_format in (torch.contiguous_format, torch.channels_last):
        for number in (0, 8, 9, 254, 255):
            code = torch.full((1, 8, 2, 2), number, dtype=torch.uint8).contiguous(memory_format=memory_format)
            geometry = ([3, 3], [2, 2], [1, 1], [1, 1])
            grad = torch.ops.fastnn.max_pool2d_backward(torch.ones(1, 8, 2, 2), code, [3, 3], *geometry)
            inside = {0: grad[..., 1, 1], 8: grad[..., 1, 1]}.get(number, torch.zeros(()))
            assert grad.sum() == inside.sum() == (8 if number in (0, 8) else 0)


# ---- the samples inside the torch wheel ----


@pytest.mark.expects_native  # for the integers and the indices
def test_wheel_samples(backend):
    info = op_info("max_pool2d")
    for dtype in FLOATING:
        samples = [*info.sample_inputs("cpu", dtype)]
        assert len(samples) >= 30
        for sample in samples:
            args, kwargs = sample.args, {k: v for k, v in sample.kwargs.items() if k != "return_indices"}
            exact = native.max_pool2d(sample.input, *args, **kwargs)
            assert_bitwise_equal(F.max_pool2d(sample.input, *args, **kwargs), exact)
    for error in info.error_inputs("cpu"):
        sample = error.sample_input
        ours, theirs = (
            raised(function, sample.input, *sample.args, **sample.kwargs)
            for function in (F.max_pool2d, native.max_pool2d)
        )
        assert ours == theirs


@pytest.mark.expects_native  # for the indices
def test_wheel_module_samples(backend):
    info = module_info("MaxPool2d")
    cases = [
        (m.constructor_input.args, m.constructor_input.kwargs, m.forward_input.args[0])
        for m in info.module_inputs_func(info, "cpu", torch.float64, requires_grad=False, training=True)
    ]
    cases += [
        (test["constructor_args"], {}, torch.randn(test["input_size"], dtype=torch.float64))
        for test in older_module_tests("MaxPool2d")
        if "input_size" in test
    ]
    assert len(cases) >= 3
    for args, kwargs, x in cases:
        ours, exact = fastnn.nn.MaxPool2d(*args, **kwargs), torch.nn.MaxPool2d(*args, **kwargs)
        assert repr(ours) == repr(exact)
        o, e = ours(x), exact(x)
        for mine, theirs in zip(*((t,) if isinstance(t, Tensor) else t for t in (o, e)), strict=True):
            assert_bitwise_equal(mine, theirs)
