"""The model families of transformers that ``fastbert.optimize`` knows: where each keeps what a packed forward needs.

A family is a description and, where it must be, a small function; what runs is ``fastbert.integrations.packed``. Paths are
those of submodules, from the base model or, in a ``LayerLayout``, from a layer.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from fastbert.packing import PackedBatch


@dataclass(frozen=True)
class LayerLayout:
    """Where a layer keeps the parts of a transformer block.

    Attributes:
        qkv: query, key and value: three linear layers, or one of all.
        out, up, down: the other linear layers, in the order of a block.
        attention_norm, feed_forward_norm: its layer norms.
        activation: a module.
        attention_dropout: of the probabilities.
        out_dropout, down_dropout: behind the parts' last products; None: there is none.
        norm_first, causal: as in fastbert.nn.BlockOptions.
        transposed: the linear layers are transformers' Conv1D, whose weight is [in, out].
    """

    qkv: tuple[str, ...]
    out: str
    attention_norm: str
    up: str
    activation: str
    down: str
    feed_forward_norm: str
    attention_dropout: str
    out_dropout: str | None
    down_dropout: str | None
    norm_first: bool = False
    causal: bool = False
    transposed: bool = False


def _layer_list(path: str) -> Callable[[nn.Module], list[nn.Module]]:
    def layers(model: nn.Module) -> list[nn.Module]:
        return list(model.get_submodule(path).children())

    return layers


def _pooler(model: Any, hidden: Tensor) -> Tensor | None:
    return None if model.pooler is None else model.pooler(hidden)


def _nothing(*_: Any) -> None:
    return None


def _embeddings(model: Any, call: Any) -> Tensor:
    given = {name: getattr(call, name) for name in ("input_ids", "token_type_ids", "position_ids", "inputs_embeds")}
    return model.embeddings(**{name: value for name, value in given.items() if value is not None}, **call.further)


@dataclass(frozen=True)
class Family:
    """One of transformers' families.

    Attributes:
        name: as its authors write it.
        module: of transformers.models, for instance "bert".
        prefix: of its classes, "Bert".
        layer: see LayerLayout.
        embeddings: path of the embeddings, whose tables and norm have the names of BERT's; None: they are not read past
            their modules.
        embed: (base model, fastbert.integrations.packed.Call) to the padded input of what follows, by the modules.
        layers: a base model's layers in the order in which they run; shared ones repeat.
        stack: paths of the modules that hold the layers: what runs past its forward must be in none of them.
        counts_tokens: positions count the tokens that are not the padding token, from padding_idx + 1 (RoBERTa), where the others'
            are columns.
        projection: path of a linear layer between embeddings and layers, if the model has it.
        final_norm: path of the layer norm behind the last layer.
        attention_bias: (base model, PackedBatch) to [heads, seq, seq], added to the logits of every layer.
        pool: (base model, padded hidden states) to the pooled output; None: there is no such output.
        output: the class in transformers.modeling_outputs that the base model returns.
        unsupported: (base model) to what its configuration asks for and a packed forward does not do.
        inputs: names of further inputs of the embeddings.
        tuple_keeps_none: whether the tuple of return_dict=False has a None for what is not there.
    """

    name: str
    module: str
    prefix: str
    layer: LayerLayout
    embeddings: str | None = "embeddings"
    embed: Callable[[Any, Any], Tensor] = _embeddings
    layers: Callable[[nn.Module], list[nn.Module]] = _layer_list("encoder.layer")
    stack: tuple[str, ...] = ("encoder",)
    counts_tokens: bool = False
    projection: str | None = None
    final_norm: str | None = None
    attention_bias: Callable[[Any, PackedBatch], Tensor | None] = _nothing
    pool: Callable[[Any, Tensor], Tensor | None] | None = _pooler
    output: str = "BaseModelOutputWithPoolingAndCrossAttentions"
    unsupported: Callable[[Any], str | None] = _nothing
    inputs: tuple[str, ...] = ()
    tuple_keeps_none: bool = False

    @property
    def modeling(self) -> str:
        """The module that defines its classes."""
        return f"transformers.models.{self.module}.modeling_{self.module}"

    @property
    def base(self) -> str:
        """Name of its base model's class."""
        return f"{self.prefix}Model"


_BERT_LAYER = LayerLayout(
    qkv=("attention.self.query", "attention.self.key", "attention.self.value"),
    out="attention.output.dense",
    attention_norm="attention.output.LayerNorm",
    up="intermediate.dense",
    activation="intermediate.intermediate_act_fn",
    down="output.dense",
    feed_forward_norm="output.LayerNorm",
    attention_dropout="attention.self.dropout",
    out_dropout="attention.output.dropout",
    down_dropout="output.dropout",
)


def _decoder(model: Any) -> str | None:
    if model.config.is_decoder or model.config.add_cross_attention:
        return "it is configured as a decoder (is_decoder or add_cross_attention)"
    if getattr(model.config, "position_embedding_type", None) not in (None, "absolute"):
        return f"position_embedding_type is {model.config.position_embedding_type!r}"
    return None


BERT = Family("BERT", "bert", "Bert", _BERT_LAYER, unsupported=_decoder)

FAMILIES = (BERT,)


def family_of(cls: type) -> Family | None:
    """The family whose module defines a class."""
    return next((family for family in FAMILIES if family.modeling == cls.__module__), None)


def stock_class(name: str) -> type | None:
    """A family's class of this name."""
    for family in FAMILIES:
        if name.startswith(family.prefix):
            found = getattr(importlib.import_module(family.modeling), name, None)
            if isinstance(found, type) and found.__module__ == family.modeling and issubclass(found, nn.Module):
                return found
    return None


__all__ = ["FAMILIES", "Family", "LayerLayout", "family_of", "stock_class"]
