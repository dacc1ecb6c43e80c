"""GPT in GPT-2's layout (Radford et al. 2019) on packed tokens: learned positions, norms first, causal, tied words."""

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as TF

from fastbert import functional as F
from fastbert.models.bert_heads import IGNORED, HeadOutput, as_it_came, token_labels
from fastbert.models.generation import GeneratedTokens, Sampling, generate_tokens, packed_prompts
from fastbert.models.gpt_config import GPTConfig
from fastbert.models.kv_cache import KeyValueCache
from fastbert.models.pretrained import PretrainedModel, StackOfBlocks, Stored, Table, exportable, linear_or_norm
from fastbert.nn import LayerNorm, TransformerBlock, check_precision, initialize, run_blocks
from fastbert.ops._common import check_range
from fastbert.packing import PackedBatch, check_tensor, pack, unpack


@exportable
class GPTOutput(NamedTuple):
    """What GPTModel returns: padded for padded input, packed for packed input."""

    last_hidden_state: Tensor  # [batch, seq, n_embd], zeros on padding; packed: [total, n_embd]
    hidden_states: tuple[Tensor, ...] | None = (
        None  # the embeddings and every layer's, the last one normed, as transformers'
    )


class _GPTFolder(PretrainedModel):
    """What GPT's models know of their checkpoints."""

    family = "GPT-2"
    first_tensor = "wte.weight"
    _prefix = ""  # of our names

    @classmethod
    def _config_from(cls, values: Mapping[str, Any]) -> GPTConfig:
        return GPTConfig.from_dict(values)

    @classmethod
    def _table(cls, config: GPTConfig, **arguments: Any) -> Table:
        table: Table = {
            "words.weight": Stored(("wte.weight",)),
            "positions.weight": Stored(("wpe.weight",)),
            **linear_or_norm("norm", "ln_f"),
        }
        for i in range(config.n_layer):
            ours, theirs = f"layers.{i}", f"h.{i}"
            table |= {
                **linear_or_norm(f"{ours}.attention.qkv", f"{theirs}.attn.c_attn", transposed=True),
                **linear_or_norm(f"{ours}.attention.out", f"{theirs}.attn.c_proj", transposed=True),
                **linear_or_norm(f"{ours}.attention_norm", f"{theirs}.ln_1"),
                **linear_or_norm(f"{ours}.feed_forward.up", f"{theirs}.mlp.c_fc", transposed=True),
                **linear_or_norm(f"{ours}.feed_forward.down", f"{theirs}.mlp.c_proj", transposed=True),
                **linear_or_norm(f"{ours}.feed_forward_norm", f"{theirs}.ln_2"),
            }
        return {f"{cls._prefix}{ours}": stored for ours, stored in table.items()}

    @classmethod
    def _canonical(cls, in_files: list[str], folder: Path) -> dict[str, str]:
        prefix = "transformer." if any(name.startswith("transformer.") for name in in_files) else ""
        found = {}
        for name in in_files:
            short = name.removeprefix(prefix)
            mask = short.startswith("h.") and short.endswith(
                (".attn.bias", ".attn.masked_bias")
            )  # buffers, in old files
            if name.startswith(prefix) and short.startswith(("wte.", "wpe.", "h.", "ln_f.")) and not mask:
                found[short] = name
        return found

    @classmethod
    def from_pretrained(
        cls,
        path_or_hub_id: str | os.PathLike[str],
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        revision: str | None = None,
        precision: str = "fp32",
    ) -> Self:
        """Reads a Hugging Face checkpoint of a GPT-2, with or without its head, in evaluation mode.

        Arguments and errors are those of BertModel.from_pretrained.
        """
        check_precision(precision)
        return cls._load(path_or_hub_id, dtype, device, revision, {}, precision=precision)


class GPTModel(_GPTFolder, StackOfBlocks):
    """GPT without a head: token ids to hidden states. Only real tokens exist inside, as in BertModel.

    Args:
        config: see GPTConfig.
        precision: of inference: "fp32", "bf16" or "int8", see fastbert.nn.PRECISIONS.
    """

    architecture = "GPT2Model"

    def __init__(self, config: GPTConfig, *, precision: str = "fp32") -> None:
        super().__init__()
        self.config = config
        self._precision = check_precision(precision)
        self.words = nn.Embedding(config.vocab_size, config.n_embd)
        self.positions = nn.Embedding(config.n_positions, config.n_embd)
        blocks = [
            TransformerBlock(
                config.n_embd,
                config.n_head,
                config.n_inner,
                activation=config.activation,
                dropout_p=config.resid_pdrop,
                attention_dropout_p=config.attn_pdrop,
                eps=config.layer_norm_epsilon,
                norm_first=True,
                causal=True,
                precision=precision,
            )
            for _ in range(config.n_layer)
        ]
        self.layers = nn.ModuleList(blocks)
        self.norm = LayerNorm(config.n_embd, config.layer_norm_epsilon)
        initialize(self, config.initializer_range)
        # Each layer adds twice to the stream: its last products start smaller (Radford et al. 2019, 2.3).
        for block in blocks:
            for last in (block.attention.out, block.feed_forward.down):
                nn.init.normal_(last.weight, std=config.initializer_range / (2 * max(config.n_layer, 1)) ** 0.5)

    def forward(
        self,
        input_ids: Tensor | PackedBatch,  # int [batch, seq], or a packed batch of ids [total]
        attention_mask: Tensor | None = None,  # [batch, seq], True or 1 for real tokens
        position_ids: Tensor | None = None,  # int [batch, seq]
        *,
        cache: KeyValueCache | None = None,
        output_hidden_states: bool = False,
    ) -> GPTOutput:
        """Hidden states of every real token, equal to transformers' own.

        Args:
            input_ids: padded ids, or a PackedBatch, which carries positions itself.
            attention_mask: real tokens, in any pattern; every token is real unless given.
            position_ids: a token's column unless given.
            cache: earlier tokens of the sequences, which the new ones attend to and join. No gradients then.
            output_hidden_states: also the embeddings and every layer's.

        Raises:
            IndexError: a token id or position outside its table (on CPU).
            ValueError: shapes or devices that do not fit, or more tokens than n_positions.
            TypeError: ids that are no integers, or arguments that are no tensors.
        """
        batch = self.packed(input_ids, attention_mask, position_ids)
        hidden, states = self._encode(batch, cache, output_hidden_states)
        if isinstance(input_ids, PackedBatch):
            return GPTOutput(hidden, states)
        if states is not None:
            states = tuple(unpack(batch, state) for state in states)
        return GPTOutput(unpack(batch, hidden), states)

    def packed(
        self,
        input_ids: Tensor | PackedBatch,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> PackedBatch:
        """The arguments of ``forward``, checked, as one packed batch. Raises as forward does."""
        packed = isinstance(input_ids, PackedBatch)
        ids = input_ids.values if isinstance(input_ids, PackedBatch) else input_ids
        check_tensor("input_ids", ids, "int [batch, seq], or a PackedBatch")
        if ids.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"input_ids is {ids.dtype}; expected int64 or int32")
        if ids.dim() != (1 if packed else 2):
            raise ValueError(
                f"input_ids has shape {list(ids.shape)}; expected {'[total]' if packed else '[batch, seq]'}"
            )
        if ids.device != self.device:
            raise ValueError(f"input_ids is on {ids.device}, the model on {self.device}; move one of them")
        if isinstance(input_ids, PackedBatch):
            if attention_mask is not None or position_ids is not None:
                raise ValueError("a PackedBatch carries its own position_ids and needs no mask; give it alone")
            if ids.is_cpu and not torch.compiler.is_compiling():
                input_ids.check()
            batch = input_ids
        else:
            if attention_mask is not None:
                check_tensor("attention_mask", attention_mask, "[batch, seq], or None")
            batch = pack(ids, attention_mask, position_ids=position_ids)
        limit = self.config.n_positions
        longest = batch.max_seqlen if packed or position_ids is not None else ids.shape[1]
        if longest > limit:
            raise ValueError(
                f"the input has sequences of {longest} tokens; the model takes at most {limit} (n_positions). Truncate them."
            )
        return batch

    def _encode(
        self, batch: PackedBatch, cache: KeyValueCache | None, keep_states: bool
    ) -> tuple[Tensor, tuple[Tensor, ...] | None]:
        if batch.values.is_cpu and not torch.compiler.is_compiling():
            check_range("GPTModel", "input_ids", batch.values, self.config.vocab_size, "the vocabulary")
            check_range("GPTModel", "position_ids", batch.position_ids, self.config.n_positions, "the position table")
        hidden = self.words(batch.values) + self.positions(batch.position_ids)
        hidden = TF.dropout(hidden, self.config.embd_pdrop, self.training)
        states = [hidden] if keep_states else None
        if cache is None:
            checkpointing = self.gradient_checkpointing and self.training
            hidden = run_blocks(
                self.layers, hidden, batch.cu_seqlens, batch.max_seqlen, checkpointing=checkpointing, states=states
            )
        else:
            step = cache.append(batch)
            for i, layer in enumerate(self.layers):
                hidden = layer(hidden, batch.cu_seqlens, batch.max_seqlen, step.layer(i))
                if states is not None:
                    states.append(hidden)
        hidden = self.norm(hidden)
        return hidden, None if states is None else (*states[:-1], hidden)


class GPTForCausalLM(_GPTFolder):
    """GPT with the words' logits: language modelling and generation."""

    architecture = "GPT2LMHeadModel"
    _prefix = "transformer."

    def __init__(self, config: GPTConfig, *, precision: str = "fp32") -> None:
        super().__init__()
        self.config = config
        self.transformer = GPTModel(config, precision=precision)

    def to_checkpoint(self) -> dict[str, Tensor]:
        return {f"transformer.{name}": tensor for name, tensor in super().to_checkpoint().items()}

    @property
    def precision(self) -> str:
        return self.transformer.precision

    @precision.setter
    def precision(self, precision: str) -> None:
        self.transformer.precision = precision

    def forward(
        self,
        input_ids: Tensor | PackedBatch,  # int [batch, seq], or a packed batch of ids [total]
        attention_mask: Tensor | None = None,  # [batch, seq]
        position_ids: Tensor | None = None,  # int [batch, seq]
        labels: Tensor | None = None,  # int64 [batch, seq], packed: [total]; usually the ids themselves; -100: none
        *,
        return_logits: bool | None = None,
    ) -> HeadOutput:
        """The mean cross-entropy of each token's successor, and logits [batch, seq, vocab_size], packed [total, vocab_size].

        The labels are shifted here: a token is taught its sequence's next real token. In training with labels the logits do not
        exist; ``return_logits`` decides otherwise. Raises as GPTModel.forward; IndexError for a label outside the vocabulary.
        """
        batch = self.transformer.packed(input_ids, attention_mask, position_ids)
        hidden = self.transformer(batch).last_hidden_state
        targets = None if labels is None else _successors(batch, token_labels(batch, labels, "labels"))
        weight = self.transformer.words.weight
        with_logits = targets is None or not self.training if return_logits is None else return_logits
        if with_logits:
            logits = F.linear_act(hidden, weight)
            loss = None if targets is None else F.cross_entropy(logits, targets)
            return HeadOutput(loss, as_it_came(batch, logits))
        return HeadOutput(None if targets is None else F.linear_cross_entropy(hidden, weight, targets), None)

    def new_cache(self, capacity: int | None = None) -> KeyValueCache:
        """An empty cache for ``next_logits``, of at most ``capacity`` tokens a sequence (n_positions unless given)."""
        return KeyValueCache(self.config.n_layer, self.config.n_positions if capacity is None else capacity)

    @torch.no_grad()
    def next_logits(self, batch: PackedBatch, cache: KeyValueCache) -> Tensor:
        """Logits [batch, vocab_size] of what follows each sequence's last token; the batch's tokens join the cache.

        The positions in the batch count from each sequence's beginning, cached tokens included. Raises as GPTModel.forward, and as
        KeyValueCache.append.
        """
        hidden = self.transformer(batch, cache=cache).last_hidden_state
        last = hidden.index_select(0, batch.cu_seqlens[1:] - 1)
        return F.linear_act(last, self.transformer.words.weight)

    def generate(
        self,
        prompts: Tensor | PackedBatch | Sequence[Sequence[int] | Tensor],
        max_new_tokens: int,
        *,
        attention_mask: Tensor | None = None,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        repetition_penalty: float = 1.0,
        stop_token_ids: int | Sequence[int] | None = None,
        seed: int | None = None,
    ) -> list[Tensor]:
        """Continues every prompt. Prompts of different lengths cost what their tokens cost; a finished one costs nothing more.

        Args:
            prompts: a list of token ids each (lists or int tensors [length]); or padded ids [batch, seq] with attention_mask; or
                a PackedBatch. None may be empty.
            max_new_tokens: at most; a prompt and these must fit into n_positions.
            attention_mask: of padded prompts.
            do_sample: draw from the distribution; False: always the most probable token (greedy), and what follows but for
                repetition_penalty is not allowed.
            temperature: logits are divided by it; above 0.
            top_k: only the k most probable tokens.
            top_p: only the most probable tokens whose probabilities add up to p, at least one (nucleus sampling, Holtzman et al.
                2020).
            repetition_penalty: logits of tokens that stand in the prompt or were generated are divided by it where positive,
                multiplied where negative (Keskar et al. 2019).
            stop_token_ids: a sequence ends with the first of these; the configuration's eos_token_id unless given; () for none.
            seed: of the drawing; the same seed gives the same texts. A sequence draws the same numbers whichever others end
                before it. torch's generator unless given.

        Returns:
            For each prompt int64 [length + new], the prompt included, the stop token too.

        Raises:
            RuntimeError: the model is in training mode.
            ValueError: an argument out of range, or an empty prompt.
            IndexError: a token id outside the vocabulary (on CPU).
            TypeError: prompts that are no integers.
        """
        batch = packed_prompts(prompts, attention_mask, self.device)
        steps = self.stream(
            batch,
            max_new_tokens,
            do_sample=do_sample,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            repetition_penalty=repetition_penalty,
            stop_token_ids=stop_token_ids,
            seed=seed,
        )
        texts: list[list[int]] = [ids.tolist() for ids in batch.split()]
        for step in steps:
            for row, token in zip(step.rows, step.tokens, strict=True):
                texts[row].append(token)
        return [torch.tensor(ids, dtype=torch.int64, device=self.device) for ids in texts]

    def stream(
        self,
        prompts: Tensor | PackedBatch | Sequence[Sequence[int] | Tensor],
        max_new_tokens: int,
        *,
        attention_mask: Tensor | None = None,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        repetition_penalty: float = 1.0,
        stop_token_ids: int | Sequence[int] | None = None,
        seed: int | None = None,
    ) -> Iterator[GeneratedTokens]:
        """As ``generate``, the new tokens as they come: at each step the rows that go on, and a token for each."""
        sampling = Sampling(do_sample, temperature, top_k, top_p, repetition_penalty)
        stops = self.config.stop_tokens if stop_token_ids is None else stop_token_ids
        batch = packed_prompts(prompts, attention_mask, self.device)
        return generate_tokens(self, batch, max_new_tokens, sampling, stops, seed)


def _successors(batch: PackedBatch, labels: Tensor) -> Tensor:
    """[total]: the label of the token behind each in its sequence."""
    if batch.total == 0:
        return labels
    shifted = torch.cat((labels[1:], labels.new_full((1,), IGNORED)))
    # An empty sequence's last token is another one's, or, before all, the batch's: these have no successor either.
    return shifted.index_fill(0, (batch.cu_seqlens[1:] - 1).to(torch.int64).remainder(batch.total), IGNORED)
