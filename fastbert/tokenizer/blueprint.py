"""What a WordPiece tokenizer is made of, as tokenizer.json has it: reading, checking, writing.

Every option of BertNormalizer, BertPreTokenizer, WordPiece, TemplateProcessing, BertProcessing and added tokens is taken;
what is not implemented is refused by name, never ignored.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastbert.hub import read_json
from fastbert.tokenizer.added import FLAGS, AddedToken

MAX_FILE_BYTES = 1 << 28  # a vocabulary of 250,000 words takes 5 MB
MAX_ID = 2**31 - 1
# Rust's White_Space, which tokenizers trims from the lines of a vocab.txt; str.rstrip() would take U+001C…U+001F as well.
_WHITE_SPACE = (
    "\t\n\v\f\r \x85\xa0\u1680\u2000\u2001\u2002\u2003"
    "\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u2028\u2029\u202f\u205f\u3000"
)
_REQUIRED = object()


@dataclass(frozen=True)
class Piece:
    """A part of a template: a sequence, "A" or "B", or a special token with its ids."""

    name: str
    type_id: int
    ids: tuple[int, ...] | None = None  # None: a sequence
    tokens: tuple[str, ...] = ()

    def rows(self) -> list[tuple[int, int]]:
        """(token id, type id), -1 for A and -2 for B, as the extension takes them."""
        if self.ids is None:
            return [(-1 if self.name == "A" else -2, self.type_id)]
        return [(i, self.type_id) for i in self.ids]


def bert_template(cls: tuple[str, int], sep: tuple[str, int]) -> tuple[tuple[Piece, ...], tuple[Piece, ...]]:
    """``[CLS] A [SEP]`` and ``[CLS] A [SEP] B [SEP]``, from (token, id)."""
    first, last, end = (Piece(token, type_id, (i,), (token,)) for (token, i), type_id in ((cls, 0), (sep, 0), (sep, 1)))
    return (first, Piece("A", 0), last), (first, Piece("A", 0), last, Piece("B", 1), end)


@dataclass
class Blueprint:
    """All of a tokenizer.json. The fields carry the file's own names."""

    vocab: dict[str, int]
    unk_token: str = "[UNK]"
    continuing_subword_prefix: str = "##"
    max_input_chars_per_word: int = 100
    normalizer: dict[str, bool | None] | None = field(
        default_factory=lambda: {
            "clean_text": True,
            "handle_chinese_chars": True,
            "strip_accents": None,
            "lowercase": True,
        }
    )
    single: tuple[Piece, ...] = (Piece("A", 0),)
    pair: tuple[Piece, ...] = (Piece("A", 0), Piece("B", 1))
    decoder: tuple[str, bool] | None = ("##", True)  # prefix, cleanup; None: tokens are joined by spaces
    added_tokens: list[tuple[int, AddedToken]] = field(default_factory=list)
    truncation: dict[str, Any] | None = None  # as in the file; transformers applies neither unless a call asks
    padding: dict[str, Any] | None = None

    def core_arguments(self) -> dict[str, Any]:
        """What the extension's class is built from, apart from added tokens."""
        off = dict.fromkeys(("clean_text", "handle_chinese_chars", "strip_accents", "lowercase"), False)
        options = dict(off if self.normalizer is None else self.normalizer)
        if options["strip_accents"] is None:
            options["strip_accents"] = options["lowercase"]
        return {
            "unk_token": self.unk_token,
            "prefix": self.continuing_subword_prefix,
            "max_input_chars_per_word": self.max_input_chars_per_word,
            "single": [row for piece in self.single for row in piece.rows()],
            "pair": [row for piece in self.pair for row in piece.rows()],
            **options,
        }

    def to_json(self, added: Sequence[tuple[int, AddedToken]]) -> dict[str, Any]:
        """The content of a tokenizer.json."""
        special = {piece.name: piece for piece in (*self.single, *self.pair) if piece.ids is not None}
        return {
            "version": "1.0",
            "truncation": self.truncation,
            "padding": self.padding,
            "added_tokens": [{"id": i, "content": token.content, **token.flags()} for i, token in added],
            "normalizer": None if self.normalizer is None else {"type": "BertNormalizer", **self.normalizer},
            "pre_tokenizer": {"type": "BertPreTokenizer"},
            "post_processor": {
                "type": "TemplateProcessing",
                "single": [_piece_to_json(piece) for piece in self.single],
                "pair": [_piece_to_json(piece) for piece in self.pair],
                "special_tokens": {
                    name: {"id": name, "ids": list(piece.ids or ()), "tokens": list(piece.tokens)}
                    for name, piece in sorted(special.items())
                },
            },
            "decoder": None
            if self.decoder is None
            else {"type": "WordPiece", "prefix": self.decoder[0], "cleanup": self.decoder[1]},
            "model": {
                "type": "WordPiece",
                "unk_token": self.unk_token,
                "continuing_subword_prefix": self.continuing_subword_prefix,
                "max_input_chars_per_word": self.max_input_chars_per_word,
                "vocab": dict(sorted(self.vocab.items(), key=lambda item: item[1])),
            },
        }


def _piece_to_json(piece: Piece) -> dict[str, Any]:
    kind = "Sequence" if piece.ids is None else "SpecialToken"
    return {kind: {"id": piece.name, "type_id": piece.type_id}}


# Reading


def read_vocabulary(path: Path) -> dict[str, int]:
    """A vocab.txt, a token a line; ids are line numbers from 0.

    Raises ValueError for invalid UTF-8 or a token on two lines, with the line; FileNotFoundError.
    """
    content = _read_limited(path)
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}, line {line}: invalid UTF-8 (byte {error.start}: {error.reason})") from None
    lines = text.split("\n")
    if not lines[-1]:
        lines.pop()
    tokens = [line.rstrip(_WHITE_SPACE) for line in lines]
    vocab = {token: i for i, token in enumerate(tokens)}
    if len(vocab) != len(tokens):
        seen: dict[str, int] = {}
        for i, token in enumerate(tokens):
            if seen.setdefault(token, i) != i and token:  # blank lines are no tokens and may repeat
                raise ValueError(f"{path}, line {i + 1}: the token {token!r} is on line {seen[token] + 1} already")
    return vocab


def check_vocabulary(vocab: Any, where: str) -> dict[str, int]:
    """Raises TypeError unless it is a dict of strings and integers, ValueError for ids out of range or given twice."""
    if not isinstance(vocab, Mapping):
        raise TypeError(
            f"{where} is of type {type(vocab).__name__}; expected tokens and their ids, or a list of tokens"
        )
    for token, i in vocab.items():
        if not isinstance(token, str) or type(i) is not int:
            raise TypeError(f"{where} has {token!r:.60}: {i!r:.60}; expected a string and an integer")
        if not 0 <= i <= MAX_ID:
            raise ValueError(f"{where} gives {token!r:.60} the id {i}; expected 0 to {MAX_ID}")
    if len(set(vocab.values())) != len(vocab):
        owner: dict[int, str] = {}
        for token, i in vocab.items():
            if owner.setdefault(i, token) != token:
                raise ValueError(f"{where} gives the id {i} to {owner[i]!r:.60} and to {token!r:.60}")
    return dict(vocab)


def check_unknown_token(vocab: Mapping[str, int], unk_token: str, where: str) -> None:
    if unk_token not in vocab:
        raise ValueError(f"{where} lacks {unk_token!r:.60}, the token for words that it does not have (unk_token)")


def read_tokenizer_json(path: Path) -> Blueprint:
    """A tokenizer.json.

    Raises:
        FileNotFoundError: there is none.
        ValueError: no JSON, a key that occurs twice, a value of the wrong type, or a component that is not implemented;
            the message names the file and the entry.
    """
    _check_size(path)
    try:
        content = read_json(path, _without_duplicates)
    except _DuplicateKey as error:
        raise ValueError(f"{path} has the key {error.args[0]!r:.60} twice in one object") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a JSON {type(content).__name__}; expected an object")
    version = content.get("version", "1.0")
    if version != "1.0":
        raise ValueError(f"{path}: version is {version!r}; expected '1.0'")
    model = _read_model(content, path)
    single, pair = _read_post_processor(content.get("post_processor"), f"{path}: post_processor")
    _component(content.get("pre_tokenizer"), f"{path}: pre_tokenizer", ("BertPreTokenizer",))
    return Blueprint(
        **model,
        normalizer=_read_normalizer(content.get("normalizer"), f"{path}: normalizer"),
        single=single,
        pair=pair,
        decoder=_read_decoder(content.get("decoder"), f"{path}: decoder"),
        added_tokens=_read_added_tokens(content.get("added_tokens", []), f"{path}: added_tokens"),
        truncation=_read_truncation(content.get("truncation"), f"{path}: truncation"),
        padding=_read_padding(content.get("padding"), f"{path}: padding"),
    )


class _DuplicateKey(Exception):
    pass


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        raise _DuplicateKey(next(key for key, _ in pairs if key in seen or seen.add(key)))  # type: ignore[func-returns-value]
    return result


def _check_size(path: Path) -> None:
    if path.is_file() and path.stat().st_size > MAX_FILE_BYTES:
        raise ValueError(f"{path} has {path.stat().st_size:,} bytes; a vocabulary may have {MAX_FILE_BYTES:,} at most")


def _read_limited(path: Path) -> bytes:
    _check_size(path)
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} does not exist") from None


_TYPE_NAMES = {bool: "true or false", int: "an integer", str: "a string", dict: "an object", list: "a list"}


def _take(
    content: Mapping[str, Any], key: str, kind: type | tuple[type, ...], where: str, default: Any = _REQUIRED
) -> Any:
    """content[key], checked. Raises ValueError with ``where``."""
    kinds = kind if isinstance(kind, tuple) else (kind,)
    value = content.get(key, default)
    if value is _REQUIRED:
        raise ValueError(f"{where} lacks {key!r}")
    if value is not default and type(value) not in kinds:
        expected = " or ".join(_TYPE_NAMES.get(each, "null") for each in kinds)
        raise ValueError(f"{where}.{key} is {value!r:.60}; expected {expected}")
    return value


def _component(content: Any, where: str, implemented: tuple[str, ...]) -> str:
    """The component's type, one of those implemented."""
    kind = content.get("type") if isinstance(content, dict) else content
    if kind not in implemented:
        raise ValueError(f"{where} is {kind!r:.60}, which is not implemented; expected {' or '.join(implemented)}")
    return str(kind)


def _read_model(content: Mapping[str, Any], path: Path) -> dict[str, Any]:
    model = _take(content, "model", dict, str(path))
    where = f"{path}: model"
    if "type" in model:
        _component(model, where, ("WordPiece",))
    elif "merges" in model or "continuing_subword_prefix" not in model:  # files of before 2020 name no type
        raise ValueError(f"{where} is not WordPiece, the only one implemented")
    try:
        vocab = check_vocabulary(_take(model, "vocab", dict, where), f"{where}.vocab")
    except TypeError as error:
        raise ValueError(str(error)) from None
    unk_token = _take(model, "unk_token", str, where)
    check_unknown_token(vocab, unk_token, f"{where}.vocab")
    longest = _take(model, "max_input_chars_per_word", int, where)
    if longest < 0:
        raise ValueError(f"{where}.max_input_chars_per_word is {longest}; expected 0 or more")
    return {
        "vocab": vocab,
        "unk_token": unk_token,
        "continuing_subword_prefix": _take(model, "continuing_subword_prefix", str, where),
        "max_input_chars_per_word": min(longest, MAX_ID),
    }


def _read_normalizer(content: Any, where: str) -> dict[str, bool | None] | None:
    if content is None:
        return None
    _component(content, where, ("BertNormalizer",))
    return {
        "clean_text": _take(content, "clean_text", bool, where),
        "handle_chinese_chars": _take(content, "handle_chinese_chars", bool, where),
        "strip_accents": _take(content, "strip_accents", (bool, type(None)), where, None),
        "lowercase": _take(content, "lowercase", bool, where),
    }


def _read_decoder(content: Any, where: str) -> tuple[str, bool] | None:
    if content is None:
        return None
    _component(content, where, ("WordPiece",))
    return _take(content, "prefix", str, where), _take(content, "cleanup", bool, where)


# Kept for saving: of truncation and padding transformers takes the sides and the padding token alone.


def _read_truncation(content: Any, where: str) -> dict[str, Any] | None:
    if content is None:
        return None
    _check_side(content, where, required=False)
    _take_one_of(content, "strategy", ("LongestFirst", "OnlyFirst", "OnlySecond"), where)
    for key in ("max_length", "stride"):
        _check_not_negative(_take(content, key, int, where), f"{where}.{key}")
    return content


def _read_padding(content: Any, where: str) -> dict[str, Any] | None:
    if content is None:
        return None
    _check_side(content, where, required=True)
    strategy = _take(content, "strategy", (str, dict), where)
    if isinstance(strategy, dict):
        if list(strategy) != ["Fixed"]:
            raise ValueError(f"{where}.strategy is {strategy!r:.60}; expected BatchLongest or an object with Fixed")
        _check_not_negative(_take(strategy, "Fixed", int, f"{where}.strategy"), f"{where}.strategy.Fixed")
    else:
        _take_one_of(content, "strategy", ("BatchLongest",), where)
    multiple = _take(content, "pad_to_multiple_of", (int, type(None)), where, None)
    _check_not_negative(multiple or 0, f"{where}.pad_to_multiple_of")
    for key in ("pad_id", "pad_type_id"):
        _check_not_negative(_take(content, key, int, where), f"{where}.{key}")
    _take(content, "pad_token", str, where)
    return content


def _check_side(content: Any, where: str, required: bool) -> None:
    if not isinstance(content, dict):
        raise ValueError(f"{where} is {content!r:.60}; expected an object or null")
    if required or "direction" in content:
        _take_one_of(content, "direction", ("Left", "Right"), where)


def _take_one_of(content: Mapping[str, Any], key: str, choices: tuple[str, ...], where: str) -> None:
    value = _take(content, key, str, where)
    if value not in choices:
        expected = " or ".join(filter(None, (", ".join(choices[:-1]), choices[-1])))
        raise ValueError(f"{where}.{key} is {value!r:.60}; expected {expected}")


def _check_not_negative(value: int, where: str) -> None:
    if value < 0:
        raise ValueError(f"{where} is {value}; expected 0 or more")


def _read_added_tokens(content: Any, where: str) -> list[tuple[int, AddedToken]]:
    if not isinstance(content, list):
        raise ValueError(f"{where} is {content!r:.60}; expected a list")
    rows = []
    for n, entry in enumerate(content):
        at = f"{where}[{n}]"
        if not isinstance(entry, dict):
            raise ValueError(f"{at} is {entry!r:.60}; expected an object")
        flags = {name: _take(entry, name, bool, at) for name in FLAGS}
        if not 0 <= _take(entry, "id", int, at) <= MAX_ID:
            raise ValueError(f"{at}.id is {entry['id']}; expected 0 to {MAX_ID}")
        rows.append((entry["id"], AddedToken(_take(entry, "content", str, at), **flags)))
    return sorted(rows, key=lambda row: row[0])


def _read_post_processor(content: Any, where: str) -> tuple[tuple[Piece, ...], tuple[Piece, ...]]:
    if content is None:
        return Blueprint.single, Blueprint.pair
    if _component(content, where, ("TemplateProcessing", "BertProcessing")) == "BertProcessing":
        return bert_template(*(_read_token(content, key, where) for key in ("cls", "sep")))
    special = _take(content, "special_tokens", dict, where)
    for name, entry in special.items():
        at = f"{where}.special_tokens.{name}"
        if not isinstance(entry, dict):
            raise ValueError(f"{at} is {entry!r:.60}; expected an object")
        ids, tokens = _take(entry, "ids", list, at), _take(entry, "tokens", list, at)
        if not all(type(i) is int and 0 <= i <= MAX_ID for i in ids):
            raise ValueError(f"{at}.ids is {ids!r:.60}; expected a list of token ids")
        if not all(isinstance(token, str) for token in tokens) or len(tokens) != len(ids):
            raise ValueError(f"{at}.tokens is {tokens!r:.60}; expected a list of {len(ids)} strings")
    single = _read_template(content, "single", special, where)
    pair = _read_template(content, "pair", special, where)
    for template, name, sequences in ((single, "single", ["A"]), (pair, "pair", ["A", "B"])):
        found = sorted(piece.name for piece in template if piece.ids is None)
        if found != sequences:
            raise ValueError(
                f"{where}.{name} has the sequences {', '.join(found) or 'none'}; only {' and '.join(sequences)}, "
                "once each, is implemented"
            )
    return single, pair


def _read_token(content: Mapping[str, Any], key: str, where: str) -> tuple[str, int]:
    value = content.get(key)
    if not isinstance(value, list) or [type(each) for each in value] != [str, int] or not 0 <= value[1] <= MAX_ID:
        raise ValueError(f"{where}.{key} is {value!r:.60}; expected a list of a token and its id")
    return value[0], value[1]


def _read_template(content: Mapping[str, Any], key: str, special: Mapping[str, Any], where: str) -> tuple[Piece, ...]:
    pieces = []
    for n, entry in enumerate(_take(content, key, list, where)):
        at = f"{where}.{key}[{n}]"
        kind, body = next(iter(entry.items())) if isinstance(entry, dict) and len(entry) == 1 else (None, None)
        if kind not in ("Sequence", "SpecialToken") or not isinstance(body, dict):
            raise ValueError(f"{at} is {entry!r:.60}; expected a Sequence or a SpecialToken")
        name, type_id = _take(body, "id", str, at), _take(body, "type_id", int, at)
        if not 0 <= type_id <= MAX_ID:
            raise ValueError(f"{at}.type_id is {type_id}; expected 0 or more")
        if kind == "Sequence":
            if name not in ("A", "B"):
                raise ValueError(f"{at}.id is {name!r}; expected A or B")
            pieces.append(Piece(name, type_id))
        elif name in special:
            pieces.append(Piece(name, type_id, tuple(special[name]["ids"]), tuple(special[name]["tokens"])))
        else:
            raise ValueError(f"{at} names {name!r}, which {where}.special_tokens lacks")
    return tuple(pieces)
