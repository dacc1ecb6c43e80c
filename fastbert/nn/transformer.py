"""Namesakes of torch.nn's transformer layers and stacks, run by the one transformer block of this library.

Masks keep torch's sense, the opposite of this library's: True (or −inf) = ignore.

What is fast: every layer that is what its constructor made, with any masks. A batch without masks, or with causal ones and bool
key padding masks, is packed: padding costs nothing. Other masks (2-D, 3-D, float padding) take padded attention. While
torch.compile, torch.export or a CUDA graph look on, padding is not packed either, for its amount would have to come to the host.
A layer with hooks, adapters, quantized or exchanged parts, another activation function or overridden methods is computed part by
part, by calling them.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as TF

from fastbert.nn._modules import is_plain
from fastbert.nn._padded import (
    Rows,
    attention_between,
    can_pack,
    is_causal_mask,
    nested_to_rows,
    read_masks,
    to_rows,
)
from fastbert.nn.activation import GELU
from fastbert.nn.attention import Cross, CrossWeights, PackedAttention, PaddedAttention
from fastbert.nn.block import BlockOptions, BlockWeights, transformer_block
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


def _activation_name(activation: Any) -> str | None:
    """What the block calls it; None for one that it does not know."""
    if not isinstance(activation, nn.Module):
        return next((name for function, name in _FUNCTIONS if activation is function), None)
    if not is_plain(activation, type(activation).forward):
        return None
    if type(activation) in (nn.GELU, GELU):
        return _GELUS.get(str(activation.approximate))
    return _MODULES.get(type(activation))


def _adopt(layer: nn.Module) -> None:
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


class _Plan(NamedTuple):
    """How a layer that is what its constructor made computes: the block's options and the dropouts in force."""

    options: BlockOptions
    dropout_p: float
    attention_dropout_p: float
    activation_dropout_p: float


def _plan(
    layer: Any,
    methods: Iterable[tuple[str, Callable[..., Any]]],
    attentions: tuple[Any, ...],
    norms: tuple[Any, ...],
    dropouts: tuple[nn.Module, ...],
    causal: bool,
) -> _Plan | None:
    """None for a layer that has to be computed part by part."""
    activation = _activation_name(layer.activation)
    if (
        activation is None
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
    return _Plan(options, dropout_p, attention_dropout.pop(), inner)


def _dropping(attend: Any, dropout_p: float) -> Any:
    """Attention of the stack, with the dropout of one of its layers."""
    return attend if attend is None or dropout_p == 0.0 else dataclasses.replace(attend, dropout_p=dropout_p)


def _block_weights(layer: Any, feed_forward_norm: Any) -> BlockWeights:
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


def _cross_weights(attention: Any, norm: Any) -> CrossWeights:
    sizes = [attention.embed_dim, 2 * attention.embed_dim]
    q_weight, kv_weight = attention.in_proj_weight.split(sizes)
    bias = attention.in_proj_bias
    q_bias, kv_bias = (None, None) if bias is None else bias.split(sizes)
    out = attention.out_proj
    return CrossWeights(q_weight, q_bias, kv_weight, kv_bias, out.weight, out.bias, norm.weight, norm.bias)


def _sizes(x: Tensor, batch_first: bool) -> tuple[int, int]:
    """Sequences and their length."""
    if x.dim() == 2:
        return 1, x.shape[0]
    return (x.shape[0], x.shape[1]) if batch_first else (x.shape[1], x.shape[0])


def _check_input(name: str, x: Tensor, width: int) -> None:
    if x.dim() not in (2, 3) or x.shape[-1] != width:
        raise ValueError(
            f"{name} has shape {list(x.shape)}; expected [batch, seq, {width}], [seq, batch, {width}] without batch_first, or "
            f"[seq, {width}]"
        )


def _zeros_on_padding(x: Tensor, key_padding_mask: Tensor | None, batch_first: bool) -> Tensor:
    if key_padding_mask is None or key_padding_mask.dtype != torch.bool:
        return x
    padding = key_padding_mask if x.dim() == 2 or batch_first else key_padding_mask.t()
    return x.masked_fill(padding.unsqueeze(-1), 0.0)


def _through_norm(norm: nn.Module | None, rows: Rows, x: Tensor) -> Tensor:
    """The norm behind a stack, on rows if that is what it does to them, and the layout that came."""
    if norm is None:
        return rows.restore(x)
    if any(is_plain(norm, kind.forward) for kind in (LayerNorm, RMSNorm, nn.LayerNorm, nn.RMSNorm)):
        return rows.restore(norm(x))
    y: Tensor = norm(rows.restore(x))
    return y


class TransformerEncoderLayer(nn.TransformerEncoderLayer):
    """``torch.nn.TransformerEncoderLayer``: its constructor, parameters and arguments, on this library's transformer block.

    Padded positions come back as zeros, as from torch's own nested fast path; equality with torch is on real tokens. A token with
    nothing to see attends to nothing, where torch gives NaN. Padding is what a bool ``src_key_padding_mask`` says; a float one is
    added to the logits, and every position is computed. ``is_causal=True`` is enough alone, and a ``src_mask`` beside it is not
    looked at. A nested ``src`` (without masks) gives a nested result, with gradients too. See this file's beginning for what is
    fast.

    Raises:
        TypeError: dtypes do not fit, or a mask is neither bool nor floating point.
        ValueError: shapes or devices do not fit.
    """

    @functools.wraps(nn.TransformerEncoderLayer.__init__)  # type: ignore[misc]
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _adopt(self)

    def forward(
        self,
        src: Tensor,  # [seq, d_model], [seq, batch, d_model], with batch_first [batch, seq, d_model]; or nested
        src_mask: Tensor | None = None,  # [seq, seq] or [batch · heads, seq, seq]; bool (True = ignore) or added
        src_key_padding_mask: Tensor | None = None,  # [batch, seq], or [seq]; bool (True = ignore) or added
        is_causal: bool = False,
    ) -> Tensor:
        """As src."""
        plan = self._plan(is_causal)
        if plan is None:
            return self._forward_by_parts(src, src_mask, src_key_padding_mask, is_causal)
        rows, attend = _enter_encoder(self, src, ("src_mask", src_mask), src_key_padding_mask, is_causal)
        return rows.restore(self._run(rows.values, rows, attend, plan))

    def _plan(self, causal: bool) -> _Plan | None:
        torchs = nn.TransformerEncoderLayer
        methods = (("_sa_block", torchs._sa_block), ("_ff_block", torchs._ff_block))
        dropouts = (self.dropout1, self.dropout2)
        return _plan(self, methods, (self.self_attn,), (self.norm1, self.norm2), dropouts, causal)

    def _run(self, x: Tensor, rows: Rows, attend: PaddedAttention | None, plan: _Plan) -> Tensor:
        weights = _block_weights(self, self.norm2)
        options, dropout_p, attention_dropout_p, activation_dropout_p = plan
        return transformer_block(
            x,
            rows.cu_seqlens,
            rows.max_seqlen,
            weights,
            options,
            dropout_p=dropout_p,
            attention_dropout_p=attention_dropout_p,
            activation_dropout_p=activation_dropout_p,
            attend=_dropping(attend, attention_dropout_p),
        )

    def _forward_by_parts(
        self, src: Tensor, src_mask: Tensor | None, src_key_padding_mask: Tensor | None, is_causal: bool
    ) -> Tensor:
        def attention(x: Tensor) -> Tensor:
            return self._sa_block(x, src_mask, src_key_padding_mask, is_causal=is_causal)

        x = src
        for norm, part in ((self.norm1, attention), (self.norm2, self._ff_block)):
            x = x + part(norm(x)) if self.norm_first else norm(x + part(x))
        return _zeros_on_padding(x, src_key_padding_mask, self.self_attn.batch_first)


def _enter_encoder(
    layer: TransformerEncoderLayer,
    src: Tensor,
    mask: tuple[str, Tensor | None],
    key_padding_mask: Tensor | None,
    causal: bool,
) -> tuple[Rows, PaddedAttention | None]:
    """The tokens as rows, and how they attend; None: each sequence to itself, causally or not."""
    name, attn_mask = mask
    attention = layer.self_attn
    if src.is_nested:
        if key_padding_mask is not None or (attn_mask is not None and not causal):
            raise ValueError(
                f"src is a nested tensor, which knows its lengths; give no {name} and no src_key_padding_mask"
            )
        return nested_to_rows(src), None
    _check_input("src", src, attention.embed_dim)
    batch, seq = _sizes(src, attention.batch_first)
    shape = (batch, attention.num_heads, seq, seq)
    masks = read_masks((name, "src_key_padding_mask"), attn_mask, key_padding_mask, causal, shape, src.dim() == 3)
    packed = can_pack(src, masks)
    rows = to_rows(src, masks.padding, attention.batch_first, packed)
    return rows, None if packed else masks.padded_attention(batch)


class TransformerEncoder(nn.TransformerEncoder):
    """``torch.nn.TransformerEncoder``: its constructor, parameters and arguments; packs once, and unpacks once, around all layers.

    What TransformerEncoderLayer says holds here. Padded positions come back as zeros behind the final norm too (torch's fast path
    leaves the norm's bias there). ``enable_nested_tensor`` and ``mask_check`` steer torch's fast path and have no meaning here.
    Layers of another class, or with hooks of their own, are called one by one.
    """

    def __init__(
        self,
        encoder_layer: nn.Module,
        num_layers: int,
        norm: nn.Module | None = None,
        enable_nested_tensor: bool = True,
        mask_check: bool = True,
    ) -> None:
        # Without nested tensors torch has nothing to warn of.
        super().__init__(encoder_layer, num_layers, norm, False, mask_check)  # type: ignore[arg-type]
        self.enable_nested_tensor = enable_nested_tensor

    def forward(
        self,
        src: Tensor,  # as TransformerEncoderLayer's, as are the masks
        mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,  # None: mask is looked at
    ) -> Tensor:
        """As src."""
        first = self.layers[0]
        if is_causal is None:
            is_causal = not src.is_nested and is_causal_mask(mask, _sizes(src, first.self_attn.batch_first)[1])
        plans = _plans(self.layers, TransformerEncoderLayer, is_causal)
        if plans is None:
            x = src
            for layer in self.layers:
                x = layer(x, src_mask=mask, is_causal=is_causal, src_key_padding_mask=src_key_padding_mask)
            x = x if self.norm is None else self.norm(x)
            return _zeros_on_padding(x, src_key_padding_mask, first.self_attn.batch_first)
        rows, attend = _enter_encoder(first, src, ("mask", mask), src_key_padding_mask, is_causal)
        x = rows.values
        for layer, plan in zip(self.layers, plans, strict=True):
            x = layer._run(x, rows, attend, plan)
        return _through_norm(self.norm, rows, x)


def _plans(layers: nn.ModuleList, kind: Any, causal: bool) -> list[_Plan] | None:
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


class TransformerDecoderLayer(nn.TransformerDecoderLayer):
    """``torch.nn.TransformerDecoderLayer``: its constructor, parameters and arguments, on this library's transformer block.

    As TransformerEncoderLayer: positions that a bool ``tgt_key_padding_mask`` marks come back as zeros, tokens with nothing to see
    attend to nothing, hints of causality are enough alone. ``memory_is_causal`` lets query i see the memory's tokens j ≤ i.
    """

    @functools.wraps(nn.TransformerDecoderLayer.__init__)  # type: ignore[misc]
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _adopt(self)

    def forward(
        self,
        tgt: Tensor,  # [seq_q, d_model], [seq_q, batch, d_model], or with batch_first [batch, seq_q, d_model]
        memory: Tensor,  # likewise, seq_k
        tgt_mask: Tensor
        | None = None,  # [seq_q, seq_q] or [batch · heads, seq_q, seq_q]; bool (True = ignore) or added
        memory_mask: Tensor | None = None,  # [seq_q, seq_k] or [batch · heads, seq_q, seq_k]
        tgt_key_padding_mask: Tensor | None = None,  # [batch, seq_q], or [seq_q]; bool (True = ignore) or added
        memory_key_padding_mask: Tensor | None = None,  # [batch, seq_k], or [seq_k]
        tgt_is_causal: bool = False,
        memory_is_causal: bool = False,
    ) -> Tensor:
        """As tgt."""
        masks = (tgt_mask, memory_mask, tgt_key_padding_mask, memory_key_padding_mask, tgt_is_causal, memory_is_causal)
        plan = self._plan(tgt_is_causal)
        if plan is None:
            return self._forward_by_parts(tgt, memory, *masks)
        rows, memory_rows, attend, attend_memory = _enter_decoder(self, tgt, memory, *masks)
        return rows.restore(self._run(rows.values, rows, attend, memory_rows, attend_memory, plan))

    def _plan(self, causal: bool) -> _Plan | None:
        torchs = nn.TransformerDecoderLayer
        methods = (
            ("_sa_block", torchs._sa_block),
            ("_mha_block", torchs._mha_block),
            ("_ff_block", torchs._ff_block),
        )
        attentions = (self.self_attn, self.multihead_attn)
        norms = (self.norm1, self.norm2, self.norm3)
        return _plan(self, methods, attentions, norms, (self.dropout1, self.dropout2, self.dropout3), causal)

    def _run(
        self,
        x: Tensor,
        rows: Rows,
        attend: PaddedAttention | None,
        memory: Tensor,
        attend_memory: PackedAttention | PaddedAttention,
        plan: _Plan,
    ) -> Tensor:
        options, dropout_p, attention_dropout_p, activation_dropout_p = plan
        return transformer_block(
            x,
            rows.cu_seqlens,
            rows.max_seqlen,
            _block_weights(self, self.norm3),
            options,
            dropout_p=dropout_p,
            attention_dropout_p=attention_dropout_p,
            activation_dropout_p=activation_dropout_p,
            attend=_dropping(attend, attention_dropout_p),
            cross=Cross(
                _cross_weights(self.multihead_attn, self.norm2), memory, _dropping(attend_memory, attention_dropout_p)
            ),
        )

    def _forward_by_parts(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None,
        memory_mask: Tensor | None,
        tgt_key_padding_mask: Tensor | None,
        memory_key_padding_mask: Tensor | None,
        tgt_is_causal: bool,
        memory_is_causal: bool,
    ) -> Tensor:
        def attention(x: Tensor) -> Tensor:
            return self._sa_block(x, tgt_mask, tgt_key_padding_mask, tgt_is_causal)

        def attention_to_memory(x: Tensor) -> Tensor:
            return self._mha_block(x, memory, memory_mask, memory_key_padding_mask, memory_is_causal)

        parts = ((self.norm1, attention), (self.norm2, attention_to_memory), (self.norm3, self._ff_block))
        x = tgt
        for norm, part in parts:
            x = x + part(norm(x)) if self.norm_first else norm(x + part(x))
        return _zeros_on_padding(x, tgt_key_padding_mask, self.self_attn.batch_first)


def _enter_decoder(
    layer: TransformerDecoderLayer,
    tgt: Tensor,
    memory: Tensor,
    tgt_mask: Tensor | None,
    memory_mask: Tensor | None,
    tgt_key_padding_mask: Tensor | None,
    memory_key_padding_mask: Tensor | None,
    tgt_is_causal: bool,
    memory_is_causal: bool,
) -> tuple[Rows, Tensor, PaddedAttention | None, PackedAttention | PaddedAttention]:
    """The target's rows, the memory's rows, how the former attend to themselves (as _enter_encoder), and to the latter."""
    if tgt.is_nested or memory.is_nested:
        raise ValueError(
            "tgt or memory is a nested tensor, which no decoder takes, as in torch; give it padded, with a mask"
        )
    attention = layer.self_attn
    _check_input("tgt", tgt, attention.embed_dim)
    _check_input("memory", memory, attention.embed_dim)
    batch, seq_q = _sizes(tgt, attention.batch_first)
    memory_batch, seq_k = _sizes(memory, attention.batch_first)
    if tgt.dim() != memory.dim() or batch != memory_batch:
        raise ValueError(
            f"tgt has shape {list(tgt.shape)} and memory {list(memory.shape)}; expected the same batch of both (batch_first is "
            f"{attention.batch_first})"
        )
    batched, heads = tgt.dim() == 3, attention.num_heads
    masks = read_masks(
        ("tgt_mask", "tgt_key_padding_mask"),
        tgt_mask,
        tgt_key_padding_mask,
        tgt_is_causal,
        (batch, heads, seq_q, seq_q),
        batched,
    )
    memory_masks = read_masks(
        ("memory_mask", "memory_key_padding_mask"),
        memory_mask,
        memory_key_padding_mask,
        memory_is_causal,
        (batch, heads, seq_q, seq_k),
        batched,
    )
    # Packed attention counts causality from the last tokens, torch from the first.
    packed = not memory_is_causal and can_pack(tgt, masks, memory_masks)
    rows = to_rows(tgt, masks.padding, attention.batch_first, packed)
    memory_rows = to_rows(memory, memory_masks.padding, attention.batch_first, packed)
    attend = None if packed else masks.padded_attention(batch)
    return rows, memory_rows.values, attend, attention_between(rows, memory_rows, memory_masks)


class TransformerDecoder(nn.TransformerDecoder):
    """``torch.nn.TransformerDecoder``: its constructor, parameters and arguments; packs once, and unpacks once, around all layers.

    What TransformerDecoderLayer says holds here. Layers of another class, or with hooks of their own, are called one by one.
    """

    def forward(
        self,
        tgt: Tensor,  # as TransformerDecoderLayer's, as are memory and the masks
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool | None = None,  # None: tgt_mask is looked at
        memory_is_causal: bool = False,
    ) -> Tensor:
        """As tgt."""
        first = self.layers[0]
        if tgt_is_causal is None:
            tgt_is_causal = is_causal_mask(tgt_mask, _sizes(tgt, first.self_attn.batch_first)[1])
        masks = (tgt_mask, memory_mask, tgt_key_padding_mask, memory_key_padding_mask, tgt_is_causal, memory_is_causal)
        plans = _plans(self.layers, TransformerDecoderLayer, tgt_is_causal)
        if plans is None:
            x = tgt
            for layer in self.layers:
                x = layer(x, memory, *masks)
            x = x if self.norm is None else self.norm(x)
            return _zeros_on_padding(x, tgt_key_padding_mask, first.self_attn.batch_first)
        rows, memory_rows, attend, attend_memory = _enter_decoder(first, tgt, memory, *masks)
        x = rows.values
        for layer, plan in zip(self.layers, plans, strict=True):
            x = layer._run(x, rows, attend, memory_rows, attend_memory, plan)
        return _through_norm(self.norm, rows, x)
