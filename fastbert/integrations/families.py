"""The model families of transformers that ``fastbert.optimize`` knows: where each keeps what a packed forward needs.

A family is a description and, where it must be, a small function; what runs is ``fastbert.integrations.packed``. Paths are
those of submodules, from the base model or, in a ``LayerLayout``, from a layer.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fastbert.packing import PackedBatch


class Unsupported(Exception):
    """Why a model, or a call of it, is not served packed."""


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
        norm_first: as in fastbert.nn.BlockOptions.
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
    transposed: bool = False


def _layers_at(path: str) -> Callable[[nn.Module], list[nn.Module]]:
    def layers(model: nn.Module) -> list[nn.Module]:
        return list(model.get_submodule(path).children())

    return layers


_encoder_layers = _layers_at("encoder.layer")


def _pooler(model: Any, hidden: Tensor) -> Tensor | None:
    return None if model.pooler is None else model.pooler(hidden)


def _nothing(*_: Any) -> None:
    return None


def _embeddings(model: Any, call: Any) -> Tensor:
    optional = {name: getattr(call, name) for name in ("token_type_ids", "position_ids", "inputs_embeds")}
    given = {name: value for name, value in optional.items() if value is not None}
    return model.embeddings(input_ids=call.input_ids, **given, **call.further)


def _distilbert_embeddings(model: Any, call: Any) -> Tensor:
    return model.embeddings(call.input_ids, call.inputs_embeds, call.position_ids)  # the second one's name changed


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
        causal: a token sees only itself and what stands before it.
        may_decode: as causal, where the configuration says is_decoder.
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
    layers: Callable[[nn.Module], list[nn.Module]] = _encoder_layers
    stack: tuple[str, ...] = ("encoder",)
    counts_tokens: bool = False
    projection: str | None = None
    final_norm: str | None = None
    attention_bias: Callable[[Any, PackedBatch], Tensor | None] = _nothing
    pool: Callable[[Any, Tensor], Tensor | None] | None = _pooler
    output: str = "BaseModelOutputWithPoolingAndCrossAttentions"
    causal: bool = False
    may_decode: bool = False
    unsupported: Callable[[Any], str | None] = _nothing
    inputs: tuple[str, ...] = ()
    tuple_keeps_none: bool = False

    def is_causal(self, config: Any) -> bool:
        """Whether a model of this configuration is."""
        return self.causal or (self.may_decode and bool(config.is_decoder))

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


_ALBERT_LAYER = LayerLayout(
    qkv=("attention.query", "attention.key", "attention.value"),
    out="attention.dense",
    attention_norm="attention.LayerNorm",
    up="ffn",
    activation="activation",
    down="ffn_output",
    feed_forward_norm="full_layer_layer_norm",
    attention_dropout="attention.attention_dropout",
    out_dropout="attention.output_dropout",
    down_dropout=None,
)

_DISTILBERT_LAYER = LayerLayout(
    qkv=("attention.q_lin", "attention.k_lin", "attention.v_lin"),
    out="attention.out_lin",
    attention_norm="sa_layer_norm",
    up="ffn.lin1",
    activation="ffn.activation",
    down="ffn.lin2",
    feed_forward_norm="output_layer_norm",
    attention_dropout="attention.dropout",
    out_dropout=None,
    down_dropout="ffn.dropout",
)

_MPNET_LAYER = replace(
    _BERT_LAYER,
    qkv=("attention.attn.q", "attention.attn.k", "attention.attn.v"),
    out="attention.attn.o",
    attention_norm="attention.LayerNorm",
    attention_dropout="attention.attn.dropout",
    out_dropout="attention.dropout",
)

_GPT2_LAYER = LayerLayout(
    qkv=("attn.c_attn",),
    out="attn.c_proj",
    attention_norm="ln_1",
    up="mlp.c_fc",
    activation="mlp.act",
    down="mlp.c_proj",
    feed_forward_norm="ln_2",
    attention_dropout="attn.attn_dropout",
    out_dropout="attn.resid_dropout",
    down_dropout="mlp.dropout",
    norm_first=True,
    transposed=True,
)


def _albert_layers(model: Any) -> list[nn.Module]:
    config, groups = model.config, model.encoder.albert_layer_groups
    order = [int(i / (config.num_hidden_layers / config.num_hidden_groups)) for i in range(config.num_hidden_layers)]
    return [layer for group in order for layer in groups[group].albert_layers]


def _albert_pooler(model: Any, hidden: Tensor) -> Tensor | None:
    return None if model.pooler is None else model.pooler_activation(model.pooler(hidden[:, 0]))


def _relative_positions(model: Any, batch: PackedBatch) -> Tensor:
    """MPNet's: a function of the distance in columns, which packing keeps unless it closes holes."""
    if batch.indices is not None and batch.padded_shape is not None:
        columns = batch.indices % batch.padded_shape[1]
        jumps = columns.diff() != 1
        starts = batch.cu_seqlens[1:-1].long()
        jumps[starts[(starts > 0) & (starts < batch.total)] - 1] = False
        if jumps.any():
            raise Unsupported("holes in the mask, with positions relative to columns")
    seq = batch.max_seqlen
    return model.encoder.compute_position_bias(batch.values.new_empty(1, seq, 0))[0]  # [heads, seq, seq]


def _gpt2_embeddings(model: Any, call: Any) -> Tensor:
    tokens = model.wte(call.input_ids) if call.inputs_embeds is None else call.inputs_embeds
    positions = call.position_ids
    if positions is None:
        positions = torch.arange(tokens.shape[1], device=tokens.device).unsqueeze(0)
    hidden = tokens + model.wpe(positions)
    if call.token_type_ids is not None:
        hidden = hidden + model.wte(call.token_type_ids)
    return model.drop(hidden)


def _crosses(model: Any) -> str | None:
    if getattr(model.config, "add_cross_attention", False):
        return "it has cross-attention"
    if getattr(model.config, "position_embedding_type", None) not in (None, "absolute"):
        return f"its position_embedding_type is {model.config.position_embedding_type!r}"
    return None


def _scales(model: Any) -> str | None:
    config = model.config
    if not config.scale_attn_weights or config.scale_attn_by_inverse_layer_idx:
        return "it scales attention otherwise (scale_attn_weights, scale_attn_by_inverse_layer_idx)"
    return _crosses(model)


BERT = Family("BERT", "bert", "Bert", _BERT_LAYER, may_decode=True, unsupported=_crosses)
_ROBERTA = replace(BERT, name="RoBERTa", module="roberta", prefix="Roberta", counts_tokens=True)
_WITHOUT_POOLER = "BaseModelOutputWithPastAndCrossAttentions"

FAMILIES = (
    BERT,
    _ROBERTA,
    replace(_ROBERTA, name="XLM-RoBERTa", module="xlm_roberta", prefix="XLMRoberta"),
    replace(_ROBERTA, name="CamemBERT", module="camembert", prefix="Camembert"),
    Family(
        "DistilBERT",
        "distilbert",
        "DistilBert",
        _DISTILBERT_LAYER,
        embed=_distilbert_embeddings,
        layers=_layers_at("transformer.layer"),
        stack=("transformer",),
        pool=None,
        output="BaseModelOutput",
    ),
    replace(
        BERT,
        name="ELECTRA",
        module="electra",
        prefix="Electra",
        stack=("encoder", "embeddings_project"),
        projection="embeddings_project",
        pool=None,
        output=_WITHOUT_POOLER,
    ),
    Family(
        "ALBERT",
        "albert",
        "Albert",
        _ALBERT_LAYER,
        layers=_albert_layers,
        projection="encoder.embedding_hidden_mapping_in",
        pool=_albert_pooler,
        output="BaseModelOutputWithPooling",
    ),
    replace(BERT, name="ERNIE", module="ernie", prefix="Ernie", inputs=("task_type_ids",)),
    Family(
        "MPNet",
        "mpnet",
        "MPNet",
        _MPNET_LAYER,
        counts_tokens=True,
        attention_bias=_relative_positions,
        output="BaseModelOutputWithPooling",
        tuple_keeps_none=True,
    ),
    Family(
        "GPT-2",
        "gpt2",
        "GPT2",
        _GPT2_LAYER,
        embeddings=None,
        embed=_gpt2_embeddings,
        layers=_layers_at("h"),
        stack=("h", "ln_f"),
        final_norm="ln_f",
        causal=True,
        pool=None,
        output=_WITHOUT_POOLER,
        unsupported=_scales,
    ),
)


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


__all__ = ["FAMILIES", "Family", "LayerLayout", "Unsupported", "family_of", "stock_class"]
