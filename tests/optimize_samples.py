"""Tiny models of every family that ``fastbert.optimize`` takes, with and without heads, and inputs for them."""

import importlib
import inspect

import torch
from transformers import PreTrainedModel

import fastbert
from fastbert.integrations.families import FAMILIES

FAMILY = {family.name: family for family in FAMILIES}
_SIZES = dict(vocab_size=60, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=32, pad_token_id=1)
_WIDTHS = dict(hidden_size=16, intermediate_size=24, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
_OF_FAMILY = {
    "ELECTRA": dict(embedding_size=8, summary_last_dropout=0.0),
    "ALBERT": dict(embedding_size=8, num_hidden_layers=3, num_hidden_groups=1, inner_group_num=1),
    "ERNIE": dict(use_task_id=True, task_type_vocab_size=3),
    "GPT-2": dict(
        n_inner=24, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, summary_first_dropout=0.0, hidden_dropout=0.0
    ),
    "DistilBERT": dict(
        dim=16, hidden_dim=24, dropout=0.0, attention_dropout=0.0, seq_classif_dropout=0.0, qa_dropout=0.0
    ),
}


def config(family: str, **changes):
    module = importlib.import_module(f"transformers.models.{FAMILY[family].module}")
    values = dict(_SIZES)
    values |= {"hidden_size": 16} if family in ("GPT-2", "DistilBERT") else _WIDTHS
    if family == "ALBERT":
        values["classifier_dropout_prob"] = 0.0
    values |= _OF_FAMILY.get(family, {}) | changes
    if family == "DistilBERT":
        values.pop("hidden_size")
    return getattr(module, f"{FAMILY[family].prefix}Config")(**values)


def classes(family: str) -> list[type]:
    """The base model's class and those of all heads."""
    modeling = importlib.import_module(FAMILY[family].modeling)
    return [
        cls
        for name, cls in vars(modeling).items()
        if inspect.isclass(cls)
        and issubclass(cls, PreTrainedModel)
        and cls.__module__ == FAMILY[family].modeling
        and not name.endswith("PreTrainedModel")
    ]


def make(cls: type, **changes) -> PreTrainedModel:
    """A model with random weights, none of them 0 or 1 where a head or a norm starts so."""
    family = next(name for name, family in FAMILY.items() if family.modeling == cls.__module__)
    changes |= {"num_labels": 3} if "Classification" in cls.__name__ else {}
    if cls.__name__.endswith("CausalLM") or cls.__name__ == "BertLMHeadModel":
        changes |= {"is_decoder": True}
    torch.manual_seed(0)
    model = cls(config(family, **changes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.3)
    return model.eval()


def inputs(model: PreTrainedModel, padding: str = "right", labels: bool = True) -> dict[str, torch.Tensor]:
    """Three sequences of up to 9 tokens and what the model's head takes as labels, which say nothing of padding."""
    generator = torch.Generator().manual_seed(1)
    batch, seq, vocabulary = 3, 9, model.config.vocab_size
    name = type(model).__name__
    ids = torch.randint(4, vocabulary, (batch, seq), generator=generator)
    mask = torch.ones_like(ids)
    for row, length in enumerate([seq, 4, 1] if padding != "none" else [seq] * batch):
        if padding == "left":
            mask[row, : seq - length] = 0
        else:
            mask[row, length:] = 0
    ids[mask == 0] = 1
    given = {"input_ids": ids, "attention_mask": mask}
    parameters = inspect.signature(type(model).forward).parameters
    if "token_type_ids" in parameters and not name.startswith(("Roberta", "XLMRoberta", "Camembert")):
        given["token_type_ids"] = torch.randint(0, 2, (batch, seq), generator=generator) * mask
    if "MultipleChoice" in name:
        given = {key: torch.stack((value, value.flip(0)), 1) for key, value in given.items()}
    if not labels:
        return given
    if "QuestionAnswering" in name:
        given |= {"start_positions": mask.argmax(1), "end_positions": mask.argmax(1)}
    elif name.endswith(("SequenceClassification", "MultipleChoice", "NextSentencePrediction")):
        given["labels"] = torch.tensor([0, 1, 0])
    elif name == "ElectraForPreTraining":
        given["labels"] = torch.randint(0, 2, (batch, seq), generator=generator)
    elif "labels" in parameters:
        limit = 3 if "TokenClassification" in name else vocabulary
        given["labels"] = torch.randint(0, limit, (batch, seq), generator=generator).masked_fill(mask == 0, -100)
    for other in ("next_sentence_label", "sentence_order_label"):
        if other in parameters:
            given[other] = torch.tensor([0, 1, 0])
    return given


def calls(model) -> dict[str, int]:
    """How the first optimized model's calls were answered."""
    return fastbert.report(model).replaced[0].calls


def logits(model, given):
    with torch.no_grad():
        return model(**given).logits


def assert_close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
