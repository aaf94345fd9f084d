"""The CPU instruction sets: each is in use when it is asked for, and none leaks out of its own functions."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys

import pytest

from fastnn import _C

PROBE = """
import torch, fastnn.nn.functional as F
from fastnn import _C
print(_C.isa())
x, w = torch.randn(2, 3, 20, 21), torch.randn(5, 3, 3, 3)
torch.testing.assert_close(F.conv2d(x, w), torch.nn.functional.conv2d(x, w))
assert torch.equal(F.relu(x), torch.relu(x))
"""


def run(isa: str | None, code: str = PROBE) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "FASTNN_CPU_ISA"}
    if isa is not None:
        environment["FASTNN_CPU_ISA"] = isa
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("isa", _C.available_isas())
def test_forced_by_the_environment(isa):
    done = run(isa)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{isa}\n"


@pytest.mark.parametrize("isa", [None, ""])
def test_the_fastest_by_default(isa):
    done = run(isa)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{_C.available_isas()[0]}\n"


@pytest.mark.parametrize("isa", ["sse9", "AVX2", *(set(_C.built_isas()) - set(_C.available_isas()))])
def test_what_the_machine_cannot_run_fails_the_import(isa):
    done = run(isa, "import fastnn")
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert re.match(r"(ValueError|ImportError): ", last)
    assert f"FASTNN_CPU_ISA is '{isa}'" in last
    assert all(available in last for available in _C.available_isas())


def test_set_isa():
    before = _C.isa()
    try:
        for isa in _C.available_isas():
            _C.set_isa(isa)
            assert _C.isa() == isa
    finally:
        _C.set_isa(before)
    with pytest.raises(ValueError, match="isa is 'sse9', expected one this machine runs: "):
        _C.set_isa("sse9")
    assert _C.isa() == before
    assert _C.available_isas()[-1] == "generic"


OUTSIDE = re.compile(r"%[yz]mm\d|%(xmm(1[6-9]|2\d|3[01]))\b|%k[0-7]\b")
FUNCTION = re.compile(r"^[0-9a-f]+ <(.*)>:$")


def disassembly() -> list[tuple[str, list[str]]]:
    """Every function of the library: its demangled name and its instructions, as 'mnemonic operands'."""
    objdump = shutil.which("objdump")
    if objdump is None:
        pytest.skip("objdump (binutils) is not installed")
    command = [objdump, "--disassemble", "--demangle", "--no-show-raw-insn", _C.__file__]
    functions: list[tuple[str, list[str]]] = []
    for line in subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines():
        if match := FUNCTION.match(line):
            functions.append((match[1], []))
        elif functions and "\t" in line:
            functions[-1][1].append(line.split("\t", 1)[1])
    return functions


def test_no_instruction_set_leaks():
    """VEX and EVEX instructions stand only in functions of their tier's namespace: anywhere else they would be run, and
    die with SIGILL, on machines without them."""
    if "avx2" not in _C.built_isas():
        pytest.skip("this architecture has one tier")
    used = {"avx512_bf16": 0, "avx512": 0, "avx2": 0}
    leaks = []
    for name, instructions in disassembly():
        tier = next((t for t in used if f"::{t}::" in name), None)
        text = "\n".join(instructions)
        if tier is None:
            if found := [i for i in instructions if OUTSIDE.search(i) or re.match(r"v(?!err|erw|mcall)[a-z]", i)]:
                leaks.append(f"{name}: {found[0]}")
        elif tier == "avx2":
            used["avx2"] += "%ymm" in text
            if found := re.search(r".*(%zmm\d|%k[0-7]\b).*", text):
                leaks.append(f"{name}: {found[0]}")
        else:
            used[tier] += "%zmm" in text
            if tier == "avx512" and (found := re.search(r"v(dpbf16|cvtne).*", text)):
                leaks.append(f"{name}: {found[0]}")
    assert not leaks, "\n".join(leaks)
    assert min(used.values()) > 10, used
