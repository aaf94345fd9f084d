"""One Adam step of many parameters, in torch's order of operations:

    g = -g if maximize;  p = p (1 - lr wd) if decoupled, else g = g + wd p
    m = lerp(m, g, 1 - beta1);  v = beta2 v + (1 - beta2) g g;  vmax = max(vmax, v)
    p = p - step_size m / (sqrt(v or vmax) / bias_correction2_sqrt + eps)

Blocking: a program has CHUNK elements of one parameter; one launch updates all the parameters of a dtype.
Bytes: p, g, m, v are read and p, m, v written once (amsgrad: vmax too), 7 (9) times the parameters' bytes.
Operations: 10 additions and multiplications an element, two divisions and a square root, all rounded to nearest; weight
decay adds 1 or 2, maximize 1, amsgrad a maximum, grad_scale a division. Memory-bound on every GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastnn.dispatch import _C
from fastnn.triton.tensor_lists import (
    check_operands,
    divide,
    number,
    program_chunk,
    square_root,
    tensor_of,
    update_all,
)


@triton.jit(do_not_specialize=["records", "parameters"])
def update_kernel(
    table_ptr,
    numbers_ptr,  # found_inf, 1 - lr weight_decay, grad_scale
    records,
    bias_ptr,  # (2, parameters) float64: step_size = lr / (1 - beta1^t) and sqrt(1 - beta2^t)
    parameters,
    weight_decay: tl.float64,
    one_minus_beta1: tl.float64,
    beta2: tl.float64,
    one_minus_beta2: tl.float64,
    eps: tl.float64,
    AMSGRAD: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    WEIGHT_DECAY: tl.constexpr,
    DECOUPLED: tl.constexpr,
    SCALED: tl.constexpr,
    LERP_FROM_START: tl.constexpr,
    DTYPE: tl.constexpr,
    ACC: tl.constexpr,
    ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
):
    OPERANDS: tl.constexpr = 5 if AMSGRAD else 4
    record, i, mask = program_chunk(table_ptr, numbers_ptr, records, OPERANDS, CHUNK)
    param = tensor_of(record, 0, DTYPE, ALIGNED) + i
    grad = tensor_of(record, 1, DTYPE, ALIGNED) + i
    exp_avg = tensor_of(record, 2, DTYPE, ALIGNED) + i
    exp_avg_sq = tensor_of(record, 3, DTYPE, ALIGNED) + i
    bias = bias_ptr + tl.load(record + OPERANDS + 1)
    step_size = tl.load(bias).to(ACC)
    bias_correction2_sqrt = tl.load(bias + parameters).to(ACC)

    p = tl.load(param, mask=mask).to(ACC)
    g = tl.load(grad, mask=mask).to(ACC)
    m = tl.load(exp_avg, mask=mask).to(ACC)
    v = tl.load(exp_avg_sq, mask=mask).to(ACC)
    if SCALED:
        g = divide(g, tl.load(numbers_ptr + 2).to(ACC))
        tl.store(grad, g.to(DTYPE), mask=mask)
    if MAXIMIZE:
        g = -g
    if WEIGHT_DECAY:
        if DECOUPLED:
            p = p * tl.load(numbers_ptr + 1).to(ACC)
        else:
            g = g + tl.full((), weight_decay, ACC) * p
    if LERP_FROM_START:  # torch's lerp starts from the nearer end
        m = m + tl.full((), one_minus_beta1, ACC) * (g - m)
    else:
        m = g + (tl.full((), one_minus_beta1, ACC) - 1.0) * (g - m)
    v = v * tl.full((), beta2, ACC) + tl.full((), one_minus_beta2, ACC) * g * g
    tl.store(exp_avg, m.to(DTYPE), mask=mask)
    tl.store(exp_avg_sq, v.to(DTYPE), mask=mask)
    if AMSGRAD:
        max_exp_avg_sq = tensor_of(record, 4, DTYPE, ALIGNED) + i
        v_max = tl.load(max_exp_avg_sq, mask=mask).to(ACC)
        v = tl.where((v_max > v) | (v_max != v_max), v_max, v)  # NaN on either side stays
        tl.store(max_exp_avg_sq, v.to(DTYPE), mask=mask)
    denominator = divide(square_root(v), bias_correction2_sqrt) + tl.full((), eps, ACC)
    tl.store(param, (p - divide(step_size * m, denominator)).to(DTYPE), mask=mask)


def adam_(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    max_exp_avg_sqs: list[Tensor],
    state_steps: list[Tensor],
    lr: float,
    beta1: float,
    beta2: float,
    weight_decay: float,
    eps: float,
    amsgrad: bool,
    maximize: bool,
    decoupled_weight_decay: bool,
    grad_scale: float | None = None,
    lr_tensor: Tensor | None = None,
    grad_scale_tensor: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    scaled = grad_scale is not None or grad_scale_tensor is not None
    operands = {"params": params, "grads": grads, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs}
    if amsgrad:
        operands["max_exp_avg_sqs"] = max_exp_avg_sqs
    updated = set(operands) - (set() if scaled else {"grads"})
    check_operands("adam_", operands, updated)
    if len(state_steps) != len(params):
        raise _C.NotCovered(f"adam_: state_steps has {len(state_steps)} tensors, expected {len(params)}")
    if any(t.numel() != 1 or t.dtype not in (torch.float32, torch.float64) for t in state_steps):
        raise _C.NotCovered("adam_: state_steps has a tensor that is no float32 or float64 scalar")
    device = params[0].device
    host = {torch.device("cpu")} if found_inf is None else {}  # which the host knows nothing of
    if {t.device for t in state_steps} not in ({device}, host):
        raise _C.NotCovered("adam_: state_steps has a tensor on another device")
    rate = number("adam_", "lr_tensor", lr_tensor, lr, params[0])
    found = number("adam_", "found_inf", found_inf, 0.0, params[0])
    one = (found == 0).float() if isinstance(found, Tensor) else 1

    def prepare(indices: list[int]) -> tuple[Tensor | int | float, ...]:
        torch._foreach_add_([state_steps[i] for i in indices], one)
        t = torch.stack([step.reshape(()) for step in state_steps]).to(device, torch.float64, non_blocking=True)
        bias = torch.stack([rate / (1 - beta1**t), (1 - beta2**t).sqrt()])
        return bias, len(params), weight_decay, 1 - beta1, beta2, 1 - beta2, eps

    update_all(
        update_kernel,
        operands,
        updated,
        list(range(len(params))),
        [
            found,
            1 - rate * weight_decay,
            number("adam_", "grad_scale_tensor", grad_scale_tensor, grad_scale, params[0]),
        ],
        prepare,
        AMSGRAD=amsgrad,
        MAXIMIZE=maximize,
        WEIGHT_DECAY=weight_decay != 0,
        DECOUPLED=decoupled_weight_decay,
        SCALED=scaled,
        LERP_FROM_START=1 - beta1 < 0.5,
    )
