"""fastbert.optimize on SentenceTransformer and CrossEncoder: results stay, whatever is asked of them."""

import copy
import pickle

import numpy
import pytest
import torch

import fastbert
from tests.bert_samples import minilm_folder, random_bert, small_config
from tests.tokenizer_samples import TEXTS, VOCABULARY, theirs

sentence_transformers = pytest.importorskip("sentence_transformers")
transformers = pytest.importorskip("transformers")

from sentence_transformers import CrossEncoder, SentenceTransformer  # noqa: E402
from sentence_transformers.sentence_transformer import losses, modules  # noqa: E402

from fastbert.integrations import sentence_transformers as ours  # noqa: E402
from fastbert.integrations.transformers import FastBertTokenizer  # noqa: E402

pytestmark = [
    pytest.mark.skipif(
        not hasattr(SentenceTransformer, "_inference"), reason="sentence-transformers before 6 runs padded batches"
    ),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
PROMPTS = {"query": "one two: ", "document": "the "}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny BERT with its tokenizer."""
    path = tmp_path_factory.mktemp("bert")
    random_bert(small_config(vocab_size=len(VOCABULARY))).save_pretrained(path)
    theirs().save_pretrained(path)
    return str(path)


def make(folder, *behind, pooling="mean", **arguments):
    """A SentenceTransformer around the tiny BERT."""
    transformer = modules.Transformer(folder, max_seq_length=32)
    parts = [transformer, modules.Pooling(36, pooling, **arguments), *behind]
    return SentenceTransformer(modules=parts, device="cpu", prompts=PROMPTS)


def packed_calls(model):
    return model._fastbert_texts.calls["packed"]


def assert_equal(found, expected):
    """Of whatever encode returns."""
    assert type(found) is type(expected)
    if isinstance(expected, dict):
        # What a call that is not packed returns beside is sentence-transformers' own.
        assert found.keys() == expected.keys()
        for key in expected:
            assert_equal(found[key], expected[key])
    elif isinstance(expected, list):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_equal(one, other)
    elif isinstance(expected, torch.Tensor):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    elif isinstance(expected, numpy.ndarray):
        assert found.dtype == expected.dtype
        numpy.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    else:
        assert found == expected


CALLS = {
    "list": lambda m: m.encode(TEXTS),
    "one": lambda m: m.encode(TEXTS[3]),
    "none": lambda m: m.encode([]),
    "none-tensor": lambda m: m.encode([], convert_to_tensor=True),
    "array": lambda m: m.encode(numpy.array(TEXTS)),
    "tuple": lambda m: m.encode(tuple(TEXTS)),
    "batches": lambda m: m.encode(TEXTS, batch_size=2, show_progress_bar=True),
    "many-batches": lambda m: m.encode(TEXTS * 3, batch_size=1),
    "tensor": lambda m: m.encode(TEXTS, convert_to_tensor=True),
    "tensors": lambda m: m.encode(TEXTS, convert_to_numpy=False),
    "prompt": lambda m: m.encode(TEXTS, prompt="hello "),
    "prompt-name": lambda m: m.encode(TEXTS, prompt_name="query"),
    "query": lambda m: m.encode_query(TEXTS),
    "document": lambda m: m.encode_document(TEXTS),
    "normalized": lambda m: m.encode(TEXTS, normalize_embeddings=True),
    "truncated": lambda m: m.encode(TEXTS, truncate_dim=5, normalize_embeddings=True),
    "binary": lambda m: m.encode(TEXTS, precision="ubinary"),
}
PADDED = {
    "tokens": lambda m: m.encode(TEXTS, output_value="token_embeddings"),
    "everything": lambda m: [
        {k: v for k, v in row.items() if k != "token_embeddings"} for row in m.encode(TEXTS, output_value=None)
    ],
    "processing": lambda m: m.encode(TEXTS, processing_kwargs={"text": {"max_length": 5}}),
    "forward": lambda m: m(m.preprocess(TEXTS))["sentence_embedding"],
}


@pytest.mark.parametrize("call", [*CALLS, *PADDED])
def test_encode_gives_what_it_gave(folder, call):
    model = make(folder)
    encode = {**CALLS, **PADDED}[call]
    expected = encode(model)
    assert fastbert.optimize(model) is model
    assert_equal(encode(model), expected)
    assert packed_calls(model) == (call in CALLS)
    assert model._fastbert_texts.calls.total() == (call != "forward")
    fastbert.restore(model)
    assert_equal(encode(model), expected)


@pytest.mark.parametrize(
    "pooling",
    ["cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken", ("mean", "cls", "max")],
    ids=str,
)
def test_every_pooling(folder, pooling):
    model = make(folder, pooling=pooling)
    expected = model.encode(TEXTS, batch_size=4)
    fastbert.optimize(model)
    assert_equal(model.encode(TEXTS, batch_size=4), expected)
    assert packed_calls(model) == 1


def test_modules_behind_the_pooling(folder):
    torch.manual_seed(0)
    model = make(folder, modules.Dense(36, 7), modules.LayerNorm(7), modules.Normalize())
    expected = model.encode(TEXTS)
    fastbert.optimize(model)
    assert_equal(model.encode(TEXTS), expected)
    assert packed_calls(model) == 1


def test_pooling_without_the_prompt(folder):
    model = make(folder, include_prompt=False)
    calls = (lambda: model.encode(TEXTS, prompt="hello "), lambda: model.encode(TEXTS))
    expected = [call() for call in calls]
    fastbert.optimize(model)
    assert_equal([call() for call in calls], expected)
    assert model._fastbert_texts.calls == {"packed": 1, "pooling without the prompt": 1}


def test_max_seq_length_set_later(folder):
    model = make(folder)
    fastbert.optimize(model)
    model.max_seq_length = 6
    found = model.encode(TEXTS)
    fastbert.restore(model)
    assert model.max_seq_length == 6
    assert_equal(found, model.encode(TEXTS))


def test_report_and_restore(folder):
    model = make(folder)
    tokenizer, classes = model[0].processor, [type(module) for module in model.modules()]
    assert "tokenizer: as it was: fastbert.optimize was not called" in str(fastbert.report(model))
    with fastbert.optimized(model):
        assert isinstance(model, SentenceTransformer)
        assert type(model).__name__ == "SentenceTransformer"
        assert isinstance(model.tokenizer, FastBertTokenizer)
        model.encode(TEXTS)
        model.encode(TEXTS, output_value=None)
        assert str(fastbert.report(model)).endswith(
            "0: tokenizer: fastbert's; encode: 1 calls packed, 1 calls padded: output_value is None"
        )
    assert model[0].processor is tokenizer
    assert [type(module) for module in model.modules()] == classes
    assert not any("fastbert" in name for module in model.modules() for name in vars(module))


@pytest.mark.parametrize("how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_stay_optimized(folder, how):
    model = fastbert.optimize(make(folder))
    other = how(model)
    assert_equal(other.encode(TEXTS), model.encode(TEXTS))
    assert packed_calls(other) == packed_calls(model) == 1
    assert isinstance(fastbert.restore(other).tokenizer, transformers.PreTrainedTokenizerFast)


def test_saved_it_is_a_sentence_transformer(folder, tmp_path):
    model = make(folder, modules.Normalize())
    model.save(str(tmp_path / "before"))
    fastbert.optimize(model)
    model.save(str(tmp_path / "after"))
    for name in ("modules.json", "config_sentence_transformers.json", "config.json", "1_Pooling/config.json"):
        assert (tmp_path / "after" / name).read_text() == (tmp_path / "before" / name).read_text()
    loaded = SentenceTransformer(str(tmp_path / "after"), device="cpu")
    assert not isinstance(loaded.tokenizer, FastBertTokenizer)
    assert_equal(loaded.encode(TEXTS), model.encode(TEXTS))


def test_training(folder):
    """A loss and its gradients, through forward, as trainers and fit call it."""
    model = make(folder).train()
    loss = losses.MultipleNegativesRankingLoss(model)

    def step():
        model.zero_grad()
        value = loss([model.preprocess(TEXTS[2:6]), model.preprocess(TEXTS[6:10])], None)
        value.backward()
        return value.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    expected, gradients = step()
    fastbert.optimize(model)
    found, own_gradients = step()
    torch.testing.assert_close(found, expected)
    assert own_gradients.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(own_gradients[name], gradient, rtol=1e-3, atol=1e-5, msg=name)
    assert str(fastbert.report(model)).count("calls served packed: 2") == 1


def test_several_processes(folder):
    model = make(folder)
    expected = model.encode(TEXTS)
    fastbert.optimize(model)
    pool = model.start_multi_process_pool(["cpu"])
    try:
        assert_equal(model.encode(TEXTS, pool=pool, chunk_size=5), expected)
    finally:
        model.stop_multi_process_pool(pool)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_cross_encoder(tmp_path, batch_size):
    config = small_config(vocab_size=len(VOCABULARY), num_labels=1)
    torch.manual_seed(0)
    transformers.BertForSequenceClassification(config).save_pretrained(tmp_path)
    theirs().save_pretrained(tmp_path)
    model = CrossEncoder(str(tmp_path), device="cpu")
    pairs = list(zip(TEXTS, TEXTS[::-1], strict=True))
    calls = (
        lambda: model.predict(pairs, batch_size=batch_size),
        lambda: model.predict(pairs[2], convert_to_tensor=True),
        lambda: model.rank(TEXTS[2], TEXTS[3:9], batch_size=batch_size),
    )
    expected = [call() for call in calls]
    fastbert.optimize(model)
    assert isinstance(model.tokenizer, FastBertTokenizer)
    found = [call() for call in calls]
    assert_equal(found[:2], expected[:2])
    for one, other in zip(found[2], expected[2], strict=True):
        assert one["corpus_id"] == other["corpus_id"]
        assert abs(one["score"] - other["score"]) < 1e-5
    assert "answered by transformers" not in str(fastbert.report(model))
    fastbert.restore(model)
    assert_equal([call() for call in calls[:2]], expected[:2])


def test_a_hook_sends_encode_the_padded_way(folder):
    model = fastbert.optimize(make(folder))
    seen = []
    handle = model[0].register_forward_hook(
        lambda module, inputs, output: seen.append(output["token_embeddings"].shape)
    )
    model.encode(TEXTS)
    handle.remove()
    assert len(seen) == 1
    assert model._fastbert_texts.calls == {"Transformer has hooks or is compiled": 1}


def byte_level_bpe():
    tokenizers = pytest.importorskip("tokenizers")
    letters = {c: i for i, c in enumerate(["<pad>", "<unk>", *"abcdefghijklmnopqrstuvwxyz "])}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(letters, [], unk_token="<unk>"))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", unk_token="<unk>")


def without_punctuation():
    """A WordPiece tokenizer whose normalizer is not BERT's."""
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = theirs()
    normalizers = tokenizers.normalizers
    tokenizer.backend_tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Replace("one", "two"), tokenizer.backend_tokenizer.normalizer]
    )
    return tokenizer


@pytest.mark.parametrize(
    ("tokenizer", "reason"),
    [(byte_level_bpe, "it is a BPE tokenizer; fastbert has WordPiece"), (without_punctuation, "fastbert's ")],
    ids=["BPE", "normalizer"],
)
def test_a_tokenizer_that_stays(folder, tokenizer, reason):
    model = make(folder)
    model[0].processor = tokenizer()
    model.max_seq_length = 32
    expected = model.encode(TEXTS)
    with pytest.raises(ValueError, match=f"0: the tokenizer is not replaced: {reason}"):
        fastbert.optimize(model, strict=True)
    assert type(model) is SentenceTransformer  # nothing was changed
    fastbert.optimize(model)
    assert not isinstance(model.tokenizer, FastBertTokenizer)
    assert f"0: tokenizer: as it was: {reason}" in str(fastbert.report(model))
    assert_equal(model.encode(TEXTS), expected)
    assert model._fastbert_texts.calls == {"the tokenizer is not fastbert's": 1}


def test_what_reads_padding_is_refused(folder):
    model = make(folder)
    model[0].query_expansion = {"strategy": "fixed", "attend": False, "length": 8}
    with pytest.raises(ValueError, match="query_expansion with attend=False, which reads hidden states at padding"):
        fastbert.optimize(model)
    assert type(model) is SentenceTransformer
    model[0].query_expansion = {"strategy": "fixed", "attend": True, "length": 8}
    expected = model.encode_query(TEXTS)
    fastbert.optimize(model)
    assert_equal(model.encode_query(TEXTS), expected)
    assert model._fastbert_texts.calls == {"query_expansion": 1}


def test_minilm_from_text_to_embeddings():
    model = SentenceTransformer(str(minilm_folder()), device="cpu")
    texts = [*ours._PROBES, *TEXTS]
    expected = model.encode(texts)
    fastbert.optimize(model)
    assert_equal(model.encode(texts), expected)
    assert packed_calls(model) == 1
