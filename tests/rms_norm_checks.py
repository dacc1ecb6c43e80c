"""What rms_norm must satisfy, whatever implements it: shared by the interpreter's and the GPU's tests; see layer_norm_checks.py."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastbert import reference
from tests.layer_norm_checks import double
from tests.numerics import assert_close_to_exact

EPS = 1e-6


def inputs(rows: int, width: int, dtype: torch.dtype, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    """x, grad_y [rows, width] and weight [width]."""
    x, grad_y, weight = torch.randn(rows, width), torch.randn(rows, width), 1 + 0.2 * torch.randn(width)
    return x.to(device, dtype), grad_y.to(device, dtype), weight.to(device, dtype)


def check_rms_norm(operations: Any, x: Tensor, grad_y: Tensor, weight: Tensor | None) -> None:
    """y, rstd, dx and dweight against float64; without statistics the same y, and every subset of the gradients."""
    y, rstd = operations.rms_norm(x, weight, EPS, True)
    assert y.dtype == x.dtype and rstd.dtype == torch.float32
    assert y.is_contiguous() and y.shape == x.shape and rstd.shape == x.shape[:-1]
    exact_y, exact_rstd = reference.rms_norm(double(x), double(weight), EPS, True)
    own_y, own_dx, _ = _torchs(x, grad_y, weight)
    assert_close_to_exact(y, exact_y, own_y, "y")
    own_rstd = torch.rsqrt(x.float().square().mean(-1) + EPS)
    assert_close_to_exact(rstd, exact_rstd, own_rstd, "rstd")
    y_alone, nothing = operations.rms_norm(x, weight, EPS, False)
    assert torch.equal(y_alone, y) and nothing.shape == (0,)

    dx, dweight = operations.rms_norm_backward(grad_y, x, rstd, weight, [True, True])
    assert dx.dtype == x.dtype and dx.is_contiguous() and dweight.dtype == torch.float32
    exact_dx, exact_dweight = reference.rms_norm_backward(
        double(grad_y), double(x), double(rstd), double(weight), [True, True]
    )
    _, _, own_dweight = _torchs(x.float(), grad_y.float(), weight)
    assert_close_to_exact(dx, exact_dx, own_dx, "dx")
    assert_close_to_exact(dweight, exact_dweight, own_dweight, "dweight")
    for needs in ([True, False], [False, True], [False, False]):
        some = operations.rms_norm_backward(grad_y, x, rstd, weight, needs)
        for needed, actual, wanted in zip(needs, some, (dx, dweight), strict=True):
            assert torch.equal(actual, wanted) if needed else actual.shape == (0,), needs


def _torchs(x: Tensor, grad_y: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    x = x.detach().clone().requires_grad_()
    weight = torch.ones_like(x[0]) if weight is None else weight.to(x.dtype)
    weight = weight.detach().clone().requires_grad_()
    y = F.rms_norm(x, x.shape[-1:], weight, EPS)
    y.backward(grad_y)
    assert x.grad is not None and weight.grad is not None
    return y.detach(), x.grad, weight.grad


def check_strides(operations: Any, device: str = "cpu") -> None:
    """Rows apart, columns apart, three dimensions: bit for bit what contiguous inputs give."""
    base = torch.randn(8, 6, 80, device=device)
    weight = torch.randn(160, device=device)[::2][:33]
    for name, x in {
        "rows apart": base[:, 0, 1:34],
        "columns apart": base[:, 0, ::2][:, :33],
        "three dimensions, permuted": base.transpose(0, 1)[..., :33],
        "one row": base[0, 0, :33],
    }.items():
        y, rstd = operations.rms_norm(x, weight, EPS, True)
        wanted, _ = operations.rms_norm(x.contiguous(), weight.contiguous(), EPS, True)
        assert torch.equal(y, wanted), name
        gradients = operations.rms_norm_backward(x, x, rstd, weight, [True, True])
        wanted = operations.rms_norm_backward(x.contiguous(), x.contiguous(), rstd, weight.contiguous(), [True, True])
        assert all(torch.equal(a, b) for a, b in zip(gradients, wanted, strict=True)), name


def check_not_finite(operations: Any, dtype: torch.dtype, device: str = "cpu") -> None:
    """NaN and Inf spoil their own row as in torch, and no other."""
    x, grad_y, weight = inputs(7, 100, dtype, device)
    x[1, 3], x[4, 99], x[5, 0] = torch.nan, torch.inf, -torch.inf
    y, rstd = operations.rms_norm(x, weight, EPS, True)
    dx, dweight = operations.rms_norm_backward(grad_y, x, rstd, weight, [True, True])
    for actual, own in zip((y, dx, dweight), _torchs(x, grad_y, weight), strict=True):
        assert torch.equal(actual.isnan(), own.isnan()) and torch.equal(actual.isinf(), own.isinf())
