"""``fastbert.optimize`` in a SentenceTransformer or CrossEncoder: the C++ tokenizer, and from texts to embeddings without padding.

What is optimized are the base models inside. On top of that, every WordPiece tokenizer that ours equals gives place to ours, and a
SentenceTransformer of a Transformer, a Pooling and what works on sentence embeddings gets a subclass, whose ``encode`` packs.
"""

import copy
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy
import sentence_transformers
import torch
from sentence_transformers import SentenceTransformer as _SentenceTransformer
from torch import Tensor, nn
from tqdm.autonotebook import trange
from transformers import PreTrainedTokenizerBase

from fastbert.integrations import packed
from fastbert.integrations.families import Unsupported
from fastbert.integrations.optimized import OptimizedBase
from fastbert.integrations.transformers import FastBertTokenizer
from fastbert.packing import PackedBatch
from fastbert.tokenizer import WordPieceTokenizer

# Batches whose texts are tokenized in one call, so that all threads have something to do.
_BATCHES_A_CALL = 16
# Modules that read and write the sentence embedding only.
_BEHIND_POOLING = {"Normalize", "Dense", "LayerNorm", "Dropout"}
# Texts in which tokenizers differ: cases, accents, scripts, what is no word, long words, special tokens.
_PROBES = (
    "",
    " ",
    "Hello World, this is a test of the Tokenizer's equality.",
    "Ünïcödé façade naïve Ångström İstanbul ﬁne ½ e\u0301 \u00ad\u200b\ufeff",
    "日本語のテキスト 中文字符 한국어 العربية हिन्दी ไทย русский Ελληνικά",
    "👍🏽 emoji \U0001f468\u200d\U0001f469\u200d\U0001f467 \u2028 tabs\tand\r\nnewlines\x00\x07\x7f",
    "[CLS] [MASK] [SEP] [UNK] [PAD] <s> </s> <mask> [mask] [unused1]",
    "antidisestablishmentarianism "
    + "x" * 99
    + " "
    + "y" * 101
    + " 3.14159e-10 $5,000.00 don't can't #hash @me a_b __init__",
    "word " * 700,
)


@dataclass
class Texts:
    """What was replaced in a SentenceTransformer.

    Attributes:
        calls: of encode, by how they were answered: "packed", or the reason why not.
    """

    calls: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class Pipeline:
    """How texts get into a model, for ``fastbert.report``.

    Attributes:
        path: of the module with the tokenizer, inside the reported one.
        tokenizer: "fastbert's", or why it is not.
        encode: "packed", or how many calls were not and why; "" where a padded batch goes into the model.
    """

    path: str
    tokenizer: str
    encode: str

    def __str__(self) -> str:
        return f"{self.path}: tokenizer: {self.tokenizer}" + (f"; encode: {self.encode}" if self.encode else "")


class SentenceTransformer(_SentenceTransformer):
    """A SentenceTransformer whose ``encode`` gives the model packed tokens wherever the result is what padded ones give."""

    _fastbert_texts: Texts

    def _inference(self, inputs: list[Any], **arguments: Any) -> Any:
        reason = _why_padded(self, inputs, arguments)
        if reason is None:
            try:
                embeddings = _encode(self, inputs, **arguments)
            except Unsupported as unsupported:
                reason = str(unsupported)
            else:
                self._fastbert_texts.calls["packed"] += 1
                return embeddings
        self._fastbert_texts.calls[reason] += 1
        return super()._inference(inputs, **arguments)


def prepare(model: nn.Module) -> tuple[Callable[[], None], list[str]]:
    """What :func:`fastbert.optimize` does with texts: a function that does it, and the reasons for what it does not do.

    Nothing is changed before the function is called, and then nothing can fail.

    Raises:
        ValueError: a module reads what the model makes of padding.
    """
    tokenizers: list[tuple[nn.Module, str, FastBertTokenizer]] = []
    reasons = []
    for path, module in _with_tokenizer(model):
        expansion = getattr(module, "query_expansion", None)
        if expansion is not None and not expansion["attend"]:
            raise ValueError(
                f"{path} has query_expansion with attend=False, which reads hidden states at padding, and packed models compute "
                "none there; use attend=True, or leave the model as it is"
            )
        try:
            tokenizers.append((module, *_replacement(module)))
        except Unsupported as reason:
            reasons.append(f"{path}: the tokenizer is not replaced: {reason}")
    encoders: list[Any] = []
    if hasattr(_SentenceTransformer, "_inference"):  # since sentence-transformers 6
        encoders = [module for module in model.modules() if type(module) is _SentenceTransformer]

    def apply() -> None:
        for module, name, tokenizer in tokenizers:
            module.__dict__["_fastbert_tokenizer"] = getattr(module, name)
            setattr(module, name, tokenizer)
        for encoder in encoders:
            encoder.__class__ = SentenceTransformer
            encoder.__dict__["_fastbert_texts"] = Texts()

    return apply, reasons


def restore(model: nn.Module) -> None:
    """Undoes :func:`prepare`: the tokenizers and classes that were there before. A max_seq_length set since stays."""
    for _, module in _with_tokenizer(model):
        original = module.__dict__.pop("_fastbert_tokenizer", None)
        name = _attribute(module)
        tokenizer = getattr(module, name)
        if original is not None and isinstance(tokenizer, FastBertTokenizer):
            original.model_max_length = tokenizer.model_max_length
            setattr(module, name, original)
    encoders: list[Any] = [module for module in model.modules() if type(module) is SentenceTransformer]
    for encoder in encoders:
        encoder.__class__ = _SentenceTransformer
        del encoder.__dict__["_fastbert_texts"]


def pipelines(model: nn.Module) -> list[Pipeline]:
    """How texts get into the models inside, for ``fastbert.report``."""
    found = []
    for path, module in _with_tokenizer(model):
        if isinstance(getattr(module, _attribute(module)), FastBertTokenizer):
            tokenizer = "fastbert's"
        else:
            try:
                _replacement(module)
                tokenizer = "as it was: fastbert.optimize was not called"
            except Unsupported as reason:
                tokenizer = f"as it was: {reason}"
        holder: Any = model.get_submodule(path.rpartition(".")[0])
        calls = holder._fastbert_texts.calls if isinstance(holder, SentenceTransformer) else {}
        counts = ", ".join(
            f"{count} calls {'' if how == 'packed' else 'padded: '}{how}" for how, count in calls.items()
        )
        found.append(Pipeline(path or "the model", tokenizer, counts))
    return found


def _with_tokenizer(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """sentence-transformers' modules that hold a tokenizer and a model of transformers, with their paths."""
    return [
        (path, module)
        for path, module in model.named_modules()
        if type(module).__name__ == "Transformer" and type(module).__module__.startswith("sentence_transformers.")
    ]


def _attribute(module: nn.Module) -> str:
    return "processor" if hasattr(module, "processor") else "tokenizer"


def _replacement(module: nn.Module) -> tuple[str, FastBertTokenizer]:
    """The name under which a module holds its tokenizer, and ours that equals it. Raises Unsupported if there is none."""
    name = _attribute(module)
    tokenizer = getattr(module, name)
    if not isinstance(tokenizer, PreTrainedTokenizerBase) or not hasattr(tokenizer, "backend_tokenizer"):
        raise Unsupported(f"it is a {type(tokenizer).__name__}")
    kind = type(tokenizer.backend_tokenizer.model).__name__
    if kind != "WordPiece":
        raise Unsupported(f"it is a {kind} tokenizer; fastbert has WordPiece")
    tokenizer = copy.deepcopy(tokenizer)  # calls leave their padding and truncation behind, which are then saved
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        try:
            ours = FastBertTokenizer.from_pretrained(folder)
        except (ValueError, TypeError, NotImplementedError, OSError) as error:
            raise Unsupported(f"fastbert's cannot be made of it: {error}") from error
    ours.name_or_path = tokenizer.name_or_path
    difference = _difference(ours, tokenizer)
    if difference is not None:
        raise Unsupported(f"fastbert's differs from it in {difference}")
    return name, ours


def _difference(ours: Any, theirs: Any) -> str | None:
    """What two tokenizers differ in, or None. They are asked, not read: files and settings have more ways than can be listed."""
    for name in ("model_max_length", "padding_side", "truncation_side", "model_input_names", "special_tokens_map"):
        if getattr(ours, name) != getattr(theirs, name):
            return name
    if len(ours) != len(theirs) or ours.get_vocab() != theirs.get_vocab():
        return "its vocabulary"
    words = sorted(theirs.get_vocab())
    texts = [
        *_PROBES,
        " ".join(words[:: max(1, len(words) // 400)]),
        *(f"a{token}b {token} C" for token in theirs.get_added_vocab()),
    ]
    for arguments in ({}, {"max_length": 12}):
        for pairs in ([], [texts[::-1]]):
            found, expected = (
                tokenizer(texts, *pairs, padding=True, truncation="longest_first", **arguments)
                for tokenizer in (ours, theirs)
            )
            for key in expected:
                if key not in found or found[key] != expected[key]:
                    return f"{key} of a text"
    return None


def _why_padded(model: SentenceTransformer, inputs: list[Any], arguments: dict[str, Any]) -> str | None:
    """Why a call of encode is sentence-transformers' to answer; None if it can be packed."""
    if arguments.get("output_value") != "sentence_embedding":
        return f"output_value is {arguments.get('output_value')!r}"
    further = set(arguments) - {
        *(
            "prompt",
            "batch_size",
            "show_progress_bar",
            "output_value",
            "save_to_cpu",
            "normalize_embeddings",
            "truncate_dim",
        ),
        *("device", "task"),
    }
    if further:
        return f"arguments {', '.join(sorted(further))}"
    if not all(isinstance(text, str) for text in inputs):
        return "inputs that are no strings"
    transformer: Any
    transformer, *behind = model.children()
    if type(transformer).__name__ != "Transformer" or not isinstance(transformer.model, OptimizedBase):
        return "the first module holds no optimized base model"
    base: Any = transformer.model
    if not isinstance(getattr(transformer, "processor", None), FastBertTokenizer):
        return "the tokenizer is not fastbert's"
    kinds = [type(module).__name__ for module in behind]
    if not kinds or kinds[0] != "Pooling" or not _BEHIND_POOLING.issuperset(kinds[1:]):
        return f"modules {', '.join(kinds)} behind the model"
    if not hasattr(behind[0], "_forward_flattened"):
        return f"sentence-transformers {sentence_transformers.__version__} pools no packed tokens"
    if arguments.get("prompt") and not behind[0].include_prompt:
        return "pooling without the prompt"
    modality = transformer.modality_config.get("text", {})
    if (
        set(transformer.modality_config) != {"text"}
        or (modality.get("method"), modality.get("method_output_name")) != ("forward", "last_hidden_state")
        or transformer.module_output_name != "token_embeddings"
        or base.config.output_hidden_states
    ):
        return "other outputs than the last hidden state"
    for name in ("processing_kwargs", "query_length", "document_length", "query_expansion"):
        if getattr(transformer, name, None):
            return name
    for module in (model, transformer, base):
        if module._forward_hooks or module._forward_pre_hooks or module._compiled_call_impl is not None:
            return f"{type(module).__name__} has hooks or is compiled"
    return None


def _encode(
    model: SentenceTransformer,
    inputs: list[str],
    *,
    prompt: str | None,
    batch_size: int,
    show_progress_bar: bool,
    save_to_cpu: bool,
    normalize_embeddings: bool,
    truncate_dim: int | None,
    device: Any = None,
    **_: Any,
) -> Tensor:
    """Sentence embeddings in the order of the texts, in sentence-transformers' batches: of batch_size texts, sorted by length."""
    device = model._resolve_inference_device(device)
    if any(module.training for module in model.modules()):
        model.eval()
    transformer: Any
    transformer, *behind = model.children()
    tokenizer: WordPieceTokenizer = transformer.processor.fastbert_tokenizer
    order = numpy.argsort([-len(text) for text in inputs])
    embeddings = []
    with torch.inference_mode():
        for start in trange(0, len(inputs), batch_size, desc="Batches", disable=not show_progress_bar):
            position = start // batch_size % _BATCHES_A_CALL * batch_size
            if position == 0:
                texts = [(prompt or "") + inputs[i] for i in order[start : start + batch_size * _BATCHES_A_CALL]]
                tokens = tokenizer(texts, truncation=True, return_tensors="packed", return_token_type_ids=False)
                lengths, ids = tokens.host_lengths(), tokens.split()
            batch = PackedBatch.from_lengths(
                torch.cat(ids[position : position + batch_size]), lengths[position : position + batch_size]
            ).to(device, non_blocking=True)
            hidden = packed.encode(transformer.model, batch)
            features: dict[str, Any] = {
                "token_embeddings": hidden[None],
                "cu_seq_lens_q": batch.cu_seqlens,
                "modality": "text",
            }
            for module in behind:
                features = module(features)
            embedding = features["sentence_embedding"]
            if truncate_dim is not None:
                embedding = sentence_transformers.util.truncate_embeddings(embedding, truncate_dim)
            if normalize_embeddings:
                embedding = torch.nn.functional.normalize(embedding, p=2, dim=1)
            embeddings.append(embedding.cpu() if save_to_cpu else embedding)
        if not embeddings:
            return torch.tensor([], device=device)
        in_batches = torch.cat(embeddings)
        return in_batches[torch.from_numpy(numpy.argsort(order)).to(in_batches.device)]
