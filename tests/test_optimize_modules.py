"""Modules inside an optimized model that people hook, replace, patch, prune, or wrap in adapters."""

import pytest
import torch
from torch import nn
from torch.nn.utils.prune import random_unstructured as prune_weight

pytest.importorskip("transformers")

from transformers import BertForSequenceClassification, BertModel, GPT2Model

import fastbert
from tests.optimize_samples import assert_close, calls, inputs, logits, make


@pytest.fixture(autouse=True)
def _one_thread(threads):
    torch.set_num_threads(1)  # the models are tiny


@pytest.fixture
def model():
    return make(BertForSequenceClassification)


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
