"""``fastbert.optimize`` against the same models as they come: every family, padded less and more, in inference and in training.

Models are base models of transformers at base size with 2 of their 12 layers, random weights, float32. All contenders hold the
same weights and get the same padded batch. Errors are those of the last hidden state of real tokens, and of all gradients, against
the model in float64. As they come, models run torch's SDPA where transformers has it for them. Rows of text run models and
tokenizers of sentence-transformers, and start at the text.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

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
    first_line,
)
from fastbert.bench.suites._common import Maker
from fastbert.bench.suites.end_to_end import model_folder, quiet_transformers

_OPTIMIZED, _ATTENTION, _STOCK = "fastbert.optimize", 'attn_implementation="fastbert"', "as it comes"
_LAYERS, _BATCH, _SEQ, _VOCABULARY = 2, 8, 128, 30522
_SHARES = {"full": 1.0, "half": 0.5, "third": 1 / 3}
_TOLERANCE = 2e-5  # of float32, as a share of the largest value
_EMBEDDING_TOLERANCE = 1e-5
_TEXTS, _CHARACTERS = 128, 300  # four batches, which sorting by length makes alike: one would be mostly padding

_BERT = {"num_hidden_layers": _LAYERS, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {  # name → prefix of transformers' classes, configuration
    "BERT": ("Bert", _BERT),
    "RoBERTa": ("Roberta", _BERT),
    "XLM-RoBERTa": ("XLMRoberta", _BERT),
    "CamemBERT": ("Camembert", _BERT),
    "DistilBERT": ("DistilBert", {"n_layers": _LAYERS, "dropout": 0.0, "attention_dropout": 0.0}),
    "ELECTRA": (
        "Electra",
        {**_BERT, "embedding_size": 768, "hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12},
    ),
    "ALBERT": ("Albert", {**_BERT, "hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}),
    "ERNIE": ("Ernie", _BERT),
    "MPNet": ("MPNet", _BERT),
    "GPT-2": (
        "GPT2",
        {"n_layer": _LAYERS, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0, "use_cache": False},
    ),
}


@dataclass(frozen=True)
class Problem:
    """A family's base model and a batch for it.

    Attributes:
        family: its name.
        share: of the positions that hold a token: "full", "half", "third".
        training: forward and backward; else forward without gradients.
        changes: to the configuration and the batch, for tests.
    """

    family: str
    share: str
    training: bool
    batch: int = _BATCH
    seq: int = _SEQ
    changes: tuple[tuple[str, Any], ...] = ()

    def lengths(self) -> list[int]:
        """Evenly spread with the share of real tokens, the last one seq."""
        real = _SHARES[self.share]
        if real == 1.0:
            return [self.seq] * self.batch
        lengths = [
            min(self.seq, max(1, round(2.0 * real * self.seq * (i + 0.5) / self.batch))) for i in range(self.batch)
        ]
        return [*lengths[:-1], self.seq]

    def inputs(self, seed: int, device: str) -> dict[str, Tensor]:
        """input_ids and attention_mask [batch, seq], padded on the right."""
        vocabulary = dict(self.changes).get("vocab_size", _VOCABULARY)
        ids = Maker(seed, device).integers(5, vocabulary, self.batch, self.seq)
        columns = torch.arange(self.seq, device=device)
        mask = (columns < torch.tensor(self.lengths(), device=device)[:, None]).long()
        return {"input_ids": ids.masked_fill(mask == 0, 1), "attention_mask": mask}

    def model(self, seed: int, device: str) -> Any:
        """transformers' model. Raises CaseUnavailable where transformers is missing."""
        try:
            import transformers
        except ImportError as error:
            raise CaseUnavailable(f"transformers is not installed: {first_line(error)}") from error
        prefix, options = _FAMILIES[self.family]
        config = getattr(transformers, f"{prefix}Config")(
            **{**options, "vocab_size": _VOCABULARY, "pad_token_id": 1, **dict(self.changes)}
        )
        torch.manual_seed(seed)
        with quiet_transformers():
            model = getattr(transformers, f"{prefix}Model")._from_config(config)
        return model.to(device).train(self.training)

    def flops(self, model: Any) -> int:
        """Of the products, on real tokens."""
        config = model.config
        hidden, inner = config.hidden_size, getattr(config, "intermediate_size", None)
        inner = inner or getattr(config, "hidden_dim", None) or 4 * hidden
        tokens, pairs = sum(self.lengths()), sum(length * length for length in self.lengths())
        forward = config.num_hidden_layers * (
            2 * tokens * (4 * hidden * hidden + 2 * hidden * inner) + 4 * pairs * hidden
        )
        return 3 * forward if self.training else forward


def cases() -> list[Case]:
    found = [
        _case(Problem(family, share, training))
        for family in _FAMILIES
        for training in (False, True)
        for share in _SHARES
    ]
    return [
        *found,
        _text_case("sentence-transformer", "SentenceTransformer.encode", _sentence_transformer, named_only=False),
        _text_case("one-text", "SentenceTransformer.encode, one short text", _one_text),
        _text_case("cross-encoder", "CrossEncoder.predict", _cross_encoder),
    ]


def _case(problem: Problem) -> Case:
    kind = "training" if problem.training else "inference"
    shown = problem.family == "BERT" and problem.share == "third"  # the row that every run has
    real = "no padding" if problem.share == "full" else f"{problem.share} real"
    return Case(
        f"families/{problem.family}/{kind}-{problem.share}",
        "families",
        f"{kind}, base, {_LAYERS} layers, {_BATCH}×{_SEQ}",
        f"{problem.family}, {real}",
        (_OPTIMIZED, _ATTENTION, _STOCK),
        functools.partial(prepare, problem),
        quick=shown and not problem.training,
        budget_seconds=4.0,
        quick_budget_seconds=1.5,
        named_only=not shown,
    )


def _text_case(name: str, title: str, prepare: Callable[[Settings], Prepared], named_only: bool = True) -> Case:
    return Case(
        f"families/text/{name}",
        "families",
        "from text, all-MiniLM-L6-v2",
        title,
        (_OPTIMIZED, _STOCK),
        prepare,
        quick=not named_only,
        budget_seconds=5.0,
        quick_budget_seconds=2.0,
        named_only=named_only,
    )


def prepare(problem: Problem, settings: Settings) -> Prepared:
    """The contenders of a problem."""
    import fastbert

    stock = problem.model(settings.seed, settings.device)
    inputs = problem.inputs(settings.seed, settings.device)
    real = inputs["attention_mask"].bool()
    weights = Maker(settings.seed + 1, settings.device).normal(*real.shape, stock.config.hidden_size) * real[..., None]
    run = functools.partial(_step if problem.training else _inference, inputs=inputs, weights=weights)

    optimized = copy.deepcopy(stock)
    try:
        fastbert.optimize(optimized)
    except ValueError as error:
        raise CaseUnavailable(first_line(error)) from error
    contenders = [Contender(_OPTIMIZED, OURS, functools.partial(run, optimized), convert=_real_only(real))]
    not_measured = {}
    attention = _with_our_attention(stock)
    if isinstance(attention, str):
        not_measured[_ATTENTION] = attention
    else:
        contenders.append(Contender(_ATTENTION, OURS, functools.partial(run, attention), convert=_real_only(real)))
    contenders.append(Contender(_STOCK, PEER, functools.partial(run, stock), convert=_real_only(real)))

    def expected() -> Sequence[Tensor]:
        exact = copy.deepcopy(stock).double()
        return _real_only(real)(
            _step(exact, inputs, weights.double()) if problem.training else _inference(exact, inputs, weights)
        )

    notes = ["padded positions count for nobody: tokens are the real ones"]
    if problem.training:
        notes.append("forward and backward, without dropout, which would leave nothing to check; no optimizer")

    return Prepared(
        contenders,
        _STOCK,
        lambda: check_against(contenders, expected, None, torch.float32, tolerance=_TOLERANCE),
        flops=problem.flops(stock),
        items=sum(problem.lengths()),
        item_unit="tokens",
        not_measured=not_measured,
        notes=notes,
    )


def _with_our_attention(stock: Any) -> Any:
    """A copy with attn_implementation="fastbert", or why there is none."""
    from fastbert.integrations.transformers import attention

    if not stock._can_set_attn_implementation():
        return f"{type(stock).__name__} is not on the AttentionInterface of this transformers"
    model = copy.deepcopy(stock)
    model.set_attn_implementation(attention.NAME)
    return model


def _inference(model: Any, inputs: dict[str, Tensor], weights: Tensor) -> Tensor:
    with torch.no_grad():
        return model(**inputs).last_hidden_state


def _step(model: Any, inputs: dict[str, Tensor], weights: Tensor) -> list[Tensor]:
    """The last hidden state, and the gradients of a weighted sum of its real part in every parameter that has one."""
    model.zero_grad(set_to_none=True)
    hidden = model(**inputs).last_hidden_state
    (hidden * weights).sum().backward()
    return [hidden.detach(), *(parameter.grad for parameter in model.parameters() if parameter.grad is not None)]


def _real_only(real: Tensor) -> Callable[[Any], list[Tensor]]:
    def convert(output: Any) -> list[Tensor]:
        if isinstance(output, Tensor):
            return [output[real]]
        hidden, *gradients = output
        # Together: a key's bias has no gradient but rounding, which is no share of anything.
        return [hidden[real], torch.cat([gradient.flatten() for gradient in gradients])]

    return convert


# ---- from text ----


def _texts(settings: Settings) -> list[str]:
    """Sentences and short paragraphs."""
    texts, _ = text.load(settings.text)
    return text.sample(
        [each for each in texts if len(each) <= _CHARACTERS] or texts, _TEXTS // 2 if settings.quick else _TEXTS
    )


def _sentence_transformer(settings: Settings) -> Prepared:
    from_text = functools.partial(_models, settings, "SentenceTransformer")
    texts = _texts(settings)
    return _prepare_text(from_text, lambda model: model.encode(texts, convert_to_tensor=True), settings, len(texts))


def _one_text(settings: Settings) -> Prepared:
    from_text = functools.partial(_models, settings, "SentenceTransformer")
    query = "how long does it take to read one short query of about two dozen tokens, say in a search engine?"
    return _prepare_text(from_text, lambda model: model.encode(query, convert_to_tensor=True), settings, 1)


def _cross_encoder(settings: Settings) -> Prepared:
    from_text = functools.partial(_models, settings, "CrossEncoder", num_labels=3)
    texts = _texts(settings)
    pairs = list(zip(texts, texts[1:] + texts[:1], strict=True))
    return _prepare_text(from_text, lambda model: model.predict(pairs, convert_to_tensor=True), settings, len(pairs))


def _models(settings: Settings, kind: str, **options: Any) -> Any:
    """A model of sentence-transformers. Raises CaseUnavailable where it or the weights are missing."""
    folder = str(model_folder(settings.model))
    try:
        import sentence_transformers
    except ImportError as error:
        raise CaseUnavailable(f"sentence-transformers is not installed: {first_line(error)}") from error
    torch.manual_seed(settings.seed)  # a CrossEncoder's head is random
    with quiet_transformers():
        return getattr(sentence_transformers, kind)(
            folder, device=settings.device, model_kwargs={"attn_implementation": "sdpa", "dtype": "float32"}, **options
        )


def _prepare_text(make: Callable[[], Any], call: Callable[[Any], Tensor], settings: Settings, texts: int) -> Prepared:
    import fastbert

    stock = make()
    optimized = fastbert.optimize(copy.deepcopy(stock))
    contenders = [
        Contender(_OPTIMIZED, OURS, lambda: call(optimized)),
        Contender(_STOCK, PEER, lambda: call(stock)),
    ]

    def check() -> dict[str, Check]:
        return check_against(
            contenders,
            lambda: [call(copy.deepcopy(stock).double())],
            None,
            torch.float32,
            absolute=True,
            tolerance=_EMBEDDING_TOLERANCE,
        )

    return Prepared(
        contenders,
        _STOCK,
        check,
        error_unit="in components of an embedding of length 1, or in a score",
        items=texts,
        item_unit="texts",
        notes=[
            f"from text: tokenization is part of the time; texts of at most {_CHARACTERS} characters; both sort them by length "
            "into batches of 32"
        ],
    )
