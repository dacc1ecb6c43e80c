"""Transformer blocks for inference: one C++ call for one, or for all of a model (csrc/cpu/block.cpp).

What it computes is defined by ``fastbert.nn.transformer_block``, which calls it: the same operations in the same order, each
the C++ implementation of its operator, on packed weights and in one thread-owned workspace.
"""

from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Module, Parameter

from fastbert import _C, reference
from fastbert.cpu._launch import ACTIVATION_NUMBERS, DTYPE_NUMBERS, is_gone
from fastbert.cpu.packed_weights import PRECISIONS, PackedWeight, derived, forget, is_cacheable, packed_weight

_DONE, _STALE = 0, 1  # csrc/cpu/block.h's enum BlockOutcome; else the boundaries are refused
_MOST_KNOWN = 64  # prepared stacks of modules; those of modules that are gone go with their weights, or with the rest


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


# Of one block: matrices (query, key and value, one or three; output; up; down), vectors (their biases; weight and bias of the
# attention's norm and the feed-forward's), and BlockSettings.
BlockArguments = tuple[tuple[Tensor, ...], tuple[Tensor | None, ...], tuple[Any, ...]]


def transformer_blocks(
    x: Tensor,  # [total, hidden]
    cu_seqlens: Tensor,  # int32 [batch + 1]
    max_seqlen: int,
    blocks: Sequence[BlockArguments],
) -> Tensor | None:
    """The blocks one after another, at least one: [total, hidden].

    None where this cannot answer, and the operations one by one do, with their checks and errors.
    """
    if not _takes(x, cu_seqlens, max_seqlen) or not all(_is_taken(block, x.dtype, x.shape[1]) for block in blocks):
        return None
    for _ in range(2):
        run = _prepare(blocks, x.dtype, x.shape[1])
        if run is None:
            return None
        outcome, y = run(x, cu_seqlens, max_seqlen)
        if outcome == _DONE:
            return y
        if outcome != _STALE:
            return None
        for block in blocks:
            forget(block[0])
    return None  # somebody changes the weights while we pack them


def module_blocks(
    x: Tensor,  # [total, hidden]
    cu_seqlens: Tensor,  # int32 [batch + 1]
    max_seqlen: int,
    modules: list[Module],
    describe: Callable[[list[Module]], Sequence[BlockArguments] | None],
    constants: tuple[type, ...],
    variant: Hashable = None,
) -> Tensor | None:
    """As transformer_blocks of what ``describe`` says of the modules, at least one; it is asked again where they have changed.

    Gradients must be off. ``describe`` reads classes, hooks, parameters, and attributes that are numbers, strings or of the types
    ``constants``; it says None of modules that are no blocks. ``variant`` names one of several states that modules go to and from.
    """
    if not _takes(x, cu_seqlens, max_seqlen):
        return None
    known = derived()
    key = (id(modules[0]), len(modules), x.dtype, x.shape[1], variant)
    found = known.get(key)
    if found is not None and found[0].holds(modules):
        outcome, y = found[1](x, cu_seqlens, max_seqlen)
        if outcome == _DONE:
            return y
    blocks = describe(modules)
    if blocks is None:
        return None
    try:
        state = _C.ModuleState(modules, constants)
    except ValueError:
        return transformer_blocks(x, cu_seqlens, max_seqlen, blocks)
    blocks = describe(modules)  # again: behind the state, so that whatever changes from here on is seen as a change
    if blocks is None:
        return None
    result = transformer_blocks(x, cu_seqlens, max_seqlen, blocks)
    if result is None:
        return None
    tensors = [each for matrices, vectors, _ in blocks for each in (*matrices, *vectors) if each is not None]
    run = _prepare(blocks, x.dtype, x.shape[1]) if all(map(state.has, tensors)) else None
    if run is not None:
        if len(known) >= _MOST_KNOWN:
            known.clear()
        # Vectors too: while C++ reads them another thread may replace them, and here nobody else holds them.
        run.held.extend((v.detach(),) for _, vectors, _ in blocks for v in vectors if v is not None)
        known[key] = state, run
    return result


class _Run(NamedTuple):
    """Plans of blocks, and what they read: another thread may drop the packed weights meanwhile, and the plans with them."""

    plans: list[_C.Block]
    held: list[tuple[object, ...]]

    def __call__(self, x: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> tuple[int, Tensor]:
        """A BlockOutcome, and the result if that is _DONE."""
        y = torch.empty_like(x)
        outcome = _C.run_blocks(
            self.plans,
            x.shape[0],
            x.data_ptr(),
            cu_seqlens.data_ptr(),
            cu_seqlens.shape[0] - 1,
            max_seqlen,
            y.data_ptr(),
            torch.get_num_threads(),
        )
        return outcome, y


def _prepare(blocks: Sequence[BlockArguments], dtype: torch.dtype, hidden: int) -> _Run | None:
    """None for shapes that C++ does not take."""
    run = _Run([], [])
    for block in blocks:
        packed = _packed(block, dtype)
        plan = _plan(block, packed, dtype, hidden)
        if plan is None:
            return None
        run.plans.append(plan.block)
        run.held.append((packed, plan))
    return run


def fixed_block(block: BlockArguments, dtype: torch.dtype) -> _Run | None:
    """The block, prepared for tokens of `dtype`, that reads neither its matrices nor its vectors again: they may go.

    None where C++ does not take it.
    """
    matrices, vectors, settings = block
    hidden = matrices[0].shape[1]
    described = BlockSettings(*settings)
    if dtype not in DTYPE_NUMBERS or not _is_taken(block, dtype, hidden):
        return None
    if not _fits(hidden, matrices, vectors, described):
        return None
    packed = tuple(each.without_originals() for each in _packed(block, dtype, check=True))
    kept = tuple(None if v is None else v.detach().clone() for v in vectors)
    plan = _Plan(dtype, packed, kept, described)
    return _Run([plan.block], [(packed, kept, plan)])


def run_fixed_blocks(x: Tensor, cu_seqlens: Tensor, max_seqlen: int, runs: Sequence[_Run]) -> Tensor | None:
    """What fixed_block made, one after another: [total, hidden]. None for other tokens and boundaries than C++ takes."""
    if not _takes(x, cu_seqlens, max_seqlen):
        return None
    outcome, y = _Run([plan for run in runs for plan in run.plans], [])(x, cu_seqlens, max_seqlen)
    return y if outcome == _DONE else None


def _takes(x: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> bool:
    return (
        x.dtype in DTYPE_NUMBERS
        and x.dim() == 2
        and x.is_cpu
        and x.is_contiguous()
        and type(cu_seqlens) is Tensor
        and type(max_seqlen) is int
        and cu_seqlens.is_cpu
        and cu_seqlens.dtype is torch.int32
        and cu_seqlens.dim() == 1
        and cu_seqlens.is_contiguous()
        and cu_seqlens.shape[0] > 0
    )


def _is_taken(block: BlockArguments, dtype: torch.dtype, hidden: int) -> bool:
    """Whether the weights may be packed: looked at before anything is. Their shapes are looked at with the plan."""
    matrices, vectors, settings = block
    # Of a tensor subclass the address says nothing: it may compute its values.
    for v in vectors:
        if v is not None and (type(v) not in (Parameter, Tensor) or is_gone(v)):
            return False
    if settings[-1] == "fp32":
        if _C.isa() == "baseline":
            return False
        for w in matrices:
            if w.dtype is not dtype or type(w) is not Parameter:
                return False
    for w in matrices:
        if type(w) is not Parameter and type(w) is not Tensor:
            return False
        if w.dim() != 2 or not w.is_cpu or w.dtype not in DTYPE_NUMBERS or not is_cacheable(w) or is_gone(w):
            return False
    first, *others = matrices[:-3]
    if first.shape[1] != hidden:
        return False
    return all(w.shape == first.shape and w.dtype is first.dtype for w in others)


def _packed(block: BlockArguments, dtype: torch.dtype, check: bool = False) -> tuple[PackedWeight, ...]:
    matrices, _, settings = block
    precision = settings[-1]
    if precision == "fp32" and dtype is torch.bfloat16:
        precision = "bf16"  # products of bfloat16 tensors
    return (
        packed_weight(precision, *matrices[:-3], check=check),
        *[packed_weight(precision, w, check=check) for w in matrices[-3:]],
    )


def _plan(block: BlockArguments, packed: tuple[PackedWeight, ...], dtype: torch.dtype, hidden: int) -> _Plan | None:
    """The block's plan, made if there is none for the weights as they are; None for shapes that C++ does not take."""
    matrices, vectors, settings = block
    key = (settings, dtype)
    plan = packed[0].blocks.get(key)
    if isinstance(plan, _Plan) and plan.packed == packed[1:] and plan.layouts == _layouts(vectors):
        return plan
    described = BlockSettings(*settings)
    if not _fits(hidden, matrices, vectors, described):
        return None
    plan = packed[0].blocks[key] = _Plan(dtype, packed, vectors, described)
    return plan


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
