"""Tokens and ids: one immutable state of a tokenizer's vocabulary, added tokens included."""

from collections.abc import Iterable, Sequence
from functools import cached_property
from operator import index
from typing import Any

from fastbert.tokenizer.added import AddedToken, AddedVocabulary
from fastbert.tokenizer.blueprint import Blueprint

_MAX_U32 = 2**32 - 1
# What the decoder, and clean_up_tokenization_spaces, take spaces from. The decoder knows one more than transformers does.
_SPACES = [(" .", "."), (" ?", "?"), (" !", "!"), (" ,", ","), (" ' ", "'"), (" n't", "n't"), (" 'm", "'m")]
_CONTRACTIONS = [(" 's", "'s"), (" 've", "'ve"), (" 're", "'re")]


def clean_up(text: str, *, do_not: bool = False) -> str:
    """Without the spaces that splitting put before punctuation. ``do_not``: also " do not" to " don't"."""
    for spaced, joined in (*_SPACES, *([(" do not", " don't")] if do_not else []), *_CONTRACTIONS):
        text = text.replace(spaced, joined)
    return text


def _extension() -> Any:
    try:
        from fastbert import _C
    except ImportError as error:
        raise ImportError(
            f"WordPieceTokenizer needs fastbert's C++ extension, which is missing ({error}): install a wheel, or build "
            "it with a C++17 compiler"
        ) from error
    return _C


class Vocabulary:
    """The extension's object with the tables that lead from ids back to tokens. Never changes once made."""

    def __init__(self, blueprint: Blueprint, added: AddedVocabulary) -> None:
        self.blueprint = blueprint
        self.model = blueprint.vocab
        self.added = added
        self.decoder = blueprint.decoder
        extension = _extension()
        self.core = extension.WordPiece(self.model, added_tokens=added.as_rows(), **blueprint.core_arguments())
        self.template_tokens = self.core.num_special_tokens(False)
        self.fill = self.core.fill
        self._truncation_error = extension.TruncationError

    def __reduce__(self) -> tuple[Any, ...]:
        return Vocabulary, (self.blueprint, self.added)

    def __copy__(self) -> "Vocabulary":
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> "Vocabulary":
        return self

    def encode(self, texts: Any, pairs: Any, options: dict[str, Any], offsets: bool, threads: int) -> Any:
        """The extension's Encodings. Raises what transformers raises."""
        try:
            if offsets:
                options = {**options, "offsets": True}
            if threads != 1:
                options = {**options, "threads": threads}
            return self.core.encode(texts, pairs, **options)
        except self._truncation_error as error:
            raise Exception(str(error)) from None  # transformers raises no narrower class

    def encode_utf8(self, data: Any, offsets: Any, options: dict[str, Any], threads: int) -> Any:
        try:
            return self.core.encode_utf8(data, offsets, threads=threads, **options)
        except self._truncation_error as error:
            raise Exception(str(error)) from None

    def __len__(self) -> int:
        return len(self.model) + sum(token not in self.model for token in self.added.ids)

    def token_to_id(self, token: str) -> int | None:
        """Raises TypeError for what is no string, UnicodeEncodeError for a lone surrogate."""
        if not isinstance(token, str):
            raise TypeError(f"{type(token).__name__!r} object is not an instance of 'str'")
        found = self.added.ids.get(token)
        if found is None:
            found = self.model.get(token)
        if found is None and not token.isascii():
            token.encode()
        return found

    @cached_property
    def _token_of(self) -> dict[int, str]:
        table = {i: token for token, i in self.model.items()}
        for i, token in self.added.by_id.items():
            # tokenizers gives back what it looks for in the text, not what was added.
            table[i] = self.core.normalize(token.content) if token.normalized else token.content
        return table

    def id_to_token(self, i: int) -> str | None:
        """None for an id that there is not. Raises OverflowError outside of 32 bits, as tokenizers does."""
        token = self._token_of.get(i)
        if token is None:
            _check_id(i)
        return token

    def tokens(self, ids: Sequence[int]) -> list[str]:
        """The tokens of ids that the extension gave."""
        return list(map(self._token_of.__getitem__, ids))

    @cached_property
    def varying(self) -> dict[int, bool]:
        """Added tokens that may stand for different texts, and whether the normalized text is meant."""
        return {
            i: token.normalized
            for i, token in self.added.by_id.items()
            if token.lstrip or token.rstrip or token.normalized
        }

    @cached_property
    def special_ids(self) -> set[int]:
        """Ids that decoding skips on request."""
        return {i for i, token in self._token_of.items() if token in self.added.special}

    @cached_property
    def _texts(self) -> tuple[dict[int, str], dict[int, str]]:
        """What each id adds to a decoded text: at its start, and further on."""
        first = {i: self._first(token) for i, token in self._token_of.items()}
        return first, {i: self._further(token) for i, token in self._token_of.items()}

    def _first(self, token: str) -> str:
        return clean_up(token, do_not=True) if self.decoder is not None and self.decoder[1] else token

    def _further(self, token: str) -> str:
        if self.decoder is None:
            return f" {token}"
        prefix, cleanup = self.decoder
        token = token[len(prefix) :] if token.startswith(prefix) else f" {token}"
        return clean_up(token, do_not=True) if cleanup else token

    def decode(self, ids: Iterable[Any], skip_special_tokens: bool) -> str:
        """Unknown ids are left out.

        Raises TypeError for what is no sequence of integers, OverflowError for an integer outside of 32 bits.
        """
        ids = _checked_ids(ids)
        first, further = self._texts
        if skip_special_tokens:
            special = self.special_ids
            ids = [i for i in ids if i not in special]
        try:
            return first[ids[0]] + "".join(map(further.__getitem__, ids[1:])) if ids else ""
        except KeyError:
            for i in ids:
                _check_id(i)
            return self.decode([i for i in ids if i in first], False)

    def join(self, tokens: Any) -> str:
        """Tokens as a text."""
        if isinstance(tokens, str) or not isinstance(tokens, Sequence):
            raise TypeError(f"tokens is of type {type(tokens).__name__}; expected a list of strings")
        for token in tokens:
            if not isinstance(token, str):
                raise TypeError(f"{type(token).__name__!r} object is not an instance of 'str'")
        if self.decoder is None:
            return " ".join(tokens)
        return "".join(self._further(token) if n else self._first(token) for n, token in enumerate(tokens))

    def with_added(self, tokens: Sequence[AddedToken]) -> tuple["Vocabulary", int]:
        """Another one that has these tokens, too, and how many were added."""
        added = AddedVocabulary()
        added.by_id, added.ids, added.special = (
            dict(self.added.by_id),
            dict(self.added.ids),
            set(self.added.special),
        )
        count = added.add(tokens, self.model)
        return Vocabulary(self.blueprint, added), count


def _check_id(i: int) -> None:
    if not 0 <= i <= _MAX_U32:
        raise OverflowError(f"id {i} does not fit: number too {'small' if i < 0 else 'large'}")


def _checked_ids(ids: Any) -> list[int]:
    if isinstance(ids, str) or not isinstance(ids, Sequence):
        raise TypeError(f"token_ids is of type {type(ids).__name__}; expected a list of integers")
    if set(map(type, ids)) <= {int}:
        return ids if isinstance(ids, list) else list(ids)
    return [index(i) for i in ids]
