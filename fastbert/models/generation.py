"""Text generation: choosing the next token of each sequence, and the loop around it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from fastbert.models.kv_cache import KeyValueCache
from fastbert.packing import PackedBatch, as_integer, check_tensor, pack


class GeneratedTokens(NamedTuple):
    """One step of generation."""

    rows: list[int]  # the prompts that are still going on
    tokens: list[int]  # the new token of each


class LanguageModel(Protocol):
    """What the loop needs of a model."""

    training: bool
    config: Any

    def new_cache(self, capacity: int | None = None) -> KeyValueCache: ...

    def next_logits(self, batch: PackedBatch, cache: KeyValueCache) -> Tensor: ...


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen from its logits; see GPTForCausalLM.generate. The filters apply in the order of the fields."""

    do_sample: bool = False
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        if not self.temperature > 0.0:
            raise ValueError(
                f"temperature is {self.temperature}; expected a number above 0 (greedy is do_sample=False)"
            )
        if not self.repetition_penalty > 0.0:
            raise ValueError(f"repetition_penalty is {self.repetition_penalty}; expected a number above 0, 1 for none")
        if self.top_k is not None and as_integer("top_k", self.top_k) < 1:
            raise ValueError(f"top_k is {self.top_k}; expected None or at least 1")
        if self.top_p is not None and not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p is {self.top_p}; expected None or a number in (0, 1]")
        given = [
            f"{name}={value}"
            for name, value in (("temperature", self.temperature), ("top_k", self.top_k), ("top_p", self.top_p))
            if value not in (None, 1.0)
        ]
        if given and not self.do_sample:
            raise ValueError(f"{given[0]} changes nothing with do_sample=False; give do_sample=True")

    def probabilities(self, logits: Tensor) -> Tensor:
        """[batch, vocab_size] logits to the distribution that is drawn from, float32; the repetition penalty apart."""
        logits = logits.float() / self.temperature
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            least = logits.topk(self.top_k).values[:, -1:]
            logits = logits.masked_fill(logits < least, float("-inf"))
        probabilities = logits.softmax(-1)
        if self.top_p is not None and self.top_p < 1.0:
            ordered, order = probabilities.sort(stable=True, dim=-1, descending=True)
            above = ordered.cumsum(-1) - ordered  # of all more probable ones: below p for those that stay
            ordered = ordered.masked_fill(above >= self.top_p, 0.0)
            probabilities = torch.zeros_like(probabilities).scatter_(-1, order, ordered)
            probabilities = probabilities / probabilities.sum(-1, keepdim=True)
        return probabilities

    def penalized(self, logits: Tensor, seen: Tensor) -> Tensor:
        """Logits [batch, vocab_size] with those of ``seen`` tokens, bool, made smaller (Keskar et al. 2019)."""
        p = self.repetition_penalty
        return torch.where(seen, torch.where(logits > 0, logits / p, logits * p), logits)


def packed_prompts(
    prompts: Any,  # Tensor | PackedBatch | Sequence[Sequence[int] | Tensor]
    attention_mask: Tensor | None,
    device: torch.device,
) -> PackedBatch:
    """Prompts in any form as one packed batch whose positions count each prompt's own tokens."""
    if attention_mask is not None and not (isinstance(prompts, Tensor) and prompts.dim() == 2):
        raise ValueError("attention_mask is given; expected prompts as one padded tensor [batch, seq]")
    if isinstance(prompts, PackedBatch):
        values, lengths = prompts.values, prompts.host_lengths()
    elif isinstance(prompts, Tensor):
        if prompts.dim() != 2:
            raise ValueError(f"prompts has shape {list(prompts.shape)}; expected [batch, seq], or a list of prompts")
        if attention_mask is not None:
            check_tensor("attention_mask", attention_mask, "[batch, seq], or None")
        batch = pack(prompts, attention_mask)
        values, lengths = batch.values, batch.host_lengths()
    else:
        if isinstance(prompts, str) or not isinstance(prompts, Sequence):
            raise TypeError(f"prompts is of type {type(prompts).__name__}; expected lists of token ids, not text")
        rows = [_ids(i, prompt) for i, prompt in enumerate(prompts)]
        values = torch.cat(rows).to(device) if rows else torch.empty(0, dtype=torch.int64, device=device)
        lengths = [len(row) for row in rows]
    if values.is_floating_point() or values.is_complex() or values.dtype == torch.bool:
        raise TypeError(f"prompts are {values.dtype}; expected integers")
    if 0 in lengths:
        raise ValueError(
            f"prompt {lengths.index(0)} is empty; expected at least one token, such as the beginning of a text"
        )
    return PackedBatch.from_lengths(values.to(torch.int64), lengths)


def _ids(number: int, prompt: Any) -> Tensor:
    if isinstance(prompt, Tensor):
        if prompt.dim() != 1:
            raise ValueError(f"prompt {number} has shape {list(prompt.shape)}; expected [length]")
        return prompt
    if isinstance(prompt, str) or not isinstance(prompt, Sequence):
        raise TypeError(f"prompt {number} is of type {type(prompt).__name__}; expected token ids")
    return torch.tensor([as_integer(f"prompt {number}", token) for token in prompt], dtype=torch.int64)


def generate_tokens(
    model: LanguageModel,
    prompts: PackedBatch,
    max_new_tokens: int,
    sampling: Sampling,
    stop_token_ids: int | Sequence[int],
    seed: int | None,
) -> Iterator[GeneratedTokens]:
    """The tokens of each step, until every sequence has ended. Arguments are checked before the first."""
    if model.training:
        raise RuntimeError(
            "the model is in training mode, where dropout would garble its texts; call model.eval() first"
        )
    if as_integer("max_new_tokens", max_new_tokens) < 0:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; expected 0 or more")
    limit = model.config.n_positions
    longest = max(prompts.host_lengths(), default=0)
    if longest + max_new_tokens > limit + 1:  # the last token is never read
        raise ValueError(
            f"the longest prompt has {longest} tokens; with {max_new_tokens} new ones (max_new_tokens) they pass the model's "
            f"{limit} positions (n_positions)"
        )
    stops = {stop_token_ids} if isinstance(stop_token_ids, int) else set(stop_token_ids)
    stops = {as_integer("stop_token_ids", token) for token in stops}
    return _steps(model, prompts, max_new_tokens, sampling, stops, seed)


@torch.no_grad()
def _steps(
    model: LanguageModel,
    batch: PackedBatch,
    max_new_tokens: int,
    sampling: Sampling,
    stops: set[int],
    seed: int | None,
) -> Iterator[GeneratedTokens]:
    device = batch.device
    rows = list(range(len(batch)))
    generator = None
    if sampling.do_sample and seed is not None:
        generator = torch.Generator(device).manual_seed(seed)
    cache = model.new_cache()
    seen = None
    if sampling.repetition_penalty != 1.0:
        seen = torch.zeros(len(batch), model.config.vocab_size, dtype=torch.bool, device=device)
        lengths = batch.cu_seqlens.diff().to(torch.int64)
        owners = torch.arange(len(batch), device=device).repeat_interleave(lengths, output_size=batch.total)
        inside = batch.values.clamp(0, model.config.vocab_size - 1)  # ids outside raise below, in the embeddings
        seen[owners, inside] = True
    count = len(rows)
    for step in range(max_new_tokens):
        if not rows:
            return
        logits = model.next_logits(batch, cache)
        if seen is not None:
            logits = sampling.penalized(logits, seen)
        if sampling.do_sample:
            # A number for every prompt, whether it goes on or not: what one draws does not hang on the others' ends.
            drawn = torch.rand(count, generator=generator, device=device)[rows]
            chosen = _draw(sampling.probabilities(logits), drawn)
        else:
            chosen = logits.argmax(-1)
        tokens: list[int] = chosen.tolist()
        yield GeneratedTokens(list(rows), tokens)
        if step + 1 == max_new_tokens:
            return
        going = [i for i, token in enumerate(tokens) if token not in stops]
        if seen is not None:
            seen[torch.arange(len(rows), device=device), chosen] = True
        if len(going) < len(rows):
            rows = [rows[i] for i in going]
            cache.select(going)
            index = torch.tensor(going, dtype=torch.int64, device=device)
            chosen = chosen.index_select(0, index)
            seen = None if seen is None else seen.index_select(0, index)
        positions = torch.tensor(cache.lengths, dtype=torch.int64, device=device)
        batch = PackedBatch.from_lengths(chosen, [1] * len(rows), position_ids=positions)


def _draw(probabilities: Tensor, drawn: Tensor) -> Tensor:
    """The token at which the running sum of [batch, vocab_size] passes ``drawn`` [batch], uniform in [0, 1)."""
    sums = probabilities.cumsum(-1, dtype=torch.float64)
    # Of the total, which is 1 but for rounding; a token without probability is never the first to pass.
    token = torch.searchsorted(sums, (drawn.double() * sums[:, -1]).unsqueeze(-1), right=True).squeeze(-1)
    return token.clamp(max=probabilities.shape[-1] - 1)
