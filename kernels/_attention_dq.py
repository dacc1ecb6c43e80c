"""The gradient of attention's queries, with the block of queries as the owner of its sum: a loop over the keys.

The first of the two kernels of the deterministic backward pass of long sequences; see attention_backward.
"""

import triton
import triton.language as tl

from fastbert.kernels._attention_common import (
    VARYING,
    alibi_slope,
    backward_weights,
    fill_past_the_end,
    keep_pairs,
    load_tile,
    logit_gradients,
    logits,
    query_block,
    store_tile,
    visible_keys,
)


@triton.jit
def _gather_dq(
    accumulator,  # float32 [BLOCK_M, BLOCK_D]
    q_tile, grad_tile,  # of the queries: [BLOCK_M, BLOCK_D], [BLOCK_M, BLOCK_V]
    row_lse, correction, delta,  # of the queries: [BLOCK_M], pointers [BLOCK_M], [BLOCK_M, 1]
    q, grad_out, k, v, attn_mask, key_padding,  # of the sequence and head
    seed, q_stride, grad_out_stride, k_stride, v_stride, mask_stride_q, mask_stride_k,
    sequence_head, first_query, first, last, full_first, full_last, shift, seq_q, seq_k, max_q, max_k, slope, logit_scale,
    window_left, window_right, counter, threshold, keep_factor,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    ALIBI: tl.constexpr, ADDITIVE: tl.constexpr, SCALE_FIRST: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
    DROPOUT: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Add what keys give to dq, in whole blocks: [full_first, full_last), or MASKED those of [first, last) outside of it."""
    # float32 products have no tensor cores: of a wide head, the queries' operands do not fit the registers, where the
    # compiler would keep them all through the loop.
    RELOAD: tl.constexpr = q.dtype.element_ty == tl.float32 and BLOCK_D + BLOCK_V > 256
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
        p = backward_weights(logit, row_lse, correction, logit_scale, ADDITIVE, SCALE_FIRST, 0)
        _, dlogit = logit_gradients(p, dp, delta, keep, keep_factor, DROPOUT)
        accumulator = tl.dot(dlogit.to(k_tile.dtype), k_tile, accumulator, input_precision=PRECISION)
    return accumulator


@triton.jit(do_not_specialize=VARYING)
def dq_kernel(
    grad_out,  # as out
    q, k, v, out,  # as the forward kernel's
    lse,  # float32 [batch, heads, seq_q], packed [heads, total_q]
    delta,  # float32, as lse, written
    correction,  # float32, as lse, or None where the mask is not additive
    dq,  # as q, contiguous, written
    cu_seqlens_q, cu_seqlens_k, attn_mask, key_padding, key_bounds, alibi, seed,
    grad_out_stride_b, grad_out_stride_h, grad_out_stride, out_stride_b, out_stride_h, out_stride,
    q_stride_b, q_stride_h, q_stride, k_stride_b, k_stride_h, k_stride, v_stride_b, v_stride_h, v_stride,
    dq_stride_b, dq_stride_h, dq_stride, lse_stride_b, lse_stride_h,
    mask_stride_b, mask_stride_h, mask_stride_q, mask_stride_k, padding_stride, alibi_stride,
    heads, kv_heads, sequence_heads, blocks, group, max_q, max_k, rows_q, window_left, window_right, logit_scale, scale,
    counter: tl.int64, threshold: tl.uint32, keep_factor,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    ADDITIVE: tl.constexpr, SCALE_FIRST: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
    BOTTOM_RIGHT: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dq and delta. Grid: blocks of queries of every head of every sequence, as the forward kernel's."""
    block, sequence_head, sequence, head, row_q, seq_q, row_k, seq_k = query_block(
        cu_seqlens_q, cu_seqlens_k, blocks, sequence_heads, group, heads, max_q, max_k, RIGHT
    )
    if cu_seqlens_q is not None:
        fill_past_the_end(dq, 0.0, cu_seqlens_q, sequence_heads // heads, rows_q, heads * HEAD_DIM)
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
    if key_bounds is not None:
        key_bounds += at * 3
    ALIBI: tl.constexpr = alibi is not None
    slope = alibi_slope(alibi, at, h, alibi_stride, ADDITIVE)
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
    if ADDITIVE:
        correction += statistics
    accumulator = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    first, full_first, full_last, last = visible_keys(
        first_query, BLOCK_M, shift, seq_k, key_bounds, window_left, window_right, LEFT, RIGHT, BLOCK_N
    )
    if attn_mask is not None or (key_padding is not None and key_bounds is None):
        full_first, full_last = first, first  # every block needs masking
    else:
        accumulator = _gather_dq(
            accumulator, q_tile, grad_tile, row_lse, correction, row_delta[:, None],
            q, grad_out, k, v, attn_mask, key_padding,
            seed_value, q_stride, grad_out_stride, k_stride, v_stride, mask_stride_q, mask_stride_k,
            sequence_head, first_query, first, last, full_first, full_last, shift, seq_q, seq_k, max_q, max_k,
            slope, logit_scale, window_left, window_right, counter, threshold, keep_factor,
            HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_V, ALIBI, ADDITIVE, SCALE_FIRST, LEFT, RIGHT,
            DROPOUT, PRECISION, False, BLOCK_M, BLOCK_N, STAGES,
        )  # fmt: skip
    accumulator = _gather_dq(
        accumulator, q_tile, grad_tile, row_lse, correction, row_delta[:, None],
        q, grad_out, k, v, attn_mask, key_padding,
        seed_value, q_stride, grad_out_stride, k_stride, v_stride, mask_stride_q, mask_stride_k,
        sequence_head, first_query, first, last, full_first, full_last, shift, seq_q, seq_k, max_q, max_k,
        slope, logit_scale, window_left, window_right, counter, threshold, keep_factor,
        HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_V, ALIBI, ADDITIVE, SCALE_FIRST, LEFT, RIGHT,
        DROPOUT, PRECISION, True, BLOCK_M, BLOCK_N, STAGES,
    )  # fmt: skip
    # Zero weights times what is not finite would be NaN.
    accumulator = tl.where((row_lse == float("-inf"))[:, None], 0.0, accumulator * scale)
    store_tile(dq, accumulator, first_query, dq_stride, seq_q, BLOCK_M, HEAD_DIM, BLOCK_D)
