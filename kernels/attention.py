"""Scaled dot-product attention, forward: one kernel for packed and dense sequences and every mask.

    logit_ij = scale * q_i · k_j + mask_ij - slope * |distance|, -inf where not visible;  p = softmax(logit)
    out_i = sum_j keep_ij / (1 - dropout_p) * p_ij * v_j;  lse_i = log(sum_j exp(logit_ij))

One program per block of queries of one head of one sequence. It goes once over the keys, with a running maximum and sum
(Dao, "FlashAttention-2", 2023), from the first block that any of its queries sees to the last; the blocks between, that
all its queries see whole, skip every mask. A query that sees nothing gives zeros and -inf.

On paper (fastbert.bench.floors has the figures): T query tokens, H heads, S keys each, D wide are 4·T·H·S·D operations,
T·H·S exponentials and 8·T·H·D bytes (q, k, v, out in 16 bits, once). On H200 that is bound by memory up to S = 256. At D = 64
exponentials take nearly as long as products; without overlap of the two the roof is 431 TFLOP/s. Two programs a
multiprocessor overlap one's exponentials with the other's products, which is why 64-wide heads take blocks of 64 keys.
"""

import functools
import math
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastbert.kernels._attention_aot import aot_grid, aot_inputs
from fastbert.kernels._attention_common import (
    LN2,
    VARYING,
    alibi_slope,
    exponential,
    fill_past_the_end,
    keep_pairs,
    load_tile,
    logits,
    prepare,
    query_block,
    statistics_shape,
    statistics_strides,
    store_tile,
    strides,
    tile_for,
    unit_stride,
    visible_keys,
)
from fastbert.kernels._launch import AotCase, device_of, launch


@triton.jit
def _attend_keys(
    accumulator, row_sum, row_max,  # of the queries so far
    q,  # [BLOCK_M, BLOCK_D]
    k, v, attn_mask, key_padding,  # of the sequence and head
    seed, k_stride, v_stride, mask_stride_q, mask_stride_k,
    sequence_head, first_query, first, last, full_first, full_last, shift, seq_q, seq_k, max_q, max_k, slope, logit_scale,
    window_left, window_right, counter, threshold,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    ALIBI: tl.constexpr, ADDITIVE: tl.constexpr, SCALE_FIRST: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
    DROPOUT: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Attend to keys too, in whole blocks: to [full_first, full_last), or MASKED to those of [first, last) outside of it."""
    query = (first_query + tl.arange(0, BLOCK_M))[:, None]
    skip = 0
    if MASKED:
        skip = full_last - full_first
    else:
        first, last = full_first, full_last
    for position in tl.range(first, last - skip, BLOCK_N, num_stages=STAGES):
        first_key = position
        if MASKED:
            first_key += tl.where(position >= full_first, skip, 0)
        key = (first_key + tl.arange(0, BLOCK_N))[None, :]
        k_tile = load_tile(k, first_key, k_stride, seq_k, BLOCK_N, HEAD_DIM, BLOCK_D, MASKED)
        products = tl.dot(q, tl.trans(k_tile), input_precision=PRECISION)
        logit = logits(
            products, query, key, attn_mask, mask_stride_q, mask_stride_k, key_padding,
            slope, logit_scale, shift, seq_q, seq_k, window_left, window_right,
            ALIBI, ADDITIVE, SCALE_FIRST, LEFT, RIGHT, MASKED,
        )  # fmt: skip
        block_max = tl.max(logit, axis=1)
        if not SCALE_FIRST:
            block_max *= logit_scale
        new_max = tl.maximum(row_max, block_max)
        # A row that has seen nothing: -inf - (-inf) would be NaN.
        subtrahend = tl.where(new_max == float("-inf"), 0.0, new_max)
        p = exponential(logit, subtrahend[:, None], logit_scale, ADDITIVE, SCALE_FIRST)
        rescale = exponential(row_max, subtrahend, logit_scale, ADDITIVE, True)
        row_sum = row_sum * rescale + tl.sum(p, axis=1)
        row_max = new_max
        if DROPOUT:
            keep = keep_pairs(
                seed, counter, sequence_head, first_query, first_key, max_q, max_k, threshold, BLOCK_M, BLOCK_N
            )
            p = tl.where(keep, p, 0.0)
        v_tile = load_tile(v, first_key, v_stride, seq_k, BLOCK_N, VALUE_DIM, BLOCK_V, MASKED)
        accumulator = accumulator * rescale[:, None]
        accumulator = tl.dot(p.to(v_tile.dtype), v_tile, accumulator, input_precision=PRECISION)
    return accumulator, row_sum, row_max


@triton.jit(do_not_specialize=VARYING)
def _forward_kernel(
    q,  # [batch, heads, seq_q, head_dim], or packed [total_q, heads, head_dim]
    k,  # [batch, kv_heads, seq_k, head_dim], or packed
    v,  # [batch, kv_heads, seq_k, value_dim], or packed
    out,  # [batch, heads, seq_q, value_dim], or packed, written
    lse,  # float32 [batch, heads, seq_q], packed [heads, total_q], written, or None
    cu_seqlens_q,  # int32 [batch + 1] or None
    cu_seqlens_k,  # int32 [batch + 1] or None
    attn_mask,  # [batch, heads, seq_q, seq_k] by its strides, uint8 or additive, or None
    key_padding,  # uint8 [batch, seq_k] or None
    key_bounds,  # int32 [batch, 3]: its first real key, first gap and one past the last; None: not looked for
    alibi,  # [heads] or [batch, heads] or None
    seed,  # int64 [1] or None
    q_stride_b, q_stride_h, q_stride, k_stride_b, k_stride_h, k_stride, v_stride_b, v_stride_h, v_stride,
    out_stride_b, out_stride_h, out_stride, lse_stride_b, lse_stride_h,
    mask_stride_b, mask_stride_h, mask_stride_q, mask_stride_k, padding_stride, alibi_stride,
    heads, kv_heads, sequence_heads, blocks, group, max_q, max_k, rows_q, window_left, window_right, logit_scale,
    counter: tl.int64, threshold: tl.uint32, keep_factor,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    ADDITIVE: tl.constexpr, SCALE_FIRST: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
    BOTTOM_RIGHT: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Grid: blocks of queries of every head of every sequence."""
    block, sequence_head, sequence, head, row_q, seq_q, row_k, seq_k = query_block(
        cu_seqlens_q, cu_seqlens_k, blocks, sequence_heads, group, heads, max_q, max_k, RIGHT
    )
    if cu_seqlens_q is not None:
        sequences = sequence_heads // heads
        fill_past_the_end(out, 0.0, cu_seqlens_q, sequences, rows_q, heads * VALUE_DIM)
        if lse is not None:
            fill_past_the_end(lse, float("-inf"), cu_seqlens_q, sequences, rows_q, 1, heads, lse_stride_h)
    first_query = block * BLOCK_M
    if first_query >= seq_q:
        return

    at, h = sequence.to(tl.int64), head.to(tl.int64)
    kv_head = h // (heads // kv_heads)
    q += at * q_stride_b + h * q_stride_h + row_q * q_stride
    k += at * k_stride_b + kv_head * k_stride_h + row_k * k_stride
    v += at * v_stride_b + kv_head * v_stride_h + row_k * v_stride
    out += at * out_stride_b + h * out_stride_h + row_q * out_stride
    if attn_mask is not None:
        attn_mask += at * mask_stride_b + h * mask_stride_h
    if key_padding is not None:
        key_padding += at * padding_stride
    if key_bounds is not None:
        key_bounds += at * 3
    slope = alibi_slope(alibi, at, h, alibi_stride, ADDITIVE)
    seed_value = tl.cast(0, tl.int64)
    if DROPOUT:
        seed_value = tl.load(seed)
    shift = 0
    if BOTTOM_RIGHT:
        shift = seq_k - seq_q

    q_tile = load_tile(q, first_query, q_stride, seq_q, BLOCK_M, HEAD_DIM, BLOCK_D, True)
    accumulator = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    first, full_first, full_last, last = visible_keys(
        first_query, BLOCK_M, shift, seq_k, key_bounds, window_left, window_right, LEFT, RIGHT, BLOCK_N
    )
    ALIBI: tl.constexpr = alibi is not None
    ALL_MASKED: tl.constexpr = attn_mask is not None or (key_padding is not None and key_bounds is None)
    if ALL_MASKED:
        full_first, full_last = first, first
    if not ALL_MASKED:
        accumulator, row_sum, row_max = _attend_keys(
            accumulator, row_sum, row_max, q_tile, k, v, attn_mask, key_padding,
            seed_value, k_stride, v_stride, mask_stride_q, mask_stride_k,
            sequence_head, first_query, first, last, full_first, full_last, shift, seq_q, seq_k, max_q, max_k,
            slope, logit_scale, window_left, window_right, counter, threshold,
            HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_V, ALIBI, ADDITIVE, SCALE_FIRST, LEFT, RIGHT,
            DROPOUT, PRECISION, False, BLOCK_M, BLOCK_N, STAGES,
        )  # fmt: skip
    accumulator, row_sum, row_max = _attend_keys(
        accumulator, row_sum, row_max, q_tile, k, v, attn_mask, key_padding,
        seed_value, k_stride, v_stride, mask_stride_q, mask_stride_k,
        sequence_head, first_query, first, last, full_first, full_last, shift, seq_q, seq_k, max_q, max_k,
        slope, logit_scale, window_left, window_right, counter, threshold,
        HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_V, ALIBI, ADDITIVE, SCALE_FIRST, LEFT, RIGHT,
        DROPOUT, PRECISION, True, BLOCK_M, BLOCK_N, STAGES,
    )  # fmt: skip

    nothing = row_sum == 0.0
    total = tl.where(nothing, 1.0, row_sum)
    result = accumulator * (keep_factor / total)[:, None]
    # A product of zero weights with what is not finite would be NaN.
    result = tl.where(nothing[:, None], 0.0, result)
    store_tile(out, result, first_query, out_stride, seq_q, BLOCK_M, VALUE_DIM, BLOCK_V)
    if lse is not None:
        log_sum = tl.log2(total) * LN2 + row_max * (1.0 if ADDITIVE else LN2)
        # Its weights are NaN, inf - inf, and so is their sum.
        log_sum = tl.where(row_max == float("inf"), float("inf"), log_sum)
        query = first_query + tl.arange(0, BLOCK_M)
        pointers = lse + at * lse_stride_b + h * lse_stride_h + row_q + query
        tl.store(pointers, tl.where(nothing, float("-inf"), log_sum), mask=query < seq_q)


def attention(
    q: Tensor,  # dense [batch, heads, seq_q, head_dim], packed [total_q, heads, head_dim]
    k: Tensor,  # dense [batch, kv_heads, seq_k, head_dim], packed [total_k, kv_heads, head_dim]
    v: Tensor,  # as k, value_dim wide
    cu_seqlens_q: Tensor | None,  # int32 [batch + 1]; given: packed
    cu_seqlens_k: Tensor | None,  # int32 [batch + 1]
    max_seqlen_q: int,  # packed only
    max_seqlen_k: int,
    attn_mask: Tensor | None,  # bool (True = attend) or additive; dense: to [batch, heads, seq_q, seq_k]; packed:
    #                            [heads or 1, max_seqlen_q, max_seqlen_k], shared by the sequences
    key_padding_mask: Tensor | None,  # bool [batch, seq_k], True = attend; dense only
    alibi_slopes: Tensor | None,  # [heads] or [batch, heads]
    scale: float,
    window_left: int,  # keys further left of the diagonal are not visible; -1: no limit
    window_right: int,  # 0 is causal
    bottom_right: bool,  # the diagonal ends at the last query and key, else starts at the first
    dropout_p: float,
    seed: Tensor | None,  # int64 [1]; not read when dropout_p == 0
    offset: int,  # the stream index of dropout's first element, a multiple of 4
    save_lse: bool,
) -> tuple[Tensor, Tensor]:
    """out in q's layout and dtype, contiguous; the log-sum-exp float32 [batch, heads, seq_q], packed [heads, total_q], or [0].

    Packed rows past the last boundary get zeros and -inf.
    Raises ValueError for heads wider than 256, a tensor that is not on the kernels' device or bad dropout arguments,
    TypeError for a dtype.
    """
    call = prepare(
        "attention", q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, attn_mask, key_padding_mask,
        alibi_slopes, scale, window_left, window_right, bottom_right, dropout_p, seed, offset,
    )  # fmt: skip
    out_shape, lse_shape = (*q.shape[:-1], v.shape[-1]), statistics_shape(q) if save_lse else (0,)
    if q.numel() == 0 or call.value_dim == 0 or call.batch == 0 or call.max_q == 0:
        # Packed rows may belong to no sequence.
        return q.new_zeros(out_shape), q.new_full(lse_shape, -math.inf, dtype=torch.float32)
    out = torch.empty(out_shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(lse_shape, dtype=torch.float32, device=q.device)
    q, k, v = unit_stride(q), unit_stride(k), unit_stride(v)
    tile = tile_for("attention", call, device_of(q))
    blocks = triton.cdiv(call.max_q, tile.block_m)
    sequence_heads = call.batch * call.heads
    launch(
        _forward_kernel, (blocks * sequence_heads,), q, q, k, v, out, lse if save_lse else None,
        **strides("q", q), **strides("k", k), **strides("v", v), **strides("out", out), **statistics_strides(q),
        sequence_heads=sequence_heads, blocks=blocks, group=call.heads_together(sequence_heads), rows_q=q.shape[0],
        **call.bounded(tile.block_n), **call.flags, **call.block_dims, **tile.constexprs, num_warps=tile.num_warps,
    )  # fmt: skip
    return out, lse


# --------------------------------------------------------------------------------------------------------- ahead of time

_SAMPLE = (
    "attention-d64-s1024-bf16-full",
    "attention-d128-s1024-fp16-causal",
    "attention-d64-s1024-bf16-packed-causal-dropout",
)


def aot_cases() -> Iterator[AotCase]:
    """What is compiled ahead of time: every line of the table, and what adds or removes code."""
    for name, head_dim, dtype, length, options in aot_grid("attention"):
        i = aot_inputs(head_dim, dtype, length, **options)
        call = functools.partial(attention, i.q, i.k, i.v, *i.arguments, True)
        yield AotCase(name, call, name in _SAMPLE)
