"""Layer norm, alone and behind bias, dropout and residual, in C++ (csrc/cpu/layer_norm*.cpp)."""

import torch
from torch import Tensor  # torch comes first: the extension then shares its OpenMP threads

from fastbert import _C
from fastbert.cpu._launch import (
    address,
    check_output,
    dtype_number,
    empty_result,
    empty_statistics,
    matrix,
    nothing,
    parameters_dtype,
    row_count,
    seed_number,
    vector,
)


def layer_norm(
    x: Tensor,  # [..., width]
    weight: Tensor | None,  # [width]
    bias: Tensor | None,  # [width]
    eps: float,
    save_stats: bool,
    *,
    out: Tensor | None = None,  # [..., width]
) -> tuple[Tensor, Tensor, Tensor]:
    """y [..., width], and mean [...], rstd [...] float32 when save_stats, else [0].

    Args:
        x: float32 or bfloat16, any strides.
        weight, bias: x's dtype or float32, both the same.
        out: takes y where given: contiguous, x's shape and dtype. It may be x itself.

    Raises:
        NotImplementedError: x has another dtype.
        TypeError: the dtypes of weight and bias.
        ValueError: ``out`` does not fit.
    """
    dtype = dtype_number("layer_norm", x)
    parameter_dtype = parameters_dtype("layer_norm", x, weight, bias)
    width = x.shape[-1]
    weight, bias = vector("layer_norm", "weight", weight, width), vector("layer_norm", "bias", bias, width)
    if out is None:
        y = empty_result(x)
    else:
        check_output("layer_norm", "out", out, x)
        y = out
    if save_stats:
        mean = empty_statistics(x)
        rstd = torch.empty_like(mean)
    else:
        mean, rstd = nothing(), nothing()
    rows, (source, stride) = row_count(x), matrix(x)
    _C.layer_norm(
        dtype,
        rows,
        width,
        source.data_ptr(),
        stride,
        address(weight),
        address(bias),
        parameter_dtype,
        eps,
        y.data_ptr(),
        mean.data_ptr(),  # 0 when empty
        rstd.data_ptr(),
        torch.get_num_threads(),
    )
    return y, mean, rstd


def layer_norm_backward(
    grad_y: Tensor,  # [..., width]
    x: Tensor,  # [..., width]
    mean: Tensor,  # [...]
    rstd: Tensor,  # [...]
    weight: Tensor | None,  # [width]
    needs: list[bool],  # dx, dweight, dbias
) -> tuple[Tensor, Tensor, Tensor]:
    """dx [..., width] in x's dtype; dweight, dbias [width] float32; [0] for what is not needed."""
    _, dx, _, dweight, dbias = _backward(
        "layer_norm_backward",
        grad_y,
        None,
        x,
        mean,
        rstd,
        weight,
        0.0,
        None,
        0,
        [False, needs[0], False, needs[1], needs[2]],
    )
    return dx, dweight, dbias


def add_layer_norm(
    x: Tensor,  # [..., width]
    residual: Tensor,  # [..., width]
    x_bias: Tensor | None,  # [width]
    weight: Tensor | None,  # [width]
    bias: Tensor | None,  # [width]
    eps: float,
    dropout_p: float,
    seed: Tensor | None,  # int64 [1]
    offset: int,
    save_stats: bool,
    save_sum: bool = True,
    *,
    out: Tensor | None = None,  # [..., width]
    sum_out: Tensor | None = None,  # [..., width]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y and sum = residual + dropout(x + x_bias), both [..., width]; mean [...], rstd [...] as in layer_norm.

    y comes from the sum before it is rounded to x's dtype.

    Args:
        x, residual: float32 or bfloat16, one shape and dtype, any strides.
        x_bias: x's dtype or float32.
        weight, bias: x's dtype or float32, both the same.
        seed, offset: of the dropout stream (fastbert/reference/dropout.py); not read when dropout_p is 0.
        save_sum: False spares the writing of sum, which is then [0].
        out, sum_out: take y and sum where given: contiguous, x's shape and dtype. Each may be x or residual.

    Raises:
        NotImplementedError: x has another dtype.
        TypeError: the dtypes of the parameters.
        ValueError: ``out``, ``sum_out``, the seed, the offset or the shape of residual do not fit.
    """
    dtype = dtype_number("add_layer_norm", x)
    x_bias_dtype = parameters_dtype("add_layer_norm", x, x_bias)
    parameter_dtype = parameters_dtype("add_layer_norm", x, weight, bias)
    if residual.shape != x.shape or residual.dtype is not x.dtype or residual.device != x.device:
        raise ValueError(
            f"add_layer_norm: residual is {tuple(residual.shape)} {residual.dtype}; x is {tuple(x.shape)} {x.dtype}"
        )
    key = seed_number("add_layer_norm", dropout_p, seed, offset)
    width = x.shape[-1]
    x_bias, weight, bias = (
        vector("add_layer_norm", name, parameter, width)
        for name, parameter in (("x_bias", x_bias), ("weight", weight), ("bias", bias))
    )
    if out is None:
        y = empty_result(x)
    else:
        check_output("add_layer_norm", "out", out, x)
        y = out
    if sum_out is not None:
        check_output("add_layer_norm", "sum_out", sum_out, x)
        total = sum_out
    elif save_sum:
        total = empty_result(x)
    else:
        total = nothing(x.dtype)
    if save_stats:
        mean = empty_statistics(x)
        rstd = torch.empty_like(mean)
    else:
        mean, rstd = nothing(), nothing()
    rows, (source, stride), (residual, residual_stride) = row_count(x), matrix(x), matrix(residual)
    _C.add_layer_norm(
        dtype,
        rows,
        width,
        source.data_ptr(),
        stride,
        residual.data_ptr(),
        residual_stride,
        address(x_bias),
        x_bias_dtype,
        address(weight),
        address(bias),
        parameter_dtype,
        eps,
        dropout_p,
        key,
        offset,
        y.data_ptr(),
        total.data_ptr(),
        mean.data_ptr(),
        rstd.data_ptr(),
        torch.get_num_threads(),
    )
    return y, total, mean, rstd


def add_layer_norm_backward(
    grad_y: Tensor,  # [..., width]
    grad_sum: Tensor | None,  # [..., width]
    sum: Tensor,  # [..., width]
    mean: Tensor,  # [...]
    rstd: Tensor,  # [...]
    weight: Tensor | None,  # [width]
    dropout_p: float,
    seed: Tensor | None,  # int64 [1]
    offset: int,
    needs: list[bool],  # dx, dresidual, dx_bias, dweight, dbias
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dx, dresidual [..., width] in sum's dtype; dx_bias, dweight, dbias [width] float32; [0] for what is not needed.

    Without dropout dx equals dresidual: then dx is [0], and dresidual serves whoever needs either.
    """
    return _backward(
        "add_layer_norm_backward", grad_y, grad_sum, sum, mean, rstd, weight, dropout_p, seed, offset, needs
    )


def _backward(
    operation: str,
    grad_y: Tensor,
    grad_sum: Tensor | None,
    sum: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
    offset: int,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dtype = dtype_number(operation, sum)
    parameter_dtype = parameters_dtype(operation, sum, weight)
    for name, gradient in (("grad_y", grad_y), ("grad_sum", grad_sum)):
        if gradient is None:
            continue
        if gradient.shape != sum.shape or gradient.dtype is not sum.dtype or gradient.device != sum.device:
            raise ValueError(
                f"{operation}: {name} is {tuple(gradient.shape)} {gradient.dtype}; the tensor it belongs to is "
                f"{tuple(sum.shape)} {sum.dtype}"
            )
    rows, width = row_count(sum), sum.shape[-1]
    if mean.dtype is not torch.float32 or rstd.dtype is not torch.float32 or {mean.numel(), rstd.numel()} != {rows}:
        raise ValueError(
            f"{operation}: mean is {list(mean.shape)} {mean.dtype} and rstd {list(rstd.shape)} {rstd.dtype}; expected "
            f"{rows} elements of torch.float32 each. Call the forward operation with save_stats=True."
        )
    key = seed_number(operation, dropout_p, seed, offset)
    needs_dx = needs[0] and dropout_p > 0.0
    needs_dresidual = needs[1] or (needs[0] and dropout_p == 0.0)

    def matrix_result(needed: bool) -> Tensor:
        return empty_result(sum) if needed else nothing(sum.dtype)

    def vector_result(needed: bool) -> Tensor:
        return torch.empty(width, dtype=torch.float32) if needed else nothing()

    dx, dresidual = matrix_result(needs_dx), matrix_result(needs_dresidual)
    dx_bias, dweight, dbias = vector_result(needs[2]), vector_result(needs[3]), vector_result(needs[4])
    weight = vector(operation, "weight", weight, width)
    mean, rstd = mean.contiguous(), rstd.contiguous()
    (grad_y, grad_y_stride), (source, stride) = matrix(grad_y), matrix(sum)
    grad_sum_stride = 0
    if grad_sum is not None:
        grad_sum, grad_sum_stride = matrix(grad_sum)
    _C.add_layer_norm_backward(
        dtype,
        rows,
        width,
        grad_y.data_ptr(),
        grad_y_stride,
        address(grad_sum),
        grad_sum_stride,
        source.data_ptr(),
        stride,
        mean.data_ptr(),
        rstd.data_ptr(),
        address(weight),
        parameter_dtype,
        dropout_p,
        key,
        offset,
        dx.data_ptr(),  # 0 when empty
        dresidual.data_ptr(),
        dx_bias.data_ptr(),
        dweight.data_ptr(),
        dbias.data_ptr(),
        torch.get_num_threads(),
    )
    return dx, dresidual, dx_bias, dweight, dbias
