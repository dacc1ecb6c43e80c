"""What the kernels on rows [rows, width] share: widths, blocks of columns, and sums over rows without atomics.

A sum over rows (the gradient of a parameter) takes two kernels: each program of the first writes the sums over its own
rows, and the second adds the programs' in a fixed order, so the same input gives the same output, bit for bit.
"""

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastbert.kernels import _configs
from fastbert.kernels._launch import device_of, launch

DTYPE_NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


@triton.jit
def _add_partials(partial, out, programs, width, PROGRAMS: tl.constexpr, COLUMNS: tl.constexpr):
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
    first,  # float32 [width], written, or None
    second,  # float32 [width], written, or None
    third,  # float32 [width], written, or None
    programs, width,
    PROGRAMS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Add the programs' partial sums. Grid: (blocks of columns, 3): first, second, third."""
    kind = tl.program_id(1)
    partial = partials + kind * programs.to(tl.int64) * width
    if first is not None:  # noqa: SIM102 (goes away at compile time)
        if kind == 0:
            _add_partials(partial, first, programs, width, PROGRAMS, COLUMNS)
    if second is not None:  # noqa: SIM102
        if kind == 1:
            _add_partials(partial, second, programs, width, PROGRAMS, COLUMNS)
    if third is not None:  # noqa: SIM102
        if kind == 2:
            _add_partials(partial, third, programs, width, PROGRAMS, COLUMNS)


def add_partials(
    partials: Tensor,  # float32 [sums, programs, width], written by a launched kernel where needed
    outs: Sequence[Tensor],  # float32 [width] each, written where needed; at most three
    needs: Sequence[bool],
) -> None:
    """Launch the second kernel of the sums over rows; `outs` and `needs` are in the order of the partials."""
    sums, programs, width = partials.shape
    needed = [out if need else None for out, need in zip(outs, needs, strict=True)]
    tile = _configs.reduce_tile(device_of(partials))
    launch(
        _reduce_kernel, (triton.cdiv(width, tile.columns), sums), partials,
        partials, *needed, *[None] * (3 - sums), programs, width,
        num_warps=tile.num_warps, PROGRAMS=tile.programs, COLUMNS=tile.columns,
    )  # fmt: skip


def checked_width(operation: str, x: Tensor) -> int:
    """The last dimension. Raises ValueError where the kernels that hold whole rows do not take it."""
    width = x.shape[-1] if x.dim() else 0
    if not 1 <= width <= _configs.MAX_WIDTH:
        raise ValueError(
            f"{operation}: the last dimension is {width}; the Triton kernels take 1 to {_configs.MAX_WIDTH}. "
            "Use fastbert.use_reference() for other widths."
        )
    return width


def blocked(width: int, line: _configs.RowTile) -> tuple[int, int]:
    """(columns of a block, rows of a tile): whole rows where the tile is wide enough for one."""
    block = min(max(triton.next_power_of_2(width), _configs.MIN_BLOCK), line.tile)
    return block, line.tile // block


def blocked_elementwise(rows: int, width: int, tile: int) -> tuple[int, int]:
    """As `blocked`, where no result depends on a whole row: blocks of MAX_ELEMENT_BLOCK columns, or of one row alone."""
    most = tile if rows == 1 else _configs.MAX_ELEMENT_BLOCK
    block = min(max(triton.next_power_of_2(width), _configs.MIN_BLOCK), most)
    return block, min(tile // block, triton.next_power_of_2(rows))


def dense(parameter: Tensor | None) -> Tensor | None:
    """What a kernel reads as one run of elements."""
    return None if parameter is None else parameter.contiguous()


def meta_tensor(*shape: int, dtype: torch.dtype, aligned: bool = True) -> Tensor:
    """For `aot_cases`; an unaligned tensor starts one element after an aligned one."""
    start = 0 if aligned else 1
    return torch.empty(start + math.prod(shape), dtype=dtype, device="meta")[start:].view(shape)
