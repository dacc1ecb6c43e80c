"""GELU behind a bias, in C++ (csrc/cpu/gelu*.cpp)."""

import torch
from torch import Tensor  # torch comes first: the extension then shares its OpenMP threads

from fastbert import _C
from fastbert.cpu._launch import (
    ACTIVATION_NUMBERS,
    address,
    check_like,
    dtype_number,
    empty_result,
    matrix,
    nothing,
    parameters_dtype,
    row_count,
    vector,
)
from fastbert.reference import GELU_BY_APPROXIMATION

_NUMBERS = {name: ACTIVATION_NUMBERS[gelu] for name, gelu in GELU_BY_APPROXIMATION.items()}


def _number(operation: str, approximate: str) -> int:
    number = _NUMBERS.get(approximate)
    if number is None:
        raise ValueError(
            f"{operation}: approximate is {approximate!r}; expected one of {', '.join(map(repr, _NUMBERS))}"
        )
    return number


def bias_gelu(
    x: Tensor,  # [..., width]
    bias: Tensor | None,  # [width]
    approximate: str,  # "none" (erf), "tanh", "quick"
) -> Tensor:
    """gelu(x + bias), [..., width].

    Args:
        x: float32 or bfloat16, any strides.
        bias: x's dtype or float32.

    Raises:
        NotImplementedError: x has another dtype.
        TypeError: the dtype of bias.
        ValueError: the length of bias, or the approximation.
    """
    dtype = dtype_number("bias_gelu", x)
    bias_dtype = parameters_dtype("bias_gelu", x, bias)
    gelu = _number("bias_gelu", approximate)
    width = x.shape[-1]
    bias = vector("bias_gelu", "bias", bias, width)
    y = empty_result(x)
    rows, (source, stride) = row_count(x), matrix(x)
    _C.bias_gelu(
        dtype,
        gelu,
        rows,
        width,
        source.data_ptr(),
        stride,
        address(bias),
        bias_dtype,
        y.data_ptr(),
        torch.get_num_threads(),
    )
    return y


def bias_gelu_backward(
    grad_y: Tensor,  # [..., width]
    x: Tensor,  # [..., width]
    bias: Tensor | None,  # [width]
    approximate: str,
    needs: list[bool],  # dx, dbias
) -> tuple[Tensor, Tensor]:
    """dx [..., width] in x's dtype; dbias [width] float32; [0] for what is not needed. Raises as bias_gelu does."""
    operation = "bias_gelu_backward"
    dtype = dtype_number(operation, x)
    bias_dtype = parameters_dtype(operation, x, bias)
    gelu = _number(operation, approximate)
    check_like(operation, "grad_y", grad_y, x)
    rows, width = row_count(x), x.shape[-1]
    bias = vector(operation, "bias", bias, width)
    dx = empty_result(x) if needs[0] else nothing(x.dtype)
    dbias = torch.empty(width, dtype=torch.float32) if needs[1] else nothing()
    (grad_y, grad_y_stride), (source, stride) = matrix(grad_y), matrix(x)
    _C.bias_gelu_backward(
        dtype,
        gelu,
        rows,
        width,
        grad_y.data_ptr(),
        grad_y_stride,
        source.data_ptr(),
        stride,
        address(bias),
        bias_dtype,
        dx.data_ptr(),  # 0 when empty
        dbias.data_ptr(),
        torch.get_num_threads(),
    )
    return dx, dbias
