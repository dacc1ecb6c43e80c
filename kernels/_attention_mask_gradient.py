"""The gradient of attention's additive mask: dlogit, summed over what the mask is broadcast over.

A kernel of its own, beside those of attention_backward. A block of the mask is shared by some tiles of pairs: one for each
sequence, head, block of queries and block of keys that it is broadcast over. Programs make the dlogit of those tiles once more.
Where a mask has many blocks, each is one program's; where it has few, the tiles of each are dealt out to several programs,
in runs, whose partial sums a second kernel adds. Every sum has one order, that of the tiles, and takes no atomics: the same
input gives the same bits on a device.

On paper: two products a pair and an exponential, where the backward pass without it has five and one; the partial sums are at
most as many tiles as there are programs: 4·132 of 64·64 float32, 9 MB, on H200.
"""

import triton
import triton.language as tl
from torch import Tensor

from fastbert.kernels import _attention_configs, _configs
from fastbert.kernels._attention_common import (
    VARYING,
    Call,
    alibi_slope,
    backward_weights,
    bounds,
    keep_pairs,
    load_tile,
    logit_gradients,
    logits,
    tile_for,
    visible_keys,
)
from fastbert.kernels._launch import device_of, launch

_VARYING = [
    *VARYING, "mask_batch", "mask_heads", "mask_blocks_q", "mask_blocks_k",
    "shared_heads", "shared_blocks_q", "shared_blocks_k", "tiles", "tiles_each",
]  # fmt: skip


@triton.jit(do_not_specialize=_VARYING)
def _mask_gradient_kernel(
    grad_out, q, k, v,  # as the forward kernel's
    lse, delta, correction,  # float32 [batch, heads, seq_q], packed [heads, total_q]
    partial,  # float32 [splits, batch or 1, heads or 1, max_q or 1, max_k or 1], contiguous, written
    cu_seqlens_q, cu_seqlens_k, attn_mask, key_padding, key_bounds, alibi, seed,
    grad_out_stride_b, grad_out_stride_h, grad_out_stride,
    q_stride_b, q_stride_h, q_stride, k_stride_b, k_stride_h, k_stride, v_stride_b, v_stride_h, v_stride,
    lse_stride_b, lse_stride_h,
    mask_stride_b, mask_stride_h, mask_stride_q, mask_stride_k, padding_stride, alibi_stride,
    mask_batch, mask_heads, mask_blocks_q, mask_blocks_k,  # of the gradient: what it is summed over counts one
    shared_heads, shared_blocks_q, shared_blocks_k,  # how many of each share a block of the gradient
    tiles: tl.int64, tiles_each: tl.int64,  # that share a block; of those, that a split has
    heads, kv_heads, max_q, max_k, window_left, window_right, logit_scale,
    counter: tl.int64, threshold: tl.uint32, keep_factor,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    ADDITIVE: tl.constexpr, SCALE_FIRST: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
    BOTTOM_RIGHT: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    SUM_QUERIES: tl.constexpr, SUM_KEYS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dlogit summed over a split of the tiles that share a block of the mask. Grid: splits of blocks."""
    program = tl.program_id(0)
    mask_block_k = program % mask_blocks_k
    mask_block_q = program // mask_blocks_k % mask_blocks_q
    mask_head = program // mask_blocks_k // mask_blocks_q % mask_heads
    mask_sequence = program // mask_blocks_k // mask_blocks_q // mask_heads % mask_batch
    split = program // mask_blocks_k // mask_blocks_q // mask_heads // mask_batch
    ALIBI: tl.constexpr = alibi is not None
    seed_value = tl.cast(0, tl.int64)
    if DROPOUT:
        seed_value = tl.load(seed)

    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    first_tile = split.to(tl.int64) * tiles_each
    for tile in range(first_tile, tl.minimum(first_tile + tiles_each, tiles)):
        # One of the two addends of each line is zero: what is summed over, or the block that is not.
        shared_block_k = (tile % shared_blocks_k).to(tl.int32)
        shared_block_q = (tile // shared_blocks_k % shared_blocks_q).to(tl.int32)
        sequence_head = (tile // shared_blocks_k // shared_blocks_q).to(tl.int32)
        first_key = (mask_block_k + shared_block_k) * BLOCK_N
        first_query = (mask_block_q + shared_block_q) * BLOCK_M
        head = mask_head + sequence_head % shared_heads
        sequence = mask_sequence + sequence_head // shared_heads
        row_q, seq_q = bounds(cu_seqlens_q, sequence, max_q)
        row_k, seq_k = bounds(cu_seqlens_k, sequence, max_k)
        at, h = tl.cast(sequence, tl.int64), tl.cast(head, tl.int64)
        shift = 0
        if BOTTOM_RIGHT:
            shift = seq_k - seq_q
        padding = key_padding
        if key_padding is not None:
            padding = key_padding + at * padding_stride
        real_keys = key_bounds
        if key_bounds is not None:
            real_keys = key_bounds + at * 3
        first, _full_first, _full_last, last = visible_keys(
            first_query, BLOCK_M, shift, seq_k, real_keys, window_left, window_right, LEFT, RIGHT, BLOCK_N
        )
        if (first_query < seq_q) & (first_key >= first) & (first_key < last):
            kv_head = h // (heads // kv_heads)
            q_head = q + at * q_stride_b + h * q_stride_h + row_q * q_stride
            k_head = k + at * k_stride_b + kv_head * k_stride_h + row_k * k_stride
            v_head = v + at * v_stride_b + kv_head * v_stride_h + row_k * v_stride
            grad_head = grad_out + at * grad_out_stride_b + h * grad_out_stride_h + row_q * grad_out_stride
            mask = attn_mask + at * mask_stride_b + h * mask_stride_h
            slope = alibi_slope(alibi, at, h, alibi_stride, ADDITIVE)
            query = first_query + tl.arange(0, BLOCK_M)
            key = first_key + tl.arange(0, BLOCK_N)
            statistics = at * lse_stride_b + h * lse_stride_h + row_q + query
            row_lse = tl.load(lse + statistics, mask=query < seq_q, other=float("-inf"))
            row_delta = tl.load(delta + statistics, mask=query < seq_q, other=0.0)
            q_tile = load_tile(q_head, first_query, q_stride, seq_q, BLOCK_M, HEAD_DIM, BLOCK_D, True)
            grad_tile = load_tile(grad_head, first_query, grad_out_stride, seq_q, BLOCK_M, VALUE_DIM, BLOCK_V, True)
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
            p = backward_weights(logit, row_lse, correction + statistics, logit_scale, ADDITIVE, SCALE_FIRST, 0)
            _kept, dlogit = logit_gradients(p, dp, row_delta[:, None], keep, keep_factor, DROPOUT)
            total += dlogit

    width = 1 if SUM_KEYS else max_k
    height = 1 if SUM_QUERIES else max_q
    partial += ((split.to(tl.int64) * mask_batch + mask_sequence) * mask_heads + mask_head) * height * width
    if SUM_QUERIES:
        row = tl.arange(0, 1)
        total = tl.sum(total, axis=0, keep_dims=True)
    else:
        row = mask_block_q * BLOCK_M + tl.arange(0, BLOCK_M)
    if SUM_KEYS:
        column = tl.arange(0, 1)
        total = tl.sum(total, axis=1, keep_dims=True)
    else:
        column = mask_block_k * BLOCK_N + tl.arange(0, BLOCK_N)
    pointers = partial + row.to(tl.int64)[:, None] * width + column[None, :]
    tl.store(pointers, total, mask=(row < height)[:, None] & (column < width)[None, :])


@triton.jit(do_not_specialize=["splits", "elements"])
def _sum_splits_kernel(
    partial,  # float32 [splits, elements]
    d_mask,  # float32 [elements], written
    splits, elements: tl.int64,
    SPLITS: tl.constexpr, ELEMENTS: tl.constexpr,
):  # fmt: skip
    """Add the splits, in order. Grid: blocks of elements."""
    element = tl.program_id(0).to(tl.int64) * ELEMENTS + tl.arange(0, ELEMENTS)
    in_mask = (element < elements)[None, :]
    total = tl.zeros([SPLITS, ELEMENTS], tl.float32)
    for first in range(0, splits, SPLITS):
        split = first + tl.arange(0, SPLITS)
        pointers = partial + split.to(tl.int64)[:, None] * elements + element[None, :]
        total += tl.load(pointers, mask=(split < splits)[:, None] & in_mask, other=0.0)
    tl.store(d_mask + element, tl.sum(total, axis=0), mask=element < elements)


def mask_gradient(
    call: Call, shared: dict[str, object], grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor,
    lse: Tensor, delta: Tensor | None, correction: Tensor | None, d_mask: Tensor,
) -> None:  # fmt: skip
    """Fill `d_mask`, of the mask's shape; `shared` are the kernel arguments that attention_backward's have too."""
    device = device_of(q)
    tile = tile_for("attention_backward_mask", call, device)
    mask_batch, mask_heads, mask_q, mask_k = call.mask_shape
    blocks_q, blocks_k = triton.cdiv(call.max_q, tile.block_m), triton.cdiv(call.max_k, tile.block_n)
    sum_queries, sum_keys = mask_q < call.max_q, mask_k < call.max_k
    mask_blocks_q, mask_blocks_k = 1 if sum_queries else blocks_q, 1 if sum_keys else blocks_k
    blocks = mask_batch * mask_heads * mask_blocks_q * mask_blocks_k
    shared_heads = call.heads // mask_heads
    shared_blocks_q, shared_blocks_k = blocks_q // mask_blocks_q, blocks_k // mask_blocks_k
    tiles = call.batch // mask_batch * shared_heads * shared_blocks_q * shared_blocks_k
    tiles_each, splits = _attention_configs.mask_gradient_splits(device, blocks, tiles)
    partial = d_mask if splits == 1 else d_mask.new_empty((splits, *d_mask.shape))
    launch(
        _mask_gradient_kernel, (splits * blocks,), q, grad_out, q, k, v, lse, delta, correction, partial,
        **shared, **call.bounded(tile.block_n),
        mask_batch=mask_batch, mask_heads=mask_heads, mask_blocks_q=mask_blocks_q, mask_blocks_k=mask_blocks_k,
        shared_heads=shared_heads, shared_blocks_q=shared_blocks_q, shared_blocks_k=shared_blocks_k,
        tiles=tiles, tiles_each=tiles_each, SUM_QUERIES=sum_queries, SUM_KEYS=sum_keys,
        BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, num_warps=tile.num_warps,
    )  # fmt: skip
    if splits > 1:
        reduction = _configs.reduce_tile(device)
        launch(
            _sum_splits_kernel, (triton.cdiv(d_mask.numel(), reduction.columns),), q, partial, d_mask, splits,
            d_mask.numel(), SPLITS=reduction.programs, ELEMENTS=reduction.columns, num_warps=reduction.num_warps,
        )  # fmt: skip
