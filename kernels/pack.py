"""Rows of a padded batch gathered into a packed one, and put back: each is the other's gradient.

    pack:   packed[t] = padded[indices[t]]
    unpack: padded[indices[t]] = packed[t], and padding_value in every other row

unpack writes each row once, padding or not: a program finds by searching the ascending indices which tokens fall into its tile of
rows. Filling the batch first and then scattering into it would write the real rows twice.

On paper, 16384 rows of 1024 bfloat16, half of them real, on H200 (4.3 TB/s): 34 MB in pack, 7.8 us; 50 MB in unpack, 11.7 us.
"""

import functools
import math
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastbert.kernels import _configs
from fastbert.kernels._launch import AotCase, as_rows, check_device, device_of, launch
from fastbert.kernels._rows import meta_tensor

#: What values may be: the kernels move elements, whatever they mean.
VALUE_DTYPES = (
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
)
#: Indices that one step of the search looks at.
_PROBES = 128


@triton.jit(do_not_specialize=["total", "padded_rows", "blocks"])
def _pack_kernel(
    padded,  # [padded_rows, width]
    indices,  # int64 [total]
    packed,  # [total, width] contiguous, written
    total, padded_rows, width, padded_stride, blocks,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid: tiles of tokens * blocks of columns."""
    token = (tl.program_id(0) // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = ((tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK))[None, :]
    row = tl.load(indices + token, mask=token < total, other=-1)
    in_bounds = (token < total)[:, None] & (column < width)
    readable = in_bounds & ((row >= 0) & (row < padded_rows))[:, None]
    values = tl.load(padded + row[:, None] * padded_stride + column, mask=readable, other=0)
    tl.store(packed + token[:, None] * width + column, values, mask=in_bounds)


@triton.jit
def _tokens_before(indices, total, row, PROBES: tl.constexpr):
    """How many of the ascending indices are below `row`: PROBES of them at a time instead of one, as each look is a wait."""
    first = tl.cast(0, tl.int64)  # the answer is in [first, last]
    last = tl.cast(total, tl.int64)
    while first < last:
        step = (last - first + PROBES - 1) // PROBES
        probe = first + tl.arange(0, PROBES) * step
        below = tl.load(indices + probe, mask=probe < last, other=9223372036854775807) < row
        count = tl.sum(below.to(tl.int64))
        # indices[first + (count - 1) * step] is below, and the next probe, if there is one, is not.
        last = tl.where(count == 0, first, tl.minimum(first + count * step, last))
        first = tl.where(count == 0, first, first + (count - 1) * step + 1)
    return first


@triton.jit(do_not_specialize=["total", "padded_rows", "blocks", "padding_value"])
def _unpack_kernel(
    packed,  # [total, width]
    indices,  # int64 [total], ascending
    padded,  # [padded_rows, width] contiguous, written
    padding_value,
    total, padded_rows, width, packed_stride, blocks,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, PROBES: tl.constexpr,
):  # fmt: skip
    """Grid: tiles of padded rows * blocks of columns."""
    first_row = (tl.program_id(0) // blocks).to(tl.int64) * ROWS
    column = ((tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK))[None, :]
    row = first_row + tl.arange(0, ROWS)
    first_token = _tokens_before(indices, total, first_row, PROBES)
    # At most ROWS tokens fall into the tile. Which of them is a row's: the one whose index it is.
    token = first_token + tl.arange(0, ROWS)
    index = tl.load(indices + token, mask=token < total, other=-1)
    hit = index[None, :] == row[:, None]
    # The largest, so that indices which are not ascending as they must be never name a token that is not there.
    source = tl.max(tl.where(hit, token[None, :], 0), axis=1)
    is_real = tl.sum(hit.to(tl.int32), axis=1) > 0
    in_bounds = (row < padded_rows)[:, None] & (column < width)
    padding = tl.full([ROWS, BLOCK], padding_value, packed.dtype.element_ty)
    values = tl.load(
        packed + source[:, None] * packed_stride + column, mask=in_bounds & is_real[:, None], other=padding
    )
    tl.store(padded + row[:, None] * width + column, values, mask=in_bounds)


def pack(
    padded: Tensor,  # [padded_rows, ...]
    indices: Tensor,  # int64 [total], ascending
) -> Tensor:
    """padded[indices], [total, ...], contiguous; zeros for an index outside the batch.

    Raises ValueError for a tensor that is not on the kernels' device, TypeError for a dtype.
    """
    _check("pack", padded, indices)
    total = indices.shape[0]
    packed = torch.empty((total, *padded.shape[1:]), dtype=padded.dtype, device=padded.device)
    if packed.numel():
        rows, out = _rows(padded), _rows(packed)
        width = rows.shape[1]
        tile_rows, block, num_warps = _tile("pack", rows, total)
        blocks = triton.cdiv(width, block)
        launch(
            _pack_kernel, (triton.cdiv(total, tile_rows) * blocks,), padded,
            rows, indices.contiguous(), out, total, rows.shape[0], width, rows.stride(0), blocks,
            num_warps=num_warps, ROWS=tile_rows, BLOCK=block,
        )  # fmt: skip
    return packed


def unpack(
    packed: Tensor,  # [total, ...]
    indices: Tensor,  # int64 [total], ascending
    padded_rows: int,
    padding_value: float,
) -> Tensor:
    """[padded_rows, ...], contiguous, with packed[t] at indices[t] and padding_value elsewhere. Raises as `pack` does."""
    _check("unpack", packed, indices)
    padded = torch.empty((padded_rows, *packed.shape[1:]), dtype=packed.dtype, device=packed.device)
    if padded.numel():
        rows, out = _rows(packed), _rows(padded)
        width = rows.shape[1]
        tile_rows, block, num_warps = _tile("unpack", rows, padded_rows)
        blocks = triton.cdiv(width, block)
        launch(
            _unpack_kernel, (triton.cdiv(padded_rows, tile_rows) * blocks,), packed,
            rows, indices.contiguous(), out,
            float(padding_value) if packed.is_floating_point() else int(padding_value),
            indices.shape[0], padded_rows, width, rows.stride(0), blocks,
            num_warps=num_warps, ROWS=tile_rows, BLOCK=block, PROBES=_PROBES,
        )  # fmt: skip
    return padded


def _check(operation: str, values: Tensor, indices: Tensor) -> None:
    if values.dtype not in VALUE_DTYPES:
        raise TypeError(
            f"{operation}: the values are {values.dtype}; the Triton kernels take {', '.join(map(str, VALUE_DTYPES))}. "
            "Use fastbert.use_reference()."
        )
    check_device(operation, "values", values)
    check_device(operation, "indices", indices)


def _rows(values: Tensor) -> Tensor:
    """[rows, ...] as [rows, width], True and False as 1 and 0."""
    if values.dtype is torch.bool:
        values = values.view(torch.uint8)
    width = math.prod(values.shape[1:])
    return as_rows(values, width)


def _tile(operation: str, rows: Tensor, count: int) -> tuple[int, int, int]:
    """(rows of a tile, columns of a block, warps) for an output of `count` rows."""
    line = _configs.element_tile(operation, device_of(rows))
    block = min(max(triton.next_power_of_2(rows.shape[1]), _configs.MIN_BLOCK), _configs.MAX_ELEMENT_BLOCK)
    tile_rows = min(line.tile * 2 // max(rows.element_size(), 2) // block, _configs.MAX_PACK_ROWS)
    return min(tile_rows, triton.next_power_of_2(count)), block, line.num_warps


def aot_cases() -> Iterator[AotCase]:
    """What is compiled ahead of time: wide and narrow rows, each size of element and alignment."""
    indices = meta_tensor(40, dtype=torch.int64)
    for dtype in (torch.float32, torch.bfloat16, torch.int64, torch.uint8):
        for width in (1, 767, 768):
            padded, packed = (meta_tensor(rows, width, dtype=dtype, aligned=width == 768) for rows in (64, 40))
            name = f"w{width}-{str(dtype).removeprefix('torch.')}{'' if width == 768 else '-unaligned'}"
            sample = width == 768 and dtype is torch.bfloat16
            yield AotCase(f"pack-{name}", functools.partial(pack, padded, indices), sample)
            yield AotCase(f"unpack-{name}", functools.partial(unpack, packed, indices, 64, 0), sample)
