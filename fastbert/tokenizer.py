"""Text to packed token ids, for now through Hugging Face's ``tokenizers``."""

import copy
import json
import os
import threading
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy
import torch

from fastbert.packing import PackedBatch, as_integer

__all__ = ["Tokenizer"]

_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_CHUNK = 4096  # texts at a time: the package's own objects take a hundred times the memory of the ids


class Tokenizer:
    """A WordPiece tokenizer that gives packed batches: no text is ever padded. Several threads may share one."""

    def __init__(self, backend: Any) -> None:
        """``backend`` is a ``tokenizers.Tokenizer``; load() makes it."""
        backend.no_padding()  # tokenizer.json may ask for it
        self._backend = backend
        self._lock = threading.Lock()  # around the backend's truncation and the encoding that relies on it

    def __reduce__(self) -> tuple[Any, ...]:
        # Locks do not copy or pickle. A copy gets a backend of its own, as its lock would not guard a shared one.
        return type(self), (copy.deepcopy(self._backend),)

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, lowercase: bool = False) -> "Tokenizer":
        """From a tokenizer.json, or from a model's folder that has one or, as the oldest BERTs, a vocab.txt.

        Args:
            path: the file or the folder.
            lowercase: lowercase texts, special tokens apart, whatever the file says.

        Raises:
            FileNotFoundError: there is none.
            ValueError: the file is damaged.
            ImportError: ``tokenizers`` is missing.
        """
        path = Path(path)
        file = path / "tokenizer.json" if path.is_dir() else path
        if not file.is_file() and path.is_dir() and (path / "vocab.txt").is_file():
            file = path / "vocab.txt"
        if not file.is_file():
            raise FileNotFoundError(
                f"{file} does not exist; expected a tokenizer.json, or a folder with one or a vocab.txt"
            )
        try:
            import tokenizers
        except ImportError as error:
            raise ImportError(
                "reading a tokenizer needs the package tokenizers: pip install 'fastbert-kernels[transformers]'"
            ) from error
        if file.suffix == ".txt":
            backend = _from_vocabulary(file, tokenizers)
        else:
            try:
                backend = tokenizers.Tokenizer.from_file(str(file))
            except Exception as error:  # the package raises bare Exceptions
                raise ValueError(f"{file} is not a readable tokenizer.json (truncated?): {error}") from error
        if lowercase and not getattr(backend.normalizer, "lowercase", False):
            after = [] if backend.normalizer is None else [backend.normalizer]
            backend.normalizer = tokenizers.normalizers.Sequence([tokenizers.normalizers.Lowercase(), *after])
        return cls(backend)

    @property
    def vocab_size(self) -> int:
        return self._backend.get_vocab_size(with_added_tokens=True)

    def encode(self, texts: Sequence[str] | Sequence[tuple[str, str]], *, max_length: int | None = None) -> PackedBatch:
        """Ids int64 [total] of all texts, special tokens included, with their lengths known on the host.

        Args:
            texts: strings, or pairs of strings, whose second halves have token type 1.
            max_length: tokens to truncate each to, special tokens included; None: no limit. Pairs lose tokens from the
                longer.

        Raises:
            TypeError: a text is no string (or pair of strings), or texts is no list of them; max_length is no integer.
            ValueError: max_length leaves no room beside the special tokens, or a text is no valid Unicode.
        """
        pairs = check_texts(texts)
        if max_length is not None:
            max_length = as_integer("max_length", max_length)
            special = self._backend.num_special_tokens_to_add(pairs)
            if max_length < special:
                raise ValueError(
                    f"max_length is {max_length}; expected at least {special}, the number of special tokens"
                )
        lengths: list[int] = []
        ids: list[numpy.ndarray] = []
        types: list[numpy.ndarray] = []
        for start in range(0, len(texts), _CHUNK):
            with self._lock:
                self._truncate_to(max_length)
                encodings = self._backend.encode_batch_fast(list(texts[start : start + _CHUNK]))
            lengths += [len(encoding) for encoding in encodings]
            ids.append(_concatenated(encoding.ids for encoding in encodings))
            if pairs:
                types.append(_concatenated(encoding.type_ids for encoding in encodings))
        return PackedBatch.from_lengths(_tensor(ids), lengths, token_type_ids=_tensor(types) if pairs else None)

    def _truncate_to(self, max_length: int | None) -> None:
        if max_length is None:
            self._backend.no_truncation()
            return
        truncation = self._backend.truncation
        if truncation is None or truncation["max_length"] != max_length or truncation["strategy"] != "longest_first":
            self._backend.enable_truncation(max_length, strategy="longest_first")


def _concatenated(lists: Iterable[list[int]]) -> numpy.ndarray:
    return numpy.fromiter(chain.from_iterable(lists), numpy.int64)


def _tensor(parts: list[numpy.ndarray]) -> torch.Tensor:
    return torch.from_numpy(numpy.concatenate(parts)) if parts else torch.zeros(0, dtype=torch.int64)


def check_texts(texts: Sequence[Any]) -> bool:
    """Whether texts are pairs.

    Raises TypeError where they are neither strings nor pairs of them, ValueError where one is no valid Unicode.
    """
    if isinstance(texts, str):
        raise TypeError("texts is a single string; expected a list of them: [text]")
    if isinstance(texts, bytes) or not isinstance(texts, Sequence | numpy.ndarray):
        raise TypeError(f"texts is of type {type(texts).__name__}; expected a list of strings")
    pairs = len(texts) > 0 and not isinstance(texts[0], str)
    for i, text in enumerate(texts):
        fits = isinstance(text, tuple | list) and len(text) == 2 and all(isinstance(part, str) for part in text)
        if not (fits if pairs else isinstance(text, str)):
            raise TypeError(
                f"texts[{i}] is {text!r:.60} of type {type(text).__name__}; "
                "expected only strings, or only pairs of strings"
            )
        for part in text if pairs else (text,):
            try:
                part.encode()
            except UnicodeEncodeError as error:
                raise ValueError(f"texts[{i}] is {text!r:.60}, which is no valid Unicode: {error}") from None
    return pairs


def _from_vocabulary(file: Path, tokenizers: Any) -> Any:
    """BERT's tokenizer as its authors published it, from a vocab.txt and what tokenizer_config.json beside it says."""
    config_file = file.with_name("tokenizer_config.json")
    try:
        config = json.loads(config_file.read_text(encoding="utf-8")) if config_file.is_file() else {}
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{config_file} is not valid JSON (truncated?): {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{config_file} holds a JSON {type(config).__name__}; expected an object")
    vocabulary = {word: i for i, word in enumerate(file.read_text(encoding="utf-8").splitlines())}
    missing = [word for word in _SPECIAL if word not in vocabulary]
    if missing:
        raise ValueError(f"{file} lacks {', '.join(missing)}; expected BERT's vocabulary, a token a line")
    backend = tokenizers.Tokenizer(tokenizers.models.WordPiece(vocabulary, unk_token="[UNK]"))
    backend.normalizer = tokenizers.normalizers.BertNormalizer(
        lowercase=config.get("do_lower_case", True),
        strip_accents=config.get("strip_accents"),
        handle_chinese_chars=config.get("tokenize_chinese_chars", True),
    )
    backend.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(word, vocabulary[word]) for word in ("[CLS]", "[SEP]")],
    )
    backend.add_special_tokens(list(_SPECIAL))
    return backend
