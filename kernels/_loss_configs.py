"""Launch configurations of cross_entropy and linear_cross_entropy; how they are chosen: _configs.py."""

from dataclasses import dataclass, replace

from fastbert.kernels._launch import Device


@dataclass(frozen=True)
class ClassTile:
    """How a loop over the classes of a row of logits is launched."""

    block: int  # classes a step; a power of two
    num_warps: int
    num_stages: int = 1


#: "cuda", forward: 256 threads with 16 logits each in two 16-byte loads of a 16-bit dtype, and a running sum each; 56 to 80
#: registers on sm_90, so at least 3 programs share a multiprocessor, each with a block in registers and one on its way to
#: shared memory: 3 * 2 * 4096 * 2 bytes = 48 KiB of loads in flight, where 23 KiB are wanted (_configs.py). Backward is
#: elementwise: 128 threads with 16 logits, as layer_norm's. "hip": half the warps, twice as wide, and no stages.
_CLASS_TILES: dict[tuple[str, str], ClassTile] = {
    ("cross_entropy", "cuda"): ClassTile(block=4096, num_warps=8, num_stages=2),
    ("cross_entropy", "hip"): ClassTile(block=4096, num_warps=4),
    ("cross_entropy_backward", "cuda"): ClassTile(block=2048, num_warps=4),
    ("cross_entropy_backward", "hip"): ClassTile(block=2048, num_warps=2),
}  # (operation, family)


def class_tile(operation: str, classes: int, device: Device) -> ClassTile:
    """The line of `operation`'s table; fewer classes than a block shrink it."""
    line = _CLASS_TILES[operation, device.family]
    block = min(max(1 << (classes - 1).bit_length(), 1024), line.block)
    return replace(line, block=block, num_warps=max(1, line.num_warps * block // line.block))


@dataclass(frozen=True)
class ProductTile:
    """How a product inside a kernel is launched: tiles [block_m, block_n] of it, block_k of the summed dimension a step."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int = 1  # steps whose operands are loaded ahead, by asynchronous copies to shared memory
    programs_per_processor: int = 1
    least_slots: int = 1024  # rows of logits that a backward chunk has at least

    @property
    def constexprs(self) -> dict[str, int]:
        return dict(BLOCK_M=self.block_m, BLOCK_N=self.block_n, BLOCK_K=self.block_k, STAGES=self.num_stages)

    def programs(self, device: Device) -> int:
        """As many as run at a time: their kernels loop over tiles."""
        return self.programs_per_processor * device.processors


#: linear_cross_entropy, "cuda", 16 bits: a tile of 128 x 256 is 128 float32 a thread of 256, and a step reads (128 + 256) * 2
#: bytes for 2 * 128 * 256 operations: 85 a byte, so that 600 TFLOP/s want 7 TB/s of L2, where 128 x 128 wants 9.4. Three
#: stages of 64 are 144 KiB of shared memory, one program a multiprocessor. The sum that smoothing adds to the forward pass leaves
#: no registers for that (440 bytes of spills), nor do masks of columns, nor adding to dweight: 128 x 128; rows that no 16-byte
#: access can read: less.
#: 32 bits: true float32 products have no tensor cores, and their operands are registers: what does not spill is small.
#: "hip": 64 KiB of shared memory a compute unit, so no stages. What d_logits writes is zero up to its block_m, which therefore
#: is a multiple of dx's block_m and of dweight's block_k.
#:
#: Against the goal, 0.8 of the matmul rate (790 TFLOP/s: 6.0 a multiprocessor), hidden = 768. A tile of logits takes 8.4 us of
#: products; then, with no second program to hide it, its 32768 exponentials 1.2 us at 16 a clock, about eight other
#: instructions an element 1.2, and the first stage's way from L2 most of 1: 0.73 forward, 0.8 from hidden = 1152 on. dx and
#: dweight have long sums and short ends, 0.9 at best: backward 0.84, both passes 0.81 of the eight operations done, of which two
#: are the logits' second making. Chunks of logits by cuBLAS and their gradient in place (Liger Kernel) do six at nearly its
#: whole rate, 5.8 ps a logit, and wait 1.4 for memory: 0.8 of six against 0.81 of eight, a third faster where every row has a
#: label. But cuBLAS has its sizes from the host, which does not know how many rows do: of masked-LM's 15 %, that scheme makes 6.7
#: times too many.
_WIDE = ProductTile(block_m=128, block_n=256, block_k=64, num_warps=8, num_stages=3)
_SQUARE = ProductTile(block_m=128, block_n=128, block_k=64, num_warps=8, num_stages=3)
_UNEVEN = ProductTile(block_m=64, block_n=64, block_k=32, num_warps=4, programs_per_processor=2)
_FLOAT32 = ProductTile(block_m=64, block_n=64, block_k=16, num_warps=4, programs_per_processor=4)
_FLOAT32_SUM = replace(_FLOAT32, num_warps=8, programs_per_processor=2)  # its masks of columns spill with 4 warps
_PRODUCT_TILES: dict[tuple[str, str, int], tuple[tuple[int, ProductTile], ...]] = {
    ("forward", "cuda", 2): ((64, _WIDE), (1, _UNEVEN)),
    ("forward_smoothed", "cuda", 2): ((64, _SQUARE), (1, _UNEVEN)),
    ("d_logits", "cuda", 2): ((64, _WIDE), (1, _UNEVEN)),
    ("dx", "cuda", 2): ((256, _WIDE), (128, _SQUARE), (1, _UNEVEN)),
    ("dweight", "cuda", 2): ((128, _SQUARE), (1, _UNEVEN)),
    ("forward", "cuda", 4): ((1, _FLOAT32),),
    ("forward_smoothed", "cuda", 4): ((1, _FLOAT32),),
    ("d_logits", "cuda", 4): ((1, _FLOAT32),),
    ("dx", "cuda", 4): ((1, _FLOAT32),),
    ("dweight", "cuda", 4): ((1, _FLOAT32_SUM),),
}  # (kernel, family, bytes of an element) -> (what the width of x is a multiple of, tile), the first that fits
_PRODUCT_TILES |= {
    (kernel, "hip", size): ((1, tile),)
    for kernel in ("forward", "forward_smoothed", "d_logits", "dx", "dweight")
    for size, tile in ((2, _UNEVEN), (4, _FLOAT32))
}
#: Small, so that a few dozen rows and classes are several tiles and chunks.
_INTERPRETER_TILE = ProductTile(block_m=16, block_n=64, block_k=16, num_warps=4, least_slots=32)

#: Splits of the classes, forward: with the blocks of rows they are the units that programs take, and 20 blocks (15 % of 16384
#: rows) then make 600, 4.5 for each multiprocessor of an H200; 3 float32 a row and split are 0.6 % of 30522 bfloat16 logits.
CLASS_SPLITS = 32
#: Rows whose splits one program combines: 32 x 32 numbers of each kind, 8 a thread.
COMBINE_SLOTS = 32
#: A chunk of backward has one in so many rows. Of 16384 x 30522 logits its d_logits are 7.0 %, dx's splits (hidden 768) 1.4 %.
CHUNKS = 14


def product_tile(kernel: str, device: Device, element_size: int, hidden: int) -> ProductTile:
    """The tile of a kernel of linear_cross_entropy ("forward", "forward_smoothed", "d_logits", "dx" or "dweight").

    `hidden` are the columns of x.
    """
    if device.architecture == "interpreter":
        return _INTERPRETER_TILE
    return next(
        tile for multiple, tile in _PRODUCT_TILES[kernel, device.family, element_size] if hidden % multiple == 0
    )


def chunk_slots(rows: int, tile: ProductTile) -> int:
    """How many labelled rows' gradients of logits are in memory at a time: a multiple of the tile's."""
    wanted = max(rows // CHUNKS, tile.least_slots)
    if wanted >= rows:
        wanted = rows + tile.block_m - 1
    return wanted // tile.block_m * tile.block_m
