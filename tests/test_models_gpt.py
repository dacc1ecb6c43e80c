"""GPT against transformers' GPT-2: hidden states, losses, gradients, folders; generation, cached and not."""

import copy
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastbert.models import GPTConfig, GPTForCausalLM, GPTModel, KeyValueCache
from fastbert.models.generation import Sampling
from fastbert.packing import PackedBatch, pack
from tests.bert_samples import MASKS

transformers = pytest.importorskip("transformers")

VOCABULARY, POSITIONS, EOS = 97, 140, 96
LENGTHS = (9, 4, 1)


def small_config(**changes):
    values = {
        "vocab_size": VOCABULARY,
        "n_positions": POSITIONS,
        "n_embd": 36,
        "n_layer": 3,
        "n_head": 3,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "eos_token_id": EOS,
        "bos_token_id": EOS,
    }
    return transformers.GPT2Config(**(values | changes))


def saved(folder, head=True, dtype=torch.float32, **changes):
    torch.manual_seed(0)
    kind = transformers.GPT2LMHeadModel if head else transformers.GPT2Model
    model = kind(small_config(**changes))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "ln_" in name and "weight" in name else 0.0, 0.2)
    model = model.to(dtype).eval()
    model.save_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpt")
    theirs = saved(folder)
    return GPTForCausalLM.from_pretrained(folder), theirs


def batch(mask_name):
    mask = torch.tensor(MASKS[mask_name])
    return torch.randint(VOCABULARY, mask.shape, generator=torch.Generator().manual_seed(1)), mask


def prompts():
    generator = torch.Generator().manual_seed(4)
    return [torch.randint(VOCABULARY - 1, (length,), generator=generator) for length in LENGTHS]


@pytest.mark.parametrize("mask_name", MASKS)
@torch.no_grad()
def test_equals_transformers(models, mask_name):
    ours, theirs = models
    ids, mask = batch(mask_name)
    real = mask.bool()
    actual = ours.transformer(ids, mask, output_hidden_states=True)
    # Newer versions number positions by the mask where nothing is said; ours by columns.
    columns = torch.arange(9).expand(3, 9)
    expected = theirs.transformer(ids, attention_mask=mask, position_ids=columns, output_hidden_states=True)
    assert len(actual.hidden_states) == len(expected.hidden_states)
    for mine, other in zip(actual.hidden_states, expected.hidden_states, strict=True):
        torch.testing.assert_close(mine[real], other[real], rtol=0, atol=1e-5)
    assert not actual.last_hidden_state[~real].any()
    packed = ours.transformer(pack(ids, mask)).last_hidden_state
    torch.testing.assert_close(packed, actual.last_hidden_state[real], rtol=0, atol=1e-6)


def test_loss_and_gradients_equal_transformers(tmp_path):
    theirs = saved(tmp_path, dtype=torch.float64)
    ours = GPTForCausalLM.from_pretrained(tmp_path)
    ids, mask = batch("right")
    labels = ids.masked_fill(mask == 0, -100)
    labels[0, 3] = -100
    logits = theirs(ids, attention_mask=mask).logits
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    real = mask.bool()
    torch.testing.assert_close(ours(ids, mask).logits[real], logits[real], rtol=0, atol=1e-10)
    torch.testing.assert_close(ours(ids, mask, labels=labels).loss, expected)
    ours.train()
    output = ours(ids, mask, labels=labels)
    assert output.logits is None
    packed = pack(ids, mask)
    in_packed = ours(packed.from_lengths(packed.values, packed.lengths), labels=labels[real]).loss
    torch.testing.assert_close(output.loss, expected)
    torch.testing.assert_close(in_packed, expected)
    output.loss.backward()
    expected.backward()
    gradients = {name: parameter.grad for name, parameter in ours.named_parameters()}
    theirs_gradients = dict(theirs.named_parameters())
    for name, stored in ours._table(ours.config).items():
        gradient = gradients[name].t() if stored.transposed else gradients[name]
        torch.testing.assert_close(
            gradient, theirs_gradients[f"transformer.{stored.names[0]}"].grad, rtol=1e-6, atol=1e-9
        )


def test_labels_of_empty_sequences_are_nobodys(models):
    ours, _ = models
    values = torch.arange(6)
    filled = PackedBatch.from_lengths(values, [4, 2])
    with_empty = PackedBatch.from_lengths(values, [0, 4, 0, 0, 2, 0])
    expected = ours(filled, labels=values).loss
    torch.testing.assert_close(ours(with_empty, labels=values).loss, expected)


@pytest.mark.parametrize("head", [True, False], ids=["head", "base"])
def test_folders_both_ways(tmp_path, head):
    theirs = saved(tmp_path / "theirs", head)
    kind = GPTForCausalLM if head else GPTModel
    ours = kind.from_pretrained(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    again = type(theirs).from_pretrained(tmp_path / "ours")
    for name, value in theirs.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    # The other kind reads it too, and so do names and buffers of old files.
    other = (GPTModel if head else GPTForCausalLM).from_pretrained(tmp_path / "ours")
    base, other_base = (model.transformer if hasattr(model, "transformer") else model for model in (ours, other))
    assert all(torch.equal(a, b) for a, b in zip(base.parameters(), other_base.parameters(), strict=True))
    file = tmp_path / "ours" / "model.safetensors"
    tensors = {name.removeprefix("transformer."): value for name, value in load_file(file).items()}
    save_file(tensors | {"h.0.attn.bias": torch.ones(1, 1, 4, 4), "h.0.attn.masked_bias": torch.tensor(-1e4)}, file)
    kind.from_pretrained(tmp_path / "ours")


@torch.no_grad()
def test_greedy_equals_transformers_and_batches_equal_singles(models):
    ours, theirs = models
    texts = ours.generate(prompts(), 90, stop_token_ids=())  # past the cache's first memory
    for prompt, text in zip(prompts(), texts, strict=True):
        expected = theirs.generate(
            prompt[None],
            attention_mask=torch.ones_like(prompt[None]),
            max_new_tokens=90,
            do_sample=False,
            eos_token_id=None,
        )
        assert torch.equal(text, expected[0])
        assert torch.equal(ours.generate([prompt.tolist()], 90, stop_token_ids=())[0], text)


def test_prompts_in_every_form(models):
    ours, _ = models
    expected = ours.generate(prompts(), 6)
    padded, mask = torch.zeros(3, 9, dtype=torch.int64), torch.zeros(3, 9, dtype=torch.int64)
    for row, prompt in enumerate(prompts()):
        padded[row, 9 - len(prompt) :], mask[row, 9 - len(prompt) :] = (
            prompt,
            1,
        )  # on the left, as transformers' users do
    forms = [
        ours.generate([prompt.tolist() for prompt in prompts()], 6),
        ours.generate(padded, 6, attention_mask=mask),
        ours.generate(pack(padded, mask), 6),
        ours.generate(PackedBatch.from_lengths(torch.cat(prompts()), LENGTHS), 6),
    ]
    for form in forms:
        assert all(torch.equal(a, b) for a, b in zip(form, expected, strict=True))
    assert ours.generate([], 6) == []
    assert torch.equal(ours.generate(prompts(), 0)[1], prompts()[1])


@pytest.mark.parametrize("chunk", [1, 3, 7])
@torch.no_grad()
def test_cached_equals_uncached(models, chunk):
    ours, _ = models
    ids = torch.randint(VOCABULARY, (3, 4 + 4 * chunk), generator=torch.Generator().manual_seed(5))
    lengths = [4, 1, 3]
    first = PackedBatch.from_lengths(torch.cat([ids[row, :n] for row, n in enumerate(lengths)]), lengths)
    cache = ours.new_cache()
    logits = [ours.next_logits(first, cache)]
    done = list(lengths)
    for _ in range(4):
        new = torch.cat([ids[row, n : n + chunk] for row, n in enumerate(done)])
        positions = torch.cat([torch.arange(n, n + chunk) for n in done])
        logits.append(ours.next_logits(PackedBatch.from_lengths(new, [chunk] * 3, position_ids=positions), cache))
        done = [n + chunk for n in done]
    assert cache.lengths == done
    for row, start in enumerate(lengths):
        whole = ours(ids[row : row + 1, : done[row]]).logits[0]
        for step, actual in enumerate(logits):
            torch.testing.assert_close(actual[row], whole[start + step * chunk - 1], rtol=1e-5, atol=1e-5)


def test_stop_tokens_end_a_sequence_and_free_its_cache(models):
    ours, _ = models
    free = ours.generate(prompts(), 12, stop_token_ids=())
    stop = int(free[0][len(prompts()[0]) + 2])
    stopped = ours.generate(prompts(), 12, stop_token_ids=stop)
    assert int(stopped[0][-1]) == stop
    for prompt, text, whole in zip(prompts(), stopped, free, strict=True):
        new = whole[len(prompt) :].tolist()
        expected = new.index(stop) + 1 if stop in new else len(new)
        assert text.tolist() == whole[: len(prompt) + expected].tolist()
    rows = [step.rows for step in ours.stream(prompts(), 12, stop_token_ids=stop)]
    assert rows[0] == [0, 1, 2] and 0 not in rows[-1]


def test_streaming_gives_the_same_tokens_and_no_gradient_mode_to_its_caller(models):
    ours, _ = models
    texts = [prompt.tolist() for prompt in prompts()]
    for step in ours.stream(prompts(), 8, do_sample=True, seed=3):
        assert torch.is_grad_enabled()
        for row, token in zip(step.rows, step.tokens, strict=True):
            texts[row].append(token)
    expected = ours.generate(prompts(), 8, do_sample=True, seed=3)
    assert texts == [text.tolist() for text in expected]


def test_sampling_is_reproducible_and_rows_draw_their_own_numbers(models):
    ours, _ = models
    arguments = {"do_sample": True, "temperature": 1.5, "stop_token_ids": ()}
    first = ours.generate(prompts(), 20, seed=7, **arguments)
    again = ours.generate(prompts(), 20, seed=7, **arguments)
    other = ours.generate(prompts(), 20, seed=8, **arguments)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    stop = int(first[0][len(prompts()[0])])  # row 0 ends at once
    stopped = ours.generate(prompts(), 20, seed=7, **(arguments | {"stop_token_ids": stop}))
    for row in (1, 2):
        new = stopped[row].tolist()
        assert new == first[row].tolist()[: len(new)]


@pytest.mark.parametrize(
    "sampling, warpers",
    [
        (Sampling(True), []),
        (Sampling(True, temperature=0.7), [("TemperatureLogitsWarper", 0.7)]),
        (Sampling(True, top_k=5), [("TopKLogitsWarper", 5)]),
        (Sampling(True, top_p=0.6), [("TopPLogitsWarper", 0.6)]),
        (Sampling(True, top_p=1e-6), [("TopPLogitsWarper", 1e-6)]),
        (
            Sampling(True, temperature=1.3, top_k=20, top_p=0.9),
            [("TemperatureLogitsWarper", 1.3), ("TopKLogitsWarper", 20), ("TopPLogitsWarper", 0.9)],
        ),
    ],
    ids=str,
)
def test_distributions_equal_transformers(sampling, warpers):
    logits = torch.randn(6, VOCABULARY, generator=torch.Generator().manual_seed(0)) * 2
    expected = logits
    for name, argument in warpers:
        expected = getattr(transformers, name)(argument)(None, expected)
    torch.testing.assert_close(sampling.probabilities(logits), expected.softmax(-1))


def test_repetition_penalty_equals_transformers(models):
    ours, theirs = models
    prompt = prompts()[0]
    expected = theirs.generate(
        prompt[None],
        attention_mask=torch.ones_like(prompt[None]),
        max_new_tokens=20,
        do_sample=False,
        repetition_penalty=1.7,
        eos_token_id=None,
    )
    actual = ours.generate(prompts(), 20, repetition_penalty=1.7, stop_token_ids=())
    assert torch.equal(actual[0], expected[0])
    assert not torch.equal(actual[0], ours.generate(prompts(), 20, stop_token_ids=())[0])


def test_drawn_tokens_follow_the_distribution(models):
    ours, _ = models
    prompt = prompts()[0]
    probabilities = ours(prompt[None]).logits[0, -1].softmax(-1)
    texts = ours.generate([prompt] * 4000, 1, do_sample=True, seed=0)
    counts = torch.stack(texts)[:, -1].bincount(minlength=VOCABULARY) / 4000
    # Five standard deviations of a share of 4000.
    assert ((counts - probabilities).abs() <= 5 * (probabilities / 4000).sqrt() + 1e-3).all()


@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_reduced_precision_generates(models, precision):
    ours = copy.deepcopy(models[0])
    ours.precision = precision
    cache = ours.new_cache()
    batch = PackedBatch.from_lengths(torch.cat(prompts()), LENGTHS)
    logits = ours.next_logits(batch, cache)
    exact = models[0].next_logits(batch, models[0].new_cache())
    assert cache._keys[0].dtype == torch.bfloat16
    assert (logits - exact).norm() < 0.1 * exact.norm()
    assert len(ours.generate(prompts(), 5)) == 3


def test_cache_refuses_what_it_cannot_hold(models):
    ours, _ = models
    cache = KeyValueCache(3, 8)
    with pytest.raises(ValueError, match="a sequence would have 9 tokens; the cache holds at most 8"):
        ours.next_logits(PackedBatch.from_lengths(torch.arange(9), [9]), cache)
    ours.next_logits(PackedBatch.from_lengths(torch.arange(5), [3, 2]), cache)
    assert cache.nbytes == 2 * 3 * 2 * 8 * 36 * 4
    with pytest.raises(ValueError, match="brings 1 to 2 tokens a sequence to a filled cache"):
        ours.next_logits(PackedBatch.from_lengths(torch.arange(3), [1, 2]), cache)
    with pytest.raises(ValueError, match="the batch has 1 sequences, the cache 2"):
        ours.next_logits(PackedBatch.from_lengths(torch.arange(1), [1]), cache)


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"max_new_tokens": 200}, ValueError, "9 tokens; with 200 new ones .* 140 positions"),
        ({"max_new_tokens": -1}, ValueError, "max_new_tokens is -1"),
        ({"max_new_tokens": 1.5}, TypeError, "max_new_tokens is 1.5"),
        ({"temperature": 0.0, "do_sample": True}, ValueError, "temperature is 0.0; expected a number above 0"),
        ({"top_k": 0, "do_sample": True}, ValueError, "top_k is 0"),
        ({"top_p": 1.5, "do_sample": True}, ValueError, "top_p is 1.5"),
        ({"top_p": 0.5}, ValueError, "top_p=0.5 changes nothing with do_sample=False"),
        ({"repetition_penalty": 0}, ValueError, "repetition_penalty is 0"),
        ({"stop_token_ids": ["x"]}, TypeError, "stop_token_ids is 'x'"),
        ({"prompts": "text"}, TypeError, "prompts is of type str; expected lists of token ids, not text"),
        ({"prompts": ["text"]}, TypeError, "prompt 0 is of type str"),
        ({"prompts": [[1], []]}, ValueError, "prompt 1 is empty"),
        ({"prompts": [torch.zeros(2, 2, dtype=torch.int64)]}, ValueError, r"prompt 0 has shape \[2, 2\]"),
        ({"prompts": torch.zeros(2, 3)}, TypeError, "prompts are torch.float32"),
        ({"prompts": [[VOCABULARY]]}, IndexError, "input_ids holds 97; the vocabulary takes 0 to 96"),
        ({"attention_mask": torch.ones(3, 9)}, ValueError, "expected prompts as one padded tensor"),
    ],
    ids=str,
)
def test_arguments_of_generate(models, arguments, error, message):
    ours, _ = models
    with pytest.raises(error, match=message):
        ours.generate(**({"prompts": prompts(), "max_new_tokens": 4} | arguments))


def test_generation_refuses_a_model_in_training_mode(models):
    ours = copy.deepcopy(models[0]).train()
    with pytest.raises(RuntimeError, match="in training mode"):
        ours.stream(prompts(), 4)


@pytest.mark.parametrize(
    "ids, error, message",
    [
        (torch.zeros(1, 141, dtype=torch.int64), ValueError, "141 tokens; the model takes at most 140"),
        (torch.zeros(2, 3), TypeError, "input_ids is torch.float32"),
        (torch.zeros(3, dtype=torch.int64), ValueError, r"shape \[3\]; expected \[batch, seq\]"),
        ([1, 2], TypeError, "input_ids is of type list"),
    ],
    ids=["long", "float", "shape", "list"],
)
def test_bad_ids(models, ids, error, message):
    with pytest.raises(error, match=message):
        models[0](ids)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"n_head": 5}, "n_embd is 768; expected a multiple of n_head, 5"),
        ({"n_layer": -1}, "n_layer is -1; expected an integer, at least 0"),
        ({"n_inner": 0}, "n_inner is 0"),
        ({"activation_function": "mish"}, "activation_function is 'mish'"),
        ({"attn_pdrop": 1.0}, "attn_pdrop is 1.0"),
        ({"layer_norm_epsilon": 0.0}, "layer_norm_epsilon is 0.0"),
        ({"scale_attn_by_inverse_layer_idx": True}, "a scale for each layer is not supported"),
        ({"model_type": "bert"}, "model_type is 'bert'; expected \"gpt2\""),
    ],
    ids=str,
)
def test_configuration(changes, message):
    with pytest.raises(ValueError, match=message):
        GPTConfig.from_dict({"model_type": "gpt2", **changes})


def test_gradient_checkpointing_changes_nothing(tmp_path):
    saved(tmp_path, resid_pdrop=0.2, attn_pdrop=0.1, embd_pdrop=0.1)
    ours = GPTForCausalLM.from_pretrained(tmp_path).train()
    ids, mask = batch("right")
    kept = []
    for enabled in (False, True):
        (ours.gradient_checkpointing_enable if enabled else ours.gradient_checkpointing_disable)()
        torch.manual_seed(3)
        ours.zero_grad()
        loss = ours(ids, mask, labels=ids).loss
        loss.backward()
        kept.append((loss, [parameter.grad for parameter in ours.parameters()]))
    torch.testing.assert_close(kept[0], kept[1], rtol=0, atol=0)


@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
def test_packed_input_compiles_without_a_graph_break(models, grad):
    ours = copy.deepcopy(models[0]).train(grad)
    ids, mask = batch("right")
    packed = pack(ids, mask)
    labels = ids[mask.bool()]
    packed = PackedBatch.from_lengths(packed.values, packed.lengths)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    with torch.set_grad_enabled(grad):
        actual, expected = compiled(packed, labels=labels), ours(packed, labels=labels)
    torch.testing.assert_close(actual.loss, expected.loss)
    if grad:
        actual.loss.backward()
        assert all(parameter.grad is not None for parameter in ours.parameters())


def test_copies_and_autocast(models):
    ours, _ = models
    ids, mask = batch("right")
    for copied in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert torch.equal(copied(ids, mask).logits, ours(ids, mask).logits)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        reduced = ours(ids, mask).logits
    assert reduced.dtype == torch.bfloat16
    exact = ours(ids, mask).logits
    assert (reduced.float() - exact).norm() < 0.05 * exact.norm()
