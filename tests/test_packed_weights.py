"""The cache of packed weights: never a stale or torn result, and nothing of it in what a module saves or copies."""

import copy
import gc
import io
import os
import threading
import time
import weakref

import pytest
import torch
from torch import nn

import fastbert
from fastbert import functional as F

pytest.importorskip("fastbert._C", reason="the extension is not built")
from fastbert.cpu import packed_weights
from fastbert.nn import TransformerBlock

X = torch.randn(6, 16, generator=torch.Generator().manual_seed(3))


@pytest.fixture(autouse=True)
def _empty_cache():
    fastbert.drop_packed_weights()
    yield
    fastbert.drop_packed_weights()


def _layer():
    return nn.Linear(16, 40)


@torch.no_grad()
def _ours(layer, precision="fp32"):
    return F.linear_act(X, layer.weight, layer.bias, precision=precision)


@torch.no_grad()
def _fresh(layer, precision="fp32"):
    """The same of a copy, which the cache has never seen."""
    return _ours(copy.deepcopy(layer), precision)


def _in_place(layer):
    with torch.no_grad():
        layer.weight[2, 3] += 1.0


def _optimizer(layer):
    layer(X).sum().backward()
    torch.optim.SGD(layer.parameters(), lr=0.1).step()


def _fused_step_of_one_element(layer):
    """Fused steps count no version, and this one touches no sample."""
    layer.weight.grad = torch.zeros(40, 16)
    layer.weight.grad[2, 3] = 1.0
    torch.optim.SGD(layer.parameters(), lr=1.0, fused=True).step()


def _load_state_dict(layer):
    layer.load_state_dict(_layer().state_dict())


def _load_and_assign(layer):
    layer.load_state_dict(_layer().state_dict(), assign=True)


def _other_storage(layer):
    layer.weight.data = torch.randn(40, 16)


def _data_in_place(layer):
    layer.weight.data.mul_(1.5)


def _numpy(layer):
    layer.weight.detach().numpy()[:] = 0.25


def _there_and_back(layer):
    layer.to(torch.bfloat16)
    layer.to(torch.float32)


def _other_strides(layer):
    layer.weight.data = layer.weight.data.view(16, 40).T


def _inference_mode(layer):
    with torch.inference_mode():
        layer.weight.add_(1.0)


CHANGES = [
    _in_place,
    _optimizer,
    _fused_step_of_one_element,
    _load_state_dict,
    _load_and_assign,
    _other_storage,
    _data_in_place,
    _numpy,
    _there_and_back,
    _other_strides,
    _inference_mode,
]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__.strip("_"))
def test_a_changed_weight_is_packed_again(change, precision):
    layer = _layer()
    before = _ours(layer, precision)
    assert torch.equal(before, _ours(layer, precision))
    change(layer)
    after = _ours(layer, precision)
    assert not torch.equal(before, after)
    assert torch.equal(after, _fresh(layer, precision))


# Those that are not written for a layer of 16 by 40.
OF_ANY_SHAPE = [_in_place, _data_in_place, _numpy, _there_and_back, _inference_mode]


@pytest.mark.parametrize("precision", ["fp32", "int8"])
@pytest.mark.parametrize("change", OF_ANY_SHAPE, ids=lambda f: f.__name__.strip("_"))
@pytest.mark.parametrize("part", ["attention.qkv", "attention.out", "feed_forward.up", "feed_forward.down"])
def test_a_block_sees_it_too(change, part, precision):
    block = TransformerBlock(16, 2, 32, precision=precision)
    cu_seqlens = torch.tensor([0, 2, 6], dtype=torch.int32)

    @torch.no_grad()
    def run(block):
        return block(X, cu_seqlens, 4)

    before = run(block)
    change(block.get_submodule(part))
    after = run(block)
    assert not torch.equal(before, after)
    assert torch.equal(after, run(copy.deepcopy(block)))


def test_biases_and_norms_are_read_where_they_are():
    block, cu_seqlens = TransformerBlock(16, 2, 32), torch.tensor([0, 6], dtype=torch.int32)
    with torch.no_grad():
        for name, parameter in list(block.named_parameters()):
            before = block(X, cu_seqlens, 6)
            parameter.add_(torch.randn_like(parameter))
            assert not torch.equal(before, block(X, cu_seqlens, 6)), name
            parameter.data = torch.randn_like(parameter)
            assert torch.equal(block(X, cu_seqlens, 6), copy.deepcopy(block)(X, cu_seqlens, 6)), name


def test_nothing_is_packed_with_gradients_or_of_passing_tensors():
    layer = _layer()
    F.linear_act(X, layer.weight, layer.bias).sum().backward()
    F.linear_residual(X, layer.weight, layer.bias, torch.zeros(6, 40)).sum().backward()
    with torch.no_grad():
        F.linear_act(X, layer.weight * 2.0, layer.bias)
    assert fastbert.packed_weights_info().count == 0


def test_a_weight_is_packed_once_and_forgotten_with_its_parameter():
    layer, tied = _layer(), _layer()
    tied.weight = layer.weight
    for each in (layer, tied, layer):
        _ours(each)
    info = fastbert.packed_weights_info()
    assert (info.count, info.by_precision) == (1, {"fp32": info.nbytes})
    assert 40 * 16 * 4 <= info.nbytes <= 48 * 16 * 4
    _ours(layer, "int8")
    assert fastbert.packed_weights_info().count == 2
    del layer, each
    gc.collect()
    assert fastbert.packed_weights_info().count == 2
    del tied
    gc.collect()
    assert fastbert.packed_weights_info().count == 0


def test_a_block_is_forgotten_with_its_parameters():
    gc.disable()  # and so without a cycle that only the collector would find
    try:
        block = TransformerBlock(16, 2, 32)
        with torch.no_grad():
            block(X, torch.tensor([0, 6], dtype=torch.int32), 6)
        packed = weakref.ref(packed_weights.packed_weight("fp32", block.attention.qkv.weight))
        assert fastbert.packed_weights_info().count == 4 and packed() is not None
        fastbert.drop_packed_weights()
        assert packed() is None
    finally:
        gc.enable()


def test_copies_pickles_and_state_dicts_know_nothing_of_it():
    layer = _layer()
    untouched = io.BytesIO()
    torch.save(layer, untouched)
    result = _ours(layer)
    saved = io.BytesIO()
    torch.save(layer, saved)
    assert len(saved.getvalue()) == len(untouched.getvalue())
    assert list(layer.state_dict()) == ["weight", "bias"] and not vars(layer.weight)
    saved.seek(0)
    for other in (copy.deepcopy(layer), copy.copy(layer), torch.load(saved, weights_only=False)):
        assert torch.equal(_ours(other), result)


def test_weights_made_under_inference_mode_are_never_stale():
    with torch.inference_mode():
        layer = _layer()
        for precision in ("fp32", "int8"):
            before = _ours(layer, precision)
            layer.weight.add_(1.0)
            assert not torch.equal(_ours(layer, precision), before)
    assert fastbert.packed_weights_info().count == 0


def test_a_compiled_graph_reads_the_weight_of_now():
    layer = _layer()
    function = torch.compile(
        lambda x: F.linear_act(x, layer.weight, layer.bias, "gelu"), fullgraph=True, backend="aot_eager"
    )
    with torch.no_grad():
        for _ in range(2):
            assert torch.equal(function(X), F.linear_act(X, layer.weight, layer.bias, "gelu"))
            layer.weight.mul_(-1.0)


def test_threads_that_multiply_while_weights_change():
    """Every result belongs to one of the weights; those after the last change to the last."""
    layer = nn.Linear(16, 40, bias=False)
    versions = [torch.full((40, 16), float(i)) for i in range(6)]
    allowed = {float(i) * X[0].sum().item() for i in range(6)}
    errors, stop = [], threading.Event()
    lock = threading.Lock()  # the weights' owner must not write while others read: that is a race in any module

    def multiply():
        while not stop.is_set():
            with lock:
                y = _ours(layer)
            value = y[0, 0].item()
            if not (y[0] == value).all() or min(abs(value - each) for each in allowed) > 1e-4:
                errors.append(y)

    layer.weight.data = versions[0].clone()
    threads = [threading.Thread(target=multiply) for _ in range(3)]
    for thread in threads:
        thread.start()
    for version in versions * 5:
        with lock, torch.no_grad():
            layer.weight.copy_(version)
        time.sleep(0.002)
    stop.set()
    for thread in threads:
        thread.join()
    assert not errors
    assert torch.equal(_ours(layer), _fresh(layer))


def test_many_threads_pack_a_weight_once():
    layer = nn.Linear(256, 256)
    x, results = torch.randn(9, 256), []
    barrier = threading.Barrier(4)

    def multiply():
        barrier.wait()
        with torch.no_grad():
            results.append(F.linear_act(x, layer.weight, layer.bias, "gelu"))

    threads = [threading.Thread(target=multiply) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4 and all(torch.equal(each, results[0]) for each in results)
    assert fastbert.packed_weights_info().count == 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_multiplies_on_one_thread():
    block, cu_seqlens = TransformerBlock(64, 4), torch.tensor([0, 300], dtype=torch.int32)
    x = torch.randn(300, 64)
    with torch.no_grad():
        expected = block(x, cu_seqlens, 300)
        child = os.fork()
        if child == 0:
            packed_weights.drop_packed_weights()
            os._exit(0 if torch.equal(block(x, cu_seqlens, 300), expected) else 1)
        deadline = time.monotonic() + 30.0
        status = 0
        while time.monotonic() < deadline:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                break
            time.sleep(0.01)
        else:
            os.kill(child, 9)
            os.waitpid(child, 0)
            pytest.fail("the child hangs")
    assert os.waitstatus_to_exitcode(status) == 0
