"""Cross-entropy over logits, and over a linear layer whose logits are never whole in memory."""

import torch
from torch import Tensor
from torch.nn import functional as F

from fastbert.reference._common import nothing, wide_dtype, widen

_CHUNK_ELEMENTS = 1 << 24  # logits alive at once in linear_cross_entropy: 64 MiB of float32


def cross_entropy(
    logits: Tensor,  # [rows, classes]
    target: Tensor,  # int64 [rows]
    ignore_index: int,
    label_smoothing: float,
) -> tuple[Tensor, Tensor]:
    """losses [rows] and log-sum-exp [rows], both wide, and both 0 in a row whose target is ignore_index."""
    logits = widen(logits)
    lse = torch.logsumexp(logits, -1)
    ignored = target == ignore_index
    picked = logits.gather(-1, target.masked_fill(ignored, 0).unsqueeze(-1)).squeeze(-1)
    losses = lse - (1.0 - label_smoothing) * picked
    if label_smoothing > 0.0:
        losses = losses - label_smoothing * logits.mean(-1)
    return losses.masked_fill(ignored, 0.0), lse.masked_fill(ignored, 0.0)


def cross_entropy_backward(
    grad_losses: Tensor,  # wide [rows]
    logits: Tensor,  # [rows, classes]
    target: Tensor,  # int64 [rows]
    lse: Tensor,  # wide [rows]
    ignore_index: int,
    label_smoothing: float,
) -> Tensor:
    """dlogits [rows, classes] in the logits' dtype."""
    ignored = (target == ignore_index).unsqueeze(-1)
    d = torch.exp(widen(logits) - lse.unsqueeze(-1)) - label_smoothing / logits.shape[-1]
    labels = target.unsqueeze(-1).masked_fill(ignored, 0)
    d = d.scatter_add(-1, labels, torch.full_like(d[:, :1], label_smoothing - 1.0))
    return (d * grad_losses.unsqueeze(-1)).masked_fill(ignored, 0.0).to(logits.dtype)


def cross_entropy_backward_(
    grad_losses: Tensor,  # wide [rows]
    logits: Tensor,  # [rows, classes], overwritten by dlogits
    target: Tensor,  # int64 [rows]
    lse: Tensor,  # wide [rows]
    ignore_index: int,
    label_smoothing: float,
) -> None:
    """cross_entropy_backward into the logits' own memory."""
    logits.copy_(cross_entropy_backward(grad_losses, logits, target, lse, ignore_index, label_smoothing))


def chunks_with_labels(target: Tensor, classes: int, ignore_index: int, elements: int) -> list[Tensor]:
    """Row indices that carry a label, in pieces of at most `elements` logits (or of one row)."""
    rows = torch.nonzero(target != ignore_index).squeeze(-1)
    return list(rows.split(max(1, elements // max(1, classes)))) if rows.numel() else []


def linear_cross_entropy(
    x: Tensor,  # [rows, hidden]
    weight: Tensor,  # [classes, hidden]
    bias: Tensor | None,  # [classes]
    target: Tensor,  # int64 [rows]
    ignore_index: int,
    label_smoothing: float,
) -> tuple[Tensor, Tensor]:
    """cross_entropy(x weightᵀ + bias, target): losses [rows], log-sum-exp [rows], wide; only rows with a label computed."""
    losses = torch.zeros(x.shape[0], dtype=wide_dtype(x), device=x.device)
    lse = torch.zeros_like(losses)
    for rows in chunks_with_labels(target, weight.shape[0], ignore_index, _CHUNK_ELEMENTS):
        logits = F.linear(x[rows], weight, bias)
        losses[rows], lse[rows] = cross_entropy(logits, target[rows], ignore_index, label_smoothing)
    return losses, lse


def linear_cross_entropy_backward(
    grad_losses: Tensor,  # wide [rows]
    x: Tensor,  # [rows, hidden]
    weight: Tensor,  # [classes, hidden]
    bias: Tensor | None,  # [classes]
    target: Tensor,  # int64 [rows]
    lse: Tensor,  # wide [rows]
    ignore_index: int,
    label_smoothing: float,
    needs: list[bool],  # dx, dweight, dbias
) -> tuple[Tensor, Tensor, Tensor]:
    """dx [rows, hidden] in x's dtype; dweight [classes, hidden], dbias [classes] wide. The logits are computed again."""
    wide = wide_dtype(x)
    dx = torch.zeros_like(x) if needs[0] else nothing(x)
    dweight = torch.zeros(weight.shape, dtype=wide, device=x.device) if needs[1] else nothing(x, wide)
    dbias = torch.zeros(weight.shape[:1], dtype=wide, device=x.device) if needs[2] else nothing(x, wide)
    for rows in chunks_with_labels(target, weight.shape[0], ignore_index, _CHUNK_ELEMENTS):
        logits = F.linear(x[rows], weight, bias)
        d = cross_entropy_backward(
            grad_losses[rows], logits, target[rows], lse[rows], ignore_index, label_smoothing
        )  # [chunk, classes]
        if needs[0]:
            dx[rows] = d @ weight
        if needs[1]:
            dweight += (d.T @ x[rows]).to(wide)
        if needs[2]:
            dbias += widen(d).sum(0)
    return dx, dweight, dbias
