"""fastnn._C_cuda compiles and links with nvcc, GPU or not, and its hot kernels keep everything in registers.

No code here depends on the architecture, and one architecture of all the kernels takes minutes: each file is compiled
for one of them in turn, so that the convolutions, a file a dtype, are compiled for every one.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BUILD = ROOT / "build" / "cuda-test"
ARCHITECTURES = ["80", "90a", "120"]
# In every dtype but float64, which is there for gradcheck.
HOT = [
    "relu_forward_kernel",
    "relu_backward_kernel",
    "forward_rows_kernel",
    "backward_rows_kernel",
    "forward_columns_kernel",
    "backward_columns_kernel",
    "adam_kernel",
    "sgd_kernel",
    "conv_kernel",
    "grad_weight_kernel",
    "direct_conv_kernel",
    "direct_grad_weight_kernel",
]

SCRIPT = f"""
import runpy, sys
from setuptools import Distribution
setup = runpy.run_path({str(ROOT / "setup.py")!r})
if reason := setup["why_no_cuda"]("1"):
    sys.exit("no CUDA: " + reason)
extensions = []
for number, arch in enumerate({ARCHITECTURES}):
    extension = setup["cuda_extension"]("1")
    extension.name += "_" + arch
    extension.sources = extension.sources[number :: {len(ARCHITECTURES)}]
    extension.extra_compile_args["nvcc"] += [f"-gencode=arch=compute_{{arch}},code=sm_{{arch}}", "-Xptxas=-v"]
    extension.extra_compile_args["cxx"] += ["-O0"]  # the glue is only to compile and link
    extensions.append(extension)
build = Distribution(dict(name="fastnn", ext_modules=extensions, cmdclass=dict(build_ext=setup["Build"])))
command = build.get_command_obj("build_ext")
command.build_lib, command.build_temp = {str(BUILD / "lib")!r}, {str(BUILD / "temp")!r}
command.ensure_finalized()
command.run()
"""
KERNEL = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for '(?P<arch>\w+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers",
    re.DOTALL,
)


def test_hot_kernels_use_no_local_memory():
    shutil.rmtree(BUILD / "temp" / "csrc" / "cuda" / "kernels", ignore_errors=True)  # only compiling gives a report
    environment = {**os.environ, "MAX_JOBS": "2", "FASTNN_SANITIZE": ""}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    if done.stderr.startswith("no CUDA: "):
        pytest.skip(done.stderr.strip())
    output = done.stdout + done.stderr
    assert done.returncode == 0, output[-8000:]
    reports = [match.groupdict() for match in KERNEL.finditer(output)]
    assert {report["arch"] for report in reports} == {f"sm_{arch}" for arch in ARCHITECTURES}
    for kernel in HOT:
        found = [r for r in reports if f"{kernel}I" in r["name"] and f"{kernel}Id" not in r["name"]]
        assert found, f"no report of {kernel}"
        for report in found:
            assert report["stack"] == report["stores"] == report["loads"] == "0", report
