"""GPT-2 that writes: greedy continuation of prompts over a key/value cache, against the engines that people generate with on CPUs.

Base size with 2 of its 12 layers, random weights, float32, the same for all. Ours and CTranslate2 take prompts as lists;
transformers takes them padded on the left. A contender is right when a float64 model, given the same beginning, finds no token
that is likelier than the one it chose: the error is the largest such difference of log-probabilities, so that ties may fall either
way.
"""

from __future__ import annotations

import functools
import importlib
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastbert.bench.cases import (
    OURS,
    PEER,
    Case,
    CaseUnavailable,
    Check,
    Contender,
    Prepared,
    Settings,
    check_against,
    first_line,
)
from fastbert.bench.suites._common import Maker
from fastbert.bench.suites.end_to_end import quiet_transformers

_OURS, _TRANSFORMERS, _CTRANSLATE2 = "fastbert", "transformers SDPA", "CTranslate2"
_LAYERS = 2
_TOLERANCE = 1e-4  # nats: float32's error of a logit, with room


@dataclass(frozen=True)
class Problem:
    """Prompts of these lengths, each continued by `new_tokens`. `sizes` are of the model."""

    name: str
    title: str
    lengths: tuple[int, ...]
    new_tokens: int = 32
    sizes: tuple[tuple[str, int], ...] = (("n_layer", _LAYERS),)

    def prompts(self, vocabulary: int, seed: int) -> list[list[int]]:
        make = Maker(seed, "cpu")
        return [make.integers(1, vocabulary, length).tolist() for length in self.lengths]


_PROBLEMS = (
    Problem("1x64", "one prompt of 64", (64,)),
    Problem("8xmixed", "8 prompts of 8 to 100", (8, 12, 16, 20, 30, 40, 64, 100)),
)


def cases() -> list[Case]:
    return [
        Case(
            f"generation/gpt2-{problem.name}-fp32",
            "generation",
            f"GPT-2, {_LAYERS} layers, greedy, fp32",
            f"{problem.title}, {problem.new_tokens} new",
            (_OURS, _TRANSFORMERS, _CTRANSLATE2),
            functools.partial(prepare, problem),
            budget_seconds=4.0,
            quick_budget_seconds=1.5,
            cpu_only=True,
        )
        for problem in _PROBLEMS
    ]


def prepare(problem: Problem, settings: Settings) -> Prepared:
    """The contenders of a problem."""
    if torch.device(settings.device).type != "cpu":
        raise CaseUnavailable("generation is compared on CPUs only")
    from fastbert.models import GPTForCausalLM

    folder = _folder(problem.sizes)
    theirs = _hugging_face(problem.sizes)
    prompts = problem.prompts(theirs.config.vocab_size, settings.seed)
    ours = GPTForCausalLM.from_pretrained(folder.name).eval()
    given = [torch.tensor(prompt) for prompt in prompts]
    longest = max(problem.lengths)
    ids = torch.stack([torch.nn.functional.pad(prompt, (longest - len(prompt), 0)) for prompt in given])
    mask = (torch.arange(longest) >= longest - torch.tensor(problem.lengths)[:, None]).long()

    def transformers() -> Tensor:
        return theirs.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=problem.new_tokens,
            min_new_tokens=problem.new_tokens,
            do_sample=False,
            pad_token_id=0,
        )

    def new_tokens(sequences: Any) -> list[list[int]]:
        return [torch.as_tensor(sequence)[-problem.new_tokens :].tolist() for sequence in sequences]

    regret = functools.partial(_regret, problem.sizes, prompts)
    contenders = [
        Contender(
            _OURS,
            OURS,
            lambda: ours.generate(given, max_new_tokens=problem.new_tokens, stop_token_ids=()),
            convert=lambda output: regret(new_tokens(output)),
        ),
        Contender(_TRANSFORMERS, PEER, transformers, convert=lambda output: regret(new_tokens(output))),
    ]
    not_measured = {}
    try:
        generate = _ctranslate2(problem, folder.name, prompts)
    except ImportError as error:
        not_measured[_CTRANSLATE2] = f"not installed: {first_line(error)}"
    else:
        contenders.append(
            Contender(
                _CTRANSLATE2,
                PEER,
                generate,
                convert=lambda output: regret([result.sequences_ids[0] for result in output]),  # type: ignore[attr-defined]
            )
        )

    def check() -> dict[str, Check]:
        right = [torch.zeros(len(prompts), dtype=torch.float64)]
        return check_against(contenders, lambda: right, None, torch.float32, absolute=True, tolerance=_TOLERANCE)

    return Prepared(
        contenders,
        _TRANSFORMERS,
        check,
        error_unit="nats that a chosen token is less likely than the best",
        items=problem.new_tokens * len(prompts),
        item_unit="new tokens",
        not_measured=not_measured,
        notes=["random weights, the same for all; the prompts are part of the time"],
    )


@functools.cache
def _hugging_face(sizes: tuple[tuple[str, int], ...]) -> Any:
    """transformers' GPT2LMHeadModel with random weights, float32. Raises CaseUnavailable."""
    try:
        from transformers import GPT2Config, GPT2LMHeadModel
    except ImportError as error:
        raise CaseUnavailable("transformers is not installed, and nothing else says what is right") from error
    values: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": 0, "attn_implementation": "sdpa", **dict(sizes)}
    with torch.random.fork_rng(devices=[]), quiet_transformers():
        torch.manual_seed(0)
        return GPT2LMHeadModel(GPT2Config(**values)).eval()


@functools.cache
def _folder(sizes: tuple[tuple[str, int], ...]) -> tempfile.TemporaryDirectory[str]:
    """A checkpoint of the model with a vocabulary of made-up words, which lives as long as the process."""
    folder = tempfile.TemporaryDirectory(prefix="fastbert-bench-")
    model = _hugging_face(sizes)
    with quiet_transformers():
        model.save_pretrained(folder.name)
    words = {_word(token): token for token in range(model.config.vocab_size)}
    Path(folder.name, "vocab.json").write_text(json.dumps(words), encoding="utf-8")
    Path(folder.name, "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    special = {f"{kind}_token": _word(0) for kind in ("unk", "bos", "eos")}
    Path(folder.name, "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "GPT2Tokenizer", **special}), encoding="utf-8"
    )
    return folder


def _word(token: int) -> str:
    return f"word{token}"


@functools.cache
def _converted(folder: str) -> str:
    engine = importlib.import_module("ctranslate2")
    target = str(Path(folder, "ctranslate2"))
    with quiet_transformers():
        engine.converters.TransformersConverter(folder).convert(target)
    return target


def _ctranslate2(problem: Problem, folder: str, prompts: list[list[int]]) -> Callable[[], Any]:
    """One call of CTranslate2. Raises ImportError where it is missing."""
    engine = importlib.import_module("ctranslate2")
    generator = engine.Generator(
        _converted(folder), device="cpu", compute_type="float32", intra_threads=torch.get_num_threads()
    )
    words = [[_word(token) for token in prompt] for prompt in prompts]
    return lambda: generator.generate_batch(
        words,
        max_length=problem.new_tokens,
        min_length=problem.new_tokens,
        sampling_topk=1,
        include_prompt_in_result=False,
    )


def _regret(sizes: tuple[tuple[str, int], ...], prompts: list[list[int]], chosen: list[list[int]]) -> Tensor:
    """By how much chosen tokens are less likely than the best of the same step, the largest of each sequence; in float64."""
    exact = _in_float64(sizes)
    worst = []
    for prompt, tokens in zip(prompts, chosen, strict=True):
        with torch.inference_mode():
            logits = exact(torch.tensor([prompt + tokens[:-1]])).logits[0, len(prompt) - 1 :]
        worst.append((logits.amax(dim=1) - logits[torch.arange(len(tokens)), torch.tensor(tokens)]).max())
    return torch.stack(worst)


@functools.cache
def _in_float64(sizes: tuple[tuple[str, int], ...]) -> Any:
    import copy

    return copy.deepcopy(_hugging_face(sizes)).double()
