"""The CUDA kernels without a GPU: compiled for the CPU with sanitizers (tests/cuda_emulation), they pass the operators'
own tests; and kernels that are wrong on purpose show that the emulation sees what it is there to see."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
from filelock import FileLock  # torch has it

ROOT = Path(__file__).parent.parent
CXX = os.environ.get("CXX", "g++")
TESTS = [f"tests/test_{name}.py" for name in ("conv2d", "relu", "cross_entropy", "adam", "sgd", "optim")]

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the emulation is written for Linux")


@pytest.fixture(scope="session")
def emulation() -> Path:
    """The folder of the emulation's library and of its program of wrong kernels, built if they are out of date."""
    for program in (CXX, "make"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed")
    pybind11 = pytest.importorskip("pybind11")
    from torch.utils.cpp_extension import include_paths

    out = ROOT / "build" / "cuda-emulation"
    includes = [*include_paths(), pybind11.get_include(), sysconfig.get_path("include")]
    command = ["make", "-j2", "-f", "tests/cuda_emulation/Makefile", f"OUT={out.relative_to(ROOT)}", f"CXX={CXX}"]
    command += ["INCLUDES=" + " ".join(f"-isystem {path}" for path in includes)]
    command += [f"TORCH_LIB={Path(torch.__file__).parent / 'lib'}"]
    out.mkdir(parents=True, exist_ok=True)
    with FileLock(out / ".lock"):  # the tests run in several processes
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def sanitized(**more: str) -> dict[str, str]:
    """The environment of a process with AddressSanitizer under an interpreter that has none."""
    runtimes = (
        subprocess.run([CXX, f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    )
    options = "detect_leaks=0:malloc_context_size=4"
    if torch.cuda.is_available():  # CUDA maps its memory where ASan keeps a gap, or does not start
        options += ":protect_shadow_gap=0"
    return {
        **os.environ,
        "ASAN_OPTIONS": options,
        "LD_PRELOAD": " ".join(runtimes),
        **more,
    }


FAULTS = {
    "right sum": "passed",
    "right warp sum": "passed",
    "right exchange in warp": "passed",
    "right neighbours": "passed",
    "right sum of copies": "passed",
    "right sum of copies in thread": "passed",
    "right sum of matrices": "passed",
    "no commit": "copy in flight: .*reads",
    "no wait": "copy in flight: .*reads",
    "no barrier after wait": "copy in flight: .*reads",
    "copy over what is read": "race in shared memory",
    "copy left behind": "copy in flight: .*has returned",
    "misaligned copy": "misaligned address",
    "matrices in branch": "divergent barrier.*waits at.*waits at",
    "operand not rounded": ".*which is no TF32 number",
    "no first barrier": "uninitialised",
    "no other barriers": "race in shared memory",
    "no warp barrier": "race in shared memory",
    "warp barrier between warps": "race in shared memory",
    "struct as argument": "race in shared memory|uninitialised",
    "barrier in branch": "divergent barrier.*has returned",
    "barriers in both branches": "divergent barrier.*waits at.*others at",
    "shuffle in branch": "divergent warp operation",
    "shuffle from outside": ".*reads lane 20, which takes no part",
    "write of one address": "race in global memory",
    "write after read": "race in global memory",
    "between blocks": "race between blocks",
    "uninitialised": "uninitialised",
    "left by another block": "uninitialised",
    "out of bounds": "out of bounds: a write of 4 bytes",
    "out of bounds read": "out of bounds: a read of 4 bytes",
    "out of shared bounds": "index 64 out of bounds",
    "misaligned": "misaligned address",
    "device assert": "device-side assert triggered",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_seen(emulation, fault):
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0"}
    done = subprocess.run([emulation / "faults", fault], env=environment, capture_output=True, text=True, check=False)
    if done.returncode == 0:  # else UBSan ended the process
        first, again, *more = done.stdout.splitlines()
        assert re.match(FAULTS[fault], first), done.stdout
        assert again == "passed"
        assert not more
    else:
        assert FAULTS[fault] in done.stderr


def test_operators_pass_their_tests(emulation):
    command = [sys.executable, "-m", "pytest", "-x", "--capture=sys", "-p", "no:cacheprovider", *TESTS]
    environment = sanitized(
        FASTNN_TEST_EMULATED_CUDA=str(emulation / "_C_cuda.so"),
        PYTHONPATH=os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    )
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-8000:]
    assert re.search(r"^\d{2,} passed", done.stdout, re.MULTILINE), done.stdout[-2000:]
