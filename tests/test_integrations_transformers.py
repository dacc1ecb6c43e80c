"""FastBertTokenizer where transformers and sentence-transformers expect one of their own: results equal theirs."""

import copy
import pickle

import numpy
import pytest
import torch

from tests.bert_samples import minilm_folder, small_config
from tests.tokenizer_samples import TEXTS, VOCABULARY, assert_same, plain, theirs

transformers = pytest.importorskip("transformers")

from fastbert.integrations.transformers import FastBertTokenizer  # noqa: E402
from fastbert.tokenizer import WordPieceTokenizer  # noqa: E402


@pytest.fixture
def ours():
    return FastBertTokenizer(WordPieceTokenizer(VOCABULARY, model_max_length=24))


@pytest.fixture
def other():
    return theirs(model_max_length=24)


def test_it_is_one_of_theirs(ours):
    assert isinstance(ours, transformers.PreTrainedTokenizerBase)
    assert ours.is_fast
    assert isinstance(ours("a"), transformers.BatchEncoding)
    with pytest.raises(TypeError, match=r"tokenizer is of type dict; expected a fastbert.WordPieceTokenizer"):
        FastBertTokenizer({})
    with pytest.raises(NotImplementedError, match="sanitize_control_tokens"):
        ours("a", sanitize_control_tokens=True)


@pytest.mark.parametrize(
    "call",
    [
        lambda t: t(TEXTS),
        lambda t: t(TEXTS, TEXTS[::-1], padding=True, truncation=True, return_tensors="pt"),
        lambda t: t(TEXTS[2], truncation=True, max_length=6, stride=1, return_overflowing_tokens=True),
        lambda t: t([x.split() for x in TEXTS], is_split_into_words=True, return_offsets_mapping=True),
        lambda t: t("a", text_target="b c"),
        lambda t: t(TEXTS[2], TEXTS[3])[0],
        lambda t: t(None),
        lambda t: t("a\ud800"),
        lambda t: t(TEXTS).word_ids(2),
        lambda t: pickle.loads(pickle.dumps(t(TEXTS, padding=True))).tokens(1),
        lambda t: t.encode("one two", max_length=3, truncation=True),
        lambda t: t.tokenize("one unaffable"),
        lambda t: t.decode([2, 7, 8, 3], skip_special_tokens=True),
        lambda t: t.batch_decode([[2, 7], [8]]),
        lambda t: t.convert_ids_to_tokens([2, 7], skip_special_tokens=True),
        lambda t: t.convert_tokens_to_ids(["one", "nonsense"]),
        lambda t: t.convert_tokens_to_string(["un", "##aff"]),
        lambda t: t.get_special_tokens_mask([2, 7], already_has_special_tokens=True),
        lambda t: (len(t), t.vocab_size, t.get_vocab(), t.num_special_tokens_to_add(True)),
        lambda t: (t.special_tokens_map, t.all_special_ids, t.added_tokens_decoder, t.get_added_vocab()),
        lambda t: (t.add_tokens(["newer"]), t.add_special_tokens({"extra_special_tokens": ["<e>"]}), t("newer <e>")),
        lambda t: (setattr(t, "pad_token", "a"), t.pad_token_id, t(["a b", "a"], padding=True)),
        lambda t: (setattr(t, "pad_token_id", 9), t.pad_token, t(["a b", "a"], padding=True)),
        lambda t: (setattr(t, "padding_side", "left"), t(["a b", "a"], padding=True)),
        lambda t: (setattr(t, "truncation_side", "left"), t("a b c", truncation=True, max_length=4)),
        lambda t: t.model_input_names.remove("token_type_ids") or t("a"),
        lambda t: t.pad([{"input_ids": [1, 2]}, {"input_ids": [1]}], return_tensors="np"),
        lambda t: t.pad([t("a b"), t("c")], pad_to_multiple_of=8),
        lambda t: t.apply_chat_template(
            [{"role": "user", "content": "one two"}],
            chat_template="{% for m in messages %}{{ m['content'] }}{% endfor %}",
        ),
    ],
)
def test_calls(ours, other, call):
    assert_same(call, ours, other)


@pytest.mark.parametrize("again", [copy.deepcopy, lambda t: pickle.loads(pickle.dumps(t))], ids=["copy", "pickle"])
def test_copies_are_apart(ours, again):
    other = again(ours)
    other.add_tokens(["newer"])
    other.padding_side = "left"
    assert plain(other("one [MASK]")) == plain(ours("one [MASK]"))
    assert (len(other), ours.padding_side, ours.fastbert_tokenizer.padding_side) == (len(ours) + 1, "right", "right")


def test_saved_files_are_theirs(ours, tmp_path):
    ours.add_tokens(["newer"])
    ours.chat_template = "{{ messages }}"
    written = ours.save_pretrained(tmp_path)
    assert all((tmp_path / name).is_file() for name in written)
    back = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert type(back).__name__ == "BertTokenizer"
    assert back.chat_template == ours.chat_template
    for text in [*TEXTS, "newer", "NEWERa"]:
        assert_same(lambda t: t(text), ours, back, text)  # noqa: B023
    with pytest.raises(ValueError, match="push_to_hub"):
        ours.save_pretrained(tmp_path, push_to_hub=True)


FEATURES = [{"input_ids": [2, 7, 8, 9, 3], "labels": [0, 1, 2, 1, 0]}, {"input_ids": [2, 7, 3], "labels": [0, 1, 0]}]


@pytest.mark.parametrize(
    "collator",
    [
        lambda t: transformers.DataCollatorWithPadding(t, pad_to_multiple_of=8),
        lambda t: transformers.DataCollatorForTokenClassification(t),
        lambda t: transformers.DataCollatorForLanguageModeling(t, mlm_probability=0.5, seed=3),
        lambda t: transformers.DataCollatorForLanguageModeling(t, mlm=False),
    ],
    ids=["padding", "token-classification", "masked", "causal"],
)
def test_data_collators(ours, other, collator):
    token_classification = collator(ours).__class__.__name__.endswith("TokenClassification")
    features = FEATURES if token_classification else [{"input_ids": row["input_ids"]} for row in FEATURES]
    actual, expected = (collator(t)(copy.deepcopy(features)) for t in (ours, other))
    assert plain(dict(actual)) == plain(dict(expected))
    assert isinstance(actual["input_ids"], torch.Tensor)


def test_whole_words_are_masked_alike(ours, other):
    masked = [
        transformers.DataCollatorForLanguageModeling(t, mlm_probability=0.5, seed=3, whole_word_mask=True)(
            [t(text, padding="max_length", max_length=24, return_offsets_mapping=True) for text in TEXTS[2:6]]
        )
        for t in (ours, other)
    ]
    assert plain(dict(masked[0])) == plain(dict(masked[1]))


def _config(**changes):
    return small_config(vocab_size=len(VOCABULARY), **changes)


def test_trainer(ours, tmp_path):
    pytest.importorskip("accelerate")
    torch.manual_seed(0)
    model = transformers.BertForSequenceClassification(_config(num_labels=2))
    rows = [{**ours(text, truncation=True, max_length=12), "labels": i % 2} for i, text in enumerate(TEXTS)]
    arguments = transformers.TrainingArguments(
        tmp_path, max_steps=3, per_device_train_batch_size=4, report_to=[], use_cpu=True, disable_tqdm=True
    )
    trainer = transformers.Trainer(model, arguments, train_dataset=rows, processing_class=ours)
    assert numpy.isfinite(trainer.train().training_loss)
    trainer.save_model()
    assert len(transformers.AutoTokenizer.from_pretrained(tmp_path)) == len(ours)


@pytest.mark.parametrize(
    "task, model_class, argument",
    [
        ("text-classification", "BertForSequenceClassification", "one two three"),
        ("token-classification", "BertForTokenClassification", "Hello unaffable world"),
        ("fill-mask", "BertForMaskedLM", "one [MASK] three"),
        ("feature-extraction", "BertModel", ["one two", "three"]),
    ],
)
def test_pipelines(ours, other, task, model_class, argument):
    torch.manual_seed(0)
    model = getattr(transformers, model_class)(_config()).eval()
    options = {"aggregation_strategy": "average"} if task == "token-classification" else {}
    actual, expected = (
        transformers.pipeline(task, model=model, tokenizer=t, device="cpu", **options)(argument) for t in (ours, other)
    )
    assert actual == expected


def test_sentence_transformer():
    sentence_transformers = pytest.importorskip("sentence_transformers")
    model = sentence_transformers.SentenceTransformer(str(minilm_folder()), device="cpu")
    expected = model.encode(TEXTS, convert_to_tensor=True)
    model[0].processor = FastBertTokenizer.from_pretrained(minilm_folder())
    assert isinstance(model.tokenizer, FastBertTokenizer)
    torch.testing.assert_close(model.encode(TEXTS, convert_to_tensor=True), expected, rtol=0, atol=0)
