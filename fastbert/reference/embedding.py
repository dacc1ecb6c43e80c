"""BERT's input: word + position + token type embeddings, layer norm, dropout."""

import torch
from torch import Tensor

from fastbert.reference._common import nothing, wide_dtype, widen
from fastbert.reference.dropout import dropout_mask
from fastbert.reference.layer_norm import _normalize, _normalize_backward


def _sum_of_embeddings(
    input_ids: Tensor,  # int [...]
    position_ids: Tensor | None,  # int [...]
    token_type_ids: Tensor | None,  # int [...]
    word: Tensor,  # [vocabulary, width]
    position: Tensor | None,  # [positions, width]
    token_type: Tensor | None,  # [types, width]
) -> Tensor:
    total = widen(word[input_ids])
    if position is not None:
        total = total + widen(position[position_ids])
    if token_type is not None:
        total = total + widen(token_type[token_type_ids])
    return total


def embedding_layer_norm(
    input_ids: Tensor,  # int [...]
    position_ids: Tensor | None,  # int [...]
    token_type_ids: Tensor | None,  # int [...]
    word: Tensor,  # [vocabulary, width]
    position: Tensor | None,  # [positions, width]
    token_type: Tensor | None,  # [types, width]
    weight: Tensor | None,  # [width]
    bias: Tensor | None,  # [width]
    eps: float,
    dropout_p: float,
    seed: Tensor | None,  # int64 [1]
    offset: int,
    save_stats: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """y [..., width] = dropout(layer_norm(word[ids] + position[ids] + token_type[ids])); mean [...], rstd [...]."""
    total = _sum_of_embeddings(input_ids, position_ids, token_type_ids, word, position, token_type)
    y, mean, rstd = _normalize(total, weight, bias, eps)
    if dropout_p > 0.0:
        assert seed is not None
        y = y * dropout_mask(tuple(y.shape), dropout_p, seed, offset, y.dtype)
    if not save_stats:
        mean, rstd = nothing(mean), nothing(mean)
    return y.to(word.dtype), mean, rstd


def embedding_layer_norm_backward(
    grad_y: Tensor,  # [..., width]
    input_ids: Tensor,  # int [...]
    position_ids: Tensor | None,  # int [...]
    token_type_ids: Tensor | None,  # int [...]
    word: Tensor,  # [vocabulary, width]
    position: Tensor | None,  # [positions, width]
    token_type: Tensor | None,  # [types, width]
    mean: Tensor,  # [...]
    rstd: Tensor,  # [...]
    weight: Tensor | None,  # [width]
    dropout_p: float,
    seed: Tensor | None,  # int64 [1]
    offset: int,
    padding_idx: int,  # this row of word gets no gradient; −1: every row does
    needs: list[bool],  # dword, dposition, dtoken_type, dweight, dbias
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the tables and of weight and bias, in their shapes, wide. The sum is gathered again, not saved."""
    total = _sum_of_embeddings(input_ids, position_ids, token_type_ids, word, position, token_type)
    grad_y = widen(grad_y)
    if dropout_p > 0.0:
        assert seed is not None
        grad_y = grad_y * dropout_mask(tuple(grad_y.shape), dropout_p, seed, offset, grad_y.dtype)
    d_total, dweight, dbias = _normalize_backward(grad_y, total, mean, rstd, weight)
    rows = d_total.reshape(-1, word.shape[-1])  # [tokens, width]
    wide = wide_dtype(word)

    def scatter(ids: Tensor | None, table: Tensor | None, needed: bool) -> Tensor:
        if ids is None or table is None or not needed:
            return nothing(word, wide)
        return torch.zeros(table.shape, dtype=wide, device=table.device).index_add_(0, ids.reshape(-1), rows)

    dword = scatter(input_ids, word, needs[0])
    if needs[0] and padding_idx >= 0:
        dword[padding_idx] = 0.0
    return (
        dword,
        scatter(position_ids, position, needs[1]),
        scatter(token_type_ids, token_type, needs[2]),
        dweight if needs[3] else nothing(word, wide),
        dbias if needs[4] else nothing(word, wide),
    )
