"""fastbert's tokenizer as one of transformers': for a Trainer, a pipeline, a data collator or a SentenceTransformer."""

import os
from types import SimpleNamespace
from typing import Any

from transformers import AddedToken, BatchEncoding, PreTrainedTokenizerBase

from fastbert.tokenizer import WordPieceTokenizer
from fastbert.tokenizer import added as fastbert_added
from fastbert.tokenizer import encoding as fastbert_encoding

__all__ = ["FastBertTokenizer"]

# What both objects know; assigning it here assigns it there.
_SHARED = {
    "clean_up_tokenization_spaces",
    "extra_special_tokens",
    "model_input_names",
    "model_max_length",
    "padding_side",
    "split_special_tokens",
    "truncation_side",
}


class FastBertTokenizer(PreTrainedTokenizerBase):
    """A PreTrainedTokenizerBase whose work a :class:`fastbert.WordPieceTokenizer` does.

    Results are transformers' own BatchEncoding. Saving writes files that AutoTokenizer reads as transformers' own tokenizer.

    Attributes:
        fastbert_tokenizer: the WordPieceTokenizer.
    """

    model_input_names = ["input_ids", "token_type_ids", "attention_mask"]  # noqa: RUF012
    vocab_files_names = WordPieceTokenizer.vocab_files_names

    def __init__(self, tokenizer: WordPieceTokenizer, **kwargs: Any) -> None:
        """``kwargs`` are those of PreTrainedTokenizerBase, such as chat_template, before what the tokenizer says."""
        if not isinstance(tokenizer, WordPieceTokenizer):
            raise TypeError(f"tokenizer is of type {type(tokenizer).__name__}; expected a fastbert.WordPieceTokenizer")
        object.__setattr__(self, "fastbert_tokenizer", tokenizer)
        told = {name: getattr(tokenizer, name) for name in (*sorted(_SHARED), "name_or_path")}
        super().__init__(**{**told, **tokenizer.special_tokens_map, **kwargs, "backend": "fastbert"})
        self.deprecation_warnings["Asking-to-pad-a-fast-tokenizer"] = True  # ours pads what is encoded as fast

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, pretrained_model_name_or_path: str | os.PathLike[str], *, revision: str | None = None, **kwargs: Any
    ) -> "FastBertTokenizer":
        """See :meth:`fastbert.WordPieceTokenizer.from_pretrained`."""
        return cls(WordPieceTokenizer.from_pretrained(pretrained_model_name_or_path, revision=revision, **kwargs))

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        base = name.removesuffix("_ids").removesuffix("_id")
        if name == "_extra_special_tokens":
            self.fastbert_tokenizer.extra_special_tokens = value
        elif base in _SHARED or base in self.fastbert_tokenizer.SPECIAL_TOKENS_ATTRIBUTES:
            # What was assigned by id stands here as its token.
            self.fastbert_tokenizer.__setattr__(base, getattr(self, base))

    @property
    def is_fast(self) -> bool:
        return True

    @property
    def _tokenizer(self) -> SimpleNamespace:
        # transformers' token classification asks here whether pieces of words are marked as such.
        prefix = self.fastbert_tokenizer.continuing_subword_prefix
        return SimpleNamespace(model=SimpleNamespace(continuing_subword_prefix=prefix))

    def _encode_plus(  # type: ignore[override]
        self,
        text: Any,
        text_pair: Any = None,
        *,
        padding_strategy: Any = "do_not_pad",
        truncation_strategy: Any = "do_not_truncate",
        **options: Any,
    ) -> BatchEncoding:
        if options.pop("sanitize_control_tokens", False):
            raise NotImplementedError("sanitize_control_tokens=True is not implemented by fastbert's tokenizer")
        result = self.fastbert_tokenizer._encode(
            text, text_pair, padding=padding_strategy, truncation=truncation_strategy, **options
        )
        return _as_transformers(result) if isinstance(result, fastbert_encoding.BatchEncoding) else result

    def encode(self, text: Any, text_pair: Any = None, *args: Any, **kwargs: Any) -> Any:
        return self.fastbert_tokenizer.encode(text, text_pair, *args, **kwargs)

    def tokenize(
        self, text: str, pair: str | None = None, add_special_tokens: bool = False, **kwargs: Any
    ) -> list[str]:
        return self.fastbert_tokenizer.tokenize(text, pair, add_special_tokens, **kwargs)

    def pad(self, encoded_inputs: Any, *args: Any, **kwargs: Any) -> Any:
        padded = self.fastbert_tokenizer.pad(encoded_inputs, *args, **kwargs)
        return _as_transformers(padded) if isinstance(padded, fastbert_encoding.BatchEncoding) else padded

    def _decode(
        self,
        token_ids: Any,
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        **kwargs: Any,
    ) -> str:
        return self.fastbert_tokenizer.decode(token_ids, skip_special_tokens, clean_up_tokenization_spaces)

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return self.fastbert_tokenizer.convert_tokens_to_string(tokens)

    def convert_ids_to_tokens(self, ids: Any, skip_special_tokens: bool = False) -> Any:
        return self.fastbert_tokenizer.convert_ids_to_tokens(ids, skip_special_tokens)

    def _convert_token_to_id_with_added_voc(self, token: str) -> int:
        return self.fastbert_tokenizer.convert_tokens_to_ids([token])[0]

    def _add_tokens(self, new_tokens: Any, special_tokens: bool = False) -> int:
        return self.fastbert_tokenizer._add_tokens(new_tokens, special_tokens)

    def num_special_tokens_to_add(self, pair: bool = False) -> int:
        return self.fastbert_tokenizer.num_special_tokens_to_add(pair)

    @property
    def vocab_size(self) -> int:
        return self.fastbert_tokenizer.vocab_size

    def __len__(self) -> int:
        return len(self.fastbert_tokenizer)

    def __bool__(self) -> bool:
        return True

    def get_vocab(self) -> dict[str, int]:
        return self.fastbert_tokenizer.get_vocab()

    @property
    def vocab(self) -> dict[str, int]:
        return self.get_vocab()

    @property
    def added_tokens_decoder(self) -> dict[int, AddedToken]:
        return {
            i: AddedToken(token.content, **{name: getattr(token, name) for name in fastbert_added.FLAGS})
            for i, token in self.fastbert_tokenizer.added_tokens_decoder.items()
        }

    @property
    def added_tokens_encoder(self) -> dict[str, int]:
        return self.fastbert_tokenizer.added_tokens_encoder

    def get_added_vocab(self) -> dict[str, int]:
        return self.added_tokens_encoder

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        legacy_format: bool | None = None,
        filename_prefix: str | None = None,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> tuple[str, ...]:
        """See :meth:`fastbert.WordPieceTokenizer.save_pretrained`; a chat template is saved beside."""
        if push_to_hub:
            raise ValueError("save_pretrained does not push; call push_to_hub()")
        written = self.fastbert_tokenizer.save_pretrained(save_directory, legacy_format, filename_prefix)
        _, templates = self.save_chat_templates(save_directory, {}, filename_prefix, save_jinja_files=True)
        return (*written, *templates)

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str, ...]:
        return self.fastbert_tokenizer.save_vocabulary(save_directory, filename_prefix)


def _as_transformers(result: fastbert_encoding.BatchEncoding) -> BatchEncoding:
    """The same outputs and encodings, which stay uncomputed until they are asked for."""
    request = result._details
    pair = request.is_pair(0) if isinstance(request, fastbert_encoding.Request) else False
    encodings: Any = result.encodings
    return BatchEncoding(dict(result), encodings, n_sequences=2 if pair else 1)
