"""A linear layer with what follows it: an activation, or a residual."""

import torch
from torch import Tensor
from torch.nn import functional as F

from fastbert.reference._common import matrix, nothing, sum_over_rows, wide_dtype, widen
from fastbert.reference.elementwise import ACTIVATIONS


def linear_act(
    x: Tensor,  # [..., in]
    weight: Tensor,  # [out, in]
    bias: Tensor | None,  # [out]
    activation: str,
    save_pre: bool,
) -> tuple[Tensor, Tensor]:
    """y = activation(x weightᵀ + bias) [..., out], and the pre-activation [..., out] when save_pre."""
    pre = F.linear(x, weight, bias)
    if activation == "none":
        return pre, nothing(x)
    y = ACTIVATIONS[activation][0](widen(pre)).to(x.dtype)
    return y, pre if save_pre else nothing(x)


def linear_act_backward(
    grad_y: Tensor,  # [..., out]
    x: Tensor,  # [..., in]
    weight: Tensor,  # [out, in]
    pre: Tensor,  # [..., out]; not read when activation is "none"
    activation: str,
    needs: list[bool],  # dx, dweight, dbias
) -> tuple[Tensor, Tensor, Tensor]:
    """dx [..., in] in x's dtype; dweight [out, in] in weight's dtype; dbias [out] wide."""
    d_pre = grad_y
    if activation != "none":
        d_pre = (widen(grad_y) * ACTIVATIONS[activation][1](widen(pre))).to(grad_y.dtype)
    return (
        d_pre @ weight if needs[0] else nothing(x),
        matrix(d_pre).T @ matrix(x) if needs[1] else nothing(weight),
        sum_over_rows(widen(d_pre)) if needs[2] else nothing(x, wide_dtype(x)),
    )


def linear_residual(
    x: Tensor,  # [..., in]
    weight: Tensor,  # [out, in]
    bias: Tensor | None,  # [out]
    residual: Tensor,  # [..., out]
) -> Tensor:
    """x weightᵀ + bias + residual, [..., out]. Its gradient is linear_act_backward's with activation "none"."""
    return F.linear(x, weight, bias) + residual


PRECISIONS = ("fp32", "bf16", "int8")

_LARGEST_INTEGER = 127.0


def quantize_rows(
    x: Tensor,  # [..., width]
) -> tuple[Tensor, Tensor]:
    """Integers of at most 127 in magnitude [..., width], and scales [..., 1]: x ≈ integers * scale, both float32.

    Symmetric: scale = max|row| / 127, integer = round(x * (127 / max|row|)), ties to even, in float32. A row of zeros has scale
    0, and so has one so small that 127 / max|row| overflows. A row that is not finite has scale NaN.
    """
    x = x.float()
    largest = x.abs().amax(-1, keepdim=True) if x.shape[-1] else x.new_zeros((*x.shape[:-1], 1))
    inverse = _LARGEST_INTEGER / largest
    usable = largest.isfinite() & inverse.isfinite()
    integers = (x * inverse).round().masked_fill(~usable, 0.0)
    scale = (largest / _LARGEST_INTEGER).masked_fill(inverse.isinf(), 0.0).masked_fill(~largest.isfinite(), torch.nan)
    return integers, scale


def linear_reduced(
    x: Tensor,  # [..., in]
    weight: Tensor,  # [out, in]
    bias: Tensor | None,  # [out]
    activation: str,
    residual: Tensor | None,  # [..., out]
    precision: str,
    dtype: torch.dtype,
) -> Tensor:
    """activation(x weightᵀ + bias) + residual, [..., out] in dtype, of a product in reduced precision.

    "bf16": x and weight are rounded to bfloat16, their products summed in float32.
    "int8": each row of x (a token) and of weight (an output channel) is quantized as ``quantize_rows`` says; the integers' sum is
    exact, and multiplied by both scales.
    Bias, activation and residual are float32.
    """
    wide = wide_dtype(x)
    if precision == "bf16":
        pre = F.linear(x.bfloat16().to(wide), weight.bfloat16().to(wide))
    elif precision == "int8":
        x_integers, x_scale = quantize_rows(x)
        weight_integers, weight_scale = quantize_rows(weight)
        exact = F.linear(x_integers.double(), weight_integers.double())  # beyond 2²⁴, where float32 loses integers
        pre = exact.to(wide) * (x_scale.to(wide) * weight_scale.to(wide).T)
    else:
        pre = F.linear(x.to(wide), weight.to(wide))
    if bias is not None:
        pre = pre + bias.to(wide)
    y = ACTIVATIONS[activation][0](pre)
    return (y if residual is None else y + residual.to(wide)).to(dtype)
