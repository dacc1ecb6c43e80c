"""Softmax, the losses and the embeddings on a GPU at training sizes, forward and backward, against torch and torch.compile.

A batch of 16384 tokens of BERT-base in bfloat16. Each case states what an ideal implementation moves and multiplies, and
the time below which an H200 cannot do that.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from fastbert.bench.cases import OURS, PEER, Case, CaseUnavailable, Contender, Prepared, Settings, check_against
from fastbert.bench.suites._common import DTYPE_NAMES, Maker, answers

#: Of an H200: bytes a second of a copy, operations a second of an 8192³ bfloat16 product on random data; both measured.
H200_BANDWIDTH, H200_MATMUL_RATE = 4.3e12, 790e12
_LABELLED = 0.15  # of the tokens, as in masked language modelling
_EPS = 1e-12
_OURS, _TORCH, _COMPILED = "fastbert.functional", "torch", "torch.compile"

Function = Callable[[list[Tensor]], Tensor]


@dataclass(frozen=True)
class Sizes:
    """Of the model and the batch."""

    tokens: int = 16384
    seq: int = 512
    heads: int = 12
    hidden: int = 768
    vocabulary: int = 30522
    dtype: torch.dtype = torch.bfloat16

    @property
    def element(self) -> int:
        return self.dtype.itemsize


@dataclass
class Problem:
    """What is computed, of which tensors, and at least how much is moved (bytes) and multiplied (operations)."""

    leaves: list[Tensor]
    ours: Function
    torchs: Function
    bytes: tuple[int, int]  # forward, backward
    flops: tuple[int, int] = (0, 0)


def floor_seconds(moved: int, flops: int) -> float:
    """The time below which an H200 can neither move nor multiply so much."""
    return max(moved / H200_BANDWIDTH, flops / H200_MATMUL_RATE)


def _softmax(sizes: Sizes, make: Maker) -> Problem:
    from fastbert import functional

    batch = sizes.tokens // sizes.seq
    x = make.normal(batch, sizes.heads, sizes.seq, sizes.seq, scale=4.0)
    mask = make.choice(0.7, batch, 1, 1, sizes.seq)
    mask[..., 0] = True  # a row with nothing to keep is NaN in torch, zeros here
    moved = x.numel() * sizes.element
    return Problem(
        [x],
        lambda t: functional.softmax(t[0], mask=mask, scale=0.125),
        lambda t: (t[0] * 0.125).masked_fill(~mask, -torch.inf).softmax(-1),
        (2 * moved, 3 * moved),
    )


def _labels(sizes: Sizes, make: Maker, share: float) -> tuple[Tensor, int]:
    labelled = make.choice(share, sizes.tokens)
    target = torch.where(labelled, make.integers(0, sizes.vocabulary, sizes.tokens), -100)
    return target, int(labelled.sum())


def _cross_entropy(sizes: Sizes, make: Maker) -> Problem:
    from fastbert import functional

    target, rows = _labels(sizes, make, 1.0)
    moved = rows * sizes.vocabulary * sizes.element
    return Problem(
        [make.normal(sizes.tokens, sizes.vocabulary)],
        lambda t: functional.cross_entropy(t[0], target),
        lambda t: F.cross_entropy(t[0].float(), target),
        (moved, 2 * moved),
    )


def _linear_cross_entropy(sizes: Sizes, make: Maker, share: float) -> Problem:
    from fastbert import functional

    target, rows = _labels(sizes, make, share)
    weight, bias = make.normal(sizes.vocabulary, sizes.hidden, scale=0.03), make.normal(sizes.vocabulary, scale=0.1)
    product = 2 * rows * sizes.hidden * sizes.vocabulary
    table = sizes.vocabulary * sizes.hidden
    moved = (table + rows * sizes.hidden) * sizes.element
    return Problem(
        [make.normal(sizes.tokens, sizes.hidden), weight, bias],
        lambda t: functional.linear_cross_entropy(t[0], t[1], target, t[2]),
        lambda t: F.cross_entropy(F.linear(*t).float(), target),
        (moved, moved + sizes.tokens * sizes.hidden * sizes.element + 4 * table),
        (product, 3 * product),  # backward: the logits again, dx, dweight
    )


def _embedding(sizes: Sizes, make: Maker) -> Problem:
    from fastbert import functional

    ids, types = make.integers(0, sizes.vocabulary, sizes.tokens), make.integers(0, 2, sizes.tokens)
    positions = torch.arange(sizes.tokens, device=make.device) % sizes.seq
    tables = [make.normal(n, sizes.hidden) for n in (sizes.vocabulary, sizes.seq, 2)]
    weight, bias = make.normal(sizes.hidden, scale=0.1, shift=1.0), make.normal(sizes.hidden, scale=0.1)

    def torchs(t: list[Tensor]) -> Tensor:
        total = F.embedding(ids, t[0]) + F.embedding(positions, t[1]) + F.embedding(types, t[2])
        return F.layer_norm(total, (sizes.hidden,), t[3], t[4], _EPS)

    rows = sizes.tokens * sizes.hidden * sizes.element
    gradients = 4 * sizes.hidden * (sizes.vocabulary + sizes.seq + 2)
    return Problem(
        [*tables, weight, bias],
        lambda t: functional.embedding_layer_norm(
            ids, t[0], t[1], t[2], t[3], t[4], _EPS, position_ids=positions, token_type_ids=types
        ),
        torchs,
        # Forward: a row of words read, one written; the other tables stay in the caches. Backward: grad_y and words read, the
        # gradient of their sum written, and read for each of the three tables.
        (2 * rows, 6 * rows + gradients),
    )


_PROBLEMS: dict[tuple[str, str], Callable[[Sizes, Maker], Problem]] = {
    ("softmax", "16384x12x512-masked"): _softmax,
    ("cross_entropy", "16384x30522"): _cross_entropy,
    ("linear_cross_entropy", "16384x768x30522-15pc"): lambda s, make: _linear_cross_entropy(s, make, _LABELLED),
    ("linear_cross_entropy", "16384x768x30522"): lambda s, make: _linear_cross_entropy(s, make, 1.0),
    ("embedding_layer_norm", "16384x768"): _embedding,
}


def cases() -> list[Case]:
    return [
        _case(operation, name, make, backward)
        for (operation, name), make in _PROBLEMS.items()
        for backward in (False, True)
    ]


def _case(operation: str, name: str, make: Callable[[Sizes, Maker], Problem], backward: bool) -> Case:
    group = f"{operation}_backward" if backward else operation

    def on_gpu(settings: Settings) -> Prepared:
        if torch.device(settings.device).type != "cuda":
            raise CaseUnavailable(f"{group} at training size needs a CUDA device; smaller cases of it run on CPUs")
        return prepare(group, make, backward, settings, Sizes())

    return Case(
        name=f"ops/{group}/{name}-{DTYPE_NAMES[Sizes().dtype]}",
        suite="ops",
        group=group,
        title=f"{name.replace('x', '×')} {DTYPE_NAMES[Sizes().dtype]}",
        contenders=(_OURS, _TORCH, _COMPILED),
        prepare=on_gpu,
        quick=True,
        cuda_only=True,
    )


def prepare(
    operation: str, make: Callable[[Sizes, Maker], Problem], backward: bool, settings: Settings, sizes: Sizes
) -> Prepared:
    """The contenders of a problem, on any device."""
    problem = make(sizes, Maker(settings.seed, settings.device, sizes.dtype))
    functions = {_OURS: problem.ours, _TORCH: problem.torchs, _COMPILED: torch.compile(problem.torchs)}

    def runner(function: Function, wide: bool = False) -> Callable[[], object]:
        leaves = [t.double() if wide else t for t in problem.leaves]
        if not backward:
            return lambda: function(leaves)
        leaves = [t.detach().requires_grad_() for t in leaves]
        y = function(leaves)
        grad = torch.ones_like(y) if y.dim() == 0 else (y.detach() * 0.5).to(y.dtype)
        return lambda: torch.autograd.grad(y, leaves, grad, retain_graph=True)

    def expected() -> list[Tensor]:
        result = runner(problem.torchs, wide=True)()
        return [result] if isinstance(result, Tensor) else list(result)  # type: ignore[call-overload]

    contenders = [
        Contender(
            name,
            OURS if name == _OURS else PEER,
            runner(function),
            implementation=answers(operation, settings.device, sizes.dtype) if name == _OURS else "",
        )
        for name, function in functions.items()
    ]
    moved, flops = problem.bytes[backward], problem.flops[backward]
    return Prepared(
        contenders,
        _TORCH,
        lambda: check_against(contenders, expected, _TORCH, sizes.dtype),
        bytes=moved,
        flops=flops or None,
        items=sizes.tokens,
        item_unit="tokens",
        notes=[f"an H200 needs at least {floor_seconds(moved, flops) * 1e6:.0f} µs"],
    )
