"""What configurations share, and BERT's, under Hugging Face's names."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, Self

from fastbert.packing import as_integer

# transformers' names on the left, fastbert.functional's on the right.
ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "gelu_quick",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}

# What a config may say and this model does not do: the values that change nothing, and what to say of any other.
_UNSUPPORTED = {
    "position_embedding_type": ((None, "absolute"), "only absolute position embeddings are supported"),
    "is_decoder": ((None, False), "only the encoder is supported"),
    "add_cross_attention": ((None, False), "cross-attention is not supported"),
    "quantization_config": ((None,), "quantized checkpoints are not read"),
}

# What heads read, of the keys a base model does not know.
_OF_HEADS = {"num_labels", "id2label", "label2id", "problem_type", "classifier_dropout", "tie_word_embeddings"}
PROBLEM_TYPES = ("regression", "single_label_classification", "multi_label_classification")

_LARGEST = 2**28  # far above every BERT; the bytes of a table of this by this still fit int64


def takes_use_cache(config: type) -> type:
    """A frozen class that lets transformers' Trainer write ``use_cache``, which nothing here reads."""
    frozen: Any = config.__setattr__

    def write(self: Any, name: str, value: Any) -> None:
        (object.__setattr__ if name == "use_cache" else frozen)(self, name, value)

    config.__setattr__ = write  # type: ignore[assignment]
    return config


@dataclass(frozen=True)
class Config:
    """A configuration that is a config.json's content. ``extra`` keeps the keys the model does not use: saving loses nothing."""

    model_type: ClassVar[str]
    _unsupported: ClassVar[Mapping[str, tuple[tuple[Any, ...], str]]]
    extra: Mapping[str, Any] = field(default_factory=dict, repr=False, hash=False, kw_only=True)

    @classmethod
    def _known(cls) -> set[str]:
        return {f.name for f in fields(cls)} - {"extra"}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """From the content of a config.json. Raises ValueError where it describes another architecture."""
        cls._check_architecture(values)
        known = cls._known()
        return cls(
            **{name: value for name, value in values.items() if name in known},
            extra={name: value for name, value in values.items() if name not in known},
        )

    @classmethod
    def _check_architecture(cls, values: Mapping[str, Any]) -> None:
        if values.get("model_type") != cls.model_type:
            raise ValueError(f'model_type is {values.get("model_type")!r}; expected "{cls.model_type}"')

    def to_dict(self) -> dict[str, Any]:
        """The content of a config.json: what was read, unknown keys included."""
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "extra"}
        return {**self.extra, "model_type": self.model_type, **own}

    def _check_activation(self, name: str) -> None:
        value = getattr(self, name)
        if not isinstance(value, str) or value not in ACTIVATIONS:
            raise ValueError(f"{name} is {value!r}; expected one of {', '.join(ACTIVATIONS)}")

    def _check_unsupported(self) -> None:
        for name, (harmless, complaint) in self._unsupported.items():
            if self.extra.get(name) not in harmless:
                raise ValueError(f"{name} is {self.extra[name]!r}; {complaint}")


@takes_use_cache
@dataclass(frozen=True)
class BertConfig(Config):
    """The numbers that make a BERT; defaults are bert-base-uncased's.

    The attributes have Hugging Face's names and meaning.

    Raises:
        ValueError: a value the model cannot be made with, named with what was expected.
    """

    model_type = "bert"
    _unsupported = _UNSUPPORTED

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    pad_token_id: int | None = 0

    def __post_init__(self) -> None:
        check_numbers(
            self,
            integers=[
                "vocab_size",
                "hidden_size",
                "num_hidden_layers",
                "num_attention_heads",
                "intermediate_size",
                "max_position_embeddings",
                "type_vocab_size",
            ],
            probabilities=["hidden_dropout_prob", "attention_probs_dropout_prob"],
            epsilon="layer_norm_eps",
            smallest={"num_hidden_layers": 0},
        )
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size is {self.hidden_size}; "
                f"expected a multiple of num_attention_heads, {self.num_attention_heads}"
            )
        self._check_activation("hidden_act")
        if self.pad_token_id is not None:
            expected = f"None or an id below vocab_size, {self.vocab_size}"
            pad = _integer(self, "pad_token_id", expected)
            if not 0 <= pad < self.vocab_size:
                raise ValueError(f"pad_token_id is {pad!r}; expected {expected}")
        labels = self.extra.get("num_labels", 2)
        if "id2label" in self.extra and not isinstance(self.extra["id2label"], Mapping | None):
            raise ValueError(f"id2label is {self.extra['id2label']!r}; expected a mapping from numbers to names")
        if isinstance(labels, bool) or not isinstance(labels, int) or labels < 1:
            raise ValueError(f"num_labels is {labels!r}; expected an integer, at least 1")
        if self.problem_type not in (None, *PROBLEM_TYPES):
            raise ValueError(
                f"problem_type is {self.problem_type!r}; expected None or one of {', '.join(PROBLEM_TYPES)}"
            )
        self._check_unsupported()

    @classmethod
    def _check_architecture(cls, values: Mapping[str, Any]) -> None:
        model_type = values.get("model_type")
        architectures = values.get("architectures") or []
        if not isinstance(architectures, list | tuple):
            raise ValueError(f"architectures is {architectures!r}; expected a list of names")
        if model_type is None:
            others = [name for name in architectures if not str(name).startswith("Bert")]
            if others:
                raise ValueError(f'the config describes {others[0]}; expected a BERT ("model_type": "bert")')
        elif model_type != "bert":
            described = f"{model_type!r} ({', '.join(map(str, architectures))})" if architectures else repr(model_type)
            raise ValueError(f'model_type is {described}; expected "bert". Only BERT checkpoints can be read here.')

    def changed(self, **changes: Any) -> "BertConfig":
        """The same configuration with other values: fields, or what the heads read (num_labels, id2label, …).

        Raises TypeError for another name.
        """
        known = self._known()
        strange = sorted(changes.keys() - known - _OF_HEADS)
        if strange:
            raise TypeError(
                f"{strange[0]!r} is no part of the configuration; expected one of {', '.join(sorted(known | _OF_HEADS))}"
            )
        extra = {**self.extra, **{name: value for name, value in changes.items() if name in _OF_HEADS}}
        count = extra.pop("num_labels", None)
        if count is not None and "id2label" not in changes and (type(count) is not int or count != self.num_labels):
            if type(count) is not int or count < 1:
                raise ValueError(f"num_labels is {count!r}; expected an integer, at least 1")
            extra["id2label"] = {str(i): f"LABEL_{i}" for i in range(count)}
            extra["label2id"] = {f"LABEL_{i}": i for i in range(count)}
        return replace(self, **{name: value for name, value in changes.items() if name in known}, extra=extra)

    @property
    def num_labels(self) -> int:
        """Classes of a classifier: as many as id2label has names, else num_labels, else 2."""
        names = self.extra.get("id2label")
        return len(names) if names else int(self.extra.get("num_labels", 2))

    @property
    def problem_type(self) -> str | None:
        """What a classifier of sequences learns; None: its labels decide."""
        kind: str | None = self.extra.get("problem_type")
        return kind

    @property
    def classifier_dropout_prob(self) -> float:
        """Dropout before a classifier: classifier_dropout, or hidden_dropout_prob."""
        p = self.extra.get("classifier_dropout")
        return self.hidden_dropout_prob if p is None else float(p)

    @property
    def tie_word_embeddings(self) -> bool:
        """Whether the words' logits come from the word embeddings' matrix."""
        return bool(self.extra.get("tie_word_embeddings", True))

    @property
    def activation(self) -> str:
        """hidden_act under the name that fastbert.functional has for it."""
        return ACTIVATIONS[self.hidden_act]


def check_numbers(
    config: Any, integers: list[str], probabilities: list[str], epsilon: str, smallest: Mapping[str, int]
) -> None:
    """Raises ValueError for an attribute that is no integer of at least ``smallest`` (1), no probability, no epsilon."""
    for name in integers:
        value, least = _integer(config, name, "an integer"), smallest.get(name, 1)
        if value < least:
            raise ValueError(f"{name} is {value!r}; expected an integer, at least {least}")
        if value > _LARGEST:
            raise ValueError(f"{name} is {value!r}; expected at most {_LARGEST}")
    for name in probabilities:
        value = getattr(config, name)
        if not _is_number(value) or not 0.0 <= value < 1.0:
            raise ValueError(f"{name} is {value!r}; expected a probability, at least 0 and less than 1")
    value = getattr(config, epsilon)
    if not _is_number(value) or not value > 0.0:
        raise ValueError(f"{epsilon} is {value!r}; expected a positive, finite number")
    value = config.initializer_range
    if not _is_number(value) or not value >= 0.0:
        raise ValueError(f"initializer_range is {value!r}; expected a finite number, at least 0")


def _integer(config: Any, name: str, expected: str) -> int:
    value = getattr(config, name)
    try:
        integer = as_integer(name, value)
    except TypeError:
        raise ValueError(f"{name} is {value!r}; expected {expected}") from None
    object.__setattr__(config, name, integer)  # an int, where it was numpy's
    return integer


def _is_number(value: object) -> bool:
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an int above every float
        return False
