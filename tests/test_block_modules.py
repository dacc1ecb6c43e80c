"""A block whose modules somebody has changed: adapters, pruning, older weight norm, hooks. All have their say."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from fastbert.models.bert import Pooler
from fastbert.nn import TransformerBlock

CU_SEQLENS = torch.tensor([0, 2, 6], dtype=torch.int32)
LINEARS = ["attention.qkv", "attention.out", "feed_forward.up", "feed_forward.down"]
PARTS = ["attention", *LINEARS, "attention_norm", "feed_forward", "feed_forward_norm"]


@pytest.fixture
def x():
    return torch.randn(6, 16, generator=torch.Generator().manual_seed(3))


@pytest.fixture(params=[False, True], ids=["post-norm", "pre-norm"])
def block(request):
    return TransformerBlock(16, 2, 32, norm_first=request.param, dropout_p=0.2).eval()


class LowRank(nn.Module):
    """A layer and an update of its weight, as LoRA has it; ``weight`` is the layer's."""

    def __init__(self, layer):
        super().__init__()
        self.layer, self.update = layer, nn.Parameter(torch.randn_like(layer.weight))

    @property
    def weight(self):
        return self.layer.weight

    @property
    def bias(self):
        return self.layer.bias

    def forward(self, x):
        return self.layer(x) + nn.functional.linear(x, self.update)


@pytest.mark.parametrize("gradients", [False, True], ids=["inference", "gradients"])
@pytest.mark.parametrize("name", LINEARS)
def test_an_adapter_is_its_update_of_the_weight(block, x, name, gradients):
    parent, _, attribute = name.rpartition(".")
    adapter = LowRank(block.get_submodule(name))
    merged = copy.deepcopy(block)
    merged.get_submodule(name).weight.data += adapter.update.data
    setattr(block.get_submodule(parent), attribute, adapter)
    with torch.set_grad_enabled(gradients):
        y = block(x, CU_SEQLENS, 4)
        torch.testing.assert_close(y, merged(x, CU_SEQLENS, 4), rtol=1e-5, atol=1e-5)
    if gradients:
        y.square().sum().backward()
        assert adapter.update.grad.abs().max() > 0.0


@pytest.mark.parametrize(
    "change",
    [lambda layer: nn.utils.weight_norm(layer), lambda layer: prune.random_unstructured(layer, "weight", 0.5)],
    ids=["weight-norm", "pruning"],
)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("name", LINEARS)
def test_a_weight_that_a_hook_computes_is_computed(block, x, name, change):
    layer = block.get_submodule(name)
    change(layer)
    computed_from = next(p for n, p in layer.named_parameters() if n in ("weight_v", "weight_orig"))
    with torch.no_grad():
        before = block(x, CU_SEQLENS, 4)
        computed_from.copy_(torch.randn_like(computed_from))
        assert not torch.allclose(before, block(x, CU_SEQLENS, 4))


@pytest.mark.parametrize("name", PARTS)
def test_hooks_see_and_change_what_passes(block, x, name):
    seen = []
    with torch.no_grad():
        before = block(x, CU_SEQLENS, 4)
        handle = block.get_submodule(name).register_forward_hook(lambda module, arguments, y: seen.append(y.clone()))
        torch.testing.assert_close(block(x, CU_SEQLENS, 4), before, rtol=1e-5, atol=1e-5)
        assert len(seen) == 1
        handle.remove()
        handle = block.get_submodule(name).register_forward_hook(lambda module, arguments, y: torch.zeros_like(y))
        assert not torch.allclose(before, block(x, CU_SEQLENS, 4))
        handle.remove()
        assert torch.equal(block(x, CU_SEQLENS, 4), before)


def test_parametrized_weights_stay_in_the_block(block, x):
    with torch.no_grad():
        expected = block(x, CU_SEQLENS, 4)
        nn.utils.parametrizations.weight_norm(block.attention.qkv)
        block.precision = "bf16"
        torch.testing.assert_close(block(x, CU_SEQLENS, 4), expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("name", PARTS)
def test_reduced_precision_says_what_stands_in_its_way(block, x, name):
    block.precision = "int8"
    block.get_submodule(name).register_forward_hook(lambda *_: None)
    with (
        torch.no_grad(),
        pytest.raises(ValueError, match=rf"precision is 'int8'.*but {name} has another forward or hooks"),
    ):
        block(x, CU_SEQLENS, 4)


def test_dropout_of_the_modules_path(block, x):
    block.attention.register_forward_hook(lambda *_: None)
    assert torch.equal(block(x, CU_SEQLENS, 4), block(x, CU_SEQLENS, 4))
    block.train()
    assert not torch.equal(block(x, CU_SEQLENS, 4), block(x, CU_SEQLENS, 4))


def test_an_adapter_in_the_pooler(x):
    pooler = Pooler(16)
    plain = pooler(x, CU_SEQLENS)
    pooler.dense = LowRank(pooler.dense)
    assert not torch.allclose(plain, pooler(x, CU_SEQLENS))
