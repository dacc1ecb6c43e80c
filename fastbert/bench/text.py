"""Real text for benchmarks: what Python itself ships, or a file."""

from __future__ import annotations

import importlib
import re
from collections.abc import Sequence
from pathlib import Path

_PARAGRAPH = re.compile(r"\n\s*\n")
_SENTENCE = re.compile(r"(?<=[.!?:]) +(?=[A-Z\"(])")
_MIN_WORDS = 3  # shorter pieces are headings and debris


class TextError(ValueError):
    """A text that cannot be used; the message says why, in one line."""


def load(path: str | None) -> tuple[list[str], str]:
    """(texts, what they are). A file holds a text a paragraph where blank lines separate some, else a text a line."""
    if path is None:
        texts, source = python_documentation(), "Python's own documentation (pydoc_data.topics)"
    else:
        texts, source = read(path), path
    return texts, source


def read(path: str) -> list[str]:
    """The texts of a UTF-8 file, white space collapsed. Raises TextError."""
    try:
        content = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise TextError(f"cannot read {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise TextError(f"cannot read {path}: it is not UTF-8 (byte {error.start})") from error
    content = content.strip().removeprefix("\ufeff")
    pieces = _PARAGRAPH.split(content)
    if len(pieces) == 1:
        pieces = content.splitlines()
    texts = [" ".join(piece.split()) for piece in pieces]
    texts = [text for text in texts if text]
    if not texts:
        raise TextError(f"{path} holds no text")
    return texts


def python_documentation() -> list[str]:
    """Paragraphs and sentences of Python's language reference, in turn: lengths from three words to some hundreds."""
    try:
        topics = importlib.import_module("pydoc_data.topics").topics
    except ImportError as error:
        raise TextError(
            f"this Python comes without pydoc_data.topics ({error}): give a text with --text FILE"
        ) from error
    texts: list[str] = []
    for topic in sorted(topics):
        for index, piece in enumerate(_PARAGRAPH.split(topics[topic])):
            if piece.startswith("   ") or "::=" in piece:  # code and grammar
                continue
            paragraph = " ".join(piece.split())
            found = _SENTENCE.split(paragraph) if index % 2 else [paragraph]
            texts += [text for text in found if len(text.split()) >= _MIN_WORDS and re.search("[a-z]{2}", text)]
    return texts


def sample(texts: Sequence[str], count: int) -> list[str]:
    """At most `count` texts, evenly spaced, in order: the same ones on every run."""
    if len(texts) <= count:
        return list(texts)
    return [texts[i * len(texts) // count] for i in range(count)]
