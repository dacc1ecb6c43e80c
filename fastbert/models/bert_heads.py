"""BERT with a head: pre-training, fill-mask, classification, tagging, question answering, next sentence.

Every model takes what BertModel takes, padded or packed, and labels. What stands on padding is no token: it has no loss, whatever
its label, and its logits are 0 (question answering: the dtype's least number, so that no answer begins there).
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as TF

from fastbert import functional as F
from fastbert.models import bert_names
from fastbert.models.bert import BertModel
from fastbert.models.config import BertConfig
from fastbert.models.pretrained import PretrainedModel, Stored, Table, exportable, linear_or_norm
from fastbert.nn import LayerNorm, initialize
from fastbert.nn._modules import product
from fastbert.ops.pack import pack_rows
from fastbert.packing import PackedBatch, check_tensor, unpack

IGNORED = -100  # the label of a token that has none


@exportable
class HeadOutput(NamedTuple):
    """What a model with one head returns."""

    loss: Tensor | None  # scalar, float32; None without labels
    logits: Tensor | None  # see the model


@exportable
class PreTrainingOutput(NamedTuple):
    loss: Tensor | None  # scalar, float32: the sum of both losses; None without both labels
    prediction_logits: Tensor | None  # [batch, seq, vocab_size], packed: [total, vocab_size]
    seq_relationship_logits: Tensor  # [batch, 2]: whether the second part follows the first (class 0), or not (class 1)


@exportable
class QuestionAnsweringOutput(NamedTuple):
    loss: Tensor | None  # scalar, float32: the mean of the losses of start and end; None without both positions
    start_logits: Tensor  # [batch, seq], packed: [total]
    end_logits: Tensor  # [batch, seq], packed: [total]


class BertWithHead(PretrainedModel):
    """A BertModel, ``bert``, and something on top of it; what the heads share."""

    uses_pooler = False
    _head_prefixes: tuple[str, ...] = ()

    def __init__(self, config: BertConfig, *, precision: str = "fp32") -> None:
        super().__init__()
        self.config = config
        self.bert = BertModel(config, self.uses_pooler, precision=precision)

    @classmethod
    def from_pretrained(
        cls,
        path_or_hub_id: str | os.PathLike[str],
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        revision: str | None = None,
        precision: str = "fp32",
        **changes: Any,
    ) -> Self:
        """Reads a Hugging Face checkpoint of a BERT, in evaluation mode; arguments and errors as BertModel.from_pretrained.

        A head that the checkpoint does not have starts with random weights, and a warning says so.

        Args:
            changes: to the configuration: fields of BertConfig, or num_labels, id2label, label2id, problem_type,
                classifier_dropout.
        """
        return cls._load(path_or_hub_id, dtype, device, revision, changes, precision=precision)

    @classmethod
    def _config_from(cls, values: Mapping[str, Any]) -> BertConfig:
        return BertConfig.from_dict(values)

    @classmethod
    def _table(cls, config: BertConfig, **arguments: Any) -> Table:
        table = bert_names.name_table(config.num_hidden_layers, False)
        # A base model's checkpoint has these names too, without the prefix; `canonical` takes it away.
        return {f"bert.{ours}": stored for ours, stored in table.items()}

    @classmethod
    def _head_table(cls, config: BertConfig) -> Table:
        return linear_or_norm("bert.pooler.dense", "pooler.dense") if cls.uses_pooler else {}

    @classmethod
    def _canonical(cls, in_files: list[str], folder: Path) -> dict[str, str]:
        return bert_names.canonical(in_files, folder, cls._head_prefixes)

    @classmethod
    def _is_known(cls, name: str, **arguments: Any) -> bool:
        return name.startswith(("pooler.", "cls."))  # of other heads; a tied matrix stored twice

    def to_checkpoint(self) -> dict[str, Tensor]:
        parts = ("embeddings.", "encoder.", "pooler.")
        return {
            f"bert.{name}" if name.startswith(parts) else name: tensor
            for name, tensor in super().to_checkpoint().items()
        }

    @property
    def precision(self) -> str:
        return self.bert.precision

    @precision.setter
    def precision(self, precision: str) -> None:
        self.bert.precision = precision

    def _start(self) -> None:
        """Initial values of everything; last in a constructor."""
        initialize(self, self.config.initializer_range)

    def _encode(self, *inputs: Any) -> tuple[PackedBatch, Tensor, Tensor | None]:
        """The packed batch, its hidden states [total, hidden], and the pooler's vectors [batch, hidden]."""
        batch = self.bert.packed(*inputs)
        output = self.bert(batch)
        return batch, output.last_hidden_state, output.pooler_output

    def _dropped(self, x: Tensor) -> Tensor:
        """Dropout before a classifier."""
        return TF.dropout(x, self.config.classifier_dropout_prob, self.training)


class MaskedLMHead(nn.Module):
    """Hidden states to one logit for each word: linear, activation, layer norm, and the word embeddings' matrix."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.activation = config.activation
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.norm = LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))
        self.weight = (
            None if config.tie_word_embeddings else nn.Parameter(torch.empty(config.vocab_size, config.hidden_size))
        )
        if self.weight is not None:
            nn.init.normal_(self.weight, std=config.initializer_range)

    @staticmethod
    def names(config: BertConfig) -> Table:
        theirs = "cls.predictions"
        table = {
            **linear_or_norm("head.dense", f"{theirs}.transform.dense"),
            **linear_or_norm("head.norm", f"{theirs}.transform.LayerNorm"),
        }
        if config.tie_word_embeddings:
            return {**table, "head.bias": Stored((f"{theirs}.bias",))}
        return {**table, **linear_or_norm("head", f"{theirs}.decoder")}  # there the bias is the decoder's own

    def forward(self, hidden: Tensor, word_weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What ``logits`` and ``loss`` take: the vectors [total, hidden], the matrix [vocab_size, hidden] and the bias."""
        x = self.norm(product(self.dense, hidden, self.activation))
        return x, word_weight if self.weight is None else self.weight, self.bias


def _masked_lm(
    head: MaskedLMHead,
    bert: BertModel,
    batch: PackedBatch,
    hidden: Tensor,  # [total, hidden]
    labels: Tensor | None,
    return_logits: bool | None,
) -> tuple[Tensor | None, Tensor | None]:
    """Loss and logits, the latter as the batch came."""
    word_weight = bert.embeddings.word.weight
    targets = None if labels is None else token_labels(batch, labels, "labels")
    with_logits = targets is None or not head.training if return_logits is None else return_logits
    if with_logits:
        x, weight, bias = head(hidden, word_weight)
        logits = F.linear_act(x, weight, bias)
        loss = None if targets is None else F.cross_entropy(logits, targets)
        return loss, as_it_came(batch, logits)
    if targets is None:
        return None, None
    if (
        hidden.is_cpu and not torch.compiler.is_compiling()
    ):  # elsewhere the number of rows would have to come to the host
        labelled = (targets != IGNORED).nonzero().squeeze(1)
        hidden, targets = hidden.index_select(0, labelled), targets.index_select(0, labelled)
    x, weight, bias = head(hidden, word_weight)
    return F.linear_cross_entropy(x, weight, targets, bias), None


class BertForMaskedLM(BertWithHead):
    """Fill-mask, and pre-training with masked tokens alone (Liu et al. 2019)."""

    architecture = "BertForMaskedLM"
    _head_prefixes = ("cls.predictions.",)

    def __init__(self, config: BertConfig, *, precision: str = "fp32") -> None:
        super().__init__(config, precision=precision)
        self.head = MaskedLMHead(config)
        self._start()

    @classmethod
    def _head_table(cls, config: BertConfig) -> Table:
        return MaskedLMHead.names(config)

    def forward(
        self,
        input_ids: Tensor | PackedBatch,  # int [batch, seq], or a packed batch of ids [total]
        attention_mask: Tensor | None = None,  # [batch, seq]
        token_type_ids: Tensor | None = None,  # int [batch, seq]
        position_ids: Tensor | None = None,  # int [batch, seq]
        labels: Tensor | None = None,  # int64 [batch, seq], packed: [total]; -100: none
        *,
        return_logits: bool | None = None,
    ) -> HeadOutput:
        """The mean cross-entropy over tokens with a label, and logits [batch, seq, vocab_size], packed [total, vocab_size].

        In training with labels the logits do not exist, and only tokens with a label reach the head; ``return_logits`` decides
        otherwise. Raises as BertModel.forward; IndexError for a label outside the vocabulary.
        """
        batch, hidden, _ = self._encode(input_ids, attention_mask, token_type_ids, position_ids)
        return HeadOutput(*_masked_lm(self.head, self.bert, batch, hidden, labels, return_logits))


class BertForPreTraining(BertWithHead):
    """Masked tokens and next sentence, as BERT was made (Devlin et al. 2019)."""

    architecture = "BertForPreTraining"
    uses_pooler = True
    _head_prefixes = ("cls.",)

    def __init__(self, config: BertConfig, *, precision: str = "fp32") -> None:
        super().__init__(config, precision=precision)
        self.head = MaskedLMHead(config)
        self.seq_relationship = nn.Linear(config.hidden_size, 2)
        self._start()

    @classmethod
    def _head_table(cls, config: BertConfig) -> Table:
        return {
            **super()._head_table(config),
            **MaskedLMHead.names(config),
            **linear_or_norm("seq_relationship", "cls.seq_relationship"),
        }

    def forward(
        self,
        input_ids: Tensor | PackedBatch,  # int [batch, seq], or a packed batch of ids [total]
        attention_mask: Tensor | None = None,  # [batch, seq]
        token_type_ids: Tensor | None = None,  # int [batch, seq]
        position_ids: Tensor | None = None,  # int [batch, seq]
        labels: Tensor | None = None,  # int64 [batch, seq], packed: [total]; -100: none
        next_sentence_label: Tensor | None = None,  # int64 [batch]
        *,
        return_logits: bool | None = None,
    ) -> PreTrainingOutput:
        """See BertForMaskedLM for labels and logits."""
        batch, hidden, pooled = self._encode(input_ids, attention_mask, token_type_ids, position_ids)
        loss, logits = _masked_lm(self.head, self.bert, batch, hidden, labels, return_logits)
        assert pooled is not None
        relationship = product(self.seq_relationship, pooled)
        if next_sentence_label is None:
            loss = None
        elif loss is not None:
            loss = loss + F.cross_entropy(
                relationship, _sequence_labels(batch, next_sentence_label, "next_sentence_label")
            )
        return PreTrainingOutput(loss, logits, relationship)


class BertForNextSentencePrediction(BertWithHead):
    """Whether the second part of a pair follows the first."""

    architecture = "BertForNextSentencePrediction"
    uses_pooler = True
    _head_prefixes = ("cls.seq_relationship.",)

    def __init__(self, config: BertConfig, *, precision: str = "fp32") -> None:
        super().__init__(config, precision=precision)
        self.seq_relationship = nn.Linear(config.hidden_size, 2)
        self._start()

    @classmethod
    def _head_table(cls, config: BertConfig) -> Table:
        return {**super()._head_table(config), **linear_or_norm("seq_relationship", "cls.seq_relationship")}

    def forward(
        self,
        input_ids: Tensor | PackedBatch,  # int [batch, seq], or a packed batch of ids [total]
        attention_mask: Tensor | None = None,  # [batch, seq]
        token_type_ids: Tensor | None = None,  # int [batch, seq]
        position_ids: Tensor | None = None,  # int [batch, seq]
        labels: Tensor | None = None,  # int64 [batch]: 0 follows, 1 does not
    ) -> HeadOutput:
        """Logits [batch, 2]."""
        batch, _, pooled = self._encode(input_ids, attention_mask, token_type_ids, position_ids)
        assert pooled is not None
        logits = product(self.seq_relationship, pooled)
        loss = None if labels is None else F.cross_entropy(logits, _sequence_labels(batch, labels, "labels"))
        return HeadOutput(loss, logits)


class BertForSequenceClassification(BertWithHead):
    """One label, several, or numbers for each sequence.

    config.problem_type is "regression", "single_label_classification" or "multi_label_classification"; unless it is given, one
    label is a regression, and with more the dtype of the labels decides: integers are classes.
    """

    architecture = "BertForSequenceClassification"
    uses_pooler = True
    _head_prefixes = ("classifier.",)

    def __init__(self, config: BertConfig, *, precision: str = "fp32") -> None:
        super().__init__(config, precision=precision)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self._start()

    @classmethod
    def _head_table(cls, config: BertConfig) -> Table:
        return {**super()._head_table(config), **linear_or_norm("classifier", "classifier")}

    def forward(
        self,
        input_ids: Tensor | PackedBatch,  # int [batch, seq], or a packed batch of ids [total]
        attention_mask: Tensor | None = None,  # [batch, seq]
        token_type_ids: Tensor | None = None,  # int [batch, seq]
        position_ids: Tensor | None = None,  # int [batch, seq]
        labels: Tensor | None = None,  # int64 [batch]; regression and several labels: [batch, num_labels]
    ) -> HeadOutput:
        """Logits [batch, num_labels]. The labels of a regression with one number may be [batch]."""
        batch, _, pooled = self._encode(input_ids, attention_mask, token_type_ids, position_ids)
        assert pooled is not None
        logits = product(self.classifier, self._dropped(pooled))
        return HeadOutput(None if labels is None else self._loss(batch, logits, labels), logits)

    def _loss(self, batch: PackedBatch, logits: Tensor, labels: Tensor) -> Tensor:
        check_tensor("labels", labels, "[batch] or [batch, num_labels]")
        kind = self.config.problem_type
        if kind is None:
            kind = "multi_label_classification" if labels.is_floating_point() else "single_label_classification"
            kind = "regression" if self.config.num_labels == 1 else kind
        if kind == "single_label_classification":
            return F.cross_entropy(logits, _sequence_labels(batch, labels, "labels"))
        expected = list(logits.shape)
        if list(labels.shape) != expected and not (expected[1] == 1 and list(labels.shape) == expected[:1]):
            raise ValueError(
                f"labels has shape {list(labels.shape)}; expected {expected} for a {kind.replace('_', ' ')}"
            )
        wide = logits if logits.dtype == torch.float64 else logits.float()
        targets = labels.reshape(expected).to(wide.dtype)
        if kind == "regression":
            return TF.mse_loss(wide, targets)
        return TF.binary_cross_entropy_with_logits(wide, targets)


class BertForTokenClassification(BertWithHead):
    """A label for each token: named entities, parts of speech."""

    architecture = "BertForTokenClassification"
    _head_prefixes = ("classifier.",)

    def __init__(self, config: BertConfig, *, precision: str = "fp32") -> None:
        super().__init__(config, precision=precision)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self._start()

    @classmethod
    def _head_table(cls, config: BertConfig) -> Table:
        return linear_or_norm("classifier", "classifier")

    def forward(
        self,
        input_ids: Tensor | PackedBatch,  # int [batch, seq], or a packed batch of ids [total]
        attention_mask: Tensor | None = None,  # [batch, seq]
        token_type_ids: Tensor | None = None,  # int [batch, seq]
        position_ids: Tensor | None = None,  # int [batch, seq]
        labels: Tensor | None = None,  # int64 [batch, seq], packed: [total]; -100: none
    ) -> HeadOutput:
        """Logits [batch, seq, num_labels], packed [total, num_labels]."""
        batch, hidden, _ = self._encode(input_ids, attention_mask, token_type_ids, position_ids)
        logits = product(self.classifier, self._dropped(hidden))
        loss = None if labels is None else F.cross_entropy(logits, token_labels(batch, labels, "labels"))
        return HeadOutput(loss, as_it_came(batch, logits))


class BertForQuestionAnswering(BertWithHead):
    """Where in a text the answer begins and where it ends.

    Unlike transformers' own, padding takes no part in the softmax over positions: on a padded batch the loss is that of each text
    alone.
    """

    architecture = "BertForQuestionAnswering"
    _head_prefixes = ("qa_outputs.",)

    def __init__(self, config: BertConfig, *, precision: str = "fp32") -> None:
        super().__init__(config, precision=precision)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self._start()

    @classmethod
    def _head_table(cls, config: BertConfig) -> Table:
        return linear_or_norm("qa_outputs", "qa_outputs")

    def forward(
        self,
        input_ids: Tensor | PackedBatch,  # int [batch, seq], or a packed batch of ids [total]
        attention_mask: Tensor | None = None,  # [batch, seq]
        token_type_ids: Tensor | None = None,  # int [batch, seq]
        position_ids: Tensor | None = None,  # int [batch, seq]
        start_positions: Tensor | None = None,  # int64 [batch]; outside the text: no answer here, no loss
        end_positions: Tensor | None = None,  # int64 [batch]
    ) -> QuestionAnsweringOutput:
        """A logit for each token to be the first, and to be the last, of the answer."""
        batch, hidden, _ = self._encode(input_ids, attention_mask, token_type_ids, position_ids)
        logits = product(self.qa_outputs, hidden)  # [total, 2]
        least = torch.finfo(logits.dtype).min
        padded = unpack(batch, logits, padding_value=least)  # [batch, seq, 2]
        loss = None
        if start_positions is not None and end_positions is not None:
            losses = [
                self._loss(padded[..., i], _sequence_labels(batch, positions, name))
                for i, (name, positions) in enumerate(
                    (("start_positions", start_positions), ("end_positions", end_positions))
                )
            ]
            loss = (losses[0] + losses[1]) / 2
        start, end = (logits if batch.padded_shape is None else padded).unbind(-1)
        return QuestionAnsweringOutput(loss, start, end)

    @staticmethod
    def _loss(logits: Tensor, positions: Tensor) -> Tensor:
        seq = logits.shape[1]
        return F.cross_entropy(logits.contiguous(), positions.clamp(0, seq), ignore_index=seq)


def token_labels(batch: PackedBatch, labels: Tensor, name: str) -> Tensor:
    """[total] from labels as the batch came."""
    expected = [batch.total] if batch.padded_shape is None else list(batch.padded_shape)
    _check_labels(batch, labels, name, expected)
    flat = labels.reshape(-1).to(torch.int64)
    return flat if batch.indices is None else pack_rows(flat, batch.indices)


def _sequence_labels(batch: PackedBatch, labels: Tensor, name: str) -> Tensor:
    """[batch]; transformers takes [batch, 1] too."""
    check_tensor(name, labels, "int64 [batch]")
    labels = labels.squeeze(1) if labels.dim() == 2 and labels.shape[1] == 1 else labels
    _check_labels(batch, labels, name, [len(batch)])
    return labels.to(torch.int64)


def _check_labels(batch: PackedBatch, labels: Tensor, name: str, expected: list[int]) -> None:
    check_tensor(name, labels, f"int64 {expected}")
    if labels.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{name} is {labels.dtype}; expected int64")
    if list(labels.shape) != expected:
        raise ValueError(f"{name} has shape {list(labels.shape)}; expected {expected}")
    if labels.device != batch.device:
        raise ValueError(f"{name} is on {labels.device}, the batch on {batch.device}; move one of them")


def as_it_came(batch: PackedBatch, values: Tensor) -> Tensor:
    """Values [total, ...] padded again where the batch was."""
    return values if batch.padded_shape is None else unpack(batch, values)
