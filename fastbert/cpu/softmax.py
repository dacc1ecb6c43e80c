"""Softmax with its scale, mask and causality, in C++ (csrc/cpu/softmax*.cpp)."""

import torch
from torch import Tensor  # torch comes first: the extension then shares its OpenMP threads

from fastbert import _C
from fastbert.cpu._launch import address, check_like, dtype_number, empty_result, matrix, row_count

# Numbers of csrc/cpu/softmax.h's enum MaskType; 0 is no mask.
_MASK_TYPES = {torch.bool: 1, torch.float32: 2, torch.bfloat16: 3}


def softmax(
    x: Tensor,  # [..., rows, columns] (rows may be missing unless causal)
    mask: Tensor | None,  # broadcastable to x: bool, True = keep, or additive
    scale: float,
    causal: bool,  # row i keeps columns j <= i
) -> Tensor:
    """softmax(scale * x + mask) over the last dimension; a row with nothing to keep gives zeros.

    Args:
        x: float32 or bfloat16, any strides.
        mask: bool or floating point, any strides.

    Raises:
        NotImplementedError: x has another dtype.
        TypeError: mask is neither bool nor floating point.
        ValueError: mask does not broadcast to x, or x is causal and has no rows.
    """
    dtype = dtype_number("softmax", x)
    columns = x.shape[-1]
    if causal and x.dim() < 2:
        raise ValueError(f"softmax: x is {list(x.shape)}; causal needs rows and columns")
    sizes: list[int] = []
    strides: list[int] = []
    mask_type = 0
    if mask is not None:
        mask = _with_dense_rows(mask, x)
        mask_type = _MASK_TYPES[mask.dtype]
        sizes, strides = list(x.shape[:-1]), list(mask.stride()[:-1])
    y = empty_result(x)
    rows, (source, stride) = row_count(x), matrix(x)
    _C.softmax(
        dtype,
        rows,
        columns,
        source.data_ptr(),
        stride,
        scale,
        address(mask),
        mask_type,
        sizes,
        strides,
        x.shape[-2] if causal else 0,
        y.data_ptr(),
        torch.get_num_threads(),
    )
    return y


def _with_dense_rows(mask: Tensor, x: Tensor) -> Tensor:
    """The mask expanded to x's shape, its rows one run of memory; a copy of those it really has where they are not."""
    if mask.dtype not in _MASK_TYPES:
        if not mask.is_floating_point():
            raise TypeError(f"softmax: mask is {mask.dtype}; expected torch.bool (True = keep) or floating point")
        mask = mask.float()
    if mask.device != x.device:
        raise ValueError(f"softmax: mask is on {mask.device}; expected it on {x.device}")
    if mask.dim() == 0 or (mask.stride(-1) != 1 and x.shape[-1] > 1) or mask.shape[-1] != x.shape[-1]:
        if mask.shape[-1:] not in ((), (1,), x.shape[-1:]):
            raise ValueError(f"softmax: mask is {list(mask.shape)}; it must broadcast to {list(x.shape)}")
        mask = mask.expand(*mask.shape[:-1], x.shape[-1]).contiguous()
    try:
        return mask.expand(x.shape)
    except RuntimeError as error:
        raise ValueError(f"softmax: mask is {list(mask.shape)}; it must broadcast to {list(x.shape)}") from error


def softmax_backward(
    grad_y: Tensor,  # [..., columns]
    y: Tensor,  # [..., columns]
    scale: float,
) -> Tensor:
    """dx [..., columns].

    Raises:
        NotImplementedError: y is neither float32 nor bfloat16.
        ValueError: grad_y is not like y.
    """
    dtype = dtype_number("softmax_backward", y)
    check_like("softmax_backward", "grad_y", grad_y, y)
    dx = empty_result(y)
    rows, columns = row_count(y), y.shape[-1]
    (grad_y, grad_y_stride), (source, stride) = matrix(grad_y), matrix(y)
    _C.softmax_backward(
        dtype,
        rows,
        columns,
        grad_y.data_ptr(),
        grad_y_stride,
        source.data_ptr(),
        stride,
        scale,
        dx.data_ptr(),
        torch.get_num_threads(),
    )
    return dx
