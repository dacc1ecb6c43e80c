"""What softmax must satisfy, whatever implements it: shared by the interpreter's and the GPU's tests.

`operations` is anything with functions of the operators' names and signatures: a kernel module, or torch.ops.fastbert.
"""

from typing import Any

import torch
from torch import Tensor

from fastbert import reference
from tests.numerics import assert_close_to_exact

#: Each with its reason.
COLUMNS = {
    1: "every weight is 1",
    17: "odd, many rows a tile",
    128: "a short sequence",
    1000: "a multiple of 8, not of 16",
    2049: "one over a tile",
}
WIDE = 8193  # one over the widest row that a program holds

#: Masks of x [2, 3, 4, columns], by the dimensions that they broadcast.
MASKS = {
    "keys": lambda columns: torch.rand(2, 1, 1, columns) > 0.3,
    "rows": lambda columns: torch.rand(4, columns) > 0.3,
    "whole": lambda columns: torch.rand(2, 3, 4, columns) > 0.3,
    "columns": lambda columns: torch.rand(3, 1, 1) > 0.5,
    "transposed": lambda columns: torch.rand(columns, 4).T > 0.3,
    "additive": lambda columns: torch.randn(3, 4, columns),
    "additive-batch": lambda columns: torch.randn(2, 1, 4, columns).masked_fill(
        torch.rand(2, 1, 4, columns) > 0.7, -torch.inf
    ),
}


def random(*shape: int, dtype: torch.dtype, device: str = "cpu") -> Tensor:
    return (torch.randn(*shape, dtype=torch.float64) * 3).to(dtype).to(device)


def check_softmax(
    operations: Any, x: Tensor, mask: Tensor | None = None, scale: float = 0.5, causal: bool = False
) -> None:
    """y and dx against float64."""
    y = operations.softmax(x, mask, scale, causal)
    assert y.dtype == x.dtype and y.shape == x.shape and y.is_contiguous()
    exact = reference.softmax(x.double(), mask, scale, causal)
    logits = _torchs_logits(x, mask, scale, causal)
    assert_close_to_exact(y, exact, logits.softmax(-1).nan_to_num(0.0), "y")

    grad = random(*x.shape, dtype=x.dtype, device=str(x.device))
    dx = operations.softmax_backward(grad, y, scale)
    assert dx.dtype == x.dtype and dx.shape == x.shape and dx.is_contiguous()
    own = torch.ops.aten._softmax_backward_data(grad, y, -1, y.dtype) * scale
    assert_close_to_exact(dx, reference.softmax_backward(grad.double(), y.double(), scale), own, "dx")


def _torchs_logits(x: Tensor, mask: Tensor | None, scale: float, causal: bool) -> Tensor:
    logits = x * scale
    if mask is not None:
        logits = logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else logits + mask.to(x.dtype)
    if causal:
        logits = logits.masked_fill(torch.ones_like(logits, dtype=torch.bool).triu(1), -torch.inf)
    return logits


def check_masks(operations: Any, columns: int, dtype: torch.dtype, causal: bool, device: str = "cpu") -> None:
    """Every mask, with a row that keeps nothing."""
    x = random(2, 3, 4, columns, dtype=dtype, device=device)
    for make in MASKS.values():
        mask = make(columns).to(device)
        if mask.dtype != torch.bool:
            mask = mask.to(dtype)
        check_softmax(operations, x, mask, 0.5, causal)


def check_nothing_kept(operations: Any, columns: int, device: str = "cpu") -> None:
    """Zeros and zero gradients, not NaN; other rows are not touched."""
    x = random(3, columns, dtype=torch.float32, device=device)
    mask = torch.ones(3, columns, dtype=torch.bool, device=device)
    mask[1] = False
    y = operations.softmax(x, mask, 1.0, False)
    assert not y[1].any() and torch.equal(y[0::2], operations.softmax(x[0::2], None, 1.0, False))
    assert not operations.softmax_backward(torch.ones_like(x), y, 1.0)[1].any()
    least = torch.zeros(3, columns, device=device)
    least[1] = torch.finfo(torch.float32).min  # as transformers builds its masks: a row of them is even, not empty
    torch.testing.assert_close(operations.softmax(x, least, 1.0, False)[1], torch.full_like(x[1], 1 / columns))


def check_not_finite(operations: Any, columns: int, device: str = "cpu") -> None:
    """NaN and +inf make NaN of their own row, as in torch; -inf is a masked element."""
    x = random(4, columns, dtype=torch.float32, device=device)
    x[0, 3], x[1, columns - 1], x[2, 0] = torch.nan, torch.inf, -torch.inf
    y = operations.softmax(x, None, 1.0, False)
    own = x.softmax(-1)
    assert torch.equal(y.isnan(), own.isnan())
    torch.testing.assert_close(y, own, equal_nan=True)
    x = torch.full((1, columns), -torch.inf, device=device)
    x[0, 1] = torch.nan  # nothing else is kept, and still NaN
    assert operations.softmax(x, None, 1.0, False).isnan().all()


def check_strides(operations: Any, device: str = "cpu") -> None:
    """Bit for bit what contiguous inputs give; six dimensions whose mask has too many levels for strides."""
    base = torch.randn(6, 5, 80, device=device)
    mask = torch.rand(5, 160, device=device) > 0.3
    for name, x in {
        "rows apart": base[:, :, :33],
        "within a row": base[:, :, 1:34],
        "columns apart": base[:, :, ::2][..., :33],
        "transposed": base.permute(2, 1, 0)[:33].permute(2, 1, 0),
        "expanded": base[:1, :, :33].expand(4, 5, 33),
    }.items():
        keep = mask[:, ::2][:, :33]
        y = operations.softmax(x, keep, 0.5, True)
        assert torch.equal(y, operations.softmax(x.contiguous(), keep.contiguous(), 0.5, True)), name
        assert torch.equal(
            operations.softmax_backward(x, y, 0.5), operations.softmax_backward(x.contiguous(), y, 0.5)
        ), name
    x = torch.randn(2, 2, 2, 2, 2, 2, 9, device=device)
    for shape in ((2, 1, 2, 1, 2, 1, 9), (1, 2, 1, 2, 1, 2, 9), (2, 1, 2, 1, 1, 1, 9), (2, 2, 1, 1, 2, 2, 1)):
        check_softmax(operations, x, torch.rand(shape, device=device) > 0.3)
