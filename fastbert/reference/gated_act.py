"""Gated activations: gated linear units (Dauphin et al. 2017) and their variants (Shazeer 2020)."""

import torch
from torch import Tensor

from fastbert.reference._common import nothing, widen
from fastbert.reference.elementwise import ACTIVATIONS


def _sigmoid_derivative(z: Tensor) -> Tensor:
    s = torch.sigmoid(z)
    return s * (1.0 - s)


# name: (function, derivative), both of the wide gate
GATE_ACTIVATIONS = {name: ACTIVATIONS[name] for name in ("gelu", "gelu_tanh", "gelu_quick", "silu", "relu")} | {
    "sigmoid": (torch.sigmoid, _sigmoid_derivative)
}


def _value_and_gate(input: Tensor, gate: Tensor | None, gate_first: bool) -> tuple[Tensor, Tensor]:
    if gate is not None:
        return input, gate
    first, second = input.chunk(2, -1)
    return (second, first) if gate_first else (first, second)


def gated_act(
    input: Tensor,  # [..., width], or [..., 2 width] without gate
    gate: Tensor | None,  # [..., width]
    activation: str,  # a key of GATE_ACTIVATIONS
    gate_first: bool,  # of the halves
) -> Tensor:
    """value * act(gate), [..., width]; value and gate are input's halves where gate is None."""
    value, gate = _value_and_gate(input, gate, gate_first)
    return (widen(value) * GATE_ACTIVATIONS[activation][0](widen(gate))).to(input.dtype)


def gated_act_backward(
    grad_y: Tensor,  # [..., width]
    input: Tensor,  # [..., width], or [..., 2 width] without gate
    gate: Tensor | None,  # [..., width]
    activation: str,
    gate_first: bool,
    needs: list[bool],  # dinput, dgate
) -> tuple[Tensor, Tensor]:
    """dinput and dgate, like input and gate."""
    value, gate_half = (widen(t) for t in _value_and_gate(input, gate, gate_first))
    function, derivative = GATE_ACTIVATIONS[activation]
    grad_wide = widen(grad_y)
    dvalue = (grad_wide * function(gate_half)).to(input.dtype)
    dgate = (grad_wide * value * derivative(gate_half)).to(input.dtype)
    if gate is None:
        halves = (dgate, dvalue) if gate_first else (dvalue, dgate)
        return torch.cat(halves, -1) if needs[0] else nothing(input), nothing(input)
    return dvalue if needs[0] else nothing(input), dgate if needs[1] else nothing(input)
