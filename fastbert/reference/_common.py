"""What the references share."""

import torch
from torch import Tensor


def wide_dtype(x: Tensor) -> torch.dtype:
    """The dtype that arithmetic and statistics of an operation on ``x`` use: float32, or float64 for float64."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def widen(x: Tensor) -> Tensor:
    return x.to(wide_dtype(x))


def nothing(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The [0] tensor that stands for a result nobody asked for."""
    return x.new_empty(0, dtype=dtype)


def matrix(x: Tensor) -> Tensor:
    """[..., width] → [rows, width], also of no rows or no width."""
    return x.reshape(x.shape[:-1].numel(), x.shape[-1])


def sum_over_rows(x: Tensor) -> Tensor:
    """[..., width] → [width], summed over everything else."""
    return matrix(x).sum(0)
