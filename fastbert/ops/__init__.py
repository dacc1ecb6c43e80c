"""The operations: one file each, with schema, shape function, autograd and public function. Importing registers them."""

from fastbert.ops import (
    add_layer_norm,
    attention,
    attention_decode,
    cross_entropy,
    embedding,
    gated_act,
    gelu,
    layer_norm,
    linear,
    pack,
    rms_norm,
    rotary,
    softmax,
)

__all__ = [
    "add_layer_norm",
    "attention",
    "attention_decode",
    "cross_entropy",
    "embedding",
    "gated_act",
    "gelu",
    "layer_norm",
    "linear",
    "pack",
    "rms_norm",
    "rotary",
    "softmax",
]
