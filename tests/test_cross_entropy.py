"""cross_entropy on every implementation of this machine: values and gradients against float64, torch's own samples and
errors, autograd, determinism, and the traps that other implementations fell into."""

import contextlib
import copy
import itertools
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import mostly_big
from torch.nn import functional as native
from wheel import here, module_info, op_info

import fastnn
import fastnn.nn as fnn
import fastnn.nn.functional as F

pytestmark = pytest.mark.kernels

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
REDUCTIONS = ["mean", "sum", "none"]


def class_dim(x):
    return 0 if x.dim() == 1 else 1


def run(function, x, target, grad_output=None, **kwargs):
    """Loss and gradient of the logits (and of probabilities that require grad)."""
    x = x.detach().requires_grad_()
    loss = function(x, target, **kwargs)
    if grad_output is None:
        grad_output = torch.linspace(0.5, 1.5, max(loss.numel(), 1))[: loss.numel()].reshape(loss.shape).to(loss.dtype)
    inputs = [x, target] if target.requires_grad else [x]
    return loss.detach(), *torch.autograd.grad(loss, inputs, grad_output)


def to_double(value):
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        return value.detach().double().requires_grad_(value.requires_grad)
    return value


def gradient_terms(x, target, weight=None, reduction="mean", ignore_index=-100, **_):
    """The largest softmax, times the largest gradient of a row's loss (see run)."""
    divisor = 1
    if reduction == "mean":
        divisor = x.numel() / x.shape[class_dim(x)]
        if not target.is_floating_point():
            counts = target[target != ignore_index]
            divisor = counts.numel() if weight is None else weight[counts].sum()
    bound = x.softmax(class_dim(x)).nan_to_num(0).max() * 1.5 * (1 if weight is None else weight.max()) / divisor
    return float(bound) if bound.isfinite() else 0.0


def assert_no_worse(reference, theirs, ours, terms=0.0):
    """Against a float64 reference, an error no larger than native's at that dtype; or than one rounding to that dtype
    and 64 roundings of the accumulator (sums over up to 20000 classes), of the largest element or of the larger `terms`
    that it is the difference of. NaN and infinities where the reference has them."""
    assert ours.dtype == theirs.dtype
    assert ours.shape == theirs.shape
    info = torch.finfo(ours.dtype)
    reference = torch.where(reference.abs() > info.max, reference.sign() * float("inf"), reference)
    finite = reference.isfinite()
    assert torch.equal(ours.double()[~finite].nan_to_num(1, 2, 3), reference[~finite].nan_to_num(1, 2, 3))
    reference, theirs, ours = (t.double()[finite] for t in (reference, theirs, ours))
    if reference.numel() > 0:
        native_error = float((theirs - reference).nan_to_num(0, 0, 0).abs().max())
        accumulator = torch.finfo(torch.float64 if info.eps < 1e-12 else torch.float32)
        largest = max(float(reference.abs().max()), terms)
        rounding = (info.eps + 64 * accumulator.eps) * largest + info.smallest_normal
        assert float((ours - reference).abs().max()) <= max(native_error, rounding)


def assert_as_accurate_as_native(x, target, **kwargs):
    """Loss and gradients of ours and native's, each at the dtype of x, against native in float64."""
    wide = {name: to_double(value) for name, value in kwargs.items()}
    reference = run(native.cross_entropy, x.double(), to_double(target), **wide)
    theirs = run(native.cross_entropy, x, target, **kwargs)
    ours = run(F.cross_entropy, x, target, **kwargs)
    if not target.is_floating_point():  # an ignored row's gradient is 0, though native makes NaN of infinities there
        ignored = (target == kwargs.get("ignore_index", -100)).unsqueeze(class_dim(x)).expand(x.shape)
        assert (ours[1][ignored] == 0).all()
        reference[1].masked_fill_(ignored, 0)
    terms = [0.0, gradient_terms(x.detach().double(), to_double(target.detach()), **wide), 0.0]
    for expected, other, actual, scale in zip(reference, theirs, ours, terms, strict=False):
        assert_no_worse(expected, other, actual, scale)


def strided(x, how):
    """The same values with other strides."""
    if how == "contiguous":
        return x.contiguous()
    if how == "sliced":
        return torch.stack([x, -x], -1)[..., 0]
    if how == "offset":
        padded = torch.zeros(*x.shape[:-1], x.shape[-1] + 3, dtype=x.dtype)
        padded[..., 2:-1] = x
        return padded[..., 2:-1]
    if how == "classes_last":
        return x.movedim(class_dim(x), -1).contiguous().movedim(-1, class_dim(x))
    if how == "batch_last":
        return x.movedim(0, -1).contiguous().movedim(-1, 0)
    assert how == "expanded"
    return x[:1].expand(x.shape)


LAYOUTS = ["contiguous", "sliced", "offset", "classes_last", "batch_last", "expanded"]


@st.composite
def problems(draw):
    shape = draw(
        st.one_of(
            st.tuples(st.integers(1, 70)),
            st.tuples(st.integers(1, 9), st.sampled_from([1, 2, 3, 7, 10, 31, 32, 33, 40, 129, 1000])),
            st.tuples(st.integers(1, 3), st.integers(1, 70), st.sampled_from([1, 2, 5, 31, 300])),
            st.tuples(st.integers(1, 3), st.integers(1, 12), st.integers(1, 5), st.integers(1, 5)),
            st.sampled_from([(2, 8192), (2, 8193), (3, 20000), (300, 5), (2, 3, 2, 3, 2)]),
        )
    )
    generator = torch.Generator(here()).manual_seed(draw(st.integers(0, 2**31)))
    x = torch.randn(shape, generator=generator, dtype=torch.float64) * draw(st.sampled_from([0.1, 1.0, 10.0]))
    x += draw(st.sampled_from([0.0, 0.0, 100.0, -3000.0]))
    special = draw(st.sampled_from([None, None, None, "ties", "-inf", "inf", "nan", "-0"]))
    if special == "ties":
        x = x.round()
    elif special is not None:
        x.view(-1)[torch.randint(x.numel(), (max(1, x.numel() // 20),), generator=generator)] = float(special)
    classes = shape[class_dim(x)]
    target_shape = shape[: class_dim(x)] + shape[class_dim(x) + 1 :]
    kwargs = {"reduction": draw(st.sampled_from(REDUCTIONS)), "label_smoothing": draw(st.sampled_from([0.0, 0.1, 1.0]))}
    probabilities = draw(st.booleans())
    if probabilities:
        target = torch.rand(shape, generator=generator, dtype=torch.float64).softmax(class_dim(x))
    else:
        target = torch.randint(classes, target_shape, generator=generator)
        kwargs["ignore_index"] = draw(st.sampled_from([-100, 0, classes - 1, -1]))
        if draw(st.booleans()):
            mask = torch.rand(target_shape, generator=generator) < 0.3
            target = target.masked_fill(mask, kwargs["ignore_index"])
    if draw(st.booleans()):
        kwargs["weight"] = torch.rand(classes, generator=generator, dtype=torch.float64)
    layout = draw(st.sampled_from(LAYOUTS))
    target_layout = draw(st.sampled_from(LAYOUTS[:2])) if target.dim() > 0 else "contiguous"
    return x, target, kwargs, layout, target_layout


def cast(value, dtype):
    return value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value


@given(problem=problems())
@settings(max_examples=40)
@pytest.mark.parametrize("dtype", DTYPES)
def test_against_float64(backend, dtype, problem):
    x, target, kwargs, layout, target_layout = problem
    x = strided(x.to(dtype), layout)
    target = strided(cast(target, dtype), target_layout)
    kwargs = {name: cast(value, dtype) for name, value in kwargs.items()}
    assert_as_accurate_as_native(x, target, **kwargs)


GRADCHECK_CASES = [
    pytest.param(shape, layout, *options, marks=[pytest.mark.big] if number % 7 else [])
    for number, ((shape, layout), *options) in enumerate(
        itertools.product(
            [
                ((4,), "contiguous"),
                ((3, 4), "contiguous"),
                ((3, 4), "sliced"),
                ((3, 35), "classes_last"),
                ((2, 3, 2), "contiguous"),
                ((2, 3, 2, 2), "classes_last"),
                ((2, 3, 2), "batch_last"),
            ],
            [False, True],
            [False, True],
            [0.0, 0.2],
            REDUCTIONS,
        )
    )
]


@pytest.mark.parametrize(("shape", "layout", "probabilities", "weighted", "smoothing", "reduction"), GRADCHECK_CASES)
def test_gradcheck(backend, shape, layout, probabilities, weighted, smoothing, reduction):
    x = strided(torch.randn(shape, dtype=torch.float64), layout).requires_grad_()
    dim = class_dim(x)
    weight = torch.rand(shape[dim], dtype=torch.float64) if weighted else None
    if probabilities:
        inputs = (x, torch.rand(shape, dtype=torch.float64).softmax(dim).requires_grad_())
    else:
        target = torch.randint(shape[dim], shape[:dim] + shape[dim + 1 :])
        if target.numel() > 1:
            target.view(-1)[1] = -100
        inputs = (x, target)

    def loss(x, target):
        return F.cross_entropy(x, target, weight, reduction=reduction, label_smoothing=smoothing)

    # Every element's own derivative once per layout, target and weight; the rest by random projections.
    assert torch.autograd.gradcheck(loss, inputs, fast_mode=x.numel() > 30 or reduction != "mean")
    assert torch.autograd.gradgradcheck(loss, inputs, fast_mode=True)


@pytest.mark.one_tier
@pytest.mark.parametrize("reduction", [0, 1, 2])
@pytest.mark.parametrize("probabilities", [False, True])
def test_opcheck(backend, reduction, probabilities):
    x = torch.randn(3, 4, 2, requires_grad=True)
    target = torch.rand(3, 4, 2) if probabilities else torch.randint(4, (3, 2))
    args = (x, target, torch.rand(4), reduction, -100, 0.1)
    torch.library.opcheck(torch.ops.fastnn.cross_entropy.default, args)
    loss, stats = torch.ops.fastnn.cross_entropy(*args)
    saved = (x.detach().requires_grad_(), target, args[2], stats.detach())
    torch.library.opcheck(
        torch.ops.fastnn.cross_entropy_backward.default, (torch.rand_like(loss).detach(), *saved, *args[3:])
    )


def test_third_derivative(backend):
    x = torch.randn(3, 4, dtype=torch.float64)
    target = torch.tensor([0, 3, 1])

    def third(function):
        y = x.clone().requires_grad_()
        result = function(y, target)
        for power in (2, 3, 2):
            (result,) = torch.autograd.grad((result**power).sum(), y, create_graph=True)
        return result

    torch.testing.assert_close(third(F.cross_entropy), third(native.cross_entropy))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(
    ("target", "dtype", "options"),
    [
        ([0, 3, 1], torch.uint8, {"ignore_index": 3 - 256}),
        ([0, 3, 1], torch.uint8, {"ignore_index": 3}),
        ([0, -100, 1], torch.int64, {"label_smoothing": 0.1}),
        ([-100, -100, -100], torch.int64, {}),
        ([0, 3, 1], torch.int64, {"label_smoothing": -0.5}),
    ],
    ids=str,
)
def test_gradient_of_the_gradient(backend, target, dtype, options, reduction):
    x, target = torch.randn(3, 4, dtype=torch.float64), torch.tensor(target, dtype=dtype)
    weights = torch.linspace(-1, 2, 12, dtype=torch.float64).view(3, 4)

    def derivatives(function):
        leaf = x.clone().requires_grad_()
        loss = function(leaf, target, reduction=reduction, **options)
        grad_output = torch.full_like(loss, 0.7, requires_grad=True)
        (grad,) = torch.autograd.grad(loss, leaf, grad_output, create_graph=True)
        return loss, grad, *torch.autograd.grad(grad, (leaf, grad_output), weights)

    expected = derivatives(native.cross_entropy)
    x[target.long() == options.get("ignore_index", -100)] = float("inf")  # does not count; native makes NaN of it
    torch.testing.assert_close(derivatives(F.cross_entropy), expected, equal_nan=True)


def test_same_tensor_as_logits_and_probabilities(backend):
    x = torch.rand(3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: F.cross_entropy(x, x), x)
    assert torch.autograd.gradgradcheck(lambda x: F.cross_entropy(x, x), x)


# ---- targets ----


def refusing(backend, bad):
    """How a backend refuses a class index: on a GPU by a device assert, after which the process cannot use it again."""
    if here() != "cpu":
        pytest.skip("a device assert would end this process's use of the GPU")
    if backend == "cuda-emulated":
        return pytest.raises(
            RuntimeError, match=r"cross_entropy(_backward)?: device-side assert triggered: target == args"
        )
    return pytest.raises(IndexError, match=rf"^Target {bad} is out of bounds\.")


@pytest.mark.parametrize("bad", [-1, 5, 7, -100, 2**31, 2**32 + 1, 2**62, -(2**62)])
@pytest.mark.parametrize("shape", [(4, 5), (4, 5, 6), (2, 5, 3, 2), (5,)])
def test_target_out_of_range(backend, bad, shape):
    x = torch.randn(shape, requires_grad=True)
    target = torch.zeros(shape[: class_dim(x)] + shape[class_dim(x) + 1 :], dtype=torch.int64)
    target.view(-1)[target.numel() // 2] = bad
    for reduction, smoothing in itertools.product(REDUCTIONS, [0.0, 0.1]):
        with refusing(backend, bad):
            F.cross_entropy(
                x, target, ignore_index=-1 if bad != -1 else -2, reduction=reduction, label_smoothing=smoothing
            )


def test_backward_checks_the_target_again(backend):
    x, target = torch.randn(4, 5), torch.tensor([0, 1, 2, 3])
    _, stats = torch.ops.fastnn.cross_entropy(x, target, None, 1, -100, 0.0)
    target[2] = 10**9
    with refusing(backend, 10**9):
        torch.ops.fastnn.cross_entropy_backward(torch.ones(()), x, target, None, stats, 1, -100, 0.0)


def test_ignored_rows(backend):
    x = torch.randn(6, 50)
    x[1] = float("nan")
    target = torch.tensor([3, -100, 7, -100, 0, 49])
    assert_as_accurate_as_native(x, target)
    loss, grad = run(F.cross_entropy, x, target, reduction="none")
    assert (loss[[1, 3]] == 0).all()
    assert (grad[[1, 3]] == 0).all()  # native makes NaN of row 1, whose logits do not count
    for smoothing in (0.0, 0.1):
        everything = torch.full((6,), -100)
        loss, grad = run(F.cross_entropy, x, everything, label_smoothing=smoothing)
        assert loss.isnan()
        assert (grad == 0).all()
        assert F.cross_entropy(x, everything, reduction="sum", label_smoothing=smoothing) == 0


def test_uint8_and_strided_targets(backend):
    x, target = torch.randn(4, 5), torch.tensor([4, 0, 3, 1])
    expected = native.cross_entropy(x, target)
    torch.testing.assert_close(F.cross_entropy(x, target.to(torch.uint8)), expected)
    torch.testing.assert_close(F.cross_entropy(x, torch.stack([target, target], 1)[:, 0]), expected)
    torch.testing.assert_close(F.cross_entropy(x, target, torch.rand(5, 2)[:, 0].fill_(2.0)), expected)
    same = torch.tensor([2]).expand(4)
    torch.testing.assert_close(F.cross_entropy(x, same), native.cross_entropy(x, same))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", [(0, 5), (2, 5, 0), (0, 5, 3, 2)])
def test_empty_batch(backend, shape, reduction):
    x = torch.randn(shape)
    for target in (torch.zeros(shape[:1] + shape[2:], dtype=torch.int64), torch.zeros(shape)):
        expected, actual = (run(f, x, target, reduction=reduction) for f in (native.cross_entropy, F.cross_entropy))
        torch.testing.assert_close(actual, expected, equal_nan=True)


# ---- traps ----


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(8, 10), (8, 1000), (2, 20, 9)])
def test_confident_rows(backend, dtype, shape):
    """p - 1 of the true class, were p rounded to bf16 first, would be 0 or 2**-8."""
    target = torch.randint(shape[1], shape[:1] + shape[2:])
    x = torch.zeros(shape, dtype=dtype).scatter_(1, target.unsqueeze(1), 10.0)
    _, expected = run(native.cross_entropy, x.double(), target, reduction="sum")
    _, actual = run(F.cross_entropy, x, target, reduction="sum")
    torch.testing.assert_close(actual.double(), expected, rtol=torch.finfo(dtype).eps, atol=1e-7)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 20000), (2, 30), (2, 200, 5)])
def test_nothing_but_minus_infinity_at_first(backend, dtype, shape):
    x = torch.randn(shape).to(dtype)
    x[:, : shape[1] - 7] = -float("inf")
    assert_as_accurate_as_native(x, torch.full(shape[:1] + shape[2:], shape[1] - 1))
    _, grad = run(F.cross_entropy, x, torch.full(shape[:1] + shape[2:], shape[1] - 1))
    assert (grad[:, : shape[1] - 7] == 0).all()
    x[0] = -float("inf")
    assert_as_accurate_as_native(x, torch.full(shape[:1] + shape[2:], shape[1] - 1), reduction="none")


@pytest.mark.parametrize("how", ["expanded", "strided", "reversed"])
@pytest.mark.parametrize("shape", [(6, 10), (6, 100), (6, 5, 7)])
def test_any_grad_output(backend, how, shape):
    x, target = torch.randn(shape), torch.randint(5, shape[:1] + shape[2:])
    grad = {
        "expanded": torch.tensor(0.3).expand(target.shape),
        "strided": torch.randn(*target.shape, 2)[..., 1],
        "reversed": torch.randn(*reversed(target.shape)).permute(*reversed(range(target.dim()))),
    }[how]
    expected, actual = (run(f, x, target, grad, reduction="none") for f in (native.cross_entropy, F.cross_entropy))
    torch.testing.assert_close(actual, expected)


@pytest.mark.big
@pytest.mark.parametrize("dtype", DTYPES)
def test_many_rows(backend, dtype):
    """Native's own 16-bit mean goes wrong here."""
    x, target = torch.randn(40000, 4).to(dtype), torch.randint(4, (40000,))
    expected = native.cross_entropy(x.double(), target)
    torch.testing.assert_close(F.cross_entropy(x, target).double(), expected, rtol=4 * torch.finfo(dtype).eps, atol=0)


LARGE_SHAPES = [(3, 20000), (10, 9000), (20, 9000), (5000, 10), (200, 100), (3, 20, 700), (700, 3)]


@pytest.mark.parametrize("shape", [(2, 17000), (70, 5), (2, 70, 9), *mostly_big(LARGE_SHAPES)])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_same_bits_every_time(backend, shape, reduction):
    x, target = torch.randn(shape), torch.randint(shape[1], shape[:1] + shape[2:])
    weight = torch.rand(shape[1])
    before = torch.get_num_threads()
    try:
        results = []
        for threads in [1, 2] * 10:
            torch.set_num_threads(threads)
            results.append(run(F.cross_entropy, x, target, weight=weight, reduction=reduction, label_smoothing=0.1))
    finally:
        torch.set_num_threads(before)
    for loss, grad in results[1:]:
        assert torch.equal(loss, results[0][0])
        assert torch.equal(grad, results[0][1])


@pytest.mark.parametrize("shape", [pytest.param((40, 20000), marks=pytest.mark.big), (40, 10), (40, 100)])
def test_row_does_not_depend_on_its_batch(backend, shape):
    x, target = torch.randn(shape), torch.randint(shape[1], shape[:1])
    together = F.cross_entropy(x, target, reduction="none")
    alone = torch.cat([F.cross_entropy(x[i : i + 1], target[i : i + 1], reduction="none") for i in range(40)])
    assert torch.equal(together, alone)


# ---- what ships with torch ----


def outcome(call):
    try:
        return call()
    except Exception as error:
        return type(error), str(error).splitlines()[0]


@pytest.mark.parametrize("dtype", DTYPES)
def test_opinfo_samples(backend, dtype):
    info = op_info("cross_entropy")
    count = 0
    for sample in info.sample_inputs(here(), dtype, requires_grad=True):
        target = sample.args[0]
        target = target.detach().requires_grad_(target.requires_grad)
        assert_as_accurate_as_native(sample.input, target, *sample.args[1:], **sample.kwargs)
        count += 1
    assert count > 20
    assert info.error_inputs_func is None  # none to run; those of the module are below


@pytest.mark.parametrize("dtype", mostly_big([torch.float64, torch.float32, torch.float16], 1))
def test_moduleinfo_samples(backend, dtype):
    info = module_info("CrossEntropyLoss")
    inputs = info.module_inputs_func(info, here(), dtype, requires_grad=True, training=True)
    assert len(inputs) > 50
    for sample in inputs:
        x, target = sample.forward_input.args
        target = target.detach().requires_grad_(target.is_floating_point())
        build = sample.constructor_input
        theirs = torch.nn.CrossEntropyLoss(*build.args, **build.kwargs)
        ours = fnn.CrossEntropyLoss(*build.args, **build.kwargs)
        wide = copy.deepcopy(theirs).double()
        expected, other, actual = (
            run(module, x.double() if module is wide else x, to_double(target) if module is wide else target)
            for module in (wide, theirs, ours)
        )
        for results in zip(expected, other, actual, strict=True):
            assert_no_worse(*results)


@pytest.mark.expects_native
def test_moduleinfo_errors(backend):
    info = module_info("CrossEntropyLoss")
    errors = info.module_error_inputs_func(info, here(), torch.float32, requires_grad=True, training=True)
    assert errors
    for error in errors:
        build, call = error.module_error_input.constructor_input, error.module_error_input.forward_input
        theirs, ours = (
            outcome(lambda cls=cls, build=build, call=call: cls(*build.args, **build.kwargs)(*call.args, **call.kwargs))
            for cls in (torch.nn.CrossEntropyLoss, fnn.CrossEntropyLoss)
        )
        assert theirs == ours
        assert theirs[0] is error.error_type


def logits_and_target():
    return torch.zeros(3, 5), torch.tensor([0, 1, 2])


ODD_CALLS = {
    "list input": lambda f, X, T: f([1.0], T),
    "list target": lambda f, X, T: f(X, [0, 1, 2]),
    "no input": lambda f, X, T: f(None, T),
    "no target": lambda f, X, T: f(X, None),
    "integer input": lambda f, X, T: f(X.long(), T),
    "complex input": lambda f, X, T: f(X.to(torch.complex64), T),
    "int32 target": lambda f, X, T: f(X, T.int()),
    "bool target": lambda f, X, T: f(X, T.bool()),
    "uint8 target, columns": lambda f, X, T: f(torch.zeros(3, 5, 2), torch.zeros(3, 2, dtype=torch.uint8)),
    "uint8 target, smoothed and weighted": lambda f, X, T: f(X, T.byte(), torch.ones(5), label_smoothing=0.1),
    "mixed weight": lambda f, X, T: f(X, T, torch.ones(5).double()),
    "2-d weight": lambda f, X, T: f(X, T, torch.ones(5, 1)),
    "mixed probabilities": lambda f, X, T: f(X, X.double().softmax(1)),
    "weight requires grad": lambda f, X, T: f(X.clone().requires_grad_(), T, torch.ones(5, requires_grad=True)),
    "weight of probabilities requires grad": lambda f, X, T: f(X, X.softmax(1), torch.ones(5, requires_grad=True)),
    "no dimensions": lambda f, X, T: f(torch.tensor(1.0), torch.tensor(0)),
    "no dimensions, probabilities": lambda f, X, T: f(torch.tensor(1.0), torch.tensor(1.0)),
    "one-element target of (C,)": lambda f, X, T: f(X[0], T[:1]),
    "no classes": lambda f, X, T: f(torch.zeros(2, 0), T[:2]) if X.is_cpu else None,  # a GPU would assert
    "no classes, probabilities": lambda f, X, T: f(torch.zeros(2, 0), torch.zeros(2, 0)),
    "bad reduction": lambda f, X, T: f(X, T, reduction="average"),
    "no reduction": lambda f, X, T: f(X, T, reduction=None),
    "smoothing above 1": lambda f, X, T: f(X, T, label_smoothing=1.5),
    "negative smoothing": lambda f, X, T: f(X, T, label_smoothing=-0.5),
    "NaN smoothing": lambda f, X, T: f(X, T, label_smoothing=float("nan")),
    "string smoothing": lambda f, X, T: f(X, T, label_smoothing="a"),
    "tensor smoothing": lambda f, X, T: f(X, T, label_smoothing=torch.tensor(0.1)),
    "tensor smoothing of two elements": lambda f, X, T: f(X, T, label_smoothing=torch.ones(2)),
    "array smoothing": lambda f, X, T: f(X, T, label_smoothing=np.ones(2)),
    "bool ignore_index": lambda f, X, T: f(X, T, ignore_index=True),
    "ignore_index over 64 bits": lambda f, X, T: f(X, T, ignore_index=2**64),
    "string ignore_index": lambda f, X, T: f(X, T, ignore_index="a"),
    "float ignore_index": lambda f, X, T: f(X, T, ignore_index=1.5),
    "no ignore_index": lambda f, X, T: f(X, T, ignore_index=None),
    "string weight": lambda f, X, T: f(X, T, "a"),
    "meta input": lambda f, X, T: f(X.to("meta"), T.to("meta")),
    "meta target": lambda f, X, T: f(X, T.to("meta")),
    "sparse input": lambda f, X, T: f(X.to_sparse(), T),
}


@pytest.mark.expects_native
@pytest.mark.parametrize("call", ODD_CALLS.values(), ids=ODD_CALLS.keys())
def test_odd_calls_end_as_native_ones(backend, call):
    theirs, ours = (outcome(lambda f=f: call(f, *logits_and_target())) for f in (native.cross_entropy, F.cross_entropy))
    if isinstance(theirs, tuple):
        assert theirs == ours
    else:
        torch.testing.assert_close(ours, theirs, equal_nan=True)


@pytest.mark.parametrize(("size_average", "reduce"), [(True, None), (False, None), (None, False), (None, True)])
def test_legacy_arguments(backend, size_average, reduce):
    results = []
    X, T = logits_and_target()
    for function in (native.cross_entropy, F.cross_entropy):
        with pytest.warns(UserWarning, match="size_average and reduce args will be deprecated"):
            results.append(function(X, T, size_average=size_average, reduce=reduce))
    torch.testing.assert_close(*results)
    with pytest.warns(UserWarning, match="'elementwise_mean' is deprecated"):
        F.cross_entropy(X, T, reduction="elementwise_mean")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_autocast(backend, dtype):
    x, target = torch.randn(4, 5).to(dtype), torch.tensor([0, 4, 2, 1])
    weight = torch.ones(5).to(dtype)
    with torch.autocast(here(), torch.bfloat16):
        expected, actual = (run(f, x, target, weight=weight) for f in (native.cross_entropy, F.cross_entropy))
    torch.testing.assert_close(actual, expected)


# ---- the module ----


def test_module(backend):
    weight = torch.rand(5)
    ours = fnn.CrossEntropyLoss(weight, ignore_index=2, reduction="sum", label_smoothing=0.1)
    theirs = torch.nn.CrossEntropyLoss(weight, ignore_index=2, reduction="sum", label_smoothing=0.1)
    assert isinstance(ours, torch.nn.CrossEntropyLoss)
    assert repr(ours) == repr(theirs)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    x, target = torch.randn(7, 5), torch.randint(5, (7,))
    for module in (ours, copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert type(module) is fnn.CrossEntropyLoss
        torch.testing.assert_close(module(x, target), theirs(x, target))
    ours.load_state_dict({"weight": torch.ones(5)})
    theirs.load_state_dict(ours.state_dict())
    torch.testing.assert_close(ours(x, target), theirs(x, target))


# ---- small calls ----


@pytest.mark.parametrize(
    ("rows", "dtype", "options", "forced", "native_torch"),
    [
        (8, torch.float32, {}, None, True),
        (1024, torch.float32, {}, None, True),
        (8, torch.float64, {"weight": True, "reduction": "none"}, None, True),
        (8, torch.float32, {}, "cpu", False),
        (1025, torch.float32, {}, None, False),
        (8, torch.bfloat16, {}, None, False),
        (8, torch.float32, {"label_smoothing": 0.1}, None, False),
        (8, torch.float32, {"probabilities": True}, None, False),
    ],
)
def test_few_logits_are_native_unless_the_kernels_are_forced(rows, dtype, options, forced, native_torch):
    options = dict(options)
    x = torch.randn(rows, 8, dtype=dtype, requires_grad=True)
    target = torch.arange(rows) % 8
    if options.pop("probabilities", False):
        target = torch.softmax(torch.randn_like(x), 1).detach()
    if options.pop("weight", False):
        options["weight"] = torch.rand(8, dtype=dtype)
    with fastnn.backend(forced) if forced else contextlib.nullcontext():
        loss = F.cross_entropy(x, target, **options)
    assert ("CrossEntropyBackward" not in loss.grad_fn.name()) == native_torch
    torch.testing.assert_close(loss, native.cross_entropy(x, target, **options))
