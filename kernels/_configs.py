"""Launch configurations: tables by (operation, architecture), chosen by the width of a row. No autotuning at run time.

All numbers here are chosen by counting registers and bytes, and held by the ahead-of-time compiler (no spills on
sm_90); none is measured on a GPU yet. A line that a measurement confirms or replaces names its result file."""

import itertools
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
    # A grid-stride loop: two programs of 66 to 80 registers hold 2 * 2 * 4096 * 2 bytes = 32 KiB, and the next tiles.
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
    ("pack", "cuda"): ElementTile(tile=4096, num_warps=4),
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


# ------------------------------------------------------------------------------------------------------------ attention


@dataclass(frozen=True)
class AttentionTile:
    """How an attention kernel is launched, for heads of at most `max_head_dim` and sequences of at most `max_length`."""

    max_head_dim: int
    block_m: int  # queries a program (forward, dq) or a step of its loop (dk and dv) takes
    block_n: int  # keys, the other way round
    num_warps: int
    num_stages: int = 1  # steps whose tiles are loaded ahead, by asynchronous copies to shared memory
    max_length: int = 2**31
    split: bool = True  # dk and dv: a loop of their own for blocks that need no mask; costs registers

    def __post_init__(self) -> None:
        for block in (self.block_m, self.block_n):
            if block & (block - 1) or block < 16:
                raise ValueError(f"a block is {block}; it must be a power of two and at least 16, for tensor cores")

    @property
    def constexprs(self) -> dict[str, int]:
        return dict(BLOCK_M=self.block_m, BLOCK_N=self.block_n, STAGES=self.num_stages)


#: The widest head that the attention kernels take.
MAX_HEAD_DIM = 256

#: What the keys and values of heads that run together may take of the L2 cache: H200 has 50 MB, in two halves that each
#: keep their own copy.
L2_BYTES = 16 * 2**20

# "cuda", 16 bits, forward, 64 wide: a thread of 128 has 64 float32 of logits and 64 of the result, 224 to 239 registers in
# all on sm_90, so two programs share a multiprocessor and one computes exponentials while the other multiplies; 3 stages of
# keys and values are 16 + 48 = 64 KiB of shared memory. With 128 keys a step it spills. A sequence of up to 128 tokens has
# one program a head. Dropout's random words take twice the threads. Wider heads: 256 threads and 2 stages, 96 and 128 KiB.
#
# Backward: dk and dv (64 float32 a thread at 128 keys), logits and their gradients, both statistics of each query in every
# thread: 32 queries a step, and wider heads keep all blocks in one masked loop. Whole sequences: the same with out and dq;
# 256 keys leave room for 16 queries a step and none for dropout, whose sequences above 128 go the long way.
#
# 32 bits: true float32 products have no tensor cores, and their operands are registers: what does not spill is small.
#
# "hip": 64 KiB of shared memory a compute unit, so no stages.
_ATTENTION_TILES: dict[tuple[str, str, int], tuple[AttentionTile, ...]] = {
    ("attention", "cuda", 2): (
        AttentionTile(max_head_dim=64, block_m=128, block_n=64, num_warps=4, num_stages=3),
        AttentionTile(max_head_dim=128, block_m=128, block_n=64, num_warps=8, num_stages=2),
        AttentionTile(max_head_dim=256, block_m=128, block_n=32, num_warps=8, num_stages=2),
    ),
    ("attention_dropout", "cuda", 2): (
        AttentionTile(max_head_dim=64, block_m=128, block_n=64, num_warps=8, num_stages=3),
        AttentionTile(max_head_dim=128, block_m=128, block_n=64, num_warps=8, num_stages=2),
        AttentionTile(max_head_dim=256, block_m=128, block_n=32, num_warps=8, num_stages=2),
    ),
    ("attention", "cuda", 4): (
        AttentionTile(max_head_dim=64, block_m=32, block_n=16, num_warps=4),
        AttentionTile(max_head_dim=256, block_m=16, block_n=16, num_warps=4),
    ),
    ("attention", "hip", 2): (
        AttentionTile(max_head_dim=128, block_m=128, block_n=64, num_warps=4),
        AttentionTile(max_head_dim=256, block_m=64, block_n=32, num_warps=4),
    ),
    ("attention", "hip", 4): (
        AttentionTile(max_head_dim=128, block_m=64, block_n=32, num_warps=4),
        AttentionTile(max_head_dim=256, block_m=32, block_n=16, num_warps=4),
    ),
    ("attention_backward_dq", "cuda", 2): (
        AttentionTile(max_head_dim=64, block_m=128, block_n=64, num_warps=8, num_stages=2),
        AttentionTile(max_head_dim=128, block_m=128, block_n=64, num_warps=8),
        AttentionTile(max_head_dim=256, block_m=32, block_n=32, num_warps=8),
    ),
    ("attention_backward_dq_dropout", "cuda", 2): (
        AttentionTile(max_head_dim=64, block_m=128, block_n=64, num_warps=8, num_stages=2),
        AttentionTile(max_head_dim=128, block_m=128, block_n=32, num_warps=8),
        AttentionTile(max_head_dim=256, block_m=32, block_n=32, num_warps=8),
    ),
    ("attention_backward_dq", "cuda", 4): (
        AttentionTile(max_head_dim=64, block_m=32, block_n=16, num_warps=4),
        AttentionTile(max_head_dim=128, block_m=16, block_n=16, num_warps=8),
        AttentionTile(max_head_dim=256, block_m=16, block_n=16, num_warps=4),
    ),
    ("attention_backward_dq", "hip", 2): (
        AttentionTile(max_head_dim=128, block_m=64, block_n=64, num_warps=4),
        AttentionTile(max_head_dim=256, block_m=32, block_n=32, num_warps=4),
    ),
    ("attention_backward_dq", "hip", 4): (
        AttentionTile(max_head_dim=128, block_m=32, block_n=16, num_warps=4),
        AttentionTile(max_head_dim=256, block_m=16, block_n=16, num_warps=4),
    ),
    ("attention_backward_dk_dv", "cuda", 2): (
        AttentionTile(max_head_dim=64, block_m=32, block_n=128, num_warps=8, num_stages=2),
        AttentionTile(max_head_dim=128, block_m=32, block_n=128, num_warps=8, num_stages=2, split=False),
        AttentionTile(max_head_dim=256, block_m=32, block_n=32, num_warps=8, split=False),
    ),
    ("attention_backward_dk_dv_dropout", "cuda", 2): (
        AttentionTile(max_head_dim=64, block_m=32, block_n=128, num_warps=8),
        AttentionTile(max_head_dim=128, block_m=16, block_n=64, num_warps=8, num_stages=2, split=False),
        AttentionTile(max_head_dim=256, block_m=32, block_n=32, num_warps=8, split=False),
    ),
    ("attention_backward_dk_dv", "cuda", 4): (
        AttentionTile(max_head_dim=64, block_m=16, block_n=32, num_warps=4),
        AttentionTile(max_head_dim=128, block_m=16, block_n=16, num_warps=8),
        AttentionTile(max_head_dim=256, block_m=16, block_n=16, num_warps=4),
    ),
    ("attention_backward_dk_dv_dropout", "cuda", 4): (
        AttentionTile(max_head_dim=64, block_m=16, block_n=16, num_warps=8),
        AttentionTile(max_head_dim=128, block_m=32, block_n=16, num_warps=8),
        AttentionTile(max_head_dim=256, block_m=16, block_n=16, num_warps=8),
    ),
    ("attention_backward_dk_dv", "hip", 2): (
        AttentionTile(max_head_dim=128, block_m=32, block_n=64, num_warps=4),
        AttentionTile(max_head_dim=256, block_m=32, block_n=32, num_warps=4),
    ),
    ("attention_backward_dk_dv", "hip", 4): (
        AttentionTile(max_head_dim=128, block_m=16, block_n=32, num_warps=4),
        AttentionTile(max_head_dim=256, block_m=16, block_n=16, num_warps=4),
    ),
    ("attention_backward_whole", "cuda", 2): (
        AttentionTile(max_head_dim=64, block_m=32, block_n=128, num_warps=8, num_stages=2, max_length=128),
        AttentionTile(max_head_dim=64, block_m=16, block_n=256, num_warps=8, max_length=256),
    ),
    ("attention_backward_whole_dropout", "cuda", 2): (
        AttentionTile(max_head_dim=64, block_m=32, block_n=128, num_warps=8, max_length=128),
    ),
    ("attention_backward_whole", "hip", 2): (
        AttentionTile(max_head_dim=64, block_m=32, block_n=128, num_warps=4, max_length=128),
    ),
    ("attention_backward_mask", "cuda", 2): (
        AttentionTile(max_head_dim=128, block_m=64, block_n=64, num_warps=8),
        AttentionTile(max_head_dim=256, block_m=32, block_n=32, num_warps=8),
    ),
    ("attention_backward_mask", "cuda", 4): (AttentionTile(max_head_dim=256, block_m=16, block_n=16, num_warps=4),),
    ("attention_backward_mask", "hip", 2): (AttentionTile(max_head_dim=256, block_m=32, block_n=32, num_warps=4),),
    ("attention_backward_mask", "hip", 4): (AttentionTile(max_head_dim=256, block_m=16, block_n=16, num_warps=4),),
    ("attention_decode", "cuda", 2): (
        AttentionTile(max_head_dim=128, block_m=64, block_n=64, num_warps=4, num_stages=3),
        AttentionTile(max_head_dim=256, block_m=32, block_n=32, num_warps=4, num_stages=3),
    ),
    ("attention_decode", "cuda", 4): (AttentionTile(max_head_dim=256, block_m=16, block_n=16, num_warps=4),),
    ("attention_decode", "hip", 2): (
        AttentionTile(max_head_dim=128, block_m=64, block_n=64, num_warps=4),
        AttentionTile(max_head_dim=256, block_m=64, block_n=32, num_warps=4),
    ),
    ("attention_decode", "hip", 4): (AttentionTile(max_head_dim=256, block_m=16, block_n=16, num_warps=4),),
    # Small blocks: sequences of a few dozen tokens then have several, full ones and others.
    ("attention", "interpreter", 0): (AttentionTile(max_head_dim=256, block_m=16, block_n=32, num_warps=4),),
    ("attention_backward_dq", "interpreter", 0): (
        AttentionTile(max_head_dim=256, block_m=32, block_n=16, num_warps=4),
    ),
    ("attention_backward_dk_dv", "interpreter", 0): (
        AttentionTile(max_head_dim=256, block_m=16, block_n=32, num_warps=4),
    ),
    ("attention_backward_whole", "interpreter", 0): (
        AttentionTile(max_head_dim=256, block_m=16, block_n=32, num_warps=4, max_length=32),
    ),
    ("attention_backward_mask", "interpreter", 0): (
        AttentionTile(max_head_dim=256, block_m=32, block_n=32, num_warps=4),
    ),
    ("attention_decode", "interpreter", 0): (AttentionTile(max_head_dim=256, block_m=16, block_n=16, num_warps=4),),
}  # (operation, architecture or family, bytes of an element; the interpreter has one line for all)


@dataclass(frozen=True)
class AttentionKey:
    """What an attention kernel's configuration is chosen by."""

    head_dim: int  # the wider of head_dim and value_dim, at most MAX_HEAD_DIM
    element_size: int  # bytes
    length: int  # of the longest sequence, queries or keys
    dropout: bool


def _attention_lines(operation: str, device: Device, key: AttentionKey) -> list[AttentionTile]:
    element_size = 0 if device.architecture == "interpreter" else key.element_size
    names = [f"{operation}_dropout", operation] if key.dropout else [operation]
    for name, architecture in itertools.product(names, (device.architecture, device.family)):
        table = _ATTENTION_TILES.get((name, architecture, element_size))
        if table is not None:
            return [line for line in table if key.head_dim <= line.max_head_dim and key.length <= line.max_length]
    return []


def attention_tile(operation: str, device: Device, key: AttentionKey) -> AttentionTile:
    """The line of `operation`'s table: with dropout first of "<operation>_dropout", for the architecture first."""
    return _attention_lines(operation, device, key)[0]


def has_attention_tile(operation: str, device: Device, key: AttentionKey) -> bool:
    """Whether `operation`'s table has a line for these."""
    return bool(_attention_lines(operation, device, key))


#: Programs a multiprocessor that decoding wants, and blocks of keys that a program must have for its share of the second
#: kernel to be small; and what that kernel holds in registers.
_DECODE_PROGRAMS_PER_PROCESSOR = 2
_DECODE_LEAST_BLOCKS = 2
_DECODE_MOST_SPLITS = 64


def decode_splits(device: Device, rows: int, blocks: int) -> int:
    """Among how many programs the keys of each of `rows` tiles are split; a sequence has at most `blocks` blocks of them."""
    wanted = _DECODE_PROGRAMS_PER_PROCESSOR * device.processors // max(rows, 1)
    return max(1, min(wanted, blocks // _DECODE_LEAST_BLOCKS, _DECODE_MOST_SPLITS))


def attention_lines(operation: str) -> list[tuple[int, int]]:
    """(head_dim, length) that reach every line of `operation`'s tables: what the ahead-of-time compiler has to try."""
    kernels = {"attention_backward": ("_dq", "_dk_dv", "_whole", "_mask")}.get(operation, ("",))
    names = {operation + kernel + dropout for kernel in kernels for dropout in ("", "_dropout")}
    lines = {
        (line.max_head_dim, min(line.max_length, 1024))
        for (name, architecture, _), table in _ATTENTION_TILES.items()
        for line in table
        if name in names and architecture != "interpreter"
    }
    return sorted(lines)
