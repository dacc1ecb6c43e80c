"""fastbert where transformers expects its own: a tokenizer, and ``attn_implementation="fastbert"`` for its models.

from fastbert.integrations.transformers import FastBertTokenizer
tokenizer = FastBertTokenizer.from_pretrained("google-bert/bert-base-uncased")
model = AutoModel.from_pretrained("answerdotai/ModernBERT-base", attn_implementation="fastbert")
"""

from fastbert.integrations.transformers.attention import register as _register
from fastbert.integrations.transformers.tokenizer import FastBertTokenizer

__all__ = ["FastBertTokenizer"]

_register()
