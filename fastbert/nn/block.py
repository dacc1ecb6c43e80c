"""The one transformer block of the library, on packed tokens.

The mathematics is ``transformer_block``, a function of tensors: models, modules and integrations run it on whatever
parameters they hold. The modules below it are thin holders.

Shapes: ``x [total, hidden]``, ``cu_seqlens`` int32 ``[batch + 1]``, ``max_seqlen`` a Python int.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as TF

from fastbert import functional as F
from fastbert.nn._modules import is_plain, product, weight_and_bias
from fastbert.nn.init import initialize
from fastbert.nn.norm import LayerNorm
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


Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""query, key and value of the new tokens, each [total, heads, head_dim], to the attention's result, likewise."""

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
    attend: Attend | None = None,
) -> Tensor:
    """Multi-head attention of each sequence to itself, before the output projection: [total, hidden].

    In bfloat16 where the precision is reduced. ``bias`` is added to the logits, and shared by the sequences. ``attend`` computes
    the attention in place of all that: over a cache of earlier keys and values.
    """
    weights, biases = _parts(qkv_weight, qkv_bias)
    products = [_linear(x, w, b, "none", precision, torch.bfloat16) for w, b in zip(weights, biases, strict=True)]
    return _attend(products, cu_seqlens, max_seqlen, num_heads, causal, dropout_p, bias, attend)


def _attend(
    products: Sequence[Tensor],  # query, key and value: one [total, 3 * hidden], or three [total, hidden]
    cu_seqlens: Tensor,
    max_seqlen: int,
    num_heads: int,
    causal: bool,
    dropout_p: float,
    bias: Tensor | None = None,
    attend: Attend | None = None,
) -> Tensor:
    total, width = products[0].shape
    head_dim = width * len(products) // (3 * num_heads)
    if len(products) == 1:
        q, k, v = products[0].view(total, 3, num_heads, head_dim).unbind(1)  # each [total, heads, head_dim]
    else:
        q, k, v = (each.view(total, num_heads, head_dim) for each in products)
    if attend is not None:
        return attend(q, k, v).flatten(1)
    context = F.varlen_attention(
        q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, dropout_p, causal=causal, bias=bias
    )
    assert isinstance(context, Tensor)  # and no pair, without return_lse
    return context.flatten(1)


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
    attention_bias: Tensor | None = None,  # [num_heads or 1, max_seqlen, max_seqlen]
    attend: Attend | None = None,
) -> Tensor:
    """One layer, [total, hidden] to [total, hidden].

    Post-norm (Vaswani et al. 2017; BERT): x = norm(x + attention(x)); x = norm(x + feed_forward(x)).
    Pre-norm (GPT-2): x = x + attention(norm(x)); x = x + feed_forward(norm(x)).

    The bias of each part's last product, its dropout, the residual and the following layer norm are one operation.
    Dropout applies whenever its probability is not 0: the caller knows whether it trains. dropout_p is that of both parts, or,
    with feed_forward_dropout_p, of the attention alone.

    attention_bias is added to the attention's logits and shared by the sequences (MPNet's relative positions). attend
    replaces the attention to the block's own tokens: over a key/value cache.

    What the products multiply is options.precision's affair, see PRECISIONS. Without gradients and dropout a CPU runs the whole
    block in one call.
    """
    if feed_forward_dropout_p is None:
        feed_forward_dropout_p = dropout_p
    if (
        dropout_p == attention_dropout_p == feed_forward_dropout_p == 0.0
        and attention_bias is None
        and attend is None
        and x.is_cpu
    ):
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
    y = (
        F.layer_norm(x, x.shape[-1], w.attention_norm_weight, w.attention_norm_bias, options.eps)
        if options.norm_first
        else x
    )
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
        attend=attend,
    )
    stream = x.dtype
    projected = _linear(context, w.out_weight, None, "none", precision, stream)
    x = x.to(projected.dtype)  # under autocast the first block's input is wider than its products

    if options.norm_first:
        y, x = F.add_layer_norm(
            projected,
            x,
            w.feed_forward_norm_weight,
            w.feed_forward_norm_bias,
            options.eps,
            x_bias=w.out_bias,
            dropout_p=dropout_p,
        )
        up = _linear(y, w.up_weight, w.up_bias, options.activation, precision, torch.bfloat16)
        if feed_forward_dropout_p == 0.0:
            return F.linear_residual(up, w.down_weight, w.down_bias, x, precision=precision)
        # For its sum: the norm that follows belongs to the next block, and is not used here.
        down = _linear(up, w.down_weight, None, "none", precision, stream)
        _, x = F.add_layer_norm(down, x, x_bias=w.down_bias, dropout_p=feed_forward_dropout_p)
        return x

    x = F.add_layer_norm(
        projected,
        x,
        w.attention_norm_weight,
        w.attention_norm_bias,
        options.eps,
        x_bias=w.out_bias,
        dropout_p=dropout_p,
        return_sum=False,
    )
    up = _linear(x, w.up_weight, w.up_bias, options.activation, precision, torch.bfloat16)
    return F.add_layer_norm(
        _linear(up, w.down_weight, None, "none", precision, stream),
        x,
        w.feed_forward_norm_weight,
        w.feed_forward_norm_bias,
        options.eps,
        x_bias=w.down_bias,
        dropout_p=feed_forward_dropout_p,
        return_sum=False,
    )


class SelfAttention(nn.Module):
    """Multi-head self-attention with its output projection, each sequence of a packed batch on its own.

    Args:
        hidden_size: width of the tokens; a multiple of num_heads.
        num_heads: attention heads.
        bias: whether the projections have one.
        causal: a token sees only itself and what stands before it.
        dropout_p: of the attention probabilities, in training mode only.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        *,
        bias: bool = True,
        causal: bool = False,
        dropout_p: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if num_heads < 1 or hidden_size % num_heads:
            raise ValueError(
                f"hidden_size is {hidden_size} and num_heads {num_heads}; expected a multiple of the heads"
            )
        self.num_heads = num_heads
        self.causal = causal
        self.dropout_p = dropout_p
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size, bias, device=device, dtype=dtype)
        self.out = nn.Linear(hidden_size, hidden_size, bias, device=device, dtype=dtype)
        initialize(self)

    def forward(self, x: Tensor, cu_seqlens: Tensor, max_seqlen: int, attend: Attend | None = None) -> Tensor:
        """[total, hidden] to [total, hidden]."""
        dropout_p = self.dropout_p if self.training else 0.0
        qkv = [product(self.qkv, x)]
        context = _attend(qkv, cu_seqlens, max_seqlen, self.num_heads, self.causal, dropout_p, attend=attend)
        return product(self.out, context)

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, causal={self.causal}, dropout_p={self.dropout_p}"


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

    Args:
        hidden_size: width of the tokens; a multiple of num_heads.
        num_heads: attention heads.
        intermediate_size: width between the feed-forward part's products; 4 * hidden_size unless given.
        activation: gelu, gelu_tanh, gelu_quick, relu, silu, tanh or none.
        dropout_p: behind both parts, in training mode only.
        attention_dropout_p: of the attention probabilities, in training mode only.
        eps: of both layer norms.
        norm_first: layer norm before each part (GPT-2) rather than after it (BERT).
        causal: a token sees only itself and what stands before it.
        bias: whether the four products have one.
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
            dropout_p=attention_dropout_p,
            device=device,
            dtype=dtype,
        )
        self.attention_norm = LayerNorm(hidden_size, eps, device=device, dtype=dtype)
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

    def forward(self, x: Tensor, cu_seqlens: Tensor, max_seqlen: int, attend: Attend | None = None) -> Tensor:
        """[total, hidden] to [total, hidden]. ``attend``: see ``transformer_block``."""
        changed = self._changed_parts()
        if changed:
            return self._forward_by_modules(x, cu_seqlens, max_seqlen, attend, changed)
        training = self.training
        return transformer_block(
            x,
            cu_seqlens,
            max_seqlen,
            self.weights(),
            self.options,
            dropout_p=self.dropout_p if training else 0.0,
            attention_dropout_p=self.attention.dropout_p if training else 0.0,
            attend=attend,
        )

    def _changed_parts(self) -> list[str]:
        """Modules of the block that are no longer what it made: another class, or with hooks."""
        attention, feed_forward = self.attention, self.feed_forward
        if (
            is_plain(attention, SelfAttention.forward)
            and is_plain(attention.qkv, nn.Linear.forward)
            and is_plain(attention.out, nn.Linear.forward)
            and is_plain(self.attention_norm, LayerNorm.forward)
            and is_plain(feed_forward, FeedForward.forward)
            and is_plain(feed_forward.up, nn.Linear.forward)
            and is_plain(feed_forward.down, nn.Linear.forward)
            and is_plain(self.feed_forward_norm, LayerNorm.forward)
        ):
            return []
        expected: tuple[Callable[..., Any], ...] = (
            SelfAttention.forward,
            FeedForward.forward,
            LayerNorm.forward,
            nn.Linear.forward,
        )
        changed = [
            name for name, part in self.named_modules() if name and not any(is_plain(part, each) for each in expected)
        ]
        return changed or ["a part"]

    def _forward_by_modules(
        self, x: Tensor, cu_seqlens: Tensor, max_seqlen: int, attend: Attend | None, changed: list[str]
    ) -> Tensor:
        """The same block, every module called: an adapter, a pruned or quantized layer, a hook has its say."""
        if self.precision != "fp32":
            raise ValueError(
                f"precision is {self.precision!r}, which reads the weights past their modules, but {changed[0]} has another "
                "forward or hooks; remove these (merge an adapter into its weight), or take precision 'fp32'"
            )
        p, training = self.dropout_p, self.training
        if self.options.norm_first:
            x = x + TF.dropout(self.attention(self.attention_norm(x), cu_seqlens, max_seqlen, attend), p, training)
            return x + TF.dropout(self.feed_forward(self.feed_forward_norm(x)), p, training)
        x = self.attention_norm(x + TF.dropout(self.attention(x, cu_seqlens, max_seqlen, attend), p, training))
        y: Tensor = self.feed_forward_norm(x + TF.dropout(self.feed_forward(x), p, training))
        return y

    def extra_repr(self) -> str:
        return f"norm_first={self.options.norm_first}, dropout_p={self.dropout_p}, precision={self.precision!r}"
