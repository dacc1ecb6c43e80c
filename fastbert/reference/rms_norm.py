"""RMS norm (Zhang and Sennrich 2019)."""

import torch
from torch import Tensor

from fastbert.reference._common import nothing, sum_over_rows, wide_dtype, widen


def rms_norm(
    x: Tensor,  # [..., width]
    weight: Tensor | None,  # [width]
    eps: float,
    save_stats: bool,
) -> tuple[Tensor, Tensor]:
    """y [..., width], and rstd [...] when save_stats."""
    x_wide = widen(x)
    rstd = torch.rsqrt(x_wide.square().mean(-1) + eps)
    y = x_wide * rstd.unsqueeze(-1)
    if weight is not None:
        y = y * weight.to(y.dtype)
    return y.to(x.dtype), rstd if save_stats else nothing(rstd)


def rms_norm_backward(
    grad_y: Tensor,  # [..., width]
    x: Tensor,  # [..., width]
    rstd: Tensor,  # [...]
    weight: Tensor | None,  # [width]
    needs: list[bool],  # dx, dweight
) -> tuple[Tensor, Tensor]:
    """dx [..., width] in x's dtype; dweight [width] wide."""
    grad_wide = widen(grad_y)
    x_hat = widen(x) * rstd.to(wide_dtype(x)).unsqueeze(-1)
    wdy = grad_wide if weight is None else grad_wide * weight.to(grad_wide.dtype)
    dx = rstd.unsqueeze(-1) * (wdy - x_hat * (wdy * x_hat).mean(-1, keepdim=True))
    dweight = sum_over_rows(grad_wide * x_hat)
    return dx.to(x.dtype) if needs[0] else nothing(x), dweight if needs[1] else nothing(dweight)
