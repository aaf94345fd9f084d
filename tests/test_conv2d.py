"""conv2d, conv2d_relu and conv2d_relu_max_pool2d against float64 native, finite differences and torch's own samples."""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from conftest import BACKENDS
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import (
    FLOATING,
    LAYOUTS,
    SLACK,
    allow_tf32,
    conv2d_numpy,
    error,
    mostly_big,
    pairwise,
    to_float64,
    values_and_gradients,
)
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional as native
from wheel import here, module_info, older_module_tests, op_info, raised

import fastnn
import fastnn.nn.functional as F

pytestmark = pytest.mark.kernels


@pytest.fixture(autouse=True)
def settings_of_the_process() -> Iterator[None]:
    """Starting threads costs more than all the work on tensors this small; test_threads.py compares thread counts."""
    threads, winograd = torch.get_num_threads(), fastnn.backends.cpu.winograd
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    fastnn.backends.cpu.winograd = winograd


def native_conv2d_relu(*args: Any, **kwargs: Any) -> Tensor:
    return native.relu(native.conv2d(*args, **kwargs))


def native_conv2d_relu_max_pool2d(
    *args: Any, pool_kernel_size: Any = 2, pool_stride: Any = None, **kwargs: Any
) -> Tensor:
    return native.max_pool2d(native_conv2d_relu(*args, **kwargs), pool_kernel_size, pool_stride)


@dataclass(frozen=True)
class Op:
    ours: Callable[..., Tensor]
    native: Callable[..., Tensor]


CONV2D = Op(F.conv2d, native.conv2d)
CONV2D_RELU = Op(F.conv2d_relu, native_conv2d_relu)
CONV2D_RELU_MAX_POOL2D = Op(F.conv2d_relu_max_pool2d, native_conv2d_relu_max_pool2d)
OPS = [
    pytest.param(CONV2D, id="conv2d"),
    pytest.param(CONV2D_RELU, id="conv2d_relu"),
    pytest.param(CONV2D_RELU_MAX_POOL2D, id="conv2d_relu_max_pool2d"),
]


@dataclass(frozen=True)
class Case:
    """A convolution: its shapes, its arguments, and the layouts of (input, weight, grad_output)."""

    input: tuple[int, ...]
    weight: tuple[int, int, int, int]
    bias: bool = True
    kwargs: dict[str, Any] = field(default_factory=dict)
    layouts: tuple[str, str, str] = ("contiguous", "contiguous", "contiguous")

    def tensors(self, draw: Callable[[tuple[int, ...]], Tensor]) -> tuple[Tensor, Tensor, Tensor | None]:
        """input, weight and bias, their elements from ``draw(shape)``."""
        x, w = LAYOUTS[self.layouts[0]](draw(self.input)), LAYOUTS[self.layouts[1]](draw(self.weight))
        return x, w, draw(self.weight[:1]) if self.bias else None

    def grad_output(self, output: Tensor, draw: Callable[[tuple[int, ...]], Tensor]) -> Tensor:
        return LAYOUTS[self.layouts[2]](draw(tuple(output.shape)))

    @property
    def native_gradient_crashes(self) -> bool:
        """torch 2.13 on the CPU: a strided 1x1 convolution's gradients, for some layouts and channel counts."""
        return self.weight[2:] == (1, 1) and self.kwargs.get("stride", 1) not in (1, (1, 1))


def one_or_pair(draw: st.DrawFn, values: st.SearchStrategy[int]) -> tuple[Any, tuple[int, int]]:
    """An argument as an int or a pair, and the pair it means."""
    if draw(st.booleans()):
        value = draw(values)
        return value, (value, value)
    pair = (draw(values), draw(values))
    return pair, pair


@st.composite
def cases(draw: st.DrawFn, min_output: int = 1) -> Case:
    """Convolutions of small tensors; output widths up to 40 cover every tail of every vector width."""
    kernel = draw(st.tuples(st.integers(1, 7), st.integers(1, 7)) | st.sampled_from([(1, 1), (3, 3), (5, 5)]))
    stride, strides = one_or_pair(draw, st.integers(1, 3))
    dilation, dilations = one_or_pair(draw, st.integers(1, 3))
    padding: Any
    if strides == (1, 1) and draw(st.integers(0, 4)) == 0:
        padding = "same"
        pads = tuple(d * (k - 1) / 2 for d, k in zip(dilations, kernel, strict=True))
    elif draw(st.integers(0, 9)) == 0:
        padding, pads = "valid", (0, 0)
    else:
        padding, pads = one_or_pair(draw, st.integers(0, 4))
    output = (draw(st.integers(min_output, 7)), draw(st.integers(min_output, 40)))
    # Sizes that the last window does not reach the end of, too.
    size = [
        max(1, int((o - 1) * s + d * (k - 1) + 1 - 2 * p) + draw(st.integers(0, s - 1)))
        for o, s, d, k, p in zip(output, strides, dilations, kernel, pads, strict=True)
    ]
    channels = st.integers(1, 5) | st.sampled_from([7, 8, 16, 17, 33])
    groups = draw(st.sampled_from([1, 1, 1, 2, 3, 4]))
    per_group = draw(channels if groups == 1 else st.integers(1, 3))  # 1: depthwise
    out_per_group = draw(channels if groups == 1 else st.integers(1, 3))
    batch = draw(st.sampled_from([(), (0,), (1,), (2,), (3,)]))
    layout = st.sampled_from(["contiguous", "contiguous", "channels_last", "channels_last", *LAYOUTS])
    return Case(
        (*batch, groups * per_group, *size),
        (groups * out_per_group, per_group, *kernel),
        bias=draw(st.booleans()),
        kwargs={"stride": stride, "padding": padding, "dilation": dilation, "groups": groups},
        layouts=(draw(layout), draw(layout), draw(layout)),
    )


@st.composite
def winograd_cases(draw: st.DrawFn) -> Case:
    """3x3 windows that move by one, with the channels and the results that Winograd's convolution asks for."""
    channels, groups = st.integers(16, 35), draw(st.sampled_from([1, 1, 2]))
    per_group, out_per_group = draw(channels), draw(channels)
    batch = draw(st.sampled_from([(), (1,), (2,), (3,)]))
    layout = st.sampled_from(["contiguous", "contiguous", "channels_last", "channels_last", *LAYOUTS])
    return Case(
        (*batch, groups * per_group, draw(st.integers(14, 19)), draw(st.integers(14, 19))),
        (groups * out_per_group, per_group, 3, 3),
        bias=draw(st.booleans()),
        kwargs={"padding": draw(st.sampled_from([0, 1, 1, "same", 2, (0, 1), (2, 0)])), "groups": groups},
        layouts=(draw(layout), draw(layout), draw(layout)),
    )


CASES = cases() | winograd_cases()
WINOGRAD = st.sampled_from(["default", "fast"])
POOLS = st.fixed_dictionaries(
    {
        "pool_kernel_size": st.sampled_from([2, 2, 2, 3, (2, 3), (3, 1), (1, 4)]),
        "pool_stride": st.sampled_from([None, None, None, 1, 2, 3, (2, 1), (1, 4)]),
    }
)


def integers(dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """Mostly zeros, and -1, 1: every sum of them is exact in every dtype's accumulator, and ties abound."""
    return torch.randint(-1, 2, shape, dtype=dtype) * torch.randint(0, 2, shape, dtype=dtype)


def normals(dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, dtype=torch.float64).to(dtype)


def offset_normals(dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """Values whose differences are small beside them."""
    return (torch.randn(shape, dtype=torch.float64) + 50).to(dtype)


def assert_same(actual: Tensor, expected: Tensor, what: str) -> None:
    torch.testing.assert_close(
        actual, expected, rtol=0, atol=0, equal_nan=True, msg=lambda text: f"{what}: {text}", check_stride=False
    )


NAMES = ("output", "grad_input", "grad_weight", "grad_bias")


@given(case=CASES, dtype=st.sampled_from(FLOATING), tf32=st.booleans(), seed=st.integers(0, 99), data=st.data())
@settings(max_examples=120)
@pytest.mark.parametrize("op", OPS)
def test_integers_are_exact(backend, op, case, dtype, tf32, seed, data):
    """On small integers no rounding hides a wrong index: results and gradients are float64's, rounded once."""
    torch.manual_seed(seed)
    allow_tf32(tf32)
    kwargs = dict(case.kwargs)
    if op is CONV2D_RELU_MAX_POOL2D:
        # float64 for the output: the gradient takes a path that depends on it, so it must not be rounded.
        kwargs |= data.draw(POOLS)
    draw = partial(integers, dtype)
    inputs = case.tensors(draw)
    exact_inputs = tuple(map(to_float64, inputs))
    try:
        exact_output = op.native(*exact_inputs, **kwargs)
    except RuntimeError:  # the pool's window is larger than the convolution's output
        with pytest.raises(RuntimeError):
            op.ours(*inputs, **kwargs)
        return
    grad_output = case.grad_output(exact_output, draw)
    exact = values_and_gradients(partial(op.native, **kwargs), exact_inputs, to_float64(grad_output))
    actual = values_and_gradients(partial(op.ours, **kwargs), inputs, grad_output)
    for name, a, e in zip(NAMES, actual, exact, strict=False):
        assert_same(a, e.to(dtype), name)


@given(
    case=CASES,
    dtype=st.sampled_from(FLOATING),
    distribution=st.sampled_from([normals, normals, offset_normals]),
    winograd=WINOGRAD,
    seed=st.integers(0, 99),
)
@settings(max_examples=160)
def test_error_is_no_worse_than_natives(backend, case, dtype, distribution, winograd, seed):
    torch.manual_seed(seed)
    fastnn.backends.cpu.winograd = winograd
    draw = partial(distribution, dtype)
    inputs = case.tensors(draw)
    exact_inputs = tuple(map(to_float64, inputs))
    grad_output = case.grad_output(native.conv2d(*exact_inputs, **case.kwargs), draw)
    ours = values_and_gradients(partial(F.conv2d, **case.kwargs), inputs, grad_output)
    reference = partial(native.conv2d, **case.kwargs)
    exact = values_and_gradients(reference, exact_inputs, to_float64(grad_output))
    magnitudes = values_and_gradients(
        reference, tuple(None if t is None else t.abs() for t in exact_inputs), to_float64(grad_output).abs()
    )
    contiguous = tuple(None if t is None else t.contiguous() for t in inputs)
    if case.native_gradient_crashes:
        natives = [e.to(dtype) for e in exact]
    else:
        natives = values_and_gradients(reference, contiguous, grad_output.contiguous())
    for name, o, n, e, magnitude in zip(NAMES, ours, natives, exact, magnitudes, strict=False):
        allowed = error(n, e, magnitude) + SLACK[dtype] * torch.finfo(dtype).eps
        assert error(o, e, magnitude) <= allowed, name


@given(case=CASES, pool=POOLS, winograd=WINOGRAD, seed=st.integers(0, 99), data=st.data())
@settings(max_examples=110)
def test_fused_gradients_are_natives(backend, case, pool, winograd, seed, data):
    """In float64, where no two implementations disagree on which of two real numbers is larger."""
    torch.manual_seed(seed)
    fastnn.backends.cpu.winograd = winograd
    op, kwargs = data.draw(st.sampled_from([(CONV2D_RELU, {}), (CONV2D_RELU_MAX_POOL2D, pool)]))
    kwargs = case.kwargs | kwargs
    draw = partial(normals, torch.float64)
    inputs = case.tensors(draw)
    try:
        output = op.native(*inputs, **kwargs)
    except RuntimeError:
        return
    grad_output = case.grad_output(output, draw)
    contiguous = tuple(map(to_float64, inputs))
    exact = values_and_gradients(partial(op.native, **kwargs), contiguous, to_float64(grad_output))
    actual = values_and_gradients(partial(op.ours, **kwargs), inputs, grad_output)
    for name, a, e in zip(NAMES, actual, exact, strict=False):
        torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}")


@given(
    case=CASES,
    dtype=st.sampled_from(FLOATING),
    op=st.sampled_from([CONV2D, CONV2D_RELU]),
    winograd=WINOGRAD,
    data=st.data(),
)
@settings(max_examples=110)
def test_infinities_and_nans_reach_the_same_outputs(backend, case, dtype, op, winograd, data):
    """An infinity or a NaN in the input is seen by the windows that hold it and by no other."""
    fastnn.backends.cpu.winograd = winograd
    special = data.draw(st.lists(st.sampled_from([float("inf"), -float("inf"), float("nan"), -0.0]), max_size=3))
    x, w, b = case.tensors(partial(normals, dtype))
    if x.numel() and case.layouts[0] != "expanded":
        for value in special:
            x[tuple(data.draw(st.integers(0, size - 1)) for size in x.shape)] = value
    actual = op.ours(x, w, b, **case.kwargs)
    exact = op.native(to_float64(x), to_float64(w), to_float64(b), **case.kwargs)
    assert_same(actual.isnan(), exact.isnan(), "NaN")
    assert_same(actual == torch.inf, exact == torch.inf, "inf")
    assert_same(actual == -torch.inf, exact == -torch.inf, "-inf")


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
def test_overflow_and_underflow(backend, dtype):
    """Sums that leave the dtype's range are infinite, and subnormal ones are kept, as the float64 sums rounded; but the
    processor's products of bfloat16, which native torch has too, take subnormal numbers as 0."""
    finfo = torch.finfo(dtype)
    x = torch.tensor([finfo.max, -finfo.max, finfo.max / 2, finfo.tiny, finfo.tiny / 4], dtype=dtype)
    x = x.view(5, 1, 1, 1).expand(5, 1, 9, 19)
    w = torch.ones(3, 1, 1, 2, dtype=dtype)
    exact = native.conv2d(to_float64(x) / 4, to_float64(w)) * 4  # /4: float64 itself must not overflow here
    if dtype is torch.bfloat16 and backend == "cpu-avx512_bf16":
        exact[4] = 0
    assert_same(F.conv2d(x, w), exact.to(dtype), "output")


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("channels", [3, 40])
@pytest.mark.parametrize("dtype", FLOATING, ids=str)
def test_what_is_beside_a_window_does_not_count(backend, dtype, channels, channels_last):
    """Rows of odd length, of a window's terms and of positions: whatever is multiplied two by two has one too many."""
    x, w = normals(dtype, (2, channels, 4, 7)), normals(dtype, (40, channels, 2, 3))
    x[0, 0, 1, 6] = torch.inf
    if channels_last:
        x, w = (t.to(memory_format=torch.channels_last) for t in (x, w))
    x.requires_grad_(), w.requires_grad_()
    exact_x, exact_w = (to_float64(t).detach().requires_grad_() for t in (x, w))
    output, exact = F.conv2d(x, w), native.conv2d(exact_x, exact_w)
    grad = normals(dtype, tuple(output.shape))
    grad[1, 2, 2, 2] = torch.nan
    found = output, *torch.autograd.grad(output, (x, w), grad)
    expected = exact, *torch.autograd.grad(exact, (exact_x, exact_w), to_float64(grad))
    for name, ours, theirs in zip(("output", "grad_input", "grad_weight"), found, expected, strict=True):
        assert_same(ours.isfinite(), theirs.isfinite(), name)


@pytest.mark.big(emulated=True)
@pytest.mark.parametrize("dtype", FLOATING, ids=str)
def test_overflow_of_what_cancels(backend, dtype):
    """Winograd's convolution sums neighbours before it multiplies; the terms of the result stay in range."""
    x, w = torch.zeros(2, 16, 14, 15, dtype=dtype), torch.zeros(16, 16, 3, 3, dtype=dtype)
    x[:, 0] = torch.finfo(dtype).max / 2
    w[:, :, 1, 1:] = torch.tensor([1, -1])
    assert_same(F.conv2d(x, w), torch.zeros(2, 16, 12, 13, dtype=dtype), "output")


@pytest.mark.big
@given(case=winograd_cases(), dtype=st.sampled_from(FLOATING), winograd=WINOGRAD, data=st.data())
@settings(max_examples=30)
def test_infinities_and_nans_of_a_gradient(backend, case, dtype, winograd, data):
    """As of the input: they reach the elements whose windows hold them. So do the input's own, in the weight's."""
    fastnn.backends.cpu.winograd = winograd
    x, w, _ = case.tensors(partial(normals, dtype))
    grad_output = normals(dtype, tuple(native.conv2d(x, w, **case.kwargs).shape))
    for value in data.draw(st.lists(st.sampled_from([float("inf"), float("nan")]), max_size=2)):
        where = data.draw(st.sampled_from([grad_output] if case.layouts[0] == "expanded" else [grad_output, x]))
        where[tuple(data.draw(st.integers(0, size - 1)) for size in where.shape)] = value
    exact_inputs = (to_float64(x), to_float64(w))
    exact = values_and_gradients(partial(native.conv2d, **case.kwargs), exact_inputs, to_float64(grad_output))[1]
    grad_output = LAYOUTS[case.layouts[2]](grad_output) if case.layouts[2] != "expanded" else grad_output
    actual = values_and_gradients(partial(F.conv2d, **case.kwargs), (x, w), grad_output)[1]
    assert_same(actual.isfinite(), exact.isfinite(), "finite")
    assert_same(actual.isnan(), exact.isnan(), "NaN")


# Winograd's convolution packs the weights once a call where there are many tiles, and where they are used where not.
MANY_TILES = {"few tiles": (2, 15, 17), "many tiles": (3, 45, 61)}


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name.startswith("cpu")], indirect=True)
@pytest.mark.parametrize(
    ("tiles", "op", "layout", "dtype"),
    pairwise(list(MANY_TILES), ["plain", "pooled"], ["contiguous", "channels_last"], FLOATING),
    ids=str,
)
def test_winograd_settings(backend, tiles, op, layout, dtype):
    """Each setting's sums are its own: exact on small integers but for those of 'fast', which round by little."""
    op = {"plain": CONV2D, "pooled": CONV2D_RELU_MAX_POOL2D}[op]
    batch, height, width = MANY_TILES[tiles]
    case = Case((batch, 18, height, width), (70, 18, 3, 3), kwargs={"padding": 1}, layouts=(layout,) * 3)
    inputs = case.tensors(partial(integers, dtype))
    exact_inputs = tuple(map(to_float64, inputs))
    grad_output = case.grad_output(op.native(*exact_inputs, padding=1), partial(integers, dtype))
    exact = values_and_gradients(partial(op.native, padding=1), exact_inputs, to_float64(grad_output))
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    for winograd in ("off", "default", "fast"):
        fastnn.backends.cpu.winograd = winograd
        assert fastnn.backends.cpu.winograd == winograd
        actual = values_and_gradients(partial(op.ours, padding=1), inputs, grad_output)
        slack = 1000 * torch.finfo(wide).eps if winograd == "fast" else 0.0
        # Which of a window's equal maxima has the gradient depends on the rounding.
        for name, a, e in zip(NAMES, actual if op is CONV2D or not slack else actual[:1], exact, strict=False):
            assert ((e - slack).to(dtype) <= a).all(), name
            assert (a <= (e + slack).to(dtype)).all(), name
    x, w, _ = case.tensors(partial(normals, wide))
    outputs = []
    for winograd in ("off", "default", "fast"):
        fastnn.backends.cpu.winograd = winograd
        outputs.append(F.conv2d(x, w, padding=1))
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(outputs, 2))


def test_winograd_setting_is_checked():
    with pytest.raises(
        ValueError, match=r"fastnn.backends.cpu.winograd set to 'fastest', expected one of off, default"
    ):
        fastnn.backends.cpu.winograd = "fastest"
    assert fastnn.backends.cpu.winograd == "default"
    with pytest.raises(AttributeError):
        fastnn.backends.cpu.winogard = "fast"


POOLED = [(4, 1, 2, {"pool_kernel_size": (2, 3), "pool_stride": stride}) for stride in (None, 1, 3)] + [(16, 3, 1, {})]


@pytest.mark.parametrize("convolution", mostly_big(POOLED, 1, emulated=True), ids=str)
@pytest.mark.parametrize("special", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("layout", mostly_big(["contiguous", "channels_last"], 0, emulated=True))
@pytest.mark.parametrize("operand", ["input", "weight"])
def test_pool_of_infinities_and_nans(backend, operand, special, convolution, layout):
    """NaN wins its window, whichever element of several native chooses gets the gradient, and -inf loses to 0. In
    backward, infinity times a gradient of zero is NaN."""
    channels, kernel, groups, pool = convolution
    x = integers(torch.float64, (2, channels, 12, 23))
    w = integers(torch.float64, (16, channels // groups, kernel, kernel))
    if operand == "input":
        x[:, ::2][torch.rand(2, channels // 2, 12, 23) < 0.1 / kernel**2] = special
    else:
        w[1, 1] = special
    x = LAYOUTS[layout](x)
    kwargs = {"groups": groups, **pool}
    output = native_conv2d_relu_max_pool2d(x, w, **kwargs)
    grad_output = integers(torch.float64, tuple(output.shape))
    ours = values_and_gradients(partial(F.conv2d_relu_max_pool2d, **kwargs), (x, w), grad_output)
    exact = values_and_gradients(partial(native_conv2d_relu_max_pool2d, **kwargs), (x.contiguous(), w), grad_output)
    for name, a, e in zip(NAMES, ours, exact, strict=False):
        assert_same(a, e, name)


@pytest.mark.big
@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "offset"])
@pytest.mark.parametrize(
    ("channels", "results", "kwargs"),
    [
        pytest.param(33, 65, {"padding": 1}, id="a chunk and one more channel, a block and one more result"),
        pytest.param(70, 40, {"dilation": (1, 2), "pool_kernel_size": 3, "pool_stride": 2}, id="dilated, overlapping"),
        pytest.param(40, 140, {"groups": 2, "stride": 2, "padding": 2, "pool_stride": 3}, id="strided, gaps, groups"),
    ],
)
def test_pool_gradients_of_many_channels(backend, dtype, layout, channels, results, kwargs):
    """On small integers, so exactly: more channels than are taken at a time."""
    x = LAYOUTS[layout](integers(dtype, (2, channels, 15, 18)))
    w = integers(dtype, (results, channels // kwargs.get("groups", 1), 3, 3))
    b = integers(dtype, (results,))
    exact_inputs = tuple(map(to_float64, (x, w, b)))
    grad_output = integers(dtype, tuple(native_conv2d_relu_max_pool2d(*exact_inputs, **kwargs).shape))
    actual = values_and_gradients(partial(F.conv2d_relu_max_pool2d, **kwargs), (x, w, b), grad_output)
    exact = values_and_gradients(
        partial(native_conv2d_relu_max_pool2d, **kwargs), exact_inputs, to_float64(grad_output)
    )
    for name, a, e in zip(NAMES, actual, exact, strict=True):
        assert_same(a, e.to(dtype), name)


@pytest.mark.big(emulated=True)
@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("op", mostly_big([CONV2D, CONV2D_RELU], 0), ids=["plain", "relu"])
@pytest.mark.parametrize(
    ("channels", "results", "size", "stride"),
    [
        pytest.param(300, 40, (5, 9), 1, id="many channels"),
        pytest.param(
            1030, 25, (6, 33), 1, marks=pytest.mark.big, id="more channels than a row's pixels fit the cache with"
        ),
        pytest.param(20, 17, (1, 1), 1, id="one pixel"),
        pytest.param(3, 530, (13, 25), 2, id="strided"),
    ],
)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_one_by_one(backend, dtype, op, channels, results, size, stride, layout):
    """On small integers, so exactly."""
    x = LAYOUTS[layout](integers(dtype, (2, channels, *size)))
    w, b = integers(dtype, (results, channels, 1, 1)), integers(dtype, (results,)) if op is CONV2D_RELU else None
    exact_inputs = tuple(map(to_float64, (x, w, b)))
    grad_output = integers(dtype, tuple(op.native(*exact_inputs, stride=stride).shape))
    actual = values_and_gradients(partial(op.ours, stride=stride), (x, w, b), LAYOUTS[layout](grad_output))
    exact = values_and_gradients(partial(op.native, stride=stride), exact_inputs, to_float64(grad_output))
    for name, a, e in zip(NAMES, actual, exact, strict=False):
        assert_same(a, e.to(dtype), name)


COMMON_LAYERS = {
    "few channels": (CONV2D, 3, 24, (3, 3), (17, 18), {"padding": 1}),
    "strided": (CONV2D_RELU, 16, 40, (3, 3), (11, 12), {"stride": 2, "padding": 1}),
    "pooled": (CONV2D_RELU_MAX_POOL2D, 16, 72, (3, 3), (8, 9), {"padding": (1, 2)}),
    "many channels of no whole vector": (CONV2D, 131, 16, (3, 3), (4, 5), {}),
    "depthwise": (CONV2D_RELU, 24, 24, (3, 3), (9, 11), {"stride": 2, "padding": 1, "groups": 24}),
    "small groups": (CONV2D_RELU, 40, 40, (3, 3), (9, 11), {"stride": 2, "padding": 1, "groups": 10}),
    "smaller ones": (CONV2D, 22, 22, (3, 3), (6, 7), {"padding": 1, "groups": 11}),
    "depthwise, pooled": (CONV2D_RELU_MAX_POOL2D, 16, 16, (3, 3), (8, 9), {"padding": 1, "groups": 16}),
    "large windows of few channels": (CONV2D_RELU, 3, 70, (7, 7), (13, 37), {"stride": 2, "padding": 3}),
    "larger ones of two channels": (CONV2D_RELU, 2, 70, (11, 11), (13, 37), {"padding": 5}),
    "large ones of four channels": (CONV2D_RELU, 4, 40, (7, 7), (9, 37), {"padding": 3}),
    "two channels, four results": (CONV2D_RELU, 2, 4, (5, 5), (9, 35), {"padding": 2}),
    "large windows": (CONV2D, 21, 50, (5, 5), (9, 23), {"padding": 2}),
    "one channel": (CONV2D, 1, 20, (5, 5), (7, 30), {"padding": 2}),
    "two results": (CONV2D_RELU, 21, 2, (3, 3), (6, 57), {"padding": 1}),
    "large windows, no padding": (CONV2D_RELU, 20, 50, (5, 5), (9, 10), {}),
    "windows of a column": (CONV2D, 4, 40, (2, 1), (20, 13), {}),
    "many positions": (CONV2D, 5, 3, (2, 2), (64, 65), {}),
}


@pytest.fixture
def filled_memory():
    """What malloc returns is filled: what nobody has written shows."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", lambda *_: None)  # glibc's
    perturb = -6
    mallopt(perturb, 1)
    yield
    mallopt(perturb, 0)


@pytest.mark.parametrize(
    ("layer", "layout", "dtype"),
    pairwise(list(COMMON_LAYERS), ["contiguous", "channels_last"], [*FLOATING, "TF32"]),
    ids=str,
)
def test_common_layers(backend, filled_memory, layer, layout, dtype):
    """On small integers, so exactly: what each kernel is for, in both of its layouts and every dtype."""
    op, channels, results, kernel, size, kwargs = COMMON_LAYERS[layer]
    allow_tf32(dtype == "TF32")
    dtype = torch.float32 if dtype == "TF32" else dtype
    case = Case((2, channels, *size), (results, channels // kwargs.get("groups", 1), *kernel))
    x, w, b = case.tensors(partial(integers, dtype))
    exact_inputs = tuple(map(to_float64, (x, w, b)))
    grad_output = LAYOUTS[layout](integers(dtype, tuple(op.native(*exact_inputs, **kwargs).shape)))
    actual = values_and_gradients(partial(op.ours, **kwargs), (LAYOUTS[layout](x), w, b), grad_output)
    exact = values_and_gradients(partial(op.native, **kwargs), exact_inputs, to_float64(grad_output))
    for name, a, e in zip(NAMES, actual, exact, strict=True):
        assert_same(a, e.to(dtype), name)


def rounded_to_tf32(t: Tensor) -> Tensor:
    """To 11 significant bits, to nearest."""
    return ((t.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("layer", COMMON_LAYERS)
def test_tf32_where_torch_allows_it(backend, layer, layout):
    """Of rounded operands every product is exact, so the result is float64's of these to float32's accuracy."""
    op, channels, results, kernel, size, kwargs = COMMON_LAYERS[layer]
    op = CONV2D if op is CONV2D_RELU_MAX_POOL2D else op  # which element is a window's maximum depends on the rounding
    case = Case((2, channels, *size), (results, channels // kwargs.get("groups", 1), *kernel), bias=False)
    x, w, _ = case.tensors(partial(normals, torch.float32))
    grad_output = normals(torch.float32, tuple(op.native(x, w, **kwargs).shape))
    # Small groups are not worth the matrix units.
    multiplies_tf32 = (x.is_cuda or backend == "cuda-emulated") and "groups" not in kwargs
    results = []
    for tf32 in (False, True):
        allow_tf32(tf32)
        leaves = tuple(LAYOUTS[layout](t) for t in (x, w))
        results.append(values_and_gradients(partial(op.ours, **kwargs), leaves, LAYOUTS[layout](grad_output)))
        x_, w_, grad_ = (to_float64(rounded_to_tf32(t) if tf32 and multiplies_tf32 else t) for t in (x, w, grad_output))
        exact = values_and_gradients(partial(op.native, **kwargs), (x_, w_), grad_)
        magnitudes = values_and_gradients(partial(native.conv2d, **kwargs), (x_.abs(), w_.abs()), grad_.abs())
        allowed = SLACK[torch.float32] * torch.finfo(torch.float32).eps
        if multiplies_tf32 and backend == "triton":  # which may round in another way
            allowed += 2**-10
        for name, r, e, magnitude in zip(NAMES, results[-1], exact, magnitudes, strict=False):
            assert error(r, e, magnitude) <= allowed, f"TF32 {tf32}: {name}"
    for name, in_float32, in_tf32 in zip(NAMES, *results, strict=False):
        assert torch.equal(in_float32, in_tf32) != multiplies_tf32, name


SOME_CASES = [
    Case((2, 3, 9, 11), (4, 3, 3, 3), kwargs={"padding": 1}),
    Case((1, 3, 17, 16), (8, 3, 7, 7), kwargs={"padding": 3, "stride": 2}),
    Case((2, 4, 8, 7), (6, 2, 2, 3), kwargs={"padding": (0, 2), "stride": (2, 1), "dilation": (1, 2), "groups": 2}),
    Case((2, 6, 7, 9), (6, 1, 3, 3), kwargs={"padding": 1, "groups": 6}),
    Case((1, 4, 6, 8), (12, 1, 5, 3), kwargs={"padding": 2, "stride": 2, "groups": 4}),
    Case((3, 16, 5, 5), (24, 16, 1, 1)),
    Case((1, 5, 6, 6), (3, 5, 1, 1), kwargs={"stride": 2, "padding": 1}),
]


@pytest.mark.parametrize("case", mostly_big(SOME_CASES, 2, 4, 6, emulated=True), ids=str)
def test_matches_the_definition(backend, case):
    """The output and every gradient against loops in numpy: an oracle that is not torch's convolution."""
    x, w, b = case.tensors(partial(normals, torch.float64))
    pairs = {
        name: (value, value) if isinstance(value, int) else value
        for name, value in {"stride": 1, "padding": 0, "dilation": 1, **case.kwargs}.items()
        if name != "groups"
    }
    output_shape = native.conv2d(x, w, b, **case.kwargs).shape
    grad_output = normals(torch.float64, tuple(output_shape))
    exact = conv2d_numpy(
        *(t.cpu().numpy() for t in (x, w, b, grad_output)), **pairs, groups=case.kwargs.get("groups", 1)
    )
    actual = values_and_gradients(partial(F.conv2d, **case.kwargs), (x, w, b), grad_output)
    for a, e in zip(actual, exact, strict=True):
        np.testing.assert_allclose(a.cpu().numpy(), e, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("width", [*mostly_big(range(1, 17), emulated=True), 17, *mostly_big(range(18, 41))])
def test_every_tail(backend, width):
    """Output widths and channel counts one by one, in float32, where the vectors are widest."""
    x, w, b = Case((2, width, 5, width), (width, width, 3, 3)).tensors(partial(integers, torch.float32))
    grad_output = integers(torch.float32, (2, width, 5, width))
    for layout in ("contiguous", "channels_last"):
        conv = partial(F.conv2d, padding=1)
        actual = values_and_gradients(conv, (LAYOUTS[layout](x), w, b), LAYOUTS[layout](grad_output))
        exact = values_and_gradients(partial(native.conv2d, padding=1), (x, w, b), grad_output)
        for name, a, e in zip(NAMES, actual, exact, strict=True):
            assert_same(a, e, f"{layout} {name}")


@pytest.mark.parametrize("channels", mostly_big([3, 16], 0, emulated=True))
def test_padding_of_each_side(backend, channels):
    """The operator takes four paddings, top, left, bottom and right."""
    inputs = Case((2, channels, 13, 14), (16, channels, 3, 3)).tensors(partial(integers, torch.float32))
    grad_output = integers(torch.float32, (2, 16, 12, 17))
    ours = lambda x, w, b: torch.ops.fastnn.conv2d(x, w, b, [1, 1], [1, 2, 0, 3], [1, 1], 1, False)  # noqa: E731
    padded = lambda x, w, b: native.conv2d(native.pad(x, (2, 3, 1, 0)), w, b)  # noqa: E731
    actual = values_and_gradients(ours, inputs, grad_output)
    for name, a, e in zip(NAMES, actual, values_and_gradients(padded, inputs, grad_output), strict=True):
        assert_same(a, e, name)


def test_one_by_one_beside_padding_on_one_side(backend):
    """Results past the input are the bias: nothing is read there."""
    inputs = Case((2, 16, 4, 6), (8, 16, 1, 1), layouts=("channels_last", "contiguous", "contiguous")).tensors(
        partial(integers, torch.float32)
    )
    grad_output = integers(torch.float32, (2, 8, 3, 4))
    ours = lambda x, w, b: torch.ops.fastnn.conv2d(x, w, b, [2, 2], [0, 0, 1, 1], [1, 1], 1, False)  # noqa: E731
    padded = lambda x, w, b: native.conv2d(native.pad(x, (0, 1, 0, 1)), w, b, 2)  # noqa: E731
    actual = values_and_gradients(ours, inputs, grad_output)
    for name, a, e in zip(NAMES, actual, values_and_gradients(padded, inputs, grad_output), strict=True):
        assert_same(a, e, name)


DEPTHWISE_LAYOUTS = [
    ("contiguous", "contiguous"),
    ("channels_last", "channels_last"),
    ("contiguous", "channels_last"),
    ("channels_last", "contiguous"),
    ("sliced", "offset"),
    ("offset", "sliced"),
    ("transposed", "transposed"),
]
# Widths, channels, kernels and more.
DEPTHWISE_SIZES = [
    (1, 3, (1, 1), {"padding": 1}),
    (3, 8, (3, 3), {"padding": 1}),
    (7, 17, (3, 3), {"padding": 1}),
    (8, 5, (5, 5), {"padding": 2}),
    (13, 2, (2, 4), {"padding": (0, 3)}),
    (16, 16, (3, 3), {"padding": 1}),
    (5, 16, (3, 3), {"padding": 4}),
    (21, 32, (2, 3), {"padding": (0, 1), "dilation": (1, 4)}),
    (27, 1, (3, 3), {"padding": 0}),
    (33, 9, (4, 1), {"padding": (4, 0)}),
    (66, 2, (1, 9), {"padding": 4}),
]
LARGE_DEPTHWISE_SIZES = [
    (18, 33, (3, 3), {"padding": (1, 2), "dilation": (2, 3)}),
    (47, 4, (7, 7), {"padding": 3}),
    (35, 2, (10, 9), {"padding": 5}),  # more taps than the kernels of their own take
    (23, 48, (5, 4), {"padding": 2}),
    (150, 112, (3, 3), {"padding": 1}),  # lines of all channels are more than the cache holds
]


@pytest.mark.parametrize(
    "sizes",
    [
        pytest.param(DEPTHWISE_SIZES, marks=pytest.mark.big(emulated=True), id="small"),
        pytest.param(LARGE_DEPTHWISE_SIZES, marks=pytest.mark.big, id="large"),
    ],
)
@pytest.mark.parametrize(
    ("stride", "layouts", "dtype"),
    pairwise([1, 2, 3, (1, 2), (2, 1), (4, 5)], DEPTHWISE_LAYOUTS, FLOATING),
    ids=str,
)
def test_depthwise(backend, stride, layouts, dtype, sizes):
    """Every tail of columns and channels, in every way to read and to interleave lines, with and without ReLU."""
    torch.manual_seed(0)
    for width, channels, kernel, more in sizes:
        case = Case((2, channels, 11, width), (channels, 1, *kernel), layouts=(layouts[0], "contiguous", layouts[1]))
        kwargs = {"stride": stride, "groups": channels, **more}
        inputs = case.tensors(partial(integers, dtype))
        exact_inputs = tuple(map(to_float64, inputs))
        for op in (CONV2D, CONV2D_RELU):
            grad_output = case.grad_output(op.native(*exact_inputs, **kwargs), partial(integers, dtype))
            exact = values_and_gradients(partial(op.native, **kwargs), exact_inputs, to_float64(grad_output))
            actual = values_and_gradients(partial(op.ours, **kwargs), inputs, grad_output)
            for name, a, e in zip(NAMES, actual, exact, strict=True):
                assert_same(a, e.to(dtype), f"width {width} {name}")


@pytest.mark.parametrize("channels", [20, 32])
@pytest.mark.parametrize("layout", mostly_big(["contiguous", "channels_last", "channels_last, by two"], 1))
@pytest.mark.parametrize("stride", [1, 2])
def test_depthwise_padding_is_not_multiplied(backend, request, stride, layout, channels):
    """An infinite weight or gradient meets no zero of the padding: what is not finite is so by the sum's own terms."""
    group = 2 if "by two" in layout else 1
    if group == 2 and not request.node.callspec.params["backend"].startswith("cpu"):
        pytest.skip("only the CPU's kernels of depthwise convolutions take groups of two")
    layout = layout.removesuffix(", by two")
    torch.manual_seed(0)
    x, w, b = Case((2, channels, 9, 19), (channels, group, 3, 3)).tensors(partial(normals, torch.float64))
    w[3, 0, 0, 1], w[4, 0, 2, 2], w[18, 0, 1, 0] = torch.inf, torch.nan, -torch.inf
    kwargs = {"stride": stride, "padding": 1, "groups": channels // group}
    grad_output = normals(torch.float64, tuple(native.conv2d(x, w, b, **kwargs).shape))
    grad_output[0, 7, 0, 4], grad_output[1, 8, -1, -1], grad_output[0, 19, 2, 0] = torch.inf, -torch.inf, torch.nan
    rows, cols = grad_output.shape[2:]
    output = b.view(-1, 1, 1) + torch.zeros_like(grad_output)
    grad_input, grad_weight = torch.zeros_like(x), torch.zeros_like(w)
    for r in range(3):
        for q in range(3):
            ys = [y for y in range(rows) if 0 <= y * stride + r - 1 < x.shape[2]]
            xs = [i for i in range(cols) if 0 <= i * stride + q - 1 < x.shape[3]]
            out = (..., slice(ys[0], ys[-1] + 1), slice(xs[0], xs[-1] + 1))
            inside = (
                ...,
                slice(ys[0] * stride + r - 1, ys[-1] * stride + r, stride),
                slice(xs[0] * stride + q - 1, xs[-1] * stride + q, stride),
            )
            tap = w[:, :, r, q].view(-1, group, group)
            source, grad = (t.unflatten(1, (-1, group)) for t in (x[inside], grad_output[out]))
            output[out] += torch.einsum("gmc,ngcyx->ngmyx", tap, source).flatten(1, 2)
            grad_input[inside] += torch.einsum("gmc,ngmyx->ngcyx", tap, grad).flatten(1, 2)
            grad_weight[:, :, r, q] = torch.einsum("ngcyx,ngmyx->gmc", source, grad).flatten(0, 1)
    exact = (output, grad_input, grad_weight, grad_output.sum((0, 2, 3)))
    actual = values_and_gradients(partial(F.conv2d, **kwargs), (LAYOUTS[layout](x), w, b), LAYOUTS[layout](grad_output))
    # Of groups of two, the gradient of the weight is another kernel's.
    for name, a, e in list(zip(NAMES, actual, exact, strict=True))[: 4 // group]:
        torch.testing.assert_close(a, e, equal_nan=True, msg=lambda text, name=name: f"{name}: {text}")


def by_definition(x: Tensor, w: Tensor, grad: Tensor, stride: int, multiplied: tuple[bool, ...]) -> list[Tensor]:
    """A convolution with padding 1 and its gradients, which multiply the zeros of the padding (and those between the
    positions of a strided convolution's result) where ``multiplied`` says so of output, grad_input, grad_weight."""
    (height, width), (rows, cols) = x.shape[2:], grad.shape[2:]
    output, grad_input, grad_weight = (torch.zeros_like(t) for t in (grad, x, w))
    for r, q in itertools.product(range(3), range(3)):
        tap = w[:, :, r, q]
        for y, z in itertools.product(range(rows), range(cols)):
            i, j = y * stride + r - 1, z * stride + q - 1
            inside = 0 <= i < height and 0 <= j < width
            pixel = x[:, :, i, j] if inside else torch.zeros_like(x[:, :, 0, 0])
            if inside or multiplied[0]:
                output[:, :, y, z] += (pixel[:, None] * tap).sum(2)
            if inside or multiplied[2]:
                grad_weight[:, :, r, q] += (grad[:, :, y, z, None] * pixel[:, None]).sum(0)
        for i, j in itertools.product(range(height), range(width)):
            y, z = i + 1 - r, j + 1 - q
            inside = y % stride == 0 == z % stride and 0 <= y // stride < rows and 0 <= z // stride < cols
            position = grad[:, :, y // stride, z // stride] if inside else torch.zeros_like(grad[:, :, 0, 0])
            if inside or multiplied[1]:
                grad_input[:, :, i, j] += (position[:, :, None] * tap).sum(1)
    return [output, grad_input, grad_weight]


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name == "triton"], indirect=True)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(
    ("channels", "results", "dtype", "multiplied"),
    [
        (16, 32, torch.float32, (True, True, True)),
        (16, 32, torch.float16, (True, True, True)),
        (3, 32, torch.float32, (True, False, True)),
        (16, 8, torch.float32, (False, True, False)),
        (3, 8, torch.float32, (False, False, False)),
        (16, 32, torch.float64, (False, False, False)),
    ],
)
def test_which_zeros_matrix_units_multiply(backend, channels, results, dtype, multiplied, stride):
    """As docs/backends.md says of Triton: these and no other make NaN of an infinite weight or gradient."""
    x, w = integers(dtype, (2, channels, 5, 6)), integers(dtype, (results, channels, 3, 3))
    w[1, 0, 0, 1], w[2, 0, 2, 2] = torch.inf, torch.nan
    grad = integers(dtype, tuple(native.conv2d(x, w, stride=stride, padding=1).shape))
    grad[0, 3, 0, 2], grad[1, 4, -1, -1] = torch.inf, -torch.inf
    exact = by_definition(*map(to_float64, (x, w, grad)), stride, multiplied)
    actual = values_and_gradients(partial(F.conv2d, stride=stride, padding=1), (x, w), grad)
    for name, a, e in zip(NAMES, actual, exact, strict=False):
        assert_same(a, e.to(dtype), name)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    "grads", [(True, False, False), (False, True, False), (False, False, True), (True, False, True)]
)
def test_only_the_gradients_asked_for(backend, op, grads):
    inputs = Case((2, 3, 8, 9), (4, 3, 3, 3)).tensors(partial(normals, torch.float64))
    results = []
    for function in (op.ours, op.native):
        leaves = [t.clone().requires_grad_(wanted) for t, wanted in zip(inputs, grads, strict=True)]
        function(*leaves, padding=1).sum().backward()
        results.append([leaf.grad for leaf in leaves])
    for ours, exact in zip(*results, strict=True):
        assert (ours is None) == (exact is None)
        if ours is not None:
            torch.testing.assert_close(ours, exact)


# ---- derivatives against finite differences ----

DERIVATIVE_CASES = [
    Case((2, 2, 5, 6), (3, 2, 3, 3), kwargs={"padding": 1}),
    Case((2, 2, 5, 6), (3, 2, 3, 3), bias=False, layouts=("channels_last", "contiguous", "contiguous")),
    Case((1, 3, 5, 4), (2, 3, 1, 1), layouts=("channels_last", "channels_last", "contiguous")),
    Case((1, 2, 7, 6), (2, 2, 3, 2), kwargs={"stride": 2, "padding": (1, 0)}, layouts=("sliced", "transposed", "")),
    Case((2, 5, 5), (3, 2, 2, 3), kwargs={"padding": "same"}),
    Case((1, 2, 7, 7), (2, 2, 2, 2), kwargs={"dilation": (2, 3), "padding": 1}, layouts=("transposed", "sliced", "")),
    Case((2, 4, 4, 5), (4, 2, 3, 3), kwargs={"groups": 2, "padding": 1}),
    Case((1, 3, 5, 5), (3, 1, 3, 3), kwargs={"groups": 3, "padding": 1}),
    Case(
        (1, 3, 5, 6),
        (6, 1, 3, 3),
        kwargs={"groups": 3, "padding": 1, "stride": 2},
        layouts=("channels_last", "offset", ""),
    ),
    Case((2, 2, 4, 4), (2, 2, 2, 2), layouts=("expanded", "contiguous", "")),
    Case((0, 2, 4, 4), (2, 2, 3, 3), kwargs={"padding": 1}),
]


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("case", mostly_big(DERIVATIVE_CASES, 8), ids=str)
def test_derivatives(backend, op, case):
    """First and second derivatives are those of finite differences."""
    inputs = [None if t is None else t.requires_grad_() for t in case.tensors(partial(normals, torch.float64))]
    function = partial(op.ours, **case.kwargs)
    # Steps along an expanded dimension would move all its elements at once.
    if "expanded" in case.layouts:
        base = [None if t is None else t[:1].detach().clone().requires_grad_() for t in inputs[:1]] + inputs[1:]
        function = lambda x, *rest: op.ours(x.expand(case.input), *rest, **case.kwargs)  # noqa: E731
        inputs = base
    assert gradcheck(function, inputs)
    assert gradgradcheck(function, inputs)


@pytest.mark.parametrize(
    "pool", mostly_big([{"pool_kernel_size": 3}, {"pool_kernel_size": (2, 3), "pool_stride": (1, 2)}], 1), ids=str
)
def test_pool_derivatives(backend, pool):
    """Also where windows overlap, so that one convolution output gets several gradients."""
    inputs = Case((2, 2, 6, 8), (3, 2, 3, 3)).tensors(partial(normals, torch.float64))
    inputs = [t.requires_grad_() for t in inputs]
    function = partial(F.conv2d_relu_max_pool2d, padding=1, **pool)
    assert gradcheck(function, inputs)
    assert gradgradcheck(function, inputs)


# ---- the raw operators ----


def conv2d_arguments(relu: bool, **changes: Any) -> tuple[Any, ...]:
    x, w, b = Case((2, 2, 5, 6), (4, 2, 3, 3)).tensors(partial(normals, torch.float64))
    return (*({"x": x, "w": w, "b": b} | changes).values(), [1, 2], [1, 1, 0, 2], [1, 1], 1, relu)


def pool_arguments() -> tuple[Any, ...]:
    return (*conv2d_arguments(False)[:-1], [2, 2], [2, 2])


def backward_arguments(kind: str) -> tuple[Any, ...]:
    """conv2d_backward's arguments after a plain convolution, one with ReLU, and one with ReLU and max-pooling."""
    x, w, b, *convolution, _ = conv2d_arguments(False)
    output = code = None
    if kind == "pool":
        result, code = torch.ops.fastnn.conv2d_relu_max_pool2d(*pool_arguments()[:-2], [2, 2], [2, 2])
    else:
        result = torch.ops.fastnn.conv2d(x, w, b, *convolution, kind == "relu")
        output = result if kind == "relu" else None
    grad_output = normals(torch.float64, tuple(result.shape))
    pool = [2, 2] if kind == "pool" else []
    return (grad_output, x, w, output, code, *convolution, pool, pool, [True, True, True])


def raw_calls() -> list[Any]:
    ops = torch.ops.fastnn
    return [
        pytest.param(ops.conv2d.default, lambda: conv2d_arguments(False), id="conv2d"),
        pytest.param(ops.conv2d.default, lambda: conv2d_arguments(True), id="conv2d+relu"),
        pytest.param(ops.conv2d_relu_max_pool2d.default, pool_arguments, id="conv2d_relu_max_pool2d"),
        *(
            pytest.param(ops.conv2d_backward.default, partial(backward_arguments, kind), id=f"conv2d_backward+{kind}")
            for kind in ("plain", "relu", "pool")
        ),
    ]


@pytest.mark.one_tier
@pytest.mark.parametrize(("op", "arguments"), raw_calls())
@pytest.mark.parametrize("requires_grad", mostly_big([False, True], 1))
def test_opcheck(backend, op, arguments, requires_grad):
    args = arguments()
    if requires_grad:
        args = tuple(a.requires_grad_() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args)
        try:
            op(*args)
        except RuntimeError as refusal:
            assert "not differentiable" in str(refusal)
            return
    torch.library.opcheck(op, args)


@pytest.mark.one_tier
@pytest.mark.parametrize(("op", "arguments"), raw_calls())
def test_raw_operator_differentiates_or_raises(backend, op, arguments):
    args = list(arguments())
    leaves = [a.requires_grad_() for a in args[:3]]
    try:
        outputs = op(*args)
    except RuntimeError as refusal:
        assert "not differentiable" in str(refusal)
        return
    outputs = [t for t in ([outputs] if isinstance(outputs, Tensor) else outputs) if t.is_floating_point()]
    assert all(t.requires_grad for t in outputs)
    assert gradcheck(lambda *t: first_floating(op(*t, *args[3:])), leaves)


def first_floating(outputs: Any) -> Any:
    return outputs if isinstance(outputs, Tensor) else tuple(t for t in outputs if t.is_floating_point())


@pytest.mark.parametrize(
    "wrong",
    [
        {"x": torch.zeros(2, 5, 6)},
        {"x": torch.zeros(2, 2, 5, 6)},
        {"x": torch.zeros(2, 3, 5, 6, dtype=torch.float64)},
        {"w": torch.zeros(4, 2, 3, dtype=torch.float64)},
        {"w": torch.zeros(4, 2, 30, 3, dtype=torch.float64)},
        {"b": torch.zeros(5, dtype=torch.float64)},
    ],
    ids=str,
)
def test_raw_operator_refuses_wrong_arguments(backend, wrong):
    wrong = {name: t.to(here()) for name, t in wrong.items()}
    with pytest.raises(RuntimeError, match="conv2d"):
        torch.ops.fastnn.conv2d(*conv2d_arguments(False, **wrong))
    with pytest.raises(RuntimeError, match="conv2d"):
        torch.ops.fastnn.conv2d_relu_max_pool2d(*conv2d_arguments(False, **wrong)[:-1], [2, 2], [2, 2])


def test_raw_backward_never_trusts_the_pool_code(backend):
    """Codes no forward pass writes: an error or any numbers, but no access outside of the tensors."""
    grad_output, x, w, _, code, *rest = backward_arguments("pool")
    for value in (4, 200, 254, 255):
        code = torch.full_like(code, value)
        try:
            gradients = torch.ops.fastnn.conv2d_backward(grad_output, x, w, None, code, *rest)
        except RuntimeError:
            continue
        assert gradients[0].shape == x.shape


# ---- memory ----


def saved_bytes_beyond(arguments: tuple[Tensor, ...], function: Callable[..., Tensor]) -> int:
    """Bytes of the distinct storages that the graph of ``function(*arguments)`` keeps, other than the arguments'."""
    known = {t.untyped_storage().data_ptr() for t in arguments}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = function(*arguments)
    assert output.requires_grad
    return sum(saved.values())


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_saved_memory(backend, layout):
    x, w, b = Case((2, 3, 32, 32), (16, 3, 3, 3)).tensors(partial(normals, torch.float32))
    inputs = (LAYOUTS[layout](x).requires_grad_(), w.requires_grad_(), b.requires_grad_())
    conv_output = 2 * 16 * 32 * 32
    assert saved_bytes_beyond(inputs, partial(F.conv2d, padding=1)) == 0
    assert saved_bytes_beyond(inputs, partial(F.conv2d_relu, padding=1)) <= 4 * conv_output
    assert saved_bytes_beyond(inputs, partial(F.conv2d_relu_max_pool2d, padding=1)) <= conv_output


# ---- layouts ----


@pytest.mark.one_tier
@pytest.mark.parametrize(("channels", "kernel"), [(1, (3, 3)), (1, (1, 2)), (2, (1, 1))])
def test_gradient_of_the_weight_is_laid_out_as_the_fake_rule_says(backend, channels, kernel):
    """Also along dimensions of size 1: an optimizer copies a gradient whose strides are not its parameter's."""
    x, w, _ = Case((1, channels * 3, 5, 4), (6, channels, *kernel)).tensors(partial(normals, torch.float32))
    w.requires_grad_()
    F.conv2d(x, w, groups=3).sum().backward()
    assert w.grad.stride() == w.stride()


@pytest.mark.parametrize(
    ("input_layout", "weight_layout", "groups"), pairwise(list(LAYOUTS), ["contiguous", "channels_last"], [1, 2, 4])
)
def test_output_layout_is_natives(backend, input_layout, weight_layout, groups):
    """channels_last if either the input or the weight is."""
    case = Case((2, 4, 6, 7), (8, 4 // groups, 3, 3), layouts=(input_layout, weight_layout, "contiguous"))
    inputs = case.tensors(partial(normals, torch.float32))
    exact = native.conv2d(*inputs, groups=groups)
    assert F.conv2d(*inputs, groups=groups).stride() == exact.stride()
    assert F.conv2d_relu(*inputs, groups=groups).stride() == exact.stride()
    pooled = F.conv2d_relu_max_pool2d(*inputs, groups=groups)
    memory_format = (
        torch.channels_last if exact.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format
    )
    assert pooled.is_contiguous(memory_format=memory_format)


# ---- the same bits every time ----


@pytest.mark.parametrize("groups", [1, 8], ids=["dense", "depthwise"])
@pytest.mark.parametrize("layout", mostly_big(["contiguous", "channels_last"], 1, emulated=True))
def test_same_bits_every_time(backend, layout, groups):
    """With so many positions the CUDA kernels sum the gradients of weight and bias in several slices. Larger calls are
    in test_threads.py."""
    inputs = [torch.randn(shape) for shape in [(2, 8, 16, 17), (8, 8 // groups, 3, 3), (8,)]]
    inputs[0] = LAYOUTS[layout](inputs[0])
    grad_output = torch.randn(2, 8, 16, 17)
    conv = partial(F.conv2d_relu, padding=1, groups=groups)
    first, *others = (values_and_gradients(conv, inputs, grad_output) for _ in range(3))
    for other in others:
        for name, a, e in zip(NAMES, other, first, strict=True):
            assert torch.equal(a, e), name


# ---- the samples inside the torch wheel ----


@pytest.mark.big
@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_wheel_samples(backend, op, dtype):
    samples = list(op_info("conv2d").sample_inputs(here(), dtype))
    assert len(samples) >= 30
    for sample in samples:
        inputs = (sample.input, *sample.args)
        exact_inputs = tuple(map(to_float64, inputs))
        try:
            exact_output = op.native(*exact_inputs, **sample.kwargs)
        except RuntimeError as exact_error:  # a pool larger than what the convolution gives
            with pytest.raises(RuntimeError) as ours_error:
                op.ours(*inputs, **sample.kwargs)
            assert str(ours_error.value) == str(exact_error)
            continue
        grad_output = normals(dtype, tuple(exact_output.shape))
        exact = values_and_gradients(partial(op.native, **sample.kwargs), exact_inputs, to_float64(grad_output))
        ours = values_and_gradients(partial(op.ours, **sample.kwargs), inputs, grad_output)
        for name, o, e in zip(NAMES, ours, exact, strict=False):
            # Samples reach +-9, so sums reach hundreds; a float16 gradient is a sum of up to 50 of these.
            tolerance = 32 * torch.finfo(dtype).eps * float(e.abs().max().clamp_min(1))
            torch.testing.assert_close(
                o.to(torch.float64), e, rtol=0, atol=tolerance, msg=lambda t, n=name: f"{n}: {t}"
            )


@pytest.mark.expects_native
@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64, torch.complex128], ids=str)
def test_wheel_samples_without_a_kernel(backend, dtype):
    for sample in op_info("conv2d").sample_inputs(here(), dtype, requires_grad=dtype.is_complex):
        exact = native.conv2d(sample.input, *sample.args, **sample.kwargs)
        ours = F.conv2d(sample.input, *sample.args, **sample.kwargs)
        assert_same(ours, exact, "output")
        if dtype.is_complex:
            leaves = [t for t in (sample.input, *sample.args) if t is not None]
            for o, e in zip(
                torch.autograd.grad(ours.abs().sum(), leaves),
                torch.autograd.grad(exact.abs().sum(), leaves),
                strict=True,
            ):
                torch.testing.assert_close(o, e)


@pytest.mark.expects_native
def test_wheel_error_inputs(backend):
    errors = list(op_info("conv2d").error_inputs(here()))
    assert len(errors) >= 10
    for case in errors:
        sample = case.sample_input
        inputs = (sample.input, *sample.args)
        assert raised(F.conv2d, *inputs, **sample.kwargs) == raised(native.conv2d, *inputs, **sample.kwargs)
        for op in (CONV2D_RELU, CONV2D_RELU_MAX_POOL2D):
            assert raised(op.ours, *inputs, **sample.kwargs) == raised(op.native, *inputs, **sample.kwargs)


ZEROS = torch.zeros
MORE_ERRORS = [
    ((ZEROS(2, 3, 5), ZEROS(4, 2, 3, 3)), {}),
    ((ZEROS(1, 3, 5, 5), ZEROS(4, 2, 3, 3)), {}),
    ((ZEROS(3, 3), ZEROS(4, 3, 3, 3)), {}),
    ((ZEROS(1, 3, 5, 5), ZEROS(4, 3, 7, 7)), {}),
    ((ZEROS(1, 3, 5, 5), ZEROS(4, 3, 3, 3), ZEROS(5)), {}),
    ((ZEROS(1, 3, 5, 5), ZEROS(4, 3, 3, 3), ZEROS(2, 2)), {}),
    ((ZEROS(1, 3, 5, 5), ZEROS(4, 3, 3)), {}),
    ((ZEROS(1, 4, 5, 5), ZEROS(3, 2, 3, 3)), {"groups": 2}),
    ((ZEROS(1, 3, 5, 5), ZEROS(4, 3, 3, 3)), {"groups": 0}),
    ((ZEROS(1, 3, 5, 5), ZEROS(4, 3, 3, 3)), {"groups": -1}),
    ((ZEROS(1, 3, 5, 5), ZEROS(4, 3, 3, 3)), {"stride": 0}),
    ((ZEROS(1, 3, 5, 5), ZEROS(4, 3, 3, 3)), {"stride": (1, 2, 3)}),
    ((ZEROS(1, 3, 5, 5), ZEROS(4, 3, 3, 3)), {"padding": -1}),
    ((ZEROS(1, 3, 5, 5), ZEROS(4, 3, 3, 3)), {"padding": "full"}),
    ((ZEROS(1, 3, 5, 5), ZEROS(4, 3, 3, 3)), {"padding": "same", "stride": 2}),
    ((ZEROS(1, 3, 5, 5), ZEROS(4, 3, 3, 3)), {"padding": 1.5}),
    ((ZEROS(1, 3, 5, 5), ZEROS(4, 3, 3, 3)), {"dilation": 0}),
    ((ZEROS(1, 3, 5, 5), ZEROS(4, 3, 3, 3, dtype=torch.float64)), {}),
    ((ZEROS(1, 3, 5, 5), ZEROS(4, 3, 3, 3), ZEROS(4, dtype=torch.float64)), {}),
    ((ZEROS(1, 0, 5, 5), ZEROS(4, 0, 3, 3)), {}),
    ((ZEROS(1, 3, 0, 5), ZEROS(4, 3, 1, 1)), {}),
    ((ZEROS(1, 3, 5, 5), ZEROS(0, 3, 3, 3)), {}),
    ((ZEROS(1, 3, 5, 5), None), {}),
    ((None, ZEROS(4, 3, 3, 3)), {}),
    ((ZEROS(1, 3, 5, 5), ZEROS(4, 3, 3, 3)), {"groups": True}),
    ((ZEROS(1, 3, 5, 5), ZEROS(4, 3, 3, 3)), {"padding": 2**64}),
    ((ZEROS(1, 3, 5, 5), ZEROS(4, 3, 3, 3)), {"dilation": (1, -(2**64))}),
    (([1.0], ZEROS(4, 3, 3, 3)), {}),
    ((ZEROS(1, 3, 5, 5),), {}),
    ((ZEROS(1, 3, 5, 5), ZEROS(4, 3, 3, 3)), {"no_such_argument": 1}),
]


@pytest.mark.expects_native
@pytest.mark.parametrize(("args", "kwargs"), MORE_ERRORS)
def test_errors_are_natives(backend, args, kwargs):
    """The error, type and text, or where native has an answer after all, that answer."""
    args = [t.to(here()) if isinstance(t, Tensor) else t for t in args]
    try:
        exact = native.conv2d(*args, **kwargs)
    except Exception as exception:
        kind, text = raised(F.conv2d, *args, **kwargs)
        assert kind is type(exception)
        if kind is not TypeError:  # native's names its own overloads
            assert text == str(exception)
        with pytest.raises(type(exception)):
            F.conv2d_relu_max_pool2d(*args, **kwargs)
    else:
        torch.testing.assert_close(F.conv2d(*args, **kwargs), exact)


@pytest.mark.expects_native
@pytest.mark.parametrize(
    "pool",
    [
        {"pool_kernel_size": 9},
        {"pool_kernel_size": 0},
        {"pool_stride": 0},
        {"pool_kernel_size": (1, 2, 3)},
        {"pool_kernel_size": "2"},
        {"pool_stride": -1},
    ],
    ids=str,
)
def test_pool_errors_are_natives(backend, pool):
    args = (ZEROS(1, 3, 8, 8), ZEROS(4, 3, 3, 3))
    assert raised(F.conv2d_relu_max_pool2d, *args, **pool) == raised(native_conv2d_relu_max_pool2d, *args, **pool)


@pytest.mark.parametrize("window", [(15, 17), pytest.param((16, 16), marks=pytest.mark.expects_native)])
def test_a_large_pool_window(backend, window):
    """As many elements as a code of one byte can name, and more."""
    x, w, b = Case((1, 2, 40, 40), (3, 2, 3, 3)).tensors(partial(normals, torch.float64))
    grad_output = normals(torch.float64, (1, 3, 2, 2))
    ours, exact = (
        values_and_gradients(partial(function, pool_kernel_size=window), (x, w, b), grad_output)
        for function in (F.conv2d_relu_max_pool2d, native_conv2d_relu_max_pool2d)
    )
    for o, e in zip(ours, exact, strict=True):
        torch.testing.assert_close(o, e)


def module_samples() -> list[Any]:
    """Every nn.Conv2d of torch's own module tests, as (constructor arguments, input shape)."""
    samples = []
    info = module_info("Conv2d")
    for m in info.module_inputs_func(info, here(), torch.float64, requires_grad=False, training=True):
        args, kwargs = m.constructor_input.args, m.constructor_input.kwargs
        samples.append(((args, kwargs), tuple(m.forward_input.args[0].shape)))
    for test in older_module_tests("Conv2d"):
        if "constructor_args" in test:
            samples.append(((test["constructor_args"], {}), test["input_size"]))
        else:
            module = test["constructor"]()
            names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups")
            samples.append((((), {name: getattr(module, name) for name in names}), test["input_size"]))
    return samples


@pytest.mark.big
def test_wheel_module_samples(backend):
    samples = module_samples()
    assert len(samples) >= 20
    for (args, kwargs), shape in samples:
        exact_module = torch.nn.Conv2d(*args, **kwargs, dtype=torch.float64)
        module = fastnn.nn.Conv2d(*args, **kwargs, dtype=torch.float64)
        module.load_state_dict(exact_module.state_dict())
        x = normals(torch.float64, shape).requires_grad_()
        ours, exact = module(x), exact_module(x)
        torch.testing.assert_close(ours, exact)
        grad_output = normals(torch.float64, tuple(exact.shape))
        for o, e in zip(
            torch.autograd.grad(ours, [x, *module.parameters()], grad_output),
            torch.autograd.grad(exact, [x, *exact_module.parameters()], grad_output),
            strict=True,
        ):
            torch.testing.assert_close(o, e)
        assert gradcheck(module, (x,))


# ---- fake tensors, other tensors ----


@pytest.mark.expects_native
@pytest.mark.parametrize("op", OPS)
def test_meta_and_fake_tensors(backend, op):
    x, w, b = Case((2, 3, 6, 7), (4, 3, 3, 3)).tensors(partial(normals, torch.float32))
    exact = op.native(x, w, b, padding=1)
    on_meta = op.ours(*(t.to("meta") for t in (x, w, b)), padding=1)
    assert (on_meta.shape, on_meta.dtype) == (exact.shape, exact.dtype)
    with torch._subclasses.FakeTensorMode() as mode:
        fake = op.ours(*map(mode.from_tensor, (x, w, b)), padding=1)
        assert (fake.shape, fake.dtype, fake.stride()) == (exact.shape, exact.dtype, exact.stride())


@pytest.mark.expects_native
def test_layouts_and_types_without_a_kernel(backend):
    x, w, b = Case((2, 3, 6, 7), (4, 3, 3, 3)).tensors(partial(normals, torch.float32))

    class Wrapped(Tensor):
        pass

    wrapped = F.conv2d(x.as_subclass(Wrapped), w, b)
    assert type(wrapped) is Wrapped
    assert_same(wrapped.as_subclass(Tensor), native.conv2d(x, w, b), "subclass")
    if x.is_cpu and torch.backends.mkldnn.is_available():
        on_mkldnn = F.conv2d(x.to_mkldnn(), w.to_mkldnn(), b.to_mkldnn())
        torch.testing.assert_close(on_mkldnn.to_dense(), native.conv2d(x, w, b))


@pytest.mark.parametrize("op", OPS)
def test_arguments_by_position_and_by_name(backend, op):
    x, w, b = Case((2, 4, 9, 9), (6, 2, 3, 3)).tensors(partial(normals, torch.float64))
    by_position = op.ours(x, w, b, (2, 1), (1, 2), (1, 2), 2)
    exact = op.native(x, w, b, (2, 1), (1, 2), (1, 2), 2)
    torch.testing.assert_close(by_position, exact)
    by_name = op.ours(input=x, weight=w, bias=b, stride=torch.Size([2, 1]), padding=[1, 2], dilation=(1, 2), groups=2)
    torch.testing.assert_close(by_name, exact)


def test_inputs_are_left_alone_and_version_counters_checked(backend):
    x, w, b = Case((2, 3, 6, 7), (4, 3, 3, 3)).tensors(partial(normals, torch.float64))
    copies = [t.clone() for t in (x, w, b)]
    leaves = [t.requires_grad_() for t in (x, w, b)]
    F.conv2d_relu_max_pool2d(*leaves).sum().backward()
    for t, copy in zip(leaves, copies, strict=True):
        assert_same(t.detach(), copy, "input")
    output = F.conv2d(*leaves)
    with torch.no_grad():
        w.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


@pytest.mark.parametrize("wrong", [{"stride": (1.0, 1)}, {"padding": (0, 0.0)}, {"dilation": 1.0}, {"groups": 1.0}])
def test_a_float_is_no_int_after_its_int_was_taken(wrong):
    x, weight = torch.randn(1, 2, 5, 5), torch.randn(3, 2, 3, 3)
    name, value = next(iter(wrong.items()))
    F.conv2d(x, weight, **{name: tuple(map(int, value)) if isinstance(value, tuple) else int(value)})
    with pytest.raises(TypeError):
        F.conv2d(x, weight, **wrong)
