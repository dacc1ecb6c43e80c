"""RMS norm over the last dimensions."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastbert import reference
from fastbert.ops._common import check_floating, empty_gradients, or_none, parameter_for, wants_grad
from fastbert.ops._registry import CPU_DTYPES, CUDA_DTYPES, Implementation, Operation, register
from fastbert.ops.layer_norm import check_norm_arguments, rows_to_normalise
from fastbert.reference import wide_dtype


def _fake(x: Tensor, weight: Tensor | None, eps: float, save_stats: bool) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape[:-1] if save_stats else (0,), dtype=wide_dtype(x))


def _fake_backward(
    grad_y: Tensor, x: Tensor, rstd: Tensor, weight: Tensor | None, needs: list[bool]
) -> tuple[Tensor, ...]:
    return empty_gradients(x, needs)


_forward = register(
    Operation(
        "rms_norm",
        "(Tensor x, Tensor? weight, float eps, bool save_stats) -> (Tensor y, Tensor rstd)",
        reference.rms_norm,
        _fake,
        cpu=Implementation("C++", "fastbert.cpu.rms_norm:rms_norm", CPU_DTYPES),
        cuda=Implementation("Triton", "fastbert.kernels.rms_norm:rms_norm", CUDA_DTYPES),
    )
)
_backward = register(
    Operation(
        "rms_norm_backward",
        "(Tensor grad_y, Tensor x, Tensor rstd, Tensor? weight, bool[2] needs) -> (Tensor dx, Tensor dweight)",
        reference.rms_norm_backward,
        _fake_backward,
        cpu=Implementation("C++", "fastbert.cpu.rms_norm:rms_norm_backward", CPU_DTYPES),
        cuda=Implementation("Triton", "fastbert.kernels.rms_norm:rms_norm_backward", CUDA_DTYPES),
    )
)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
        y, rstd = _forward(x, weight, eps, True)
        ctx.save_for_backward(x, weight, rstd)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, rstd = ctx.saved_tensors
        needs = list(ctx.needs_input_grad[:2])
        dx, dweight = _backward(grad_y, x, rstd, weight, needs)
        return or_none(dx, needs[0]), or_none(dweight, needs[1], None if weight is None else weight.dtype), None


def rms_norm(
    input: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Tensor:
    """RMS norm (Zhang and Sennrich 2019), as ``torch.nn.functional.rms_norm``.

    Args:
        input: [..., *normalized_shape], floating point.
        normalized_shape: the trailing dimensions to normalise over.
        weight: [*normalized_shape], in input's dtype or float32.
        eps: added to the mean square. None: the machine epsilon of the arithmetic, which is float32's for 16-bit inputs,
            as torch computes it.

    Returns:
        [..., *normalized_shape] in input's dtype, also under autocast.

    Raises:
        TypeError: input is not floating point.
        ValueError: shapes do not fit, or the tensors are on several devices.
    """
    check_floating("rms_norm", "input", input)
    x, (weight,) = rows_to_normalise("rms_norm", input, normalized_shape, weight=weight)
    check_norm_arguments("rms_norm", x, weight, None)
    weight = parameter_for(x, weight)
    if eps is None:
        eps = torch.finfo(wide_dtype(x)).eps
    y = _RmsNorm.apply(x, weight, eps) if wants_grad(x, weight) else _forward(x, weight, eps, False)[0]
    return y if x is input else y.reshape(input.shape)
