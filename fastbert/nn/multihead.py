"""Namesake of torch.nn's MultiheadAttention."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as TF

from fastbert import functional as F
from fastbert.nn._padded import Masks, read_masks


class MultiheadAttention(nn.MultiheadAttention):
    """``torch.nn.MultiheadAttention``: its constructor, parameters and arguments, through this library's attention.

    Masks keep torch's sense, the opposite of this library's: True (or −inf) = ignore.

    ``need_weights=False`` is the fast way, in memory linear in the lengths. ``need_weights=True``, torch's default, is served
    outside it: the weights are computed and returned, [batch, heads, queries, keys] of them in memory. ``add_bias_kv``,
    ``add_zero_attn`` and nested tensors go to torch's own code.

    Documented differences: a query with nothing to see gives the output's bias, and weights of zero, where torch gives NaN.
    ``is_causal=True`` is enough alone; with ``need_weights=False`` an ``attn_mask`` beside it is not looked at. Under autocast the
    weights are in autocast's dtype.

    Raises:
        TypeError: dtypes do not fit, or a mask is neither bool nor floating point.
        ValueError: shapes or devices do not fit.
    """

    def forward(
        self,
        query: Tensor,  # [seq_q, embed_dim], [seq_q, batch, embed_dim], or with batch_first [batch, seq_q, embed_dim]
        key: Tensor,  # likewise, seq_k and kdim
        value: Tensor,  # likewise, seq_k and vdim
        key_padding_mask: Tensor
        | None = None,  # [batch, seq_k], or [seq_k]; bool (True = ignore) or added to the logits
        need_weights: bool = True,
        attn_mask: Tensor
        | None = None,  # [seq_q, seq_k] or [batch · heads, seq_q, seq_k]; bool (True = ignore) or added
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """The output, as query; and the weights [batch, seq_q, seq_k] (or per head, or unbatched), None unless needed."""
        rare = self.bias_k is not None or self.bias_v is not None or self.add_zero_attn
        if rare or query.is_nested or key.is_nested or value.is_nested:
            return super().forward(
                query,
                key,
                value,
                key_padding_mask,
                need_weights,
                attn_mask,
                average_attn_weights,
                is_causal,
            )
        self._check(query, key, value)
        batched = query.dim() == 3
        projected = self._project(query, key, value)
        if not batched:
            q, k, v = (x.unsqueeze(0) for x in projected)
        elif self.batch_first:
            q, k, v = projected
        else:
            q, k, v = (x.transpose(0, 1) for x in projected)
        shape = (q.shape[0], self.num_heads, q.shape[1], k.shape[1])
        # Beside weights the mask itself counts, as in torch.
        causal = is_causal and (attn_mask is None or not need_weights)
        masks = read_masks(("attn_mask", "key_padding_mask"), attn_mask, key_padding_mask, causal, shape, batched)
        q, k, v = (x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2) for x in (q, k, v))
        dropout_p = self.dropout if self.training else 0.0
        weights: Tensor | None = None
        if need_weights:
            context, weights = _attention_with_weights(q, k, v, masks, dropout_p)
            weights = weights.mean(1) if average_attn_weights else weights
            weights = weights if batched else weights.squeeze(0)
        else:
            real = None if masks.padding is None else ~masks.padding
            context = F.scaled_dot_product_attention(
                q, k, v, masks.attn_mask, dropout_p, masks.causal, key_padding_mask=real
            )
        if not batched:
            context = context.squeeze(0).transpose(0, 1)  # [seq_q, heads, head_dim]
        else:
            context = context.permute((0, 2, 1, 3) if self.batch_first else (2, 0, 1, 3))
        return F.linear_act(context.flatten(-2), self.out_proj.weight, self.out_proj.bias), weights

    def _check(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        if query.dim() not in (2, 3) or key.dim() != query.dim() or value.dim() != query.dim():
            raise ValueError(
                f"query has shape {list(query.shape)}, key {list(key.shape)} and value {list(value.shape)}; expected three "
                "dimensions of each, or two of each without a batch"
            )
        for name, x, width in (
            ("query", query, self.embed_dim),
            ("key", key, self.kdim),
            ("value", value, self.vdim),
        ):
            if x.shape[-1] != width:
                raise ValueError(f"{name} has {x.shape[-1]} features; this module takes {width}")
        batch = 0 if self.batch_first else 1
        if key.shape[:-1] != value.shape[:-1] or (query.dim() == 3 and query.shape[batch] != key.shape[batch]):
            raise ValueError(
                f"query has shape {list(query.shape)}, key {list(key.shape)} and value {list(value.shape)}; batch sizes, and "
                f"key's and value's lengths, must be equal (batch_first is {self.batch_first})"
            )

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        """Query, key and value as attention takes them, in the layout they came in; products of one input are one product."""
        embed_dim, bias = self.embed_dim, self.in_proj_bias
        if self._qkv_same_embed_dim:
            weight = self.in_proj_weight
            if query is key and key is value:
                return F.linear_act(query, weight, bias).chunk(3, -1)
            if key is value:
                sizes = [embed_dim, 2 * embed_dim]
                q_bias, kv_bias = (None, None) if bias is None else bias.split(sizes)
                q_weight, kv_weight = weight.split(sizes)
                return F.linear_act(query, q_weight, q_bias), *F.linear_act(key, kv_weight, kv_bias).chunk(2, -1)
            weights = weight.chunk(3)
        else:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        biases = (None, None, None) if bias is None else bias.chunk(3)
        return tuple(map(F.linear_act, (query, key, value), weights, biases))


def _attention_with_weights(
    q: Tensor,  # [batch, heads, seq_q, head_dim]
    k: Tensor,  # [batch, heads, seq_k, head_dim]
    v: Tensor,  # [batch, heads, seq_k, head_dim]
    masks: Masks,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    """The result and the weights [batch, heads, seq_q, seq_k] that made it, after dropout as torch returns them."""
    weights = F.softmax(
        torch.matmul(q, k.transpose(-2, -1)),
        mask=masks.merged(),
        scale=1.0 / math.sqrt(q.shape[-1]),
        causal=masks.causal,
    )
    weights = TF.dropout(weights, dropout_p) if dropout_p > 0.0 else weights
    return torch.matmul(weights, v), weights
