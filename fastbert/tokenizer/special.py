"""The special tokens of a tokenizer: attributes such as cls_token and cls_token_id, and adding tokens."""

from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from typing import Any

from fastbert.tokenizer.added import AddedToken, AddedVocabulary
from fastbert.tokenizer.files import SPECIAL_ATTRIBUTES

_EXTRA = "extra_special_tokens"


class SpecialTokens:
    """bos_token, eos_token, unk_token, sep_token, pad_token, cls_token, mask_token, each with ``_id``, and
    extra_special_tokens, with ``_ids``: reading an unset one gives None, assigning changes which token it is."""

    SPECIAL_TOKENS_ATTRIBUTES: Sequence[str] = SPECIAL_ATTRIBUTES
    _special: dict[str, Any]
    _extra: list[Any]

    def convert_tokens_to_ids(self, tokens: Any) -> Any:
        raise NotImplementedError

    def convert_ids_to_tokens(self, ids: Any, skip_special_tokens: bool = False) -> Any:
        raise NotImplementedError

    def _add_tokens(self, new_tokens: Iterable[Any], special_tokens: bool = False) -> int:
        raise NotImplementedError

    def _take_special_tokens(self, kwargs: MutableMapping[str, Any]) -> None:
        """Takes the special tokens out of the constructor's arguments."""
        names = list(SPECIAL_ATTRIBUTES)
        extra = kwargs.pop("additional_special_tokens", None)
        extra = kwargs.pop(_EXTRA, None) or extra or []
        more = kwargs.pop("model_specific_special_tokens", None) or {}
        if isinstance(extra, Mapping):
            more, extra = {**more, **extra}, []
        if not isinstance(extra, list | tuple):
            raise TypeError("extra_special_tokens must be a list/tuple of tokens or a dict of named tokens")
        for name in list(kwargs):
            if name.endswith("_token") and name not in names and _is_token(kwargs[name]):
                more = {**more, name: kwargs.pop(name)}
        object.__setattr__(self, "SPECIAL_TOKENS_ATTRIBUTES", [*names, *more])
        object.__setattr__(self, "_extra", list(extra))
        object.__setattr__(self, "_special", dict.fromkeys(self.SPECIAL_TOKENS_ATTRIBUTES))
        for name, value in {**{name: kwargs.pop(name) for name in names if name in kwargs}, **more}.items():
            if value is not None and not _is_token(value):
                raise TypeError(f"Special token {name} has to be either str or AddedToken but got: {type(value)}")
            self._special[name] = value

    def _tokens_to_add(self, tokens: Sequence[AddedToken], present: AddedVocabulary) -> list[AddedToken]:
        """Tokens, and those special ones that are neither among them nor present."""
        named = {str(token) for token in self._special.values() if token is not None}
        known = {*present.ids, *(token.content for token in tokens)}
        result = [AddedToken.of(token, special=token.content in named) for token in tokens]
        for token in (*self._special.values(), *self._extra):
            if token is not None and str(token) not in known:
                known.add(str(token))
                special = isinstance(token, str) or str(token) in named
                result.append(AddedToken.of(token, special=special))
        return result

    def add_tokens(self, new_tokens: Any, special_tokens: bool = False) -> int:
        """Adds tokens, strings or AddedTokens, and returns how many. One that the vocabulary has keeps its id."""
        if not new_tokens:
            return 0
        return self._add_tokens(new_tokens if isinstance(new_tokens, list | tuple) else [new_tokens], special_tokens)

    def add_special_tokens(
        self, special_tokens_dict: Mapping[str, Any], replace_extra_special_tokens: bool = True
    ) -> int:
        """Sets special tokens by attribute and adds those that the vocabulary lacks. Returns how many were added.

        Raises ValueError for another key than those of SPECIAL_TOKENS_ATTRIBUTES and extra_special_tokens, or a value
        that is no token.
        """
        wanted = dict(special_tokens_dict or {})
        if not wanted:
            return 0
        if "additional_special_tokens" in wanted and not wanted.get(_EXTRA):
            wanted[_EXTRA] = wanted.pop("additional_special_tokens")
        allowed = {*self.SPECIAL_TOKENS_ATTRIBUTES, _EXTRA}
        added = []
        for key, value in wanted.items():
            if key not in allowed:
                raise ValueError(f"Key {key} is not a valid special token. Valid keys are: {sorted(allowed)}")
            if key == _EXTRA:
                if not isinstance(value, list | tuple) or not all(map(_is_token, value)):
                    raise ValueError(f"Tokens {value} for key {key} should all be str or AddedToken instances")
                new = [
                    AddedToken(token, special=True, normalized=False) if isinstance(token, str) else token
                    for token in value
                    if replace_extra_special_tokens or str(token) not in self.extra_special_tokens
                ]
                if replace_extra_special_tokens and new:
                    object.__setattr__(self, "_extra", new)
                else:
                    self._extra.extend(new)
                added.extend(new)
            else:
                if not _is_token(value):
                    raise ValueError(f"Token {value} for key {key} should be a str or an AddedToken instance")
                token = AddedToken(value, special=True, normalized=False) if isinstance(value, str) else value
                setattr(self, key, token)
                added.append(token)
        return self.add_tokens(added, special_tokens=True)

    @property
    def pad_token(self) -> str | None:
        # A property, as every padded call asks for it; assignments go through __setattr__ all the same.
        token = self._special["pad_token"]
        return None if token is None else str(token)

    def __getattr__(self, name: str) -> Any:
        base = _without_id(name)
        special = self.__dict__.get("_special", {})
        if base in special:
            token = special[base]
            if token is None:
                return None
            return str(token) if name == base else self.convert_tokens_to_ids(str(token))
        if base == _EXTRA:
            tokens = [str(token) for token in self.__dict__.get("_extra", [])]
            return tokens if name == base else self.convert_tokens_to_ids(tokens)
        raise AttributeError(f"{type(self).__name__} has no attribute {name}")

    def __setattr__(self, name: str, value: Any) -> None:
        base = _without_id(name)
        if base in self.SPECIAL_TOKENS_ATTRIBUTES:
            if name != base and value is not None:
                value = self.convert_ids_to_tokens(value)
            if value is not None and not _is_token(value):
                raise ValueError(f"Cannot set a non-string value as the {base}")
            self._special[base] = value
        elif base == _EXTRA:
            if name != base and isinstance(value, list | tuple):
                value = self.convert_ids_to_tokens(value)
            if value is not None and not isinstance(value, list | tuple):
                raise ValueError(f"extra_special_tokens must be a list or tuple, got {type(value)}")
            object.__setattr__(self, "_extra", list(value or []))
        else:
            object.__setattr__(self, name, value)

    @property
    def special_tokens_map(self) -> dict[str, str]:
        """Attribute and token, for those that are set."""
        return {name: str(token) for name, token in self._special.items() if token is not None}

    @property
    def all_special_tokens(self) -> list[str]:
        return list(dict.fromkeys([*self.special_tokens_map.values(), *map(str, self._extra)]))

    @property
    def all_special_ids(self) -> list[int]:
        return self.convert_tokens_to_ids(self.all_special_tokens)

    def get_special_tokens_mask(
        self,
        token_ids_0: Sequence[int],
        token_ids_1: Sequence[int] | None = None,
        already_has_special_tokens: bool = False,
    ) -> list[int]:
        """1 for special tokens, 0 for others, of ids that have their special tokens already.

        Raises ValueError for a second sequence, NotImplementedError for ids without special tokens, as transformers does.
        """
        if not already_has_special_tokens:
            raise NotImplementedError(
                f"{type(self).__name__} does not implement get_special_tokens_mask for non-formatted sequences"
            )
        if token_ids_1 is not None:
            raise ValueError(
                "You should not supply a second sequence if the provided sequence of ids is already formatted with "
                "special tokens for the model."
            )
        special = set(self.all_special_ids)
        return [int(int(i) in special) for i in token_ids_0]


def _is_token(value: Any) -> bool:
    return isinstance(value, str | AddedToken) or type(value).__name__ == "AddedToken"


def _without_id(name: str) -> str:
    return name.removesuffix("_ids").removesuffix("_id") if name.endswith(("_id", "_ids")) else name
