"""One SGD step of many parameters, in torch's order of operations:

    g = -g if maximize;  g = grad_factor (g + wd p)
    b = g on the first step, else momentum b + (1 - dampening) g; with dampening also where b is -0, which no step
        leaves there: found_inf may have skipped the first one, of which the host need not know
    p = p + step_factor (b, or g + momentum b if nesterov, or g without momentum)

Blocking: a program has CHUNK elements of one parameter; one launch updates all the parameters of a dtype.
Bytes: with momentum p, g, b are read and p, b written once, 5 times the parameters' bytes; without, 3.
Operations: 6 additions and multiplications an element with momentum, 3 without; weight decay and nesterov add 2 each,
maximize 1, grad_scale a division. Memory-bound on every GPU.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastnn.triton.arguments import check
from fastnn.triton.tensor_lists import check_operands, divide, number, program_chunk, tensor_of, update_all


@triton.jit(do_not_specialize=["records"])
def update_kernel(
    table_ptr,
    numbers_ptr,  # found_inf, grad_factor, step_factor, grad_scale
    records,
    momentum: tl.float64,
    undamped: tl.float64,  # 1 - dampening
    weight_decay: tl.float64,
    MOMENTUM: tl.constexpr,
    DAMPED: tl.constexpr,
    NESTEROV: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    WEIGHT_DECAY: tl.constexpr,
    SCALED: tl.constexpr,
    DTYPE: tl.constexpr,
    ACC: tl.constexpr,
    ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
):
    OPERANDS: tl.constexpr = 3 if MOMENTUM else 2
    record, i, mask = program_chunk(table_ptr, numbers_ptr, records, OPERANDS, CHUNK)
    param = tensor_of(record, 0, DTYPE, ALIGNED) + i
    grad = tensor_of(record, 1, DTYPE, ALIGNED) + i
    p = tl.load(param, mask=mask).to(ACC)
    g = tl.load(grad, mask=mask).to(ACC)
    if SCALED:
        g = divide(g, tl.load(numbers_ptr + 3).to(ACC))
        tl.store(grad, g.to(DTYPE), mask=mask)
    if MAXIMIZE:
        g = -g
    if WEIGHT_DECAY:
        g = g + tl.full((), weight_decay, ACC) * p
    g = g * tl.load(numbers_ptr + 1).to(ACC)
    if MOMENTUM:
        buffer = tensor_of(record, 2, DTYPE, ALIGNED) + i
        is_first = tl.load(record + OPERANDS + 1) != 0  # what the buffer then holds, NaN perhaps, is not selected
        b = tl.load(buffer, mask=mask).to(ACC)
        if DAMPED:
            is_first = is_first | ((b == 0) & (divide(tl.full((), 1.0, ACC), b) < 0))
        b = tl.where(is_first, g, b * tl.full((), momentum, ACC) + tl.full((), undamped, ACC) * g)
        stored = b.to(DTYPE)
        tl.store(buffer, stored.to(ACC) + 0.0 if DAMPED else stored, mask=mask)  # + 0.0: never -0
        g = g + tl.full((), momentum, ACC) * b if NESTEROV else b
    tl.store(param, (p + tl.load(numbers_ptr + 2).to(ACC) * g).to(DTYPE), mask=mask)


def sgd_(
    params: list[Tensor],
    grads: list[Tensor],
    momentum_buffer_list: list[Tensor],
    first_steps: list[int],
    lr: float,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
    maximize: bool,
    lr_in_velocity: bool,
    grad_scale: float | None = None,
    lr_tensor: Tensor | None = None,
    grad_scale_tensor: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    scaled = grad_scale is not None or grad_scale_tensor is not None
    operands = {"params": params, "grads": grads}
    if momentum != 0:
        operands["momentum_buffer_list"] = momentum_buffer_list
    updated = set(operands) - (set() if scaled else {"grads"})
    check_operands("sgd_", operands, updated)
    is_first = [0] * len(params)
    for i in first_steps:
        check(
            momentum != 0 and 0 <= i < len(params),
            f"sgd_: first_steps has {i}, expected indices of parameters with momentum",
        )
        is_first[i] = 1
    step = -number("sgd_", "lr_tensor", lr_tensor, lr, params[0])
    update_all(
        update_kernel,
        operands,
        updated,
        is_first,
        [
            number("sgd_", "found_inf", found_inf, 0.0, params[0]),
            *((step, 1.0) if lr_in_velocity else (1.0, step)),
            number("sgd_", "grad_scale_tensor", grad_scale_tensor, grad_scale, params[0]),
        ],
        lambda _: (momentum, 1 - dampening, weight_decay),
        MOMENTUM=momentum != 0,
        DAMPED=dampening != 0,
        NESTEROV=nesterov,
        MAXIMIZE=maximize,
        WEIGHT_DECAY=weight_decay != 0,
        SCALED=scaled,
    )
