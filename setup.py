"""Builds fastnn._C, and fastnn._C_cuda where there is a CUDA compiler, from csrc/ with whichever torch >= 2.11 is
installed; the result loads beside every later one.

Environment: MAX_JOBS (default: what cores and memory allow), FASTNN_SANITIZE=address,undefined (make test-asan),
FASTNN_CUDA=auto (the default: where nvcc fits a CUDA build of torch), 1 (wherever nvcc is; any failure is fatal) or 0,
TORCH_CUDA_ARCH_LIST (as torch's own extensions take it).
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pybind11
import torch
from setuptools import setup
from torch.utils import cpp_extension
from torch.utils.cpp_extension import BuildExtension, CppExtension

ROOT = Path(__file__).parent
# torch 2.11's stable ABI. The format is 0xMMmmpp00...: 0x0210... would mean 2.16.
STABLE_ABI = "0x020b000000000000"
TOOLKIT = ("bin/nvcc", "include/cuda.h")
SANITIZE = os.environ.get("FASTNN_SANITIZE", "")


def jobs() -> int:
    """One compiler a core, but no more than memory holds at 2 GiB each."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if "SC_AVPHYS_PAGES" in os.sysconf_names:
        cores = min(cores, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES") // (2 << 30))
    return max(1, cores)


def why_no_cuda(mode: str) -> str | None:
    """Why the CUDA kernels are not built; None if they are."""
    if mode not in ("auto", "0", "1"):
        sys.exit(f"fastnn: FASTNN_CUDA is {mode!r}, expected auto, 1 or 0")
    if mode == "0" or SANITIZE:
        return "FASTNN_CUDA=0" if mode == "0" else "FASTNN_SANITIZE"
    toolkits = [cpp_extension.CUDA_HOME, os.environ.get("CUDA_HOME"), Path(shutil.which("nvcc") or "/").parent.parent]
    found = (str(t) for t in [*toolkits, "/usr/local/cuda"] if t and all(Path(t, f).exists() for f in TOOLKIT))
    cpp_extension.CUDA_HOME = next(found, None)  # torch's may be the folder of a wrapper of nvcc, without headers
    if cpp_extension.CUDA_HOME is None:
        return "no nvcc with its headers was found (CUDA_HOME names its toolkit)"
    nvcc = [f"{cpp_extension.CUDA_HOME}/bin/nvcc", "--version"]
    version = re.search(r"release (\d+)\.(\d+)", subprocess.run(nvcc, capture_output=True, text=True).stdout)
    old = version is not None and tuple(map(int, version.groups())) < (12, 8)  # it does not know 10.0 and 12.0
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;8.6;8.9" + ("+PTX;9.0a" if old else ";9.0a;10.0;12.0+PTX"))
    if torch.version.cuda is None:
        return None if mode == "1" else "this torch is no CUDA build"
    fits = version is not None and version[1] == torch.version.cuda.split(".")[0]
    return None if fits else f"{nvcc[0]} is of CUDA {version and version[1]}, torch of {torch.version.cuda}"


def extension(name: str, folders: list[str], macros: dict[str, str], **more) -> CppExtension:
    flags = ["-O3", "-std=c++17", "-fvisibility=hidden", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"]
    flags += ["-fno-tree-loop-distribute-patterns"]  # or GCC makes calls of memset out of two-element loops
    flags += ["-Wall", "-Wextra", "-Wno-psabi", "-Wno-unknown-pragmas"]
    flags += ["-Wno-unused-parameter", "-Wno-maybe-uninitialized"]  # torch's and GCC 12's own headers
    flags += ["-g0"]  # Python's own flags have -g: a quarter of the compiler's time, and most of the library
    if SANITIZE:
        flags += [f"-fsanitize={SANITIZE}", "-fno-omit-frame-pointer", "-g1", "-O1", "-fno-sanitize-recover=undefined"]
        more["extra_link_args"] = [f"-fsanitize={SANITIZE}"]
    files = sorted(str(p.relative_to(ROOT)) for folder in folders for p in (ROOT / "csrc").glob(folder))
    return CppExtension(
        name,
        sources=[f for f in files if f.endswith((".cpp", ".cu"))],
        depends=[f for f in files if f.endswith(".h")],
        include_dirs=[str(ROOT / "csrc"), pybind11.get_include(), *more.pop("include_dirs", [])],
        define_macros=[("TORCH_TARGET_VERSION", STABLE_ABI), *macros.items()],
        extra_compile_args={"cxx": flags, "nvcc": ["-O3", "-std=c++17", "-lineinfo", "--threads=2"]},
        **more,
    )


def cuda_extension(mode: str) -> CppExtension:
    return extension(
        "fastnn._C_cuda",
        ["common/*", "cuda/**/*"],
        {"USE_CUDA": "1", "FASTNN_CUDA_ARCHITECTURES": f'"{os.environ["TORCH_CUDA_ARCH_LIST"]}"'},
        include_dirs=[f"{cpp_extension.CUDA_HOME}/include"],
        library_dirs=[f"{cpp_extension.CUDA_HOME}/lib64"],
        libraries=["cudart"] + ["torch_cuda"] * (torch.version.cuda is not None),
        optional=mode != "1",
    )


class Build(BuildExtension):
    def finalize_options(self) -> None:
        # Else an editable install builds in a folder that is then removed: later builds go on from its objects.
        self.build_temp = self.build_temp or f"build/temp.{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
        super().finalize_options()

    def build_extension(self, ext) -> None:
        try:
            super().build_extension(ext)
        except Exception as error:
            if not ext.optional:
                raise
            print(f"fastnn: {ext.name} was not built, its kernels are off: {error}", file=sys.stderr)


if __name__ == "__main__":
    os.environ.setdefault("MAX_JOBS", str(jobs()))
    mode = os.environ.get("FASTNN_CUDA", "auto")
    no_cuda = why_no_cuda(mode)
    if mode == "1" and no_cuda:
        sys.exit(f"fastnn: FASTNN_CUDA=1, but {no_cuda}")
    print(
        f"fastnn: torch {torch.__version__}, stable ABI 2.11, CPU kernels for avx512_bf16, avx512, avx2 and any "
        f"other, CUDA kernels {'off: ' + no_cuda if no_cuda else 'for ' + os.environ['TORCH_CUDA_ARCH_LIST']}, "
        f"{os.environ['MAX_JOBS']} jobs" + (f", sanitizers {SANITIZE}" if SANITIZE else "")
    )
    cpu = extension("fastnn._C", ["*", "common/*", "cpu/**/*"], {"FASTNN_TORCH_VERSION": f'"{torch.__version__}"'})
    setup(ext_modules=[cpu] + ([] if no_cuda else [cuda_extension(mode)]), cmdclass={"build_ext": Build})
