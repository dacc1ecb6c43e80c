"""What the attention kernels share: where a program's sequence lies, tiles of it, its masked logits, and the launchers'
common arguments.

A dense tensor [batch, heads, seq, head_dim] and a packed one [total, heads, head_dim] are the same to a kernel: three
strides (sequence, head, row), and the row at which a sequence starts (dense: 0; packed: its stride of sequences is 0).

Logits are kept in units of log2, so that the exponential is one `exp2` of one fused multiply-add,
`exp2(q·k * logit_scale - maximum)` with `logit_scale = scale * log2(e)`. With an additive mask they stay natural
(`exp2((logit - maximum) * log2(e))`): masks hold the dtype's least number, and times log2(e) that would be -inf."""

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastbert.kernels import _attention_configs
from fastbert.kernels._attention_padding import key_bounds
from fastbert.kernels._launch import Device, check_seed, check_tensors
from fastbert.kernels._philox import first_counter, keep_scale, keep_threshold, keep_tile

LOG2E: tl.constexpr = tl.constexpr(math.log2(math.e))
LN2: tl.constexpr = tl.constexpr(math.log(2.0))

#: Kernel arguments that differ from call to call must not make a new specialisation of the kernel each.
VARYING = [
    "heads", "kv_heads", "sequence_heads", "blocks", "group", "max_q", "max_k", "rows_q", "rows_k",
    "window_left", "window_right", "counter", "threshold",
]  # fmt: skip


# ------------------------------------------------------------------------------------------------------------ in kernels


@triton.jit
def place(program, blocks, sequence_heads, group):
    """(block, sequence and head) of a program: `group` heads at a time, all their first blocks before their second."""
    programs_per_group = blocks.to(tl.int64) * group  # may pass 2**31 though no program does
    first = (program // programs_per_group).to(tl.int32)
    within = (program % programs_per_group).to(tl.int32)
    size = tl.minimum(sequence_heads - first * group, group)
    return within // size, first * group + within % size


@triton.jit
def bounds(cu_seqlens, sequence, length):
    """(first row, rows) of a sequence: packed by its boundaries, dense from row 0, `length` rows."""
    if cu_seqlens is None:
        first = tl.cast(0, tl.int64)
        rows = length
    else:
        first = tl.load(cu_seqlens + sequence).to(tl.int64)
        rows = (tl.load(cu_seqlens + sequence + 1) - first).to(tl.int32)
    return first, rows


@triton.jit
def query_block(
    cu_seqlens_q, cu_seqlens_k, blocks, sequence_heads, group, heads, max_q, max_k, RIGHT: tl.constexpr
):  # fmt: skip
    """(block, sequence and head, sequence, head, its first query's row, queries, its first key's row, keys) of a program."""
    block, sequence_head = place(tl.program_id(0), blocks, sequence_heads, group)
    if RIGHT:
        block = blocks - 1 - block  # the last queries see the most keys: first, so that the short ones fill the end
    sequence, head = sequence_head // heads, sequence_head % heads
    row_q, seq_q = bounds(cu_seqlens_q, sequence, max_q)
    row_k, seq_k = bounds(cu_seqlens_k, sequence, max_k)
    return block, sequence_head, sequence, head, row_q, seq_q, row_k, seq_k


@triton.jit
def fill_past_the_end(
    base,  # packed rows, contiguous, of `width` elements; `copies` times, `copy_stride` apart
    value, cu_seqlens, sequences, rows, width, copies=1, copy_stride=0,
):  # fmt: skip
    """`value` in the rows past the last boundary, which belong to no sequence. All programs of the grid share the work."""
    BLOCK: tl.constexpr = 1024
    first, end = tl.load(cu_seqlens + sequences).to(tl.int64) * width, rows.to(tl.int64) * width
    if first < end:
        for copy in range(0, copies):
            start = base + tl.cast(copy, tl.int64) * copy_stride
            step = tl.num_programs(0).to(tl.int64) * BLOCK
            for block in range(first + tl.program_id(0).to(tl.int64) * BLOCK, end, step):
                element = block + tl.arange(0, BLOCK)
                tl.store(start + element, tl.full([BLOCK], value, base.dtype.element_ty), mask=element < end)


@triton.jit
def alibi_slope(alibi, sequence, head, alibi_stride, ADDITIVE: tl.constexpr):
    """The slope of a head, in the logits' units; 0 without ALiBi."""
    slope = 0.0
    if alibi is not None:
        slope = tl.load(alibi + sequence * alibi_stride + head).to(tl.float32)
        if not ADDITIVE:
            slope *= LOG2E
    return slope


@triton.jit
def tile_offsets(row_stride, ROWS: tl.constexpr, BLOCK_D: tl.constexpr, NARROW: tl.constexpr = False):
    """Within a tile; NARROW: int32, which takes half the registers, and `unit_stride` sees to it that they fit."""
    row = tl.arange(0, ROWS)
    if not NARROW:
        row = row.to(tl.int64)
    return row[:, None] * row_stride + tl.arange(0, BLOCK_D)[None, :]


@triton.jit
def load_tile(
    base,  # pointer to the sequence's first row
    first_row, row_stride, rows,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, CHECK_ROWS: tl.constexpr,
    AGAIN: tl.constexpr = False, NARROW: tl.constexpr = False,
):  # fmt: skip
    """Rows [first_row, first_row + ROWS) as a tile [ROWS, BLOCK_D], zero out of bounds; AGAIN: never moved out of a loop."""
    pointers = base + tl.cast(first_row, tl.int64) * row_stride + tile_offsets(row_stride, ROWS, BLOCK_D, NARROW)
    in_rows = (tl.arange(0, ROWS) < rows - first_row)[:, None]
    in_width = (tl.arange(0, BLOCK_D) < WIDTH)[None, :]
    if CHECK_ROWS:
        if WIDTH == BLOCK_D:
            return tl.load(pointers, mask=in_rows, other=0.0, volatile=AGAIN)
        else:
            return tl.load(pointers, mask=in_rows & in_width, other=0.0, volatile=AGAIN)
    else:
        if WIDTH == BLOCK_D:
            return tl.load(pointers, volatile=AGAIN)
        else:
            return tl.load(pointers, mask=in_width, other=0.0, volatile=AGAIN)


@triton.jit
def store_tile(
    base, value, first_row, row_stride, rows,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, NARROW: tl.constexpr = False,
):  # fmt: skip
    """Store a tile [ROWS, BLOCK_D] where it is in bounds."""
    pointers = base + tl.cast(first_row, tl.int64) * row_stride + tile_offsets(row_stride, ROWS, BLOCK_D, NARROW)
    in_bounds = (tl.arange(0, ROWS) < rows - first_row)[:, None] & (tl.arange(0, BLOCK_D) < WIDTH)[None, :]
    tl.store(pointers, value.to(base.dtype.element_ty), mask=in_bounds)


@triton.jit
def logits(
    products,  # float32 tile: q · k
    query,  # int32, broadcasts to the tile
    key,  # int32, broadcasts to the tile
    attn_mask,  # pointer to the head's [seq_q, seq_k], uint8 or additive, or None
    mask_stride_q, mask_stride_k,
    key_padding,  # pointer to the sequence's uint8 [seq_k], or None
    slope, logit_scale, shift, seq_q, seq_k, window_left, window_right,
    ALIBI: tl.constexpr, ADDITIVE: tl.constexpr, SCALE_FIRST: tl.constexpr,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """The tile's logits, -inf where a key is not visible; still to be multiplied by logit_scale if not SCALE_FIRST.

    MASKED false: the caller knows that every pair of the tile is visible.
    """
    value = products
    distance = key - (query + shift)
    if SCALE_FIRST:
        value *= logit_scale
    if ALIBI:
        value -= slope * tl.abs(distance).to(tl.float32)
    if MASKED:
        visible = (key < seq_k) & (query < seq_q)
        if LEFT:
            visible = visible & (distance >= -window_left)
        if RIGHT:
            visible = visible & (distance <= window_right)
        if key_padding is not None:
            visible = visible & (tl.load(key_padding + key, mask=key < seq_k, other=0) != 0)
        if attn_mask is not None:
            offsets = query.to(tl.int64) * mask_stride_q + key.to(tl.int64) * mask_stride_k
            in_bounds = (query < seq_q) & (key < seq_k)
            if ADDITIVE:
                value += tl.load(attn_mask + offsets, mask=in_bounds, other=0.0).to(tl.float32)
            else:
                visible = visible & (tl.load(attn_mask + offsets, mask=in_bounds, other=0) != 0)
        value = tl.where(visible, value, float("-inf"))
    return value


@triton.jit
def exponential(logit, subtrahend, logit_scale, ADDITIVE: tl.constexpr, SCALE_FIRST: tl.constexpr):
    """e to the (logit - subtrahend), whatever the units of both."""
    if ADDITIVE:
        return tl.exp2((logit - subtrahend) * LOG2E)
    elif SCALE_FIRST:
        return tl.exp2(logit - subtrahend)
    else:
        return tl.exp2(logit * logit_scale - subtrahend)


@triton.jit
def large_lse(lse):
    """Whether the logarithm of a row's sum is lost, wholly or in part, in its float32 log-sum-exp: see correction_kernel.

    That is so of rows that see nothing but a mask's least number, -3.4e38, -65504 or BERT's -10000. Below the limit it is
    off by less than 2**-14.
    """
    return (tl.abs(lse) >= 1024.0) & (tl.abs(lse) < float("inf"))


@triton.jit
def backward_weights(
    logit,
    lse,  # [rows], 0 past the sequence's end
    correction,  # pointers [rows], read where lse is large and the mask additive
    logit_scale,
    ADDITIVE: tl.constexpr, SCALE_FIRST: tl.constexpr,
    ROW_AXIS: tl.constexpr,  # of the tile
):  # fmt: skip
    """p = exp(logit - lse) of a tile; 0 in a row that saw nothing, NaN in one that saw an infinite logit, as softmax has."""
    subtrahend = lse
    if not ADDITIVE:
        subtrahend = lse * LOG2E
    subtrahend = tl.where(lse == float("inf"), float("nan"), subtrahend)
    subtrahend = tl.where(lse == float("-inf"), float("inf"), subtrahend)
    p = exponential(logit, tl.expand_dims(subtrahend, 1 - ROW_AXIS), logit_scale, ADDITIVE, SCALE_FIRST)
    if ADDITIVE:
        large = large_lse(lse)
        if tl.max(large.to(tl.int32), axis=0) > 0:
            p *= tl.exp2(-tl.expand_dims(tl.load(correction, mask=large, other=0.0), 1 - ROW_AXIS))
    return p


@triton.jit
def logit_gradients(p, dp, delta, keep, keep_factor, DROPOUT: tl.constexpr):
    """(keep / (1 - dropout_p) * p, dlogit) of a tile, whichever way round it is."""
    kept = p
    if DROPOUT:
        factor = tl.where(keep, keep_factor, 0.0)
        kept = p * factor
        dp = dp * factor
    return kept, p * (dp - delta)


@triton.jit
def keep_pairs(
    seed, counter, sequence_head, first_query, first_key, max_q, max_k, threshold,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Dropout's decisions [BLOCK_M, BLOCK_N] for the pairs of a tile; the stream's tensor is [batch, heads, max_q, max_k].

    first_key is a multiple of four.
    """
    row = sequence_head.to(tl.int64) * max_q + first_query + tl.arange(0, BLOCK_M)
    return keep_tile(seed, counter, row, first_key, max_k, threshold, BLOCK_N, 4)


@triton.jit
def visible_keys(
    first_query, queries, shift, seq_k,
    key_bounds,  # of the sequence: pointer to (first real key, first gap after it, one past the last), or None
    window_left, window_right,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """For the queries [first_query, first_query + queries): (first, full_first, full_last, last) keys.

    Outside [first, last) no query sees a key; within [full_first, full_last), made of whole blocks, every query sees
    every key, as far as lengths, windows and padding go. All but `last` are multiples of BLOCK_N.
    """
    first = 0
    full_first = 0
    last = seq_k
    full_last = seq_k
    if LEFT:
        left = first_query + shift - window_left  # the first key that the first query sees
        first = tl.maximum(left, 0) // BLOCK_N * BLOCK_N
        full_first = tl.cdiv(tl.maximum(left + queries - 1, 0), BLOCK_N) * BLOCK_N
    if RIGHT:
        right = first_query + shift + window_right + 1  # one past the last key that the first query sees
        last = tl.minimum(last, right + queries - 1)
        full_last = tl.maximum(tl.minimum(full_last, right), 0)
    if key_bounds is not None:
        real = tl.load(key_bounds)
        first = tl.maximum(first, real // BLOCK_N * BLOCK_N)
        full_first = tl.maximum(full_first, tl.cdiv(real, BLOCK_N) * BLOCK_N)
        full_last = tl.minimum(full_last, tl.load(key_bounds + 1))
        last = tl.minimum(last, tl.load(key_bounds + 2))
    full_last = tl.maximum(full_last // BLOCK_N * BLOCK_N, full_first)
    # Where a window is narrower than a block there is no full one, and the two ends meet.
    last = tl.maximum(last, first)
    return first, full_first, full_last, last


# ------------------------------------------------------------------------------------------------------------ launchers


@dataclass(frozen=True)
class Call:
    """A checked call: its sizes, and what every kernel of it is launched with."""

    packed: bool
    batch: int
    heads: int
    kv_heads: int
    max_q: int  # longest sequence: packed max_seqlen_q, dense seq_q
    max_k: int
    head_dim: int
    value_dim: int
    element_size: int
    masks: dict[str, Any]  # kernel arguments by name
    flags: dict[str, Any]  # constexprs
    mask_shape: tuple[int, ...]  # of attn_mask as four dimensions, or ()

    @property
    def group(self) -> int:
        """Query heads that share a key head."""
        return self.heads // self.kv_heads if self.kv_heads else 1

    @property
    def block_dims(self) -> dict[str, int]:
        """Widths of q, k and of v, as they are and as tiles."""
        return dict(
            HEAD_DIM=self.head_dim, VALUE_DIM=self.value_dim,
            BLOCK_D=block_dim(self.head_dim), BLOCK_V=block_dim(self.value_dim),
        )  # fmt: skip

    @property
    def tile_key(self) -> _attention_configs.AttentionKey:
        return _attention_configs.AttentionKey(
            max(self.head_dim, self.value_dim),
            self.element_size,
            max(self.max_q, self.max_k),
            self.flags["DROPOUT"],
        )

    @functools.cached_property
    def _key_bounds(self) -> Tensor | None:
        padding = self.masks["key_padding"]
        return None if padding is None else key_bounds(padding)

    def bounded(self, block_n: int) -> dict[str, Any]:
        """`masks` for a kernel that works on `block_n` keys at a time: padding bounds its loop where there are several blocks."""
        return dict(self.masks, key_bounds=self._key_bounds if self.max_k > block_n else None)

    def heads_together(self, heads: int) -> int:
        """How many of `heads` (sequence, head) pairs run at a time, so that what they share stays in L2."""
        length = max(self.max_q, self.max_k)
        per_head = max(1, length * (self.head_dim + self.value_dim) * self.element_size)
        return max(1, min(heads, _attention_configs.L2_BYTES // per_head))


def block_dim(head_dim: int) -> int:
    return max(16, triton.next_power_of_2(head_dim))


#: Tiles have at most 256 rows, and offsets within them are int32.
_MAX_ROW_STRIDE = 2**31 // 256


def unit_stride(x: Tensor, rows: int | None = None) -> Tensor:
    """x with neighbouring elements along its last dimension and rows not too far apart: itself where its strides allow.

    `rows` is the dimension of the sequence: by default that of [batch, heads, seq, head_dim] or [total, heads, head_dim].
    Raises ValueError where even contiguous rows are too far apart.
    """
    rows = (2 if x.dim() == 4 else 0) if rows is None else rows
    if x.stride(-1) != 1 or x.stride(rows) >= _MAX_ROW_STRIDE:
        x = x.contiguous()
    if x.stride(rows) >= _MAX_ROW_STRIDE:
        raise ValueError(
            f"attention: rows of {list(x.shape)} are {x.stride(rows)} elements apart; the Triton kernels take less than "
            f"{_MAX_ROW_STRIDE}. Split the heads."
        )
    return x


def strides(name: str, x: Tensor) -> dict[str, int]:
    """The strides of [batch, heads, seq, head_dim] or packed [total, heads, head_dim], as a kernel names them."""
    sequence, head, row = (x.stride(0), x.stride(1), x.stride(2)) if x.dim() == 4 else (0, x.stride(1), x.stride(0))
    return {f"{name}_stride_b": sequence, f"{name}_stride_h": head, f"{name}_stride": row}


def statistics_strides(q: Tensor) -> dict[str, int]:
    """Of a log-sum-exp, contiguous: dense [batch, heads, seq_q], packed [heads, total_q]."""
    sequence, head = (q.shape[1] * q.shape[2], q.shape[2]) if q.dim() == 4 else (0, q.shape[0])
    return dict(lse_stride_b=sequence, lse_stride_h=head)


def statistics_shape(q: Tensor) -> tuple[int, ...]:
    return tuple(q.shape[:3]) if q.dim() == 4 else (q.shape[1], q.shape[0])


def check_head_dims(operation: str, **dims: int) -> None:
    """Raise for a head too wide for the kernels."""
    for name, dim in dims.items():
        if not 1 <= dim <= _attention_configs.MAX_HEAD_DIM:
            raise ValueError(
                f"{operation}: {name} is {dim}; the Triton kernels take 1 to {_attention_configs.MAX_HEAD_DIM}. "
                "Use fastbert.use_reference() for other widths."
            )


def precision(x: Tensor) -> str:
    """How float32 products are made: exactly, unless torch is allowed TF32 (by any of its settings: this one follows all)."""
    return "tf32" if x.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def _mask_view(attn_mask: Tensor, shape: tuple[int, ...]) -> Tensor:
    """attn_mask broadcast to `shape` by zero strides; bool as uint8."""
    if attn_mask.dtype == torch.bool:
        attn_mask = attn_mask.view(torch.uint8)
    elif attn_mask.dtype == torch.float64:
        attn_mask = attn_mask.float()
    return attn_mask.expand(shape)


def prepare(
    operation: str, q: Tensor, k: Tensor, v: Tensor,
    cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None, max_seqlen_q: int, max_seqlen_k: int,
    attn_mask: Tensor | None, key_padding_mask: Tensor | None, alibi_slopes: Tensor | None,
    scale: float, window_left: int, window_right: int, bottom_right: bool,
    dropout_p: float, seed: Tensor | None, offset: int,
) -> Call:  # fmt: skip
    """The operator's arguments as the kernels take them. Raises TypeError or ValueError for what they do not support."""
    additive = attn_mask is not None and attn_mask.dtype != torch.bool
    floats = {"alibi_slopes": alibi_slopes, "attn_mask": attn_mask if additive else None}
    floats = {n: t.float() if t is not None and t.dtype == torch.float64 else t for n, t in floats.items()}
    check_tensors(operation, q=q, k=k, v=v, **floats)
    check_head_dims(operation, head_dim=q.shape[-1], value_dim=v.shape[-1])
    dropout = dropout_p != 0.0
    seed = check_seed(operation, seed) if dropout else None

    packed = cu_seqlens_q is not None and cu_seqlens_k is not None
    heads, kv_heads = q.shape[1], k.shape[1]
    if kv_heads == 0 or heads % kv_heads:
        kv_heads = max(kv_heads, 1)
        if heads % kv_heads:
            raise ValueError(f"{operation}: {heads} query heads and {k.shape[1]} key heads; the second must divide")
    if cu_seqlens_q is not None and cu_seqlens_k is not None:
        batch, max_q, max_k = cu_seqlens_q.shape[0] - 1, max_seqlen_q, max_seqlen_k
        cu_seqlens_q, cu_seqlens_k = cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous()
    else:
        batch, max_q, max_k = q.shape[0], q.shape[2], k.shape[2]

    mask_strides: tuple[int, ...] = (0, 0, 0, 0)
    mask_shape: tuple[int, ...] = ()
    if attn_mask is not None:
        mask_shape = (1,) * (4 - attn_mask.dim()) + tuple(attn_mask.shape)
        attn_mask = _mask_view(attn_mask, (1 if packed else batch, heads, max_q, max_k))
        mask_strides = (0 if packed else attn_mask.stride(0), *attn_mask.stride()[1:])
    if key_padding_mask is not None:
        key_padding_mask = unit_stride(key_padding_mask, rows=1).view(torch.uint8)
    alibi_stride = 0
    if alibi_slopes is not None:
        alibi_slopes = alibi_slopes.contiguous()
        alibi_stride = heads if alibi_slopes.dim() == 2 else 0
    # What reaches past both ends is no window; and a clipped one cannot overflow the kernels' int32.
    limit = max_q + max_k
    left, right = (-1 if window >= limit else window for window in (window_left, window_right))

    biased = additive or alibi_slopes is not None
    masks = dict(
        cu_seqlens_q=cu_seqlens_q if packed else None, cu_seqlens_k=cu_seqlens_k if packed else None,
        attn_mask=attn_mask, key_padding=key_padding_mask, alibi=alibi_slopes, seed=seed,
        mask_stride_b=mask_strides[0], mask_stride_h=mask_strides[1],
        mask_stride_q=mask_strides[2], mask_stride_k=mask_strides[3],
        padding_stride=0 if key_padding_mask is None else key_padding_mask.stride(0), alibi_stride=alibi_stride,
        heads=heads, kv_heads=kv_heads, max_q=max_q, max_k=max_k, window_left=left, window_right=right,
        logit_scale=float(scale) * (1.0 if additive else LOG2E.value),
        counter=first_counter(offset), threshold=keep_threshold(dropout_p), keep_factor=keep_scale(dropout_p),
    )  # fmt: skip
    flags = dict(
        # The maximum of q·k times the scale is the maximum of the logits only where the scale is positive.
        ADDITIVE=additive, SCALE_FIRST=biased or not scale > 0, LEFT=left >= 0, RIGHT=right >= 0,
        BOTTOM_RIGHT=bottom_right, DROPOUT=dropout, PRECISION=precision(q),
    )  # fmt: skip
    return Call(
        packed,
        batch,
        heads,
        kv_heads,
        max_q,
        max_k,
        q.shape[-1],
        v.shape[-1],
        q.element_size(),
        masks,
        flags,
        mask_shape,
    )


def tile_for(operation: str, call: Call, device: Device) -> _attention_configs.AttentionTile:
    """The configuration of a call."""
    return _attention_configs.attention_tile(operation, device, call.tile_key)
