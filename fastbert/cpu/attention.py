"""Attention, packed and dense, in C++ (csrc/cpu/attention*)."""

from typing import Any

import torch
from torch import Tensor  # torch comes first: the extension then shares its OpenMP threads

from fastbert import _C
from fastbert.cpu._launch import DTYPE_NUMBERS, address, nothing, seed_number

_NO_MASK, _BOOLEAN, _ADDITIVE = 0, 1, 2  # csrc/cpu/attention.h's enum MaskKind
_LARGEST = 2**62  # windows are compared with differences of positions


def attention(
    q: Tensor,  # dense [batch, heads, seq_q, head_dim], packed [total_q, heads, head_dim]
    k: Tensor,  # dense [batch, kv_heads, seq_k, head_dim], packed [total_k, kv_heads, head_dim]
    v: Tensor,  # as k, with value_dim
    cu_seqlens_q: Tensor | None,  # int32 [batch + 1]; given: packed
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    attn_mask: Tensor | None,
    key_padding_mask: Tensor | None,  # bool [batch, seq_k]
    alibi_slopes: Tensor | None,  # [heads] or [batch, heads]
    scale: float,
    window_left: int,
    window_right: int,
    bottom_right: bool,
    dropout_p: float,
    seed: Tensor | None,  # int64 [1]
    offset: int,
    save_lse: bool,
) -> tuple[Tensor, Tensor]:
    """As reference.attention, in memory linear in the lengths; q, k and v of any strides, and nothing of them is copied.

    Boundaries of packed sequences are trusted. float16 is computed in float32, from copies.

    Raises:
        NotImplementedError: q has another dtype than float32, bfloat16 and float16.
        TypeError: dtypes differ.
        ValueError: shapes do not fit.
    """
    if q.dtype is torch.float16:
        out, lse = attention(
            q.float(),
            k.float(),
            v.float(),
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
            offset,
            save_lse,
        )
        return out.to(torch.float16), lse
    dtype = _dtype_number("attention", q, k, v)
    arguments, _alive = _arguments(
        "attention", q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, attn_mask, key_padding_mask,
        alibi_slopes, scale, window_left, window_right, bottom_right, dropout_p, seed, offset,
    )  # fmt: skip
    out = _empty_out(q, v.shape[-1])
    lse = torch.empty(_lse_shape(q), dtype=torch.float32) if save_lse else nothing()
    _C.attention(dtype, arguments, out.data_ptr(), lse.data_ptr(), torch.get_num_threads())  # 0 when empty
    return out, lse


def attention_backward(
    grad_out: Tensor,  # as out
    q: Tensor,
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
    deterministic: bool,  # this is always, and the same for any number of threads
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As reference.attention_backward, in memory linear in the lengths, but for a mask's gradient, of the mask's size.

    Tensors may have any strides. float16 is computed in float32, from copies.

    Raises:
        NotImplementedError: q has another dtype than float32, bfloat16 and float16.
        TypeError: dtypes differ.
        ValueError: shapes do not fit, or the gradient of a mask is wanted that is not additive.
    """
    operation = "attention_backward"
    wanted = q.dtype
    if wanted is torch.float16:
        grad_out, q, k, v, out = grad_out.float(), q.float(), k.float(), v.float(), out.float()
    dtype = _dtype_number(operation, q, k, v)
    arguments, _alive = _arguments(
        operation, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, attn_mask, key_padding_mask,
        alibi_slopes, scale, window_left, window_right, bottom_right, dropout_p, seed, offset,
    )  # fmt: skip
    for name, x in (("out", out), ("grad_out", grad_out)):
        if x.shape != (*q.shape[:-1], v.shape[-1]) or x.dtype is not q.dtype or not x.is_cpu:
            raise ValueError(
                f"{operation}: {name} is {list(x.shape)} {x.dtype} on {x.device}; expected "
                f"{[*q.shape[:-1], v.shape[-1]]} {q.dtype} on the CPU"
            )
    if tuple(lse.shape) != _lse_shape(q) or lse.dtype is not torch.float32 or not lse.is_cpu:
        raise ValueError(
            f"{operation}: lse is {list(lse.shape)} {lse.dtype} on {lse.device}; expected {list(_lse_shape(q))} "
            "torch.float32 on the CPU: that of the forward pass"
        )
    d_mask = nothing()
    d_mask_strides: tuple[int, ...] = ()
    if needs_mask_grad:
        if attn_mask is None or attn_mask.dtype is torch.bool:
            raise ValueError(f"{operation}: needs_mask_grad is set, and there is no additive mask")
        d_mask = torch.zeros(attn_mask.shape, dtype=torch.float32)
        d_mask_strides = d_mask.expand(_logits_shape(q, k, cu_seqlens_q, max_seqlen_q, max_seqlen_k)).stride()
    if v.shape[-1] == 0:  # no value has a gradient, and no weight
        return (
            torch.zeros(q.shape, dtype=wanted),
            torch.zeros(k.shape, dtype=wanted),
            v.new_empty(v.shape, dtype=wanted),
            d_mask,
        )
    out, lse = out.contiguous(), lse.contiguous()
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    _C.attention_backward(
        dtype,
        arguments,
        out.data_ptr(),
        lse.data_ptr(),
        grad_out.data_ptr(),
        grad_out.stride(),
        dq.data_ptr(),
        dk.data_ptr(),
        dv.data_ptr(),
        d_mask.data_ptr(),
        d_mask_strides,
        torch.get_num_threads(),
    )
    return dq.to(wanted), dk.to(wanted), dv.to(wanted), d_mask


def attention_decode(
    q: Tensor,  # [batch, seq_q, heads, head_dim]
    k_cache: Tensor,  # [batch, capacity, kv_heads, head_dim]
    v_cache: Tensor,  # [batch, capacity, kv_heads, value_dim]
    lengths: Tensor,  # int32 [batch]
    alibi_slopes: Tensor | None,  # [heads] or [batch, heads]
    scale: float,
    window_left: int,
) -> tuple[Tensor, Tensor]:
    """As reference.attention_decode: out as q, log-sum-exp float32 [batch, heads, seq_q].

    Lengths are trusted to be within the caches. float16 is computed in float32, from copies.

    Raises:
        NotImplementedError: q has another dtype than float32, bfloat16 and float16.
        TypeError: dtypes differ.
        ValueError: shapes do not fit.
    """
    if q.dtype is torch.float16:
        arguments = (lengths, alibi_slopes, scale, window_left)
        out, lse = attention_decode(q.float(), k_cache.float(), v_cache.float(), *arguments)
        return out.to(torch.float16), lse
    dtype = _dtype_number("attention_decode", q, k_cache, v_cache)
    batch, seq_q, heads, head_dim = q.shape
    cached, capacity, kv_heads, key_dim = k_cache.shape
    value_dim = v_cache.shape[-1]
    grouped = kv_heads == heads or (kv_heads > 0 and heads % kv_heads == 0)
    if (
        cached != batch
        or key_dim != head_dim
        or head_dim == 0
        or v_cache.shape[:-1] != k_cache.shape[:-1]
        or not grouped
    ):
        raise ValueError(
            f"attention_decode: q has shape {list(q.shape)}, k_cache {list(k_cache.shape)} and v_cache "
            f"{list(v_cache.shape)}; the caches must have q's batch size, equal capacities and heads, and heads that "
            "divide those of q; k_cache also q's head_dim, at least 1"
        )
    if lengths.dtype is not torch.int32 or tuple(lengths.shape) != (batch,) or not lengths.is_cpu:
        raise ValueError(
            f"attention_decode: lengths is {list(lengths.shape)} {lengths.dtype} on {lengths.device}; expected int32 "
            f"{[batch]} on the CPU"
        )
    lengths = lengths.contiguous()
    slopes, slopes_batch = _slopes("attention_decode", alibi_slopes, batch, heads)
    out = _empty_out(q, value_dim)
    lse = torch.empty((batch, heads, seq_q), dtype=torch.float32)
    _C.attention_decode(
        dtype,
        (batch, heads, kv_heads, seq_q, capacity, head_dim, value_dim),
        q.data_ptr(),
        q.stride(),
        k_cache.data_ptr(),
        k_cache.stride(),
        v_cache.data_ptr(),
        v_cache.stride(),
        lengths.data_ptr(),
        address(slopes),
        slopes_batch,
        scale,
        min(window_left, _LARGEST),
        out.data_ptr(),
        lse.data_ptr(),
        torch.get_num_threads(),
    )
    return out, lse


def _dtype_number(operation: str, q: Tensor, k: Tensor, v: Tensor) -> int:
    number = DTYPE_NUMBERS.get(q.dtype)
    if number is None:
        raise NotImplementedError(
            f"{operation}: dtype is {q.dtype}; the C++ implementation takes torch.float32, torch.bfloat16 and "
            f"torch.float16. Use fastbert.reference.{operation}."
        )
    if k.dtype is not q.dtype or v.dtype is not q.dtype:
        raise TypeError(f"{operation}: q is {q.dtype}, k {k.dtype} and v {v.dtype}; cast them to one dtype")
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not x.is_cpu:
            raise ValueError(f"{operation}: {name} is on {x.device}; expected a tensor on the CPU")
    return number


def _arguments(
    operation: str,
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
) -> tuple[Any, tuple[Tensor | None, ...]]:
    """A checked call as _C.AttentionArguments, and the tensors whose addresses are in it."""
    shape, kv_shape = q.shape, k.shape
    packed = cu_seqlens_q is not None
    if packed:
        cu_seqlens_q, cu_seqlens_k = _boundaries(operation, cu_seqlens_q, cu_seqlens_k)
        tokens, _, head_dim = shape
        kv_heads = kv_shape[1]
    else:
        tokens, head_dim, kv_heads = 0, shape[3], kv_shape[1]
        if kv_shape[0] != shape[0]:
            raise ValueError(
                f"{operation}: q has shape {list(shape)} and k {list(kv_shape)}; batch sizes must be equal"
            )
    logits_shape = _logits_shape(q, k, cu_seqlens_q, max_seqlen_q, max_seqlen_k)
    batch, heads, seq_q, seq_k = logits_shape
    if cu_seqlens_q is not None:
        batch = cu_seqlens_q.shape[0] - 1
    if (
        kv_shape[-1] != head_dim
        or head_dim == 0
        or v.shape[:-1] != kv_shape[:-1]
        or (kv_heads != heads and (not kv_heads or heads % kv_heads))
    ):
        raise ValueError(
            f"{operation}: q has shape {list(shape)}, k {list(kv_shape)} and v {list(v.shape)}; k and v must have equal "
            "tokens and heads, k the head_dim of q, at least 1, and heads that divide those of q"
        )

    mask_kind = _NO_MASK
    mask_strides: tuple[int, ...] = ()
    if attn_mask is not None:
        attn_mask, mask_kind, mask_strides = _mask(operation, attn_mask, logits_shape)
    padding_strides: tuple[int, ...] = ()
    if key_padding_mask is not None:
        if tuple(key_padding_mask.shape) != (batch, seq_k) or packed or key_padding_mask.dtype is not torch.bool:
            raise ValueError(
                f"{operation}: key_padding_mask is {list(key_padding_mask.shape)} {key_padding_mask.dtype}; expected bool "
                f"{[batch, seq_k]}, of dense sequences"
            )
        padding_strides = key_padding_mask.stride()
    slopes, slopes_batch = _slopes(operation, alibi_slopes, batch, heads)
    arguments = (
        (batch, heads, kv_heads, seq_q, seq_k, head_dim, v.shape[-1], tokens),
        q.data_ptr(),
        q.stride(),
        k.data_ptr(),
        k.stride(),
        v.data_ptr(),
        v.stride(),
        address(cu_seqlens_q),
        address(cu_seqlens_k),
        mask_kind,
        address(attn_mask),
        mask_strides,
        address(key_padding_mask),
        padding_strides,
        address(slopes),
        slopes_batch,
        scale,
        min(window_left, _LARGEST),
        min(window_right, _LARGEST),
        bottom_right,
        dropout_p,
        seed_number(operation, dropout_p, seed, offset),
        offset,
    )
    return arguments, (cu_seqlens_q, cu_seqlens_k, attn_mask, slopes)


def _logits_shape(
    q: Tensor, k: Tensor, cu_seqlens_q: Tensor | None, max_seqlen_q: int, max_seqlen_k: int
) -> tuple[int, int, int, int]:
    """That of what a mask is added to: [batch, heads, seq_q, seq_k], of packed sequences, which share one, without batch."""
    if cu_seqlens_q is None:
        return q.shape[0], q.shape[1], q.shape[2], k.shape[2]
    return 1, q.shape[1], max_seqlen_q, max_seqlen_k


def _lse_shape(q: Tensor) -> tuple[int, ...]:
    return tuple(q.shape[:3]) if q.dim() == 4 else (q.shape[1], q.shape[0])


def _boundaries(operation: str, cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None) -> tuple[Tensor, Tensor]:
    """The boundaries of packed sequences as C++ reads them."""
    if cu_seqlens_q is None or cu_seqlens_k is None or cu_seqlens_q.shape != cu_seqlens_k.shape:
        raise ValueError(
            f"{operation}: cu_seqlens_q and cu_seqlens_k describe the same batch; expected two of one shape"
        )
    for x in (cu_seqlens_q, cu_seqlens_k):
        if x.dtype is not torch.int32 or x.dim() != 1 or not x.is_cpu:
            raise ValueError(
                f"{operation}: cu_seqlens is {list(x.shape)} {x.dtype} on {x.device}; expected int32 [batch + 1] on the CPU"
            )
    return cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous()


def _mask(operation: str, attn_mask: Tensor, shape: tuple[int, ...]) -> tuple[Tensor, int, tuple[int, ...]]:
    """The mask as C++ reads it, its kind, and its strides in ``shape``, that of the logits."""
    kind = _BOOLEAN
    if attn_mask.dtype is not torch.bool:
        kind, attn_mask = _ADDITIVE, attn_mask.float()
    try:
        return attn_mask, kind, attn_mask.expand(shape).stride()
    except RuntimeError as error:
        raise ValueError(f"{operation}: attn_mask has shape {list(attn_mask.shape)}; expected {list(shape)}") from error


def _slopes(operation: str, slopes: Tensor | None, batch: int, heads: int) -> tuple[Tensor | None, int]:
    """ALiBi's slopes as C++ reads them, and the distance between two sequences' slopes."""
    if slopes is None:
        return None, 0
    if tuple(slopes.shape) not in ((heads,), (batch, heads)):
        raise ValueError(
            f"{operation}: alibi_slopes has shape {list(slopes.shape)}; expected {[heads]} or {[batch, heads]}"
        )
    return slopes.float().contiguous(), heads if slopes.dim() == 2 else 0


def _empty_out(q: Tensor, value_dim: int) -> Tensor:
    if value_dim == q.shape[-1]:
        return torch.empty_like(q, memory_format=torch.contiguous_format)
    return q.new_empty((*q.shape[:-1], value_dim))
