"""Attention to a memory, rotary and sinusoidal positions: what a block on packed tokens may have beside self-attention."""

import copy
import math

import pytest
import torch
from torch import nn

import fastbert.nn as fnn
from fastbert.packing import PackedBatch

HIDDEN, HEADS, MEMORY = 24, 3, 10
LENGTHS, MEMORY_LENGTHS = [4, 0, 7, 1], [3, 5, 0, 9]
NORMS = {"post-norm": False, "pre-norm": True}


@pytest.fixture(autouse=True)
def one_thread(threads):
    torch.set_num_threads(1)  # tensors this small are done before a second one wakes


def rows(lengths, width, seed=0, dtype=torch.float64):
    values = torch.randn(sum(lengths), width, dtype=dtype, generator=torch.Generator().manual_seed(seed))
    return PackedBatch.from_lengths(values, lengths)


def described(batch):
    return batch.values, batch.cu_seqlens, batch.max_seqlen


def given(memory, values=None):
    """A block's arguments of that name."""
    values = memory.values if values is None else values
    return {"memory": values, "memory_cu_seqlens": memory.cu_seqlens, "memory_max_seqlen": memory.max_seqlen}


def fill(module):
    torch.manual_seed(1)
    for parameter in module.parameters():
        nn.init.normal_(parameter, 0.0, 0.3)
    return module


def attention_formula(q, k, v, causal=False):
    """[length, hidden] each, of one sequence, head by head."""
    heads = [x.unflatten(-1, (HEADS, -1)).transpose(0, 1) for x in (q, k, v)]
    if k.shape[0] == 0:
        return torch.zeros_like(q)
    return nn.functional.scaled_dot_product_attention(*heads, is_causal=causal).transpose(0, 1).flatten(1)


def cross_formula(part, x, memory):
    k, v = part.kv(memory).chunk(2, -1)
    return part.out(attention_formula(part.q(x), k, v))


def decoder_block(norm_first=False, **changes):
    arguments = {"cross_attention": True, "memory_size": MEMORY, "causal": True, "norm_first": norm_first, **changes}
    return fill(fnn.TransformerBlock(HIDDEN, HEADS, 40, dtype=torch.float64, eps=1e-5, **arguments))


def block_formula(block, x, memory):
    """One sequence, [length, hidden]."""
    attention = block.attention
    parts = [
        (
            block.attention_norm,
            lambda y: attention.out(attention_formula(*attention.qkv(y).chunk(3, -1), causal=True)),
        ),
        (block.cross_attention_norm, lambda y: cross_formula(block.cross_attention, y, memory)),
        (block.feed_forward_norm, block.feed_forward),
    ]
    for norm, part in parts:
        x = x + part(norm(x)) if block.options.norm_first else norm(x + part(x))
    return x


def test_cross_attention_is_its_formula():
    part = fill(fnn.CrossAttention(HIDDEN, HEADS, MEMORY, dtype=torch.float64))
    x, memory = rows(LENGTHS, HIDDEN), rows(MEMORY_LENGTHS, MEMORY, 1)
    expected = torch.cat([cross_formula(part, *each) for each in zip(x.split(), memory.split(), strict=True)])
    torch.testing.assert_close(part(*described(x), *described(memory)), expected)


@pytest.mark.parametrize("gradients", [True, False], ids=["gradients", "inference"])
@pytest.mark.parametrize("norm_first", NORMS.values(), ids=NORMS)
def test_decoder_block_is_its_formula(norm_first, gradients):
    block = decoder_block(norm_first)
    x, memory = rows(LENGTHS, HIDDEN), rows(MEMORY_LENGTHS, MEMORY, 1)
    results = []
    for formula in (False, True):
        leaves = [batch.values.clone().requires_grad_() for batch in (x, memory)]
        block.zero_grad()
        with torch.set_grad_enabled(gradients):
            if formula:
                parts = zip(leaves[0].split(LENGTHS), leaves[1].split(MEMORY_LENGTHS), strict=True)
                y = torch.cat([block_formula(block, *each) for each in parts])
            else:
                y = block(leaves[0], *described(x)[1:], **given(memory, leaves[1]))
        if gradients:
            (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).reshape(y.shape)).sum().backward()
        results.append([y, *(each.grad for each in (*leaves, *block.parameters()))])
    for actual, expected in zip(*results, strict=True):
        assert (actual is None) == (expected is None)
        if actual is not None:
            torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("norm_first", NORMS.values(), ids=NORMS)
@pytest.mark.parametrize("name", ["cross_attention", "cross_attention.q", "cross_attention.kv", "cross_attention_norm"])
def test_changed_parts_have_their_say(name, norm_first):
    block = decoder_block(norm_first)
    x, memory = described(rows(LENGTHS, HIDDEN)), given(rows(MEMORY_LENGTHS, MEMORY, 1))
    before, seen = block(*x, **memory), []
    block.get_submodule(name).register_forward_hook(lambda module, given, y: seen.append(y.shape))
    torch.testing.assert_close(block(*x, **memory), before)
    assert len(seen) == 1


def test_memory_belongs_to_blocks_with_cross_attention():
    x, memory = rows(LENGTHS, HIDDEN), rows(MEMORY_LENGTHS, MEMORY, 1)
    with pytest.raises(
        ValueError, match="memory is None and memory_cu_seqlens None, in a block with cross_attention=True"
    ):
        decoder_block()(*described(x))
    with pytest.raises(ValueError, match=r"memory is given .*cross_attention=False"):
        decoder_block(cross_attention=False, memory_size=None)(*described(x), **given(memory))
    with pytest.raises(ValueError, match="memory_size is 10, but cross_attention is False"):
        decoder_block(cross_attention=False)
    with pytest.raises(ValueError, match="24"):
        decoder_block()(*described(x), **given(x))
    with pytest.raises(ValueError, match="cu_seqlens_q has 5 entries and cu_seqlens_k 4"):
        decoder_block()(*described(x), **given(rows([3, 5, 9], MEMORY)))
    with pytest.raises(ValueError, match="hidden_size is 24 and num_heads 5"):
        fnn.CrossAttention(24, 5)


def turned(x, positions, width, base=10000.0):
    """Halves turned by position · base^(−2i / width), [length, heads, head_dim], written with complex numbers."""
    angles = torch.outer(positions.double(), base ** (-torch.arange(0, width, 2, dtype=torch.float64) / width))
    first, second = x[..., : width // 2], x[..., width // 2 : width]
    z = torch.complex(first, second) * torch.polar(torch.ones_like(angles), angles).unsqueeze(1)
    return torch.cat([z.real, z.imag, x[..., width:]], -1)


@pytest.mark.parametrize("gradients", [True, False], ids=["gradients", "inference"])
@pytest.mark.parametrize("width", [8, 4])
@pytest.mark.parametrize("given", [False, True], ids=["counted", "given"])
def test_rotary_positions_turn_query_and_key(given, width, gradients):
    rotary = fnn.RotaryPositions(20, width)
    block = fill(fnn.TransformerBlock(HIDDEN, HEADS, 40, rotary=rotary, dtype=torch.float64, norm_first=True).double())
    batch = rows(LENGTHS, HIDDEN)
    positions = torch.arange(12).flip(0) if given else batch.position_ids
    with torch.set_grad_enabled(gradients):
        y = block(*described(batch), position_ids=positions if given else None)
    expected = []
    for x, p in zip(batch.split(), positions.split(LENGTHS), strict=True):
        q, k, v = (
            part.unflatten(-1, (HEADS, -1)) for part in block.attention.qkv(block.attention_norm(x)).chunk(3, -1)
        )
        q, k = turned(q, p, width), turned(k, p, width)
        x = x + block.attention.out(attention_formula(q.flatten(1), k.flatten(1), v.flatten(1)))
        expected.append(x + block.feed_forward(block.feed_forward_norm(x)))
    torch.testing.assert_close(y, torch.cat(expected))
    hooked = block.feed_forward.register_forward_hook(lambda *_: None)
    torch.testing.assert_close(block(*described(batch), position_ids=positions), y)
    hooked.remove()


def test_rotary_attention_sees_distances_alone():
    rotary = fnn.RotaryPositions(1000, 8)
    attention = fill(fnn.SelfAttention(HIDDEN, HEADS, rotary=rotary))
    batch = rows([9], HIDDEN, dtype=torch.float32)
    near = attention(*described(batch), position_ids=batch.position_ids)
    far = attention(*described(batch), position_ids=batch.position_ids + 900)
    torch.testing.assert_close(near, far, rtol=1e-3, atol=1e-3)
    with pytest.raises(IndexError, match="1000"):
        attention(*described(batch), position_ids=batch.position_ids + 992)
    with pytest.raises(ValueError, match="rotary turns 10 features and head_dim is 8"):
        fnn.SelfAttention(HIDDEN, HEADS, rotary=fnn.RotaryPositions(9, 10))
    with pytest.raises(ValueError, match="9 positions of width 7"):
        fnn.RotaryPositions(9, 7)


@pytest.mark.parametrize("kind", [fnn.RotaryPositions, fnn.SinusoidalPositions], ids=lambda kind: kind.__name__)
def test_tables_come_through_moves_and_are_no_state(kind):
    tables = kind(30, 8)
    assert not tables.state_dict() and not list(tables.parameters())
    expected = {name: buffer.clone() for name, buffer in tables.named_buffers()}
    with torch.device("meta"):
        empty = kind(30, 8)
    for name, buffer in empty.to_empty(device="cpu").named_buffers():
        assert torch.equal(buffer, expected[name])
    half = copy.deepcopy(tables).half()
    for name, buffer in half.named_buffers():
        wanted = expected[name].half() if kind is fnn.SinusoidalPositions else expected[name]
        assert torch.equal(buffer, wanted)
    for name, buffer in half.double().named_buffers():
        torch.testing.assert_close(buffer, expected[name].double(), rtol=0, atol=1e-7)


def test_sinusoidal_embeddings_are_vaswanis():
    module = fnn.Embeddings(11, HIDDEN, 40, 0, positions="sinusoidal", eps=1e-5)
    assert set(module.state_dict()) == {"word.weight", "norm.weight", "norm.bias"}
    ids, positions = torch.tensor([3, 3, 10]), torch.tensor([0, 39, 7])
    table = torch.tensor(
        [
            [(math.cos if i % 2 else math.sin)(p / 10000 ** ((i - i % 2) / HIDDEN)) for i in range(HIDDEN)]
            for p in positions.tolist()
        ]
    )
    expected = nn.functional.layer_norm(module.word.weight[ids] + table, (HIDDEN,))
    torch.testing.assert_close(module(ids, positions), expected)
    with pytest.raises(IndexError, match="40"):
        module(ids, positions + 1)


def test_rotary_embeddings_have_no_table():
    module = fnn.Embeddings(11, HIDDEN, 40, 0, positions="rotary")
    assert set(module.state_dict()) == {"word.weight", "norm.weight", "norm.bias"}
    assert module(torch.tensor([3, 10])).shape == (2, HIDDEN)
    with pytest.raises(ValueError, match="positions is 'absolute'; expected one of 'learned', 'sinusoidal', 'rotary'"):
        fnn.Embeddings(11, HIDDEN, positions="absolute")


@pytest.mark.parametrize("gradients", [True, False], ids=["gradients", "inference"])
def test_compiles_without_a_graph_break(gradients):
    rotary = fnn.RotaryPositions(20, 8)
    block = decoder_block(rotary=rotary).float()
    x, memory = rows(LENGTHS, HIDDEN, dtype=torch.float32), rows(MEMORY_LENGTHS, MEMORY, 1, torch.float32)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    with torch.set_grad_enabled(gradients):
        arguments, memory = described(x), given(memory)
        torch.testing.assert_close(compiled(*arguments, **memory), block(*arguments, **memory), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("precision", ["bf16", "int8"])
@torch.no_grad()
def test_reduced_precision(precision):
    block = decoder_block().float().eval()
    x = described(rows(LENGTHS, HIDDEN, dtype=torch.float32))
    memory = given(rows(MEMORY_LENGTHS, MEMORY, 1, torch.float32))
    expected = block(*x, **memory)
    block.precision = precision
    y = block(*x, **memory)
    assert not torch.equal(y, expected)
    torch.testing.assert_close(y, expected, rtol=0.1, atol=0.2)
