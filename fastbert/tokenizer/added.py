"""Tokens added to a vocabulary: how they match, and which ids they get."""

import copy
from collections.abc import Iterable, Mapping
from typing import Any

__all__ = ["AddedToken", "AddedVocabulary"]

FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


class AddedToken:
    """A token matched in the text before anything is split; the same fields and defaults as ``tokenizers.AddedToken``.

    Attributes:
        content: the token.
        single_word: whether it matches only where no letter or digit touches it.
        lstrip, rstrip: whether it takes the white space before (after) it along.
        normalized: whether it is looked for in the normalized text; not special tokens unless given.
        special: whether ``skip_special_tokens`` drops it and ``split_special_tokens`` splits it.
    """

    __slots__ = ("_normalized", "content", "lstrip", "rstrip", "single_word", "special")

    def __init__(
        self,
        content: str,
        single_word: bool = False,
        lstrip: bool = False,
        rstrip: bool = False,
        normalized: bool | None = None,
        special: bool = False,
    ) -> None:
        if not isinstance(content, str):
            raise TypeError(f"content is {content!r} of type {type(content).__name__}; expected a string")
        self.content = content
        self.single_word = single_word
        self.lstrip = lstrip
        self.rstrip = rstrip
        self._normalized = normalized
        self.special = special

    @classmethod
    def of(cls, token: Any, *, special: bool = False) -> "AddedToken":
        """A copy of a token, ours or ``tokenizers``', or one made of a string. ``special`` makes it special.

        Raises TypeError for anything else, with tokenizers' message.
        """
        if isinstance(token, str) and _is_unicode(token):
            return cls(str(token), special=special)
        if isinstance(token, cls):
            token = copy.copy(token)
            token.special = token.special or special
            return token
        if type(token).__name__ == "AddedToken" and all(hasattr(token, name) for name in ("content", *FLAGS)):
            if special:
                # tokenizers' own methods set it on the given token, too; only then does its `normalized` follow.
                token.special = True
            return cls(token.content, **{name: getattr(token, name) for name in FLAGS})
        raise TypeError("Input must be a List[Union[str, AddedToken]]")

    @property
    def normalized(self) -> bool:
        return not self.special if self._normalized is None else self._normalized

    def flags(self) -> dict[str, bool]:
        return {name: bool(getattr(self, name)) for name in FLAGS}

    def __getstate__(self) -> dict[str, Any]:
        return {"content": self.content, **self.flags()}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, AddedToken) and self.__getstate__() == other.__getstate__()

    def __hash__(self) -> int:
        return hash(self.content)

    def __str__(self) -> str:
        return self.content

    def __repr__(self) -> str:
        return (
            f'AddedToken("{self.content}", rstrip={self.rstrip}, lstrip={self.lstrip}, '
            f"single_word={self.single_word}, normalized={self.normalized}, special={self.special})"
        )


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


class AddedVocabulary:
    """The added tokens of a tokenizer by id. Ids are given as ``tokenizers`` gives them."""

    def __init__(self) -> None:
        self.by_id: dict[int, AddedToken] = {}
        self.ids: dict[str, int] = {}
        self.special: set[str] = set()  # a token that once was special stays so for decoding

    def add(self, tokens: Iterable[AddedToken], vocab: Mapping[str, int]) -> int:
        """Adds tokens: with the id of the vocabulary where it has them, else after the largest. Returns how many."""
        last = max(self.ids.values(), default=-1)
        next_id = last + 1 if last >= len(vocab) else len(vocab)
        present = set(self.by_id.values())
        added = 0
        for token in tokens:
            if token.special and token.content:
                self.special.add(token.content)
            if not token.content or token in present:
                continue
            known = self.ids.get(token.content, vocab.get(token.content))
            if known is None:
                known, next_id = next_id, next_id + 1
            self.ids[token.content] = known
            replaced = self.by_id.get(known)
            if replaced is not None:
                present.discard(replaced)
            self.by_id[known] = token
            present.add(token)
            added += 1
        return added

    def as_rows(self) -> list[tuple[int, str, bool, bool, bool, bool, bool]]:
        """(id, content, single_word, lstrip, rstrip, normalized, special) in the order of ids."""
        return [
            (i, t.content, t.single_word, t.lstrip, t.rstrip, t.normalized, t.content in self.special)
            for i, t in sorted(self.by_id.items())
        ]
