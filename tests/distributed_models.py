"""What each of two processes runs for test_models_distributed.py: a training step, sharded or replicated."""

import sys

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from fastbert.models import BertConfig, BertForMaskedLM, GPTConfig, GPTForCausalLM

ROWS, SEQ, VOCABULARY = 4, 7, 50


def build(kind: str) -> torch.nn.Module:
    torch.manual_seed(0)
    if kind == "bert":
        config = BertConfig(VOCABULARY, 24, 2, 3, 40, max_position_embeddings=16, pad_token_id=None)
        return BertForMaskedLM(config.changed(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0))
    return GPTForCausalLM(GPTConfig(VOCABULARY, 16, 24, 2, 3, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))


def layers(model: torch.nn.Module) -> torch.nn.ModuleList:
    return model.bert.layers if isinstance(model, BertForMaskedLM) else model.transformer.layers


def data() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids, mask and labels; every row has equally many labels, so that the mean of two halves' losses is that of the whole."""
    ids = torch.randint(VOCABULARY, (ROWS, SEQ), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1::2, 5:] = 0
    labels = torch.full_like(ids, -100)
    labels[:, 1:4] = ids[:, 1:4]
    return ids, mask, labels


def step(model: torch.nn.Module, rows: slice) -> float:
    """One step of AdamW on these rows; the loss."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    ids, mask, labels = (tensor[rows] for tensor in data())
    loss = model(ids, mask, labels=labels).loss
    loss.backward()
    optimizer.step()
    return loss.item()


CASES = [(kind, way) for kind in ("bert", "gpt") for way in ("ddp", "fsdp")]


def train(kind: str, way: str, rank: int) -> dict[str, torch.Tensor]:
    """The parameters after a step of two processes, each on its half of the rows."""
    model = build(kind).train()
    if way == "ddp":
        wrapped = DistributedDataParallel(model)
    else:
        for layer in layers(model):
            fully_shard(layer)
        wrapped = fully_shard(model)
    step(wrapped, slice(rank * 2, rank * 2 + 2))
    return {name: p.full_tensor() if way == "fsdp" else p for name, p in model.state_dict().items()}


def main(rank: int, rendezvous: str, result: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    states = {f"{kind}-{way}": train(kind, way, rank) for kind, way in CASES}
    if rank == 0:
        torch.save(states, result)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3])
