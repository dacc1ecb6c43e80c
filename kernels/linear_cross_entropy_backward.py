"""Cross-entropy over a linear layer, backward; what it is and how it is cut: linear_cross_entropy.py.

The logits are made again, a chunk of labelled rows at a time; the chunk's d_logits are stored in x's dtype, and from them
come, as plain products,

    dx = d_logits weight;  dweight += d_logitsᵀ x;  dbias += sum_rows(d_logits)

so 6 n hidden classes operations for n labelled rows. Making the gradients in the forward pass (Hsu et al. 2024, "Liger Kernel")
would save 2 of the 8 in all, but wants every loss to have one known weight, holds dweight from forward to backward, and
costs an evaluation three times its work. Adding tiles of dx and dweight in place (Wijmans et al. 2024) would save the
chunk's memory, but its order is not fixed.

Sums take no atomics: splits of a sum are stored apart and added by a second kernel; chunks are added in order.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastbert.kernels import _loss_configs
from fastbert.kernels._launch import AotCase, Device, check_tensors, device_of, launch
from fastbert.kernels._rows import meta_tensor
from fastbert.kernels.cross_entropy import LOG2E
from fastbert.kernels.linear_cross_entropy import (
    VARYING,
    aot_inputs,
    checked,
    list_labelled,
    logits_constexprs,
    logits_tile,
    precision,
)


@triton.jit(do_not_specialize=VARYING)
def _d_logits_kernel(
    grad_losses,  # float32 [rows] by its stride
    x,  # [rows, hidden]
    weight,  # [classes, hidden]
    bias,  # [classes] or None
    target,  # int64 [rows]
    lse,  # float32 [rows]
    row_of_slot,  # int32 [rows]
    count,  # int32 [1]
    d_logits,  # [slots, class_stride], written: the chunk's blocks of slots that hold a labelled row, zero past the classes
    bias_partials,  # float32 [slots / BLOCK_M, class_stride], written: their sums over a block of slots, or None
    hidden, classes, class_stride, grad_stride, x_stride, weight_stride, label_smoothing, first_slot, slots,
    PRECISION: tl.constexpr, EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The gradient of a chunk of logits. A unit of work is a tile; neighbouring programs share the classes, for L2."""
    labelled = tl.load(count)
    slot_blocks = tl.cdiv(tl.minimum(labelled - first_slot, slots), BLOCK_M)
    units = tl.maximum(slot_blocks, 0) * tl.cdiv(class_stride, BLOCK_N)
    for unit in range(tl.program_id(0), units, tl.num_programs(0)):
        slot_block = unit % slot_blocks
        first_class = (unit // slot_blocks) * BLOCK_N
        in_chunk = slot_block * BLOCK_M + tl.arange(0, BLOCK_M)
        in_list = first_slot + in_chunk < labelled
        row = tl.load(row_of_slot + first_slot + in_chunk, mask=in_list, other=0)
        logits = logits_tile(
            x, weight, bias, row, first_class, hidden, classes, x_stride, weight_stride,
            PRECISION, EVEN, BLOCK_N, BLOCK_K, STAGES,
        )  # fmt: skip
        label = tl.load(target + row, mask=in_list, other=0)
        label = tl.minimum(tl.maximum(label, 0), classes - 1).to(tl.int32)
        row_lse = tl.load(lse + row, mask=in_list, other=0.0)
        gradient = tl.load(grad_losses + row.to(tl.int64) * grad_stride, mask=in_list, other=0.0)
        class_ = first_class + tl.arange(0, BLOCK_N)
        d = tl.exp2((logits - row_lse[:, None]) * LOG2E) - label_smoothing / classes
        d = tl.where(class_[None, :] == label[:, None], d - (1.0 - label_smoothing), d) * gradient[:, None]
        d = tl.where(in_list[:, None] & (class_ < classes)[None, :], d, 0.0)
        offsets = in_chunk.to(tl.int64)[:, None] * class_stride + class_[None, :]
        in_buffer = (class_ < class_stride)[None, :]
        tl.store(d_logits + offsets, d.to(d_logits.dtype.element_ty), mask=in_buffer)
        if bias_partials is not None:
            partial = bias_partials + slot_block.to(tl.int64) * class_stride + class_
            tl.store(partial, tl.sum(d, axis=0), mask=class_ < class_stride)


@triton.jit(do_not_specialize=VARYING)
def _dx_kernel(
    d_logits,  # [slots, class_stride]
    weight,  # [classes, hidden]
    count,  # int32 [1]
    partials,  # float32 [splits, slots, hidden], written
    hidden, classes, class_stride, weight_stride, first_slot, slots, splits, split_classes,
    PRECISION: tl.constexpr, EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """d_logits weight of a chunk, a split of the classes at a time (a chunk alone has too few tiles for all programs)."""
    slot_blocks = tl.maximum(tl.cdiv(tl.minimum(tl.load(count) - first_slot, slots), BLOCK_M), 0)
    hidden_blocks = tl.cdiv(hidden, BLOCK_N)
    for unit in range(tl.program_id(0), slot_blocks * hidden_blocks * splits, tl.num_programs(0)):
        h = (unit % hidden_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
        first_slot_of_tile = (unit // hidden_blocks % slot_blocks) * BLOCK_M
        split = unit // (hidden_blocks * slot_blocks)
        last_class = tl.minimum((split + 1) * split_classes, classes)
        m, k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_K)
        d_rows = d_logits + first_slot_of_tile.to(tl.int64) * class_stride
        dx = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for first in tl.range(split * split_classes, last_class, BLOCK_K, num_stages=STAGES):
            d_tile = tl.load(d_rows + first + (m[:, None] * class_stride + k[None, :]))  # a row ends on a whole block
            in_table = (k < classes - first)[:, None]
            if not EVEN:
                in_table = in_table & (h < hidden)[None, :]
            weight_rows = weight + tl.cast(first, tl.int64) * weight_stride
            weight_tile = tl.load(weight_rows + (k[:, None] * weight_stride + h[None, :]), mask=in_table, other=0.0)
            dx = tl.dot(d_tile, weight_tile, dx, input_precision=PRECISION)
        slot = split.to(tl.int64) * slots + first_slot_of_tile + m
        partial = partials + slot[:, None] * hidden + h[None, :]
        tl.store(partial, dx, mask=(h < hidden)[None, :])


@triton.jit(do_not_specialize=VARYING)
def _store_dx_kernel(
    partials,  # float32 [splits, slots, hidden]
    row_of_slot,  # int32 [rows]
    count,  # int32 [1]
    dx,  # [rows, hidden] contiguous, written where there is a label
    hidden, first_slot, slots, splits,
    SLOTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The splits' sum, to the rows that the slots stand for. Grid: (blocks of slots, blocks of hidden)."""
    in_chunk = tl.program_id(0) * SLOTS + tl.arange(0, SLOTS)
    in_list = (in_chunk < slots) & (first_slot + in_chunk < tl.load(count))
    h = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    in_bounds = in_list[:, None] & (h < hidden)[None, :]
    total = tl.zeros([SLOTS, BLOCK], tl.float32)
    for split in range(0, splits):
        slot = tl.cast(split, tl.int64) * slots + in_chunk
        total += tl.load(partials + slot[:, None] * hidden + h[None, :], mask=in_bounds, other=0.0)
    row = tl.load(row_of_slot + first_slot + in_chunk, mask=in_list, other=0).to(tl.int64)
    tl.store(dx + row[:, None] * hidden + h[None, :], total.to(dx.dtype.element_ty), mask=in_bounds)


@triton.jit(do_not_specialize=VARYING)
def _gather_kernel(
    x,  # [rows, hidden]
    row_of_slot,  # int32 [rows]
    count,  # int32 [1]
    chunk,  # [slots, hidden] contiguous, written: the chunk's rows of x, zeros in slots past the last label
    hidden, x_stride, first_slot, slots,
    SLOTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """So that dweight's loop reads plain tiles: each is read once for every block of classes. Grid as _store_dx_kernel's."""
    in_chunk = tl.program_id(0) * SLOTS + tl.arange(0, SLOTS)
    labelled = tl.load(count)
    if first_slot < labelled:
        in_list = (in_chunk < slots) & (first_slot + in_chunk < labelled)
        h = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        row = tl.load(row_of_slot + first_slot + in_chunk, mask=in_list, other=0).to(tl.int64)
        in_bounds = in_list[:, None] & (h < hidden)[None, :]
        value = tl.load(x + row[:, None] * x_stride + h[None, :], mask=in_bounds, other=0.0)
        in_buffer = (in_chunk < slots)[:, None] & (h < hidden)[None, :]
        tl.store(chunk + in_chunk.to(tl.int64)[:, None] * hidden + h[None, :], value, mask=in_buffer)


@triton.jit(do_not_specialize=VARYING)
def _dweight_kernel(
    d_logits,  # [slots, class_stride]
    bias_partials,  # float32 [slots / SLOT_BLOCK, class_stride] or None
    x,  # [slots, hidden] contiguous: the chunk's rows
    count,  # int32 [1]
    dweight,  # float32 [classes, hidden] contiguous, added to (FIRST: written), or None
    dbias,  # float32 [classes], likewise
    hidden, classes, class_stride, first_slot, slots,
    FIRST: tl.constexpr, SLOT_BLOCK: tl.constexpr, PRECISION: tl.constexpr, EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """d_logitsᵀ x and the column sums of a chunk. A unit of work is a tile of dweight; its first column has dbias too."""
    in_use = tl.maximum(tl.minimum(tl.load(count) - first_slot, slots), 0)
    hidden_blocks = tl.cdiv(hidden, BLOCK_N)
    if dweight is None:
        hidden_blocks = 1
    units = tl.cdiv(classes, BLOCK_M) * hidden_blocks
    if not FIRST:
        units = tl.where(in_use > 0, units, 0)
    for unit in range(tl.program_id(0), units, tl.num_programs(0)):
        first_class = (unit // hidden_blocks) * BLOCK_M
        class_ = first_class + tl.arange(0, BLOCK_M)
        hidden_block = unit % hidden_blocks
        in_classes = class_ < classes
        if dweight is not None:
            h = hidden_block * BLOCK_N + tl.arange(0, BLOCK_N)
            pointers = dweight + class_.to(tl.int64)[:, None] * hidden + h[None, :]
            in_bounds = in_classes[:, None] & (h < hidden)[None, :]
            if FIRST:  # noqa: SIM108 (a branch that goes away at compile time)
                sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            else:
                sums = tl.load(pointers, mask=in_bounds, other=0.0)
            d_offsets = tl.arange(0, BLOCK_K)[:, None] * class_stride + tl.arange(0, BLOCK_M)[None, :]
            x_offsets = tl.arange(0, BLOCK_K)[:, None] * hidden + h[None, :]
            for first in tl.range(0, in_use, BLOCK_K, num_stages=STAGES):
                # Slots past the last label, up to a whole tile, are zeros in both.
                slot = tl.cast(first, tl.int64)
                d_tile = tl.load(d_logits + slot * class_stride + first_class + d_offsets)
                if EVEN:
                    x_tile = tl.load(x + slot * hidden + x_offsets)
                else:
                    x_tile = tl.load(x + slot * hidden + x_offsets, mask=(h < hidden)[None, :], other=0.0)
                sums = tl.dot(tl.trans(d_tile), x_tile, sums, input_precision=PRECISION)
            tl.store(pointers, sums, mask=in_bounds)
        if dbias is not None:  # noqa: SIM102 (goes away at compile time)
            if hidden_block == 0:
                total = tl.zeros([BLOCK_M], tl.float32)
                for slot_block in range(0, tl.cdiv(in_use, SLOT_BLOCK)):
                    partial = bias_partials + tl.cast(slot_block, tl.int64) * class_stride + class_
                    total += tl.load(partial, mask=in_classes, other=0.0)
                if not FIRST:
                    total += tl.load(dbias + class_, mask=in_classes, other=0.0)
                tl.store(dbias + class_, total, mask=in_classes)


@dataclass(frozen=True)
class _Plan:
    """How the backward pass cuts its work."""

    d_logits_tile: _loss_configs.ProductTile
    dx_tile: _loss_configs.ProductTile
    dweight_tile: _loss_configs.ProductTile
    slots: int  # labelled rows of a chunk
    class_stride: int  # elements of a row of d_logits
    splits: int  # of the classes, for dx
    split_classes: int


def _plan(rows: int, hidden: int, classes: int, device: Device, element_size: int) -> _Plan:
    d_logits_tile, dx_tile, dweight_tile = (
        _loss_configs.product_tile(kernel, device, element_size, hidden) for kernel in ("d_logits", "dx", "dweight")
    )
    slots = _loss_configs.chunk_slots(rows, d_logits_tile)
    # Rows of d_logits end on a whole tile of those who read them, which so need no mask there.
    end = max(dx_tile.block_k, dweight_tile.block_m)
    # A chunk alone has too few tiles of dx for all programs.
    dx_tiles = triton.cdiv(slots, dx_tile.block_m) * triton.cdiv(hidden, dx_tile.block_n)
    split_classes = triton.cdiv(classes, max(1, dx_tile.programs(device) // max(dx_tiles, 1)))
    split_classes = triton.cdiv(split_classes, dx_tile.block_k) * dx_tile.block_k
    return _Plan(
        d_logits_tile, dx_tile, dweight_tile, slots, triton.cdiv(classes, end) * end,
        triton.cdiv(classes, split_classes), split_classes,
    )  # fmt: skip


def backward_workspace(rows: int, hidden: int, classes: int, device: Device, element_size: int) -> int:
    """Bytes of memory that the backward pass takes beside its inputs and gradients."""
    plan = _plan(rows, hidden, classes, device, element_size)
    d_logits = plan.slots * plan.class_stride * element_size
    bias_partials = plan.slots // plan.d_logits_tile.block_m * plan.class_stride * 4
    dx_partials, x_chunk = plan.splits * plan.slots * hidden * 4, plan.slots * hidden * element_size
    return d_logits + bias_partials + dx_partials + x_chunk + rows * 4


def linear_cross_entropy_backward(
    grad_losses: Tensor,  # float32 [rows]
    x: Tensor,  # [rows, hidden]
    weight: Tensor,  # [classes, hidden]
    bias: Tensor | None,  # [classes]
    target: Tensor,  # int64 [rows]
    lse: Tensor,  # float32 [rows]
    ignore_index: int,
    label_smoothing: float,
    needs: Sequence[bool],  # dx, dweight, dbias
) -> tuple[Tensor, Tensor, Tensor]:
    """dx like x, 0 where there is no label; dweight and dbias float32; [0] for what is not needed. Raises as the forward."""
    operation = "linear_cross_entropy_backward"
    check_tensors(operation, grad_losses=grad_losses, lse=lse)
    x, weight, bias, target = checked(operation, x, weight, bias, target)
    needs_dx, needs_dweight, needs_dbias = needs
    (rows, hidden), classes = x.shape, weight.shape[0]
    dx = torch.zeros((rows, hidden) if needs_dx else 0, dtype=x.dtype, device=x.device)
    allocate = torch.empty if rows else torch.zeros
    dweight = allocate((classes, hidden) if needs_dweight else 0, dtype=torch.float32, device=x.device)
    dbias = allocate(classes if needs_dbias else 0, dtype=torch.float32, device=x.device)
    if not rows or not any(needs):
        return dx, dweight, dbias

    device = device_of(x)
    plan = _plan(rows, hidden, classes, device, x.element_size())
    d_logits_tile, dx_tile, dweight_tile = plan.d_logits_tile, plan.dx_tile, plan.dweight_tile
    slots, class_stride, splits = plan.slots, plan.class_stride, plan.splits
    slot_blocks, class_blocks = slots // d_logits_tile.block_m, triton.cdiv(class_stride, d_logits_tile.block_n)
    dx_units = triton.cdiv(slots, dx_tile.block_m) * triton.cdiv(hidden, dx_tile.block_n) * splits
    dweight_units = triton.cdiv(classes, dweight_tile.block_m) * max(triton.cdiv(hidden, dweight_tile.block_n), 1)
    d_logits = torch.empty((slots, class_stride), dtype=x.dtype, device=x.device)
    dx_partials = torch.empty((splits, slots, hidden) if needs_dx else 0, dtype=torch.float32, device=x.device)
    x_chunk = torch.empty((slots, hidden) if needs_dweight else 0, dtype=x.dtype, device=x.device)
    bias_partials = None
    if needs_dbias:
        bias_partials = torch.empty((slot_blocks, class_stride), dtype=torch.float32, device=x.device)
    row_of_slot, count = list_labelled(target, ignore_index)
    lse = lse.contiguous()
    for first_slot in range(0, rows, slots):
        launch(
            _d_logits_kernel, (min(d_logits_tile.programs(device), slot_blocks * class_blocks),), x,
            grad_losses, x, weight, bias, target, lse, row_of_slot, count, d_logits, bias_partials,
            hidden, classes, class_stride, grad_losses.stride(0), x.stride(0), weight.stride(0), label_smoothing,
            first_slot, slots, num_warps=d_logits_tile.num_warps, **logits_constexprs(x, d_logits_tile),
        )  # fmt: skip
        if needs_dx and hidden:
            launch(
                _dx_kernel, (min(dx_tile.programs(device), dx_units),), x,
                d_logits, weight, count, dx_partials,
                hidden, classes, class_stride, weight.stride(0), first_slot, slots, splits, plan.split_classes,
                num_warps=dx_tile.num_warps, **_product_constexprs(x, dx_tile),
            )  # fmt: skip
            launch(
                _store_dx_kernel, (triton.cdiv(slots, 8), triton.cdiv(hidden, 256)), x,
                dx_partials, row_of_slot, count, dx, hidden, first_slot, slots, splits,
                num_warps=4, SLOTS=8, BLOCK=256,
            )  # fmt: skip
        if needs_dweight or needs_dbias:
            if needs_dweight and hidden:
                launch(
                    _gather_kernel, (triton.cdiv(slots, 8), triton.cdiv(hidden, 256)), x,
                    x, row_of_slot, count, x_chunk, hidden, x.stride(0), first_slot, slots,
                    num_warps=4, SLOTS=8, BLOCK=256,
                )  # fmt: skip
            launch(
                _dweight_kernel, (min(dweight_tile.programs(device), dweight_units),), x,
                d_logits, bias_partials, x_chunk, count,
                dweight if needs_dweight and hidden else None, dbias if needs_dbias else None,
                hidden, classes, class_stride, first_slot, slots,
                num_warps=dweight_tile.num_warps, FIRST=first_slot == 0, SLOT_BLOCK=d_logits_tile.block_m,
                **_product_constexprs(x, dweight_tile),
            )  # fmt: skip
    return dx, dweight, dbias


def _product_constexprs(x: Tensor, tile: _loss_configs.ProductTile) -> dict[str, object]:
    """Of a product that has the columns of x."""
    return dict(PRECISION=precision(x), EVEN=x.shape[1] % tile.block_n == 0, **tile.constexprs)


# -------------------------------------------------------------------------------------------------------- ahead of time


def aot_cases() -> Iterator[AotCase]:
    """What is compiled ahead of time."""
    for suffix, arguments, smoothing, sample in aot_inputs():
        rows = meta_tensor(arguments[0].shape[0], dtype=torch.float32)
        yield AotCase(
            f"linear_cross_entropy_backward-{suffix}",
            lambda a=arguments, s=smoothing, r=rows: linear_cross_entropy_backward(
                r, *a, r, -100, s, [True, True, a[2] is not None]
            ),
            sample,
        )
