"""Cross-entropy over logits, in C++ (csrc/cpu/cross_entropy*.cpp), and over a linear layer, on torch's products."""

import torch
from torch import Tensor  # torch comes first: the extension then shares its OpenMP threads
from torch.nn import functional as F

from fastbert import _C
from fastbert.cpu._launch import check_output, dtype_number, empty_result, matrix, nothing
from fastbert.reference.losses import chunks_with_labels

# Logits alive at once in linear_cross_entropy: 16 MiB of float32, which the allocator keeps for the next chunk. (What is
# mapped anew for each costs more in page faults than the losses themselves.)
_CHUNK_ELEMENTS = 1 << 22


def _check_logits(operation: str, logits: Tensor, target: Tensor) -> int:
    """The number of the logits' dtype."""
    dtype = dtype_number(operation, logits)
    if logits.dim() != 2 or logits.shape[1] == 0:
        raise ValueError(f"{operation}: logits are {list(logits.shape)}; expected [rows, classes], at least one class")
    if target.shape != logits.shape[:1] or target.dtype is not torch.int64 or target.device != logits.device:
        raise ValueError(
            f"{operation}: target is {list(target.shape)} {target.dtype} on {target.device}; expected "
            f"{list(logits.shape[:1])} torch.int64 on {logits.device}"
        )
    return dtype


def cross_entropy(
    logits: Tensor,  # [rows, classes]
    target: Tensor,  # int64 [rows]
    ignore_index: int,
    label_smoothing: float,
) -> tuple[Tensor, Tensor]:
    """losses [rows] and log-sum-exp [rows], float32; both 0 where the target is ignore_index.

    Args:
        logits: float32 or bfloat16, any strides.
        target: 0 to classes - 1, or ignore_index. Not looked at here: the operator has checked it.

    Raises:
        NotImplementedError: the logits have another dtype.
        ValueError: shapes do not fit.
    """
    dtype = _check_logits("cross_entropy", logits, target)
    rows, classes = logits.shape
    losses = torch.empty(rows, dtype=torch.float32)
    lse = torch.empty_like(losses)
    (source, stride), target = matrix(logits), target.contiguous()
    _C.cross_entropy(
        dtype,
        rows,
        classes,
        source.data_ptr(),
        stride,
        target.data_ptr(),
        ignore_index,
        label_smoothing,
        losses.data_ptr(),
        lse.data_ptr(),
        torch.get_num_threads(),
    )
    return losses, lse


def cross_entropy_backward(
    grad_losses: Tensor,  # float32 [rows]
    logits: Tensor,  # [rows, classes]
    target: Tensor,  # int64 [rows]
    lse: Tensor,  # float32 [rows]
    ignore_index: int,
    label_smoothing: float,
    *,
    out: Tensor | None = None,  # [rows, classes]
) -> Tensor:
    """dlogits [rows, classes] in the logits' dtype.

    Args:
        out: takes the result where given: contiguous, the logits' shape and dtype. It may be the logits themselves.

    Raises:
        NotImplementedError: the logits have another dtype.
        ValueError: shapes or dtypes do not fit.
    """
    operation = "cross_entropy_backward"
    dtype = _check_logits(operation, logits, target)
    rows, classes = logits.shape
    for name, each in (("grad_losses", grad_losses), ("lse", lse)):
        if each.shape != target.shape or each.dtype is not torch.float32 or each.device != logits.device:
            raise ValueError(f"{operation}: {name} is {list(each.shape)} {each.dtype}; expected [{rows}] torch.float32")
    if out is None:
        dlogits = empty_result(logits)
    else:
        check_output(operation, "out", out, logits)
        dlogits = out
    (source, stride), target, lse = matrix(logits), target.contiguous(), lse.contiguous()
    _C.cross_entropy_backward(
        dtype,
        rows,
        classes,
        grad_losses.data_ptr(),
        grad_losses.stride(0),  # 0 where a mean's gradient was expanded
        source.data_ptr(),
        stride,
        target.data_ptr(),
        lse.data_ptr(),
        ignore_index,
        label_smoothing,
        dlogits.data_ptr(),
        torch.get_num_threads(),
    )
    return dlogits


def cross_entropy_backward_(
    grad_losses: Tensor,  # float32 [rows]
    logits: Tensor,  # [rows, classes], overwritten
    target: Tensor,  # int64 [rows]
    lse: Tensor,  # float32 [rows]
    ignore_index: int,
    label_smoothing: float,
) -> None:
    """cross_entropy_backward, whose result takes the logits' place. Raises as it does."""
    arguments = (grad_losses, logits, target, lse, ignore_index, label_smoothing)
    if logits.is_contiguous():
        cross_entropy_backward(*arguments, out=logits)
    else:
        logits.copy_(cross_entropy_backward(*arguments))


def linear_cross_entropy(
    x: Tensor,  # [rows, hidden]
    weight: Tensor,  # [classes, hidden]
    bias: Tensor | None,  # [classes]
    target: Tensor,  # int64 [rows]
    ignore_index: int,
    label_smoothing: float,
) -> tuple[Tensor, Tensor]:
    """cross_entropy(x weightᵀ + bias, target): losses [rows], log-sum-exp [rows], float32; only rows with a label computed.

    Raises:
        NotImplementedError: x is neither float32 nor bfloat16.
        ValueError: shapes do not fit.
    """
    dtype_number("linear_cross_entropy", x)
    losses = torch.zeros(x.shape[0], dtype=torch.float32)
    lse = torch.zeros_like(losses)
    for rows in chunks_with_labels(target, weight.shape[0], ignore_index, _CHUNK_ELEMENTS):
        logits = F.linear(x[rows], weight, bias)
        losses[rows], lse[rows] = cross_entropy(logits, target[rows], ignore_index, label_smoothing)
    return losses, lse


def linear_cross_entropy_backward(
    grad_losses: Tensor,  # float32 [rows]
    x: Tensor,  # [rows, hidden]
    weight: Tensor,  # [classes, hidden]
    bias: Tensor | None,  # [classes]
    target: Tensor,  # int64 [rows]
    lse: Tensor,  # float32 [rows]
    ignore_index: int,
    label_smoothing: float,
    needs: list[bool],  # dx, dweight, dbias
) -> tuple[Tensor, Tensor, Tensor]:
    """dx [rows, hidden] in x's dtype; dweight [classes, hidden], dbias [classes] float32. Raises as the forward does.

    The logits are computed again, and their gradient takes their place.
    """
    dtype_number("linear_cross_entropy_backward", x)
    dx = torch.zeros_like(x, memory_format=torch.contiguous_format) if needs[0] else nothing(x.dtype)
    dweight = torch.zeros(weight.shape, dtype=torch.float32) if needs[1] else nothing()
    dbias = torch.zeros(weight.shape[:1], dtype=torch.float32) if needs[2] else nothing()
    for rows in chunks_with_labels(target, weight.shape[0], ignore_index, _CHUNK_ELEMENTS):
        x_rows = x[rows]
        logits = F.linear(x_rows, weight, bias)
        d = cross_entropy_backward(
            grad_losses[rows], logits, target[rows], lse[rows], ignore_index, label_smoothing, out=logits
        )  # [chunk, classes]
        if needs[0]:
            dx[rows] = d @ weight
        if needs[1]:
            if x.dtype is torch.float32:
                dweight.addmm_(d.T, x_rows)
            else:
                dweight += d.T @ x_rows
        if needs[2]:
            dbias += d.sum(0, dtype=torch.float32)
    return dx, dweight, dbias
