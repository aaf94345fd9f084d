"""2-D convolution and its gradients, as implicit matrix products: nothing is unfolded in memory.

Two kernels serve the three passes:
    conv_kernel         out[n, m, y, x] = bias[m] + sum over c, r, q of weight[m, c, r, q] * source[n, c, row, col]
                        forward: row = y * stride - padding + r * dilation, zero outside the input (columns alike).
                        gradient of the input: the source is the output's gradient, weight's first two dimensions are
                        exchanged, and row = (y + padding - r * dilation) / stride where that divides without remainder.
    grad_weight_kernel  grad_weight[m, c, r, q] = sum over n, y, x of grad[n, m, y, x] * input[n, c, row, col]
A ReLU behind the convolution is applied to the sums; a max-pool behind that is a kernel of its own, which leaves a byte
per result that says which element of its window it was. Backward undoes the two in kernels of their own first.

Blocking: a program has ROWS positions of one image by COLUMNS channels of one group, and walks along taps and channels,
the channels innermost, DEPTH at a time. In the gradient of the weight it has channels by taps and channels, and walks
along a slice of all positions; the slices are cut by shape alone and added up in order, so the bits are the
same every time.
Operations: 2 N H' W' K C/groups R S a pass, on matrix units where tl.dot takes the operands. Bytes: every operand once
from memory where the caches hold a block's surroundings, its taps from the caches. A strided convolution's gradient of
the input multiplies stride_h * stride_w times as much, mostly by zeros.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastnn.ops.conv2d import _memory_format, is_countable, output_size
from fastnn.triton import is_interpreted
from fastnn.triton.arguments import (
    accumulator,
    accumulator_dtype,
    check,
    check_dim,
    check_dtype,
    check_same_dtype,
    check_same_shape,
)
from fastnn.triton.relu import relu_backward

Ints = list[int]

# Blocks of tl.dot: rows, columns (at most), and what is reduced at a time. 64 x 64 float32 sums are 32 registers a
# thread at 4 warps, and two blocks of operands some 16 KiB of shared memory: several programs fit a multiprocessor.
ROWS, MAX_COLUMNS, DEPTH = 64, 64, 32
MIN_COLUMNS = 16  # tl.dot takes no fewer, nor float64 on many GPUs: these are multiplied and added element by element
SUMS, SHALLOW = 512, 8  # then: rows * columns, and what is reduced at a time; the product of both is in registers
# The interpreter's cost is one of steps, not of elements.
INTERPRETED_ROWS, INTERPRETED_DEPTH = 256, 128
# The gradient of the weight: programs enough for the largest GPUs, and memory for all the slices.
PROGRAMS, SLICE_BYTES = 512, 64 << 20
BLOCK = 1024  # elements of a program of the pooling kernels

POOL_NONE = tl.constexpr(255)  # the code of a pooled output that ReLU zeroed: no element of its window gets a gradient


@triton.jit
def _multiply_add(a, b, a_mask, b_mask, sums, DOT: tl.constexpr, PRECISION: tl.constexpr):
    """sums + a @ b, of which matrix units multiply the zeros outside of the masks too: there 0 * inf is NaN."""
    if DOT:
        return tl.dot(a, b, sums, input_precision=PRECISION)
    products = a.to(sums.dtype)[:, :, None] * b.to(sums.dtype)[None, :, :]
    return sums + tl.sum(tl.where(a_mask[:, :, None] & b_mask[None, :, :], products, 0.0), 1)


@triton.jit
def _gather(base, row_stride, col_stride, row, col, height, width, mask):
    """The elements at (row, col) of a plane, 0 outside the plane and the mask; and which are inside both."""
    inside = mask & (row >= 0) & (row < height) & (col >= 0) & (col < width)
    at = base + row.to(tl.int64) * row_stride + col.to(tl.int64) * col_stride
    return tl.load(at, mask=inside, other=0.0), inside


@triton.jit
def conv_kernel(
    source_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    groups,
    group_channels,
    group_results,
    height,  # of the source
    width,
    out_height,
    out_width,
    kernel_h,
    kernel_w,
    multiply_h,  # row = (y * multiply_h + offset_h + r * tap_h) / divide_h
    multiply_w,
    offset_h,
    offset_w,
    tap_h,
    tap_w,
    divide_h,
    divide_w,
    source_n,  # strides, from here on
    source_c,
    source_h,
    source_w,
    weight_group,
    weight_m,
    weight_c,
    weight_h,
    weight_w,
    bias_m,
    out_n,
    out_c,
    out_h,
    out_w,
    HAS_BIAS: tl.constexpr,
    RELU: tl.constexpr,
    ACC: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    positions = out_height * out_width
    position_blocks = tl.cdiv(positions, ROWS)
    result_blocks = tl.cdiv(group_results, COLUMNS)
    pid = tl.program_id(0)
    p = pid % position_blocks * ROWS + tl.arange(0, ROWS)
    pid = pid // position_blocks
    m = pid % result_blocks * COLUMNS + tl.arange(0, COLUMNS)
    pid = pid // result_blocks
    group = (pid % groups).to(tl.int64)
    n = (pid // groups).to(tl.int64)
    y, x = p // out_width, p % out_width
    source_ptr += n * source_n + group * group_channels * source_c
    weight_ptr += group * weight_group

    sums = tl.zeros((ROWS, COLUMNS), ACC)
    depth = kernel_h * kernel_w * group_channels
    for first in range(0, depth, DEPTH):
        d = first + tl.arange(0, DEPTH)
        tap, c = d // group_channels, (d % group_channels).to(tl.int64)
        r, q = tap // kernel_w, tap % kernel_w
        row = (y * multiply_h + offset_h)[:, None] + (r * tap_h)[None, :]
        col = (x * multiply_w + offset_w)[:, None] + (q * tap_w)[None, :]
        mask = (p < positions)[:, None] & (d < depth)[None, :]
        mask &= (row >= 0) & (row % divide_h == 0) & (col >= 0) & (col % divide_w == 0)
        row, col = row // divide_h, col // divide_w
        channel = source_ptr + (c * source_c)[None, :]
        a, a_mask = _gather(channel, source_h, source_w, row, col, height, width, mask)
        of_tap = c * weight_c + r.to(tl.int64) * weight_h + q.to(tl.int64) * weight_w
        of_m = m.to(tl.int64) * weight_m
        b_mask = (d < depth)[:, None] & (m < group_results)[None, :]
        b = tl.load(weight_ptr + of_tap[:, None] + of_m[None, :], mask=b_mask, other=0.0)
        sums = _multiply_add(a, b, a_mask, b_mask, sums, DOT, PRECISION)

    m = group * group_results + m
    valid = m < (group + 1) * group_results
    if HAS_BIAS:
        sums += tl.load(bias_ptr + m * bias_m, mask=valid, other=0.0).to(ACC)[None, :]
    if RELU:
        sums = tl.where(sums < 0, 0.0, sums)  # NaN stays
    out = out_ptr + n * out_n + (y.to(tl.int64) * out_h + x.to(tl.int64) * out_w)[:, None] + (m * out_c)[None, :]
    tl.store(out, sums.to(out_ptr.dtype.element_ty), mask=(p < positions)[:, None] & valid[None, :])


@triton.jit
def grad_weight_kernel(
    grad_ptr,
    input_ptr,
    partial_ptr,  # [slices][groups * group_results][taps * group_channels], the channels innermost
    batch,
    groups,
    group_channels,
    group_results,
    height,
    width,
    out_height,
    out_width,
    kernel_h,
    kernel_w,
    stride_h,
    stride_w,
    pad_top,
    pad_left,
    dilation_h,
    dilation_w,
    slice_blocks,  # blocks of positions in a slice
    grad_n,  # strides, from here on
    grad_c,
    grad_h,
    grad_w,
    input_n,
    input_c,
    input_h,
    input_w,
    ACC: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    depth = kernel_h * kernel_w * group_channels
    row_blocks = tl.cdiv(group_results, ROWS)
    column_blocks = tl.cdiv(depth, COLUMNS)
    pid = tl.program_id(0)
    m = pid % row_blocks * ROWS + tl.arange(0, ROWS)
    pid = pid // row_blocks
    d = pid % column_blocks * COLUMNS + tl.arange(0, COLUMNS)
    pid = pid // column_blocks
    group = (pid % groups).to(tl.int64)
    slice = pid // groups
    tap, c = d // group_channels, (d % group_channels).to(tl.int64)
    r, q = tap // kernel_w, tap % kernel_w
    grad_ptr += group * group_results * grad_c
    input_ptr += group * group_channels * input_c

    sums = tl.zeros((ROWS, COLUMNS), ACC)
    positions = out_height * out_width
    position_blocks = tl.cdiv(positions, DEPTH)
    first = slice * slice_blocks
    last = tl.minimum(first + slice_blocks, batch * position_blocks)
    for block in range(first, last):
        n = (block // position_blocks).to(tl.int64)
        p = block % position_blocks * DEPTH + tl.arange(0, DEPTH)
        y, x = p // out_width, p % out_width
        of_position = n * grad_n + y.to(tl.int64) * grad_h + x.to(tl.int64) * grad_w
        a_mask = (m < group_results)[:, None] & (p < positions)[None, :]
        a = tl.load(grad_ptr + (m.to(tl.int64) * grad_c)[:, None] + of_position[None, :], mask=a_mask, other=0.0)
        row = (y * stride_h - pad_top)[:, None] + (r * dilation_h)[None, :]
        col = (x * stride_w - pad_left)[:, None] + (q * dilation_w)[None, :]
        mask = (p < positions)[:, None] & (d < depth)[None, :]
        channel = input_ptr + n * input_n + (c * input_c)[None, :]
        b, b_mask = _gather(channel, input_h, input_w, row, col, height, width, mask)
        sums = _multiply_add(a, b, a_mask, b_mask, sums, DOT, PRECISION)
    of_m = ((slice * groups + group) * group_results + m) * depth
    valid = (m < group_results)[:, None] & (d < depth)[None, :]
    tl.store(partial_ptr + of_m[:, None] + d[None, :], sums, mask=valid)


@triton.jit
def _position(i, channels, height, width):
    """(n, c, y, x) of element i of an NCHW tensor."""
    plane = i // (height * width)
    return plane // channels, plane % channels, i // width % height, i % width


@triton.jit
def pool_kernel(
    source_ptr,
    out_ptr,
    code_ptr,
    count,
    channels,
    out_height,
    out_width,
    kernel_h,
    kernel_w,
    stride_h,
    stride_w,
    source_n,
    source_c,
    source_h,
    source_w,
    out_n,
    out_c,
    out_h,
    out_w,
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
):
    """Max-pooling of what ReLU left, and which element of its window each maximum was: NaN wins, then the first."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = i < count
    n, c, y, x = _position(i, channels, out_height, out_width)
    plane = source_ptr + n * source_n + c * source_c
    top = tl.full((BLOCK,), float("-inf"), ACC)
    code = tl.zeros((BLOCK,), tl.int32)
    for element in range(kernel_h * kernel_w):
        row, col = y * stride_h + element // kernel_w, x * stride_w + element % kernel_w
        value = tl.load(plane + row * source_h + col * source_w, mask=mask, other=0.0).to(ACC)
        wins = (value > top) | (value != value)
        top = tl.where(wins, value, top)
        code = tl.where(wins, element, code)
    code = tl.where(top <= 0, POOL_NONE, code)
    at = n * out_n + c * out_c + y * out_h + x * out_w
    tl.store(out_ptr + at, top.to(out_ptr.dtype.element_ty), mask=mask)
    tl.store(code_ptr + at, code.to(tl.uint8), mask=mask)


@triton.jit
def unpool_kernel(
    grad_ptr,
    code_ptr,
    out_ptr,
    count,
    channels,
    height,
    width,
    pooled_height,
    pooled_width,
    kernel_h,
    kernel_w,
    stride_h,
    stride_w,
    grad_n,
    grad_c,
    grad_h,
    grad_w,
    code_n,
    code_c,
    code_h,
    code_w,
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
):
    """The gradient of each of a convolution's results: the sum of those of the windows whose maximum it was."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = i < count
    n, c, y, x = _position(i, channels, height, width)
    sums = tl.zeros((BLOCK,), ACC)
    for j in range(tl.cdiv(kernel_h, stride_h)):
        for k in range(tl.cdiv(kernel_w, stride_w)):
            window_y, window_x = y // stride_h - j, x // stride_w - k
            row, col = y - window_y * stride_h, x - window_x * stride_w
            inside = mask & (window_y >= 0) & (window_y < pooled_height) & (row < kernel_h)
            inside &= (window_x >= 0) & (window_x < pooled_width) & (col < kernel_w)
            code = tl.load(
                code_ptr + n * code_n + c * code_c + window_y * code_h + window_x * code_w, mask=inside, other=POOL_NONE
            )
            chosen = inside & (code.to(tl.int64) == row * kernel_w + col)
            at = n * grad_n + c * grad_c + window_y * grad_h + window_x * grad_w
            sums += tl.load(grad_ptr + at, mask=chosen, other=0.0).to(ACC)
    tl.store(out_ptr + i, sums.to(out_ptr.dtype.element_ty), mask=mask)


# ---- one call ----


class Geometry(NamedTuple):
    """What a convolution's arguments say, checked; padding is (top, left, bottom, right)."""

    output_size: Ints
    stride: Ints
    padding: Ints
    dilation: Ints
    groups: int


def _geometry(
    op: str, input: Tensor, weight: Tensor, stride: Ints, padding: Ints, dilation: Ints, groups: int
) -> Geometry:
    check_dtype(input, op, "input")
    check_dim(input, 4, op, "input")
    check_dim(weight, 4, op, "weight")
    check_same_dtype(weight, input, op, "weight")
    check(
        len(stride) == 2 and len(dilation) == 2 and len(padding) == 4,
        f"{op}: expected 2 values of stride and dilation and 4 of padding, got {len(stride)}, {len(dilation)} and "
        f"{len(padding)}",
    )
    check(
        min(*stride, *dilation, groups) > 0,
        f"{op}: stride, dilation and groups must be positive, got {stride}, {dilation} and {groups}",
    )
    check(min(padding) >= 0, f"{op}: padding must not be negative, got {padding}")
    results, channels, *kernel = weight.shape
    check(
        input.shape[1] == channels * groups and results % groups == 0 and results > 0 and channels > 0,
        f"{op}: input of shape {list(input.shape)}, weight of shape {list(weight.shape)} and groups {groups} do not "
        "fit together",
    )
    check(
        min(kernel) > 0
        and all(input.shape[2 + d] + padding[d] + padding[2 + d] > dilation[d] * (kernel[d] - 1) for d in range(2)),
        f"{op}: weight of shape {list(weight.shape)} is larger than the padded input of shape {list(input.shape)}",
    )
    check(
        is_countable(input.shape, weight.shape, padding),
        f"{op}: input of shape {list(input.shape)} with padding {padding}, or weight of shape {list(weight.shape)}, is "
        "larger than the kernels take",
    )
    size = [input.shape[0], results, *output_size(input.shape, weight.shape, stride, padding, dilation)]
    return Geometry(size, stride, padding, dilation, groups)


def _pooled_size(op: str, size: Ints, kernel: Ints, stride: Ints) -> Ints:
    check(len(kernel) == 2 and len(stride) == 2, f"{op}: expected 2 values of pool_kernel_size and pool_stride")
    check(
        min(*kernel, *stride) > 0
        and kernel[0] <= size[2]
        and kernel[1] <= size[3]
        and kernel[0] * kernel[1] <= POOL_NONE.value,
        f"{op}: pool_kernel_size is {kernel}, pool_stride {stride}, expected a window of 1 to {POOL_NONE.value} "
        f"elements inside {size[2]} x {size[3]}",
    )
    return [*size[:2], *((size[2 + d] - kernel[d]) // stride[d] + 1 for d in range(2))]


def _blocks(tensor: Tensor, columns: int, rows: int | None = None) -> dict[str, Any]:
    """The kernels' constants for so many columns, and so many rows where they are few."""
    dot = tensor.dtype is not torch.float64 and min(columns, rows or columns) >= MIN_COLUMNS
    block = min(triton.next_power_of_2(columns), MAX_COLUMNS if dot else MIN_COLUMNS)
    height, depth = (ROWS, DEPTH) if dot else (SUMS // block, SHALLOW)
    if is_interpreted():
        height, depth = INTERPRETED_ROWS, INTERPRETED_DEPTH
    if rows is not None:
        height = min(triton.next_power_of_2(rows), height)
    # As torch's own convolution; float32 outside of CUDA is what it says. On ROCm tensors are `cuda` too.
    nvidia = tensor.is_cuda and torch.version.hip is None
    tf32 = nvidia and tensor.dtype is torch.float32 and torch._C._get_fp32_precision_getter("cuda", "conv") == "tf32"
    return {
        "ACC": accumulator(tensor),
        "DOT": dot,
        "PRECISION": "tf32" if tf32 else "ieee",
        "ROWS": height,
        "COLUMNS": block,
        "DEPTH": depth,
    }


def _convolve(
    source: Tensor,
    weight: Tensor,  # (group_results, group_channels, kernel_h, kernel_w) of the first group
    weight_group: int,
    bias: Tensor | None,
    out: Tensor,
    geometry: Geometry,
    backward: bool,
    relu: bool,
) -> None:
    groups, kernel = geometry.groups, list(weight.shape[2:])
    top_left = geometry.padding[:2]
    ones = [1, 1]
    if backward:
        coordinates = (*ones, *top_left, *(-d for d in geometry.dilation), *geometry.stride)
    else:
        coordinates = (*geometry.stride, *(-p for p in top_left), *geometry.dilation, *ones)
    results = out.shape[1] // groups
    constants = _blocks(source, results)
    position_blocks = triton.cdiv(out.shape[2] * out.shape[3], constants["ROWS"])
    grid = (out.shape[0] * groups * triton.cdiv(results, constants["COLUMNS"]) * position_blocks,)
    conv_kernel[grid](
        source,
        weight,
        bias,
        out,
        groups,
        source.shape[1] // groups,
        results,
        *source.shape[2:],
        *out.shape[2:],
        *kernel,
        *coordinates,
        *source.stride(),
        weight_group,
        *weight.stride(),
        0 if bias is None else bias.stride(0),
        *out.stride(),
        HAS_BIAS=bias is not None,
        RELU=relu,
        **constants,
    )


def _forward(op: str, input: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, relu: bool) -> Tensor:
    if bias is not None:
        check_same_dtype(bias, input, op, "bias")
        check_dim(bias, 1, op, "bias")
        check(
            bias.shape[0] == weight.shape[0],
            f"{op}: bias has shape {list(bias.shape)}, expected [{weight.shape[0]}]",
        )
    out = torch.empty(
        geometry.output_size, dtype=input.dtype, device=input.device, memory_format=_memory_format(input, weight)
    )
    if out.numel() > 0:
        results = weight.shape[0] // geometry.groups
        _convolve(input, weight[:results], results * weight.stride(0), bias, out, geometry, False, relu)
    return out


def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Ints,
    padding: Ints,
    dilation: Ints,
    groups: int,
    relu: bool,
) -> Tensor:
    geometry = _geometry("conv2d", input, weight, stride, padding, dilation, groups)
    return _forward("conv2d", input, weight, bias, geometry, relu)


def conv2d_relu_max_pool2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Ints,
    padding: Ints,
    dilation: Ints,
    groups: int,
    pool_kernel_size: Ints,
    pool_stride: Ints,
) -> tuple[Tensor, Tensor]:
    op = "conv2d_relu_max_pool2d"
    geometry = _geometry(op, input, weight, stride, padding, dilation, groups)
    size = _pooled_size(op, geometry.output_size, pool_kernel_size, pool_stride)
    source = _forward(op, input, weight, bias, geometry, relu=True)
    memory_format = _memory_format(input, weight)
    out = torch.empty(size, dtype=input.dtype, device=input.device, memory_format=memory_format)
    code = torch.empty(size, dtype=torch.uint8, device=input.device, memory_format=memory_format)
    if out.numel() > 0:
        pool_kernel[(triton.cdiv(out.numel(), BLOCK),)](
            source,
            out,
            code,
            out.numel(),
            *size[1:],
            *pool_kernel_size,
            *pool_stride,
            *source.stride(),
            *out.stride(),
            BLOCK=BLOCK,
            ACC=accumulator(input),
        )
    return out, code


# ---- backward ----


def _unpooled(grad: Tensor, code: Tensor, size: Ints, kernel: Ints, stride: Ints) -> Tensor:
    out = grad.new_empty(size)
    if out.numel() > 0:
        unpool_kernel[(triton.cdiv(out.numel(), BLOCK),)](
            grad,
            code,
            out,
            out.numel(),
            *size[1:],
            *grad.shape[2:],
            *kernel,
            *stride,
            *grad.stride(),
            *code.stride(),
            BLOCK=BLOCK,
            ACC=accumulator(grad),
        )
    return out


def _grad_weight(grad: Tensor, input: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    groups, (results, channels, *kernel) = geometry.groups, weight.shape
    depth = channels * kernel[0] * kernel[1]
    constants = _blocks(input, depth, results // groups)
    tiles = groups * triton.cdiv(results // groups, constants["ROWS"]) * triton.cdiv(depth, constants["COLUMNS"])
    blocks = input.shape[0] * triton.cdiv(grad.shape[2] * grad.shape[3], constants["DEPTH"])
    dtype = accumulator_dtype(input)
    slices = min(blocks, triton.cdiv(PROGRAMS, tiles), max(1, SLICE_BYTES // (results * depth * dtype.itemsize)))
    slice_blocks = triton.cdiv(blocks, slices)
    slices = triton.cdiv(blocks, slice_blocks)
    partial = torch.empty(slices, results, depth, dtype=dtype, device=input.device)
    grad_weight_kernel[(tiles * slices,)](
        grad,
        input,
        partial,
        input.shape[0],
        groups,
        channels,
        results // groups,
        *input.shape[2:],
        *grad.shape[2:],
        *kernel,
        *geometry.stride,
        *geometry.padding[:2],
        *geometry.dilation,
        slice_blocks,
        *grad.stride(),
        *input.stride(),
        **constants,
    )
    taps_first = partial.sum(0).view(results, *kernel, channels)
    return weight.new_empty(weight.shape).copy_(taps_first.permute(0, 3, 1, 2))


def conv2d_backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    relu_output: Tensor | None,
    pool_code: Tensor | None,
    stride: Ints,
    padding: Ints,
    dilation: Ints,
    groups: int,
    pool_kernel_size: Ints,
    pool_stride: Ints,
    output_mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    op = "conv2d_backward"
    geometry = _geometry(op, input, weight, stride, padding, dilation, groups)
    check_same_dtype(grad_output, input, op, "grad_output")
    check_dim(grad_output, 4, op, "grad_output")
    check(len(output_mask) == 3, f"{op}: output_mask has {len(output_mask)} values, expected 3")
    size = geometry.output_size
    if pool_code is not None:
        size = _pooled_size(op, size, pool_kernel_size, pool_stride)
        check_same_shape(pool_code, grad_output, op, "pool_code")
        check(pool_code.dtype is torch.uint8, f"{op}: pool_code has dtype {pool_code.dtype}, expected torch.uint8")
    check(list(grad_output.shape) == size, f"{op}: grad_output has shape {list(grad_output.shape)}, expected {size}")
    of_input, of_weight, of_bias = output_mask
    grad_input, grad_weight, grad_bias = (input.new_empty(0) for _ in range(3))
    if of_input:
        grad_input = torch.empty(
            input.shape, dtype=input.dtype, device=input.device, memory_format=_memory_format(input, weight)
        )
    if grad_output.numel() == 0 or input.numel() == 0:
        if of_weight:
            grad_weight = weight.new_zeros(weight.shape)
        if of_bias:
            grad_bias = weight.new_zeros(weight.shape[0])
        return grad_input.zero_(), grad_weight, grad_bias

    grad = grad_output
    if pool_code is not None:
        grad = _unpooled(grad, pool_code, geometry.output_size, pool_kernel_size, pool_stride)
    elif relu_output is not None:
        check_same_dtype(relu_output, input, op, "relu_output")
        check_same_shape(relu_output, grad_output, op, "relu_output")
        grad = relu_backward(grad, relu_output)
    if of_input:
        results = weight.shape[0] // groups
        _convolve(
            grad, weight[:results].transpose(0, 1), results * weight.stride(0), None, grad_input, geometry, True, False
        )
    if of_weight:
        grad_weight = _grad_weight(grad, input, weight, geometry)
    if of_bias:
        grad_bias = grad.sum((0, 2, 3), dtype=accumulator_dtype(grad)).to(grad.dtype)
    return grad_input, grad_weight, grad_bias
