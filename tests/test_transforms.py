"""What programs do to a function besides calling it: autocast, and every way PyTorch has to differentiate, batch, trace
or recompute one. Each gives with fastnn's functions what it gives with torch's.

Inside a transform, calls are torch's own; a graph that was recorded outside of one, and is walked inside, is fastnn's.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as native
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import fastnn
import fastnn.nn.functional as F
from examples.compare import load_program

Function = Callable[..., Tensor]
Inputs = tuple[Tensor, ...]


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def native_conv2d_relu(*args: Any, **kwargs: Any) -> Tensor:
    return native.relu(native.conv2d(*args, **kwargs))


def native_conv2d_relu_max_pool2d(*args: Any, **kwargs: Any) -> Tensor:
    return native.max_pool2d(native_conv2d_relu(*args, **kwargs), 2)


def indexed(cross_entropy: Function, x: Tensor, **options: Any) -> Tensor:
    return cross_entropy(x, torch.arange(1, 1 + x.numel() // 5).view(x.shape[:-1]) % 5, **options)


torch.manual_seed(0)
BFLOAT16, FLOAT16, FLOAT32, FLOAT64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
CONV = (randn(2, 4, 6, 5), randn(4, 4, 3, 3), randn(4))
GROUPED = {"stride": (2, 1), "padding": 1, "groups": 2}
WEIGHTED = {"weight": randn(5).exp(), "label_smoothing": 0.1}
# ours, torch's, and arguments to differentiate by.
OPS: dict[str, tuple[Function, Function, Inputs]] = {
    "conv2d": (F.conv2d, native.conv2d, CONV),
    "conv2d, strided": (
        partial(F.conv2d, **GROUPED),
        partial(native.conv2d, **GROUPED),
        (*CONV[:1], randn(4, 2, 3, 3)),
    ),
    "conv2d, padded on one side": (
        lambda x, w: F.conv2d(x, w, padding="same"),
        lambda x, w: native.conv2d(x, w, padding="same"),
        (randn(2, 4, 5, 4), randn(3, 4, 2, 4)),
    ),
    "conv2d_relu": (F.conv2d_relu, native_conv2d_relu, CONV),
    "conv2d_relu_max_pool2d": (F.conv2d_relu_max_pool2d, native_conv2d_relu_max_pool2d, CONV),
    "relu": (F.relu, native.relu, (randn(3, 4),)),
    "max_pool2d": (
        partial(F.max_pool2d, kernel_size=3, stride=1, padding=1),
        partial(native.max_pool2d, kernel_size=3, stride=1, padding=1),
        (randn(2, 3, 4, 5),),
    ),
    "relu, in place": (
        lambda x: F.relu(x * 2, inplace=True),
        lambda x: native.relu(x * 2, inplace=True),
        (randn(3, 4),),
    ),
    "cross_entropy": (partial(indexed, F.cross_entropy), partial(indexed, native.cross_entropy), (randn(3, 5),)),
    "cross_entropy, ignoring": (
        partial(indexed, F.cross_entropy, ignore_index=2, reduction="none", **WEIGHTED),
        partial(indexed, native.cross_entropy, ignore_index=2, reduction="none", **WEIGHTED),
        (randn(3, 5),),
    ),
    "cross_entropy, probabilities": (
        partial(F.cross_entropy, **WEIGHTED),
        partial(native.cross_entropy, **WEIGHTED),
        (randn(3, 5), randn(3, 5).softmax(1)),
    ),
}

# ---- transforms ----


def every(inputs: Inputs) -> tuple[int, ...]:
    return tuple(range(len(inputs)))


def scalar(function: Function) -> Function:
    return lambda *args: function(*args).pow(3).sum()


def tangents(tensors: Iterable[Tensor]) -> Inputs:
    return tuple(t.detach().cos() for t in tensors)


def batched(inputs: Inputs, dim: int = 0) -> Inputs:
    return tuple(torch.stack([t, t.cos()], dim) for t in inputs)


def recorded(function: Function, inputs: Inputs) -> tuple[list[Tensor], Tensor]:
    """Leaves, and the function of them."""
    leaves = [t.clone().requires_grad_() for t in inputs]
    return leaves, function(*leaves)


def gradients(function: Function, inputs: Inputs) -> Inputs:
    leaves, output = recorded(function, inputs)
    output.backward(*tangents([output]))
    return output.detach(), *(leaf.grad for leaf in leaves)


def dual_level(function: Function, inputs: Inputs) -> tuple[Any, ...]:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(function(*map(forward_ad.make_dual, inputs, tangents(inputs))))


def dual_level_over_a_recorded_graph(function: Function, inputs: Inputs) -> list[Any]:
    leaves, output = recorded(function, inputs)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(torch.ones_like(output), *tangents([output]))
        return [forward_ad.unpack_dual(g) for g in torch.autograd.grad(output, leaves, dual)]


def vmap_over_a_recorded_graph(function: Function, inputs: Inputs) -> Inputs:
    leaves, output = recorded(function, inputs)
    backward = partial(torch.autograd.grad, output, leaves, retain_graph=True)
    return torch.vmap(lambda grad: backward(grad))(*batched([output.detach()]))


def vmap_over_a_recorded_double_backward(function: Function, inputs: Inputs) -> Inputs:
    leaves, output = recorded(scalar(function), inputs)
    grads = torch.autograd.grad(output, leaves, create_graph=True)
    stacked = batched(tuple(g.detach() for g in grads))
    return torch.vmap(lambda *gs: torch.autograd.grad(grads, leaves, gs, retain_graph=True))(*stacked)


def batched_grads(function: Function, inputs: Inputs) -> Inputs:
    leaves, output = recorded(function, inputs)
    return torch.autograd.grad(output, leaves, *batched([output.detach()]), is_grads_batched=True)


def thrice(function: Function, inputs: Inputs) -> Inputs:
    leaves, output = recorded(function, inputs)
    grads = torch.autograd.grad(output.pow(3).sum(), leaves, create_graph=True)
    for _ in range(2):
        grads = torch.autograd.grad(sum(g.pow(2).sum() for g in grads), leaves, create_graph=True)
    return grads


def linearize(function: Function, inputs: Inputs) -> tuple[Tensor, Tensor]:
    output, jvp = torch.func.linearize(function, *inputs)
    return output, jvp(*tangents(inputs))


def saved_as_arrays(function: Function, inputs: Inputs) -> Inputs:
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.detach().numpy(), torch.from_numpy):
        leaves, output = recorded(function, inputs)
    return torch.autograd.grad(output, leaves, *tangents([output]))


def without_anomalies(function: Function, inputs: Inputs) -> Inputs:
    with pytest.warns(UserWarning, match="Anomaly Detection"), torch.autograd.detect_anomaly():
        return gradients(function, inputs)


def selective() -> Any:
    """Recomputes all but the convolutions."""
    return create_selective_checkpoint_contexts([torch.ops.fastnn.conv2d.default])


def jvp(function: Function, inputs: Inputs) -> Any:
    return torch.func.jvp(function, inputs, tangents(inputs))


def vjp(function: Function, inputs: Inputs) -> Any:
    output, pull = torch.func.vjp(function, *inputs)
    return output, pull(*tangents([output]))


jacobian, hessian = torch.autograd.functional.jacobian, torch.autograd.functional.hessian
TRANSFORMS: dict[str, Callable[[Function, Inputs], Any]] = {
    "func.grad": lambda f, x: torch.func.grad(scalar(f), every(x))(*x),
    "func.vjp": vjp,
    "func.jvp": jvp,
    "func.jvp of grad": lambda f, x: jvp(torch.func.grad(scalar(f), every(x)), x),
    "func.jacrev": lambda f, x: torch.func.jacrev(f, every(x))(*x),
    "func.jacfwd": lambda f, x: torch.func.jacfwd(f, every(x))(*x),
    "func.hessian": lambda f, x: torch.func.hessian(scalar(f), every(x))(*x),
    "func.linearize": linearize,
    "vmap": lambda f, x: torch.vmap(f)(*batched(x)),
    "vmap along the last dimension": lambda f, x: torch.vmap(f, -1, -1)(*batched(x, -1)),
    "vmap of grad": lambda f, x: torch.vmap(torch.func.grad(scalar(f), every(x)))(*batched(x)),
    "vmap over a recorded graph": vmap_over_a_recorded_graph,
    "vmap over a recorded double backward": vmap_over_a_recorded_double_backward,
    "dual_level": dual_level,
    "dual_level over a recorded graph": dual_level_over_a_recorded_graph,
    "is_grads_batched": batched_grads,
    "jacobian": partial(jacobian, vectorize=True),
    "hessian": lambda f, x: hessian(scalar(f), x, vectorize=True),
    "third derivatives": thrice,
    "checkpoint": lambda f, x: gradients(partial(checkpoint, f, use_reentrant=False), x),
    "checkpoint, reentrant": lambda f, x: gradients(partial(checkpoint, f, use_reentrant=True), x),
    "checkpoint, selective": lambda f, x: gradients(
        partial(checkpoint, f, use_reentrant=False, context_fn=selective), x
    ),
    "saved_tensors_hooks": saved_as_arrays,
    "detect_anomaly": without_anomalies,
    "functionalize": lambda f, x: torch.func.functionalize(f)(*x),
    "make_fx of grad": lambda f, x: make_fx(torch.func.grad(scalar(f), every(x)))(*x)(*x),
}


@pytest.mark.expects_native
@pytest.mark.filterwarnings("error:There is a performance drop")  # an operator without a batching rule
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("op", OPS)
def test_transforms(op: str, transform: str) -> None:
    ours, exact, inputs = OPS[op]
    with fastnn.backend("cpu"):  # a ReLU of few elements too
        found = [TRANSFORMS[transform](function, tuple(t.clone() for t in inputs)) for function in (ours, exact)]
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-11)


# ---- autocast ----


@pytest.mark.one_tier
@pytest.mark.expects_native  # of float64, which autocast leaves alone, beside what it lowers
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    ("lower", "given", "compiled"),
    [
        *((lower, FLOAT32, False) for lower in (BFLOAT16, FLOAT16)),
        *(
            pytest.param(lower, given, False, marks=pytest.mark.big)
            for lower in (BFLOAT16, FLOAT16)
            for given in (FLOAT64, BFLOAT16)
        ),
        pytest.param(BFLOAT16, FLOAT32, True, marks=pytest.mark.big),
    ],
    ids=str,
)
def test_autocast(backend: str, op: str, lower: torch.dtype, given: torch.dtype, compiled: bool) -> None:
    """Dtypes, or the error, are torch's, and the values within the lower type's rounding of torch's."""
    device = torch.empty(0).device
    found = []
    for function in OPS[op][:2]:
        leaves = [t.to(device, given, copy=True).requires_grad_() for t in OPS[op][2]]
        call = torch.compile(function, fullgraph=True, backend="aot_eager") if compiled else function
        torch._dynamo.reset()
        try:
            with torch.autocast(device.type, lower):
                output = call(*leaves)
            found.append([output.detach(), *torch.autograd.grad(output, leaves, torch.ones_like(output))])
        except RuntimeError as error:
            found.append(type(error) if compiled else str(error))
    if not isinstance(found[1], list):
        assert found[0] == found[1]
        return
    for ours, exact in zip(*found, strict=True):
        assert ours.dtype is exact.dtype
        torch.testing.assert_close(ours, exact, rtol=0.02, atol=0.03 * float(exact.abs().max()))


@pytest.mark.parametrize("converted", [False, True], ids=["imports", "converted"])
@pytest.mark.parametrize(("lower", "compiled"), [(BFLOAT16, False), (FLOAT16, False), (BFLOAT16, True)], ids=str)
def test_the_users_program_under_autocast(lower: torch.dtype, converted: bool, compiled: bool) -> None:
    """The loss comes in float32, and it and the gradients are no further from float64's than torch's are, or than one
    element that rounding sends through ReLU or another way through the max-pool."""
    pytest.importorskip("tqdm")
    pytest.importorskip("PIL")
    images, labels = torch.randn(8, 3, 16, 16), torch.randint(10, (8,))
    found = []
    for name in ("exact", "native", "ours"):
        program = load_program(native=name != "ours")
        torch.manual_seed(0)
        model, criterion = program.CNN(16, 10), program.nn.CrossEntropyLoss()
        x = images.double() if name == "exact" else images
        if name == "exact":
            model.double()
        elif name == "ours" and converted:
            fastnn.convert(model)
        torch._dynamo.reset()
        run = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled and name == "ours" else model
        with torch.autocast("cpu", lower, enabled=name != "exact"):
            loss = criterion(run(x), labels)
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in model.parameters())])
    for exact, theirs, ours in zip(*found, strict=True):
        assert ours.dtype is theirs.dtype is torch.float32
        error, bound = ((t - exact).norm() / exact.norm() for t in (ours, theirs))
        assert error <= max(1.5 * bound, 0.04)


# ---- profilers ----

OPERATORS = {
    "conv2d": ["fastnn::conv2d", "fastnn::conv2d_backward"],
    "conv2d_relu": ["fastnn::conv2d", "fastnn::conv2d_backward"],
    "conv2d_relu_max_pool2d": ["fastnn::conv2d_relu_max_pool2d", "fastnn::conv2d_backward"],
    "max_pool2d": ["fastnn::max_pool2d", "fastnn::max_pool2d_backward"],
    "relu": ["fastnn::relu", "fastnn::relu_backward"],
    "relu, in place": ["fastnn::relu_", "fastnn::relu_backward"],
    "cross_entropy": ["fastnn::cross_entropy", "fastnn::cross_entropy_backward"],
}


@pytest.mark.parametrize("op", OPERATORS)
def test_the_profilers_trace_has_every_operator_and_its_shapes(op: str, tmp_path: Path) -> None:
    ours, inputs = OPS[op][0], [t.clone() for t in OPS[op][2]]
    with fastnn.backend("cpu"), profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        gradients(ours, tuple(inputs))
    profiler.export_chrome_trace(str(tmp_path / "trace.json"))
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    shapes = {e["name"]: e["args"]["Input Dims"] for e in events if e["name"].startswith("fastnn::")}
    assert list(shapes) == OPERATORS[op]
    forward, backward = shapes.values()
    assert forward[: len(inputs)] == [list(t.shape) for t in inputs]
    assert list(inputs[0].shape) in backward


@pytest.mark.parametrize("name", ["Adam", "AdamW", "SGD"])
def test_the_profilers_trace_has_the_optimizers_kernel_and_its_shapes(name: str, tmp_path: Path) -> None:
    params = [torch.nn.Parameter(torch.ones(4, 5)), torch.nn.Parameter(torch.ones(6, dtype=torch.float64))]
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer = getattr(fastnn.optim, name)(params, lr=0.1)
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        optimizer.step()
    profiler.export_chrome_trace(str(tmp_path / "trace.json"))
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    dims = {e["name"]: e["args"]["Input Dims"] for e in events if e["name"].startswith("fastnn::")}
    assert {operator: shapes[:2] for operator, shapes in dims.items()} == {
        "fastnn::sgd_" if name == "SGD" else "fastnn::adam_": [[[4, 5], [6]]] * 2
    }


@pytest.mark.filterwarnings("ignore:.*Profiler clears events")
def test_tensorboards_trace_of_a_training_step(tmp_path: Path) -> None:
    nn = fastnn.nn
    layers = [nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.MaxPool2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(4, 5)]
    model = nn.Sequential(*layers)
    optimizer = fastnn.optim.Adam(model.parameters())
    images, labels = torch.randn(2, 3, 6, 6), torch.tensor([0, 4])
    to_tensorboard = torch.profiler.tensorboard_trace_handler(str(tmp_path))
    recording = torch.profiler.schedule(wait=0, warmup=1, active=1)
    with (
        fastnn.backend("cpu"),
        profile(
            activities=[ProfilerActivity.CPU], schedule=recording, on_trace_ready=to_tensorboard, record_shapes=True
        ) as profiler,
    ):
        for _ in range(2):
            optimizer.zero_grad()
            nn.CrossEntropyLoss()(model(images), labels).backward()
            optimizer.step()
            profiler.step()
    (file,) = tmp_path.glob("*.pt.trace.json")  # the name that TensorBoard's plugin looks for
    events = json.loads(file.read_text())["traceEvents"]
    first = {e["name"]: e["args"]["Input Dims"][0] for e in events if e["name"].startswith("fastnn::")}
    assert first == {
        "fastnn::conv2d_relu_max_pool2d": [2, 3, 6, 6],
        "fastnn::max_pool2d": [2, 4, 2, 2],
        "fastnn::relu": [2, 4, 1, 1],
        "fastnn::cross_entropy": [2, 5],
        "fastnn::cross_entropy_backward": [],
        "fastnn::relu_backward": [2, 4, 1, 1],
        "fastnn::max_pool2d_backward": [2, 4, 1, 1],
        "fastnn::conv2d_backward": [2, 4, 2, 2],
        "fastnn::adam_": [[4, 3, 3, 3], [4], [5, 4], [5]],
    }


CONV = ([1, 1], [0, 0, 0, 0], [1, 1], 1)
RAW = {
    "relu": lambda x: torch.ops.fastnn.relu(x),
    "relu_": lambda x: torch.ops.fastnn.relu_(x),
    "relu_backward": lambda x: torch.ops.fastnn.relu_backward(x, torch.ones(x.shape)),
    "conv2d": lambda x: torch.ops.fastnn.conv2d(torch.ones(1, 2, 4, 4), x, None, *CONV, False),
    "cross_entropy": lambda x: torch.ops.fastnn.cross_entropy(x, torch.zeros(2, 2, 2).long(), None, 1, -100, 0.0),
}


@pytest.mark.parametrize("operator", RAW)
@pytest.mark.parametrize("requires_grad", [False, True])
def test_a_raw_operator_refuses_tangents_instead_of_dropping_them(operator, requires_grad):
    x = torch.randn(2, 2, 2, 2, requires_grad=requires_grad)
    with forward_ad.dual_level():
        with torch.no_grad():
            RAW[operator](x.detach().clone())  # no tangent, no objection
        with pytest.raises(NotImplementedError, match=f"fastnn.{operator} has no forward-mode derivative"):
            RAW[operator](forward_ad.make_dual(x, torch.ones_like(x)))
