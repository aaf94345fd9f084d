"""What `make test-gpu` and `make bench-gpu` ask first: prints the architecture to compile for, or ends with one line
that says what is missing here.

python tests/check_gpu.py MODULE ..  the modules that are needed besides those of the build
"""

from __future__ import annotations

import importlib.util
import os
import runpy
import shutil
import sys
from pathlib import Path


def why_not(modules: list[str]) -> str | None:
    """What is missing; None if nothing is."""
    lacks = [m for m in ("torch", "numpy", "setuptools", "pybind11", *modules) if importlib.util.find_spec(m) is None]
    if lacks:
        return f"{sys.executable} lacks {', '.join(lacks)}"
    compiler = os.environ.get("CXX", "g++")
    lacks = [program for program in (compiler, "ninja") if shutil.which(program) is None]
    if lacks:  # without ninja torch's build takes one core
        return f"{', '.join(lacks)} not found in PATH"
    import torch

    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 11):
        return f"torch {torch.__version__} is too old: 2.11 or newer is needed"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is no CUDA build"
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} sees no GPU"
    return runpy.run_path(str(Path(__file__).parent.parent / "setup.py"))["why_no_cuda"]("1")


if __name__ == "__main__":
    reason = why_not(sys.argv[1:])
    if reason:
        sys.exit(f"fastnn: {reason}")
    import torch

    major, minor = torch.cuda.get_device_capability()
    print(f"{major}.{minor}" + "a" * ((major, minor) == (9, 0)))
