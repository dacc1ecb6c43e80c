"""From the tokens of each sequence to one vector: [total, hidden] to [batch, hidden]."""

import torch
from torch import Tensor
from torch.nn import functional as F


def mean_pool(
    hidden: Tensor,  # [total, hidden]
    cu_seqlens: Tensor,  # int32 [batch + 1]
) -> Tensor:
    """The mean over each sequence's tokens: float32 [batch, hidden] (float64 for float64), zeros for an empty sequence.

    Sums run in float32 in a fixed order: the same input gives the same output, bit for bit. Never synchronises.
    """
    wide = hidden if hidden.dtype == torch.float64 else hidden.float()
    lengths = cu_seqlens.diff().to(torch.int64)
    batch = lengths.shape[0]
    if hidden.device.type == "cpu":
        # index_add walks the rows in order here, at 12 times segment_reduce's speed on 4096 tokens of 384; on GPUs its
        # order varies.
        sequence = torch.arange(batch).repeat_interleave(lengths, output_size=hidden.shape[0])  # [total]
        sums = wide.new_zeros(batch, *hidden.shape[1:]).index_add(0, sequence, wide)
    else:
        sums = torch.segment_reduce(wide, "sum", offsets=cu_seqlens.to(torch.int64), axis=0, unsafe=True, initial=0)
    return sums / lengths.clamp(min=1).unsqueeze(-1)


def cls_pool(
    hidden: Tensor,  # [total, hidden]
    cu_seqlens: Tensor,  # int32 [batch + 1]
) -> Tensor:
    """Each sequence's first token: [batch, hidden] in hidden's dtype, zeros for an empty one. Never synchronises."""
    total = hidden.shape[0]
    if torch.compiler.is_exporting():
        torch._check(total > 0)  # an exported graph has no other branch
    elif total == 0:
        return hidden.new_zeros(cu_seqlens.shape[0] - 1, *hidden.shape[1:])
    # An empty sequence at the end starts at total, which is no row.
    first = hidden.index_select(0, cu_seqlens[:-1].clamp(max=total - 1))
    return first.masked_fill((cu_seqlens.diff() == 0).unsqueeze(-1), 0.0)


def normalize(embeddings: Tensor) -> Tensor:
    """Each row [..., hidden] divided by its Euclidean norm, zeros staying zeros."""
    return F.normalize(embeddings, dim=-1)
