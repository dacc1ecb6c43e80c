"""Gated activations: GEGLU, SwiGLU and the other gated linear units (Dauphin et al. 2017; Shazeer 2020)."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastbert import reference
from fastbert.ops._common import check_choice, check_floating, check_same, distinct, or_none, wants_grad
from fastbert.ops._registry import CPU_DTYPES, CUDA_DTYPES, Implementation, Operation, register


def _fake(input: Tensor, gate: Tensor | None, activation: str, gate_first: bool) -> Tensor:
    return input.new_empty(input.shape if gate is not None else (*input.shape[:-1], input.shape[-1] // 2))


def _fake_backward(
    grad_y: Tensor, input: Tensor, gate: Tensor | None, activation: str, gate_first: bool, needs: list[bool]
) -> tuple[Tensor, Tensor]:
    return (
        input.new_empty(input.shape if needs[0] else (0,)),
        input.new_empty(input.shape if needs[1] and gate is not None else (0,)),
    )


_forward = register(
    Operation(
        "gated_act",
        "(Tensor input, Tensor? gate, str activation, bool gate_first) -> Tensor",
        reference.gated_act,
        _fake,
        cpu=Implementation("C++", "fastbert.cpu.gated_act:gated_act", CPU_DTYPES),
        cuda=Implementation("Triton", "fastbert.kernels.gated_act:gated_act", CUDA_DTYPES),
    )
)
_backward = register(
    Operation(
        "gated_act_backward",
        "(Tensor grad_y, Tensor input, Tensor? gate, str activation, bool gate_first, bool[2] needs)"
        " -> (Tensor dinput, Tensor dgate)",
        reference.gated_act_backward,
        _fake_backward,
        cpu=Implementation("C++", "fastbert.cpu.gated_act:gated_act_backward", CPU_DTYPES),
        cuda=Implementation("Triton", "fastbert.kernels.gated_act:gated_act_backward", CUDA_DTYPES),
    )
)


class _GatedAct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, gate: Tensor | None, activation: str, gate_first: bool) -> Tensor:
        ctx.save_for_backward(input, gate)
        ctx.options = activation, gate_first
        return _forward(input, gate, activation, gate_first)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        input, gate = ctx.saved_tensors
        needs = list(ctx.needs_input_grad[:2])
        dinput, dgate = _backward(grad_y, input, gate, *ctx.options, needs)
        return or_none(dinput, needs[0]), or_none(dgate, needs[1]), None, None


def gated_act(
    input: Tensor, gate: Tensor | None = None, activation: str = "sigmoid", *, gate_first: bool = False
) -> Tensor:
    """``value * act(gate)`` in one pass.

    Args:
        input: [..., 2 · width]: value and gate are its halves, in this order, as in ``torch.nn.functional.glu``. With
            ``gate``, the value alone, [..., width].
        gate: [..., width], where it is a tensor of its own.
        activation: of the gate: sigmoid (GLU, as ``torch.nn.functional.glu``), gelu, gelu_tanh, gelu_quick (GEGLU), silu
            (SwiGLU) or relu (ReGLU).
        gate_first: the gate is the first half of input, as in ModernBERT, Phi-3 and vLLM's ``silu_and_mul``.

    Returns:
        [..., width] in input's dtype.

    Raises:
        TypeError: input is not floating point, or gate of another dtype.
        ValueError: shapes or devices do not fit, an odd last dimension without gate, ``gate_first`` with gate, or an
            unknown activation.
    """
    return _gated("gated_act", input, gate, activation, gate_first)


def geglu(input: Tensor, gate: Tensor | None = None, *, approximate: str = "none", gate_first: bool = False) -> Tensor:
    """``value * gelu(gate)`` (Shazeer 2020): :func:`gated_act`, whose arguments it takes, with GELU.

    ``approximate`` is as :func:`gelu`'s: "none", "tanh" or "quick". Raises as :func:`gated_act`.
    """
    check_choice("geglu", "approximate", approximate, tuple(reference.GELU_BY_APPROXIMATION))
    return _gated("geglu", input, gate, reference.GELU_BY_APPROXIMATION[approximate], gate_first)


def swiglu(input: Tensor, gate: Tensor | None = None, *, gate_first: bool = False) -> Tensor:
    """``value * silu(gate)`` (Shazeer 2020): :func:`gated_act`, whose arguments it takes, with SiLU. Raises as it does."""
    return _gated("swiglu", input, gate, "silu", gate_first)


def _gated(function: str, input: Tensor, gate: Tensor | None, activation: str, gate_first: bool) -> Tensor:
    check_floating(function, "input", input)
    check_choice(function, "activation", activation, tuple(reference.GATE_ACTIVATIONS))
    if gate is not None:
        check_same(function, "input", input, "gate", gate)
        if gate_first:
            raise ValueError(f"{function}: gate_first is about the halves of input; a gate of its own comes second")
    if input.dim() == 0 or (gate is None and input.shape[-1] % 2):
        raise ValueError(
            f"{function}: input has shape {list(input.shape)}; expected [..., 2 · width] (an even last dimension), or "
            "[..., width] and a gate"
        )
    if not wants_grad(input, gate):
        return _forward(input, gate, activation, gate_first)
    if gate is not None:
        input, gate = distinct(input, gate)
    return _GatedAct.apply(input, gate, activation, gate_first)
