"""Bitwise equal results from run to run, thread count to thread count; concurrent calls, the GIL, and fork."""

from __future__ import annotations

import contextlib
import multiprocessing
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import fastnn
import fastnn.nn.functional as F
from fastnn import _C

RUNS = 20


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """Sets the thread count, and puts it back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def leaf(*shape: int, dtype: torch.dtype = torch.float32, channels_last: bool = False) -> Tensor:
    generator = torch.Generator(torch.get_default_device()).manual_seed(sum(shape))
    t = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    return (t.contiguous(memory_format=torch.channels_last) if channels_last else t).requires_grad_()


def conv(function: Callable[..., Tensor], x: Tensor, w: Tensor, **kwargs: object) -> tuple[Tensor, list[Tensor]]:
    leaves = [x, w, leaf(w.shape[0], dtype=x.dtype)]
    return function(*leaves, **kwargs), leaves


def in_place_relu() -> tuple[Tensor, list[Tensor]]:
    x = leaf(4, 64, 40, 41)
    return F.relu(x * 1, inplace=True), [x]


# What is called, on tensors large enough for several threads: (output, leaves).
CALLS: dict[str, Callable[[], tuple[Tensor, list[Tensor]]]] = {
    "relu": lambda: (F.relu(x := leaf(4, 64, 40, 41)), [x]),
    "relu_": in_place_relu,
    "max_pool2d": lambda: (F.max_pool2d(x := leaf(4, 64, 40, 41), 3, 2, 1), [x]),
    "max_pool2d channels_last": lambda: (F.max_pool2d(x := leaf(4, 64, 40, 41, channels_last=True), 2), [x]),
    "conv2d 3x3": lambda: conv(F.conv2d, leaf(4, 16, 40, 40), leaf(24, 16, 3, 3), padding=1),
    "conv2d 3x3 channels_last": lambda: conv(
        F.conv2d, leaf(4, 16, 40, 40, channels_last=True), leaf(24, 16, 3, 3), padding=1
    ),
    "conv2d 3x3 one image": lambda: conv(F.conv2d, leaf(1, 32, 64, 64), leaf(32, 32, 3, 3), padding=1),
    "conv2d 3x3 small maps": lambda: conv(F.conv2d, leaf(2, 128, 7, 7), leaf(128, 128, 3, 3), padding=1),
    "conv2d 3x3 float64": lambda: conv(
        F.conv2d, leaf(4, 8, 32, 32, dtype=torch.float64), leaf(8, 8, 3, 3, dtype=torch.float64)
    ),
    "conv2d 3x3 bfloat16": lambda: conv(
        F.conv2d, leaf(4, 8, 32, 32, dtype=torch.bfloat16), leaf(8, 8, 3, 3, dtype=torch.bfloat16)
    ),
    "conv2d 7x7 stride 2": lambda: conv(F.conv2d, leaf(4, 3, 64, 64), leaf(32, 3, 7, 7), padding=3, stride=2),
    "conv2d 1x1": lambda: conv(F.conv2d, leaf(4, 64, 28, 28), leaf(64, 64, 1, 1)),
    "conv2d depthwise": lambda: conv(F.conv2d, leaf(4, 32, 40, 40), leaf(32, 1, 3, 3), padding=1, groups=32),
    "conv2d depthwise channels_last": lambda: conv(
        F.conv2d, leaf(2, 72, 61, 40, channels_last=True), leaf(72, 1, 3, 3), padding=1, groups=72
    ),
    "conv2d depthwise stride 2": lambda: conv(
        F.conv2d, leaf(1, 6, 160, 61), leaf(6, 1, 5, 5), padding=2, stride=2, groups=6
    ),
    "conv2d groups": lambda: conv(F.conv2d, leaf(4, 32, 30, 30), leaf(32, 8, 3, 3), padding=1, groups=4),
    "conv2d_relu": lambda: conv(F.conv2d_relu, leaf(4, 16, 40, 40), leaf(24, 16, 3, 3), padding=1),
    "conv2d_relu_max_pool2d": lambda: conv(F.conv2d_relu_max_pool2d, leaf(4, 3, 64, 64), leaf(32, 3, 3, 3), padding=1),
    "conv2d_relu_max_pool2d one image": lambda: conv(
        F.conv2d_relu_max_pool2d, leaf(1, 40, 33, 64), leaf(70, 40, 3, 3), padding=1
    ),
    "conv2d_relu_max_pool2d overlapping": lambda: conv(
        F.conv2d_relu_max_pool2d, leaf(4, 8, 41, 43), leaf(16, 8, 3, 3), pool_kernel_size=3, pool_stride=2
    ),
    "cross_entropy": lambda: (
        F.cross_entropy(
            x := leaf(256, 1000), torch.arange(256), label_smoothing=0.1, weight=torch.linspace(0.5, 1.5, 1000)
        ),
        [x],
    ),
    "cross_entropy probabilities": lambda: (
        F.cross_entropy(x := leaf(256, 1000), leaf(256, 1000).detach().softmax(1)),
        [x],
    ),
    "cross_entropy (N, C, d)": lambda: (
        F.cross_entropy(x := leaf(8, 50, 1000), torch.arange(8000).view(8, 1000) % 50),
        [x],
    ),
}


def results(call: Callable[[], tuple[Tensor, list[Tensor]]]) -> list[Tensor]:
    """Output and gradients."""
    output, leaves = call()
    grad_output = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view(output.shape)
    return [output.detach(), *torch.autograd.grad(output, leaves, grad_output)]


def assert_identical(actual: list[Tensor], expected: list[Tensor], what: str) -> None:
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert torch.equal(a, e), f"{what}: result {i} differs at {int((a != e).sum())} of {a.numel()} elements"


def has_kernels(backend: str, name: str) -> bool:
    op = next(op for op in fastnn.dispatch.OPERATORS if name.startswith(op))
    return op in fastnn.dispatch.KERNELS[backend.partition("-")[0]]


@pytest.mark.big
@pytest.mark.kernels
@pytest.mark.parametrize("name", CALLS)
def test_bitwise_equal_runs_and_thread_counts(backend, threads, name):
    if not has_kernels(backend, name):
        pytest.skip("this backend has no kernel of it")
    threads(1)
    expected = results(CALLS[name])
    for run in range(RUNS):
        count = (2, 1, 2, 3)[run % 4]
        threads(count)
        assert_identical(results(CALLS[name]), expected, f"run {run}, {count} threads")


@pytest.mark.big
@pytest.mark.kernels
def test_concurrent_python_threads(backend, threads):
    """Forward and backward of every operator at once, from four Python threads that share nothing."""
    names = [name for name in CALLS if has_kernels(backend, name)]
    expected = {name: results(CALLS[name]) for name in names}
    forced, device = fastnn.dispatch.forced(), torch.get_default_device()

    def work(offset: int) -> None:
        with fastnn.dispatch.forced_to(forced), contextlib.nullcontext() if device.type == "cpu" else device:
            for name in names[offset:] + names[:offset]:
                assert_identical(results(CALLS[name]), expected[name], name)

    with ThreadPoolExecutor(4) as pool:
        for future in [pool.submit(work, offset * 4) for offset in range(4)]:
            future.result()


@pytest.mark.parametrize("name", ["relu", "conv2d", "conv2d_relu_max_pool2d"])
def test_gil_is_released(name):
    """Another Python thread makes progress while a kernel runs."""
    if name == "relu":
        x = torch.randn(2**25)
        call = lambda: F.relu(x)  # noqa: E731
    else:
        x, w = torch.randn(8, 32, 128, 128), torch.randn(32, 32, 5, 5)
        call = lambda: getattr(F, name)(x, w)  # noqa: E731
    call()
    ticks = 0
    stop = threading.Event()

    def tick() -> None:
        nonlocal ticks
        while not stop.is_set():
            ticks += 1
            time.sleep(1e-4)

    # The interpreter must not take the GIL from the caller between the kernel's return and the reading of ticks.
    interval = sys.getswitchinterval()
    sys.setswitchinterval(30)
    ticker = threading.Thread(target=tick)
    ticker.start()
    try:
        progress = []
        for _ in range(5):
            before = ticks
            call()
            progress.append(ticks - before)
    finally:
        stop.set()
        ticker.join()
        sys.setswitchinterval(interval)
    assert max(progress) > 0


# ---- fork ----


def run_in_child(names: list[str], queue: multiprocessing.Queue) -> None:
    # OpenMP's threads do not survive a fork, and native torch hangs waiting for them, too. A DataLoader does the same.
    torch.set_num_threads(1)
    queue.put({name: [t.tolist() for t in results(CALLS[name])] for name in names})


FORKED = ["relu", "conv2d 3x3", "conv2d_relu_max_pool2d", "cross_entropy"]


@pytest.mark.parametrize("count", [1, 2])
def test_after_fork(threads, count):
    """A child forked after the parent's kernels have run on several threads gets the parent's results."""
    threads(count)
    expected = {name: results(CALLS[name]) for name in FORKED}
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=run_in_child, args=(FORKED, queue))
    child.start()
    try:
        actual = queue.get(timeout=60)
    finally:
        child.kill()
        child.join()
    for name in FORKED:
        for a, e in zip(actual[name], expected[name], strict=True):
            assert torch.equal(torch.tensor(a, dtype=e.dtype), e), name


class Filtered(Dataset):
    """Images that a worker has convolved."""

    def __init__(self) -> None:
        self.images = torch.randn(8, 3, 48, 48)
        self.weight = torch.randn(16, 3, 3, 3)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return F.conv2d_relu_max_pool2d(self.images[index], self.weight)


def test_in_a_data_loader_worker():
    dataset = Filtered()
    expected = torch.stack([dataset[i] for i in range(len(dataset))])
    loader = DataLoader(dataset, batch_size=4, num_workers=2, multiprocessing_context="fork", timeout=60)
    assert torch.equal(torch.cat(list(loader)), expected)


def test_num_threads_is_torchs(threads):
    for count in (1, 2):
        threads(count)
        assert _C.num_threads() == count


def test_backend_is_of_its_thread():
    """fastnn.backend() in one thread leaves the others alone."""
    import fastnn
    from fastnn import dispatch

    with fastnn.backend("torch"), ThreadPoolExecutor(1) as pool:
        assert not dispatch.use_kernels("relu", torch.ones(1))
        assert pool.submit(dispatch.use_kernels, "relu", torch.ones(1)).result()
