"""What only a GPU can show of the CUDA kernels: streams, graphs, the absence of waiting, sizes past 2**31, asserts."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch.nn import functional as native

import fastnn
import fastnn.nn.functional as F
import fastnn.optim

pytestmark = pytest.mark.skipif(
    fastnn.dispatch.CUDA_OFF is not None, reason=f"no CUDA kernels here: {fastnn.dispatch.CUDA_OFF}"
)


@pytest.fixture(autouse=True)
def forced():
    with fastnn.backend("cuda"):
        yield


def loss_of(weight, x, target):
    return F.cross_entropy(F.relu(x) @ weight, target, label_smoothing=0.1)


def problem(seed=0):
    generator = torch.Generator("cuda").manual_seed(seed)
    x = torch.randn(32, 64, device="cuda", generator=generator)
    target = torch.randint(10, (32,), device="cuda", generator=generator)
    return torch.randn(64, 10, device="cuda", generator=generator).requires_grad_(), x, target


def optimizers(weight, **kwargs):
    lr = torch.tensor(0.05, device="cuda")
    return {
        "Adam": lambda: fastnn.optim.Adam([weight], lr=lr, amsgrad=True, **kwargs),
        "AdamW": lambda: fastnn.optim.AdamW([weight], lr=lr, **kwargs),
        "SGD": lambda: fastnn.optim.SGD([weight], lr=lr, momentum=0.9, dampening=0.1, fused=True),
    }


@pytest.mark.parametrize("name", ["Adam", "AdamW", "SGD"])
def test_nothing_waits_for_the_device(name):
    weight, x, target = problem()
    optimizer = optimizers(weight, fused=True)[name]()
    optimizer.grad_scale = torch.tensor(4.0, device="cuda")
    optimizer.found_inf = torch.tensor(0.0, device="cuda")
    try:
        for mode in ("default", "error"):  # the first step makes the state
            torch.cuda.set_sync_debug_mode(mode)
            optimizer.zero_grad()
            loss_of(weight, x, target).backward()
            optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("channels", [3, 64])
def test_convolutions_do_not_wait_either(channels):
    images = torch.randn(8, channels, 16, 16, device="cuda", requires_grad=True)
    weights = [torch.randn(32, channels, 3, 3, device="cuda"), torch.randn(32, 1, 3, 3, device="cuda")]
    leaves = [images, *(w.requires_grad_() for w in weights)]
    try:
        torch.cuda.set_sync_debug_mode("error")
        pooled = F.conv2d_relu_max_pool2d(images, weights[0], padding=1)
        torch.autograd.grad(F.conv2d_relu(pooled, weights[1], stride=2, groups=32).sum(), leaves)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", ["Adam", "AdamW", "SGD"])
def test_a_captured_step_replays_as_the_eager_one(name):
    results = []
    for captured in (False, True):
        weight, x, target = problem()
        weight.grad = torch.zeros_like(weight)
        capturable = {} if name == "SGD" else {"capturable": True}
        optimizer = optimizers(weight, **capturable)[name]()

        def step(weight=weight, x=x, target=target, optimizer=optimizer):
            (grad,) = torch.autograd.grad(loss_of(weight, x, target), weight)
            weight.grad.copy_(grad)
            optimizer.step()

        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            step()
        torch.cuda.current_stream().wait_stream(stream)
        if captured:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                step()
        for _ in range(3):
            graph.replay() if captured else step()
        results.append(weight.detach().clone())
    assert torch.equal(*results)


@pytest.mark.parametrize("name", ["Adam", "AdamW", "SGD"])
def test_found_inf_on_the_device_skips(name):
    weight, x, target = problem()
    optimizer = optimizers(weight, fused=True)[name]()
    before = weight.detach().clone()
    loss_of(weight, x, target).backward()
    optimizer.found_inf = torch.tensor(1.0, device="cuda")
    optimizer.step()
    assert torch.equal(weight, before)
    optimizer.found_inf = torch.tensor(0.0, device="cuda")
    optimizer.step()
    expected = before.clone().requires_grad_()
    expected.grad = weight.grad.clone()
    optimizers(expected, fused=True)[name]().step()
    assert torch.equal(weight, expected)


def test_other_devices():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    x = torch.randn(1000, device="cuda:1")
    torch.testing.assert_close(F.relu(x), native.relu(x), rtol=0, atol=0)
    assert torch.cuda.current_device() == 0


@pytest.mark.big
def test_more_than_2_to_the_31_elements():
    if torch.cuda.mem_get_info()[0] < 16 << 30:
        pytest.skip("needs 16 GiB of free GPU memory")
    count = 2**31 + 4096
    x = torch.full((count,), -1.0, dtype=torch.bfloat16, device="cuda")
    x[-1] = 2
    y = F.relu_(x)
    assert (float(y[0]), float(y[2**31]), float(y[-1])) == (0, 0, 2)
    rows = x.fill_(0).view(-1, 4096)
    target = torch.full((rows.shape[0],), 7, device="cuda")
    loss = F.cross_entropy(rows, target, reduction="none")
    torch.testing.assert_close(loss[-1].float(), torch.tensor(4096.0, device="cuda").log(), rtol=2**-8, atol=0)


@pytest.mark.big
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_convolutions_of_more_than_2_to_the_31_elements(memory_format):
    if torch.cuda.mem_get_info()[0] < 24 << 30:
        pytest.skip("needs 24 GiB of free GPU memory")
    images = torch.zeros(2049, 64, 128, 128, dtype=torch.bfloat16, device="cuda").to(memory_format=memory_format)
    images[-1].normal_()
    weight = torch.randn(8, 64, 1, 1, dtype=torch.bfloat16, device="cuda")
    results = []
    for x in (images, images[-1:].clone()):
        leaves = [x.requires_grad_(), weight.requires_grad_()]
        output = F.conv2d_relu(*leaves)
        results.append([output.detach()[-1], *torch.autograd.grad(output[-1].sum(), leaves)])
        results[-1][1] = results[-1][1][-1]
    for large, small in zip(*results, strict=True):
        torch.testing.assert_close(large, small)


def test_a_target_out_of_range_is_a_device_assert():
    script = """
import torch, fastnn.nn.functional as F
F.cross_entropy(torch.randn(3, 5, device="cuda"), torch.tensor([0, 5, 1], device="cuda"))
torch.cuda.synchronize()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "device-side assert triggered" in done.stderr
    assert "target == args.ignore_index" in done.stdout + done.stderr
