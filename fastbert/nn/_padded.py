"""From torch.nn's arguments to rows of tokens and back: layouts, masks in torch's sense, padding."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fastbert.nn.attention import PackedAttention, PaddedAttention
from fastbert.ops.block import is_watched
from fastbert.packing import PackedBatch, pack, unpack


class Masks(NamedTuple):
    """What a query may see, read from torch.nn's arguments."""

    attn_mask: (
        Tensor | None
    )  # broadcastable to [batch, heads, seq_q, seq_k]; bool (True = attend) or added to the logits
    padding: Tensor | None  # bool [batch, seq_k], True = padding
    causal: bool

    def padded_attention(self, batch: int) -> PaddedAttention:
        real = None if self.padding is None else ~self.padding
        return PaddedAttention(batch, self.attn_mask, real, self.causal)

    def merged(self) -> Tensor | None:
        """Both masks as one, of the same kinds."""
        if self.padding is None:
            return self.attn_mask
        real = ~self.padding[:, None, None, :]
        if self.attn_mask is None:
            return real
        if self.attn_mask.dtype == torch.bool:
            return self.attn_mask & real
        return self.attn_mask.masked_fill(~real, -torch.inf)


def read_masks(
    names: tuple[str, str],  # of the two masks, for messages
    attn_mask: Tensor | None,  # [seq_q, seq_k] or [batch * heads, seq_q, seq_k]; bool (True = ignore) or added
    key_padding_mask: Tensor | None,  # [batch, seq_k], or [seq_k] unbatched; bool (True = ignore) or added
    causal: bool,
    shape: tuple[int, int, int, int],  # batch, heads, seq_q, seq_k
    batched: bool,
) -> Masks:
    """The masks in this library's sense, checked. A float key_padding_mask becomes a part of attn_mask.

    Raises:
        TypeError: a mask is neither bool nor floating point.
        ValueError: a mask's shape does not fit.
    """
    batch, heads, seq_q, seq_k = shape
    for name, mask in zip(names, (attn_mask, key_padding_mask), strict=True):
        if mask is not None and not (mask.dtype == torch.bool or mask.is_floating_point()):
            raise TypeError(f"{name} is {mask.dtype}; expected bool (True = ignore) or floating point (added)")
    if causal:
        attn_mask = None  # the hint says what is in it
    if attn_mask is not None:
        if tuple(attn_mask.shape) not in ((seq_q, seq_k), (batch * heads, seq_q, seq_k)):
            raise ValueError(
                f"{names[0]} has shape {list(attn_mask.shape)}; expected {[seq_q, seq_k]} or {[batch * heads, seq_q, seq_k]}, "
                "the last being batch · heads, queries, keys"
            )
        if attn_mask.dtype == torch.bool:
            attn_mask = ~attn_mask
        if attn_mask.dim() == 3:
            attn_mask = attn_mask.reshape(batch, heads, seq_q, seq_k)
    if key_padding_mask is None:
        return Masks(attn_mask, None, causal)
    expected = [batch, seq_k] if batched else [seq_k]
    if list(key_padding_mask.shape) != expected:
        raise ValueError(f"{names[1]} has shape {list(key_padding_mask.shape)}; expected {expected}, True = ignore")
    key_padding_mask = key_padding_mask.reshape(batch, seq_k)
    if key_padding_mask.dtype == torch.bool:
        return Masks(attn_mask, key_padding_mask, causal)
    added = key_padding_mask[:, None, None, :]
    if attn_mask is None:
        return Masks(added, None, causal)
    if attn_mask.dtype == torch.bool:
        return Masks(added.masked_fill(~attn_mask, -torch.inf), None, causal)
    return Masks(attn_mask + added, None, causal)


def is_causal_mask(mask: Tensor | None, length: int) -> bool:
    """Whether a mask in torch's sense is the causal one: torch's own transformer stacks look at it too, once a call.

    While something traces nobody knows the values, and the mask is then taken as any other.
    """
    if mask is None or tuple(mask.shape) != (length, length) or mask.is_meta or is_watched():
        return False
    after = torch.ones(length, length, dtype=torch.bool, device=mask.device).triu(1)
    if mask.dtype == torch.bool:
        return torch.equal(mask, after)
    return torch.equal(mask, torch.zeros_like(mask).masked_fill(after, -torch.inf))


class Rows(NamedTuple):
    """The tokens of a batch [total, width], and the way back."""

    values: Tensor
    cu_seqlens: Tensor  # int32 [batch + 1]
    max_seqlen: int
    packed: bool  # without padding; otherwise total is batch · seq
    restore: Callable[[Tensor], Tensor]  # [total, width] to the layout that came, zeros on padding

    @property
    def batch(self) -> int:
        return self.cu_seqlens.shape[0] - 1


def can_pack(x: Tensor, *masks: Masks) -> bool:
    """Whether real tokens are all that attention needs to know, and their number may come to the host."""
    if any(each.attn_mask is not None for each in masks):
        return False
    if all(each.padding is None for each in masks):
        return True
    return not (is_watched() or x.is_meta or (x.is_cuda and torch.cuda.is_current_stream_capturing()))


def to_rows(x: Tensor, padding: Tensor | None, batch_first: bool, packed: bool) -> Rows:
    """[seq, width], [seq, batch, width] or with batch_first [batch, seq, width], as rows.

    Args:
        padding: bool [batch, seq], True = padding.
        packed: whether padding is left out; otherwise it comes along, and is zeros in the end all the same.
    """
    batched = x.dim() == 3
    if not batched:
        x = x.unsqueeze(0)
    elif not batch_first:
        x = x.transpose(0, 1)

    def layout(y: Tensor) -> Tensor:  # [batch, seq, width]
        if not batched:
            return y.squeeze(0)
        return y if batch_first else y.transpose(0, 1).contiguous()

    if packed and padding is not None:
        real = pack(x, ~padding)
        return Rows(real.values, real.cu_seqlens, real.max_seqlen, True, lambda values: layout(unpack(real, values)))
    batch, seq = x.shape[:2]

    def restore(values: Tensor) -> Tensor:
        y = values.view(batch, seq, values.shape[-1])
        return layout(y if padding is None else y.masked_fill(padding.unsqueeze(-1), 0.0))

    cu_seqlens = torch.arange(batch + 1, dtype=torch.int32, device=x.device) * seq
    return Rows(x.reshape(batch * seq, x.shape[2]), cu_seqlens, seq, packed, restore)


def nested_to_rows(x: Tensor) -> Rows:
    """A nested tensor of [length, width] each, as rows; the result is one again, in its layout."""
    parts = x.unbind()
    lengths = [part.shape[0] for part in parts]
    batch = PackedBatch.from_lengths(torch.cat(parts), lengths)

    def restore(values: Tensor) -> Tensor:
        return torch.nested.as_nested_tensor(list(values.split(lengths)), layout=x.layout)

    return Rows(batch.values, batch.cu_seqlens, batch.max_seqlen, True, restore)


def attention_between(queries: Rows, keys: Rows, masks: Masks) -> PackedAttention | PaddedAttention:
    """Which queries see which keys; both are packed, or neither is."""
    if not queries.packed:
        return masks.padded_attention(queries.batch)
    return PackedAttention(queries.cu_seqlens, keys.cu_seqlens, queries.max_seqlen, keys.max_seqlen, masks.causal)
