"""Scaled dot-product attention, packed and dense, with every mask of the library; memory O(S²), unlike the kernels."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fastbert.reference._common import nothing, wide_dtype, widen
from fastbert.reference.dropout import dropout_mask, dropout_mask_of_rows


def _logits(
    q: Tensor,  # wide [batch, heads, seq_q, head_dim]
    k: Tensor,  # wide [batch, heads, seq_k, head_dim]
    attn_mask: Tensor | None,  # broadcastable to [batch, heads, seq_q, seq_k]: bool, True = attend, or additive
    key_padding_mask: Tensor | None,  # bool [batch, seq_k], True = attend
    alibi_slopes: Tensor | None,  # [heads] or [batch, heads]
    scale: float,
    window: tuple[int, int],
    bottom_right: bool,
) -> Tensor:
    """scale · q kᵀ plus the biases, −inf where not visible: [batch, heads, seq_q, seq_k]."""
    logits = (q @ k.mT) * scale
    seq_q, seq_k = q.shape[-2], k.shape[-2]
    shift = seq_k - seq_q if bottom_right else 0
    row = torch.arange(seq_q, device=q.device).unsqueeze(-1) + shift
    distance = torch.arange(seq_k, device=q.device) - row  # [seq_q, seq_k]: how far right of its diagonal a key stands
    if alibi_slopes is not None:
        slopes = alibi_slopes.to(logits.dtype).reshape(-1, alibi_slopes.shape[-1], 1, 1)
        logits = logits - slopes * distance.abs()
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            logits = logits.masked_fill(~attn_mask, -torch.inf)
        else:
            logits = logits + attn_mask.to(logits.dtype)
    if key_padding_mask is not None:
        logits = logits.masked_fill(~key_padding_mask[:, None, None, :], -torch.inf)
    left, right = window
    if left >= 0:
        logits = logits.masked_fill(distance < -left, -torch.inf)
    if right >= 0:
        logits = logits.masked_fill(distance > right, -torch.inf)
    return logits


def _probabilities(logits: Tensor) -> tuple[Tensor, Tensor]:
    """softmax and log-sum-exp; a row of −inf gives zeros and −inf."""
    lse = torch.logsumexp(logits, -1)
    # Not exp(logits - lse): among logits of finfo.min, which masks hold, the logarithm of their number is lost.
    return torch.softmax(logits, -1).masked_fill((lse == -torch.inf).unsqueeze(-1), 0.0), lse


def _repeat_heads(x: Tensor, heads: int) -> Tensor:
    """[batch, kv_heads, seq, head_dim] → [batch, heads, seq, head_dim]: query head h reads key head h // group."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)


def _sum_heads(x: Tensor, kv_heads: int) -> Tensor:
    """The gradient of _repeat_heads."""
    return x if x.shape[1] == kv_heads else x.unflatten(1, (kv_heads, -1)).sum(2)


def _dense(
    q: Tensor,  # [batch, heads, seq_q, head_dim]
    k: Tensor,  # [batch, kv_heads, seq_k, head_dim]
    v: Tensor,  # [batch, kv_heads, seq_k, head_dim]
    mask: Tensor | None,  # wide [batch, heads, seq_q, seq_k]: dropout's factors
    logits_arguments: tuple[Any, ...],
) -> tuple[Tensor, Tensor]:
    heads = q.shape[1]
    logits = _logits(widen(q), _repeat_heads(widen(k), heads), *logits_arguments)
    p, lse = _probabilities(logits)
    if mask is not None:
        p = p * mask
    return (p @ _repeat_heads(widen(v), heads)).to(q.dtype), lse


def _dense_backward(
    grad_out: Tensor,  # [batch, heads, seq_q, head_dim]
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,  # [batch, heads, seq_q, head_dim]
    mask: Tensor | None,
    logits_arguments: tuple[Any, ...],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv and dlogits, wide. Dao et al. 2022, FlashAttention, section B.2: five products."""
    heads, kv_heads = q.shape[1], k.shape[1]
    scale = logits_arguments[3]
    q_wide, k_wide, v_wide = widen(q), _repeat_heads(widen(k), heads), _repeat_heads(widen(v), heads)
    logits = _logits(q_wide, k_wide, *logits_arguments)
    p, _ = _probabilities(logits)
    grad_wide = widen(grad_out)
    dp = grad_wide @ v_wide.mT
    dv = (p if mask is None else p * mask).mT @ grad_wide
    if mask is not None:
        dp = dp * mask
    d = (grad_wide * widen(out)).sum(-1, keepdim=True)  # = Σ_j p_ij dp_ij
    d_logits = p * (dp - d)
    dq = d_logits @ k_wide * scale
    dk = d_logits.mT @ q_wide * scale
    return dq, _sum_heads(dk, kv_heads), _sum_heads(dv, kv_heads), d_logits


def _sequences(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor) -> Iterator[tuple[int, slice, slice]]:
    ends_q, ends_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for i in range(len(ends_q) - 1):
        yield i, slice(ends_q[i], ends_q[i + 1]), slice(ends_k[i], ends_k[i + 1])


def _as_dense(x: Tensor, rows: slice) -> Tensor:
    """A sequence of a packed tensor [total, heads, head_dim] as [1, heads, seq, head_dim]."""
    return x[rows].transpose(0, 1).unsqueeze(0)


def _sequence_mask(attn_mask: Tensor | None, seq_q: int, seq_k: int) -> Tensor | None:
    return None if attn_mask is None else attn_mask[:, :seq_q, :seq_k].unsqueeze(0)


def _sequence_slopes(alibi_slopes: Tensor | None, i: int) -> Tensor | None:
    return alibi_slopes if alibi_slopes is None or alibi_slopes.dim() == 1 else alibi_slopes[i]


def attention(
    q: Tensor,  # dense [batch, heads, seq_q, head_dim], packed [total_q, heads, head_dim]
    k: Tensor,  # dense [batch, kv_heads, seq_k, head_dim], packed [total_k, kv_heads, head_dim]
    v: Tensor,  # as k
    cu_seqlens_q: Tensor | None,  # int32 [batch + 1]; given: packed
    cu_seqlens_k: Tensor | None,  # int32 [batch + 1]
    max_seqlen_q: int,  # packed only
    max_seqlen_k: int,
    attn_mask: Tensor | None,  # bool (True = attend) or additive; dense: to [batch, heads, seq_q, seq_k]; packed:
    #                            [heads or 1, max_seqlen_q, max_seqlen_k], shared by the sequences
    key_padding_mask: Tensor | None,  # bool [batch, seq_k], True = attend; dense only
    alibi_slopes: Tensor | None,  # [heads] or [batch, heads]
    scale: float,
    window_left: int,  # keys further left of the diagonal are not visible; −1: no limit
    window_right: int,  # 0 is causal
    bottom_right: bool,  # the diagonal ends at the last query and key (flash_attn), else starts at the first (torch)
    dropout_p: float,
    seed: Tensor | None,  # int64 [1]
    offset: int,
    save_lse: bool,
) -> tuple[Tensor, Tensor]:
    """softmax(scale · q kᵀ + biases) v in q's layout and dtype, and the log-sum-exp when save_lse.

    The log-sum-exp is wide: dense [batch, heads, seq_q], packed [heads, total_q]. A query with nothing to attend to gives zeros
    and −inf. ALiBi adds −slope · |distance from the diagonal| (Press et al. 2022). Dropout's element (sequence, head, i, j)
    is that of a tensor [batch, heads, seq_q, seq_k], packed [batch, heads, max_seqlen_q, max_seqlen_k].
    """
    window = (window_left, window_right)
    wide = wide_dtype(q)
    if cu_seqlens_q is None or cu_seqlens_k is None:
        mask = _dense_dropout(q, k, dropout_p, seed, offset)
        arguments = (attn_mask, key_padding_mask, alibi_slopes, scale, window, bottom_right)
        out, lse = _dense(q, k, v, mask, arguments)
        return out, lse if save_lse else nothing(lse)

    out = torch.zeros((*q.shape[:2], v.shape[-1]), dtype=q.dtype, device=q.device)
    lse = torch.full((q.shape[1], q.shape[0]), -torch.inf, dtype=wide, device=q.device)
    for i, rows_q, rows_k in _sequences(cu_seqlens_q, cu_seqlens_k):
        seq_q, seq_k = rows_q.stop - rows_q.start, rows_k.stop - rows_k.start
        arguments = (
            _sequence_mask(attn_mask, seq_q, seq_k),
            None,
            _sequence_slopes(alibi_slopes, i),
            scale,
            window,
            bottom_right,
        )
        mask = _sequence_dropout(q, i, seq_q, seq_k, max_seqlen_q, max_seqlen_k, dropout_p, seed, offset)
        o, sequence_lse = _dense(_as_dense(q, rows_q), _as_dense(k, rows_k), _as_dense(v, rows_k), mask, arguments)
        out[rows_q] = o[0].transpose(0, 1)
        lse[:, rows_q] = sequence_lse[0]
    return out, lse if save_lse else nothing(lse)


def _dense_dropout(q: Tensor, k: Tensor, dropout_p: float, seed: Tensor | None, offset: int) -> Tensor | None:
    """The mask [batch, heads, seq_q, seq_k]."""
    if dropout_p == 0.0:
        return None
    assert seed is not None
    return dropout_mask((*q.shape[:3], k.shape[2]), dropout_p, seed, offset, wide_dtype(q))


def _sequence_dropout(
    q: Tensor,
    i: int,
    seq_q: int,
    seq_k: int,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    seed: Tensor | None,
    offset: int,
) -> Tensor | None:
    """Sequence i's part [1, heads, seq_q, seq_k] of the mask of [batch, heads, max_seqlen_q, max_seqlen_k]."""
    if dropout_p == 0.0:
        return None
    assert seed is not None
    heads = torch.arange(q.shape[1], device=q.device).unsqueeze(-1) + i * q.shape[1]
    rows = heads * max_seqlen_q + torch.arange(seq_q, device=q.device)  # [heads, seq_q]
    return dropout_mask_of_rows(rows, seq_k, max_seqlen_k, dropout_p, seed, offset, wide_dtype(q)).unsqueeze(0)


def attention_backward(
    grad_out: Tensor,  # as out
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,  # dense [batch, heads, seq_q], packed [heads, total_q]: for the kernels; here p comes from the logits
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
    deterministic: bool,  # for the kernels: this is always
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv in the shapes and dtypes of q, k, v; the additive mask's gradient in its shape, wide, if needed."""
    window = (window_left, window_right)
    wide = wide_dtype(q)
    if cu_seqlens_q is None or cu_seqlens_k is None:
        mask = _dense_dropout(q, k, dropout_p, seed, offset)
        arguments = (attn_mask, key_padding_mask, alibi_slopes, scale, window, bottom_right)
        dq, dk, dv, d_logits = _dense_backward(grad_out, q, k, v, out, mask, arguments)
        d_mask = nothing(q, wide)
        if needs_mask_grad:
            assert attn_mask is not None
            d_mask = d_logits.sum_to_size(attn_mask.shape).contiguous()
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), d_mask

    dq_all, dk_all, dv_all = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    d_mask = nothing(q, wide)
    if needs_mask_grad:
        assert attn_mask is not None
        d_mask = torch.zeros(attn_mask.shape, dtype=wide, device=q.device)
    for i, rows_q, rows_k in _sequences(cu_seqlens_q, cu_seqlens_k):
        seq_q, seq_k = rows_q.stop - rows_q.start, rows_k.stop - rows_k.start
        sequence_mask = _sequence_mask(attn_mask, seq_q, seq_k)
        arguments = (sequence_mask, None, _sequence_slopes(alibi_slopes, i), scale, window, bottom_right)
        dq, dk, dv, d_logits = _dense_backward(
            _as_dense(grad_out, rows_q),
            _as_dense(q, rows_q),
            _as_dense(k, rows_k),
            _as_dense(v, rows_k),
            _as_dense(out, rows_q),
            _sequence_dropout(q, i, seq_q, seq_k, max_seqlen_q, max_seqlen_k, dropout_p, seed, offset),
            arguments,
        )
        dq_all[rows_q] = dq[0].transpose(0, 1).to(q.dtype)
        dk_all[rows_k] = dk[0].transpose(0, 1).to(k.dtype)
        dv_all[rows_k] = dv[0].transpose(0, 1).to(v.dtype)
        if needs_mask_grad:
            assert sequence_mask is not None
            d_mask[:, :seq_q, :seq_k] += d_logits.sum_to_size(sequence_mask.shape)[0]
    return dq_all, dk_all, dv_all, d_mask


def attention_decode(
    q: Tensor,  # [batch, seq_q, heads, head_dim]: the newest tokens of each sequence
    k_cache: Tensor,  # [batch, capacity, kv_heads, head_dim]
    v_cache: Tensor,  # [batch, capacity, kv_heads, head_dim]
    lengths: Tensor,  # int32 [batch]: valid keys of each sequence, those of the queries included
    alibi_slopes: Tensor | None,  # [heads] or [batch, heads]
    scale: float,
    window_left: int,
) -> tuple[Tensor, Tensor]:
    """Causal attention of the last seq_q tokens over a cache: out as q, log-sum-exp wide [batch, heads, seq_q].

    Query i of a sequence sees keys j <= lengths - seq_q + i, and with a window only the last window_left before that.
    """
    seq_q, capacity = q.shape[1], k_cache.shape[1]
    heads = q.shape[2]
    q_wide = widen(q).transpose(1, 2)
    k_wide = _repeat_heads(widen(k_cache).transpose(1, 2), heads)
    v_wide = _repeat_heads(widen(v_cache).transpose(1, 2), heads)
    diagonal = lengths.to(torch.int64)[:, None, None] - seq_q + torch.arange(seq_q, device=q.device)[:, None]
    distance = torch.arange(capacity, device=q.device) - diagonal  # [batch, seq_q, capacity]
    distance = distance.unsqueeze(1)
    logits = (q_wide @ k_wide.mT) * scale
    if alibi_slopes is not None:
        logits = logits - alibi_slopes.to(logits.dtype).reshape(-1, heads, 1, 1) * distance.abs()
    logits = logits.masked_fill(distance > 0, -torch.inf)
    if window_left >= 0:
        logits = logits.masked_fill(distance < -window_left, -torch.inf)
    p, lse = _probabilities(logits)
    # What lies past a sequence's length is not data, and 0 · NaN would spread it.
    unused = torch.arange(capacity, device=q.device) >= lengths[:, None]
    v_wide = v_wide.masked_fill(unused[:, None, :, None], 0.0)
    return (p @ v_wide).transpose(1, 2).to(q.dtype), lse
