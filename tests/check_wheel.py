"""Checks a wheel: what its libraries need of a system, and that it works where nothing else of fastnn is.

python tests/check_wheel.py WHEEL               only the first
python tests/check_wheel.py WHEEL --torch NAME  both, beside a torch downloaded for it
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

# Of torch, and, for CUDA kernels, the CUDA runtime that torch brings. All else must be every manylinux system's.
ALLOWED = re.compile(r"(libtorch\w*|libc10\w*|libcudart)\.so[.\d]*")
SMOKE = """
import fastnn, torch
assert fastnn.__file__.startswith({folder!r}), fastnn.__file__
import sys, fastnn.__main__
sys.exit(fastnn.__main__.main())  # the self-test: every available backend beside native torch
"""


def run(*command: str | Path, **more: str) -> str:
    done = subprocess.run(list(map(str, command)), env=os.environ | more, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}"
    return done.stdout


def audit(wheel: Path) -> dict[str, str]:
    """What auditwheel finds, apart from torch's libraries: the oldest system by the symbols, and their newest versions.

    Raises:
        AssertionError: a library is needed that is neither torch's nor part of every manylinux system, or symbols or
            instructions that no manylinux system is bound to have.
    """
    found = json.loads(run(sys.executable, "-m", "auditwheel", "show", "--json", wheel))
    foreign = [name for name in found["external_libs"] if not ALLOWED.fullmatch(name)]
    assert not foreign, f"{wheel.name} needs {foreign}"
    assert found["sym_tag"].startswith("manylinux"), found
    assert not found["unsupported_isa"], found
    newest = {}
    for symbol in (s for versions in found["versioned_symbols"].values() for s in versions):
        name, _, version = symbol.rpartition("_")
        newest[name] = max(newest.get(name, ""), version, key=lambda v: [int(n) for n in re.findall(r"\d+", v)])
    return {"system": found["sym_tag"], **newest}


def try_out(wheel: Path, folder: Path, torch: str | None = None) -> str:
    """Installs the wheel into a new environment in ``folder`` and returns what ``python -m fastnn`` prints there.

    Beside it is the named torch, or this interpreter's packages, of which an editable fastnn is not one.
    """
    run(sys.executable, "-m", "venv", "--without-pip", folder)
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--disable-pip-version-check"]
    if torch is None:
        packages = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
        (Path(packages) / "torch.pth").write_text(sysconfig.get_path("purelib"))
        run(*pip, "--no-index", wheel)
    else:
        run(*pip, torch, wheel)
    return run(python, "-I", "-c", SMOKE.format(folder=str(folder)))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--torch", help="a requirement, as pip takes it")
    options = parser.parse_args()
    needs = ", ".join(f"{name} {version}" for name, version in audit(options.wheel).items())
    print(f"{options.wheel}, {options.wheel.stat().st_size >> 20} MiB: torch's libraries, and {needs}")
    if options.torch:
        with tempfile.TemporaryDirectory() as place:
            print(try_out(options.wheel, Path(place).resolve() / "env", options.torch))
