"""Calls of the tokenizer against transformers' BertTokenizer: every combination of arguments, exceptions included."""

import itertools
import random

import pytest
import torch

from fastbert.tokenizer import AddedToken, WordPieceTokenizer
from tests.tokenizer_samples import TEXTS, VOCABULARY, assert_same, both, outcome

SOME = TEXTS[:9]  # overflowing pairs multiply their windows
PAIRS = [(a, b) for a, b in zip(SOME, reversed(SOME), strict=True)]
WORDS = [text.split() for text in SOME]
LONG, SHORT = TEXTS[2], TEXTS[3]
# name: (text, text_pair, further arguments)
INPUTS = {
    "text": (LONG, None, {}),
    "pair": (LONG, SHORT, {}),
    "short-long": ("one two", LONG, {}),
    "batch": (TEXTS, None, {}),
    "batch-pairs": ([a for a, _ in PAIRS], [b for _, b in PAIRS], {}),
    "tuples": (PAIRS, None, {}),
    "mixed": ([LONG, PAIRS[3], SHORT], None, {}),
    "words": (LONG.split(), None, {"is_split_into_words": True}),
    "words-pair": (LONG.split(), SHORT.split(), {"is_split_into_words": True}),
    "batch-words": (WORDS, None, {"is_split_into_words": True}),
    "batch-words-pairs": (WORDS, WORDS[::-1], {"is_split_into_words": True}),
}
TRUNCATIONS = [False, True, "only_first", "only_second", "do_not_truncate"]
OUTPUTS = {
    "return_special_tokens_mask": True,
    "return_offsets_mapping": True,
    "return_length": True,
    "return_overflowing_tokens": True,
}


@pytest.fixture(scope="module")
def pair():
    return both(model_max_length=24)


def _arguments(name, **options):
    text, text_pair, more = INPUTS[name]
    return {"text": text, "text_pair": text_pair, **more, **options}


@pytest.mark.parametrize("truncation", TRUNCATIONS)
@pytest.mark.parametrize("name", INPUTS)
def test_truncation_padding_and_sides(pair, name, truncation):
    ours, theirs = pair
    for max_length, padding, sides in itertools.product(
        (None, 0, 1, 2, 3, 6, 30),
        (False, True, "max_length"),
        (("right", "right"), ("left", "left"), ("left", "right")),
    ):
        for tokenizer in pair:
            tokenizer.truncation_side, tokenizer.padding_side = sides
        arguments = _arguments(name, truncation=truncation, max_length=max_length, padding=padding, verbose=False)
        assert_same(lambda t: t(**arguments), ours, theirs, (arguments, sides))  # noqa: B023
    for tokenizer in pair:
        tokenizer.truncation_side = tokenizer.padding_side = "right"


@pytest.mark.parametrize("truncation", TRUNCATIONS)
@pytest.mark.parametrize("name", INPUTS)
def test_overflow_and_stride(pair, name, truncation):
    ours, theirs = pair
    for max_length, stride, side in itertools.product((2, 3, 4, 6, 11), (0, 1, 3), ("right", "left")):
        for tokenizer in pair:
            tokenizer.truncation_side = side
        arguments = _arguments(name, truncation=truncation, max_length=max_length, stride=stride, **OUTPUTS)
        assert_same(lambda t: t(**arguments), ours, theirs, (arguments, side))  # noqa: B023
    for tokenizer in pair:
        tokenizer.truncation_side = "right"


@pytest.mark.parametrize("tensors", [None, "np", "pt"])
@pytest.mark.parametrize("name", INPUTS)
def test_outputs_and_tensors(pair, name, tensors):
    ours, theirs = pair
    for padding, multiple, special, overflow in itertools.product(
        (False, True, "max_length"), (None, 8), (True, False), (False, True)
    ):
        for chosen in ((), ("return_special_tokens_mask", "return_length"), ("return_offsets_mapping",)):
            arguments = _arguments(
                name,
                padding=padding,
                pad_to_multiple_of=multiple,
                add_special_tokens=special,
                return_overflowing_tokens=overflow,
                return_tensors=tensors,
                truncation=True,
                max_length=16,
                **dict.fromkeys(chosen, True),
            )
            assert_same(lambda t: t(**arguments), ours, theirs, arguments)  # noqa: B023


@pytest.mark.parametrize("cjk", [True, False], ids=["cjk", "no-cjk"])
@pytest.mark.parametrize("strip_accents", [None, True, False])
@pytest.mark.parametrize("lowercase", [True, False], ids=["uncased", "cased"])
def test_normalization(lowercase, strip_accents, cjk):
    ours, theirs = both(do_lower_case=lowercase, strip_accents=strip_accents, tokenize_chinese_chars=cjk)
    for text in TEXTS:
        assert_same(lambda t: t(text), ours, theirs, text)  # noqa: B023
        assert_same(lambda t: t.tokenize(text), ours, theirs, text)  # noqa: B023


@pytest.mark.parametrize("split", [False, True], ids=["kept", "split"])
def test_added_tokens(split):
    tokens = [
        "newtok",
        "OtherTok",  # two that are the same when normalized would tie, and transformers draws lots
        "éa",
        AddedToken("<l>", lstrip=True),
        AddedToken("<r>", rstrip=True, normalized=False),
        AddedToken("<s>", special=True, lstrip=True, rstrip=True),
        AddedToken("sw", single_word=True),
        "hello",
    ]
    transformers_tokens = pytest.importorskip("tokenizers").AddedToken
    ours, theirs = both()
    flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
    given = [
        t if isinstance(t, str) else transformers_tokens(str(t), **{f: getattr(t, f) for f in flags}) for t in tokens
    ]
    assert ours.add_tokens(tokens) == theirs.add_tokens(given)
    assert ours.add_special_tokens({"extra_special_tokens": ["<e>"]}) == theirs.add_special_tokens(
        {"extra_special_tokens": ["<e>"]}
    )
    rng = random.Random(5)
    parts = [
        "newtok",
        "NEWTOK",
        "OTHERTOK",
        " ",
        "  ",
        "<l>",
        "<r>",
        "<s>",
        "<e>",
        "sw",
        "x",
        "hello",
        "ÉA",
        "e\u0301a",
        "-",
        "[SEP]",
    ]
    for _ in range(300):
        text = "".join(rng.choices(parts, k=rng.randrange(1, 9)))
        arguments = {"split_special_tokens": split, "return_offsets_mapping": True}
        assert_same(lambda t: t(text, **arguments), ours, theirs, text)  # noqa: B023
        words = text.split(" ")
        assert_same(lambda t: t(words, is_split_into_words=True, **arguments), ours, theirs, words)  # noqa: B023
        assert_same(lambda t: t.decode(t(text).input_ids, skip_special_tokens=True), ours, theirs, text)  # noqa: B023


def test_words_and_characters(pair):
    """char_to_token and its kin, at every index and beyond the end."""
    for name in ("text", "pair", "tuples", "batch-words-pairs"):
        for padding in (False, True):
            arguments = _arguments(name, padding=padding, truncation=True, max_length=12, return_tensors=None)
            for tokenizer in pair:
                tokenizer.padding_side = "left"
            results = [tokenizer(**arguments) for tokenizer in pair]
            rows = len(results[0].encodings)
            assert rows == len(results[1].encodings)
            for row, method, sequence in itertools.product(
                range(rows), ("char_to_token", "char_to_word", "word_to_tokens", "word_to_chars"), (0, 1, 2)
            ):
                for i in range(14):
                    assert_same(lambda r: getattr(r, method)(row, i, sequence), *results, (name, row, method, i))  # noqa: B023
            for row, method in itertools.product(range(rows), ("token_to_word", "token_to_chars", "token_to_sequence")):
                for i in range(15):
                    assert_same(lambda r: getattr(r, method)(row, i), *results, (name, row, method, i))  # noqa: B023
    for tokenizer in pair:
        tokenizer.padding_side = "right"


BAD = {
    "surrogate": "a\ud800",
    "surrogate-pair": "\ud83d\ude42",
    "none": None,
    "integer": 5,
    "bytes": b"a",
    "empty-list": [],
    "list-of-none": ["a", None],
    "list-of-int": [1],
    "list-surrogate": ["a", "\udfff"],
    "triple": [("a", "b", "c")],
    "single-in-list": [["a"]],
    "pair-with-none": [("a", None)],
    "nested": [("a", ("b",))],
    "dict": {"a": 1},
    "empty-tuple": [()],
}


@pytest.mark.parametrize("split", [False, True], ids=["texts", "words"])
@pytest.mark.parametrize("name", BAD)
def test_bad_texts(pair, name, split):
    assert_same(lambda t: t(BAD[name], is_split_into_words=split), *pair)
    assert_same(lambda t: t("a", BAD[name], is_split_into_words=split), *pair)
    assert_same(lambda t: t(["a"], BAD[name], is_split_into_words=split), *pair)
    assert_same(lambda t: t([["a"]], [BAD[name]], is_split_into_words=split), *pair)


@pytest.mark.parametrize(
    "arguments",
    [
        {"padding": "foo"},
        {"padding": 1},
        {"padding": None},
        {"truncation": "foo"},
        {"truncation": 1},
        {"max_length": -1},
        {"max_length": 3.5},
        {"max_length": "3"},
        {"max_length": 2**70},
        {"max_length": 2**40, "truncation": True},
        {"max_length": 3, "stride": -1},
        {"max_length": 3, "stride": 1},
        {"max_length": 6, "stride": 5},
        {"max_length": 2, "stride": 1, "truncation": True},
        {"truncation": True, "max_length": 6, "pad_to_multiple_of": 4, "padding": True},
        {"padding": True, "pad_to_multiple_of": 0},
        {"padding": True, "pad_to_multiple_of": -1},
        {"padding": "max_length", "max_length": -3},
        {"padding": True, "padding_side": "up"},
        {"padding": False, "padding_side": "up"},
        {"return_tensors": "xx"},
        {"return_tensors": "pt"},
        {"foo": 1},
        {"return_token_type_ids": False},
        {"return_attention_mask": False},
        {"return_token_type_ids": 0, "return_length": True},
        {"tokenizer_kwargs": {"padding": "max_length", "max_length": 9}},
        {"split_special_tokens": True},
        {"split_special_tokens": 1},
        {"is_split_into_words": 1},
        {"is_split_into_words": None},
        {"stride": None},
        {"stride": None, "truncation": True},
        {"add_special_tokens": 1},
        {"add_special_tokens": None},
        {"text_target": "a b"},
        {"text_target": "a b", "max_target_length": 3, "max_length": 4},
        {"text_target": "a b", "max_target_length": 3},
    ],
    ids=str,
)
def test_arguments(arguments):
    # A tokenizer of their own: transformers' remembers the limits of the call before.
    ours, theirs = both(model_max_length=24)
    assert_same(lambda t: t("a b [SEP] c d", **arguments), ours, theirs)
    assert_same(lambda t: t(["a b c", "d"], **arguments), ours, theirs)


def test_no_text_at_all(pair):
    assert_same(lambda t: t(), *pair)
    assert_same(lambda t: t(text_target="a b"), *pair)


# What must not matter


@pytest.fixture(scope="module")
def many():
    rng = random.Random(11)
    alphabet = [*" \n\u00a0abcdeABCéİ漢字!?-'", "[MASK]", "\u0301", "\U0001f642", "##a", "one ", "two "]
    return ["".join(rng.choices(alphabet, k=rng.randrange(60))) for _ in range(400)]


def test_a_batch_is_its_texts(pair, many):
    tokenizer = pair[0]
    batch = tokenizer(many, return_offsets_mapping=True)
    for i, text in enumerate(many):
        single = tokenizer(text, return_offsets_mapping=True)
        assert all(batch[key][i] == single[key] for key in batch), repr(text)
        assert tokenizer(text)["input_ids"] == single["input_ids"]
    packed = tokenizer(many, return_tensors="packed")
    assert [ids.tolist() for ids in packed.split()] == batch["input_ids"]
    assert packed.position_ids.tolist() == [i for ids in batch["input_ids"] for i in range(len(ids))]
    padded = tokenizer(many, padding=True, return_tensors="pt")
    lengths = padded.attention_mask.sum(1)
    assert torch.equal(padded.input_ids[padded.attention_mask.bool()], packed.values)
    assert lengths.tolist() == packed.lengths
    packed.check()


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
def test_threads_change_nothing(pair, many, threads):
    tokenizer = pair[0]
    for arguments in ({}, {"truncation": True, "max_length": 9, "stride": 2, **OUTPUTS}):
        expected = outcome(lambda t: t(many, **arguments, threads=1), tokenizer)  # noqa: B023
        assert outcome(lambda t: t(many, **arguments, threads=threads), tokenizer) == expected  # noqa: B023


def test_truncation_equals_cutting(pair, many):
    tokenizer = pair[0]
    whole = tokenizer(many, add_special_tokens=False)["input_ids"]
    for limit in (1, 2, 7, 30):
        cut = tokenizer(many, add_special_tokens=False, truncation=True, max_length=limit)["input_ids"]
        assert cut == [ids[:limit] for ids in whole]


def test_packed(pair):
    tokenizer = pair[0]
    batch = tokenizer([("one two", "three"), ("a", "")], return_tensors="packed")
    assert batch.lengths == [6, 4]
    assert batch.token_type_ids.tolist() == [0, 0, 0, 0, 1, 1, 0, 0, 0, 1]
    assert batch.position_ids.tolist() == [*range(6), *range(4)]
    assert batch.cu_seqlens.tolist() == [0, 6, 10] and batch.cu_seqlens.dtype == torch.int32
    assert batch.max_seqlen == 6
    assert len(tokenizer([], return_tensors="packed")) == 0
    assert tokenizer("a", return_tensors="packed", return_token_type_ids=False).token_type_ids is None
    assert tokenizer.encode("a", return_tensors="packed").total == 3
    for arguments in ({"padding": True}, {"return_offsets_mapping": True}, {"return_overflowing_tokens": True}):
        with pytest.raises(ValueError, match=f"packed.*take away {next(iter(arguments))}"):
            tokenizer("a", return_tensors="packed", **arguments)


def test_a_very_long_text():
    tokenizer = WordPieceTokenizer(VOCABULARY)
    text = "one two " * 1_000_000
    assert len(tokenizer(text, verbose=False)["input_ids"]) == 2_000_002
    assert tokenizer(text, truncation=True, max_length=6)["input_ids"] == tokenizer("one two one two")["input_ids"]
    assert tokenizer("x" * 10_000_000)["input_ids"] == tokenizer("x" * 101)["input_ids"]
