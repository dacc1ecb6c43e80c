"""Models made of the library's blocks, and the Hugging Face folders they come from."""

from fastbert.models.bert import BertModel, BertOutput
from fastbert.models.bert_heads import (
    BertForMaskedLM,
    BertForNextSentencePrediction,
    BertForPreTraining,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    HeadOutput,
    PreTrainingOutput,
    QuestionAnsweringOutput,
)
from fastbert.models.config import BertConfig
from fastbert.models.generation import GeneratedTokens
from fastbert.models.gpt import GPTForCausalLM, GPTModel, GPTOutput
from fastbert.models.gpt_config import GPTConfig
from fastbert.models.kv_cache import KeyValueCache
from fastbert.models.pooling import cls_pool, mean_pool, normalize
from fastbert.models.sentence_encoder import SentenceEncoder

__all__ = [
    "BertConfig",
    "BertForMaskedLM",
    "BertForNextSentencePrediction",
    "BertForPreTraining",
    "BertForQuestionAnswering",
    "BertForSequenceClassification",
    "BertForTokenClassification",
    "BertModel",
    "BertOutput",
    "GPTConfig",
    "GPTForCausalLM",
    "GPTModel",
    "GPTOutput",
    "GeneratedTokens",
    "HeadOutput",
    "KeyValueCache",
    "PreTrainingOutput",
    "QuestionAnsweringOutput",
    "SentenceEncoder",
    "cls_pool",
    "mean_pool",
    "normalize",
]
