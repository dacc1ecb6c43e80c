"""What stands between the matrix products of a layer, at the sizes of training on a GPU: bf16, 16384 tokens, BERT-large's widths.

Each is bound by memory, so its limit is a copy that moves the same bytes. `python -m fastbert.bench.suites.elementwise` prints
what that takes on paper.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from fastbert.bench.cases import LIMIT, OURS, PEER, Case, Contender, Prepared, Settings, check_against
from fastbert.bench.suites._common import Maker, answers

TOKENS = 16384
_HIDDEN, _INNER, _HEADS, _HEAD_DIM = 1024, 4096, 16, 64  # BERT-large
_SEQ = 512
_OURS, _TORCH, _COMPILED, _COPY = "fastbert.functional", "torch", "torch.compile", "copy of the same bytes"
#: Bytes a second that a copy reads and writes on an H200.
H200_BANDWIDTH = 4.3e12

Function = Callable[..., Tensor]
Made = tuple[list[Tensor], Function, Function]  # differentiable inputs, ours, torch's


@dataclass(frozen=True)
class Problem:
    """An operation, and what a user would write with torch instead."""

    operation: str
    title: str
    make: Callable[[Maker, int], Made]
    forward: float  # elements read and written for each token; parameters and their gradients do not count
    backward: float


def _rms_norm(make: Maker, tokens: int) -> Made:
    from fastbert import functional

    inputs = [make.normal(tokens, _HIDDEN), make.normal(_HIDDEN, scale=0.1, shift=1.0)]
    return (
        inputs,
        lambda x, w: functional.rms_norm(x, _HIDDEN, w, 1e-6),
        lambda x, w: F.rms_norm(x, (_HIDDEN,), w, 1e-6),
    )


def _bias_gelu(make: Maker, tokens: int) -> Made:
    from fastbert import functional

    return [make.normal(tokens, _INNER), make.normal(_INNER)], functional.bias_gelu, lambda x, bias: F.gelu(x + bias)


def _geglu(make: Maker, tokens: int) -> Made:
    from fastbert import functional

    def theirs(x: Tensor) -> Tensor:
        value, gate = x.chunk(2, -1)
        return value * F.gelu(gate)

    return [make.normal(tokens, 2 * _INNER)], functional.geglu, theirs


def _swiglu(make: Maker, tokens: int) -> Made:
    from fastbert import functional

    value, gate = make.normal(tokens, _INNER), make.normal(tokens, _INNER)
    return [value, gate], functional.swiglu, lambda value, gate: value * F.silu(gate)


def _rotary(make: Maker, tokens: int) -> Made:
    from fastbert import functional

    rates = 10000.0 ** (-torch.arange(0, _HEAD_DIM, 2) / _HEAD_DIM)
    angles = (torch.arange(_SEQ)[:, None] * rates).to(make.device)
    cos, sin, positions = angles.cos(), angles.sin(), torch.arange(tokens, device=make.device) % _SEQ

    def theirs(x: Tensor) -> Tensor:  # as models in transformers do it, with the angles already gathered
        first, second = x.chunk(2, -1)
        return x * wide_cos.to(x.dtype) + torch.cat([-second, first], -1) * wide_sin.to(x.dtype)

    wide_cos, wide_sin = (torch.cat([t, t], -1)[positions][:, None] for t in (cos, sin))
    x = make.normal(tokens, _HEADS, _HEAD_DIM)
    return [x], lambda x: functional.rotary(x, cos, sin, position_ids=positions), theirs


def _half_real(make: Maker, tokens: int) -> tuple[list[int], Tensor]:
    """Lengths of sequences padded to _SEQ, half of it in the mean, and the indices of their tokens."""
    lengths = make.integers(1, _SEQ, max(tokens // _SEQ, 1)).tolist()
    places = [row * _SEQ + column for row, length in enumerate(lengths) for column in range(length)]
    return lengths, torch.tensor(places, device=make.device)


def _pack(make: Maker, tokens: int) -> Made:
    from fastbert import packing

    lengths, indices = _half_real(make, tokens)
    padded = make.normal(len(lengths), _SEQ, _HIDDEN)
    return (
        [padded],
        lambda x: packing.pack(x, lengths=lengths).values,
        lambda x: x.flatten(0, 1).index_select(0, indices),
    )


def _unpack(make: Maker, tokens: int) -> Made:
    from fastbert import packing

    lengths, indices = _half_real(make, tokens)
    packed = packing.pack(make.normal(len(lengths), _SEQ, _HIDDEN), lengths=lengths)

    def theirs(x: Tensor) -> Tensor:
        flat = x.new_zeros(len(lengths) * _SEQ, _HIDDEN)
        return flat.index_copy(0, indices, x).view(len(lengths), _SEQ, _HIDDEN)

    return [packed.values], lambda x: packing.unpack(packed, x), theirs


_ROTARY_ANGLES = 2 * _HEAD_DIM // 2 * 2  # cos and sin in float32, counted in elements of 16 bits
PROBLEMS = (
    Problem("rms_norm", f"{TOKENS}×{_HIDDEN}", _rms_norm, 2 * _HIDDEN, 3 * _HIDDEN),
    Problem("bias_gelu", f"{TOKENS}×{_INNER}", _bias_gelu, 2 * _INNER, 3 * _INNER),
    Problem("gated_act", f"{TOKENS}×{2 * _INNER} GEGLU, halves", _geglu, 3 * _INNER, 5 * _INNER),
    Problem("gated_act", f"2 × {TOKENS}×{_INNER} SwiGLU", _swiglu, 3 * _INNER, 5 * _INNER),
    Problem("rotary", f"{TOKENS}×{_HEADS}×{_HEAD_DIM}", _rotary, *[2 * _HIDDEN + _ROTARY_ANGLES] * 2),
    # Half of the rows are real: pack reads and writes half; unpack reads half and writes all, and is pack's gradient.
    Problem("pack", f"{TOKENS}×{_HIDDEN}, half real", _pack, 1.0 * _HIDDEN, 1.5 * _HIDDEN),
    Problem("unpack", f"{TOKENS}×{_HIDDEN}, half real", _unpack, 1.5 * _HIDDEN, 1.0 * _HIDDEN),
)


def cases() -> list[Case]:
    found = []
    for problem in PROBLEMS:
        for backward in (False, True):
            operation = problem.operation + ("_backward" if backward else "")
            found.append(
                Case(
                    name=f"ops/{operation}/{problem.title.replace(' ', '').replace('×', 'x')}-bf16",
                    suite="ops",
                    group=operation,
                    title=f"{problem.title} bf16",
                    contenders=(_OURS, _TORCH, _COMPILED, _COPY),
                    prepare=partial(prepare, problem, backward, TOKENS),
                    quick=True,
                    cuda_only=True,
                )
            )
    return found


def prepare(problem: Problem, backward: bool, tokens: int, settings: Settings) -> Prepared:
    """The contenders on `tokens` tokens."""
    make = Maker(settings.seed, settings.device, torch.bfloat16)
    inputs, ours, theirs = problem.make(make, tokens)
    runner = _gradients if backward else _results
    grad = torch.randn_like(theirs(*inputs)) if backward else None
    # Where gradients are another operator's, it answers: pack's are unpack's.
    answering = {"pack": "unpack", "unpack": "pack", "rotary": "rotary"}.get(problem.operation)
    answering = problem.operation if not backward else answering or f"{problem.operation}_backward"
    contenders = [
        Contender(
            _OURS, OURS, runner(ours, inputs, grad), implementation=answers(answering, settings.device, make.dtype)
        ),
        Contender(_TORCH, PEER, runner(theirs, inputs, grad)),
    ]
    not_measured = {}
    if torch.device(settings.device).type == "cuda":
        contenders.append(Contender(_COMPILED, PEER, runner(torch.compile(theirs), inputs, grad)))
    else:
        not_measured[_COMPILED] = "compared on GPUs only"
    moved = round(tokens * (problem.backward if backward else problem.forward) * inputs[0].element_size())
    source = torch.empty(moved // 2, dtype=torch.uint8, device=settings.device)
    target = torch.empty_like(source)
    contenders.append(Contender(_COPY, LIMIT, lambda: target.copy_(source), checked=False))

    def expected() -> Sequence[Tensor]:
        wide = [each.double() for each in inputs]
        return runner(theirs, wide, None if grad is None else grad.double())()

    return Prepared(
        contenders,
        _TORCH,
        lambda: check_against(contenders, expected, _TORCH, make.dtype),
        bytes=moved,
        items=tokens,
        item_unit="tokens",
        not_measured=not_measured,
        notes=[f"{moved / 1e6:.0f} MB: {moved / H200_BANDWIDTH * 1e6:.1f} µs on an H200 at the rate of a copy"],
    )


def _results(function: Function, inputs: Sequence[Tensor], grad: Tensor | None) -> Callable[[], tuple[Tensor, ...]]:
    def run() -> tuple[Tensor, ...]:
        with torch.no_grad():
            return (function(*inputs),)

    return run


def _gradients(function: Function, inputs: Sequence[Tensor], grad: Tensor | None) -> Callable[[], tuple[Tensor, ...]]:
    """One backward pass as a call: the graph is made once and kept."""
    leaves = [each.detach().requires_grad_() for each in inputs]
    y = function(*leaves)
    return lambda: torch.autograd.grad(y, leaves, grad, retain_graph=True)


def paper() -> str:
    """What each case moves, and how long an H200 takes for that."""
    lines = []
    for problem in PROBLEMS:
        for name, elements in (("forward", problem.forward), ("backward", problem.backward)):
            moved = TOKENS * elements * 2
            lines.append(
                f"{problem.operation:10} {problem.title:28} {name:8} {moved / 1e6:6.0f} MB "
                f"{moved / H200_BANDWIDTH * 1e6:6.1f} µs, goal (90 %) {moved / 0.9 / H200_BANDWIDTH * 1e6:6.1f} µs"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    print(paper())
