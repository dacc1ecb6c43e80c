"""Vocabularies, texts and comparisons that the tokenizer tests share. What is right is what transformers answers."""

import os
from typing import Any

import numpy
import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers or huggingface_hub is imported
os.environ["TOKENIZERS_PARALLELISM"] = "false"  # of several errors in a batch, threads report any
os.environ["RUST_BACKTRACE"] = "0"  # tokenizers panics in some calls, which is expected and slow to explain

from fastbert.tokenizer import Encoding, WordPieceTokenizer

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
_WORDS = (
    "the a one two three four five six seven eight nine ten hello Hello world World cafe café Café don't do not n't 's "
    "un ##aff ##able ##ing ##s new newtok run ##ning 漢 字 ##字 漢字 日本 naïve naive über ##ber straße ß ﬁ αβγ ΑΣ ας"
)
LETTERS = "abcdefghijklmnopqrstuvwxyzABCXYZ0123456789äéîñçöüİıßαβσςжЖ漢字日本語한국"
VOCABULARY = {
    token: i
    for i, token in enumerate(
        dict.fromkeys(
            [
                *SPECIAL,
                *_WORDS.split(),
                *LETTERS,
                *(f"##{c}" for c in LETTERS),
                *"!?.,'\"-()[]{}<>@#$%&*+=/\\:;~^_|`…—。，",
            ]
        )
    )
}

TEXTS = [
    "",
    " ",
    "one two three four five six seven eight nine ten",
    "Hello, world! don't do not",
    "Café ÜBER naïve straße",
    "e\u0301 cafe\u0301 a\u0300\u0316b",
    "漢字 日本語 mixed漢字text",
    "unaffable running newtoks",
    "special [MASK] in [SEP] text [mask] a[CLS]b",
    "tab\tnewline\nzero\u0000width\u200bsoft\u00adhyphen\ufffd",
    "word" * 30,
    "zzzz ☃ 🙂 한국 Жж İıΑΣ",
    "a " * 40,
]


_ENCODING = (
    "ids",
    "type_ids",
    "tokens",
    "offsets",
    "attention_mask",
    "special_tokens_mask",
    "word_ids",
    "sequence_ids",
    "n_sequences",
)


def theirs(**options: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    transformers.logging.set_verbosity_error()
    return transformers.BertTokenizer(vocab=dict(VOCABULARY), **options)


def both(**options: Any) -> tuple[WordPieceTokenizer, Any]:
    """Our tokenizer and transformers', of the same arguments."""
    return WordPieceTokenizer(vocab=VOCABULARY, **options), theirs(**options)


def plain(value: Any) -> Any:
    """A result as something that compares: names and values, with the types of tensors."""
    if isinstance(value, torch.Tensor):
        return "pt", value.dtype, value.shape, value.tolist()
    if isinstance(value, numpy.ndarray):
        rows = [plain(each) for each in value] if value.dtype == object else value.tolist()
        return "np", str(value.dtype), value.shape, rows
    if type(value).__name__ == "BatchEncoding":
        entries = {name: plain(each) for name, each in value.items()}
        return list(value.keys()), entries, [plain(each) for each in value.encodings or []]
    if isinstance(value, Encoding) or type(value).__name__ == "Encoding":
        return {name: getattr(value, name) for name in _ENCODING}
    if type(value).__name__ == "AddedToken":
        return str(value), *(
            getattr(value, name) for name in ("single_word", "lstrip", "rstrip", "normalized", "special")
        )
    if isinstance(value, dict):
        return {key: plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    return value


def outcome(call: Any, tokenizer: Any) -> Any:
    """What a call gives: ("result", …), or ("exception", its class)."""
    try:
        return "result", plain(call(tokenizer))
    except Exception as error:
        return "exception", type(error).__name__
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        return "exception", "ValueError"  # where tokenizers itself crashes


def assert_same(call: Any, ours: Any, other: Any, label: object = "") -> None:
    actual, expected = outcome(call, ours), outcome(call, other)
    assert actual == expected, f"{label}\nours:   {actual}\ntheirs: {expected}"
