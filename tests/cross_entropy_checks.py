"""What cross_entropy and linear_cross_entropy must satisfy, whatever implements them: shared by the interpreter's and the GPU's
tests.

`operations` is anything with functions of the operators' names and signatures: kernel modules, or torch.ops.fastbert.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastbert import reference
from tests.numerics import FLOOR_ULPS, assert_close_to_exact

IGNORED = -100
#: Each with its reason.
CLASSES = {
    1: "the loss is 0",
    2: "yes or no",
    17: "odd, less than a block",
    1000: "a multiple of 8, not of 16",
    5001: "a block and a rest",
}


def labels(rows: int, classes: int, device: str = "cpu", labelled: float = 0.7) -> Tensor:
    """int64 [rows], some of them ignored."""
    target = torch.randint(classes, (rows,))
    return target.masked_fill(torch.rand(rows) >= labelled, IGNORED).to(device)


def logits_of(rows: int, classes: int, dtype: torch.dtype, device: str = "cpu", offset: float = 0.0) -> Tensor:
    return (torch.randn(rows, classes, dtype=torch.float64) * 3 + offset).to(dtype).to(device)


def check_cross_entropy(operations: Any, logits: Tensor, target: Tensor, smoothing: float) -> None:
    """Losses, lse and gradients against float64; in place bit for bit the same."""
    numbers = (IGNORED, smoothing)
    losses, lse = operations.cross_entropy(logits, target, *numbers)
    assert losses.dtype == lse.dtype == torch.float32 and losses.shape == lse.shape == target.shape
    exact = reference.cross_entropy(logits.double(), target, *numbers)
    settings = dict(reduction="none", ignore_index=IGNORED, label_smoothing=smoothing)
    wide = logits.float()  # losses are float32; smoothed ones of many classes overflow torch's float16
    assert_close_to_exact(losses, exact[0], F.cross_entropy(wide, target, **settings), "losses")
    assert_close_to_exact(lse, exact[1], wide.logsumexp(-1).masked_fill(target == IGNORED, 0.0), "lse")
    assert not losses[target == IGNORED].any() and not lse[target == IGNORED].any()

    grad = torch.randn(target.shape, device=target.device)
    d = operations.cross_entropy_backward(grad, logits, target, lse, *numbers)
    assert d.dtype == logits.dtype and d.shape == logits.shape and d.is_contiguous()
    leaf = logits.detach().clone().requires_grad_()
    F.cross_entropy(leaf.float(), target, **settings).backward(grad)
    exact_d = reference.cross_entropy_backward(grad.double(), logits.double(), target, exact[1], *numbers)
    largest = grad.abs().max() if grad.numel() else 0.0
    assert_close_to_exact(d, exact_d, leaf.grad, "d_logits", floor_ulps=_floor(exact_d, largest))

    buffer = torch.full((logits.shape[0], logits.shape[1] + 3), 7.0, dtype=logits.dtype, device=logits.device)
    rows_apart = buffer[:, : logits.shape[1]].copy_(logits)
    assert operations.cross_entropy_backward_(grad, rows_apart, target, lse, *numbers) is None
    assert torch.equal(rows_apart, d) and (buffer[:, logits.shape[1] :] == 7.0).all()
    one = torch.ones((), device=grad.device).expand(target.shape)  # what a sum's backward pass hands over
    assert torch.equal(
        operations.cross_entropy_backward(one, logits, target, lse, *numbers),
        operations.cross_entropy_backward(one.contiguous(), logits, target, lse, *numbers),
    )


def _floor(exact: Tensor, terms: Tensor | float) -> float:
    """Ulps for a sum of cancelling terms: a few of the largest term, not of the sum. A gradient is probability minus label."""
    largest = float(exact.abs().max()) if exact.numel() else 0.0
    return FLOOR_ULPS * max(1.0, float(terms) / largest if largest else 1.0)


def check_not_finite(operations: Any, device: str = "cpu") -> None:
    """As torch.logsumexp: NaN and +inf flow, -inf is a class that cannot be; other rows are not touched."""
    logits = logits_of(6, 1000, torch.float32, device)
    clean = operations.cross_entropy(logits, torch.arange(6, device=device), IGNORED, 0.0)
    logits[0, 3], logits[1, 999], logits[2, 0], logits[3] = torch.nan, torch.inf, -torch.inf, -torch.inf
    for smoothing in (0.0, 0.1):
        target = torch.arange(6, device=device)
        actual = operations.cross_entropy(logits, target, IGNORED, smoothing)
        wanted = reference.cross_entropy(logits, target, IGNORED, smoothing)
        torch.testing.assert_close(actual, wanted, equal_nan=True)
        if smoothing == 0.0:
            assert all(torch.equal(a[4:], c[4:]) for a, c in zip(actual, clean, strict=True))
        grad = torch.ones(6, device=device)
        torch.testing.assert_close(
            operations.cross_entropy_backward(grad, logits, target, wanted[1], IGNORED, smoothing),
            reference.cross_entropy_backward(grad, logits, target, wanted[1], IGNORED, smoothing),
            equal_nan=True,
        )
    ignored = torch.full((6,), IGNORED, device=device)  # their logits are not even read
    losses, lse = operations.cross_entropy(logits, ignored, IGNORED, 0.1)
    assert not losses.any() and not lse.any()
    assert not operations.cross_entropy_backward(torch.ones(6, device=device), logits, ignored, lse, IGNORED, 0.1).any()


def check_targets_outside_the_classes_read_nothing_else(operations: Any, device: str = "cpu") -> None:
    logits = torch.randn(3, 17, device=device)
    wild = torch.tensor([2**40, -5, 17], device=device)
    clamped = torch.tensor([16, 0, 16], device=device)
    for actual, wanted in zip(
        operations.cross_entropy(logits, wild, IGNORED, 0.1),
        operations.cross_entropy(logits, clamped, IGNORED, 0.1),
        strict=True,
    ):
        assert torch.equal(actual, wanted)


def linear_inputs(
    rows: int, hidden: int, classes: int, dtype: torch.dtype, device: str = "cpu", labelled: float = 0.3
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, weight, bias, target."""
    x, weight, bias = (
        torch.randn(rows, hidden, dtype=torch.float64),
        torch.randn(classes, hidden, dtype=torch.float64) * hidden**-0.5 * 2,
        torch.randn(classes, dtype=torch.float64),
    )
    return (*(each.to(dtype).to(device) for each in (x, weight, bias)), labels(rows, classes, device, labelled))


def check_linear_cross_entropy(
    operations: Any, x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, smoothing: float = 0.1
) -> None:
    """Losses, lse and the three gradients against float64."""
    numbers = (IGNORED, smoothing)
    wide = [None if t is None else t.double() for t in (x, weight, bias)]
    losses, lse = operations.linear_cross_entropy(x, weight, bias, target, *numbers)
    assert losses.dtype == lse.dtype == torch.float32 and losses.shape == lse.shape == target.shape
    exact = reference.linear_cross_entropy(*wide, target, *numbers)
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in (x, weight, bias)]
    own_logits = F.linear(*leaves)
    settings = dict(reduction="none", ignore_index=IGNORED, label_smoothing=smoothing)
    own = F.cross_entropy(own_logits.float(), target, **settings)  # smoothed, many classes overflow float16
    assert_close_to_exact(losses, exact[0], own, "losses")
    assert_close_to_exact(lse, exact[1], own_logits.float().logsumexp(-1).masked_fill(target == IGNORED, 0.0), "lse")

    grad = torch.randn(target.shape, device=target.device)
    needs = [True, True, bias is not None]
    gradients = operations.linear_cross_entropy_backward(grad, x, weight, bias, target, lse, *numbers, needs)
    exact = reference.linear_cross_entropy_backward(grad.double(), *wide, target, exact[1], *numbers, needs)
    own.backward(grad.to(own.dtype))
    for name, leaf, actual, wanted in zip(("dx", "dweight", "dbias"), leaves, gradients, exact, strict=True):
        if leaf is not None:
            assert actual.dtype == (x.dtype if name == "dx" else torch.float32), name
            factor = {"dx": weight, "dweight": x}.get(name, torch.ones(1, device=grad.device))
            floor = _floor(wanted, grad.abs().max() * factor.abs().max()) if grad.numel() else FLOOR_ULPS
            assert_close_to_exact(actual, wanted, leaf.grad, name, floor_ulps=floor)
    assert not gradients[0][target == IGNORED].any()

    if smoothing == 0.0:  # which gradients are wanted and the smoothing have nothing to do with each other
        return
    for i in range(3):  # each alone is what it is among the others
        alone = operations.linear_cross_entropy_backward(
            grad, x, weight, bias, target, lse, *numbers, [needs[i] and i == j for j in range(3)]
        )
        for j, each in enumerate(alone):
            assert torch.equal(each, gradients[i]) if i == j else each.numel() == 0


def check_unlabelled_rows_are_not_read(operations: Any, device: str = "cpu") -> None:
    """NaN in rows without a label, and in no other, reaches nothing."""
    x, weight, bias, target = linear_inputs(100, 24, 70, torch.float32, device)
    x[target == IGNORED] = torch.nan
    losses, lse = operations.linear_cross_entropy(x, weight, bias, target, IGNORED, 0.1)
    gradients = operations.linear_cross_entropy_backward(
        torch.ones_like(losses), x, weight, bias, target, lse, IGNORED, 0.1, [True] * 3
    )
    assert all(each.isfinite().all() for each in (losses, lse, *gradients))


def check_linear_strides(operations: Any, device: str = "cpu") -> None:
    """Bit for bit what contiguous inputs give."""
    x, weight, bias, target = linear_inputs(60, 24, 70, torch.float32, device)
    apart = torch.zeros(60, 50, device=device)
    apart[:, ::2][:, :24] = x
    within = torch.zeros(70, 40, device=device)
    within[:, 3:27] = weight
    results = []
    for a, b in ((x, weight), (apart[:, ::2][:, :24], within[:, 3:27]), (x.T.contiguous().T, weight.T.contiguous().T)):
        losses, lse = operations.linear_cross_entropy(a, b, bias, target, IGNORED, 0.0)
        gradients = operations.linear_cross_entropy_backward(losses, a, b, bias, target, lse, IGNORED, 0.0, [True] * 3)
        results.append((losses, lse, *gradients))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def check_deterministic(operations: Any, inputs: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    """The same input gives the same output, bit for bit."""
    runs = []
    for _ in range(3):
        losses, lse = operations.linear_cross_entropy(*inputs, IGNORED, 0.1)
        gradients = operations.linear_cross_entropy_backward(losses, *inputs, lse, IGNORED, 0.1, [True] * 3)
        runs.append((losses, lse, *gradients))
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))
