"""What stands between the matrix products of a layer, at the sizes of training on a GPU: bf16, 16384 tokens of BERT-large.

Each is bound by memory, so its limit is a copy that moves the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from fastbert.bench.cases import Case
from fastbert.bench.suites import _training
from fastbert.bench.suites._common import Maker
from fastbert.bench.suites._training import Made, Problem, Sizes

_EPS = 1e-12


def problems(sizes: Sizes) -> list[Problem]:
    """Of any size; their works are those of ideal kernels, where parameters and their gradients do not count."""
    rows, inner = sizes.tokens * sizes.hidden, sizes.tokens * sizes.inner
    tokens = f"{sizes.tokens}×"

    def problem(
        operation: str,
        title: str,
        make: Callable[[Sizes, Maker], Made],
        forward: float,
        backward: float,
        wide: float = 0,
    ) -> Problem:
        works = sizes.work(forward, wide=wide), sizes.work(backward, wide=wide)
        return Problem(operation, title, partial(make, sizes), *works, sizes)

    return [
        problem("layer_norm", f"{tokens}{sizes.hidden}", _layer_norm, 2 * rows, 3 * rows),
        problem("add_layer_norm", f"{tokens}{sizes.hidden}", _add_layer_norm, 3 * rows, 3 * rows),
        problem("rms_norm", f"{tokens}{sizes.hidden}", _rms_norm, 2 * rows, 3 * rows),
        problem("bias_gelu", f"{tokens}{sizes.inner}", _bias_gelu, 2 * inner, 3 * inner),
        problem("gated_act", f"{tokens}{2 * sizes.inner} GEGLU, halves", _geglu, 3 * inner, 5 * inner),
        problem("gated_act", f"2 × {tokens}{sizes.inner} SwiGLU", _swiglu, 3 * inner, 5 * inner),
        problem(
            "rotary",
            f"{tokens}{sizes.heads}×{sizes.head_dim}",
            _rotary,
            2 * rows,
            2 * rows,
            wide=sizes.tokens * sizes.head_dim,  # cosines and sines of half the features each
        ),
        # Half of the rows are real: pack reads and writes half; unpack reads half and writes all, and is pack's gradient.
        problem("pack", f"{tokens}{sizes.hidden}, half real", _pack, 1.0 * rows, 1.5 * rows),
        problem("unpack", f"{tokens}{sizes.hidden}, half real", _unpack, 1.5 * rows, 1.0 * rows),
    ]


def cases() -> list[Case]:
    return _training.cases(PROBLEMS)


def _layer_norm(sizes: Sizes, make: Maker) -> Made:
    from fastbert import functional

    x, weight, bias = make.normal(sizes.tokens, sizes.hidden), *_parameters(sizes, make)
    return Made(
        [x, weight, bias],
        lambda x, weight, bias: functional.layer_norm(x, sizes.hidden, weight, bias, _EPS),
        lambda x, weight, bias: F.layer_norm(x, (sizes.hidden,), weight, bias, _EPS),
    )


def _add_layer_norm(sizes: Sizes, make: Maker) -> Made:
    from fastbert import functional

    x, residual = (make.normal(sizes.tokens, sizes.hidden) for _ in range(2))
    return Made(
        [x, residual, *_parameters(sizes, make)],
        lambda x, residual, weight, bias: functional.add_layer_norm(x, residual, weight, bias, _EPS, return_sum=False),
        lambda x, residual, weight, bias: F.layer_norm(x + residual, (sizes.hidden,), weight, bias, _EPS),
    )


def _parameters(sizes: Sizes, make: Maker) -> tuple[Tensor, Tensor]:
    return make.normal(sizes.hidden, scale=0.1, shift=1.0), make.normal(sizes.hidden, scale=0.1)


def _rms_norm(sizes: Sizes, make: Maker) -> Made:
    from fastbert import functional

    return Made(
        [make.normal(sizes.tokens, sizes.hidden), make.normal(sizes.hidden, scale=0.1, shift=1.0)],
        lambda x, weight: functional.rms_norm(x, sizes.hidden, weight, 1e-6),
        lambda x, weight: F.rms_norm(x, (sizes.hidden,), weight, 1e-6),
    )


def _bias_gelu(sizes: Sizes, make: Maker) -> Made:
    from fastbert import functional

    inputs = [make.normal(sizes.tokens, sizes.inner), make.normal(sizes.inner)]
    return Made(inputs, functional.bias_gelu, lambda x, bias: F.gelu(x + bias))


def _geglu(sizes: Sizes, make: Maker) -> Made:
    from fastbert import functional

    def theirs(x: Tensor) -> Tensor:
        value, gate = x.chunk(2, -1)
        return value * F.gelu(gate)

    return Made([make.normal(sizes.tokens, 2 * sizes.inner)], functional.geglu, theirs)


def _swiglu(sizes: Sizes, make: Maker) -> Made:
    from fastbert import functional

    inputs = [make.normal(sizes.tokens, sizes.inner) for _ in range(2)]
    return Made(inputs, functional.swiglu, lambda value, gate: value * F.silu(gate))


def _rotary(sizes: Sizes, make: Maker) -> Made:
    from fastbert import functional

    rates = 10000.0 ** (-torch.arange(0, sizes.head_dim, 2) / sizes.head_dim)
    angles = (torch.arange(sizes.seq)[:, None] * rates).to(make.device)
    cos, sin = angles.cos(), angles.sin()
    positions = torch.arange(sizes.tokens, device=make.device) % sizes.seq

    def theirs(x: Tensor) -> Tensor:  # as models in transformers do it, with the angles already gathered
        first, second = x.chunk(2, -1)
        return x * wide_cos.to(x.dtype) + torch.cat([-second, first], -1) * wide_sin.to(x.dtype)

    wide_cos, wide_sin = (torch.cat([t, t], -1)[positions][:, None] for t in (cos, sin))
    x = make.normal(sizes.tokens, sizes.heads, sizes.head_dim)
    return Made([x], lambda x: functional.rotary(x, cos, sin, position_ids=positions), theirs)


def _half_real(sizes: Sizes, make: Maker) -> tuple[list[int], Tensor]:
    """Lengths of sequences padded to `seq`, half of it in the mean, and the indices of their tokens."""
    lengths = make.integers(1, sizes.seq, max(sizes.tokens // sizes.seq, 1)).tolist()
    places = [row * sizes.seq + column for row, length in enumerate(lengths) for column in range(length)]
    return lengths, torch.tensor(places, device=make.device)


def _pack(sizes: Sizes, make: Maker) -> Made:
    from fastbert import packing

    lengths, indices = _half_real(sizes, make)
    return Made(
        [make.normal(len(lengths), sizes.seq, sizes.hidden)],
        lambda x: packing.pack(x, lengths=lengths).values,
        lambda x: x.flatten(0, 1).index_select(0, indices),
    )


def _unpack(sizes: Sizes, make: Maker) -> Made:
    from fastbert import packing

    lengths, indices = _half_real(sizes, make)
    packed = packing.pack(make.normal(len(lengths), sizes.seq, sizes.hidden), lengths=lengths)

    def theirs(x: Tensor) -> Tensor:
        flat = x.new_zeros(len(lengths) * sizes.seq, sizes.hidden)
        return flat.index_copy(0, indices, x).view(len(lengths), sizes.seq, sizes.hidden)

    return Made([packed.values], lambda x: packing.unpack(packed, x), theirs)


#: At the sizes of the suite's cases.
PROBLEMS = problems(Sizes(heads=16, inner=4096))
