"""The attention operator on CPUs, from torch's own kernel, until the library has one.

Torch's kernel knows no packed sequences: each sequence is a call of its own, and what it cannot say goes to the reference.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from fastbert import reference


def attention(
    q: Tensor,  # dense [batch, heads, seq_q, head_dim], packed [total_q, heads, head_dim]
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
    """As reference.attention."""
    causal = window_right == 0
    plain = window_left < 0 and window_right <= 0 and attn_mask is None and alibi_slopes is None
    sequences = _plain_sequences(q, k, cu_seqlens_q, cu_seqlens_k, causal and bottom_right)
    if not plain or dropout_p > 0.0 or save_lse or sequences is None or (causal and key_padding_mask is not None):
        return reference.attention(
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
            offset,
            save_lse,
        )
    no_lse = q.new_empty(0, dtype=reference.wide_dtype(q))
    grouped = k.shape[1] != q.shape[1]
    if cu_seqlens_q is None:
        mask = None if key_padding_mask is None else key_padding_mask[:, None, None, :]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=grouped)
        return _with_nan_of(q, out.contiguous()), no_lse

    out = q.new_empty((*q.shape[:2], v.shape[-1]))
    for rows_q, rows_k in sequences:
        o = F.scaled_dot_product_attention(
            q[rows_q].transpose(0, 1).unsqueeze(0),  # [1, heads, seq, head_dim]
            k[rows_k].transpose(0, 1).unsqueeze(0),
            v[rows_k].transpose(0, 1).unsqueeze(0),
            is_causal=causal,
            scale=scale,
            enable_gqa=grouped,
        )
        out[rows_q] = o[0].transpose(0, 1)
    return _with_nan_of(q, out), no_lse


def _with_nan_of(q: Tensor, out: Tensor) -> Tensor:
    """torch's CPU kernel takes a query that is not a number for one without keys, and gives zeros: NaN again, in place."""
    lost = q.sum(-1, keepdim=True).isnan()
    return out.masked_fill_(lost, torch.nan) if lost.any() else out


def _plain_sequences(
    q: Tensor, k: Tensor, cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None, aligned_at_end: bool
) -> list[tuple[slice, slice]] | None:
    """The sequences that are not empty as (rows of q, rows of k); None where torch's kernel cannot express one.

    That is: no key to attend to, or a causal mask aligned at the end with lengths that differ.
    """
    if cu_seqlens_q is None or cu_seqlens_k is None:
        lengths = (q.shape[2], k.shape[2])
        return None if 0 in (lengths[1], q.numel()) or (aligned_at_end and lengths[0] != lengths[1]) else []
    ends_q = cu_seqlens_q.tolist()
    ends_k = ends_q if cu_seqlens_k is cu_seqlens_q else cu_seqlens_k.tolist()
    sequences = []
    for i in range(len(ends_q) - 1):
        rows_q, rows_k = slice(ends_q[i], ends_q[i + 1]), slice(ends_k[i], ends_k[i + 1])
        seq_q, seq_k = rows_q.stop - rows_q.start, rows_k.stop - rows_k.start
        if seq_q == 0:
            continue
        if seq_k == 0 or (aligned_at_end and seq_q != seq_k):
            return None
        sequences.append((rows_q, rows_k))
    return sequences
