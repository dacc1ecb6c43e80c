"""GELU with the bias before it, forward and backward, and the sums over rows that are the bias's gradient.

    z = x + bias;  y = gelu(z);  dx = grad_y * gelu'(z);  dbias = sum_rows(dx)

On paper, 16384 x 4096 bfloat16 on H200 (4.3 TB/s): forward moves 268 MB, 62 us, and issues 23 instructions an element (exact GELU,
sm_90), 52 us; backward 403 MB, 94 us, and 29 instructions without dbias, 66 us. So memory is what both wait for, if not by much.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastbert.kernels import _configs
from fastbert.kernels._activations import activate
from fastbert.kernels._launch import AotCase, as_rows, check_tensors, device_of, launch
from fastbert.kernels._rows import DTYPE_NAMES, add_partials, blocked_elementwise, dense, meta_tensor

_ACTIVATIONS = {"none": "gelu", "tanh": "gelu_tanh", "quick": "gelu_quick"}


@triton.jit(do_not_specialize=["rows", "programs", "blocks"])
def _gelu_kernel(
    x,  # [rows, width]
    bias,  # [width] or None
    grad_y,  # [rows, width]; None: forward
    out,  # [rows, width] contiguous, written: y, or backward dx (or None)
    partials,  # float32 [1, programs, width], written: sums over a program's rows of dx; or None
    rows, width, x_stride, grad_y_stride, programs, blocks,
    ACTIVATION: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Grid: programs * blocks; a program takes every programs-th tile of rows in one block of columns."""
    program, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    column = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    in_width = column < width
    if bias is not None:
        bias_tile = tl.load(bias + column, mask=in_width, other=0.0).to(tl.float32)[None, :]
    sums = tl.zeros([ROWS, BLOCK], tl.float32)
    for tile in tl.range(program, tl.cdiv(rows, ROWS), programs, num_stages=STAGES):
        row = tl.cast(tile, tl.int64) * ROWS + tl.arange(0, ROWS)
        in_bounds = (row < rows)[:, None] & in_width[None, :]
        z = tl.load(x + row[:, None] * x_stride + column[None, :], mask=in_bounds, other=0.0).to(tl.float32)
        if bias is not None:
            z += bias_tile
        result, derivative = activate(z, ACTIVATION)
        if grad_y is not None:
            dy = tl.load(grad_y + row[:, None] * grad_y_stride + column[None, :], mask=in_bounds, other=0.0)
            result = dy.to(tl.float32) * derivative
        if out is not None:
            tl.store(out + row[:, None] * width + column[None, :], result.to(out.dtype.element_ty), mask=in_bounds)
        if partials is not None:
            sums += result  # out of bounds dy is 0
    if partials is not None:
        tl.store(partials + program.to(tl.int64) * width + column, tl.sum(sums, axis=0), mask=in_width)


def bias_gelu(
    x: Tensor,  # [..., width]
    bias: Tensor | None,  # [width]
    approximate: str,  # "none" (erf), "tanh", "quick"
) -> Tensor:
    """gelu(x + bias) like x, contiguous.

    Raises ValueError for a tensor that is not on the kernels' device, TypeError for a dtype.
    """
    check_tensors("bias_gelu", x=x, bias=bias)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel():
        _launch("bias_gelu", x, bias, None, y, None, approximate)
    return y


def bias_gelu_backward(
    grad_y: Tensor,  # [..., width]
    x: Tensor,  # [..., width]
    bias: Tensor | None,  # [width]
    approximate: str,
    needs: Sequence[bool],  # dx, dbias
) -> tuple[Tensor, Tensor]:
    """dx like x; dbias float32 [width]; [0] for what is not needed. Raises as `bias_gelu` does."""
    check_tensors("bias_gelu_backward", grad_y=grad_y, x=x, bias=bias)
    needs_dx, needs_dbias = needs
    dx = torch.empty(x.shape if needs_dx else 0, dtype=x.dtype, device=x.device)
    allocate = torch.empty if x.numel() else torch.zeros
    dbias = allocate(x.shape[-1] if needs_dbias else 0, dtype=torch.float32, device=x.device)
    if x.numel() and (needs_dx or needs_dbias):
        operation = "bias_gelu_backward_dbias" if needs_dbias else "bias_gelu_backward"
        _launch(operation, x, bias, grad_y, dx if needs_dx else None, dbias if needs_dbias else None, approximate)
    return dx, dbias


def _launch(
    operation: str, x: Tensor, bias: Tensor | None, grad_y: Tensor | None,
    out: Tensor | None, dbias: Tensor | None, approximate: str,
) -> None:  # fmt: skip
    width = x.shape[-1]
    if bias is None and dbias is None and x.is_contiguous() and (grad_y is None or grad_y.is_contiguous()):
        width = x.numel()  # columns mean nothing: one long row, which is aligned whatever the width was
    rows = x.numel() // width
    device = device_of(x)
    line = _configs.element_tile(operation, device)
    tile = line.tile // 2 if dbias is not None and x.element_size() == 4 else line.tile
    block, tile_rows = blocked_elementwise(rows, width, tile)
    blocks, programs = triton.cdiv(width, block), triton.cdiv(rows, tile_rows)
    if dbias is not None:
        programs = min(programs, triton.cdiv(_configs.PROGRAMS_PER_PROCESSOR * device.processors, blocks))
    x_rows, grad_y_rows = as_rows(x, width), None if grad_y is None else as_rows(grad_y, width)
    partials = None
    if dbias is not None:
        partials = torch.empty((1, programs, width), dtype=torch.float32, device=x.device)
    launch(
        _gelu_kernel, (programs * blocks,), x, x_rows, dense(bias), grad_y_rows, out, partials,
        rows, width, x_rows.stride(0), 0 if grad_y_rows is None else grad_y_rows.stride(0), programs, blocks,
        num_warps=line.num_warps, ACTIVATION=_ACTIVATIONS[approximate],
        ROWS=tile_rows, BLOCK=block, STAGES=line.num_stages,
    )  # fmt: skip
    if partials is not None and dbias is not None:
        add_partials(partials, (dbias,), (True,))


def aot_cases() -> Iterator[AotCase]:
    """What is compiled ahead of time: each activation, dtype and alignment, with and without a bias."""
    for approximate in _ACTIVATIONS:
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            for width, aligned in ((3072, True), (3071, False), (384, True)):
                yield from _aot_cases(width, dtype, aligned, approximate)


def _aot_cases(width: int, dtype: torch.dtype, aligned: bool, approximate: str) -> Iterator[AotCase]:
    x, bias = (meta_tensor(*shape, dtype=dtype, aligned=aligned) for shape in ((64, width), (width,)))
    calls: dict[str, Callable[[], object]] = {
        "bias_gelu": lambda: bias_gelu(x, bias, approximate),
        "bias_gelu_backward": lambda: bias_gelu_backward(x, x, bias, approximate, (True, True)),
    }
    if width == 3072:
        calls |= {
            "bias_gelu-no_bias": lambda: bias_gelu(x, None, approximate),
            "bias_gelu_backward-no_bias": lambda: bias_gelu_backward(x, x, None, approximate, (True, False)),
        }
    for name, call in calls.items():
        operation, _, variant = name.partition("-")
        parts = [operation, f"w{width}", DTYPE_NAMES[dtype], approximate, variant, "" if aligned else "unaligned"]
        sample = approximate == "none" and dtype is torch.bfloat16 and width == 3072
        yield AotCase("-".join(filter(None, parts)), call, sample)
