"""Whole transformer blocks in one call, where nothing asks for their parts."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastbert.ops._common import wants_grad
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
    if is_watched() or type(x) is not Tensor or torch.is_autocast_enabled("cpu") or not answers_with_extension():
        return None
    for matrices, vectors, _ in blocks:
        if wants_grad(x, *matrices, *vectors):
            return None
    return _launcher()(x, cu_seqlens, max_seqlen, blocks)


@functools.cache
def _launcher() -> Callable[..., Tensor | None]:
    from fastbert.cpu.block import transformer_blocks  # it imports the extension

    return transformer_blocks
