"""BERT's encoder (Devlin et al. 2019) on packed tokens."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastbert.models import bert_names
from fastbert.models.config import BertConfig
from fastbert.models.pooling import cls_pool
from fastbert.models.pretrained import StackOfBlocks, Table, exportable
from fastbert.nn import Embeddings, TransformerBlock, check_precision, initialize, run_blocks
from fastbert.nn._modules import product
from fastbert.packing import PackedBatch, check_tensor, pack, unpack


@exportable
class BertOutput(NamedTuple):
    """What BertModel returns: padded for padded input, packed for packed input."""

    last_hidden_state: Tensor  # [batch, seq, hidden], zeros on padding; packed: [total, hidden]
    pooler_output: Tensor | None = None  # [batch, hidden]
    hidden_states: tuple[Tensor, ...] | None = None  # the embeddings' output and every layer's, as last_hidden_state
    cu_seqlens: Tensor | None = None  # int32 [batch + 1], for packed input


class Pooler(nn.Module):
    """tanh(linear(first token)) of each sequence; zeros for an empty one."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.dense = nn.Linear(hidden_size, hidden_size)

    def forward(self, hidden: Tensor, cu_seqlens: Tensor) -> Tensor:
        """[total, hidden] to [batch, hidden]."""
        first = cls_pool(hidden, cu_seqlens)
        pooled = product(self.dense, first, "tanh")
        return pooled.masked_fill((cu_seqlens.diff() == 0).unsqueeze(-1), 0.0)


class BertModel(StackOfBlocks):
    """BERT without a head: token ids to hidden states, and to one pooled vector a sequence.

    Inside, only real tokens exist: a padded batch is packed before the embeddings and unpacked after the last layer, so
    that it costs what its real tokens cost.

    Args:
        config: see BertConfig.
        add_pooling_layer: whether there is a pooler.
        precision: of inference: "fp32", "bf16" or "int8", see fastbert.nn.PRECISIONS. It may be changed later (``model.precision =
            "int8"``); parameters, state_dict and checkpoints do not know it.
    """

    architecture = "BertModel"

    def __init__(self, config: BertConfig, add_pooling_layer: bool = True, *, precision: str = "fp32") -> None:
        super().__init__()
        self.config = config
        self._precision = check_precision(precision)
        self.embeddings = Embeddings(
            config.vocab_size,
            config.hidden_size,
            config.max_position_embeddings,
            config.type_vocab_size,
            eps=config.layer_norm_eps,
            dropout_p=config.hidden_dropout_prob,
            padding_idx=config.pad_token_id,
        )
        self.layers = nn.ModuleList(
            TransformerBlock(
                config.hidden_size,
                config.num_attention_heads,
                config.intermediate_size,
                activation=config.activation,
                dropout_p=config.hidden_dropout_prob,
                attention_dropout_p=config.attention_probs_dropout_prob,
                eps=config.layer_norm_eps,
                precision=precision,
            )
            for _ in range(config.num_hidden_layers)
        )
        self.pooler = Pooler(config.hidden_size) if add_pooling_layer else None
        initialize(self, config.initializer_range)

    @classmethod
    def from_pretrained(
        cls,
        path_or_hub_id: str | os.PathLike[str],
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        revision: str | None = None,
        add_pooling_layer: bool = True,
        precision: str = "fp32",
    ) -> "BertModel":
        """Reads a Hugging Face checkpoint of a BERT, with or without a head (which is left out), in evaluation mode.

        Args:
            path_or_hub_id: a folder with config.json and model.safetensors (or its shards, or pytorch_model.bin with
                nothing but tensors), or an id on the Hugging Face hub.
            dtype: of the parameters, float32, bfloat16, float16 or float64; as stored unless given, and the widest of
                those stored where a file mixes them.
            device: of the parameters; the CPU unless given.
            revision: branch, tag or commit on the hub.
            add_pooling_layer: whether the checkpoint's pooler is wanted.
            precision: of inference, as for BertModel.

        Raises:
            FileNotFoundError: no such folder, or a file of it is missing.
            ValueError: a truncated or damaged file, another architecture, tensors that do not fit the configuration, a
                pickle that holds more than tensors; another dtype than the four.
            TypeError: dtype is no torch.dtype.
            ImportError: a hub id without huggingface_hub.
        """
        check_precision(precision)
        arguments = {"add_pooling_layer": add_pooling_layer, "precision": precision}
        return cls._load(path_or_hub_id, dtype, device, revision, {}, **arguments)

    @classmethod
    def _config_from(cls, values: Mapping[str, Any]) -> BertConfig:
        return BertConfig.from_dict(values)

    @classmethod
    def _table(cls, config: BertConfig, **arguments: Any) -> Table:
        return bert_names.name_table(config.num_hidden_layers, arguments["add_pooling_layer"])

    @classmethod
    def _canonical(cls, in_files: list[str], folder: Path) -> dict[str, str]:
        return bert_names.canonical(in_files, folder)

    @classmethod
    def _is_known(cls, name: str, **arguments: Any) -> bool:
        return not arguments["add_pooling_layer"] and name.startswith("pooler.")

    @classmethod
    def _hint(cls, missing: list[str]) -> str:
        if not all(name.startswith("pooler.") for name in missing):
            return ""
        return ". The checkpoint has no pooler: load it with add_pooling_layer=False"

    def _arguments(self) -> dict[str, Any]:
        return {"add_pooling_layer": self.pooler is not None}

    def forward(
        self,
        input_ids: Tensor | PackedBatch,  # int [batch, seq], or a packed batch of ids [total]
        attention_mask: Tensor | None = None,  # [batch, seq], True or 1 for real tokens
        token_type_ids: Tensor | None = None,  # int [batch, seq]
        position_ids: Tensor | None = None,  # int [batch, seq]
        *,
        output_hidden_states: bool = False,
    ) -> BertOutput:
        """Hidden states of every real token, equal to transformers' own.

        Args:
            input_ids: padded ids, or a PackedBatch, which carries positions and token types itself.
            attention_mask: real tokens, in any pattern; every token is real unless given. On an accelerator a mask
                costs one synchronisation; none and packed input cost none.
            token_type_ids: 0 unless given.
            position_ids: a token's column unless given, behind left padding too, as in transformers.
            output_hidden_states: also the embeddings' output and every layer's.

        Returns:
            Padded hidden states for padded input, with zeros on padding (where transformers leaves numbers without
            meaning); packed ones, and cu_seqlens, for packed input. The pooler reads each sequence's first real token;
            transformers' reads column 0, which is padding where that is on the left.

        Raises:
            IndexError: a token id, position or token type outside its table (on CPU; elsewhere under fastbert.debug()).
            ValueError: shapes or devices that do not fit, or more tokens than max_position_embeddings.
            TypeError: ids that are no integers, or arguments that are no tensors.
        """
        batch = self.packed(input_ids, attention_mask, token_type_ids, position_ids)
        hidden, states = self._encode(batch, output_hidden_states)
        pooled = None if self.pooler is None else self.pooler(hidden, batch.cu_seqlens)
        if isinstance(input_ids, PackedBatch):
            return BertOutput(hidden, pooled, states, batch.cu_seqlens)
        if states is not None:
            states = tuple(unpack(batch, state) for state in states)
        return BertOutput(unpack(batch, hidden), pooled, states)

    def packed(
        self,
        input_ids: Tensor | PackedBatch,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> PackedBatch:
        """The arguments of ``forward``, checked, as one packed batch. Raises as forward does."""
        if isinstance(input_ids, PackedBatch):
            if attention_mask is not None or token_type_ids is not None or position_ids is not None:
                raise ValueError(
                    "a PackedBatch carries its own token_type_ids and position_ids and needs no mask; give it alone"
                )
            self._check_ids(input_ids.values, 1)
            self._check_length(input_ids.max_seqlen)
            if input_ids.device.type == "cpu" and not torch.compiler.is_compiling():
                input_ids.check()
            return input_ids
        self._check_ids(input_ids, 2)
        if attention_mask is not None:
            check_tensor("attention_mask", attention_mask, "[batch, seq], or None")
        if position_ids is None:
            self._check_length(input_ids.shape[1])
        return pack(input_ids, attention_mask, position_ids=position_ids, token_type_ids=token_type_ids)

    def _encode(self, batch: PackedBatch, keep_states: bool) -> tuple[Tensor, tuple[Tensor, ...] | None]:
        hidden = self.embeddings(batch.values, batch.position_ids, batch.token_type_ids)
        states = [hidden] if keep_states else None
        checkpointing = self.gradient_checkpointing and self.training
        hidden = run_blocks(
            self.layers, hidden, batch.cu_seqlens, batch.max_seqlen, checkpointing=checkpointing, states=states
        )
        return hidden, None if states is None else tuple(states)

    def _check_ids(self, ids: Tensor, dimensions: int) -> None:
        expected = "[batch, seq]" if dimensions == 2 else "[total]"
        if not isinstance(ids, Tensor):
            raise TypeError(
                f"input_ids is a {type(ids).__name__}; expected an integer tensor {expected} or a PackedBatch"
            )
        if ids.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"input_ids is {ids.dtype}; expected int64 or int32")
        if ids.dim() != dimensions:
            raise ValueError(f"input_ids has shape {list(ids.shape)}; expected {expected}")
        if ids.device != self.device:
            raise ValueError(f"input_ids is on {ids.device}, the model on {self.device}; move one of them")

    def _check_length(self, longest: int) -> None:
        limit = self.config.max_position_embeddings
        if longest > limit:
            raise ValueError(
                f"the input has sequences of {longest} tokens; the model takes at most {limit} "
                "(max_position_embeddings). Truncate them."
            )
