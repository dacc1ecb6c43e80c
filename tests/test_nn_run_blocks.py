"""All blocks of a model in one call: what the blocks give one after another, and whoever watches or changes one has his say."""

import copy
import gc
import pickle
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules import module as module_globals

import fastbert
from fastbert.nn import PRECISIONS, TransformerBlock, layer, run_blocks
from fastbert.nn.block import BlockOptions

CU_SEQLENS = torch.tensor([0, 5, 5, 22, 41], dtype=torch.int32)
VARIANTS = {
    "post": {},
    "pre": {"norm_first": True, "causal": True, "activation": "gelu_tanh"},
    "no-bias": {"bias": False, "activation": "silu"},
}


def _blocks(count: int = 3, hidden: int = 96, **options) -> tuple[nn.ModuleList, Tensor]:
    """Large enough for several threads."""
    blocks = nn.ModuleList(TransformerBlock(hidden, 3, 4 * hidden, eps=1e-5, **options) for _ in range(count)).eval()
    for parameter in blocks.parameters():
        nn.init.normal_(parameter, 0.0, 0.1)
    return blocks, torch.randn(41, hidden)


@torch.no_grad()
def _together(blocks: nn.ModuleList, x: Tensor) -> Tensor:
    return run_blocks(blocks, x, CU_SEQLENS, 19)


@torch.no_grad()
def _in_turn(blocks: nn.ModuleList, x: Tensor) -> Tensor:
    for block in blocks:
        x = block(x, CU_SEQLENS, 19)
    return x


@pytest.fixture
def calls(monkeypatch) -> list[int]:
    """How many blocks each C++ call ran."""
    extension = pytest.importorskip("fastbert._C", reason="the extension is not built")
    seen: list[int] = []
    run = extension.run_blocks
    monkeypatch.setattr(
        extension, "run_blocks", lambda blocks, *rest: (seen.append(len(blocks)), run(blocks, *rest))[1]
    )
    return seen


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("count", [1, 2, 3], ids="threads-{}".format)
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_bit_for_bit_the_blocks_in_turn(isa, variant, precision, count):
    torch.set_num_threads(count)
    blocks, x = _blocks(precision=precision, **VARIANTS[variant])
    before = x.clone()
    assert torch.equal(_together(blocks, x), _in_turn(blocks, x))
    assert torch.equal(x, before)


def test_one_call_runs_them_all(calls):
    blocks, x = _blocks()
    _together(blocks, x)
    assert calls == [3]


@pytest.fixture
def described(monkeypatch) -> list[int]:
    """How many blocks were looked at, each time that somebody did: twice where they are found changed."""
    pytest.importorskip("fastbert._C", reason="the extension is not built")
    seen: list[int] = []
    describe = layer._describe
    monkeypatch.setattr(layer, "_describe", lambda blocks: (seen.append(len(blocks)), describe(blocks))[1])
    return seen


def test_unchanged_blocks_are_looked_at_once(described):
    blocks, x = _blocks()
    results = [_together(blocks, x) for _ in range(3)]
    assert described == [3, 3] and all(torch.equal(each, results[0]) for each in results)
    assert torch.equal(_together(blocks[:2], x), _in_turn(blocks[:2], x))
    fastbert.drop_packed_weights()
    assert torch.equal(_together(blocks, x), results[0])
    assert described == [3, 3, 2, 2, 3, 3]


def test_so_are_copied_and_unpickled_ones(described):
    blocks, x = _blocks()
    expected = _together(blocks, x)
    for other in (copy.deepcopy(blocks), pickle.loads(pickle.dumps(blocks))):
        described.clear()
        assert all(torch.equal(_together(other, x), expected) for _ in range(3))
        assert described == [3, 3]


def test_blocks_that_go_back_to_a_precision_are_not_looked_at_again(described):
    blocks, x = _blocks()
    results: dict[str, Tensor] = {}
    for precision in ("fp32", "bf16", "int8", "fp32", "bf16", "int8"):
        for block in blocks:
            block.precision = precision
        assert torch.equal(_together(blocks, x), results.setdefault(precision, _in_turn(blocks, x)))
    assert described == [3] * 6 and not torch.equal(results["fp32"], results["bf16"])


def _weight_in_place(block: TransformerBlock) -> None:
    with torch.no_grad():
        block.feed_forward.up.weight[5, 7] += 1.0


def _weight_in_place_while_inferring(block: TransformerBlock) -> None:
    with torch.inference_mode():
        block.feed_forward.up.weight[5, 7] += 1.0


def _storage(block: TransformerBlock) -> None:
    block.attention.out.weight.data = torch.randn(96, 96)


def _strides(block: TransformerBlock) -> None:
    block.attention.out.weight.data = block.attention.out.weight.data.T


def _parameter(block: TransformerBlock) -> None:
    block.attention.out.weight = nn.Parameter(torch.randn(96, 96))


def _parameter_over_the_same_memory(block: TransformerBlock) -> None:
    changed = block.attention.out.weight.data
    changed[5, 7] += 1.0
    block.attention.out.weight = nn.Parameter(changed)


def _assigned_state(block: TransformerBlock) -> None:
    block.load_state_dict({name: torch.randn_like(each) for name, each in block.state_dict().items()}, assign=True)


def _bias_in_place(block: TransformerBlock) -> None:
    block.feed_forward.up.bias.data.add_(1.0)


def _bias(block: TransformerBlock) -> None:
    block.feed_forward.up.bias = nn.Parameter(torch.randn(384))


def _no_bias(block: TransformerBlock) -> None:
    block.feed_forward.up.bias = None


def _norm_weight(block: TransformerBlock) -> None:
    block.attention_norm.weight = nn.Parameter(torch.randn(96))


def _linear(block: TransformerBlock) -> None:
    block.feed_forward.down = nn.Linear(384, 96)


def _precision(block: TransformerBlock) -> None:
    block.precision = "bf16"


def _options(block: TransformerBlock) -> None:
    block.options = replace(block.options, causal=True)


def _class(block: TransformerBlock) -> None:
    class Doubled(type(block.feed_forward)):
        def forward(self, x: Tensor) -> Tensor:
            return 2.0 * super().forward(x)

    block.feed_forward.__class__ = Doubled


def _parametrization(block: TransformerBlock) -> None:
    class Doubled(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2.0 * weight

    nn.utils.parametrize.register_parametrization(block.attention.out, "weight", Doubled())


def _hook(block: TransformerBlock) -> None:
    block.attention_norm.register_forward_hook(lambda module, arguments, result: 2.0 * result)


CHANGES = [
    _weight_in_place,
    _weight_in_place_while_inferring,
    _storage,
    _strides,
    _parameter,
    _parameter_over_the_same_memory,
    _assigned_state,
    _bias_in_place,
    _bias,
    _no_bias,
    _norm_weight,
    _linear,
    _precision,
    _options,
    _class,
    _parametrization,
    _hook,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda each: each.__name__.strip("_"))
def test_whatever_changes_in_the_last_block_is_seen(change):
    blocks, x = _blocks()
    before = _together(blocks, x)
    assert torch.equal(_together(blocks, x), before)
    change(blocks[2])
    for _ in range(2):
        after = _together(blocks, x)
        assert not torch.equal(after, before)
        assert torch.equal(after, _in_turn(copy.deepcopy(blocks), x))


def test_dropout_that_begins_is_seen(calls):
    blocks, x = _blocks(dropout_p=0.5)
    before = _together(blocks, x)
    assert torch.equal(_together(blocks, x), before)
    assert not torch.equal(_together(blocks.train(), x), before)
    assert torch.equal(_together(blocks.eval(), x), before)
    assert calls == [3, 3, 3]


def test_an_instance_with_a_forward_of_its_own_is_called():
    blocks, x = _blocks()
    before = _together(blocks, x)
    blocks[1].forward = lambda x, cu_seqlens, max_seqlen: x
    assert torch.equal(_together(blocks, x), _in_turn(blocks, x))
    del blocks[1].forward
    assert torch.equal(_together(blocks, x), before)


def test_modules_and_parameters_are_not_kept_alive():
    gc.disable()
    try:
        blocks, x = _blocks()
        _together(blocks, x)
        _together(blocks, x)
        alive = [weakref.ref(each) for each in (blocks, *blocks, *blocks.parameters())]
        del blocks
        assert not [each for each in alive if each() is not None]
    finally:
        gc.enable()


def test_what_may_change_unnoticed_is_not_watched():
    extension = pytest.importorskip("fastbert._C", reason="the extension is not built")
    for attribute in ("a_list", "an_object"):
        block = TransformerBlock(16, 2)
        setattr(block, attribute, [1] if attribute == "a_list" else object())
        with pytest.raises(ValueError, match="without notice"):
            extension.ModuleState([block], (BlockOptions,))
    parent = nn.Module()
    parent.child = nn.Module()
    parent.child.parent = parent  # without end
    with pytest.raises(ValueError, match="without notice"):
        extension.ModuleState([parent], ())


def test_no_blocks_and_no_tokens():
    blocks, x = _blocks()
    assert run_blocks([], x, CU_SEQLENS, 19) is x
    nothing = torch.zeros(3, dtype=torch.int32)
    with torch.no_grad():
        assert run_blocks(blocks, x[:0], nothing, 0).shape == (0, 96)


def test_a_hook_of_one_block_is_called(calls):
    blocks, x = _blocks()
    expected = _together(blocks, x)
    seen = []
    blocks[1].register_forward_hook(lambda module, arguments, result: seen.append(module))
    assert torch.equal(_together(blocks, x), expected)
    assert seen == [blocks[1]] and calls == [3, 1, 1, 1]


def test_a_hook_of_all_modules_is_called():
    blocks, x = _blocks()
    expected = _together(blocks, x)
    seen = []
    handle = module_globals.register_module_forward_hook(lambda module, arguments, result: seen.append(module))
    try:
        assert torch.equal(_together(blocks, x), expected)
    finally:
        handle.remove()
    assert seen == list(blocks)


def test_a_module_of_another_kind_among_them():
    blocks, x = _blocks()
    expected = 2.0 * _in_turn(blocks, x)

    class Doubling(nn.Module):
        def forward(self, x: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
            return 2.0 * x

    assert torch.equal(_together(nn.ModuleList([*blocks, Doubling()]), x), expected)


def test_a_weight_of_the_last_block_changed_behind_its_version():
    blocks, x = _blocks()
    _together(blocks, x)
    blocks[2].feed_forward.down.weight.data.mul_(2.0)
    actual = _together(blocks, x)
    fastbert.drop_packed_weights()
    assert torch.equal(actual, _in_turn(blocks, x))


def test_a_block_of_another_width_raises_what_it_raises_alone():
    blocks, x = _blocks()
    other, _ = _blocks(1, 48)
    with pytest.raises((ValueError, RuntimeError)) as alone:
        _in_turn(other, x)
    with pytest.raises(alone.type) as among:
        _together(nn.ModuleList([*blocks, *other]), x)
    assert str(among.value) == str(alone.value)


def test_dropout_and_gradients_go_block_by_block(calls):
    blocks, x = _blocks(dropout_p=0.5)
    with torch.no_grad():
        run_blocks(blocks.train(), x, CU_SEQLENS, 19)
    run_blocks(blocks.eval(), x, CU_SEQLENS, 19).sum().backward()
    assert all(parameter.grad is not None for parameter in blocks.parameters())
    assert calls == []


def test_several_threads_call_at_once():
    blocks, x = _blocks()
    inputs = [x * (1.0 + i) for i in range(4)]
    expected = [_in_turn(blocks, each) for each in inputs]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(20):
            for actual, wanted in zip(pool.map(lambda each: _together(blocks, each), inputs), expected, strict=True):
                assert torch.equal(actual, wanted)


def test_weights_that_are_dropped_meanwhile_live_on(monkeypatch):
    extension = pytest.importorskip("fastbert._C", reason="the extension is not built")
    from fastbert.cpu.packed_weights import all_packed

    blocks, x = _blocks()
    expected = _in_turn(blocks, x)
    run, alive = extension.run_blocks, []

    def dropping(*arguments):
        packed = [weakref.ref(each) for each in all_packed()]
        fastbert.drop_packed_weights()
        alive.extend(each() is not None for each in packed)
        return run(*arguments)

    monkeypatch.setattr(extension, "run_blocks", dropping)
    assert torch.equal(_together(blocks, x), expected)
    assert alive == [True] * 12


def test_a_model_runs_its_layers_in_one_call(calls):
    config = fastbert.BertConfig(
        vocab_size=50, hidden_size=48, num_hidden_layers=4, num_attention_heads=3, intermediate_size=96
    )
    model = fastbert.BertModel(config, add_pooling_layer=False).eval()
    ids = torch.arange(14).view(2, 7)
    with torch.no_grad():
        whole = model(ids).last_hidden_state
        states = model(ids, output_hidden_states=True)
    assert calls == [4, 1, 1, 1, 1]
    assert torch.equal(whole, states.last_hidden_state) and len(states.hidden_states) == 5
