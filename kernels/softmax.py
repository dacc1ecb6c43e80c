"""Softmax with its scale, mask and causality: forward and backward.

    logits = scale * x + mask;  y = exp(logits - max(logits)) / sum(exp(logits - max(logits)))
    dx = scale * y * (grad_y - sum(grad_y * y))

A row that fits one program's registers is read once. A wider one is read twice, in blocks of columns: the first time for
its maximum and sum together (Milakov and Gimelshein 2018, "Online normalizer calculation for softmax"), or backward for
sum(grad_y * y); the second time mostly from L2. A mask is read where it lies: broadcast dimensions have stride 0.
"""

import itertools
import math
from collections.abc import Callable, Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastbert.kernels import _configs
from fastbert.kernels._launch import AotCase, as_rows, check_device, check_tensors, device_of, launch
from fastbert.kernels._rows import DTYPE_NAMES, blocked, meta_tensor

_VARYING = ["rows", "queries", "size_1", "size_2", "size_3"]

_LOG2E: tl.constexpr = tl.constexpr(math.log2(math.e))
_LOWEST: tl.constexpr = tl.constexpr(torch.finfo(torch.float32).min)

#: Groups of leading dimensions of a mask that its strides keep apart; a mask with more of them is copied.
_MASK_LEVELS = 4

#: Rows are counted in 32 bits, a tile past the end included.
_MAX_ROWS = 2**31 - 2**16


@triton.jit
def _logits_tile(
    x, mask, row, mask_row, first_column,
    rows, columns, queries, x_stride, mask_column_stride, scale,
    CAUSAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """scale * x + mask for a tile [ROWS, BLOCK], float32; -inf where nothing is kept and out of bounds."""
    column = first_column + tl.arange(0, BLOCK)
    keep = (row < rows)[:, None] & (column < columns)[None, :]
    read = keep
    if CAUSAL:  # beyond the diagonal nothing is read, in steps of 16 that leave accesses wide
        query = row % queries
        read = keep & ((column // 16)[None, :] <= (query // 16)[:, None])
        keep = keep & (column[None, :] <= query[:, None])
    x_offsets = row.to(tl.int64)[:, None] * x_stride + column[None, :]
    value = tl.load(x + x_offsets, mask=read, other=0.0).to(tl.float32) * scale
    if mask is not None:
        offsets = mask_row[:, None] + column.to(tl.int64)[None, :] * mask_column_stride
        if mask.dtype.element_ty == tl.uint8:
            keep = keep & (tl.load(mask + offsets, mask=read, other=0) != 0)
        else:
            value += tl.load(mask + offsets, mask=read, other=0.0).to(tl.float32)
    return tl.where(keep, value, float("-inf"))


@triton.jit(do_not_specialize=_VARYING)
def _forward_kernel(
    x,  # [rows, columns]
    mask,  # uint8 (0 = masked) or additive, by its strides, or None
    y,  # [rows, columns] contiguous, written
    rows, columns, queries, x_stride,
    size_1, size_2, size_3,  # a row's index is (i_0, i_1, i_2, i_3) in [any, size_1, size_2, size_3]
    mask_stride_0: tl.int64, mask_stride_1: tl.int64, mask_stride_2: tl.int64, mask_stride_3: tl.int64,
    mask_column_stride, scale,
    CAUSAL: tl.constexpr, WHOLE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid: tiles of rows. WHOLE: a tile holds whole rows."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)  # 32 bits: long divisions would take a third of the registers
    out_row = row.to(tl.int64) * columns
    mask_row = out_row
    if mask is not None:
        rest = row // size_3
        mask_row = (row % size_3) * mask_stride_3
        mask_row += (rest % size_2) * mask_stride_2
        rest = rest // size_2
        mask_row += (rest % size_1) * mask_stride_1 + (rest // size_1) * mask_stride_0
    # The lowest number stands for a maximum of -inf, so that a row with nothing to keep has exp(-inf) = 0 everywhere. A NaN
    # reaches every element through the sum, and so does +inf, by inf - inf.
    if WHOLE:
        tile = _logits_tile(
            x, mask, row, mask_row, 0, rows, columns, queries, x_stride, mask_column_stride, scale, CAUSAL, BLOCK
        )
        maximum = tl.maximum(tl.max(tile, axis=1), _LOWEST)
        exponential = tl.exp2((tile - maximum[:, None]) * _LOG2E)
        total = tl.sum(exponential, axis=1)
        factor = 1.0 / tl.where(total == 0.0, 1.0, total)
        column = tl.arange(0, BLOCK)
        in_bounds = (row < rows)[:, None] & (column < columns)[None, :]
        out = exponential * factor[:, None]
        tl.store(y + out_row[:, None] + column[None, :], out.to(y.dtype.element_ty), mask=in_bounds)
    else:
        tl.static_assert(ROWS == 1, "blocks of columns are of one row")
        last_column = columns
        if CAUSAL:
            last_column = tl.minimum(columns, (tl.program_id(0) % queries) + 1)
        maximum = tl.full([ROWS], _LOWEST, tl.float32)
        sums = tl.zeros([ROWS, BLOCK], tl.float32)
        for first_column in range(0, last_column, BLOCK):
            tile = _logits_tile(
                x, mask, row, mask_row, first_column,
                rows, columns, queries, x_stride, mask_column_stride, scale, CAUSAL, BLOCK,
            )  # fmt: skip
            new_maximum = tl.maximum(maximum, tl.max(tile, axis=1))
            sums = sums * tl.exp2((maximum - new_maximum) * _LOG2E)[:, None]
            sums += tl.exp2((tile - new_maximum[:, None]) * _LOG2E)
            maximum = new_maximum
        total = tl.sum(sums, axis=1)
        factor = 1.0 / tl.where(total == 0.0, 1.0, total)
        for first_column in range(0, columns, BLOCK):
            tile = _logits_tile(
                x, mask, row, mask_row, first_column,
                rows, columns, queries, x_stride, mask_column_stride, scale, CAUSAL, BLOCK,
            )  # fmt: skip
            out = tl.exp2((tile - maximum[:, None]) * _LOG2E) * factor[:, None]
            column = first_column + tl.arange(0, BLOCK)
            offsets = out_row[:, None] + column[None, :]
            tl.store(y + offsets, out.to(y.dtype.element_ty), mask=(column < columns)[None, :])


def softmax(
    x: Tensor,  # [..., rows, columns] (rows may be missing unless causal)
    mask: Tensor | None,  # broadcastable to x: bool, True = keep, or additive
    scale: float,
    causal: bool,  # row i keeps columns j <= i
) -> Tensor:
    """y like x, contiguous; zeros in a row with nothing to keep.

    A float64 mask is rounded to float32. A mask that broadcasts alternate dimensions of an x of six or more is copied; any
    other is read by its strides. Raises ValueError for a tensor that is not on the kernels' device and for more than
    2**31 - 2**16 rows, TypeError for a dtype.
    """
    check_tensors("softmax", x=x)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel() == 0:
        return y
    columns = x.shape[-1]
    x_rows = as_rows(x, columns)
    rows = x_rows.shape[0]
    sizes, strides, column_stride = [1] * (_MASK_LEVELS - 1), [0] * _MASK_LEVELS, 0
    if mask is not None:
        mask = _readable(mask)
        mask, sizes, strides, column_stride = _mask_levels(mask, x.shape)
    if rows > _MAX_ROWS:
        raise ValueError(f"softmax: {rows} rows; the Triton kernel takes at most {_MAX_ROWS}. Call it on parts.")
    line = _configs.row_tile("softmax", min(columns, _configs.MAX_WIDTH), device_of(x))
    block, tile_rows = blocked(columns, line)
    launch(
        _forward_kernel, (triton.cdiv(rows, tile_rows),), x,
        x_rows, mask, y, rows, columns, x.shape[-2] if x.dim() > 1 else 1, x_rows.stride(0),
        *sizes, *strides, column_stride, scale,
        num_warps=line.num_warps, CAUSAL=causal, WHOLE=columns <= block, ROWS=tile_rows, BLOCK=block,
    )  # fmt: skip
    return y


def _readable(mask: Tensor) -> Tensor:
    """A mask as the kernel reads it: bool as uint8, float64 as float32."""
    check_device("softmax", "mask", mask)
    if mask.dtype is torch.bool:
        return mask.view(torch.uint8)
    if mask.dtype is torch.float64:
        mask = mask.to(torch.float32)
    check_tensors("softmax", mask=mask)
    return mask


def _mask_levels(mask: Tensor, shape: torch.Size) -> tuple[Tensor, list[int], list[int], int]:
    """(the mask, sizes of the levels but the first, strides of the levels, stride of columns).

    Neighbouring dimensions that one stride covers are one level, broadcast ones among them.
    """
    expanded = mask.expand(shape)
    levels: list[tuple[int, int]] = []  # (size, stride), the last first
    for size, stride in zip(reversed(shape[:-1]), reversed(expanded.stride()[:-1]), strict=True):
        if size == 1:
            continue
        if levels and stride == levels[-1][0] * levels[-1][1]:
            levels[-1] = (levels[-1][0] * size, levels[-1][1])
        else:
            levels.append((size, stride))
    if len(levels) > _MASK_LEVELS:
        return _mask_levels(expanded.contiguous(), shape)
    levels += [(1, 0)] * (_MASK_LEVELS - len(levels))
    sizes = [size for size, _ in reversed(levels)]
    return mask, sizes[1:], [stride for _, stride in reversed(levels)], expanded.stride(-1)


@triton.jit(do_not_specialize=["rows"])
def _backward_kernel(
    grad_y,  # [rows, columns]
    y,  # [rows, columns]
    dx,  # [rows, columns] contiguous, written
    rows, columns, grad_stride, y_stride, scale,
    WHOLE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid: tiles of rows. WHOLE: a tile holds whole rows."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    in_rows = (row < rows)[:, None]
    column = tl.arange(0, BLOCK)
    grad_rows = grad_y + row[:, None] * grad_stride
    y_rows = y + row[:, None] * y_stride
    dx_rows = dx + row[:, None] * columns
    if WHOLE:
        in_bounds = in_rows & (column < columns)[None, :]
        gradient = tl.load(grad_rows + column[None, :], mask=in_bounds, other=0.0).to(tl.float32)
        value = tl.load(y_rows + column[None, :], mask=in_bounds, other=0.0).to(tl.float32)
        dot = tl.sum(gradient * value, axis=1)
        out = scale * value * (gradient - dot[:, None])
        tl.store(dx_rows + column[None, :], out.to(dx.dtype.element_ty), mask=in_bounds)
    else:
        tl.static_assert(ROWS == 1, "blocks of columns are of one row")
        dots = tl.zeros([ROWS, BLOCK], tl.float32)
        for first_column in range(0, columns, BLOCK):
            in_bounds = (first_column + column < columns)[None, :]
            gradient = tl.load(grad_rows + first_column + column[None, :], mask=in_bounds, other=0.0).to(tl.float32)
            value = tl.load(y_rows + first_column + column[None, :], mask=in_bounds, other=0.0).to(tl.float32)
            dots += gradient * value
        dot = tl.sum(dots, axis=1)
        for first_column in range(0, columns, BLOCK):
            in_bounds = (first_column + column < columns)[None, :]
            gradient = tl.load(grad_rows + first_column + column[None, :], mask=in_bounds, other=0.0).to(tl.float32)
            value = tl.load(y_rows + first_column + column[None, :], mask=in_bounds, other=0.0).to(tl.float32)
            out = scale * value * (gradient - dot[:, None])
            tl.store(dx_rows + first_column + column[None, :], out.to(dx.dtype.element_ty), mask=in_bounds)


def softmax_backward(
    grad_y: Tensor,  # [..., columns]
    y: Tensor,  # [..., columns]
    scale: float,
) -> Tensor:
    """dx like y, contiguous. Raises as `softmax` does."""
    check_tensors("softmax_backward", grad_y=grad_y, y=y)
    dx = torch.empty(y.shape, dtype=y.dtype, device=y.device)
    if y.numel() == 0:
        return dx
    columns = y.shape[-1]
    grad_rows, y_rows = as_rows(grad_y, columns), as_rows(y, columns)
    line = _configs.row_tile("softmax_backward", min(columns, _configs.MAX_WIDTH), device_of(y))
    block, tile_rows = blocked(columns, line)
    rows = y_rows.shape[0]
    launch(
        _backward_kernel, (triton.cdiv(rows, tile_rows),), y,
        grad_rows, y_rows, dx, rows, columns, grad_rows.stride(0), y_rows.stride(0), scale,
        num_warps=line.num_warps, WHOLE=columns <= block, ROWS=tile_rows, BLOCK=block,
    )  # fmt: skip
    return dx


# -------------------------------------------------------------------------------------------------------- ahead of time


def aot_cases() -> Iterator[AotCase]:
    """What is compiled ahead of time: every line of the tables in each dtype and alignment; masks at one width."""
    widths = sorted({128} | _configs.row_tile_widths("softmax", "softmax_backward"))
    for columns, (dtype, name), aligned in itertools.product(widths, DTYPE_NAMES.items(), (True, False)):
        width = columns if aligned else columns - 1
        x = meta_tensor(4, 16, width, dtype=dtype, aligned=aligned)
        sample = (columns, name, aligned) in ((128, "bf16", True), (_configs.MAX_WIDTH, "fp16", False))
        calls: dict[str, Callable[[], object]] = {
            "softmax": lambda x=x: softmax(x, None, 0.125, False),
            "softmax_backward": lambda x=x: softmax_backward(x, x, 0.125),
        }
        if columns in (128, _configs.MAX_WIDTH):
            keep = meta_tensor(4, 1, width, dtype=torch.bool)
            calls["softmax-bool"] = lambda x=x, keep=keep: softmax(x, keep, 0.125, False)
            calls["softmax-additive-causal"] = lambda x=x: softmax(x, x[0], 0.125, True)
        for call_name, call in calls.items():
            operation, _, variant = call_name.partition("-")
            parts = [operation, f"w{width}", name, variant, "" if aligned else "unaligned"]
            yield AotCase("-".join(filter(None, parts)), call, sample)
