"""The gradient of attention's additive mask: dlogit, summed over what the mask is broadcast over.

A kernel of its own, beside those of attention_backward: one program owns a block of the mask and makes the dlogit of every
sequence, head, query and key that shares it once more, in one order, so that the sum takes no atomics and gives the same bits
from run to run. It costs two products a pair more, and with a mask of a single row or column is not parallel over the
dimension it sums: correct before fast.
"""

import triton
import triton.language as tl
from torch import Tensor

from fastbert.kernels._attention_common import (
    VARYING,
    Call,
    bounds,
    keep_pairs,
    load_tile,
    logits,
    row_subtrahend,
    tile_for,
    weights_and_gradients,
)
from fastbert.kernels._launch import device_of, launch


@triton.jit(do_not_specialize=[*VARYING, "batch", "mask_heads"])
def _mask_gradient_kernel(
    grad_out, q, k, v,  # as the forward kernel's
    lse, delta,  # float32 [batch, heads, seq_q], packed [heads, total_q]
    d_mask,  # float32 [batch or 1, heads or 1, max_q or 1, max_k or 1], contiguous, written
    cu_seqlens_q, cu_seqlens_k, attn_mask, key_padding, alibi, seed,
    grad_out_stride_b, grad_out_stride_h, grad_out_stride,
    q_stride_b, q_stride_h, q_stride, k_stride_b, k_stride_h, k_stride, v_stride_b, v_stride_h, v_stride,
    lse_stride_b, lse_stride_h,
    mask_stride_b, mask_stride_h, mask_stride_q, mask_stride_k, padding_stride, alibi_stride,
    batch, mask_heads, heads, kv_heads, blocks_q, blocks_k, max_q, max_k, window_left, window_right, logit_scale,
    counter: tl.int64, threshold: tl.uint32, keep_factor,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    ADDITIVE: tl.constexpr, SCALE_FIRST: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
    BOTTOM_RIGHT: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    SUM_BATCH: tl.constexpr, SUM_HEADS: tl.constexpr, SUM_QUERIES: tl.constexpr, SUM_KEYS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dlogit summed over what the mask is broadcast over. Grid: blocks of the mask; one program owns one."""
    program = tl.program_id(0)
    mask_blocks_k = 1 if SUM_KEYS else blocks_k
    mask_blocks_q = 1 if SUM_QUERIES else blocks_q
    block_k = program % mask_blocks_k
    block_q = program // mask_blocks_k % mask_blocks_q
    mask_head = program // mask_blocks_k // mask_blocks_q % mask_heads
    mask_sequence = program // mask_blocks_k // mask_blocks_q // mask_heads
    # What the program sums over: all of a broadcast dimension, or the one that its block belongs to.
    first_sequence, last_sequence = mask_sequence, mask_sequence + 1
    if SUM_BATCH:
        first_sequence, last_sequence = 0, batch
    first_head, last_head = mask_head, mask_head + 1
    if SUM_HEADS:
        first_head, last_head = 0, heads
    first_block_q, last_block_q = block_q, block_q + 1
    if SUM_QUERIES:
        first_block_q, last_block_q = 0, blocks_q
    first_block_k, last_block_k = block_k, block_k + 1
    if SUM_KEYS:
        first_block_k, last_block_k = 0, blocks_k
    ALIBI: tl.constexpr = alibi is not None
    seed_value = tl.cast(0, tl.int64)
    if DROPOUT:
        seed_value = tl.load(seed)

    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for sequence in range(first_sequence, last_sequence):
        at = tl.cast(sequence, tl.int64)
        row_q, seq_q = bounds(cu_seqlens_q, sequence, max_q)
        row_k, seq_k = bounds(cu_seqlens_k, sequence, max_k)
        shift = 0
        if BOTTOM_RIGHT:
            shift = seq_k - seq_q
        padding = key_padding
        if key_padding is not None:
            padding = key_padding + at * padding_stride
        for head in range(first_head, last_head):
            h = tl.cast(head, tl.int64)
            kv_head = h // (heads // kv_heads)
            q_head = q + at * q_stride_b + h * q_stride_h + row_q * q_stride
            k_head = k + at * k_stride_b + kv_head * k_stride_h + row_k * k_stride
            v_head = v + at * v_stride_b + kv_head * v_stride_h + row_k * v_stride
            grad_head = grad_out + at * grad_out_stride_b + h * grad_out_stride_h + row_q * grad_out_stride
            mask = attn_mask + at * mask_stride_b + h * mask_stride_h
            statistics = at * lse_stride_b + h * lse_stride_h + row_q
            slope = 0.0
            if ALIBI:
                slope = tl.load(alibi + at * alibi_stride + h).to(tl.float32)
            for query_block in range(first_block_q, last_block_q):
                first_query = query_block * BLOCK_M
                query = first_query + tl.arange(0, BLOCK_M)
                q_tile = load_tile(q_head, first_query, q_stride, seq_q, BLOCK_M, HEAD_DIM, BLOCK_D, True)
                grad_tile = load_tile(grad_head, first_query, grad_out_stride, seq_q, BLOCK_M, VALUE_DIM, BLOCK_V, True)
                row_lse = tl.load(lse + statistics + query, mask=query < seq_q, other=float("-inf"))
                row_delta = tl.load(delta + statistics + query, mask=query < seq_q, other=0.0)
                for key_block in tl.range(first_block_k, last_block_k, num_stages=STAGES):
                    first_key = key_block * BLOCK_N
                    key = first_key + tl.arange(0, BLOCK_N)
                    k_tile = load_tile(k_head, first_key, k_stride, seq_k, BLOCK_N, HEAD_DIM, BLOCK_D, True)
                    v_tile = load_tile(v_head, first_key, v_stride, seq_k, BLOCK_N, VALUE_DIM, BLOCK_V, True)
                    products = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION)
                    dp = tl.dot(grad_tile, tl.trans(v_tile), input_precision=PRECISION)
                    logit = logits(
                        products, query[:, None], key[None, :], mask, mask_stride_q, mask_stride_k, padding,
                        slope, logit_scale, shift, seq_q, seq_k, window_left, window_right,
                        ALIBI, ADDITIVE, SCALE_FIRST, LEFT, RIGHT, True,
                    )  # fmt: skip
                    keep = False
                    if DROPOUT:
                        keep = keep_pairs(
                            seed_value, counter, sequence * heads + head, first_query, first_key, max_q, max_k,
                            threshold, BLOCK_M, BLOCK_N,
                        )  # fmt: skip
                    _, dlogit = weights_and_gradients(
                        logit, row_subtrahend(row_lse, ADDITIVE)[:, None], dp, row_delta[:, None], keep, keep_factor,
                        logit_scale, ADDITIVE, SCALE_FIRST, DROPOUT,
                    )  # fmt: skip
                    total += dlogit

    width = 1 if SUM_KEYS else max_k
    height = 1 if SUM_QUERIES else max_q
    d_mask += (mask_sequence.to(tl.int64) * mask_heads + mask_head) * height * width
    if SUM_QUERIES:
        row = tl.arange(0, 1)
        total = tl.sum(total, axis=0, keep_dims=True)
    else:
        row = block_q * BLOCK_M + tl.arange(0, BLOCK_M)
    if SUM_KEYS:
        column = tl.arange(0, 1)
        total = tl.sum(total, axis=1, keep_dims=True)
    else:
        column = block_k * BLOCK_N + tl.arange(0, BLOCK_N)
    pointers = d_mask + row.to(tl.int64)[:, None] * width + column[None, :]
    tl.store(pointers, total, mask=(row < height)[:, None] & (column < width)[None, :])


def mask_gradient(
    call: Call, shared: dict[str, object], grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor,
    lse: Tensor, delta: Tensor | None, d_mask: Tensor,
) -> None:  # fmt: skip
    """Fill `d_mask`, of the mask's shape; `shared` are the kernel arguments that attention_backward's have too."""
    tile = tile_for("attention_backward_mask", call, device_of(q))
    mask_batch, mask_heads, mask_q, mask_k = call.mask_shape
    blocks_q, blocks_k = triton.cdiv(call.max_q, tile.block_m), triton.cdiv(call.max_k, tile.block_n)
    sum_queries, sum_keys = mask_q < call.max_q, mask_k < call.max_k
    grid = mask_batch * mask_heads * (1 if sum_queries else blocks_q) * (1 if sum_keys else blocks_k)
    launch(
        _mask_gradient_kernel, (grid,), q, grad_out, q, k, v, lse, delta, d_mask, **shared,
        batch=call.batch, mask_heads=mask_heads, blocks_q=blocks_q, blocks_k=blocks_k,
        SUM_BATCH=mask_batch < call.batch, SUM_HEADS=mask_heads < call.heads, SUM_QUERIES=sum_queries, SUM_KEYS=sum_keys,
        **tile.constexprs, num_warps=tile.num_warps,
    )  # fmt: skip
