"""The one transformer block of the library, on packed tokens.

The mathematics is ``transformer_block``, a function of tensors: models, modules and integrations run it on whatever
parameters they hold. The modules below it are thin holders.

Shapes: ``x [total, hidden]``, ``cu_seqlens`` int32 ``[batch + 1]``, ``max_seqlen`` a Python int.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as TF

from fastbert import functional as F
from fastbert.nn._modules import is_plain, product, weight_and_bias
from fastbert.nn.attention import (
    Attend,
    Cross,
    CrossAttention,
    CrossWeights,
    PackedAttention,
    Rotation,
    SelfAttention,
    attend_to_memory,
    attend_to_self,
)
from fastbert.nn.init import initialize
from fastbert.nn.norm import LayerNorm
from fastbert.nn.positions import RotaryPositions
from fastbert.ops.block import whole_block

PRECISIONS: dict[str, str] = {
    "fp32": "everything in the parameters' dtype, sums in float32",
    "bf16": (
        "the four products of a block multiply bfloat16 and sum in float32; query, key, value, the attention's result and the "
        "feed-forward part's hidden activations are bfloat16; residuals, norms, softmax and activation functions stay float32"
    ),
    "int8": (
        "as bf16, but the four products multiply 8-bit integers, with a scale for each output channel of the weights and one for "
        "each token, found as it comes, of what they multiply (fastbert.reference.linear_reduced has the formulas)"
    ),
}
"""The precisions of inference, the one place where they are defined. Parameters keep their dtype in all of them. "bf16" and "int8"
have no gradient, and are fast on CPUs only; what they cost in exactness is in README.md."""


def check_precision(precision: str) -> str:
    """The argument, or a ValueError."""
    if precision not in PRECISIONS:
        raise ValueError(f"precision is {precision!r}; expected one of {', '.join(map(repr, PRECISIONS))}")
    return precision


@dataclass(frozen=True)
class BlockOptions:
    """What a block computes, apart from its weights.

    Attributes:
        num_heads: attention heads; they share the hidden width equally.
        activation: between the two products of the feed-forward part: gelu, gelu_tanh, gelu_quick, relu, silu, tanh,
            none.
        eps: of both layer norms.
        norm_first: layer norm before each part (GPT-2) rather than after it (BERT).
        causal: a token sees only itself and what stands before it.
        precision: of inference, see PRECISIONS.
    """

    num_heads: int
    activation: str = "gelu"
    eps: float = 1e-12
    norm_first: bool = False
    causal: bool = False
    precision: str = "fp32"

    def __post_init__(self) -> None:
        check_precision(self.precision)


Triple = tuple[Tensor, Tensor, Tensor]
OptionalTriple = tuple[Tensor | None, Tensor | None, Tensor | None]


class BlockWeights(NamedTuple):
    """The tensors of a block. Any bias may be None.

    Query, key and value are one matrix and one bias, or three of each in this order, as a checkpoint has them: on CPUs three are
    packed as one, and nothing is lost; elsewhere, and in training, three are three products.
    """

    qkv_weight: Tensor | Triple  # [3 * hidden, hidden]; or three [hidden, hidden]
    qkv_bias: Tensor | OptionalTriple | None  # [3 * hidden]; or three [hidden]
    out_weight: Tensor  # [hidden, hidden]
    out_bias: Tensor | None  # [hidden]
    attention_norm_weight: Tensor | None  # [hidden]
    attention_norm_bias: Tensor | None  # [hidden]
    up_weight: Tensor  # [intermediate, hidden]
    up_bias: Tensor | None  # [intermediate]
    down_weight: Tensor  # [hidden, intermediate]
    down_bias: Tensor | None  # [hidden]
    feed_forward_norm_weight: Tensor | None  # [hidden]
    feed_forward_norm_bias: Tensor | None  # [hidden]


def _parts(
    weight: Tensor | Triple, bias: Tensor | OptionalTriple | None
) -> tuple[tuple[Tensor, ...], tuple[Tensor | None, ...]]:
    """Weights and biases of query, key and value: one of each, or three."""
    if isinstance(weight, Tensor):
        if bias is None or isinstance(bias, Tensor):
            return (weight,), (bias,)
    elif not isinstance(bias, Tensor):
        biases: tuple[Tensor | None, ...] = (None,) * len(weight) if bias is None else bias
        if len(weight) == len(biases) == 3:
            return weight, biases
    counts = [0 if each is None else 1 if isinstance(each, Tensor) else len(each) for each in (weight, bias)]
    raise ValueError(
        f"qkv_weight is {counts[0]} tensors and qkv_bias {counts[1]}; expected one of each, or three: query, key, value"
    )


def _linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, precision: str, reduced_dtype: torch.dtype
) -> Tensor:
    """A product of a block; in reduced precision its result has reduced_dtype."""
    if precision == "fp32":
        return F.linear_act(x, weight, bias, activation)
    return F.linear_act(x, weight, bias, activation, precision=precision, dtype=reduced_dtype)


def self_attention(
    x: Tensor,  # [total, hidden]
    cu_seqlens: Tensor,  # int32 [batch + 1]
    max_seqlen: int,
    qkv_weight: Tensor | Triple,  # [3 * hidden, hidden], or three [hidden, hidden]
    qkv_bias: Tensor | OptionalTriple | None,  # [3 * hidden], or three [hidden]
    num_heads: int,
    *,
    causal: bool = False,
    dropout_p: float = 0.0,
    precision: str = "fp32",
    bias: Tensor | None = None,  # [num_heads or 1, max_seqlen, max_seqlen]
    rotation: Rotation | None = None,
    attend: Attend | None = None,
) -> Tensor:
    """Multi-head attention of each sequence to itself, before the output projection: [total, hidden].

    In bfloat16 where the precision is reduced. ``bias`` is added to the logits, and shared by the sequences. ``rotation`` turns
    query and key. ``attend`` takes the place of packed attention; what it would be told is then not looked at.
    """
    weights, biases = _parts(qkv_weight, qkv_bias)
    products = [_linear(x, w, b, "none", precision, torch.bfloat16) for w, b in zip(weights, biases, strict=True)]
    attend = attend or PackedAttention(cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, causal, dropout_p, bias)
    return attend_to_self(products, num_heads, attend, rotation)


def transformer_block(
    x: Tensor,  # [total, hidden]
    cu_seqlens: Tensor,  # int32 [batch + 1]
    max_seqlen: int,
    weights: BlockWeights,
    options: BlockOptions,
    *,
    dropout_p: float = 0.0,
    attention_dropout_p: float = 0.0,
    feed_forward_dropout_p: float | None = None,
    activation_dropout_p: float = 0.0,
    attention_bias: Tensor | None = None,  # [num_heads or 1, max_seqlen, max_seqlen]
    rotation: Rotation | None = None,
    attend: Attend | None = None,
    cross: Cross | None = None,
) -> Tensor:
    """One layer, [total, hidden] to [total, hidden].

    Post-norm (Vaswani et al. 2017; BERT): x = norm(x + attention(x)); x = norm(x + feed_forward(x)).
    Pre-norm (GPT-2): x = x + attention(norm(x)); x = x + feed_forward(norm(x)).
    A decoder's block has a part more between the two, attention to a memory, with a norm of its own.

    The bias of each part's last product, its dropout, the residual and the following layer norm are one operation.
    Dropout applies whenever its probability is not 0: the caller knows whether it trains.

    What the products multiply is options.precision's affair, see PRECISIONS. Without gradients and dropout a CPU runs the whole
    block in one call, if it is self-attention to packed tokens, without rotation, and feed-forward.

    Args:
        dropout_p: of the elements of each part's result.
        attention_dropout_p: of the attention probabilities.
        feed_forward_dropout_p: of the feed-forward part's result, where it is not dropout_p.
        activation_dropout_p: of the activations between the feed-forward part's products (Vaswani's block has it, BERT's not).
        attention_bias: added to the logits of self-attention and shared by the sequences (MPNet's relative positions).
        rotation: where the tokens stand, for rotary position embedding.
        attend: replaces self-attention among the block's own tokens, its dropout and bias too: padded, or over a key/value cache.
        cross: the attention to a memory.
    """
    if feed_forward_dropout_p is None:
        feed_forward_dropout_p = dropout_p
    simple = attention_bias is None and rotation is None and attend is None and cross is None
    dropouts = (dropout_p, attention_dropout_p, feed_forward_dropout_p, activation_dropout_p)
    if simple and not any(dropouts) and x.is_cpu:
        qkv_weights, qkv_biases = _parts(weights.qkv_weight, weights.qkv_bias)
        y = whole_block(
            x,
            cu_seqlens,
            max_seqlen,
            (*qkv_weights, weights.out_weight, weights.up_weight, weights.down_weight),
            (
                *qkv_biases,
                weights.out_bias,
                weights.up_bias,
                weights.down_bias,
                weights.attention_norm_weight,
                weights.attention_norm_bias,
                weights.feed_forward_norm_weight,
                weights.feed_forward_norm_bias,
            ),
            options.num_heads,
            options.activation,
            options.eps,
            options.norm_first,
            options.causal,
            options.precision,
        )
        if y is not None:
            return y
    w = weights
    precision = options.precision
    norms = [(w.attention_norm_weight, w.attention_norm_bias), (w.feed_forward_norm_weight, w.feed_forward_norm_bias)]
    if cross is not None:
        norms.insert(1, (cross.weights.norm_weight, cross.weights.norm_bias))
    y = F.layer_norm(x, x.shape[-1], *norms.pop(0), options.eps) if options.norm_first else x
    context = self_attention(
        y,
        cu_seqlens,
        max_seqlen,
        w.qkv_weight,
        w.qkv_bias,
        options.num_heads,
        causal=options.causal,
        dropout_p=attention_dropout_p,
        precision=precision,
        bias=attention_bias,
        rotation=rotation,
        attend=attend,
    )
    stream = x.dtype
    projected = _linear(context, w.out_weight, None, "none", precision, stream)
    x = x.to(projected.dtype)  # under autocast the first block's input is wider than its products
    y, x = _add_and_norm(projected, w.out_bias, x, *norms.pop(0), options, dropout_p)

    if cross is not None:
        c = cross.weights
        q = _linear(y, c.q_weight, c.q_bias, "none", precision, torch.bfloat16)
        kv = _linear(cross.memory, c.kv_weight, c.kv_bias, "none", precision, torch.bfloat16)
        context = attend_to_memory(q, kv, options.num_heads, cross.attend)
        projected = _linear(context, c.out_weight, None, "none", precision, stream)
        y, x = _add_and_norm(projected, c.out_bias, x, *norms.pop(0), options, dropout_p)

    up = _linear(y, w.up_weight, w.up_bias, options.activation, precision, torch.bfloat16)
    if activation_dropout_p > 0.0:
        up = TF.dropout(up, activation_dropout_p)
    if options.norm_first and feed_forward_dropout_p == 0.0:
        return F.linear_residual(up, w.down_weight, w.down_bias, x, precision=precision)
    down = _linear(up, w.down_weight, None, "none", precision, stream)
    if options.norm_first:
        # For its sum: the norm that follows belongs to the next block, and is not used here.
        return F.add_layer_norm(down, x, x_bias=w.down_bias, dropout_p=feed_forward_dropout_p)[1]
    return _add_and_norm(down, w.down_bias, x, *norms.pop(0), options, feed_forward_dropout_p)[0]


def _add_and_norm(
    branch: Tensor,  # [total, hidden], a product without its bias
    bias: Tensor | None,  # [hidden], the product's
    x: Tensor,  # [total, hidden], the residual stream
    norm_weight: Tensor | None,  # [hidden]
    norm_bias: Tensor | None,  # [hidden]
    options: BlockOptions,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    """Adds the branch to the stream and normalises: what the next part reads, and the stream as it goes on."""
    if options.norm_first:
        return F.add_layer_norm(branch, x, norm_weight, norm_bias, options.eps, x_bias=bias, dropout_p=dropout_p)
    y = F.add_layer_norm(
        branch, x, norm_weight, norm_bias, options.eps, x_bias=bias, dropout_p=dropout_p, return_sum=False
    )
    return y, y


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
        self.options = replace(self.options, precision=precision)

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

    def cross_weights(self) -> CrossWeights | None:
        """Those of the attention to a memory, where there is one."""
        if self.cross_attention is None:
            return None
        return CrossWeights(
            *weight_and_bias(self.cross_attention.q),
            *weight_and_bias(self.cross_attention.kv),
            *weight_and_bias(self.cross_attention.out),
            *weight_and_bias(self.cross_attention_norm),
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
        cross_weights = self.cross_weights()
        if len({cross_weights is None, memory is None, memory_cu_seqlens is None}) > 1:
            raise ValueError(
                f"memory is {'None' if memory is None else 'given'} and memory_cu_seqlens "
                f"{'None' if memory_cu_seqlens is None else 'given'}, in a block with cross_attention={cross_weights is not None}; "
                "both belong to a block with cross-attention, and to no other"
            )
        changed = self._changed_parts()
        if changed:
            memory_arguments = (memory, memory_cu_seqlens, memory_max_seqlen)
            return self._forward_by_modules(x, cu_seqlens, max_seqlen, attend, memory_arguments, position_ids, changed)
        training = self.training
        attention_dropout_p = self.attention.dropout_p if training else 0.0
        cross: Cross | None = None
        if cross_weights is not None and memory is not None and memory_cu_seqlens is not None:
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
