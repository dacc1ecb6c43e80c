"""Building blocks on packed tokens, the functions they hold parameters for, and namesakes of torch.nn's modules on padded ones."""

from fastbert.nn.activation import GELU, Softmax
from fastbert.nn.attention import (
    Attend,
    Cross,
    CrossAttention,
    CrossWeights,
    PackedAttention,
    PaddedAttention,
    SelfAttention,
)
from fastbert.nn.block import (
    PRECISIONS,
    BlockModules,
    BlockOptions,
    BlockWeights,
    check_precision,
    self_attention,
    transformer_block,
    transformer_block_by_modules,
)
from fastbert.nn.embeddings import Embeddings
from fastbert.nn.init import initialize
from fastbert.nn.layer import FeedForward, TransformerBlock, run_blocks
from fastbert.nn.loss import CrossEntropyLoss, LinearCrossEntropyLoss
from fastbert.nn.multihead import MultiheadAttention
from fastbert.nn.norm import LayerNorm, RMSNorm
from fastbert.nn.positions import RotaryPositions, Rotation, SinusoidalPositions
from fastbert.nn.transformer import (
    TransformerDecoder,
    TransformerDecoderLayer,
    TransformerEncoder,
    TransformerEncoderLayer,
)

__all__ = [
    "GELU",
    "PRECISIONS",
    "Attend",
    "BlockModules",
    "BlockOptions",
    "BlockWeights",
    "Cross",
    "CrossAttention",
    "CrossEntropyLoss",
    "CrossWeights",
    "Embeddings",
    "FeedForward",
    "LayerNorm",
    "LinearCrossEntropyLoss",
    "MultiheadAttention",
    "PackedAttention",
    "PaddedAttention",
    "RMSNorm",
    "RotaryPositions",
    "Rotation",
    "SelfAttention",
    "SinusoidalPositions",
    "Softmax",
    "TransformerBlock",
    "TransformerDecoder",
    "TransformerDecoderLayer",
    "TransformerEncoder",
    "TransformerEncoderLayer",
    "check_precision",
    "initialize",
    "run_blocks",
    "self_attention",
    "transformer_block",
    "transformer_block_by_modules",
]
