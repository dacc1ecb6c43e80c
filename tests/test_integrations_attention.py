"""attn_implementation="fastbert" in models of many kinds: what "eager" and "sdpa" give, gradients, caches, masks."""

import copy

import pytest
import torch

transformers = pytest.importorskip("transformers")

from transformers import masking_utils  # noqa: E402

from fastbert.integrations.transformers import attention as ours  # noqa: E402

WIDTHS = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
IDS = {"vocab_size": 90, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
ENCODER = {**WIDTHS, **IDS, "max_position_embeddings": 64}
DECODER = {**ENCODER, "num_key_value_heads": 2}
SEQ2SEQ = {**IDS, "d_model": 32, "decoder_start_token_id": 1}
BART = {
    **SEQ2SEQ,
    **{
        f"{part}_{what}": n
        for part in ("encoder", "decoder")
        for what, n in (("layers", 2), ("attention_heads", 4), ("ffn_dim", 48))
    },
}
MODELS = {
    "bert": ("BertModel", "BertConfig", ENCODER),
    "roberta": ("RobertaModel", "RobertaConfig", ENCODER),
    "modernbert": (
        "ModernBertModel",
        "ModernBertConfig",
        {**ENCODER, "local_attention": 6, "global_attn_every_n_layers": 2, "cls_token_id": 1, "sep_token_id": 2},
    ),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", {**IDS, "n_embd": 32, "n_layer": 2, "n_head": 4}),
    "llama": ("LlamaForCausalLM", "LlamaConfig", DECODER),
    "mistral": ("MistralForCausalLM", "MistralConfig", {**DECODER, "sliding_window": 5}),
    "qwen3": (
        "Qwen3ForCausalLM",
        "Qwen3Config",
        {**DECODER, "head_dim": 16, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    ),
    "bart": ("BartForConditionalGeneration", "BartConfig", BART),
    "t5": (
        "T5ForConditionalGeneration",
        "T5Config",
        {**SEQ2SEQ, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4},
    ),
}
GENERATING = ["gpt2", "llama", "mistral", "qwen3", "bart", "t5"]
SEQ = 11
LENGTHS = {"full": (11, 11, 11), "left": (7, 11, 3), "right": (7, 11, 3)}


def make(name, implementation="eager", **more):
    """A tiny model with the weights that every implementation gets, without dropout."""
    model_class, config_class, arguments = MODELS[name]
    config = getattr(transformers, config_class)(**arguments, **more)
    for key, value in vars(config).items():
        if "drop" in key and isinstance(value, float):
            setattr(config, key, 0.0)
    torch.manual_seed(0)
    model = getattr(transformers, model_class)(config)
    switch(model, implementation)
    return model.eval()


def switch(model, implementation):
    if not model._can_set_attn_implementation():
        pytest.skip(f"{type(model).__name__} of transformers {transformers.__version__} is not on the interface")
    model.set_attn_implementation(implementation)
    return model


def batch(model, padding):
    """Inputs, and which of the outputs' positions are real."""
    torch.manual_seed(1)
    ids = torch.randint(3, 90, (3, SEQ))
    columns = torch.arange(SEQ)
    lengths = torch.tensor(LENGTHS[padding])[:, None]
    mask = (columns >= SEQ - lengths if padding == "left" else columns < lengths).long()
    inputs = {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}
    if model.config.is_encoder_decoder:
        mask = mask.flip(0)[:, 1:-2]
        inputs |= {"decoder_input_ids": inputs["input_ids"].flip(0)[:, 1:-2], "decoder_attention_mask": mask}
    elif type(model).__name__.endswith(("CausalLM", "LMHeadModel")):
        inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    return inputs, mask.bool()


def outputs_and_gradients(model, inputs, real):
    """Outputs at real positions and the gradient of a weighted sum of them."""
    model.zero_grad()
    out = model(**inputs)[0][real]
    torch.manual_seed(2)
    (out * torch.randn_like(out)).sum().backward()
    return out.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("padding", LENGTHS)
@pytest.mark.parametrize("name", MODELS)
def test_outputs_and_gradients_are_those_of_eager_and_sdpa(name, padding):
    model = make(name)
    inputs, real = batch(model, padding)
    found, gradients = outputs_and_gradients(switch(model, "fastbert"), inputs, real)
    for other in ("eager", "sdpa"):
        expected, expected_gradients = outputs_and_gradients(switch(model, other), inputs, real)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-6)
        assert gradients.keys() == expected_gradients.keys()
        for parameter, gradient in expected_gradients.items():
            torch.testing.assert_close(gradients[parameter], gradient, rtol=1e-3, atol=2e-5, msg=parameter)


@pytest.mark.parametrize("name", ["bert", "llama", "mistral", "modernbert", "bart", "t5"])
def test_padding_stays_two_dimensional(name, monkeypatch):
    """No mask of seq × seq values reaches the kernel, and none but T5's bias does."""
    model = make(name, "fastbert")
    inputs, _ = batch(model, "left")
    seen = []
    attend = ours.F.scaled_dot_product_attention

    def watch(q, k, v, attn_mask, *args, key_padding_mask, **kwargs):
        seen.append((attn_mask, key_padding_mask))
        return attend(q, k, v, attn_mask, *args, key_padding_mask=key_padding_mask, **kwargs)

    monkeypatch.setattr(ours.F, "scaled_dot_product_attention", watch)
    model(**inputs)
    assert len(seen) in (2, 6)
    for mask, padding in seen:
        assert padding.shape in ((3, SEQ), (3, SEQ - 3))
        assert mask is None or (name == "t5" and mask.shape[0] == 1)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", GENERATING)
def test_generating_with_a_cache(name, cache):
    model = make(name)
    inputs, _ = batch(model, "left")
    inputs = {key: inputs[key] for key in ("input_ids", "attention_mask")}
    if cache == "static":
        if name in ("bart", "t5", "gpt2"):
            pytest.skip("static caches are tried where transformers compiles with them")
        inputs["cache_implementation"] = "static"
        inputs["disable_compile"] = True
    results = {}
    for implementation in ("eager", "sdpa", "fastbert"):
        switch(model, implementation)
        results[implementation] = model.generate(
            **inputs, max_new_tokens=9, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
    for other in ("eager", "sdpa"):
        assert results["fastbert"].sequences.tolist() == results[other].sequences.tolist()
        torch.testing.assert_close(
            torch.stack(results["fastbert"].logits), torch.stack(results[other].logits), rtol=1e-4, atol=1e-5
        )


def test_chunks_of_a_prompt_after_a_cache():
    model = make("llama")
    ids = torch.randint(3, 90, (2, 12))

    def in_chunks():
        cache = transformers.DynamicCache(config=model.config)
        parts = [model(ids[:, a:b], past_key_values=cache).logits for a, b in ((0, 5), (5, 9), (9, 10), (10, 12))]
        return torch.cat(parts, dim=1)

    expected = in_chunks()
    switch(model, "fastbert")
    torch.testing.assert_close(in_chunks(), expected, rtol=1e-4, atol=2e-6)
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32], ids=["bool", "additive"])
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_masks_of_ones_own(name, dtype):
    model = make(name, "sdpa")
    inputs, _ = batch(model, "full")
    torch.manual_seed(3)
    mask = torch.rand(3, 1, SEQ, SEQ) < 0.6
    mask |= torch.eye(SEQ, dtype=torch.bool)
    if dtype != torch.bool:
        mask = torch.zeros(mask.shape).masked_fill(~mask, float("-inf")) + torch.randn(mask.shape)
    inputs["attention_mask"] = mask
    expected = model(**inputs)[0]
    torch.testing.assert_close(switch(model, "fastbert")(**inputs)[0], expected, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("told", ["position_ids", "cu_seq_lens"])
@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_packed_sequences(name, told, monkeypatch):
    model = make(name, "fastbert")
    torch.manual_seed(1)
    texts = [torch.randint(3, 90, (n,)) for n in (4, 9, 1, 7)]
    ids = torch.cat(texts)[None]
    positions = torch.cat([torch.arange(len(t)) for t in texts])[None]
    inputs = {"input_ids": ids, "position_ids": positions, "use_cache": False}
    expected, gradients = outputs_and_gradients(switch(model, "sdpa"), inputs, slice(None))
    for text, part in zip(texts, expected[0].split([len(t) for t in texts]), strict=True):  # nothing leaks
        torch.testing.assert_close(model(text[None]).logits[0], part, rtol=1e-4, atol=2e-6)
    if told == "cu_seq_lens":
        boundaries = torch.tensor([0, 4, 13, 14, 21])
        inputs |= {"cu_seq_lens_q": boundaries, "cu_seq_lens_k": boundaries, "max_length_q": 9, "max_length_k": 9}
    monkeypatch.setattr(ours, "sdpa_mask", None)  # no mask of tokens × tokens is made
    found, own_gradients = outputs_and_gradients(switch(model, "fastbert"), inputs, slice(None))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-6)
    for parameter, gradient in gradients.items():
        torch.testing.assert_close(own_gradients[parameter], gradient, rtol=1e-3, atol=2e-5, msg=parameter)


def test_packed_rows_of_a_batch():
    """Two rows of packed sequences each; a row's end ends a sequence."""
    model = make("mistral", "sdpa")
    torch.manual_seed(1)
    ids = torch.randint(3, 90, (2, SEQ))
    positions = torch.tensor([[*range(4), *range(7)], [*range(8), *range(3)]])
    expected = model(ids, position_ids=positions, use_cache=False).logits
    found = switch(model, "fastbert")(ids, position_ids=positions, use_cache=False).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("name", ["bert", "modernbert", "mistral", "t5"])
def test_compiled_in_one_graph(name):
    model = make(name, "fastbert")
    inputs, real = batch(model, "left")
    torch._dynamo.reset()
    with torch.no_grad():
        expected = model(**inputs)[0][real]
        found = torch.compile(model, fullgraph=True, backend="aot_eager")(**inputs, use_cache=False)[0][real]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-6)


def test_gradient_checkpointing():
    model = make("mistral", "fastbert").train()
    inputs, real = batch(model, "left")
    expected, gradients = outputs_and_gradients(model, inputs, real)
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable()
    found, own_gradients = outputs_and_gradients(model, inputs, real)
    assert torch.equal(found, expected)
    assert all(torch.equal(own_gradients[name], gradients[name]) for name in gradients)


def test_dropout():
    """Weights are dropped in training only, at the rate that the configuration says."""
    model = make("bert", "fastbert", num_labels=2)
    inputs, real = batch(model, "right")
    expected = model(**inputs)[0][real]
    for layer in model.encoder.layer:
        layer.attention.self.dropout.p = 0.5
    assert torch.equal(model(**inputs)[0][real], expected)
    model.train()
    torch.manual_seed(5)
    first = model(**inputs)[0][real]
    assert (first - expected).abs().max() > 1e-2
    torch.manual_seed(5)
    assert torch.equal(model(**inputs)[0][real], first)


class Layer(torch.nn.Module):
    is_causal = False


def qkv(batch=2, seq_q=5, seq_k=5, heads=4, kv_heads=2):
    torch.manual_seed(0)
    return (
        torch.randn(batch, heads, seq_q, 8),
        torch.randn(batch, kv_heads, seq_k, 8),
        torch.randn(batch, kv_heads, seq_k, 6),
    )


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("softcap", 30.0),
        ("s_aux", torch.zeros(4)),
        ("sinks", torch.zeros(4)),
        ("cache", object()),
        ("block_table", torch.zeros(2)),
        ("head_mask", torch.ones(4)),
        ("output_attentions", True),
    ],
)
def test_arguments_not_served_raise_by_name(name, value):
    with pytest.raises(NotImplementedError, match=rf'attn_implementation="fastbert" does not serve {name}.*"eager"'):
        ours.attention(Layer(), *qkv(), None, **{name: value})
    ours.attention(Layer(), *qkv(), None, **{name: False if name == "output_attentions" else None})


def test_bad_masks_raise():
    padding = torch.ones(2, 5, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"made for 2 sequences of 5 tokens.* 2 of 5 queries and 6 keys"):
        ours.attention(Layer(), *qkv(seq_k=6), ours._compact(padding, (-1, 0)))
    with pytest.raises(ValueError, match=r"attention_mask has shape \[2, 5, 5\]"):
        ours.attention(Layer(), *qkv(), torch.ones(2, 5, 5))
    with pytest.raises(ValueError, match=r"2 queries over 5 keys with sliding_window None need a mask"):
        ours.attention(Layer(), *qkv(seq_q=2), padding, is_causal=True)
    with pytest.raises(ValueError, match=r"cuts a batch of one into sequences, and the batch has 2 rows"):
        ours.attention(Layer(), *qkv(), None, cu_seq_lens_q=torch.tensor([0, 5]), cu_seq_lens_k=torch.tensor([0, 5]))
    with pytest.raises(ValueError, match=r"come together"):
        ours.attention(Layer(), *qkv(batch=1), None, cu_seq_lens_q=torch.tensor([0, 5]))
    with pytest.raises(NotImplementedError, match=r"position_bias on packed sequences"):
        boundaries = torch.tensor([0, 5])
        bias = torch.zeros(1, 4, 5, 5)
        ours.attention(Layer(), *qkv(1), None, cu_seq_lens_q=boundaries, cu_seq_lens_k=boundaries, position_bias=bias)


@pytest.mark.parametrize("causal", [False, True], ids=["both", "causal"])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("biased", [False, True], ids=["", "biased"])
def test_a_layer_called_alone(causal, window, padded, biased):
    """With a mask of [batch, seq] or none, is_causal and sliding_window say the rest, as for flash attention."""
    q, k, v = qkv()
    distance = torch.arange(5)[:, None] - torch.arange(5)
    allowed = torch.ones(5, 5, dtype=torch.bool) if window is None else distance.abs() < window
    if causal:
        allowed = allowed & (distance >= 0)
    padding = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]]) if padded else None
    allowed = allowed[None, None] & (padding.bool()[:, None, None] if padded else torch.tensor(True))
    bias = torch.randn(1, 4, 5, 5) if biased else torch.zeros(1)
    expected = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, bias.masked_fill(~allowed, float("-inf")), scale=0.3, enable_gqa=True
    ).transpose(1, 2)
    arguments = {"scaling": 0.3, "is_causal": causal, "sliding_window": window}
    found, weights = ours.attention(Layer(), q, k, v, padding, position_bias=bias if biased else None, **arguments)
    assert weights is None
    assert found.is_contiguous()
    torch.testing.assert_close(found, expected.nan_to_num(0.0))


def test_asking_a_model_for_weights_raises():
    model = make("llama", "fastbert")
    inputs, _ = batch(model, "full")
    with pytest.raises(NotImplementedError, match="output_attentions=True"):
        model(**inputs, output_attentions=True)


def test_registered_with_a_mask_function_of_its_own():
    assert masking_utils.ALL_MASK_ATTENTION_FUNCTIONS["fastbert"] is ours.attention_mask
    model = make("bert")
    with pytest.raises(ValueError, match="output_attentions"):
        switch(model, "fastbert").config.output_attentions = True
    assert copy.deepcopy(model).config._attn_implementation == "fastbert"
