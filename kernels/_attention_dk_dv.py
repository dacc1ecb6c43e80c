"""The gradients of attention's keys and values: a block of keys, and a loop over the queries.

One kernel in three uses, see attention_backward: dk and dv alone; dq too, added to what other blocks give; or, where one
block has all keys of a sequence, dq and delta too, each written once.
"""

import triton
import triton.language as tl

from fastbert.kernels._attention_common import (
    VARYING,
    alibi_slope,
    backward_weights,
    bounds,
    fill_past_the_end,
    keep_pairs,
    load_tile,
    logit_gradients,
    logits,
    place,
    store_tile,
)


@triton.jit
def _gather_dk_dv(
    dk, dv,  # float32 [BLOCK_N, BLOCK_D], [BLOCK_N, BLOCK_V]
    k, v,  # of the keys: [BLOCK_N, BLOCK_D], [BLOCK_N, BLOCK_V]
    q, grad_out, out, dq, attn_mask, key_padding,  # of the sequence and head; out if WHOLE, dq if WHOLE or ADD_DQ
    lse, delta, correction,  # of the sequence and head; delta read, or if WHOLE written where it is not None
    seed, q_stride, grad_out_stride, out_stride, dq_stride, mask_stride_q, mask_stride_k,
    sequence_head, first_key, first, full_first, full_last, last, shift, seq_q, seq_k, max_q, max_k, slope, logit_scale, scale,
    window_left, window_right, counter, threshold, keep_factor,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    ALIBI: tl.constexpr, ADDITIVE: tl.constexpr, SCALE_FIRST: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
    DROPOUT: tl.constexpr, PRECISION: tl.constexpr, ALL_MASKED: tl.constexpr,
    WHOLE: tl.constexpr, ADD_DQ: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Add what the queries [first, last) give to dk and dv, in whole blocks; tiles are [BLOCK_N, BLOCK_M].

    Blocks within [full_first, full_last) see all keys, and skip masking. Where it begins late, none does.
    Queries past the sequence's end need no mask: they are loaded as zeros and get zero weights, as if they saw nothing.
    """
    key = (first_key + tl.arange(0, BLOCK_N))[:, None]
    # An additive mask's tile takes the registers that a load ahead would need.
    for first_query in tl.range(first, last, BLOCK_M, num_stages=1 if ADDITIVE else STAGES):
        query = first_query + tl.arange(0, BLOCK_M)
        in_rows = query < seq_q
        q_tile = load_tile(q, first_query, q_stride, seq_q, BLOCK_M, HEAD_DIM, BLOCK_D, True, NARROW=ADD_DQ)
        grad_tile = load_tile(
            grad_out, first_query, grad_out_stride, seq_q, BLOCK_M, VALUE_DIM, BLOCK_V, True, NARROW=ADD_DQ
        )
        row_lse = tl.load(lse + query, mask=in_rows, other=float("-inf"))
        if WHOLE:
            out_tile = load_tile(out, first_query, out_stride, seq_q, BLOCK_M, VALUE_DIM, BLOCK_V, True)
            row_delta = tl.sum(grad_tile.to(tl.float32) * out_tile.to(tl.float32), axis=1)
            if delta is not None:
                tl.store(delta + query, row_delta, mask=in_rows)
        else:
            row_delta = tl.load(delta + query, mask=in_rows, other=0.0)
        row_correction = correction
        if ADDITIVE:
            row_correction = correction + query
        products = tl.dot(k, tl.trans(q_tile), input_precision=PRECISION)
        logit = logits(
            products, query[None, :], key, attn_mask, mask_stride_q, mask_stride_k, key_padding,
            slope, logit_scale, shift, seq_q, seq_k, window_left, window_right,
            ALIBI, ADDITIVE, SCALE_FIRST, LEFT, RIGHT, ALL_MASKED,
        )  # fmt: skip
        if not ALL_MASKED:  # noqa: SIM102 (goes away at compile time)
            if (first_query < full_first) | (first_query >= full_last):
                logit = logits(
                    logit, query[None, :], key, None, 0, 0, key_padding,
                    0.0, 1.0, shift, seq_q, seq_k, window_left, window_right, False, False, False, LEFT, RIGHT, True,
                )  # fmt: skip
        dp = tl.dot(v, tl.trans(grad_tile), input_precision=PRECISION)
        keep = False
        if DROPOUT:
            keep = tl.trans(
                keep_pairs(
                    seed, counter, sequence_head, first_query, first_key, max_q, max_k, threshold, BLOCK_M, BLOCK_N
                )
            )
        p = backward_weights(logit, row_lse, row_correction, logit_scale, ADDITIVE, SCALE_FIRST, 1)
        kept, dlogit = logit_gradients(p, dp, row_delta[None, :], keep, keep_factor, DROPOUT)
        dv = tl.dot(kept.to(grad_tile.dtype), grad_tile, dv, input_precision=PRECISION)
        dlogit = dlogit.to(q_tile.dtype)
        dk = tl.dot(dlogit, q_tile, dk, input_precision=PRECISION)
        if ADD_DQ:
            # Relaxed: nobody reads the sums before the kernel has ended.
            dq_tile = tl.dot(tl.trans(dlogit), k, input_precision=PRECISION)
            # Of a head the rows are neighbours: offsets known to the compiler, not registers.
            column = tl.arange(0, BLOCK_D)[None, :]
            offsets = tl.arange(0, BLOCK_M)[:, None] * HEAD_DIM + column
            pointers = dq + tl.cast(first_query, tl.int64) * HEAD_DIM + offsets
            tl.atomic_add(pointers, dq_tile, mask=in_rows[:, None] & (column < HEAD_DIM), sem="relaxed")
        if WHOLE:
            dq_tile = tl.dot(tl.trans(dlogit), k, input_precision=PRECISION) * scale
            # Zero weights times what is not finite would be NaN.
            dq_tile = tl.where((row_lse == float("-inf"))[:, None], 0.0, dq_tile)
            store_tile(dq, dq_tile, first_query, dq_stride, seq_q, BLOCK_M, HEAD_DIM, BLOCK_D)
    return dk, dv


@triton.jit
def _visible_queries(
    first_key, keys, shift, seq_q, window_left, window_right,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """For the keys [first_key, first_key + keys): (first, full_first, full_last, last) queries.

    Outside [first, last) none sees a key; within [full_first, full_last), made of whole blocks, all see every key, as far as
    windows go. All but `last` are multiples of BLOCK_M.
    """
    first = 0
    full_first = 0
    full_last = tl.cdiv(seq_q, BLOCK_M) * BLOCK_M
    last = seq_q
    if RIGHT:
        right = first_key - shift - window_right  # the first query that sees the first key
        first = tl.maximum(right, 0) // BLOCK_M * BLOCK_M
        full_first = tl.cdiv(tl.maximum(right + keys - 1, 0), BLOCK_M) * BLOCK_M
    if LEFT:
        left = first_key - shift + window_left + 1  # one past the last query that sees the first key
        full_last = tl.minimum(full_last, tl.maximum(left, 0) // BLOCK_M * BLOCK_M)
        last = tl.minimum(last, left + keys - 1)
    return first, full_first, full_last, tl.maximum(last, first)


@triton.jit(do_not_specialize=VARYING)
def dk_dv_kernel(
    grad_out,  # as out
    q, k, v, out,  # as the forward kernel's
    lse,  # float32 [batch, heads, seq_q], packed [heads, total_q]
    delta,  # float32, as lse; if WHOLE written, or None
    correction,  # float32, as lse, or None where the mask is not additive
    dq,  # if WHOLE as q, contiguous, written; if ADD_DQ float32 [(batch,) heads, rows, head_dim], added to, without the scale
    dk, dv,  # as k and v, contiguous, written
    cu_seqlens_q, cu_seqlens_k, attn_mask, key_padding, key_bounds, alibi, seed,
    grad_out_stride_b, grad_out_stride_h, grad_out_stride, out_stride_b, out_stride_h, out_stride,
    q_stride_b, q_stride_h, q_stride, k_stride_b, k_stride_h, k_stride, v_stride_b, v_stride_h, v_stride,
    dq_stride_b, dq_stride_h, dq_stride, dk_stride_b, dk_stride_h, dk_stride, dv_stride_b, dv_stride_h, dv_stride,
    lse_stride_b, lse_stride_h,
    mask_stride_b, mask_stride_h, mask_stride_q, mask_stride_k, padding_stride, alibi_stride,
    heads, kv_heads, sequence_heads, blocks, group, max_q, max_k, rows_q, rows_k, window_left, window_right, logit_scale, scale,
    counter: tl.int64, threshold: tl.uint32, keep_factor,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    ADDITIVE: tl.constexpr, SCALE_FIRST: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
    BOTTOM_RIGHT: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    WHOLE: tl.constexpr,  # one block has all keys of a sequence: dq and delta too
    ADD_DQ: tl.constexpr,  # every block adds its part of dq, in no order
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dk and dv. Grid: blocks of keys of every key head of every sequence; sequence_heads counts key heads here."""
    block, sequence_head = place(tl.program_id(0), blocks, sequence_heads, group)
    sequence, kv_head = sequence_head // kv_heads, sequence_head % kv_heads
    row_q, seq_q = bounds(cu_seqlens_q, sequence, max_q)
    row_k, seq_k = bounds(cu_seqlens_k, sequence, max_k)
    if cu_seqlens_k is not None:
        sequences = sequence_heads // kv_heads
        fill_past_the_end(dk, 0.0, cu_seqlens_k, sequences, rows_k, kv_heads * HEAD_DIM)
        fill_past_the_end(dv, 0.0, cu_seqlens_k, sequences, rows_k, kv_heads * VALUE_DIM)
        if WHOLE:
            fill_past_the_end(dq, 0.0, cu_seqlens_q, sequences, rows_q, heads * HEAD_DIM)
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

    k_tile = load_tile(k, first_key, k_stride, seq_k, BLOCK_N, HEAD_DIM, BLOCK_D, True, NARROW=ADD_DQ)
    v_tile = load_tile(v, first_key, v_stride, seq_k, BLOCK_N, VALUE_DIM, BLOCK_V, True, NARROW=ADD_DQ)
    dk_tile = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv_tile = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
    first, full_first, full_last, last = _visible_queries(
        first_key, BLOCK_N, shift, seq_q, window_left, window_right, LEFT, RIGHT, BLOCK_M
    )
    # In float32, whose products have no tensor cores, a branch costs more registers than masks cost time.
    FLOAT32: tl.constexpr = k.dtype.element_ty == tl.float32
    UNBOUNDED: tl.constexpr = key_padding is not None and key_bounds is None
    ALL_MASKED: tl.constexpr = attn_mask is not None or UNBOUNDED or WHOLE or FLOAT32
    if ADD_DQ:
        # Keys past the end, loaded as zeros, would give dq their weight, which may be inf, times zero.
        full_first = tl.where(first_key + BLOCK_N > seq_k, last, full_first)
    if key_bounds is not None:
        key_bounds += at * 3
        first_real, gap, last_real = tl.load(key_bounds), tl.load(key_bounds + 1), tl.load(key_bounds + 2)
        full_first = tl.where((first_key < first_real) | (first_key + BLOCK_N > gap), last, full_first)
        # A block of padding gets zeros.
        last = tl.where((first_key + BLOCK_N <= first_real) | (first_key >= last_real), first, last)
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
        correction_head = correction
        if ADDITIVE:
            correction_head = correction + statistics + h * lse_stride_h
        mask_head = attn_mask
        if attn_mask is not None:
            mask_head = attn_mask + at * mask_stride_b + h * mask_stride_h
        slope = alibi_slope(alibi, at, h, alibi_stride, ADDITIVE)
        dk_tile, dv_tile = _gather_dk_dv(
            dk_tile, dv_tile, k_tile, v_tile, q_head, grad_head, out_head, dq_head, mask_head, key_padding,
            lse_head, delta_head, correction_head, seed_value,
            q_stride, grad_out_stride, out_stride, dq_stride, mask_stride_q, mask_stride_k,
            query_head, first_key, first, full_first, full_last, last, shift, seq_q, seq_k, max_q, max_k,
            slope, logit_scale, scale, window_left, window_right, counter, threshold, keep_factor,
            HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_V, ALIBI, ADDITIVE, SCALE_FIRST, LEFT, RIGHT,
            DROPOUT, PRECISION, ALL_MASKED, WHOLE, ADD_DQ, BLOCK_M, BLOCK_N, STAGES,
        )  # fmt: skip
    store_tile(dk, dk_tile * scale, first_key, dk_stride, seq_k, BLOCK_N, HEAD_DIM, BLOCK_D, ADD_DQ)
    store_tile(dv, dv_tile, first_key, dv_stride, seq_k, BLOCK_N, VALUE_DIM, BLOCK_V, ADD_DQ)
