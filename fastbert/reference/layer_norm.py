"""Layer norm (Ba, Kiros, Hinton 2016), alone and behind bias, dropout and residual."""

import torch
from torch import Tensor

from fastbert.reference._common import nothing, sum_over_rows, wide_dtype, widen
from fastbert.reference.dropout import dropout_mask


def _normalize(
    x_wide: Tensor,  # [..., width]
    weight: Tensor | None,  # [width]
    bias: Tensor | None,  # [width]
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    mean = x_wide.mean(-1)
    centred = x_wide - mean.unsqueeze(-1)
    rstd = torch.rsqrt(centred.square().mean(-1) + eps)
    y = centred * rstd.unsqueeze(-1)
    if weight is not None:
        y = y * weight.to(y.dtype)
    if bias is not None:
        y = y + bias.to(y.dtype)
    return y, mean, rstd


def _normalize_backward(
    grad_y: Tensor,  # [..., width]
    x: Tensor,  # [..., width]
    mean: Tensor,  # [...]
    rstd: Tensor,  # [...]
    weight: Tensor | None,  # [width]
) -> tuple[Tensor, Tensor, Tensor]:
    grad_y, x = widen(grad_y), widen(x)
    x_hat = (x - mean.unsqueeze(-1)) * rstd.unsqueeze(-1)
    wdy = grad_y if weight is None else grad_y * weight.to(grad_y.dtype)
    c1 = wdy.mean(-1, keepdim=True)
    c2 = (wdy * x_hat).mean(-1, keepdim=True)
    dx = rstd.unsqueeze(-1) * (wdy - c1 - x_hat * c2)
    return dx, sum_over_rows(grad_y * x_hat), sum_over_rows(grad_y)


def layer_norm(
    x: Tensor,  # [..., width]
    weight: Tensor | None,  # [width]
    bias: Tensor | None,  # [width]
    eps: float,
    save_stats: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """y [..., width], and mean [...], rstd [...] when save_stats."""
    y, mean, rstd = _normalize(widen(x), weight, bias, eps)
    if not save_stats:
        mean, rstd = nothing(mean), nothing(mean)
    return y.to(x.dtype), mean, rstd


def layer_norm_backward(
    grad_y: Tensor,  # [..., width]
    x: Tensor,  # [..., width]
    mean: Tensor,  # [...]
    rstd: Tensor,  # [...]
    weight: Tensor | None,  # [width]
    needs: list[bool],  # dx, dweight, dbias
) -> tuple[Tensor, Tensor, Tensor]:
    """dx [..., width] in x's dtype; dweight, dbias [width] wide."""
    dx, dweight, dbias = _normalize_backward(grad_y, x, mean, rstd, weight)
    return (
        dx.to(x.dtype) if needs[0] else nothing(x),
        dweight if needs[1] else nothing(dweight),
        dbias if needs[2] else nothing(dbias),
    )


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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """sum = residual + dropout(x + x_bias) and y = layer_norm(sum), both [..., width]; mean [...], rstd [...].

    A post-norm block without gradients has no use for the sum, and not writing it is a quarter of the traffic.
    """
    branch = widen(x)
    if x_bias is not None:
        branch = branch + x_bias.to(branch.dtype)
    if dropout_p > 0.0:
        assert seed is not None
        branch = branch * dropout_mask(tuple(x.shape), dropout_p, seed, offset, branch.dtype)
    total = widen(residual) + branch
    y, mean, rstd = _normalize(total, weight, bias, eps)
    if not save_stats:
        mean, rstd = nothing(mean), nothing(mean)
    return y.to(x.dtype), total.to(x.dtype) if save_sum else nothing(x), mean, rstd


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
    """dx, dresidual [..., width] in sum's dtype; dx_bias, dweight, dbias [width] wide.

    Without dropout dx equals dresidual: then dx is [0], and dresidual serves whoever needs either.
    """
    d_sum, dweight, dbias = _normalize_backward(grad_y, sum, mean, rstd, weight)
    if grad_sum is not None:
        d_sum = d_sum + widen(grad_sum)
    dx = d_sum
    if dropout_p > 0.0:
        assert seed is not None
        dx = d_sum * dropout_mask(tuple(sum.shape), dropout_p, seed, offset, d_sum.dtype)
    wide = wide_dtype(sum)
    needs_residual = needs[1] or (needs[0] and dropout_p == 0.0)
    return (
        dx.to(sum.dtype) if needs[0] and dropout_p > 0.0 else nothing(sum),
        d_sum.to(sum.dtype) if needs_residual else nothing(sum),
        sum_over_rows(dx) if needs[2] else nothing(sum, wide),
        dweight if needs[3] else nothing(sum, wide),
        dbias if needs[4] else nothing(sum, wide),
    )
