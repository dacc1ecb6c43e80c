"""Rows of a padded batch gathered into a packed one, and put back; each is the other's gradient. For ``fastbert.packing``."""

from typing import Any

import torch
from torch import Tensor

from fastbert import reference
from fastbert.ops._common import wants_grad
from fastbert.ops._registry import Implementation, Operation, register
from fastbert.ops.block import answers_directly

# The kernels move elements of up to eight bytes, whatever they mean; float64 is the reference's, as everywhere.
_CUDA_DTYPES = (
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
)
_MASKS = (torch.bool, torch.uint8, torch.int8, torch.int32, torch.int64)


def _fake_pack(padded: Tensor, indices: Tensor) -> Tensor:
    return padded.new_empty((indices.shape[0], *padded.shape[1:]))


def _fake_unpack(packed: Tensor, indices: Tensor, padded_rows: int, padding_value: float) -> Tensor:
    return packed.new_empty((padded_rows, *packed.shape[1:]))


def _check_indices(operation: str, indices: Tensor, padded_rows: int) -> None:
    if indices.numel() == 0:
        return
    if bool((indices.diff() <= 0).any()):
        raise ValueError(f"{operation}: indices do not ascend; expected each token's row after that of the one before")
    first, last = int(indices[0]), int(indices[-1])
    if first < 0 or last >= padded_rows:
        raise IndexError(f"{operation}: indices run from {first} to {last}; the padded batch has {padded_rows} rows")


def _check_pack(padded: Tensor, indices: Tensor) -> None:
    _check_indices("pack", indices, padded.shape[0])


def _check_unpack(packed: Tensor, indices: Tensor, padded_rows: int, padding_value: float) -> None:
    _check_indices("unpack", indices, padded_rows)


_pack = register(
    Operation(
        "pack",
        "(Tensor padded, Tensor indices) -> Tensor",
        reference.pack,
        _fake_pack,
        cuda=Implementation("Triton", "fastbert.kernels.pack:pack", _CUDA_DTYPES),
        check_values=_check_pack,
    )
)
_unpack = register(
    Operation(
        "unpack",
        "(Tensor packed, Tensor indices, SymInt padded_rows, Scalar padding_value) -> Tensor",
        reference.unpack,
        _fake_unpack,
        cuda=Implementation("Triton", "fastbert.kernels.pack:unpack", _CUDA_DTYPES),
        check_values=_check_unpack,
    )
)


class _Pack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, padded: Tensor, indices: Tensor) -> Tensor:
        ctx.save_for_backward(indices)
        ctx.padded_rows = padded.shape[0]
        return _pack(padded, indices)

    @staticmethod
    def backward(ctx: Any, grad_packed: Tensor) -> tuple[Tensor | None, ...]:
        (indices,) = ctx.saved_tensors
        return unpack_rows(grad_packed, indices, ctx.padded_rows), None


class _Unpack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, packed: Tensor, indices: Tensor, padded_rows: int, padding_value: float) -> Tensor:
        ctx.save_for_backward(indices)
        return _unpack(packed, indices, padded_rows, padding_value)

    @staticmethod
    def backward(ctx: Any, grad_padded: Tensor) -> tuple[Tensor | None, ...]:
        (indices,) = ctx.saved_tensors
        return pack_rows(grad_padded, indices), None, None, None


def pack_rows(padded: Tensor, indices: Tensor) -> Tensor:
    """``padded[indices]``: [rows, ...] and ascending int64 [total] → [total, ...]. No synchronisation on an accelerator.

    Raises:
        IndexError: an index outside the rows (looked at on CPU, and under ``fastbert.debug()`` elsewhere).
        ValueError: indices that do not ascend, likewise.
    """
    return _Pack.apply(padded, indices) if wants_grad(padded) else _pack(padded, indices)


def unpack_rows(packed: Tensor, indices: Tensor, padded_rows: int, padding_value: float = 0) -> Tensor:
    """The inverse: [total, ...] → [padded_rows, ...] with ``padding_value`` in rows without a token. Raises as pack_rows."""
    if wants_grad(packed):
        return _Unpack.apply(packed, indices, padded_rows, padding_value)
    return _unpack(packed, indices, padded_rows, padding_value)


def mask_lengths(mask: Tensor) -> list[int] | None:
    """Ones in each row of a mask [batch, seq], from the extension; None where it cannot answer, or finds more than 0 and 1."""
    if not (answers_directly(mask) and mask.is_cpu and mask.is_contiguous() and mask.dtype in _MASKS):
        return None
    from fastbert import _C

    return _C.mask_lengths(mask.element_size(), mask.data_ptr(), *mask.shape)
