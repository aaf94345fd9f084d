"""Compiles the kernels for a GPU that is not there: test_triton_compile.py runs this in a process of its own, since the
interpreter is chosen once for a process. Arguments: a target and a dtype, or tf32 for float32 convolutions that may
round to it.

Every launch by the functions of fastnn/triton, on CPU tensors, goes through Triton's own launcher, which names the
arguments, makes constants of numbers that are 1 and compiles, and stops short of running.
"""

import re
import sys

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

import fastnn.triton
from fastnn.triton import conv2d
from fastnn.triton.trial import TRIALS

TARGETS = {
    "cuda-80": GPUTarget("cuda", 80, 32),
    "cuda-90": GPUTarget("cuda", 90, 32),
    "hip-gfx90a": GPUTarget("hip", "gfx90a", 64),
    "hip-gfx942": GPUTarget("hip", "gfx942", 64),
    "hip-gfx1100": GPUTarget("hip", "gfx1100", 32),
}
compiled: set[str] = set()
asserting: set[str] = set()
approximating: set[str] = set()


class Driver:
    """A GPU of the target's kind, as far as the launcher asks."""

    def get_current_target(self):
        return TARGETS[target]

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


launch = JITFunction.run


def compile_instead(self, *args, warmup, **kwargs):
    kernel = launch(self, *args, warmup=True, **kwargs)
    name = f"{self.fn.__module__}.{self.fn.__name__}"
    compiled.add(name)
    ptx = kernel.asm.get("ptx", "")
    if "assertfail" in ptx:
        asserting.add(self.fn.__name__)
    if re.search(r"\b(sqrt\.approx|div\.(full|approx))\.", ptx):
        approximating.add(name)
    if dtype == "tf32" and "DOT" in kwargs:
        assert (".tf32." in ptx) == kwargs["DOT"], name


target, dtype = sys.argv[1:]
if dtype == "tf32":  # which the tensors of a GPU have, where torch allows it
    blocks = conv2d._blocks
    conv2d._blocks = lambda *args: blocks(*args) | {"PRECISION": "tf32"}
driver.set_active(Driver())
JITFunction.run = compile_instead


def call(operator, *args):
    return fastnn.triton.function(operator)(*args)


def draw(*shape):
    return torch.ones(shape, dtype=torch.float32 if dtype == "tf32" else getattr(torch, dtype))


for trial in TRIALS.values():
    trial(draw)
tried = set(compiled)
for rows in (70, 1):
    x = draw(rows, 9)
    call("relu_backward", call("relu", x), x)
    for labels, weight, smoothing in (
        (torch.zeros(rows, dtype=torch.int64), None, 0.0),
        (torch.zeros(rows, dtype=torch.int64), draw(9), 0.1),
        (draw(rows, 9), draw(9), 0.1),
    ):
        _, stats = call("cross_entropy", x, labels, weight, 1, -100, smoothing)
        call("cross_entropy_backward", draw(), x, labels, weight, stats, 1, -100, smoothing)
if target.startswith("cuda"):  # of a class index out of range
    assert asserting == {"forward_kernel", "backward_kernel"}, asserting
for count in (1, 2):
    lists = [[draw(5, 4) for _ in range(count)] for _ in range(5)]
    steps = [torch.zeros(()) for _ in range(count)]
    call("adam_", *lists, steps, 0.1, 0.9, 0.99, 0.1, 1e-8, True, True, False, 2.0)
    call("adam_", *lists[:4], [], steps, 0.1, 0.9, 0.99, 0.1, 1e-8, False, False, True, None)
    call("sgd_", *lists[:3], [0], 0.1, 0.9, 0.1, 0.1, True, True, False, 2.0)
for groups in (1, 32):  # with tl.dot, and depthwise
    x, w, b = draw(2, 32, 9, 8), draw(32, 32 // groups, 3, 3), draw(32)
    geometry = ([2, 1], [1, 1, 1, 1], [1, 1], groups)
    out, code = call("conv2d_relu_max_pool2d", x, w, b, *geometry, [2, 2], [2, 2])
    call("conv2d_backward", out, x, w, None, code, *geometry, [2, 2], [2, 2], [True, True, True])
assert tried == compiled, compiled - tried  # the trial before first use runs every kernel
optimizers = {name for name in approximating if name.startswith(("fastnn.triton.adam.", "fastnn.triton.sgd."))}
assert not optimizers, optimizers  # whose quotients and roots are rounded to nearest, as torch's are
print(*sorted(compiled), sep="\n")
