"""Building blocks on packed tokens, and the functions they hold parameters for."""

from fastbert.nn.block import (
    PRECISIONS,
    Attend,
    BlockOptions,
    BlockWeights,
    FeedForward,
    SelfAttention,
    TransformerBlock,
    check_precision,
    self_attention,
    transformer_block,
)
from fastbert.nn.embeddings import Embeddings
from fastbert.nn.init import initialize
from fastbert.nn.norm import LayerNorm

__all__ = [
    "PRECISIONS",
    "Attend",
    "BlockOptions",
    "BlockWeights",
    "Embeddings",
    "FeedForward",
    "LayerNorm",
    "SelfAttention",
    "TransformerBlock",
    "check_precision",
    "initialize",
    "self_attention",
    "transformer_block",
]
