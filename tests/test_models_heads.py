"""BERT's heads against transformers: logits, losses, gradients, folders both ways."""

import warnings

import pytest
import torch

from fastbert import models
from fastbert.models import BertConfig
from fastbert.packing import pack
from tests.bert_samples import MASKS, VOCABULARY, batch, saved_bert, small_config

transformers = pytest.importorskip("transformers")

HEADS = [
    "BertForPreTraining",
    "BertForMaskedLM",
    "BertForNextSentencePrediction",
    "BertForSequenceClassification",
    "BertForTokenClassification",
    "BertForQuestionAnswering",
]
PER_TOKEN = {"BertForMaskedLM", "BertForTokenClassification"}
LABELS = 5


def labels_of(name):
    return 2 if name == "BertForQuestionAnswering" else LABELS


def random_head(name, **changes):
    torch.manual_seed(0)
    model = getattr(transformers, name)(small_config(num_labels=labels_of(name), **changes))
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            parameter.normal_(1.0 if "LayerNorm.weight" in key else 0.0, 0.2)
    return model.eval()


def pair(name, folder, dtype=torch.float64, **changes):
    theirs = random_head(name, **changes).to(dtype)
    theirs.save_pretrained(folder)
    return getattr(models, name).from_pretrained(folder), theirs


def labels_for(name, mask):
    """Keyword arguments, the same for both libraries; tokens off the mask have no label."""
    generator = torch.Generator().manual_seed(2)

    def tokens(limit):
        labels = torch.randint(limit, mask.shape, generator=generator)
        chosen = (torch.rand(mask.shape, generator=generator) < 0.6) & mask.bool()
        return labels.masked_fill(~chosen, -100)

    rows = torch.tensor([1, 0, 1])
    return {
        "BertForPreTraining": lambda: {"labels": tokens(VOCABULARY), "next_sentence_label": rows},
        "BertForMaskedLM": lambda: {"labels": tokens(VOCABULARY)},
        "BertForNextSentencePrediction": lambda: {"labels": rows},
        "BertForSequenceClassification": lambda: {"labels": torch.tensor([3, 0, 4])},
        "BertForTokenClassification": lambda: {"labels": tokens(LABELS)},
        "BertForQuestionAnswering": lambda: {
            "start_positions": torch.tensor([0, 2, 9]),
            "end_positions": torch.tensor([8, 3, 50]),
        },
    }[name]()


def masks_for(name):
    # transformers' poolers read column 0, and its answers' softmax counts padding.
    return ["all"] if name == "BertForQuestionAnswering" else ["right"] if name not in PER_TOKEN else sorted(MASKS)


def results(output):
    return [value for value in output[1:] if value is not None]


@pytest.mark.parametrize(
    "name, mask_name", [(name, mask) for name in HEADS for mask in masks_for(name)], ids=lambda value: value
)
def test_equals_transformers(tmp_path, name, mask_name):
    ours, theirs = pair(name, tmp_path)
    ids, mask, types = batch(mask_name)
    labels = labels_for(name, mask)
    actual, expected = ours(ids, mask, types, **labels), theirs(ids, mask, types, **labels, return_dict=False)
    # Losses are float32 inside the one, float64 in the other.
    torch.testing.assert_close(actual.loss, expected[0], rtol=1e-5, atol=0, check_dtype=False)
    real = mask.bool()
    for ours_of, theirs_of in zip(results(actual), expected[1:], strict=True):
        if ours_of.shape[:2] == mask.shape:
            assert not ours_of[~real].any(), "padded positions are not zero"
            ours_of, theirs_of = ours_of[real], theirs_of[real]
        torch.testing.assert_close(ours_of, theirs_of, rtol=0, atol=1e-10)

    ours.train(), theirs.train()
    ours(ids, mask, types, **labels).loss.backward()
    theirs(ids, mask, types, **labels, return_dict=False)[0].backward()
    theirs_gradients = dict(theirs.named_parameters())
    parameters = dict(ours.named_parameters())
    table = {**ours._table(ours.config), **ours._head_table(ours.config)}
    compared = 0
    for our_name, stored in table.items():
        for part, gradient in zip(stored.names, parameters[our_name].grad.chunk(len(stored.names)), strict=True):
            gradient_there = theirs_gradients.get(f"bert.{part}", theirs_gradients.get(part)).grad
            torch.testing.assert_close(
                gradient, gradient_there, rtol=1e-5, atol=1e-7, msg=lambda m, n=part: f"{n}: {m}"
            )
            compared += 1
    assert compared == len(theirs_gradients)


@pytest.mark.parametrize("name", HEADS)
def test_packed_equals_padded(tmp_path, name):
    ours, _ = pair(name, tmp_path)
    ids, mask, types = batch("right")
    labels = labels_for(name, mask)
    packed = pack(ids, mask, token_type_ids=types)
    flat = {key: value[mask.bool()] if value.shape == mask.shape else value for key, value in labels.items()}
    packed = type(packed).from_lengths(packed.values, packed.lengths, token_type_ids=packed.token_type_ids)
    actual, expected = ours(packed, **flat), ours(ids, mask, types, **labels)
    torch.testing.assert_close(actual.loss, expected.loss)
    for packed_logits, padded_logits in zip(results(actual), results(expected), strict=True):
        if padded_logits.shape[:2] == mask.shape:
            padded_logits = padded_logits[mask.bool()]
        torch.testing.assert_close(packed_logits, padded_logits)


@pytest.mark.parametrize("name", HEADS)
def test_folders_both_ways(tmp_path, name):
    ours, theirs = pair(name, tmp_path / "theirs", torch.float32)
    ours.save_pretrained(tmp_path / "ours")
    again = getattr(transformers, name).from_pretrained(tmp_path / "ours")
    assert again.config.num_labels == labels_of(name)
    expected = theirs.state_dict()
    assert again.state_dict().keys() == expected.keys()
    for key, value in again.state_dict().items():
        assert torch.equal(value, expected[key]), key


def test_a_matrix_of_its_own_for_the_words(tmp_path):
    ours, theirs = pair("BertForMaskedLM", tmp_path, tie_word_embeddings=False)
    assert ours.head.weight is not None
    ids, mask, _ = batch("right")
    real = mask.bool()
    torch.testing.assert_close(ours(ids, mask).logits[real], theirs(ids, mask).logits[real], rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    "kind, labels",
    [
        ("regression", torch.tensor([0.5, -1.0, 2.0])),
        ("multi", torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 0.0], [1.0, 1.0, 1.0]])),
        ("numbers", torch.tensor([[0.1, 0.2, 0.3], [0.4, 0.5, 0.6], [0.7, 0.8, 0.9]])),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_classification_learns(tmp_path, kind, labels):
    torch.manual_seed(0)
    problem = {"regression": None, "multi": None, "numbers": "regression"}[kind]
    config = small_config(num_labels=1 if kind == "regression" else 3, problem_type=problem)
    theirs = transformers.BertForSequenceClassification(config).eval()
    theirs.save_pretrained(tmp_path)
    ours = models.BertForSequenceClassification.from_pretrained(tmp_path)
    ids, mask, _ = batch("right")
    torch.testing.assert_close(ours(ids, mask, labels=labels).loss, theirs(ids, mask, labels=labels).loss)


def test_a_new_head_on_a_base_model(tmp_path):
    saved_bert(tmp_path)
    with pytest.warns(UserWarning, match=r"random weights, to be trained: classifier.bias, classifier.weight"):
        model = models.BertForSequenceClassification.from_pretrained(tmp_path, num_labels=7)
    assert model.classifier.weight.shape == (7, 36) and model.config.num_labels == 7
    assert model.classifier.weight.std() > 0 and not model.classifier.bias.any()
    base = models.BertModel.from_pretrained(tmp_path)
    for name, parameter in base.named_parameters():
        assert torch.equal(parameter, model.bert.get_parameter(name)), name
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.save_pretrained(tmp_path / "tuned")
        models.BertForSequenceClassification.from_pretrained(tmp_path / "tuned")
    with pytest.raises(ValueError, match=r"classifier.weight has shape \[7, 36\]; the config expects \[2, 36\]"):
        models.BertForSequenceClassification.from_pretrained(tmp_path / "tuned", num_labels=2)
    with pytest.raises(TypeError, match="'num_label' is no part of the configuration"):
        models.BertForSequenceClassification.from_pretrained(tmp_path, num_label=2)


def test_training_makes_no_logits_unless_asked(tmp_path):
    ours, _ = pair("BertForMaskedLM", tmp_path)
    ids, mask, _ = batch("right")
    labels = labels_for("BertForMaskedLM", mask)["labels"]
    assert ours(ids, mask, labels=labels).logits is not None
    ours.train()
    output = ours(ids, mask, labels=labels)
    asked = ours(ids, mask, labels=labels, return_logits=True)
    assert output.logits is None and asked.logits is not None
    torch.testing.assert_close(output.loss, asked.loss)
    assert ours(ids, mask).logits is not None and ours(ids, mask, return_logits=False) == (None, None)


def test_answers_do_not_begin_on_padding(tmp_path):
    ours, _ = pair("BertForQuestionAnswering", tmp_path)
    ids, mask, _ = batch("right")
    positions = {"start_positions": torch.tensor([3, 3, 0]), "end_positions": torch.tensor([4, 3, 0])}
    output = ours(ids, mask, **positions)
    assert not output.start_logits.softmax(-1)[~mask.bool()].any()
    alone = []
    for row, length in enumerate(mask.sum(1).tolist()):
        one = {name: value[row : row + 1] for name, value in positions.items()}
        alone.append(ours(ids[row : row + 1, :length], **one).loss)
    torch.testing.assert_close(output.loss, torch.stack(alone).mean())


@pytest.mark.parametrize("name", ["BertForMaskedLM", "BertForSequenceClassification"])
def test_gradient_checkpointing_changes_nothing(tmp_path, name):
    ours, _ = pair(name, tmp_path, hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.2)
    ours.train()
    ids, mask, _ = batch("right")
    labels = labels_for(name, mask)
    kept = []
    for enabled in (False, True):
        (ours.gradient_checkpointing_enable if enabled else ours.gradient_checkpointing_disable)()
        torch.manual_seed(3)
        ours.zero_grad()
        loss = ours(ids, mask, **labels).loss
        loss.backward()
        kept.append((loss, [parameter.grad for parameter in ours.parameters()]))
    assert ours.bert.gradient_checkpointing
    torch.testing.assert_close(kept[0], kept[1], rtol=0, atol=0)


@pytest.mark.parametrize(
    "name, labels, error, message",
    [
        (
            "BertForMaskedLM",
            {"labels": torch.zeros(3, 8, dtype=torch.int64)},
            ValueError,
            r"\[3, 8\]; expected \[3, 9\]",
        ),
        ("BertForMaskedLM", {"labels": torch.zeros(3, 9)}, TypeError, "labels is torch.float32; expected int64"),
        ("BertForMaskedLM", {"labels": torch.full((3, 9), VOCABULARY)}, IndexError, f"{VOCABULARY}"),
        ("BertForTokenClassification", {"labels": [1]}, TypeError, "labels is of type list"),
        ("BertForSequenceClassification", {"labels": torch.tensor([1, 2])}, ValueError, r"\[2\]; expected \[3\]"),
        ("BertForSequenceClassification", {"labels": torch.zeros(3, 2)}, ValueError, r"\[3, 2\]; expected \[3, 5\]"),
        ("BertForNextSentencePrediction", {"labels": torch.tensor([0, 2, 1])}, IndexError, "2"),
        (
            "BertForQuestionAnswering",
            {"start_positions": torch.zeros(2, dtype=torch.int64), "end_positions": torch.zeros(3, dtype=torch.int64)},
            ValueError,
            r"start_positions has shape \[2\]; expected \[3\]",
        ),
    ],
)
def test_labels_that_do_not_fit(name, labels, error, message):
    config = BertConfig.from_dict(small_config(num_labels=LABELS).to_dict())
    model = getattr(models, name)(config)
    ids, mask, _ = batch("right")
    with pytest.raises(error, match=message):
        model(ids, mask, **labels)


@pytest.mark.parametrize(
    "changes, message", [({"num_labels": 0}, "num_labels is 0"), ({"problem_type": "x"}, "'x'; expected")]
)
def test_configuration_of_a_head(changes, message):
    with pytest.raises(ValueError, match=message):
        BertConfig().changed(**changes)
