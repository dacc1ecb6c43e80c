"""What embedding_layer_norm must satisfy, whatever implements it: shared by the interpreter's and the GPU's tests.

`operations` is anything with functions of the operators' names and signatures: a kernel module, or torch.ops.fastbert.
"""

import itertools
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastbert import reference
from tests.numerics import assert_close_to_exact

EPS = 1e-5
#: Each with its reason.
WIDTHS = {
    4: "less than a 16-byte access of a 16-bit dtype",
    17: "odd, below a block",
    384: "MiniLM, several rows a tile",
    1025: "one over a power of two: half the lanes are masked",
}
TOKENS = {
    0: "an empty batch",
    1: "less than a tile",
    37: "several tiles and chunks, the last not full",
}
#: Every width with a few tokens, every number of tokens with one width.
SHAPES = sorted({(5, width) for width in WIDTHS} | {(tokens, 17) for tokens in TOKENS})
WIDE = 8193  # one over the widest row that a program holds


@dataclass
class Inputs:
    input_ids: Tensor  # int [tokens]
    position_ids: Tensor | None
    token_type_ids: Tensor | None
    word: Tensor  # [words, width]
    position: Tensor | None
    token_type: Tensor | None
    weight: Tensor | None  # [width]
    bias: Tensor | None

    @property
    def arguments(self) -> tuple[Any, ...]:
        return tuple(getattr(self, field.name) for field in fields(self))

    def double(self) -> "Inputs":
        return Inputs(*(t.double() if t is not None and t.is_floating_point() else t for t in self.arguments))


def inputs(tokens: int, width: int, dtype: torch.dtype, device: str = "cpu", words: int = 30) -> Inputs:
    """Word ids as in text, few of them often and most never; two token types; positions in order."""

    def normal(*shape: int, shift: float = 0.0) -> Tensor:
        return (torch.randn(*shape, dtype=torch.float64) + shift).to(dtype).to(device)

    ids = (torch.rand(tokens) ** 3 * words).long()
    types, positions = torch.randint(2, (tokens,)), torch.arange(tokens) % 12
    tables = normal(words, width), normal(12, width), normal(2, width)
    return Inputs(*(t.to(device) for t in (ids, positions, types)), *tables, normal(width, shift=1.0), normal(width))


def seed_tensor(value: int, device: str = "cpu") -> Tensor:
    return torch.tensor([value], dtype=torch.int64, device=device)


def _torchs(i: Inputs, mask: Tensor | float) -> Tensor:
    total = F.embedding(i.input_ids, i.word)
    if i.position is not None:
        total = total + F.embedding(i.position_ids, i.position)
    if i.token_type is not None:
        total = total + F.embedding(i.token_type_ids, i.token_type)
    return F.layer_norm(total, total.shape[-1:], i.weight, i.bias, EPS) * mask


def check_embedding_layer_norm(
    operations: Any,
    i: Inputs,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    offset: int = 0,
    padding_idx: int = -1,
) -> None:
    """y, mean, rstd and every gradient against float64 with the same dropout mask."""
    random = (dropout_p, seed, offset)
    shape = (*i.input_ids.shape, i.word.shape[1])
    y, mean, rstd = operations.embedding_layer_norm(*i.arguments, EPS, *random, True)
    assert y.dtype == i.word.dtype and y.shape == shape and y.is_contiguous()
    assert mean.dtype == rstd.dtype == torch.float32 and mean.shape == rstd.shape == i.input_ids.shape
    exact_y, exact_mean, exact_rstd = reference.embedding_layer_norm(*i.double().arguments, EPS, *random, True)
    leaves = Inputs(
        *(t.detach().clone().requires_grad_() if t is not None and t.is_floating_point() else t for t in i.arguments)
    )
    mask = 1.0 if seed is None else reference.dropout_mask(shape, *random, i.word.dtype)
    own = _torchs(leaves, mask)
    assert_close_to_exact(y, exact_y, own, "y")
    # What a mean near zero and a variance near zero are sums of is not: their floor is an ulp of that.
    torch.testing.assert_close(mean.double(), exact_mean, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(rstd.double(), exact_rstd, atol=0.0, rtol=1e-4)
    alone, *nothing = operations.embedding_layer_norm(*i.arguments, EPS, *random, False)
    assert torch.equal(alone, y) and [each.shape for each in nothing] == [(0,), (0,)]

    grad = torch.randn(shape, dtype=torch.float64).to(y)
    tables = i.arguments[:6]
    needs = [t is not None for t in (*i.arguments[3:8],)]
    arguments = (*tables, mean, rstd, i.weight, *random, padding_idx)
    gradients = operations.embedding_layer_norm_backward(grad, *arguments, needs)
    exact = reference.embedding_layer_norm_backward(
        grad.double(),
        *i.double().arguments[:6],
        mean.double(),
        rstd.double(),
        i.double().weight,
        *random,
        padding_idx,
        needs,
    )
    own.backward(grad)
    names = ("word", "position", "token_type", "weight", "bias")
    for name, needed, actual, wanted in zip(names, needs, gradients, exact, strict=True):
        if needed:
            assert actual.dtype == torch.float32, name
            torchs = getattr(leaves, name).grad
            if name == "word" and padding_idx >= 0:
                torchs[padding_idx] = 0.0
                assert not actual[padding_idx].any()
            assert_close_to_exact(actual, wanted, torchs, f"gradient of {name}", floor_ulps=16)


def check_needs(operations: Any, i: Inputs) -> None:
    """Each gradient alone, and all but each, give what all of them give, and nothing else."""
    _, mean, rstd = operations.embedding_layer_norm(*i.arguments, EPS, 0.0, None, 0, True)
    grad = torch.randn_like(i.word[i.input_ids])
    arguments = (grad, *i.arguments[:6], mean, rstd, i.weight, 0.0, None, 0, -1)
    every = operations.embedding_layer_norm_backward(*arguments, [True] * 5)
    for wanted_one, number in itertools.product((True, False), range(5)):
        needs = [(j == number) == wanted_one for j in range(5)]
        some = operations.embedding_layer_norm_backward(*arguments, needs)
        for needed, actual, wanted in zip(needs, some, every, strict=True):
            assert torch.equal(actual, wanted) if needed else actual.shape == (0,), needs


def check_ids_outside_the_tables_read_nothing_else(operations: Any, device: str = "cpu") -> None:
    i = inputs(6, 17, torch.float32, device)
    wild = torch.tensor([2**40, -1, 30, 0, -(2**40), 29], device=device)
    clamped = torch.tensor([29, 0, 29, 0, 0, 29], device=device)
    results = []
    for ids in (wild, clamped):
        i.input_ids = i.position_ids = ids if ids is wild else clamped.clamp(max=11)
        if ids is clamped:
            i.input_ids = clamped
        y, mean, rstd = operations.embedding_layer_norm(*i.arguments, EPS, 0.0, None, 0, True)
        arguments = (y, *i.arguments[:6], mean, rstd, i.weight, 0.0, None, 0, -1, [True] * 5)
        results.append((y, mean, rstd, *operations.embedding_layer_norm_backward(*arguments)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def check_dropout_is_the_contracts(operations: Any, tokens: int, width: int, seed: Tensor, offset: int) -> None:
    """The mask of the forward and of the backward pass, bit for bit."""
    device = str(seed.device)
    i = inputs(tokens, width, torch.float32, device)
    i.weight, i.bias = torch.zeros(width, device=device), torch.ones(width, device=device)
    mask = reference.dropout_mask((tokens, width), 0.3, seed, offset, torch.float32)
    y, mean, rstd = operations.embedding_layer_norm(*i.arguments, EPS, 0.3, seed, offset, True)
    assert torch.equal(y, mask)
    arguments = (*i.arguments[:6], mean, rstd, i.weight, 0.3, seed, offset, -1, [False] * 4 + [True])
    dbias = operations.embedding_layer_norm_backward(torch.ones_like(y), *arguments)[4]
    torch.testing.assert_close(dbias, mask.sum(0))


def check_strides(operations: Any, device: str = "cpu") -> None:
    """Bit for bit what contiguous tensors give: tables and gradients apart, ids of two dimensions and expanded."""
    i = inputs(12, 33, torch.float32, device)
    i.input_ids, i.token_type_ids = i.input_ids.view(4, 3).T, i.token_type_ids.view(3, 4).to(torch.int32)
    i.position_ids = torch.arange(4, device=device).expand(3, 4)
    i.word = torch.randn(30, 80, device=device)[:, ::2][:, :33]
    i.position = torch.randn(12, 80, device=device)[:, 1:34]
    grad = torch.randn(4, 3, 33, device=device).transpose(0, 1)
    results = []
    for each, g in ((i, grad), (Inputs(*(t.contiguous() for t in i.arguments)), grad.contiguous())):
        y, mean, rstd = operations.embedding_layer_norm(*each.arguments, EPS, 0.0, None, 0, True)
        arguments = (g, *each.arguments[:6], mean, rstd, each.weight, 0.0, None, 0, -1, [True] * 5)
        results.append((y, mean, rstd, *operations.embedding_layer_norm_backward(*arguments)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def check_deterministic(operations: Any, i: Inputs) -> None:
    """The same input gives the same output, bit for bit."""
    seed = seed_tensor(9, str(i.word.device))
    runs = []
    for _ in range(3):
        y, mean, rstd = operations.embedding_layer_norm(*i.arguments, EPS, 0.1, seed, 8, True)
        arguments = (y, *i.arguments[:6], mean, rstd, i.weight, 0.1, seed, 8, 0, [True] * 5)
        runs.append((y, *operations.embedding_layer_norm_backward(*arguments)))
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))
