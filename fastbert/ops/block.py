"""A whole transformer block in one call, where nothing asks for its parts."""

import functools
from collections.abc import Callable
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


def whole_block(
    x: Tensor,  # [total, hidden]
    cu_seqlens: Tensor,  # int32 [batch + 1]
    max_seqlen: int,
    matrices: tuple[Tensor, ...],
    vectors: tuple[Tensor | None, ...],
    *settings: Any,  # fastbert.cpu.block.BlockSettings
) -> Tensor | None:
    """The block's result, from ``fastbert.cpu.block``; None where the operations have to be called one by one.

    That is with gradients, under autocast, while something traces, under use_reference(), without the extension, and for
    arguments that the C++ block does not take.
    """
    if is_watched() or type(x) is not Tensor or torch.is_autocast_enabled("cpu") or not answers_with_extension():
        return None
    if wants_grad(x, *matrices, *vectors):
        return None
    return _launcher()(x, cu_seqlens, max_seqlen, matrices, vectors, settings)


@functools.cache
def _launcher() -> Callable[..., Tensor | None]:
    from fastbert.cpu.block import transformer_block  # it imports the extension

    return transformer_block
