"""Building blocks on packed tokens, and the functions they hold parameters for."""

from fastbert.nn.block import (
    PRECISIONS,
    BlockModules,
    BlockOptions,
    BlockWeights,
    FeedForward,
    SelfAttention,
    TransformerBlock,
    check_precision,
    self_attention,
    transformer_block,
    transformer_block_by_modules,
)
from fastbert.nn.embeddings import Embeddings
from fastbert.nn.init import initialize
from fastbert.nn.norm import LayerNorm

__all__ = [
    "PRECISIONS",
    "BlockModules",
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
    "transformer_block_by_modules",
]
