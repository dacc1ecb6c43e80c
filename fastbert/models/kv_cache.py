"""Keys and values of the tokens that a model has seen, so that each new token costs one row and not all of them."""

import torch
from torch import Tensor

from fastbert import functional as F
from fastbert.nn import Attend
from fastbert.packing import PackedBatch

_STEP = 64  # tokens by which a cache grows at least


class KeyValueCache:
    """Of every layer and sequence. Sequences have lengths of their own; there is no padding to attend to.

    Made empty, filled by ``GPTModel.forward(…, cache=cache)``: a first call with the prompts, packed, then calls that give each
    sequence equally many new tokens. Memory grows with the longest sequence, by half of itself at a time, up to ``capacity``.

    Attributes:
        lengths: cached tokens of each sequence; empty before the first call.
    """

    def __init__(self, layers: int, capacity: int) -> None:
        """``capacity``: the most tokens a sequence may have."""
        self.capacity = capacity
        self.lengths: list[int] = []
        self._on_device = torch.empty(0, dtype=torch.int32)  # lengths
        self._room = 0  # tokens for which there is memory
        self._keys: list[Tensor | None] = [None] * layers  # [batch, room, heads, head_dim]
        self._values: list[Tensor | None] = [None] * layers

    def __len__(self) -> int:
        """Number of sequences."""
        return len(self.lengths)

    @property
    def nbytes(self) -> int:
        """Memory of keys and values."""
        return sum(t.numel() * t.element_size() for t in (*self._keys, *self._values) if t is not None)

    def append(self, batch: PackedBatch) -> "CacheStep":
        """Makes room for the tokens of a batch, whose keys and values the layers then write; one forward pass.

        Raises ValueError where a sequence would pass the capacity, or the batch does not fit to what is cached.
        """
        new = batch.host_lengths()
        before = self.lengths or [0] * len(new)
        if len(before) != len(new):
            raise ValueError(f"the batch has {len(new)} sequences, the cache {len(before)}")
        if self.lengths and len(set(new)) > 1:
            raise ValueError(
                f"the batch brings {min(new)} to {max(new)} tokens a sequence to a filled cache; expected equally many"
            )
        longest = max((a + b for a, b in zip(before, new, strict=True)), default=0)
        if longest > self.capacity:
            raise ValueError(f"a sequence would have {longest} tokens; the cache holds at most {self.capacity}")
        device = batch.device
        if not self.lengths:
            self._on_device = torch.zeros(len(new), dtype=torch.int32, device=device)
        self._grow(longest)
        # A token's place in the flat cache: its sequence's first place, what is there already, its number among the new.
        counts = batch.cu_seqlens.diff()
        shift = torch.arange(len(new), device=device) * self._room + self._on_device - batch.cu_seqlens[:-1]
        slots = torch.arange(batch.total, device=device) + shift.repeat_interleave(counts, output_size=batch.total)
        first = not self.lengths
        self._on_device = self._on_device + counts
        self.lengths = [a + b for a, b in zip(before, new, strict=True)]
        return CacheStep(self, batch, slots, None if first else new[0])

    def select(self, rows: list[int]) -> None:
        """Keeps these sequences, in this order."""
        index = torch.tensor(rows, dtype=torch.int64, device=self._on_device.device)
        self.lengths = [self.lengths[row] for row in rows]
        self._on_device = self._on_device.index_select(0, index)
        for stored in (self._keys, self._values):
            stored[:] = [None if t is None else t.index_select(0, index) for t in stored]

    def _grow(self, longest: int) -> None:
        if longest <= self._room:
            return
        room = min(self.capacity, max(longest + _STEP, self._room + self._room // 2))
        for stored in (self._keys, self._values):
            for i, old in enumerate(stored):
                if old is not None:
                    grown = old.new_zeros((old.shape[0], room, *old.shape[2:]))
                    grown[:, : old.shape[1]] = old
                    stored[i] = grown
        self._room = room

    def _write(self, layer: int, slots: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """The layer's caches, the new tokens in them."""
        for stored, new in ((self._keys, k), (self._values, v)):
            cache = stored[layer]
            if cache is None:
                cache = stored[layer] = new.new_zeros((len(self.lengths), self._room, *new.shape[1:]))
            cache.flatten(0, 1).index_copy_(0, slots, new)
        keys, values = self._keys[layer], self._values[layer]
        assert keys is not None and values is not None
        return keys, values


class CacheStep:
    """One forward pass over a cache."""

    def __init__(self, cache: KeyValueCache, batch: PackedBatch, slots: Tensor, each: int | None) -> None:
        self._cache = cache
        self._batch = batch
        self._slots = slots  # int64 [total]
        self._each = each  # new tokens of each sequence; None: the cache was empty, nothing but the new ones is there

    def layer(self, i: int) -> Attend:
        """The attention of layer i."""

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # each [total, heads, head_dim]
            keys, values = self._cache._write(i, self._slots, k, v)
            batch = self._batch
            if self._each is None:
                cu_seqlens, longest = batch.cu_seqlens, batch.max_seqlen
                out = F.varlen_attention(q, k, v, cu_seqlens, cu_seqlens, longest, longest, causal=True)
            else:
                new = q.view(len(batch), self._each, *q.shape[1:])
                out = F.attention_decode(new, keys, values, self._cache._on_device)
            assert isinstance(out, Tensor)
            return out.reshape(q.shape)

        return attend
