"""Optimized models under DistributedDataParallel and FSDP, in two processes."""

import copy
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

pytest.importorskip("transformers")

import fastbert

PROCESSES = 2


def _gradients(model, given):
    model.zero_grad()
    model(**given).loss.backward()
    return [p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad for p in model.parameters()]


def _check(rank: int, port: int) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
    from torch.distributed.tensor import DTensor
    from torch.nn.parallel import DistributedDataParallel
    from transformers import BertForTokenClassification

    from tests.optimize_samples import inputs, make

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=PROCESSES)
    stock = make(BertForTokenClassification).double().train()
    given = inputs(stock, ["right", "left"][rank])
    local = _gradients(stock, given)
    expected = []
    for gradient in local:
        mean = gradient.clone()
        dist.all_reduce(mean)
        expected.append(mean / PROCESSES)

    def assert_equal(actual):
        torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-11)

    ddp = DistributedDataParallel(fastbert.optimize(copy.deepcopy(stock)))
    assert_equal(_gradients(ddp, given))
    assert set(fastbert.report(ddp).replaced[0].calls) == {"packed"}
    wrapped_first = fastbert.optimize(DistributedDataParallel(copy.deepcopy(stock)))
    assert_equal(_gradients(wrapped_first, given))

    whole = fully_shard(fastbert.optimize(copy.deepcopy(stock)))
    assert isinstance(next(whole.parameters()), DTensor)
    assert_equal(_gradients(whole, given))
    assert set(fastbert.report(whole).replaced[0].calls) == {"packed"}

    by_layer = fastbert.optimize(copy.deepcopy(stock))
    for layer in by_layer.bert.encoder.layer:
        fully_shard(layer)
    fully_shard(by_layer.bert)
    fully_shard(by_layer)
    assert_equal(_gradients(by_layer, given))

    for use_orig_params in (True, False):
        flat = FullyShardedDataParallel(
            fastbert.optimize(copy.deepcopy(stock)), use_orig_params=use_orig_params, device_id=torch.device("cpu")
        )
        loss = flat(**given).loss
        loss.backward()
        torch.testing.assert_close(loss.detach(), stock(**given).loss.detach())
    with pytest.raises(ValueError, match=r"sharded already; call fastbert\.optimize\(model\) first"):
        fastbert.optimize(FullyShardedDataParallel(copy.deepcopy(stock), device_id=torch.device("cpu")))

    sharded = copy.deepcopy(stock)
    fully_shard(sharded.bert)
    with pytest.raises(ValueError, match=r"sharded already; call fastbert\.optimize\(model\) first"):
        fastbert.optimize(sharded)
    with pytest.raises(ValueError, match="got another class after fastbert"):
        fastbert.restore(whole)
    dist.destroy_process_group()


def test_ddp_and_fsdp():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(_check, args=(port,), nprocs=PROCESSES)
