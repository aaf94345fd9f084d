"""Compiles the kernels for a GPU that is not there: test_triton_compile.py runs this in a process of its own, since the
interpreter is chosen once for a process. Arguments: a target and a dtype.

Every launch by the functions of fastnn/triton, on CPU tensors, is compiled for its arguments instead of run.
"""

import sys

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction, mangle_type

import fastnn.triton

TARGETS = {
    "cuda-90": GPUTarget("cuda", 90, 32),
    "hip-gfx942": GPUTarget("hip", "gfx942", 64),
}
compiled: set[str] = set()


def compile_instead(self, *args, grid, warmup, **kwargs):
    bound = dict(zip(self.arg_names, args, strict=False)) | {k: v for k, v in kwargs.items() if k in self.arg_names}
    constants = {p.name: bound[p.name] for p in self.params if p.is_constexpr or bound[p.name] is None}
    constants = {name: getattr(value, "value", value) for name, value in constants.items()}
    signature = {
        p.name: "constexpr" if p.name in constants else p.annotation_type or mangle_type(bound[p.name])
        for p in self.params
    }
    source = ASTSource(fn=self, signature=signature, constexprs=constants)
    triton.compile(source, target=TARGETS[sys.argv[1]])
    compiled.add(f"{self.fn.__module__}.{self.fn.__name__}")


JITFunction.run = compile_instead


def call(operator, *args):
    return fastnn.triton.function(operator)(*args)


def draw(*shape):
    return torch.ones(shape, dtype=getattr(torch, sys.argv[2]))


x = draw(70, 9)
call("relu_backward", call("relu", x), x)
for target, weight, smoothing in (
    (torch.zeros(70, dtype=torch.int64), None, 0.0),
    (torch.zeros(70, dtype=torch.int64), draw(9), 0.1),
    (draw(70, 9), draw(9), 0.1),
):
    _, stats = call("cross_entropy", x, target, weight, 1, -100, smoothing)
    call("cross_entropy_backward", draw(), x, target, weight, stats, 1, -100, smoothing)
lists = [[draw(5, 4)] for _ in range(5)]
call("adam_", *lists, [torch.zeros(())], 0.1, 0.9, 0.99, 0.1, 1e-8, True, True, False, 2.0)
call("sgd_", *lists[:3], [0], 0.1, 0.9, 0.1, 0.1, True, True, False, 2.0)
for groups in (1, 32):  # with tl.dot, and depthwise
    x, w, b = draw(2, 32, 9, 8), draw(32, 32 // groups, 3, 3), draw(32)
    geometry = ([2, 1], [1, 1, 1, 1], [1, 1], groups)
    out, code = call("conv2d_relu_max_pool2d", x, w, b, *geometry, [2, 2], [2, 2])
    call("conv2d_backward", out, x, w, None, code, *geometry, [2, 2], [2, 2], [True, True, True])
print(*sorted(compiled), sep="\n")
