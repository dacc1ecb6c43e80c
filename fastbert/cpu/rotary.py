"""Rotary position embedding, in C++ (csrc/cpu/rotary*.cpp)."""

import torch
from torch import Tensor  # torch comes first: the extension then shares its OpenMP threads

from fastbert import _C
from fastbert.cpu._launch import DTYPE_NUMBERS, address, dtype_number, empty_result


def rotary(
    x: Tensor,  # [tokens, heads, head_dim] or [batch, seq, heads, head_dim]
    cos: Tensor,  # [positions, rotary_dim / 2]
    sin: Tensor,  # [positions, rotary_dim / 2]
    position_ids: Tensor | None,  # int [tokens] or [batch, seq]; None: 0, 1, … along the dimension before the heads
    interleaved: bool,
    inverse: bool,
) -> Tensor:
    """x rotated by its position's angles, or back.

    Args:
        x: float32 or bfloat16, any strides: the queries or keys of a packed product are read where they are.
        cos, sin: floating point.
        position_ids: not looked at here: the operator has checked them against the tables.

    Raises:
        NotImplementedError: x has another dtype.
        ValueError: shapes do not fit.
    """
    dtype = dtype_number("rotary", x)
    if x.dim() not in (3, 4) or cos.dim() != 2 or sin.shape != cos.shape or 2 * cos.shape[1] > x.shape[-1]:
        raise ValueError(
            f"rotary: x is {list(x.shape)}, cos {list(cos.shape)} and sin {list(sin.shape)}; expected [tokens, heads, "
            "head_dim] or [batch, seq, heads, head_dim] and twice [positions, at most head_dim / 2]"
        )
    if position_ids is None:
        if x.shape[-3] > cos.shape[0]:
            raise ValueError(f"rotary: x has {x.shape[-3]} positions; the tables have {cos.shape[0]}")
    elif position_ids.shape != x.shape[:-2]:
        raise ValueError(f"rotary: position_ids are {list(position_ids.shape)}; expected {list(x.shape[:-2])}")
    else:
        position_ids = position_ids.to(torch.int64).contiguous()
    if cos.dtype is not sin.dtype or cos.dtype not in DTYPE_NUMBERS:
        cos, sin = cos.float(), sin.float()
    cos, sin = (t if t.stride(1) == 1 else t.contiguous() for t in (cos, sin))
    y = empty_result(x)
    if x.stride(-1) != 1:
        x = x.contiguous()
    batch, batch_stride = (x.shape[0], x.stride(0)) if x.dim() == 4 else (1, 0)
    seq, heads, head_dim = x.shape[-3:]
    _C.rotary(
        dtype,
        batch,
        seq,
        heads,
        head_dim,
        x.data_ptr(),
        batch_stride,
        x.stride(-3),
        x.stride(-2),
        cos.shape[1],
        cos.data_ptr(),
        sin.data_ptr(),
        DTYPE_NUMBERS[cos.dtype],
        cos.stride(0),
        sin.stride(0),
        address(position_ids),
        interleaved,
        inverse,
        y.data_ptr(),
        torch.get_num_threads(),
    )
    return y
