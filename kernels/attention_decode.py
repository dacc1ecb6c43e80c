"""Attention of the newest tokens of each sequence over a key/value cache, for generation.

    diagonal_i = length - seq_q + i;  query i sees the keys diagonal_i - window_left … diagonal_i
    out_i = softmax(scale * q_i · k_j - slope * |diagonal_i - j|) v

One token against a long cache reads much and computes little: the programs of one sequence and key head split its keys among
them, each writes its maximum, sum and weighted values, and a second kernel adds them up ("flash decoding"; Dao, Haziza, Massa,
Sizov, 2023). The queries of all heads that share a key head, and of all new tokens, are the rows of one tile, so the cache is
read once. Lengths stay on the device: how many programs split a sequence depends on the shapes alone, what each of them takes
on the length.

On paper, H200 (4.3 TB/s): B sequences of S cached tokens and G key heads D wide in 16 bits are 4·B·S·G·D bytes. B = 16, S = 8192,
G = 8, D = 128: 537 MB, 125 us; the partial results of 3 splits are 16 * 32 * 3 * 130 * 4 = 0.8 MB.
"""

import functools
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastbert.kernels import _attention_configs
from fastbert.kernels._attention_common import (
    LN2,
    LOG2E,
    block_dim,
    check_head_dims,
    exponential,
    load_tile,
    logits,
    precision,
    unit_stride,
)
from fastbert.kernels._launch import AotCase, check_device, check_tensors, device_of, launch
from fastbert.kernels._rows import DTYPE_NAMES, meta_tensor

_VARYING = ["seq_q", "capacity", "heads", "kv_heads", "splits", "row_tiles", "window_left"]


@triton.jit
def _log_sum(row_max, total, nothing):
    """The log-sum-exp of rows: -inf where nothing was seen, inf where a logit was (its weights' sum is NaN)."""
    value = tl.where(row_max == float("inf"), float("inf"), (row_max + tl.log2(total)) * LN2)
    return tl.where(nothing, float("-inf"), value)


@triton.jit(do_not_specialize=_VARYING)
def _decode_kernel(
    q,  # [batch, seq_q, heads, head_dim]
    k,  # [batch, capacity, kv_heads, head_dim]
    v,  # [batch, capacity, kv_heads, value_dim]
    lengths,  # int32 [batch]
    alibi,  # [heads] or [batch, heads] or None
    out,  # [batch, seq_q, heads, value_dim] contiguous, written if SPLITS == 1
    lse,  # float32 [batch, heads, seq_q], likewise
    partial_out,  # float32 [splits, batch, heads, seq_q, value_dim], written if there are several splits
    partial_max,  # float32 [splits, batch, heads, seq_q], in units of log2, likewise
    partial_sum,  # float32 [splits, batch, heads, seq_q], likewise
    q_stride_b, q_stride, q_stride_h, k_stride_b, k_stride, k_stride_h, v_stride_b, v_stride, v_stride_h, alibi_stride,
    batch, seq_q, capacity, heads, kv_heads, splits, row_tiles, window_left, logit_scale,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    SCALE_FIRST: tl.constexpr, LEFT: tl.constexpr, PRECISION: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Grid: splits of the keys of (tiles of rows of) every key head of every sequence."""
    program = tl.program_id(0)
    split = program % splits
    row_tile = program // splits % row_tiles
    kv_head = program // splits // row_tiles % kv_heads
    sequence = program // splits // row_tiles // kv_heads
    at, kv_h = sequence.to(tl.int64), kv_head.to(tl.int64)
    # A row is (query, head of the group).
    group = heads // kv_heads
    row = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    query = row // group
    head = kv_head * group + row % group
    in_rows = row < seq_q * group

    length = tl.minimum(tl.maximum(tl.load(lengths + at), 0), capacity)
    shift = length - seq_q
    first = 0
    if LEFT:
        first = tl.maximum(shift - window_left, 0)
    # Whole blocks to every split.
    keys = tl.cdiv(tl.cdiv(tl.maximum(length - first, 0), BLOCK_N), splits) * BLOCK_N
    first = first + split * keys
    last = tl.minimum(first + keys, length)

    column = tl.arange(0, BLOCK_D)
    q_rows = query.to(tl.int64) * q_stride + head * q_stride_h
    q_pointers = q + at * q_stride_b + q_rows[:, None] + column[None, :]
    q_tile = tl.load(q_pointers, mask=in_rows[:, None] & (column < HEAD_DIM)[None, :], other=0.0)
    k += at * k_stride_b + kv_h * k_stride_h
    v += at * v_stride_b + kv_h * v_stride_h
    ALIBI: tl.constexpr = alibi is not None
    slope = tl.zeros([BLOCK_M, 1], tl.float32)
    if ALIBI:
        slope = (tl.load(alibi + at * alibi_stride + head, mask=in_rows, other=0.0).to(tl.float32) * LOG2E)[:, None]

    accumulator = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    for first_key in tl.range(first, last, BLOCK_N, num_stages=STAGES):
        key = first_key + tl.arange(0, BLOCK_N)
        k_tile = load_tile(k, first_key, k_stride, length, BLOCK_N, HEAD_DIM, BLOCK_D, True)
        products = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION)
        logit = logits(
            products, query[:, None], key[None, :], None, 0, 0, None, slope, logit_scale, shift, seq_q, length,
            window_left, 0, ALIBI, False, SCALE_FIRST, LEFT, True, True,
        )  # fmt: skip
        block_max = tl.max(logit, axis=1)
        if not SCALE_FIRST:
            block_max *= logit_scale
        new_max = tl.maximum(row_max, block_max)
        subtrahend = tl.where(new_max == float("-inf"), 0.0, new_max)
        p = exponential(logit, subtrahend[:, None], logit_scale, False, SCALE_FIRST)
        rescale = tl.exp2(row_max - subtrahend)
        row_sum = row_sum * rescale + tl.sum(p, axis=1)
        row_max = new_max
        v_tile = load_tile(v, first_key, v_stride, length, BLOCK_N, VALUE_DIM, BLOCK_V, True)
        accumulator = accumulator * rescale[:, None]
        accumulator = tl.dot(p.to(v_tile.dtype), v_tile, accumulator, input_precision=PRECISION)

    column = tl.arange(0, BLOCK_V)
    in_bounds = in_rows[:, None] & (column < VALUE_DIM)[None, :]
    statistics = (at * heads + head) * seq_q + query
    if SPLIT:
        statistics += split.to(tl.int64) * batch * heads * seq_q
        tl.store(partial_max + statistics, row_max, mask=in_rows)
        tl.store(partial_sum + statistics, row_sum, mask=in_rows)
        tl.store(partial_out + statistics[:, None] * VALUE_DIM + column[None, :], accumulator, mask=in_bounds)
    else:
        nothing = row_sum == 0.0
        total = tl.where(nothing, 1.0, row_sum)
        result = tl.where(nothing[:, None], 0.0, accumulator / total[:, None])
        out_rows = (at * seq_q + query) * heads + head
        tl.store(out + out_rows[:, None] * VALUE_DIM + column[None, :], result.to(out.dtype.element_ty), mask=in_bounds)
        tl.store(lse + statistics, _log_sum(row_max, total, nothing), mask=in_rows)


@triton.jit(do_not_specialize=["batch", "seq_q", "heads", "splits"])
def _combine_kernel(
    partial_out,  # float32 [splits, batch, heads, seq_q, value_dim]
    partial_max,  # float32 [splits, batch, heads, seq_q]
    partial_sum,  # float32 [splits, batch, heads, seq_q]
    out,  # [batch, seq_q, heads, value_dim], written
    lse,  # float32 [batch, heads, seq_q], written
    batch, seq_q, heads, splits,
    VALUE_DIM: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Add the splits of a row, in one order. Grid: (batch · heads · seq_q,)."""
    row = tl.program_id(0).to(tl.int64)
    rows = batch.to(tl.int64) * heads * seq_q
    split = tl.arange(0, BLOCK_S)
    statistics = split * rows + row
    maximum = tl.load(partial_max + statistics, mask=split < splits, other=float("-inf"))
    total = tl.load(partial_sum + statistics, mask=split < splits, other=0.0)
    row_max = tl.max(maximum, axis=0)
    subtrahend = tl.where(row_max == float("-inf"), 0.0, row_max)
    factor = tl.exp2(maximum - subtrahend)
    row_sum = tl.sum(total * factor, axis=0)
    column = tl.arange(0, BLOCK_V)
    in_bounds = (split < splits)[:, None] & (column < VALUE_DIM)[None, :]
    values = tl.load(partial_out + statistics[:, None] * VALUE_DIM + column[None, :], mask=in_bounds, other=0.0)
    nothing = row_sum == 0.0
    divisor = tl.where(nothing, 1.0, row_sum)
    result = tl.where(nothing, 0.0, tl.sum(values * factor[:, None], axis=0) / divisor)
    query, head, sequence = row % seq_q, row // seq_q % heads, row // seq_q // heads
    out_row = (sequence * seq_q + query) * heads + head
    tl.store(out + out_row * VALUE_DIM + column, result.to(out.dtype.element_ty), mask=column < VALUE_DIM)
    tl.store(lse + row, _log_sum(row_max, divisor, nothing))


def attention_decode(
    q: Tensor,  # [batch, seq_q, heads, head_dim]: the newest tokens of each sequence
    k_cache: Tensor,  # [batch, capacity, kv_heads, head_dim]
    v_cache: Tensor,  # [batch, capacity, kv_heads, value_dim]
    lengths: Tensor,  # int32 [batch]: valid keys of each sequence, those of the queries included
    alibi_slopes: Tensor | None,  # [heads] or [batch, heads]
    scale: float,
    window_left: int,
) -> tuple[Tensor, Tensor]:
    """out [batch, seq_q, heads, value_dim] in q's dtype, contiguous; log-sum-exp float32 [batch, heads, seq_q].

    What lies in the caches past a sequence's length is not read. Raises ValueError for heads wider than 256 or a tensor that
    is not on the kernels' device, TypeError for a dtype.
    """
    operation = "attention_decode"
    if alibi_slopes is not None and alibi_slopes.dtype == torch.float64:
        alibi_slopes = alibi_slopes.float()
    check_tensors(operation, q=q, k_cache=k_cache, v_cache=v_cache, alibi_slopes=alibi_slopes)
    check_device(operation, "lengths", lengths)
    batch, seq_q, heads, head_dim = q.shape
    capacity, kv_heads, value_dim = k_cache.shape[1], k_cache.shape[2], v_cache.shape[3]
    check_head_dims(operation, head_dim=head_dim, value_dim=value_dim)
    out = torch.empty((batch, seq_q, heads, value_dim), dtype=q.dtype, device=q.device)
    lse = torch.empty((batch, heads, seq_q), dtype=torch.float32, device=q.device)
    if out.numel() == 0:
        return out, lse

    q, k_cache, v_cache = (unit_stride(x, rows=1) for x in (q, k_cache, v_cache))
    lengths = lengths.contiguous()
    alibi_stride = 0
    if alibi_slopes is not None:
        alibi_slopes = alibi_slopes.contiguous()
        alibi_stride = heads if alibi_slopes.dim() == 2 else 0
    left = window_left if window_left < capacity + seq_q else -1
    rows = seq_q * (heads // kv_heads)
    device = device_of(q)
    key = _attention_configs.AttentionKey(max(head_dim, value_dim), q.element_size(), capacity, dropout=False)
    tile = _attention_configs.attention_tile(operation, device, key)
    block_m = min(max(triton.next_power_of_2(rows), 16), tile.block_m)
    row_tiles = triton.cdiv(rows, block_m)
    longest = capacity if left < 0 else min(capacity, left + seq_q)
    splits = _attention_configs.decode_splits(device, batch * kv_heads * row_tiles, triton.cdiv(longest, tile.block_n))

    partial_out = partial_max = partial_sum = None
    if splits > 1:
        partial_out = torch.empty((splits, batch, heads, seq_q, value_dim), dtype=torch.float32, device=q.device)
        partial_max = torch.empty((splits, batch, heads, seq_q), dtype=torch.float32, device=q.device)
        partial_sum = torch.empty_like(partial_max)
    widths = dict(VALUE_DIM=value_dim, BLOCK_V=block_dim(value_dim))
    launch(
        _decode_kernel, (splits * row_tiles * kv_heads * batch,), q,
        q, k_cache, v_cache, lengths, alibi_slopes, out, lse, partial_out, partial_max, partial_sum,
        *q.stride()[:3], *k_cache.stride()[:3], *v_cache.stride()[:3], alibi_stride,
        batch, seq_q, capacity, heads, kv_heads, splits, row_tiles, left, float(scale) * LOG2E.value,
        HEAD_DIM=head_dim, BLOCK_D=block_dim(head_dim), **widths,
        SCALE_FIRST=alibi_slopes is not None or not scale > 0, LEFT=left >= 0, PRECISION=precision(q), SPLIT=splits > 1,
        BLOCK_M=block_m, BLOCK_N=tile.block_n, STAGES=tile.num_stages, num_warps=tile.num_warps,
    )  # fmt: skip
    if splits > 1:
        launch(
            _combine_kernel, (batch * heads * seq_q,), q, partial_out, partial_max, partial_sum, out, lse,
            batch, seq_q, heads, splits, **widths, BLOCK_S=triton.next_power_of_2(splits), num_warps=4,
        )  # fmt: skip
    return out, lse


# --------------------------------------------------------------------------------------------------------- ahead of time


def aot_cases() -> Iterator[AotCase]:
    """What is compiled ahead of time: every line of the table, one and several queries, split and not."""
    for head_dim, _ in _attention_configs.attention_lines("attention_decode"):
        for dtype, name in DTYPE_NAMES.items():
            for variant, (batch, seq_q, heads, kv_heads, alibi, left) in {
                "split": (1, 1, 4, 4, False, -1),
                "whole": (512, 1, 4, 4, False, -1),
                "grouped-window-alibi": (1, 4, 32, 2, True, 500),
            }.items():

                def meta(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
                    return meta_tensor(*shape, dtype=dtype)

                cache = meta(batch, 4096, kv_heads, head_dim)
                slopes = meta(heads, dtype=torch.float32) if alibi else None
                call = functools.partial(
                    attention_decode, meta(batch, seq_q, heads, head_dim), cache, cache,
                    meta(batch, dtype=torch.int32), slopes, head_dim**-0.5, left,
                )  # fmt: skip
                sample = head_dim == 128 and dtype == torch.bfloat16 and variant == "split"
                yield AotCase(f"attention_decode-d{head_dim}-{name}-{variant}", call, sample)
