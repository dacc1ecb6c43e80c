"""Linear layers with what follows them: an activation, or a residual."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastbert import reference
from fastbert.ops._common import (
    autocast,
    check_choice,
    check_device,
    check_floating,
    check_vector,
    distinct,
    or_none,
    wants_grad,
)
from fastbert.ops._registry import CPU_DTYPES, Implementation, Operation, register
from fastbert.reference import wide_dtype

ACTIVATIONS = tuple(reference.ACTIVATIONS)
PRECISIONS = reference.PRECISIONS
_PACKED = (
    "parameters are packed once and read packed; other weights, and all where a gradient follows, go to torch's product"
)


def _fake_act(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, save_pre: bool) -> tuple[Tensor, Tensor]:
    shape = (*x.shape[:-1], weight.shape[0])
    return x.new_empty(shape), x.new_empty(shape if save_pre and activation != "none" else (0,))


def _fake_act_backward(
    grad_y: Tensor, x: Tensor, weight: Tensor, pre: Tensor, activation: str, needs: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        x.new_empty(x.shape if needs[0] else (0,)),
        weight.new_empty(weight.shape if needs[1] else (0,)),
        x.new_empty(weight.shape[:1] if needs[2] else (0,), dtype=wide_dtype(x)),
    )


def _fake_reduced(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str,
    residual: Tensor | None,
    precision: str,
    dtype: torch.dtype,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=dtype)


def _fake_residual(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor) -> Tensor:
    return x.new_empty(residual.shape)


_act = register(
    Operation(
        "linear_act",
        "(Tensor x, Tensor weight, Tensor? bias, str activation, bool save_pre) -> (Tensor y, Tensor pre)",
        reference.linear_act,
        _fake_act,
        cpu=Implementation("C++", "fastbert.cpu.linear:linear_act", CPU_DTYPES, _PACKED),
    )
)
_act_backward = register(
    Operation(
        "linear_act_backward",
        "(Tensor grad_y, Tensor x, Tensor weight, Tensor pre, str activation, bool[3] needs)"
        " -> (Tensor dx, Tensor dweight, Tensor dbias)",
        reference.linear_act_backward,
        _fake_act_backward,
        cpu=Implementation(
            "C++",
            "fastbert.cpu.linear:linear_act_backward",
            CPU_DTYPES,
            "behind a GELU; products, and what else there is, by torch",
        ),
    )
)
_residual = register(
    Operation(
        "linear_residual",
        "(Tensor x, Tensor weight, Tensor? bias, Tensor residual) -> Tensor",
        reference.linear_residual,
        _fake_residual,
        cpu=Implementation("C++", "fastbert.cpu.linear:linear_residual", CPU_DTYPES, _PACKED),
    )
)
_reduced = register(
    Operation(
        "linear_reduced",
        "(Tensor x, Tensor weight, Tensor? bias, str activation, Tensor? residual, str precision, ScalarType dtype) -> Tensor",
        reference.linear_reduced,
        _fake_reduced,
        cpu=Implementation("C++", "fastbert.cpu.linear:linear_reduced", CPU_DTYPES),
    )
)


class _LinearAct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
        y, pre = _act(x, weight, bias, activation, True)
        ctx.save_for_backward(x, weight, pre)
        ctx.activation = activation
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, pre = ctx.saved_tensors
        needs = list(ctx.needs_input_grad[:3])
        dx, dweight, dbias = _act_backward(grad_y, x, weight, pre, ctx.activation, needs)
        return or_none(dx, needs[0]), or_none(dweight, needs[1]), or_none(dbias, needs[2], x.dtype), None


class _LinearResidual(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        # Not the operator of its own, which packs weights: they change at every step of training.
        return _act(x, weight, bias, "none", True)[0] + residual

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs = list(ctx.needs_input_grad[:4])
        dx, dweight, dbias = _act_backward(grad_y, x, weight, x.new_empty(0), "none", needs[:3])
        # A copy: autograd may add into one input's gradient in place, and grad_y is not ours.
        return (
            or_none(dx, needs[0]),
            or_none(dweight, needs[1]),
            or_none(dbias, needs[2], x.dtype),
            grad_y.clone() if needs[3] else None,
        )


def _check_linear(function: str, x: Tensor, weight: Tensor, bias: Tensor | None, one_dtype: bool = True) -> None:
    check_floating(function, "weight", weight)
    if weight.dim() != 2 or x.dim() == 0 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"{function}: input has shape {list(x.shape)} and weight {list(weight.shape)}; expected [..., in] and [out, in]"
        )
    check_vector(function, "bias", bias, weight.shape[0])
    check_device(function, "input", x, weight=weight, bias=bias)
    for name, other in (("weight", weight), ("bias", bias)):
        if one_dtype and other is not None and other.dtype != x.dtype:
            raise TypeError(f"{function}: {name} has dtype {other.dtype} and input {x.dtype}; cast one of them")


def _reduced_linear(
    function: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str,
    residual: Tensor | None,
    precision: str,
    dtype: torch.dtype | None,
) -> Tensor:
    """The product in reduced precision; there is no gradient through it."""
    check_choice(function, "precision", precision, PRECISIONS)
    _check_linear(function, x, weight, bias, one_dtype=False)
    if wants_grad(x, weight, bias, residual):
        raise RuntimeError(
            f"{function}: precision {precision!r} is for inference and has no gradient; call under torch.no_grad(), or train with "
            "precision 'fp32' (and autocast for bfloat16)"
        )
    return _reduced(x, weight, bias, activation, residual, precision, x.dtype if dtype is None else dtype)


def linear_act(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str = "none",
    *,
    precision: str = "fp32",
    dtype: torch.dtype | None = None,
) -> Tensor:
    """``activation(input weightᵀ + bias)``.

    On a CPU a ``Parameter`` is packed at its first use without gradients and read packed from then on; see
    ``fastbert.packed_weights_info``.

    Args:
        input: [..., in].
        weight: [out, in].
        bias: [out].
        activation: none, relu, gelu (erf), gelu_tanh, gelu_quick, silu or tanh.
        precision: what is multiplied. "fp32": input and weight as they are. "bf16": both rounded to bfloat16, summed in float32.
            "int8": both as 8-bit integers, with a scale for each row of input and of weight, summed exactly
            (``fastbert.reference.linear_reduced`` has the formulas). The last two have no gradient, do not follow autocast, and
            compute bias and activation in float32.
        dtype: of the result; only with precision "bf16" and "int8".

    Returns:
        [..., out] in input's dtype; under autocast in autocast's.

    Raises:
        TypeError: dtypes differ, or are not floating point.
        ValueError: shapes or devices do not fit, or activation or precision is unknown.
        RuntimeError: a gradient is wanted of a reduced precision.
    """
    check_floating("linear_act", "input", input)
    check_choice("linear_act", "activation", activation, ACTIVATIONS)
    if precision != "fp32":
        return _reduced_linear("linear_act", input, weight, bias, activation, None, precision, dtype)
    if dtype is not None:
        raise ValueError(f"linear_act: dtype is {dtype}; with precision 'fp32' the result has input's, so give None")
    x, weight, bias = autocast(input, weight, bias)
    _check_linear("linear_act", x, weight, bias)
    if wants_grad(x, weight, bias):
        return _LinearAct.apply(x, weight, bias, activation)
    return _act(x, weight, bias, activation, False)[0]


def linear_residual(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    *,
    precision: str = "fp32",
) -> Tensor:
    """``input weightᵀ + bias + residual``.

    Args:
        input: [..., in].
        weight: [out, in].
        bias: [out].
        residual: [..., out].
        precision: as for ``linear_act``.

    Returns:
        [..., out] in input's dtype; under autocast in autocast's; in residual's with precision "bf16" and "int8".

    Raises:
        TypeError: dtypes differ, or are not floating point.
        ValueError: shapes or devices do not fit, or the precision is unknown.
        RuntimeError: a gradient is wanted of a reduced precision.
    """
    check_floating("linear_residual", "input", input)
    check_floating("linear_residual", "residual", residual)
    reduced = precision != "fp32"
    x = input
    if not reduced:
        x, weight, bias, residual = autocast(input, weight, bias, residual)
    _check_linear("linear_residual", x, weight, bias, one_dtype=not reduced)
    expected = (*x.shape[:-1], weight.shape[0])
    if tuple(residual.shape) != expected:
        raise ValueError(f"linear_residual: residual has shape {list(residual.shape)}; expected {list(expected)}")
    if reduced:
        check_device("linear_residual", "input", x, residual=residual)
        return _reduced_linear("linear_residual", x, weight, bias, "none", residual, precision, residual.dtype)
    if residual.dtype != x.dtype:
        raise TypeError(f"linear_residual: residual has dtype {residual.dtype} and input {x.dtype}; cast one of them")
    check_device("linear_residual", "input", x, residual=residual)
    if wants_grad(x, weight, bias, residual):
        x, residual = distinct(x, residual)
        return _LinearResidual.apply(x, weight, bias, residual)
    return _residual(x, weight, bias, residual)
