"""BERT's parameters in Hugging Face's names: one table, read in both directions."""

from __future__ import annotations

from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fastbert.models.checkpoint import Tensors

if TYPE_CHECKING:
    from fastbert.models.bert import BertModel

_PARTS = ("embeddings.", "encoder.", "pooler.")
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_SHOWN = 5  # names in an error message


def name_table(layers: int, pooler: bool) -> dict[str, tuple[str, ...]]:
    """Our parameter → Hugging Face's, of which several are one below the other in ours (query, key, value)."""
    modules: dict[str, tuple[str, ...]] = {"embeddings.norm": ("embeddings.LayerNorm",)}
    for i in range(layers):
        ours, theirs = f"layers.{i}", f"encoder.layer.{i}"
        modules[f"{ours}.attention.qkv"] = tuple(
            f"{theirs}.attention.self.{part}" for part in ("query", "key", "value")
        )
        modules[f"{ours}.attention.out"] = (f"{theirs}.attention.output.dense",)
        modules[f"{ours}.attention_norm"] = (f"{theirs}.attention.output.LayerNorm",)
        modules[f"{ours}.feed_forward.up"] = (f"{theirs}.intermediate.dense",)
        modules[f"{ours}.feed_forward.down"] = (f"{theirs}.output.dense",)
        modules[f"{ours}.feed_forward_norm"] = (f"{theirs}.output.LayerNorm",)
    if pooler:
        modules["pooler.dense"] = ("pooler.dense",)
    table: dict[str, tuple[str, ...]] = {
        "embeddings.word.weight": ("embeddings.word_embeddings.weight",),
        "embeddings.position.weight": ("embeddings.position_embeddings.weight",),
        "embeddings.token_type.weight": ("embeddings.token_type_embeddings.weight",),
    }
    for ours, theirs_of in modules.items():
        for kind in ("weight", "bias"):
            table[f"{ours}.{kind}"] = tuple(f"{theirs}.{kind}" for theirs in theirs_of)
    return table


def match_names(in_files: list[str], folder: Path, layers: int, pooler: bool) -> dict[str, list[str]]:
    """Our parameter → its parts' names in the files. Raises ValueError naming what is missing, left over or twice there.

    Before there is a model: a damaged config may ask for more layers than could ever be built.
    """
    stored = _canonical(in_files, folder)  # Hugging Face's name → the one in the file
    if not stored:
        raise ValueError(
            f"{folder} has none of a BERT's tensors, such as embeddings.word_embeddings.weight; "
            f"it has {_some(sorted(in_files)) or 'no tensor'}"
        )
    if layers > len(stored):
        raise ValueError(f"{folder} has {len(stored)} tensors; its config asks for {layers} layers (num_hidden_layers)")
    table = name_table(layers, pooler)
    wanted = {name for names in table.values() for name in names}
    missing = sorted(wanted - stored.keys())
    if missing:
        hint = ""
        if all(name.startswith("pooler.") for name in missing):
            hint = ". The checkpoint has no pooler: load it with add_pooling_layer=False"
        raise ValueError(
            f"{folder} lacks {len(missing)} of the {len(wanted)} tensors its config asks for: {_some(missing)}{hint}"
        )
    extra = sorted(name for name in stored.keys() - wanted if pooler or not name.startswith("pooler."))
    if extra:
        raise ValueError(f"{folder} has {len(extra)} tensors that its config has no place for: {_some(extra)}")
    return {ours: [stored[name] for name in names] for ours, names in table.items()}


@torch.no_grad()
def fill_from_checkpoint(
    model: BertModel,  # on the meta device
    tensors: Tensors,
    names_in_files: dict[str, list[str]],  # from match_names
    folder: Path,
    dtype: torch.dtype | None,
    device: torch.device | str | None,
) -> None:
    """Gives every parameter its memory and the checkpoint's values.

    Raises ValueError naming what is of another shape than the configuration says, or no float.
    """
    parameters = dict(model.named_parameters())
    assert names_in_files.keys() == parameters.keys()
    stored: dict[str, list[Tensor]] = {}
    for ours, names in names_in_files.items():
        parts = stored[ours] = [tensors.read(name) for name in names]
        shape = list(parameters[ours].shape)
        shape[0] //= len(parts)
        for name, part in zip(names, parts, strict=True):
            if list(part.shape) != shape:
                raise ValueError(f"{folder}: {name} has shape {list(part.shape)}; the config expects {shape}")
            if part.dtype not in FLOATS:
                raise ValueError(
                    f"{folder}: {name} is {part.dtype}; expected floating point (quantized checkpoints are not read)"
                )
    # As stored; where a file mixes dtypes the widest, which loses nothing.
    dtype = dtype or reduce(torch.promote_types, {part.dtype for parts in stored.values() for part in parts})
    for ours, parts in stored.items():
        # One copy out of the file, which may be mapped into memory: to the dtype, the device and the merged place at
        # once.
        whole = torch.empty(parameters[ours].shape, dtype=dtype, device=device)
        for place, part in zip(whole.chunk(len(parts)), parts, strict=True):
            place.copy_(part)
        module_name, _, kind = ours.rpartition(".")
        model.get_submodule(module_name).register_parameter(kind, nn.Parameter(whole))


def to_checkpoint(model: BertModel) -> dict[str, Tensor]:
    """The model's parameters under Hugging Face's names."""
    parameters = dict(model.named_parameters())
    tensors: dict[str, Tensor] = {}
    for ours, names in name_table(len(model.layers), model.pooler is not None).items():
        tensors.update(zip(names, parameters[ours].detach().chunk(len(names)), strict=True))
    return tensors


def _canonical(names: list[str], folder: Path) -> dict[str, str]:
    """The encoder's tensors as BertModel calls them → their names in the file, without heads and position buffer."""
    prefix = "bert." if any(name.startswith("bert.") for name in names) else ""
    canonical: dict[str, str] = {}
    for name in names:
        short = name.removeprefix(prefix)
        if not name.startswith(prefix) or not short.startswith(_PARTS) or short == "embeddings.position_ids":
            continue
        if short.endswith(".gamma"):  # TensorFlow's names, in the oldest checkpoints
            short = short.removesuffix("gamma") + "weight"
        elif short.endswith(".beta"):
            short = short.removesuffix("beta") + "bias"
        if short in canonical:
            raise ValueError(f"{folder} has both {canonical[short]} and {name}; expected one of them")
        canonical[short] = name
    return canonical


def _some(names: list[str]) -> str:
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
