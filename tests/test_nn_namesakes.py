"""Namesakes of torch.nn's modules: an import line is the whole change."""

import copy
import inspect
import pickle

import pytest
import torch
from torch import nn

import fastbert.nn as fnn
from fastbert.nn import _padded, transformer

pytestmark = pytest.mark.filterwarnings("ignore:enable_nested_tensor")  # torch's stacks say that they are not fast

WIDTH, HEADS, BATCH, SEQ, MEMORY = 24, 3, 3, 7, 5
PADDING = torch.tensor([[0, 0, 0, 0, 0, 1, 1], [0] * 7, [0, 1, 1, 1, 1, 1, 1]], dtype=torch.bool)  # True = padding
PADDINGS = {
    "none": None,
    "right": PADDING,
    "left": PADDING.flip(1),
    "holes": torch.tensor([[1, 0, 1, 0, 0, 1, 0], [0] * 7, [1] * 7], dtype=torch.bool),
    "float": torch.linspace(-2.0, 1.0, 21, dtype=torch.float64).reshape(3, 7).masked_fill(PADDING, -torch.inf),
}
MEMORY_PADDING = torch.tensor([[0, 0, 0, 0, 1], [0] * 5, [0, 0, 1, 1, 1]], dtype=torch.bool)
CAUSAL = nn.Transformer.generate_square_subsequent_mask(SEQ, dtype=torch.float64)
MASKS = {
    "none": None,
    "causal": CAUSAL,
    "causal-bool": CAUSAL.isneginf(),
    "band": torch.ones(SEQ, SEQ, dtype=torch.bool).triu(3),
    "each-head": torch.sin(torch.arange(BATCH * HEADS * SEQ * SEQ, dtype=torch.float64)).reshape(-1, SEQ, SEQ),
}
KINDS = ["MultiheadAttention", "TransformerEncoderLayer", "TransformerDecoderLayer"]


@pytest.fixture(autouse=True)
def one_thread(threads):
    torch.set_num_threads(1)  # tensors this small are done before a second one wakes


def fill(module, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return module


def pair(name, *args, dtype=torch.float64, **kwargs):
    """torch's module and ours, with the same parameters."""
    if name.endswith("Layer"):
        kwargs = {"dropout": 0.0, "dim_feedforward": 40, **kwargs}
    theirs = fill(getattr(nn, name)(*args, dtype=dtype, **kwargs))
    ours = getattr(fnn, name)(*args, dtype=dtype, **kwargs)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def stacks(which, layers=2, **kwargs):
    theirs, ours = pair(f"Transformer{which}Layer", WIDTH, HEADS, **kwargs)
    dtype = kwargs.get("dtype", torch.float64)
    theirs = fill(getattr(nn, f"Transformer{which}")(theirs, layers, nn.LayerNorm(WIDTH, dtype=dtype)))
    ours = getattr(fnn, f"Transformer{which}")(ours, layers, fnn.LayerNorm(WIDTH, dtype=dtype))
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def tokens(seq=SEQ, seed=0, dtype=torch.float64):
    x = torch.randn(BATCH, seq, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x.to(dtype)


def run(module, inputs, real, batch_first, **kwargs):
    """Its result, and the gradients of inputs and parameters of a sum over real tokens."""
    inputs = [x.clone().requires_grad_() for x in inputs]
    module.zero_grad()
    y = module(*(x if batch_first else x.transpose(0, 1) for x in inputs), **kwargs)
    y = y if batch_first else y.transpose(0, 1)
    weights = torch.linspace(-1.0, 1.0, y.numel(), dtype=y.dtype).reshape(y.shape)
    torch.where(real, y * weights, 0.0).sum().backward()
    return y, [x.grad for x in (*inputs, *module.parameters())]


def assert_same(ours, theirs, real):
    (mine, gradients), (own, own_gradients) = ours, theirs
    assert not mine.masked_fill(real, 0.0).any()
    torch.testing.assert_close(mine.masked_fill(~real, 0.0), own.masked_fill(~real, 0.0))
    for a, b in zip(gradients, own_gradients, strict=True):
        torch.testing.assert_close(a, b)


def real_of(padding):
    if padding is None or padding.dtype != torch.bool:
        return torch.ones(BATCH, SEQ, 1, dtype=torch.bool)
    return ~padding.unsqueeze(-1)


@pytest.mark.parametrize("name", KINDS)
def test_constructor_initial_values_and_state(name):
    torch.manual_seed(3)
    theirs = getattr(nn, name)(WIDTH, HEADS)
    torch.manual_seed(3)
    ours = getattr(fnn, name)(WIDTH, HEADS)
    assert inspect.signature(type(ours)) == inspect.signature(type(theirs))
    assert isinstance(ours, type(theirs))
    for one, other in ((ours, theirs), (theirs, ours)):
        assert {k: v.tolist() for k, v in one.state_dict().items()} == {
            k: v.tolist() for k, v in other.state_dict().items()
        }
        other.load_state_dict(fill(one, 5).state_dict())
    assert str(ours) == str(theirs)


@pytest.mark.parametrize("norm_first", [False, True], ids=["post-norm", "pre-norm"])
# Not causal behind left padding: torch's NaN of queries before the first real token spreads. The next test has these.
@pytest.mark.parametrize(
    "mask, padding",
    [(m, p) for m in MASKS for p in PADDINGS if p != "holes" and not (m.startswith("causal") and p == "left")],
)
@pytest.mark.filterwarnings("ignore:.*mismatched")
def test_encoder_equals_torch(mask, padding, norm_first):
    batch_first = mask != "band"
    theirs, ours = stacks("Encoder", norm_first=norm_first, batch_first=batch_first, activation="gelu")
    real = real_of(PADDINGS[padding])
    arguments = {"mask": MASKS[mask], "src_key_padding_mask": PADDINGS[padding]}
    results = [run(module, [tokens()], real, batch_first, **arguments) for module in (ours, theirs)]
    assert_same(*results, real)
    with torch.no_grad():
        x = tokens() if batch_first else tokens().transpose(0, 1)
        y = ours.eval()(x, **arguments)
    torch.testing.assert_close(y if batch_first else y.transpose(0, 1), results[0][0])


@pytest.mark.parametrize("padding", ["left", "holes"])
def test_causal_encoder_with_any_padding_is_that_of_each_sequence_alone(padding):
    _, ours = stacks("Encoder", batch_first=True)
    x, padded = tokens(), PADDINGS[padding]
    y = ours(x, CAUSAL, padded)
    for i in range(BATCH):
        alone = x[i, ~padded[i]]
        expected = ours(alone, is_causal=True) if len(alone) else alone
        torch.testing.assert_close(y[i, ~padded[i]], expected)
    assert not y[padded].any()


@pytest.mark.parametrize("norm_first", [False, True], ids=["post-norm", "pre-norm"])
@pytest.mark.parametrize("memory_padding", [None, MEMORY_PADDING], ids=["memory-full", "memory-padded"])
@pytest.mark.parametrize("padding", ["none", "right", "float"])
@pytest.mark.parametrize(
    "masks",
    [
        {},
        {"tgt_mask": CAUSAL},
        {"tgt_mask": MASKS["each-head"], "memory_mask": MASKS["each-head"][..., :MEMORY]},
        {"memory_mask": MASKS["band"][:, :MEMORY]},
    ],
    ids=["no-masks", "causal", "both-masks", "memory-mask"],
)
@pytest.mark.filterwarnings("ignore:.*mismatched")
def test_decoder_equals_torch(masks, padding, memory_padding, norm_first):
    batch_first = "memory_mask" not in masks
    theirs, ours = stacks("Decoder", norm_first=norm_first, batch_first=batch_first)
    real = real_of(PADDINGS[padding])
    arguments = {
        **masks,
        "tgt_key_padding_mask": PADDINGS[padding],
        "memory_key_padding_mask": memory_padding,
    }
    inputs = [tokens(), tokens(MEMORY, 1)]
    assert_same(*(run(module, inputs, real, batch_first, **arguments) for module in (ours, theirs)), real)


def test_memory_is_causal_counts_from_the_first_tokens():
    theirs, ours = pair("TransformerDecoderLayer", WIDTH, HEADS, batch_first=True)
    mask = torch.ones(SEQ, MEMORY, dtype=torch.bool).triu(1)
    expected = theirs(tokens(), tokens(MEMORY), memory_mask=mask)
    torch.testing.assert_close(ours(tokens(), tokens(MEMORY), memory_is_causal=True), expected)


@pytest.mark.parametrize("average", [True, False], ids=["averaged", "per-head"])
@pytest.mark.parametrize("need_weights", [True, False], ids=["weights", "no-weights"])
@pytest.mark.parametrize("layout", ["batch-first", "seq-first", "unbatched"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bias": False},
        {"kdim": 10, "vdim": 14},
        {"add_bias_kv": True, "add_zero_attn": True},
    ],
    ids=["plain", "no-bias", "kdim-vdim", "bias-kv-zero-attn"],
)
@pytest.mark.filterwarnings("ignore:.*mismatched")
def test_multihead_attention_equals_torch(options, layout, need_weights, average):
    theirs, ours = pair("MultiheadAttention", WIDTH, HEADS, batch_first=layout == "batch-first", **options)
    x, memory, value = tokens(), tokens(MEMORY, 1), tokens(MEMORY, 2)
    if "kdim" in options:
        memory, value = memory[..., :10], value[..., :14]
    elif layout == "seq-first":
        value = memory  # one input twice
    calls = [(x, memory, value, MEMORY_PADDING, torch.ones(SEQ, MEMORY, dtype=torch.bool).triu(2))]
    if "kdim" not in options:
        calls += [(x, x, x, PADDING, CAUSAL), (x, x, x, PADDINGS["float"], None), (x, x, x, None, MASKS["each-head"])]
    for q, k, v, padding, mask in calls:
        q, k, v = ((x[0] if layout == "unbatched" else x.transpose(0, 1)) for x in (q, k, v))
        if layout == "unbatched":
            padding = None if padding is None else padding[0]
            mask = mask[:HEADS] if mask is not None and mask.dim() == 3 else mask
        elif layout == "batch-first":
            q, k, v = (x.transpose(0, 1) for x in (q, k, v))
        same = [q, q, q] if k.data_ptr() == q.data_ptr() else [q, k, k] if v.data_ptr() == k.data_ptr() else [q, k, v]
        results = []
        for module in (ours, theirs):
            leaves = {id(t): t.clone().requires_grad_() for t in same}
            module.zero_grad()
            y, weights = module(*(leaves[id(t)] for t in same), padding, need_weights, mask, average)
            ((y * y.detach()).sum() + (0.0 if weights is None else (weights * weights.detach()).sum())).backward()
            gradients = [t.grad for t in (*leaves.values(), *module.parameters())]
            results.append([y, *([] if weights is None else [weights]), *gradients])
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("need_weights", [True, False])
def test_a_query_with_nothing_to_see(need_weights):
    _, ours = pair("MultiheadAttention", WIDTH, HEADS, batch_first=True)
    x = tokens().requires_grad_()
    nothing = torch.ones(BATCH, SEQ, dtype=torch.bool)
    for arguments in ({"key_padding_mask": nothing}, {"attn_mask": torch.full((SEQ, SEQ), -torch.inf)}):
        y, weights = ours(x, x, x, need_weights=need_weights, **arguments)
        torch.testing.assert_close(y, ours.out_proj.bias.expand_as(y))
        assert weights is None or not weights.any()
        (gradient,) = torch.autograd.grad(y.sum(), x)
        assert not gradient.any()


def test_an_encoder_packs_once_and_runs_the_one_block(monkeypatch):
    seen = []
    for module, name in ((_padded, "pack"), (_padded, "unpack"), (transformer, "transformer_block")):
        original = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, _f=original, _n=name, **k: seen.append((_n, a[0])) or _f(*a, **k))
    _, ours = stacks("Encoder", layers=3)
    ours(tokens().transpose(0, 1), CAUSAL, PADDING)
    assert [name for name, _ in seen] == ["pack"] + 3 * ["transformer_block"] + ["unpack"]
    assert seen[1][1].shape == (int((~PADDING).sum()), WIDTH)  # real tokens alone
    seen.clear()
    _, decoder = stacks("Decoder", layers=2)
    memory = tokens(MEMORY).transpose(0, 1)
    decoder(tokens().transpose(0, 1), memory, CAUSAL, None, PADDING, MEMORY_PADDING)
    assert [name for name, _ in seen] == 2 * ["pack"] + 2 * ["transformer_block"] + ["unpack"]


@torch.no_grad()
def test_inference_of_a_stack_asks_for_all_layers_at_once(monkeypatch):
    asked = []
    original = transformer.whole_blocks
    monkeypatch.setattr(transformer, "whole_blocks", lambda *a: asked.append(len(a[3])) or original(*a))
    _, ours = stacks("Encoder", layers=3, batch_first=True, dtype=torch.float32)
    x = expected = tokens(dtype=torch.float32)
    y = ours(x, src_key_padding_mask=PADDING)
    for layer in ours.layers:
        expected = layer(expected, src_key_padding_mask=PADDING)
    torch.testing.assert_close(y, ours.norm(expected).masked_fill(PADDING.unsqueeze(-1), 0.0), rtol=1e-5, atol=1e-5)
    assert asked == [3]
    ours.layers[1].dropout.p = 0.5
    ours.train()(x)
    assert asked == [3]


def test_hooks_on_all_modules_see_all_parts():
    _, ours = stacks("Encoder", layers=2)
    before, seen = ours(tokens()), []
    handle = nn.modules.module.register_module_forward_hook(lambda module, given, y: seen.append(type(module)))
    torch.testing.assert_close(ours(tokens()), before)
    handle.remove()
    assert {nn.Linear, fnn.LayerNorm, fnn.MultiheadAttention, fnn.TransformerEncoderLayer} <= set(seen)


def test_what_stands_on_padding_does_not_matter():
    _, ours = stacks("Encoder", batch_first=True)
    x = tokens()
    expected = ours(x, src_key_padding_mask=PADDING)
    x[PADDING] = torch.nan
    torch.testing.assert_close(ours(x, src_key_padding_mask=PADDING), expected)


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged], ids=str)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_with_gradients(layout):
    _, ours = stacks("Encoder", batch_first=True)
    parts = [x[:n].clone().requires_grad_() for x, n in zip(tokens(), (5, 7, 1), strict=True)]
    y = ours(torch.nested.as_nested_tensor(parts, layout=layout))
    assert y.is_nested and y.layout == layout
    padded = ours(tokens(), src_key_padding_mask=PADDING)
    for i, each in enumerate(y.unbind()):
        torch.testing.assert_close(each, padded[i, : len(each)])
    sum(each.sum() for each in y.unbind()).backward()
    assert all(part.grad is not None for part in parts)
    with pytest.raises(ValueError, match="nested tensor, which knows its lengths"):
        ours(torch.nested.as_nested_tensor(parts, layout=layout), src_key_padding_mask=PADDING)


class Halved(fnn.TransformerEncoderLayer):
    def _ff_block(self, x):
        return 0.5 * super()._ff_block(x)


def change_hook(layer):
    layer.linear1.register_forward_hook(lambda module, arguments, y: y + 1.0)


def change_norm(layer):
    layer.norm1 = nn.RMSNorm(WIDTH, dtype=torch.float64)


def change_eps(layer):
    layer.norm2.eps = 0.1


def change_activation(layer):
    layer.activation = nn.functional.leaky_relu


def change_attention(layer):
    layer.self_attn.register_forward_pre_hook(lambda module, arguments: tuple(2.0 * x for x in arguments))


@pytest.mark.parametrize(
    "change", [change_hook, change_norm, change_eps, change_activation, change_attention], ids=lambda f: f.__name__
)
def test_changed_layers_are_computed_part_by_part(change):
    theirs, ours = stacks("Encoder", batch_first=True)
    for module in (theirs, ours):
        change(module.layers[1])
    assert_same(
        *(
            run(module, [tokens()], real_of(PADDING), True, src_key_padding_mask=PADDING, mask=MASKS["band"])
            for module in (ours, theirs)
        ),
        real_of(PADDING),
    )


def test_overridden_methods_and_hooks_on_layers_have_their_say():
    layer = Halved(WIDTH, HEADS, 40, 0.0, batch_first=True, dtype=torch.float64)
    plain = fnn.TransformerEncoderLayer(WIDTH, HEADS, 40, 0.0, batch_first=True, dtype=torch.float64)
    plain.load_state_dict(layer.state_dict())
    plain.linear2.weight.data *= 0.5
    plain.linear2.bias.data *= 0.5
    torch.testing.assert_close(layer(tokens()), plain(tokens()))
    encoder, seen = fnn.TransformerEncoder(plain, 2), []
    before = encoder(tokens(), src_key_padding_mask=PADDING)
    encoder.layers[0].register_forward_hook(lambda module, arguments, y: seen.append(y.shape))
    torch.testing.assert_close(encoder(tokens(), src_key_padding_mask=PADDING), before)
    assert seen == [(BATCH, SEQ, WIDTH)]


@pytest.mark.filterwarnings("ignore:.*is a prototype", "ignore:The PyTorch API of nested tensors")
def test_our_layers_in_torchs_stack_and_torchs_in_ours():
    theirs, ours = pair("TransformerEncoderLayer", WIDTH, HEADS, batch_first=True)
    expected = fnn.TransformerEncoder(ours, 2).eval()(tokens(), src_key_padding_mask=PADDING)
    with torch.no_grad():
        for stack in (nn.TransformerEncoder(ours, 2), fnn.TransformerEncoder(theirs, 2)):
            y = stack.eval()(tokens(), src_key_padding_mask=PADDING)
            torch.testing.assert_close(y[~PADDING], expected[~PADDING])


@pytest.mark.parametrize("which", ["Encoder", "Decoder"])
@pytest.mark.parametrize("norm_first", [False, True], ids=["post-norm", "pre-norm"])
def test_dropout_in_training_only_and_by_seed(which, norm_first):
    _, ours = stacks(which, dropout=0.4, norm_first=norm_first, dtype=torch.float32, batch_first=True)
    inputs = [tokens(dtype=torch.float32)] + [tokens(MEMORY, dtype=torch.float32)] * (which == "Decoder")

    def at(seed):
        torch.manual_seed(seed)
        return ours(*inputs)

    assert torch.equal(at(1), at(1))
    assert not torch.allclose(at(1), at(2))
    ours.eval()
    assert torch.equal(at(1), at(2))


@pytest.mark.parametrize("place", ["self_attn", "dropout", "dropout1"])
def test_each_dropout_of_a_layer_acts_in_its_place(place):
    """All dropped: what is left is what the formula says."""
    layer = pair("TransformerEncoderLayer", WIDTH, HEADS, batch_first=True)[1]
    if place == "self_attn":
        layer.self_attn.dropout = 1.0
        attention, feed_forward = layer.self_attn.out_proj.bias.expand_as(tokens()), layer._ff_block
    elif place == "dropout":
        layer.dropout.p = 1.0
        attention, feed_forward = layer._sa_block(tokens(), None, None), lambda x: layer.linear2.bias
    else:
        layer.dropout1.p = layer.dropout2.p = 1.0
        attention, feed_forward = 0.0, lambda x: 0.0
    x = layer.norm1(tokens() + attention)
    torch.testing.assert_close(layer(tokens()), layer.norm2(x + feed_forward(x)))


@pytest.mark.parametrize("mask", ["none", "causal"])
def test_compile_without_a_graph_break(mask):
    torch._dynamo.reset()
    _, ours = stacks("Encoder", layers=1, batch_first=True, dtype=torch.float32)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    for gradients in (True, False):
        with torch.set_grad_enabled(gradients):
            for padding in (PADDING, None):
                arguments = {"mask": MASKS[mask], "src_key_padding_mask": padding}
                x = tokens(dtype=torch.float32)
                torch.testing.assert_close(compiled(x, **arguments), ours(x, **arguments), rtol=1e-5, atol=1e-5)


def test_compiled_decoder_and_attention():
    torch._dynamo.reset()
    decoder = stacks("Decoder", layers=1, batch_first=True, dtype=torch.float32, norm_first=True)[1]
    x, memory = tokens(dtype=torch.float32), tokens(MEMORY, dtype=torch.float32)
    arguments = (x, memory, CAUSAL.float(), None, PADDING, MEMORY_PADDING, True)
    compiled = torch.compile(decoder, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*arguments), decoder(*arguments), rtol=1e-5, atol=1e-5)
    attention = pair("MultiheadAttention", WIDTH, HEADS, dtype=torch.float32)[1]
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    for need_weights in (True, False):
        for actual, expected in zip(
            compiled(x, x, x, None, need_weights), attention(x, x, x, None, need_weights), strict=True
        ):
            assert (actual is None and expected is None) or torch.allclose(actual, expected, 1e-5, 1e-5)


def test_compiled_dropout():
    torch._dynamo.reset()
    _, ours = stacks("Encoder", layers=1, batch_first=True, dtype=torch.float32, dropout=0.5)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    x = tokens(dtype=torch.float32)
    assert not torch.allclose(compiled(x, None, PADDING), compiled(x, None, PADDING))


def test_export_with_a_padding_mask():
    ours = stacks("Encoder", batch_first=True, dtype=torch.float32)[1].eval()
    x = tokens(dtype=torch.float32)
    batch = torch.export.Dim("batch", min=2, max=16)
    with torch.no_grad():
        exported = torch.export.export(
            ours,
            (x, None, PADDING),
            dynamic_shapes={"src": {0: batch}, "mask": None, "src_key_padding_mask": {0: batch}},
        )
        for rows in (BATCH, 2):
            y = exported.module()(x[:rows], None, PADDING[:rows])
            torch.testing.assert_close(y, ours(x[:rows], None, PADDING[:rows]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("which", ["Encoder", "Decoder"])
def test_autocast(which):
    _, ours = stacks(which, batch_first=True, dtype=torch.float32)
    inputs = [tokens(dtype=torch.float32)] + [tokens(MEMORY, dtype=torch.float32)] * (which == "Decoder")
    with torch.autocast("cpu", torch.bfloat16):
        y = ours(*inputs)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), ours(*inputs), rtol=0.1, atol=0.2)
    y.float().square().sum().backward()
    assert {parameter.grad.dtype for parameter in ours.parameters()} == {torch.float32}


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("which", ["Encoder", "Decoder"])
def test_copies(which, copied):
    _, ours = stacks(which, batch_first=True)
    other = copied(ours)
    inputs = [tokens()] + [tokens(MEMORY)] * (which == "Decoder")
    assert type(other.layers[0]) is type(ours.layers[0]) and torch.equal(other(*inputs), ours(*inputs))


@pytest.mark.parametrize("shape", [(0, 7), (3, 0)], ids=["no-sequences", "no-tokens"])
def test_empty_batches(shape):
    _, ours = stacks("Encoder", batch_first=True)
    x = torch.empty(*shape, WIDTH, dtype=torch.float64)
    for padding in (None, torch.zeros(shape, dtype=torch.bool)):
        assert ours(x, src_key_padding_mask=padding).shape == x.shape
        assert ours(x, torch.zeros(shape[1], shape[1]).bool(), padding).shape == x.shape


X = torch.zeros(BATCH, SEQ, WIDTH)


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ((X[..., :23],), ValueError, r"src has shape \[3, 7, 23\]; expected \[batch, seq, 24\]"),
        ((X[0, 0],), ValueError, r"src has shape \[24\]"),
        ((X, torch.zeros(7, 6)), ValueError, r"src_mask has shape \[7, 6\]; expected \[7, 7\] or \[9, 7, 7\]"),
        ((X, None, PADDING.t()), ValueError, r"src_key_padding_mask has shape \[7, 3\]; expected \[3, 7\]"),
        ((X, None, PADDING.int()), TypeError, r"src_key_padding_mask is torch.int32; expected bool"),
        ((X, torch.zeros(7, 7).long()), TypeError, r"src_mask is torch.int64"),
        ((X.double(),), TypeError, "float64"),
        ((X[0], None, PADDING), ValueError, r"src_key_padding_mask has shape \[3, 7\]; expected \[7\]"),
    ],
)
def test_bad_input_of_an_encoder_layer(arguments, error, message):
    layer = fnn.TransformerEncoderLayer(WIDTH, HEADS, 40, batch_first=True)
    with pytest.raises(error, match=message):
        layer(*arguments)


def test_bad_input_of_decoder_and_attention():
    layer = fnn.TransformerDecoderLayer(WIDTH, HEADS, 40, batch_first=True)
    with pytest.raises(ValueError, match=r"memory \[2, 7, 24\]; expected the same batch"):
        layer(X, X[:2])
    with pytest.raises(ValueError, match=r"memory_mask has shape \[7, 6\]; expected \[7, 7\]"):
        layer(X, X, memory_mask=torch.zeros(7, 6))
    attention = fnn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
    with pytest.raises(ValueError, match="key has 23 features; this module takes 24"):
        attention(X, X[..., 1:], X)
    with pytest.raises(ValueError, match=r"value \[3, 6, 24\]; batch sizes, and key's and value's lengths"):
        attention(X, X, X[:, 1:])
    with pytest.raises(ValueError, match=r"query has shape \[7, 24\].*three dimensions of each, or two"):
        attention(X[0], X, X)
    with pytest.raises(ValueError, match=r"attn_mask has shape \[3, 7, 7\]; expected \[7, 7\] or \[9, 7, 7\]"):
        attention(X, X, X, attn_mask=torch.zeros(3, 7, 7))


def test_softmax_and_losses_where_they_differ_from_torch():
    x = torch.tensor([[0.0, 1.0], [-torch.inf, -torch.inf]])
    assert fnn.Softmax(-1)(x)[1].tolist() == [0.0, 0.0]
    torch.testing.assert_close(fnn.Softmax(-1)(x)[0], nn.Softmax(-1)(x)[0])
    logits = torch.randn(4, 9).bfloat16()
    target = torch.tensor([1, 8, -100, 0])
    loss = fnn.CrossEntropyLoss()(logits, target)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, nn.CrossEntropyLoss()(logits.float(), target))
    with pytest.raises(IndexError, match="9"):
        fnn.CrossEntropyLoss()(logits, target + 1)


def test_linear_cross_entropy_is_a_head_and_its_loss():
    loss = fnn.LinearCrossEntropyLoss(6, 11, bias=True, label_smoothing=0.1)
    assert set(loss.state_dict()) == {"linear.weight", "linear.bias"}
    x, target = torch.randn(5, 6), torch.tensor([3, -100, 10, 0, 0])
    expected = nn.functional.cross_entropy(loss.linear(x), target, label_smoothing=0.1)
    torch.testing.assert_close(loss(x, target), expected)
    with pytest.raises(ValueError, match=r"weight has shape \[3\]; expected \[11\]"):
        fnn.LinearCrossEntropyLoss(6, 11, weight=torch.ones(3))
    with pytest.raises(ValueError, match=r"label_smoothing is 1.5"):
        fnn.LinearCrossEntropyLoss(6, 11, label_smoothing=1.5)
