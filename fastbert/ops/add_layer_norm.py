"""Bias, dropout, residual and layer norm in one pass: what stands between two products of a transformer block."""

from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastbert import reference
from fastbert.ops._common import (
    check_same,
    check_vector,
    distinct,
    dropout_seed,
    norm_parameters,
    or_none,
    parameter_for,
    wants_grad,
)
from fastbert.ops._registry import CPU_DTYPES, CUDA_DTYPES, Implementation, Operation, register
from fastbert.ops.layer_norm import check_norm_arguments
from fastbert.reference import wide_dtype


def _fake(
    x: Tensor,
    residual: Tensor,
    x_bias: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    dropout_p: float,
    seed: Tensor | None,
    offset: int,
    save_stats: bool,
    save_sum: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    stats = x.shape[:-1] if save_stats else (0,)
    wide = wide_dtype(x)
    sum = x.new_empty(x.shape if save_sum else (0,))
    return x.new_empty(x.shape), sum, x.new_empty(stats, dtype=wide), x.new_empty(stats, dtype=wide)


def _fake_backward(
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
    wide = wide_dtype(sum)
    dropped = dropout_p > 0.0
    dx_bias, dweight, dbias = (sum.new_empty(sum.shape[-1:] if needed else (0,), dtype=wide) for needed in needs[2:])
    return (
        sum.new_empty(sum.shape if needs[0] and dropped else (0,)),
        sum.new_empty(sum.shape if needs[1] or (needs[0] and not dropped) else (0,)),
        dx_bias,
        dweight,
        dbias,
    )


_forward = register(
    Operation(
        "add_layer_norm",
        "(Tensor x, Tensor residual, Tensor? x_bias, Tensor? weight, Tensor? bias, float eps, float dropout_p, Tensor? seed,"
        " int offset, bool save_stats, bool save_sum=True) -> (Tensor y, Tensor sum, Tensor mean, Tensor rstd)",
        reference.add_layer_norm,
        _fake,
        cpu=Implementation("C++", "fastbert.cpu.layer_norm:add_layer_norm", CPU_DTYPES),
        cuda=Implementation("Triton", "fastbert.kernels.layer_norm:add_layer_norm", CUDA_DTYPES),
    )
)
_backward = register(
    Operation(
        "add_layer_norm_backward",
        "(Tensor grad_y, Tensor? grad_sum, Tensor sum, Tensor mean, Tensor rstd, Tensor? weight, float dropout_p, Tensor? seed,"
        " int offset, bool[5] needs) -> (Tensor dx, Tensor dresidual, Tensor dx_bias, Tensor dweight, Tensor dbias)",
        reference.add_layer_norm_backward,
        _fake_backward,
        cpu=Implementation("C++", "fastbert.cpu.layer_norm:add_layer_norm_backward", CPU_DTYPES),
        cuda=Implementation("Triton", "fastbert.kernels.layer_norm:add_layer_norm_backward", CUDA_DTYPES),
    )
)


class _AddLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor,
        x_bias: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        dropout_p: float,
        seed: Tensor | None,
        offset: int,
    ) -> tuple[Tensor, Tensor]:
        y, sum, mean, rstd = _forward(x, residual, x_bias, weight, bias, eps, dropout_p, seed, offset, True)
        ctx.save_for_backward(sum, mean, rstd, weight, seed)
        ctx.dropout_p, ctx.offset = dropout_p, offset
        ctx.vector_dtypes = [None if v is None else v.dtype for v in (x_bias, weight, bias)]
        ctx.set_materialize_grads(False)
        return y, sum

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor | None, grad_sum: Tensor | None) -> tuple[Tensor | None, ...]:
        sum, mean, rstd, weight, seed = ctx.saved_tensors
        needs = list(ctx.needs_input_grad[:5])
        if grad_y is None:
            grad_y = torch.zeros_like(sum)
        dx, dresidual, *vectors = _backward(
            grad_y, grad_sum, sum, mean, rstd, weight, ctx.dropout_p, seed, ctx.offset, needs
        )
        if ctx.dropout_p == 0.0:
            dx = dresidual
        return (
            or_none(dx, needs[0]),
            or_none(dresidual, needs[1]),
            *(or_none(v, n, d) for v, n, d in zip(vectors, needs[2:], ctx.vector_dtypes, strict=True)),
            None,
            None,
            None,
            None,
        )


@overload
def add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    x_bias: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    offset: int = 0,
    return_sum: Literal[True] = True,
) -> tuple[Tensor, Tensor]: ...


@overload
def add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    x_bias: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    offset: int = 0,
    return_sum: Literal[False],
) -> Tensor: ...


def add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    x_bias: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    offset: int = 0,
    return_sum: bool = True,
) -> Tensor | tuple[Tensor, Tensor]:
    """``sum = residual + dropout(x + x_bias)`` and ``y = layer_norm(sum)``.

    A post-norm block (BERT) goes on with y alone; a pre-norm block (GPT) puts y into the next product and sum into the
    next residual.

    Args:
        x: [..., width], the branch: the output of a product.
        residual: [..., width], of x's dtype.
        weight, bias: [width], the layer norm's, in x's dtype or float32.
        eps: added to the variance.
        x_bias: [width], the product's own bias, in x's dtype or float32.
        dropout_p: probability that an element of the branch is dropped, in [0, 1].
        seed: int64 [1], the key of the dropout stream; None draws one from torch's generator.
        offset: start in the stream, a multiple of 4; several operations can share a seed.
        return_sum: False returns y alone, and without gradients the sum is then never written.

    Returns:
        y and sum, both [..., width] in x's dtype. Inside, the sum stays in float32 until y is computed.

    Raises:
        TypeError: dtypes differ, or are not floating point.
        ValueError: shapes or devices do not fit; dropout_p or offset is out of range.
    """
    check_norm_arguments("add_layer_norm", x, weight, bias)
    check_same("add_layer_norm", "x", x, "residual", residual)
    check_vector("add_layer_norm", "x_bias", x_bias, x.shape[-1])
    seed = dropout_seed("add_layer_norm", dropout_p, seed, offset, x.device)
    weight, bias = norm_parameters(x, weight, bias)
    x_bias = parameter_for(x, x_bias)
    if wants_grad(x, residual, x_bias, weight, bias):
        x, residual = distinct(x, residual)
        y, sum = _AddLayerNorm.apply(x, residual, x_bias, weight, bias, eps, dropout_p, seed, offset)
    else:
        y, sum, _, _ = _forward(x, residual, x_bias, weight, bias, eps, dropout_p, seed, offset, False, return_sum)
    return (y, sum) if return_sum else y
