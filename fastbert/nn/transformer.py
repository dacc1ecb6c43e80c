"""Namesakes of torch.nn's transformer layers and stacks, run by the one transformer block of this library.

Masks keep torch's sense, the opposite of this library's: True (or −inf) = ignore.

What is fast: every layer that is what its constructor made, with any masks. A batch without masks, or with causal ones and bool
key padding masks, is packed: padding costs nothing. Other masks (2-D, 3-D, float padding) take padded attention. While
torch.compile, torch.export or a CUDA graph look on, padding is not packed either, for its amount would have to come to the host.
A layer with hooks, adapters, quantized or exchanged parts, another activation function or overridden methods is computed part by
part, by calling them.
"""

import functools
from typing import Any

from torch import Tensor, nn

from fastbert.nn._padded import (
    Rows,
    attention_between,
    can_pack,
    is_causal_mask,
    nested_to_rows,
    read_masks,
    to_rows,
)
from fastbert.nn._plan import (
    Plan,
    adopt,
    block_weights,
    check_input,
    cross_weights,
    dropping,
    plan_of,
    plans_of,
    sizes,
    through_norm,
    zeros_on_padding,
)
from fastbert.nn.attention import Cross, PackedAttention, PaddedAttention
from fastbert.nn.block import as_whole, transformer_block
from fastbert.ops.block import whole_blocks


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
        adopt(self)

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

    def _plan(self, causal: bool) -> Plan | None:
        torchs = nn.TransformerEncoderLayer
        methods = (("_sa_block", torchs._sa_block), ("_ff_block", torchs._ff_block))
        dropouts = (self.dropout1, self.dropout2)
        return plan_of(self, methods, (self.self_attn,), (self.norm1, self.norm2), dropouts, causal)

    def _run(self, x: Tensor, rows: Rows, attend: PaddedAttention | None, plan: Plan) -> Tensor:
        weights = block_weights(self, self.norm2)
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
            attend=dropping(attend, attention_dropout_p),
        )

    def _forward_by_parts(
        self, src: Tensor, src_mask: Tensor | None, src_key_padding_mask: Tensor | None, is_causal: bool
    ) -> Tensor:
        def attention(x: Tensor) -> Tensor:
            return self._sa_block(x, src_mask, src_key_padding_mask, is_causal=is_causal)

        x = src
        for norm, part in ((self.norm1, attention), (self.norm2, self._ff_block)):
            x = x + part(norm(x)) if self.norm_first else norm(x + part(x))
        return zeros_on_padding(x, src_key_padding_mask, self.self_attn.batch_first)


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
    check_input("src", src, attention.embed_dim)
    batch, seq = sizes(src, attention.batch_first)
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
            is_causal = not src.is_nested and is_causal_mask(mask, sizes(src, first.self_attn.batch_first)[1])
        plans = plans_of(self.layers, TransformerEncoderLayer, is_causal)
        if plans is None:
            x = src
            for layer in self.layers:
                x = layer(x, src_mask=mask, is_causal=is_causal, src_key_padding_mask=src_key_padding_mask)
            x = x if self.norm is None else self.norm(x)
            return zeros_on_padding(x, src_key_padding_mask, first.self_attn.batch_first)
        rows, attend = _enter_encoder(first, src, ("mask", mask), src_key_padding_mask, is_causal)
        x = rows.values
        whole: Tensor | None = None
        if attend is None and x.is_cpu and not any(any(plan[1:]) for plan in plans):  # nothing is dropped
            parts = zip(self.layers, plans, strict=True)
            blocks = [as_whole(block_weights(layer, layer.norm2), plan.options) for layer, plan in parts]
            whole = whole_blocks(x, rows.cu_seqlens, rows.max_seqlen, blocks)
        if whole is not None:
            return through_norm(self.norm, rows, whole)
        for layer, plan in zip(self.layers, plans, strict=True):
            x = layer._run(x, rows, attend, plan)
        return through_norm(self.norm, rows, x)


class TransformerDecoderLayer(nn.TransformerDecoderLayer):
    """``torch.nn.TransformerDecoderLayer``: its constructor, parameters and arguments, on this library's transformer block.

    As TransformerEncoderLayer: positions that a bool ``tgt_key_padding_mask`` marks come back as zeros, tokens with nothing to see
    attend to nothing, hints of causality are enough alone. ``memory_is_causal`` lets query i see the memory's tokens j ≤ i.
    """

    @functools.wraps(nn.TransformerDecoderLayer.__init__)  # type: ignore[misc]
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        adopt(self)

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

    def _plan(self, causal: bool) -> Plan | None:
        torchs = nn.TransformerDecoderLayer
        methods = (
            ("_sa_block", torchs._sa_block),
            ("_mha_block", torchs._mha_block),
            ("_ff_block", torchs._ff_block),
        )
        attentions = (self.self_attn, self.multihead_attn)
        norms = (self.norm1, self.norm2, self.norm3)
        return plan_of(self, methods, attentions, norms, (self.dropout1, self.dropout2, self.dropout3), causal)

    def _run(
        self,
        x: Tensor,
        rows: Rows,
        attend: PaddedAttention | None,
        memory: Tensor,
        attend_memory: PackedAttention | PaddedAttention,
        plan: Plan,
    ) -> Tensor:
        options, dropout_p, attention_dropout_p, activation_dropout_p = plan
        return transformer_block(
            x,
            rows.cu_seqlens,
            rows.max_seqlen,
            block_weights(self, self.norm3),
            options,
            dropout_p=dropout_p,
            attention_dropout_p=attention_dropout_p,
            activation_dropout_p=activation_dropout_p,
            attend=dropping(attend, attention_dropout_p),
            cross=Cross(
                cross_weights(self.multihead_attn, self.norm2), memory, dropping(attend_memory, attention_dropout_p)
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
        return zeros_on_padding(x, tgt_key_padding_mask, self.self_attn.batch_first)


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
    check_input("tgt", tgt, attention.embed_dim)
    check_input("memory", memory, attention.embed_dim)
    batch, seq_q = sizes(tgt, attention.batch_first)
    memory_batch, seq_k = sizes(memory, attention.batch_first)
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
            tgt_is_causal = is_causal_mask(tgt_mask, sizes(tgt, first.self_attn.batch_first)[1])
        masks = (tgt_mask, memory_mask, tgt_key_padding_mask, memory_key_padding_mask, tgt_is_causal, memory_is_causal)
        plans = plans_of(self.layers, TransformerDecoderLayer, tgt_is_causal)
        if plans is None:
            x = tgt
            for layer in self.layers:
                x = layer(x, memory, *masks)
            x = x if self.norm is None else self.norm(x)
            return zeros_on_padding(x, tgt_key_padding_mask, first.self_attn.batch_first)
        rows, memory_rows, attend, attend_memory = _enter_decoder(first, tgt, memory, *masks)
        x = rows.values
        for layer, plan in zip(self.layers, plans, strict=True):
            x = layer._run(x, rows, attend, memory_rows, attend_memory, plan)
        return through_norm(self.norm, rows, x)
