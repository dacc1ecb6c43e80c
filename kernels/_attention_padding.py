"""Where the real keys of a dense, padded batch lie, found on the device: what bounds the loops over keys."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastbert.kernels import _attention_configs
from fastbert.kernels._launch import launch


@triton.jit(do_not_specialize=["seq_k"])
def _key_bounds_kernel(
    key_padding,  # uint8 [batch, seq_k] by its stride
    key_bounds,  # int32 [batch, 3], written
    padding_stride, seq_k,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One program a sequence, once over its mask in order: what comes first is known when its first gap is looked for."""
    sequence = tl.program_id(0).to(tl.int64)
    key_padding += sequence * padding_stride
    first = seq_k
    gap = seq_k
    last = 0
    for start in range(0, seq_k, BLOCK):
        key = start + tl.arange(0, BLOCK)
        real = tl.load(key_padding + key, mask=key < seq_k, other=0) != 0
        first = tl.minimum(first, tl.min(tl.where(real, key, seq_k), axis=0))
        gap = tl.minimum(gap, tl.min(tl.where((key > first) & (real == 0), key, seq_k), axis=0))
        last = tl.maximum(last, tl.max(tl.where(real, key + 1, 0), axis=0))
    key_bounds += sequence * 3
    tl.store(key_bounds, first)
    tl.store(key_bounds + 1, gap)
    tl.store(key_bounds + 2, last)


def key_bounds(key_padding: Tensor) -> Tensor:
    """int32 [batch, 3] of a mask uint8 [batch, seq_k]: the first real key, the first gap after it, and one past the last.

    All keys of [first, gap) are real and none outside [first, last) is. A sequence without any has (seq_k, seq_k, 0).
    """
    batch, seq_k = key_padding.shape
    bounds = torch.empty((batch, 3), dtype=torch.int32, device=key_padding.device)
    launch(
        _key_bounds_kernel, (batch,), key_padding, key_padding, bounds, key_padding.stride(0), seq_k,
        BLOCK=_attention_configs.KEY_BOUNDS_BLOCK, num_warps=4,
    )  # fmt: skip
    return bounds
