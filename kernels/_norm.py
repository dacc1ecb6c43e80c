"""The kernels of the norms, forward: layer_norm, add_layer_norm and rms_norm, whose formulas stand in their own files.

rms_norm is layer_norm without the mean, and both are add_layer_norm without a residual, so all run the same kernels: an
argument that is None removes its code. A row that fits one program's registers is read once. A wider one is worked on in
blocks of columns, and a first kernel finds what depends on the whole row: its mean and rstd.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastbert.kernels import _configs
from fastbert.kernels._launch import as_rows, check_seed, check_tensors, device_of, launch
from fastbert.kernels._philox import first_counter, keep_scale, keep_threshold, keep_tile
from fastbert.kernels._rows import blocked, checked_width, dense

# Kernel arguments that differ from call to call must not make a new specialisation of the kernel each.
VARYING = ["rows", "counter", "threshold"]


@triton.jit
def _sum_tile(
    x, residual, x_bias, seed, row, first_column, in_bounds,
    width, x_stride, residual_stride, counter, threshold, scale,
    DROPOUT: tl.constexpr, RUN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """residual + dropout(x + x_bias) for a tile [ROWS, BLOCK], float32; out of bounds, something."""
    column = first_column + tl.arange(0, BLOCK)
    total = tl.load(x + row[:, None] * x_stride + column[None, :], mask=in_bounds, other=0.0).to(tl.float32)
    if x_bias is not None:
        total += tl.load(x_bias + column, mask=column < width, other=0.0).to(tl.float32)[None, :]
    if DROPOUT:
        keep = keep_tile(tl.load(seed), counter, row, first_column, width, threshold, BLOCK, RUN)
        total *= tl.where(keep, scale, 0.0)  # a product, so that what is not finite stays so, as in torch
    if residual is not None:
        offsets = row[:, None] * residual_stride + column[None, :]
        total += tl.load(residual + offsets, mask=in_bounds, other=0.0).to(tl.float32)
    return total


@triton.jit(do_not_specialize=VARYING)
def _row_statistics_kernel(
    x,  # [rows, width]
    residual,  # [rows, width] or None
    x_bias,  # [width] or None
    seed,  # int64 [1] or None
    mean,  # float32 [rows], written, or None: rms_norm
    rstd,  # float32 [rows], written
    rows, width, x_stride, residual_stride, eps,
    counter: tl.int64, threshold: tl.uint32, scale,
    DROPOUT: tl.constexpr, RUN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The statistics of rows too wide for one program's registers, one row a program, in one reading."""
    row = tl.program_id(0) + tl.arange(0, 1).to(tl.int64)
    # Chan, Golub and LeVeque (1979): blocks' means and centred squares combine without the cancellation of sum(x^2).
    row_mean = tl.zeros([1], tl.float32)
    squares = tl.zeros([1], tl.float32)
    for first_column in range(0, width, BLOCK):
        in_row = (first_column + tl.arange(0, BLOCK) < width)[None, :]
        tile = _sum_tile(
            x, residual, x_bias, seed, row, first_column, in_row,
            width, x_stride, residual_stride, counter, threshold, scale,
            DROPOUT, RUN, BLOCK,
        )  # fmt: skip
        tile = tl.where(in_row, tile, 0.0)
        if mean is None:
            squares += tl.sum(tile * tile, axis=1)
        else:
            count = tl.minimum(width - first_column, BLOCK).to(tl.float32)
            block_mean = tl.sum(tile, axis=1) / count
            centred = tl.where(in_row, tile - block_mean[:, None], 0.0)
            correction = tl.sum(centred, axis=1) / count  # the rounding of a large mean, as in _forward_kernel
            block_mean += correction
            centred = tl.where(in_row, centred - correction[:, None], 0.0)
            delta = block_mean - row_mean
            share = count / (first_column + count)
            row_mean += delta * share
            squares += tl.sum(centred * centred, axis=1) + delta * delta * first_column * share
    if mean is not None:
        tl.store(mean + row, row_mean)
    tl.store(rstd + row, tl.rsqrt(squares / width + eps))


@triton.jit(do_not_specialize=VARYING)
def _forward_kernel(
    x,  # [rows, width]
    residual,  # [rows, width] or None
    x_bias,  # [width] or None
    weight,  # [width] or None
    bias,  # [width] or None
    seed,  # int64 [1] or None
    y,  # [rows, width] contiguous, written
    sum_out,  # [rows, width] contiguous, written, or None
    mean,  # float32 [rows], written (read if STATISTICS_GIVEN), or None
    rstd,  # float32 [rows], likewise
    rows, width, x_stride, residual_stride, eps,
    counter: tl.int64, threshold: tl.uint32, scale,
    CENTRED: tl.constexpr, STATISTICS_GIVEN: tl.constexpr, DROPOUT: tl.constexpr,
    RUN: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid: (tiles of rows, blocks of columns); more than one block of columns only with STATISTICS_GIVEN."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    first_column = tl.program_id(1) * BLOCK
    column = first_column + tl.arange(0, BLOCK)
    in_width = column < width
    in_bounds = (row < rows)[:, None] & in_width[None, :]
    tile = _sum_tile(
        x, residual, x_bias, seed, row, first_column, in_bounds,
        width, x_stride, residual_stride, counter, threshold, scale,
        DROPOUT, RUN, BLOCK,
    )  # fmt: skip
    offsets = row[:, None] * width + column[None, :]
    if sum_out is not None:
        tl.store(sum_out + offsets, tile.to(sum_out.dtype.element_ty), mask=in_bounds)

    if STATISTICS_GIVEN:
        row_rstd = tl.load(rstd + row, mask=row < rows, other=0.0)
        centred = tile
        if CENTRED:
            centred -= tl.load(mean + row, mask=row < rows, other=0.0)[:, None]
    else:
        # The sums take only what is in bounds.
        centred = tl.where(in_bounds, tile, 0.0)
        if CENTRED:
            row_mean = tl.sum(centred, axis=1) / width
            centred = tl.where(in_bounds, tile - row_mean[:, None], 0.0)
            # Where the mean is large, its rounding shifts the whole row: the centred row's own mean takes that out.
            correction = tl.sum(centred, axis=1) / width
            row_mean += correction
            centred = tl.where(in_bounds, centred - correction[:, None], 0.0)
            if mean is not None:
                tl.store(mean + row, row_mean, mask=row < rows)
        row_rstd = tl.rsqrt(tl.sum(centred * centred, axis=1) / width + eps)
        if rstd is not None:
            tl.store(rstd + row, row_rstd, mask=row < rows)

    out = centred * row_rstd[:, None]
    if weight is not None:
        out *= tl.load(weight + column, mask=in_width, other=0.0).to(tl.float32)[None, :]
    if bias is not None:
        out += tl.load(bias + column, mask=in_width, other=0.0).to(tl.float32)[None, :]
    tl.store(y + offsets, out.to(y.dtype.element_ty), mask=in_bounds)


def norm_forward(
    operation: str, x: Tensor, residual: Tensor | None, x_bias: Tensor | None,
    weight: Tensor | None, bias: Tensor | None, eps: float,
    dropout_p: float, seed: Tensor | None, offset: int, save_stats: bool, save_sum: bool, centred: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(y, sum, mean, rstd); what is not saved, and the mean of rows that are not centred, is [0]."""
    check_tensors(operation, x=x, residual=residual, x_bias=x_bias, weight=weight, bias=bias)
    width = checked_width(operation, x)
    dropout = dropout_p != 0.0
    seed = check_seed(operation, seed) if dropout else None

    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    sum_out = torch.empty_like(y) if save_sum else None
    rows = x.numel() // width
    device = device_of(x)
    line = _configs.row_tile(operation, width, device)
    block, tile_rows = blocked(width, line)
    blocks = triton.cdiv(width, block)

    mean = rstd = None
    if save_stats or blocks > 1:
        rstd = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
        mean = torch.empty_like(rstd) if centred else None
    if rows:
        x_rows = as_rows(x, width)
        residual_rows = None if residual is None else as_rows(residual, width)
        residual_stride = 0 if residual_rows is None else residual_rows.stride(0)
        scalars = (rows, width, x_rows.stride(0), residual_stride, eps, *dropout_arguments(dropout_p, offset))
        constexprs = dict(DROPOUT=dropout, RUN=run_length(x), BLOCK=block)
        x_bias, weight, bias = dense(x_bias), dense(weight), dense(bias)
        if blocks > 1:
            launch(
                _row_statistics_kernel, (rows,), x, x_rows, residual_rows, x_bias, seed, mean, rstd, *scalars,
                num_warps=line.num_warps, **constexprs,
            )  # fmt: skip
        launch(
            _forward_kernel, (triton.cdiv(rows, tile_rows), blocks), x,
            x_rows, residual_rows, x_bias, weight, bias, seed, y, sum_out, mean, rstd, *scalars,
            num_warps=line.num_warps, CENTRED=centred, STATISTICS_GIVEN=blocks > 1, ROWS=tile_rows, **constexprs,
        )  # fmt: skip
    mean, rstd = (
        x.new_empty(0, dtype=torch.float32) if each is None or not save_stats else each for each in (mean, rstd)
    )
    return y, x.new_empty(0) if sum_out is None else sum_out, mean, rstd


def run_length(x: Tensor) -> int:
    """Elements of a 16-byte access, which is what a thread should hold of dropout's stream (see keep_tile)."""
    return 16 // x.element_size()


def dropout_arguments(dropout_p: float, offset: int) -> tuple[int, int, float]:
    """The kernels' counter, threshold and scale."""
    return first_counter(offset), keep_threshold(dropout_p), keep_scale(dropout_p)
