"""fastbert._C.WordPiece against `tokenizers`, text by text."""

import gc
import multiprocessing
import os
import random
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy
import pytest

_C = pytest.importorskip("fastbert._C", reason="the extension is not built")

from tests.arrow_strings import ArrowStrings  # noqa: E402
from tests.wordpiece_samples import (  # noqa: E402
    NORMALIZERS,
    core,
    first_difference,
    peer,
    random_text,
    tokenizer_json,
    tokenizers,
)

ADDED = {  # beside BERT's own: content → options
    "newtok": {},
    "<x>": {"normalized": False, "special": True},
    "<x>y": {"normalized": False, "lstrip": True},
    "ééé": {"single_word": True},
    "b ": {"normalized": False, "rstrip": True},
}
TEXTS = [
    "",
    "The quick brown fox jumps over the lazy dog.",
    "Unaffable [MASK] café, don't! 中文 한글 e\u0301 \u302e\u0301",
    "a " * 3000 + "[SEP] tail",
    "x" * 5000,
    "中" * 5000 + "\u0301",
    "“quoted” — naïve … " * 300,
]


@pytest.fixture(scope="module")
def content():
    return tokenizer_json()


@pytest.fixture(scope="module")
def theirs(content):
    return peer(content)


@pytest.fixture(scope="module")
def ours(content):
    return core(content)


def with_normalizer(content, flags):
    return {**content, "normalizer": {**content["normalizer"], **flags}}


def rows(encodings, *fields):
    return [encodings.lists(field) for field in fields]


# ---- the same as `tokenizers` ----


@pytest.mark.parametrize("added", [False, True], ids=["plain", "added-tokens"])
@pytest.mark.parametrize("flags", NORMALIZERS.values(), ids=NORMALIZERS)
def test_random_texts(content, flags, added, record_property):
    """The longer run: FASTBERT_FUZZ=1000000 pytest tests/test_tokenizer_core.py -k random_texts"""
    count = int(os.environ.get("FASTBERT_FUZZ", "100000")) // (2 * len(NORMALIZERS))
    seed = random.SystemRandom().randrange(1 << 32)
    rng = random.Random(seed)
    theirs = peer(with_normalizer(content, flags))
    if added:
        for text, options in ADDED.items():
            theirs.add_tokens([tokenizers.AddedToken(text, **{"special": False, **options})])
    ours = core({**with_normalizer(content, flags), "added_tokens": _added_tokens(theirs)})
    words = list(content["model"]["vocab"])
    for start in range(0, count, 1000):
        texts = [random_text(rng, words) for _ in range(min(1000, count - start))]
        _C.set_isa(rng.choice(_C.isas()))
        try:
            difference = first_difference(theirs, ours, texts)
        finally:
            _C.set_isa(_C.isas()[0])
        assert difference is None, f"seed {seed}: {difference}"


def _added_tokens(theirs):
    names = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")
    tokens = theirs.get_added_tokens_decoder().items()
    return [{"id": i, **{name: getattr(token, name) for name in names}} for i, token in tokens]


def _code_points():
    """Every one that Unicode assigns, and of the planes that it leaves empty or to private use some and their ends."""
    empty = [*range(0x33500, 0xE0000), *range(0xE0200, 0x110000)]
    some = [c for c in empty if c % 61 == 0 or c & 0xFFFF in (0, 0xFFFD, 0xFFFE, 0xFFFF)]
    return [*range(0xD800), *range(0xE000, 0x33500), *range(0xE0000, 0xE0200), *some]


@pytest.mark.parametrize("part", range(4))
def test_every_code_point(theirs, ours, part):
    """Alone, within a word, and with marks around it that may change places."""
    points = [chr(c) for c in _code_points()[part::4]]
    texts = ["".join(f"a{c}b {c} e\u0345{c}\u0334\n" for c in points[i : i + 256]) for i in range(0, len(points), 256)]
    assert first_difference(theirs, ours, texts) is None


@pytest.mark.parametrize(
    "options", [{"single_word": True}, {"lstrip": True}, {"rstrip": True}], ids=lambda each: next(iter(each))
)
def test_every_neighbour_of_an_added_token(content, options):
    theirs = peer(content)
    theirs.add_tokens([tokenizers.AddedToken("[T]", normalized=False, **options)])
    ours = core({**content, "added_tokens": _added_tokens(theirs)})
    ideographs = {*range(0x3500, 0x9F00), *range(0xAD00, 0xD700), *range(0x17000, 0x18B00)}  # and syllables: all alike
    points = [chr(c) for c in _code_points() if c < 0x20000 and (c not in ideographs or c % 61 == 0)]
    texts = ["".join(f"-{c}[T]{c}-" for c in points[i : i + 256]) for i in range(0, len(points), 256)]
    assert first_difference(theirs, ours, texts) is None


@pytest.mark.parametrize("limit", [0, 1, 3, 100])
@pytest.mark.parametrize("prefix", ["##", "", "a"], ids=["hashes", "none", "letter"])
def test_other_vocabularies(prefix, limit):
    rng = random.Random(f"{prefix}{limit}")
    pieces = {"".join(rng.choices("aabé中", k=rng.randint(1, 5))) for _ in range(60)}
    vocab = {token: i for i, token in enumerate(["?", *sorted(pieces | {prefix + each for each in pieces}), "a" * 20])}
    model = tokenizers.models.WordPiece(
        vocab, unk_token="?", continuing_subword_prefix=prefix, max_input_chars_per_word=limit
    )
    theirs = tokenizers.Tokenizer(model)
    theirs.normalizer = tokenizers.normalizers.BertNormalizer(strip_accents=False)
    theirs.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    ours = _C.WordPiece(vocab, unk_token="?", prefix=prefix, max_input_chars_per_word=limit, strip_accents=False)
    texts = ["".join(rng.choices("aaabbé中 ?", k=rng.randint(0, 40))) for _ in range(500)]
    assert first_difference(theirs, ours, texts) is None


def test_bytes_of_every_kind_are_the_text(ours):
    encoded = [text.encode() for text in TEXTS]
    wanted = rows(ours.encode(TEXTS, offsets=True), "input_ids", "offset_mapping", "word_ids")
    joined, bounds = b"".join(encoded), numpy.cumsum([0, *map(len, encoded)])
    columns = {
        "list": (encoded,),
        "int64": (joined, bounds.astype(numpy.int64)),
        "int32": (memoryview(joined), bounds.astype(numpy.int32)),
        "numpy": (numpy.array(TEXTS),),
        "strided": (numpy.array([each for text in TEXTS for each in (text, "")])[::2],),
        "StringDType": (numpy.array(TEXTS, dtype=numpy.dtypes.StringDType()),),
        "string": (ArrowStrings(encoded, "u"),),
        "large_string": (ArrowStrings(encoded, "U"),),
        "string_view": (ArrowStrings(encoded, "vu"),),
    }
    for name, column in columns.items():
        found = rows(ours.encode_utf8(*column, offsets=True), "input_ids", "offset_mapping", "word_ids")
        assert found == wanted, name


# ---- the same as itself ----


def test_instruction_sets_agree(ours, isa):
    text = "".join(random_text(random.Random(i), ["word", "ing"]) + " " for i in range(300))
    texts = [text[i:] for i in range(80)] + [text.encode("latin-1", "ignore").decode("latin-1")[i:] for i in range(80)]
    found = rows(ours.encode(texts, offsets=True), "input_ids", "offset_mapping")
    _C.set_isa("baseline")
    assert found == rows(ours.encode(texts, offsets=True), "input_ids", "offset_mapping")


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("strategy", ["longest_first", "only_first"])
def test_early_stop_is_full_then_truncate(ours, strategy, side):
    """Overflowing windows need every token, so their first row is made without the early stop."""
    pairs = [(a, b) for a in TEXTS for b in ("", "b b b", TEXTS[2], TEXTS[3])]
    for max_length in range(8, 600, 37):
        for texts in (TEXTS, pairs if strategy == "longest_first" else TEXTS):
            options = {"max_length": max_length, "strategy": strategy, "truncation_side": side}
            early = ours.encode(texts, **options)
            full = ours.encode(texts, overflow=True, **options)
            _, first = numpy.unique(full.samples(), return_index=True)
            assert early.lists("input_ids") == [full.list("input_ids", i) for i in first]


@pytest.mark.parametrize("offsets", [False, True], ids=["ids", "offsets"])
def test_threads_and_batches_change_nothing(ours, offsets):
    rng = random.Random(5)
    texts = [random_text(rng, ["word", "ing"]) * rng.choice([1, 30]) for _ in range(1500)]
    fields = ("input_ids", "offset_mapping", "word_ids") if offsets else ("input_ids",)
    wanted = rows(ours.encode(texts, offsets=offsets), *fields)
    for threads in (2, 3, 8):
        assert rows(ours.encode(texts, offsets=offsets, threads=threads), *fields) == wanted
    singles = [ours.encode(text, offsets=offsets) for text in texts]
    assert [[each.list(field, 0) for each in singles] for field in fields] == wanted


def test_cold_is_warm(content, ours):
    rng = random.Random(6)
    texts = ["".join(rng.choices("abcdefgh ", k=300)) for _ in range(300)]  # more words than the cache holds
    cold = core(content).encode(texts).packed("input_ids")
    for _ in range(2):
        assert (ours.encode(texts).packed("input_ids") == cold).all()


# ---- the layouts ----


def test_layouts_agree(ours):
    encodings = ours.encode([*TEXTS[:3], (TEXTS[1], TEXTS[2])], offsets=True)
    lengths = encodings.lengths()
    assert len(encodings) == 4 and encodings.total == lengths.sum() and encodings.longest == lengths.max()
    assert (encodings.cu_seqlens() == [0, *lengths.cumsum()]).all() and encodings.cu_seqlens().dtype == numpy.int32
    fields = ("input_ids", "token_type_ids", "attention_mask", "special_tokens_mask", "position_ids", "offset_mapping")
    for field in (*fields, "word_ids", "sequence_ids"):
        lists = [[-1 if value is None else value for value in row] for row in encodings.lists(field)]
        flat = numpy.array([value for row in lists for value in row])
        assert (encodings.packed(field) == flat).all()
        length = encodings.longest + 3
        for left in (False, True):
            padded = encodings.padded(field, length, 7, left)
            for row, real in zip(padded, lists, strict=True):
                begin = length - len(real) if left else 0
                assert (row[begin : begin + len(real)] == real).all()
                assert (numpy.delete(row, range(begin, begin + len(real)), axis=0) == 7).all()
        assert [encodings.list(field, i) for i in range(4)] == encodings.lists(field)


@pytest.mark.parametrize("length", [2**60, 2**60 + 2**18, 2**61, 2**63 - 1], ids=hex)
def test_lengths_beyond_memory_are_refused(ours, length):
    with pytest.raises((ValueError, MemoryError)):
        ours.encode(["a", "b"]).padded("input_ids", length)


@pytest.mark.parametrize("with_types", [True, False], ids=["types", "no-types"])
@pytest.mark.parametrize(
    "texts", [[], TEXTS[:3], [TEXTS[1] * (900 * i) for i in range(20)]], ids=["none", "few", "many"]
)
def test_packed_batch_is_the_packed_fields(ours, texts, with_types):
    encodings = ours.encode([(text, text) for text in texts], threads=3)
    assert len(texts) < 20 or encodings.total > 1 << 18  # tokens from which threads write
    ids, cu_seqlens, positions, types, lengths = encodings.packed_batch(with_types)
    assert (ids == encodings.packed("input_ids")).all() and (cu_seqlens == encodings.cu_seqlens()).all()
    starts = numpy.repeat(cu_seqlens[:-1], encodings.lengths())
    assert (positions == numpy.arange(encodings.total) - starts).all()
    assert (types == encodings.packed("token_type_ids")).all() if with_types else types is None
    assert lengths == encodings.lengths().tolist()


@pytest.mark.parametrize("options", [{}, {"max_length": 5}, {"offsets": True, "threads": 4}], ids=str)
def test_nothing_to_encode(ours, options):
    for texts in ([], [""], ["", "\x00"], [("", "")]):
        encodings = ours.encode(texts, **options)
        assert len(encodings) == len(texts)
        assert (
            encodings.total == sum(map(len, encodings.lists("input_ids"))) == (2 + (texts == [("", "")])) * len(texts)
        )


def test_added_tokens_everywhere(content):
    """Their work is linear in the text, where no space ends a chunk either."""
    added = [
        {"content": "ab", "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    ]
    tokenizer = core({**content, "added_tokens": [{"id": 7, **each} for each in added]})
    ids = tokenizer.encode("ab" * 1_000_000, add_special_tokens=False).packed("input_ids")
    assert len(ids) == 1_000_000 and (ids == 7).all()


def test_results_outlive_the_tokenizer(content):
    encodings = core(content).encode("a b", offsets=True)
    gc.collect()
    assert encodings.list("word_ids", 0) == [None, 0, 1, None]


# ---- bad input ----


@pytest.mark.parametrize("limit", [-1, 4], ids=["full", "early-stop"])
@pytest.mark.parametrize("length", [0, 1, 63, 64, 5000])
@pytest.mark.parametrize("half", ["\ud800", "\udfff", "\udc00\ud800"], ids=["high", "low", "swapped"])
def test_lone_surrogates(ours, half, length, limit):
    for text in ("a " * length + half, "中 " * length + half, "😀" + "a " * length + half + " b"):
        with pytest.raises(TypeError, match=rf"texts\[1\].*character {text.index(half[0])}"):
            ours.encode(["fine", text], max_length=limit)


@pytest.mark.parametrize(
    "bad", [b"\xff", b"\xc0\x80", b"\xe0\x80\x80", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\xe4\xb8"]
)
def test_invalid_utf8(ours, bad):
    for before in (b"", b"a" * 70, "é".encode() * 33, b"a " * 4000):
        for after in (b"", b" tail"):
            for options in ({}, {"max_length": 4}, {"offsets": True}):
                with pytest.raises(ValueError, match=f"row 1 is not valid UTF-8 at byte {len(before)}"):
                    ours.encode_utf8([b"fine", before + bad + after], **options)


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ((None,), TypeError, "expected a list"),
        (([1],), TypeError, r"texts\[0\] is of type int"),
        ((["a", b"b"],), TypeError, r"texts\[1\] is of type bytes"),
        (([("a", "b", "c")],), TypeError, r"texts\[0\] is of type tuple"),
        ((["a"], ["b", "c"]), ValueError, "texts and pairs have 1 and 2 items"),
    ],
    ids=["none", "int", "bytes", "triple", "lengths"],
)
def test_wrong_types(ours, arguments, error, message):
    with pytest.raises(error, match=message):
        ours.encode(*arguments)


@pytest.mark.parametrize(
    "column, error, message",
    [
        (("text",), TypeError, "data is of type str"),
        (([b"a", "b"],), TypeError, "row 1 is of type str"),
        ((b"abc", numpy.array([0, 4])), ValueError, "row 0 goes from byte 0 to 4"),
        ((b"abc", numpy.array([2, 1])), ValueError, "row 0 goes from byte 2 to 1"),
        ((b"abc", numpy.array([-1, 1])), ValueError, "row 0 goes from byte -1 to 1"),
        ((b"abc", numpy.array([0.0, 1.0])), TypeError, "expected one, of int32 or int64"),
        ((b"abc", numpy.array([], dtype=int)), ValueError, "bounds is empty"),
        ((numpy.array(["a"]).astype(">U1"),), TypeError, "native byte order"),
        ((numpy.array([["a"]]),), TypeError, "2 dimensions"),
        ((numpy.array([1.0]),), TypeError, "format 'd'"),
        ((numpy.array(["a", None], dtype=numpy.dtypes.StringDType(na_object=None)),), ValueError, "row 1 is missing"),
        ((ArrowStrings([b"a", None], "u"),), ValueError, "row 1 is null"),
        ((ArrowStrings([b"a"], "i"),), TypeError, "of format 'i'"),
    ],
)
def test_wrong_columns(ours, column, error, message):
    with pytest.raises(error, match=message):
        ours.encode_utf8(*column)


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"unk_token": "?"}, ValueError, "lacks the unknown token '\\?'"),
        ({"vocab": {"[UNK]": -1}}, ValueError, "id of the token '\\[UNK\\]' is -1"),
        ({"vocab": {"[UNK]": 1 << 31}}, ValueError, "expected 0 to 2147483647"),
        ({"vocab": {"[UNK]": 0, "a": "b"}}, TypeError, "expected str: int"),
        ({"vocab": {"[UNK]": 0, "\ud800": 1}}, ValueError, "half of a surrogate pair"),
        ({"added_tokens": [(1, "", False, False, False, False, False)]}, ValueError, "is empty"),
        ({"added_tokens": [(1, "\u0301", False, False, False, True, False)]}, ValueError, "empty once normalized"),
        ({"single": []}, ValueError, r"single has \$A 0 times"),
        ({"pair": [(-1, 0)]}, ValueError, r"pair has \$A 1 times and \$B 0"),
        ({"max_input_chars_per_word": -1}, ValueError, "max_input_chars_per_word is -1"),
    ],
)
def test_wrong_construction(options, error, message):
    with pytest.raises(error, match=message):
        _C.WordPiece(options.pop("vocab", {"[UNK]": 0}), **options)


# ---- processes, threads, memory ----


def test_many_threads_at_once_while_the_list_changes(ours):
    texts = [text * 20 for text in TEXTS] * 10
    wanted = ours.encode(texts).packed("input_ids")
    shared = list(texts)
    stop = threading.Event()

    def change():
        while not stop.is_set():
            shared[:] = [text + "" for text in texts]

    changer = threading.Thread(target=change)
    changer.start()
    try:
        with ThreadPoolExecutor(4) as pool:
            for found in pool.map(lambda _: ours.encode(shared, threads=2).packed("input_ids"), range(12)):
                assert (found == wanted).all()
    finally:
        stop.set()
        changer.join()


def _encode_in_child(connection, tokenizer, texts):
    connection.send(tokenizer.encode(texts, threads=2).packed("input_ids").tolist())


@pytest.mark.skipif(sys.platform == "win32", reason="no fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_fork(ours):
    texts = [TEXTS[3]] * 40
    wanted = ours.encode(texts, threads=2).packed("input_ids").tolist()
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_encode_in_child, args=(sender, ours, texts))
    child.start()
    assert receiver.poll(30), "the child hangs"
    assert receiver.recv() == wanted
    child.join()


GROWTH = """
import resource, sys
sys.path.insert(0, {root!r})
from tests.wordpiece_samples import core, tokenizer_json
tokenizer = core(tokenizer_json())
assert tokenizer.memory() < 16 << 20, tokenizer.memory()
def peak(first):
    for i in range(first, first + 30000):
        tokenizer.encode(f"word{{i}} x{{i * 7919}}").packed("input_ids")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = peak(0)
after = peak(30000)
assert after - before < 1024, (before, after)
"""


def test_memory_does_not_grow():
    root = str(Path(__file__).resolve().parent.parent)
    done = subprocess.run([sys.executable, "-c", GROWTH.format(root=root)], capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stderr
