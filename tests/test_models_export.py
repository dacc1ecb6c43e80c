"""torch.export: one graph for every batch, length and mask, in which padding still costs nothing."""

import io

import pytest
import torch

from fastbert import models
from fastbert.models import BertConfig, GPTConfig

BERT = BertConfig(97, 36, 2, 3, 55, max_position_embeddings=40)
GPT = GPTConfig(97, 40, 36, 2, 3)
CASES = {
    "BertModel": BERT,
    "BertForMaskedLM": BERT,
    "BertForSequenceClassification": BERT,
    "BertForQuestionAnswering": BERT,
    "GPTForCausalLM": GPT,
}


def batch(rows, seq, seed):
    generator = torch.Generator().manual_seed(seed)
    mask = (torch.rand(rows, seq, generator=generator) < 0.7).long()
    return torch.randint(97, (rows, seq), generator=generator), mask


@pytest.mark.parametrize("masked", [True, False], ids=["mask", "all-real"])
@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_exported_graphs_serve_other_batches(name, masked):
    torch.manual_seed(0)
    model = getattr(models, name)(CASES[name]).eval()
    axes = {0: torch.export.Dim("batch", min=2, max=64), 1: torch.export.Dim("seq", min=2, max=40)}
    ids, mask = batch(3, 9, 0)
    example = (ids, mask) if masked else (ids,)
    exported = torch.export.export(model, example, dynamic_shapes=(axes,) * len(example))
    file = io.BytesIO()
    torch.export.save(exported, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for rows, seq in ((5, 12), (2, 40)):
        ids, mask = batch(rows, seq, rows)
        inputs = (ids, mask) if masked else (ids,)
        for actual, expected in zip(loaded(*inputs), model(*inputs), strict=True):
            if expected is None:
                assert actual is None
            else:
                torch.testing.assert_close(actual, expected)
