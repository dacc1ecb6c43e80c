"""RMS norm, in C++ (csrc/cpu/rms_norm*.cpp)."""

import torch
from torch import Tensor  # torch comes first: the extension then shares its OpenMP threads

from fastbert import _C
from fastbert.cpu._launch import (
    address,
    check_like,
    dtype_number,
    empty_result,
    empty_statistics,
    matrix,
    nothing,
    parameters_dtype,
    row_count,
    vector,
)


def rms_norm(
    x: Tensor,  # [..., width]
    weight: Tensor | None,  # [width]
    eps: float,
    save_stats: bool,
) -> tuple[Tensor, Tensor]:
    """y [..., width], and rstd [...] float32 when save_stats, else [0].

    Args:
        x: float32 or bfloat16, any strides.
        weight: x's dtype or float32.

    Raises:
        NotImplementedError: x has another dtype.
        TypeError: the dtype of weight.
        ValueError: the length of weight.
    """
    dtype = dtype_number("rms_norm", x)
    weight_dtype = parameters_dtype("rms_norm", x, weight)
    rows, width = row_count(x), x.shape[-1]
    weight = vector("rms_norm", "weight", weight, width)
    y = empty_result(x)
    rstd = empty_statistics(x) if save_stats else nothing()
    source, stride = matrix(x)
    _C.rms_norm(
        dtype,
        rows,
        width,
        source.data_ptr(),
        stride,
        address(weight),
        weight_dtype,
        eps,
        y.data_ptr(),
        rstd.data_ptr(),  # 0 when empty
        torch.get_num_threads(),
    )
    return y, rstd


def rms_norm_backward(
    grad_y: Tensor,  # [..., width]
    x: Tensor,  # [..., width]
    rstd: Tensor,  # [...]
    weight: Tensor | None,  # [width]
    needs: list[bool],  # dx, dweight
) -> tuple[Tensor, Tensor]:
    """dx [..., width] in x's dtype; dweight [width] float32; [0] for what is not needed. Raises as rms_norm does."""
    operation = "rms_norm_backward"
    dtype = dtype_number(operation, x)
    weight_dtype = parameters_dtype(operation, x, weight)
    check_like(operation, "grad_y", grad_y, x)
    rows, width = row_count(x), x.shape[-1]
    weight = vector(operation, "weight", weight, width)
    if rstd.dtype is not torch.float32 or rstd.numel() != rows:
        raise ValueError(
            f"{operation}: rstd is {list(rstd.shape)} {rstd.dtype}; expected {rows} elements of torch.float32. Call the "
            "forward operation with save_stats=True."
        )
    rstd = rstd.contiguous()
    dx = empty_result(x) if needs[0] else nothing(x.dtype)
    dweight = torch.empty(width, dtype=torch.float32) if needs[1] else nothing()
    (grad_y, grad_y_stride), (source, stride) = matrix(grad_y), matrix(x)
    _C.rms_norm_backward(
        dtype,
        rows,
        width,
        grad_y.data_ptr(),
        grad_y_stride,
        source.data_ptr(),
        stride,
        rstd.data_ptr(),
        address(weight),
        weight_dtype,
        dx.data_ptr(),  # 0 when empty
        dweight.data_ptr(),
        torch.get_num_threads(),
    )
    return dx, dweight
