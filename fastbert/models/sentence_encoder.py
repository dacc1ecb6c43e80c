"""Text to embeddings: a tokenizer, a BERT, pooling and normalisation, from a sentence-transformers folder."""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

from fastbert.models import checkpoint
from fastbert.models.bert import BertModel
from fastbert.models.pooling import cls_pool, mean_pool, normalize
from fastbert.packing import PackedBatch, as_integer
from fastbert.tokenizer import WordPieceTokenizer

_POOLINGS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"mean": mean_pool, "cls": cls_pool}

# 1_Pooling/config.json names a pooling by a flag of its own, or newer by "pooling_mode".
_FLAGS = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}


@dataclass(frozen=True)
class _Recipe:
    """What a sentence-transformers folder says apart from weights and vocabulary."""

    model_folder: Path
    pooling: str = "mean"
    normalize: bool = False
    max_seq_length: int | None = None
    lowercase: bool = False
    prompt: str = ""


class SentenceEncoder:
    """Sentence embeddings, equal to sentence-transformers' and without any padding.

    Attributes:
        model: the BertModel.
        tokenizer: the WordPieceTokenizer.
        pooling: "mean" or "cls".
        normalize: whether embeddings have length 1 unless encode() is told otherwise.
        max_seq_length: tokens that a text is truncated to, special tokens included.
        prompt: what every text is preceded by.
    """

    def __init__(
        self,
        model: BertModel,
        tokenizer: WordPieceTokenizer,
        *,
        pooling: str = "mean",
        normalize: bool = False,
        max_seq_length: int | None = None,
        prompt: str = "",
    ) -> None:
        if pooling not in _POOLINGS:
            raise ValueError(f"pooling is {pooling!r}; expected one of {', '.join(_POOLINGS)}")
        limit = model.config.max_position_embeddings
        if max_seq_length is not None:
            max_seq_length = as_integer("max_seq_length", max_seq_length)
        if max_seq_length is not None and not 1 <= max_seq_length <= limit:
            raise ValueError(
                f"max_seq_length is {max_seq_length}; expected 1 to {limit}, the model's max_position_embeddings"
            )
        if len(tokenizer) > model.config.vocab_size:
            raise ValueError(
                f"the tokenizer has {len(tokenizer)} tokens, the model {model.config.vocab_size} (vocab_size); "
                "expected those of one checkpoint"
            )
        self.model = model
        self.tokenizer = tokenizer
        self.pooling = pooling
        self.normalize = normalize
        self.max_seq_length = limit if max_seq_length is None else max_seq_length
        self.prompt = prompt

    @classmethod
    def from_pretrained(
        cls,
        path_or_hub_id: str | os.PathLike[str],
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        revision: str | None = None,
        precision: str = "fp32",
    ) -> "SentenceEncoder":
        """Reads a sentence-transformers folder: a BERT, mean or cls pooling, and normalisation if it says so.

        A folder without modules.json is a plain BERT and gets mean pooling, as in sentence-transformers. The arguments
        and errors are those of BertModel.from_pretrained; also:

        Raises:
            ValueError: another kind of pooling, or a module behind it, such as Dense; named.
        """
        recipe = _read_recipe(checkpoint.find_folder(path_or_hub_id, revision))
        model = BertModel.from_pretrained(
            recipe.model_folder, dtype=dtype, device=device, add_pooling_layer=False, precision=precision
        )
        max_seq_length = recipe.max_seq_length
        if max_seq_length is not None:
            max_seq_length = min(max_seq_length, model.config.max_position_embeddings)
        return cls(
            model,
            _read_tokenizer(recipe),
            pooling=recipe.pooling,
            normalize=recipe.normalize,
            max_seq_length=max_seq_length,
            prompt=recipe.prompt,
        )

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def precision(self) -> str:
        """The model's, of inference; it may be set."""
        return self.model.precision

    @precision.setter
    def precision(self, precision: str) -> None:
        self.model.precision = precision

    def tokenize(self, texts: Sequence[str], *, max_length: int | None = None) -> PackedBatch:
        """The texts' ids as a packed batch on the CPU, truncated to max_length (max_seq_length unless given)."""
        texts = _checked(texts)
        limit = self.model.config.max_position_embeddings
        if max_length is None:
            max_length = self.max_seq_length
        elif as_integer("max_length", max_length) > limit:
            raise ValueError(f"max_length is {max_length}; the model takes at most {limit} (max_position_embeddings)")
        special = self.tokenizer.num_special_tokens_to_add()
        if max_length < special:
            raise ValueError(f"max_length is {max_length}; expected at least {special}, the number of special tokens")
        if self.prompt:
            texts = [self.prompt + text for text in texts]
        try:
            return self.tokenizer(
                texts, truncation=True, max_length=int(max_length), return_tensors="packed", return_token_type_ids=False
            )
        except TypeError:
            _check_unicode(texts)
            raise

    @torch.no_grad()
    def encode(
        self,
        texts: Sequence[str],
        *,
        batch_size: int = 32,
        normalize: bool | None = None,
        max_length: int | None = None,
    ) -> Tensor:
        """One embedding a text, in the order of the texts: float32 [n, hidden] on the model's device, without gradient.

        Args:
            texts: strings; none give [0, hidden].
            batch_size: a batch holds as many tokens as this many of the longest text; so memory is that of padded
                batches of this size, and short texts share a batch in greater numbers.
            normalize: whether embeddings get length 1; as the model's folder says unless given.
            max_length: tokens to truncate to, special tokens included; max_seq_length unless given.

        Raises:
            TypeError: texts is a single string or holds something else than strings; batch_size or max_length is no
                integer.
            ValueError: batch_size or max_length is out of range, or a text is no valid Unicode.
            RuntimeError: the model, or a part of it, is in training mode. As threads may share the model, its mode is
                not changed here.
        """
        for name, part in self.model.named_modules():
            if part.training:
                raise RuntimeError(
                    f"{f'model.{name}' if name else 'the model'} is in training mode, where embeddings would be "
                    "random; call model.eval() first"
                )
        batch_size = as_integer("batch_size", batch_size)
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; expected at least 1")
        tokens = self.tokenize(texts, max_length=max_length)
        lengths = tokens.host_lengths()
        embeddings = torch.empty(len(lengths), self.model.config.hidden_size, dtype=torch.float32, device=self.device)
        ids = tokens.split()
        for members in _batches(lengths, batch_size * tokens.max_seqlen):
            values = torch.cat([ids[i] for i in members])
            batch = PackedBatch.from_lengths(values, [lengths[i] for i in members])
            batch = batch.to(self.device, non_blocking=True)
            pooled = _POOLINGS[self.pooling](self.model(batch).last_hidden_state, batch.cu_seqlens)
            embeddings.index_copy_(0, torch.tensor(members).to(self.device, non_blocking=True), pooled.float())
        if self.normalize if normalize is None else normalize:
            embeddings = _normalized(embeddings)
        return embeddings

    def __repr__(self) -> str:
        config = self.model.config
        return (
            f"SentenceEncoder({config.num_hidden_layers} layers of {config.hidden_size}, {self.pooling} pooling, "
            f"normalize={self.normalize}, max_seq_length={self.max_seq_length}, {self.model.dtype} on {self.device})"
        )


def _normalized(embeddings: Tensor) -> Tensor:
    # encode()'s argument hides the function of that name.
    return normalize(embeddings)


def _checked(texts: Any) -> list[str]:
    """The texts as a list. Raises TypeError where they are no list of strings."""
    if isinstance(texts, str):
        raise TypeError("texts is a single string; expected a list of them: [text]")
    if isinstance(texts, bytes) or not isinstance(texts, Sequence | numpy.ndarray):
        raise TypeError(f"texts is of type {type(texts).__name__}; expected a list of strings")
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(
                f"texts[{i}] is {text!r:.60} of type {type(text).__name__}; a sentence encoder takes strings, no pairs"
            )
    return list(texts)


def _check_unicode(texts: list[str]) -> None:
    for i, text in enumerate(texts):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"texts[{i}] is {text!r:.60}, which is no valid Unicode: {error}") from None


def _read_tokenizer(recipe: _Recipe) -> WordPieceTokenizer:
    tokenizer = WordPieceTokenizer.from_pretrained(recipe.model_folder)
    return tokenizer.lowercased() if recipe.lowercase else tokenizer


def _batches(lengths: list[int], budget: int) -> Iterator[list[int]]:
    """The texts' numbers, longest first, cut into batches of at most ``budget`` tokens.

    Sorted, so that the first batch needs the most memory and the sequences of a batch cost about the same.
    """
    members: list[int] = []
    tokens = 0
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if members and tokens + lengths[i] > budget:
            yield members
            members, tokens = [], 0
        members.append(i)
        tokens += lengths[i]
    if members:
        yield members


def _read_recipe(folder: Path) -> _Recipe:
    modules_file = folder / "modules.json"
    if not modules_file.is_file():
        return _Recipe(folder)
    modules = checkpoint.read_json(modules_file)
    if not isinstance(modules, list) or not all(isinstance(module, dict) for module in modules):
        raise ValueError(f"{modules_file} is not a list of modules")
    kinds = [str(module.get("type", "")).rpartition(".")[2] for module in modules]
    if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        raise ValueError(
            f"{modules_file} lists the modules {', '.join(kinds)}; expected Transformer, Pooling and perhaps Normalize"
        )
    model_folder, pooling_folder = (_inside(folder, module, modules_file) for module in modules[:2])

    limits = _read_optional(model_folder / "sentence_bert_config.json")
    longest = limits.get("max_seq_length")
    if longest is not None and type(longest) is not int:
        raise ValueError(
            f"{model_folder / 'sentence_bert_config.json'}: max_seq_length is {longest!r}; expected an integer"
        )
    prompts_file = folder / "config_sentence_transformers.json"
    prompts = _read_optional(prompts_file)
    default_prompt = prompts.get("default_prompt_name")
    try:
        prompt = prompts["prompts"].get(default_prompt, "") if default_prompt and "prompts" in prompts else ""
    except (AttributeError, TypeError) as error:
        raise ValueError(f"{prompts_file} has no readable prompts: {error}") from error
    if not isinstance(prompt, str):
        raise ValueError(f"{prompts_file}: the prompt {default_prompt!r} is {prompt!r}; expected a string")
    return _Recipe(
        model_folder,
        _read_pooling(pooling_folder / checkpoint.CONFIG),
        "Normalize" in kinds,
        longest,
        bool(limits.get("do_lower_case", False)),
        prompt,
    )


def _inside(folder: Path, module: dict[str, Any], modules_file: Path) -> Path:
    path = folder / str(module.get("path", ""))
    if not path.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"{modules_file} names the path {module['path']!r}; expected one inside the folder")
    return path


def _read_optional(file: Path) -> dict[str, Any]:
    content = checkpoint.read_json(file) if file.is_file() else {}
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds a JSON {type(content).__name__}; expected an object")
    return content


def _read_pooling(file: Path) -> str:
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist, but modules.json asks for it")
    config = _read_optional(file)
    named = [config["pooling_mode"]] if isinstance(config.get("pooling_mode"), str) else config.get("pooling_mode")
    chosen = named or [kind for flag, kind in _FLAGS.items() if config.get(flag)]
    if len(chosen) != 1 or chosen[0] not in _POOLINGS:
        raise ValueError(f"{file} asks for {' and '.join(map(str, chosen)) or 'no'} pooling; expected mean or cls")
    if not config.get("include_prompt", True):
        raise ValueError(f"{file} leaves the prompt out of pooling (include_prompt is false), which is not supported")
    return chosen[0]
