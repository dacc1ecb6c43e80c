"""The kernels of the norms, backward; see _norm.py.

Sums over rows take no atomics: each program writes its partial sums, and a second kernel adds them in a fixed order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastbert.kernels import _configs
from fastbert.kernels._launch import as_rows, check_seed, check_tensors, device_of, launch
from fastbert.kernels._norm import VARYING, dropout_arguments, run_length
from fastbert.kernels._philox import keep_tile
from fastbert.kernels._rows import add_partials, blocked, checked_width, dense


@triton.jit
def _normalised_tile(grad_y, x, weight, row_mean, row_rstd, row, column, in_bounds, width, grad_y_stride, x_stride):
    """x_hat, grad_y and wdy = weight * grad_y for a tile [ROWS, BLOCK], float32; zero out of bounds."""
    dy = tl.load(grad_y + row[:, None] * grad_y_stride + column[None, :], mask=in_bounds, other=0.0).to(tl.float32)
    value = tl.load(x + row[:, None] * x_stride + column[None, :], mask=in_bounds, other=0.0).to(tl.float32)
    # Masked lanes again: x_hat there would be -mean * rstd, and an infinite rstd would make the row's sums NaN.
    x_hat = tl.where(in_bounds, (value - row_mean[:, None]) * row_rstd[:, None], 0.0)
    if weight is None:  # noqa: SIM108 (a branch that goes away at compile time)
        wdy = dy
    else:
        wdy = dy * tl.load(weight + column, mask=column < width, other=0.0).to(tl.float32)[None, :]
    return x_hat, dy, wdy


@triton.jit(do_not_specialize=VARYING)
def _row_means_kernel(
    grad_y,  # [rows, width]
    x,  # [rows, width]
    weight,  # [width] or None
    mean,  # float32 [rows], or None: rms_norm
    rstd,  # float32 [rows]
    row_means,  # float32 [2, rows], written: mean_w(wdy) (zero for rms_norm), mean_w(wdy * x_hat)
    rows, width, grad_y_stride, x_stride,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The two means that the gradient of a row needs, for rows too wide for one program; one row a program."""
    row = tl.program_id(0) + tl.arange(0, 1).to(tl.int64)
    row_mean = tl.zeros([1], tl.float32)
    if mean is not None:
        row_mean = tl.load(mean + row)
    row_rstd = tl.load(rstd + row)
    sum_wdy = tl.zeros([1], tl.float32)
    sum_wdy_x_hat = tl.zeros([1], tl.float32)
    for first_column in range(0, width, BLOCK):
        column = first_column + tl.arange(0, BLOCK)
        in_bounds = (column < width)[None, :]
        x_hat, _, wdy = _normalised_tile(
            grad_y, x, weight, row_mean, row_rstd, row, column, in_bounds, width, grad_y_stride, x_stride
        )
        if mean is not None:
            sum_wdy += tl.sum(wdy, axis=1)
        sum_wdy_x_hat += tl.sum(wdy * x_hat, axis=1)
    tl.store(row_means + row, sum_wdy / width)
    tl.store(row_means + rows + row, sum_wdy_x_hat / width)


@triton.jit(do_not_specialize=VARYING)
def _backward_kernel(
    grad_y,  # [rows, width]
    grad_sum,  # [rows, width] or None
    x,  # [rows, width]: what was normalised
    mean,  # float32 [rows], or None: rms_norm
    rstd,  # float32 [rows]
    row_means,  # float32 [2, rows], or None: then a program holds whole rows and finds them itself
    weight,  # [width] or None
    seed,  # int64 [1] or None
    d_sum,  # [rows, width] contiguous, written, or None
    dx,  # [rows, width] contiguous, written, or None; differs from d_sum by dropout
    partials,  # float32 [3, programs, width], written: sums over a program's rows for dweight, dbias, dx_bias
    rows, width, grad_y_stride, grad_sum_stride, x_stride,
    counter: tl.int64, threshold: tl.uint32, scale,
    NEEDS_DWEIGHT: tl.constexpr, NEEDS_DBIAS: tl.constexpr, NEEDS_DX_BIAS: tl.constexpr, DROPOUT: tl.constexpr,
    RUN: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Grid: (programs, blocks of columns); a program takes every programs-th tile of rows."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    first_column = tl.program_id(1) * BLOCK
    column = first_column + tl.arange(0, BLOCK)
    in_width = column < width
    sum_dweight = tl.zeros([ROWS, BLOCK], tl.float32)
    sum_dbias = tl.zeros([ROWS, BLOCK], tl.float32)
    sum_dx_bias = tl.zeros([ROWS, BLOCK], tl.float32)
    if DROPOUT:
        seed_value = tl.load(seed)
    for tile in tl.range(program, tl.cdiv(rows, ROWS), programs, num_stages=STAGES):
        row = tl.cast(tile, tl.int64) * ROWS + tl.arange(0, ROWS)
        in_rows = row < rows
        in_bounds = in_rows[:, None] & in_width[None, :]
        row_mean = tl.zeros([ROWS], tl.float32)
        if mean is not None:
            row_mean = tl.load(mean + row, mask=in_rows, other=0.0)
        row_rstd = tl.load(rstd + row, mask=in_rows, other=0.0)
        x_hat, dy, wdy = _normalised_tile(
            grad_y, x, weight, row_mean, row_rstd, row, column, in_bounds, width, grad_y_stride, x_stride
        )
        if NEEDS_DWEIGHT:
            sum_dweight += dy * x_hat
        if NEEDS_DBIAS:
            sum_dbias += dy

        if d_sum is not None or dx is not None or NEEDS_DX_BIAS:
            if row_means is None:
                mean_wdy = tl.zeros([ROWS], tl.float32)
                if mean is not None:
                    mean_wdy = tl.sum(wdy, axis=1) / width
                mean_wdy_x_hat = tl.sum(wdy * x_hat, axis=1) / width
            else:
                mean_wdy = tl.load(row_means + row, mask=in_rows, other=0.0)
                mean_wdy_x_hat = tl.load(row_means + rows + row, mask=in_rows, other=0.0)
            gradient = (wdy - mean_wdy[:, None] - x_hat * mean_wdy_x_hat[:, None]) * row_rstd[:, None]
            offsets = row[:, None] * width + column[None, :]
            if grad_sum is not None:
                grad_sum_offsets = row[:, None] * grad_sum_stride + column[None, :]
                gradient += tl.load(grad_sum + grad_sum_offsets, mask=in_bounds, other=0.0).to(tl.float32)
            if d_sum is not None:
                tl.store(d_sum + offsets, gradient.to(d_sum.dtype.element_ty), mask=in_bounds)
            if DROPOUT:
                keep = keep_tile(seed_value, counter, row, first_column, width, threshold, BLOCK, RUN)
                gradient *= tl.where(keep, scale, 0.0)
            if dx is not None:
                tl.store(dx + offsets, gradient.to(dx.dtype.element_ty), mask=in_bounds)
            if NEEDS_DX_BIAS:
                sum_dx_bias += tl.where(in_bounds, gradient, 0.0)

    partial = partials + program.to(tl.int64) * width + column
    kind_stride = programs.to(tl.int64) * width
    if NEEDS_DWEIGHT:
        tl.store(partial, tl.sum(sum_dweight, axis=0), mask=in_width)
    if NEEDS_DBIAS:
        tl.store(partial + kind_stride, tl.sum(sum_dbias, axis=0), mask=in_width)
    if NEEDS_DX_BIAS:
        tl.store(partial + 2 * kind_stride, tl.sum(sum_dx_bias, axis=0), mask=in_width)


def norm_backward(
    operation: str, grad_y: Tensor, grad_sum: Tensor | None, x: Tensor,
    mean: Tensor | None, rstd: Tensor, weight: Tensor | None, dropout_p: float, seed: Tensor | None, offset: int,
    *, needs_d_sum: bool, needs_dx: bool, needs_sums: tuple[bool, bool, bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(d_sum, dx, dx_bias, dweight, dbias); `needs_sums` in the order of the partials: dweight, dbias, dx_bias.

    Without a mean the rows are not centred: rms_norm.
    """
    check_tensors(operation, grad_y=grad_y, grad_sum=grad_sum, x=x, mean=mean, rstd=rstd, weight=weight)
    width = checked_width(operation, x)
    dropout = dropout_p != 0.0
    seed = check_seed(operation, seed) if dropout else None

    d_sum = torch.empty(x.shape if needs_d_sum else 0, dtype=x.dtype, device=x.device)
    dx = torch.empty(x.shape if needs_dx else 0, dtype=x.dtype, device=x.device)
    rows = x.numel() // width
    allocate = torch.empty if rows else torch.zeros
    dweight, dbias, dx_bias = (
        allocate(width if needed else 0, dtype=torch.float32, device=x.device) for needed in needs_sums
    )
    if rows and (needs_d_sum or needs_dx or any(needs_sums)):
        device = device_of(x)
        line = _configs.row_tile(operation, width, device)
        block, tile_rows = blocked(width, line)
        blocks = triton.cdiv(width, block)
        programs = triton.cdiv(_configs.PROGRAMS_PER_PROCESSOR * device.processors, blocks)
        programs = min(programs, triton.cdiv(rows, tile_rows))

        grad_y_rows, x_rows = as_rows(grad_y, width), as_rows(x, width)
        grad_sum_rows = None if grad_sum is None else as_rows(grad_sum, width)
        grad_sum_stride = 0 if grad_sum_rows is None else grad_sum_rows.stride(0)
        mean, rstd, weight = dense(mean), dense(rstd), dense(weight)
        partials = torch.empty((3, programs, width) if any(needs_sums) else 0, dtype=torch.float32, device=x.device)
        row_means = None
        if blocks > 1:
            row_means = torch.empty((2, rows), dtype=torch.float32, device=x.device)
            launch(
                _row_means_kernel, (rows,), x,
                grad_y_rows, x_rows, weight, mean, rstd, row_means,
                rows, width, grad_y_rows.stride(0), x_rows.stride(0),
                num_warps=line.num_warps, BLOCK=block,
            )  # fmt: skip
        launch(
            _backward_kernel, (programs, blocks), x,
            grad_y_rows, grad_sum_rows, x_rows, mean, rstd, row_means, weight, seed,
            d_sum if needs_d_sum else None, dx if needs_dx else None, partials,
            rows, width, grad_y_rows.stride(0), grad_sum_stride, x_rows.stride(0),
            *dropout_arguments(dropout_p, offset), num_warps=line.num_warps,
            NEEDS_DWEIGHT=needs_sums[0], NEEDS_DBIAS=needs_sums[1], NEEDS_DX_BIAS=needs_sums[2],
            DROPOUT=dropout, RUN=run_length(x), ROWS=tile_rows, BLOCK=block, STAGES=line.num_stages,
        )  # fmt: skip
        if any(needs_sums):
            add_partials(partials, (dweight, dbias, dx_bias), needs_sums)
    return d_sum, dx, dx_bias, dweight, dbias
