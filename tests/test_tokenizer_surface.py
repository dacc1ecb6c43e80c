"""The rest of the tokenizer's surface against transformers' BertTokenizer, call by call; and what Python does to objects."""

import copy
import multiprocessing
import pickle
import random
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy
import pytest
import torch

from fastbert.tokenizer import AddedToken, BatchEncoding, WordPieceTokenizer
from tests.tokenizer_samples import TEXTS, VOCABULARY, assert_same, both, plain


@pytest.fixture
def pair():
    return both(model_max_length=24)


CALLS = """
t.tokenize('hello unaffable', 'b', add_special_tokens=True)
t.tokenize(['hello'])
t.tokenize(['hello', 'a'])
t.tokenize(5)
t.tokenize('hello a b', max_length=2, truncation=True)
t.encode('hello', 'a')
t.encode(['hello', 'a'])
t.encode('a', return_tensors='pt')
t.encode('a', padding='max_length', max_length=5)
t.encode('a', padding=True, pad_to_multiple_of=4)
t.encode('a b c', max_length=4)
t.encode([1, 2])
t.encode('a b', add_special_tokens=False)
t.decode([2, 7, 8, 3])
t.decode([2, 7, 8, 3], skip_special_tokens=True)
t.decode([2, 7], clean_up_tokenization_spaces=False)
t.decode(t("don't do not, 's unaffable !").input_ids)
t.decode(t("don't do not, 's unaffable !").input_ids, clean_up_tokenization_spaces=True)
t.decode([7, 10**4])
t.decode(7)
t.decode([])
t.decode([[7], [8, 9]])
t.decode([-1])
t.decode('7')
t.decode(['7'])
t.decode([7.0])
t.decode(None)
t.decode({'input_ids': [7]})
t.decode(t('a'))
t.decode([7], skip_special_tokens=1)
t.decode([2**33])
t.decode(torch.tensor([7, 8]))
t.decode(torch.tensor([[7, 8], [9, 0]]))
t.decode(numpy.array([7, 8]))
t.decode([numpy.int64(7), 8])
t.decode(t(['a b', 'c'], padding=True, return_tensors='pt').input_ids, skip_special_tokens=True)
t.decode([7], foo=1)
t.decode([(7, 8)])
t.decode(((7, 8), (9,)))
t.decode([[[7]]])
t.batch_decode([7, 8])
t.batch_decode([])
t.batch_decode([[]])
t.batch_decode(7)
t.batch_decode([[7, 8], [9]], skip_special_tokens=True)
t.batch_decode(numpy.array([[7, 8], [2, 3]]), clean_up_tokenization_spaces=True)
t.clean_up_tokenization("a . b ' s n't do not")
t.convert_ids_to_tokens(7)
t.convert_ids_to_tokens(-1)
t.convert_ids_to_tokens(10**4)
t.convert_ids_to_tokens(2**40)
t.convert_ids_to_tokens([7, -1])
t.convert_ids_to_tokens('7')
t.convert_ids_to_tokens(['7', 8.7, numpy.int64(9)])
t.convert_ids_to_tokens([2, 7], skip_special_tokens=True)
t.convert_ids_to_tokens(torch.tensor([2, 7]))
t.convert_ids_to_tokens(7.5)
t.convert_ids_to_tokens(None)
t.convert_ids_to_tokens(True)
t.convert_tokens_to_ids('hello')
t.convert_tokens_to_ids(['hello', 'nonsense', '[MASK]'])
t.convert_tokens_to_ids(5)
t.convert_tokens_to_ids([5])
t.convert_tokens_to_ids(None)
t.convert_tokens_to_ids('\\ud800')
t.convert_tokens_to_string(['un', '##aff', '!'])
t.convert_tokens_to_string('abc')
t.convert_tokens_to_string([1])
t.convert_tokens_to_string([])
t.num_special_tokens_to_add()
t.num_special_tokens_to_add(True)
t.num_special_tokens_to_add(pair=1)
t.get_special_tokens_mask([1, 2, 9])
t.get_special_tokens_mask([1, 2, 9], already_has_special_tokens=True)
t.get_special_tokens_mask([1], [2], already_has_special_tokens=True)
t.max_len_single_sentence, t.max_len_sentences_pair, t.model_max_length
len(t), t.vocab_size, bool(t), t.is_fast, t.padding_side, t.truncation_side, t.model_input_names
t.get_vocab(), t.vocab, t.get_added_vocab(), t.added_tokens_encoder, t.added_tokens_decoder
t.bos_token, t.bos_token_id, t.cls_token, t.cls_token_id, t.pad_token_type_id, t.mask_token_id
t.special_tokens_map, t.all_special_tokens, t.all_special_ids, t.extra_special_tokens, t.extra_special_tokens_ids
t.nonsense
t.nonsense_token
'hello' in t
t.add_tokens(['x', 'yy', 'x', '', 'hello', 'new ']), t.get_added_vocab(), len(t), t('yynew X').tokens()
t.add_tokens('yy'), len(t)
t.add_tokens(['##a']), t('ba##a').tokens()
t.add_tokens([1])
t.add_tokens(None)
t.add_tokens(['\\ud800'])
t.add_tokens({'q'})
t.add_tokens(['yy'], special_tokens=True), t.added_tokens_decoder, t.decode(t('yy a').input_ids, skip_special_tokens=True)
t.add_tokens(['Éa', 'QQ']), t('éa ÉA qq').tokens(), t.decode(t('éa qq').input_ids), t.convert_ids_to_tokens(len(t) - 1)
t.add_special_tokens({'extra_special_tokens': ['<e>'], 'cls_token': '[C2]'}), t.cls_token_id, t('a <e>').input_ids
t.add_special_tokens({'foo_token': 'x'})
t.add_special_tokens({'cls_token': 5})
t.add_special_tokens({'extra_special_tokens': 'abc'})
t.add_special_tokens({})
t.add_special_tokens({'additional_special_tokens': ['qq']}), t.all_special_tokens
setattr(t, 'cls_token', 'hello'), t.cls_token_id, t('a').input_ids
setattr(t, 'pad_token_id', 8), t.pad_token, t(['a b', 'a'], padding=True)
setattr(t, 'pad_token', None), t(['a'], padding=True)
setattr(t, 'cls_token', 5)
setattr(t, 'extra_special_tokens', 5)
setattr(t, 'extra_special_tokens', ['a']), t.all_special_ids
setattr(t, 'model_input_names', ['input_ids']), t('a')
setattr(t, 'split_special_tokens', True), t('a [MASK]').tokens()
setattr(t, 'clean_up_tokenization_spaces', True), t.decode(t("don't").input_ids)
setattr(t, 'model_max_length', 5), t('a b c d e f', truncation=True), t('a', padding='max_length')
setattr(t, 'truncation_side', 'up'), t('a b', truncation=True, max_length=3)
t.pad({'input_ids': [1, 2]})
t.pad({'input_ids': [1, 2]}, padding='max_length', max_length=4)
t.pad({'input_ids': [[1, 2], [3]], 'token_type_ids': [[0, 1], [1]]})
t.pad([{'input_ids': [1, 2], 'labels': 0}, {'input_ids': [3], 'labels': 1}], return_tensors='pt')
t.pad([t('a b'), t('c')], padding=True, return_tensors='np')
t.pad([t('a b'), t('c')], padding_side='left', pad_to_multiple_of=8)
t.pad([t('a b', return_special_tokens_mask=True), t('c', return_special_tokens_mask=True)])
t.pad([{'input_ids': torch.tensor([1, 2])}, {'input_ids': torch.tensor([3])}])
t.pad([{'input_ids': numpy.array([1, 2])}, {'input_ids': numpy.array([3])}])
t.pad({'input_ids': [[1, 2], [3]]}, return_attention_mask=False)
t.pad({'input_ids': [[1, 2], [3]]}, padding=False)
t.pad({'input_ids': [[1, 2], [3]]}, padding=False, return_tensors='pt')
t.pad({'input_ids': [[1, 2], [3]], 'labels': [[1, 2], [3]]}, return_tensors='pt')
t.pad({'input_ids': []})
t.pad({'input_ids': [], 'a': 1}, return_attention_mask=True)
t.pad({'input_ids': [[], [1]]})
t.pad({'labels': [1]})
t.pad([])
t.pad({'input_ids': ['a']})
t.pad({'input_ids': [[1], [2]], 'labels': [1]})
t.pad({'input_ids': [[1, 2], [3]]}, padding='nonsense')
t.pad({'input_ids': [[1, 2], [3]]}, padding_side='up')
t.pad({'input_ids': [[1, 2, 3], [3]]}, padding='max_length', max_length=2)
t.pad({'input_ids': [[1, 2], [3]], 'labels': numpy.array([1.5, 2.5])}, return_tensors='pt')
t.pad({'input_ids': [[1, 2], [3]], 'labels': [numpy.float64(1.5), 2.5]}, return_tensors='pt')
t('a b').char_to_token(-1)
t('a b', add_special_tokens=False).token_to_chars(-1)
t(['a b', 'c'], return_offsets_mapping=True).word_ids(-1)
t(['a b', 'c'], return_offsets_mapping=True).word_ids(2)
t(['a b', 'c'], return_offsets_mapping=True, padding=True).word_ids(1)
[(r.word_ids().append(9), r[0].ids.append(9), r.word_ids(), r[0].ids) for r in [t('a b')]]
[(setattr(r, 'note', 5), r.note, list(r)) for r in [t('a b')]]
t.encode_plus('a')
t.batch_encode_plus(['a'])
""".strip().split("\n")


@pytest.mark.parametrize("call", CALLS)
def test_calls(pair, call):
    run = eval(f"lambda t: ({call})", {"numpy": numpy, "torch": torch})
    assert_same(run, *pair)


def test_results(pair):
    """The mapping that a call returns."""
    for arguments in ({}, {"return_tensors": "pt", "padding": True}):
        ours, theirs = (t(TEXTS[2:5], **arguments) for t in pair)
        assert list(ours) == list(theirs)
        assert (len(ours), dict(**ours).keys()) == (len(theirs), dict(**theirs).keys())
        for call in (
            lambda r: r.input_ids,
            lambda r: r["attention_mask"],
            lambda r: r[1],
            lambda r: r[0:2],
            lambda r: r["nonsense"],
            lambda r: r.nonsense,
            lambda r: r[7],
            lambda r: dict(r.data),
            lambda r: (r.is_fast, r.n_sequences, len(r.encodings)),
            lambda r: r.tokens(2),
            lambda r: r.word_to_chars(99),
            lambda r: r.to("cpu"),
            lambda r: copy.deepcopy(r),
            lambda r: copy.copy(r).word_ids(1),
            lambda r: pickle.loads(pickle.dumps(r)),
            lambda r: r.convert_to_tensors("np") if "pt" not in str(arguments) else 0,  # noqa: B023
        ):
            assert_same(call, ours, theirs, arguments)
    plain_mapping = BatchEncoding({"input_ids": [[1, 2], [3, 4]]}, tensor_type="pt")
    assert plain_mapping.encodings is None and plain_mapping[:1]["input_ids"].tolist() == [[1, 2]]
    with pytest.raises(ValueError, match=r"word_ids\(\) is not available"):
        plain_mapping.word_ids()
    with pytest.raises(KeyError):
        plain_mapping[0]
    with pytest.raises(ValueError, match="tf is not a valid TensorType"):
        BatchEncoding({"input_ids": [1]}, tensor_type="tf")


def test_details_are_those_of_the_call():
    """Words and characters are found when asked for; nothing that happened since may show."""
    tokenizer = WordPieceTokenizer(VOCABULARY)
    texts, words = ["one two", "three"], [["one", "two"]]
    result, split = tokenizer(texts), tokenizer(words, is_split_into_words=True)
    texts[0], words[0][1] = "changed", "x y z"
    tokenizer.add_tokens(["one", "two"])
    tokenizer.padding_side = "left"
    assert result.tokens() == ["[CLS]", "one", "two", "[SEP]"]
    assert split.word_ids() == [None, 0, 1, None]


# utf-8


def test_encode_utf8():
    tokenizer = WordPieceTokenizer(VOCABULARY)
    expected = tokenizer(TEXTS)["input_ids"]
    data = [text.encode() for text in TEXTS]
    offsets = numpy.cumsum([0, *map(len, data)], dtype=numpy.int64)
    for rows in (tokenizer.encode_utf8(data), tokenizer.encode_utf8(b"".join(data), offsets)):
        assert rows.lists("input_ids") == expected
    packed = tokenizer.encode_utf8(data, return_tensors="packed")
    assert [ids.tolist() for ids in packed.split()] == expected
    assert tokenizer.encode_utf8(memoryview(data[2])).lists("input_ids") == [expected[2]]
    without_nul = [text for text in TEXTS if "\0" not in text]
    rows = tokenizer.encode_utf8(numpy.array(without_nul), truncation=True, max_length=6)
    assert rows.lists("input_ids") == tokenizer(without_nul, truncation=True, max_length=6)["input_ids"]
    with pytest.raises(ValueError, match="UTF-8"):
        tokenizer.encode_utf8([b"a", b"\xff"])
    with pytest.raises(TypeError):
        tokenizer.encode_utf8(5)
    with pytest.raises(ValueError, match="return_tensors is 'pt'"):
        tokenizer.encode_utf8(b"a", return_tensors="pt")


# What Python does to objects


@pytest.mark.parametrize("again", [copy.copy, copy.deepcopy, lambda t: pickle.loads(pickle.dumps(t))])
def test_copies(again):
    tokenizer = WordPieceTokenizer(VOCABULARY, model_max_length=24, padding_side="left", cls_token="a")
    tokenizer.add_tokens(["newer", AddedToken("<l>", lstrip=True)])
    other = again(tokenizer)
    assert plain(other(TEXTS, padding=True)) == plain(tokenizer(TEXTS, padding=True))
    assert repr(other) == repr(tokenizer)
    if again is not copy.copy:
        other.add_tokens(["more"])
        other.cls_token = "b"
        assert (len(tokenizer), tokenizer.cls_token) == (len(other) - 1, "a")


def _ids(tokenizer, texts, queue):
    queue.put(tokenizer(texts, threads=2)["input_ids"])


def test_fork():
    tokenizer = WordPieceTokenizer(VOCABULARY)
    texts = TEXTS * 40
    expected = tokenizer(texts, threads=2)["input_ids"]
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_ids, args=(tokenizer, texts, queue))
    child.start()
    assert queue.get(timeout=60) == expected
    child.join(60)
    assert child.exitcode == 0


def test_data_loader_workers():
    tokenizer = WordPieceTokenizer(VOCABULARY)
    loader = torch.utils.data.DataLoader(
        TEXTS, batch_size=4, num_workers=2, collate_fn=_Collate(tokenizer), multiprocessing_context="fork"
    )
    batches = list(loader)
    expected = [tokenizer(TEXTS[i : i + 4], padding=True, return_tensors="pt") for i in range(0, len(TEXTS), 4)]
    assert [plain(batch) for batch in batches] == [plain(batch) for batch in expected]


class _Collate:
    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def __call__(self, texts):
        return self.tokenizer(texts, padding=True, return_tensors="pt")


def test_many_threads():
    tokenizer = WordPieceTokenizer(VOCABULARY)
    limits = random.Random(3).choices([3, 5, 9, 20], k=200)
    expected = {n: tokenizer(TEXTS, truncation=True, max_length=n)["input_ids"] for n in set(limits)}
    adding = threading.Thread(target=lambda: [tokenizer.add_tokens([f"<{i}>"]) for i in range(20)])
    adding.start()
    with ThreadPoolExecutor(8) as pool:
        results = pool.map(lambda n: tokenizer(TEXTS, truncation=True, max_length=n, threads=2)["input_ids"], limits)
        assert all(result == expected[n] for n, result in zip(limits, results, strict=True))
    adding.join()
    assert len(tokenizer) == len(VOCABULARY) + 20
