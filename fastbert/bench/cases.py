"""What is measured: cases, their contenders, and the register of all cases.

A case is one problem (an operation at a shape and dtype, a model on a text) with several ways to solve it. `Case.prepare`
makes its tensors and its contenders on the device of the settings; nothing heavy happens before that, so the register can be
listed without loading a model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

OURS, PEER, LIMIT = "ours", "peer", "limit"  # the roles of contenders
FLOOR_ULPS = 2.0  # below that, an error is rounding, whatever torch's own error is
TORCH_FACTOR = 2.0  # our error may be this many times the error of torch's own operation


class CaseUnavailable(Exception):
    """A case cannot run here; the message is the reason, in one line."""


@dataclass(frozen=True)
class Settings:
    """What a run was asked for. Everything a case needs to prepare itself."""

    device: str = "cpu"
    quick: bool = False
    text: str | None = None  # path of the text for end-to-end cases; None: Python's own documentation
    model: str | None = None  # folder of the model for end-to-end cases; None: the installed all-MiniLM-L6-v2
    seed: int = 0
    budget_seconds: float | None = None  # measuring time of one case; None: the case's own


@dataclass(frozen=True)
class Contender:
    name: str
    role: str  # OURS, PEER, LIMIT
    run: Callable[[], object]  # one call, timed; returns the tensor or tensors to check
    checked: bool = True  # a limit (a copy) does not compute the result: nothing to check
    implementation: str = ""  # who answers: "C++ (avx512)", "Triton", "reference"; "" for peers
    convert: Callable[[object], object] | None = None  # what `run` returns → the tensors to check, where they differ


@dataclass(frozen=True)
class Check:
    """A contender's error against float64, before it is timed."""

    error: float | None  # None: not checked, or it raised
    tolerance: float | None
    message: str = ""  # why it failed, where that is not simply an error above the tolerance

    @property
    def passed(self) -> bool:
        if self.message:
            return False
        return self.error is None or self.tolerance is None or self.error <= self.tolerance  # NaN fails


@dataclass
class Prepared:
    """A case with its tensors, ready to be checked and timed."""

    contenders: list[Contender]
    baseline: str  # name of the contender that ratios refer to
    check: Callable[[], dict[str, Check]]
    error_unit: str = "share of the largest value"
    bytes: int | None = None  # that an ideal implementation reads and writes
    flops: int | None = None  # of the matrix products
    flops_dtype: torch.dtype = torch.float32  # theirs
    items: int | None = None  # rows or real tokens a call works on
    item_unit: str = "rows"
    not_measured: dict[str, str] = field(default_factory=dict)  # contender → reason
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Case:
    name: str  # "ops/layer_norm/2048x768-fp32": unique, stable, what --case matches
    suite: str
    group: str  # cases of a group share a table: the operation, or the model
    title: str  # within the group: "2048×768 fp32"
    contenders: tuple[str, ...]  # their names, known before `prepare`; it makes these or says why one is missing
    prepare: Callable[[Settings], Prepared]
    quick: bool = False  # belongs to --quick
    budget_seconds: float = 1.0
    quick_budget_seconds: float = 0.35
    cuda_only: bool = False  # left out of "all" on other devices
    cpu_only: bool = False  # left out of "all" on other devices
    settle_seconds: float = 0.0  # nothing runs for so long before a sample, see timer.measure
    named_only: bool = False  # left out of "all"


SUITES = {
    "ops": "single operations against torch's own",
    "attention": "attention by length against torch's own; on a GPU forward and backward, against every backend",
    "cpu-fp32": "whole models in float32 against the CPU engines, BERT-base with 2 of its 12 layers",
    "cpu": "the whole table against the CPU engines, in every precision: many minutes (only when asked for)",
    "end-to-end": "text to sentence embeddings on all-MiniLM-L6-v2 against transformers",
    "families": "fastbert.optimize against the models as they come, by family and padding (mostly only when asked for)",
    "generation": "GPT-2 that writes, against transformers and CTranslate2 (CPU)",
    "tokenizer": "text to token ids against tokenizers, transformers and nanotoken (CPU, one thread)",
    "gpu": "all of these that compute on a GPU, which it needs",
}
GPU_SUITE = "gpu"  # the one suite that no case names as its own


_CPU_SUITES = ("cpu", "cpu-fp32", "tokenizer")


class UnknownSelection(ValueError):
    """A suite or case that does not exist; the message names what does."""


def all_cases() -> list[Case]:
    """The register, in the order of the tables."""
    from fastbert.bench.suites import (
        attention,
        cpu,
        elementwise,
        end_to_end,
        families,
        generation,
        losses,
        norms,
        operations,
        tokenizer,
    )

    cases = [
        *norms.cases(),
        *operations.cases(),
        *elementwise.cases(),
        *losses.cases(),
        *attention.cases(),
        *cpu.cases(),
        *end_to_end.cases(),
        *families.cases(),
        *generation.cases(),
        *tokenizer.cases(),
    ]
    names = [case.name for case in cases]
    duplicates = {name for name in names if names.count(name) > 1}
    if duplicates:
        raise RuntimeError(f"cases registered twice: {sorted(duplicates)}")
    return cases


def select(
    cases: Sequence[Case], *, suite: str = "all", case: str | None = None, quick: bool = False, device: str = "cpu"
) -> list[Case]:
    """The cases of a suite whose name contains `case`; with `quick` and no `case` only the quick ones.

    Cases for one kind of device are left out on the other, unless their suite has no others or one is asked for by name; long ones
    everywhere, unless their suite or one of them is asked for. The suite "gpu" has those of all that are for GPUs.
    """
    if suite != "all" and suite not in SUITES:
        raise UnknownSelection(f"unknown suite '{suite}': choose from {', '.join(SUITES)}, all")
    gpu = suite == GPU_SUITE
    chosen = [each for each in cases if suite in ("all", each.suite) or (gpu and each.suite not in _CPU_SUITES)]
    if case is not None:
        matching = [each for each in chosen if case in each.name]
        if not matching:
            where = "" if suite == "all" else f" in suite {suite}"
            raise UnknownSelection(f"no case{where} contains '{case}': fastbert bench --list names them all")
        return matching
    cuda = gpu or device.startswith("cuda")
    chosen = [each for each in chosen if not (each.cpu_only if cuda else each.cuda_only)] or chosen
    if suite == "all" or gpu:
        chosen = [each for each in chosen if not each.named_only]
    return [each for each in chosen if each.quick] if quick else chosen


def errors_of(outputs: object, expected: Sequence[Tensor], *, absolute: bool = False) -> list[float]:
    """max |output − expected| of each tensor, as a share of its largest expected value unless `absolute`.

    NaN, mismatching shapes and missing tensors give infinity. Tensors beyond `expected` are ignored: they are by-products.
    """
    found = [outputs] if isinstance(outputs, Tensor) else list(outputs)  # type: ignore[call-overload]
    errors = []
    for index, wanted in enumerate(expected):
        if index >= len(found) or found[index].shape != wanted.shape:
            errors.append(math.inf)
        elif wanted.numel() == 0:
            errors.append(0.0)
        else:
            scale = 1.0 if absolute else max(wanted.abs().max().item(), torch.finfo(torch.float64).tiny)
            error = ((found[index].detach().to(torch.float64) - wanted).abs().max() / scale).item()
            errors.append(math.inf if math.isnan(error) else error)
    return errors


def largest_error(outputs: object, expected: Sequence[Tensor], *, absolute: bool = False) -> float:
    return max(errors_of(outputs, expected, absolute=absolute), default=0.0)


def check_against(
    contenders: Sequence[Contender],
    expected: Callable[[], Sequence[Tensor]],
    torch_name: str | None,
    dtype: torch.dtype,
    *,
    absolute: bool = False,
    tolerance: float | None = None,
) -> dict[str, Check]:
    """Run each contender once and compare with `expected()`, in float64.

    The tolerance is given, or, for each tensor of the result, twice the error of the contender `torch_name` plus a floor of a few
    ulps of `dtype`. torch's error counts up to 64 times the floor: beyond, torch itself is wrong.
    """
    wanted = [each.to(torch.float64) for each in expected()]
    errors: dict[str, list[float]] = {}
    checks: dict[str, Check] = {}
    for contender in contenders:
        if not contender.checked:
            checks[contender.name] = Check(None, None)
            continue
        try:
            output = contender.run()
            output = output if contender.convert is None else contender.convert(output)
            errors[contender.name] = errors_of(output, wanted, absolute=absolute)
        except Exception as raised:  # a contender that raises must not take the others with it
            checks[contender.name] = Check(None, None, first_line(raised))
    floor = FLOOR_ULPS * torch.finfo(dtype).eps
    tolerances = [tolerance] * len(wanted) if tolerance is not None else [floor] * len(wanted)
    if tolerance is None and torch_name in errors:
        tolerances = [floor + TORCH_FACTOR * min(error, 64.0 * floor) for error in errors[torch_name]]
    for name, found in errors.items():
        # Reported is the tensor with the largest error, one that fails before all others.
        pairs = zip(found, tolerances, strict=True)
        error, allowed = max(pairs, key=lambda pair: (pair[0] > pair[1], pair[0]), default=(0.0, floor))
        checks[name] = Check(
            error, allowed, "" if math.isfinite(error) else "the result is not finite, or has another shape"
        )
    return {contender.name: checks[contender.name] for contender in contenders}


def first_line(error: BaseException) -> str:
    """An exception in one line."""
    lines = str(error).splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:200]
