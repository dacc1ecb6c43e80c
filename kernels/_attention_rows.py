"""What attention's backward pass needs of each query's row, before and after the kernels that work on pairs."""

import triton
import triton.language as tl

from fastbert.kernels._attention_common import (
    VARYING,
    alibi_slope,
    exponential,
    large_lse,
    load_tile,
    logits,
    query_block,
    store_tile,
    visible_keys,
)


@triton.jit(do_not_specialize=["heads", "rows", "blocks"])
def delta_kernel(
    grad_out, out,  # [batch, heads, rows, value_dim] by their strides; packed: batch 1, all tokens its rows
    delta,  # float32 [batch, heads, rows], written
    dq_sum,  # float32 [batch, heads, rows, head_dim], zeroed
    grad_out_stride_b, grad_out_stride_h, grad_out_stride, out_stride_b, out_stride_h, out_stride,
    lse_stride_b, lse_stride_h, heads, rows, blocks,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
):  # fmt: skip
    """delta, and zeros for dq to be added to. Grid: blocks of rows of every head of every sequence."""
    first = tl.program_id(0) % blocks * BLOCK_M
    at, h = (tl.program_id(0) // blocks // heads).to(tl.int64), (tl.program_id(0) // blocks % heads).to(tl.int64)
    grad_out += at * grad_out_stride_b + h * grad_out_stride_h
    out += at * out_stride_b + h * out_stride_h
    dq_sum += (at * lse_stride_b + h * lse_stride_h) * HEAD_DIM
    grad_tile = load_tile(grad_out, first, grad_out_stride, rows, BLOCK_M, VALUE_DIM, BLOCK_V, True)
    out_tile = load_tile(out, first, out_stride, rows, BLOCK_M, VALUE_DIM, BLOCK_V, True)
    row_delta = tl.sum(grad_tile.to(tl.float32) * out_tile.to(tl.float32), axis=1)
    row = first + tl.arange(0, BLOCK_M)
    tl.store(delta + at * lse_stride_b + h * lse_stride_h + row, row_delta, mask=row < rows)
    zeros = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    store_tile(dq_sum, zeros, first, HEAD_DIM, rows, BLOCK_M, HEAD_DIM, BLOCK_D)


@triton.jit(do_not_specialize=["heads", "rows", "blocks"])
def dq_cast_kernel(
    dq_sum,  # float32 [batch, heads, rows, head_dim]
    dq,  # as q, contiguous, written
    lse,  # float32 [batch, heads, rows]
    dq_stride_b, dq_stride_h, dq_stride, lse_stride_b, lse_stride_h, scale,
    heads, rows, blocks,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """dq = scale * dq_sum in q's dtype, zero for a query that saw nothing. Grid: as delta_kernel's."""
    first = tl.program_id(0) % blocks * BLOCK_M
    at, h = (tl.program_id(0) // blocks // heads).to(tl.int64), (tl.program_id(0) // blocks % heads).to(tl.int64)
    row = first + tl.arange(0, BLOCK_M)
    row_lse = tl.load(lse + at * lse_stride_b + h * lse_stride_h + row, mask=row < rows, other=0.0)
    dq_sum += (at * lse_stride_b + h * lse_stride_h) * HEAD_DIM
    tile = load_tile(dq_sum, first, HEAD_DIM, rows, BLOCK_M, HEAD_DIM, BLOCK_D, True)
    # Zero weights times what is not finite would be NaN.
    tile = tl.where((row_lse == float("-inf"))[:, None], 0.0, tile * scale)
    store_tile(dq + at * dq_stride_b + h * dq_stride_h, tile, first, dq_stride, rows, BLOCK_M, HEAD_DIM, BLOCK_D)


@triton.jit(do_not_specialize=VARYING)
def correction_kernel(
    q, k,  # as the forward kernel's
    lse,  # float32 [batch, heads, seq_q], packed [heads, total_q]
    correction,  # float32, as lse, written
    cu_seqlens_q, cu_seqlens_k, attn_mask, key_padding, key_bounds, alibi,
    q_stride_b, q_stride_h, q_stride, k_stride_b, k_stride_h, k_stride, lse_stride_b, lse_stride_h,
    mask_stride_b, mask_stride_h, mask_stride_q, mask_stride_k, padding_stride, alibi_stride,
    heads, kv_heads, sequence_heads, blocks, group, max_q, max_k, window_left, window_right, logit_scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
    BOTTOM_RIGHT: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """log2(sum_j exp(logit_ij - lse_i)), with an additive mask: what rounding lse has cost, zero where that is little.

    Only blocks with a large log-sum-exp look at their keys, so that this costs next to nothing where no row is masked
    whole. Grid: blocks of queries of every head of every sequence.
    """
    block, _sequence_head, sequence, head, row_q, seq_q, row_k, seq_k = query_block(
        cu_seqlens_q, cu_seqlens_k, blocks, sequence_heads, group, heads, max_q, max_k, RIGHT
    )
    first_query = block * BLOCK_M
    if first_query >= seq_q:
        return

    at, h = sequence.to(tl.int64), head.to(tl.int64)
    query = first_query + tl.arange(0, BLOCK_M)
    statistics = at * lse_stride_b + h * lse_stride_h + row_q + query
    row_lse = tl.load(lse + statistics, mask=query < seq_q, other=0.0)
    large = large_lse(row_lse)
    total = tl.where(large, 0.0, 1.0)
    if tl.max(large.to(tl.int32), axis=0) > 0:
        kv_head = h // (heads // kv_heads)
        q += at * q_stride_b + h * q_stride_h + row_q * q_stride
        k += at * k_stride_b + kv_head * k_stride_h + row_k * k_stride
        attn_mask += at * mask_stride_b + h * mask_stride_h
        if key_padding is not None:
            key_padding += at * padding_stride
        if key_bounds is not None:
            key_bounds += at * 3
        ALIBI: tl.constexpr = alibi is not None
        slope = alibi_slope(alibi, at, h, alibi_stride, True)
        shift = 0
        if BOTTOM_RIGHT:
            shift = seq_k - seq_q
        q_tile = load_tile(q, first_query, q_stride, seq_q, BLOCK_M, HEAD_DIM, BLOCK_D, True)
        first, _full_first, _full_last, last = visible_keys(
            first_query, BLOCK_M, shift, seq_k, key_bounds, window_left, window_right, LEFT, RIGHT, BLOCK_N
        )
        for first_key in range(first, last, BLOCK_N):
            key = (first_key + tl.arange(0, BLOCK_N))[None, :]
            k_tile = load_tile(k, first_key, k_stride, seq_k, BLOCK_N, HEAD_DIM, BLOCK_D, True)
            products = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION)
            logit = logits(
                products, query[:, None], key, attn_mask, mask_stride_q, mask_stride_k, key_padding,
                slope, logit_scale, shift, seq_q, seq_k, window_left, window_right,
                ALIBI, True, True, LEFT, RIGHT, True,
            )  # fmt: skip
            p = exponential(logit, row_lse[:, None], logit_scale, True, True)
            total += tl.where(large, tl.sum(p, axis=1), 0.0)
    tl.store(correction + statistics, tl.log2(total), mask=query < seq_q)
