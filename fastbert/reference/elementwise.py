"""GELU with its bias, softmax with its mask, rotary position embedding."""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from fastbert.reference._common import nothing, sum_over_rows, wide_dtype, widen

_TANH_SCALE = math.sqrt(2.0 / math.pi)
_TANH_CUBIC = 0.044715  # Hendrycks and Gimpel 2016, "Gaussian Error Linear Units", section 2
_QUICK_SLOPE = 1.702  # the same paper's sigmoid approximation


def _gelu_derivative(z: Tensor) -> Tensor:
    density = torch.exp(-0.5 * z * z) / math.sqrt(2.0 * math.pi)
    return 0.5 * (1.0 + torch.erf(z * math.sqrt(0.5))) + z * density


def _gelu_tanh_derivative(z: Tensor) -> Tensor:
    t = torch.tanh(_TANH_SCALE * (z + _TANH_CUBIC * z**3))
    return 0.5 * (1.0 + t) + 0.5 * z * (1.0 - t * t) * _TANH_SCALE * (1.0 + 3.0 * _TANH_CUBIC * z * z)


def _gelu_quick(z: Tensor) -> Tensor:
    return z * torch.sigmoid(_QUICK_SLOPE * z)


def _gelu_quick_derivative(z: Tensor) -> Tensor:
    s = torch.sigmoid(_QUICK_SLOPE * z)
    return s + z * _QUICK_SLOPE * s * (1.0 - s)


def _silu_derivative(z: Tensor) -> Tensor:
    s = torch.sigmoid(z)
    return s + z * s * (1.0 - s)


# name: (function, derivative), both of the wide pre-activation
ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "none": (lambda z: z, torch.ones_like),
    "relu": (torch.relu, lambda z: (z > 0).to(z.dtype)),
    "gelu": (F.gelu, _gelu_derivative),
    "gelu_tanh": (partial(F.gelu, approximate="tanh"), _gelu_tanh_derivative),
    "gelu_quick": (_gelu_quick, _gelu_quick_derivative),
    "silu": (F.silu, _silu_derivative),
    "tanh": (torch.tanh, lambda z: 1.0 - torch.tanh(z) ** 2),
}

GELU_BY_APPROXIMATION = {"none": "gelu", "tanh": "gelu_tanh", "quick": "gelu_quick"}


def bias_gelu(
    x: Tensor,  # [..., width]
    bias: Tensor | None,  # [width]
    approximate: str,  # "none" (erf), "tanh", "quick"
) -> Tensor:
    """gelu(x + bias), [..., width]."""
    z = widen(x) if bias is None else widen(x) + bias.to(wide_dtype(x))
    return ACTIVATIONS[GELU_BY_APPROXIMATION[approximate]][0](z).to(x.dtype)


def bias_gelu_backward(
    grad_y: Tensor,  # [..., width]
    x: Tensor,  # [..., width]
    bias: Tensor | None,  # [width]
    approximate: str,
    needs: list[bool],  # dx, dbias
) -> tuple[Tensor, Tensor]:
    """dx [..., width] in x's dtype; dbias [width] wide."""
    z = widen(x) if bias is None else widen(x) + bias.to(wide_dtype(x))
    dz = widen(grad_y) * ACTIVATIONS[GELU_BY_APPROXIMATION[approximate]][1](z)
    return (
        dz.to(x.dtype) if needs[0] else nothing(x),
        sum_over_rows(dz) if needs[1] else nothing(dz),
    )


def softmax(
    x: Tensor,  # [..., rows, columns] (rows may be missing unless causal)
    mask: Tensor | None,  # broadcastable to x: bool, True = keep, or additive
    scale: float,
    causal: bool,  # row i keeps columns j <= i
) -> Tensor:
    """softmax(scale * x + mask) over the last dimension; a row with nothing to keep gives zeros."""
    logits = widen(x) * scale
    if mask is not None:
        additive = mask.dtype != torch.bool
        logits = logits + mask.to(logits.dtype) if additive else logits.masked_fill(~mask, -torch.inf)
    if causal:
        keep = torch.ones(x.shape[-2:], dtype=torch.bool, device=x.device).tril()
        logits = logits.masked_fill(~keep, -torch.inf)
    nothing_kept = (logits == -torch.inf).all(-1, keepdim=True)
    return torch.softmax(logits, -1).masked_fill(nothing_kept, 0.0).to(x.dtype)


def softmax_backward(
    grad_y: Tensor,  # [..., columns]
    y: Tensor,  # [..., columns]
    scale: float,
) -> Tensor:
    """dx [..., columns]."""
    grad_wide, y_wide = widen(grad_y), widen(y)
    dot = (grad_wide * y_wide).sum(-1, keepdim=True)
    return (scale * y_wide * (grad_wide - dot)).to(y.dtype)


def rotary(
    x: Tensor,  # [tokens, heads, head_dim] or [batch, seq, heads, head_dim]
    cos: Tensor,  # [positions, rotary_dim / 2]
    sin: Tensor,  # [positions, rotary_dim / 2]
    position_ids: Tensor | None,  # [tokens] or [batch, seq]; None: 0, 1, … along the dimension before the heads
    interleaved: bool,
    inverse: bool,
) -> Tensor:
    """x rotated by its position's angles (Su et al. 2021, RoFormer); the inverse is the gradient.

    The pairs are (x[i], x[i + rotary_dim / 2]), or neighbours (x[2 i], x[2 i + 1]) when interleaved. Features past rotary_dim
    stay as they are.
    """
    wide = wide_dtype(x)
    if position_ids is None:
        c, s = cos[: x.shape[-3]].to(wide), sin[: x.shape[-3]].to(wide)
    else:
        c, s = cos[position_ids].to(wide), sin[position_ids].to(wide)
    c, s = c.unsqueeze(-2), s.unsqueeze(-2)  # the same angles for every head
    if inverse:
        s = -s
    half = cos.shape[-1]
    turned, kept = widen(x[..., : 2 * half]), x[..., 2 * half :]
    if interleaved:
        x1, x2 = turned[..., 0::2], turned[..., 1::2]
        turned = torch.stack((x1 * c - x2 * s, x1 * s + x2 * c), dim=-1).flatten(-2)
    else:
        x1, x2 = turned[..., :half], turned[..., half:]
        turned = torch.cat((x1 * c - x2 * s, x1 * s + x2 * c), dim=-1)
    return torch.cat((turned.to(x.dtype), kept), dim=-1)
