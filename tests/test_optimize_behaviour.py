"""What fastbert.optimize leaves as it was, what falls back to transformers, and what it refuses."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils.prune import random_unstructured as prune_weight

pytest.importorskip("transformers")

from transformers import (
    AlbertModel,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    DistilBertModel,
    ElectraForPreTraining,
    GPT2LMHeadModel,
    GPT2Model,
    LlamaConfig,
    LlamaModel,
    MPNetModel,
    RobertaForSequenceClassification,
)

import fastbert
from tests.optimize_samples import inputs, make


@pytest.fixture(autouse=True)
def _one_thread(threads):
    torch.set_num_threads(1)  # the models are tiny


@pytest.fixture
def model():
    return make(BertForSequenceClassification)


def calls(model) -> dict[str, int]:
    return fastbert.report(model).replaced[0].calls


def logits(model, given):
    with torch.no_grad():
        return model(**given).logits


def assert_close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_it_is_the_same_object_with_the_same_parameters(model):
    before = {name: (id(p), p.data_ptr()) for name, p in model.state_dict(keep_vars=True).items()}
    config = model.config.to_dict()
    assert fastbert.optimize(model) is model
    assert {name: (id(p), p.data_ptr()) for name, p in model.state_dict(keep_vars=True).items()} == before
    assert model.config.to_dict() == config
    assert isinstance(model, BertForSequenceClassification) and isinstance(model.bert, BertModel)
    assert (type(model).__name__, type(model.bert).__name__) == ("BertForSequenceClassification", "BertModel")


def test_restore_gives_back_every_class_and_attribute(model):
    before = {name: (type(module), set(module.__dict__)) for name, module in model.named_modules()}
    given = inputs(model)
    expected = logits(model, given)
    fastbert.optimize(model)
    logits(model, given)
    assert fastbert.restore(model) is model
    assert {name: (type(module), set(module.__dict__)) for name, module in model.named_modules()} == before
    assert torch.equal(logits(model, given), expected)


def test_new_models_of_the_class_are_transformers_own(model, tmp_path):
    fastbert.optimize(model).save_pretrained(tmp_path)
    for new in (type(model)(model.config), type(model).from_pretrained(tmp_path)):
        assert type(new) is BertForSequenceClassification and type(new.bert) is BertModel
    assert type(type(model.bert)(model.config, add_pooling_layer=False)) is BertModel


def test_a_decoder_made_of_an_encoder(model):
    model.bert.pooler = None
    base = fastbert.optimize(model.bert)
    given = inputs(model, labels=False) | {"use_cache": False}
    mask = given["attention_mask"].bool()
    with torch.no_grad():
        both_ways = base(**given)[0]
        base.config.is_decoder = True
        actual = base(**given)[0]
        assert base._fastbert.calls == {"packed": 2}
        expected = fastbert.restore(base)(**given)[0]
    assert not torch.allclose(actual[mask], both_ways[mask])
    assert_close(actual[mask], expected[mask])


def test_context_manager(model):
    with fastbert.optimized(model) as same:
        assert same is model
        logits(model, inputs(model))
        assert calls(model) == {"packed": 1}
    assert type(model.bert) is BertModel
    with pytest.raises(KeyError), fastbert.optimized(model):
        raise KeyError
    assert type(model.bert) is BertModel


def copies(model):
    saved = io.BytesIO()
    torch.save(model, saved)
    saved.seek(0)
    return {
        "deepcopy": copy.deepcopy(model),
        "pickle": pickle.loads(pickle.dumps(model)),
        "torch.save": torch.load(saved, weights_only=False),
    }


def test_copies_are_optimized_and_their_own(model):
    given = inputs(model)
    fastbert.optimize(model)
    expected = logits(model, given)
    for how, other in copies(model).items():
        assert torch.equal(logits(other, given), expected), how
        assert calls(other) == {"packed": 1}, how
        with torch.no_grad():
            other.bert.encoder.layer[0].output.dense.weight.zero_()
        assert not torch.equal(logits(other, given), expected), how
        assert torch.equal(logits(model, given), expected), how


def test_save_pretrained_writes_the_same_files(model, tmp_path):
    model.save_pretrained(tmp_path / "stock")
    fastbert.optimize(model).save_pretrained(tmp_path / "optimized")
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "stock" / file).read_bytes() == (tmp_path / "optimized" / file).read_bytes()
    loaded = BertForSequenceClassification.from_pretrained(tmp_path / "optimized")
    assert_close(logits(loaded, inputs(model)), logits(model, inputs(model)))


def test_loading_a_state_dict_and_a_step_are_seen(model):
    """What was packed of the weights does not outlive them; GPT-2's are packed transposed."""
    for cls, optimizer in (
        (BertForSequenceClassification, "AdamW"),
        (GPT2LMHeadModel, "AdamW"),
        (GPT2LMHeadModel, "SGD"),
    ):
        model = make(cls)
        given = inputs(model) | ({"use_cache": False} if cls is GPT2LMHeadModel else {})
        stock = copy.deepcopy(model)
        fastbert.optimize(model)
        logits(model, given)
        step = getattr(torch.optim, optimizer)(model.parameters(), lr=0.01, fused=True)
        model(**given).loss.backward()
        step.step()
        stock.load_state_dict(model.state_dict())
        assert_close(real_logits(model, given), real_logits(stock, given))
        for parameter in stock.parameters():
            parameter.data.mul_(0.5)
        model.load_state_dict(stock.state_dict())
        assert_close(real_logits(model, given), real_logits(stock, given))


def real_logits(model, given):
    values, mask = logits(model, given), given["attention_mask"].bool()
    return values[mask] if values.dim() == 3 else values


def test_weights_are_packed_once():
    for model in (make(GPT2Model), make(AlbertModel), make(BertModel)):
        fastbert.drop_packed_weights()
        given = inputs(model) | {"use_cache": False}
        fastbert.optimize(model)
        with torch.inference_mode():
            model(**given)
            assert fastbert.packed_weights_info().count >= 4
            once = fastbert.packed_weights_info()
            model(**given)
        assert fastbert.packed_weights_info() == once
    fastbert.drop_packed_weights()


class Doubled(nn.Linear):
    """A linear layer of somebody's own."""

    def forward(self, x):
        return 2.0 * super().forward(x)


def hook_layer(model):
    model.bert.encoder.layer[1].register_forward_hook(lambda module, args, output: output * 1.5)


def hook_linear(model):
    model.bert.encoder.layer[0].attention.self.query.register_forward_pre_hook(lambda module, args: (args[0] * 1.5,))


def hook_encoder(model):
    model.bert.encoder.register_full_backward_hook(lambda *_: None)


def replace_linear(model):
    old = model.bert.encoder.layer[1].intermediate.dense
    new = model.bert.encoder.layer[1].intermediate.dense = Doubled(old.in_features, old.out_features)
    new.load_state_dict(old.state_dict())


def patch_forward(model):
    module = model.bert.encoder.layer[0].output
    stock = module.forward
    module.forward = lambda *args: 1.5 * stock(*args)


def prune(model):
    prune_weight(model.bert.encoder.layer[0].output.dense, "weight", 0.5)


def parametrize(model):
    torch.nn.utils.parametrizations.weight_norm(model.bert.encoder.layer[0].output.dense)


def drop_layer(model):
    del model.bert.encoder.layer[1]


def change_activation(model):
    model.bert.encoder.layer[0].intermediate.intermediate_act_fn = nn.Softplus()


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (hook_layer, "encoder.layer.1 has hooks"),
        (hook_linear, "encoder.layer.0.attention.self.query has hooks"),
        (hook_encoder, "encoder has hooks"),
        (replace_linear, "Doubled"),
        (patch_forward, "encoder.layer.0.output has a forward of its own"),
        (prune, "encoder.layer.0.output.dense has hooks"),
        (parametrize, "ParametrizedLinear"),
        (change_activation, "Softplus"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_people_do_to_modules_keeps_working(model, change, reason, when):
    if when == "after":
        fastbert.optimize(model)
        logits(model, inputs(model))  # so that there is something to be found stale
    torch.manual_seed(0)
    change(model)
    if when == "before":
        if change in (replace_linear, parametrize, change_activation):
            with pytest.raises(ValueError, match=reason):
                fastbert.optimize(model)
            return
        fastbert.optimize(model)
    given = inputs(model)
    actual = logits(model, given)
    assert [reason in each for each in calls(model) if each != "packed"] == [True], calls(model)
    fastbert.restore(model)
    assert torch.equal(actual, logits(model, given))


def test_a_removed_layer_is_served(model):
    given = inputs(model)
    fastbert.optimize(model)
    logits(model, given)
    drop_layer(model)
    actual = logits(model, given)
    assert calls(model) == {"packed": 2}
    assert_close(actual, logits(fastbert.restore(model), given))


def test_a_hook_on_all_modules_sees_them(model):
    fastbert.optimize(model)
    seen = []
    with nn.modules.module.register_module_forward_hook(lambda module, args, output: seen.append(module)):
        logits(model, inputs(model))
    assert model.bert.encoder.layer[1].output in seen
    assert calls(model) == {"hooks on all modules": 1}


def test_a_resized_vocabulary_is_read_anew(model):
    given = inputs(model)
    fastbert.optimize(model)
    logits(model, given)
    model.resize_token_embeddings(70)
    given["input_ids"][0, 1] = 65
    actual = logits(model, given)
    assert calls(model) == {"packed": 2}
    assert model.bert._fastbert.plan.tables(model.bert).word["weight"].shape[0] == 70
    assert_close(actual, logits(fastbert.restore(model), given))


def test_a_hook_that_goes_away_is_forgotten(model):
    fastbert.optimize(model)
    handle = model.bert.encoder.layer[1].register_forward_hook(lambda *_: None)
    logits(model, inputs(model))
    handle.remove()
    logits(model, inputs(model))
    assert calls(model) == {"encoder.layer.1 has hooks": 1, "packed": 1}


def test_hooks_on_the_model_its_embeddings_and_head_see_what_they_saw(model):
    seen = []
    given = inputs(model)
    for module in (model, model.bert, model.bert.embeddings, model.bert.embeddings.word_embeddings, model.classifier):
        module.register_forward_hook(lambda module, args, output: seen.append(type(module).__name__))
    expected = logits(model, given)
    before, seen[:] = list(seen), []
    fastbert.optimize(model)
    assert_close(logits(model, given), expected)
    assert seen == before and calls(model) == {"packed": 1}


class BaseTunerLayer:
    """What peft's adapters are known by."""


BaseTunerLayer.__module__ = "peft.tuners.tuners_utils"


class Adapter(nn.Module, BaseTunerLayer):
    """As peft.tuners.lora.Linear: a linear layer, and a product of two thin ones beside it."""

    def __init__(self, base):
        super().__init__()
        self.base_layer = base
        width_in, width_out = base.weight.shape if type(base).__name__ == "Conv1D" else base.weight.shape[::-1]
        self.lora_A, self.lora_B = nn.Linear(width_in, 2, bias=False), nn.Linear(2, width_out, bias=False)

    @property
    def weight(self):
        return self.base_layer.weight

    def forward(self, x):
        return self.base_layer(x) + self.lora_B(self.lora_A(x))


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("cls", [BertModel, GPT2Model], ids=lambda cls: cls.__name__)
def test_adapters_run_packed_and_get_their_gradients(cls, when):
    model = make(cls).double().train()
    given = inputs(model, labels=False)
    if when == "after":
        fastbert.optimize(model)
        model(**given)
    model.requires_grad_(False)
    if cls is BertModel:
        attention = model.encoder.layer[1].attention.self
        attention.query, attention.value = Adapter(attention.query).double(), Adapter(attention.value).double()
    else:
        model.h[0].attn.c_attn = Adapter(model.h[0].attn.c_attn).double()

    def step():
        model.zero_grad()
        (model(**given)[0] * given["attention_mask"].unsqueeze(-1)).square().mean().backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    if when == "before":
        fastbert.optimize(model)
    actual = step()
    assert set(calls(model)) == {"packed"}
    fastbert.restore(model)
    expected = step()
    assert actual.keys() == expected.keys() != set()
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, rtol=1e-8, atol=1e-12)


def attention_weights(model, given):
    model.set_attn_implementation("eager")
    return {"output_attentions": True}


def four_dimensional_mask(model, given):
    mask = given["attention_mask"][:, None, None, :].bool()
    return {"attention_mask": mask.expand(-1, 1, mask.shape[-1], -1)}


@pytest.mark.parametrize(
    ("further", "reason"),
    [(attention_weights, "output_attentions"), (four_dimensional_mask, "attention_mask")],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_arguments_that_transformers_answers(model, further, reason):
    given = inputs(model)
    given |= further(model, given)
    expected = model(**given)
    actual = fastbert.optimize(model)(**given)
    assert [reason in each for each in calls(model)] == [True]
    assert torch.equal(actual.logits, expected.logits)
    assert len(actual.get("attentions") or ()) == len(expected.get("attentions") or ())


def test_recorded_states_by_transformers_after_the_swap(model):
    """transformers looks up by class what can be recorded."""
    model.set_attn_implementation("eager")
    given = inputs(model) | {"output_attentions": True, "output_hidden_states": True}
    expected = model(**given)
    actual = fastbert.optimize(model)(**given)
    assert len(actual.attentions) == len(expected.attentions) == 2
    assert len(actual.hidden_states) == len(expected.hidden_states) == 3
    given.pop("output_attentions")
    model(**given)  # recording leaves hooks behind, which are no obstacle
    assert calls(model) == {"output_attentions": 1, "packed": 1}


def test_generation_with_a_cache():
    model = make(GPT2LMHeadModel, eos_token_id=None, bos_token_id=None)
    given = inputs(model, "left", labels=False)
    settings = dict(max_new_tokens=5, do_sample=False, pad_token_id=1)
    expected = model.generate(**given, **settings)
    fastbert.optimize(model)
    assert torch.equal(model.generate(**given, **settings), expected)
    with torch.no_grad():
        assert model(**given).past_key_values is not None
        model(**given, use_cache=False)
    assert calls(model)["packed"] == 1 and calls(model)["use_cache=True"] >= 1


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["saved-tensors", "reentrant"])
def test_gradient_checkpointing(use_reentrant):
    model = make(BertForMaskedLM, hidden_dropout_prob=0.2).double().train()
    model.bert.embeddings.dropout.p = (
        0.0  # checkpointing hooks the table, whose module is then called, with torch's own dropout
    )
    given = inputs(model)
    fastbert.optimize(model)

    def step():
        """Gradients, and how much the forward kept for them."""
        model.zero_grad()
        torch.manual_seed(3)
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
            loss = model.bert(given["input_ids"], given["attention_mask"])[0].square().sum()
        loss.backward()
        return [p.grad.clone() for p in model.bert.parameters()], sum(kept)

    expected, kept = step()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    actual, kept_with_checkpoints = step()
    assert calls(model) == {"packed": 2}
    assert kept_with_checkpoints < kept / 2
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("cls", [BertModel, GPT2Model, MPNetModel], ids=lambda cls: cls.__name__)
def test_autocast(cls, grad):
    model = make(cls)
    given = inputs(model, labels=False) | {"use_cache": False}
    mask = given["attention_mask"].bool()
    with torch.autocast("cpu", torch.bfloat16), torch.set_grad_enabled(grad):
        expected = model(**given)[0]
        actual = fastbert.optimize(model)(**given)[0]
    assert actual.dtype == expected.dtype == torch.float32
    assert (actual - expected)[mask].norm() < 0.03 * expected[mask].norm()
    assert calls(model) == {"packed": 1}


@pytest.mark.parametrize("cls", [BertForSequenceClassification, GPT2LMHeadModel], ids=lambda cls: cls.__name__)
def test_compiled_models_are_transformers_own(cls):
    model = make(cls)
    given = inputs(model, labels=False) | ({"use_cache": False} if cls is GPT2LMHeadModel else {})
    expected = logits(model, given)
    torch.compiler.reset()
    compiled = torch.compile(fastbert.optimize(model), backend="eager", fullgraph=True)
    assert_close(logits(compiled, given), expected)


def test_traced_and_transformed_calls(model):
    given = inputs(model, labels=False)
    arguments = (given["input_ids"], given["attention_mask"])
    base = make(BertModel)
    fastbert.optimize(base)
    base.config.return_dict = False
    with torch.no_grad():
        traced = torch.jit.trace(base, arguments, check_trace=False)
        other = arguments[0].flip(0), arguments[1].flip(0)
        assert_close(traced(*other)[0], fastbert.restore(base)(*other)[0])


@pytest.mark.parametrize("precision", ["bf16", "int8"])
@pytest.mark.parametrize("cls", [BertModel, DistilBertModel, GPT2Model, MPNetModel], ids=lambda cls: cls.__name__)
def test_reduced_precision(cls, precision):
    model = make(cls)
    given = inputs(model, labels=False) | {"use_cache": False}
    mask = given["attention_mask"].bool()
    with torch.no_grad():
        expected = model(**given)[0][mask]
        fastbert.optimize(model, precision=precision)
        actual = model(**given)[0][mask]
    assert calls(model) == {"packed": 1}
    error = (actual - expected).norm() / expected.norm()
    assert 1e-5 < error < 0.1
    with pytest.raises(RuntimeError, match="is for inference and has no gradient"):
        model(**given)


class Classifier(nn.Module):
    """Somebody's own model around two of transformers'."""

    def __init__(self):
        super().__init__()
        self.first, self.second = make(BertModel), make(DistilBertModel)
        self.out = nn.Linear(32, 3)

    def forward(self, input_ids, attention_mask):
        hidden = [each(input_ids, attention_mask).last_hidden_state[:, 0] for each in (self.first, self.second)]
        return self.out(torch.cat(hidden, -1))


def test_containers():
    model = Classifier().eval()
    given = inputs(model.second, labels=False)
    with torch.no_grad():
        expected = model(**given)
        assert_close(fastbert.optimize(model)(**given), expected)
    text = str(fastbert.report(model))
    assert "first: BertModel (BERT), fp32; calls served packed: 1" in text
    assert "second: DistilBertModel (DistilBERT), fp32; calls served packed: 1" in text


def test_what_is_not_replaced_is_reported_and_strict_refuses_it():
    llama = LlamaModel(
        LlamaConfig(vocab_size=20, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    )
    model = nn.ModuleDict({"bert": make(BertModel), "llama": llama})
    with pytest.raises(ValueError, match="llama: LlamaModel is not replaced"):
        fastbert.optimize(model, strict=True)
    assert type(model["bert"]) is BertModel
    fastbert.optimize(model)
    assert type(model["llama"]) is LlamaModel
    assert "llama: LlamaModel is not replaced: its class is no known one" in str(fastbert.report(model))


class OwnBert(BertModel):
    """A subclass of somebody's own."""


def test_refusals_leave_the_model_as_it_was(model):
    def refused(message, other=model, error=ValueError, **arguments):
        before = {name: type(module) for name, module in other.named_modules()} if isinstance(other, nn.Module) else {}
        with pytest.raises(error, match=message):
            fastbert.optimize(other, **arguments)
        if isinstance(other, nn.Module):
            assert {name: type(module) for name, module in other.named_modules()} == before

    refused("expected a torch.nn.Module", "bert-base-uncased", TypeError)
    refused("precision is 'fp8'", precision="fp8")
    refused("Linear holds no model of transformers; fastbert.optimize takes those of BERT, RoBERTa", nn.Linear(2, 2))
    llama = LlamaConfig(vocab_size=20, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    refused("the model: LlamaModel is not replaced.*attn_implementation='fastbert'", LlamaModel(llama))
    refused("it is a subclass of BertModel", OwnBert(model.config))
    refused("compiled already; call fastbert.optimize", torch.compile(make(BertModel), backend="eager"))
    compiled = make(BertModel)
    compiled.compile(backend="eager")
    refused("compiled already", compiled)
    with torch.device("meta"):
        refused("meta device", BertModel(model.config))
    mixed = make(BertModel)
    mixed.pooler.to("meta")
    refused("meta device", mixed)
    refused("scales attention otherwise", make(GPT2Model, scale_attn_by_inverse_layer_idx=True))
    lost = make(BertModel)
    del lost.encoder.layer[0].output
    refused("its modules are not those of BertModel", lost)
    refused("has cross-attention", make(BertModel, is_decoder=True, add_cross_attention=True))
    patched = make(BertForSequenceClassification)
    patched.forward = patched.forward
    refused("the forward of this BertForSequenceClassification was replaced", patched)
    fastbert.optimize(model)
    refused("optimized already; call fastbert.restore")
    refused("optimized already", nn.ModuleList([make(BertModel), model]))
    fastbert.restore(model)
    with pytest.raises(ValueError, match="BertForSequenceClassification is not optimized"):
        fastbert.restore(model)
    with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module"):
        fastbert.restore(None)


def test_report_names_what_transformers_answered():
    model = make(ElectraForPreTraining)
    assert "ElectraModel is not replaced: fastbert.optimize was not called" in str(fastbert.report(model))
    fastbert.optimize(model, precision="bf16")
    model.set_attn_implementation("eager")
    with torch.no_grad():
        model(**inputs(model), output_attentions=True)
    assert str(fastbert.report(model)).splitlines() == [
        "electra: ElectraModel (ELECTRA), bf16; calls served packed: 0",
        "  calls answered by transformers: 1, output_attentions",
    ]
    assert str(fastbert.report(nn.Linear(2, 2))) == "no model of transformers is in it"


def test_left_padding_and_the_first_column(model):
    """A pooler reads the first column; where that is padding, transformers computes what stands there."""
    for model in (make(BertForSequenceClassification), make(RobertaForSequenceClassification)):
        given = inputs(model, "left")
        expected = logits(model, given)
        assert torch.equal(logits(fastbert.optimize(model), given), expected)
        assert calls(model) == {"padding in the first column, which the pooler or the head reads": 1}
