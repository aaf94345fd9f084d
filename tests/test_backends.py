"""The choice of backend: forced, by default, and where Triton is missing, too old or broken."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import subprocess
import sys
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as native
from torch.utils.flop_counter import FlopCounterMode

import fastnn
import fastnn.nn as nn
import fastnn.nn.functional as F
import fastnn.optim
import fastnn.triton
from fastnn import __main__ as command
from fastnn import dispatch

ROOT = Path(__file__).parent.parent
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")

needs_interpreter = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or torch.accelerator.is_available(),
    reason="Triton takes CPU tensors where it is interpreted: it is installed, and there is no GPU",
)


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {k: v for k, v in os.environ.items() if k not in ("FASTNN_BACKEND", "TRITON_INTERPRET")}
    return subprocess.run(
        [sys.executable, *arguments], env=kept | environment, capture_output=True, text=True, check=False
    )


# ---- the registry ----


def test_every_operator_is_in_the_registry():
    registered = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("fastnn::")}
    operators = [o for of_op in dispatch.OPERATORS.values() for o in of_op]
    assert {name for o in operators for name in dispatch.overloads(o)} == registered


@pytest.mark.parametrize("op", dispatch.OPERATORS)
def test_what_the_registry_says_is_there(op):
    for operator in dispatch.OPERATORS[op]:
        has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key(f"fastnn::{operator}", "CPU")
        assert has_kernel == (op in dispatch.KERNELS["cpu"])
        if op in dispatch.KERNELS["triton"]:
            for key in ("CUDA", "XPU"):
                assert torch._C._dispatch_has_kernel_for_dispatch_key(f"fastnn::{operator}", key)


@needs_triton
@pytest.mark.parametrize("op", dispatch.KERNELS["triton"])
def test_triton_has_a_function_of_every_operator(op):
    for operator in dispatch.OPERATORS[op]:
        assert callable(fastnn.triton.function(operator))


def test_the_documentation_shows_the_registry():
    documented = (ROOT / "docs" / "backends.md").read_text()
    assert f"<!-- support -->\n{command.markdown()}\n<!-- /support -->" in documented


def test_the_readme_shows_the_registry():
    table = (ROOT / "README.md").read_text().split("## What is supported\n\n")[1].split("\n\n")[0]
    header, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    columns = {
        backend: header.index(name) for backend, name in {"cpu": "CPU", "cuda": "CUDA", "triton": "Triton"}.items()
    }
    shown = {}
    for row in rows:
        op = row[0].split("`")[1].lower()
        shown[op] = [backend for backend, column in columns.items() if row[column].startswith("yes")]
        assert sorted(row[1].split(", ")) == sorted(str(t).removeprefix("torch.") for t in dispatch.KERNEL_DTYPES)
    assert shown == {op: [b for b in dispatch.KERNELS if op in dispatch.KERNELS[b]] for op in dispatch.OPERATORS}


# ---- the choice ----


@pytest.mark.parametrize(
    ("forced", "device", "expected"),
    [
        (None, "cpu", ("cpu", "")),
        ("cpu", "cpu", ("cpu", "")),
        ("torch", "cpu", ("torch", "")),
        ("cpu", "cuda", ("torch", "cpu is off: it has no kernels for cuda tensors")),
        ("cuda", "cpu", ("torch", "cuda is off: it has no kernels for cpu tensors")),
        (None, "mps", ("torch", "device mps has no kernel")),
        ("triton", "mps", ("torch", "triton is off: it has no kernels for mps tensors")),
    ],
)
def test_choice(monkeypatch, forced, device, expected):
    monkeypatch.setattr(dispatch, "_choices", {})
    monkeypatch.setitem(dispatch.KERNELS, "cuda", ("relu",))
    with dispatch.forced_to(forced):
        assert dispatch.choice("relu", torch.device(device), torch.float32) == expected
        assert dispatch.choice("relu", torch.device(device), torch.float32) == expected


@pytest.mark.parametrize(
    ("off", "expected"),
    [
        ({}, ("cuda", "")),
        ({"cuda": "not built"}, ("triton", "")),
        ({"cuda": "not built", "triton": "no driver"}, ("torch", "cuda is off: not built; triton is off: no driver")),
    ],
)
def test_compiled_kernels_come_first_then_triton_then_native(monkeypatch, off, expected):
    monkeypatch.setattr(dispatch, "_choices", {})
    monkeypatch.setattr(dispatch, "why_off", lambda backend, *_: off.get(backend))
    assert dispatch.choice("conv2d_relu", torch.device("cuda", 0), torch.float32) == expected


@pytest.mark.parametrize("function", [F.relu, lambda x: F.max_pool2d(x, 2)], ids=["relu", "max_pool2d"])
def test_a_default_device_changes_nothing(function):
    """It is a TorchFunctionMode, and so looks as if somebody overrode torch's functions."""
    x = torch.randn(1, 150, 150, requires_grad=True)
    expected = type(function(x).grad_fn)
    with torch.device("cpu"):
        assert type(function(x).grad_fn) is expected


@pytest.mark.parametrize("name", ["cpu", "torch", pytest.param("triton", marks=needs_interpreter)])
def test_forced_by_the_environment(name):
    """What the calls of a process then run: a function of Triton's, or none."""
    program = """
import torch, fastnn.dispatch as d, fastnn.nn.functional as F, fastnn.triton
function = fastnn.triton.function
fastnn.triton.function = lambda operator: print(operator) or function(operator)
x = torch.tensor([-1.0, 2.0], requires_grad=True)
F.relu(x).sum().backward()
assert x.grad.tolist() == [0, 1]
print(d.choice("relu", x.device, x.dtype)[0])
"""
    done = python("-c", program, FASTNN_BACKEND=name, TRITON_INTERPRET="1")
    expected = ["relu", "relu_backward", "triton"] if name == "triton" else [name]
    assert (done.returncode, done.stdout.split()) == (0, expected), done.stderr


@pytest.mark.parametrize(
    ("architectures", "runs", "does_not"),
    [
        ("8.0;8.6", ["8.0", "8.6", "8.7", "8.9"], ["7.5", "9.0", "10.0"]),
        ("8.6 9.0a", ["8.6", "8.9", "9.0"], ["8.0", "9.1", "10.0", "12.0"]),
        ("8.0;10.0;12.0+PTX", ["8.9", "10.0", "10.3", "12.0", "12.1", "13.0"], ["7.5", "9.0", "11.0"]),
        ("9.0a+PTX", ["9.0"], ["8.9", "9.1", "10.0"]),
        ("7.5+PTX", ["7.5", "8.0", "12.1"], ["7.0"]),
        ("Ampere", ["7.0", "8.0", "12.0"], []),
    ],
)
def test_devices_that_compiled_code_runs_on(architectures, runs, does_not):
    for expected, capabilities in ((True, runs), (False, does_not)):
        for capability in capabilities:
            major, minor = capability.split(".")
            assert dispatch.has_code_for((int(major), int(minor)), architectures) == expected, capability


@needs_triton
def test_the_trial_runs_where_the_tensors_will_be(monkeypatch):
    """Triton launches on the current device, which another's tensors do not make theirs."""
    entered = []
    monkeypatch.setattr(torch.accelerator, "device_index", lambda i: entered.append(i) or contextlib.nullcontext())
    monkeypatch.setattr(fastnn.triton, "is_interpreted", lambda: False)
    trial = importlib.import_module("fastnn.triton.trial")
    monkeypatch.setattr(trial, "is_right", lambda op, device, dtype: entered == [device.index])
    assert fastnn.triton.why_off.__wrapped__("relu", torch.device("cuda", 1), torch.float32) is None


def test_each_gpu_has_a_choice_of_its_own(monkeypatch):
    """Of two in one machine, the one that the compiled kernels have no code for gets Triton's."""
    monkeypatch.setattr(dispatch, "_choices", {})
    monkeypatch.setattr(dispatch, "CUDA_OFF", None)
    monkeypatch.setitem(dispatch.LIBRARIES, "cuda", type(sys)("_C_cuda"))
    dispatch.LIBRARIES["cuda"].architectures = "8.0;9.0a"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: [(8, 6), (7, 5)][device.index])
    monkeypatch.setattr(fastnn.triton, "why_off", lambda *_: None)
    devices = [torch.device("cuda", i) for i in range(2)]
    assert [dispatch.choice("conv2d", device, torch.float32)[0] for device in devices] == ["cuda", "triton"]
    with fastnn.backend("cuda"):
        assert dispatch.choice("conv2d", devices[1], torch.float32) == (
            "torch",
            "cuda is off: its kernels are compiled for 8.0;9.0a, and cuda:1 is 7.5",
        )


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_what_runs_is_what_was_chosen(monkeypatch, backend):
    """Triton's function also where compiled kernels are registered for the device and nothing is forced."""
    x = torch.ones(3)
    monkeypatch.setattr(fastnn.triton, "function", lambda operator: f"triton's {operator}")
    monkeypatch.setattr(dispatch, "_choices", {("relu_backward", *dispatch._ON_CPU, None): (backend, "")})
    expected = "triton's relu_backward" if backend == "triton" else torch.ops.fastnn.relu_backward.default
    assert dispatch.kernel("relu_backward", (x, x)) == expected


class Recording(torch.utils._python_dispatch.TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.add(str(function))
        return function(*args, **(kwargs or {}))


def forced_triton(monkeypatch):
    """Where Triton runs here, the operators of its functions that are called from now on, and the overload they are in
    for what sees operators."""
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    ran, function = set(), fastnn.triton.function
    monkeypatch.setattr(fastnn.triton, "function", lambda operator: ran.add(operator) or function(operator))
    return device, ran, "default" if device.type in dispatch.TRITON_REGISTERED else "triton"


@pytest.mark.gpu
@needs_triton
@pytest.mark.parametrize("how", ["mode", "eager", "aot_eager", "inductor"])
def test_forced_triton_serves_what_sees_operators(monkeypatch, caplog, how):
    """Also where the device's compiled kernels are the operators, and backward outside of the with block."""
    device, ran, overload = forced_triton(monkeypatch)

    def function(x, w, v):
        pooled = F.conv2d_relu_max_pool2d(x, w)
        return F.cross_entropy(F.conv2d(pooled, v).flatten(1), torch.zeros(1, dtype=torch.int64, device=x.device))

    leaves = [t.to(device).requires_grad_() for t in (IMAGES, WEIGHT, torch.ones(2, 3, 3, 3))]
    with fastnn.backend("torch"):
        expected = [loss := function(*leaves), *torch.autograd.grad(loss, leaves)]
    torch._dynamo.reset()
    dispatch._logged.clear()
    mode = Recording() if how == "mode" else contextlib.nullcontext()
    called = function if how == "mode" else torch.compile(function, fullgraph=True, backend=how)
    with caplog.at_level("DEBUG", logger="fastnn"):
        with fastnn.backend("triton"), mode:
            loss = called(*leaves)
        forward = set(ran)
        results = [loss, *torch.autograd.grad(loss, leaves)]
    torch.testing.assert_close(results, expected)
    assert forward == {"conv2d", "conv2d_relu_max_pool2d", "cross_entropy"}
    assert ran - forward == {"conv2d_backward", "cross_entropy_backward"}
    assert not [record for record in caplog.records if record.name == "fastnn"]
    if how == "mode":
        assert {name for name in mode.seen if "fastnn" in name} == {f"fastnn.{o}.{overload}" for o in forward}


@pytest.mark.gpu
@needs_triton
@pytest.mark.parametrize("name", ["Adam", "SGD"])
def test_forced_triton_serves_compiled_steps(monkeypatch, caplog, name):
    device, ran, _ = forced_triton(monkeypatch)
    params = [[torch.nn.Parameter(torch.linspace(-1, 1, 9, device=device))] for _ in range(2)]
    eager, compiled = (getattr(fastnn.optim, name)(p, lr=0.1) for p in params)
    torch._dynamo.reset()
    step = torch.compile(compiled.step, fullgraph=True, backend="aot_eager")
    dispatch._logged.clear()
    with caplog.at_level("DEBUG", logger="fastnn"):
        for _ in range(2):
            for (p,) in params:
                p.grad = p.detach().cos()
            with fastnn.backend("torch"):
                eager.step()
            with fastnn.backend("triton"):
                step()
    torch.testing.assert_close(params[1], params[0])
    assert ran == {f"{name.lower()}_"}
    assert not [record for record in caplog.records if record.name == "fastnn"]


@needs_interpreter
def test_tritons_overloads_keep_the_operators_rules():
    x, w, b = IMAGES.double(), WEIGHT.double().requires_grad_(), torch.ones(3, dtype=torch.float64)
    torch.library.opcheck(torch.ops.fastnn.conv2d.triton, (x, w, b, [2, 2], [0] * 4, [1, 1], 1, True))
    with pytest.raises(RuntimeError, match="is not differentiable"):
        torch.ops.fastnn.relu_.triton(w * 1)
    flops = {}
    for name in ("cpu", "triton"):
        with fastnn.backend(name), FlopCounterMode(display=False) as counter:
            F.conv2d(x, w).sum().backward()
        flops[name] = counter.get_total_flops()
    assert flops["cpu"] == flops["triton"] > 0


def test_an_unknown_name_in_the_environment_fails_the_import():
    done = python("-c", "import fastnn", FASTNN_BACKEND="gpu")
    last = done.stderr.strip().splitlines()[-1]
    assert last == "ValueError: FASTNN_BACKEND is 'gpu', expected one of 'cpu', 'cuda', 'triton', 'torch'"


def test_backward_runs_where_forward_was_forced_to(monkeypatch):
    """Also when another thread calls it, outside the with block."""
    calls = []

    def function(operator):
        calls.append(operator)
        return getattr(torch.ops.fastnn, operator)

    monkeypatch.setattr(fastnn.triton, "function", function)
    monkeypatch.setitem(dispatch._choices, ("relu", *dispatch._ON_CPU, "triton"), ("triton", ""))
    x = torch.randn(5, requires_grad=True)
    with fastnn.backend("triton"):
        y = F.relu(x)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(y.sum().backward).result()
    assert calls == ["relu", "relu_backward"]
    y = F.relu(x)
    with fastnn.backend("triton"):
        y.sum().backward()
    assert calls == ["relu", "relu_backward"]


# ---- what the kernels do not cover ----


def step_of(later=(), **kwargs):
    """A parameter after two steps of Adam, whose options are then changed to ``later``'s."""
    p = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    p.grad = torch.ones(2)
    optimizer = fastnn.optim.Adam([p], **kwargs)
    optimizer.param_groups[0].update(later)
    for _ in range(2):
        optimizer.step()
    return p.detach()


IMAGES, WEIGHT = torch.arange(2.0 * 20 * 20).view(1, 2, 20, 20).sin(), torch.arange(54.0).view(3, 2, 3, 3).cos()
UNCOVERED = {
    "relu: native torch, because dtype torch.int64 has no kernel": lambda: F.relu(torch.arange(-2, 3)),
    "conv2d: native torch, because dtype torch.complex64 has no kernel": lambda: F.conv2d(
        IMAGES.to(torch.complex64), WEIGHT.to(torch.complex64)
    ),
    "conv2d_relu_max_pool2d: native torch, because a 17 x 17 window has over 255 elements": lambda: (
        F.conv2d_relu_max_pool2d(IMAGES, WEIGHT, pool_kernel_size=17)
    ),
    "cross_entropy: native torch, because dtypes torch.float32 and torch.float64 are mixed": lambda: F.cross_entropy(
        WEIGHT[0, 0], WEIGHT[0, 0].softmax(1), weight=torch.ones(3, dtype=torch.float64)
    ),
    "conv2d: native torch, because the kernels do not take these arguments": lambda: F.conv2d(
        IMAGES, WEIGHT, groups=np.int64(1)
    ),
    "conv2d_relu: native torch, because the kernels do not take these arguments": lambda: F.conv2d_relu(
        IMAGES, WEIGHT, stride=1.5
    ),
    "conv2d_relu_max_pool2d: native torch, because the kernels do not take these arguments": lambda: (
        F.conv2d_relu_max_pool2d(IMAGES, WEIGHT, pool_stride=torch.tensor(2))
    ),
    "max_pool2d: native torch, because of return_indices=True": lambda: F.max_pool2d(IMAGES, 2, return_indices=True)[1],
    "relu: native torch, because the kernels do not take these arguments": lambda: F.relu_(torch.ones(1).expand(9)),
    "adam: native torch, because of differentiable=True": lambda: step_of(differentiable=True),
    "adam: native torch, because of foreach=True with a tensor for lr or betas": lambda: step_of(
        foreach=True, later={"lr": torch.tensor(0.1)}
    ),
}


@pytest.mark.parametrize("backend", ["cpu", pytest.param("triton", marks=needs_interpreter)])
@pytest.mark.parametrize("line", UNCOVERED)
def test_what_is_not_covered_gives_the_native_result_and_one_line(caplog, backend, line):
    call = UNCOVERED[line]

    def outcome():
        try:
            return call()
        except Exception as error:
            return type(error), str(error)

    with fastnn.backend("torch"):
        expected = outcome()
    dispatch._logged.clear()
    with caplog.at_level("DEBUG", logger="fastnn"), fastnn.backend(backend):
        results = [outcome() for _ in range(2)]
    for result in results:
        if isinstance(expected, tuple):
            assert result == expected
        else:
            torch.testing.assert_close(result, expected, rtol=0, atol=0)
    assert [record.getMessage() for record in caplog.records] == [line]


def test_out_of_memory_says_of_what():
    with pytest.raises(RuntimeError, match=r"allocate memory for a CPU tensor of shape \[1, 3, 8388626, 8388626\]"):
        F.conv2d(IMAGES, WEIGHT, padding=2**22)


def test_in_place_relu_of_a_slice_is_one_version():
    x = torch.ones(6, 8)[:, ::2]
    with fastnn.backend("cpu"):
        F.relu_(x)
    assert x._version == 1


@pytest.mark.parametrize(
    "call",
    [
        lambda f, x: f.relu(x),
        lambda f, x: f.relu_(x),
        lambda f, x: f.max_pool2d(x, 2),
        lambda f, x: f.conv2d(x, torch.ones(1, 1, 3, 3)),
        lambda f, x: f.cross_entropy(x[0, 0], torch.arange(8) // 2),
        lambda f, x: f.cross_entropy(x[0, 0], x[0, 0], label_smoothing=0.1),
        lambda f, x: torch.autograd.grad(f.relu(leaf := x.clone().requires_grad_()), leaf, x)[0],
        lambda f, x: torch.autograd.grad(f.max_pool2d(leaf := x.clone().requires_grad_(), 1), leaf, x)[0],
    ],
    ids=["relu", "relu_", "max_pool2d", "conv2d", "indices", "probabilities", "relu_backward", "max_pool2d_backward"],
)
@pytest.mark.parametrize("layout", ["imag", "dense"])
def test_lazily_negated_tensors(call, layout):
    """What stands for the negative of its memory gives what its copy gives, however it lies."""
    x = torch.complex(*torch.linspace(-1, 1, 256).view(2, 2, 1, 8, 8)).conj().imag
    if layout == "dense":
        x = x.as_strided(x.shape, (64, 64, 8, 1))
    assert x.is_neg()
    assert x.is_contiguous() == (layout == "dense")
    expected = call(native, x.clone())
    with fastnn.backend("cpu"):
        torch.testing.assert_close(call(F, x), expected)


@pytest.mark.parametrize(
    "call",
    [
        lambda two: F.conv2d(IMAGES, WEIGHT, stride=two, padding=(two, 1)),
        lambda two: F.conv2d_relu_max_pool2d(IMAGES, WEIGHT, pool_kernel_size=two, pool_stride=[two]),
        lambda two: F.max_pool2d(IMAGES, 3, two),
        lambda two: fastnn.nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.MaxPool2d(3, two))(IMAGES).detach(),
    ],
    ids=["conv2d", "conv2d_relu_max_pool2d", "max_pool2d", "Sequential"],
)
def test_numpy_numbers_are_numbers(caplog, call):
    dispatch._logged.clear()
    with caplog.at_level("DEBUG", logger="fastnn"):
        torch.manual_seed(0)
        result = call(np.int64(2))
    assert not caplog.records
    torch.manual_seed(0)
    assert torch.equal(result, call(2))


@pytest.mark.parametrize(
    ("shape", "weight_shape", "options"),
    [
        ((1, 1, 2**15, 2**15), (1, 1, 3, 3), (4, 0, 1, 1)),
        ((1, 1, 2**15 - 9, 2**15 - 9), (1, 1, 3, 3), (4, 5, 1, 1)),
        ((1, 2**21, 32, 32), (1, 2**21, 32, 32), (1, 0, 1, 1)),
    ],
    ids=["image", "padding", "weight"],
)
def test_what_31_bits_do_not_count_is_not_for_gpus(monkeypatch, caplog, shape, weight_shape, options):
    """The CPU's kernels count in 64 bits. Nothing of this size is in memory."""
    x, weight = (torch.zeros(1).expand(s) for s in (shape, weight_shape))
    monkeypatch.setattr(dispatch, "_choices", {("conv2d", *dispatch._ON_CPU, "triton"): ("triton", "")})
    dispatch._logged.clear()
    geometry = F._conv_geometry("conv2d", x, weight, None, options)
    with caplog.at_level("DEBUG", logger="fastnn"), fastnn.backend("triton"):
        smaller = (x[..., : 2**14, : 2**14], weight[..., :3, :3])
        assert F._conv_geometry("conv2d", *smaller, None, options) is not None
        assert F._conv_geometry("conv2d", x, weight, None, options) is None
    assert [record.getMessage() for record in caplog.records] == [
        "conv2d: native torch, because an image or a weight is larger than the kernels of GPUs take"
    ]
    if importlib.util.find_spec("triton"):
        with pytest.raises(RuntimeError, match="is larger than the kernels take"):
            fastnn.triton.function("conv2d")(x, weight, None, *geometry, False)


F32 = torch.ones(2, 3)


@pytest.mark.parametrize(
    "tensors",
    [
        (F32,),
        (F32, None, torch.nn.Parameter(F32)),
        (F32.t()[1:], F32.expand(4, 2, 3)),
        (F32.half(), F32.half()),
        (F32.bfloat16(),),
        (F32.double(),),
        (None,),
        (F32, F32.double()),
        (F32.half(), F32.bfloat16()),
        (F32.long(),),
        (F32.to(torch.complex64),),
        (F32.to(torch.float8_e4m3fn),),
        (F32.to_sparse(),),
        (F32.to("meta"),),
        (torch.nn.Buffer(F32), F32.as_subclass(type("Sub", (torch.Tensor,), {}))),
        (F32, 1.0),
    ],
)
def test_the_question_to_c_is_answered_as_in_python(tensors):
    assert dispatch._C.are_plain(*tensors) == ((dispatch._kind("relu", tensors) or [None])[0] == torch.device("cpu"))


# ---- Triton that does not work ----

FAKES = {
    "too old": ("__version__ = '2.1.0'", "triton 2.1.0 is older than 3.6"),
    "broken": ("raise OSError('libtriton.so: undefined symbol')", "triton does not work here: OSError: libtriton.so"),
    "no version": ("", "triton does not work here: AttributeError"),
}
PROBE = """
import logging, torch, fastnn, fastnn.nn.functional as F
logging.basicConfig(format="%(message)s", level=logging.DEBUG)
with fastnn.backend("triton"):
    for _ in range(2):
        assert torch.equal(F.relu(torch.tensor([-1.0, 2.0])), torch.tensor([0.0, 2.0]))
"""


@pytest.mark.parametrize("fake", FAKES)
def test_triton_that_does_not_work_is_off_with_a_reason(tmp_path, fake):
    source, reason = FAKES[fake]
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton" / "__init__.py").write_text(source)
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = python("-c", PROBE, PYTHONPATH=path)
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("relu:")]
    assert line.startswith(f"relu: native torch, because triton is off: {reason}")


@needs_interpreter
@pytest.mark.parametrize(
    ("op", "kernel"),
    [
        *(("conv2d", f"{name}_kernel") for name in ("conv", "grad_weight", "pool", "unpool")),
        *((op, f"{name}_kernel") for op in ("relu", "cross_entropy") for name in ("forward", "backward")),
        ("adam", "update_kernel"),
        ("sgd", "update_kernel"),
    ],
)
def test_a_kernel_that_does_not_compile_turns_its_op_and_dtype_off(monkeypatch, caplog, op, kernel):
    """And nothing else, before any call depends on it: forward does not run where backward could not."""
    module = importlib.import_module(f"fastnn.triton.{op}")
    launch = getattr(module, kernel)

    class Refusing:
        def __getitem__(self, grid):
            def launch_unless_float64(*args, **constants):
                if tl.float64 in (constants["ACC"], constants.get("DTYPE")):
                    raise RuntimeError("no float64\n...\non this device")
                launch[grid](*args, **constants)

            return launch_unless_float64

    tl = pytest.importorskip("triton.language")
    monkeypatch.setattr(module, kernel, Refusing())
    monkeypatch.setattr(fastnn.triton, "is_interpreted", lambda: True)  # which looks at a kernel
    monkeypatch.setattr(dispatch, "_choices", {})
    fastnn.triton.why_off.cache_clear()
    dispatch._logged.clear()
    try:
        with caplog.at_level("DEBUG", logger="fastnn"):
            for dtype in (torch.float32, torch.float64):
                draw = lambda *shape, dtype=dtype: torch.randn(shape, dtype=dtype)  # noqa: E731
                for _ in range(2):
                    with fastnn.backend("triton"):
                        command.SELF_TEST[op](draw)
        lines = [record.getMessage() for record in caplog.records]
        reason = "triton is off: triton does not work here: RuntimeError: no float64 .. on this device"
        calls = {"conv2d": ["conv2d", "conv2d_relu_max_pool2d"]}.get(op, [op])
        assert lines == [f"{call}: native torch, because {reason}" for call in calls]
        assert {other: fastnn.triton.why_off(other, *dispatch._ON_CPU) for other in dispatch.KERNELS["triton"]} == (
            dict.fromkeys(dispatch.KERNELS["triton"])
        )
    finally:
        fastnn.triton.why_off.cache_clear()


@needs_interpreter
def test_parameters_of_a_dtype_that_is_off_are_stepped_natively(monkeypatch, caplog):
    """Also where the group's first parameter has another."""
    why_off = dispatch.why_off
    monkeypatch.setattr(dispatch, "why_off", lambda *of: "no float16" if of[3] is torch.float16 else why_off(*of))
    monkeypatch.setattr(dispatch, "_choices", {})
    dispatch._logged.clear()
    params = [torch.nn.Parameter(torch.ones(3, dtype=dtype)) for dtype in (torch.float32, torch.float16)]
    for p in params:
        p.grad = torch.ones_like(p)
    with caplog.at_level("DEBUG", logger="fastnn"), fastnn.backend("triton"):
        fastnn.optim.SGD(params, lr=0.5).step()
    assert [record.getMessage() for record in caplog.records] == [
        "sgd: native torch, because triton is off: no float16"
    ]
    assert all((p == 0.5).all() for p in params)


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        ("None", "triton is not installed"),
        ("type(sys)('triton')", "triton does not work here: ValueError: triton.__spec__ is None"),
    ],
    ids=["missing", "no spec"],
)
def test_triton_that_is_missing(module, reason):
    done = python("-c", f"import sys; sys.modules['triton'] = {module}\n{PROBE}")
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("relu:")]
    assert line == f"relu: native torch, because triton is off: {reason}"


@needs_triton
def test_the_interpreter_is_not_for_gpus(monkeypatch):
    """It would read their addresses as the host's."""
    monkeypatch.setattr(fastnn.triton, "is_interpreted", lambda: True)
    reason = fastnn.triton.why_off.__wrapped__("adam", torch.device("cuda", 0), torch.float32)
    assert reason == "its interpreter, TRITON_INTERPRET=1, takes CPU tensors alone"


@needs_triton
def test_cpu_tensors_need_the_interpreter():
    done = python("-c", PROBE)
    assert done.returncode == 0, done.stderr
    assert "triton is off: CPU tensors need its interpreter, TRITON_INTERPRET=1" in done.stderr


# ---- python -m fastnn ----


@pytest.mark.gpu
def test_command_for_machines():
    interpreted = {} if torch.accelerator.is_available() else {"TRITON_INTERPRET": "1"}
    done = python("-m", "fastnn", "--json", **interpreted)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout)
    assert report["torch"] == torch.__version__
    assert report["support"].keys() == dispatch.OPERATORS.keys()
    for op, states in report["support"].items():
        assert states.keys() == dispatch.KERNELS.keys()
        assert all(state.split(";")[0] == "available" or state.startswith("off: ") for state in states.values())
        available = [backend for backend, state in states.items() if not state.startswith("off: ")]
        assert report["self-test"][op] == dict.fromkeys(available, "as native")
        assert "cpu" in available
        if importlib.util.find_spec("triton"):
            assert ("triton" in available) == (op in dispatch.KERNELS["triton"])


@pytest.mark.parametrize(
    ("module", "says"),
    [
        (types.SimpleNamespace(__version__="3.6.0+rocm"), "3.6.0+rocm"),
        (types.SimpleNamespace(), "does not load: AttributeError: "),
        (None, "not installed"),
    ],
    ids=["another package's", "broken", "missing"],
)
def test_command_says_which_triton_is_imported(monkeypatch, module, says):
    """AMD's and Intel's packages have other names than the module."""
    monkeypatch.setitem(sys.modules, "triton", module)
    assert command.facts()["triton"].startswith(says)


@pytest.mark.parametrize("as_json", [False, True])
def test_command_finds_a_difference(monkeypatch, capsys, as_json):
    relu = F.relu
    monkeypatch.setattr(F, "relu", lambda x: relu(x) + (dispatch.forced() == "cpu") * 1e-3)
    monkeypatch.setattr(sys, "argv", ["fastnn", *["--json"] * as_json])
    assert command.main() == 1
    assert "DIFFERS in torch.float32: AssertionError" in capsys.readouterr().out


def test_command_reports_a_backend_that_raises(monkeypatch):
    def raises(draw):
        raise RuntimeError("no such instruction")

    monkeypatch.setitem(command.SELF_TEST, "sgd", raises)
    assert command.self_test("cpu", "sgd") == "DIFFERS in torch.bfloat16: RuntimeError: no such instruction"


@pytest.mark.parametrize("op", dispatch.KERNELS["cpu"])
def test_command_notices_what_native_torch_computed(monkeypatch, op):
    """Without a word, since that is what should not be."""
    assert command.self_test("cpu", op) == "as native"
    for module in (F, fastnn.optim.step):
        monkeypatch.setattr(module, "use_kernels", lambda *_: False)
    assert command.self_test("cpu", op) == "DIFFERS in torch.bfloat16: RuntimeError: it went to native torch"
    torch.testing.assert_close(F.relu(-F32), 0 * F32)  # native's functions are back


@pytest.mark.parametrize("off", [{torch.float64: "no float64"}, dict.fromkeys(command.DTYPES, "no driver")])
def test_command_tests_the_dtypes_that_are_on(monkeypatch, off):
    drawn = set()

    def test(draw):
        drawn.add(draw(1).dtype)
        return []

    monkeypatch.setitem(command.SELF_TEST, "relu", test)
    monkeypatch.setattr(command, "why_off", lambda backend, op, device, dtype: off.get(dtype))
    assert command.self_test("cpu", "relu") == "as native"
    served = {dtype for dtype in command.DTYPES if dtype not in off}
    assert drawn - {torch.float64} == served - {torch.float64}  # float64 is what is compared with
    assert command.table()["relu"]["cpu"] == (
        "available; off for torch.float64: no float64" if served else "off: no driver"
    )


@pytest.mark.parametrize("dtype", command.DTYPES, ids=str)
def test_command_sees_a_wrong_rounding(monkeypatch, dtype):
    """One result of many, by four roundings of the largest in 16-bit types and by sixty-four in the wider ones."""
    conv2d, units = F.conv2d, 4 if dtype.itemsize == 2 else 64

    def off_by_little(x, *args, **kwargs):
        y = conv2d(x, *args, **kwargs)
        if dispatch.forced() == "cpu" and x.dtype is dtype:
            y = y + torch.zeros_like(y).index_put((torch.tensor(0),) * 4, units * torch.finfo(dtype).eps * y.max())
        return y

    monkeypatch.setattr(F, "conv2d", off_by_little)
    assert command.self_test("cpu", "conv2d").startswith(f"DIFFERS in {dtype}: AssertionError")
