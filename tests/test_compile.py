"""torch.compile(fullgraph=True) and torch.export: values and gradients as in eager, through the same kernels, with at
most one recompilation over three batch sizes.

Most tests compile with aot_eager, all of the compiler but its last stage, which takes g++ seconds a graph. Through the
whole of it, inductor, go each operator, the user's program, the optimizers' steps and one of transformers' models.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import fastnn
import fastnn.nn as nn
import fastnn.nn.functional as F
import fastnn.optim
from examples.compare import load_program

BATCHES = (2, 3, 5)


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def operators(counter: CompileCounterWithBackend) -> set[str]:
    """The operators of fastnn in what was compiled."""
    targets = {str(node.target) for graph in counter.graphs for node in graph.graph.nodes}
    return {target.split(".")[1] for target in targets if target.startswith("fastnn.")}


def results(function: Callable[..., Tensor], inputs: tuple[Any, ...], parameters: list[Tensor]) -> list[Tensor]:
    """The value of the function, and the gradients of its floating-point inputs and of the parameters."""
    inputs = tuple(t.detach().requires_grad_() if t.is_floating_point() else t for t in inputs)
    output = function(*inputs)
    leaves = [t for t in (*inputs, *parameters) if t.requires_grad]
    return [output.detach(), *torch.autograd.grad(output.square().sum(), leaves)]


def check(
    function: Callable[..., Tensor],
    inputs: Callable[[int], tuple[Any, ...]],
    expected: set[str],
    backend: str = "aot_eager",
) -> None:
    parameters = list(function.parameters()) if isinstance(function, torch.nn.Module) else []
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(function, fullgraph=True, backend=counter)
    for n in BATCHES:
        args = inputs(n)
        for c, e in zip(results(compiled, args, parameters), results(function, args, parameters), strict=True):
            torch.testing.assert_close(c, e, rtol=1e-12, atol=1e-12)
            assert c.stride() == e.stride()
    assert counter.frame_count <= 2
    assert operators(counter) == expected


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def channels_last(*shape: int) -> Tensor:
    return randn(*shape).contiguous(memory_format=torch.channels_last)


W, B, CLASS_WEIGHT = randn(4, 3, 3, 3), randn(4), randn(5).exp()
POOLED, CONV, POOL, LOSS = {"conv2d_relu_max_pool2d"}, {"conv2d"}, {"max_pool2d"}, {"cross_entropy"}
CALLS = {
    "relu": (F.relu, lambda n: (randn(n, 5),), set()),  # native's, which the compiler fuses
    "relu in place": (lambda x: F.relu(x * 2, inplace=True), lambda n: (randn(n, 5),), set()),
    "conv2d": (lambda x, w, b: F.conv2d(x, w, b, 2, 1), lambda n: (randn(n, 3, 9, 8), W, B), CONV),
    "conv2d, channels_last": (F.conv2d, lambda n: (channels_last(n, 3, 8, 8), W, B), CONV),
    "conv2d, depthwise": (
        lambda x, w: F.conv2d(x, w, padding="same", groups=3),
        lambda n: (randn(n, 3, 8, 8), randn(3, 1, 3, 3)),
        CONV,
    ),
    "conv2d, image sizes": (F.conv2d, lambda n: (randn(3, 8 + n, 9 * n), W, B), CONV),
    "conv2d_relu": (F.conv2d_relu, lambda n: (randn(n, 3, 8, 8), W, B), CONV),
    "conv2d_relu_max_pool2d": (F.conv2d_relu_max_pool2d, lambda n: (randn(n, 3, 8, 8), W, B), POOLED),
    "max_pool2d": (lambda x: F.max_pool2d(x, 3, 2, 1), lambda n: (channels_last(n, 3, 9, 8),), POOL),
    "max_pool2d, image sizes": (lambda x: F.max_pool2d(x, 2), lambda n: (randn(2, 3, 8 + n, 9 * n),), POOL),
    "cross_entropy": (F.cross_entropy, lambda n: (randn(n, 5), torch.arange(n) % 5), LOSS),
    "cross_entropy, probabilities": (
        lambda x, t: F.cross_entropy(x, t, CLASS_WEIGHT, label_smoothing=0.1, reduction="none"),
        lambda n: (randn(n, 5, 4), randn(n, 5, 4).softmax(1)),
        LOSS,
    ),
    "cross_entropy, deprecated options": (
        lambda x, t: F.cross_entropy(x, t, size_average=False),
        lambda n: (randn(n, 5), torch.arange(n) % 5),
        LOSS,
    ),
    "nn.ReLU": (nn.ReLU(), lambda n: (randn(n, 5),), set()),
    "nn.Conv2d": (nn.Conv2d(3, 4, 3).double(), lambda n: (randn(n, 3, 8, 8),), CONV),
    "nn.Conv2d, circular": (
        nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular").double(),
        lambda n: (randn(n, 3, 8, 8),),
        CONV,
    ),
    "nn.MaxPool2d": (nn.MaxPool2d(2), lambda n: (randn(n, 3, 9, 8),), POOL),
    "nn.ConvReLU2d": (nn.ConvReLU2d(3, 4, 3, groups=1).double(), lambda n: (randn(n, 3, 8, 8),), CONV),
    "nn.ConvReLUMaxPool2d": (nn.ConvReLUMaxPool2d(3, 4, 3).double(), lambda n: (randn(n, 3, 8, 8),), POOLED),
    "nn.Sequential": (
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 4, 3), nn.ReLU()).double(),
        lambda n: (randn(n, 3, 9, 8),),
        POOLED | CONV,
    ),
    "nn.CrossEntropyLoss": (nn.CrossEntropyLoss(), lambda n: (randn(n, 5), torch.arange(n) % 5), LOSS),
    # What no kernel covers is compiled natively.
    "integers": (lambda x, y: x * F.relu(y), lambda n: (randn(n, 5), torch.arange(5)), set()),
    "mixed dtypes": (
        lambda x, t: F.cross_entropy(x, t.float()),
        lambda n: (randn(n, 5), randn(n, 5).softmax(1)),
        set(),
    ),
}


def test_what_is_compiled_natively_is_said(caplog):
    fastnn.dispatch._logged.clear()
    with caplog.at_level("DEBUG", logger="fastnn"):
        torch.compile(lambda x, y: F.relu(x) + F.conv2d(y, y), fullgraph=True, backend="eager")(randn(5), W.half())
    assert [record.getMessage() for record in caplog.records if record.name == "fastnn"] == [
        "relu: native torch, because torch.compile fuses its own into what stands beside it"
    ]


@pytest.mark.filterwarnings("ignore:size_average and reduce args")
@pytest.mark.parametrize("name", CALLS)
def test_calls(name):
    check(*CALLS[name])


def test_every_operator_through_the_whole_compiler():
    def all_of_them(x, w, b, v, target):
        pooled = F.max_pool2d(F.conv2d_relu(x, w, b), 3, 2, 1)
        again = F.relu(F.conv2d(pooled, v, padding=1) - 0.1)
        return F.cross_entropy(F.conv2d_relu_max_pool2d(again, v).flatten(1), target)

    v = randn(4, 4, 3, 3)
    check(
        all_of_them,
        lambda n: (randn(n, 3, 12, 12), W, B, v, torch.arange(n) % 4),
        CONV | POOL | POOLED | LOSS,
        "inductor",
    )


def test_per_sample_gradients():
    per_sample = torch.vmap(torch.func.grad(lambda x, w: F.conv2d(x, w).pow(3).sum(), argnums=1), in_dims=(0, None))
    compiled = torch.compile(per_sample, fullgraph=True, backend="aot_eager")
    x = randn(4, 3, 6, 6)
    torch.testing.assert_close(compiled(x, W), per_sample(x, W))


def test_backend_is_that_of_when_it_was_compiled():
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(lambda x, w: F.conv2d(x, w), fullgraph=True, backend=counter)
    with fastnn.backend("torch"):
        compiled(randn(1, 3, 8, 8), W)
    assert operators(counter) == set()


@pytest.mark.parametrize("converted", [False, True], ids=["imports", "converted"])
def test_the_users_program(converted):
    """The model, the loss and backward through the whole compiler, and three steps of a compiled optimizer."""
    pytest.importorskip("tqdm")
    pytest.importorskip("PIL")
    program = load_program(native=False)
    eager = program.CNN(16, 10).double()
    model = copy.deepcopy(eager)
    if converted:
        fastnn.convert(model)
    criterion = program.nn.CrossEntropyLoss()
    counter = CompileCounterWithBackend("inductor")
    loss_of = torch.compile(lambda x, t: criterion(model(x), t), fullgraph=True, backend=counter)
    optimizers = [program.optim.Adam(m.parameters()) for m in (eager, model)]
    step = torch.compile(lambda: optimizers[1].step(), fullgraph=True, backend="aot_eager")
    for n in BATCHES:
        images, labels = randn(n, 3, 16, 16), torch.randint(10, (n,))
        exact, loss = criterion(eager(images), labels), loss_of(images, labels)
        torch.testing.assert_close(loss, exact, rtol=1e-12, atol=1e-12)
        for optimizer, value in zip(optimizers, (exact, loss), strict=True):
            optimizer.zero_grad()
            value.backward()
        optimizers[0].step()
        step()
        for p, e in zip(model.parameters(), eager.parameters(), strict=True):
            torch.testing.assert_close(p.grad, e.grad, rtol=1e-9, atol=1e-12)
            torch.testing.assert_close(p, e, rtol=1e-9, atol=1e-9)
    assert counter.frame_count <= 2
    layers = {"conv2d", "max_pool2d"} if converted else {"conv2d_relu_max_pool2d"}  # Sequential's, without stand-ins
    assert operators(counter) == layers | {"cross_entropy"}


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("Adam", {"amsgrad": True}),
        ("AdamW", {"maximize": True}),
        ("SGD", {"weight_decay": 0.1}),
        ("SGD", {"momentum": 0.9, "nesterov": True}),
        ("SGD", {"momentum": 0.9, "lr_in_velocity": True}),
    ],
)
@pytest.mark.parametrize(("tensor_lr", "backend"), [(False, "inductor"), (True, "aot_eager")])
def test_optimizer_steps(name, kwargs, tensor_lr, backend):
    """Bit for bit what the eager step gives, over changes of lr, compiled again for the first of them at the most (and
    for momentum's first step)."""
    values = [torch.randn(4, 3), randn(5)]
    eager, compiled = (
        getattr(fastnn.optim, name)(
            [torch.nn.Parameter(v.clone()) for v in values], lr=torch.tensor(0.1) if tensor_lr else 0.1, **kwargs
        )
        for _ in range(2)
    )
    counter = CompileCounterWithBackend(backend)
    step = torch.compile(compiled.step, fullgraph=True, backend=counter)
    for i in range(10):
        for optimizer in (eager, compiled):
            if tensor_lr:
                optimizer.param_groups[0]["lr"].fill_(0.1 / (1 + i))
            else:
                optimizer.param_groups[0]["lr"] = 0.1 / (1 + i)
            for p in optimizer.param_groups[0]["params"]:
                p.grad = p.detach().cos()
        eager.step()
        step()
    state_made = name == "SGD" and "momentum" in kwargs
    assert counter.frame_count <= 2 + state_made
    assert operators(counter) == {"sgd_" if name == "SGD" else "adam_"}
    torch.testing.assert_close(compiled.state_dict(), eager.state_dict(), rtol=0, atol=0)
    for c, e in zip(compiled.param_groups[0]["params"], eager.param_groups[0]["params"], strict=True):
        assert torch.equal(c, e)


def test_optimizer_steps_that_are_natives():
    values = [torch.randn(4, 3), torch.randn(2, dtype=torch.complex64)]
    native, ours = (
        cls([torch.nn.Parameter(v.clone()) for v in values], lr=0.1) for cls in (torch.optim.SGD, fastnn.optim.SGD)
    )
    step = torch.compile(ours.step, backend="eager")
    for _ in range(2):
        for optimizer in (native, ours):
            for p in optimizer.param_groups[0]["params"]:
                p.grad = p.detach().cos()
        native.step()
        step()
    for o, n in zip(ours.param_groups[0]["params"], native.param_groups[0]["params"], strict=True):
        torch.testing.assert_close(o, n)


EXPORTED = {name: call for name, call in CALLS.items() if isinstance(call[0], torch.nn.Module)}


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("name", EXPORTED)
def test_export(name, strict):
    module, inputs, _ = EXPORTED[name]
    batch = torch.export.Dim("batch", min=1)
    args = inputs(BATCHES[0])
    shapes = tuple({0: batch} for _ in args)
    exported = torch.export.export(module, args, dynamic_shapes=shapes, strict=strict).module()
    for n in BATCHES:
        args = inputs(n)
        torch.testing.assert_close(exported(*args), module(*args), rtol=1e-12, atol=1e-12)
