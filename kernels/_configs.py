"""Launch configurations of the kernels on rows and elements: tables by (operation, architecture). No autotuning at run time.

Those of the losses are in _loss_configs.py, those of attention in _attention_configs.py. All numbers there and here are
chosen by counting registers and bytes, and held by the ahead-of-time compiler (no spills on sm_90); none is measured on a
GPU yet. A line that a measurement confirms or replaces names its result file."""

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
# rms_norm does layer_norm's work on the same bytes, with fewer registers; but for rows in blocks of columns ptxas then aims at 80,
# and spills 8 bytes of float32, unless the block is narrower.
_ROW_TILES |= {
    (operation.replace("layer_norm", "rms_norm"), family): _ROW_TILES[operation, family]
    for operation in ("layer_norm", "layer_norm_backward")
    for family in ("cuda", "hip")
}
_ROW_TILES["rms_norm_backward", "cuda"] = (
    RowTile(max_width=4096, tile=4096, num_warps=8, num_stages=2),
    RowTile(max_width=MAX_WIDTH, tile=2048, num_warps=8, num_stages=2),
)

# softmax, "cuda": one reading and one writing of a row, as layer_norm, so its shape; a mask adds a reading and no sums, and
# its backward two readings. Embeddings: three gathered rows are three tensors read, as add_layer_norm's two and its bias;
# backward grad_y is a fourth, and the sums of dweight and dbias are its too. Sixteen narrow unaligned rows a tile, each with
# three places of its own, would spill: half as many.
_ROW_TILES |= {
    (operation, family): _ROW_TILES[like, family]
    for family in ("cuda", "hip")
    for operation, like in (
        ("softmax", "layer_norm"),
        ("softmax_backward", "layer_norm"),
        ("embedding_layer_norm", "add_layer_norm"),
        ("embedding_layer_norm_backward", "add_layer_norm_backward"),
    )
}
# In blocks of 4096 columns a float32 row, its mask and its running sums spill 8 bytes with triton 3.6.0.
_ROW_TILES["softmax", "cuda"] = (
    *_ROW_TILES["layer_norm", "cuda"][:-1],
    RowTile(max_width=MAX_WIDTH, tile=2048, num_warps=8),
)
_ROW_TILES["embedding_layer_norm_backward", "cuda"] = (
    RowTile(max_width=256, tile=1024, num_warps=4, num_stages=2),
    *_ROW_TILES["embedding_layer_norm_backward", "cuda"],
)

#: Programs of a grid-stride loop for each multiprocessor: two, as the registers above allow; more only lengthen the
#: second reduction, which reads one row of partial sums a program.
PROGRAMS_PER_PROCESSOR = 2


@dataclass(frozen=True)
class ElementTile:
    """How an elementwise operation is launched, whatever the width of its rows."""

    tile: int  # elements that a program holds at a time; a power of two
    num_warps: int
    num_stages: int = 1  # as RowTile's


#: The widest head that the rotary kernel takes: a program holds whole ones.
MAX_ROTARY_HEAD_DIM = 1024
#: Rows of a tile in pack and unpack, where rows are short: unpack compares each row of its tile with each token.
MAX_PACK_ROWS = 32
#: Columns of a block: a divisor of the widths of feed-forward layers, so that few lanes idle.
MAX_ELEMENT_BLOCK = 1024
#: 16 elements of each tensor a thread, or 32 where only one is read: then the instructions that find addresses and masks are few
#: beside those of the activation (sm_90, bfloat16, exact GELU: 23 an element in all, of the 27 that memory leaves time for), and
#: the 9 to 16 programs that registers allow hold 64 KiB of loads and more on a multiprocessor, where 23 are wanted.
_ELEMENT_TILES: dict[tuple[str, str], ElementTile] = {
    ("bias_gelu", "cuda"): ElementTile(tile=4096, num_warps=4),
    ("bias_gelu", "hip"): ElementTile(tile=4096, num_warps=2),
    ("bias_gelu_backward", "cuda"): ElementTile(tile=2048, num_warps=4),
    ("bias_gelu_backward", "hip"): ElementTile(tile=2048, num_warps=2),
    # A grid-stride loop: two programs of 66 to 80 registers hold 2 * 2 * 4096 * 2 bytes = 32 KiB, and the next tiles. Of 32 bits
    # half as many elements are as many bytes, and nothing spills.
    ("bias_gelu_backward_dbias", "cuda"): ElementTile(tile=4096, num_warps=8, num_stages=2),
    ("bias_gelu_backward_dbias", "hip"): ElementTile(tile=4096, num_warps=4),
    ("gated_act", "cuda"): ElementTile(tile=2048, num_warps=4),
    ("gated_act", "hip"): ElementTile(tile=2048, num_warps=2),
    ("gated_act_backward", "cuda"): ElementTile(tile=2048, num_warps=4),
    ("gated_act_backward", "hip"): ElementTile(tile=2048, num_warps=2),
    ("rotary", "cuda"): ElementTile(tile=2048, num_warps=4),
    ("rotary", "hip"): ElementTile(tile=2048, num_warps=2),
    # Of 16-bit elements, half as many of 32 bits: 8 KiB a program. On paper unpack waits 1 us for its search and 2 for the rest,
    # while 12 programs keep 12 * (8 + 4) KiB moving on a multiprocessor, 1.4 times what memory takes. With 16 KiB it spills.
    # pack has no search to wait for, and twice the threads: with 32 elements each, rows off 16 bytes spill with triton 3.6.0.
    ("pack", "cuda"): ElementTile(tile=4096, num_warps=8),
    ("pack", "hip"): ElementTile(tile=4096, num_warps=2),
    ("unpack", "cuda"): ElementTile(tile=4096, num_warps=4),
    ("unpack", "hip"): ElementTile(tile=4096, num_warps=2),
}  # (operation, architecture or family)


def element_tile(operation: str, device: Device) -> ElementTile:
    """The line of `operation`'s table."""
    return _ELEMENT_TILES.get((operation, device.architecture)) or _ELEMENT_TILES[operation, device.family]


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


def row_tile_widths(*operations: str) -> set[int]:
    """The widest row of every line of the operations' tables: what the ahead-of-time compiler has to try."""
    return {line.max_width for (name, _), table in _ROW_TILES.items() if name in operations for line in table}


# ----------------------------------------------------------------------------------------------------------- embeddings


@dataclass(frozen=True)
class TableTile:
    """How gradients are summed into a table: tiles [rows, columns] of them; chunks of `chunk` rows have a program of their own."""

    chunk: int
    rows: int
    columns: int
    num_warps: int


#: 16384 tokens make 256 chunks of 64, so a table of two rows keeps 256 programs busy and then adds 128 of their sums a row;
#: half or twice the chunk would lengthen one of the two. Four rows of up to 1024 columns are 16 float32 sums a thread of 256.
_TABLE_CHUNK, _TABLE_ROWS, _TABLE_COLUMNS = 64, 4, 1024


def table_tile(width: int, device: Device) -> TableTile:
    """The tile for a table of `width` columns. In the interpreter chunks are short, so that few tokens make several."""
    columns = min(max(1 << (width - 1).bit_length(), 128), _TABLE_COLUMNS)
    threads = columns * _TABLE_ROWS // 16
    return TableTile(
        chunk=4 if device.architecture == "interpreter" else _TABLE_CHUNK,
        rows=_TABLE_ROWS,
        columns=columns,
        num_warps=max(1, threads // (64 if device.family == "hip" else 32)),
    )
