"""How one of torch.nn's transformer layers computes, if it is what its constructor made, and what its stacks share."""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as TF
from torch.nn.modules import module as module_globals

from fastbert.nn._modules import is_plain
from fastbert.nn._padded import Rows
from fastbert.nn.activation import GELU
from fastbert.nn.attention import CrossWeights
from fastbert.nn.block import BlockOptions, BlockWeights
from fastbert.nn.multihead import MultiheadAttention
from fastbert.nn.norm import LayerNorm, RMSNorm

_FUNCTIONS: tuple[tuple[Callable[..., Tensor], str], ...] = (
    (TF.relu, "relu"),
    (torch.relu, "relu"),
    (TF.gelu, "gelu"),
    (TF.silu, "silu"),
    (torch.tanh, "tanh"),
)
_MODULES: dict[type[nn.Module], str] = {nn.ReLU: "relu", nn.SiLU: "silu", nn.Tanh: "tanh"}
_GELUS = {"none": "gelu", "tanh": "gelu_tanh", "quick": "gelu_quick"}


def activation_name(activation: Any) -> str | None:
    """What the block calls it; None for one that it does not know."""
    if not isinstance(activation, nn.Module):
        return next((name for function, name in _FUNCTIONS if activation is function), None)
    if not is_plain(activation, type(activation).forward):
        return None
    if type(activation) in (nn.GELU, GELU):
        return _GELUS.get(str(activation.approximate))
    return _MODULES.get(type(activation))


def adopt(layer: nn.Module) -> None:
    """The parts that torch's constructor made, with the same parameters, become this library's."""
    for part in layer.children():
        for ours in (MultiheadAttention, LayerNorm):
            if type(part) is ours.__bases__[0]:
                part.__class__ = ours


def _probability(dropout: Any) -> float | None:
    """That which is in force; None for something else than dropout."""
    if not is_plain(dropout, nn.Dropout.forward):
        return None
    return float(dropout.p) if dropout.training else 0.0


def _is_plain_attention(attention: Any) -> bool:
    return bool(
        is_plain(attention, MultiheadAttention.forward)
        and is_plain(attention.out_proj, nn.Linear.forward)
        and attention._qkv_same_embed_dim
        and attention.bias_k is None
        and attention.bias_v is None
        and not attention.add_zero_attn
    )


def _is_plain_norm(norm: nn.Module) -> bool:
    return is_plain(norm, LayerNorm.forward) or is_plain(norm, nn.LayerNorm.forward)


class Plan(NamedTuple):
    """How a layer that is what its constructor made computes: the block's options and the dropouts in force."""

    options: BlockOptions
    dropout_p: float
    attention_dropout_p: float
    activation_dropout_p: float


def plan_of(
    layer: Any,
    methods: Iterable[tuple[str, Callable[..., Any]]],
    attentions: tuple[Any, ...],
    norms: tuple[Any, ...],
    dropouts: tuple[nn.Module, ...],
    causal: bool,
) -> Plan | None:
    """None for a layer that has to be computed part by part."""
    activation = activation_name(layer.activation)
    if (
        activation is None
        or module_globals._has_any_global_hook()
        or any(getattr(type(layer), name) is not method or name in layer.__dict__ for name, method in methods)
        or not all(map(_is_plain_attention, attentions))
        or not all(map(_is_plain_norm, norms))
        or not is_plain(layer.linear1, nn.Linear.forward)
        or not is_plain(layer.linear2, nn.Linear.forward)
    ):
        return None
    heads = {attention.num_heads for attention in attentions}
    eps = {norm.eps for norm in norms}
    shapes = {tuple(norm.normalized_shape) for norm in norms}
    attention_dropout = {attention.dropout if attention.training else 0.0 for attention in attentions}
    inner = _probability(layer.dropout)
    outer = {_probability(dropout) for dropout in dropouts}
    one_of_each = all(len(each) == 1 for each in (heads, eps, shapes, attention_dropout, outer))
    dropout_p = outer.pop()
    if inner is None or dropout_p is None or not one_of_each:
        return None
    options = BlockOptions(heads.pop(), activation, eps.pop(), layer.norm_first, causal)
    return Plan(options, dropout_p, attention_dropout.pop(), inner)


def dropping(attend: Any, dropout_p: float) -> Any:
    """Attention of the stack, with the dropout of one of its layers."""
    return attend if attend is None or dropout_p == 0.0 else dataclasses.replace(attend, dropout_p=dropout_p)


def block_weights(layer: Any, feed_forward_norm: Any) -> BlockWeights:
    attention = layer.self_attn
    return BlockWeights(
        attention.in_proj_weight,
        attention.in_proj_bias,
        attention.out_proj.weight,
        attention.out_proj.bias,
        layer.norm1.weight,
        layer.norm1.bias,
        layer.linear1.weight,
        layer.linear1.bias,
        layer.linear2.weight,
        layer.linear2.bias,
        feed_forward_norm.weight,
        feed_forward_norm.bias,
    )


def cross_weights(attention: Any, norm: Any) -> CrossWeights:
    widths = [attention.embed_dim, 2 * attention.embed_dim]
    q_weight, kv_weight = attention.in_proj_weight.split(widths)
    bias = attention.in_proj_bias
    q_bias, kv_bias = (None, None) if bias is None else bias.split(widths)
    out = attention.out_proj
    return CrossWeights(q_weight, q_bias, kv_weight, kv_bias, out.weight, out.bias, norm.weight, norm.bias)


def sizes(x: Tensor, batch_first: bool) -> tuple[int, int]:
    """Sequences and their length."""
    if x.dim() == 2:
        return 1, x.shape[0]
    return (x.shape[0], x.shape[1]) if batch_first else (x.shape[1], x.shape[0])


def check_input(name: str, x: Tensor, width: int) -> None:
    if x.dim() not in (2, 3) or x.shape[-1] != width:
        raise ValueError(
            f"{name} has shape {list(x.shape)}; expected [batch, seq, {width}], [seq, batch, {width}] without batch_first, or "
            f"[seq, {width}]"
        )


def zeros_on_padding(x: Tensor, key_padding_mask: Tensor | None, batch_first: bool) -> Tensor:
    if key_padding_mask is None or key_padding_mask.dtype != torch.bool:
        return x
    padding = key_padding_mask if x.dim() == 2 or batch_first else key_padding_mask.t()
    return x.masked_fill(padding.unsqueeze(-1), 0.0)


def through_norm(norm: nn.Module | None, rows: Rows, x: Tensor) -> Tensor:
    """The norm behind a stack, on rows if that is what it does to them, and the layout that came."""
    if norm is None:
        return rows.restore(x)
    if any(is_plain(norm, kind.forward) for kind in (LayerNorm, RMSNorm, nn.LayerNorm, nn.RMSNorm)):
        return rows.restore(norm(x))
    y: Tensor = norm(rows.restore(x))
    return y


def plans_of(layers: nn.ModuleList, kind: Any, causal: bool) -> list[Plan] | None:
    """Those of all layers, if one after another they may run on the same rows."""
    plans = []
    layouts = set()
    for layer in layers:
        if not isinstance(layer, kind) or not is_plain(layer, kind.forward):
            return None
        plan = layer._plan(causal)
        if plan is None:
            return None
        plans.append(plan)
        layouts.add((layer.self_attn.batch_first, plan.options.num_heads))
    return plans if len(layouts) == 1 else None
