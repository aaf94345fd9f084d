"""Builds fastnn._C from csrc/ with whichever torch >= 2.11 is installed; the result loads beside every later one.

Environment: MAX_JOBS (default: what cores and memory allow), FASTNN_SANITIZE=address,undefined (make test-asan).
"""

import os
from pathlib import Path

import torch
from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

ROOT = Path(__file__).parent
# torch 2.11's stable ABI. The format is 0xMMmmpp00...: 0x0210... would mean 2.16.
STABLE_ABI = "0x020b000000000000"
SANITIZE = os.environ.get("FASTNN_SANITIZE", "")


def jobs() -> int:
    """One compiler a core, but no more than memory holds at 2 GiB each."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    except (ValueError, OSError):
        return cores
    return max(1, min(cores, memory // (2 << 30)))


def extension() -> CppExtension:
    import pybind11

    flags = ["-O3", "-std=c++17", "-fvisibility=hidden", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"]
    flags += ["-fno-tree-loop-distribute-patterns"]  # or GCC makes calls of memset out of two-element loops
    flags += ["-Wall", "-Wextra", "-Wno-psabi", "-Wno-unknown-pragmas"]
    flags += ["-Wno-unused-parameter", "-Wno-maybe-uninitialized"]  # torch's and GCC 12's own headers
    link = []
    if SANITIZE:
        flags += [f"-fsanitize={SANITIZE}", "-fno-omit-frame-pointer", "-g1", "-O1", "-fno-sanitize-recover=undefined"]
        link += [f"-fsanitize={SANITIZE}"]
    return CppExtension(
        "fastnn._C",
        sources=sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*.cpp") if "cuda" not in p.parts),
        depends=sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*.h")),
        include_dirs=[str(ROOT / "csrc"), pybind11.get_include()],
        define_macros=[
            ("TORCH_TARGET_VERSION", STABLE_ABI),
            ("FASTNN_TORCH_VERSION", f'"{torch.__version__}"'),
        ],
        extra_compile_args={"cxx": flags},
        extra_link_args=link,
    )


os.environ.setdefault("MAX_JOBS", str(jobs()))
print(
    f"fastnn: torch {torch.__version__}, stable ABI 2.11, CPU kernels for avx512 + avx2 + generic "
    f"(chosen at run time), {os.environ['MAX_JOBS']} jobs" + (f", sanitizers {SANITIZE}" if SANITIZE else "")
)
setup(ext_modules=[extension()], cmdclass={"build_ext": BuildExtension})
