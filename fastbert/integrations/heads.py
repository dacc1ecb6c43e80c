"""The forward of an optimized model with a head: transformers' own, which may ask the base model below to be that, too.

Padding comes back from a packed base model as zeros. Most heads read nothing of it that reaches a result; where one does, in a
loss as transformers computes it, the whole call is transformers'.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastbert.integrations.packed import by_transformers, is_traced

_IGNORED_LABEL = -100


def head_forward(stock: type[nn.Module]) -> Callable[..., Any]:
    """The forward of an optimized class, with the signature of the class that it stands for."""
    original: Any = stock.forward
    signature = inspect.signature(original)
    rule = _rule(stock.__name__)

    @functools.wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if rule is None or torch.compiler.is_compiling() or is_traced():
            return original(self, *args, **kwargs)
        given = signature.bind(self, *args, **kwargs).arguments
        mask = given.get("attention_mask")
        reason = rule(given, mask != 0) if isinstance(mask, Tensor) and mask.dim() == 2 and mask.numel() else None
        if reason is None:
            return original(self, *args, **kwargs)
        with by_transformers(reason):
            return original(self, *args, **kwargs)

    return forward


def _rule(name: str) -> Callable[[dict[str, Any], Tensor], str | None] | None:
    """For a class of this name: (arguments, real tokens [batch, seq]) to what it reads of padding, or None."""
    if name.endswith("ForQuestionAnswering"):
        return _positions
    if name.endswith("DoubleHeadsModel"):
        return lambda given, real: _last_column(given, real) or _next_tokens(given, real)
    if name.endswith(("LMHeadModel", "ForCausalLM")):
        return _next_tokens
    if name.endswith(("ForMaskedLM", "ForTokenClassification", "ForPreTraining")) and name != "ElectraForPreTraining":
        return _tokens
    return None


def _positions(given: dict[str, Any], real: Tensor) -> str | None:
    if all(given.get(name) is None for name in ("start_positions", "end_positions")) or real.all():
        return None
    return "the loss is over all positions, padding included"


def _tokens(given: dict[str, Any], real: Tensor) -> str | None:
    labels = given.get("labels")
    if not isinstance(labels, Tensor) or labels.shape != real.shape or not ((labels != _IGNORED_LABEL) & ~real).any():
        return None
    return f"padding has labels other than {_IGNORED_LABEL}"


def _next_tokens(given: dict[str, Any], real: Tensor) -> str | None:
    labels = given.get("labels")
    if not isinstance(labels, Tensor) or labels.shape != real.shape:
        return None
    if not ((labels[:, 1:] != _IGNORED_LABEL) & ~real[:, :-1]).any():
        return None
    return f"a label other than {_IGNORED_LABEL} is predicted from padding"


def _last_column(given: dict[str, Any], real: Tensor) -> str | None:
    if given.get("mc_token_ids") is not None or real[:, -1].all():
        return None
    return "the second head reads the last column, which has padding"
