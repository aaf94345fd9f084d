"""fastnn._C_cuda compiles and links with nvcc, GPU or not, for every kind of architecture, and its kernels keep
everything in registers on each of them."""

from __future__ import annotations

import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch.utils.cpp_extension

ROOT = Path(__file__).parent.parent
BUILD = ROOT / "build" / "cuda-test"
PASSED = BUILD / "passed"
ARCHITECTURES = ["80", "90a", "120"]
# Every kernel is hot but those of cross-entropy in float64, which is there for gradcheck.
COLD = re.compile(r"(forward|backward)_(rows|columns)_kernelId")

SCRIPT = f"""
import runpy, sys
from setuptools import Distribution
setup = runpy.run_path({str(ROOT / "setup.py")!r})
if reason := setup["why_no_cuda"]("1"):
    sys.exit("no CUDA: " + reason)
extension = setup["cuda_extension"]("1")
extension.extra_compile_args["nvcc"].remove("--threads=2")  # whose reports would come mixed
extension.extra_compile_args["nvcc"] += ["-Xptxas=-v"]
for arch in {ARCHITECTURES}:
    extension.extra_compile_args["nvcc"] += [f"-gencode=arch=compute_{{arch}},code=sm_{{arch}}"]
extension.extra_compile_args["cxx"] += ["-O0"]  # the glue is only to compile and link
build = Distribution(dict(name="fastnn", ext_modules=[extension], cmdclass=dict(build_ext=setup["Build"])))
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


def make_toolkit(folder: Path, release: str) -> None:
    for file in ("bin/nvcc", "include/cuda.h"):
        (folder / file).parent.mkdir(parents=True)
        (folder / file).write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {release}, V{release}.1'\n")
    (folder / "bin/nvcc").chmod(0o755)


@pytest.mark.parametrize(("release", "blackwell"), [("12.6", False), ("12.8", True), ("13.0", True)])
def test_an_nvcc_is_asked_for_what_it_knows(release, blackwell, tmp_path, monkeypatch):
    make_toolkit(tmp_path, release)
    monkeypatch.setattr("torch.utils.cpp_extension.CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0")
    why_no_cuda = runpy.run_path(str(ROOT / "setup.py"))["why_no_cuda"]
    why_no_cuda("1")
    assert os.environ["TORCH_CUDA_ARCH_LIST"] == "8.0"  # the user's
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST")
    why_no_cuda("1")
    assert ("12.0" in os.environ["TORCH_CUDA_ARCH_LIST"]) == blackwell
    assert "9.0a" in os.environ["TORCH_CUDA_ARCH_LIST"]


@pytest.mark.parametrize("torchs", ["wrapper", None])
def test_a_toolkit_is_one_with_headers(torchs, tmp_path, monkeypatch):
    """Torch takes the folder around the nvcc in PATH for a toolkit, which may be a wrapper's."""
    make_toolkit(tmp_path / "wrapper", "13.0")
    (tmp_path / "wrapper/include/cuda.h").unlink()
    make_toolkit(tmp_path / "toolkit", "13.0")
    monkeypatch.setattr("torch.utils.cpp_extension.CUDA_HOME", torchs and str(tmp_path / torchs))
    monkeypatch.setenv("PATH", str(tmp_path / "wrapper/bin"), prepend=os.pathsep)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "toolkit"))
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0")
    runpy.run_path(str(ROOT / "setup.py"))["why_no_cuda"]("1")
    assert str(tmp_path / "toolkit") == torch.utils.cpp_extension.CUDA_HOME


def lacking(*modules: str, **more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tests/check_gpu.py"), *modules]
    return subprocess.run(command, env={**os.environ, **more}, capture_output=True, text=True, check=False)


def test_what_a_gpu_build_lacks_is_said_in_one_line():
    for done, says in (
        (lacking("no_such_module", "nor_this"), "lacks no_such_module, nor_this"),
        (lacking(CXX="no-such-compiler"), "no-such-compiler not found"),
    ):
        assert done.returncode == 1
        assert says in done.stderr
        assert done.stderr.count("\n") == 1
    assert lacking(CXX="sh", CUDA_VISIBLE_DEVICES="").returncode == 1  # here is no GPU, or none is to be seen


def test_hot_kernels_use_no_local_memory():
    # Only compiling gives a report: everything is compiled again, unless nothing has changed since it passed.
    kernels = [*(ROOT / "csrc/cuda/kernels").iterdir()]
    sources = [Path(__file__), ROOT / "setup.py", *(ROOT / "csrc/common").iterdir(), *kernels]
    checked = PASSED.exists() and PASSED.stat().st_mtime > max(source.stat().st_mtime for source in sources)
    if not checked:
        shutil.rmtree(BUILD / "temp" / "csrc" / "cuda" / "kernels", ignore_errors=True)
    environment = {**os.environ, "MAX_JOBS": "2", "FASTNN_SANITIZE": ""}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    if done.stderr.startswith("no CUDA: "):
        pytest.skip(done.stderr.strip())
    output = done.stdout + done.stderr
    assert done.returncode == 0, output[-8000:]
    if checked:
        return
    reports = [match.groupdict() for match in KERNEL.finditer(output)]
    code = "".join(kernel.read_text() for kernel in kernels)
    for kernel in re.findall(r"__global__[^{;]*?(\w+_kernel)\(", code):
        mangled = re.compile(f"{len(kernel)}{kernel}[IE]")
        assert {r["arch"] for r in reports if mangled.search(r["name"])} == {f"sm_{a}" for a in ARCHITECTURES}, kernel
    hot = [report for report in reports if not COLD.search(report["name"])]
    local = [report for report in hot if {report["stack"], report["stores"], report["loads"]} != {"0"}]
    assert not local, "\n".join(map(str, local))
    PASSED.touch()
