"""The public functions, named and ordered as torch.nn.functional and flash_attn name theirs."""

from fastbert.ops.add_layer_norm import add_layer_norm
from fastbert.ops.attention import scaled_dot_product_attention, varlen_attention
from fastbert.ops.attention_decode import attention_decode
from fastbert.ops.cross_entropy import cross_entropy, linear_cross_entropy
from fastbert.ops.embedding import embedding_layer_norm
from fastbert.ops.gated_act import gated_act, geglu, swiglu
from fastbert.ops.gelu import bias_gelu, gelu
from fastbert.ops.layer_norm import layer_norm
from fastbert.ops.linear import linear_act, linear_residual
from fastbert.ops.rms_norm import rms_norm
from fastbert.ops.rotary import rotary
from fastbert.ops.softmax import softmax

__all__ = [
    "add_layer_norm",
    "attention_decode",
    "bias_gelu",
    "cross_entropy",
    "embedding_layer_norm",
    "gated_act",
    "geglu",
    "gelu",
    "layer_norm",
    "linear_act",
    "linear_cross_entropy",
    "linear_residual",
    "rms_norm",
    "rotary",
    "scaled_dot_product_attention",
    "softmax",
    "swiglu",
    "varlen_attention",
]
