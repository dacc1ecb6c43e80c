"""Dropout from one counter-based random stream, so that every implementation draws the same mask.

Philox4x32-10: J. Salmon, M. Moraes, R. Dror, D. Shaw, "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011.
"""

import math

import torch
from torch import Tensor

_MASK32 = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_INCREMENTS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


def philox(counter: Tensor, seed: Tensor) -> Tensor:
    """Philox4x32-10 words of the counters (low32(counter), high32(counter), 0, 0) under the key ``seed``.

    Args:
        counter: int64 of any shape.
        seed: int64, one element; its 64 bits are the key.

    Returns:
        int64 [*counter.shape, 4], each word in [0, 2**32).
    """
    # int64 multiplication wraps modulo 2**64, and the masks take the two halves out of the two's complement product.
    c0, c1 = counter & _MASK32, (counter >> 32) & _MASK32
    c2, c3 = torch.zeros_like(counter), torch.zeros_like(counter)
    key = seed.reshape(())
    k0, k1 = key & _MASK32, (key >> 32) & _MASK32
    for _ in range(_ROUNDS):
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((product1 >> 32) & _MASK32) ^ c1 ^ k0,
            product1 & _MASK32,
            ((product0 >> 32) & _MASK32) ^ c3 ^ k1,
            product0 & _MASK32,
        )
        k0, k1 = (k0 + _KEY_INCREMENTS[0]) & _MASK32, (k1 + _KEY_INCREMENTS[1]) & _MASK32
    return torch.stack((c0, c1, c2, c3), dim=-1)


def dropout_mask(shape: tuple[int, ...], dropout_p: float, seed: Tensor, offset: int, dtype: torch.dtype) -> Tensor:
    """The factor each element of a tensor is multiplied by: 0 where dropped, 1 / (1 - dropout_p) where kept.

    Element (row, column) of the tensor as a matrix [rows, shape[-1]] has the stream index
    ``n = offset + row * ceil4(shape[-1]) + column``, where ceil4 rounds up to a multiple of four; its word is
    ``philox(n // 4)[n % 4]``, and it is kept where ``word >= round(dropout_p * 2**32)``. One Philox call thus serves four
    neighbours of a row.

    Args:
        shape: at least one dimension.
        dropout_p: in [0, 1].
        seed: int64, one element, on the device of the result.
        offset: a multiple of 4.
        dtype: of the result.
    """
    rows = torch.arange(math.prod(shape[:-1]), device=seed.device)
    return dropout_mask_of_rows(rows, shape[-1], shape[-1], dropout_p, seed, offset, dtype).reshape(shape)


def dropout_mask_of_rows(
    rows: Tensor, columns: int, width: int, dropout_p: float, seed: Tensor, offset: int, dtype: torch.dtype
) -> Tensor:
    """The first ``columns`` columns of some rows, int64 of any shape, of the mask of a matrix [..., width]."""
    groups = (columns + 3) // 4
    threshold = min(round(dropout_p * 2**32), 2**32 - 1)
    scale = 0.0 if dropout_p == 1.0 else 1.0 / (1.0 - dropout_p)
    first = offset // 4 + rows * ((width + 3) // 4)
    counters = first.unsqueeze(-1) + torch.arange(groups, device=seed.device)
    words = philox(counters, seed).flatten(-2)[..., :columns]
    return (words >= threshold).to(dtype) * scale
