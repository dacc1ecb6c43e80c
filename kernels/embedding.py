"""The input of a BERT: word + position + token type embeddings, layer norm, dropout, in one pass; and its gradients.

    sum = word[input_ids] + position[position_ids] + token_type[token_type_ids]
    x_hat = (sum - mean) * rstd;  y = dropout(x_hat * weight + bias);  rstd = 1 / sqrt(var + eps)

    dy = dropout's mask and scale applied to grad_y;  wdy = weight * dy
    d_sum = rstd * (wdy - mean_w(wdy) - x_hat * mean_w(wdy * x_hat))
    dweight = sum_rows(dy * x_hat);  dbias = sum_rows(dy);  each table's gradient: see _table_gradient.py

Backward gathers the sum again and saves none. d_sum is stored in the tables' dtype, as autograd would hand it from a layer
norm to an embedding. Ids are clamped to their tables. A row too wide for one program's registers is worked on in blocks.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastbert.kernels import _configs
from fastbert.kernels._launch import AotCase, as_rows, check_device, check_seed, check_tensors, device_of, launch
from fastbert.kernels._philox import first_counter, keep_scale, keep_threshold, keep_tile
from fastbert.kernels._rows import DTYPE_NAMES, add_partials, blocked, dense, meta_tensor
from fastbert.kernels._table_gradient import table_gradient

_VARYING = ["rows", "words", "positions", "types", "counter", "threshold"]


@triton.jit
def _table_rows(table, ids, row, in_rows, entries, stride):
    """Pointers [ROWS] to the table's rows that `ids` name."""
    index = tl.load(ids + row, mask=in_rows, other=0)
    return table + tl.minimum(tl.maximum(index, 0), entries - 1).to(tl.int64) * stride


@triton.jit
def _sum_tile(
    input_ids, position_ids, token_type_ids, word, position, token_type, row, in_rows, column,
    width, words, positions, types, word_stride, position_stride, type_stride,
):  # fmt: skip
    """The sum of the embeddings for a tile [ROWS, BLOCK], float32; zero out of bounds."""
    in_bounds = in_rows[:, None] & (column < width)[None, :]
    pointers = _table_rows(word, input_ids, row, in_rows, words, word_stride)[:, None] + column[None, :]
    total = tl.load(pointers, mask=in_bounds, other=0.0).to(tl.float32)
    if position is not None:
        pointers = _table_rows(position, position_ids, row, in_rows, positions, position_stride)[:, None]
        total += tl.load(pointers + column[None, :], mask=in_bounds, other=0.0).to(tl.float32)
    if token_type is not None:
        pointers = _table_rows(token_type, token_type_ids, row, in_rows, types, type_stride)[:, None]
        total += tl.load(pointers + column[None, :], mask=in_bounds, other=0.0).to(tl.float32)
    return total


# -------------------------------------------------------------------------------------------------------------- forward


@triton.jit
def _store_y(
    y, weight, bias, seed, centred, row_rstd, row, in_rows, first_column, width, counter, threshold, scale,
    DROPOUT: tl.constexpr, RUN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    column = first_column + tl.arange(0, BLOCK)
    in_width = column < width
    out = centred * row_rstd[:, None]
    if weight is not None:
        out *= tl.load(weight + column, mask=in_width, other=0.0).to(tl.float32)[None, :]
    if bias is not None:
        out += tl.load(bias + column, mask=in_width, other=0.0).to(tl.float32)[None, :]
    if DROPOUT:
        keep = keep_tile(tl.load(seed), counter, row, first_column, width, threshold, BLOCK, RUN)
        out *= tl.where(keep, scale, 0.0)  # a product, so that what is not finite stays so, as in torch
    in_bounds = in_rows[:, None] & in_width[None, :]
    tl.store(y + row[:, None] * width + column[None, :], out.to(y.dtype.element_ty), mask=in_bounds)


@triton.jit(do_not_specialize=_VARYING)
def _forward_kernel(
    input_ids,  # int [rows]
    position_ids,  # int [rows] or None
    token_type_ids,  # int [rows] or None
    word,  # [words, width]
    position,  # [positions, width] or None
    token_type,  # [types, width] or None
    weight,  # [width] or None
    bias,  # [width] or None
    seed,  # int64 [1] or None
    y,  # [rows, width] contiguous, written
    mean,  # float32 [rows], written, or None
    rstd,  # float32 [rows], likewise
    rows, width, words, positions, types, word_stride, position_stride, type_stride, eps,
    counter: tl.int64, threshold: tl.uint32, scale,
    WHOLE: tl.constexpr, DROPOUT: tl.constexpr, RUN: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid: tiles of rows. WHOLE: a tile holds whole rows; else a row is gathered twice, in blocks of columns."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    in_rows = row < rows
    if WHOLE:
        column = tl.arange(0, BLOCK)
        total = _sum_tile(
            input_ids, position_ids, token_type_ids, word, position, token_type, row, in_rows, column,
            width, words, positions, types, word_stride, position_stride, type_stride,
        )  # fmt: skip
        in_width = (column < width)[None, :]
        row_mean = tl.sum(total, axis=1) / width
        centred = tl.where(in_width, total - row_mean[:, None], 0.0)
        # Where the mean is large, its rounding shifts the whole row: the centred row's own mean takes that out.
        correction = tl.sum(centred, axis=1) / width
        row_mean += correction
        centred = tl.where(in_width, centred - correction[:, None], 0.0)
        row_rstd = tl.rsqrt(tl.sum(centred * centred, axis=1) / width + eps)
        _store_y(
            y, weight, bias, seed, centred, row_rstd, row, in_rows, 0, width, counter, threshold, scale,
            DROPOUT, RUN, BLOCK,
        )  # fmt: skip
    else:
        # Chan, Golub and LeVeque (1979): blocks' means and centred squares combine without cancellation.
        row_mean = tl.zeros([ROWS], tl.float32)
        squares = tl.zeros([ROWS], tl.float32)
        for first_column in range(0, width, BLOCK):
            column = first_column + tl.arange(0, BLOCK)
            total = _sum_tile(
                input_ids, position_ids, token_type_ids, word, position, token_type, row, in_rows, column,
                width, words, positions, types, word_stride, position_stride, type_stride,
            )  # fmt: skip
            in_width = (column < width)[None, :]
            count = tl.minimum(width - first_column, BLOCK).to(tl.float32)
            block_mean = tl.sum(total, axis=1) / count
            centred = tl.where(in_width, total - block_mean[:, None], 0.0)
            correction = tl.sum(centred, axis=1) / count
            block_mean += correction
            centred = tl.where(in_width, centred - correction[:, None], 0.0)
            delta = block_mean - row_mean
            share = count / (first_column + count)
            row_mean += delta * share
            squares += tl.sum(centred * centred, axis=1) + delta * delta * first_column * share
        row_rstd = tl.rsqrt(squares / width + eps)
        for first_column in range(0, width, BLOCK):
            column = first_column + tl.arange(0, BLOCK)
            total = _sum_tile(
                input_ids, position_ids, token_type_ids, word, position, token_type, row, in_rows, column,
                width, words, positions, types, word_stride, position_stride, type_stride,
            )  # fmt: skip
            _store_y(
                y, weight, bias, seed, total - row_mean[:, None], row_rstd, row, in_rows, first_column,
                width, counter, threshold, scale, DROPOUT, RUN, BLOCK,
            )  # fmt: skip
    if mean is not None:
        tl.store(mean + row, row_mean, mask=in_rows)
        tl.store(rstd + row, row_rstd, mask=in_rows)


def embedding_layer_norm(
    input_ids: Tensor,  # int [...]
    position_ids: Tensor | None,  # int [...]
    token_type_ids: Tensor | None,  # int [...]
    word: Tensor,  # [words, width]
    position: Tensor | None,  # [positions, width]
    token_type: Tensor | None,  # [types, width]
    weight: Tensor | None,  # [width]
    bias: Tensor | None,  # [width]
    eps: float,
    dropout_p: float,
    seed: Tensor | None,  # int64 [1]; not read when dropout_p == 0
    offset: int,  # the stream index of the first element, a multiple of 4
    save_stats: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """y [..., width] like word, contiguous; mean and rstd float32 [...], or [0] without `save_stats`.

    Raises ValueError for a table without rows, a bad dropout_p, seed or offset, or a tensor that is not on the kernels' device,
    TypeError for a dtype.
    """
    operation = "embedding_layer_norm"
    check_tensors(operation, word=word, position=position, token_type=token_type, weight=weight, bias=bias)
    width = word.shape[1]
    y = torch.empty((*input_ids.shape, width), dtype=word.dtype, device=word.device)
    empty = torch.empty(0, dtype=torch.float32, device=word.device)
    mean = torch.empty(input_ids.shape, dtype=torch.float32, device=word.device) if save_stats else empty
    rstd = torch.empty_like(mean)
    inputs = _inputs(operation, (input_ids, position_ids, token_type_ids), (word, position, token_type))
    dropout, seed, random = _dropout(operation, dropout_p, seed, offset)
    rows = input_ids.numel()
    if rows and width:
        line = _configs.row_tile(operation, min(width, _configs.MAX_WIDTH), device_of(word))
        block, tile_rows = blocked(width, line)
        launch(
            _forward_kernel, (triton.cdiv(rows, tile_rows),), word,
            *inputs.pointers, *map(dense, (weight, bias)), seed, y, *((mean, rstd) if save_stats else (None, None)),
            rows, width, *inputs.sizes, *inputs.strides, eps, *random,
            num_warps=line.num_warps, WHOLE=width <= block, DROPOUT=dropout, RUN=16 // word.element_size(),
            ROWS=tile_rows, BLOCK=block,
        )  # fmt: skip
    return y, mean, rstd


# ------------------------------------------------------------------------------------------------------------- backward


@triton.jit
def _normalised_tile(
    total, grad_y, weight, seed_value, row_mean, row_rstd, row, in_rows, first_column,
    width, grad_y_stride, counter, threshold, scale,
    DROPOUT: tl.constexpr, RUN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """x_hat, dy and wdy of a tile [ROWS, BLOCK], float32; zero out of bounds."""
    column = first_column + tl.arange(0, BLOCK)
    in_bounds = in_rows[:, None] & (column < width)[None, :]
    # Masked lanes again: x_hat there would be -mean * rstd, and an infinite rstd would make the row's sums NaN.
    x_hat = tl.where(in_bounds, (total - row_mean[:, None]) * row_rstd[:, None], 0.0)
    dy = tl.load(grad_y + row[:, None] * grad_y_stride + column[None, :], mask=in_bounds, other=0.0).to(tl.float32)
    if DROPOUT:
        dy *= tl.where(keep_tile(seed_value, counter, row, first_column, width, threshold, BLOCK, RUN), scale, 0.0)
    wdy = dy
    if weight is not None:
        wdy = dy * tl.load(weight + column, mask=column < width, other=0.0).to(tl.float32)[None, :]
    return x_hat, dy, wdy


@triton.jit(do_not_specialize=_VARYING)
def _row_means_kernel(
    input_ids, position_ids, token_type_ids, word, position, token_type,  # as in _backward_kernel
    grad_y, weight, seed, mean, rstd,
    row_means,  # float32 [2, rows], written: mean_w(wdy), mean_w(wdy * x_hat)
    rows, width, words, positions, types, word_stride, position_stride, type_stride, grad_y_stride,
    counter: tl.int64, threshold: tl.uint32, scale,
    DROPOUT: tl.constexpr, RUN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The two means that the gradient of a row needs, for rows too wide for one program; one row a program."""
    row = tl.program_id(0) + tl.arange(0, 1).to(tl.int64)
    in_rows = row < rows
    seed_value = 0
    if DROPOUT:
        seed_value = tl.load(seed)
    row_mean = tl.load(mean + row)
    row_rstd = tl.load(rstd + row)
    sum_wdy = tl.zeros([1], tl.float32)
    sum_wdy_x_hat = tl.zeros([1], tl.float32)
    for first_column in range(0, width, BLOCK):
        total = _sum_tile(
            input_ids, position_ids, token_type_ids, word, position, token_type,
            row, in_rows, first_column + tl.arange(0, BLOCK),
            width, words, positions, types, word_stride, position_stride, type_stride,
        )  # fmt: skip
        x_hat, _, wdy = _normalised_tile(
            total, grad_y, weight, seed_value, row_mean, row_rstd, row, in_rows, first_column,
            width, grad_y_stride, counter, threshold, scale, DROPOUT, RUN, BLOCK,
        )  # fmt: skip
        sum_wdy += tl.sum(wdy, axis=1)
        sum_wdy_x_hat += tl.sum(wdy * x_hat, axis=1)
    tl.store(row_means + row, sum_wdy / width)
    tl.store(row_means + rows + row, sum_wdy_x_hat / width)


@triton.jit(do_not_specialize=_VARYING)
def _backward_kernel(
    input_ids,  # int [rows]
    position_ids,  # int [rows] or None
    token_type_ids,  # int [rows] or None
    word,  # [words, width]
    position,  # [positions, width] or None
    token_type,  # [types, width] or None
    grad_y,  # [rows, width]
    weight,  # [width] or None
    seed,  # int64 [1] or None
    mean,  # float32 [rows]
    rstd,  # float32 [rows]
    row_means,  # float32 [2, rows], or None: then a program holds whole rows and finds them itself
    d_sum,  # [rows, width] contiguous, written, or None
    partials,  # float32 [2, programs, width], written: sums over a program's rows for dweight and dbias, or None
    rows, width, words, positions, types, word_stride, position_stride, type_stride, grad_y_stride,
    counter: tl.int64, threshold: tl.uint32, scale,
    DROPOUT: tl.constexpr, RUN: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Grid: (programs, blocks of columns); a program takes every programs-th tile of rows."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    first_column = tl.program_id(1) * BLOCK
    column = first_column + tl.arange(0, BLOCK)
    sum_dweight = tl.zeros([ROWS, BLOCK], tl.float32)
    sum_dbias = tl.zeros([ROWS, BLOCK], tl.float32)
    seed_value = 0
    if DROPOUT:
        seed_value = tl.load(seed)
    for tile in tl.range(program, tl.cdiv(rows, ROWS), programs, num_stages=STAGES):
        row = tl.cast(tile, tl.int64) * ROWS + tl.arange(0, ROWS)
        in_rows = row < rows
        row_mean = tl.load(mean + row, mask=in_rows, other=0.0)
        row_rstd = tl.load(rstd + row, mask=in_rows, other=0.0)
        total = _sum_tile(
            input_ids, position_ids, token_type_ids, word, position, token_type, row, in_rows, column,
            width, words, positions, types, word_stride, position_stride, type_stride,
        )  # fmt: skip
        x_hat, dy, wdy = _normalised_tile(
            total, grad_y, weight, seed_value, row_mean, row_rstd, row, in_rows, first_column,
            width, grad_y_stride, counter, threshold, scale, DROPOUT, RUN, BLOCK,
        )  # fmt: skip
        if partials is not None:
            sum_dweight += dy * x_hat
            sum_dbias += dy
        if d_sum is not None:
            if row_means is None:
                mean_wdy = tl.sum(wdy, axis=1) / width
                mean_wdy_x_hat = tl.sum(wdy * x_hat, axis=1) / width
            else:
                mean_wdy = tl.load(row_means + row, mask=in_rows, other=0.0)
                mean_wdy_x_hat = tl.load(row_means + rows + row, mask=in_rows, other=0.0)
            gradient = (wdy - mean_wdy[:, None] - x_hat * mean_wdy_x_hat[:, None]) * row_rstd[:, None]
            in_bounds = in_rows[:, None] & (column < width)[None, :]
            offsets = row[:, None] * width + column[None, :]
            tl.store(d_sum + offsets, gradient.to(d_sum.dtype.element_ty), mask=in_bounds)
    if partials is not None:
        partial = partials + program.to(tl.int64) * width + column
        tl.store(partial, tl.sum(sum_dweight, axis=0), mask=column < width)
        tl.store(partial + programs.to(tl.int64) * width, tl.sum(sum_dbias, axis=0), mask=column < width)


def embedding_layer_norm_backward(
    grad_y: Tensor,  # [..., width]
    input_ids: Tensor,  # int [...]
    position_ids: Tensor | None,  # int [...]
    token_type_ids: Tensor | None,  # int [...]
    word: Tensor,  # [words, width]
    position: Tensor | None,  # [positions, width]
    token_type: Tensor | None,  # [types, width]
    mean: Tensor,  # float32 [...]
    rstd: Tensor,  # float32 [...]
    weight: Tensor | None,  # [width]
    dropout_p: float,
    seed: Tensor | None,  # int64 [1]; not read when dropout_p == 0
    offset: int,
    padding_idx: int,  # this row of word gets no gradient; -1: every row does
    needs: Sequence[bool],  # dword, dposition, dtoken_type, dweight, dbias
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients in the shapes of the tables and parameters, float32; [0] for what is not needed.

    Raises as `embedding_layer_norm` does.
    """
    operation = "embedding_layer_norm_backward"
    tables = (word, position, token_type)
    check_tensors(operation, grad_y=grad_y, word=word, position=position, token_type=token_type, weight=weight)
    check_tensors(operation, mean=mean, rstd=rstd)
    width = word.shape[1]
    all_ids = (input_ids, position_ids, token_type_ids)
    inputs = _inputs(operation, all_ids, tables)
    dropout, seed, random = _dropout(operation, dropout_p, seed, offset)
    needs_tables = [needed and table is not None for needed, table in zip(needs, tables, strict=False)]
    needs_parameters = needs[3] or needs[4]

    rows = input_ids.numel()
    allocate = torch.empty if rows else torch.zeros
    dweight, dbias = (
        allocate(width if needs_parameters else 0, dtype=torch.float32, device=word.device) for _ in range(2)
    )
    d_sum = torch.empty((rows, width) if any(needs_tables) else 0, dtype=word.dtype, device=word.device)
    if rows and width and (any(needs_tables) or needs_parameters):
        device = device_of(word)
        line = _configs.row_tile(operation, min(width, _configs.MAX_WIDTH), device)
        block, tile_rows = blocked(width, line)
        blocks = triton.cdiv(width, block)
        programs = triton.cdiv(_configs.PROGRAMS_PER_PROCESSOR * device.processors, blocks)
        programs = min(programs, triton.cdiv(rows, tile_rows))
        grad_y = as_rows(grad_y, width)
        tensors = (*inputs.pointers, grad_y, dense(weight), seed, mean.contiguous(), rstd.contiguous())
        scalars = (rows, width, *inputs.sizes, *inputs.strides, grad_y.stride(0), *random)
        constexprs = dict(DROPOUT=dropout, RUN=16 // word.element_size(), BLOCK=block)
        row_means = partials = None
        if needs_parameters:
            partials = torch.empty((2, programs, width), dtype=torch.float32, device=word.device)
        if blocks > 1:
            row_means = torch.empty((2, rows), dtype=torch.float32, device=word.device)
            launch(
                _row_means_kernel, (rows,), word, *tensors, row_means, *scalars, num_warps=line.num_warps, **constexprs
            )
        launch(
            _backward_kernel, (programs, blocks), word,
            *tensors, row_means, d_sum if any(needs_tables) else None, partials, *scalars,
            num_warps=line.num_warps, ROWS=tile_rows, STAGES=line.num_stages, **constexprs,
        )  # fmt: skip
        if partials is not None:
            add_partials(partials, (dweight, dbias), needs[3:])
    nothing = torch.empty(0, dtype=torch.float32, device=word.device)
    gradients = [nothing, nothing.clone(), nothing.clone()]
    for i, (ids, table) in enumerate(zip(all_ids, tables, strict=True)):
        if needs_tables[i] and ids is not None and table is not None:
            skipped = padding_idx if i == 0 else -1
            gradients[i] = table_gradient(d_sum, ids.reshape(-1), table.shape[0], skipped)
    dword, dposition, dtoken_type = gradients
    dweight, dbias = (
        d if needed else torch.empty_like(nothing) for d, needed in zip((dweight, dbias), needs[3:], strict=True)
    )
    return dword, dposition, dtoken_type, dweight, dbias


# --------------------------------------------------------------------------------------------------------------- shared


class _Inputs:
    """Ids and tables as the kernels take them."""

    def __init__(self, ids: Sequence[Tensor | None], tables: Sequence[Tensor | None]) -> None:
        flat = [None if each is None else each.reshape(-1).contiguous() for each in ids]
        readable = [None if table is None else as_rows(table, table.shape[1]) for table in tables]
        self.pointers = (*flat, *readable)
        self.sizes = [0 if table is None else table.shape[0] for table in readable]
        self.strides = [0 if table is None else table.stride(0) for table in readable]


def _inputs(operation: str, ids: Sequence[Tensor | None], tables: Sequence[Tensor | None]) -> _Inputs:
    names = ("input_ids", "position_ids", "token_type_ids")
    pairs = [
        pair if pair[0] is not None and pair[1] is not None else (None, None) for pair in zip(ids, tables, strict=True)
    ]
    for name, (each, table) in zip(names, pairs, strict=True):
        if each is None or table is None:
            continue
        check_device(operation, name, each)
        if each.numel() and not table.shape[0]:
            raise ValueError(
                f"{operation}: {name} has {each.numel()} ids and their table no rows; it must hold at least one"
            )
    return _Inputs([each for each, _ in pairs], [table for _, table in pairs])


def _dropout(
    operation: str, dropout_p: float, seed: Tensor | None, offset: int
) -> tuple[bool, Tensor | None, tuple[int, int, float]]:
    """(whether there is any, the seed, the kernels' counter, threshold and scale)."""
    random = first_counter(offset), keep_threshold(dropout_p), keep_scale(dropout_p)
    return dropout_p != 0.0, check_seed(operation, seed) if dropout_p != 0.0 else None, random


# -------------------------------------------------------------------------------------------------------- ahead of time


def aot_cases() -> Iterator[AotCase]:
    """What is compiled ahead of time: every line of the tables, usual widths, each dtype and alignment."""
    operations = ("embedding_layer_norm", "embedding_layer_norm_backward")
    widths = sorted({128, 384, 768} | _configs.row_tile_widths(*operations))
    for columns, (dtype, name), aligned in itertools.product(widths, DTYPE_NAMES.items(), (True, False)):
        width = columns if aligned else columns - 1
        for call_name, call in _aot_calls(width, dtype, aligned).items():
            operation, _, variant = call_name.partition("-")
            if variant and columns != 768:  # what removes code is tried at one width
                continue
            parts = [operation, f"w{width}", name, variant, "" if aligned else "unaligned"]
            sample = columns == 768 and not variant and name == "bf16" and aligned
            yield AotCase("-".join(filter(None, parts)), call, sample)


def _aot_calls(width: int, dtype: torch.dtype, aligned: bool) -> dict[str, Callable[[], object]]:
    rows = 256
    ids, seed = (meta_tensor(n, dtype=torch.int64, aligned=aligned) for n in (rows, 1))
    tables = tuple(meta_tensor(n, width, dtype=dtype, aligned=aligned) for n in (1000, 512, 2))
    parameter, grad_y = (meta_tensor(*shape, dtype=dtype, aligned=aligned) for shape in ((width,), (rows, width)))
    statistics = meta_tensor(rows, dtype=torch.float32)
    everything, words = (ids, ids, ids, *tables), (ids, None, None, tables[0], None, None)
    return {
        "embedding_layer_norm": lambda: embedding_layer_norm(
            *everything, parameter, parameter, 1e-12, 0.1, seed, 0, True
        ),
        "embedding_layer_norm-words": lambda: embedding_layer_norm(*words, None, None, 1e-12, 0.0, None, 0, False),
        "embedding_layer_norm_backward": lambda: embedding_layer_norm_backward(
            grad_y, *everything, statistics, statistics, parameter, 0.1, seed, 0, 0, [True] * 5
        ),
        "embedding_layer_norm_backward-words": lambda: embedding_layer_norm_backward(
            grad_y, *words, statistics, statistics, None, 0.0, None, 0, -1, [True] + [False] * 4
        ),
    }
