"""Linear layers on prepacked weights, in C++ (csrc/cpu/linear*)."""

import torch
from torch import Tensor  # torch comes first: the extension then shares its OpenMP threads
from torch.nn import Parameter

from fastbert import _C, reference
from fastbert.cpu._launch import ACTIVATION_NUMBERS, DTYPE_NUMBERS, address, matrix, nothing
from fastbert.cpu.gelu import bias_gelu_backward
from fastbert.cpu.packed_weights import PRECISIONS, PackedWeight, is_cacheable, packed_weight

_GELUS = {activation: approximation for approximation, activation in reference.GELU_BY_APPROXIMATION.items()}
_PRODUCT = {torch.float32: "fp32", torch.bfloat16: "bf16"}  # what a product of tensors of this dtype is, unreduced


def linear_act(
    x: Tensor,  # [..., in]
    weight: Tensor,  # [out, in]
    bias: Tensor | None,  # [out]
    activation: str,
    save_pre: bool,
) -> tuple[Tensor, Tensor]:
    """As reference.linear_act. A Parameter is packed once and then read packed, but not where a gradient follows (save_pre)."""
    if save_pre or not _is_packed(x, weight):
        return reference.linear_act(x, weight, bias, activation, save_pre)
    packed = packed_weight(_PRODUCT[x.dtype], weight)
    return multiply(x, packed, bias, activation, None, x.dtype), nothing(x.dtype)


def linear_act_backward(
    grad_y: Tensor,  # [..., out]
    x: Tensor,  # [..., in]
    weight: Tensor,  # [out, in]
    pre: Tensor,  # [..., out]; not read when activation is "none"
    activation: str,
    needs: list[bool],  # dx, dweight, dbias
) -> tuple[Tensor, Tensor, Tensor]:
    """As reference.linear_act_backward, whose products are torch's; GELU's gradient and the bias's in one pass of ours."""
    approximation = _GELUS.get(activation)
    if approximation is None:
        return reference.linear_act_backward(grad_y, x, weight, pre, activation, needs)
    d_pre, d_bias = bias_gelu_backward(grad_y, pre, None, approximation, [needs[0] or needs[1], needs[2]])
    if not (needs[0] or needs[1]):
        return nothing(x.dtype), nothing(weight.dtype), d_bias
    dx, d_weight, _ = reference.linear_act_backward(d_pre, x, weight, pre, "none", [*needs[:2], False])
    return dx, d_weight, d_bias


def linear_residual(
    x: Tensor,  # [..., in]
    weight: Tensor,  # [out, in]
    bias: Tensor | None,  # [out]
    residual: Tensor,  # [..., out]
) -> Tensor:
    """As reference.linear_residual, with weights packed as those of linear_act."""
    if not _is_packed(x, weight):
        return reference.linear_residual(x, weight, bias, residual)
    return multiply(x, packed_weight(_PRODUCT[x.dtype], weight), bias, "none", residual, x.dtype)


def linear_reduced(
    x: Tensor,  # [..., in]
    weight: Tensor,  # [out, in]
    bias: Tensor | None,  # [out]
    activation: str,
    residual: Tensor | None,  # [..., out]
    precision: str,
    dtype: torch.dtype,
) -> Tensor:
    """As reference.linear_reduced, with weights packed in the precision."""
    if weight.dim() != 2 or weight.dtype not in DTYPE_NUMBERS or not weight.is_cpu or dtype not in DTYPE_NUMBERS:
        raise ValueError(
            f"linear_reduced: weight is {list(weight.shape)} {weight.dtype} on {weight.device} and the result {dtype}; expected "
            "[out, in] on the CPU, and float32 or bfloat16 for both"
        )
    return multiply(x, packed_weight(precision, weight), bias, activation, residual, dtype)


def _is_packed(x: Tensor, weight: Tensor) -> bool:
    # Another tensor may be new at every call (a cast, a slice), and packing costs more than a small product. Without vector
    # instructions of ours torch's product is the faster one.
    return (
        isinstance(weight, Parameter)
        and weight.dtype is x.dtype
        and x.dtype in _PRODUCT
        and is_cacheable(weight)
        and _C.isa() != "baseline"
    )


def multiply(
    x: Tensor,  # [..., in] float32 or bfloat16
    packed: PackedWeight,
    bias: Tensor | None,  # [out]
    activation: str,
    residual: Tensor | None,  # [..., out]
    dtype: torch.dtype,
) -> Tensor:
    """activation(x weightᵀ + bias) + residual, [..., out] in dtype, which is float32 or bfloat16."""
    shape = (*x.shape[:-1], packed.out)
    if x.shape[-1] != packed.in_features or not x.is_cpu:
        raise ValueError(f"linear: x is {list(x.shape)} on {x.device}; expected [..., {packed.in_features}] on the CPU")
    for name, other, expected in (("bias", bias, shape[-1:]), ("residual", residual, shape)):
        if other is not None and (other.shape != expected or not other.is_cpu or other.dtype not in DTYPE_NUMBERS):
            raise ValueError(
                f"linear: {name} is {list(other.shape)} {other.dtype} on {other.device}; expected {list(expected)} float32 or "
                "bfloat16 on the CPU"
            )
    if packed.in_features == 0:
        zeros = x.new_zeros(shape, dtype=torch.float32)
        pre = zeros if bias is None else zeros + bias
        y = reference.ACTIVATIONS[activation][0](pre)
        return (y if residual is None else y + residual).to(dtype)
    if packed.precision == "fp32" and x.dtype is not torch.float32:
        x = x.float()
    x, stride = matrix(x)
    y = torch.empty(shape, dtype=dtype)
    residual_stride = 0
    if residual is not None:
        residual, residual_stride = matrix(residual)
    if bias is not None:
        bias = bias.contiguous()
    _C.linear(
        PRECISIONS[packed.precision],
        x.numel() // packed.in_features,
        packed.out,
        packed.in_features,
        x.data_ptr(),
        DTYPE_NUMBERS[x.dtype],
        stride,
        packed.address,
        address(bias),
        0 if bias is None else DTYPE_NUMBERS[bias.dtype],
        ACTIVATION_NUMBERS[activation],
        address(residual),
        0 if residual is None else DTYPE_NUMBERS[residual.dtype],
        residual_stride,
        y.data_ptr(),
        DTYPE_NUMBERS[dtype],
        packed.out,
        torch.get_num_threads(),
    )
    return y
