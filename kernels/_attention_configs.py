"""Launch configurations of attention, by (operation, architecture, bytes of an element); how they are chosen: _configs.py."""

import itertools
from dataclasses import dataclass

from fastbert.kernels._launch import Device


@dataclass(frozen=True)
class AttentionTile:
    """How an attention kernel is launched, for heads of at most `max_head_dim` and sequences of at most `max_length`."""

    max_head_dim: int
    block_m: int  # queries a program (forward, dq) or a step of its loop (dk and dv) takes
    block_n: int  # keys, the other way round
    num_warps: int
    num_stages: int = 1  # steps whose tiles are loaded ahead, by asynchronous copies to shared memory
    min_length: int = 0
    max_length: int = 2**31

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
# Backward, dk and dv alone: 64 float32 a thread at 128 keys, logits and their gradients, both statistics of each query in
# every thread: 32 queries a step. Whole sequences: the same with out and dq; 256 keys leave room for 16 queries a step and
# none for dropout, whose sequences above 128 go a long way. With dq added:
# 128 keys and 32 queries a step, which leaves dq's product to the synchronous tensor instructions (Hopper's others want 64
# rows) and takes 192 to 253 registers; 64 queries spill 48 bytes a thread with triton 3.6.0, and with 3.7.1 only where masks
# are added. One program of 256 threads a multiprocessor, the next step's q and dout on their way to 74 KiB of shared memory.
# At 128 wide, 64 keys; dropout there spills in every size that has Hopper's products. At 256 wide 32 keys would fit, but
# then dq's additions, four times those of 128 keys, move more bytes through the L2 cache (8.6 GB at 4096 tokens) than it can
# in the time that two products take. Those two take two passes. So do sequences under 512, where zeroing and casting dq cost
# what two products do (fastbert.bench.floors).
#
# 32 bits: true float32 products have no tensor cores, and their operands are registers: what does not spill is small. dq
# beside dk and dv leaves 16 keys, eight times the additions: two passes, whose gradients are bit-equal besides.
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
    ("attention_dropout", "cuda", 4): (
        AttentionTile(max_head_dim=64, block_m=32, block_n=16, num_warps=4),
        AttentionTile(max_head_dim=128, block_m=16, block_n=16, num_warps=4),
        AttentionTile(max_head_dim=256, block_m=16, block_n=16, num_warps=8),
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
    ("attention_backward_dq_dropout", "cuda", 4): (
        AttentionTile(max_head_dim=64, block_m=32, block_n=16, num_warps=8),
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
        AttentionTile(max_head_dim=128, block_m=32, block_n=64, num_warps=8),
        AttentionTile(max_head_dim=256, block_m=32, block_n=32, num_warps=8),
    ),
    ("attention_backward_dk_dv_dropout", "cuda", 2): (
        AttentionTile(max_head_dim=64, block_m=32, block_n=128, num_warps=8),
        AttentionTile(max_head_dim=128, block_m=16, block_n=64, num_warps=8, num_stages=2),
        AttentionTile(max_head_dim=256, block_m=32, block_n=32, num_warps=8),
    ),
    ("attention_backward_dk_dv", "cuda", 4): (
        AttentionTile(max_head_dim=64, block_m=16, block_n=16, num_warps=4),
        AttentionTile(max_head_dim=128, block_m=32, block_n=32, num_warps=8),
        AttentionTile(max_head_dim=256, block_m=16, block_n=16, num_warps=8),
    ),
    ("attention_backward_dk_dv_dropout", "cuda", 4): (
        AttentionTile(max_head_dim=64, block_m=16, block_n=16, num_warps=4),
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
    ("attention_backward_add", "cuda", 2): (
        AttentionTile(max_head_dim=64, block_m=32, block_n=128, num_warps=8, num_stages=2, min_length=512),
        AttentionTile(max_head_dim=128, block_m=32, block_n=64, num_warps=8, min_length=512),
    ),
    ("attention_backward_add_dropout", "cuda", 2): (
        AttentionTile(max_head_dim=64, block_m=32, block_n=128, num_warps=8, min_length=512),
    ),
    ("attention_backward_add", "hip", 2): (
        AttentionTile(max_head_dim=128, block_m=32, block_n=64, num_warps=4, min_length=512),
    ),
    ("attention_backward_mask", "cuda", 2): (
        AttentionTile(max_head_dim=128, block_m=64, block_n=64, num_warps=8),
        AttentionTile(max_head_dim=256, block_m=16, block_n=16, num_warps=4),
    ),
    ("attention_backward_mask", "cuda", 4): (AttentionTile(max_head_dim=256, block_m=16, block_n=16, num_warps=8),),
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
    ("attention_backward_add", "interpreter", 0): (
        AttentionTile(max_head_dim=256, block_m=16, block_n=32, num_warps=4, min_length=33),
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
            return [
                line
                for line in table
                if key.head_dim <= line.max_head_dim and line.min_length <= key.length <= line.max_length
            ]
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


#: Keys that a program looks at together when it looks for where a sequence's real ones lie: 8 bytes a thread of 128.
KEY_BOUNDS_BLOCK = 1024

#: Elements of a tile of the kernels that work on rows of queries: 128 threads, 32 elements each of every tensor.
_ROWS_TILE = 4096


def attention_rows(head_dim: int) -> int:
    """How many rows of queries, of heads of that width, one program takes."""
    return max(16, _ROWS_TILE // (1 << (head_dim - 1).bit_length()))


#: Programs a multiprocessor that the gradient of a mask wants: of those that live there at a time, two, two rounds.
_MASK_PROGRAMS_PER_PROCESSOR = 4


def mask_gradient_splits(device: Device, blocks: int, tiles: int) -> tuple[int, int]:
    """(tiles a program takes, programs that share a block) where each of `blocks` blocks of a mask sums over `tiles` tiles."""
    wanted = max(1, min(tiles, _MASK_PROGRAMS_PER_PROCESSOR * device.processors // blocks))
    tiles_each = -(-tiles // wanted)
    return tiles_each, -(-tiles // tiles_each)


def attention_lines(operation: str) -> list[tuple[int, int]]:
    """(head_dim, length) that reach every line of `operation`'s tables: what the ahead-of-time compiler has to try."""
    kernels = {"attention_backward": ("_dq", "_dk_dv", "_add", "_whole", "_mask")}.get(operation, ("",))
    names = {operation + kernel + dropout for kernel in kernels for dropout in ("", "_dropout")}
    lines = {
        (line.max_head_dim, min(line.max_length, 1024))
        for (name, architecture, _), table in _ATTENTION_TILES.items()
        for line in table
        if name in names and architecture != "interpreter"
    }
    return sorted(lines)
