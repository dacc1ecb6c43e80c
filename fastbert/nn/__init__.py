"""Building blocks on packed tokens, and the functions they hold parameters for."""

from fastbert.nn.block import (
    BlockOptions,
    BlockWeights,
    FeedForward,
    SelfAttention,
    TransformerBlock,
    self_attention,
    transformer_block,
)
from fastbert.nn.embeddings import Embeddings
from fastbert.nn.init import initialize
from fastbert.nn.norm import LayerNorm

__all__ = [
    "BlockOptions",
    "BlockWeights",
    "Embeddings",
    "FeedForward",
    "LayerNorm",
    "SelfAttention",
    "TransformerBlock",
    "initialize",
    "self_attention",
    "transformer_block",
]
