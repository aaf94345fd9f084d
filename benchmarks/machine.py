"""What the numbers were measured on: the machine, its peaks, and the software."""

from __future__ import annotations

import ctypes
import datetime
import os
import platform
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import calls_a_sample, sample
from fastnn import _C

ROOT = Path(__file__).resolve().parent.parent
# Settings of memory allocation that change what a large fresh output costs.
ALLOCATOR_VARIABLES = ("THP_MEM_ALLOC_ENABLE", "LD_PRELOAD", "MALLOC_CONF", "GLIBC_TUNABLES", "MALLOC_TOP_PAD_")
_C_TYPES = {torch.float32: ("float", ctypes.c_float), torch.float64: ("double", ctypes.c_double)}


def _read(path: str) -> str | None:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return None


def _cpu_model() -> str:
    for line in (_read("/proc/cpuinfo") or "").splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _commit() -> str | None:
    if shutil.which("git") is None:
        return None
    command = ["git", "describe", "--always", "--exclude=*", "--abbrev=12", "--dirty=+changes"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None


def facts(device: torch.device) -> dict[str, Any]:
    """Machine, software, commit and date, as they stand in the JSON file."""
    return {
        "machine": {
            "cpu": _cpu_model(),
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "threads": torch.get_num_threads(),
            "isa": _C.isa(),
            "torch_isa": torch.backends.cpu.get_cpu_capability(),
            "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
            "system": f"{platform.system()} {platform.release()}",
            "transparent_hugepage": _read("/sys/kernel/mm/transparent_hugepage/enabled"),
            "load_before": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        },
        "software": {"python": platform.python_version(), "torch": torch.__version__, "compiler": _C.compiler},
        "allocator": {name: os.environ[name] for name in ALLOCATOR_VARIABLES if name in os.environ},
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def _best_seconds(run: Callable[[], Any], device: torch.device, seconds: float = 0.4) -> float:
    calls = 1
    if device.type == "cuda":  # as many for one wait as the rows have: more waiting would make the peaks read low
        calls = calls_a_sample(min(sample(run, 1, device) for _ in range(2)))
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        best = min(best, sample(run, calls, device))
    return best


def _fma_loop_gflops(dtype: torch.dtype) -> float:
    """Multiply-adds on registers, on as many threads as torch uses. 0 where no C compiler is found."""
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if dtype not in _C_TYPES or compiler is None:
        return 0.0
    name, real = _C_TYPES[dtype]
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "peak.so"
        flags = ["-O3", "-march=native", "-ffp-contract=fast", f"-DREAL={name}", "-shared", "-fPIC"]
        source = Path(__file__).with_name("peak_loop.c")
        if subprocess.run([compiler, *flags, "-o", library, source], capture_output=True, check=False).returncode:
            return 0.0
        loop = ctypes.CDLL(str(library)).fma_loop
    loop.restype, loop.argtypes = ctypes.c_double, [ctypes.c_long, ctypes.POINTER(real)]
    threads = torch.get_num_threads()
    with ThreadPoolExecutor(threads) as pool:  # ctypes releases the interpreter lock

        def everywhere() -> float:
            return sum(pool.map(lambda _: loop(1_000_000, ctypes.byref(real())), range(threads)))

        flops = everywhere()
        return flops / _best_seconds(everywhere, torch.device("cpu")) / 1e9


def _matmul_gflops(dtype: torch.dtype, device: torch.device) -> float:
    best = 0.0
    for size in (256, 512, 1024, 2048, *((4096, 8192) if device.type == "cuda" else ())):
        a, b = (torch.rand(size, size, device=device).to(dtype) for _ in range(2))
        seconds = _best_seconds(partial(torch.mm, a, b, out=torch.empty_like(a)), device)
        best = max(best, 2 * size**3 / seconds / 1e9)
        if seconds > 0.05:  # a dtype without fast products here: the next size takes eight times as long
            break
    return best


def peaks(dtypes: Sequence[torch.dtype], device: torch.device) -> dict[str, Any]:
    """Measured GFLOP/s by dtype, and GB/s of a copy between two buffers far larger than the caches.

    The arithmetic peak is the better of a loop of multiply-adds on registers (CPU, float32 and float64) and the best
    native matrix product; that of a 16-bit type is at least float32's, in which its kernels may compute.
    """
    gflops = {}
    for dtype in dtypes:
        loop = _fma_loop_gflops(dtype if dtype in _C_TYPES else torch.float32) if device.type == "cpu" else 0.0
        gflops[str(dtype).removeprefix("torch.")] = max(loop, _matmul_gflops(dtype, device))
    source = torch.ones(64 << 20, device=device)
    target = torch.empty_like(source).copy_(source)
    seconds = _best_seconds(lambda: target.copy_(source), device)
    return {"gflops": gflops, "copy_gbs": 2 * source.numel() * source.element_size() / seconds / 1e9}
