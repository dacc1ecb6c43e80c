"""Layer norm, and residual + bias + dropout + layer norm: forward and backward.

    sum = residual + dropout(x + x_bias)        (layer_norm alone: sum = x)
    x_hat = (sum - mean) * rstd;  y = x_hat * weight + bias;  rstd = 1 / sqrt(var + eps)

    wdy = weight * grad_y
    d_sum = rstd * (wdy - mean_w(wdy) - x_hat * mean_w(wdy * x_hat)) + grad_sum
    d_residual = d_sum;  dx = dropout's mask and scale applied to d_sum;  dx_bias = sum_rows(dx)
    dweight = sum_rows(grad_y * x_hat);  dbias = sum_rows(grad_y)

layer_norm is add_layer_norm without a residual, so both run the same kernels: an argument that is None removes its
code. A row that fits one program's registers is read once. A wider one is worked on in blocks of columns, and a first
kernel finds what depends on the whole row: its mean and rstd, or backward its two means.

Sums over rows take no atomics: each program writes its partial sums, and a second kernel adds them in a fixed order.
"""

import math
from collections.abc import Callable, Iterator, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastbert.kernels import _configs
from fastbert.kernels._launch import AotCase, as_rows, check_seed, check_tensors, device_of, launch
from fastbert.kernels._philox import first_counter, keep_scale, keep_threshold, keep_tile

# Kernel arguments that differ from call to call must not make a new specialisation of the kernel each.
_VARYING = ["rows", "counter", "threshold"]

_DTYPE_NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


# -------------------------------------------------------------------------------------------------------------- forward


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


@triton.jit(do_not_specialize=_VARYING)
def _row_statistics_kernel(
    x,  # [rows, width]
    residual,  # [rows, width] or None
    x_bias,  # [width] or None
    seed,  # int64 [1] or None
    mean,  # float32 [rows], written
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
        count = tl.minimum(width - first_column, BLOCK).to(tl.float32)
        block_mean = tl.sum(tl.where(in_row, tile, 0.0), axis=1) / count
        centred = tl.where(in_row, tile - block_mean[:, None], 0.0)
        correction = tl.sum(centred, axis=1) / count  # the rounding of a large mean, as in _forward_kernel
        block_mean += correction
        centred = tl.where(in_row, centred - correction[:, None], 0.0)
        delta = block_mean - row_mean
        share = count / (first_column + count)
        row_mean += delta * share
        squares += tl.sum(centred * centred, axis=1) + delta * delta * first_column * share
    tl.store(mean + row, row_mean)
    tl.store(rstd + row, tl.rsqrt(squares / width + eps))


@triton.jit(do_not_specialize=_VARYING)
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
    STATISTICS_GIVEN: tl.constexpr, DROPOUT: tl.constexpr, RUN: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
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
        row_mean = tl.load(mean + row, mask=row < rows, other=0.0)
        row_rstd = tl.load(rstd + row, mask=row < rows, other=0.0)
        centred = tile - row_mean[:, None]
    else:
        # The sums take only what is in bounds.
        row_mean = tl.sum(tl.where(in_bounds, tile, 0.0), axis=1) / width
        centred = tl.where(in_bounds, tile - row_mean[:, None], 0.0)
        # Where the mean is large, its rounding shifts the whole row: the centred row's own mean takes that out.
        correction = tl.sum(centred, axis=1) / width
        row_mean += correction
        centred = tl.where(in_bounds, centred - correction[:, None], 0.0)
        row_rstd = tl.rsqrt(tl.sum(centred * centred, axis=1) / width + eps)
        if mean is not None:
            tl.store(mean + row, row_mean, mask=row < rows)
            tl.store(rstd + row, row_rstd, mask=row < rows)

    out = centred * row_rstd[:, None]
    if weight is not None:
        out *= tl.load(weight + column, mask=in_width, other=0.0).to(tl.float32)[None, :]
    if bias is not None:
        out += tl.load(bias + column, mask=in_width, other=0.0).to(tl.float32)[None, :]
    tl.store(y + offsets, out.to(y.dtype.element_ty), mask=in_bounds)


def layer_norm(
    x: Tensor,  # [..., width]
    weight: Tensor | None,  # [width]
    bias: Tensor | None,  # [width]
    eps: float,
    save_stats: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """y like x, contiguous; mean and rstd float32 [...], or [0] without `save_stats`.

    Raises ValueError for a width above 65536 or a tensor that is not on the kernels' device, TypeError for a dtype.
    """
    y, _, mean, rstd = _forward("layer_norm", x, None, None, weight, bias, eps, 0.0, None, 0, save_stats, False)
    return y, mean, rstd


def add_layer_norm(
    x: Tensor,  # [..., width]
    residual: Tensor,  # [..., width]
    x_bias: Tensor | None,  # [width]
    weight: Tensor | None,  # [width]
    bias: Tensor | None,  # [width]
    eps: float,
    dropout_p: float,
    seed: Tensor | None,  # int64 [1]; not read when dropout_p == 0
    offset: int,  # the stream index of the first element, a multiple of 4
    save_stats: bool,
    save_sum: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y = layer_norm(sum), sum = residual + dropout(x + x_bias), both like x, contiguous; mean, rstd as `layer_norm`'s.

    Without `save_sum` the sum is [0]. y comes from the unrounded float32 sum. Raises as `layer_norm` does, and ValueError
    for a bad dropout_p, seed or offset.
    """
    return _forward(
        "add_layer_norm", x, residual, x_bias, weight, bias, eps, dropout_p, seed, offset, save_stats, save_sum
    )


def _forward(
    operation: str, x: Tensor, residual: Tensor | None, x_bias: Tensor | None,
    weight: Tensor | None, bias: Tensor | None, eps: float,
    dropout_p: float, seed: Tensor | None, offset: int, save_stats: bool, save_sum: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    check_tensors(operation, x=x, residual=residual, x_bias=x_bias, weight=weight, bias=bias)
    width = _checked_width(operation, x)
    dropout = dropout_p != 0.0
    seed = check_seed(operation, seed) if dropout else None

    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    sum_out = torch.empty_like(y) if save_sum else None
    empty = x.new_empty(0, dtype=torch.float32)
    rows = x.numel() // width
    device = device_of(x)
    line = _configs.row_tile(operation, width, device)
    block, tile_rows = _blocked(width, line)
    blocks = triton.cdiv(width, block)

    mean = rstd = None
    if save_stats or blocks > 1:
        mean = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
        rstd = torch.empty_like(mean)
    if rows:
        x_rows = as_rows(x, width)
        residual_rows = None if residual is None else as_rows(residual, width)
        residual_stride = 0 if residual_rows is None else residual_rows.stride(0)
        scalars = (rows, width, x_rows.stride(0), residual_stride, eps, *_dropout_arguments(dropout_p, offset))
        constexprs = dict(DROPOUT=dropout, RUN=_run(x), BLOCK=block)
        x_bias, weight, bias = _dense(x_bias), _dense(weight), _dense(bias)
        if blocks > 1:
            launch(
                _row_statistics_kernel, (rows,), x, x_rows, residual_rows, x_bias, seed, mean, rstd, *scalars,
                num_warps=line.num_warps, **constexprs,
            )  # fmt: skip
        launch(
            _forward_kernel, (triton.cdiv(rows, tile_rows), blocks), x,
            x_rows, residual_rows, x_bias, weight, bias, seed, y, sum_out, mean, rstd, *scalars,
            num_warps=line.num_warps, STATISTICS_GIVEN=blocks > 1, ROWS=tile_rows, **constexprs,
        )  # fmt: skip
    if not save_stats or mean is None or rstd is None:
        mean, rstd = empty, torch.empty_like(empty)
    return y, x.new_empty(0) if sum_out is None else sum_out, mean, rstd


# ------------------------------------------------------------------------------------------------------------- backward


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


@triton.jit(do_not_specialize=_VARYING)
def _row_means_kernel(
    grad_y,  # [rows, width]
    x,  # [rows, width]
    weight,  # [width] or None
    mean,  # float32 [rows]
    rstd,  # float32 [rows]
    row_means,  # float32 [2, rows], written: mean_w(wdy), mean_w(wdy * x_hat)
    rows, width, grad_y_stride, x_stride,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The two means that the gradient of a row needs, for rows too wide for one program; one row a program."""
    row = tl.program_id(0) + tl.arange(0, 1).to(tl.int64)
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
        sum_wdy += tl.sum(wdy, axis=1)
        sum_wdy_x_hat += tl.sum(wdy * x_hat, axis=1)
    tl.store(row_means + row, sum_wdy / width)
    tl.store(row_means + rows + row, sum_wdy_x_hat / width)


@triton.jit(do_not_specialize=_VARYING)
def _backward_kernel(
    grad_y,  # [rows, width]
    grad_sum,  # [rows, width] or None
    x,  # [rows, width]: what was normalised
    mean,  # float32 [rows]
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


@triton.jit
def _reduce_partials(partial, out, programs, width, PROGRAMS: tl.constexpr, COLUMNS: tl.constexpr):
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([PROGRAMS, COLUMNS], tl.float32)
    for first_program in range(0, programs, PROGRAMS):
        program = first_program + tl.arange(0, PROGRAMS).to(tl.int64)
        in_bounds = (program < programs)[:, None] & (column < width)[None, :]
        total += tl.load(partial + program[:, None] * width + column[None, :], mask=in_bounds, other=0.0)
    tl.store(out + column, tl.sum(total, axis=0), mask=column < width)


@triton.jit(do_not_specialize=["programs"])
def _reduce_kernel(
    partials,  # float32 [3, programs, width]
    dweight,  # float32 [width], written, or None
    dbias,  # float32 [width], written, or None
    dx_bias,  # float32 [width], written, or None
    programs, width,
    PROGRAMS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Add the programs' partial sums. Grid: (blocks of columns, 3): dweight, dbias, dx_bias."""
    kind = tl.program_id(1)
    partial = partials + kind * programs.to(tl.int64) * width
    if dweight is not None:  # noqa: SIM102 (goes away at compile time)
        if kind == 0:
            _reduce_partials(partial, dweight, programs, width, PROGRAMS, COLUMNS)
    if dbias is not None:  # noqa: SIM102
        if kind == 1:
            _reduce_partials(partial, dbias, programs, width, PROGRAMS, COLUMNS)
    if dx_bias is not None:  # noqa: SIM102
        if kind == 2:
            _reduce_partials(partial, dx_bias, programs, width, PROGRAMS, COLUMNS)


def layer_norm_backward(
    grad_y: Tensor,  # [..., width]
    x: Tensor,  # [..., width]
    mean: Tensor,  # float32 [...]
    rstd: Tensor,  # float32 [...]
    weight: Tensor | None,  # [width]
    needs: Sequence[bool],  # dx, dweight, dbias
) -> tuple[Tensor, Tensor, Tensor]:
    """dx like x; dweight and dbias float32 [width]; [0] for what is not needed. Raises as `layer_norm` does."""
    needs_dx, needs_dweight, needs_dbias = needs
    dx, _, _, dweight, dbias = _backward(
        "layer_norm_backward", grad_y, None, x, mean, rstd, weight, 0.0, None, 0,
        needs_d_sum=needs_dx, needs_dx=False, needs_sums=(needs_dweight, needs_dbias, False),
    )  # fmt: skip
    return dx, dweight, dbias


def add_layer_norm_backward(
    grad_y: Tensor,  # [..., width]
    grad_sum: Tensor | None,  # [..., width]
    sum: Tensor,  # [..., width]
    mean: Tensor,  # float32 [...]
    rstd: Tensor,  # float32 [...]
    weight: Tensor | None,  # [width]
    dropout_p: float,
    seed: Tensor | None,  # int64 [1]; not read when dropout_p == 0
    offset: int,
    needs: Sequence[bool],  # x, residual, x_bias, weight, bias
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dx and dresidual like sum; dx_bias, dweight and dbias float32 [width]; [0] for what is not needed.

    Without dropout dx equals dresidual: then dx is always [0], and dresidual is written if x or residual needs it.
    Raises as `add_layer_norm` does.
    """
    needs_x, needs_residual, needs_dx_bias, needs_dweight, needs_dbias = needs
    dropout = dropout_p != 0.0
    d_sum, dx, dx_bias, dweight, dbias = _backward(
        "add_layer_norm_backward", grad_y, grad_sum, sum, mean, rstd, weight, dropout_p, seed, offset,
        needs_d_sum=needs_residual or (needs_x and not dropout), needs_dx=needs_x and dropout,
        needs_sums=(needs_dweight, needs_dbias, needs_dx_bias),
    )  # fmt: skip
    return dx, d_sum, dx_bias, dweight, dbias


def _backward(
    operation: str, grad_y: Tensor, grad_sum: Tensor | None, x: Tensor,
    mean: Tensor, rstd: Tensor, weight: Tensor | None, dropout_p: float, seed: Tensor | None, offset: int,
    *, needs_d_sum: bool, needs_dx: bool, needs_sums: tuple[bool, bool, bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(d_sum, dx, dx_bias, dweight, dbias); `needs_sums` in the order of the partials: dweight, dbias, dx_bias."""
    check_tensors(operation, grad_y=grad_y, grad_sum=grad_sum, x=x, mean=mean, rstd=rstd, weight=weight)
    width = _checked_width(operation, x)
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
        block, tile_rows = _blocked(width, line)
        blocks = triton.cdiv(width, block)
        programs = triton.cdiv(_configs.PROGRAMS_PER_PROCESSOR * device.processors, blocks)
        programs = min(programs, triton.cdiv(rows, tile_rows))

        grad_y_rows, x_rows = as_rows(grad_y, width), as_rows(x, width)
        grad_sum_rows = None if grad_sum is None else as_rows(grad_sum, width)
        grad_sum_stride = 0 if grad_sum_rows is None else grad_sum_rows.stride(0)
        mean, rstd, weight = mean.contiguous(), rstd.contiguous(), _dense(weight)
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
            *_dropout_arguments(dropout_p, offset), num_warps=line.num_warps,
            NEEDS_DWEIGHT=needs_sums[0], NEEDS_DBIAS=needs_sums[1], NEEDS_DX_BIAS=needs_sums[2],
            DROPOUT=dropout, RUN=_run(x), ROWS=tile_rows, BLOCK=block, STAGES=line.num_stages,
        )  # fmt: skip
        if any(needs_sums):
            outs = [out if needed else None for out, needed in zip((dweight, dbias, dx_bias), needs_sums, strict=True)]
            tile = _configs.reduce_tile(device)
            launch(
                _reduce_kernel, (triton.cdiv(width, tile.columns), 3), x, partials, *outs, programs, width,
                num_warps=tile.num_warps, PROGRAMS=tile.programs, COLUMNS=tile.columns,
            )  # fmt: skip
    return d_sum, dx, dx_bias, dweight, dbias


# --------------------------------------------------------------------------------------------------------------- shared


def _checked_width(operation: str, x: Tensor) -> int:
    width = x.shape[-1] if x.dim() else 0
    if not 1 <= width <= _configs.MAX_WIDTH:
        raise ValueError(
            f"{operation}: the last dimension is {width}; the Triton kernels take 1 to {_configs.MAX_WIDTH}. "
            "Use fastbert.use_reference() for other widths."
        )
    return width


def _blocked(width: int, line: _configs.RowTile) -> tuple[int, int]:
    """(columns of a block, rows of a tile): whole rows where the tile is wide enough for one."""
    block = min(max(triton.next_power_of_2(width), _configs.MIN_BLOCK), line.tile)
    return block, line.tile // block


def _run(x: Tensor) -> int:
    """Elements of a 16-byte access, which is what a thread should hold of dropout's stream (see keep_tile)."""
    return 16 // x.element_size()


def _dropout_arguments(dropout_p: float, offset: int) -> tuple[int, int, float]:
    return first_counter(offset), keep_threshold(dropout_p), keep_scale(dropout_p)


def _dense(parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else parameter.contiguous()


# -------------------------------------------------------------------------------------------------------- ahead of time


def aot_cases() -> Iterator[AotCase]:
    """What is compiled ahead of time: every line of the tables, usual widths, each dtype and alignment."""
    operations = [norm + way for norm in ("layer_norm", "add_layer_norm") for way in ("", "_backward")]
    for width in sorted({64, 128, 384, 768} | _configs.row_tile_widths(*operations)):
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            for aligned in (True, False):
                yield from _aot_cases(width if aligned else width - 1, dtype, aligned)


def _aot_cases(width: int, dtype: torch.dtype, aligned: bool) -> Iterator[AotCase]:
    rows = 64

    def tensor(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        # An unaligned tensor starts one element after an aligned one.
        start = 0 if aligned else 1
        return torch.empty(start + math.prod(shape), dtype=dtype, device="meta")[start:].view(shape)

    x, parameter = tensor(rows, width), tensor(width)
    statistics = tensor(rows, dtype=torch.float32)
    seed = tensor(1, dtype=torch.int64)
    calls: dict[str, Callable[[], object]] = {
        "layer_norm": lambda: layer_norm(x, parameter, parameter, 1e-5, True),
        "add_layer_norm": lambda: add_layer_norm(x, x, parameter, parameter, parameter, 1e-5, 0.1, seed, 0, True),
        "layer_norm_backward": lambda: layer_norm_backward(x, x, statistics, statistics, parameter, (True,) * 3),
        "add_layer_norm_backward": lambda: add_layer_norm_backward(
            x, x, x, statistics, statistics, parameter, 0.1, seed, 0, (True,) * 5
        ),
    }
    if width == 768:  # what removes code is tried at one width
        calls |= {
            "layer_norm-no_stats": lambda: layer_norm(x, parameter, parameter, 1e-5, False),
            "layer_norm-no_affine": lambda: layer_norm(x, None, None, 1e-5, True),
            "add_layer_norm-no_sum": lambda: add_layer_norm(
                x, x, parameter, parameter, parameter, 1e-5, 0.0, None, 0, False, False
            ),
            "add_layer_norm-no_dropout": lambda: add_layer_norm(
                x, x, None, parameter, parameter, 1e-5, 0.0, None, 0, False
            ),
            "add_layer_norm_backward-no_dropout": lambda: add_layer_norm_backward(
                x, None, x, statistics, statistics, parameter, 0.0, None, 0, (True,) * 5
            ),
        }
    for name, call in calls.items():
        operation, _, variant = name.partition("-")
        parts = [operation, f"w{width}", _DTYPE_NAMES[dtype], variant, "" if aligned else "unaligned"]
        sample = dtype is torch.float16 if width == 767 else width == 768 and dtype is torch.bfloat16 and not variant
        yield AotCase("-".join(filter(None, parts)), call, sample)
