"""BertModel against transformers: real tokens equal, padding zero, gradients, bad input."""

import copy
import pickle

import pytest
import torch

from fastbert.models import BertConfig, BertModel, cls_pool, mean_pool, normalize
from fastbert.models.bert_names import name_table
from fastbert.packing import PackedBatch, pack
from tests.bert_samples import MASKS, POSITIONS, VOCABULARY, batch, minilm_folder, random_bert, saved_bert, small_config
from tests.numerics import assert_close_to_exact

transformers = pytest.importorskip("transformers")

TOLERANCE = 1e-5
ACTIVATIONS = ["gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "silu", "swish", "quick_gelu"]


def load(folder, **arguments):
    return BertModel.from_pretrained(folder, **arguments)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return saved_bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def models(folder):
    return load(folder), transformers.BertModel.from_pretrained(folder).eval()


def assert_equal_on_real_tokens(ours, theirs, mask, tolerance=TOLERANCE):
    real = mask.bool()
    torch.testing.assert_close(ours[real], theirs[real], rtol=0, atol=tolerance)
    assert not ours[~real].any(), "padded positions are not zero"


@pytest.mark.parametrize("mask_name", MASKS)
@torch.no_grad()
def test_equals_transformers(models, mask_name):
    ours, theirs = models
    ids, mask, types = batch(mask_name)
    actual = ours(ids, mask, types)
    expected = theirs(input_ids=ids, attention_mask=mask, token_type_ids=types)
    assert_equal_on_real_tokens(actual.last_hidden_state, expected.last_hidden_state, mask)
    # transformers' pooler reads column 0, which is padding in some rows; ours reads the first real token.
    starts_real = mask[:, 0].bool()
    torch.testing.assert_close(
        actual.pooler_output[starts_real], expected.pooler_output[starts_real], rtol=0, atol=TOLERANCE
    )
    first = expected.last_hidden_state[torch.arange(3), mask.argmax(1)]
    torch.testing.assert_close(actual.pooler_output, torch.tanh(theirs.pooler.dense(first)), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("mask_name", ["right", "left", "holes"])
@torch.no_grad()
def test_minilm_equals_transformers(mask_name):
    ours = load(minilm_folder())
    theirs = transformers.BertModel.from_pretrained(minilm_folder()).eval()
    ids, mask, types = batch(mask_name, vocabulary=30522)
    actual = ours(ids, mask, types).last_hidden_state
    expected = theirs(input_ids=ids, attention_mask=mask, token_type_ids=types).last_hidden_state
    assert_equal_on_real_tokens(actual, expected, mask)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@torch.no_grad()
def test_activations(tmp_path, activation):
    ours = load(saved_bert(tmp_path, hidden_act=activation))
    theirs = transformers.BertModel.from_pretrained(tmp_path).eval()
    ids, mask, types = batch("right")
    actual, expected = ours(ids, mask, types), theirs(ids, mask, types)
    assert_equal_on_real_tokens(actual.last_hidden_state, expected.last_hidden_state, mask)


@pytest.mark.parametrize(
    "changes",
    [
        {"type_vocab_size": 1},
        {"hidden_size": 64, "num_attention_heads": 1},
        {"hidden_size": 33, "num_attention_heads": 33},
        {"num_hidden_layers": 0},
        {"layer_norm_eps": 1e-3, "intermediate_size": 1},
        {"pad_token_id": None},
    ],
    ids=str,
)
@torch.no_grad()
def test_other_sizes(tmp_path, changes):
    ours = load(saved_bert(tmp_path, **changes))
    theirs = transformers.BertModel.from_pretrained(tmp_path).eval()
    ids, mask, _ = batch("right")
    assert_equal_on_real_tokens(ours(ids, mask).last_hidden_state, theirs(ids, mask).last_hidden_state, mask)


@torch.no_grad()
def test_long_sequence_uses_every_position(models):
    ours, theirs = models
    ids = torch.randint(VOCABULARY, (2, POSITIONS))
    torch.testing.assert_close(ours(ids).last_hidden_state, theirs(ids).last_hidden_state, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("shape", [(3, 9), (1, 9)], ids=str)
@torch.no_grad()
def test_position_ids(models, shape):
    ours, theirs = models
    ids, mask, types = batch("left")
    positions = torch.randint(POSITIONS, shape)
    actual = ours(ids, mask, types, positions).last_hidden_state
    expected = theirs(ids, mask, types, positions).last_hidden_state
    assert_equal_on_real_tokens(actual, expected, mask)


@pytest.mark.parametrize("kind", [torch.bool, torch.int32, torch.int64], ids=str)
@torch.no_grad()
def test_mask_and_id_dtypes(models, kind):
    ids, mask, types = batch("holes")
    expected = models[0](ids, mask, types).last_hidden_state
    assert torch.equal(models[0](ids.int(), mask.to(kind), types.int()).last_hidden_state, expected)


@torch.no_grad()
def test_packed_equals_padded(models):
    ours = models[0]
    ids, mask, types = batch("holes")
    padded = ours(ids, mask, types, output_hidden_states=True)
    packed = pack(ids, mask, token_type_ids=types)
    output = ours(packed, output_hidden_states=True)
    assert torch.equal(output.last_hidden_state, padded.last_hidden_state[mask.bool()])
    assert torch.equal(output.pooler_output, padded.pooler_output)
    assert output.cu_seqlens is packed.cu_seqlens
    assert len(output.hidden_states) == len(padded.hidden_states) == 3
    for state, padded_state in zip(output.hidden_states, padded.hidden_states, strict=True):
        assert torch.equal(state, padded_state[mask.bool()])
    assert torch.equal(output.hidden_states[-1], output.last_hidden_state)


@torch.no_grad()
def test_hidden_states_equal_transformers(models):
    ours, theirs = models
    ids, mask, types = batch("right")
    actual = ours(ids, mask, types, output_hidden_states=True).hidden_states
    expected = theirs(ids, mask, types, output_hidden_states=True).hidden_states
    for mine, state in zip(actual, expected, strict=True):
        assert_equal_on_real_tokens(mine, state, mask)


@torch.no_grad()
def test_empty_sequences_and_batches(models):
    ours, theirs = models
    ids, mask, types = batch("right")
    expected = theirs(ids[:1], token_type_ids=types[:1])
    mask = mask.clone()
    mask[1:] = 0
    output = ours(ids, mask, types)
    torch.testing.assert_close(output.last_hidden_state[0], expected.last_hidden_state[0], rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(output.pooler_output[0], expected.pooler_output[0], rtol=0, atol=TOLERANCE)
    assert not output.last_hidden_state[1:].any()
    assert not output.pooler_output[1:].any()
    nothing = ours(ids, torch.zeros_like(mask))
    assert nothing.last_hidden_state.shape == (3, 9, 36)
    assert not nothing.last_hidden_state.any()
    assert not nothing.pooler_output.any()
    for shape in ((0, 9), (3, 0), (0, 0)):
        output = ours(torch.zeros(shape, dtype=torch.int64))
        assert output.last_hidden_state.shape == (*shape, 36)
        assert output.pooler_output.shape == (shape[0], 36)


@torch.no_grad()
def test_bfloat16_is_as_exact_as_transformers(folder):
    ids, mask, types = batch("right")
    real = mask.bool()
    ours = load(folder, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in ours.parameters()} == {torch.bfloat16}
    theirs = transformers.BertModel.from_pretrained(folder, dtype=torch.bfloat16).eval()
    torchs_own = theirs(ids, mask, types)
    exact = theirs.double()(ids, mask, types)
    actual = ours(ids, mask, types)
    assert_close_to_exact(
        actual.last_hidden_state[real], exact.last_hidden_state[real], torchs_own.last_hidden_state[real]
    )
    assert_close_to_exact(actual.pooler_output, exact.pooler_output, torchs_own.pooler_output)


@torch.no_grad()
def test_float64_equals_transformers_to_the_last_digits(folder):
    ids, mask, types = batch("holes")
    ours = load(folder, dtype=torch.float64)
    theirs = transformers.BertModel.from_pretrained(folder, dtype=torch.float64).eval()
    actual, expected = ours(ids, mask, types), theirs(ids, mask, types)
    assert_equal_on_real_tokens(actual.last_hidden_state, expected.last_hidden_state, mask, 1e-12)


@pytest.mark.parametrize("mask_name", ["right", "holes"])
def test_gradients_equal_transformers(tmp_path, mask_name):
    ours = load(saved_bert(tmp_path), dtype=torch.float64).train()
    theirs = transformers.BertModel.from_pretrained(tmp_path, dtype=torch.float64).train()
    ids, mask, types = batch(mask_name)
    weight = torch.randn(3, 9, 36, dtype=torch.float64) * mask.unsqueeze(-1)
    starts_real = mask[:, :1]
    for model in (ours, theirs):
        output = model(ids, mask, types)
        ((output.last_hidden_state * weight).sum() + (output.pooler_output * starts_real).square().sum()).backward()
    expected = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    actual = {}
    for name, stored in name_table(2, True).items():
        names = stored.names
        actual.update(zip(names, ours.get_parameter(name).grad.chunk(len(names)), strict=True))
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(
            actual[name], gradient, rtol=1e-8, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}"
        )


def test_training_uses_dropout_and_evaluation_does_not(tmp_path):
    model = load(saved_bert(tmp_path, hidden_dropout_prob=0.3, attention_probs_dropout_prob=0.3))
    ids, mask, _ = batch("right")
    assert not model.training
    assert torch.equal(model(ids, mask).last_hidden_state, model(ids, mask).last_hidden_state)
    model.train()
    assert not torch.allclose(model(ids, mask).last_hidden_state, model(ids, mask).last_hidden_state)


def test_autocast(models):
    ids, mask, types = batch("right")
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        output = models[0](ids, mask, types)
    expected = models[0](ids, mask, types).last_hidden_state
    assert output.last_hidden_state.dtype == torch.bfloat16
    torch.testing.assert_close(output.last_hidden_state.float(), expected, rtol=0.1, atol=0.2)


@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
def test_packed_input_compiles_without_a_graph_break(models, grad):
    ours = models[0]
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    ids, mask, types = batch("right")
    with torch.set_grad_enabled(grad):
        for packed in (pack(ids, mask, token_type_ids=types), pack(ids[:2], lengths=[4, 7])):
            actual, expected = compiled(packed), ours(packed)
            torch.testing.assert_close(actual.last_hidden_state, expected.last_hidden_state)
            torch.testing.assert_close(actual.pooler_output, expected.pooler_output)


def test_padded_input_without_a_mask_compiles_without_a_graph_break(models):
    compiled = torch.compile(models[0], fullgraph=True, backend="aot_eager")
    ids, _, types = batch("right")
    with torch.no_grad():
        actual, expected = compiled(ids, None, types), models[0](ids, None, types)
    torch.testing.assert_close(actual.last_hidden_state, expected.last_hidden_state)


@torch.no_grad()
def test_packed_forward_reads_nothing_back_to_the_host(models, monkeypatch):
    # Tensors on the meta device have no values: whatever reads one raises. Autocast does not know the device.
    model = BertModel(models[0].config).to("meta").eval()
    packed = PackedBatch.from_lengths(torch.zeros(9, dtype=torch.int64, device="meta"), [4, 0, 5])
    output = model(packed)
    assert output.last_hidden_state.shape == (9, 36)
    assert output.pooler_output.shape == (3, 36)
    assert model(torch.zeros(2, 5, dtype=torch.int64, device="meta")).last_hidden_state.shape == (2, 5, 36)


def test_a_new_model_has_berts_initialisation():
    model = BertModel(BertConfig(vocab_size=500, hidden_size=64, num_attention_heads=4, num_hidden_layers=1))
    assert abs(model.embeddings.word.weight.std().item() - 0.02) < 2e-3
    assert not model.embeddings.word.weight[0].any()
    assert abs(model.pooler.dense.weight.std().item() - 0.02) < 2e-3
    assert not model.pooler.dense.bias.any()
    assert model.training
    assert BertModel(model.config, add_pooling_layer=False).pooler is None


IDS = torch.ones(2, 5, dtype=torch.int64)


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ((IDS * VOCABULARY,), IndexError, f"{VOCABULARY}; .* 0 to {VOCABULARY - 1}"),
        ((-IDS,), IndexError, "-1"),
        ((IDS.float(),), TypeError, "float32; expected int64"),
        ((IDS.bool(),), TypeError, "bool; expected int64"),
        (([1, 2],), TypeError, "list; expected an integer tensor"),
        ((IDS, IDS.tolist()), TypeError, "attention_mask is of type list; expected a tensor"),
        ((IDS, None, IDS.tolist()), TypeError, "token_type_ids is of type list"),
        ((IDS, None, None, IDS.tolist()), TypeError, "position_ids is of type list"),
        ((IDS[0],), ValueError, r"\[5\]; expected \[batch, seq\]"),
        ((torch.ones(2, POSITIONS + 1, dtype=torch.int64),), ValueError, f"{POSITIONS + 1} tokens; .* {POSITIONS}"),
        ((IDS, torch.ones(2, 4)), ValueError, r"\[2, 4\]; expected \[2, 5\]"),
        ((IDS, torch.ones(2, 5)), TypeError, "float32; expected bool"),
        ((IDS, torch.ones(2, 1, 5, 5)), ValueError, r"\[2, 1, 5, 5\]; expected \[2, 5\]"),
        ((IDS, IDS * 2), ValueError, "from 2 to 2"),
        ((IDS, None, IDS * 2), IndexError, "2; .* 0 to 1"),
        ((IDS, None, IDS[:, :4]), ValueError, r"token_type_ids has shape \[2, 4\]"),
        ((IDS, None, IDS.float()), TypeError, "token_type_ids is torch.float32"),
        ((IDS, None, None, IDS * POSITIONS), IndexError, f"{POSITIONS}; .* 0 to {POSITIONS - 1}"),
        ((IDS, None, None, IDS[:1, :1]), ValueError, r"position_ids has shape \[1, 1\]"),
        ((IDS.to("meta"),), ValueError, "input_ids is on meta, the model on cpu"),
        ((IDS, IDS.to("meta")), ValueError, "key_padding_mask is on meta"),
        ((IDS, None, IDS.to("meta")), ValueError, "token_type_ids is on meta"),
        ((PackedBatch.from_lengths(IDS[0], [5]), IDS), ValueError, "give it alone"),
        ((PackedBatch.from_lengths(IDS[0].float(), [5]),), TypeError, "float32"),
        ((PackedBatch.from_lengths(IDS, [2]),), ValueError, r"\[2, 5\]; expected \[total\]"),
        ((PackedBatch.from_lengths(IDS[0], [5]).to("meta"),), ValueError, "input_ids is on meta"),
        ((PackedBatch.from_lengths(IDS[0] * 1000, [5]),), IndexError, "1000"),
        ((PackedBatch.from_lengths(IDS.flatten().repeat(5), [50]),), ValueError, f"50 tokens; .* {POSITIONS}"),
        (
            (PackedBatch.from_lengths(IDS[0], [5], position_ids=IDS[0] * 1000),),
            IndexError,
            "1000",
        ),
        (
            (PackedBatch(IDS[0], torch.tensor([0, 6], dtype=torch.int32), 6, IDS[0]),),
            ValueError,
            "from 0 to 6; expected 0 to 5",
        ),
        (
            (PackedBatch(IDS[0], torch.tensor([0, 5], dtype=torch.int32), 4, IDS[0]),),
            ValueError,
            "max_seqlen is 4, but a sequence has 5",
        ),
    ],
)
@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
def test_bad_input(models, grad, arguments, error, message):
    with torch.set_grad_enabled(grad), pytest.raises(error, match=message):
        models[0](*arguments)


# Pooling


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_mean_and_cls_pooling(dtype):
    lengths = [0, 3, 1, 0, 500, 0]
    packed = PackedBatch.from_lengths(torch.randn(504, 17).to(dtype) + 3.0, lengths)
    mean, first = mean_pool(packed.values, packed.cu_seqlens), cls_pool(packed.values, packed.cu_seqlens)
    assert mean.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert first.dtype == dtype
    for row, (part, length) in enumerate(zip(packed.split(), lengths, strict=True)):
        if length == 0:
            assert not mean[row].any()
            assert not first[row].any()
        else:
            tolerance = 1e-12 if dtype == torch.float64 else 2e-6
            torch.testing.assert_close(mean[row].double(), part.double().mean(0), rtol=tolerance, atol=tolerance)
            assert torch.equal(first[row], part[0])


def test_pooling_nothing():
    empty = PackedBatch.from_lengths(torch.zeros(0, 4), [0, 0])
    assert torch.equal(mean_pool(empty.values, empty.cu_seqlens), torch.zeros(2, 4))
    assert torch.equal(cls_pool(empty.values, empty.cu_seqlens), torch.zeros(2, 4))
    none = PackedBatch.from_lengths(torch.zeros(0, 4), [])
    assert mean_pool(none.values, none.cu_seqlens).shape == (0, 4)


def test_pooling_keeps_a_bad_token_to_its_sequence():
    values = torch.ones(4, 2)
    values[1] = torch.nan
    packed = PackedBatch.from_lengths(values, [2, 2])
    pooled = mean_pool(packed.values, packed.cu_seqlens)
    assert pooled[0].isnan().all()
    assert torch.equal(pooled[1], torch.ones(2))


def test_pooling_gradients():
    cu_seqlens = torch.tensor([0, 2, 2, 5], dtype=torch.int32)
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: mean_pool(x, cu_seqlens), x)
    assert torch.autograd.gradcheck(lambda x: cls_pool(x, cu_seqlens), x)


def test_normalize():
    x = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    torch.testing.assert_close(normalize(x), torch.tensor([[0.6, 0.8], [0.0, 0.0]]))


@torch.no_grad()
def test_models_and_batches_copy_and_pickle(models):
    ours = models[0]
    ids, mask, _ = batch("holes")
    packed = pack(ids, mask)
    expected = ours(packed).last_hidden_state
    for again in (copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))):
        assert torch.equal(again(ours)(again(packed)).last_hidden_state, expected)


def test_random_bert_is_random_everywhere():
    # The comparisons above would not see a bias or a layer norm that is at its default.
    for name, parameter in random_bert(small_config()).named_parameters():
        assert parameter.unique().numel() > 1, name
