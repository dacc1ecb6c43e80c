"""Cross-entropy over logits, and over a linear layer whose logits are never whole in memory."""

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
    check_range,
    check_tensor,
    check_vector,
    or_none,
    wants_grad,
)
from fastbert.ops._registry import CPU_DTYPES, CUDA_DTYPES, Implementation, Operation, register
from fastbert.reference import wide_dtype

REDUCTIONS = ("mean", "sum", "none")


def _fake(logits: Tensor, target: Tensor, ignore_index: int, label_smoothing: float) -> tuple[Tensor, Tensor]:
    wide = wide_dtype(logits)
    return logits.new_empty(target.shape, dtype=wide), logits.new_empty(target.shape, dtype=wide)


def _fake_backward(
    grad_losses: Tensor, logits: Tensor, target: Tensor, lse: Tensor, ignore_index: int, label_smoothing: float
) -> Tensor:
    return logits.new_empty(logits.shape)


def _fake_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, ignore_index: int, label_smoothing: float
) -> tuple[Tensor, Tensor]:
    wide = wide_dtype(x)
    return x.new_empty(target.shape, dtype=wide), x.new_empty(target.shape, dtype=wide)


def _fake_linear_backward(
    grad_losses: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    lse: Tensor,
    ignore_index: int,
    label_smoothing: float,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    wide = wide_dtype(x)
    return (
        x.new_empty(x.shape if needs[0] else (0,)),
        x.new_empty(weight.shape if needs[1] else (0,), dtype=wide),
        x.new_empty(weight.shape[:1] if needs[2] else (0,), dtype=wide),
    )


def _check_values(logits: Tensor, target: Tensor, ignore_index: int, *_: Any) -> None:
    check_range("cross_entropy", "target", target, logits.shape[-1], "the class index", ignore=ignore_index)


def _check_backward_values(
    grad_losses: Tensor, logits: Tensor, target: Tensor, lse: Tensor, ignore_index: int, *_: Any
) -> None:
    _check_values(logits, target, ignore_index)


def _check_linear_values(
    x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, ignore_index: int, *_: Any
) -> None:
    check_range("linear_cross_entropy", "target", target, weight.shape[0], "the class index", ignore=ignore_index)


def _check_linear_backward_values(
    grad_losses: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    lse: Tensor,
    ignore_index: int,
    *_: Any,
) -> None:
    _check_linear_values(x, weight, bias, target, ignore_index)


_forward = register(
    Operation(
        "cross_entropy",
        "(Tensor logits, Tensor target, int ignore_index, float label_smoothing) -> (Tensor losses, Tensor lse)",
        reference.cross_entropy,
        _fake,
        cpu=Implementation("C++", "fastbert.cpu.cross_entropy:cross_entropy", CPU_DTYPES),
        cuda=Implementation("Triton", "fastbert.kernels.cross_entropy:cross_entropy", CUDA_DTYPES),
        check_values=_check_values,
    )
)
_backward = register(
    Operation(
        "cross_entropy_backward",
        "(Tensor grad_losses, Tensor logits, Tensor target, Tensor lse, int ignore_index, float label_smoothing) -> Tensor",
        reference.cross_entropy_backward,
        _fake_backward,
        cpu=Implementation("C++", "fastbert.cpu.cross_entropy:cross_entropy_backward", CPU_DTYPES),
        cuda=Implementation("Triton", "fastbert.kernels.cross_entropy:cross_entropy_backward", CUDA_DTYPES),
        dtype_argument=1,
        check_values=_check_backward_values,
    )
)
_backward_in_place = register(
    Operation(
        "cross_entropy_backward_",
        "(Tensor grad_losses, Tensor(a!) logits, Tensor target, Tensor lse, int ignore_index, float label_smoothing) -> ()",
        reference.cross_entropy_backward_,
        lambda *_: None,
        cpu=Implementation("C++", "fastbert.cpu.cross_entropy:cross_entropy_backward_", CPU_DTYPES),
        cuda=Implementation("Triton", "fastbert.kernels.cross_entropy:cross_entropy_backward_", CUDA_DTYPES),
        dtype_argument=1,
        check_values=_check_backward_values,
    )
)
_linear_forward = register(
    Operation(
        "linear_cross_entropy",
        "(Tensor x, Tensor weight, Tensor? bias, Tensor target, int ignore_index, float label_smoothing)"
        " -> (Tensor losses, Tensor lse)",
        reference.linear_cross_entropy,
        _fake_linear,
        cpu=Implementation("C++", "fastbert.cpu.cross_entropy:linear_cross_entropy", CPU_DTYPES),
        cuda=Implementation("Triton", "fastbert.kernels.linear_cross_entropy:linear_cross_entropy", CUDA_DTYPES),
        check_values=_check_linear_values,
    )
)
_linear_backward = register(
    Operation(
        "linear_cross_entropy_backward",
        "(Tensor grad_losses, Tensor x, Tensor weight, Tensor? bias, Tensor target, Tensor lse, int ignore_index,"
        " float label_smoothing, bool[3] needs) -> (Tensor dx, Tensor dweight, Tensor dbias)",
        reference.linear_cross_entropy_backward,
        _fake_linear_backward,
        cpu=Implementation("C++", "fastbert.cpu.cross_entropy:linear_cross_entropy_backward", CPU_DTYPES),
        cuda=Implementation(
            "Triton", "fastbert.kernels.linear_cross_entropy_backward:linear_cross_entropy_backward", CUDA_DTYPES
        ),
        dtype_argument=1,
        check_values=_check_linear_backward_values,
    )
)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, target: Tensor, ignore_index: int, label_smoothing: float, inplace_backward: bool
    ) -> Tensor:
        losses, lse = _forward(logits, target, ignore_index, label_smoothing)
        ctx.save_for_backward(logits, target, lse)
        ctx.numbers = (ignore_index, label_smoothing)
        ctx.inplace_backward = inplace_backward
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_losses: Tensor) -> tuple[Tensor | None, ...]:
        # Raises where the logits were written since: by a user, or by an earlier backward pass in place.
        logits, target, lse = ctx.saved_tensors
        if not ctx.inplace_backward:
            return _backward(grad_losses, logits, target, lse, *ctx.numbers), None, None, None, None
        d_logits = logits.detach()  # the same memory, without history
        _backward_in_place(grad_losses, d_logits, target, lse, *ctx.numbers)
        # Whoever saved the logits for a backward pass of its own now raises instead of reading a gradient.
        torch.autograd.graph.increment_version(logits)
        return d_logits, None, None, None, None


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        ignore_index: int,
        label_smoothing: float,
    ) -> Tensor:
        losses, lse = _linear_forward(x, weight, bias, target, ignore_index, label_smoothing)
        ctx.save_for_backward(x, weight, bias, target, lse)
        ctx.numbers = (ignore_index, label_smoothing)
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_losses: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, target, lse = ctx.saved_tensors
        needs = list(ctx.needs_input_grad[:3])
        dx, dweight, dbias = _linear_backward(grad_losses, x, weight, bias, target, lse, *ctx.numbers, needs)
        return (
            or_none(dx, needs[0]),
            or_none(dweight, needs[1], weight.dtype),
            or_none(dbias, needs[2], weight.dtype),
            None,
            None,
            None,
        )


def _reduce(losses: Tensor, target: Tensor, ignore_index: int, reduction: str) -> Tensor:
    if reduction == "none":
        return losses
    if reduction == "sum":
        return losses.sum()
    return losses.sum() / (target != ignore_index).sum()  # all ignored: 0 / 0 is NaN, as torch's


def _check_target(
    function: str, rows: Tensor, target: Tensor, classes: int, reduction: str, label_smoothing: float
) -> None:
    check_choice(function, "reduction", reduction, REDUCTIONS)
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"{function}: label_smoothing is {label_smoothing}; expected a number in [0, 1]")
    if classes == 0:
        raise ValueError(f"{function}: there are 0 classes; expected at least 1")
    check_tensor(function, "target", target)
    if target.dtype != torch.int64:
        raise TypeError(
            f"{function}: target has dtype {target.dtype}; expected int64 class indices (for class probabilities use "
            "torch.nn.functional.cross_entropy)"
        )
    if target.shape != rows.shape[:-1]:
        raise ValueError(f"{function}: target has shape {list(target.shape)}; expected {list(rows.shape[:-1])}")
    check_device(function, "input", rows, target=target)


def _check_in_place(function: str, input: Tensor, logits: Tensor) -> None:
    if (input if input._base is None else input._base).is_leaf:
        raise ValueError(
            f"{function}: inplace_backward is True and input is a leaf or a view of one, whose gradient would share its memory; "
            "it takes the result of an operation. Use inplace_backward=False"
        )
    rows, classes = logits.shape
    if (classes > 1 and logits.stride(1) != 1) or (rows > 1 and logits.stride(0) < classes):
        raise ValueError(
            f"{function}: inplace_backward is True and input has strides {input.stride()}; the rows must lie apart and their "
            "columns side by side. Use input.contiguous() or inplace_backward=False"
        )


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    inplace_backward: bool = False,
) -> Tensor:
    """Cross-entropy with class indices, as ``torch.nn.functional.cross_entropy``; losses are float32 also for half logits.

    Args:
        input: [rows, classes] or [classes], the logits. (torch's [rows, classes, d1, …]: move the classes to the end and
            flatten the rest.)
        target: int64 [rows] or a scalar.
        weight: class weights; not supported.
        ignore_index: rows with this target have loss 0, gradient 0, and do not count in the mean.
        reduction: "mean" over the rows that count, "sum", or "none".
        label_smoothing: in [0, 1].
        inplace_backward: the backward pass writes the gradient over input, which saves as much memory as input takes. After
            it input and its views hold the gradient. Autograd then raises where it still needs the logits: in a second backward
            pass, or in that of another operation that saved them. Plain reads cannot be told apart: read before. Ignored
            in a graph of torch.compile, which plans its own memory.

    Returns:
        A scalar, or [rows] without reduction; float32 (float64 for float64).

    Raises:
        IndexError: a target is outside the classes (looked at on CPU, and under ``fastbert.debug()`` elsewhere).
        NotImplementedError: weight, size_average or reduce is given.
        RuntimeError: from backward, where inplace_backward has already overwritten the logits.
        TypeError: dtypes do not fit.
        ValueError: shapes, devices, reduction or label_smoothing do not fit; or inplace_backward with an input that is a
            leaf or a view of one (its gradient would share its memory), or whose elements lie apart or overlap in a row.
    """
    function = "cross_entropy"
    if weight is not None or size_average is not None or reduce is not None:
        raise NotImplementedError(
            f"{function}: weight, size_average and reduce are not supported; use torch.nn.functional.cross_entropy"
        )
    check_floating(function, "input", input)
    if input.dim() not in (1, 2):
        raise ValueError(
            f"{function}: input has shape {list(input.shape)}; expected [rows, classes] or [classes]. Move the classes to the "
            "end and flatten the rest"
        )
    _check_target(function, input, target, input.shape[-1], reduction, label_smoothing)
    logits, labels = (input, target) if input.dim() == 2 else (input.unsqueeze(0), target.reshape(1))
    if wants_grad(logits):
        in_place = inplace_backward and not torch.compiler.is_compiling()
        if in_place:
            _check_in_place(function, input, logits)
        losses = _CrossEntropy.apply(logits, labels, ignore_index, label_smoothing, in_place)
    else:
        losses = _forward(logits, labels, ignore_index, label_smoothing)[0]
    losses = losses if input.dim() == 2 else losses.squeeze(0)
    return _reduce(losses, target, ignore_index, reduction)


def linear_cross_entropy(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """``cross_entropy(input weightᵀ + bias, target)`` without the logits in memory: the masked- and causal-LM losses.

    Only rows with a label are computed, in chunks, and again in the backward pass.

    Args:
        input: [..., hidden].
        weight: [classes, hidden].
        target: int64 [...].
        bias: [classes].
        ignore_index: rows with this target have loss 0, gradient 0, and do not count in the mean.
        reduction: "mean" over the rows that count, "sum", or "none".
        label_smoothing: in [0, 1].

    Returns:
        A scalar, or [...] without reduction; float32 (float64 for float64).

    Raises:
        IndexError: a target is outside the classes (looked at on CPU, and under ``fastbert.debug()`` elsewhere).
        TypeError: dtypes do not fit.
        ValueError: shapes, devices, reduction or label_smoothing do not fit.
    """
    function = "linear_cross_entropy"
    check_floating(function, "input", input)
    check_floating(function, "weight", weight)
    x, weight, bias = autocast(input, weight, bias)
    if weight.dim() != 2 or x.dim() == 0 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"{function}: input has shape {list(x.shape)} and weight {list(weight.shape)}; expected [..., hidden] and "
            "[classes, hidden]"
        )
    check_vector(function, "bias", bias, weight.shape[0])
    for name, other in (("weight", weight), ("bias", bias)):
        if other is not None and other.dtype != x.dtype:
            raise TypeError(f"{function}: {name} has dtype {other.dtype} and input {x.dtype}; cast one of them")
    check_device(function, "input", x, weight=weight, bias=bias)
    _check_target(function, x, target, weight.shape[0], reduction, label_smoothing)
    rows, labels = x.reshape(-1, x.shape[-1]), target.reshape(-1)
    if wants_grad(rows, weight, bias):
        losses = _LinearCrossEntropy.apply(rows, weight, bias, labels, ignore_index, label_smoothing)
    else:
        losses = _linear_forward(rows, weight, bias, labels, ignore_index, label_smoothing)[0]
    return _reduce(losses.reshape(target.shape), target, ignore_index, reduction)
