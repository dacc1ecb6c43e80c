"""Gated activations (Dauphin et al. 2017; Shazeer 2020: GEGLU, SwiGLU), forward and backward.

    y = value * act(gate);  dvalue = grad_y * act(gate);  dgate = grad_y * value * act'(gate)

value and gate are two tensors, or the halves of one: then backward writes both gradients into one tensor.

On paper, 16384 x 2 * 4096 bfloat16 on H200 (4.3 TB/s): forward moves 403 MB, 94 us; backward 671 MB, 156 us.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastbert.kernels import _configs
from fastbert.kernels._activations import activate
from fastbert.kernels._launch import AotCase, as_rows, check_tensors, device_of, launch
from fastbert.kernels._rows import DTYPE_NAMES, blocked_elementwise, meta_tensor

_ACTIVATIONS = ("gelu", "gelu_tanh", "gelu_quick", "silu", "relu", "sigmoid")


@triton.jit(do_not_specialize=["rows", "blocks"])
def _gated_kernel(
    value,  # [rows, width]
    gate,  # [rows, width]
    grad_y,  # [rows, width]; None: forward
    out,  # [rows, width], written: y, or backward dvalue (or None)
    dgate,  # [rows, width], written backward; or None
    rows, width, value_stride, gate_stride, grad_y_stride, out_stride, dgate_stride, blocks,
    ACTIVATION: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid: tiles of rows * blocks of columns."""
    tile, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    row = (tile.to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    column = (block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK))[None, :]
    in_bounds = (row < rows) & (column < width)
    v = tl.load(value + row * value_stride + column, mask=in_bounds, other=0.0).to(tl.float32)
    g = tl.load(gate + row * gate_stride + column, mask=in_bounds, other=0.0).to(tl.float32)
    activated, derivative = activate(g, ACTIVATION)
    if grad_y is None:
        result = v * activated
    else:
        dy = tl.load(grad_y + row * grad_y_stride + column, mask=in_bounds, other=0.0).to(tl.float32)
        result = dy * activated
        if dgate is not None:
            d = dy * v * derivative
            tl.store(dgate + row * dgate_stride + column, d.to(dgate.dtype.element_ty), mask=in_bounds)
    if out is not None:
        tl.store(out + row * out_stride + column, result.to(out.dtype.element_ty), mask=in_bounds)


def gated_act(
    input: Tensor,  # [..., width], or [..., 2 width] without `gate`
    gate: Tensor | None,  # [..., width]
    activation: str,
    gate_first: bool,  # of the halves
) -> Tensor:
    """value * act(gate), [..., width] in input's dtype, contiguous.

    Raises ValueError for a tensor that is not on the kernels' device, TypeError for a dtype.
    """
    check_tensors("gated_act", input=input, gate=gate)
    value, gate = _value_and_gate(input, gate, gate_first)
    y = torch.empty(value.shape, dtype=value.dtype, device=value.device)
    _launch("gated_act", value, gate, None, y, None, activation)
    return y


def gated_act_backward(
    grad_y: Tensor,  # [..., width]
    input: Tensor,  # [..., width], or [..., 2 width] without `gate`
    gate: Tensor | None,  # [..., width]
    activation: str,
    gate_first: bool,
    needs: Sequence[bool],  # dinput, dgate
) -> tuple[Tensor, Tensor]:
    """dinput like input; dgate like gate; [0] for what is not needed. Raises as `gated_act` does."""
    check_tensors("gated_act_backward", grad_y=grad_y, input=input, gate=gate)
    needs_dinput, needs_dgate = needs[0], needs[1] and gate is not None
    dinput = torch.empty(input.shape if needs_dinput else 0, dtype=input.dtype, device=input.device)
    dgate = torch.empty(input.shape if needs_dgate else 0, dtype=input.dtype, device=input.device)
    if needs_dinput or needs_dgate:
        outs = (dinput if needs_dinput else None, dgate if needs_dgate else None)
        if gate is None:
            outs = _value_and_gate(dinput, None, gate_first)
        _launch("gated_act_backward", *_value_and_gate(input, gate, gate_first), grad_y, *outs, activation)
    return dinput, dgate


def _value_and_gate(input: Tensor, gate: Tensor | None, gate_first: bool) -> tuple[Tensor, Tensor]:
    if gate is not None:
        return input, gate
    first, second = input.chunk(2, -1)
    return (second, first) if gate_first else (first, second)


def _launch(
    operation: str, value: Tensor, gate: Tensor, grad_y: Tensor | None,
    out: Tensor | None, dgate: Tensor | None, activation: str,
) -> None:  # fmt: skip
    if not value.numel():
        return
    tensors = (value, gate, grad_y, out, dgate)
    width = value.shape[-1]
    if all(tensor is None or tensor.is_contiguous() for tensor in tensors):
        width = value.numel()  # one long row, which is aligned whatever the width was
    rows = value.numel() // width
    line = _configs.element_tile(operation, device_of(value))
    block, tile_rows = blocked_elementwise(rows, width, line.tile)
    blocks = triton.cdiv(width, block)
    as_tiled = [None if tensor is None else as_rows(tensor, width) for tensor in tensors]
    launch(
        _gated_kernel, (triton.cdiv(rows, tile_rows) * blocks,), value, *as_tiled,
        rows, width, *(0 if tensor is None else tensor.stride(0) for tensor in as_tiled), blocks,
        num_warps=line.num_warps, ACTIVATION=activation, ROWS=tile_rows, BLOCK=block,
    )  # fmt: skip


def aot_cases() -> Iterator[AotCase]:
    """What is compiled ahead of time: each activation, and one with each dtype and alignment; one tensor, and two."""
    for activation in _ACTIVATIONS:
        yield from _aot_cases(3072, torch.bfloat16, True, activation)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        if dtype is not torch.bfloat16:
            yield from _aot_cases(3072, dtype, True, "gelu")
        yield from _aot_cases(3071, dtype, False, "gelu")


def _aot_cases(width: int, dtype: torch.dtype, aligned: bool, activation: str) -> Iterator[AotCase]:
    x, both = (meta_tensor(64, n, dtype=dtype, aligned=aligned) for n in (width, 2 * width))
    calls: dict[str, Callable[[], object]] = {
        "gated_act": lambda: gated_act(both, None, activation, False),
        "gated_act_backward": lambda: gated_act_backward(x, both, None, activation, False, (True, False)),
    }
    if aligned:
        calls |= {
            "gated_act-two": lambda: gated_act(x, x, activation, False),
            "gated_act_backward-two": lambda: gated_act_backward(x, x, x, activation, False, (True, True)),
        }
    for name, call in calls.items():
        operation, _, variant = name.partition("-")
        parts = [operation, f"w{width}", DTYPE_NAMES[dtype], activation, variant, "" if aligned else "unaligned"]
        sample = activation == "silu" and dtype is torch.bfloat16 and aligned and not variant
        yield AotCase("-".join(filter(None, parts)), call, sample)
