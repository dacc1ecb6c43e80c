"""What of attention is compiled ahead of time: the calls that reach every line of its tables, and what adds or removes code."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastbert.kernels import _attention_configs
from fastbert.kernels._rows import DTYPE_NAMES, meta_tensor

#: What removes or adds code, by name; each is tried at one head width, some at all.
AOT_VARIANTS: dict[str, dict[str, Any]] = {
    "full": {},
    "causal": dict(window_right=0),
    "packed": dict(packed=True),
    "packed-causal-dropout": dict(packed=True, window_right=0, bottom_right=True, dropout_p=0.1),
    "padding": dict(padding=True),
    "bool": dict(mask=torch.bool),
    "additive": dict(mask=torch.float32),
    "additive-keys": dict(mask=torch.float32, mask_rows=1),
    "window-alibi": dict(window_left=128, window_right=0, alibi=True),
    "dropout": dict(dropout_p=0.1),
    "additive-dropout": dict(mask=torch.float32, dropout_p=0.1),
}


@dataclass(frozen=True)
class AotInputs:
    """Meta tensors of one call, and its arguments from cu_seqlens_q to offset."""

    q: Tensor
    k: Tensor
    v: Tensor
    arguments: tuple[Any, ...]


def aot_inputs(
    head_dim: int, dtype: torch.dtype, length: int = 1024, *, packed: bool = False, mask: torch.dtype | None = None,
    mask_rows: int = 0, padding: bool = False, alibi: bool = False, window_left: int = -1, window_right: int = -1,
    bottom_right: bool = False, dropout_p: float = 0.0,
) -> AotInputs:  # fmt: skip
    """A call with 2 sequences of 4 heads."""

    def meta(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return meta_tensor(*shape, dtype=dtype)

    q = meta(2 * length, 4, head_dim) if packed else meta(2, 4, length, head_dim)
    boundaries = meta(3, dtype=torch.int32) if packed else None
    mask_tensor = None if mask is None else meta(4 if packed else 2, 1, mask_rows or length, length, dtype=mask)
    if mask_tensor is not None and packed:
        mask_tensor = mask_tensor[:, 0]
    arguments = (
        boundaries, boundaries, length, length, mask_tensor,
        meta(2, length, dtype=torch.bool) if padding else None, meta(4, dtype=torch.float32) if alibi else None,
        1 / math.sqrt(head_dim), window_left, window_right, bottom_right,
        dropout_p, meta(1, dtype=torch.int64) if dropout_p else None, 0,
    )  # fmt: skip
    return AotInputs(q, q, q, arguments)


def aot_grid(operation: str) -> list[tuple[str, int, torch.dtype, int, dict[str, Any]]]:
    """(case, head_dim, dtype, length, variant): every line of the operation's tables, the variants at 64."""
    grid = []
    for head_dim, length in _attention_configs.attention_lines(operation):
        for dtype, name in DTYPE_NAMES.items():
            for variant, options in AOT_VARIANTS.items():
                if (
                    variant in ("full", "causal", "packed-causal-dropout")
                    or (head_dim == 64 and length > 256 and dtype != torch.float16)
                    or (
                        head_dim in (128, 256)
                        and dtype == torch.bfloat16
                        and variant in ("padding", "additive", "additive-dropout")
                    )
                ):
                    grid.append(
                        (f"{operation}-d{head_dim}-s{length}-{name}-{variant}", head_dim, dtype, length, options)
                    )
    for head_dim in (32, 80):  # no line's own: narrower than the tile, and no power of two
        name = f"{operation}-d{head_dim}-s1024-bf16-causal"
        grid.append((name, head_dim, torch.bfloat16, 1024, dict(window_right=0)))
    return grid
