"""Text to token ids, on one thread unless a row says otherwise: fastbert's WordPiece tokenizer against its peers.

These are tokenizers, transformers and nanotoken. Every contender's ids are compared with those of `tokenizers` before it is timed,
and the error is the largest difference: 0, or it fails. All use the vocabulary of all-MiniLM-L6-v2.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import random
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy
import torch
from torch import Tensor

from fastbert.bench import text
from fastbert.bench.cases import (
    OURS,
    PEER,
    Case,
    CaseUnavailable,
    Check,
    Contender,
    Prepared,
    Settings,
    check_against,
)
from fastbert.bench.suites.end_to_end import model_folder

_LINE_WORDS, _DOCUMENT_CHARACTERS, _MAX_LENGTH, _BATCH_SIZE = 20, 20_000, 512, 32
_CHARACTERS, _QUICK_CHARACTERS = 1_000_000, 200_000
_COLD_ROUNDS = 3
_SHORT = "The quick brown fox jumps over the lazy dog."

# Scripts of the multilingual text, a line each in turn: letters as ranges of code points, and the lengths of words.
_LATIN = "aàâbcçčdeéèêëęfgğhiîïıjklłmnñoôöpqrřsšßtuùûüvwxyýzž"
_SCRIPTS: tuple[tuple[str, int, int], ...] = (
    (_LATIN, 2, 10),
    ("".join(map(chr, range(0x430, 0x450))), 2, 11),  # Cyrillic
    ("".join(map(chr, range(0x3AC, 0x3CF))), 2, 10),  # Greek, accents among them
    ("".join(map(chr, (*range(0x627, 0x63B), *range(0x641, 0x64B)))), 2, 8),  # Arabic
    ("".join(map(chr, range(0x5D0, 0x5EB))), 2, 7),  # Hebrew
    ("".join(map(chr, (*range(0x905, 0x93A), *range(0x93E, 0x94D)))), 2, 8),  # Devanagari, with vowel signs
    ("".join(map(chr, (*range(0xE01, 0xE2F), *range(0xE30, 0xE3A)))), 5, 30),  # Thai, which has no spaces between words
    ("".join(map(chr, range(0x4E00, 0x4E00 + 3000))), 2, 12),  # Chinese
    ("".join(map(chr, range(0x3042, 0x3094))), 3, 12),  # Hiragana
    ("".join(map(chr, range(0xAC00, 0xD7A4, 5))), 2, 5),  # Hangul
)
_LEXICON = 3000  # words of a script

# contenders
_OURS, _TOKENIZERS, _TRANSFORMERS, _NANOTOKEN = "fastbert", "tokenizers encode_batch", "transformers", "nanotoken"
_UTF8, _TWO_THREADS, _ONE_THREAD = "fastbert encode_utf8", "fastbert, 2 threads", "fastbert, 1 thread"


def cases() -> list[Case]:
    return [
        _case("lines", "20-word lines to packed ids", (_OURS, _UTF8, _TOKENIZERS, _NANOTOKEN), _lines),
        _case("documents", "20 kB documents to packed ids", (_OURS, _UTF8, _TOKENIZERS, _NANOTOKEN), _documents),
        _case(
            "multilingual",
            "20-word lines of ten scripts, generated words",
            (_OURS, _UTF8, _TOKENIZERS, _NANOTOKEN),
            _multilingual,
            named_only=True,
        ),
        _case("truncated", "20 kB documents, 512 tokens of each", (_OURS, _TOKENIZERS, _NANOTOKEN), _truncated),
        _case("offsets", "20-word lines with offsets and word ids", (_OURS, _TOKENIZERS), _offsets),
        _case("padded", "32 lines to padded tensors", (_OURS, _TRANSFORMERS), _padded),
        _case("short", "one short text", (_OURS, _UTF8, _TRANSFORMERS), _short),
        _case("threads", "20 kB documents to packed ids, two threads", (_TWO_THREADS, _ONE_THREAD), _threads),
    ]


def _case(
    name: str,
    title: str,
    contenders: tuple[str, ...],
    prepare: Callable[[Settings], Prepared],
    named_only: bool = False,
) -> Case:
    return Case(
        f"tokenizer/{name}",
        "tokenizer",
        "WordPiece",
        title,
        contenders,
        prepare,
        True,
        2.0,
        0.7,
        named_only=named_only,
    )


# ---- the contenders ----


@functools.cache
def _ours(folder: str) -> Any:
    import fastbert

    tokenizer = fastbert.WordPieceTokenizer.from_pretrained(folder)
    tokenizer.threads = 1
    return tokenizer


@functools.cache
def _tokenizers(folder: str, max_length: int | None = None) -> Any:
    if importlib.util.find_spec("tokenizers") is None:
        raise CaseUnavailable(
            "tokenizers is not installed, and nothing else says what is right: pip install tokenizers"
        )
    import tokenizers

    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its only switch: one thread, as all others here
    peer = tokenizers.Tokenizer.from_file(f"{folder}/tokenizer.json")
    peer.no_padding()
    peer.no_truncation()
    if max_length is not None:
        peer.enable_truncation(max_length)
    return peer


@functools.cache
def _nanotoken(folder: str) -> Any:
    import nanotoken

    return nanotoken.Tokenizer(f"{folder}/tokenizer.json")


@functools.cache
def _transformers(folder: str) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def _flat(rows: Sequence[Sequence[int]]) -> list[Tensor]:
    return [torch.tensor([i for row in rows for i in row]), torch.tensor([len(row) for row in rows])]


def _from_packed(batch: Any) -> list[Tensor]:
    return [batch.values, batch.cu_seqlens.diff().to(torch.int64)]


def _packed_problem(settings: Settings, texts: list[str], max_length: int | None = None) -> Prepared:
    folder = str(model_folder(settings.model))
    ours, theirs = _ours(folder), _tokenizers(folder, max_length)
    options = {} if max_length is None else {"truncation": True, "max_length": max_length}
    contenders = [
        Contender(
            _OURS,
            OURS,
            lambda: ours(texts, return_tensors="packed", verbose=False, **options),
            implementation="C++",
            convert=_from_packed,
        )
    ]
    if max_length is None:
        encoded = [each.encode() for each in texts]
        joined, bounds = b"".join(encoded), numpy.cumsum([0, *map(len, encoded)])
        contenders.append(
            Contender(
                _UTF8,
                OURS,
                lambda: ours.encode_utf8(joined, bounds, return_tensors="packed"),
                implementation="C++",
                convert=_from_packed,
            )
        )
    contenders.append(
        Contender(
            _TOKENIZERS,
            PEER,
            lambda: theirs.encode_batch(texts),
            convert=lambda encodings: _flat([each.ids for each in encodings]),  # type: ignore[attr-defined]
        )
    )
    not_measured = {}
    if importlib.util.find_spec("nanotoken") is None:
        not_measured[_NANOTOKEN] = "nanotoken is not installed"
    else:
        nano = _nanotoken(folder)
        contenders.append(
            Contender(
                _NANOTOKEN,
                PEER,
                lambda: nano.encode_batch(texts, max_length=max_length, parallel=False),
                convert=lambda rows: _flat([list(map(int, row)) for row in rows]),  # type: ignore[attr-defined]
            )
        )
    return _prepared(contenders, lambda: _flat([each.ids for each in theirs.encode_batch(texts)]), texts, not_measured)


def _prepared(
    contenders: list[Contender],
    expected: Callable[[], Sequence[Tensor]],
    texts: Sequence[str],
    not_measured: dict[str, str] | None = None,
) -> Prepared:
    def check() -> dict[str, Check]:
        return check_against(contenders, expected, None, torch.float64, absolute=True, tolerance=0.0)

    size = sum(len(each.encode()) for each in texts)
    return Prepared(
        contenders,
        next(each.name for each in contenders if each.role == PEER),
        check,
        error_unit="in ids, against tokenizers",
        items=size,
        item_unit="bytes of text",
        not_measured=not_measured or {},
        notes=[f"{len(texts)} texts, {size} bytes as UTF-8"],
    )


# ---- the problems ----


def _words(settings: Settings) -> list[str]:
    """Words of the text, as often as it takes."""
    texts, _ = text.load(settings.text)
    words = " ".join(texts).split()
    wanted = _QUICK_CHARACTERS if settings.quick else _CHARACTERS
    length = sum(map(len, words)) + len(words)
    return words * max(1, round(wanted / length)) if length < wanted else words[: len(words) * wanted // length]


def _line_texts(settings: Settings) -> list[str]:
    words = _words(settings)
    return [" ".join(words[i : i + _LINE_WORDS]) for i in range(0, len(words), _LINE_WORDS)]


def _document_texts(settings: Settings) -> list[str]:
    whole = " ".join(_words(settings))
    return [whole[i : i + _DOCUMENT_CHARACTERS] for i in range(0, len(whole), _DOCUMENT_CHARACTERS)]


def _lines(settings: Settings) -> Prepared:
    texts = _line_texts(settings)
    prepared = _packed_problem(settings, texts)
    prepared.notes.append(_first_passes(str(model_folder(settings.model)), texts))
    return prepared


def _first_passes(folder: str, texts: list[str]) -> str:
    """What the caches cost that a warm tokenizer has filled: the same lines through tokenizers that have seen none."""
    passes: dict[str, tuple[Any, Callable[[Any], Any]]] = {
        _TOKENIZERS: (_tokenizers, lambda peer: peer.encode_batch(texts)),
        _OURS: (_ours, lambda ours: ours(texts, return_tensors="packed", verbose=False)),
    }
    if importlib.util.find_spec("nanotoken") is not None:
        passes[_NANOTOKEN] = (_nanotoken, lambda nano: nano.encode_batch(texts, parallel=False))
    seconds: dict[str, list[float]] = {name: [] for name in passes}
    for _ in range(_COLD_ROUNDS):
        for name, (make, run) in passes.items():
            tokenizer = make.__wrapped__(folder)  # not the one that is kept
            start = time.perf_counter()
            run(tokenizer)
            seconds[name].append(time.perf_counter() - start)
    median = {name: statistics.median(samples) for name, samples in seconds.items()}
    rows = (f"{name} {1e6 * each:,.0f} µs ({median[_TOKENIZERS] / each:.3g}×)" for name, each in median.items())
    return f"first pass of a new tokenizer over the lines, median of {_COLD_ROUNDS}: {', '.join(rows)}"


def _multilingual(settings: Settings) -> Prepared:
    return _packed_problem(settings, _multilingual_texts(_QUICK_CHARACTERS if settings.quick else _CHARACTERS))


def _multilingual_texts(characters: int) -> list[str]:
    """Lines of random words, frequent ones as frequent as Zipf's law has them. No text of so many languages is at hand
    everywhere; a file of real ones goes through the other rows, with --text."""
    rng = random.Random(7)
    lexicons = [
        ["".join(rng.choices(letters, k=rng.randint(shortest, longest))) for _ in range(_LEXICON)]
        for letters, shortest, longest in _SCRIPTS
    ]
    lines: list[str] = []
    while characters > 0:
        lexicon = lexicons[len(lines) % len(lexicons)]
        words = [lexicon[int(_LEXICON ** rng.random()) - 1] for _ in range(_LINE_WORDS)]
        lines.append(f"{' '.join(words[: _LINE_WORDS // 2]).capitalize()}, {' '.join(words[_LINE_WORDS // 2 :])}.")
        characters -= len(lines[-1])
    return lines


def _documents(settings: Settings) -> Prepared:
    return _packed_problem(settings, _document_texts(settings))


def _truncated(settings: Settings) -> Prepared:
    return _packed_problem(settings, _document_texts(settings), _MAX_LENGTH)


def _offsets(settings: Settings) -> Prepared:
    """To lists, which is what both give."""
    folder = str(model_folder(settings.model))
    ours, theirs = _ours(folder), _tokenizers(folder)
    texts = _line_texts(settings)[:1000]

    def run_ours() -> Any:
        encoding = ours(texts, return_offsets_mapping=True, return_tensors=None)
        return encoding, [encoding.word_ids(i) for i in range(len(texts))]

    def run_theirs() -> Any:
        encodings = theirs.encode_batch(texts)
        return encodings, [(each.ids, each.offsets, each.word_ids) for each in encodings]

    contenders = [
        Contender(_OURS, OURS, run_ours, implementation="C++", convert=lambda out: _flat(out[0]["input_ids"])),  # type: ignore[index]
        Contender(_TOKENIZERS, PEER, run_theirs, convert=lambda out: _flat([row[0] for row in out[1]])),  # type: ignore[index]
    ]
    return _prepared(contenders, lambda: _flat([each.ids for each in theirs.encode_batch(texts)]), texts)


def _call_problem(settings: Settings, call: Callable[[Any], Any], texts: Sequence[str]) -> Prepared:
    folder = str(model_folder(settings.model))
    if importlib.util.find_spec("transformers") is None:
        raise CaseUnavailable("transformers is not installed: pip install transformers")
    ours, theirs = _ours(folder), _transformers(folder)

    def convert(encoding: Any) -> list[Tensor]:
        return [torch.as_tensor(encoding[name]) for name in ("input_ids", "token_type_ids", "attention_mask")]

    contenders = [
        Contender(_OURS, OURS, lambda: call(ours), implementation="C++", convert=convert),
        Contender(_TRANSFORMERS, PEER, lambda: call(theirs), convert=convert),
    ]
    return _prepared(contenders, lambda: convert(call(theirs)), texts)


def _padded(settings: Settings) -> Prepared:
    texts = _line_texts(settings)[:_BATCH_SIZE]
    return _call_problem(settings, lambda each: each(texts, padding=True, truncation=True, return_tensors="pt"), texts)


def _short(settings: Settings) -> Prepared:
    prepared = _call_problem(settings, lambda each: each(_SHORT), [_SHORT])
    ours, encoded = _ours(str(model_folder(settings.model))), _SHORT.encode()
    native = Contender(
        _UTF8,
        OURS,
        lambda: ours.encode_utf8(encoded, return_tensors="packed"),
        implementation="C++",
        convert=lambda out: [out.values, torch.zeros_like(out.values), torch.ones_like(out.values)],  # type: ignore[attr-defined]
    )
    prepared.contenders.insert(1, native)
    return prepared


def _threads(settings: Settings) -> Prepared:
    """Two threads against one: near 2 where two cores are idle."""
    import fastbert

    folder = str(model_folder(settings.model))
    texts, theirs = _document_texts(settings), _tokenizers(folder)

    def contender(name: str, role: str, threads: int) -> Contender:
        tokenizer = fastbert.WordPieceTokenizer.from_pretrained(folder)
        tokenizer.threads = threads
        return Contender(
            name,
            role,
            lambda: tokenizer(texts, return_tensors="packed", verbose=False),
            implementation="C++",
            convert=_from_packed,
        )

    contenders = [contender(_TWO_THREADS, OURS, 2), contender(_ONE_THREAD, PEER, 1)]
    return _prepared(contenders, lambda: _flat([each.ids for each in theirs.encode_batch(texts)]), texts)
