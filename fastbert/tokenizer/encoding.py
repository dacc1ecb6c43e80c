"""What a tokenizer returns: a mapping of its outputs, with the way back from tokens to words and characters.

Nothing but the outputs is computed by the call itself. Who asks for words or characters later has the texts encoded once
more, with offsets, by the same immutable vocabulary; a call that gives offsets keeps its rows for that.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import numpy
import torch

from fastbert.tokenizer.tensors import as_tensors

__all__ = ["BatchEncoding", "CharSpan", "Encoding", "TokenSpan"]

logger = logging.getLogger(__name__)


class CharSpan(NamedTuple):
    """Characters [start, end) of a text."""

    start: int
    end: int


class TokenSpan(NamedTuple):
    """Tokens [start, end) of an encoded text."""

    start: int
    end: int


# The fields of the extension's Encodings, and what padding puts there.
PADDING = {
    "input_ids": 0,  # the padding token's id instead
    "token_type_ids": 0,
    "attention_mask": 0,
    "special_tokens_mask": 1,
    "offset_mapping": (0, 0),
    "word_ids": None,
    "sequence_ids": None,
}


class Rows(Protocol):
    """Encoded texts, padding apart: the extension's Encodings, or a pickled copy of one."""

    def __len__(self) -> int: ...

    def list(self, field: str, row: int) -> list[Any]: ...

    def samples(self) -> numpy.ndarray: ...


class Padding(NamedTuple):
    length: int
    left: bool
    token: str
    token_id: int


class Request(NamedTuple):
    """Everything a call of the tokenizer was about, so that its details can be had later."""

    vocabulary: Any  # the tokenizer's _Vocabulary
    texts: Any  # a string, or a list of texts (strings, pairs, lists of words)
    pairs: Any
    options: Mapping[str, Any]  # the extension's
    padding: Padding | None = None
    rows: Any = None  # the extension's Encodings, where the call kept offsets

    def encode(self) -> Any:
        """The extension's Encodings with offsets."""
        if self.rows is not None:
            return self.rows
        return self.vocabulary.core.encode(self.texts, self.pairs, offsets=True, **self.options)

    def is_pair(self, sample: int) -> bool:
        if self.pairs is not None:
            return True
        text = self.texts if isinstance(self.texts, str) else self.texts[sample]
        if self.options.get("is_split_into_words"):
            return len(text) == 2 and not isinstance(text[0], str)
        return not isinstance(text, str)

    def text(self, sample: int, sequence: int) -> Any:
        """The text, or words, that a token of a sample came from."""
        if isinstance(self.texts, str):
            return (self.texts, self.pairs)[sequence]
        if self.pairs is not None:
            return (self.texts, self.pairs)[sequence][sample]
        return self.texts[sample][sequence] if self.is_pair(sample) else self.texts[sample]

    def plain_tokens(self, ids: list[int]) -> list[str] | None:
        """The tokens of ids; None where they depend on the text."""
        varying = self.vocabulary.varying
        return self.vocabulary.tokens(ids) if not varying or varying.keys().isdisjoint(ids) else None

    def tokens(self, rows: Rows, row: int) -> list[str]:
        """The tokens of a row. Those that took white space along, or were normalized, stand as they were found."""
        ids = rows.list("input_ids", row)
        tokens = self.plain_tokens(ids)
        if tokens is None:
            tokens = self.vocabulary.tokens(ids)
            varying = self.vocabulary.varying
            sample = int(rows.samples()[row])
            details = (rows.list(field, row) for field in ("sequence_ids", "word_ids", "offset_mapping"))
            for n, (i, sequence, word, (start, end)) in enumerate(zip(ids, *details, strict=True)):
                if i in varying and sequence is not None:
                    text = self.text(sample, sequence)
                    found = (text if isinstance(text, str) else text[word])[start:end]
                    found = self.vocabulary.core.normalize(found) if varying[i] else found
                    if tokens[n] in found:  # else it is a piece of a word: "##a" found in "ba"
                        tokens[n] = found
        return tokens


class Encoding:
    """One encoded text, with tokenizers.Encoding's attributes and methods."""

    def __init__(
        self,
        rows: Rows,
        row: int,
        pair: bool,
        padding: Padding | None,
        tokens: "Request | list[str]",
    ) -> None:
        """``tokens``: those of the row, padding apart, or the request that finds them."""
        self._rows = rows
        self._row = row
        self._pair = pair
        self._padding = padding
        self._tokens = tokens
        self._fields: dict[str, list[Any]] = {}

    def __len__(self) -> int:
        return len(self._field("input_ids"))

    def __repr__(self) -> str:
        return f"Encoding({len(self)} tokens)"

    def __reduce__(self) -> tuple[Any, ...]:
        return Encoding, (_Copy(self._rows, [self._row]), 0, self._pair, self._padding, self._unpadded_tokens())

    def _unpadded_tokens(self) -> list[str]:
        if isinstance(self._tokens, Request):
            self._tokens = self._tokens.tokens(self._rows, self._row)
        return self._tokens

    def _pad(self, values: list[Any], fill: Any) -> list[Any]:
        missing = 0 if self._padding is None else self._padding.length - len(values)
        if missing <= 0:
            return values
        assert self._padding is not None
        return [fill] * missing + values if self._padding.left else values + [fill] * missing

    def _field(self, name: str) -> list[Any]:
        """A field with its padding, to be read only."""
        values = self._fields.get(name)
        if values is None:
            fill = PADDING[name]
            if name == "input_ids" and self._padding is not None:
                fill = self._padding.token_id
            values = self._fields[name] = self._pad(self._rows.list(name, self._row), fill)
        return values

    @property
    def ids(self) -> list[int]:
        return self._field("input_ids")[:]

    @property
    def type_ids(self) -> list[int]:
        return self._field("token_type_ids")[:]

    @property
    def attention_mask(self) -> list[int]:
        return self._field("attention_mask")[:]

    @property
    def special_tokens_mask(self) -> list[int]:
        return self._field("special_tokens_mask")[:]

    @property
    def offsets(self) -> list[tuple[int, int]]:
        return self._field("offset_mapping")[:]

    @property
    def word_ids(self) -> list[int | None]:
        return self._field("word_ids")[:]

    @property
    def sequence_ids(self) -> list[int | None]:
        return self._field("sequence_ids")[:]

    @property
    def tokens(self) -> list[str]:
        return self._pad(self._unpadded_tokens(), "" if self._padding is None else self._padding.token)[:]

    @property
    def n_sequences(self) -> int:
        return 2 if self._pair else 1

    def _range(self, sequence: int) -> range:
        """The tokens of a sequence; all tokens for a sequence that there is not, as in tokenizers."""
        if not 0 <= sequence < self.n_sequences:
            return range(len(self))
        ids = self._field("sequence_ids")
        count = ids.count(sequence)
        start = ids.index(sequence) if count else 0
        return range(start, start + count)

    def char_to_token(self, char_pos: int, sequence_index: int = 0) -> int | None:
        """The first token whose characters include this one. Raises OverflowError for a negative position."""
        _not_negative(char_pos)
        offsets = self._field("offset_mapping")
        return next((i for i in self._range(sequence_index) if offsets[i][0] <= char_pos < offsets[i][1]), None)

    def char_to_word(self, char_pos: int, sequence_index: int = 0) -> int | None:
        token = self.char_to_token(char_pos, sequence_index)
        return None if token is None else self.token_to_word(token)

    def token_to_sequence(self, token_index: int) -> int | None:
        """0 or 1; None for special tokens, padding, and past the end."""
        return self._field("sequence_ids")[token_index] if token_index < len(self) else None

    def token_to_word(self, token_index: int) -> int | None:
        return None if self.token_to_sequence(token_index) is None else self._field("word_ids")[token_index]

    def token_to_chars(self, token_index: int) -> tuple[int, int] | None:
        """The characters [start, end) of a token. Raises OverflowError for a negative index."""
        _not_negative(token_index)
        return None if self.token_to_sequence(token_index) is None else self._field("offset_mapping")[token_index]

    def word_to_tokens(self, word_index: int, sequence_index: int = 0) -> tuple[int, int] | None:
        """The tokens [start, end) of a word."""
        words = self._field("word_ids")
        found = []
        for i in self._range(sequence_index):
            word = words[i]
            if word is not None and word > word_index:
                break
            if word == word_index:
                found.append(i)
        return (found[0], found[-1] + 1) if found else None

    def word_to_chars(self, word_index: int, sequence_index: int = 0) -> tuple[int, int] | None:
        span = self.word_to_tokens(word_index, sequence_index)
        offsets = self._field("offset_mapping")
        return None if span is None else (offsets[span[0]][0], offsets[span[1] - 1][1])


def _not_negative(position: int) -> None:
    if position < 0:
        raise OverflowError(f"the index is {position}; can't convert negative int to unsigned")


class _Copy:
    """Rows as plain arrays, for pickling."""

    def __init__(self, rows: Rows, chosen: Sequence[int]) -> None:
        self._samples = rows.samples()[list(chosen)]
        self._lists = {field: [rows.list(field, row) for row in chosen] for field in PADDING}

    def __len__(self) -> int:
        return len(self._samples)

    def list(self, field: str, row: int) -> list[Any]:
        return self._lists[field][row]

    def samples(self) -> numpy.ndarray:
        return self._samples


class Encodings(Sequence[Encoding]):
    """The encodings of a call, computed when first asked for."""

    def __init__(self, request: Request) -> None:
        self._request: Request | None = request

    @cached_property
    def _all(self) -> list[Encoding]:
        request = self._request
        assert request is not None
        rows = request.encode()
        samples = rows.samples().tolist()
        self._request = None
        return [
            Encoding(rows, row, request.is_pair(sample), request.padding, request) for row, sample in enumerate(samples)
        ]

    def __len__(self) -> int:
        return len(self._all)

    def __getitem__(self, item: Any) -> Any:
        return self._all[item]

    def __iter__(self) -> Iterator[Encoding]:
        return iter(self._all)

    def __reduce__(self) -> tuple[Any, ...]:
        return list, (self._all,)


class BatchEncoding(dict[str, Any]):
    """A tokenizer's outputs by name ("input_ids", "token_type_ids", "attention_mask", …): transformers' BatchEncoding.

    Entries are attributes too. An integer gives the :class:`Encoding` of a row. The methods that lead to words and
    characters take ``(batch_index, index)``, or ``(index)`` for the first row.
    """

    __slots__ = ("__dict__", "_details")
    _details: Any  # a Request, its encodings, or None

    def __init__(
        self,
        data: Mapping[str, Any] | None = None,
        encoding: Encoding | Sequence[Encoding] | Request | None = None,
        tensor_type: str | None = None,
        prepend_batch_axis: bool = False,
    ) -> None:
        super().__init__(data or {})
        self._details = [encoding] if isinstance(encoding, Encoding) else encoding
        self.convert_to_tensors(tensor_type, prepend_batch_axis)

    def __getitem__(self, item: Any) -> Any:
        if isinstance(item, str):
            return super().__getitem__(item)
        encodings = self.encodings
        if encodings is not None:
            return encodings[item]
        if isinstance(item, slice):
            return {key: value[item] for key, value in self.items()}
        raise KeyError(f"{item!r}: without encodings only names and slices are keys")

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getitem__(name)
        except KeyError:
            raise AttributeError(
                f"{type(self).__name__} has no attribute {name!r}, nor an entry of that name"
            ) from None

    def __reduce__(self) -> tuple[Any, ...]:
        encodings = self.encodings
        return BatchEncoding, (dict(self), None if encodings is None else list(encodings))

    def __copy__(self) -> "BatchEncoding":
        return self.copy()

    def copy(self) -> "BatchEncoding":
        return BatchEncoding(self, self._details)

    @property
    def data(self) -> dict[str, Any]:
        """The entries; this very mapping."""
        return self

    @property
    def encodings(self) -> Sequence[Encoding] | None:
        """An Encoding for each row; None where the mapping did not come from texts."""
        details = self._details
        if isinstance(details, Request):
            details = self._details = Encodings(details)
        return details

    @property
    def is_fast(self) -> bool:
        return self._details is not None

    @property
    def n_sequences(self) -> int | None:
        encodings = self.encodings
        return encodings[0].n_sequences if encodings else None

    def _encoding(self, method: str, row: int) -> Encoding:
        encodings = self.encodings
        if not encodings:
            raise ValueError(f"{method}() is not available: these encodings did not come from texts")
        return encodings[row]

    def _at(self, method: str, first: int, second: int | None) -> tuple[Encoding, int]:
        """The encoding and the index that ``(batch_index, index)`` or ``(index)`` mean."""
        return self._encoding(method, 0 if second is None else first), first if second is None else second

    def tokens(self, batch_index: int = 0) -> list[str]:
        return self._encoding("tokens", batch_index).tokens

    def sequence_ids(self, batch_index: int = 0) -> list[int | None]:
        """Which text each token is of, 0 or 1; None for special tokens and padding."""
        return self._encoding("sequence_ids", batch_index).sequence_ids

    def word_ids(self, batch_index: int = 0) -> list[int | None]:
        """Which word of its text each token is of; None for special tokens and padding."""
        details = self._details
        if type(details) is Request and details.rows is not None and details.padding is None and batch_index >= 0:
            return details.rows.list("word_ids", batch_index)
        return self._encoding("word_ids", batch_index).word_ids

    def token_to_sequence(self, batch_or_token_index: int, token_index: int | None = None) -> int | None:
        encoding, token = self._at("token_to_sequence", batch_or_token_index, token_index)
        return encoding.token_to_sequence(token + len(encoding) if token < 0 else token)

    def token_to_word(self, batch_or_token_index: int, token_index: int | None = None) -> int | None:
        encoding, token = self._at("token_to_word", batch_or_token_index, token_index)
        return encoding.token_to_word(token + len(encoding) if token < 0 else token)

    def token_to_chars(self, batch_or_token_index: int, token_index: int | None = None) -> CharSpan | None:
        encoding, token = self._at("token_to_chars", batch_or_token_index, token_index)
        span = encoding.token_to_chars(token)
        return None if span is None else CharSpan(*span)

    def word_to_tokens(
        self, batch_or_word_index: int, word_index: int | None = None, sequence_index: int = 0
    ) -> TokenSpan | None:
        encoding, word = self._at("word_to_tokens", batch_or_word_index, word_index)
        span = encoding.word_to_tokens(word, sequence_index)
        return None if span is None else TokenSpan(*span)

    def word_to_chars(
        self, batch_or_word_index: int, word_index: int | None = None, sequence_index: int = 0
    ) -> CharSpan:
        """Raises TypeError for a word that there is not, as transformers does."""
        encoding, word = self._at("word_to_chars", batch_or_word_index, word_index)
        span = encoding.word_to_chars(word, sequence_index)
        if span is None:
            raise TypeError(f"sequence {sequence_index} has no word {word}")
        return CharSpan(*span)

    def char_to_token(
        self, batch_or_char_index: int, char_index: int | None = None, sequence_index: int = 0
    ) -> int | None:
        encoding, char = self._at("char_to_token", batch_or_char_index, char_index)
        return encoding.char_to_token(char, sequence_index)

    def char_to_word(
        self, batch_or_char_index: int, char_index: int | None = None, sequence_index: int = 0
    ) -> int | None:
        encoding, char = self._at("char_to_word", batch_or_char_index, char_index)
        return encoding.char_to_word(char, sequence_index)

    def convert_to_tensors(self, tensor_type: str | None = None, prepend_batch_axis: bool = False) -> "BatchEncoding":
        """The entries as tensors ("pt") or arrays ("np"), in place. Raises ValueError where rows differ in length."""
        if tensor_type is not None:
            self.update(as_tensors(self, tensor_type, prepend_batch_axis))
        return self

    def to(self, device: Any, *, non_blocking: bool = False) -> "BatchEncoding":
        """The tensors on ``device``, in place. A dtype changes nothing: ids are integers."""
        if isinstance(device, str | torch.device | int):
            for key, value in self.items():
                if callable(getattr(value, "to", None)):
                    self[key] = value.to(device=device, non_blocking=non_blocking)
        else:
            logger.warning("Attempting to cast a BatchEncoding to type %s. This is not supported.", device)
        return self
