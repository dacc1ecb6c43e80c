"""A linear layer with what follows it: an activation, or a residual."""

from torch import Tensor
from torch.nn import functional as F

from fastbert.reference._common import nothing, sum_over_rows, wide_dtype, widen
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
    rows = d_pre.reshape(-1, d_pre.shape[-1])
    return (
        d_pre @ weight if needs[0] else nothing(x),
        rows.T @ x.reshape(-1, x.shape[-1]) if needs[1] else nothing(weight),
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
