"""Whole transformer blocks in one call, where nothing asks for their parts."""

import functools
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module, Parameter

from fastbert.ops._common import may_want_grad, wants_grad
from fastbert.ops._registry import answers_with_extension


def is_watched() -> bool:
    """Whether somebody records, transforms or replaces the operators that are called: a compiler, a tracer, a mode, vmap."""
    return (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._len_torch_function_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
    )


def whole_blocks(
    x: Tensor,  # [total, hidden]
    cu_seqlens: Tensor,  # int32 [batch + 1]
    max_seqlen: int,
    blocks: Sequence[tuple[tuple[Tensor, ...], tuple[Tensor | None, ...], tuple[Any, ...]]],  # cpu.block.BlockArguments
) -> Tensor | None:
    """The blocks one after another, from ``fastbert.cpu.block``; None where the operations have to be called one by one.

    That is with gradients, under autocast, while something traces, under use_reference(), without the extension, and for
    arguments that the C++ block does not take.
    """
    if not answers_directly(x):
        return None
    for matrices, vectors, _ in blocks:
        if wants_grad(x, *matrices, *vectors):
            return None
    return _launcher("transformer_blocks")(x, cu_seqlens, max_seqlen, blocks)


def whole_modules(
    x: Tensor,  # [total, hidden]
    cu_seqlens: Tensor,  # int32 [batch + 1]
    max_seqlen: int,
    modules: list[Module],
    describe: Callable[[list[Module]], Sequence[Any] | None],
    constants: tuple[type, ...],
    variant: Hashable = None,
) -> Tensor | None:
    """As whole_blocks of ``describe(modules)``, which without gradients is asked only where a module has changed.

    See ``fastbert.cpu.block.module_blocks``.
    """
    if not answers_directly(x):
        return None
    if may_want_grad():
        blocks = describe(modules)
        return None if blocks is None else whole_blocks(x, cu_seqlens, max_seqlen, blocks)
    return _launcher("module_blocks")(x, cu_seqlens, max_seqlen, modules, describe, constants, variant)


def fixed_block(block: tuple[Any, ...], dtype: torch.dtype) -> Any:
    """One block prepared for run_fixed_blocks, whose weights may go; None where C++ does not take it."""
    return _launcher("fixed_block")(block, dtype) if answers_with_extension() else None


def run_fixed_blocks(x: Tensor, cu_seqlens: Tensor, max_seqlen: int, runs: Sequence[Any]) -> Tensor | None:
    """Blocks that fixed_block has prepared, in one call of C++: [total, hidden]; None where it cannot answer, as whole_blocks."""
    return _launcher("run_fixed_blocks")(x, cu_seqlens, max_seqlen, runs) if answers_directly(x) else None


def answers_directly(x: Tensor) -> bool:
    """Whether the extension may be called past the operators, on CPU tensors and without gradients."""
    return not (
        is_watched()
        or type(x) not in (Tensor, Parameter)
        or torch.is_autocast_enabled("cpu")
        or not answers_with_extension()
    )


@functools.cache
def _launcher(name: str) -> Callable[..., Any]:
    from fastbert.cpu import block  # it imports the extension

    launcher: Callable[..., Any] = getattr(block, name)
    return launcher
