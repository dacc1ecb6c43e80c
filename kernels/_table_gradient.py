"""The gradient of a table that rows were gathered from: for each of its rows the sum of those gradients that it was read for.

    out[i] = sum(values[token] for token in range(tokens) if ids[token] == i)

No atomics: tokens are sorted by id (a stable sort), which makes a row's tokens a segment, and a segment is added in a
fixed order. A chunk of sorted tokens that lies inside one segment is summed by a program of its own first, so that a table
of two rows keeps as many programs busy as one of thirty thousand: no program adds more than two chunks of tokens
and a chunk's share of the sums. Every element of the table's gradient is written once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastbert.kernels import _configs
from fastbert.kernels._launch import device_of, launch


@triton.jit
def _sum_of_rows(
    values,  # [tokens, width]
    order,  # int64 [tokens], or None: the rows themselves
    first, last, column, width,
    ROWS: tl.constexpr,
):  # fmt: skip
    """The sum of values[order[first:last]], float32 [COLUMNS]."""
    total = tl.zeros([ROWS, column.shape[0]], tl.float32)
    in_width = (column < width)[None, :]
    for start in range(first, last, ROWS):
        place = start + tl.arange(0, ROWS)
        row = place.to(tl.int64)
        if order is not None:
            row = tl.load(order + row, mask=place < last, other=0)
        in_bounds = (place < last)[:, None] & in_width
        total += tl.load(values + row[:, None] * width + column[None, :], mask=in_bounds, other=0.0).to(tl.float32)
    return tl.sum(total, axis=0)


@triton.jit
def _chunk_sums_kernel(
    values,  # [tokens, width]
    sorted_ids,  # int32 [tokens]
    order,  # int64 [tokens]
    sums,  # float32 [tokens / CHUNK, width], written for chunks that lie inside one segment
    width,
    CHUNK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Grid: (whole chunks, blocks of columns)."""
    chunk = tl.program_id(0)
    first = chunk * CHUNK
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    if tl.load(sorted_ids + first) == tl.load(sorted_ids + first + (CHUNK - 1)):
        total = _sum_of_rows(values, order, first, first + CHUNK, column, width, ROWS)
        tl.store(sums + tl.cast(chunk, tl.int64) * width + column, total, mask=column < width)


@triton.jit(do_not_specialize=["skipped"])
def _segment_sums_kernel(
    values,  # [tokens, width]
    order,  # int64 [tokens]
    boundaries,  # int32 [table rows + 1]: the sorted tokens of table row i are boundaries[i] to boundaries[i + 1]
    chunk_sums,  # float32 [tokens / CHUNK, width]
    out,  # float32 [table rows, width], written
    width, skipped,
    CHUNK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Grid: (table rows, blocks of columns)."""
    table_row = tl.program_id(0)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    first = tl.load(boundaries + table_row)
    last = tl.load(boundaries + table_row + 1)
    last = tl.where(table_row == skipped, first, last)
    first_chunk, last_chunk = tl.cdiv(first, CHUNK), last // CHUNK
    total = _sum_of_rows(values, order, first, tl.minimum(last, first_chunk * CHUNK), column, width, ROWS)
    total += _sum_of_rows(chunk_sums, None, first_chunk, last_chunk, column, width, ROWS)
    total += _sum_of_rows(values, order, tl.maximum(first_chunk, last_chunk) * CHUNK, last, column, width, ROWS)
    tl.store(out + tl.cast(table_row, tl.int64) * width + column, total, mask=column < width)


def table_gradient(
    values: Tensor,  # [tokens, width], contiguous
    ids: Tensor,  # int [tokens]; clamped to the table
    table_rows: int,
    skipped: int = -1,  # this row of the table gets zeros
) -> Tensor:
    """float32 [table_rows, width]."""
    tokens, width = values.shape
    out = torch.empty((table_rows, width), dtype=torch.float32, device=values.device)
    if not out.numel():
        return out
    sorted_ids, order = torch.sort(ids.clamp(0, table_rows - 1).to(torch.int32), stable=True)
    every_row = torch.arange(table_rows + 1, dtype=torch.int32, device=values.device)
    boundaries = torch.searchsorted(sorted_ids, every_row, out_int32=True)
    tile = _configs.table_tile(width, device_of(values))
    constexprs = dict(CHUNK=tile.chunk, ROWS=tile.rows, COLUMNS=tile.columns)
    column_blocks = triton.cdiv(width, tile.columns)
    chunk_sums = torch.empty((tokens // tile.chunk, width), dtype=torch.float32, device=values.device)
    if chunk_sums.numel():
        launch(
            _chunk_sums_kernel, (chunk_sums.shape[0], column_blocks), values,
            values, sorted_ids, order, chunk_sums, width,
            num_warps=tile.num_warps, **constexprs,
        )  # fmt: skip
    launch(
        _segment_sums_kernel, (table_rows, column_blocks), values,
        values, order, boundaries, chunk_sums, out, width, skipped,
        num_warps=tile.num_warps, **constexprs,
    )  # fmt: skip
    return out
