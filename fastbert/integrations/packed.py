"""The forward of an optimized base model: packed through ``fastbert.nn.transformer_block``, or transformers' own.

A call is packed once, before the embeddings where these are nothing but tables and a norm, and unpacked once behind the last
layer. Whatever a packed forward does not do is transformers' to answer, for that call: attention weights, masks of more than two
dimensions, caches, hooks and unknown modules inside the layers, tracing, compiling. Padded positions come back as zeros; a call
whose pooler or head reads more of them than a loss ignores is transformers' too.
"""

import functools
import importlib
import inspect
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from fastbert import functional as F
from fastbert.integrations.families import Family, Unsupported
from fastbert.integrations.plan import Embeddings, Layer, Plan
from fastbert.nn import BlockWeights
from fastbert.nn._modules import product
from fastbert.nn.block import as_whole
from fastbert.ops.block import whole_blocks
from fastbert.packing import PackedBatch, pack, unpack

# What a base model's forward may be given and has no part in: a head's loss reads it.
_OF_THE_HEAD = {"num_items_in_batch"}
_FLAGS = ("output_attentions", "output_hidden_states", "return_dict")
_TENSORS = ("input_ids", "attention_mask", "token_type_ids", "position_ids", "inputs_embeds")

_exact = threading.local()


@contextmanager
def by_transformers(reason: str) -> Iterator[None]:
    """Optimized models answer with transformers' own forward, in this thread."""
    before = getattr(_exact, "reason", None)
    _exact.reason = reason
    try:
        yield
    finally:
        _exact.reason = before


def is_traced() -> bool:
    """Whether values cannot be looked at: torch.jit traces the call, or torch.func transforms it."""
    return torch._C._get_tracing_state() is not None or torch._C._functorch.peek_interpreter_stack() is not None


@dataclass
class State:
    """What an optimized base model knows besides what it was: an attribute of it, and copied and pickled with it.

    Attributes:
        precision: of inference, see fastbert.nn.PRECISIONS.
        reads_first_column: whether its pooler or its head reads the first column, padding or not.
        calls: how many calls were served packed, under "packed", and by transformers, under the reason.
    """

    precision: str
    reads_first_column: bool
    calls: Counter[str] = field(default_factory=Counter)
    plan: Plan | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "plan": None, "calls": Counter()}

    def plan_for(self, model: nn.Module, family: Family) -> Plan:
        """The plan, made anew where the model's modules have changed. Raises Unsupported."""
        plan = self.plan
        if plan is not None and plan.changed(model) is None:
            return plan
        if getattr(model, "_is_replica", False):
            raise Unsupported("torch.nn.DataParallel runs a copy of the model")
        self.plan = None
        plan = Plan(model, family, self.precision)
        changed = plan.changed(model)
        if changed is not None:
            raise Unsupported(changed)
        self.plan = plan
        return plan


@dataclass
class Call:
    """The arguments of a base model's forward, as far as a packed forward takes them."""

    input_ids: Tensor | None
    attention_mask: Tensor | None
    token_type_ids: Tensor | None
    position_ids: Tensor | None
    inputs_embeds: Tensor | None
    further: dict[str, Tensor]
    output_hidden_states: bool
    return_dict: bool


def packed_forward(stock: type[nn.Module], family: Family) -> Callable[..., Any]:
    """The forward of an optimized class, with the signature of the class that it stands for."""
    original: Any = stock.forward
    names = [
        name
        for name, parameter in inspect.signature(original).parameters.items()
        if parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
    ][1:]

    @functools.wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return original(self, *args, **kwargs)
        state: State = self._fastbert
        try:
            positional = dict(zip(names, args, strict=False))
            if len(args) > len(names) or not positional.keys().isdisjoint(kwargs):
                raise Unsupported("arguments that it does not take")
            call = read_call(self, family, positional | kwargs)
            plan = state.plan_for(self, family)
            batch, hidden = embed(self, family, plan, call, state)
            blocks = [(layer, layer.weights(hidden.dtype)) for layer in plan.layers]
            bias = family.attention_bias(self, batch)
        except Unsupported as reason:
            state.calls[str(reason)] += 1
            return original(self, *args, **kwargs)
        state.calls["packed"] += 1
        hidden, states = run_layers(self, family, batch, hidden, blocks, bias, call.output_hidden_states)
        return make_output(self, family, batch, hidden, states, call.return_dict)

    return forward


def read_call(model: Any, family: Family, arguments: dict[str, Any]) -> Call:
    """Raises Unsupported for arguments, or circumstances, that are transformers' to answer."""
    reason = getattr(_exact, "reason", None)
    if reason is not None:
        raise Unsupported(reason)
    if is_traced():
        raise Unsupported("the call is traced or transformed")
    if nn.modules.module._has_any_global_hook():
        raise Unsupported("hooks on all modules")
    config = model.config
    flags = {}
    for name in _FLAGS:
        default = getattr(config, name, name == "return_dict")
        value = arguments.pop(name, default)
        if value is None and bool(default) is not (name == "return_dict"):
            # Versions of transformers differ in what that means.
            raise Unsupported(f"{name} is None against the configuration")
        flags[name] = (name == "return_dict") if value is None else value
    if flags["output_attentions"]:
        raise Unsupported("output_attentions")
    if not isinstance(flags["output_hidden_states"], bool):
        raise Unsupported("output_hidden_states of some layers")
    if getattr(config, "is_causal", None) is not None:
        raise Unsupported("config.is_causal")
    use_cache = arguments.pop("use_cache", None)
    if family.is_causal(config):
        if use_cache:
            raise Unsupported("use_cache=True")
        # In training the cache that the configuration asks for is of no use.
        if use_cache is None and config.use_cache and not model.training:
            raise Unsupported("a cache, by the configuration's default; use_cache=False would do without")
    tensors = {name: arguments.pop(name, None) for name in _TENSORS}
    further = {}
    for name, value in arguments.items():
        if value is None or value is False or name in _OF_THE_HEAD:
            continue
        if name not in family.inputs:
            raise Unsupported(name)
        further[name] = value
    call = Call(
        **tensors, further=further, output_hidden_states=flags["output_hidden_states"], return_dict=flags["return_dict"]
    )
    _check_tensors(model, call)
    return call


def _check_tensors(model: Any, call: Call) -> None:
    """Raises Unsupported where the arguments do not fit together: transformers has the words for it."""
    ids, embeds = call.input_ids, call.inputs_embeds
    given = embeds if ids is None else ids
    if type(given) is not Tensor or (ids is not None and embeds is not None):
        raise Unsupported("input_ids and inputs_embeds together, or neither, or of a tensor's subclass")
    if given.dim() != (2 if ids is not None else 3) or given.is_meta or given.numel() == 0:
        raise Unsupported("an input of another number of dimensions, or empty, or without memory")
    if ids is not None and ids.dtype not in (torch.int64, torch.int32):
        raise Unsupported(f"input_ids are {ids.dtype}")
    batch, seq = given.shape[:2]
    for name in ("attention_mask", "token_type_ids", "position_ids"):
        tensor = getattr(call, name)
        if tensor is None:
            continue
        if type(tensor) is not Tensor or tensor.dim() != 2 or tensor.device != given.device:
            raise Unsupported(f"{name} is no matrix on the input's device")
        rows, columns = tensor.shape
        if columns != seq or not (rows == batch or (rows == 1 and name == "position_ids")):
            raise Unsupported(f"{name} is not of the input's shape")
        if name != "attention_mask" and tensor.dtype not in (torch.int64, torch.int32):
            raise Unsupported(f"{name} are {tensor.dtype}")


def embed(model: Any, family: Family, plan: Plan, call: Call, state: State) -> tuple[PackedBatch, Tensor]:
    """The packed batch, and the first layer's input [total, hidden]."""
    mask = call.attention_mask
    if mask is not None:
        mask = mask != 0
        if state.reads_first_column and not mask[:, 0].all():
            raise Unsupported("padding in the first column, which the pooler or the head reads")
    tables = plan.tables(model)
    if call.input_ids is None or call.further or (tables is not None and _needs_modules(tables)):
        tables = None
    if tables is None:
        batch = pack(family.embed(model, call), mask)
        hidden = batch.values
    else:
        ids, positions = call.input_ids, call.position_ids
        assert ids is not None
        if positions is None:
            offset = 0
            if family.counts_tokens:
                padding_idx = tables.padding_idx
                assert padding_idx is not None
                real = ids.ne(padding_idx)
                positions = real.cumsum(1) * real + padding_idx
                offset = padding_idx + 1
            rows = tables.position["weight"].shape[0]
            if ids.shape[1] + offset > rows:
                raise Unsupported("more tokens than positions")
        types = None if tables.token_type is None else call.token_type_ids  # without a table transformers ignores them
        batch = pack(ids, mask, position_ids=positions, token_type_ids=types)
        hidden = _look_up(tables, batch)
    return batch, _project(model, family, hidden)


def _needs_modules(tables: Embeddings) -> bool:
    # The row of a padding token's position gets no gradient.
    return tables.position_padding_idx is not None and torch.is_grad_enabled()


def _look_up(tables: Embeddings, batch: PackedBatch) -> Tensor:
    dropout = tables.dropout
    return F.embedding_layer_norm(
        batch.values,
        tables.word["weight"],
        tables.position["weight"],
        None if tables.token_type is None else tables.token_type["weight"],
        tables.norm["weight"],
        tables.norm["bias"],
        tables.eps,
        position_ids=batch.position_ids,
        token_type_ids=batch.token_type_ids,
        dropout_p=dropout.p if dropout.training else 0.0,
        padding_idx=tables.padding_idx,
    )


def _project(model: Any, family: Family, hidden: Tensor) -> Tensor:
    if family.projection is None:
        return hidden
    path, _, name = family.projection.rpartition(".")
    projection = getattr(model.get_submodule(path), name, None)
    return hidden if projection is None else product(projection, hidden)


def encode(model: Any, batch: PackedBatch) -> Tensor:
    """Hidden states [total, hidden] of a packed batch of token ids, by an optimized base model; nothing is padded.

    Positions count from 0 in each sequence, as PackedBatch has them; where the family counts otherwise, they are translated.

    Raises:
        Unsupported: the model cannot be run packed as it is now, see ``report``.
        IndexError: an id or a position outside its table (on CPU; elsewhere under fastbert.debug()).
    """
    family: Family = model._fastbert_family
    plan = model._fastbert.plan_for(model, family)
    tables = plan.tables(model)
    if tables is None or _needs_modules(tables):
        raise Unsupported("the embeddings have to be called padded")
    if family.counts_tokens:
        batch = replace(batch, position_ids=_count_tokens(batch, tables.padding_idx))
    if batch.token_type_ids is not None and tables.token_type is None:
        batch = replace(batch, token_type_ids=None)
    hidden = _project(model, family, _look_up(tables, batch))
    blocks = [(layer, layer.weights(hidden.dtype)) for layer in plan.layers]
    bias = family.attention_bias(model, batch)
    model._fastbert.calls["packed"] += 1
    return run_layers(model, family, batch, hidden, blocks, bias, False)[0]


def _count_tokens(batch: PackedBatch, padding_idx: Any) -> Tensor:
    """Position ids [total] of RoBERTa's kind."""
    real = batch.values.ne(padding_idx)
    counts = torch.cat((real.new_zeros(1, dtype=torch.int64), real.cumsum(0)))  # of real tokens before each
    starts = batch.cu_seqlens[:-1].long()
    before = counts[starts].repeat_interleave(batch.cu_seqlens.diff().long(), output_size=batch.total)
    return (counts[1:] - before) * real + padding_idx


def run_layers(
    model: Any,
    family: Family,
    batch: PackedBatch,
    hidden: Tensor,  # [total, hidden]
    blocks: list[tuple[Layer, BlockWeights | None]],
    bias: Tensor | None,  # [heads, seq, seq], of the attention
    keep_states: bool,
) -> tuple[Tensor, list[Tensor] | None]:
    """The last layer's output [total, hidden], normed where the model norms it; and, if kept, the input of each layer and it."""
    dtype = hidden.dtype
    states = [hidden] if keep_states else None
    dropouts = [layer.dropouts() for layer, _ in blocks]
    whole = None
    if states is None and bias is None and hidden.is_cpu and not any(map(any, dropouts)):
        described = [as_whole(weights, layer.options) for layer, weights in blocks if weights is not None]
        if len(described) == len(blocks):
            whole = whole_blocks(hidden, batch.cu_seqlens, batch.max_seqlen, described)
    if whole is not None:
        hidden = whole
    else:
        for (layer, weights), (attention, out, down) in zip(blocks, dropouts, strict=True):
            block = functools.partial(
                layer.run,
                weights,
                cu_seqlens=batch.cu_seqlens,
                max_seqlen=batch.max_seqlen,
                dropout_p=out,
                attention_dropout_p=attention,
                feed_forward_dropout_p=down,
                attention_bias=bias,
            )
            module = layer.module
            if module.training and getattr(module, "gradient_checkpointing", False):
                hidden = module._gradient_checkpointing_func(block, hidden)
            else:
                hidden = block(hidden)
            if states is not None:
                states.append(hidden)
    if family.final_norm is not None:
        hidden = model.get_submodule(family.final_norm)(hidden)
        if states is not None:
            states[-1] = hidden
    # Under autocast a block gives autocast's dtype, where transformers' last operation, a layer norm, gives float32.
    return hidden.to(dtype), states


def make_output(
    model: Any, family: Family, batch: PackedBatch, hidden: Tensor, states: list[Tensor] | None, return_dict: bool
) -> Any:
    """What the base model returns, padded again, with zeros at padding."""
    output_class: Any = getattr(importlib.import_module("transformers.modeling_outputs"), family.output)
    padded = unpack(batch, hidden)
    values: dict[str, Any] = {"last_hidden_state": padded}
    if family.pool is not None:
        values["pooler_output"] = family.pool(model, padded)
    if states is not None:
        values["hidden_states"] = (*[unpack(batch, state.to(hidden.dtype)) for state in states[:-1]], padded)
    if return_dict:
        return output_class(**values)
    return tuple(value for value in values.values() if value is not None or family.tuple_keeps_none)
