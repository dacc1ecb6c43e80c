"""Rotary position embedding."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastbert import reference
from fastbert.ops._common import check_device, check_floating, check_integers, check_range, wants_grad
from fastbert.ops._registry import CPU_DTYPES, CUDA_DTYPES, Implementation, Operation, register


def _fake(x: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor | None, interleaved: bool, inverse: bool) -> Tensor:
    return x.new_empty(x.shape)


def _check_values(x: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor | None, *_: Any) -> None:
    if position_ids is not None:
        check_range("rotary", "position_ids", position_ids, cos.shape[0], "the table of angles")


_rotary = register(
    Operation(
        "rotary",
        "(Tensor x, Tensor cos, Tensor sin, Tensor? position_ids, bool interleaved, bool inverse) -> Tensor",
        reference.rotary,
        _fake,
        cpu=Implementation("C++", "fastbert.cpu.rotary:rotary", CPU_DTYPES),
        cuda=Implementation("Triton", "fastbert.kernels.rotary:rotary", CUDA_DTYPES),
        check_values=_check_values,
    )
)


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor | None, interleaved: bool
    ) -> Tensor:
        ctx.save_for_backward(cos, sin, position_ids)
        ctx.interleaved = interleaved
        return _rotary(x, cos, sin, position_ids, interleaved, False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin, position_ids = ctx.saved_tensors
        return _rotary(grad_y, cos, sin, position_ids, ctx.interleaved, True), None, None, None, None


def rotary(
    input: Tensor, cos: Tensor, sin: Tensor, *, position_ids: Tensor | None = None, interleaved: bool = False
) -> Tensor:
    """Rotary position embedding (Su et al. 2021, RoFormer).

    Args:
        input: [tokens, heads, head_dim] (packed) or [batch, seq, heads, head_dim].
        cos: [positions, rotary_dim / 2]; rotary_dim ≤ head_dim, features past it stay as they are.
        sin: as cos. The tables get no gradient.
        position_ids: int [tokens] or [batch, seq]. Required for packed input; None counts 0, 1, … along seq.
        interleaved: pairs are neighbours (GPT-J), else halves (GPT-NeoX, Llama).

    Returns:
        input's shape and dtype.

    Raises:
        IndexError: a position is outside the tables (looked at on CPU, and under ``fastbert.debug()`` elsewhere).
        TypeError: dtypes do not fit.
        ValueError: shapes or devices do not fit.
    """
    function = "rotary"
    check_floating(function, "input", input)
    if input.dim() not in (3, 4):
        raise ValueError(
            f"{function}: input has shape {list(input.shape)}; expected [tokens, heads, head_dim] or [batch, seq, heads, head_dim]"
        )
    check_floating(function, "cos", cos)
    check_floating(function, "sin", sin)
    if cos.dim() != 2 or sin.shape != cos.shape or 2 * cos.shape[1] > input.shape[-1]:
        raise ValueError(
            f"{function}: cos has shape {list(cos.shape)}, sin {list(sin.shape)}; expected [positions, at most "
            f"{input.shape[-1] // 2}], both equal"
        )
    check_device(function, "input", input, cos=cos, sin=sin, position_ids=position_ids)
    if position_ids is not None:
        if position_ids.shape != input.shape[:-2]:
            raise ValueError(
                f"{function}: position_ids has shape {list(position_ids.shape)}; expected {list(input.shape[:-2])}"
            )
        check_integers(function, "position_ids", position_ids)
    elif input.dim() == 3:
        raise ValueError(f"{function}: packed input [tokens, heads, head_dim] needs position_ids [tokens]")
    elif input.shape[1] > cos.shape[0]:
        raise ValueError(f"{function}: input has {input.shape[1]} positions; the table of angles has {cos.shape[0]}")
    if input.dtype != torch.float64:
        cos, sin = (t.float() if t.dtype == torch.float64 else t for t in (cos, sin))
    if wants_grad(input):
        return _Rotary.apply(input, cos, sin, position_ids, interleaved)
    return _rotary(input, cos, sin, position_ids, interleaved, False)
