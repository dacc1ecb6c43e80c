"""Prepare a case, check its contenders, time those that are right."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from fastbert.bench import limits
from fastbert.bench.cases import Case, CaseUnavailable, Check, Prepared, Settings, first_line
from fastbert.bench.results import FAILED, OK, WRONG, CaseResult, ContenderResult
from fastbert.bench.timer import Clock, Timing, clock_for, measure


def run_case(case: Case, settings: Settings, clock: Clock | None = None) -> CaseResult:
    """One case, start to end. Contenders whose error exceeds the tolerance are reported and not timed."""
    try:
        prepared = case.prepare(settings)
        checks = prepared.check()
    except CaseUnavailable as reason:
        return _unavailable(case, str(reason))
    except Exception as error:  # one broken case must not cost the others
        return _unavailable(case, first_line(error), failed=True)
    timed = {each.name: each.run for each in prepared.contenders if checks[each.name].passed}
    timing = Timing({}, {}, {}, 0, False)
    if timed:
        budget = settings.budget_seconds
        if budget is None:
            budget = case.quick_budget_seconds if settings.quick else case.budget_seconds
        timing = measure(
            timed,
            prepared.baseline,
            budget_seconds=budget,
            clock=clock if clock is not None else clock_for(settings.device),
            settle_seconds=case.settle_seconds,
        )
    floor = None
    if timed and settings.device != "cpu":
        floor = limits.floor_seconds(prepared.flops, prepared.flops_dtype, prepared.bytes, settings.device)
    return _result(case, prepared, checks, timing, floor)


def _result(
    case: Case, prepared: Prepared, checks: dict[str, Check], timing: Timing, floor: float | None
) -> CaseResult:
    contenders = []
    for contender in prepared.contenders:
        check = checks[contender.name]
        status = OK if check.passed else FAILED if check.error is None else WRONG
        message = check.message
        if status == WRONG and not message:
            message = f"its error {check.error:.1e} exceeds the tolerance {check.tolerance:.1e}"
        finite = check.error is not None and math.isfinite(check.error)
        contenders.append(
            ContenderResult(
                name=contender.name,
                role=contender.role,
                status=status,
                implementation=contender.implementation,
                error=check.error if finite else None,
                tolerance=check.tolerance,
                message=message,
                seconds=timing.seconds.get(contender.name),
                ratio=timing.ratios.get(contender.name),
                calls=timing.calls.get(contender.name, 0),
            )
        )
    return CaseResult(
        name=case.name,
        suite=case.suite,
        group=case.group,
        title=case.title,
        baseline=prepared.baseline,
        contenders=contenders,
        not_measured=dict(prepared.not_measured),
        notes=list(prepared.notes),
        error_unit=prepared.error_unit,
        bytes=prepared.bytes,
        flops=prepared.flops,
        items=prepared.items,
        item_unit=prepared.item_unit,
        rounds=timing.rounds,
        interrupted=timing.interrupted,
        failed=False,
        floor=floor,
    )


def _unavailable(case: Case, reason: str, failed: bool = False) -> CaseResult:
    return CaseResult(
        name=case.name,
        suite=case.suite,
        group=case.group,
        title=case.title,
        baseline="",
        contenders=[],
        not_measured={"*": reason},
        notes=[],
        error_unit="",
        bytes=None,
        flops=None,
        items=None,
        item_unit="",
        rounds=0,
        interrupted=False,
        failed=failed,
    )


def run_cases(
    cases: Sequence[Case],
    settings: Settings,
    *,
    before: Callable[[Case], None] = lambda case: None,
    clock: Clock | None = None,
) -> tuple[list[CaseResult], bool]:
    """All cases in order, and whether Ctrl-C ended it; what was measured until then is returned."""
    results: list[CaseResult] = []
    try:
        for case in cases:
            before(case)
            results.append(run_case(case, settings, clock))
            if results[-1].interrupted:
                return results, True
    except KeyboardInterrupt:
        return results, True
    return results, False
