"""Attention among packed tokens and to a memory, and which tokens see which.

Shapes: ``q [total_q, heads, head_dim]``, ``k, v [total_k, heads, head_dim]``, tokens of all sequences as rows.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastbert import functional as F
from fastbert.nn._modules import product
from fastbert.nn.init import initialize
from fastbert.nn.positions import RotaryPositions, Rotation, positions_in_sequences

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""query, key and value, each [total, heads, head_dim], to the attention's result, likewise: PackedAttention, PaddedAttention, or a
function of one's own, over a cache for example."""


@dataclass(frozen=True)
class PackedAttention:
    """Sequence i of the queries sees sequence i of the keys, and no padding exists.

    Attributes:
        cu_seqlens_q: int32 [batch + 1].
        cu_seqlens_k: int32 [batch + 1]; the same tensor for self-attention.
        max_seqlen_q: at least the longest sequence of the queries.
        max_seqlen_k: at least the longest sequence of the keys.
        causal: query i sees the keys j ≤ i + seq_k − seq_q.
        dropout_p: of the attention probabilities.
        bias: [heads or 1, max_seqlen_q, max_seqlen_k], added to the logits and shared by the sequences.
    """

    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    max_seqlen_q: int
    max_seqlen_k: int
    causal: bool = False
    dropout_p: float = 0.0
    bias: Tensor | None = None

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        context = F.varlen_attention(
            q,
            k,
            v,
            self.cu_seqlens_q,
            self.cu_seqlens_k,
            self.max_seqlen_q,
            self.max_seqlen_k,
            self.dropout_p,
            causal=self.causal,
            bias=self.bias,
        )
        assert isinstance(context, Tensor)  # and no pair, without return_lse
        return context


@dataclass(frozen=True)
class PaddedAttention:
    """Rows that are batch × seq of a padded batch, for masks that differ from position to position.

    Attributes:
        batch: sequences.
        attn_mask: broadcastable to [batch, heads, seq_q, seq_k]; bool (True = attend) or added to the logits.
        key_padding_mask: bool [batch, seq_k], True = real token.
        causal: query i sees the keys j ≤ i.
        dropout_p: of the attention probabilities.
    """

    batch: int
    attn_mask: Tensor | None = None
    key_padding_mask: Tensor | None = None
    causal: bool = False
    dropout_p: float = 0.0

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.batch == 0:
            return q
        q, k, v = (x.view(self.batch, x.shape[0] // self.batch, *x.shape[1:]).transpose(1, 2) for x in (q, k, v))
        context = F.scaled_dot_product_attention(
            q, k, v, self.attn_mask, self.dropout_p, self.causal, key_padding_mask=self.key_padding_mask
        )
        return context.transpose(1, 2).flatten(0, 1)


class CrossWeights(NamedTuple):
    """The tensors of attention to a memory, and of the norm that belongs to it. Any bias may be None."""

    q_weight: Tensor  # [hidden, hidden]
    q_bias: Tensor | None  # [hidden]
    kv_weight: Tensor  # [2 * hidden, memory_size]
    kv_bias: Tensor | None  # [2 * hidden]
    out_weight: Tensor  # [hidden, hidden]
    out_bias: Tensor | None  # [hidden]
    norm_weight: Tensor | None  # [hidden]
    norm_bias: Tensor | None  # [hidden]


class Cross(NamedTuple):
    """The part of a decoder's block between self-attention and feed-forward: attention to a memory."""

    weights: CrossWeights
    memory: Tensor  # [total_k, memory_size]
    attend: Attend


def attend_to_self(
    products: Sequence[Tensor],  # query, key and value: one [total, 3 * hidden], or three [total, hidden]
    num_heads: int,
    attend: Attend,
    rotation: Rotation | None = None,
) -> Tensor:
    """Multi-head attention among these, before the output projection: [total, hidden]."""
    total, width = products[0].shape
    head_dim = width * len(products) // (3 * num_heads)
    if len(products) == 1:
        q, k, v = products[0].view(total, 3, num_heads, head_dim).unbind(1)  # each [total, heads, head_dim]
    else:
        q, k, v = (each.view(total, num_heads, head_dim) for each in products)
    if rotation is not None:
        q, k = rotation(q), rotation(k)
    return attend(q, k, v).flatten(1)


def attend_to_memory(
    q: Tensor,  # [total_q, hidden], projected
    kv: Tensor,  # [total_k, 2 * hidden], projected
    num_heads: int,
    attend: Attend,
) -> Tensor:
    """Multi-head attention of the queries to the keys, before the output projection: [total_q, hidden]."""
    head_dim = q.shape[1] // num_heads
    k, v = kv.view(kv.shape[0], 2, num_heads, head_dim).unbind(1)
    return attend(q.view(q.shape[0], num_heads, head_dim), k, v).flatten(1)


class SelfAttention(nn.Module):
    """Multi-head self-attention with its output projection, each sequence of a packed batch on its own.

    Args:
        hidden_size: width of the tokens; a multiple of num_heads.
        num_heads: attention heads.
        bias: whether the projections have one.
        causal: a token sees only itself and what stands before it.
        rotary: turns query and key by their tokens' positions; one module may serve many.
        dropout_p: of the attention probabilities, in training mode only.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        *,
        bias: bool = True,
        causal: bool = False,
        rotary: RotaryPositions | None = None,
        dropout_p: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_heads(hidden_size, num_heads)
        if rotary is not None and rotary.width > hidden_size // num_heads:
            raise ValueError(
                f"rotary turns {rotary.width} features and head_dim is {hidden_size // num_heads}; turn no more"
            )
        self.num_heads = num_heads
        self.causal = causal
        self.rotary = rotary
        self.dropout_p = dropout_p
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size, bias, device=device, dtype=dtype)
        self.out = nn.Linear(hidden_size, hidden_size, bias, device=device, dtype=dtype)
        initialize(self)

    def forward(
        self,
        x: Tensor,  # [total, hidden]
        cu_seqlens: Tensor,  # int32 [batch + 1]
        max_seqlen: int,
        attend: Attend | None = None,
        *,
        position_ids: Tensor | None = None,  # int [total], for rotary; 0, 1, … in each sequence unless given
    ) -> Tensor:
        """[total, hidden] to [total, hidden]. ``attend``: see ``transformer_block``."""
        if attend is None:
            dropout_p = self.dropout_p if self.training else 0.0
            attend = PackedAttention(cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, self.causal, dropout_p)
        rotation = self.rotation(cu_seqlens, x.shape[0], position_ids)
        return product(self.out, attend_to_self([product(self.qkv, x)], self.num_heads, attend, rotation))

    def rotation(self, cu_seqlens: Tensor, total: int, position_ids: Tensor | None) -> Rotation | None:
        """What turns query and key, if anything does."""
        if self.rotary is None:
            return None
        if position_ids is None:
            position_ids = positions_in_sequences(cu_seqlens, total)
        rotation: Rotation = self.rotary(position_ids)
        return rotation

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, causal={self.causal}, dropout_p={self.dropout_p}"


class CrossAttention(nn.Module):
    """Multi-head attention of packed queries to a packed memory, with its output projection.

    Sequence i of the queries sees sequence i of the memory; their lengths need not be equal, and either may be empty (zeros plus
    the output's bias, where there is nothing to see).

    Args:
        hidden_size: width of the queries and of the result; a multiple of num_heads.
        num_heads: attention heads.
        memory_size: width of the memory; hidden_size unless given.
        bias: whether the projections have one.
        dropout_p: of the attention probabilities, in training mode only.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        memory_size: int | None = None,
        *,
        bias: bool = True,
        dropout_p: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_heads(hidden_size, num_heads)
        memory_size = hidden_size if memory_size is None else memory_size
        self.num_heads = num_heads
        self.dropout_p = dropout_p
        self.q = nn.Linear(hidden_size, hidden_size, bias, device=device, dtype=dtype)
        self.kv = nn.Linear(memory_size, 2 * hidden_size, bias, device=device, dtype=dtype)
        self.out = nn.Linear(hidden_size, hidden_size, bias, device=device, dtype=dtype)
        initialize(self)

    def forward(
        self,
        x: Tensor,  # [total_q, hidden]
        cu_seqlens: Tensor,  # int32 [batch + 1]
        max_seqlen: int,
        memory: Tensor,  # [total_k, memory_size]
        memory_cu_seqlens: Tensor,  # int32 [batch + 1]
        memory_max_seqlen: int,
    ) -> Tensor:
        """[total_q, hidden]."""
        dropout_p = self.dropout_p if self.training else 0.0
        attend = PackedAttention(cu_seqlens, memory_cu_seqlens, max_seqlen, memory_max_seqlen, dropout_p=dropout_p)
        context = attend_to_memory(product(self.q, x), product(self.kv, memory), self.num_heads, attend)
        return product(self.out, context)

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, dropout_p={self.dropout_p}"


def check_heads(hidden_size: int, num_heads: int) -> None:
    if num_heads < 1 or hidden_size % num_heads:
        raise ValueError(f"hidden_size is {hidden_size} and num_heads {num_heads}; expected a multiple of the heads")
