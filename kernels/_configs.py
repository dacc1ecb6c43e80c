"""Launch configurations: tables by (operation, architecture), chosen by the width of a row. No autotuning at run time.

All numbers here are chosen by counting registers and bytes, and held by the ahead-of-time compiler (no spills on
sm_90); none is measured on a GPU yet. A line that a measurement confirms or replaces names its result file."""

from dataclasses import dataclass

from fastbert.kernels._launch import Device


@dataclass(frozen=True)
class RowTile:
    """How an operation on rows is launched, for rows of at most `max_width` elements.

    A program holds `tile` elements at a time: as many whole rows as fit, or, of a row wider than that, a block of
    columns.
    """

    max_width: int
    tile: int  # elements; a power of two
    num_warps: int
    num_stages: int = 1  # tiles in flight in a grid-stride loop, by asynchronous copies to shared memory

    def __post_init__(self) -> None:
        if self.tile & (self.tile - 1) or self.tile < MIN_BLOCK:
            raise ValueError(f"tile is {self.tile}; it must be a power of two and at least {MIN_BLOCK}")


#: The narrowest block of columns: two 16-byte accesses of a 16-bit dtype, so that the dropout stream's groups of 8 fit.
MIN_BLOCK = 16
#: The widest row that the row kernels take; they are compiled ahead of time up to here.
MAX_WIDTH = 65536

# Forward, "cuda". layer_norm: 128 threads with 16 elements each (two 16-byte loads of a 16-bit dtype) take 40 to 48
# registers on sm_90, so at least 8 programs fit a multiprocessor: 8 * 2048 * 2 bytes = 32 KiB of loads in flight on
# each, where 4.3 TB/s * 0.7 us / 132 = 23 KiB are wanted (Little's law). add_layer_norm reads two tensors, so 8
# elements a thread do the same. Wider rows get more threads, up to 512, then 16 elements a thread; with 32 an
# unaligned row spills, so rows above 8192 are read twice, in blocks of columns (the second time mostly from L2).
#
# Backward, "cuda": grad_y, x, wdy and the sums over rows are one float32 an element each. layer_norm with 16 elements a
# thread takes up to 128 registers when aligned, add_layer_norm with 8 up to 115: no more than the 128 that let two
# programs of 256 threads live on a multiprocessor. The two hold 2 * 2 * 4096 * 2 bytes = 32 KiB (2 * 3 * 2048 * 2 = 24
# KiB) of loads, and as much again is copied to shared memory ahead. Above 4096 the sums of an unaligned row spill:
# columns are worked on in blocks.
#
# "hip": a wavefront has 64 lanes, so half the warps make the same tile per thread. No stages: 64 KiB of LDS a compute
# unit.
_ROW_TILES: dict[tuple[str, str], tuple[RowTile, ...]] = {
    ("layer_norm", "cuda"): (
        RowTile(max_width=2048, tile=2048, num_warps=4),
        RowTile(max_width=4096, tile=4096, num_warps=8),
        RowTile(max_width=8192, tile=8192, num_warps=16),
        RowTile(max_width=MAX_WIDTH, tile=4096, num_warps=8),
    ),
    ("layer_norm", "hip"): (
        RowTile(max_width=2048, tile=2048, num_warps=2),
        RowTile(max_width=4096, tile=4096, num_warps=4),
        RowTile(max_width=8192, tile=8192, num_warps=8),
        RowTile(max_width=MAX_WIDTH, tile=4096, num_warps=4),
    ),
    ("add_layer_norm", "cuda"): (
        RowTile(max_width=1024, tile=1024, num_warps=4),
        RowTile(max_width=2048, tile=2048, num_warps=8),
        RowTile(max_width=4096, tile=4096, num_warps=16),
        RowTile(max_width=8192, tile=8192, num_warps=16),
        RowTile(max_width=MAX_WIDTH, tile=2048, num_warps=8),
    ),
    ("add_layer_norm", "hip"): (
        RowTile(max_width=1024, tile=1024, num_warps=2),
        RowTile(max_width=2048, tile=2048, num_warps=4),
        RowTile(max_width=4096, tile=4096, num_warps=8),
        RowTile(max_width=8192, tile=8192, num_warps=8),
        RowTile(max_width=MAX_WIDTH, tile=2048, num_warps=4),
    ),
    ("layer_norm_backward", "cuda"): (
        RowTile(max_width=4096, tile=4096, num_warps=8, num_stages=2),
        RowTile(max_width=MAX_WIDTH, tile=4096, num_warps=8, num_stages=2),
    ),
    ("layer_norm_backward", "hip"): (
        RowTile(max_width=4096, tile=4096, num_warps=4),
        RowTile(max_width=8192, tile=8192, num_warps=8),
        RowTile(max_width=MAX_WIDTH, tile=4096, num_warps=4),
    ),
    ("add_layer_norm_backward", "cuda"): (
        RowTile(max_width=2048, tile=2048, num_warps=8, num_stages=2),
        RowTile(max_width=4096, tile=4096, num_warps=16, num_stages=2),
        RowTile(max_width=MAX_WIDTH, tile=2048, num_warps=8, num_stages=2),
    ),
    ("add_layer_norm_backward", "hip"): (
        RowTile(max_width=2048, tile=2048, num_warps=4),
        RowTile(max_width=4096, tile=4096, num_warps=8),
        RowTile(max_width=MAX_WIDTH, tile=2048, num_warps=4),
    ),
}  # (operation, architecture or family) -> lines in order of max_width

#: Programs of a grid-stride loop for each multiprocessor: two, as the registers above allow; more only lengthen the
#: second reduction, which reads one row of partial sums a program.
PROGRAMS_PER_PROCESSOR = 2


@dataclass(frozen=True)
class ReduceTile:
    """How the programs' partial sums are added: a tile [programs, columns] at a time."""

    programs: int
    columns: int
    num_warps: int


#: A row of a tile is one line of 128 bytes, and 1024 columns still make 32 programs. In the interpreter, where each
#: program costs a millisecond whatever its size, wide tiles.
_REDUCE_TILES: dict[str, ReduceTile] = {
    "cuda": ReduceTile(programs=64, columns=32, num_warps=4),
    "hip": ReduceTile(programs=64, columns=32, num_warps=2),
    "interpreter": ReduceTile(programs=4, columns=1024, num_warps=4),
}


def reduce_tile(device: Device) -> ReduceTile:
    """The tile of the second reduction."""
    return _REDUCE_TILES.get(device.architecture) or _REDUCE_TILES[device.family]


def row_tile(operation: str, width: int, device: Device) -> RowTile:
    """The line of `operation`'s table for rows of `width` elements; the caller has checked width <= MAX_WIDTH."""
    table = _ROW_TILES.get((operation, device.architecture)) or _ROW_TILES[operation, device.family]
    return next(line for line in table if width <= line.max_width)


def row_tile_widths() -> set[int]:
    """The widest row of every line of every table: what the ahead-of-time compiler has to try."""
    return {line.max_width for table in _ROW_TILES.values() for line in table}
