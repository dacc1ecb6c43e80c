"""Scaled dot-product attention, backward: five products a pair of query and key, in one kernel, or seven, deterministic, in two.

    p = exp(logit - lse);  delta_i = sum_d dout_id * out_id;  dp_ij = keep_ij / (1 - dropout_p) * dout_i · v_j
    dlogit = p * (dp - delta);  dq = scale * dlogit k;  dk = scale * dlogit' q;  dv = (keep / (1 - dropout_p) * p)' dout

(Dao et al., "FlashAttention", 2022, section B.2.) What a forward pass makes from blocks is made again from lse, so memory
stays linear in the length. Three ways, each with a block of keys and a loop over the queries (_attention_dk_dv):

- Short sequences: one program has all keys of a head, so that it knows whole rows of dlogit, and writes dq as it goes.
- Long ones: each block of keys adds its part of dq to a float32 sum, by atomic additions (Dao, "FlashAttention-2", 2023);
  small kernels before and after (_attention_rows) make delta and zeros, and scale and cast the sum. The order of the
  additions is the scheduler's, so the last bits of dq differ from run to run; dk, dv and the mask's gradient do not.
- `deterministic`, and wherever the configuration tables have no line for the second way: dq from a kernel of its own with
  blocks of queries and a loop over the keys (_attention_dq), which makes logits and dp once more. Each sum has one owner
  and one order: the same input gives the same bits.

A key head that several query heads share belongs to one program, which loops over them.

With an additive mask, rows may see nothing but its least number. Their log-sum-exp is that number, the logarithm of how many
there are being lost in it, and exp(logit - lse) would be 1 for each: correction_kernel finds such rows and their true sum.

On paper (fastbert.bench.floors has the figures): five products are 10·T·H·S·D operations, seven 14, for T query tokens, H heads
and S keys each, D wide. The second way moves a quarter more bytes than the third, in kernels of their own. On H200, products
and exponentials in turn, it takes 0.89 of the third's time at S = 512, and 0.67 at 4096; everything overlapped, 1.08 and 0.76.
So it begins at 512.
"""

import functools
from collections.abc import Iterator
from typing import Any

import torch
import triton
from torch import Tensor

from fastbert.kernels import _attention_configs
from fastbert.kernels._attention_aot import aot_grid, aot_inputs
from fastbert.kernels._attention_common import (
    Call,
    prepare,
    statistics_shape,
    statistics_strides,
    strides,
    tile_for,
    unit_stride,
)
from fastbert.kernels._attention_dk_dv import dk_dv_kernel
from fastbert.kernels._attention_dq import dq_kernel
from fastbert.kernels._attention_mask_gradient import mask_gradient
from fastbert.kernels._attention_rows import correction_kernel, delta_kernel, dq_cast_kernel
from fastbert.kernels._launch import AotCase, Device, check_tensors, device_of, launch
from fastbert.kernels._rows import meta_tensor


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
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv like q, k, v, contiguous; the additive mask's gradient float32 in its shape, or [0].

    Packed rows past the last boundary get zeros. Bit-equal from run to run with `deterministic`; without, all but dq are, and
    dq is for short sequences and in float32. Raises as `attention` does.
    """
    operation = "attention_backward"
    call = prepare(
        operation, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, attn_mask, key_padding_mask,
        alibi_slopes, scale, window_left, window_right, bottom_right, dropout_p, seed, offset,
    )  # fmt: skip
    check_tensors(operation, grad_out=grad_out, out=out, lse=lse)
    needs_mask_grad = needs_mask_grad and call.flags["ADDITIVE"]
    nothing = 0 in (call.batch, call.max_q, call.max_k, call.heads)
    allocate = torch.zeros if nothing else torch.empty
    dq, dk, dv = (allocate(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    mask_shape = attn_mask.shape if needs_mask_grad and attn_mask is not None else (0,)
    d_mask = allocate(mask_shape, dtype=torch.float32, device=q.device)
    if nothing:
        return dq, dk, dv, d_mask

    grad_out, q, k, v, out = (unit_stride(x) for x in (grad_out, q, k, v, out))
    lse = lse.contiguous()
    device = device_of(q)
    way = _way(call, device, deterministic)
    delta = None
    if needs_mask_grad or way != "whole":
        delta = torch.empty(statistics_shape(q), dtype=torch.float32, device=q.device)
    correction = _correction(call, device, q, k, lse) if call.flags["ADDITIVE"] else None
    shared = dict(
        **strides("q", q), **strides("k", k), **strides("v", v), **strides("grad_out", grad_out),
        **statistics_strides(q), **call.flags, **call.block_dims,
    )  # fmt: skip
    rest = dict(shared, **strides("out", out), **strides("dq", dq), scale=float(scale))
    dq_sum = None
    if way == "add":
        dq_sum = torch.empty((*lse.shape, call.head_dim), dtype=torch.float32, device=q.device)
        sequence, head = rest["lse_stride_b"], rest["lse_stride_h"]
        rest |= dict(dq_stride_b=sequence * call.head_dim, dq_stride_h=head * call.head_dim, dq_stride=call.head_dim)
        _launch_rows(
            delta_kernel, call, q, grad_out, out, delta, dq_sum, **strides("grad_out", grad_out), **strides("out", out),
            VALUE_DIM=call.value_dim, BLOCK_V=call.block_dims["BLOCK_V"],
        )  # fmt: skip
    if way == "two passes":
        tile = tile_for("attention_backward_dq", call, device)
        blocks, sequence_heads = triton.cdiv(call.max_q, tile.block_m), call.batch * call.heads
        launch(
            dq_kernel, (blocks * sequence_heads,), q, grad_out, q, k, v, out, lse, delta, correction, dq,
            **rest, **call.bounded(tile.block_n),
            blocks=blocks, sequence_heads=sequence_heads, group=call.heads_together(sequence_heads), rows_q=q.shape[0],
            **tile.constexprs, num_warps=tile.num_warps,
        )  # fmt: skip
    tile = tile_for(_BY_KEYS[way], call, device)
    blocks, sequence_heads = triton.cdiv(call.max_k, tile.block_n), call.batch * call.kv_heads
    launch(
        dk_dv_kernel, (blocks * sequence_heads,), q, grad_out, q, k, v, out, lse, delta, correction,
        dq if dq_sum is None else dq_sum, dk, dv, **rest, **call.bounded(tile.block_n),
        **strides("dk", dk), **strides("dv", dv),
        blocks=blocks, sequence_heads=sequence_heads, group=call.heads_together(sequence_heads),
        rows_q=q.shape[0], rows_k=k.shape[0],
        WHOLE=way == "whole", ADD_DQ=way == "add", **tile.constexprs, num_warps=tile.num_warps,
    )  # fmt: skip
    if dq_sum is not None:
        _launch_rows(dq_cast_kernel, call, q, dq_sum, dq, lse, **strides("dq", dq), scale=float(scale))
    if needs_mask_grad:
        mask_gradient(call, shared, grad_out, q, k, v, lse, delta, correction, d_mask)
    return dq, dk, dv, d_mask


#: The table of the kernel with blocks of keys.
_BY_KEYS = {
    "whole": "attention_backward_whole",
    "add": "attention_backward_add",
    "two passes": "attention_backward_dk_dv",
}


def _way(call: Call, device: Device, deterministic: bool) -> str:
    """Which of the three ways a call goes."""
    if _attention_configs.has_attention_tile(_BY_KEYS["whole"], device, call.tile_key):
        return "whole"
    if not deterministic and _attention_configs.has_attention_tile(_BY_KEYS["add"], device, call.tile_key):
        return "add"
    return "two passes"


def _launch_rows(kernel: Any, call: Call, q: Tensor, *tensors: Tensor | None, **arguments: Any) -> None:
    """Start a kernel that works on rows of q alone: of a packed batch all are one sequence's."""
    rows = q.shape[0] if call.packed else call.max_q
    heads, sequences = call.heads, 1 if call.packed else call.batch
    block_m = _attention_configs.attention_rows(max(call.head_dim, call.value_dim))
    blocks = triton.cdiv(rows, block_m)
    launch(
        kernel, (blocks * heads * sequences,), q, *tensors, **statistics_strides(q), **arguments,
        heads=heads, rows=rows, blocks=blocks, BLOCK_M=block_m,
        HEAD_DIM=call.head_dim, BLOCK_D=call.block_dims["BLOCK_D"], num_warps=4,
    )  # fmt: skip


def _correction(call: Call, device: Device, q: Tensor, k: Tensor, lse: Tensor) -> Tensor:
    """float32 of lse's shape: the logarithm, to base two, of what exp(logit - lse) sums to in each row."""
    correction = torch.empty_like(lse)
    tile = tile_for("attention_backward_dq", call, device)
    blocks, sequence_heads = triton.cdiv(call.max_q, tile.block_m), call.batch * call.heads
    unused = ("seed", "counter", "threshold", "keep_factor")
    masks = {name: value for name, value in call.bounded(tile.block_n).items() if name not in unused}
    launch(
        correction_kernel, (blocks * sequence_heads,), q, q, k, lse, correction,
        **strides("q", q), **strides("k", k), **statistics_strides(q), **masks,
        **{name: call.flags[name] for name in ("LEFT", "RIGHT", "BOTTOM_RIGHT", "PRECISION")},
        **{name: call.block_dims[name] for name in ("HEAD_DIM", "BLOCK_D")},
        blocks=blocks, sequence_heads=sequence_heads, group=call.heads_together(sequence_heads),
        BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, num_warps=tile.num_warps,
    )  # fmt: skip
    return correction


# --------------------------------------------------------------------------------------------------------- ahead of time

_SAMPLE = (
    "attention_backward-d64-s1024-bf16-full",
    "attention_backward-d64-s1024-bf16-full-deterministic",
    "attention_backward-d64-s128-bf16-full",
    "attention_backward-d64-s1024-bf16-additive-keys",
)


def aot_cases() -> Iterator[AotCase]:
    """What is compiled ahead of time: every line of the tables, and what adds or removes code."""
    for name, head_dim, dtype, length, options in aot_grid("attention_backward"):
        i = aot_inputs(head_dim, dtype, length, **options)
        lse = meta_tensor(*statistics_shape(i.q), dtype=torch.float32)
        needs_mask_grad = options.get("mask") == torch.float32
        arguments = (i.q, i.q, i.k, i.v, i.q, lse, *i.arguments, needs_mask_grad)
        for deterministic in (False, True):
            case = f"{name}-deterministic" if deterministic else name
            yield AotCase(case, functools.partial(attention_backward, *arguments, deterministic), case in _SAMPLE)
