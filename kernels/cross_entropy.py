"""Cross-entropy over logits: forward, backward, and backward into the logits' own memory.

    lse = log(sum(exp(logits)));  loss = lse - (1 - s) * logits[target] - s * mean(logits),  s = label_smoothing
    d_logits = grad_loss * (exp(logits - lse) - s / classes - (1 - s) * (class == target))

A row is read once, in blocks, with the running maximum and sum of Milakov and Gimelshein (2018), "Online normalizer
calculation for softmax". A row whose target is ignored is not read at all. Elements are split among programs in
backward, where each depends on nothing but its row's lse.
"""

import itertools
import math
from collections.abc import Callable, Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastbert.kernels import _loss_configs
from fastbert.kernels._launch import AotCase, as_rows, check_device, check_tensors, device_of, launch
from fastbert.kernels._rows import DTYPE_NAMES, meta_tensor

LOG2E: tl.constexpr = tl.constexpr(math.log2(math.e))
#: Bounds of a running maximum. An infinite one would make inf - inf of a row of -inf, or of a logit that is inf itself;
#: the lowest and the highest finite number give lse = -inf and lse = inf there, as torch.logsumexp does.
LOWEST: tl.constexpr = tl.constexpr(torch.finfo(torch.float32).min)
HIGHEST: tl.constexpr = tl.constexpr(torch.finfo(torch.float32).max)


@triton.jit(do_not_specialize=["ignore_index"])
def _forward_kernel(
    logits,  # [rows, classes]
    target,  # int64 [rows]
    losses,  # float32 [rows], written
    lse,  # float32 [rows], written
    classes, logits_stride, ignore_index: tl.int64, label_smoothing,
    SMOOTHED: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One row a program."""
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(target + row)
    row_loss = 0.0
    row_lse = 0.0
    if label != ignore_index:
        row_logits = logits + row * logits_stride
        maximum = LOWEST
        sums = tl.zeros([BLOCK], tl.float32)  # one each lane: the lanes are added once, after the loop
        plain_sums = tl.zeros([BLOCK], tl.float32)
        for first in tl.range(0, classes, BLOCK, num_stages=STAGES):
            column = first + tl.arange(0, BLOCK)
            value = tl.load(row_logits + column, mask=column < classes, other=float("-inf")).to(tl.float32)
            new_maximum = tl.minimum(tl.maximum(maximum, tl.max(value, axis=0)), HIGHEST)
            sums = sums * tl.exp2((maximum - new_maximum) * LOG2E) + tl.exp2((value - new_maximum) * LOG2E)
            maximum = new_maximum
            if SMOOTHED:
                plain_sums += tl.where(column < classes, value, 0.0)
        log_sum = tl.log(tl.sum(sums, axis=0))
        # The maximum leaves first: two large numbers that nearly cancel keep their digits.
        picked = tl.load(row_logits + tl.minimum(tl.maximum(label, 0), classes - 1)).to(tl.float32)
        row_loss = (1.0 - label_smoothing) * (maximum - picked) + log_sum
        if SMOOTHED:
            row_loss += label_smoothing * (maximum - tl.sum(plain_sums, axis=0) / classes)
        row_lse = maximum + log_sum
    tl.store(losses + row, row_loss)
    tl.store(lse + row, row_lse)


def cross_entropy(
    logits: Tensor,  # [rows, classes]
    target: Tensor,  # int64 [rows]
    ignore_index: int,
    label_smoothing: float,
) -> tuple[Tensor, Tensor]:
    """losses and log-sum-exp, float32 [rows]; both 0 where the target is ignore_index. A target is clamped to the classes.

    Raises ValueError for a tensor that is not on the kernels' device, TypeError for a dtype.
    """
    check_tensors("cross_entropy", logits=logits)
    check_device("cross_entropy", "target", target)
    rows, classes = logits.shape
    losses = torch.empty(rows, dtype=torch.float32, device=logits.device)
    lse = torch.empty_like(losses)
    if rows:
        logits = as_rows(logits, classes)
        line = _loss_configs.class_tile("cross_entropy", classes, device_of(logits))
        launch(
            _forward_kernel, (rows,), logits,
            logits, target.contiguous(), losses, lse, classes, logits.stride(0), ignore_index, label_smoothing,
            num_warps=line.num_warps, SMOOTHED=label_smoothing != 0.0, BLOCK=line.block, STAGES=line.num_stages,
        )  # fmt: skip
    return losses, lse


@triton.jit(do_not_specialize=["ignore_index", "blocks"])
def _backward_kernel(
    grad_losses,  # float32 [rows] by its stride
    logits,  # [rows, classes]
    target,  # int64 [rows]
    lse,  # float32 [rows]
    out,  # [rows, classes], written; may be logits
    classes, blocks, grad_stride, logits_stride, out_stride, ignore_index: tl.int64, label_smoothing,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid: rows times blocks of classes, blocks first."""
    program = tl.program_id(0)
    row = (program // blocks).to(tl.int64)
    column = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
    in_row = column < classes
    label = tl.load(target + row)
    gradient = tl.zeros([BLOCK], tl.float32)
    if label != ignore_index:
        value = tl.load(logits + row * logits_stride + column, mask=in_row, other=0.0).to(tl.float32)
        label = tl.minimum(tl.maximum(label, 0), classes - 1)
        gradient = tl.exp2((value - tl.load(lse + row)) * LOG2E) - label_smoothing / classes
        gradient = tl.where(column == label, gradient - (1.0 - label_smoothing), gradient)
        gradient *= tl.load(grad_losses + row * grad_stride)
    tl.store(out + row * out_stride + column, gradient.to(out.dtype.element_ty), mask=in_row)


def cross_entropy_backward(
    grad_losses: Tensor,  # float32 [rows]
    logits: Tensor,  # [rows, classes]
    target: Tensor,  # int64 [rows]
    lse: Tensor,  # float32 [rows]
    ignore_index: int,
    label_smoothing: float,
) -> Tensor:
    """d_logits like logits, contiguous. Raises as `cross_entropy` does."""
    out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    logits = as_rows(logits, logits.shape[1]) if logits.numel() else logits
    _backward("cross_entropy_backward", grad_losses, logits, target, lse, ignore_index, label_smoothing, out)
    return out


def cross_entropy_backward_(
    grad_losses: Tensor,  # float32 [rows]
    logits: Tensor,  # [rows, classes], neighbouring columns; overwritten by d_logits
    target: Tensor,  # int64 [rows]
    lse: Tensor,  # float32 [rows]
    ignore_index: int,
    label_smoothing: float,
) -> None:
    """d_logits into logits. Raises as `cross_entropy` does, and ValueError for columns that are apart."""
    if logits.stride(1) != 1 and logits.shape[1] > 1:
        raise ValueError(
            f"cross_entropy_backward_: logits have strides {logits.stride()}; in place the kernel takes neighbouring columns. "
            "Make them contiguous."
        )
    _backward("cross_entropy_backward_", grad_losses, logits, target, lse, ignore_index, label_smoothing, logits)


def _backward(
    operation: str, grad_losses: Tensor, logits: Tensor, target: Tensor, lse: Tensor, ignore_index: int,
    label_smoothing: float, out: Tensor,
) -> None:  # fmt: skip
    check_tensors(operation, logits=logits, grad_losses=grad_losses, lse=lse)
    check_device(operation, "target", target)
    rows, classes = logits.shape
    if rows:
        line = _loss_configs.class_tile("cross_entropy_backward", classes, device_of(logits))
        blocks = triton.cdiv(classes, line.block)
        launch(
            _backward_kernel, (rows * blocks,), logits,
            grad_losses, logits, target.contiguous(), lse.contiguous(), out,
            classes, blocks, grad_losses.stride(0), logits.stride(0), out.stride(0), ignore_index, label_smoothing,
            num_warps=line.num_warps, BLOCK=line.block,
        )  # fmt: skip


# -------------------------------------------------------------------------------------------------------- ahead of time


def aot_cases() -> Iterator[AotCase]:
    """What is compiled ahead of time: few classes and a vocabulary, each dtype and alignment."""
    for classes, (dtype, name), aligned in itertools.product((1024, 32768), DTYPE_NAMES.items(), (True, False)):
        width = classes if aligned else classes - 1
        logits = meta_tensor(64, width, dtype=dtype, aligned=aligned)
        target = meta_tensor(64, dtype=torch.int64)
        rows, gradient = meta_tensor(64, dtype=torch.float32), meta_tensor(dtype=torch.float32).expand(64)
        calls: dict[str, Callable[[], object]] = {
            "cross_entropy": lambda z=logits, t=target: cross_entropy(z, t, -100, 0.0),
            "cross_entropy-smoothed": lambda z=logits, t=target: cross_entropy(z, t, -100, 0.1),
            "cross_entropy_backward": lambda z=logits, t=target, r=rows: cross_entropy_backward(r, z, t, r, -100, 0.1),
            "cross_entropy_backward-in_place": lambda z=logits, t=target, r=rows, g=gradient: cross_entropy_backward_(
                g, z, t, r, -100, 0.1
            ),
        }
        for call_name, call in calls.items():
            operation, _, variant = call_name.partition("-")
            parts = [operation, f"c{width}", name, variant, "" if aligned else "unaligned"]
            sample = classes > 1024 and dtype is torch.bfloat16 and aligned and variant != "in_place"
            yield AotCase("-".join(filter(None, parts)), call, sample)
