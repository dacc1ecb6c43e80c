"""Real tokens only: between a padded batch ``[batch, seq, ...]`` and a packed one ``[total, ...]`` with ``cu_seqlens``.

Padding exists at the outer boundary of a model and nowhere else: ``pack`` once before the first layer, ``unpack`` once
after the last.
"""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from operator import index
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as TF

from fastbert.ops.pack import mask_lengths, pack_rows, unpack_rows

__all__ = ["PackedBatch", "pack", "unpack"]

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
_INT32_MAX = 2**31 - 1


@dataclass(frozen=True, eq=False, repr=False)
class PackedBatch:
    """Sequences end to end, without padding.

    ``values[cu_seqlens[i]:cu_seqlens[i + 1]]`` is sequence ``i``. ``values`` is whatever stands at a token: ids
    ``[total]``, embeddings ``[total, hidden]``. The last three fields are what the host knows about the batch; they
    save synchronisations, and ``unpack`` needs them to put the tokens back.

    Make one with :func:`pack` from a padded batch, or with :meth:`from_lengths` from tokens that never were padded.
    """

    values: Tensor  # [total, ...]
    cu_seqlens: Tensor  # int32 [batch + 1], from 0 to total
    max_seqlen: int  # at least the longest sequence
    position_ids: Tensor  # int64 [total]
    token_type_ids: Tensor | None = None  # int64 [total]
    lengths: list[int] | None = None  # tokens of each sequence, where the host knows them
    indices: Tensor | None = None  # int64 [total], ascending, into the flat padded batch; None: all, or never padded
    padded_shape: tuple[int, int] | None = None  # (batch, seq); None: never padded

    def __post_init__(self) -> None:
        check_tensor("PackedBatch.values", self.values, "[total, ...]")
        check_tensor("PackedBatch.cu_seqlens", self.cu_seqlens, "int32 [batch + 1]")
        check_tensor("PackedBatch.position_ids", self.position_ids, "int64 [total]")
        for name, optional in (("token_type_ids", self.token_type_ids), ("indices", self.indices)):
            if optional is not None:
                check_tensor(f"PackedBatch.{name}", optional, "int64 [total], or None")
        if not isinstance(self.max_seqlen, int | torch.SymInt) or isinstance(self.max_seqlen, bool):
            object.__setattr__(self, "max_seqlen", as_integer("PackedBatch.max_seqlen", self.max_seqlen))
        total = self.values.shape[0] if self.values.dim() else -1
        if total < 0:
            raise ValueError("PackedBatch.values is a scalar; expected [total, ...]")
        if self.cu_seqlens.dim() != 1 or self.cu_seqlens.shape[0] < 1 or self.cu_seqlens.dtype != torch.int32:
            raise ValueError(
                f"PackedBatch.cu_seqlens is {self.cu_seqlens.dtype} {list(self.cu_seqlens.shape)}; "
                "expected int32 [batch + 1]"
            )
        if self.max_seqlen < 0:
            raise ValueError(f"PackedBatch.max_seqlen is {self.max_seqlen}; expected 0 or more")
        for name, tensor in (("position_ids", self.position_ids), ("token_type_ids", self.token_type_ids)):
            if tensor is not None and (tensor.dim() != 1 or tensor.shape[0] != total or tensor.dtype != torch.int64):
                raise ValueError(
                    f"PackedBatch.{name} is {tensor.dtype} {list(tensor.shape)}; expected int64 [{total}], one a token"
                )
        for name, tensor in (
            ("cu_seqlens", self.cu_seqlens),
            ("position_ids", self.position_ids),
            ("token_type_ids", self.token_type_ids),
            ("indices", self.indices),
        ):
            if tensor is not None and tensor.device != self.values.device:
                raise ValueError(
                    f"PackedBatch.{name} is on {tensor.device}, values on {self.values.device}; use .to(device)"
                )

    @classmethod
    def of_valid(cls, **fields: Any) -> "PackedBatch":
        """A batch of fields that are right by construction. Checking them takes longer than tokenizing a short text."""
        self = object.__new__(cls)
        self.__dict__.update(fields)  # the others have defaults, which the class holds
        return self

    @classmethod
    def from_lengths(
        cls,
        values: Tensor,  # [total, ...]
        lengths: Sequence[int] | Tensor,  # [batch]
        *,
        position_ids: Tensor | None = None,  # int [total]
        token_type_ids: Tensor | None = None,  # int [total]
    ) -> "PackedBatch":
        """A batch that never was padded. Positions count from 0 in each sequence unless given. No synchronisation."""
        check_tensor("values", values, "[total, ...]")
        host_lengths = _host_lengths(lengths)
        total = sum(host_lengths)
        if values.dim() == 0 or values.shape[0] != total:
            raise ValueError(f"values has shape {list(values.shape)}, but lengths add up to {total} tokens")
        cu_seqlens = _cu_seqlens(host_lengths, values.device)
        max_seqlen = _largest(host_lengths)
        if position_ids is None:
            position_ids = _flat_indices(cu_seqlens, total, stride=0)
        return cls(
            values,
            cu_seqlens,
            max_seqlen,
            _per_token(position_ids, total, "position_ids"),
            None if token_type_ids is None else _per_token(token_type_ids, total, "token_type_ids"),
            host_lengths,
        )

    def __len__(self) -> int:
        """Number of sequences."""
        return self.cu_seqlens.shape[0] - 1

    @property
    def total(self) -> int:
        """Number of tokens."""
        return self.values.shape[0]

    @property
    def device(self) -> torch.device:
        return self.values.device

    def __repr__(self) -> str:
        batch = len(self)
        text = f"PackedBatch({batch} sequences, {self.total} tokens, longest {self.max_seqlen}"
        if self.padded_shape is not None:
            seq = self.padded_shape[1]
            padded = batch * seq
            share = 100.0 * (padded - self.total) / padded if padded else 0.0
            text += f", from [{batch}, {seq}]: {share:.0f} % was padding"
        dtype = str(self.values.dtype).removeprefix("torch.")
        return f"{text}; values {dtype} {list(self.values.shape)} on {self.values.device})"

    def with_values(self, values: Tensor) -> "PackedBatch":
        """The same batch with other values at its tokens, ``[total, ...]``."""
        return replace(self, values=values)

    def to(
        self,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        non_blocking: bool = False,
    ) -> "PackedBatch":
        """The batch on ``device``; ``dtype`` changes the values, where they are floating point, and nothing else."""

        def move(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
            return tensor.to(device=device or tensor.device, dtype=dtype or tensor.dtype, non_blocking=non_blocking)

        return replace(
            self,
            values=move(self.values, dtype if self.values.is_floating_point() else None),
            cu_seqlens=move(self.cu_seqlens),
            position_ids=move(self.position_ids),
            token_type_ids=None if self.token_type_ids is None else move(self.token_type_ids),
            indices=None if self.indices is None else move(self.indices),
        )

    def host_lengths(self) -> list[int]:
        """Tokens of each sequence; one synchronisation where only an accelerator knows them."""
        return self.lengths if self.lengths is not None else self.cu_seqlens.diff().tolist()

    def split(self) -> list[Tensor]:
        """Each sequence's values, ``[length, ...]``, as views."""
        return list(self.values.split(self.host_lengths()))

    def check(self) -> None:
        """Raises ValueError unless cu_seqlens, max_seqlen and lengths describe the values. Synchronises."""
        ends = self.cu_seqlens.tolist()
        if ends[0] != 0 or ends[-1] != self.total:
            raise ValueError(
                f"cu_seqlens runs from {ends[0]} to {ends[-1]}; expected 0 to {self.total}, the number of tokens"
            )
        lengths = [end - start for start, end in pairwise(ends)]
        if min(lengths, default=0) < 0:
            raise ValueError(
                f"cu_seqlens falls after sequence {lengths.index(min(lengths))}; expected it never to: {ends}"
            )
        if max(lengths, default=0) > self.max_seqlen:
            raise ValueError(f"max_seqlen is {self.max_seqlen}, but a sequence has {max(lengths)} tokens")
        if self.lengths is not None and self.lengths != lengths:
            raise ValueError(f"lengths {self.lengths} are not those of cu_seqlens, {lengths}")


def pack(
    padded: Tensor,  # [batch, seq, ...]
    key_padding_mask: Tensor | None = None,  # bool or 0/1 integers [batch, seq]
    *,
    lengths: Sequence[int] | Tensor | None = None,  # [batch]
    padding_side: str = "right",
    position_ids: Tensor | None = None,  # int [batch, seq], [1, seq] or [seq]
    token_type_ids: Tensor | None = None,  # int [batch, seq], [1, seq] or [seq]
) -> PackedBatch:
    """The real tokens of a padded batch, end to end.

    Gradients flow through the values. Where nothing is padding, the values are a view of ``padded``.

    Args:
        padded: [batch, seq, ...], anything that stands at tokens.
        key_padding_mask: [batch, seq], True (or 1) for real tokens, as in transformers and flash_attn. Any pattern:
            padding on either side, holes, rows without a real token. On an accelerator the lengths come to the host in
            one transfer, the only synchronisation.
        lengths: [batch], instead of a mask: the real tokens of each row, at its left end, or at its right with
            ``padding_side="left"``. From the host (a list, or a CPU tensor) nothing synchronises. With neither mask nor
            lengths every token is real.
        padding_side: "right" or "left", for lengths.
        position_ids: integers [batch, seq], [1, seq] or [seq], packed along. A token's position is its column unless
            given, as in transformers: tokens behind left padding do not start at 0.
        token_type_ids: as position_ids.

    Raises:
        ValueError: shapes or devices that do not fit, a length outside 0..seq, mask values other than 0 and 1.
        TypeError: a mask, lengths or ids of a dtype that is not taken, or no tensors.
    """
    check_tensor("padded", padded, "[batch, seq, ...]")
    if padded.dim() < 2:
        raise ValueError(f"padded has shape {list(padded.shape)}; expected [batch, seq, ...]")
    if padding_side not in ("right", "left"):
        raise ValueError(f'padding_side is {padding_side!r}; expected "right" or "left"')
    if key_padding_mask is not None and lengths is not None:
        raise ValueError("both key_padding_mask and lengths are given; give one of them")
    batch, seq = padded.shape[:2]
    device = padded.device

    real: Tensor | None = None
    if torch.compiler.is_exporting() and lengths is None:
        return _pack_exported(padded, key_padding_mask, position_ids, token_type_ids)
    if key_padding_mask is not None:
        real, host_lengths = _read_mask(key_padding_mask, batch, seq, device)
    elif lengths is not None:
        host_lengths = _host_lengths(lengths)
        if len(host_lengths) != batch:
            raise ValueError(f"lengths has {len(host_lengths)} entries for a batch of {batch}")
        if _largest(host_lengths) > seq:
            raise ValueError(f"lengths has a {max(host_lengths)}, but the padded batch has {seq} columns")
    else:
        host_lengths = [seq] * batch

    total = sum(host_lengths)
    cu_seqlens = _cu_seqlens(host_lengths, device)
    indices: Tensor | None = None
    if total != batch * seq:
        if real is not None:
            real = real if real.dtype == torch.bool else real != 0
            indices = torch.nonzero_static(real.reshape(-1), size=total).squeeze(1)
        else:
            indices = _flat_indices(cu_seqlens, total, seq, at_right=padding_side == "left")

    return _packed_by(padded, indices, cu_seqlens, _largest(host_lengths), host_lengths, position_ids, token_type_ids)


def _packed_by(
    padded: Tensor,  # [batch, seq, ...]
    indices: Tensor | None,  # int64 [total]
    cu_seqlens: Tensor,
    max_seqlen: int,
    host_lengths: list[int] | None,
    position_ids: Tensor | None,
    token_type_ids: Tensor | None,
) -> PackedBatch:
    batch, seq = padded.shape[:2]
    device = padded.device

    def gather(name: str, ids: Tensor) -> Tensor:
        check_tensor(name, ids, "[batch, seq], or None")
        if ids.dtype not in _INTEGERS:
            raise TypeError(f"{name} is {ids.dtype}; expected integers")
        if ids.device != device:
            raise ValueError(f"{name} is on {ids.device}, the batch on {device}")
        if list(ids.shape) not in ([batch, seq], [1, seq], [seq]):
            raise ValueError(f"{name} has shape {list(ids.shape)}; expected [{batch}, {seq}]")
        return _gather(ids.to(torch.int64).expand(batch, seq), indices)

    if position_ids is not None:
        positions = gather("position_ids", position_ids)
    elif indices is not None:
        positions = indices.remainder(max(seq, 1))
    else:
        positions = torch.arange(seq, device=device).expand(batch, seq).reshape(-1)
    # What torch.compile traces is checked once, and it does not take the other.
    make = PackedBatch if torch.compiler.is_compiling() else PackedBatch.of_valid
    return make(
        values=_gather(padded, indices),
        cu_seqlens=cu_seqlens,
        max_seqlen=max_seqlen,
        position_ids=positions,
        token_type_ids=None if token_type_ids is None else gather("token_type_ids", token_type_ids),
        lengths=host_lengths,
        indices=indices,
        padded_shape=(batch, seq),
    )


def _pack_exported(
    padded: Tensor, mask: Tensor | None, position_ids: Tensor | None, token_type_ids: Tensor | None
) -> PackedBatch:
    """As ``pack``, for torch.export: one graph for every batch, so the host learns no length, and the mask is not checked."""
    batch, seq = padded.shape[:2]
    if mask is None:
        cu_seqlens = torch.arange(0, (batch + 1) * seq, seq, dtype=torch.int32, device=padded.device)
        return _packed_by(padded, None, cu_seqlens, seq, None, position_ids, token_type_ids)
    real = mask != 0
    cu_seqlens = TF.pad(real.sum(1).cumsum(0, dtype=torch.int32), (1, 0))
    indices = real.reshape(-1).nonzero().squeeze(1)
    return _packed_by(padded, indices, cu_seqlens, seq, None, position_ids, token_type_ids)


def unpack(packed: PackedBatch, values: Tensor | None = None, *, padding_value: float = 0) -> Tensor:
    """The padded batch ``[batch, seq, ...]``, ``padding_value`` where padding was; never synchronises.

    ``values`` ``[total, ...]`` replaces the batch's own, such as a model's output for its ids. A batch that never was
    padded comes out padded on the right to ``max_seqlen``. Gradients flow through.

    Raises:
        ValueError: values of another number of tokens or device, or a padding_value that integers cannot hold.
        TypeError: no PackedBatch, or values that are no tensor.
    """
    if not isinstance(packed, PackedBatch):
        raise TypeError(f"packed is of type {type(packed).__name__}; expected a PackedBatch")
    if values is None:
        values = packed.values
    check_tensor("values", values, "[total, ...], or None")
    if values.dim() == 0 or values.shape[0] != packed.total:
        raise ValueError(f"values has shape {list(values.shape)}; the batch has {packed.total} tokens")
    if values.device != packed.device:
        raise ValueError(f"values is on {values.device}, the batch on {packed.device}")
    if not (values.is_floating_point() or values.is_complex()) and padding_value % 1 != 0:  # also NaN and Inf
        raise ValueError(f"padding_value is {padding_value}, but values are {values.dtype}; expected an integer")
    batch, seq = packed.padded_shape or (len(packed), packed.max_seqlen)
    rest = values.shape[1:]
    indices = packed.indices
    if indices is None:
        if packed.total == batch * seq:
            return values.reshape(batch, seq, *rest)
        indices = _flat_indices(packed.cu_seqlens, packed.total, seq)
    return unpack_rows(values, indices, batch * seq, padding_value).reshape(batch, seq, *rest)


def check_tensor(name: str, value: object, expected: str) -> None:
    """Raises TypeError unless ``value`` is a tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is of type {type(value).__name__}; expected a tensor {expected}")


def as_integer(name: str, value: Any) -> int:
    """An int, or what stands for one, such as numpy.int64; no bool. Raises TypeError for anything else."""
    if not isinstance(value, bool):
        with suppress(TypeError):
            return index(value)
    raise TypeError(f"{name} is {value!r:.60} of type {type(value).__name__}; expected an integer")


def _largest(lengths: list[int]) -> int:
    return max(lengths) if lengths else 0  # torch.compile warns of max(…, default=0)


def _gather(padded: Tensor, indices: Tensor | None) -> Tensor:
    """[batch, seq, ...] → [total, ...]."""
    rows = padded.reshape(padded.shape[0] * padded.shape[1], *padded.shape[2:])
    return rows if indices is None else pack_rows(rows, indices)


def _flat_indices(
    cu_seqlens: Tensor,  # int32 [batch + 1]
    total: int,
    stride: int,
    at_right: bool = False,
) -> Tensor:
    """Token t of row i → i · stride + its column, int64 [total]. As ``total`` is known, nothing synchronises."""
    starts, ends = cu_seqlens[:-1].to(torch.int64), cu_seqlens[1:].to(torch.int64)
    rows = torch.arange(starts.shape[0], device=cu_seqlens.device)
    first_column = stride - (ends - starts) if at_right else 0
    shift = rows * stride + first_column - starts  # [batch]: from an index into the packed to one into the padded batch
    return torch.arange(total, device=cu_seqlens.device) + shift.repeat_interleave(ends - starts, output_size=total)


def _cu_seqlens(lengths: list[int], device: torch.device) -> Tensor:
    total = sum(lengths)
    if total > _INT32_MAX:
        raise ValueError(
            f"the batch has {total} tokens; cu_seqlens is int32 and holds at most {_INT32_MAX}. Split the batch."
        )
    # non_blocking: a copy from pageable memory is staged before the call returns, and waits for nothing on the device.
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32).to(device, non_blocking=True)


def _host_lengths(lengths: Sequence[int] | Tensor) -> list[int]:
    if isinstance(lengths, Tensor):
        if lengths.dtype not in _INTEGERS:
            raise TypeError(f"lengths is {lengths.dtype}; expected integers")
        if lengths.dim() != 1:
            raise ValueError(f"lengths has shape {list(lengths.shape)}; expected [batch]")
        host: list[int] = lengths.tolist()
    elif not hasattr(lengths, "__iter__"):
        raise TypeError(f"lengths is of type {type(lengths).__name__}; expected a list of integers or a tensor [batch]")
    else:
        host = [n if type(n) is int else as_integer(f"lengths[{i}]", n) for i, n in enumerate(lengths)]
    if host and min(host) < 0:
        raise ValueError(f"lengths has a {min(host)}; expected 0 or more")
    return host


def _read_mask(mask: Tensor, batch: int, seq: int, device: torch.device) -> tuple[Tensor, list[int]]:
    """The mask, not zero for real tokens, and the number of these in each row on the host, in one transfer."""
    check_tensor("key_padding_mask", mask, "[batch, seq], or None")
    if list(mask.shape) != [batch, seq]:
        raise ValueError(
            f"key_padding_mask has shape {list(mask.shape)}; expected [{batch}, {seq}], True for real tokens"
        )
    if mask.device != device:
        raise ValueError(f"key_padding_mask is on {mask.device}, the batch on {device}")
    found = mask_lengths(mask)
    if found is not None:
        return mask, found
    if mask.dtype == torch.bool:
        return mask, mask.sum(1).tolist()
    if mask.dtype not in _INTEGERS:
        raise TypeError(f"key_padding_mask is {mask.dtype}; expected bool or 0/1 integers, True (1) for real tokens")
    real = mask != 0
    if mask.numel() == 0:
        return real, [0] * batch
    smallest, largest = mask.to(torch.int64).aminmax()
    *lengths, low, high = torch.cat((real.sum(1), smallest.view(1), largest.view(1))).tolist()
    if low < 0 or high > 1:
        raise ValueError(
            f"key_padding_mask has values from {low} to {high}; expected 1 for real tokens and 0 for padding"
        )
    return real, lengths


def _per_token(ids: Tensor, total: int, name: str) -> Tensor:
    check_tensor(name, ids, "[total], or None")
    if ids.dtype not in _INTEGERS:
        raise TypeError(f"{name} is {ids.dtype}; expected integers")
    if list(ids.shape) != [total]:
        raise ValueError(f"{name} has shape {list(ids.shape)}; expected [{total}], one a token")
    return ids.to(torch.int64)
