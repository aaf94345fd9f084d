"""Triton's kernels compile for GPUs, which the interpreter cannot show; no GPU is needed."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton", reason="triton is not installed")
SCRIPT = Path(__file__).parent / "triton_compile.py"


def kernels() -> set[str]:
    """Every kernel of fastnn/triton, by its file's own name for it."""
    import importlib

    from fastnn.dispatch import KERNELS

    found = set()
    for op in KERNELS["triton"]:
        module = importlib.import_module(f"fastnn.triton.{op}")
        found |= {f"{module.__name__}.{name}" for name, _ in inspect.getmembers(module) if name.endswith("_kernel")}
    return found


@pytest.mark.parametrize(
    ("target", "dtype"),
    [
        ("cuda-80", "float64"),
        ("cuda-90", "bfloat16"),
        ("cuda-90", "tf32"),
        ("hip-gfx90a", "float16"),
        ("hip-gfx942", "float32"),
        ("hip-gfx1100", "bfloat16"),
    ],
)
def test_kernels_compile(target, dtype):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), target, dtype], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.split()) == kernels()
