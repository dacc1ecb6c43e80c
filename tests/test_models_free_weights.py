"""Models whose layers keep packed weights alone: the same results, the memory gone, and no way to use what is no more."""

import copy
import gc
import io
import pickle
import weakref

import pytest
import torch

import fastbert
from fastbert.models import BertConfig, BertForSequenceClassification, BertModel, GPTConfig, GPTForCausalLM

pytest.importorskip("fastbert._C", reason="the C++ extension is not built")
if fastbert._C.isa() == "baseline":
    pytest.skip("float32 products are torch's here", allow_module_level=True)

SIZES = dict(vocab_size=99, hidden_size=64, num_hidden_layers=3, num_attention_heads=4, intermediate_size=96)


def a_model(precision="fp32", dtype=torch.float32):
    torch.manual_seed(0)
    model = BertModel(BertConfig(**SIZES), precision=precision).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.2)
    return model


def a_batch():
    ids = torch.randint(1, 99, (4, 9), generator=torch.Generator().manual_seed(1))
    return ids, (torch.arange(9) < torch.tensor([9, 1, 4, 7])[:, None]).long()


def hidden(model, **options):
    with torch.inference_mode():
        return model(*a_batch(), **options).last_hidden_state


@pytest.mark.parametrize("packed_before", [False, True], ids=["fresh", "warm"])
@pytest.mark.parametrize(("precision", "dtype"), [
    ("fp32", torch.float32), ("bf16", torch.float32), ("int8", torch.float32), ("fp32", torch.bfloat16), ("int8", torch.bfloat16),
])  # fmt: skip
def test_same_bits_and_the_memory_is_gone(precision, dtype, packed_before):
    model = a_model(precision, dtype)
    expected = hidden(copy.deepcopy(model))
    if packed_before:
        hidden(model)
    matrices = [weakref.ref(p) for p in model.layers.parameters()]
    nbytes = sum(p.nbytes for p in model.layers.parameters())
    assert model.free_weights() == nbytes
    gc.collect()
    assert not any(each() for each in matrices)
    assert torch.equal(hidden(model), expected)
    assert model.free_weights() == 0


def test_hidden_states_and_blocks_one_by_one():
    model = a_model()
    with torch.inference_mode():
        expected = model(*a_batch(), output_hidden_states=True).hidden_states
        model.free_weights()
        found = model(*a_batch(), output_hidden_states=True).hidden_states
    assert len(found) == len(expected) == 4
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def test_packed_weights_are_reported_until_the_model_goes():
    gc.collect()
    before = fastbert.packed_weights_info()
    model = a_model("int8")
    model.free_weights()
    gc.collect()
    with_model = fastbert.packed_weights_info()
    assert with_model.count - before.count == 4 * 3
    layers = 3 * (4 * 64 * 64 + 2 * 64 * 96)  # bytes of 8-bit weights
    assert layers < with_model.nbytes - before.nbytes < 1.5 * layers + 3 * 4 * 4096
    other = copy.deepcopy(model)
    assert fastbert.packed_weights_info() == with_model  # copies share
    fastbert.drop_packed_weights()
    assert torch.equal(hidden(model), hidden(other))
    del model, other
    gc.collect()
    assert fastbert.packed_weights_info().count <= before.count


def test_a_vector_that_changes_later_changes_nothing():
    model = a_model()
    bias = model.layers[0].feed_forward.down.bias
    model.free_weights()
    expected = hidden(model)
    with torch.no_grad():
        bias.add_(1.0)
    assert torch.equal(hidden(model), expected)


REFUSED = {
    "train": lambda model: model.train(),
    "state_dict": lambda model: model.state_dict(),
    "load_state_dict": lambda model: model.load_state_dict({k: v + 1 for k, v in a_model().state_dict().items()}),
    "half": lambda model: model.bfloat16(),
    "meta": lambda model: model.to("meta"),
    "pickle": lambda model: pickle.dumps(model),
    "torch.save": lambda model: torch.save(model, io.BytesIO()),
    "precision": lambda model: setattr(model, "precision", "int8"),
    "gradients": lambda model: model(*a_batch()),
    "autocast": lambda model: with_autocast(model),
    "reference": lambda model: with_reference(model),
}


def with_autocast(model):
    with torch.autocast("cpu", torch.bfloat16):
        hidden(model)


def with_reference(model):
    with fastbert.use_reference():
        hidden(model)


@pytest.mark.parametrize("use", REFUSED.values(), ids=REFUSED)
def test_what_needs_the_weights_raises(use):
    model = a_model()
    model.free_weights()
    expected = hidden(model)
    with pytest.raises(RuntimeError, match=r"weights of this block were freed.*Load the model again"):
        use(model)
    assert not model.training and model.precision == "fp32"  # nothing has half happened
    assert torch.equal(hidden(model), expected)


def test_saving_raises(tmp_path):
    model = a_model()
    model.free_weights()
    with pytest.raises(RuntimeError, match="were freed"):
        model.save_pretrained(tmp_path / "model")
    assert model.to("cpu").float().eval() is model  # what changes nothing is no loss


@pytest.mark.parametrize(
    ("boundaries", "longest", "message"),
    [
        ([0, 6], 6, "cu_seqlens is list"),
        (torch.tensor([0, 6]), 6, r"cu_seqlens is torch.int64 \[2\]"),
        (torch.tensor([0, 5], dtype=torch.int32), 6, "boundaries from 0 to 6"),
        (torch.tensor([0, 6], dtype=torch.int32), 5, "max_seqlen, 5"),
    ],
    ids=["list", "int64", "short", "longest"],
)
def test_bad_boundaries_are_named(boundaries, longest, message):
    model = a_model()
    model.free_weights()
    with torch.inference_mode(), pytest.raises(ValueError, match=message):
        model.layers[0](torch.ones(6, 64), boundaries, longest)
    assert torch.equal(hidden(copy.copy(model)), hidden(model))


@pytest.mark.parametrize("part", ["weight", "bias"])
def test_a_storage_that_was_given_back_is_an_error(part):
    model = a_model()
    hidden(model)
    getattr(model.layers[0].attention.out, part).untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="has no memory"):
        hidden(model)


def test_heads_and_hooks():
    torch.manual_seed(0)
    classifier = BertForSequenceClassification(BertConfig(**SIZES)).eval()
    with torch.inference_mode():
        expected = classifier(*a_batch()).logits
        classifier.bert.free_weights()
        assert torch.equal(classifier(*a_batch()).logits, expected)
        called = []
        classifier.bert.layers[1].register_forward_hook(lambda *_: called.append(1))
        assert torch.equal(classifier(*a_batch()).logits, expected)
    assert called == [1]


def test_gpt_without_a_cache():
    torch.manual_seed(0)
    gpt = GPTForCausalLM(GPTConfig(vocab_size=99, n_positions=32, n_embd=64, n_layer=2, n_head=4)).eval()
    ids = torch.arange(1, 9)[None]
    with torch.inference_mode():
        expected = gpt(ids).logits
        gpt.transformer.free_weights()
        assert torch.equal(gpt(ids).logits, expected)
    with pytest.raises(RuntimeError, match="cannot attend over a cache"):
        gpt.generate([[1, 2]], max_new_tokens=2)


@pytest.mark.parametrize(("change", "message"), [
    (lambda model: model.train(), "in training"),
    (lambda model: model.layers[1].register_forward_hook(print), "hooks, adapters"),
    (lambda model: model.double(), "weights of torch.float64"),
    (lambda model: model.to("meta"), "on meta cannot be freed"),
], ids=["training", "hook", "float64", "meta"])  # fmt: skip
def test_what_cannot_be_freed_says_so_and_stays(change, message):
    model = a_model()
    change(model)
    layers = list(model.layers)
    with pytest.raises(ValueError, match=message):
        model.free_weights()
    assert list(model.layers) == layers
