"""Attention, packed and dense, in C++ (csrc/cpu/attention*)."""

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
    shape, kv_shape, value_dim = q.shape, k.shape, v.shape[-1]
    packed = cu_seqlens_q is not None
    if packed:
        cu_seqlens_q, cu_seqlens_k = _boundaries(cu_seqlens_q, cu_seqlens_k)
        batch = cu_seqlens_q.shape[0] - 1
        tokens, heads, head_dim = shape
        kv_heads, seq_q, seq_k = kv_shape[1], max_seqlen_q, max_seqlen_k
    else:
        batch, heads, seq_q, head_dim = shape
        tokens, kv_heads, seq_k = 0, kv_shape[1], kv_shape[2]
        if kv_shape[0] != batch:
            raise ValueError(f"attention: q has shape {list(shape)} and k {list(kv_shape)}; batch sizes must be equal")
    if (
        kv_shape[-1] != head_dim
        or head_dim == 0
        or v.shape[:-1] != kv_shape[:-1]
        or (kv_heads != heads and (not kv_heads or heads % kv_heads))
    ):
        raise ValueError(
            f"attention: q has shape {list(shape)}, k {list(kv_shape)} and v {list(v.shape)}; k and v must have equal "
            "tokens and heads, k the head_dim of q, at least 1, and heads that divide those of q"
        )

    mask_kind = _NO_MASK
    mask_strides: tuple[int, ...] = ()
    if attn_mask is not None:
        mask_shape = (1 if packed else batch, heads, seq_q, seq_k)
        attn_mask, mask_kind, mask_strides = _mask(attn_mask, mask_shape)
    padding_strides: tuple[int, ...] = ()
    if key_padding_mask is not None:
        if tuple(key_padding_mask.shape) != (batch, seq_k) or packed or key_padding_mask.dtype is not torch.bool:
            raise ValueError(
                f"attention: key_padding_mask is {list(key_padding_mask.shape)} {key_padding_mask.dtype}; expected bool "
                f"{[batch, seq_k]}, of dense sequences"
            )
        padding_strides = key_padding_mask.stride()
    slopes, slopes_batch = _slopes("attention", alibi_slopes, batch, heads)
    key = seed_number("attention", dropout_p, seed, offset)
    out = _empty_out(q, value_dim)
    lse = torch.empty((heads, tokens) if packed else shape[:-1], dtype=torch.float32) if save_lse else nothing()
    _C.attention(
        dtype,
        (batch, heads, kv_heads, seq_q, seq_k, head_dim, value_dim, tokens),
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
        key,
        offset,
        out.data_ptr(),
        lse.data_ptr(),  # 0 when empty
        torch.get_num_threads(),
    )
    return out, lse


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


def _boundaries(cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None) -> tuple[Tensor, Tensor]:
    """The boundaries of packed sequences as C++ reads them."""
    if cu_seqlens_q is None or cu_seqlens_k is None or cu_seqlens_q.shape != cu_seqlens_k.shape:
        raise ValueError("attention: cu_seqlens_q and cu_seqlens_k describe the same batch; expected two of one shape")
    for x in (cu_seqlens_q, cu_seqlens_k):
        if x.dtype is not torch.int32 or x.dim() != 1 or not x.is_cpu:
            raise ValueError(
                f"attention: cu_seqlens is {list(x.shape)} {x.dtype} on {x.device}; expected int32 [batch + 1] on the CPU"
            )
    return cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous()


def _mask(attn_mask: Tensor, shape: tuple[int, ...]) -> tuple[Tensor, int, tuple[int, ...]]:
    """The mask as C++ reads it, its kind, and its strides in ``shape``, that of the logits."""
    kind = _BOOLEAN
    if attn_mask.dtype is not torch.bool:
        kind, attn_mask = _ADDITIVE, attn_mask.float()
    try:
        return attn_mask, kind, attn_mask.expand(shape).stride()
    except RuntimeError as error:
        raise ValueError(f"attention: attn_mask has shape {list(attn_mask.shape)}; expected {list(shape)}") from error


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
