"""Gated activations, in C++ (csrc/cpu/gated_act*.cpp)."""

import torch
from torch import Tensor  # torch comes first: the extension then shares its OpenMP threads

from fastbert import _C
from fastbert.cpu._launch import (
    ACTIVATION_NUMBERS,
    check_like,
    dtype_number,
    empty_result,
    matrix,
    nothing,
    row_count,
)
from fastbert.reference import GATE_ACTIVATIONS

_NUMBERS = {name: ACTIVATION_NUMBERS[name] for name in GATE_ACTIVATIONS}


def _arguments(
    operation: str, input: Tensor, gate: Tensor | None, activation: str, gate_first: bool
) -> tuple[int, int, int, int, Tensor, Tensor, tuple[int, int, int, int]]:
    """Numbers of dtype and activation, rows, width, two tensors to keep, and addresses and strides of value and gate."""
    dtype = dtype_number(operation, input)
    number = _NUMBERS.get(activation)
    if number is None:
        raise ValueError(f"{operation}: activation is {activation!r}; expected one of {', '.join(map(repr, _NUMBERS))}")
    rows, width = row_count(input), input.shape[-1]
    source, stride = matrix(input)
    if gate is not None:
        check_like(operation, "gate", gate, input)
        gates, gate_stride = matrix(gate)
        return dtype, number, rows, width, source, gates, (source.data_ptr(), stride, gates.data_ptr(), gate_stride)
    if width % 2:
        raise ValueError(f"{operation}: input is {list(input.shape)}; without a gate its last dimension must be even")
    width //= 2
    halves = source.data_ptr(), source.data_ptr() + width * source.element_size()
    value, gate_half = halves[::-1] if gate_first else halves
    return dtype, number, rows, width, source, source, (value, stride, gate_half, stride)


def gated_act(
    input: Tensor,  # [..., width], or [..., 2 width] without gate
    gate: Tensor | None,  # [..., width]
    activation: str,
    gate_first: bool,  # of the halves
) -> Tensor:
    """value * act(gate), [..., width]; value and gate are input's halves where gate is None.

    Args:
        input: float32 or bfloat16, any strides.
        activation: gelu, gelu_tanh, gelu_quick, silu, relu or sigmoid.

    Raises:
        NotImplementedError: input has another dtype.
        ValueError: shapes do not fit, or the activation is unknown.
    """
    dtype, number, rows, width, *_kept, places = _arguments("gated_act", input, gate, activation, gate_first)
    y = empty_result(input) if gate is not None else torch.empty((*input.shape[:-1], width), dtype=input.dtype)
    _C.gated_act(dtype, number, rows, width, *places, y.data_ptr(), torch.get_num_threads())
    return y


def gated_act_backward(
    grad_y: Tensor,  # [..., width]
    input: Tensor,  # [..., width], or [..., 2 width] without gate
    gate: Tensor | None,  # [..., width]
    activation: str,
    gate_first: bool,
    needs: list[bool],  # dinput, dgate
) -> tuple[Tensor, Tensor]:
    """dinput and dgate, like input and gate; [0] for what is not needed. Raises as gated_act does."""
    operation = "gated_act_backward"
    dtype, number, rows, width, *_kept, places = _arguments(operation, input, gate, activation, gate_first)
    if grad_y.shape != (*input.shape[:-1], width) or grad_y.dtype is not input.dtype or grad_y.device != input.device:
        raise ValueError(
            f"{operation}: grad_y is {list(grad_y.shape)} {grad_y.dtype}; expected {[*input.shape[:-1], width]} {input.dtype}"
        )
    dinput = empty_result(input) if needs[0] else nothing(input.dtype)
    dgate = empty_result(gate) if needs[1] and gate is not None else nothing(input.dtype)
    if gate is not None:
        dvalue_at, dgate_at, gradient_stride = dinput.data_ptr(), dgate.data_ptr(), width  # 0 when empty
    else:
        dvalue_at, gradient_stride = dinput.data_ptr(), 2 * width
        dgate_at = dvalue_at + width * dinput.element_size() if needs[0] else 0
        if gate_first:
            dvalue_at, dgate_at = dgate_at, dvalue_at
    grad_y, grad_y_stride = matrix(grad_y)
    _C.gated_act_backward(
        dtype,
        number,
        rows,
        width,
        grad_y.data_ptr(),
        grad_y_stride,
        *places,
        dvalue_at,
        dgate_at,
        gradient_stride,
        torch.get_num_threads(),
    )
    return dinput, dgate
