"""Building blocks on packed tokens, and the functions they hold parameters for."""

from fastbert.nn.block import (
    PRECISIONS,
    BlockOptions,
    BlockWeights,
    FeedForward,
    SelfAttention,
    TransformerBlock,
    check_precision,
    run_blocks,
    self_attention,
    transformer_block,
)
from fastbert.nn.embeddings import Embeddings
from fastbert.nn.init import initialize
from fastbert.nn.norm import LayerNorm

__all__ = [
    "PRECISIONS",
    "BlockOptions",
    "BlockWeights",
    "Embeddings",
    "FeedForward",
    "LayerNorm",
    "SelfAttention",
    "TransformerBlock",
    "check_precision",
    "initialize",
    "run_blocks",
    "self_attention",
    "transformer_block",
]
