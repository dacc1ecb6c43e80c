"""Layer norm over the last dimensions."""

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastbert import reference
from fastbert.ops._common import (
    check_device,
    check_floating,
    check_vector,
    empty_gradients,
    norm_parameters,
    or_none,
    wants_grad,
)
from fastbert.ops._registry import CPU_DTYPES, CUDA_DTYPES, Implementation, Operation, register
from fastbert.reference import wide_dtype


def _fake(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, save_stats: bool
) -> tuple[Tensor, Tensor, Tensor]:
    stats = x.shape[:-1] if save_stats else (0,)
    wide = wide_dtype(x)
    return x.new_empty(x.shape), x.new_empty(stats, dtype=wide), x.new_empty(stats, dtype=wide)


def _fake_backward(
    grad_y: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, needs: list[bool]
) -> tuple[Tensor, ...]:
    return empty_gradients(x, needs)


_forward = register(
    Operation(
        "layer_norm",
        "(Tensor x, Tensor? weight, Tensor? bias, float eps, bool save_stats) -> (Tensor y, Tensor mean, Tensor rstd)",
        reference.layer_norm,
        _fake,
        cpu=Implementation("C++", "fastbert.cpu.layer_norm:layer_norm", CPU_DTYPES),
        cuda=Implementation("Triton", "fastbert.kernels.layer_norm:layer_norm", CUDA_DTYPES),
    )
)
_backward = register(
    Operation(
        "layer_norm_backward",
        "(Tensor grad_y, Tensor x, Tensor mean, Tensor rstd, Tensor? weight, bool[3] needs)"
        " -> (Tensor dx, Tensor dweight, Tensor dbias)",
        reference.layer_norm_backward,
        _fake_backward,
        cpu=Implementation("C++", "fastbert.cpu.layer_norm:layer_norm_backward", CPU_DTYPES),
        cuda=Implementation("Triton", "fastbert.kernels.layer_norm:layer_norm_backward", CUDA_DTYPES),
    )
)


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
        y, mean, rstd = _forward(x, weight, bias, eps, True)
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.bias_dtype = None if bias is None else bias.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, rstd = ctx.saved_tensors
        needs = list(ctx.needs_input_grad[:3])
        dx, dweight, dbias = _backward(grad_y, x, mean, rstd, weight, needs)
        return (
            or_none(dx, needs[0]),
            or_none(dweight, needs[1], None if weight is None else weight.dtype),
            or_none(dbias, needs[2], ctx.bias_dtype),
            None,
        )


def layer_norm(
    input: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Layer norm (Ba, Kiros, Hinton 2016), as ``torch.nn.functional.layer_norm``.

    Args:
        input: [..., *normalized_shape], floating point.
        normalized_shape: the trailing dimensions to normalise over.
        weight: [*normalized_shape], in input's dtype or float32.
        bias: as weight.
        eps: added to the variance.

    Returns:
        [..., *normalized_shape] in input's dtype, also under autocast (torch's own returns float32 there).

    Raises:
        TypeError: input is not floating point.
        ValueError: shapes do not fit, or the tensors are on several devices.
    """
    check_floating("layer_norm", "input", input)
    x, (weight, bias) = rows_to_normalise("layer_norm", input, normalized_shape, weight=weight, bias=bias)
    check_norm_arguments("layer_norm", x, weight, bias)
    weight, bias = norm_parameters(x, weight, bias)
    y = (
        _LayerNorm.apply(x, weight, bias, eps)
        if wants_grad(x, weight, bias)
        else _forward(x, weight, bias, eps, False)[0]
    )
    return y if x is input else y.reshape(input.shape)


def rows_to_normalise(
    function: str, input: Tensor, normalized_shape: int | Sequence[int], **parameters: Tensor | None
) -> tuple[Tensor, list[Tensor | None]]:
    """input as [..., width] and the parameters as [width]. Raises where normalized_shape is not that of their last dimensions."""
    shape = tuple(normalized_shape) if isinstance(normalized_shape, Sequence) else (operator.index(normalized_shape),)
    if not shape or tuple(input.shape[-len(shape) :]) != shape:
        raise ValueError(
            f"{function}: normalized_shape is {list(shape)} and input {list(input.shape)}; expected input's last dimensions"
        )
    if len(shape) == 1:
        return input, list(parameters.values())
    return input.flatten(-len(shape)), [_flat(function, name, each, shape) for name, each in parameters.items()]


def _flat(function: str, name: str, parameter: Tensor | None, shape: tuple[int, ...]) -> Tensor | None:
    if parameter is None:
        return None
    check_floating(function, name, parameter)
    if tuple(parameter.shape) != shape:
        raise ValueError(f"{function}: {name} has shape {list(parameter.shape)}; expected {list(shape)}")
    return parameter.flatten()


def check_norm_arguments(function: str, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> None:
    """Raises TypeError or ValueError unless x [..., width] can be normalised with weight and bias [width]."""
    check_floating(function, "input", x)
    width = x.shape[-1] if x.dim() else 0
    if width == 0:
        raise ValueError(
            f"{function}: input has shape {list(x.shape)}; the last dimension must hold at least one feature"
        )
    check_vector(function, "weight", weight, width)
    check_vector(function, "bias", bias, width)
    check_device(function, "input", x, weight=weight, bias=bias)
