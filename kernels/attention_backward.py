"""Scaled dot-product attention, backward: two kernels without atomics, or one where all keys fit a program.

    p = exp(logit - lse);  delta_i = sum_d dout_id * out_id;  dp_ij = keep_ij / (1 - dropout_p) * dout_i · v_j
    dlogit = p * (dp - delta);  dq = scale * dlogit k;  dk = scale * dlogit' q;  dv = (keep / (1 - dropout_p) * p)' dout

(Dao et al., "FlashAttention", 2022, section B.2.) What a forward pass makes from blocks is made again from lse, so memory
stays linear in the length. Long sequences: the first kernel has a block of queries and loops over the keys for dq (and writes
delta), the second has a block of keys and loops over the queries for dk and dv. Each sum has one owner and one order: the same
input gives the same bits. That costs seven products where atomics would need five. Sequences of up to a few hundred keys take
five: one program has all keys of a head, so that it also knows whole rows of dlogit, and writes dq as it goes.
A key head that several query heads share belongs to one program, which loops over them.

On paper, H200, T = 16384 tokens, H = 16, D = 64, 16 bits: five products are 10·T·H·S·D operations, seven 14; the bytes of q, k, v,
out, dout, dq, dk, dv are 16·T·H·D = 268 MB, 62 us.
    S = 128: 21 GFLOP 27 us, memory 62 us.    S = 512: 86 GFLOP 109 us (seven: 152 us), one exponential a pair 36 us (two: 72 us).
    S = 4096: 687 GFLOP 870 us with five, 962 GFLOP 1218 us with seven products.
"""

import functools
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastbert.kernels import _configs
from fastbert.kernels._attention_common import (
    LOG2E,
    VARYING,
    aot_grid,
    aot_inputs,
    bounds,
    keep_pairs,
    load_tile,
    logits,
    place,
    prepare,
    row_subtrahend,
    statistics_shape,
    statistics_strides,
    store_tile,
    strides,
    tile_for,
    unit_stride,
    visible_keys,
    weights_and_gradients,
)
from fastbert.kernels._attention_mask_gradient import mask_gradient
from fastbert.kernels._launch import AotCase, check_tensors, device_of, launch

# ------------------------------------------------------------------------------------------------------------------- dq


@triton.jit
def _gather_dq(
    accumulator,  # float32 [BLOCK_M, BLOCK_D]
    q_tile, grad_tile, subtrahend, delta,  # of the queries: [BLOCK_M, BLOCK_D], [BLOCK_M, BLOCK_V], [BLOCK_M, 1] twice
    q, grad_out, k, v, attn_mask, key_padding,  # of the sequence and head
    seed, q_stride, grad_out_stride, k_stride, v_stride, mask_stride_q, mask_stride_k,
    sequence_head, first_query, first, last, shift, seq_q, seq_k, max_q, max_k, slope, logit_scale,
    window_left, window_right, counter, threshold, keep_factor,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    ALIBI: tl.constexpr, ADDITIVE: tl.constexpr, SCALE_FIRST: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
    DROPOUT: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Add what the keys [first, last) give to dq, in whole blocks."""
    # float32 products have no tensor cores: of a wide head, the queries' operands do not fit the registers, where the
    # compiler would keep them all through the loop.
    RELOAD: tl.constexpr = q.dtype.element_ty == tl.float32 and BLOCK_D + BLOCK_V > 256
    query = (first_query + tl.arange(0, BLOCK_M))[:, None]
    for first_key in tl.range(first, last, BLOCK_N, num_stages=STAGES):
        key = (first_key + tl.arange(0, BLOCK_N))[None, :]
        k_tile = load_tile(k, first_key, k_stride, seq_k, BLOCK_N, HEAD_DIM, BLOCK_D, MASKED)
        v_tile = load_tile(v, first_key, v_stride, seq_k, BLOCK_N, VALUE_DIM, BLOCK_V, MASKED)
        if RELOAD:
            q_tile = load_tile(q, first_query, q_stride, seq_q, BLOCK_M, HEAD_DIM, BLOCK_D, True, True)
            grad_tile = load_tile(
                grad_out, first_query, grad_out_stride, seq_q, BLOCK_M, VALUE_DIM, BLOCK_V, True, True
            )
        products = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION)
        dp = tl.dot(grad_tile, tl.trans(v_tile), input_precision=PRECISION)
        logit = logits(
            products, query, key, attn_mask, mask_stride_q, mask_stride_k, key_padding,
            slope, logit_scale, shift, seq_q, seq_k, window_left, window_right,
            ALIBI, ADDITIVE, SCALE_FIRST, LEFT, RIGHT, MASKED,
        )  # fmt: skip
        keep = False
        if DROPOUT:
            keep = keep_pairs(
                seed, counter, sequence_head, first_query, first_key, max_q, max_k, threshold, BLOCK_M, BLOCK_N
            )
        _, dlogit = weights_and_gradients(
            logit, subtrahend, dp, delta, keep, keep_factor, logit_scale, ADDITIVE, SCALE_FIRST, DROPOUT
        )
        accumulator = tl.dot(dlogit.to(k_tile.dtype), k_tile, accumulator, input_precision=PRECISION)
    return accumulator


@triton.jit(do_not_specialize=VARYING)
def _dq_kernel(
    grad_out,  # as out
    q, k, v, out,  # as the forward kernel's
    lse,  # float32 [batch, heads, seq_q], packed [heads, total_q]
    delta,  # float32, as lse, written
    dq,  # as q, contiguous, written
    cu_seqlens_q, cu_seqlens_k, attn_mask, key_padding, alibi, seed,
    grad_out_stride_b, grad_out_stride_h, grad_out_stride, out_stride_b, out_stride_h, out_stride,
    q_stride_b, q_stride_h, q_stride, k_stride_b, k_stride_h, k_stride, v_stride_b, v_stride_h, v_stride,
    dq_stride_b, dq_stride_h, dq_stride, lse_stride_b, lse_stride_h,
    mask_stride_b, mask_stride_h, mask_stride_q, mask_stride_k, padding_stride, alibi_stride,
    heads, kv_heads, sequence_heads, blocks, group, max_q, max_k, window_left, window_right, logit_scale, scale,
    counter: tl.int64, threshold: tl.uint32, keep_factor,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    ADDITIVE: tl.constexpr, SCALE_FIRST: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
    BOTTOM_RIGHT: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dq and delta. Grid: blocks of queries of every head of every sequence, as the forward kernel's."""
    block, sequence_head = place(tl.program_id(0), blocks, sequence_heads, group)
    if RIGHT:
        block = blocks - 1 - block
    sequence, head = sequence_head // heads, sequence_head % heads
    row_q, seq_q = bounds(cu_seqlens_q, sequence, max_q)
    row_k, seq_k = bounds(cu_seqlens_k, sequence, max_k)
    first_query = block * BLOCK_M
    if first_query >= seq_q:
        return

    at, h = sequence.to(tl.int64), head.to(tl.int64)
    kv_head = h // (heads // kv_heads)
    q += at * q_stride_b + h * q_stride_h + row_q * q_stride
    dq += at * dq_stride_b + h * dq_stride_h + row_q * dq_stride
    grad_out += at * grad_out_stride_b + h * grad_out_stride_h + row_q * grad_out_stride
    out += at * out_stride_b + h * out_stride_h + row_q * out_stride
    k += at * k_stride_b + kv_head * k_stride_h + row_k * k_stride
    v += at * v_stride_b + kv_head * v_stride_h + row_k * v_stride
    if attn_mask is not None:
        attn_mask += at * mask_stride_b + h * mask_stride_h
    if key_padding is not None:
        key_padding += at * padding_stride
    ALIBI: tl.constexpr = alibi is not None
    slope = 0.0
    if ALIBI:
        slope = tl.load(alibi + at * alibi_stride + h).to(tl.float32)
        if not ADDITIVE:
            slope *= LOG2E
    seed_value = tl.cast(0, tl.int64)
    if DROPOUT:
        seed_value = tl.load(seed)
    shift = 0
    if BOTTOM_RIGHT:
        shift = seq_k - seq_q

    q_tile = load_tile(q, first_query, q_stride, seq_q, BLOCK_M, HEAD_DIM, BLOCK_D, True)
    grad_tile = load_tile(grad_out, first_query, grad_out_stride, seq_q, BLOCK_M, VALUE_DIM, BLOCK_V, True)
    out_tile = load_tile(out, first_query, out_stride, seq_q, BLOCK_M, VALUE_DIM, BLOCK_V, True)
    query = first_query + tl.arange(0, BLOCK_M)
    statistics = at * lse_stride_b + h * lse_stride_h + row_q + query
    row_delta = tl.sum(grad_tile.to(tl.float32) * out_tile.to(tl.float32), axis=1)
    tl.store(delta + statistics, row_delta, mask=query < seq_q)
    row_lse = tl.load(lse + statistics, mask=query < seq_q, other=float("-inf"))
    subtrahend = row_subtrahend(row_lse, ADDITIVE)[:, None]
    accumulator = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    first, full_first, full_last, last = visible_keys(
        first_query, BLOCK_M, shift, seq_k, window_left, window_right, LEFT, RIGHT, BLOCK_N
    )
    if attn_mask is not None or key_padding is not None:
        full_first, full_last = first, first  # every block needs masking
    else:
        if LEFT:
            accumulator = _gather_dq(
                accumulator, q_tile, grad_tile, subtrahend, row_delta[:, None], q, grad_out, k, v, attn_mask, key_padding,
                seed_value, q_stride, grad_out_stride, k_stride, v_stride, mask_stride_q, mask_stride_k,
                sequence_head, first_query, first, tl.minimum(full_first, last), shift, seq_q, seq_k, max_q, max_k,
                slope, logit_scale, window_left, window_right, counter, threshold, keep_factor,
                HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_V, ALIBI, ADDITIVE, SCALE_FIRST, LEFT, RIGHT,
                DROPOUT, PRECISION, True, BLOCK_M, BLOCK_N, STAGES,
            )  # fmt: skip
        accumulator = _gather_dq(
            accumulator, q_tile, grad_tile, subtrahend, row_delta[:, None], q, grad_out, k, v, attn_mask, key_padding,
            seed_value, q_stride, grad_out_stride, k_stride, v_stride, mask_stride_q, mask_stride_k,
            sequence_head, first_query, full_first, full_last, shift, seq_q, seq_k, max_q, max_k,
            slope, logit_scale, window_left, window_right, counter, threshold, keep_factor,
            HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_V, ALIBI, ADDITIVE, SCALE_FIRST, LEFT, RIGHT,
            DROPOUT, PRECISION, False, BLOCK_M, BLOCK_N, STAGES,
        )  # fmt: skip
    accumulator = _gather_dq(
        accumulator, q_tile, grad_tile, subtrahend, row_delta[:, None], q, grad_out, k, v, attn_mask, key_padding,
        seed_value, q_stride, grad_out_stride, k_stride, v_stride, mask_stride_q, mask_stride_k,
        sequence_head, first_query, full_last, last, shift, seq_q, seq_k, max_q, max_k,
        slope, logit_scale, window_left, window_right, counter, threshold, keep_factor,
        HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_V, ALIBI, ADDITIVE, SCALE_FIRST, LEFT, RIGHT,
        DROPOUT, PRECISION, True, BLOCK_M, BLOCK_N, STAGES,
    )  # fmt: skip
    # Zero weights times what is not finite would be NaN.
    accumulator = tl.where((row_lse == float("-inf"))[:, None], 0.0, accumulator * scale)
    store_tile(dq, accumulator, first_query, dq_stride, seq_q, BLOCK_M, HEAD_DIM, BLOCK_D)


# ----------------------------------------------------------------------------------------------------------- dk and dv


@triton.jit
def _gather_dk_dv(
    dk, dv,  # float32 [BLOCK_N, BLOCK_D], [BLOCK_N, BLOCK_V]
    k, v,  # of the keys: [BLOCK_N, BLOCK_D], [BLOCK_N, BLOCK_V]
    q, grad_out, out, dq, attn_mask, key_padding,  # of the sequence and head; out and dq only if WHOLE
    lse, delta,  # of the sequence and head; delta read, or if WHOLE written where it is not None
    seed, q_stride, grad_out_stride, out_stride, dq_stride, mask_stride_q, mask_stride_k,
    sequence_head, first_key, first, last, shift, seq_q, seq_k, max_q, max_k, slope, logit_scale, scale,
    window_left, window_right, counter, threshold, keep_factor,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    ALIBI: tl.constexpr, ADDITIVE: tl.constexpr, SCALE_FIRST: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
    DROPOUT: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr, WHOLE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Add what the queries [first, last) give to dk and dv, in whole blocks; tiles are [BLOCK_N, BLOCK_M].

    Queries past the sequence's end need no mask: they are loaded as zeros and get zero weights, as if they saw nothing.
    """
    key = (first_key + tl.arange(0, BLOCK_N))[:, None]
    # An additive mask's tile takes the registers that a load ahead would need.
    for first_query in tl.range(first, last, BLOCK_M, num_stages=1 if ADDITIVE else STAGES):
        query = first_query + tl.arange(0, BLOCK_M)
        in_rows = query < seq_q
        q_tile = load_tile(q, first_query, q_stride, seq_q, BLOCK_M, HEAD_DIM, BLOCK_D, True)
        grad_tile = load_tile(grad_out, first_query, grad_out_stride, seq_q, BLOCK_M, VALUE_DIM, BLOCK_V, True)
        row_lse = tl.load(lse + query, mask=in_rows, other=float("-inf"))
        if WHOLE:
            out_tile = load_tile(out, first_query, out_stride, seq_q, BLOCK_M, VALUE_DIM, BLOCK_V, True)
            row_delta = tl.sum(grad_tile.to(tl.float32) * out_tile.to(tl.float32), axis=1)
            if delta is not None:
                tl.store(delta + query, row_delta, mask=in_rows)
        else:
            row_delta = tl.load(delta + query, mask=in_rows, other=0.0)
        products = tl.dot(k, tl.trans(q_tile), input_precision=PRECISION)
        logit = logits(
            products, query[None, :], key, attn_mask, mask_stride_q, mask_stride_k, key_padding,
            slope, logit_scale, shift, seq_q, seq_k, window_left, window_right,
            ALIBI, ADDITIVE, SCALE_FIRST, LEFT, RIGHT, MASKED,
        )  # fmt: skip
        dp = tl.dot(v, tl.trans(grad_tile), input_precision=PRECISION)
        keep = False
        if DROPOUT:
            keep = tl.trans(
                keep_pairs(
                    seed, counter, sequence_head, first_query, first_key, max_q, max_k, threshold, BLOCK_M, BLOCK_N
                )
            )
        kept, dlogit = weights_and_gradients(
            logit, row_subtrahend(row_lse, ADDITIVE)[None, :], dp, row_delta[None, :], keep, keep_factor, logit_scale,
            ADDITIVE, SCALE_FIRST, DROPOUT,
        )  # fmt: skip
        dv = tl.dot(kept.to(grad_tile.dtype), grad_tile, dv, input_precision=PRECISION)
        dlogit = dlogit.to(q_tile.dtype)
        dk = tl.dot(dlogit, q_tile, dk, input_precision=PRECISION)
        if WHOLE:
            dq_tile = tl.dot(tl.trans(dlogit), k, input_precision=PRECISION) * scale
            dq_tile = tl.where((row_lse == float("-inf"))[:, None], 0.0, dq_tile)
            store_tile(dq, dq_tile, first_query, dq_stride, seq_q, BLOCK_M, HEAD_DIM, BLOCK_D)
    return dk, dv


@triton.jit
def _visible_queries(
    first_key, keys, shift, seq_q, window_left, window_right,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """For the keys [first_key, first_key + keys): (first, full, last) queries.

    Outside [first, last) none sees a key; from `full` on, as far as the right end of a window goes, all see every key.
    """
    first = 0
    full = 0
    last = seq_q
    if RIGHT:
        right = first_key - shift - window_right  # the first query that sees the first key
        first = tl.maximum(right, 0) // BLOCK_M * BLOCK_M
        full = tl.cdiv(tl.maximum(right + keys - 1, 0), BLOCK_M) * BLOCK_M
    if LEFT:
        last = tl.minimum(last, first_key - shift + window_left + keys)
    return first, full, tl.maximum(last, first)


@triton.jit(do_not_specialize=VARYING)
def _dk_dv_kernel(
    grad_out,  # as out
    q, k, v, out,  # as the forward kernel's
    lse,  # float32 [batch, heads, seq_q], packed [heads, total_q]
    delta,  # float32, as lse; if WHOLE written, or None
    dq,  # as q, contiguous, written if WHOLE
    dk, dv,  # as k and v, contiguous, written
    cu_seqlens_q, cu_seqlens_k, attn_mask, key_padding, alibi, seed,
    grad_out_stride_b, grad_out_stride_h, grad_out_stride, out_stride_b, out_stride_h, out_stride,
    q_stride_b, q_stride_h, q_stride, k_stride_b, k_stride_h, k_stride, v_stride_b, v_stride_h, v_stride,
    dq_stride_b, dq_stride_h, dq_stride, dk_stride_b, dk_stride_h, dk_stride, dv_stride_b, dv_stride_h, dv_stride,
    lse_stride_b, lse_stride_h,
    mask_stride_b, mask_stride_h, mask_stride_q, mask_stride_k, padding_stride, alibi_stride,
    heads, kv_heads, sequence_heads, blocks, group, max_q, max_k, window_left, window_right, logit_scale, scale,
    counter: tl.int64, threshold: tl.uint32, keep_factor,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    ADDITIVE: tl.constexpr, SCALE_FIRST: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
    BOTTOM_RIGHT: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    WHOLE: tl.constexpr,  # one block has all keys of a sequence: dq and delta too
    SPLIT: tl.constexpr,  # blocks that need no mask have a loop of their own
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dk and dv. Grid: blocks of keys of every key head of every sequence; sequence_heads counts key heads here."""
    block, sequence_head = place(tl.program_id(0), blocks, sequence_heads, group)
    sequence, kv_head = sequence_head // kv_heads, sequence_head % kv_heads
    row_q, seq_q = bounds(cu_seqlens_q, sequence, max_q)
    row_k, seq_k = bounds(cu_seqlens_k, sequence, max_k)
    first_key = block * BLOCK_N
    if WHOLE:
        # A sequence without keys still has queries, whose gradient is zero.
        if tl.maximum(seq_k, seq_q) <= 0:
            return
    else:
        if first_key >= seq_k:
            return

    at, kv_h = sequence.to(tl.int64), kv_head.to(tl.int64)
    k += at * k_stride_b + kv_h * k_stride_h + row_k * k_stride
    v += at * v_stride_b + kv_h * v_stride_h + row_k * v_stride
    dk += at * dk_stride_b + kv_h * dk_stride_h + row_k * dk_stride
    dv += at * dv_stride_b + kv_h * dv_stride_h + row_k * dv_stride
    q += at * q_stride_b + row_q * q_stride
    grad_out += at * grad_out_stride_b + row_q * grad_out_stride
    out += at * out_stride_b + row_q * out_stride
    dq += at * dq_stride_b + row_q * dq_stride
    statistics = at * lse_stride_b + row_q
    if key_padding is not None:
        key_padding += at * padding_stride
    ALIBI: tl.constexpr = alibi is not None
    seed_value = tl.cast(0, tl.int64)
    if DROPOUT:
        seed_value = tl.load(seed)
    shift = 0
    if BOTTOM_RIGHT:
        shift = seq_k - seq_q

    k_tile = load_tile(k, first_key, k_stride, seq_k, BLOCK_N, HEAD_DIM, BLOCK_D, True)
    v_tile = load_tile(v, first_key, v_stride, seq_k, BLOCK_N, VALUE_DIM, BLOCK_V, True)
    dk_tile = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv_tile = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
    first, full, last = _visible_queries(
        first_key, BLOCK_N, shift, seq_q, window_left, window_right, LEFT, RIGHT, BLOCK_M
    )
    # A window that ends on both sides is mostly blocks that it cuts: one loop, and its registers, for all of them.
    ONE_LOOP: tl.constexpr = attn_mask is not None or key_padding is not None or WHOLE or LEFT or not SPLIT
    if WHOLE:
        first, last = 0, seq_q  # every query gets its dq
    heads_each = heads // kv_heads
    for head in range(kv_head * heads_each, (kv_head + 1) * heads_each):
        h = tl.cast(head, tl.int64)
        query_head = sequence * heads + head
        q_head, grad_head, out_head = q + h * q_stride_h, grad_out + h * grad_out_stride_h, out + h * out_stride_h
        dq_head = dq + h * dq_stride_h
        lse_head = lse + statistics + h * lse_stride_h
        delta_head = delta
        if delta is not None:
            delta_head = delta + statistics + h * lse_stride_h
        mask_head = attn_mask
        if attn_mask is not None:
            mask_head = attn_mask + at * mask_stride_b + h * mask_stride_h
        slope = 0.0
        if ALIBI:
            slope = tl.load(alibi + at * alibi_stride + h).to(tl.float32)
            if not ADDITIVE:
                slope *= LOG2E
        if not ONE_LOOP:
            if RIGHT:
                dk_tile, dv_tile = _gather_dk_dv(
                    dk_tile, dv_tile, k_tile, v_tile, q_head, grad_head, out_head, dq_head, mask_head, key_padding,
                    lse_head, delta_head, seed_value,
                    q_stride, grad_out_stride, out_stride, dq_stride, mask_stride_q, mask_stride_k,
                    query_head, first_key, first, tl.minimum(full, last), shift, seq_q, seq_k, max_q, max_k,
                    slope, logit_scale, scale, window_left, window_right, counter, threshold, keep_factor,
                    HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_V, ALIBI, ADDITIVE, SCALE_FIRST, LEFT, RIGHT,
                    DROPOUT, PRECISION, True, WHOLE, BLOCK_M, BLOCK_N, STAGES,
                )  # fmt: skip
            dk_tile, dv_tile = _gather_dk_dv(
                dk_tile, dv_tile, k_tile, v_tile, q_head, grad_head, out_head, dq_head, mask_head, key_padding,
                lse_head, delta_head, seed_value,
                q_stride, grad_out_stride, out_stride, dq_stride, mask_stride_q, mask_stride_k,
                query_head, first_key, full, last, shift, seq_q, seq_k, max_q, max_k,
                slope, logit_scale, scale, window_left, window_right, counter, threshold, keep_factor,
                HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_V, ALIBI, ADDITIVE, SCALE_FIRST, LEFT, RIGHT,
                DROPOUT, PRECISION, False, WHOLE, BLOCK_M, BLOCK_N, STAGES,
            )  # fmt: skip
        else:
            dk_tile, dv_tile = _gather_dk_dv(
                dk_tile, dv_tile, k_tile, v_tile, q_head, grad_head, out_head, dq_head, mask_head, key_padding,
                lse_head, delta_head, seed_value,
                q_stride, grad_out_stride, out_stride, dq_stride, mask_stride_q, mask_stride_k,
                query_head, first_key, first, last, shift, seq_q, seq_k, max_q, max_k,
                slope, logit_scale, scale, window_left, window_right, counter, threshold, keep_factor,
                HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_V, ALIBI, ADDITIVE, SCALE_FIRST, LEFT, RIGHT,
                DROPOUT, PRECISION, True, WHOLE, BLOCK_M, BLOCK_N, STAGES,
            )  # fmt: skip
    store_tile(dk, dk_tile * scale, first_key, dk_stride, seq_k, BLOCK_N, HEAD_DIM, BLOCK_D)
    store_tile(dv, dv_tile, first_key, dv_stride, seq_k, BLOCK_N, VALUE_DIM, BLOCK_V)


# ------------------------------------------------------------------------------------------------------------- launcher


def attention_backward(
    grad_out: Tensor,  # as out
    q: Tensor,  # dense [batch, heads, seq_q, head_dim], packed [total_q, heads, head_dim]
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,  # float32, dense [batch, heads, seq_q], packed [heads, total_q]
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    attn_mask: Tensor | None,
    key_padding_mask: Tensor | None,
    alibi_slopes: Tensor | None,
    scale: float,
    window_left: int,
    window_right: int,
    bottom_right: bool,
    dropout_p: float,
    seed: Tensor | None,
    offset: int,
    needs_mask_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv like q, k, v, contiguous; the additive mask's gradient float32 in its shape, or [0].

    Bit-equal from run to run. Raises as `attention` does.
    """
    operation = "attention_backward"
    call = prepare(
        operation, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, attn_mask, key_padding_mask,
        alibi_slopes, scale, window_left, window_right, bottom_right, dropout_p, seed, offset,
    )  # fmt: skip
    check_tensors(operation, grad_out=grad_out, out=out, lse=lse)
    needs_mask_grad = needs_mask_grad and call.flags["ADDITIVE"]
    # Packed rows that belong to no sequence do not exist, but sequences without queries or keys do.
    nothing = 0 in (call.batch, call.max_q, call.max_k, call.heads)
    allocate = torch.zeros if nothing else torch.empty
    dq, dk, dv = (allocate(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    mask_shape = attn_mask.shape if needs_mask_grad and attn_mask is not None else (0,)
    d_mask = allocate(mask_shape, dtype=torch.float32, device=q.device)
    if nothing:
        return dq, dk, dv, d_mask

    grad_out, q, k, v, out = (unit_stride(x) for x in (grad_out, q, k, v, out))
    lse = lse.contiguous()
    shared = dict(
        **strides("q", q), **strides("k", k), **strides("v", v), **strides("grad_out", grad_out),
        **statistics_strides(q), **call.masks, **call.flags, **call.block_dims,
    )  # fmt: skip
    device = device_of(q)
    whole = _configs.has_attention_tile("attention_backward_whole", device, call.tile_key)
    delta = None
    if needs_mask_grad or not whole:
        delta = torch.empty(statistics_shape(q), dtype=torch.float32, device=q.device)
    rest = dict(shared, **strides("out", out), **strides("dq", dq), scale=float(scale))
    if not whole:
        tile = tile_for("attention_backward_dq", call, device)
        blocks, sequence_heads = triton.cdiv(call.max_q, tile.block_m), call.batch * call.heads
        launch(
            _dq_kernel, (blocks * sequence_heads,), q, grad_out, q, k, v, out, lse, delta, dq, **rest,
            blocks=blocks, sequence_heads=sequence_heads, group=call.heads_together(sequence_heads),
            **tile.constexprs, num_warps=tile.num_warps,
        )  # fmt: skip
    tile = tile_for("attention_backward_whole" if whole else "attention_backward_dk_dv", call, device)
    blocks, sequence_heads = triton.cdiv(call.max_k, tile.block_n), call.batch * call.kv_heads
    launch(
        _dk_dv_kernel, (blocks * sequence_heads,), q, grad_out, q, k, v, out, lse, delta, dq, dk, dv, **rest,
        **strides("dk", dk), **strides("dv", dv),
        blocks=blocks, sequence_heads=sequence_heads, group=call.heads_together(sequence_heads),
        WHOLE=whole, SPLIT=tile.split, **tile.constexprs, num_warps=tile.num_warps,
    )  # fmt: skip
    if needs_mask_grad:
        mask_gradient(call, shared, grad_out, q, k, v, lse, delta, d_mask)
    return dq, dk, dv, d_mask


# --------------------------------------------------------------------------------------------------------- ahead of time

_SAMPLE = (
    "attention_backward-d64-s1024-bf16-full",
    "attention_backward-d64-s128-bf16-full",
    "attention_backward-d64-s1024-bf16-additive",
)


def aot_cases() -> Iterator[AotCase]:
    """What is compiled ahead of time: every line of the tables, and what adds or removes code."""
    for name, head_dim, dtype, length, options in aot_grid("attention_backward"):
        i = aot_inputs(head_dim, dtype, length, **options)
        lse = torch.empty(statistics_shape(i.q), dtype=torch.float32, device="meta")
        call = functools.partial(
            attention_backward, i.q, i.q, i.k, i.v, i.q, lse, *i.arguments, options.get("mask") == torch.float32
        )
        yield AotCase(name, call, name in _SAMPLE)
