"""A transformer block for inference: one C++ call a layer (csrc/cpu/block.cpp).

What it computes is defined by ``fastbert.nn.transformer_block``, which calls it: the same operations in the same order, each
the C++ implementation of its operator, on packed weights and in one thread-owned workspace.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from fastbert import _C, reference
from fastbert.cpu._launch import ACTIVATION_NUMBERS, DTYPE_NUMBERS
from fastbert.cpu.packed_weights import PRECISIONS, PackedWeight, forget, is_cacheable, packed_weight

_DONE, _STALE = 0, 1  # csrc/cpu/block.h's enum BlockOutcome; else the boundaries are refused


class BlockSettings(NamedTuple):
    """What a block computes, apart from its weights; as fastbert.nn.BlockOptions."""

    num_heads: int
    activation: str
    eps: float
    norm_first: bool
    causal: bool
    precision: str


class _Plan:
    """A C++ block, and what it was made for."""

    __slots__ = ("block", "layouts", "packed")

    def __init__(
        self,
        stream: torch.dtype,
        packed: tuple[PackedWeight, ...],
        vectors: tuple[Tensor | None, ...],
        settings: BlockSettings,
    ) -> None:
        # Alive as long as C++ has their addresses. The first one holds this plan: no cycle.
        self.packed = packed[1:]
        self.layouts = _layouts(vectors)
        described = [(0, 0) if v is None else (v.data_ptr(), DTYPE_NUMBERS[v.dtype]) for v in vectors]
        biases = [described[:-7], *[[bias] for bias in described[-7:-4]]]
        linears = [(p.out, p.in_features, p.address, bias, p.originals) for p, bias in zip(packed, biases, strict=True)]
        self.block = _C.Block(
            PRECISIONS[packed[0].precision],
            DTYPE_NUMBERS[stream],
            settings.num_heads,
            ACTIVATION_NUMBERS[settings.activation],
            settings.eps,
            settings.norm_first,
            settings.causal,
            linears,
            described[-4:],
        )


def _layouts(vectors: tuple[Tensor | None, ...]) -> list[tuple[object, ...] | None]:
    """What C++ knows of them. Their values are read at every call."""
    return [None if v is None else (v.data_ptr(), v.dtype, v.shape, v.stride()) for v in vectors]


def transformer_block(
    x: Tensor,  # [total, hidden]
    cu_seqlens: Tensor,  # int32 [batch + 1]
    max_seqlen: int,
    matrices: tuple[Tensor, ...],  # query, key and value, one or three; output; up; down
    vectors: tuple[Tensor | None, ...],  # their biases; weight and bias of the attention's norm and the feed-forward's
    settings: tuple[Any, ...],  # BlockSettings
) -> Tensor | None:
    """[total, hidden]; None where this cannot answer, and the operations one by one do, with their checks and errors."""
    dtype = x.dtype
    if dtype not in DTYPE_NUMBERS or x.dim() != 2 or not x.is_cpu or not x.is_contiguous():
        return None
    if type(cu_seqlens) is not Tensor or type(max_seqlen) is not int:
        return None
    if not (
        cu_seqlens.is_cpu and cu_seqlens.dtype is torch.int32 and cu_seqlens.dim() == 1 and cu_seqlens.is_contiguous()
    ):
        return None
    if cu_seqlens.shape[0] == 0:
        return None
    # Of a tensor subclass the address says nothing: it may compute its values.
    for v in vectors:
        if v is not None and type(v) is not Parameter and type(v) is not Tensor:
            return None
    precision = settings[-1]
    if precision == "fp32":
        if dtype is torch.bfloat16:
            precision = "bf16"  # products of bfloat16 tensors
        if _C.isa() == "baseline":
            return None
        for w in matrices:
            if w.dtype is not dtype or type(w) is not Parameter:
                return None
    for w in matrices:  # before anything of them is packed; their shapes are looked at with the plan
        if type(w) is not Parameter and type(w) is not Tensor:
            return None
        if w.dim() != 2 or not w.is_cpu or w.dtype not in DTYPE_NUMBERS or not is_cacheable(w):
            return None
    qkv = matrices[:-3]
    if x.shape[1] != qkv[0].shape[1] or any(w.shape != qkv[0].shape or w.dtype is not qkv[0].dtype for w in qkv):
        return None
    for _ in range(2):
        packed = (
            packed_weight(precision, *qkv, check=False),
            *[packed_weight(precision, w, check=False) for w in matrices[-3:]],
        )
        key = (settings, dtype)
        plan = packed[0].blocks.get(key)
        if not isinstance(plan, _Plan) or plan.packed != packed[1:] or plan.layouts != _layouts(vectors):
            described = BlockSettings(*settings)
            if not _fits(x.shape[1], matrices, vectors, described):
                return None
            plan = packed[0].blocks[key] = _Plan(dtype, packed, vectors, described)
        y = torch.empty_like(x)
        outcome = plan.block.run(
            x.shape[0],
            x.data_ptr(),
            cu_seqlens.data_ptr(),
            cu_seqlens.shape[0] - 1,
            max_seqlen,
            y.data_ptr(),
            torch.get_num_threads(),
        )
        if outcome == _DONE:
            return y
        if outcome != _STALE:
            return None
        forget(matrices)
    return None  # somebody changes the weights while we pack them


def _fits(
    hidden: int, matrices: tuple[Tensor, ...], vectors: tuple[Tensor | None, ...], settings: BlockSettings
) -> bool:
    """Whether all shapes of the weights, and the vectors' dtypes and layouts, are those that the C++ block takes."""
    parts = len(matrices) - 3  # of query, key and value
    wide = 3 * hidden // parts
    intermediate = matrices[-2].shape[0]
    expected = (*[(wide, hidden)] * parts, (hidden, hidden), (intermediate, hidden), (hidden, intermediate))
    heads = settings.num_heads
    if min(hidden, intermediate, heads) < 1 or hidden % heads or settings.activation not in reference.ACTIVATIONS:
        return False
    for matrix, shape in zip(matrices, expected, strict=True):
        if tuple(matrix.shape) != shape:
            return False
    lengths = (*[wide] * parts, hidden, intermediate, hidden, *[hidden] * 4)
    for vector, length in zip(vectors, lengths, strict=True):
        if vector is None:
            continue
        if tuple(vector.shape) != (length,) or vector.dtype not in DTYPE_NUMBERS or not vector.is_cpu:
            return False
        if not vector.is_contiguous():
            return False
    return len({bias.dtype for bias in vectors[:parts] if bias is not None}) <= 1
