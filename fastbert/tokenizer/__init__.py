"""Text to tokens: BERT's WordPiece in C++, with the call surface of transformers' BertTokenizer."""

from fastbert.tokenizer.added import AddedToken
from fastbert.tokenizer.encoding import BatchEncoding, CharSpan, Encoding, TokenSpan
from fastbert.tokenizer.wordpiece import WordPieceTokenizer

__all__ = ["AddedToken", "BatchEncoding", "CharSpan", "Encoding", "TokenSpan", "WordPieceTokenizer"]
