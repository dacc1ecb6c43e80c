"""The building blocks on packed tokens, against torch's own modules, one sequence at a time."""

import pytest
import torch
from torch import nn

from fastbert import nn as fnn
from fastbert.packing import PackedBatch
from tests.numerics import assert_close_to_exact

LENGTHS = [7, 1, 0, 17, 64]
HIDDEN, HEADS, INTERMEDIATE = 24, 3, 55
TORCH_ACTIVATIONS = {"relu": "relu", "gelu": "gelu", "silu": nn.functional.silu, "tanh": torch.tanh}


def packed_tokens(dtype=torch.float64, lengths=LENGTHS):
    torch.manual_seed(1)
    return PackedBatch.from_lengths(torch.randn(sum(lengths), HIDDEN, dtype=dtype), lengths)


def pair(dtype=torch.float64, norm_first=False, causal=False, activation="gelu", bias=True):
    """Our block, and torch's encoder layer with the same weights; all of them random."""
    torch.manual_seed(0)
    ours = fnn.TransformerBlock(
        HIDDEN,
        HEADS,
        INTERMEDIATE,
        activation=activation,
        eps=1e-5,
        norm_first=norm_first,
        causal=causal,
        bias=bias,
        dtype=dtype,
    )
    for parameter in ours.parameters():
        nn.init.normal_(parameter, 0.0, 0.3)
    theirs = nn.TransformerEncoderLayer(
        HIDDEN,
        HEADS,
        INTERMEDIATE,
        dropout=0.0,
        activation=TORCH_ACTIVATIONS[activation],
        batch_first=True,
        norm_first=norm_first,
        dtype=dtype,
    )
    names = {
        "self_attn.in_proj_": "attention.qkv.",
        "self_attn.out_proj.": "attention.out.",
        "linear1.": "feed_forward.up.",
        "linear2.": "feed_forward.down.",
        "norm1.": "attention_norm.",
        "norm2.": "feed_forward_norm.",
    }
    state = {}
    for their_prefix, our_prefix in names.items():
        for kind in ("weight", "bias"):
            value = ours.state_dict().get(our_prefix + kind)
            state[their_prefix + kind] = (
                torch.zeros_like(theirs.state_dict()[their_prefix + kind]) if value is None else value
            )
    theirs.load_state_dict(state)
    return ours, theirs


def one_by_one(layer, batch, causal=False):
    parts = []
    for x in batch.split():
        if len(x) == 0:
            continue
        mask = torch.ones(len(x), len(x), dtype=torch.bool).triu(1) if causal else None
        parts.append(layer(x.unsqueeze(0), src_mask=mask).squeeze(0))
    return torch.cat(parts)


@pytest.mark.parametrize("activation", TORCH_ACTIVATIONS)
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("norm_first", [False, True], ids=["post-norm", "pre-norm"])
def test_block_equals_torchs_layer_forward_and_backward(norm_first, causal, activation):
    ours, theirs = pair(norm_first=norm_first, causal=causal, activation=activation)
    batch = packed_tokens()
    x, y = batch.values.clone().requires_grad_(), batch.values.clone().requires_grad_()
    actual = ours(x, batch.cu_seqlens, batch.max_seqlen)
    expected = one_by_one(theirs, batch.with_values(y), causal)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)

    weight = torch.randn_like(expected)
    (actual * weight).sum().backward()
    (expected * weight).sum().backward()
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(ours.attention.qkv.weight.grad, theirs.self_attn.in_proj_weight.grad)
    torch.testing.assert_close(ours.attention.out.bias.grad, theirs.self_attn.out_proj.bias.grad)
    torch.testing.assert_close(ours.attention_norm.weight.grad, theirs.norm1.weight.grad)
    torch.testing.assert_close(ours.feed_forward.up.bias.grad, theirs.linear1.bias.grad)
    torch.testing.assert_close(ours.feed_forward.down.weight.grad, theirs.linear2.weight.grad)
    torch.testing.assert_close(ours.feed_forward_norm.bias.grad, theirs.norm2.bias.grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("norm_first", [False, True], ids=["post-norm", "pre-norm"])
@torch.no_grad()
def test_block_is_as_exact_as_torchs(norm_first, dtype):
    batch = packed_tokens(dtype)
    ours, theirs = pair(dtype, norm_first)
    exact = one_by_one(theirs.double(), batch.to(dtype=torch.float64))
    torchs_own = one_by_one(theirs.to(dtype), batch)
    assert_close_to_exact(ours(batch.values, batch.cu_seqlens, batch.max_seqlen), exact, torchs_own)


@torch.no_grad()
def test_block_without_biases():
    ours, theirs = pair(bias=False)
    assert [name for name, _ in ours.named_parameters() if name.endswith("bias")] == [
        "attention_norm.bias",
        "feed_forward_norm.bias",
    ]
    batch = packed_tokens()
    torch.testing.assert_close(ours(batch.values, batch.cu_seqlens, batch.max_seqlen), one_by_one(theirs, batch))


@pytest.mark.parametrize("norm_first", [False, True], ids=["post-norm", "pre-norm"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_separate_query_key_and_value_have_the_merged_ones_gradients(norm_first, bias):
    block, _ = pair(norm_first=norm_first, bias=bias)
    batch = packed_tokens()
    merged, x = block.weights(), batch.values.clone().requires_grad_()
    parts = [
        None if each is None else tuple(part.detach().clone().requires_grad_() for part in each.chunk(3))
        for each in merged[:2]
    ]
    actual = fnn.transformer_block(
        batch.values, batch.cu_seqlens, batch.max_seqlen, fnn.BlockWeights(*parts, *merged[2:]), block.options
    )
    expected = fnn.transformer_block(x, batch.cu_seqlens, batch.max_seqlen, merged, block.options)
    torch.testing.assert_close(actual, expected)
    weight = torch.randn_like(expected)
    (actual * weight).sum().backward()
    (expected * weight).sum().backward()
    for whole, three in zip(merged[:2], parts, strict=True):
        if three is not None:
            torch.testing.assert_close(torch.cat([part.grad for part in three]), whole.grad)


def test_query_key_and_value_are_all_merged_or_all_separate():
    block, _ = pair()
    batch = packed_tokens()
    weights = block.weights()
    three = tuple(weights.qkv_weight.chunk(3))
    for mixed in (weights._replace(qkv_weight=three), weights._replace(qkv_weight=three[:2], qkv_bias=None)):
        with pytest.raises(ValueError, match=r"qkv_weight is \d tensors and qkv_bias [013]"):
            fnn.transformer_block(batch.values, batch.cu_seqlens, batch.max_seqlen, mixed, block.options)


@pytest.mark.parametrize("norm_first", [False, True], ids=["post-norm", "pre-norm"])
@pytest.mark.parametrize("lengths", [[], [0], [0, 0]], ids=str)
def test_no_tokens(lengths, norm_first):
    ours, _ = pair(norm_first=norm_first)
    batch = packed_tokens(lengths=lengths)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            assert ours(batch.values, batch.cu_seqlens, batch.max_seqlen).shape == (0, HIDDEN)


@torch.no_grad()
def test_sequences_do_not_see_each_other():
    ours, _ = pair(torch.float32)
    batch = packed_tokens(torch.float32)
    before = batch.with_values(ours(batch.values, batch.cu_seqlens, batch.max_seqlen)).split()
    other = batch.values.clone()
    other[:7] = torch.randn(7, HIDDEN)
    after = batch.with_values(ours(other, batch.cu_seqlens, batch.max_seqlen)).split()
    assert not torch.equal(before[0], after[0])
    for mine, same in zip(before[1:], after[1:], strict=True):
        torch.testing.assert_close(mine, same, rtol=1e-6, atol=1e-6)


@torch.no_grad()
def test_the_parts_make_the_block():
    block, _ = pair()
    batch = packed_tokens()
    x = batch.values
    attended = nn.functional.layer_norm(
        x + block.attention(x, batch.cu_seqlens, batch.max_seqlen), (HIDDEN,), *block.weights()[4:6], 1e-5
    )
    expected = nn.functional.layer_norm(
        attended + block.feed_forward(attended), (HIDDEN,), *block.weights()[10:12], 1e-5
    )
    torch.testing.assert_close(block(x, batch.cu_seqlens, batch.max_seqlen), expected)
    same = fnn.transformer_block(x, batch.cu_seqlens, batch.max_seqlen, block.weights(), block.options)
    assert torch.equal(same, block(x, batch.cu_seqlens, batch.max_seqlen))


@pytest.mark.parametrize("norm_first", [False, True], ids=["post-norm", "pre-norm"])
@pytest.mark.parametrize("which", ["dropout_p", "attention_dropout_p"])
def test_dropout_only_in_training_and_reproducible(which, norm_first):
    block = fnn.TransformerBlock(HIDDEN, HEADS, INTERMEDIATE, norm_first=norm_first, **{which: 0.5})
    for parameter in block.parameters():
        nn.init.normal_(parameter, 0.0, 0.3)
    plain = fnn.TransformerBlock(HIDDEN, HEADS, INTERMEDIATE, norm_first=norm_first)
    plain.load_state_dict(block.state_dict())
    batch = packed_tokens(torch.float32)

    def run(module, seed):
        torch.manual_seed(seed)
        return module(batch.values, batch.cu_seqlens, batch.max_seqlen)

    trained = run(block, 1)
    assert torch.equal(trained, run(block, 1))
    assert not torch.allclose(trained, run(block, 2))
    assert not torch.allclose(trained, run(plain, 1))
    assert torch.equal(run(block.eval(), 1), run(plain.eval(), 1))


def test_dropping_everything_leaves_the_residual():
    block = fnn.TransformerBlock(HIDDEN, HEADS, INTERMEDIATE, norm_first=True, dropout_p=1.0)
    batch = packed_tokens(torch.float32)
    torch.testing.assert_close(block(batch.values, batch.cu_seqlens, batch.max_seqlen), batch.values)


@pytest.mark.parametrize("norm_first", [False, True], ids=["post-norm", "pre-norm"])
def test_autocast_runs_the_products_in_bfloat16(norm_first):
    block, _ = pair(torch.float32, norm_first)
    batch = packed_tokens(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = block(batch.values, batch.cu_seqlens, batch.max_seqlen)
        y.float().square().sum().backward()
    assert y.dtype == torch.bfloat16
    assert {p.grad.dtype for p in block.parameters()} == {torch.float32}
    exact = block.double()(batch.values.double(), batch.cu_seqlens, batch.max_seqlen)
    torch.testing.assert_close(y.double(), exact, rtol=0.1, atol=0.1 * exact.abs().max().item())


def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match="hidden_size is 25 and num_heads 3"):
        fnn.TransformerBlock(25, 3)
    with pytest.raises(ValueError, match="num_heads 0"):
        fnn.SelfAttention(24, 0)


def test_wrong_input_is_refused():
    block, _ = pair(torch.float32)
    batch = packed_tokens(torch.float32)
    with pytest.raises(TypeError, match="float64"):
        block(batch.values.double(), batch.cu_seqlens, batch.max_seqlen)
    with pytest.raises(ValueError, match="25"):
        block(torch.randn(batch.total, 25), batch.cu_seqlens, batch.max_seqlen)
    with pytest.raises(ValueError, match="cu_seqlens"):
        block(batch.values[:-1], batch.cu_seqlens, batch.max_seqlen)
    with pytest.raises(ValueError, match="max_seqlen"):
        block(batch.values, batch.cu_seqlens, 63)


def test_layer_norm_is_a_drop_in():
    theirs = nn.LayerNorm((3, 8), eps=1e-3)
    ours = fnn.LayerNorm((3, 8), eps=1e-3)
    nn.init.normal_(theirs.weight)
    nn.init.normal_(theirs.bias)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(5, 3, 8)
    torch.testing.assert_close(ours(x), theirs(x))
    assert repr(ours) == repr(theirs)


def embeddings(**changes):
    torch.manual_seed(0)
    module = fnn.Embeddings(97, HIDDEN, 40, 2, dtype=torch.float64, **changes)
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    return module


def test_embeddings_equal_their_formula_forward_and_backward():
    module = embeddings(padding_idx=0)
    ids, positions, types = torch.tensor([5, 0, 5, 96]), torch.tensor([0, 39, 3, 3]), torch.tensor([0, 1, 1, 0])

    def formula(word, position, token_type, weight, bias):
        total = nn.functional.embedding(ids, word, 0) + position[positions] + token_type[types]
        return nn.functional.layer_norm(total, (HIDDEN,), weight, bias, 1e-12)

    copies = [parameter.detach().clone().requires_grad_() for parameter in module.parameters()]
    actual, expected = module(ids, positions, types), formula(*copies)
    torch.testing.assert_close(actual, expected)
    weight = torch.randn_like(expected)
    (actual * weight).sum().backward()
    (expected * weight).sum().backward()
    for parameter, copy in zip(module.parameters(), copies, strict=True):
        torch.testing.assert_close(parameter.grad, copy.grad)
    assert not module.word.weight.grad[0].any()


def test_embeddings_default_to_type_zero_and_may_lack_tables():
    module = embeddings()
    ids, positions = torch.tensor([5, 0, 5]), torch.arange(3)
    assert torch.equal(module(ids, positions), module(ids, positions, torch.zeros(3, dtype=torch.int64)))
    bare = fnn.Embeddings(97, HIDDEN, 0, 0)
    assert set(bare.state_dict()) == {"word.weight", "norm.weight", "norm.bias"}
    expected = nn.functional.layer_norm(bare.word.weight[ids], (HIDDEN,), eps=1e-12)
    torch.testing.assert_close(bare(ids), expected)
    with pytest.raises(ValueError, match="type_vocab_size is 0"):
        bare(ids, None, ids)
    with pytest.raises(ValueError, match="position_ids are needed"):
        module(ids)


@pytest.mark.parametrize(
    "ids, positions, types, message",
    [
        ([97], [0], [0], "97"),
        ([-1], [0], [0], "-1"),
        ([0], [40], [0], "40"),
        ([0], [-1], [0], "-1"),
        ([0], [0], [2], "2"),
    ],
)
def test_embeddings_refuse_ids_outside_their_tables(ids, positions, types, message):
    with pytest.raises(IndexError, match=message):
        embeddings()(*(torch.tensor(x) for x in (ids, positions, types)))


def test_initialisation_is_berts():
    block = fnn.TransformerBlock(256, 4)
    table = fnn.Embeddings(1000, 256, padding_idx=3)
    for weight in (block.attention.qkv.weight, block.feed_forward.down.weight, table.word.weight):
        assert abs(weight.std().item() - 0.02) < 1e-3
        assert abs(weight.mean().item()) < 1e-3
    assert not table.word.weight[3].any()
    assert not block.attention.qkv.bias.any()
    assert torch.equal(block.attention_norm.weight, torch.ones(256))
    assert not block.attention_norm.bias.any()
