"""The transformer block as a module: it holds the parameters that ``fastbert.nn.block`` computes with."""

import functools
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn import functional as TF
from torch.nn.modules import module as module_globals
from torch.utils.checkpoint import checkpoint

from fastbert.nn._modules import is_plain, product, weight_and_bias
from fastbert.nn.attention import Attend, Cross, CrossAttention, CrossWeights, PackedAttention, SelfAttention
from fastbert.nn.block import BlockOptions, BlockWeights, as_whole, transformer_block
from fastbert.nn.inference import InferenceBlock, run_inference_blocks
from fastbert.nn.init import initialize
from fastbert.nn.norm import LayerNorm
from fastbert.nn.positions import RotaryPositions
from fastbert.ops.block import whole_modules


class FeedForward(nn.Module):
    """activation(x upᵀ + bias) downᵀ + bias, on [..., hidden]."""

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        activation: str = "gelu",
        *,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.activation = activation
        self.up = nn.Linear(hidden_size, intermediate_size, bias, device=device, dtype=dtype)
        self.down = nn.Linear(intermediate_size, hidden_size, bias, device=device, dtype=dtype)
        initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        """[..., hidden] to [..., hidden]."""
        return product(self.down, product(self.up, x, self.activation))

    def extra_repr(self) -> str:
        return f"activation={self.activation}"


@functools.lru_cache
def _one_of_equal(options: BlockOptions) -> BlockOptions:
    """One object for all that are equal: a block that goes back to a precision is what it was."""
    return options


class TransformerBlock(nn.Module):
    """Self-attention and feed-forward, each with residual, dropout and layer norm, on packed tokens.

    With cross_attention, attention to a memory stands between the two: a decoder's block.

    Args:
        hidden_size: width of the tokens; a multiple of num_heads.
        num_heads: attention heads.
        intermediate_size: width between the feed-forward part's products; 4 * hidden_size unless given.
        activation: gelu, gelu_tanh, gelu_quick, relu, silu, tanh or none.
        dropout_p: behind both parts, in training mode only.
        attention_dropout_p: of the attention probabilities, in training mode only.
        eps: of the layer norms.
        norm_first: layer norm before each part (GPT-2) rather than after it (BERT).
        causal: a token sees only itself and what stands before it.
        cross_attention: whether there is a part that attends to a memory.
        memory_size: width of the memory; hidden_size unless given.
        rotary: turns query and key of self-attention by their positions; one module may serve all blocks.
        bias: whether the products have one.
        precision: of inference, see PRECISIONS. It may be changed later; it is no part of the state.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        intermediate_size: int | None = None,
        *,
        activation: str = "gelu",
        dropout_p: float = 0.0,
        attention_dropout_p: float = 0.0,
        eps: float = 1e-12,
        norm_first: bool = False,
        causal: bool = False,
        cross_attention: bool = False,
        memory_size: int | None = None,
        rotary: RotaryPositions | None = None,
        bias: bool = True,
        precision: str = "fp32",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        intermediate_size = 4 * hidden_size if intermediate_size is None else intermediate_size
        self.attention = SelfAttention(
            hidden_size,
            num_heads,
            bias=bias,
            causal=causal,
            rotary=rotary,
            dropout_p=attention_dropout_p,
            device=device,
            dtype=dtype,
        )
        self.attention_norm = LayerNorm(hidden_size, eps, device=device, dtype=dtype)
        if memory_size is not None and not cross_attention:
            raise ValueError(f"memory_size is {memory_size}, but cross_attention is False; set it to True")
        self.cross_attention = None
        if cross_attention:
            self.cross_attention = CrossAttention(
                hidden_size,
                num_heads,
                memory_size,
                bias=bias,
                dropout_p=attention_dropout_p,
                device=device,
                dtype=dtype,
            )
            self.cross_attention_norm = LayerNorm(hidden_size, eps, device=device, dtype=dtype)
        self.feed_forward = FeedForward(
            hidden_size, intermediate_size, activation, bias=bias, device=device, dtype=dtype
        )
        self.feed_forward_norm = LayerNorm(hidden_size, eps, device=device, dtype=dtype)
        self.options = BlockOptions(num_heads, activation, eps, norm_first, causal, precision)
        self.dropout_p = dropout_p

    @property
    def precision(self) -> str:
        return self.options.precision

    @precision.setter
    def precision(self, precision: str) -> None:
        self.options = _one_of_equal(replace(self.options, precision=precision))

    def weights(self) -> BlockWeights:
        """The parameters as ``transformer_block`` takes them."""
        attention, feed_forward = self.attention, self.feed_forward
        return BlockWeights(
            *weight_and_bias(attention.qkv),
            *weight_and_bias(attention.out),
            *weight_and_bias(self.attention_norm),
            *weight_and_bias(feed_forward.up),
            *weight_and_bias(feed_forward.down),
            *weight_and_bias(self.feed_forward_norm),
        )

    def forward(
        self,
        x: Tensor,  # [total, hidden]
        cu_seqlens: Tensor,  # int32 [batch + 1]
        max_seqlen: int,
        attend: Attend | None = None,
        *,
        memory: Tensor | None = None,  # [total_k, memory_size]
        memory_cu_seqlens: Tensor | None = None,  # int32 [batch + 1]
        memory_max_seqlen: int = 0,
        position_ids: Tensor | None = None,  # int [total], for rotary; 0, 1, … in each sequence unless given
    ) -> Tensor:
        """[total, hidden] to [total, hidden]. A block with cross-attention needs a memory, one without takes none.

        ``attend``: see ``transformer_block``.
        """
        cross_attention = self.cross_attention
        if len({cross_attention is None, memory is None, memory_cu_seqlens is None}) > 1:
            raise ValueError(
                f"memory is {'None' if memory is None else 'given'} and memory_cu_seqlens "
                f"{'None' if memory_cu_seqlens is None else 'given'}, in a block with "
                f"cross_attention={cross_attention is not None}; both belong to a block with cross-attention, and to no other"
            )
        changed = self._changed_parts()
        if changed:
            memory_arguments = (memory, memory_cu_seqlens, memory_max_seqlen)
            return self._forward_by_modules(x, cu_seqlens, max_seqlen, attend, memory_arguments, position_ids, changed)
        training = self.training
        attention_dropout_p = self.attention.dropout_p if training else 0.0
        cross: Cross | None = None
        if cross_attention is not None and memory is not None and memory_cu_seqlens is not None:
            cross_weights = CrossWeights(
                *weight_and_bias(cross_attention.q),
                *weight_and_bias(cross_attention.kv),
                *weight_and_bias(cross_attention.out),
                *weight_and_bias(self.cross_attention_norm),
            )
            attend_memory = PackedAttention(
                cu_seqlens, memory_cu_seqlens, max_seqlen, memory_max_seqlen, dropout_p=attention_dropout_p
            )
            cross = Cross(cross_weights, memory, attend_memory)
        return transformer_block(
            x,
            cu_seqlens,
            max_seqlen,
            self.weights(),
            self.options,
            dropout_p=self.dropout_p if training else 0.0,
            attention_dropout_p=attention_dropout_p,
            attend=attend,
            rotation=self.attention.rotation(cu_seqlens, x.shape[0], position_ids),
            cross=cross,
        )

    def _changed_parts(self) -> list[str]:
        """Modules of the block that are no longer what it made: another class, or with hooks."""
        attention, cross, feed_forward = self.attention, self.cross_attention, self.feed_forward
        if (
            is_plain(attention, SelfAttention.forward)
            and is_plain(attention.qkv, nn.Linear.forward)
            and is_plain(attention.out, nn.Linear.forward)
            and is_plain(self.attention_norm, LayerNorm.forward)
            and is_plain(feed_forward, FeedForward.forward)
            and is_plain(feed_forward.up, nn.Linear.forward)
            and is_plain(feed_forward.down, nn.Linear.forward)
            and is_plain(self.feed_forward_norm, LayerNorm.forward)
            and (cross is None or self._cross_attention_is_plain(cross))
        ):
            return []
        expected: tuple[Callable[..., Any], ...] = (
            SelfAttention.forward,
            CrossAttention.forward,
            RotaryPositions.forward,
            FeedForward.forward,
            LayerNorm.forward,
            nn.Linear.forward,
        )
        changed = [
            name for name, part in self.named_modules() if name and not any(is_plain(part, each) for each in expected)
        ]
        return changed or ["a part"]

    def _cross_attention_is_plain(self, cross: CrossAttention) -> bool:
        return (
            is_plain(cross, CrossAttention.forward)
            and all(is_plain(linear, nn.Linear.forward) for linear in (cross.q, cross.kv, cross.out))
            and is_plain(self.cross_attention_norm, LayerNorm.forward)
        )

    def _forward_by_modules(
        self,
        x: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        attend: Attend | None,
        memory: tuple[Any, ...],
        position_ids: Tensor | None,
        changed: list[str],
    ) -> Tensor:
        """The same block, every module called: an adapter, a pruned or quantized layer, a hook has its say."""
        if self.precision != "fp32":
            raise ValueError(
                f"precision is {self.precision!r}, which reads the weights past their modules, but {changed[0]} has another "
                "forward or hooks; remove these (merge an adapter into its weight), or take precision 'fp32'"
            )
        attention, cross, feed_forward = self.attention, self.cross_attention, self.feed_forward
        rare = {"attend": attend, "position_ids": position_ids}  # another class may not know them
        given = {name: value for name, value in rare.items() if value is not None}
        parts = [(self.attention_norm, lambda y: attention(y, cu_seqlens, max_seqlen, **given))]
        if cross is not None:
            parts.append((self.cross_attention_norm, lambda y: cross(y, cu_seqlens, max_seqlen, *memory)))
        parts.append((self.feed_forward_norm, feed_forward))
        for norm, part in parts:
            if self.options.norm_first:
                x = x + TF.dropout(part(norm(x)), self.dropout_p, self.training)
            else:
                x = norm(x + TF.dropout(part(x), self.dropout_p, self.training))
        return x

    def extra_repr(self) -> str:
        return f"norm_first={self.options.norm_first}, dropout_p={self.dropout_p}, precision={self.precision!r}"


def run_blocks(
    blocks: Iterable[nn.Module],
    x: Tensor,  # [total, hidden]
    cu_seqlens: Tensor,  # int32 [batch + 1]
    max_seqlen: int,
    *,
    checkpointing: bool = False,
    states: list[Tensor] | None = None,
) -> Tensor:
    """Every block called in turn, [total, hidden] to [total, hidden]; on a CPU without gradients all of them in one call.

    With ``checkpointing`` a gradient computes each block's activations again instead of keeping them. ``states`` gets the result
    of every block.
    """
    blocks = list(blocks)
    if x.is_cpu and blocks and states is None and not module_globals._has_any_global_hook():
        alone = [
            block for block in blocks if isinstance(block, InferenceBlock) and is_plain(block, InferenceBlock.forward)
        ]
        if len(alone) == len(blocks):
            return run_inference_blocks(alone, x, cu_seqlens, max_seqlen)
        variant = blocks[0].options if isinstance(blocks[0], TransformerBlock) else None
        y = whole_modules(x, cu_seqlens, max_seqlen, blocks, _describe, (BlockOptions,), variant)
        if y is not None:
            return y
    checkpointing = checkpointing and torch.is_grad_enabled()
    for block in blocks:
        arguments = (x, cu_seqlens, max_seqlen)
        x = checkpoint(block, *arguments, use_reentrant=False) if checkpointing else block(*arguments)
        if states is not None:
            states.append(x)
    return x


def _describe(blocks: list[nn.Module]) -> list[Any] | None:
    """What whole_blocks is to run, if that is what calling the blocks is."""
    whole = [as_whole(block.weights(), block.options) for block in blocks if _is_whole(block)]
    return whole if len(whole) == len(blocks) else None


def _is_whole(block: nn.Module) -> TypeGuard[TransformerBlock]:
    """Whether the block drops nothing out, and calling it is calling ``transformer_block`` and nothing else, to its own tokens."""
    return (
        isinstance(block, TransformerBlock)
        and is_plain(block, TransformerBlock.forward)
        and block.cross_attention is None
        and block.attention.rotary is None
        and not (block.training and (block.dropout_p or block.attention.dropout_p))
        and not block._changed_parts()
    )


def freeable(block: nn.Module) -> TransformerBlock:
    """The block. Raises ValueError for one in training or not run as a whole: it cannot do without its weights."""
    if block.training:
        raise ValueError("the model is in training, and without its weights nothing can be learnt: call eval() first")
    if not _is_whole(block):
        raise ValueError(
            f"a {type(block).__name__} with hooks, adapters, exchanged parts, cross-attention or rotary positions is run part by "
            "part: its weights cannot be freed. Remove these, or merge them into the weights"
        )
    return block
