"""Cross-entropy over a linear layer: cross_entropy(x weightᵀ + bias, target) without the logits in memory.

Only rows with a label are computed. How many there are is known to the device alone: a first kernel lists them, and every
other one is a grid of as many programs as run at a time, which loop over the tiles that the list's length leaves. Nothing
waits for the host, and a captured graph replays with other labels.

Forward makes tiles of logits in registers and keeps a row's running maximum, sum and label's logit (Wijmans et al. 2024,
"Cut Your Losses in Large-Vocabulary Language Models", arXiv 2411.09009): 2 n hidden classes operations for n labelled
rows, and a few numbers a row of memory. The products are Triton's and not cuBLAS's, which must be told the number of rows
by the host. Backward: linear_cross_entropy_backward.py.
"""

import itertools
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastbert.kernels import _loss_configs
from fastbert.kernels._launch import AotCase, check_device, check_tensors, device_of, launch
from fastbert.kernels._rows import DTYPE_NAMES, meta_tensor
from fastbert.kernels.cross_entropy import HIGHEST, LOG2E, LOWEST

VARYING = ["rows", "splits", "split_blocks", "slots", "first_slot", "split_classes", "ignore_index"]


# ------------------------------------------------------------------------------------------------------ rows with labels


@triton.jit(do_not_specialize=["rows", "ignore_index"])
def _list_labelled_kernel(
    target,  # int64 [rows]
    row_of_slot,  # int32 [rows], written up to count
    count,  # int32 [1], written
    rows, ignore_index: tl.int64,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The rows that carry a label, in order. One program: a million rows are 4 MB."""
    found = tl.program_id(0)
    for first in range(0, rows, BLOCK):
        row = first + tl.arange(0, BLOCK)
        labelled = (row < rows) & (tl.load(target + row, mask=row < rows, other=0) != ignore_index)
        slot = found + tl.cumsum(labelled.to(tl.int32), axis=0) - 1
        tl.store(row_of_slot + slot, row, mask=labelled)
        found += tl.sum(labelled.to(tl.int32), axis=0)
    tl.store(count, found)


_LIST_BLOCK = 4096


def list_labelled(target: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """(row_of_slot int32 [rows], count int32 [1])."""
    row_of_slot = torch.empty(target.shape, dtype=torch.int32, device=target.device)
    count = torch.empty(1, dtype=torch.int32, device=target.device)
    launch(
        _list_labelled_kernel, (1,), target, target, row_of_slot, count, target.shape[0], ignore_index,
        num_warps=8, BLOCK=_LIST_BLOCK,
    )  # fmt: skip
    return row_of_slot, count


# -------------------------------------------------------------------------------------------------------------- forward


@triton.jit
def logits_tile(
    x, weight, bias, row, first_class, hidden, classes, x_stride, weight_stride,
    PRECISION: tl.constexpr, EVEN: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """x[row] weightᵀ + bias for the classes from `first_class` on: float32 [rows, BLOCK_N], -inf past the last class."""
    class_ = first_class + tl.arange(0, BLOCK_N)
    # Past the last class the last one's weights are read: a mask would cost more than what it saves.
    # Offsets within a tile are 32 bits wide, here and below: they stay in registers while a 64-bit base moves.
    first_row = weight + tl.cast(first_class, tl.int64) * weight_stride
    weight_rows = first_row + ((tl.minimum(class_, classes - 1) - first_class) * weight_stride)[None, :]
    x_rows = x + row.to(tl.int64)[:, None] * x_stride
    logits = tl.zeros([row.shape[0], BLOCK_N], tl.float32)
    for first in tl.range(0, hidden, BLOCK_K, num_stages=STAGES):
        k = first + tl.arange(0, BLOCK_K)
        if EVEN:
            x_tile = tl.load(x_rows + k[None, :])
            weight_tile = tl.load(weight_rows + k[:, None])
        else:
            x_tile = tl.load(x_rows + k[None, :], mask=(k < hidden)[None, :], other=0.0)
            weight_tile = tl.load(weight_rows + k[:, None], mask=(k < hidden)[:, None], other=0.0)
        logits = tl.dot(x_tile, weight_tile, logits, input_precision=PRECISION)
    if bias is not None:
        logits += tl.load(bias + class_, mask=class_ < classes, other=0.0).to(tl.float32)[None, :]
    return tl.where((class_ < classes)[None, :], logits, float("-inf"))


@triton.jit(do_not_specialize=VARYING)
def _forward_kernel(
    x,  # [rows, hidden]
    weight,  # [classes, hidden]
    bias,  # [classes] or None
    target,  # int64 [rows]
    row_of_slot,  # int32 [rows]
    count,  # int32 [1]
    partials,  # float32 [4, splits, rows], written up to count: maximum, sum of exponentials, label's logit, plain sum
    rows, hidden, classes, x_stride, weight_stride, splits, split_blocks,
    SMOOTHED: tl.constexpr, PRECISION: tl.constexpr, EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A unit of work is a block of slots and a split of the classes; neighbouring programs share the classes, for L2."""
    labelled = tl.load(count)
    slot_blocks = tl.cdiv(labelled, BLOCK_M)
    for unit in range(tl.program_id(0), slot_blocks * splits, tl.num_programs(0)):
        split = unit // slot_blocks
        slot = (unit % slot_blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
        in_list = slot < labelled
        row = tl.load(row_of_slot + slot, mask=in_list, other=0)
        label = tl.load(target + row, mask=in_list, other=0)
        label = tl.minimum(tl.maximum(label, 0), classes - 1).to(tl.int32)
        maximum = tl.full([BLOCK_M], LOWEST, tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        picked = tl.zeros([BLOCK_M], tl.float32)
        plain_total = tl.zeros([BLOCK_M], tl.float32)
        last_block = tl.minimum((split + 1) * split_blocks, tl.cdiv(classes, BLOCK_N))
        for block in range(split * split_blocks, last_block):
            logits = logits_tile(
                x, weight, bias, row, block * BLOCK_N, hidden, classes, x_stride, weight_stride,
                PRECISION, EVEN, BLOCK_N, BLOCK_K, STAGES,
            )  # fmt: skip
            class_ = block * BLOCK_N + tl.arange(0, BLOCK_N)
            new_maximum = tl.minimum(tl.maximum(maximum, tl.max(logits, axis=1)), HIGHEST)
            exponentials = tl.exp2((logits - new_maximum[:, None]) * LOG2E)
            total = total * tl.exp2((maximum - new_maximum) * LOG2E) + tl.sum(exponentials, axis=1)
            maximum = new_maximum
            picked += tl.sum(tl.where(class_[None, :] == label[:, None], logits, 0.0), axis=1)
            if SMOOTHED:
                plain_total += tl.sum(tl.where((class_ < classes)[None, :], logits, 0.0), axis=1)
        kind_stride = splits.to(tl.int64) * rows
        partial = partials + split.to(tl.int64) * rows + slot
        tl.store(partial, maximum, mask=in_list)
        tl.store(partial + kind_stride, total, mask=in_list)
        tl.store(partial + 2 * kind_stride, picked, mask=in_list)
        if SMOOTHED:
            tl.store(partial + 3 * kind_stride, plain_total, mask=in_list)


@triton.jit(do_not_specialize=VARYING)
def _combine_kernel(
    partials,  # float32 [4, splits, rows]
    row_of_slot,  # int32 [rows]
    count,  # int32 [1]
    losses,  # float32 [rows], written where there is a label
    lse,  # float32 [rows], likewise
    rows, classes, splits, label_smoothing,
    SMOOTHED: tl.constexpr, SPLITS: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """One log-sum-exp out of the splits', and the losses. Grid: blocks of slots."""
    slot = tl.program_id(0) * SLOTS + tl.arange(0, SLOTS)
    in_list = slot < tl.load(count)
    split = tl.arange(0, SPLITS)
    in_bounds = (split < splits)[:, None] & in_list[None, :]
    kind_stride = splits.to(tl.int64) * rows
    partial = partials + split.to(tl.int64)[:, None] * rows + slot[None, :]
    maxima = tl.load(partial, mask=in_bounds, other=LOWEST)
    totals = tl.load(partial + kind_stride, mask=in_bounds, other=0.0)
    picked = tl.sum(tl.load(partial + 2 * kind_stride, mask=in_bounds, other=0.0), axis=0)
    maximum = tl.max(maxima, axis=0)
    log_sum = tl.log(tl.sum(totals * tl.exp2((maxima - maximum[None, :]) * LOG2E), axis=0))
    loss = (1.0 - label_smoothing) * (maximum - picked) + log_sum
    if SMOOTHED:
        plain_total = tl.sum(tl.load(partial + 3 * kind_stride, mask=in_bounds, other=0.0), axis=0)
        loss += label_smoothing * (maximum - plain_total / classes)
    row = tl.load(row_of_slot + slot, mask=in_list, other=0)
    tl.store(losses + row, loss, mask=in_list)
    tl.store(lse + row, maximum + log_sum, mask=in_list)


def linear_cross_entropy(
    x: Tensor,  # [rows, hidden]
    weight: Tensor,  # [classes, hidden]
    bias: Tensor | None,  # [classes]
    target: Tensor,  # int64 [rows]
    ignore_index: int,
    label_smoothing: float,
) -> tuple[Tensor, Tensor]:
    """losses and log-sum-exp, float32 [rows]; both 0 where the target is ignore_index. A target is clamped to the classes.

    Raises ValueError for a tensor that is not on the kernels' device, TypeError for a dtype.
    """
    operation = "linear_cross_entropy"
    x, weight, bias, target = checked(operation, x, weight, bias, target)
    (rows, hidden), classes = x.shape, weight.shape[0]
    losses = torch.zeros(rows, dtype=torch.float32, device=x.device)
    lse = torch.zeros_like(losses)
    if rows:
        device = device_of(x)
        smoothed = label_smoothing != 0.0
        kernel = "forward_smoothed" if smoothed else "forward"
        tile = _loss_configs.product_tile(kernel, device, x.element_size(), hidden)
        row_of_slot, count = list_labelled(target, ignore_index)
        class_blocks = triton.cdiv(classes, tile.block_n)
        split_blocks = triton.cdiv(class_blocks, _loss_configs.CLASS_SPLITS)
        splits = triton.cdiv(class_blocks, split_blocks)
        partials = torch.empty((4 if smoothed else 3, splits, rows), dtype=torch.float32, device=x.device)
        launch(
            _forward_kernel, (min(tile.programs(device), triton.cdiv(rows, tile.block_m) * splits),), x,
            x, weight, bias, target, row_of_slot, count, partials,
            rows, hidden, classes, x.stride(0), weight.stride(0), splits, split_blocks,
            num_warps=tile.num_warps, SMOOTHED=smoothed, **logits_constexprs(x, tile),
        )  # fmt: skip
        slots = _loss_configs.COMBINE_SLOTS
        launch(
            _combine_kernel, (triton.cdiv(rows, slots),), x,
            partials, row_of_slot, count, losses, lse, rows, classes, splits, label_smoothing,
            num_warps=4, SMOOTHED=smoothed, SPLITS=triton.next_power_of_2(_loss_configs.CLASS_SPLITS), SLOTS=slots,
        )  # fmt: skip
    return losses, lse


# --------------------------------------------------------------------------------------------------------------- shared


#: Offsets within a tile, of at most 256 rows, are 32 bits wide.
_LARGEST_STRIDE = 2**22


def checked(
    operation: str, x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """The arguments with neighbouring columns."""
    check_tensors(operation, x=x, weight=weight, bias=bias)
    check_device(operation, "target", target)
    x, weight = (t if t.stride(1) == 1 and t.stride(0) < _LARGEST_STRIDE else t.contiguous() for t in (x, weight))
    return x, weight, None if bias is None else bias.contiguous(), target.contiguous()


def precision(x: Tensor) -> str:
    """How float32 products are made: exactly, unless torch is allowed TF32 (by any of its settings: this one follows all)."""
    return "tf32" if x.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def logits_constexprs(x: Tensor, tile: _loss_configs.ProductTile) -> dict[str, object]:
    """Of a product that sums over the columns of x."""
    return dict(PRECISION=precision(x), EVEN=x.shape[1] % tile.block_k == 0, **tile.constexprs)


# -------------------------------------------------------------------------------------------------------- ahead of time


def aot_inputs() -> Iterator[tuple[str, tuple[Tensor, Tensor, Tensor | None, Tensor], float, bool]]:
    """(suffix of the id, (x, weight, bias, target), smoothing, sample): each dtype; widths that are a multiple of 256, of 128
    and odd, with an unaligned start; with and without smoothing and bias."""
    variants = ("", "smoothed", "no_bias")
    for hidden, (dtype, name), variant in itertools.product((768, 384, 767), DTYPE_NAMES.items(), variants):
        rows, classes = 4096, 30522
        if variant == "no_bias" and hidden != 768:
            continue
        x, weight, bias = (
            meta_tensor(n, width, dtype=dtype, aligned=hidden % 2 == 0)
            for n, width in ((rows, hidden), (classes, hidden), (1, classes))
        )
        target = meta_tensor(rows, dtype=torch.int64)
        sample = dtype is torch.bfloat16 and hidden == 768 and not variant
        suffix = "-".join(filter(None, [f"h{hidden}", name, variant]))
        arguments = (x, weight, None if variant == "no_bias" else bias[0], target)
        yield suffix, arguments, 0.1 if variant == "smoothed" else 0.0, sample


def aot_cases() -> Iterator[AotCase]:
    """What is compiled ahead of time."""
    for suffix, arguments, smoothing, sample in aot_inputs():
        yield AotCase(
            f"linear_cross_entropy-{suffix}",
            lambda a=arguments, s=smoothing: linear_cross_entropy(*a, -100, s),
            sample,
        )
