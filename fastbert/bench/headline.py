"""Which rows stand for a whole run: where a reader looks first, on the page and in README."""

from __future__ import annotations

from dataclasses import dataclass

from fastbert.bench.cases import OURS
from fastbert.bench.results import CaseResult, ContenderResult, RunResult

#: Section → case → what it is. A run shows those that it has measured.
HEADLINE: dict[str, dict[str, str]] = {
    "all-MiniLM-L6-v2": {
        "end-to-end/minilm/text": "text to embeddings",
        "end-to-end/minilm/forward": "tokens to embeddings",
        "end-to-end/minilm/short": "one short text",
    },
    "fastbert.optimize": {
        "families/text/sentence-transformer": "SentenceTransformer.encode, MiniLM",
        "families/BERT/inference-third": "BERT-base inference, 33 % real tokens",
        "families/BERT/training-third": "BERT-base training, 33 % real tokens",
    },
    "GPT-2, greedy": {
        "generation/gpt2-1x64-fp32": "one prompt, 32 new tokens",
        "generation/gpt2-8xmixed-fp32": "8 prompts of 8 to 100 tokens, 32 new each",
    },
    "Attention": {
        "attention/cpu/d64-half-S512-fp32": "packed, 512 tokens at most, fp32",
        "attention/cpu/d64-full-S128-fp32": "128 tokens, fp32",
        "attention/cpu/d64-full-S512-fp32": "512 tokens, fp32",
        "attention/cpu/d64-full-S512-bf16": "512 tokens, bf16",
        "attention/cpu-training/d64-half-S512-fp32": "training, packed, 512 tokens at most, fp32",
        "attention/forward/d64-full-S512-bf16": "512 tokens, bf16",
        "attention/forward/d64-half-S512-bf16": "packed, 512 tokens at most, bf16",
        "attention/forward/d128-causal-S4096-bf16": "4096 tokens, causal, bf16",
        "attention/backward/d64-full-S512-bf16": "backward, 512 tokens, bf16",
        "attention/backward/d64-half-S512-bf16": "backward, packed, 512 tokens at most, bf16",
        "attention/backward/d128-causal-S4096-bf16": "backward, 4096 tokens, causal, bf16",
    },
    "Operations at training size": {
        "ops/add_layer_norm/16384x1024-bf16": "add and layer norm, bf16",
        "ops/softmax/16384x12x512-masked-bf16": "masked softmax, bf16",
        "ops/cross_entropy/16384x30522-bf16": "cross entropy, bf16",
        "ops/linear_cross_entropy/16384x768x30522-bf16": "linear and cross entropy, bf16",
    },
    "Tokenizer": {
        "tokenizer/lines": "lines to packed ids",
        "tokenizer/documents": "documents to packed ids",
        "tokenizer/truncated": "documents, 512 tokens of each",
        "tokenizer/padded": "32 lines to padded tensors",
        "tokenizer/short": "one short text",
    },
}
PUBLIC_FUNCTION = "fastbert.functional"  # of several contenders of ours, what people call


@dataclass(frozen=True)
class Headline:
    section: str
    title: str
    case: CaseResult
    ours: ContenderResult


def ours_of(case: CaseResult) -> ContenderResult | None:
    """The contender of ours that stands for a case: what people call, compared with another one; None without."""
    ours = [
        each for each in case.contenders if each.role == OURS and each.ratio is not None and each.name != case.baseline
    ]
    return next((each for each in ours if each.name == PUBLIC_FUNCTION), ours[0] if ours else None)


def headlines(run: RunResult) -> list[Headline]:
    """The rows of HEADLINE that the run has, in that order."""
    measured = {case.name: case for case in run.cases}
    found = []
    for section, rows in HEADLINE.items():
        for name, title in rows.items():
            case = measured.get(name)
            ours = None if case is None else ours_of(case)
            if case is not None and ours is not None:
                found.append(Headline(section, title, case, ours))
    return found
