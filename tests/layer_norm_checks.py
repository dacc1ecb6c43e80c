"""What layer_norm and add_layer_norm must satisfy, whatever implements them: shared by the interpreter's and the GPU's tests.

`operations` is anything with functions of the operators' names and signatures: a kernel module, or torch.ops.fastbert.
"""

import itertools
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastbert import reference
from tests.numerics import FLOOR_ULPS, assert_close_to_exact

EPS = 1e-5

#: Each with its reason.
WIDTHS = {
    1: "variance 0: the row is its own mean",
    17: "odd, below a block",
    64: "a power of two, many rows a tile",
    100: "a multiple of 4 and no more",
    384: "MiniLM",
    768: "BERT-base",
    1000: "a multiple of 8, not of 16",
    1025: "one over a power of two: half the lanes are masked",
}
ROWS = {
    0: "an empty batch",
    1: "less than a tile",
    5: "odd",
    63: "several tiles, the last not full",
}
#: Every width with a few rows, every number of rows with a few widths.
SHAPES = sorted({(5, width) for width in WIDTHS} | {(rows, width) for rows in ROWS for width in (17, 384)})


@dataclass
class Inputs:
    x: Tensor  # [rows, width]
    residual: Tensor  # [rows, width]
    x_bias: Tensor  # [width]
    weight: Tensor  # [width]
    bias: Tensor  # [width]
    grad_y: Tensor  # [rows, width]
    grad_sum: Tensor  # [rows, width]


def inputs(rows: int, width: int, dtype: torch.dtype, device: str = "cpu", offset: float = 0.0) -> Inputs:
    """Random inputs; `offset` is the mean of x."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64)

    tensors = [
        normal(rows, width) + offset,
        normal(rows, width),
        normal(width) * 0.5,
        1 + normal(width) * 0.2,
        normal(width) * 0.2,
        normal(rows, width),
        normal(rows, width),
    ]
    return Inputs(*(tensor.to(dtype).to(device) for tensor in tensors))


def seed_tensor(value: int, device: str = "cpu") -> Tensor:
    return torch.tensor([value], dtype=torch.int64, device=device)


def double(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach().to(torch.float64)


def check_layer_norm(operations: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> None:
    """y, mean and rstd against float64, and without statistics the same y."""
    y, mean, rstd = operations.layer_norm(x, weight, bias, EPS, True)
    assert y.dtype == x.dtype and mean.dtype == rstd.dtype == torch.float32
    assert y.is_contiguous() and y.shape == x.shape and mean.shape == rstd.shape == x.shape[:-1]
    exact = reference.layer_norm(double(x), double(weight), double(bias), EPS, True)
    shape = x.shape[-1:]
    own = F.layer_norm(x, shape, *(None if p is None else p.to(x.dtype) for p in (weight, bias)), EPS)
    _, own_mean, own_rstd = torch.native_layer_norm(x.float(), shape, None, None, EPS)
    assert_close_to_exact(y, exact[0], own, "y")
    _check_mean(mean, exact[1], own_mean, x)
    assert_close_to_exact(rstd, exact[2], own_rstd.reshape(rstd.shape), "rstd")

    y_alone, *nothing = operations.layer_norm(x, weight, bias, EPS, False)
    assert torch.equal(y_alone, y)
    assert [n.shape for n in nothing] == [(0,), (0,)]


def _check_mean(mean: Tensor, exact: Tensor, own: Tensor, x: Tensor) -> None:
    """A mean near zero is the sum of what is not: its floor is a few ulps of the largest element, not of the mean."""
    largest_x, largest_mean = (float(tensor.abs().max()) if tensor.numel() else 0.0 for tensor in (x, exact))
    floor_ulps = FLOOR_ULPS * max(1.0, largest_x / largest_mean if largest_mean else 1.0)
    assert_close_to_exact(mean, exact, own.reshape(mean.shape), "mean", floor_ulps=floor_ulps)


def check_layer_norm_backward(operations: Any, grad_y: Tensor, x: Tensor, weight: Tensor | None) -> None:
    """dx, dweight and dbias against float64 from the same statistics."""
    _, mean, rstd = operations.layer_norm(x, weight, None, EPS, True)
    dx, dweight, dbias = operations.layer_norm_backward(grad_y, x, mean, rstd, weight, [True] * 3)
    assert dx.dtype == x.dtype and dx.shape == x.shape and dx.is_contiguous()
    assert dweight.dtype == dbias.dtype == torch.float32
    exact = reference.layer_norm_backward(
        double(grad_y), double(x), double(mean), double(rstd), double(weight), [True] * 3
    )
    own_dx, _, _ = _torchs_gradients(grad_y, x, weight)
    _, own_dweight, own_dbias = _torchs_gradients(grad_y.float(), x.float(), weight)
    assert_close_to_exact(dx, exact[0], own_dx, "dx")
    assert_close_to_exact(dweight, exact[1], own_dweight, "dweight")
    assert_close_to_exact(dbias, exact[2], own_dbias, "dbias")


def _torchs_gradients(grad_y: Tensor, x: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    x = x.detach().clone().requires_grad_()
    weight = torch.ones_like(x[0]) if weight is None else weight.to(x.dtype)
    weight = weight.detach().clone().requires_grad_()
    bias = torch.zeros_like(weight).requires_grad_()
    F.layer_norm(x, x.shape[-1:], weight, bias, EPS).backward(grad_y)
    assert x.grad is not None and weight.grad is not None and bias.grad is not None
    return x.grad, weight.grad, bias.grad


def check_add_layer_norm(operations: Any, i: Inputs, dropout_p: float, seed: Tensor | None, offset: int) -> None:
    """y, sum, mean and rstd against float64 with the same dropout mask, forward and backward."""
    forward = (i.x, i.residual, i.x_bias, i.weight, i.bias)
    y, total, mean, rstd = operations.add_layer_norm(*forward, EPS, dropout_p, seed, offset, True)
    assert y.dtype == total.dtype == i.x.dtype and y.shape == total.shape == i.x.shape
    exact = reference.add_layer_norm(*map(double, forward), EPS, dropout_p, seed, offset, True)
    own_sum, own_y = _torchs_add_layer_norm(i, dropout_p, seed, offset)
    _, own_mean, own_rstd = torch.native_layer_norm(own_sum.float(), i.x.shape[-1:], None, None, EPS)
    assert_close_to_exact(y, exact[0], own_y, "y")
    assert_close_to_exact(total, exact[1], own_sum, "sum")
    _check_mean(mean, exact[2], own_mean, own_sum)
    assert_close_to_exact(rstd, exact[3], own_rstd.reshape(rstd.shape), "rstd")
    alone, *nothing = operations.add_layer_norm(*forward, EPS, dropout_p, seed, offset, False, False)
    assert torch.equal(alone, y) and [each.numel() for each in nothing] == [0, 0, 0]

    for grad_sum in (i.grad_sum, None):
        backward = (i.grad_y, grad_sum, total, mean, rstd, i.weight)
        gradients = operations.add_layer_norm_backward(*backward, dropout_p, seed, offset, [True] * 5)
        exact = reference.add_layer_norm_backward(*map(double, backward), dropout_p, seed, offset, [True] * 5)
        own_d_sum, _, _ = _torchs_gradients(i.grad_y, total, i.weight)
        wide_d_sum, own_dweight, own_dbias = _torchs_gradients(i.grad_y.float(), total.float(), i.weight)
        if grad_sum is not None:
            own_d_sum, wide_d_sum = own_d_sum + grad_sum, wide_d_sum + grad_sum.float()
        mask = _mask(i.x, dropout_p, seed, offset)
        own_dx = own_d_sum * mask if dropout_p else own_d_sum.new_empty(0)
        own_dx_bias = (wide_d_sum * mask.float()).sum(0)
        own = own_dx, own_d_sum, own_dx_bias, own_dweight, own_dbias
        for name, actual, wanted, torchs in zip(
            ("dx", "dresidual", "dx_bias", "dweight", "dbias"), gradients, exact, own, strict=True
        ):
            assert actual.dtype == (i.x.dtype if name in ("dx", "dresidual") else torch.float32), name
            assert_close_to_exact(actual, wanted, torchs, name)


def _mask(x: Tensor, dropout_p: float, seed: Tensor | None, offset: int) -> Tensor:
    if dropout_p == 0.0 or seed is None:
        return torch.ones_like(x)
    return reference.dropout_mask(tuple(x.shape), dropout_p, seed, offset, x.dtype)


def _torchs_add_layer_norm(i: Inputs, dropout_p: float, seed: Tensor | None, offset: int) -> tuple[Tensor, Tensor]:
    total = i.residual + (i.x + i.x_bias) * _mask(i.x, dropout_p, seed, offset)
    return total, F.layer_norm(total, i.x.shape[-1:], i.weight, i.bias, EPS)


def check_dropout_is_the_contracts(operations: Any, rows: int, width: int, dropout_p: float, seed: Tensor, offset: int):
    """The mask of the forward and of the backward pass, bit for bit."""
    device = str(seed.device)
    ones, zeros = torch.ones(rows, width, device=device), torch.zeros(rows, width, device=device)
    mask = reference.dropout_mask((rows, width), dropout_p, seed, offset, torch.float32)
    for dtype in (torch.float32, torch.float16):
        x, residual = ones.to(dtype), zeros.to(dtype)
        _, total, mean, rstd = operations.add_layer_norm(
            x, residual, None, None, None, EPS, dropout_p, seed, offset, True
        )
        assert torch.equal(total, mask.to(dtype)), f"forward, {dtype}"
        gradients = operations.add_layer_norm_backward(
            residual, x, total, mean, rstd, None, dropout_p, seed, offset, [True] * 5
        )
        assert torch.equal(gradients[0], mask.to(dtype)), f"backward, {dtype}"


#: Philox4x32-10 of counter 0 under key 0, from the known answers of Random123.
KNOWN_WORDS = (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)


def check_known_answer(operations: Any, device: str = "cpu") -> None:
    """An element is kept at its word's own threshold, and dropped at the next."""
    x, zeros = torch.ones(1, 4, device=device), torch.zeros(1, 4, device=device)
    for column, word in enumerate(KNOWN_WORDS):
        for threshold, kept in ((word, True), (word + 1, False)):
            arguments = (x, zeros, None, None, None, EPS, threshold / 2**32, seed_tensor(0, device), 0, False)
            _, total, _, _ = operations.add_layer_norm(*arguments)
            assert bool(total[0, column] != 0) == kept, (column, hex(threshold))


def check_needs(operations: Any, i: Inputs) -> None:
    """Every subset of the gradients gives what all of them give, and nothing else."""
    _, mean, rstd = operations.layer_norm(i.x, i.weight, i.bias, EPS, True)
    every = operations.layer_norm_backward(i.grad_y, i.x, mean, rstd, i.weight, [True] * 3)
    for needs in itertools.product((False, True), repeat=3):
        some = operations.layer_norm_backward(i.grad_y, i.x, mean, rstd, i.weight, list(needs))
        _check_subset(needs, some, every)

    seed = seed_tensor(5, str(i.x.device))
    for dropout_p in (0.0, 0.3):
        forward = (i.x, i.residual, i.x_bias, i.weight, i.bias)
        _, total, mean, rstd = operations.add_layer_norm(*forward, EPS, dropout_p, seed, 0, True)
        backward = (i.grad_y, i.grad_sum, total, mean, rstd, i.weight, dropout_p, seed, 0)
        every = operations.add_layer_norm_backward(*backward, [True] * 5)
        for needs in itertools.product((False, True), repeat=5):
            some = operations.add_layer_norm_backward(*backward, list(needs))
            x, residual, *sums = needs
            written = (x and dropout_p > 0, residual or (x and dropout_p == 0), *sums)
            _check_subset(written, some, every)


def _check_subset(written: tuple[bool, ...], some: tuple[Tensor, ...], every: tuple[Tensor, ...]) -> None:
    for number, (needed, actual, wanted) in enumerate(zip(written, some, every, strict=True)):
        assert actual.dtype == wanted.dtype
        if needed:
            assert torch.equal(actual, wanted), (written, number)
        else:
            assert actual.shape == (0,), (written, number)


def check_strides(operations: Any, device: str = "cpu") -> None:
    """Rows apart, columns apart, transposed, expanded, three dimensions: bit for bit what contiguous inputs give."""
    base = torch.randn(8, 6, 80, device=device)
    weight = torch.randn(160, device=device)[::2][:33]
    layouts = {
        "rows apart": base[:, 0, :33],
        "starting within a row": base[:, 0, 1:34],
        "columns apart": base[:, 0, ::2][:, :33],
        "transposed": base[0].T[:33].T,
        "three dimensions": base[:, :, :33],
        "three dimensions, permuted": base.transpose(0, 1)[..., :33],
        "expanded rows": base[0, 0, :33].expand(7, 33),
        "one row": base[0, 0, :33],
    }
    for name, x in layouts.items():
        grad = torch.randn(80, *x.shape[:-1], device=device).movedim(0, -1)[..., :33]
        results = []
        for a, g, w in ((x, grad, weight), (x.contiguous(), grad.contiguous(), weight.contiguous())):
            y, mean, rstd = operations.layer_norm(a, w, w, EPS, True)
            gradients = operations.layer_norm_backward(g, a, mean, rstd, w, [True] * 3)
            added = operations.add_layer_norm(a, g, w, w, w, EPS, 0.0, None, 0, True)
            back = operations.add_layer_norm_backward(g, a, a, mean, rstd, w, 0.0, None, 0, [True] * 5)
            results.append((y, mean, rstd, *gradients, *added, *back))
        for actual, wanted in zip(*results, strict=True):
            assert torch.equal(actual, wanted), name


def check_not_finite(operations: Any, dtype: torch.dtype, device: str = "cpu") -> None:
    """NaN and Inf make NaN of their own row, as in torch, and touch no other row."""
    i = inputs(9, 100, dtype, device)
    clean_y, _, _ = operations.layer_norm(i.x, i.weight, i.bias, EPS, True)
    x = i.x.clone()
    x[1, 3], x[4, 99], x[6, 0] = torch.nan, torch.inf, -torch.inf
    y, mean, rstd = operations.layer_norm(x, i.weight, i.bias, EPS, True)
    own = F.layer_norm(x, (100,), i.weight, i.bias, EPS)
    assert torch.equal(y.isnan(), own.isnan()) and torch.equal(y.isinf(), own.isinf())
    spoilt = torch.tensor([1, 4, 6], device=device)
    fine = torch.tensor([0, 2, 3, 5, 7, 8], device=device)
    assert y[spoilt].isnan().all() and torch.equal(y[fine], clean_y[fine])

    dx, dweight, _ = operations.layer_norm_backward(i.grad_y, x, mean, rstd, i.weight, [True] * 3)
    own_dx, own_dweight, _ = _torchs_gradients(i.grad_y, x, i.weight)
    assert torch.equal(dx.isnan(), own_dx.isnan())
    assert torch.equal(dweight.isnan(), own_dweight.isnan())

    seed = seed_tensor(3, device)
    _, total, mean, rstd = operations.add_layer_norm(x, i.residual, i.x_bias, i.weight, i.bias, EPS, 0.3, seed, 0, True)
    wanted, _ = _torchs_add_layer_norm(
        Inputs(x, i.residual, i.x_bias, i.weight, i.bias, i.grad_y, i.grad_sum), 0.3, seed, 0
    )
    assert torch.equal(total.isnan(), wanted.isnan()) and torch.equal(total.isinf(), wanted.isinf())


def check_deterministic(operations: Any, dtype: torch.dtype, device: str = "cpu", rows: int = 63):
    """The same input gives the same output, bit for bit."""
    i = inputs(rows, 384, dtype, device)
    seed = seed_tensor(9, device)
    runs = []
    for _ in range(3):
        forward = operations.add_layer_norm(i.x, i.residual, i.x_bias, i.weight, i.bias, EPS, 0.1, seed, 8, True)
        _, total, mean, rstd = forward
        backward = operations.add_layer_norm_backward(
            i.grad_y, i.grad_sum, total, mean, rstd, i.weight, 0.1, seed, 8, [True] * 5
        )
        runs.append((*forward, *backward))
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))
