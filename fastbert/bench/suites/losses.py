"""Softmax, the losses and the embeddings at the sizes of training on a GPU: bf16, 16384 tokens of BERT-base."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fastbert.bench.cases import Case
from fastbert.bench.suites import _training
from fastbert.bench.suites._common import Maker
from fastbert.bench.suites._training import Made, Problem, Sizes

_LABELLED = 0.15  # of the tokens, as in masked language modelling
_EPS = 1e-12


def problems(sizes: Sizes) -> list[Problem]:
    """Of any size; their works are those of ideal kernels."""
    return [
        _softmax(sizes),
        _cross_entropy(sizes),
        _linear_cross_entropy(sizes, _LABELLED, f"-{_LABELLED:.0%}".replace("%", "pc")),
        _linear_cross_entropy(sizes, 1.0, ""),
        _embedding(sizes),
    ]


def cases() -> list[Case]:
    return _training.cases(PROBLEMS)


def _softmax(sizes: Sizes) -> Problem:
    batch = sizes.tokens // sizes.seq

    def make(maker: Maker) -> Made:
        from fastbert import functional

        x = maker.normal(batch, sizes.heads, sizes.seq, sizes.seq, scale=4.0)
        mask = maker.choice(0.7, batch, 1, 1, sizes.seq)
        mask[..., 0] = True  # a row with nothing to keep is NaN in torch, zeros here
        return Made(
            [x],
            lambda x: functional.softmax(x, mask=mask, scale=0.125),
            lambda x: (x * 0.125).masked_fill(~mask, -torch.inf).softmax(-1),
        )

    elements = batch * sizes.heads * sizes.seq**2
    return Problem(
        "softmax",
        f"{sizes.tokens}×{sizes.heads}×{sizes.seq}-masked",
        make,
        sizes.work(2 * elements, exponentials=elements),
        sizes.work(3 * elements),
        sizes,
    )


def _wide(logits: Tensor) -> Tensor:
    """As a user computes a loss: in float32 at least."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _cross_entropy(sizes: Sizes) -> Problem:
    def make(maker: Maker) -> Made:
        from fastbert import functional

        target = maker.integers(0, sizes.vocabulary, sizes.tokens)
        return Made(
            [maker.normal(sizes.tokens, sizes.vocabulary)],
            lambda logits: functional.cross_entropy(logits, target),
            lambda logits: F.cross_entropy(_wide(logits), target),
        )

    logits = sizes.tokens * sizes.vocabulary
    return Problem(
        "cross_entropy",
        f"{sizes.tokens}×{sizes.vocabulary}",
        make,
        sizes.work(logits, exponentials=logits),
        sizes.work(2 * logits, exponentials=logits),
        sizes,
    )


def _linear_cross_entropy(sizes: Sizes, share: float, suffix: str) -> Problem:
    rows = round(sizes.tokens * share)

    def make(maker: Maker) -> Made:
        from fastbert import functional

        target = maker.integers(0, sizes.vocabulary, sizes.tokens)
        target[maker.permutation(sizes.tokens)[rows:]] = -100
        x = maker.normal(sizes.tokens, sizes.hidden)
        weight = maker.normal(sizes.vocabulary, sizes.hidden, scale=0.03)
        return Made(
            [x, weight, maker.normal(sizes.vocabulary, scale=0.1)],
            lambda x, weight, bias: functional.linear_cross_entropy(x, weight, target, bias),
            lambda x, weight, bias: F.cross_entropy(_wide(F.linear(x, weight, bias)), target),
        )

    logits, table = rows * sizes.vocabulary, sizes.vocabulary * sizes.hidden
    product, read = 2 * logits * sizes.hidden, table + rows * sizes.hidden
    return Problem(
        "linear_cross_entropy",
        f"{sizes.tokens}×{sizes.hidden}×{sizes.vocabulary}{suffix}",
        make,
        sizes.work(read, product, logits),
        # The logits again, dx and dweight, which is float32.
        sizes.work(read + sizes.tokens * sizes.hidden, 3 * product, logits, wide=table),
        sizes,
    )


def _embedding(sizes: Sizes) -> Problem:
    def make(maker: Maker) -> Made:
        from fastbert import functional

        ids, types = maker.integers(0, sizes.vocabulary, sizes.tokens), maker.integers(0, 2, sizes.tokens)
        positions = torch.arange(sizes.tokens, device=maker.device) % sizes.seq
        tables = [maker.normal(n, sizes.hidden) for n in (sizes.vocabulary, sizes.seq, 2)]
        weight, bias = maker.normal(sizes.hidden, scale=0.1, shift=1.0), maker.normal(sizes.hidden, scale=0.1)

        def ours(word: Tensor, position: Tensor, token_type: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            return functional.embedding_layer_norm(
                ids, word, position, token_type, weight, bias, _EPS, position_ids=positions, token_type_ids=types
            )

        def theirs(word: Tensor, position: Tensor, token_type: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            total = F.embedding(ids, word) + F.embedding(positions, position) + F.embedding(types, token_type)
            return F.layer_norm(total, (sizes.hidden,), weight, bias, _EPS)

        return Made([*tables, weight, bias], ours, theirs)

    rows = sizes.tokens * sizes.hidden
    gradients = sizes.hidden * (sizes.vocabulary + sizes.seq + 2)
    return Problem(
        "embedding_layer_norm",
        f"{sizes.tokens}×{sizes.hidden}",
        make,
        # Forward: a row of words read, one written; the other tables stay in the caches. Backward: grad_y and words read, the
        # gradient of their sum written, and read for each of the three tables.
        sizes.work(2 * rows),
        sizes.work(6 * rows, wide=gradients),
        sizes,
    )


#: At the sizes of the suite's cases.
PROBLEMS = problems(Sizes())
