"""Cross-entropy of logits x against a target, and its gradient.

With a_c the weight the target gives to class c, A = sum a_c, m = max x_c and S = sum e^(x_c - m), a row's
    loss      = sum a_c (m + log S - x_c)         = A log S - sum a_c (x_c - m)
    gradient  = g (A e^(x_c - m) / S - a_c)         of x_c, g being the gradient of the row's loss.
A class index t gives a_t = (1 - label_smoothing) w_t and, smoothed, label_smoothing / C * w_c more to every class;
probabilities q_c give ((1 - label_smoothing) q_c + label_smoothing / C) w_c.

Blocking: every operand is an (outer, classes, inner) array of any strides. A program has a tile of inner positions by
classes: forward walks along the classes, a block at a time, and keeps m, S, A and sum a_c (x_c - m) a row, rescaled
when m grows; backward is one tile a program. The tile depends on the number of classes and the layout alone, so a row's
bits do not depend on its batch.
Bytes: forward reads the logits once and keeps three values a row; backward reads them once and writes as much. Some 10
operations and an exponential a logit: memory-bound on every GPU.
Only e^(x - m) <= 1 is ever formed, and in the accumulator, as is A e^(x - m) / S - a_c: that is rounded to the dtype.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastnn.triton.arguments import (
    accumulator,
    accumulator_dtype,
    check,
    check_dtype,
    check_same_dtype,
    check_same_shape,
)

TILE = 4096  # elements of a tile: 16 to 32 registers a thread
MAX_ROWS = 128  # where a row's classes are neighbours in memory: fills a tile down to 32 classes
POSITIONS = 128  # where positions are: two or four 128-byte lines of every class

# What the loss is taken against: the class of an index; that, smoothed (a weight for every class); or probabilities.
INDEX, SMOOTHED, PROBABILITIES = (tl.constexpr(i) for i in range(3))
NONE, MEAN, SUM = range(3)  # reductions
# Of a launch: without debug a compiled kernel has no assertions, and with it, unasked, arithmetic has its own.
ASSERTING = {"debug": True, "sanitize_overflow": False}


@triton.jit
def _reference(top):
    """What is subtracted from the logits: not a maximum of -inf, whose -inf - -inf would be NaN."""
    return tl.where(top == float("-inf"), 0.0, top)


@triton.jit
def _class_weights(
    p_row,
    weight_ptr,
    c,
    mask,
    p_class,
    keep,
    uniform,
    TARGET: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    ACC: tl.constexpr,
):
    """a_c without the true class's own share; 0 outside the mask. Not for TARGET == INDEX, which has none."""
    a = tl.full(mask.shape, uniform, ACC)
    if TARGET == PROBABILITIES:
        a += tl.load(p_row[:, None] + (c * p_class)[None, :], mask=mask, other=0.0).to(ACC) * tl.full((), keep, ACC)
    if HAS_WEIGHT:
        a *= tl.load(weight_ptr + c[None, :], mask=mask, other=0.0)
    return tl.where(mask, a, 0.0)


@triton.jit(do_not_specialize=["rows", "ignore_index"])
def forward_kernel(
    x_ptr,
    p_ptr,
    index_ptr,
    weight_ptr,
    stats_ptr,
    loss_ptr,
    row_weight_ptr,
    rows,
    classes,
    inner,
    x_outer,
    x_class,
    x_inner,
    p_outer,
    p_class,
    p_inner,
    ignore_index,
    keep: tl.float64,
    uniform: tl.float64,
    TARGET: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    ACC: tl.constexpr,
    ROWS: tl.constexpr,
    CLASSES: tl.constexpr,
):
    tiles = tl.cdiv(inner, ROWS)
    outer = tl.program_id(0).to(tl.int64) // tiles
    i = tl.program_id(0).to(tl.int64) % tiles * ROWS + tl.arange(0, ROWS)
    in_range = i < inner
    row = outer * inner + i
    x_row = x_ptr + outer * x_outer + i * x_inner
    p_row = p_ptr + outer * p_outer + i * p_inner

    top = tl.full((ROWS,), float("-inf"), ACC)
    total = tl.zeros((ROWS,), ACC)  # of e^(x_c - reference(top))
    weight = tl.zeros((ROWS,), ACC)  # of a_c
    dot = tl.zeros((ROWS,), ACC)  # of a_c (x_c - reference(top))
    for first in range(0, classes, CLASSES):
        c = first + tl.arange(0, CLASSES).to(tl.int64)
        mask = in_range[:, None] & (c < classes)[None, :]
        x = tl.load(x_row[:, None] + (c * x_class)[None, :], mask=mask, other=float("-inf")).to(ACC)
        new_top = tl.maximum(top, tl.max(x, 1))
        fall = _reference(top) - _reference(new_top)
        below = x - _reference(new_top)[:, None]
        rest = tl.where(top == float("-inf"), 0.0, tl.exp(fall))
        total = total * rest + tl.sum(tl.exp(below), 1)
        if TARGET != INDEX:
            a = _class_weights(p_row, weight_ptr, c, mask, p_class, keep, uniform, TARGET, HAS_WEIGHT, ACC)
            dot += weight * fall + tl.sum(tl.where(mask, a * below, 0.0), 1)
            weight += tl.sum(a, 1)
        top = new_top

    total = tl.where(top == float("-inf"), float("nan"), total)  # nothing but -inf has no softmax
    log_total = tl.log(total)
    loss = weight * log_total - dot
    row_weight = tl.full((ROWS,), 1.0, ACC)
    if TARGET != PROBABILITIES:
        t = tl.load(index_ptr + row, mask=in_range, other=0)
        counts = in_range & (t != ignore_index)
        valid = (t >= 0) & (t < classes)
        tl.device_assert(valid | ~counts, "Target is out of bounds.")
        x_true = tl.load(x_row + t * x_class, mask=counts & valid, other=0.0).to(ACC)
        if HAS_WEIGHT:
            row_weight = tl.load(weight_ptr + t, mask=counts & valid, other=0.0)
        true_weight = row_weight * tl.full((), keep, ACC)
        loss += true_weight * (top - x_true + log_total)
        # An ignored row's logits do not count, whatever they are.
        loss = tl.where(counts, loss, 0.0)
        top = tl.where(counts, top, 0.0)
        total = tl.where(counts, total, 1.0)
        weight = tl.where(counts, weight + true_weight, 0.0)
        row_weight = tl.where(counts, row_weight, 0.0)
    tl.store(loss_ptr + row, loss, mask=in_range)
    tl.store(row_weight_ptr + row, row_weight, mask=in_range)
    tl.store(stats_ptr + row, top, mask=in_range)
    tl.store(stats_ptr + rows + row, total, mask=in_range)
    tl.store(stats_ptr + tl.full((), 2, tl.int64) * rows + row, weight, mask=in_range)


@triton.jit(do_not_specialize=["rows", "grad_row", "ignore_index"])
def backward_kernel(
    grad_ptr,
    x_ptr,
    p_ptr,
    index_ptr,
    weight_ptr,
    stats_ptr,
    grad_x_ptr,
    rows,
    classes,
    inner,
    grad_row,
    x_outer,
    x_class,
    x_inner,
    p_outer,
    p_class,
    p_inner,
    grad_x_outer,
    grad_x_class,
    grad_x_inner,
    ignore_index,
    keep: tl.float64,
    uniform: tl.float64,
    TARGET: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    ACC: tl.constexpr,
    ROWS: tl.constexpr,
    CLASSES: tl.constexpr,
):
    blocks = tl.cdiv(classes, CLASSES)
    tiles = tl.cdiv(inner, ROWS)
    tile = tl.program_id(0).to(tl.int64) // blocks
    outer = tile // tiles
    i = tile % tiles * ROWS + tl.arange(0, ROWS)
    c = tl.program_id(0).to(tl.int64) % blocks * CLASSES + tl.arange(0, CLASSES)
    in_range = i < inner
    mask = in_range[:, None] & (c < classes)[None, :]
    row = outer * inner + i
    p_row = p_ptr + outer * p_outer + i * p_inner

    g = tl.load(grad_ptr + row * grad_row, mask=in_range, other=0.0)
    top = tl.load(stats_ptr + row, mask=in_range, other=0.0)
    total = tl.load(stats_ptr + rows + row, mask=in_range, other=1.0)
    weight = tl.load(stats_ptr + tl.full((), 2, tl.int64) * rows + row, mask=in_range, other=0.0)
    x = tl.load(x_ptr + outer * x_outer + (i * x_inner)[:, None] + (c * x_class)[None, :], mask=mask, other=0.0)
    grad = tl.exp(x.to(ACC) - _reference(top)[:, None]) / total[:, None] * weight[:, None]
    if TARGET != INDEX:
        grad -= _class_weights(p_row, weight_ptr, c, mask, p_class, keep, uniform, TARGET, HAS_WEIGHT, ACC)
    if TARGET != PROBABILITIES:
        t = tl.load(index_ptr + row, mask=in_range, other=0)
        counts = in_range & (t != ignore_index)
        valid = (t >= 0) & (t < classes)
        tl.device_assert(valid | ~counts, "Target is out of bounds.")
        true_weight = tl.full((ROWS,), keep, ACC)
        if HAS_WEIGHT:
            true_weight *= tl.load(weight_ptr + t, mask=counts & valid, other=0.0)
        grad -= tl.where(c[None, :] == t[:, None], true_weight[:, None], 0.0)
        grad = tl.where(counts[:, None], grad * g[:, None], 0.0)
    else:
        grad *= g[:, None]
    grad_x = grad_x_ptr + outer * grad_x_outer + (i * grad_x_inner)[:, None] + (c * grad_x_class)[None, :]
    tl.store(grad_x, grad.to(grad_x_ptr.dtype.element_ty), mask=mask)


# ---- one call ----


def _array(tensor: Tensor) -> Tensor | None:
    """The tensor as (outer, classes, inner); None where its strides do not allow it."""
    if tensor.dim() == 1:
        return tensor.view(1, -1, 1)
    if tensor.dim() == 2:
        return tensor.T.unsqueeze(0)
    try:
        return tensor.view(*tensor.shape[:2], math.prod(tensor.shape[2:]))
    except RuntimeError:
        return None


def _gathered(tensor: Tensor) -> Tensor:
    array = _array(tensor)
    if array is None:
        array = _array(tensor.contiguous())
    assert array is not None
    return array


class _Call:
    """The arguments that both kernels take, checked."""

    def __init__(
        self,
        op: str,
        input: Tensor,
        target: Tensor,
        weight: Tensor | None,
        reduction: int,
        ignore_index: int,
        label_smoothing: float,
    ) -> None:
        check_dtype(input, op, "input")
        check(input.dim() >= 1, f"{op}: input has no dimensions")
        check(reduction in (NONE, MEAN, SUM), f"{op}: reduction is {reduction}, expected 0, 1 or 2")
        check(not label_smoothing > 1, f"{op}: label_smoothing is {label_smoothing}, expected at most 1")
        self.accumulator = accumulator_dtype(input)
        self.x = self.p = _gathered(input)
        self.outer, self.classes, self.inner = self.x.shape
        self.rows = self.outer * self.inner
        self.ignore_index = ignore_index
        smoothing = max(label_smoothing, 0.0)
        self.keep, self.uniform = 1 - smoothing, smoothing / max(self.classes, 1)
        self.index = self.x  # not read where there are probabilities
        if target.dtype in (torch.int64, torch.uint8):
            self.target = SMOOTHED if smoothing > 0 else INDEX
            check(
                target.numel() == self.rows,
                f"{op}: target has shape {list(target.shape)}, expected {self.rows} class indices for input "
                f"{list(input.shape)}",
            )
            self.index = target.to(torch.int64).contiguous()
            if self.index.is_cpu:  # the interpreter's; a GPU asserts in the kernel, as native torch does there
                bad = self.index[(self.index != ignore_index) & ((self.index < 0) | (self.index >= self.classes))]
                if bad.numel() > 0:
                    raise IndexError(f"Target {bad[0].item()} is out of bounds.")
        else:
            self.target = PROBABILITIES
            check_same_dtype(target, input, op, "target")
            check_same_shape(target, input, op, "target")
            self.p = _gathered(target)
        self.weight = weight
        if weight is not None:
            check_same_dtype(weight, input, op, "weight")
            check(
                weight.shape == (self.classes,),
                f"{op}: weight has shape {list(weight.shape)}, expected [{self.classes}]",
            )
            self.weight = weight.to(self.accumulator).contiguous()
        self.constants = {"TARGET": self.target, "HAS_WEIGHT": weight is not None, "ACC": accumulator(input)}
        classes = triton.next_power_of_2(max(self.classes, 1))
        if self.x.stride(2) == 1 and self.x.stride(1) != 1:
            rows = min(POSITIONS, triton.next_power_of_2(max(self.inner, 1)) if input.dim() > 2 else POSITIONS)
            classes = min(classes, TILE // rows)
        else:
            classes = min(classes, TILE)
            rows = min(MAX_ROWS, TILE // classes)
        self.constants |= {"ROWS": rows, "CLASSES": classes}
        self.tiles = self.outer * triton.cdiv(self.inner, rows)
        self.blocks = triton.cdiv(self.classes, classes)


def cross_entropy(
    input: Tensor, target: Tensor, weight: Tensor | None, reduction: int, ignore_index: int, label_smoothing: float
) -> tuple[Tensor, Tensor]:
    call = _Call("cross_entropy", input, target, weight, reduction, ignore_index, label_smoothing)
    stats = input.new_empty(3 * call.rows + 1, dtype=call.accumulator)
    losses = input.new_empty(call.rows, dtype=call.accumulator)
    row_weights = torch.empty_like(losses)
    if call.rows > 0:
        forward_kernel[(call.tiles,)](
            call.x,
            call.p,
            call.index,
            call.weight,
            stats,
            losses,
            row_weights,
            call.rows,
            call.classes,
            call.inner,
            *call.x.stride(),
            *call.p.stride(),
            call.ignore_index,
            call.keep,
            call.uniform,
            **call.constants,
            **ASSERTING,
        )
    total_weight = row_weights.sum(dtype=torch.float64)
    stats[-1] = total_weight
    if reduction == NONE:
        return losses.to(input.dtype).view(input.shape[:1] + input.shape[2:] if input.dim() > 1 else ()), stats
    loss = losses.sum(dtype=torch.float64)
    return (loss / total_weight if reduction == MEAN else loss).to(input.dtype), stats


def cross_entropy_backward(
    grad_output: Tensor,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    stats: Tensor,
    reduction: int,
    ignore_index: int,
    label_smoothing: float,
) -> Tensor:
    op = "cross_entropy_backward"
    call = _Call(op, input, target, weight, reduction, ignore_index, label_smoothing)
    check_same_dtype(grad_output, input, op, "grad_output")
    check(
        grad_output.numel() == (call.rows if reduction == NONE else 1),
        f"{op}: grad_output has shape {list(grad_output.shape)}",
    )
    check(
        stats.shape == (3 * call.rows + 1,) and stats.dtype is call.accumulator and stats.is_contiguous(),
        f"{op}: stats is not what cross_entropy returned",
    )
    grad_rows = grad_output.to(call.accumulator).contiguous()
    if reduction == MEAN:
        grad_rows = grad_rows / stats[-1]
    grad_input = torch.empty_like(input)
    if input.numel() == 0:
        return grad_input
    grad_x = _array(grad_input)
    if grad_x is None:
        grad_input = torch.empty_like(input, memory_format=torch.contiguous_format)
        grad_x = _gathered(grad_input)
    backward_kernel[(call.tiles * call.blocks,)](
        grad_rows,
        call.x,
        call.p,
        call.index,
        call.weight,
        stats,
        grad_x,
        call.rows,
        call.classes,
        call.inner,
        int(reduction == NONE),
        *call.x.stride(),
        *call.p.stride(),
        *grad_x.stride(),
        call.ignore_index,
        call.keep,
        call.uniform,
        **call.constants,
        **ASSERTING,
    )
    return grad_input
