"""Text to embeddings, against sentence-transformers; the tokenizer's packed batches, against transformers' tokenizer."""

import copy
import json
import os
import pickle
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy
import pytest
import torch

from fastbert.models import BertModel, SentenceEncoder
from fastbert.models.sentence_encoder import _batches
from fastbert.tokenizer import WordPieceTokenizer
from tests.bert_samples import minilm_folder, saved_bert

TEXTS = [
    "A sentence.",
    "",
    "   spaces around\tand\nlines   ",
    "Ein längerer Satz mit Ümläuten, 漢字 and emoji 🙂.",
    "word " * 300,
    "x",
    "The quick brown fox jumps over the lazy dog. " * 9,
    "[MASK] [CLS] special tokens [SEP]",
]


@pytest.fixture(scope="module")
def encoder():
    return SentenceEncoder.from_pretrained(minilm_folder())


@pytest.fixture
def minilm_copy(tmp_path):
    """The folder's files as links, so that a test can replace one."""
    folder = tmp_path / "minilm"
    shutil.copytree(minilm_folder(), folder, copy_function=os.symlink)
    return folder


def replace(file, content):
    file.unlink(missing_ok=True)
    file.parent.mkdir(exist_ok=True)
    file.write_text(content if isinstance(content, str) else json.dumps(content))


@pytest.fixture(scope="module")
def expected():
    sentence_transformers = pytest.importorskip("sentence_transformers")
    theirs = sentence_transformers.SentenceTransformer(str(minilm_folder()), device="cpu")
    return theirs.encode(TEXTS, convert_to_tensor=True)


@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_equals_sentence_transformers(encoder, expected, batch_size):
    actual = encoder.encode(TEXTS, batch_size=batch_size)
    assert actual.dtype == torch.float32
    assert not actual.requires_grad
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


def test_equals_transformers_with_pooling_by_hand(encoder):
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm_folder())
    model = transformers.BertModel.from_pretrained(minilm_folder()).eval()
    inputs = tokenizer(TEXTS, padding=True, truncation=True, max_length=256, return_tensors="pt")
    with torch.no_grad():
        hidden = model(**inputs).last_hidden_state
    mask = inputs["attention_mask"].unsqueeze(-1)
    expected = (hidden * mask).sum(1) / mask.sum(1)
    torch.testing.assert_close(encoder.encode(TEXTS, normalize=False), expected, rtol=0, atol=1e-5)
    expected = torch.nn.functional.normalize(expected)
    torch.testing.assert_close(encoder.encode(TEXTS), expected, rtol=0, atol=1e-5)


def test_tokens_equal_transformers(encoder):
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm_folder())
    expected = tokenizer(TEXTS, truncation=True, max_length=256)["input_ids"]
    batch = encoder.tokenize(TEXTS)
    batch.check()
    assert [ids.tolist() for ids in batch.split()] == expected
    assert batch.lengths == [len(ids) for ids in expected]
    assert batch.max_seqlen == 256
    assert batch.padded_shape is None
    assert batch.values.dtype == torch.int64
    assert max(encoder.tokenize(TEXTS, max_length=7).lengths) == 7
    assert max(encoder.tokenize(TEXTS).lengths) == 256, "a max_length must not stay behind"


def test_pairs_equal_transformers(encoder):
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm_folder())
    pairs = [("a question", "an answer " * 20), ("", "x"), ("long " * 30, "short")]
    expected = tokenizer(
        [a for a, _ in pairs],
        [b for _, b in pairs],
        truncation=True,
        max_length=16,
        return_token_type_ids=True,
    )
    batch = encoder.tokenizer(pairs, truncation=True, max_length=16, return_tensors="packed")
    assert [ids.tolist() for ids in batch.split()] == expected["input_ids"]
    types = batch.with_values(batch.token_type_ids).split()
    assert [ids.tolist() for ids in types] == expected["token_type_ids"]


def test_order_is_kept_whatever_the_batches(encoder):
    texts = [f"{'word ' * (i * 7 % 13)}number {i}" for i in range(20)]
    together = encoder.encode(texts, batch_size=4)
    for i in (0, 7, 19):
        torch.testing.assert_close(together[i], encoder.encode([texts[i]])[0], rtol=0, atol=1e-6)


def test_batches_hold_every_text_once_and_keep_to_the_budget():
    lengths = [5, 1, 9, 9, 2, 3, 1, 7]
    for budget in (9, 10, 18, 100):
        batches = list(_batches(lengths, budget))
        assert sorted(i for batch in batches for i in batch) == list(range(8))
        assert all(sum(lengths[i] for i in batch) <= budget for batch in batches)
        flat = [lengths[i] for batch in batches for i in batch]
        assert flat == sorted(lengths, reverse=True)
    assert list(_batches([], 0)) == []
    assert len(list(_batches([5, 5, 5, 5], 10))) == 2


def test_nothing_to_encode(encoder):
    assert encoder.encode([]).shape == (0, 384)
    assert encoder.encode([]).dtype == torch.float32
    assert len(encoder.tokenize([])) == 0


def test_bfloat16_gives_float32_embeddings():
    encoder = SentenceEncoder.from_pretrained(minilm_folder(), dtype=torch.bfloat16)
    assert encoder.model.dtype == torch.bfloat16
    exact = SentenceEncoder.from_pretrained(minilm_folder(), dtype=torch.float64)
    actual, expected = encoder.encode(TEXTS[:4]), exact.encode(TEXTS[:4])
    assert actual.dtype == expected.dtype == torch.float32
    assert (actual * expected).sum(-1).min() > 0.999


@pytest.mark.parametrize("part", ["", "embeddings", "layers.3.attention"])
def test_a_model_in_training_is_refused_and_left_as_it_is(encoder, part):
    encoder.model.get_submodule(part).train()
    before = [module.training for module in encoder.model.modules()]
    try:
        with pytest.raises(RuntimeError, match=rf"{part}.*in training mode.* call model.eval\(\) first"):
            encoder.encode(TEXTS[:2])
        assert [module.training for module in encoder.model.modules()] == before
    finally:
        encoder.model.eval()
    assert torch.equal(encoder.encode(TEXTS[:2]), encoder.encode(TEXTS[:2]))


def test_threads_may_truncate_to_different_lengths(encoder):
    texts = ["word " * 300] * 5
    limits = [7, 50, 128, 255] * 50
    with ThreadPoolExecutor(4) as pool:
        batches = list(pool.map(lambda limit: encoder.tokenize(texts, max_length=limit), limits))
    assert [set(batch.lengths) for batch in batches] == [{limit} for limit in limits]


@pytest.mark.parametrize("again", [copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_tokenizers_copy_and_pickle(encoder, again):
    other = again(encoder.tokenizer)
    expected = encoder.tokenizer(TEXTS)["input_ids"]
    assert other(TEXTS)["input_ids"] == expected
    if again is not copy.copy:
        other.add_tokens(["word"])
        assert encoder.tokenizer(TEXTS)["input_ids"] == expected


def test_integers_and_texts_of_numpy(encoder):
    texts = numpy.array(TEXTS[:3])
    actual = encoder.encode(texts, batch_size=numpy.int64(2), max_length=numpy.int32(9))
    assert torch.equal(actual, encoder.encode(TEXTS[:3], batch_size=2, max_length=9))


def test_without_modules_json_it_is_mean_pooling_without_normalisation(minilm_copy, encoder):
    (minilm_copy / "modules.json").unlink()
    plain = SentenceEncoder.from_pretrained(minilm_copy)
    assert (plain.pooling, plain.normalize, plain.max_seq_length) == ("mean", False, 512)
    torch.testing.assert_close(
        plain.encode(TEXTS, max_length=256), encoder.encode(TEXTS, normalize=False), rtol=0, atol=1e-6
    )


@pytest.mark.parametrize(
    "config",
    [{"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, {"pooling_mode": "cls"}],
    ids=["flag", "name"],
)
def test_cls_pooling(minilm_copy, config):
    replace(minilm_copy / "1_Pooling" / "config.json", {"word_embedding_dimension": 384} | config)
    encoder = SentenceEncoder.from_pretrained(minilm_copy)
    model = BertModel.from_pretrained(minilm_copy)
    for text in TEXTS[:2]:
        with torch.no_grad():
            expected = model(encoder.tokenize([text])).last_hidden_state[:1]
        torch.testing.assert_close(encoder.encode([text], normalize=False), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("cased", [False, True], ids=["uncased", "cased"])
def test_what_the_folder_says_of_length_case_and_prompt(minilm_copy, cased):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    if cased:  # a tokenizer that does not lowercase by itself
        tokenizer = json.loads((minilm_copy / "tokenizer.json").read_text())
        tokenizer["normalizer"]["lowercase"] = False
        replace(minilm_copy / "tokenizer.json", tokenizer)
        # transformers takes the case from here, not from tokenizer.json.
        config = json.loads((minilm_copy / "tokenizer_config.json").read_text())
        replace(minilm_copy / "tokenizer_config.json", config | {"do_lower_case": False})
    replace(minilm_copy / "sentence_bert_config.json", {"max_seq_length": 9, "do_lower_case": True})
    replace(
        minilm_copy / "config_sentence_transformers.json",
        {"prompts": {"query": "ask: ", "passage": "tell: "}, "default_prompt_name": "query"},
    )
    changed = SentenceEncoder.from_pretrained(minilm_copy)
    assert (changed.max_seq_length, changed.prompt) == (9, "ask: ")
    theirs = sentence_transformers.SentenceTransformer(str(minilm_copy), device="cpu")
    torch.testing.assert_close(changed.encode(TEXTS), theirs.encode(TEXTS, convert_to_tensor=True), rtol=0, atol=1e-5)


def test_the_oldest_tokenizer_is_a_vocabulary(minilm_copy):
    new = WordPieceTokenizer.from_pretrained(minilm_copy)
    (minilm_copy / "tokenizer.json").unlink()
    old = WordPieceTokenizer.from_pretrained(minilm_copy)
    for texts in (TEXTS, [("a question", "an answer")]):
        one, other = (t(texts, truncation=True, max_length=64, return_tensors="packed") for t in (old, new))
        assert torch.equal(one.values, other.values)
        assert torch.equal(one.token_type_ids, other.token_type_ids)
        assert one.lengths == other.lengths
    replace(minilm_copy / "vocab.txt", "just\nwords\n")
    with pytest.raises(ValueError, match=r"lacks .*\[UNK\]"):
        WordPieceTokenizer.from_pretrained(minilm_copy)
    replace(minilm_copy / "tokenizer_config.json", "[1]")
    with pytest.raises(ValueError, match=r"tokenizer_config.json holds a JSON list; expected an object"):
        WordPieceTokenizer.from_pretrained(minilm_copy)
    replace(minilm_copy / "tokenizer_config.json", "[" * 100000)
    with pytest.raises(ValueError, match=r"tokenizer_config.json is not valid JSON"):
        WordPieceTokenizer.from_pretrained(minilm_copy)


# What can be wrong


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda e: e.encode("one text"), TypeError, "single string"),
        (lambda e: e.encode(["a", None]), TypeError, r"texts\[1\] is None of type NoneType"),
        (lambda e: e.encode([1]), TypeError, r"texts\[0\] is 1 of type int"),
        (lambda e: e.encode([("a", "b")]), TypeError, "pairs"),
        (lambda e: e.encode(None), TypeError, "texts is of type NoneType; expected a list of strings"),
        (lambda e: e.encode(iter("ab")), TypeError, "texts is of type str_.*iterator; expected a list"),
        (lambda e: e.encode({"a": 1}), TypeError, "texts is of type dict"),
        (lambda e: e.encode(b""), TypeError, "texts is of type bytes"),
        (lambda e: e.encode(["a", "b\ud800"]), ValueError, r"texts\[1\] is 'b\\ud800', which is no valid Unicode"),
        (lambda e: e.encode(["a"], batch_size="3"), TypeError, "batch_size is '3' of type str; expected an integer"),
        (lambda e: e.encode(["a"], batch_size=1.5), TypeError, "batch_size is 1.5 of type float"),
        (lambda e: e.encode(["a"], max_length="3"), TypeError, "max_length is '3' of type str"),
        (lambda e: e.encode(["a"], max_length=3.0), TypeError, "max_length is 3.0 of type float"),
        (lambda e: SentenceEncoder(e.model, e.tokenizer, max_seq_length=9.5), TypeError, "max_seq_length is 9.5"),
        (lambda e: e.encode(["a"], batch_size=0), ValueError, "batch_size is 0"),
        (lambda e: e.encode(["a"], max_length=1), ValueError, "max_length is 1; expected at least 2"),
        (lambda e: e.encode(["a"], max_length=513), ValueError, "max_length is 513; the model takes at most 512"),
        (lambda e: SentenceEncoder(e.model, e.tokenizer, pooling="max"), ValueError, "pooling is 'max'"),
        (lambda e: SentenceEncoder(e.model, e.tokenizer, max_seq_length=600), ValueError, "600; expected 1 to 512"),
    ],
)
def test_bad_input(encoder, call, error, message):
    with pytest.raises(error, match=message):
        call(encoder)


def test_only_special_tokens_fit(encoder):
    assert encoder.tokenize(["many words here"], max_length=2).values.tolist() == [101, 102]


@pytest.mark.parametrize(
    "name, content, error, message",
    [
        ("modules.json", "[", ValueError, "modules.json is not valid JSON"),
        ("modules.json", {}, ValueError, "not a list of modules"),
        (
            "modules.json",
            [
                {"type": f"sentence_transformers.models.{kind}", "path": ""}
                for kind in ("Transformer", "Pooling", "Dense")
            ],
            ValueError,
            "Transformer, Pooling, Dense; expected Transformer, Pooling",
        ),
        (
            "modules.json",
            [{"type": "a.Transformer", "path": "../.."}, {"type": "a.Pooling", "path": "1_Pooling"}],
            ValueError,
            "expected one inside the folder",
        ),
        ("1_Pooling/config.json", {"pooling_mode_max_tokens": True}, ValueError, "asks for max pooling"),
        ("1_Pooling/config.json", {"pooling_mode": "lasttoken"}, ValueError, "asks for lasttoken pooling"),
        ("1_Pooling/config.json", {}, ValueError, "asks for no pooling"),
        (
            "1_Pooling/config.json",
            {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True},
            ValueError,
            "mean and cls pooling",
        ),
        (
            "1_Pooling/config.json",
            {"pooling_mode_mean_tokens": True, "include_prompt": False},
            ValueError,
            "include_prompt",
        ),
        ("1_Pooling/config.json", None, FileNotFoundError, "1_Pooling/config.json does not exist"),
        ("sentence_bert_config.json", "[]", ValueError, "sentence_bert_config.json holds a JSON list"),
        (
            "sentence_bert_config.json",
            {"max_seq_length": "9"},
            ValueError,
            "max_seq_length is '9'; expected an integer",
        ),
        (
            "config_sentence_transformers.json",
            {"prompts": ["x"], "default_prompt_name": "a"},
            ValueError,
            "config_sentence_transformers.json has no readable prompts",
        ),
        (
            "config_sentence_transformers.json",
            {"prompts": {"a": 5}, "default_prompt_name": "a"},
            ValueError,
            "the prompt 'a' is 5; expected a string",
        ),
        ("tokenizer.json", '{"version": "1.0", ', ValueError, "tokenizer.json is not valid JSON"),
        ("config.json", {"model_type": "t5"}, ValueError, "model_type is 't5'"),
    ],
    ids=str,
)
def test_folders_it_cannot_read(minilm_copy, name, content, error, message):
    if content is None:
        (minilm_copy / name).unlink()
    else:
        replace(minilm_copy / name, content)
    with pytest.raises(error, match=message):
        SentenceEncoder.from_pretrained(minilm_copy)


def test_no_tokenizer(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has neither a tokenizer.json nor a vocab.txt"):
        SentenceEncoder.from_pretrained(saved_bert(tmp_path))


def test_a_tokenizer_of_another_model(tmp_path):
    saved_bert(tmp_path)
    shutil.copy(minilm_folder() / "tokenizer.json", tmp_path)
    with pytest.raises(ValueError, match="the tokenizer has 30522 tokens, the model 97"):
        SentenceEncoder.from_pretrained(tmp_path)


def test_neither_tokenizers_nor_transformers_is_needed(monkeypatch):
    for name in ("tokenizers", "transformers"):
        monkeypatch.setitem(sys.modules, name, None)
    assert SentenceEncoder.from_pretrained(minilm_folder()).tokenize(["one"]).lengths == [3]
