"""Every operation in plain PyTorch, forward and backward: the specification, and the fallback.

A function here has the name and the positional signature of its operator, ``fastbert::<name>``. The C++ and the
Triton implementations are held to it by the tests. It is written to be read: explicit formulas, no autograd, no
in-place tricks, memory as it falls.

Shared conventions:

- Arithmetic runs in float32 (float64 for float64 inputs), whatever the dtype of the tensors; results are rounded once
  to the input's dtype. Products of matrices run in the dtype of their operands, as everywhere in PyTorch.
- Statistics (mean, rstd, log-sum-exp), losses and the gradients of parameters come back in that wide dtype.
- A result that is not asked for comes back as an empty tensor of shape [0].
"""

from fastbert.reference._common import wide_dtype
from fastbert.reference.attention import attention, attention_backward, attention_decode
from fastbert.reference.dropout import dropout_mask, philox
from fastbert.reference.elementwise import (
    ACTIVATIONS,
    GELU_BY_APPROXIMATION,
    bias_gelu,
    bias_gelu_backward,
    rotary,
    softmax,
    softmax_backward,
)
from fastbert.reference.embedding import embedding_layer_norm, embedding_layer_norm_backward
from fastbert.reference.gated_act import GATE_ACTIVATIONS, gated_act, gated_act_backward
from fastbert.reference.layer_norm import add_layer_norm, add_layer_norm_backward, layer_norm, layer_norm_backward
from fastbert.reference.linear import (
    PRECISIONS,
    linear_act,
    linear_act_backward,
    linear_reduced,
    linear_residual,
    quantize_rows,
)
from fastbert.reference.losses import (
    cross_entropy,
    cross_entropy_backward,
    cross_entropy_backward_,
    linear_cross_entropy,
    linear_cross_entropy_backward,
)
from fastbert.reference.pack import pack, unpack
from fastbert.reference.rms_norm import rms_norm, rms_norm_backward

__all__ = [
    "ACTIVATIONS",
    "GATE_ACTIVATIONS",
    "GELU_BY_APPROXIMATION",
    "PRECISIONS",
    "add_layer_norm",
    "add_layer_norm_backward",
    "attention",
    "attention_backward",
    "attention_decode",
    "bias_gelu",
    "bias_gelu_backward",
    "cross_entropy",
    "cross_entropy_backward",
    "cross_entropy_backward_",
    "dropout_mask",
    "embedding_layer_norm",
    "embedding_layer_norm_backward",
    "gated_act",
    "gated_act_backward",
    "layer_norm",
    "layer_norm_backward",
    "linear_act",
    "linear_act_backward",
    "linear_cross_entropy",
    "linear_cross_entropy_backward",
    "linear_reduced",
    "linear_residual",
    "pack",
    "philox",
    "quantize_rows",
    "rms_norm",
    "rms_norm_backward",
    "rotary",
    "softmax",
    "softmax_backward",
    "unpack",
    "wide_dtype",
]
