"""fastbert: BERT- and GPT-style transformers in PyTorch, fast and exact, on GPUs and plain CPUs."""

import importlib
from typing import TYPE_CHECKING, Any

from fastbert import functional
from fastbert._version import __version__
from fastbert.ops._registry import BackendStatus, MissingBackendWarning, backends, debug, use_reference

if TYPE_CHECKING:
    from fastbert.integrations.optimize import optimize, optimized, report, restore
    from fastbert.models import (
        BertConfig,
        BertForMaskedLM,
        BertForNextSentencePrediction,
        BertForPreTraining,
        BertForQuestionAnswering,
        BertForSequenceClassification,
        BertForTokenClassification,
        BertModel,
        GPTConfig,
        GPTForCausalLM,
        GPTModel,
        SentenceEncoder,
    )
    from fastbert.ops.packed_weights import drop_packed_weights, packed_weights_info
    from fastbert.packing import PackedBatch, pack, unpack
    from fastbert.tokenizer import WordPieceTokenizer

__all__ = [
    "BackendStatus",
    "BertConfig",
    "BertForMaskedLM",
    "BertForNextSentencePrediction",
    "BertForPreTraining",
    "BertForQuestionAnswering",
    "BertForSequenceClassification",
    "BertForTokenClassification",
    "BertModel",
    "GPTConfig",
    "GPTForCausalLM",
    "GPTModel",
    "MissingBackendWarning",
    "PackedBatch",
    "SentenceEncoder",
    "WordPieceTokenizer",
    "__version__",
    "backends",
    "debug",
    "drop_packed_weights",
    "functional",
    "optimize",
    "optimized",
    "pack",
    "packed_weights_info",
    "report",
    "restore",
    "unpack",
    "use_reference",
]

_LAZY = {
    "BertConfig": "fastbert.models",
    "BertModel": "fastbert.models",
    "BertForMaskedLM": "fastbert.models",
    "BertForNextSentencePrediction": "fastbert.models",
    "BertForPreTraining": "fastbert.models",
    "BertForQuestionAnswering": "fastbert.models",
    "BertForSequenceClassification": "fastbert.models",
    "BertForTokenClassification": "fastbert.models",
    "GPTConfig": "fastbert.models",
    "GPTForCausalLM": "fastbert.models",
    "GPTModel": "fastbert.models",
    "SentenceEncoder": "fastbert.models",
    "WordPieceTokenizer": "fastbert.tokenizer",
    "PackedBatch": "fastbert.packing",
    "pack": "fastbert.packing",
    "unpack": "fastbert.packing",
    "optimize": "fastbert.integrations.optimize",
    "optimized": "fastbert.integrations.optimize",
    "report": "fastbert.integrations.optimize",
    "restore": "fastbert.integrations.optimize",
    "drop_packed_weights": "fastbert.ops.packed_weights",
    "packed_weights_info": "fastbert.ops.packed_weights",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'fastbert' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
