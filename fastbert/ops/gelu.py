"""GELU (Hendrycks and Gimpel 2016), alone and with the bias before it."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastbert import reference
from fastbert.ops._common import (
    check_choice,
    check_device,
    check_floating,
    check_vector,
    empty_gradients,
    or_none,
    parameter_for,
    wants_grad,
)
from fastbert.ops._registry import CPU_DTYPES, CUDA_DTYPES, Implementation, Operation, register

APPROXIMATIONS = ("none", "tanh", "quick")


def _fake(x: Tensor, bias: Tensor | None, approximate: str) -> Tensor:
    return x.new_empty(x.shape)


def _fake_backward(
    grad_y: Tensor, x: Tensor, bias: Tensor | None, approximate: str, needs: list[bool]
) -> tuple[Tensor, ...]:
    return empty_gradients(x, needs)


_forward = register(
    Operation(
        "bias_gelu",
        "(Tensor x, Tensor? bias, str approximate) -> Tensor",
        reference.bias_gelu,
        _fake,
        cpu=Implementation("C++", "fastbert.cpu.gelu:bias_gelu", CPU_DTYPES),
        cuda=Implementation("Triton", "fastbert.kernels.gelu:bias_gelu", CUDA_DTYPES),
    )
)
_backward = register(
    Operation(
        "bias_gelu_backward",
        "(Tensor grad_y, Tensor x, Tensor? bias, str approximate, bool[2] needs) -> (Tensor dx, Tensor dbias)",
        reference.bias_gelu_backward,
        _fake_backward,
        cpu=Implementation("C++", "fastbert.cpu.gelu:bias_gelu_backward", CPU_DTYPES),
        cuda=Implementation("Triton", "fastbert.kernels.gelu:bias_gelu_backward", CUDA_DTYPES),
    )
)


class _BiasGelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, approximate: str) -> Tensor:
        ctx.save_for_backward(x, bias)
        ctx.approximate = approximate
        return _forward(x, bias, approximate)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, bias = ctx.saved_tensors
        needs = list(ctx.needs_input_grad[:2])
        dx, dbias = _backward(grad_y, x, bias, ctx.approximate, needs)
        return or_none(dx, needs[0]), or_none(dbias, needs[1], None if bias is None else bias.dtype), None


def gelu(input: Tensor, approximate: str = "none") -> Tensor:
    """GELU, as ``torch.nn.functional.gelu``; ``approximate`` also takes "quick" (x · sigmoid(1.702 x)).

    Args:
        input: any shape with at least one dimension, floating point.
        approximate: "none" (erf), "tanh" or "quick".

    Raises:
        TypeError: input is not floating point.
        ValueError: the approximation is unknown.
    """
    return _bias_gelu("gelu", input, None, approximate)


def bias_gelu(input: Tensor, bias: Tensor | None, approximate: str = "none") -> Tensor:
    """``gelu(input + bias)`` in one pass.

    Args:
        input: [..., width], the output of a product without its bias.
        bias: [width], in input's dtype or float32.
        approximate: "none" (erf), "tanh" or "quick".

    Raises:
        TypeError: input is not floating point.
        ValueError: shapes or devices do not fit, or the approximation is unknown.
    """
    return _bias_gelu("bias_gelu", input, bias, approximate)


def _bias_gelu(function: str, input: Tensor, bias: Tensor | None, approximate: str) -> Tensor:
    check_floating(function, "input", input)
    check_choice(function, "approximate", approximate, APPROXIMATIONS)
    x = input if input.dim() else input.reshape(1)
    check_vector(function, "bias", bias, x.shape[-1])
    check_device(function, "input", x, bias=bias)
    bias = parameter_for(x, bias)
    y = _BiasGelu.apply(x, bias, approximate) if wants_grad(x, bias) else _forward(x, bias, approximate)
    return y.reshape(input.shape)
