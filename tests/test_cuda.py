"""What only a GPU can show of the CUDA kernels: streams, graphs, the absence of waiting, sizes past 2**31, asserts."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
import torch
from torch.nn import functional as native

import fastnn
import fastnn.nn.functional as F
import fastnn.optim

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        fastnn.dispatch.CUDA_OFF is not None, reason=f"no CUDA kernels here: {fastnn.dispatch.CUDA_OFF}"
    ),
]


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
        with torch.cuda.stream(stream):  # a second step launches what a first did not, and no capture may load that
            for _ in range(2):
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
    results = []
    for device in ("cuda:0", "cuda:1"):
        generator = torch.Generator().manual_seed(0)
        images, weight = (torch.randn(shape, generator=generator) for shape in [(4, 3, 8, 8), (5, 3, 3, 3)])
        leaves = [images.to(device).requires_grad_(), weight.to(device).requires_grad_()]
        scores = F.relu(F.conv2d(*leaves)).mean((2, 3))
        F.cross_entropy(scores, torch.arange(4, device=device)).backward()
        fastnn.optim.Adam(leaves, fused=True).step()
        results.append([t.detach().cpu() for t in (scores, *leaves, *(leaf.grad for leaf in leaves))])
        assert torch.cuda.current_device() == 0
    torch.testing.assert_close(*results)


# ---- more elements than 31 bits count ----


def zeros_but_the_last(count):
    x = torch.zeros(count, dtype=torch.bfloat16, device="cuda")
    x[-1] = 2
    return x


def some_elements(x):
    x = x.detach()
    return float(x[0]), float(x[2**31 - 1]), float(x[2**31]), float(x[-1])


@pytest.mark.big
def test_relu_of_more_than_2_to_the_31_elements(need_memory):
    need_memory(16)
    x = torch.full((2**31 + 4096,), -1.0, dtype=torch.bfloat16, device="cuda")
    x[-1] = 2
    y = F.relu(x.requires_grad_())
    assert some_elements(y) == (0, 0, 0, 2)
    (grad,) = torch.autograd.grad(y, x, x.detach())
    assert some_elements(grad) == (0, 0, 0, 2)
    assert some_elements(F.relu_(x.detach())) == (0, 0, 0, 2)


@pytest.mark.big
@pytest.mark.parametrize("shape", [(2**19 + 1, 4096), (17, 1024, 2**17)], ids=["rows", "columns"])
def test_cross_entropy_of_more_than_2_to_the_31_logits(need_memory, shape):
    need_memory(16)
    x = torch.zeros(shape, dtype=torch.bfloat16, device="cuda")
    x[-1].normal_()
    x.requires_grad_()
    target = torch.randint(shape[1], shape[:1] + shape[2:], device="cuda")
    loss = F.cross_entropy(x, target, reduction="none")
    (grad,) = torch.autograd.grad(loss, x, torch.ones_like(loss))
    last = x.detach()[-1:].float().requires_grad_()
    expected = native.cross_entropy(last, target[-1:], reduction="none")
    torch.testing.assert_close(loss[-1:].float(), expected, rtol=2**-8, atol=0)
    (expected_grad,) = torch.autograd.grad(expected, last, torch.ones_like(expected))
    torch.testing.assert_close(grad[-1:].float(), expected_grad, rtol=2**-8, atol=1e-6)


@pytest.mark.big
@pytest.mark.parametrize("name", ["Adam", "SGD"])
def test_a_step_of_more_than_2_to_the_31_elements(need_memory, name):
    need_memory(24)
    param = zeros_but_the_last(2**31 + 4096).requires_grad_()
    param.grad = zeros_but_the_last(2**31 + 4096)
    if name == "Adam":  # whose first step is lr times the gradient's sign
        fastnn.optim.Adam([param], lr=0.5, fused=True).step()
    else:
        fastnn.optim.SGD([param], lr=0.25, momentum=0.9, fused=True).step()
    assert some_elements(param) == (0, 0, 0, 1.5)


@pytest.mark.big
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    ("function", "weight_shape", "kwargs"),
    [
        pytest.param(F.conv2d_relu, (8, 64, 1, 1), {}, id="1x1"),
        pytest.param(F.conv2d_relu, (64, 1, 3, 3), {"padding": 1, "groups": 64}, id="depthwise"),
        pytest.param(F.conv2d_relu_max_pool2d, (8, 64, 3, 3), {"padding": 1}, id="pooled"),
    ],
)
def test_convolutions_of_more_than_2_to_the_31_elements(need_memory, function, weight_shape, kwargs, memory_format):
    need_memory(24)
    images = torch.zeros(2049, 64, 128, 128, dtype=torch.bfloat16, device="cuda").to(memory_format=memory_format)
    images[-1].normal_()
    weight = torch.randn(weight_shape, dtype=torch.bfloat16, device="cuda")
    results = []
    for x in (images, images[-1:].clone()):
        leaves = [x.requires_grad_(), weight.requires_grad_()]
        output = function(*leaves, **kwargs)
        results.append([output.detach()[-1], *torch.autograd.grad(output[-1].sum(), leaves)])
        results[-1][1] = results[-1][1][-1]
    # The weight's gradient sums 2**14 products of either sign, in slices that hang on the batch: up to 2**10 steps of a
    # matrix unit, each of which cuts off some 2**-24 of the 2**7 that the sum has reached, however little it ends with.
    for large, small in zip(*results, strict=True):
        torch.testing.assert_close(large, small, rtol=2**-6, atol=2**-7)


# ---- errors ----


# Native torch serves calls as small as these, unless it is kept from that.
OUT_OF_RANGE = """
import torch, fastnn, fastnn.nn.functional as F
x = torch.randn(3, 5, device="cuda")
with fastnn.backend("cuda"):
    F.cross_entropy(x, torch.tensor([0, 5, 1], device="cuda"))
"""


def test_a_target_out_of_range_is_a_device_assert():
    script = OUT_OF_RANGE + "torch.cuda.synchronize()"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "device-side assert triggered" in done.stderr
    assert "target == args.ignore_index" in done.stdout + done.stderr


def test_a_launch_error_names_the_operator():
    """After a device assert the device takes no launch, and a launch is all that relu_ asks of it."""
    script = f"""{OUT_OF_RANGE}
try:
    torch.cuda.synchronize()
except RuntimeError:
    pass
try:
    with fastnn.backend("cuda"):
        F.relu_(x)
except RuntimeError as error:
    print("raised", error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    # torch's own check puts the place in our sources before it
    assert re.search("^raised .*, relu_: device-side assert", done.stdout, re.MULTILINE), done.stdout + done.stderr
