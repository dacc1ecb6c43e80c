"""Softmax with its scale, mask and causality in one pass."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastbert import reference
from fastbert.ops._common import check_device, check_floating, check_tensor, wants_grad
from fastbert.ops._registry import CPU_DTYPES, CUDA_DTYPES, Implementation, Operation, register


def _fake(x: Tensor, mask: Tensor | None, scale: float, causal: bool) -> Tensor:
    return x.new_empty(x.shape)


def _fake_backward(grad_y: Tensor, y: Tensor, scale: float) -> Tensor:
    return y.new_empty(y.shape)


_forward = register(
    Operation(
        "softmax",
        "(Tensor x, Tensor? mask, float scale, bool causal) -> Tensor",
        reference.softmax,
        _fake,
        cpu=Implementation("C++", "fastbert.cpu.softmax:softmax", CPU_DTYPES),
        cuda=Implementation("Triton", "fastbert.kernels.softmax:softmax", CUDA_DTYPES),
    )
)
_backward = register(
    Operation(
        "softmax_backward",
        "(Tensor grad_y, Tensor y, float scale) -> Tensor",
        reference.softmax_backward,
        _fake_backward,
        cpu=Implementation("C++", "fastbert.cpu.softmax:softmax_backward", CPU_DTYPES),
        cuda=Implementation("Triton", "fastbert.kernels.softmax:softmax_backward", CUDA_DTYPES),
    )
)


class _Softmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, mask: Tensor | None, scale: float, causal: bool) -> Tensor:
        y = _forward(x, mask, scale, causal)
        ctx.save_for_backward(y)
        ctx.scale = scale
        ctx.mask_shape = None if mask is None else mask.shape
        ctx.mask_dtype = None if mask is None else mask.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        (y,) = ctx.saved_tensors
        needs_dx, needs_d_mask, *_ = ctx.needs_input_grad
        dx = _backward(grad_y, y, ctx.scale) if needs_dx else None
        if not needs_d_mask:
            return dx, None, None, None
        # With scale 1 the logits' gradient is dx itself.
        d_logits = dx if dx is not None and ctx.scale == 1.0 else _backward(grad_y, y, 1.0)
        # The gradients of two inputs must not share memory, as they would where nothing is summed.
        shared = d_logits is dx and ctx.mask_shape == y.shape
        d_mask = d_logits.sum_to_size(ctx.mask_shape).to(ctx.mask_dtype, copy=shared)
        return dx, d_mask, None, None


def softmax(
    input: Tensor, dim: int = -1, *, mask: Tensor | None = None, scale: float = 1.0, causal: bool = False
) -> Tensor:
    """``softmax(scale · input + mask)``. A row with nothing to keep gives zeros, where torch's gives NaN.

    Args:
        input: [..., columns], floating point.
        dim: the dimension that sums to one; with a mask or causal it must be the last.
        mask: broadcastable to input; bool (True = keep) or additive.
        scale: factor on input.
        causal: row i of the last two dimensions keeps the columns j ≤ i.

    Returns:
        input's shape and dtype, also under autocast (torch's own returns float32 there).

    Raises:
        TypeError: input is not floating point, or the mask neither floating point nor bool.
        ValueError: shapes or devices do not fit.
    """
    check_floating("softmax", "input", input)
    if input.dim() == 0 or not -input.dim() <= dim < input.dim():
        raise ValueError(f"softmax: dim is {dim} and input has {input.dim()} dimensions")
    last = dim in (-1, input.dim() - 1)
    if mask is not None or causal:
        if not last:
            raise ValueError(f"softmax: dim is {dim}; with a mask or causal it must be the last")
        if causal and input.dim() < 2:
            raise ValueError(f"softmax: input has shape {list(input.shape)}; causal needs rows and columns")
    if mask is not None:
        check_tensor("softmax", "mask", mask)
        if not (mask.is_floating_point() or mask.dtype == torch.bool):
            raise TypeError(f"softmax: mask has dtype {mask.dtype}; expected bool (True = keep) or floating point")
        check_device("softmax", "input", input, mask=mask)
        check_broadcast("softmax", "mask", mask, input.shape)
    x = input if last else input.movedim(dim, -1)
    y = _Softmax.apply(x, mask, scale, causal) if wants_grad(x, mask) else _forward(x, mask, scale, causal)
    return y if last else y.movedim(-1, dim)


def check_broadcast(function: str, name: str, x: Tensor, shape: torch.Size | tuple[int, ...]) -> None:
    """Raises ValueError unless x broadcasts to shape without widening it."""
    fits = x.dim() <= len(shape) and all(a in (1, b) for a, b in zip(reversed(x.shape), reversed(shape), strict=False))
    if not fits:
        raise ValueError(f"{function}: {name} has shape {list(x.shape)}; it must broadcast to {list(shape)}")
