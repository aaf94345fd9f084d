"""``python -m fastnn``: what is built, what this machine can run of it, and what is in use."""

import os
import platform
import sys

import torch

import fastnn
from fastnn import _C


def main() -> None:
    built, available = _C.built_isas(), _C.available_isas()
    rows = [
        ("fastnn", f"{fastnn.__version__}, Python {platform.python_version()} on {sys.platform} {platform.machine()}"),
        ("torch", f"{torch.__version__}, built with {_C.torch_built_with}, compiler {_C.compiler}"),
        ("threads", str(_C.num_threads())),
    ]
    for isa in built:
        state = "in use" if isa == _C.isa() else "available" if isa in available else "off: this CPU does not have it"
        rows.append((isa, state))
    if "FASTNN_CPU_ISA" in os.environ:
        rows.append(("", f"FASTNN_CPU_ISA={os.environ['FASTNN_CPU_ISA']} chose the instruction set"))
    ops = sorted(name for name in torch._C._dispatch_get_all_op_names() if name.startswith("fastnn::"))
    for op in ops:
        has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key(op, "CPU")
        rows.append((op.removeprefix("fastnn::"), "CPU kernel" if has_kernel else "no kernel: native torch serves it"))
    width = max(len(name) for name, _ in rows)
    for name, what in rows:
        print(f"{name:<{width}}  {what}")


if __name__ == "__main__":
    main()
