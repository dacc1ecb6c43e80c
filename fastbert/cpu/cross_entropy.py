"""Cross-entropy over logits, in C++ (csrc/cpu/cross_entropy*.cpp), and over a linear layer, on torch's products."""

import torch
from torch import Tensor  # torch comes first: the extension then shares its OpenMP threads

from fastbert import _C
from fastbert.cpu._launch import check_output, dtype_number, empty_result, matrix


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
    """losses [rows] and log-sum-exp [rows], float32; a row whose target is ignore_index has loss 0.

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
