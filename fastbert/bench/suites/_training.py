"""Operations at the sizes of training on a GPU, forward and backward, against torch and torch.compile.

A suite lists its operations as `Problem`s; the cases, the check against float64 and the estimate on paper follow from them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from fastbert.bench.cases import LIMIT, OURS, PEER, Case, CaseUnavailable, Contender, Prepared, Settings, check_against
from fastbert.bench.floors import H200, Work
from fastbert.bench.suites._common import DTYPE_NAMES, Maker, answers

_OURS, _TORCH, _COMPILED, _COPY = "fastbert.functional", "torch", "torch.compile", "copy of the same bytes"

Function = Callable[..., Tensor]


@dataclass(frozen=True)
class Sizes:
    """Of the model and the batch; as they stand, BERT-base."""

    tokens: int = 16384
    seq: int = 512
    heads: int = 12
    head_dim: int = 64
    inner: int = 3072
    vocabulary: int = 30522
    dtype: torch.dtype = torch.bfloat16

    @property
    def hidden(self) -> int:
        return self.heads * self.head_dim

    def work(self, elements: float, flops: float = 0, exponentials: float = 0, wide: float = 0) -> Work:
        """Of a kernel that moves so many elements of `dtype`, and `wide` of float32."""
        return Work(flops, exponentials, elements * self.dtype.itemsize + wide * 4)


@dataclass(frozen=True)
class Made:
    """The tensors of a problem, bound to those who solve it."""

    inputs: list[Tensor]  # of floating point: each gets a gradient
    ours: Function
    theirs: Function  # what a user would write with torch


@dataclass(frozen=True)
class Problem:
    """An operation at a size."""

    operation: str
    title: str
    make: Callable[[Maker], Made]
    forward: Work  # of one ideal kernel: each tensor read and written once
    backward: Work
    sizes: Sizes

    def work(self, backward: bool) -> Work:
        return self.backward if backward else self.forward


def cases(problems: Sequence[Problem]) -> list[Case]:
    """Forward and backward of each."""
    return [_case(problem, backward) for problem in problems for backward in (False, True)]


def _case(problem: Problem, backward: bool) -> Case:
    operation = problem.operation + ("_backward" if backward else "")
    dtype = DTYPE_NAMES[problem.sizes.dtype]
    return Case(
        name=f"ops/{operation}/{problem.title.replace(' ', '').replace('×', 'x')}-{dtype}",
        suite="ops",
        group=operation,
        title=f"{problem.title} {dtype}",
        contenders=(_OURS, _TORCH, _COMPILED) + (() if problem.work(backward).flops else (_COPY,)),
        prepare=partial(_prepare_on_gpu, problem, backward),
        quick=True,
        cuda_only=True,
    )


def _prepare_on_gpu(problem: Problem, backward: bool, settings: Settings) -> Prepared:
    if torch.device(settings.device).type != "cuda":
        raise CaseUnavailable(f"{problem.operation} at training size needs a CUDA device; smaller cases run on CPUs")
    return prepare(problem, backward, settings)


def prepare(problem: Problem, backward: bool, settings: Settings) -> Prepared:
    """The contenders of a problem, on any device."""
    dtype = problem.sizes.dtype
    make = Maker(settings.seed, settings.device, dtype)
    made = problem.make(make)
    output_gradients: list[Tensor] = []  # made with the first output, whose shape it has

    def output_gradient(y: Tensor) -> Tensor:
        if not output_gradients:
            output_gradients.append(make.normal(*y.shape) if y.dim() else torch.ones_like(y))
        return output_gradients[0].to(y.dtype)

    def runner(function: Function, inputs: Sequence[Tensor]) -> Callable[[], tuple[Tensor, ...]]:
        """One call: the output; or the gradients, of an output that the first call computes and keeps."""
        leaves = [each.detach().requires_grad_(backward) for each in inputs]
        outputs: list[Tensor] = []

        def gradients() -> tuple[Tensor, ...]:
            if not outputs:
                outputs.append(function(*leaves))
            return torch.autograd.grad(outputs[0], leaves, output_gradient(outputs[0]), retain_graph=True)

        def forward() -> tuple[Tensor, ...]:
            with torch.no_grad():
                return (function(*leaves),)

        return gradients if backward else forward

    contenders = [
        Contender(
            _OURS,
            OURS,
            runner(made.ours, made.inputs),
            implementation=answers(_answering(problem.operation, backward), settings.device, dtype),
        ),
        Contender(_TORCH, PEER, runner(made.theirs, made.inputs)),
    ]
    not_measured = {}
    if torch.device(settings.device).type == "cuda":
        contenders.append(Contender(_COMPILED, PEER, runner(torch.compile(made.theirs), made.inputs)))
    else:
        not_measured[_COMPILED] = "compared on GPUs only"
    work = problem.work(backward)
    if not work.flops:
        source = torch.empty(round(work.bytes) // 2, dtype=torch.uint8, device=settings.device)
        target = torch.empty_like(source)
        contenders.append(Contender(_COPY, LIMIT, lambda: target.copy_(source), checked=False))

    def expected() -> Sequence[Tensor]:
        return runner(made.theirs, [each.double() for each in made.inputs])()

    return Prepared(
        contenders,
        _TORCH,
        lambda: check_against(contenders, expected, _TORCH, dtype),
        bytes=round(work.bytes),
        flops=round(work.flops) or None,
        flops_dtype=dtype,
        items=problem.sizes.tokens,
        item_unit="tokens",
        not_measured=not_measured,
        notes=[f"{work.bytes / 1e6:.0f} MB: an H200 needs at least {work.floor(H200) * 1e6:.0f} µs"],
    )


def _answering(operation: str, backward: bool) -> str:
    """The operator that computes: some gradients are another's, or the operation's own."""
    gradients = {"pack": "unpack", "unpack": "pack", "rotary": "rotary"}
    return gradients.get(operation, f"{operation}_backward") if backward else operation
