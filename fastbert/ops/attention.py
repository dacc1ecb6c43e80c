"""Scaled dot-product attention: dense under torch's name, packed under flash_attn's, one operator below."""

import itertools
import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastbert import reference
from fastbert.ops._common import (
    autocast,
    check_device,
    check_floating,
    check_tensor,
    distinct,
    dropout_seed,
    wants_grad,
)
from fastbert.ops._registry import CUDA_DTYPES, Implementation, Operation, register
from fastbert.ops.softmax import check_broadcast
from fastbert.reference import wide_dtype


def _fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
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
    save_lse: bool,
) -> tuple[Tensor, Tensor]:
    lse_shape = tuple(q.shape[:3]) if cu_seqlens_q is None else (q.shape[1], q.shape[0])
    return (
        q.new_empty((*q.shape[:-1], v.shape[-1])),
        q.new_empty(lse_shape if save_lse else (0,), dtype=wide_dtype(q)),
    )


def _fake_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
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
    mask_shape = attn_mask.shape if needs_mask_grad and attn_mask is not None else (0,)
    return (
        q.new_empty(q.shape),
        k.new_empty(k.shape),
        v.new_empty(v.shape),
        q.new_empty(mask_shape, dtype=wide_dtype(q)),
    )


def _check_values(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *_: Any,
) -> None:
    if cu_seqlens_q is None or cu_seqlens_k is None:
        return
    _check_boundaries("q", cu_seqlens_q, max_seqlen_q, q.shape[0])
    same = cu_seqlens_k is cu_seqlens_q and max_seqlen_k == max_seqlen_q and k.shape[0] == q.shape[0]
    if not same:  # self-attention passes one tensor twice, and looking at its values is not free
        _check_boundaries("k", cu_seqlens_k, max_seqlen_k, k.shape[0])


def _check_boundaries(which: str, cu_seqlens: Tensor, max_seqlen: int, total: int) -> None:
    """Raises ValueError unless cu_seqlens cuts ``total`` tokens into sequences of at most max_seqlen."""
    ends = cu_seqlens.tolist()
    lengths = [b - a for a, b in itertools.pairwise(ends)]
    decreases = bool(lengths) and min(lengths) < 0
    if ends[0] != 0 or ends[-1] != total or decreases:
        raise ValueError(
            f"varlen_attention: cu_seqlens_{which} runs from {ends[0]} to {ends[-1]}{' and decreases' if decreases else ''}; "
            f"expected running sums of lengths from 0 to the {total} packed tokens"
        )
    if lengths and max(lengths) > max_seqlen:
        raise ValueError(
            f"varlen_attention: cu_seqlens_{which} holds a sequence of {max(lengths)} tokens and max_seqlen_{which} is "
            f"{max_seqlen}"
        )


_MASKS = (
    "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k, Tensor? attn_mask,"
    " Tensor? key_padding_mask, Tensor? alibi_slopes, float scale, SymInt window_left, SymInt window_right, bool bottom_right,"
    " float dropout_p, Tensor? seed, int offset"
)

_forward = register(
    Operation(
        "attention",
        f"(Tensor q, Tensor k, Tensor v, {_MASKS}, bool save_lse) -> (Tensor out, Tensor lse)",
        reference.attention,
        _fake,
        cpu=Implementation(
            "C++",
            "fastbert.cpu.attention:attention",
            (torch.float32, torch.bfloat16, torch.float16),
            "float16 is computed in float32",
        ),
        cuda=Implementation("Triton", "fastbert.kernels.attention:attention", CUDA_DTYPES),
        check_values=_check_values,
    )
)
_backward = register(
    Operation(
        "attention_backward",
        f"(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, {_MASKS}, bool needs_mask_grad,"
        " bool deterministic) -> (Tensor dq, Tensor dk, Tensor dv, Tensor dmask)",
        reference.attention_backward,
        _fake_backward,
        cpu=Implementation(
            "C++",
            "fastbert.cpu.attention:attention_backward",
            (torch.float32, torch.bfloat16, torch.float16),
            "float16 is computed in float32",
        ),
        cuda=Implementation("Triton", "fastbert.kernels.attention_backward:attention_backward", CUDA_DTYPES),
    )
)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, tensors: Any, numbers: Any
    ) -> tuple[Tensor, Tensor]:
        cu_seqlens_q, cu_seqlens_k, key_padding_mask, alibi_slopes, seed = tensors
        max_seqlen_q, max_seqlen_k, scale, window_left, window_right, bottom_right, dropout_p, _ = numbers
        masks = (
            cu_seqlens_q,
            cu_seqlens_k,
            max_seqlen_q,
            max_seqlen_k,
            attn_mask,
            key_padding_mask,
            alibi_slopes,
            scale,
            window_left,
            window_right,
            bottom_right,
            dropout_p,
            seed,
            0,
        )
        out, lse = _forward(q, k, v, *masks, True)
        ctx.save_for_backward(
            q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, attn_mask, key_padding_mask, alibi_slopes, seed
        )
        ctx.numbers = numbers
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, cu_q, cu_k, attn_mask, key_padding_mask, alibi_slopes, seed = ctx.saved_tensors
        max_seqlen_q, max_seqlen_k, scale, window_left, window_right, bottom_right, dropout_p, deterministic = (
            ctx.numbers
        )
        needs_mask = ctx.needs_input_grad[3]
        dq, dk, dv, d_mask = _backward(
            grad_out,
            q,
            k,
            v,
            out,
            lse,
            cu_q,
            cu_k,
            max_seqlen_q,
            max_seqlen_k,
            attn_mask,
            key_padding_mask,
            alibi_slopes,
            scale,
            window_left,
            window_right,
            bottom_right,
            dropout_p,
            seed,
            0,
            needs_mask,
            deterministic,
        )
        return dq, dk, dv, d_mask.to(attn_mask.dtype) if needs_mask else None, None, None


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None,
    tensors: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None],
    numbers: tuple[int, int, float, int, int, bool, float, bool],
    save_lse: bool,
) -> tuple[Tensor, Tensor]:
    if wants_grad(q, k, v, attn_mask):
        q, k, v = distinct(q, k, v)
        return _Attention.apply(q, k, v, attn_mask, tensors, numbers)
    cu_seqlens_q, cu_seqlens_k, key_padding_mask, alibi_slopes, seed = tensors
    max_seqlen_q, max_seqlen_k, scale, window_left, window_right, bottom_right, dropout_p, _ = numbers
    return _forward(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        attn_mask,
        key_padding_mask,
        alibi_slopes,
        scale,
        window_left,
        window_right,
        bottom_right,
        dropout_p,
        seed,
        0,
        save_lse,
    )


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    key_padding_mask: Tensor | None = None,
    window: tuple[int, int] | None = None,
) -> Tensor:
    """Attention (Vaswani et al. 2017), as ``torch.nn.functional.scaled_dot_product_attention``, and two keywords more.

    A query with nothing to attend to gives zeros and gets a zero gradient. One documented difference: masks combine freely
    with ``is_causal``. A query whose every key has an additive mask of a dtype's least number, as transformers makes them, does
    attend, to all of them alike. On a GPU, in 16 bits, from 512 tokens a sequence on, the last bits of query's gradient may
    differ from run to run unless torch.use_deterministic_algorithms(True) is in force; the rest is bit-equal.

    Args:
        query: [batch, heads, seq_q, head_dim]; leading dimensions may be missing.
        key: [batch, kv_heads, seq_k, head_dim].
        value: [batch, kv_heads, seq_k, value_dim].
        attn_mask: broadcastable to [batch, heads, seq_q, seq_k]; bool (True = attend) or additive; an additive mask gets its
            gradient.
        dropout_p: probability that an attention weight is dropped; applied whenever above 0, as torch does.
        is_causal: query i attends to keys j ≤ i, counted from the first of both, as torch does.
        scale: factor on the logits; default 1/sqrt(head_dim).
        enable_gqa: kv_heads may divide heads; query head h then reads key head h // (heads // kv_heads).
        key_padding_mask: bool [batch, seq_k], True = real token.
        window: (left, right): query i attends to keys from i − left to i + right; −1 is no limit.

    Returns:
        [batch, heads, seq_q, value_dim] in query's dtype; under autocast in autocast's.

    Raises:
        TypeError: dtypes differ, are not floating point, or a mask is neither bool nor floating point.
        ValueError: shapes or devices do not fit; dropout_p or window is out of range.
    """
    function = "scaled_dot_product_attention"
    q, k, v = autocast_qkv(function, query=query, key=key, value=value)
    missing = max(0, 4 - q.dim())
    for _ in range(missing):
        q, k, v = q.unsqueeze(0), k.unsqueeze(0), v.unsqueeze(0)
    _check_qkv(function, q, k, v, dimensions=4)
    if k.shape[0] != q.shape[0] or v.shape[:3] != k.shape[:3]:
        raise ValueError(
            f"{function}: query has shape {list(query.shape)}, key {list(key.shape)}, value {list(value.shape)}; "
            "batch sizes, and key's and value's heads and lengths, must be equal"
        )
    _check_heads(function, q.shape[1], k.shape[1], enable_gqa, "enable_gqa=True lets key heads divide query heads")
    batch, heads, seq_q, seq_k = q.shape[0], q.shape[1], q.shape[2], k.shape[2]
    _check_mask(function, q, attn_mask, (batch, heads, seq_q, seq_k))
    if key_padding_mask is not None:
        check_tensor(function, "key_padding_mask", key_padding_mask)
        if key_padding_mask.dtype != torch.bool or tuple(key_padding_mask.shape) != (batch, seq_k):
            raise ValueError(
                f"{function}: key_padding_mask is {key_padding_mask.dtype} {list(key_padding_mask.shape)}; expected bool "
                f"{[batch, seq_k]}, True = real token"
            )
        check_device(function, "query", q, key_padding_mask=key_padding_mask)
    left, right = _check_window(function, window or (-1, -1))
    if is_causal:
        right = 0
    seed = dropout_seed(function, dropout_p, None, 0, q.device)
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale
    numbers = (0, 0, scale, left, right, False, dropout_p, torch.are_deterministic_algorithms_enabled())
    out, _ = _attend(q, k, v, attn_mask, (None, None, key_padding_mask, None, seed), numbers, False)
    for _ in range(missing):
        out = out.squeeze(0)
    return out


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    alibi_slopes: Tensor | None = None,
    bias: Tensor | None = None,
    deterministic: bool = False,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention on packed sequences, as flash_attn's ``flash_attn_varlen_func``: sequence i attends to itself only.

    Args:
        q: [total_q, heads, head_dim].
        k: [total_k, kv_heads, head_dim]; kv_heads divides heads.
        v: [total_k, kv_heads, value_dim].
        cu_seqlens_q: int32 [batch + 1], 0 and the running sums of the lengths; empty sequences are fine. They end at the last
            token; on a GPU, where the host does not look, they may end before it, so that a CUDA graph can run on fewer tokens:
            those past the last boundary are not read and get zeros, a log-sum-exp of −inf and gradients of zero.
        cu_seqlens_k: as cu_seqlens_q, for the keys.
        max_seqlen_q: at least the longest sequence of q.
        max_seqlen_k: at least the longest sequence of k.
        dropout_p: probability that an attention weight is dropped.
        softmax_scale: factor on the logits; default 1/sqrt(head_dim).
        causal: aligned at the last query and key: query i sees the keys j ≤ i + seq_k − seq_q.
        window_size: (left, right) tokens around that diagonal; −1 is no limit.
        alibi_slopes: [heads] or [batch, heads]: −slope · |distance from the diagonal| is added to the logits. They get no
            gradient.
        bias: [heads or 1, max_seqlen_q, max_seqlen_k], added to the logits (bool: True = attend), shared by the sequences;
            gets its gradient.
        deterministic: the gradient is bit-equal from run to run, as it also is under torch.use_deterministic_algorithms(True).
            Without, the last bits of q's may differ on a GPU, in 16 bits, from 512 tokens a sequence on, where it takes five
            products instead of seven.
        return_lse: also return the log-sum-exp.

    Returns:
        [total_q, heads, value_dim] in q's dtype, zeros for a query with nothing to attend to; with return_lse also the
        log-sum-exp [heads, total_q] in float32, −inf for such a query (no gradient flows through it).

    Raises:
        TypeError: dtypes differ or are not floating point; cu_seqlens is not int32.
        ValueError: shapes or devices do not fit, or, on a CPU and under fastbert.debug(), boundaries that do not cut all tokens
            into sequences; dropout_p or window_size is out of range.
    """
    function = "varlen_attention"
    q, k, v = autocast_qkv(function, q=q, k=k, v=v)
    _check_qkv(function, q, k, v, dimensions=3)
    if v.shape[:2] != k.shape[:2]:
        raise ValueError(
            f"{function}: k has shape {list(k.shape)} and v {list(v.shape)}; tokens and heads must be equal"
        )
    heads = q.shape[1]
    _check_heads(function, heads, k.shape[1], True, "")
    _check_cu_seqlens(function, "cu_seqlens_q", cu_seqlens_q, q)
    if cu_seqlens_k is not cu_seqlens_q:
        _check_cu_seqlens(function, "cu_seqlens_k", cu_seqlens_k, q)
        if cu_seqlens_q.shape != cu_seqlens_k.shape:
            raise ValueError(
                f"{function}: cu_seqlens_q has {cu_seqlens_q.shape[0]} entries and cu_seqlens_k {cu_seqlens_k.shape[0]}; "
                "both describe the same batch"
            )
    _check_mask(function, q, bias, None)
    if bias is not None and tuple(bias.shape) not in (
        (1, max_seqlen_q, max_seqlen_k),
        (heads, max_seqlen_q, max_seqlen_k),
    ):
        raise ValueError(
            f"{function}: bias has shape {list(bias.shape)}; expected [{heads} or 1, {max_seqlen_q}, {max_seqlen_k}]"
        )
    check_alibi(function, q, alibi_slopes, heads, cu_seqlens_q.shape[0] - 1)
    left, right = _check_window(function, window_size)
    if causal:
        right = 0
    seed = dropout_seed(function, dropout_p, None, 0, q.device)
    scale = 1.0 / math.sqrt(q.shape[-1]) if softmax_scale is None else softmax_scale
    deterministic = deterministic or torch.are_deterministic_algorithms_enabled()
    numbers = (max_seqlen_q, max_seqlen_k, scale, left, right, True, dropout_p, deterministic)
    out, lse = _attend(q, k, v, bias, (cu_seqlens_q, cu_seqlens_k, None, alibi_slopes, seed), numbers, return_lse)
    return (out, lse) if return_lse else out


def autocast_qkv(function: str, **qkv: Tensor) -> tuple[Any, ...]:
    """Query, key and value, under the names their function gives them: floating-point tensors, cast by autocast."""
    for name, x in qkv.items():
        check_floating(function, name, x)
    return autocast(*qkv.values())


def _check_qkv(function: str, q: Tensor, k: Tensor, v: Tensor, dimensions: int) -> None:
    dtype = q.dtype
    for name, x in (("query", q), ("key", k), ("value", v)):
        if x.dim() != dimensions:
            raise ValueError(f"{function}: {name} has shape {list(x.shape)}; expected {dimensions} dimensions")
        if x.dtype is not dtype:
            raise TypeError(f"{function}: {name} has dtype {x.dtype} and query {dtype}; cast one of them")
    check_device(function, "query", q, key=k, value=v)
    if q.shape[-1] != k.shape[-1] or q.shape[-1] == 0:
        raise ValueError(
            f"{function}: head_dim is {q.shape[-1]} in the query and {k.shape[-1]} in the key; they must be equal, at least 1"
        )


def _check_heads(function: str, heads: int, kv_heads: int, grouped: bool, hint: str) -> None:
    if kv_heads == heads:
        return
    if not grouped:
        raise ValueError(f"{function}: query has {heads} heads and key {kv_heads}; {hint}")
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"{function}: query has {heads} heads and key {kv_heads}; key heads must divide query heads")


def _check_mask(function: str, q: Tensor, mask: Tensor | None, shape: tuple[int, ...] | None) -> None:
    if mask is None:
        return
    check_tensor(function, "the mask", mask)
    if not (mask.is_floating_point() or mask.dtype == torch.bool):
        raise TypeError(f"{function}: the mask has dtype {mask.dtype}; expected bool (True = attend) or floating point")
    check_device(function, "query", q, mask=mask)
    if shape is not None:
        check_broadcast(function, "attn_mask", mask, shape)


def _check_window(function: str, window: tuple[int, int]) -> tuple[int, int]:
    if not isinstance(window, tuple | list) or len(window) != 2:
        raise ValueError(f"{function}: window is {window}; expected two numbers of tokens, −1 for no limit")
    left, right = window
    if left < -1 or right < -1:
        raise ValueError(f"{function}: window is {window}; expected two numbers of tokens, −1 for no limit")
    return left, right


def check_alibi(function: str, q: Tensor, slopes: Tensor | None, heads: int, batch: int) -> None:
    """Raises unless slopes is None, [heads] or [batch, heads], floating point, on q's device."""
    if slopes is None:
        return
    check_floating(function, "alibi_slopes", slopes)
    if tuple(slopes.shape) not in ((heads,), (batch, heads)):
        raise ValueError(
            f"{function}: alibi_slopes has shape {list(slopes.shape)}; expected [{heads}] or [{batch}, {heads}]"
        )
    check_device(function, "query", q, alibi_slopes=slopes)


def _check_cu_seqlens(function: str, name: str, cu_seqlens: Tensor, packed: Tensor) -> None:
    """Shape, dtype and device; its values are the operator's to check."""
    check_tensor(function, name, cu_seqlens)
    if cu_seqlens.dtype != torch.int32:
        raise TypeError(f"{function}: {name} has dtype {cu_seqlens.dtype}; expected int32")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] == 0:
        raise ValueError(f"{function}: {name} has shape {list(cu_seqlens.shape)}; expected [batch + 1]")
    check_device(function, "query", packed, **{name: cu_seqlens})
