"""What the optimizers share: one elementwise update of many tensors in a launch per dtype.

A table in the device's memory has a record per parameter, with the addresses of its tensors, its element count and a
number of the op's own, and behind the records, for every program of the grid, which record and which chunk of it are
its. The table is made anew for every step: a step remembers nothing of the tensors.

The numbers of a step that may be in the device's memory (lr, grad_scale, found_inf) are read there, as float64: the
host waits for none of them. The first is found_inf: unless it is 0, no element is touched.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastnn.dispatch import _C
from fastnn.triton.arguments import check_dtype

CHUNK = 2048  # elements of a program: two or four 16-byte accesses a thread and tensor at 4 warps
ALIGNMENT = tl.constexpr(16)  # bytes: what a vector access needs

TL_DTYPES = {
    torch.float64: tl.float64,
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}


@triton.jit
def program_chunk(table_ptr, numbers_ptr, records, OPERANDS: tl.constexpr, CHUNK: tl.constexpr):
    """This program's record, and offsets and mask of its elements, none of which counts in a step to be skipped."""
    programs = tl.num_programs(0)
    mine = table_ptr + records.to(tl.int64) * (OPERANDS + 2) + tl.program_id(0)
    record = table_ptr + tl.load(mine) * (OPERANDS + 2)
    i = tl.load(mine + programs) * CHUNK + tl.arange(0, CHUNK)
    count = tl.where(tl.load(numbers_ptr) == 0, tl.load(record + OPERANDS), 0)
    return record, i, i < count


@triton.jit
def tensor_of(record, operand: tl.constexpr, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """The address of the record's tensor of an operand."""
    address = tl.load(record + operand)
    if ALIGNED:
        address = tl.multiple_of(address, ALIGNMENT)
    return address.to(tl.pointer_type(DTYPE))


@triton.jit
def divide(x, y):
    """x / y to nearest, as torch rounds: in float32 Triton's own quotients may be some units off."""
    return tl.div_rn(x, y) if y.dtype == tl.float32 else x / y


@triton.jit
def square_root(x):
    """To nearest, likewise."""
    return tl.sqrt_rn(x) if x.dtype == tl.float32 else tl.sqrt(x)


def _refuse(op: str, name: str, what: str) -> None:
    raise _C.NotCovered(f"{op}: {name} has {what}")


def _is_expanded(tensor: Tensor) -> bool:
    return any(stride == 0 and size > 1 for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def check_operands(op: str, operands: dict[str, list[Tensor]], updated: set[str]) -> None:
    """Raises for what an update cannot do, before anything is changed. The first operand is the parameters."""
    params = operands["params"]
    for name, tensors in operands.items():
        if len(tensors) != len(params):
            _refuse(op, name, f"{len(tensors)} tensors, expected {len(params)}")
        for tensor, param in zip(tensors, params, strict=True):
            if tensor.layout is not torch.strided:
                _refuse(op, name, "a tensor that is not strided memory")
            check_dtype(tensor, op, name)
            if (tensor.dtype, tensor.shape) != (param.dtype, param.shape):
                _refuse(op, name, f"{tensor.dtype} {list(tensor.shape)} beside {param.dtype} {list(param.shape)}")
            if tensor.device != params[0].device:
                _refuse(op, name, f"a tensor on {tensor.device} beside one on {params[0].device}")
            if name in updated and name != "grads" and _is_expanded(tensor):
                _refuse(op, name, "elements that share memory")


def number(op: str, name: str, tensor: Tensor | None, value: float | None, param: Tensor) -> Tensor | float:
    """The number in a tensor of one element on the parameters' device; where there is none ``value``, or 1."""
    if tensor is None:
        return 1.0 if value is None else value
    if tensor.numel() != 1 or tensor.device != param.device:
        raise _C.NotCovered(f"{op}: {name} is no single element on the parameters' device")
    return tensor.detach().reshape(()).double()


def _on_device(numbers: list[Tensor | float], device: torch.device) -> Tensor:
    full = partial(torch.full, (), dtype=torch.float64, device=device)  # a kernel's argument: nothing is copied
    return torch.stack([x if isinstance(x, Tensor) else full(x) for x in numbers])


def _share_memory(tensors: list[Tensor]) -> bool:
    """Whether two of the tensors do (a parameter listed twice, views of one storage)."""
    ranges = []
    for t in tensors:
        if t.numel() > 0:
            last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
            ranges.append((t.data_ptr(), t.data_ptr() + (last + 1) * t.element_size()))
    ranges.sort()
    return any(end > begin for (_, end), (begin, _) in itertools.pairwise(ranges))


def _copy_back(target: Tensor, source: Tensor) -> None:
    """copy_ refuses an expanded target; its elements that share memory are alike, so the first of each is enough."""
    for d in range(target.dim()):
        if target.stride(d) == 0 and target.shape[d] > 1:
            target, source = target.narrow(d, 0, 1), source.narrow(d, 0, 1)
    target.copy_(source)


def _table(tensors: list[tuple[Tensor, ...]], numbers: list[int]) -> tuple[Tensor, int]:
    """The table of the parameters' tensors on their device, and the number of programs."""
    records = [
        [*(t.data_ptr() for t in of_one), of_one[0].numel(), number]
        for of_one, number in zip(tensors, numbers, strict=True)
    ]
    chunks = torch.tensor([triton.cdiv(of_one[0].numel(), CHUNK) for of_one in tensors])
    record = torch.repeat_interleave(torch.arange(len(records)), chunks)
    chunk = torch.arange(len(record)) - (chunks.cumsum(0) - chunks)[record]
    table = torch.cat([torch.tensor(records, dtype=torch.int64).flatten(), record, chunk])
    return table.to(tensors[0][0].device, non_blocking=True), len(record)


def update_all(
    kernel: Any,
    operands: dict[str, list[Tensor]],
    updated: set[str],
    of_record: list[int],
    numbers: list[Tensor | float],
    prepare: Callable[[list[int]], tuple[Any, ...]],
    **constants: Any,
) -> None:
    """Runs ``kernel`` on all the parameters that have elements, those that share memory one after the other.

    ``of_record``: the number in each parameter's record. ``numbers``: those that may be in the device's memory,
    found_inf first. ``prepare(indices)`` is called before these parameters are updated, with those without elements
    among them, and returns more arguments for the kernel.
    """
    on_device = _on_device(numbers, operands["params"][0].device)
    params = operands["params"]
    everything = list(range(len(params)))
    for batch in [[i] for i in everything] if _share_memory(params) else [everything]:
        arguments = prepare(batch)
        copies: list[tuple[Tensor, Tensor]] = []
        tensors: dict[torch.dtype, list[tuple[Tensor, ...]]] = {}
        of_dtype: dict[torch.dtype, list[int]] = {}
        for i in batch:
            if params[i].numel() == 0:
                continue
            order = torch.empty_like(params[i])
            of_one = []
            for name, list_ in operands.items():
                tensor = list_[i]
                if tensor.stride() != order.stride():
                    copy = torch.empty_like(order).copy_(tensor)
                    if name in updated:
                        copies.append((tensor, copy))
                    tensor = copy
                of_one.append(tensor)
            tensors.setdefault(params[i].dtype, []).append(tuple(of_one))
            of_dtype.setdefault(params[i].dtype, []).append(of_record[i])
        for dtype, of_all in tensors.items():
            table, programs = _table(of_all, of_dtype[dtype])
            kernel[(programs,)](
                table,
                on_device,
                len(of_all),
                *arguments,
                DTYPE=TL_DTYPES[dtype],
                ACC=tl.float64 if dtype is torch.float64 else tl.float32,
                ALIGNED=all(t.data_ptr() % ALIGNMENT.value == 0 for of_one in of_all for t in of_one),
                CHUNK=CHUNK,
                **constants,
            )
        for tensor, copy in copies:
            _copy_back(tensor, copy)
