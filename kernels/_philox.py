"""Dropout's random stream: Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).

Element (row, column) of a tensor [rows, width] has the stream index `n = offset + row * ceil4(width) + column`, and
its word is `philox(counter=(low32(n >> 2), high32(n >> 2), 0, 0), key=(low32(seed), high32(seed)))[n & 3]`. A row
starts at a multiple of four, so one call of Philox serves four neighbours. Triton, C++ and the reference produce the
same words, bit for bit."""

import triton
import triton.language as tl


def keep_threshold(dropout_p: float) -> int:
    """The least word that keeps its element: min(round(p * 2**32), 2**32 - 1)."""
    _check_probability(dropout_p)
    return min(round(dropout_p * 2**32), 2**32 - 1)


def keep_scale(dropout_p: float) -> float:
    """What a kept element is multiplied by: 1 / (1 - p), and 0.0 when p == 1."""
    _check_probability(dropout_p)
    return 0.0 if dropout_p == 1.0 else 1.0 / (1.0 - dropout_p)


def first_counter(offset: int) -> int:
    """The Philox counter of the stream index `offset`, which starts a row and so is a multiple of four."""
    if offset < 0 or offset % 4:
        raise ValueError(f"the dropout offset is {offset}; it must be a multiple of 4 and at least 0")
    return offset // 4


def _check_probability(dropout_p: float) -> None:
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"dropout_p is {dropout_p}; a probability lies between 0 and 1")


@triton.jit
def _kept(seed, counter, threshold):
    # -> four tiles of the counter's shape: is the word's element kept?
    word_0, word_1, word_2, word_3 = tl.randint4x(seed, counter)
    return word_0 >= threshold, word_1 >= threshold, word_2 >= threshold, word_3 >= threshold


@triton.jit
def keep_tile(
    seed,  # int64 scalar
    counter,  # int64 scalar: the Philox counter of the tensor's first element
    row,  # [ROWS] int64
    first_column,  # a multiple of BLOCK
    width,
    threshold,  # uint32 scalar
    BLOCK: tl.constexpr,
    RUN: tl.constexpr,  # 4 or 8: the neighbours that one thread should hold, as many as one 16-byte access moves
):
    """The keep decisions [ROWS, BLOCK] of the columns from `first_column` on."""
    first = counter + row * ((width + 3) // 4) + first_column // 4
    # A join appends the fastest dimension, so the words' high bit is joined before the low one: [group, (run half,)
    # high, low].
    if RUN == 8:
        # Both calls of a run in one thread: the tile then has the layout of a 16-byte access of a 16-bit dtype, and
        # needs no exchange between threads.
        group = first[:, None] + tl.arange(0, BLOCK // 8)[None, :] * 2
        a_0, a_1, a_2, a_3 = _kept(seed, group, threshold)
        b_0, b_1, b_2, b_3 = _kept(seed, group + 1, threshold)
        even = tl.join(tl.join(a_0, b_0), tl.join(a_2, b_2))
        odd = tl.join(tl.join(a_1, b_1), tl.join(a_3, b_3))
    else:
        tl.static_assert(RUN == 4, "RUN is 4 or 8")
        group = first[:, None] + tl.arange(0, BLOCK // 4)[None, :]
        a_0, a_1, a_2, a_3 = _kept(seed, group, threshold)
        even = tl.join(a_0, a_2)
        odd = tl.join(a_1, a_3)
    return tl.reshape(tl.join(even, odd), (row.shape[0], BLOCK))
