"""The one transformer block of the library, on packed tokens.

The mathematics is ``transformer_block``, a function of tensors: models, modules and integrations run it on whatever
parameters they hold. The modules below it are thin holders.

Shapes: ``x [total, hidden]``, ``cu_seqlens`` int32 ``[batch + 1]``, ``max_seqlen`` a Python int.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as TF

from fastbert import functional as F
from fastbert.nn._modules import product
from fastbert.nn.attention import (
    Attend,
    Cross,
    PackedAttention,
    Rotation,
    attend_to_memory,
    attend_to_self,
)
from fastbert.ops.block import whole_blocks

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


def as_whole(weights: BlockWeights, options: BlockOptions) -> tuple[Any, Any, Any]:
    """Matrices, vectors and settings, as fastbert.cpu.block takes them."""
    qkv_weights, qkv_biases = _parts(weights.qkv_weight, weights.qkv_bias)
    return (
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
        (
            options.num_heads,
            options.activation,
            options.eps,
            options.norm_first,
            options.causal,
            options.precision,
        ),
    )


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
        y = whole_blocks(x, cu_seqlens, max_seqlen, [as_whole(weights, options)])
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


class BlockModules(NamedTuple):
    """The modules of a block, where some are called rather than read; see ``BlockWeights``."""

    qkv: tuple[nn.Module, ...]  # one, or query, key and value
    out: nn.Module
    attention_norm: nn.Module
    up: nn.Module
    down: nn.Module
    feed_forward_norm: nn.Module


def transformer_block_by_modules(
    x: Tensor,  # [total, hidden]
    cu_seqlens: Tensor,  # int32 [batch + 1]
    max_seqlen: int,
    modules: BlockModules,
    options: BlockOptions,
    *,
    dropout_p: float = 0.0,
    attention_dropout_p: float = 0.0,
    feed_forward_dropout_p: float | None = None,
    attention_bias: Tensor | None = None,  # [num_heads or 1, max_seqlen, max_seqlen]
) -> Tensor:
    """``transformer_block`` for linear layers that are more than a weight: adapters. Each is called with [total, width]."""
    if options.precision != "fp32":
        raise ValueError(f"precision is {options.precision!r}, which reads the weights past their modules; take 'fp32'")
    if feed_forward_dropout_p is None:
        feed_forward_dropout_p = dropout_p

    attend = PackedAttention(
        cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, options.causal, attention_dropout_p, attention_bias
    )

    def attention(y: Tensor) -> Tensor:
        context = attend_to_self([product(each, y) for each in modules.qkv], options.num_heads, attend)
        return TF.dropout(product(modules.out, context), dropout_p)

    def feed_forward(y: Tensor) -> Tensor:
        up = product(modules.up, y, options.activation)
        return TF.dropout(product(modules.down, up), feed_forward_dropout_p)

    if options.norm_first:
        x = x + attention(modules.attention_norm(x))
        return x + feed_forward(modules.feed_forward_norm(x))
    x = modules.attention_norm(x + attention(x))
    y: Tensor = modules.feed_forward_norm(x + feed_forward(x))
    return y
