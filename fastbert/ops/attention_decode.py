"""Attention of the newest tokens over a key/value cache. For generation: it has no gradient."""

import math
from typing import Any

import torch
from torch import Tensor

from fastbert import reference
from fastbert.ops._common import check_device, check_tensor, wants_grad
from fastbert.ops._registry import CUDA_DTYPES, Implementation, Operation, register
from fastbert.ops.attention import _check_heads, _check_qkv, autocast_qkv, check_alibi
from fastbert.reference import wide_dtype


def _fake(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    alibi_slopes: Tensor | None,
    scale: float,
    window_left: int,
) -> tuple[Tensor, Tensor]:
    batch, seq_q, heads, _ = q.shape
    return (
        q.new_empty((batch, seq_q, heads, v_cache.shape[-1])),
        q.new_empty((batch, heads, seq_q), dtype=wide_dtype(q)),
    )


def _check_values(q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, *_: Any) -> None:
    if lengths.numel() == 0:
        return
    shortest, longest = (int(v) for v in torch.aminmax(lengths))
    if shortest < 0 or longest > k_cache.shape[1]:
        wrong = shortest if shortest < 0 else longest
        raise ValueError(f"attention_decode: lengths holds {wrong}; the caches hold 0 to {k_cache.shape[1]} tokens")


_forward = register(
    Operation(
        "attention_decode",
        "(Tensor q, Tensor k_cache, Tensor v_cache, Tensor lengths, Tensor? alibi_slopes, float scale, SymInt window_left)"
        " -> (Tensor out, Tensor lse)",
        reference.attention_decode,
        _fake,
        cpu=Implementation(
            "C++",
            "fastbert.cpu.attention:attention_decode",
            (torch.float32, torch.bfloat16, torch.float16),
            "float16 is computed in float32",
        ),
        cuda=Implementation("Triton", "fastbert.kernels.attention_decode:attention_decode", CUDA_DTYPES),
        check_values=_check_values,
    )
)


def attention_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    *,
    softmax_scale: float | None = None,
    window_left: int = -1,
    alibi_slopes: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Causal attention of the last tokens of each sequence over its cached keys and values.

    Args:
        q: [batch, seq_q, heads, head_dim]: the newest tokens; their keys and values are already in the caches.
        k_cache: [batch, capacity, kv_heads, head_dim]; kv_heads divides heads.
        v_cache: [batch, capacity, kv_heads, value_dim].
        lengths: int32 [batch]: cached tokens of each sequence, the new ones included. What lies behind is not read.
        softmax_scale: factor on the logits; default 1/sqrt(head_dim).
        window_left: how many tokens before its own a query sees; −1: all.
        alibi_slopes: [heads] or [batch, heads].
        return_lse: also return the log-sum-exp.

    Returns:
        [batch, seq_q, heads, value_dim] in q's dtype; with return_lse also [batch, heads, seq_q] float32.

    Raises:
        RuntimeError: a gradient is wanted; train with varlen_attention or scaled_dot_product_attention.
        TypeError: dtypes do not fit.
        ValueError: shapes or devices do not fit, or a length passes the cache's capacity.
    """
    function = "attention_decode"
    q, k_cache, v_cache = autocast_qkv(function, q=q, k_cache=k_cache, v_cache=v_cache)
    if wants_grad(q, k_cache, v_cache):
        raise RuntimeError(
            f"{function} has no gradient and an input requires one; call it under torch.no_grad(), "
            "or train with varlen_attention or scaled_dot_product_attention"
        )
    _check_qkv(function, q, k_cache, v_cache, dimensions=4)
    batch, _, heads, _ = q.shape
    if k_cache.shape[0] != batch or v_cache.shape[:3] != k_cache.shape[:3]:
        raise ValueError(
            f"{function}: q has shape {list(q.shape)}, k_cache {list(k_cache.shape)}, v_cache {list(v_cache.shape)}; "
            "batch sizes, and the caches' capacities and heads, must be equal"
        )
    _check_heads(function, heads, k_cache.shape[2], True, "")
    check_tensor(function, "lengths", lengths)
    if lengths.dtype != torch.int32:
        raise TypeError(f"{function}: lengths has dtype {lengths.dtype}; expected int32")
    if tuple(lengths.shape) != (batch,):
        raise ValueError(f"{function}: lengths has shape {list(lengths.shape)}; expected [{batch}]")
    check_device(function, "q", q, lengths=lengths)
    check_alibi(function, q, alibi_slopes, heads, batch)
    if window_left < -1:
        raise ValueError(f"{function}: window_left is {window_left}; expected a number of tokens, −1 for no limit")
    scale = 1.0 / math.sqrt(q.shape[-1]) if softmax_scale is None else softmax_scale
    out, lse = _forward(q, k_cache, v_cache, lengths, alibi_slopes, scale, window_left)
    return (out, lse) if return_lse else out
