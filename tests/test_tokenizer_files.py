"""Tokenizers from files and to files: what a folder means is what transformers' AutoTokenizer makes of it."""

import json

import pytest

from fastbert.tokenizer import AddedToken, WordPieceTokenizer
from tests.bert_samples import minilm_folder
from tests.tokenizer_samples import SPECIAL, TEXTS, VOCABULARY, assert_same, outcome

PROBES = [*TEXTS, "Éa newer <x>", "naïve ÀB new"]


def added(content, i, **flags):
    values = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False) | {"special": True} | flags
    return {"id": i, "content": content, **values}


def tokenizer_json(**changes):
    """A tokenizer.json that differs from what BertTokenizer would make of its vocabulary in several ways."""
    sequence, special = (lambda name, t: {"Sequence": {"id": name, "type_id": t}}), {"id": "[CLS]", "type_id": 0}
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [added(token, i) for i, token in enumerate(SPECIAL)],
        "normalizer": {
            "type": "BertNormalizer",
            "clean_text": True,
            "handle_chinese_chars": False,
            "strip_accents": False,
            "lowercase": False,
        },
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": special}, sequence("A", 3)],
            "pair": [sequence("B", 1), {"SpecialToken": special}, sequence("A", 2)],
            "special_tokens": {"[CLS]": {"id": "[CLS]", "ids": [2, 3], "tokens": ["[CLS]", "[SEP]"]}},
        },
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": False},
        "model": {
            "type": "WordPiece",
            "unk_token": "[UNK]",
            "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 5,
            "vocab": VOCABULARY,
        },
    }
    return content | changes


def write(folder, name, content):
    folder.mkdir(exist_ok=True)
    data = content if isinstance(content, str | bytes) else json.dumps(content)
    (folder / name).write_bytes(data if isinstance(data, bytes) else data.encode())
    return folder / name


def vocab_txt(vocab=VOCABULARY):
    return "".join(f"{token}\n" for token in vocab)


def compare(ours, theirs, special=True):
    for text in PROBES:
        assert_same(lambda t: t(text, return_token_type_ids=True), ours, theirs, text)  # noqa: B023
        assert_same(lambda t: t(text, "a b", add_special_tokens=False, return_token_type_ids=True), ours, theirs, text)  # noqa: B023
    assert_same(lambda t: t.decode([2, 7, 40, 41, 3, 4]), ours, theirs)
    assert_same(lambda t: (t.get_vocab(), t.vocab_size, len(t), t.added_tokens_decoder), ours, theirs)
    assert_same(lambda t: (t.model_max_length, t.padding_side, t.truncation_side), ours, theirs)
    if special:
        assert_same(lambda t: (t.special_tokens_map, t.all_special_ids, t.extra_special_tokens), ours, theirs)
        assert_same(lambda t: t(PROBES, PROBES[::-1], padding=True, truncation=True, max_length=9), ours, theirs)


BERT = {"config.json": {"model_type": "bert"}}
FOLDERS = {
    "tokenizer.json": {"tokenizer.json": tokenizer_json()},
    "of-a-bert": {"tokenizer.json": tokenizer_json(), **BERT},
    "named-bert": {"tokenizer.json": tokenizer_json(), "tokenizer_config.json": {"tokenizer_class": "BertTokenizer"}},
    "named-fast": {
        "tokenizer.json": tokenizer_json(),
        "tokenizer_config.json": {
            "tokenizer_class": "BertTokenizerFast",
            "do_lower_case": False,
            "model_max_length": 9,
        },
    },
    "named-distilbert": {
        "tokenizer.json": tokenizer_json(),
        "tokenizer_config.json": {"tokenizer_class": "DistilBertTokenizer", "strip_accents": False},
    },
    "named-other": {
        "tokenizer.json": tokenizer_json(),
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "pad_token": "[PAD]",
            "cls_token": "[CLS]",
            "unk_token": "[UNK]",
        },
        **BERT,
    },
    "accents": {
        "vocab.txt": vocab_txt(),
        "tokenizer_config.json": {"do_lower_case": True, "strip_accents": False, "tokenize_chinese_chars": False},
        **BERT,
    },
    "vocabulary": {"vocab.txt": vocab_txt(), **BERT},
    "cased": {"vocab.txt": vocab_txt(), "tokenizer_config.json": {"do_lower_case": False, "max_len": 77}, **BERT},
    "old": {
        "vocab.txt": vocab_txt(),
        "special_tokens_map.json": {"cls_token": "[MASK]", "sep_token": {"content": "[SEP]", "lstrip": True}},
        "added_tokens.json": {"<x>": len(VOCABULARY) + 1, "newer": len(VOCABULARY)},
        **BERT,
    },
    "extra": {
        "vocab.txt": vocab_txt(),
        "tokenizer_config.json": {"additional_special_tokens": ["<x>"], "image_token": "<img>", "bos_token": "newer"},
        **BERT,
    },
    "decoder": {
        "tokenizer.json": tokenizer_json(),
        "tokenizer_config.json": {
            "tokenizer_class": "BertTokenizer",
            "added_tokens_decoder": {
                "1": added("[UNK]", 1) | {"id": 1},
                str(len(VOCABULARY)): {"content": "newer", "normalized": True, "lstrip": True},
            },
        },
    },
    "sides": {
        "tokenizer.json": tokenizer_json(
            truncation={"direction": "Left", "max_length": 4, "strategy": "LongestFirst", "stride": 1},
            padding={
                "strategy": {"Fixed": 30},
                "direction": "Left",
                "pad_to_multiple_of": None,
                "pad_id": 0,
                "pad_type_id": 0,
                "pad_token": "[PAD]",
            },
        ),
        **BERT,
    },
    "added": {
        "tokenizer.json": tokenizer_json(
            added_tokens=[
                added("[PAD]", 0),
                added("<x>", 900),
                added("newer", 901, normalized=True, special=False),
                added("éa", 902, normalized=True, special=False, single_word=True),
            ]
        ),
        **BERT,
    },
}
for entry in FOLDERS["decoder"]["tokenizer_config.json"]["added_tokens_decoder"].values():
    entry.pop("id", None)


@pytest.mark.parametrize("name", FOLDERS)
def test_folders(tmp_path, name):
    transformers = pytest.importorskip("transformers")
    transformers.logging.set_verbosity_error()
    for file, content in FOLDERS[name].items():
        write(tmp_path, file, content)
    # By itself a tokenizer.json names no special tokens for transformers; ours takes BERT's.
    compare(
        WordPieceTokenizer.from_pretrained(tmp_path),
        transformers.AutoTokenizer.from_pretrained(tmp_path),
        special=name != "tokenizer.json",
    )


OPTIONS = {
    "as-is": {},
    "bert-processing": {"post_processor": {"type": "BertProcessing", "sep": ["[SEP]", 3], "cls": ["[CLS]", 2]}},
    "no-processor": {"post_processor": None},
    "no-normalizer": {"normalizer": None},
    "no-decoder": {"decoder": None},
    "unclean": {"normalizer": tokenizer_json()["normalizer"] | {"clean_text": False, "strip_accents": True}},
    "cjk": {"normalizer": tokenizer_json()["normalizer"] | {"handle_chinese_chars": True, "lowercase": True}},
    "accents-unsaid": {"normalizer": tokenizer_json()["normalizer"] | {"strip_accents": None, "lowercase": True}},
    "prefix": {"model": tokenizer_json()["model"] | {"continuing_subword_prefix": "", "max_input_chars_per_word": 100}},
    "no-model-type": {"model": {k: v for k, v in tokenizer_json()["model"].items() if k != "type"}},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_of_a_tokenizer_json(tmp_path, name):
    transformers = pytest.importorskip("transformers")
    file = write(tmp_path, "tokenizer.json", tokenizer_json(**OPTIONS[name]))
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(file), model_input_names=["input_ids", "token_type_ids", "attention_mask"]
    )
    compare(WordPieceTokenizer.from_pretrained(file), theirs, special=False)


def test_minilm():
    transformers = pytest.importorskip("transformers")
    folder = minilm_folder()
    compare(WordPieceTokenizer.from_pretrained(folder), transformers.AutoTokenizer.from_pretrained(folder))
    overridden = WordPieceTokenizer.from_pretrained(folder, do_lower_case=False, model_max_length=7)
    compare(overridden, transformers.AutoTokenizer.from_pretrained(folder, do_lower_case=False, model_max_length=7))


@pytest.mark.parametrize("vocab", [None, VOCABULARY, list(VOCABULARY), "file"], ids=["none", "dict", "list", "file"])
def test_constructor(tmp_path, vocab):
    transformers = pytest.importorskip("transformers")
    vocab = str(write(tmp_path, "vocab.txt", vocab_txt())) if vocab == "file" else vocab
    ours = WordPieceTokenizer(vocab)
    compare(ours, transformers.BertTokenizer(dict(VOCABULARY) if isinstance(vocab, list) else vocab))
    if vocab and not isinstance(vocab, list | dict):
        compare(WordPieceTokenizer.from_pretrained(vocab), transformers.BertTokenizer.from_pretrained(vocab))


# Saving


def changed(tokenizer):
    tokenizer.add_tokens(["newer", AddedToken("<l>", lstrip=True)])
    tokenizer.add_special_tokens({"extra_special_tokens": ["<x>"]})
    tokenizer.padding_side = "left"
    return tokenizer


SAVED = {
    "bert": lambda folder: WordPieceTokenizer(VOCABULARY, do_lower_case=False, strip_accents=True, model_max_length=30),
    "added": lambda folder: changed(WordPieceTokenizer(VOCABULARY)),
    "other-cls": lambda folder: WordPieceTokenizer(VOCABULARY, cls_token="[MASK]", bos_token="[new]"),
    "file": lambda folder: changed(
        WordPieceTokenizer.from_pretrained(write(folder, "tokenizer.json", tokenizer_json()))
    ),
}


@pytest.mark.parametrize("name", SAVED)
def test_saved_files(tmp_path, name):
    transformers = pytest.importorskip("transformers")
    tokenizer = SAVED[name](tmp_path / "from")
    folder = tmp_path / "to"
    written = tokenizer.save_pretrained(folder, legacy_format=True)
    assert [file.rpartition("/")[2] for file in written] == ["tokenizer_config.json", "tokenizer.json", "vocab.txt"]
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    assert type(theirs).__name__ == ("TokenizersBackend" if name == "file" else "BertTokenizer")
    compare(tokenizer, theirs)
    compare(WordPieceTokenizer.from_pretrained(folder), theirs)
    assert list(folder.iterdir()) and not list(folder.glob("*.tmp"))


def test_saving_where_it_cannot(tmp_path):
    file = write(tmp_path, "file", "x")
    with pytest.raises(NotADirectoryError, match="is a file"):
        WordPieceTokenizer().save_pretrained(file)
    gaps = WordPieceTokenizer({"[UNK]": 0, "a": 9, "[PAD]": 1, "[CLS]": 2, "[SEP]": 3, "[MASK]": 4})
    with pytest.raises(ValueError, match=r"gaps"):
        gaps.save_vocabulary(tmp_path)


# Damaged files


def _changed(path, value):
    """A tokenizer.json with the entry at a dotted path changed, or removed where value is ...."""
    content = json.loads(json.dumps(tokenizer_json()))
    *parents, last = path.split(".")
    at = content
    for key in parents:
        at = at[int(key)] if isinstance(at, list) else at[key]
    if value is ...:
        del at[last]
    else:
        at[int(last) if isinstance(at, list) else last] = value
    return content


@pytest.mark.parametrize(
    "path, value, message",
    [
        ("version", "2.0", "version is '2.0'"),
        ("model", ..., "lacks 'model'"),
        ("model", 5, "model is 5; expected an object"),
        ("model.type", "BPE", "model is 'BPE', which is not implemented; expected WordPiece"),
        ("model.unk_token", ..., "model lacks 'unk_token'"),
        ("model.unk_token", "<unk>", r"model.vocab lacks '<unk>'"),
        ("model.vocab", ["a"], "model.vocab is .* expected an object"),
        ("model.vocab.one", "1", "model.vocab has 'one': '1'; expected a string and an integer"),
        ("model.vocab.one", True, "model.vocab has 'one': True"),
        ("model.vocab.one", -1, "gives 'one' the id -1"),
        ("model.vocab.one", 2**40, "gives 'one' the id 1099511627776; expected 0 to"),
        ("model.vocab.one", 8, "gives the id 8 to 'one' and to 'two'"),
        ("model.max_input_chars_per_word", -1, "max_input_chars_per_word is -1"),
        ("model.continuing_subword_prefix", None, "continuing_subword_prefix is None; expected a string"),
        ("normalizer.type", "NFKC", "normalizer is 'NFKC', which is not implemented; expected BertNormalizer"),
        ("normalizer.lowercase", "yes", "normalizer.lowercase is 'yes'; expected true or false"),
        ("normalizer.clean_text", ..., "normalizer lacks 'clean_text'"),
        ("pre_tokenizer", None, "pre_tokenizer is None, which is not implemented; expected BertPreTokenizer"),
        ("pre_tokenizer.type", "Whitespace", "pre_tokenizer is 'Whitespace'"),
        ("post_processor.type", "RobertaProcessing", "post_processor is 'RobertaProcessing', which is not implemented"),
        ("post_processor.single", [], "single has the sequences none; only A, once each"),
        ("post_processor.single.0.SpecialToken.id", "[X]", r"single\[0\] names '\[X\]'"),
        ("post_processor.single.1", 5, r"single\[1\] is 5; expected a Sequence or a SpecialToken"),
        ("post_processor.pair.0.Sequence.id", "C", r"pair\[0\].id is 'C'; expected A or B"),
        ("post_processor.pair.0.Sequence.type_id", -1, r"pair\[0\].type_id is -1"),
        ("post_processor.special_tokens.[CLS].ids", ["2"], r"special_tokens.\[CLS\].ids is \['2'\]"),
        ("decoder.type", "BPEDecoder", "decoder is 'BPEDecoder', which is not implemented; expected WordPiece"),
        ("decoder.cleanup", ..., "decoder lacks 'cleanup'"),
        ("added_tokens", {}, "added_tokens is {}; expected a list"),
        ("added_tokens.1.content", 5, r"added_tokens\[1\].content is 5; expected a string"),
        ("added_tokens.1.lstrip", ..., r"added_tokens\[1\] lacks 'lstrip'"),
        ("added_tokens.1.id", -1, r"added_tokens\[1\].id is -1; expected 0 to"),
        (
            "truncation",
            {"strategy": "LongestFirst", "max_length": "5"},
            "truncation.max_length is '5'; expected an integer",
        ),
        (
            "truncation",
            {"strategy": "Longest", "max_length": 5, "stride": 0},
            "truncation.strategy is 'Longest'; expected LongestFirst, OnlyFirst or OnlySecond",
        ),
        ("truncation", {"strategy": "OnlyFirst", "max_length": 5}, "truncation lacks 'stride'"),
        (
            "truncation",
            {"strategy": "OnlyFirst", "max_length": -1, "stride": 0},
            "truncation.max_length is -1; expected 0 or more",
        ),
        ("truncation", 5, "truncation is 5; expected an object or null"),
        (
            "padding",
            {"strategy": "BatchLongest", "direction": "Up"},
            "padding.direction is 'Up'; expected Left or Right",
        ),
        ("padding", {"strategy": "BatchLongest"}, "padding lacks 'direction'"),
        (
            "padding",
            {"strategy": "Longest", "direction": "Left"},
            "padding.strategy is 'Longest'; expected BatchLongest",
        ),
        (
            "padding",
            {"strategy": {"Fixed": -2}, "direction": "Left"},
            "padding.strategy.Fixed is -2; expected 0 or more",
        ),
        (
            "padding",
            {"strategy": "BatchLongest", "direction": "Left", "pad_id": 0, "pad_type_id": 0},
            "padding lacks 'pad_token'",
        ),
    ],
    ids=str,
)
def test_damaged_tokenizer_json(tmp_path, path, value, message):
    file = write(tmp_path, "tokenizer.json", _changed(path, value))
    with pytest.raises(ValueError, match=message) as error:
        WordPieceTokenizer.from_pretrained(file)
    assert str(error.value).startswith(str(file))


@pytest.mark.parametrize(
    "name, content, error, message",
    [
        ("tokenizer.json", "{", ValueError, "not valid JSON"),
        ("tokenizer.json", b"\xff", ValueError, "not valid JSON"),
        ("tokenizer.json", "[]", ValueError, "holds a JSON list; expected an object"),
        ("tokenizer.json", "[" * 100000, ValueError, "not valid JSON"),
        ("tokenizer.json", '{"model": {"vocab": {"a": 1, "b": 2, "a": 3}}}', ValueError, "has the key 'a' twice"),
        ("vocab.txt", b"[UNK]\na\n\xff\n", ValueError, r"vocab.txt, line 3: invalid UTF-8 \(byte 8"),
        ("vocab.txt", "[UNK]\na\nb\na\n", ValueError, "vocab.txt, line 4: the token 'a' is on line 2 already"),
        ("vocab.txt", "a\nb\n", ValueError, r"vocab.txt lacks '\[UNK\]'"),
        ("vocab.txt", "", ValueError, r"vocab.txt lacks '\[UNK\]'"),
        ("tokenizer_config.json", "5", ValueError, "holds a JSON int; expected an object"),
        ("tokenizer_config.json", {"tokenizer_class": 5}, ValueError, "tokenizer_class is 5; expected a string"),
        ("tokenizer_config.json", {"tokenizer_class": "XTokenizer"}, ValueError, "expected one of BERT's family"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"a": 1}}, ValueError, "added_tokens_decoder is"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"1": 1}}, ValueError, "added_tokens_decoder.1 is 1"),
        ("tokenizer_config.json", {"cls_token": 5}, TypeError, "cls_token has to be either str or AddedToken"),
        ("tokenizer_config.json", {"padding_side": "up"}, ValueError, "Padding side should be"),
        ("tokenizer_config.json", {"do_lower_case": "no"}, TypeError, "do_lower_case is 'no'; expected True or False"),
        ("added_tokens.json", {"a": "b"}, ValueError, "'a' is 'b'; expected an id"),
        (
            "special_tokens_map.json",
            {"cls_token": {}},
            ValueError,
            'cls_token is {}; expected an object with "content"',
        ),
    ],
)
def test_damaged_files(tmp_path, name, content, error, message):
    if name != "tokenizer.json":
        write(tmp_path, "vocab.txt", vocab_txt())
    write(tmp_path, name, content)
    with pytest.raises(error, match=message):
        WordPieceTokenizer.from_pretrained(tmp_path)


def test_huge_files(tmp_path, monkeypatch):
    monkeypatch.setattr("fastbert.tokenizer.blueprint.MAX_FILE_BYTES", 100)
    for name in ("vocab.txt", "tokenizer.json"):
        file = write(tmp_path, name, "x" * 101)
        with pytest.raises(ValueError, match=r"has 101 bytes; a vocabulary may have 100 at most"):
            WordPieceTokenizer.from_pretrained(file)


def test_vocabularies_as_arguments():
    for vocab, error, message in (
        (5, TypeError, "vocab is of type int"),
        ({"[UNK]": "0"}, TypeError, r"vocab has '\[UNK\]': '0'"),
        ({"[UNK]": 0, "a": 0}, ValueError, "gives the id 0 to"),
        (["[UNK]", "a", "a"], ValueError, "a token twice"),
        ({"a": 0}, ValueError, r"vocab lacks '\[UNK\]'"),
    ):
        with pytest.raises(error, match=message):
            WordPieceTokenizer(vocab)
    with pytest.raises(TypeError, match="unk_token is None"):
        WordPieceTokenizer(VOCABULARY, unk_token=None)
    with pytest.raises(AttributeError, match="pad conflicts with the method pad"):
        WordPieceTokenizer(VOCABULARY, pad=1)
    assert outcome(lambda t: t("a").input_ids, WordPieceTokenizer({"[UNK]": 7, "a": 3}))[0] == "result"


def test_nothing_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"neither a tokenizer.json nor a vocab.txt"):
        WordPieceTokenizer.from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"does not exist"):
        WordPieceTokenizer.from_pretrained(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match=r"does not exist"):
        WordPieceTokenizer(tmp_path / "vocab.txt")
    with pytest.raises(TypeError, match="cache_dir is not taken"):
        WordPieceTokenizer.from_pretrained(tmp_path, cache_dir="x")
