"""relu, in place and not, against native bit for bit, finite differences and torch's own samples."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import FLOATING, LAYOUTS, assert_bitwise_equal
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional as native
from wheel import here, module_info, older_module_tests, op_info, raised

import fastnn
import fastnn.nn.functional as F

pytestmark = pytest.mark.kernels

SPECIAL = [0.0, -0.0, float("inf"), -float("inf"), float("nan"), 1e-30, -1e-30, 1e30, -1e30]


def values(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Normals, a quarter of them replaced by zeros of both signs, infinities, NaN and extreme values."""
    special = torch.tensor(SPECIAL, dtype=dtype)[torch.randint(len(SPECIAL), shape)]
    return torch.where(torch.rand(shape) < 0.25, special, torch.randn(shape).to(dtype))


def gradient(function: Callable[[Tensor], Tensor], x: Tensor, grad_output: Tensor) -> tuple[Tensor, Tensor]:
    leaf = x.detach().requires_grad_()
    output = function(leaf)
    return output.detach(), torch.autograd.grad(output, leaf, grad_output)[0]


def assert_is_natives(actual: Tensor, expected: Tensor, what: str = "") -> None:
    """Bit for bit, but for the sign of zeros on CUDA, where native's relu(-0) may be 0 (pytorch/pytorch#181533)."""
    if expected.is_cuda:
        actual, expected = (t.masked_fill(t == 0, 0) for t in (actual, expected))
    assert_bitwise_equal(actual, expected, what)


shapes = st.lists(st.integers(0, 9) | st.sampled_from([17, 31, 33, 64]), max_size=3).map(tuple)
layouts = st.sampled_from(["contiguous", *(name for name in LAYOUTS if name != "channels_last")])


@given(shape=shapes, dtype=st.sampled_from(FLOATING), layout=layouts, grad_layout=layouts, seed=st.integers(0, 99))
def test_is_natives_bit_for_bit(backend, shape, dtype, layout, grad_layout, seed):
    torch.manual_seed(seed)
    x, grad_output = values(shape, dtype), values(shape, dtype)
    x = LAYOUTS[layout](x) if len(shape) >= 2 else x
    grad_output = LAYOUTS[grad_layout](grad_output) if len(shape) >= 2 else grad_output
    ours, exact = gradient(F.relu, x, grad_output), gradient(native.relu, x, grad_output)
    for o, e, what in zip(ours, exact, ("output", "gradient"), strict=True):
        assert_is_natives(o, e, what)
    if layout != "expanded":
        in_place = LAYOUTS[layout](x.clone()) if len(shape) >= 2 else x.clone()
        assert F.relu(in_place, inplace=True) is in_place
        assert_is_natives(in_place, exact[0], "in place")


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
def test_every_length(backend, dtype):
    """Every tail of every vector width, and nothing written beside it."""
    for length in range(70):
        buffer = values((length + 2,), dtype)
        before = buffer.clone()
        view = buffer[1:-1]
        exact = native.relu(view)
        assert_is_natives(F.relu(view), exact, f"length {length}")
        F.relu_(view)
        assert_is_natives(view, exact, f"length {length} in place")
        assert_bitwise_equal(buffer[[0, -1]], before[[0, -1]], "beside")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_16_bit_value(backend, dtype):
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int16)
    x = bits.view(dtype)
    grad_output = x.flip(0)
    for o, e in zip(gradient(F.relu, x, grad_output), gradient(native.relu, x, grad_output), strict=True):
        assert_is_natives(o, e)


@pytest.mark.parametrize(
    "memory_format", [torch.channels_last, torch.channels_last_3d, torch.contiguous_format], ids=str
)
def test_keeps_the_memory_format(backend, memory_format):
    dims = 5 if memory_format is torch.channels_last_3d else 4
    x = torch.randn((2, 3, 4, 5, 6)[:dims]).contiguous(memory_format=memory_format)
    assert F.relu(x).stride() == native.relu(x).stride()
    permuted = x.transpose(1, 2)
    assert F.relu(permuted).stride() == native.relu(permuted).stride()


def large(layout: str) -> Tensor:
    """More elements than one thread takes."""
    return LAYOUTS[layout](torch.randn(3, 64, 40, 41, dtype=torch.float32))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_large(backend, layout):
    x = large(layout)
    grad_output = torch.randn_like(x)
    for o, e in zip(gradient(F.relu, x, grad_output), gradient(native.relu, x, grad_output), strict=True):
        assert_is_natives(o, e)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("inplace", [False, True])
def test_derivatives(backend, layout, inplace):
    base = torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)

    def function(t: Tensor) -> Tensor:
        laid_out = (
            LAYOUTS[layout](t) if layout in ("contiguous", "channels_last", "transposed", "expanded") else t[:, ::2]
        )
        if inplace:  # a leaf cannot be written to, an expanded view neither
            laid_out = laid_out.clone(memory_format=torch.preserve_format) if layout != "sliced" else laid_out * 1
        return F.relu(laid_out, inplace=inplace)

    assert gradcheck(function, base)
    assert gradgradcheck(function, base)


# ---- in place, as autograd sees it ----


def test_in_place_returns_its_argument_and_bumps_the_version(backend):
    x = torch.randn(4, 5)
    before = x._version
    assert F.relu_(x) is x
    assert x._version == before + 1
    y = torch.randn(4, 5, requires_grad=True) * 1
    before = y._version
    assert F.relu(y, inplace=True) is y
    assert y._version > before
    assert y.requires_grad


@pytest.mark.parametrize("view", [lambda t: t[:, 1::2], lambda t: t.T[2:4], lambda t: t.view(-1)[3:9], torch.diagonal])
def test_in_place_through_views(backend, view):
    """A view of a tensor in the graph, written in place: the base's gradient sees it."""
    gradients = []
    for function in (F.relu, native.relu):
        leaf = torch.linspace(-2, 2, 24, dtype=torch.float64).view(4, 6).requires_grad_()
        base = leaf * 1
        function(view(base), inplace=True)
        (base * torch.arange(24.0).view(4, 6)).sum().backward()
        gradients.append((base.detach(), leaf.grad))
    for o, e in zip(*gradients, strict=True):
        assert_is_natives(o, e)


def test_in_place_on_partly_overlapping_memory(backend):
    """Native lets it pass, and so often as an element is visited its ReLU is the same."""
    buffer = torch.linspace(-1, 1, 10)
    exact = native.relu(buffer)
    F.relu(buffer.as_strided((4, 4), (2, 1)), inplace=True)
    assert_is_natives(buffer, exact)


def on_a_leaf(relu: Callable[..., Tensor]) -> None:
    relu(torch.randn(3, requires_grad=True), inplace=True)


def on_a_view_of_a_leaf(relu: Callable[..., Tensor]) -> None:
    relu(torch.randn(3, 3, requires_grad=True)[1:], inplace=True)


def on_an_expanded_tensor(relu: Callable[..., Tensor]) -> None:
    relu(torch.randn(3, 1).expand(3, 4), inplace=True)


def on_an_expanded_tensor_in_a_graph(relu: Callable[..., Tensor]) -> None:
    relu((torch.randn(3, 1, requires_grad=True) * 1).expand(3, 4), inplace=True)


def on_what_backward_needs(relu: Callable[..., Tensor]) -> None:
    x = torch.randn(3, requires_grad=True)
    y = x.exp()
    relu(y, inplace=True)
    y.sum().backward()


def written_to_before_backward(relu: Callable[..., Tensor]) -> None:
    y = relu(torch.randn(3, requires_grad=True))
    y.add_(1)
    y.sum().backward()


def in_place_written_to_before_backward(relu: Callable[..., Tensor]) -> None:
    y = relu(torch.randn(3, requires_grad=True) * 1, inplace=True)
    y.add_(1)
    y.sum().backward()


def on_one_of_several_views(relu: Callable[..., Tensor]) -> None:
    relu((torch.randn(4, 3, requires_grad=True) * 1).unbind()[0], inplace=True)


def on_an_inference_tensor(relu: Callable[..., Tensor]) -> None:
    with torch.inference_mode():
        x = torch.randn(3)
    relu(x, inplace=True)


def on_a_list(relu: Callable[..., Tensor]) -> None:
    relu([1.0])


@pytest.mark.expects_native
@pytest.mark.parametrize(
    "misuse",
    [
        on_a_leaf,
        on_a_view_of_a_leaf,
        on_an_expanded_tensor,
        on_an_expanded_tensor_in_a_graph,
        on_what_backward_needs,
        on_one_of_several_views,
        on_an_inference_tensor,
        on_a_list,
    ],
)
def test_misuse_raises_what_native_raises(backend, misuse):
    kind, text = raised(misuse, F.relu)
    exact_kind, exact_text = raised(misuse, native.relu)
    assert kind is exact_kind
    assert same_but_for_the_node(text) == same_but_for_the_node(exact_text)


def same_but_for_the_node(text: str) -> str:
    """Without the name of the graph node, which is ours."""
    return text.replace("ReLUInPlaceBackward", "ReluBackward0").replace("ReLUBackward", "ReluBackward0")


@pytest.mark.parametrize("misuse", [written_to_before_backward, in_place_written_to_before_backward])
def test_result_written_to_before_backward(backend, misuse):
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        misuse(native.relu)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        misuse(F.relu)


# ---- the raw operators ----


@pytest.mark.one_tier
@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "sliced"])
def test_opcheck(backend, requires_grad, layout):
    x = LAYOUTS[layout](torch.randn(3, 7, dtype=torch.float64)).requires_grad_(requires_grad)
    torch.library.opcheck(torch.ops.fastnn.relu.default, (x,))
    torch.library.opcheck(torch.ops.fastnn.relu_backward.default, (torch.randn_like(x), x))
    torch.library.opcheck(torch.ops.fastnn.relu_.default, (x.detach().clone(),))


def test_raw_operator_differentiates_or_raises(backend):
    x = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)
    assert gradcheck(torch.ops.fastnn.relu, (x,))
    grad = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda g: torch.ops.fastnn.relu_backward(g, x.detach()), (grad,))
    with pytest.raises(RuntimeError, match="not differentiable"):
        torch.ops.fastnn.relu_(x * 1)


def test_raw_operator_refuses_wrong_arguments(backend):
    with pytest.raises(RuntimeError, match=r"relu: self has dtype (Int|torch\.int32)"):
        torch.ops.fastnn.relu(torch.arange(3, dtype=torch.int32))
    with pytest.raises(RuntimeError, match="relu_backward: grad_output has dtype"):
        torch.ops.fastnn.relu_backward(torch.zeros(3), torch.zeros(3, dtype=torch.float64))
    with pytest.raises(RuntimeError, match="relu_backward: grad_output has shape"):
        torch.ops.fastnn.relu_backward(torch.zeros(4), torch.zeros(3))


# ---- the samples inside the torch wheel ----


@pytest.mark.big
@pytest.mark.expects_native  # for the integers
def test_wheel_samples(backend):
    info = op_info("relu")
    for dtype in sorted(info.dtypes, key=str):
        samples = [*info.sample_inputs(here(), dtype), *info.reference_inputs(here(), dtype)]
        assert len(samples) >= 30
        for sample in samples:
            exact = native.relu(sample.input, *sample.args, **sample.kwargs)
            ours = F.relu(sample.input, *sample.args, **sample.kwargs)
            assert_is_natives(ours, exact)
            assert ours.stride() == exact.stride() or ours.numel() == 0
            if dtype.is_floating_point:
                grad_output = torch.randn_like(exact)
                for o, e in zip(
                    gradient(F.relu, sample.input, grad_output),
                    gradient(native.relu, sample.input, grad_output),
                    strict=True,
                ):
                    assert_is_natives(o, e)


@pytest.mark.expects_native
@pytest.mark.parametrize("dtype", [torch.complex64, torch.bool, torch.uint16], ids=str)
def test_dtypes_native_refuses(backend, dtype):
    x = torch.ones(3, dtype=dtype)
    assert raised(F.relu, x) == raised(native.relu, x)


def test_wheel_module_samples(backend):
    info = module_info("ReLU")
    inputs = [
        m.forward_input.args[0]
        for m in info.module_inputs_func(info, here(), torch.float64, requires_grad=False, training=True)
    ]
    inputs += [torch.randn(test["input_size"], dtype=torch.float64) for test in older_module_tests("ReLU")]
    assert len(inputs) >= 5
    for x in inputs:
        for inplace in (False, True):
            ours, exact = fastnn.nn.ReLU(inplace), torch.nn.ReLU(inplace)
            assert repr(ours) == repr(exact)
            assert_is_natives(ours(x.clone()), exact(x.clone()))
        assert gradcheck(fastnn.nn.ReLU(), x.clone().requires_grad_())


# ---- other tensors ----


@pytest.mark.expects_native
def test_meta_fake_sparse_and_subclass(backend):
    x = torch.randn(3, 4)
    assert F.relu(x.to("meta")).shape == x.shape
    with torch._subclasses.FakeTensorMode() as mode:
        assert F.relu(mode.from_tensor(x)).stride() == x.stride()
    sparse = x.relu().to_sparse()
    assert_is_natives(F.relu(sparse).to_dense(), x.relu())

    class Wrapped(Tensor):
        pass

    assert type(F.relu(x.as_subclass(Wrapped))) is Wrapped


def test_parameter_gives_a_plain_tensor(backend):
    p = torch.nn.Parameter(torch.randn(3))
    assert type(F.relu(p)) is Tensor
    assert type(F.relu(p.detach())) is Tensor


def test_saves_only_its_result(backend):
    x = torch.randn(5, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = F.relu(x)
    assert [t.data_ptr() for t in saved] == [y.data_ptr()]
