"""The input of a BERT: three embeddings, their sum's layer norm, dropout, in one pass."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastbert import reference
from fastbert.ops._common import (
    check_device,
    check_floating,
    check_integers,
    check_range,
    check_vector,
    dropout_seed,
    may_want_grad,
    norm_parameters,
    or_none,
    wants_grad,
)
from fastbert.ops._registry import CPU_DTYPES, CUDA_DTYPES, Implementation, Operation, register
from fastbert.ops.block import answers_directly
from fastbert.reference import wide_dtype


def _fake(
    input_ids: Tensor,
    position_ids: Tensor | None,
    token_type_ids: Tensor | None,
    word: Tensor,
    position: Tensor | None,
    token_type: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    dropout_p: float,
    seed: Tensor | None,
    offset: int,
    save_stats: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    stats = input_ids.shape if save_stats else (0,)
    wide = wide_dtype(word)
    return (
        word.new_empty((*input_ids.shape, word.shape[1])),
        word.new_empty(stats, dtype=wide),
        word.new_empty(stats, dtype=wide),
    )


def _fake_backward(
    grad_y: Tensor,
    input_ids: Tensor,
    position_ids: Tensor | None,
    token_type_ids: Tensor | None,
    word: Tensor,
    position: Tensor | None,
    token_type: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
    offset: int,
    padding_idx: int,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    wide = wide_dtype(word)

    def gradient(table: Tensor | None, needed: bool) -> Tensor:
        return word.new_empty(table.shape if needed and table is not None else (0,), dtype=wide)

    width = word.shape[1:]
    return (
        gradient(word, needs[0]),
        gradient(position, needs[1]),
        gradient(token_type, needs[2]),
        word.new_empty(width if needs[3] else (0,), dtype=wide),
        word.new_empty(width if needs[4] else (0,), dtype=wide),
    )


def _check_values(
    input_ids: Tensor,
    position_ids: Tensor | None,
    token_type_ids: Tensor | None,
    word: Tensor,
    position: Tensor | None,
    token_type: Tensor | None,
    *_: Any,
) -> None:
    function = "embedding_layer_norm"
    check_range(function, "input_ids", input_ids, word.shape[0], "the vocabulary")
    if position is not None and position_ids is not None:
        check_range(function, "position_ids", position_ids, position.shape[0], "the position table")
    if token_type is not None and token_type_ids is not None:
        check_range(function, "token_type_ids", token_type_ids, token_type.shape[0], "the token type table")


def _check_backward_values(grad_y: Tensor, *arguments: Any) -> None:
    _check_values(*arguments)


_forward = register(
    Operation(
        "embedding_layer_norm",
        "(Tensor input_ids, Tensor? position_ids, Tensor? token_type_ids, Tensor word, Tensor? position, Tensor? token_type,"
        " Tensor? weight, Tensor? bias, float eps, float dropout_p, Tensor? seed, int offset, bool save_stats)"
        " -> (Tensor y, Tensor mean, Tensor rstd)",
        reference.embedding_layer_norm,
        _fake,
        cpu=Implementation("C++", "fastbert.cpu.embedding:embedding_layer_norm", CPU_DTYPES),
        cuda=Implementation("Triton", "fastbert.kernels.embedding:embedding_layer_norm", CUDA_DTYPES),
        dtype_argument=3,
        check_values=_check_values,
    )
)
_backward = register(
    Operation(
        "embedding_layer_norm_backward",
        "(Tensor grad_y, Tensor input_ids, Tensor? position_ids, Tensor? token_type_ids, Tensor word, Tensor? position,"
        " Tensor? token_type, Tensor mean, Tensor rstd, Tensor? weight, float dropout_p, Tensor? seed, int offset,"
        " int padding_idx, bool[5] needs)"
        " -> (Tensor dword, Tensor dposition, Tensor dtoken_type, Tensor dweight, Tensor dbias)",
        reference.embedding_layer_norm_backward,
        _fake_backward,
        cpu=Implementation("C++", "fastbert.cpu.embedding:embedding_layer_norm_backward", CPU_DTYPES),
        cuda=Implementation("Triton", "fastbert.kernels.embedding:embedding_layer_norm_backward", CUDA_DTYPES),
        check_values=_check_backward_values,
    )
)


class _EmbeddingLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        word: Tensor,
        position: Tensor | None,
        token_type: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        ids: tuple[Tensor, Tensor | None, Tensor | None],
        eps: float,
        dropout_p: float,
        seed: Tensor | None,
        padding_idx: int,
    ) -> Tensor:
        y, mean, rstd = _forward(*ids, word, position, token_type, weight, bias, eps, dropout_p, seed, 0, True)
        ctx.save_for_backward(*ids, word, position, token_type, mean, rstd, weight, seed)
        ctx.numbers = (dropout_p, padding_idx)
        ctx.dtypes = [None if t is None else t.dtype for t in (word, position, token_type, weight, bias)]
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, seed = ctx.saved_tensors
        dropout_p, padding_idx = ctx.numbers
        needs = list(ctx.needs_input_grad[:5])
        gradients = _backward(grad_y, *inputs, dropout_p, seed, 0, padding_idx, needs)
        return (*(or_none(g, n, d) for g, n, d in zip(gradients, needs, ctx.dtypes, strict=True)), *([None] * 5))


@functools.cache
def _direct() -> Callable[..., Tensor | None]:
    from fastbert.cpu.embedding import embed_directly  # it imports the extension

    return embed_directly


def embedding_layer_norm(
    input_ids: Tensor,
    word: Tensor,
    position: Tensor | None = None,
    token_type: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-12,
    *,
    position_ids: Tensor | None = None,
    token_type_ids: Tensor | None = None,
    dropout_p: float = 0.0,
    padding_idx: int | None = None,
) -> Tensor:
    """``dropout(layer_norm(word[input_ids] + position[position_ids] + token_type[token_type_ids]))``.

    Args:
        input_ids: int [...].
        word: [vocabulary, width].
        position: [positions, width]; needs position_ids.
        token_type: [types, width]; token_type_ids default to 0.
        weight, bias: [width], the layer norm's, in word's dtype or float32.
        eps: added to the variance.
        position_ids: int [...], as input_ids.
        token_type_ids: int [...], as input_ids.
        dropout_p: probability that an element of the result is dropped.
        padding_idx: this row of word gets no gradient.

    Returns:
        [..., width] in word's dtype.

    Raises:
        IndexError: an id is outside its table (looked at on CPU, and under ``fastbert.debug()`` elsewhere).
        TypeError: ids are not integers, or dtypes differ.
        ValueError: shapes or devices do not fit.
    """
    plain = dropout_p == 0.0 and not may_want_grad() and answers_directly(word) and word.dim() == 2
    if plain and (padding_idx is None or 0 <= padding_idx < word.shape[0]):
        y = _direct()(input_ids, position_ids, token_type_ids, word, position, token_type, weight, bias, eps)
        if y is not None:
            return y
    function = "embedding_layer_norm"
    check_floating(function, "word", word)
    check_integers(function, "input_ids", input_ids)
    if word.dim() != 2 or word.shape[1] == 0:
        raise ValueError(f"{function}: word has shape {list(word.shape)}; expected [vocabulary, width]")
    width = word.shape[1]
    if (position is None) != (position_ids is None):
        raise ValueError(f"{function}: position and position_ids come together; one of them is missing")
    if token_type is None and token_type_ids is not None:
        raise ValueError(f"{function}: token_type_ids are given without the token_type table")
    if token_type is not None and token_type_ids is None:
        token_type_ids = torch.zeros_like(input_ids)
    for name, table in (("position", position), ("token_type", token_type)):
        if table is None:
            continue
        check_floating(function, name, table)
        if table.dim() != 2 or table.shape[1] != width:
            raise ValueError(f"{function}: {name} has shape {list(table.shape)}; expected [entries, {width}]")
        if table.dtype != word.dtype:
            raise TypeError(f"{function}: {name} has dtype {table.dtype} and word {word.dtype}; cast one of them")
    check_vector(function, "weight", weight, width)
    check_vector(function, "bias", bias, width)
    for name, ids in (("position_ids", position_ids), ("token_type_ids", token_type_ids)):
        if ids is None:
            continue
        check_integers(function, name, ids)
        if ids.shape != input_ids.shape:
            raise ValueError(f"{function}: {name} has shape {list(ids.shape)}; expected {list(input_ids.shape)}")
    check_device(
        function,
        "word",
        word,
        input_ids=input_ids,
        position_ids=position_ids,
        token_type_ids=token_type_ids,
        position=position,
        token_type=token_type,
        weight=weight,
        bias=bias,
    )
    if padding_idx is not None and not 0 <= padding_idx < word.shape[0]:
        raise ValueError(f"{function}: padding_idx is {padding_idx}; the vocabulary takes 0 to {word.shape[0] - 1}")
    weight, bias = norm_parameters(word, weight, bias)
    seed = dropout_seed(function, dropout_p, None, 0, word.device)
    ids3 = (input_ids, position_ids, token_type_ids)
    if wants_grad(word, position, token_type, weight, bias):
        padding = -1 if padding_idx is None else padding_idx
        return _EmbeddingLayerNorm.apply(word, position, token_type, weight, bias, ids3, eps, dropout_p, seed, padding)
    return _forward(*ids3, word, position, token_type, weight, bias, eps, dropout_p, seed, 0, False)[0]
