"""A result as rows of text, once for all that shows it: the terminal's tables, the page, README.

No winner is claimed where a ratio's range contains 1: such a ratio is marked with ~ and its verdict is "undecided".
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from fastbert.bench.cases import LIMIT, OURS
from fastbert.bench.results import OK, CaseResult, ContenderResult, RunResult
from fastbert.bench.timer import Spread

BUSY = 0.5  # load per core, before the run, from which a machine is called busy
WIDE_SPREAD = 0.1  # ± of a time, as a share of its median, from which a case is called noisy
_NAMED = 6  # noisy cases in a line, the worst first

FOOTER_CPU = (
    "Ratio: baseline's time / this one's, median over rounds in which all contenders ran in turn; above 1 is faster than the "
    "baseline, ~ marks a range (central 80 % of the rounds) that contains 1: no winner. limit%: share of the limit's speed, "
    "which is the dim row's in the same run. On CPUs only ratios are claimed; times are this machine's, that day's."
)
FOOTER_GPU = (
    FOOTER_CPU.split(" On CPUs")[0]
    + " Times are GPU time by CUDA events, with a cold L2 cache. floor%: share of the time "
    "that the products at torch.mm's rate and the bytes at a copy's take, whichever is longer."
)
FOOTER_ERROR = "Error: largest difference from float64, checked before timing, {units}."


# ---- numbers ----


def number(value: float) -> str:
    """Three digits, as a person writes them: 0.123, 1.23, 12.3, 123, 12,345."""
    if value >= 99.95:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 9.995 else f"{value:.2f}" if value >= 0.0995 else f"{value:.3g}"


def factor(value: float) -> str:
    """A ratio: two digits behind the point up to ten."""
    return number(value) if value >= 1.0 else f"{value:.2f}"


def ratio_text(ratio: Spread) -> str:
    """ "5.99×", or "~1.02×" where the range contains 1."""
    return f"{'~' if ratio.straddles_one else ''}{factor(ratio.median)}×"


def range_text(ratio: Spread) -> str:
    return f"{factor(ratio.low)}–{factor(ratio.high)}"


def verdict_of(ratio: Spread) -> str:
    """ "undecided" where the range contains 1, else "faster" or "slower"."""
    return "undecided" if ratio.straddles_one else "faster" if ratio.median > 1.0 else "slower"


# ---- tables ----


@dataclass(frozen=True)
class Row:
    """One contender of a case; "" is what it has not."""

    case: str  # title, in the first row of a case alone
    contender: str
    role: str
    time: str  # in the group's unit
    spread: str  # ± of the time in percent
    ratio: str  # "5.99×", "1×" of the baseline, or why it was not timed: "WRONG", "FAILED"
    range: str
    verdict: str  # of the ratio: "faster", "slower", "undecided"; "baseline"; "bad" where it was not timed
    rate: str  # in the group's rate unit
    share: str  # percent of the floor or of the limit
    error: str
    last: bool  # of its case


@dataclass(frozen=True)
class Group:
    """The cases that share a table."""

    suite: str
    name: str
    implementations: list[str]  # who answers for fastbert
    unit: str  # of the times
    rate_unit: str  # "" where the cases have no common one
    share_name: str  # "floor%", "limit%" or ""
    rows: list[Row]


def groups(run: RunResult) -> list[Group]:
    """The tables of a run, in the order of its cases; cases of which nothing was measured are in `remarks` alone."""
    measured = [case for case in run.cases if case.contenders]
    return [_group(list(cases)) for _, cases in groupby(measured, key=lambda case: (case.suite, case.group))]


def _group(cases: Sequence[CaseResult]) -> Group:
    unit, per_second = _time_unit(cases)
    rate = _rate(cases)
    floors = any(case.floor is not None for case in cases)
    limits = any(_limit(case) is not None for case in cases)
    rows = []
    for case in cases:
        for index, each in enumerate(case.contenders):
            timed, counts = each.seconds, each.seconds is not None and each.role != LIMIT
            amount = getattr(case, rate[1]) if rate is not None else None
            share = _floor_share(each, case) if floors else _limit_share(each, _limit(case))
            baseline = each.name == case.baseline
            compared = each.ratio if each.status == OK and not baseline else None
            rows.append(
                Row(
                    case=case.title if index == 0 else "",
                    contender=each.name,
                    role=each.role,
                    time="" if timed is None else number(timed.median * per_second),
                    spread="" if timed is None else f"{100.0 * timed.relative:.0f}",
                    ratio=each.status.upper()
                    if each.status != OK
                    else "1×"
                    if baseline
                    else ""
                    if compared is None
                    else ratio_text(compared),
                    range="" if compared is None else range_text(compared),
                    verdict="bad"
                    if each.status != OK
                    else "baseline"
                    if baseline
                    else ""
                    if compared is None
                    else verdict_of(compared),
                    rate=number(amount / timed.median * rate[2]) if rate and amount and timed and counts else "",
                    share=share,
                    error=f"{each.error:.1e}" if each.error is not None else "" if each.status == OK else "-",
                    last=index == len(case.contenders) - 1,
                )
            )
    implementations = sorted({each.implementation for case in cases for each in case.contenders} - {""})
    share_name = "floor%" if floors else "limit%" if limits else ""
    first = cases[0]
    return Group(first.suite, first.group, implementations, unit, rate[0] if rate else "", share_name, rows)


def _time_unit(cases: Sequence[CaseResult]) -> tuple[str, float]:
    """The unit for a table's times, and how many of it make a second."""
    medians = [each.seconds.median for case in cases for each in case.contenders if each.seconds is not None]
    return ("ms", 1e3) if medians and min(medians) >= 1e-3 else ("µs", 1e6)


def _rate(cases: Sequence[CaseResult]) -> tuple[str, str, float] | None:
    """(unit, field of CaseResult, factor): what all cases of a table can be rated by."""
    if all(case.suite == "end-to-end" and case.items for case in cases):
        return f"{cases[0].item_unit}/s", "items", 1.0
    if all(case.flops for case in cases):
        return "GFLOP/s", "flops", 1e-9
    if all(case.bytes for case in cases):
        return "GB/s", "bytes", 1e-9
    return None


def _limit(case: CaseResult) -> ContenderResult | None:
    """The contender that the others cannot beat, where it was measured."""
    return next((each for each in case.contenders if each.role == LIMIT and each.ratio is not None), None)


def _limit_share(contender: ContenderResult, limit: ContenderResult | None) -> str:
    """How much of the limit's speed the contender has, by their ratios to the same baseline."""
    if limit is None or limit.ratio is None or contender.ratio is None or contender is limit:
        return ""
    return f"{100.0 * contender.ratio.median / limit.ratio.median:.0f}"


def _floor_share(contender: ContenderResult, case: CaseResult) -> str:
    if case.floor is None or contender.seconds is None or contender.role == LIMIT:
        return ""
    return f"{100.0 * case.floor / contender.seconds.median:.0f}"


# ---- what a reader must know beside the tables ----


def environment_rows(environment: dict[str, Any]) -> list[tuple[str, str]]:
    """What a reader must know of the machine, as (name, value)."""
    processor = f"{environment['cpu']}, {environment['isa'] or 'no extension'}"
    rows = [
        ("device", environment["device"]),
        ("cpu", processor),
        ("threads", f"{environment['threads']} on {environment['cores']} cores"),
        ("versions", ", ".join(f"{name} {version}" for name, version in environment["versions"].items() if version)),
        ("python", f"{environment['python']}, {environment['platform']}"),
        ("commit", environment["commit"] or "not a checkout"),
        ("date", environment["date"]),
        ("command", environment["command"]),
    ]
    return [("device", processor), *rows[2:]] if environment["device"] == environment["cpu"] else rows


@dataclass(frozen=True)
class Remarks:
    wrong: list[tuple[str, str, str]]  # status, "case: contender", why
    not_measured: list[tuple[str, str]]  # contender or group, why
    warnings: list[tuple[str, str]]  # a word ("busy", "noisy", "interrupted"), a line
    notes: list[tuple[str, str]]  # group, note
    footer: str


def remarks(run: RunResult) -> Remarks:
    wrong = [
        (each.status.upper(), f"{case.name}: {each.name}", each.message) for case in run.cases for each in case.wrong
    ]
    skipped = (
        (case.group if name == "*" else name, why) for case in run.cases for name, why in case.not_measured.items()
    )
    footer = ""
    if any(case.contenders for case in run.cases):
        units = " or ".join(sorted({case.error_unit for case in run.cases if case.error_unit}, reverse=True))
        footer = FOOTER_CPU if run.environment["device_type"] == "cpu" else FOOTER_GPU
        footer += " " + FOOTER_ERROR.format(units=units)
    notes = _unique((case.group, note) for case in run.cases for note in case.notes)
    return Remarks(wrong, _unique(skipped), warnings(run), notes, footer)


def _unique(pairs: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    return list(dict.fromkeys(pairs))


def warnings(run: RunResult, named: int = _NAMED) -> list[tuple[str, str]]:
    """(word, line): a machine that was busy before the run, one that was noisy in it, a run that was cut short.

    At most `named` noisy cases are named.
    """
    found = []
    line = busy(run.environment)
    if line:
        found.append(("busy", line))
    line = noise(run, named)
    if line:
        found.append(("noisy", line))
    if run.interrupted:
        found.append(("interrupted", "the run was ended early; what had been measured until then is here"))
    return found


def busy(environment: dict[str, Any]) -> str:
    """One line that says how busy the machine was before the run; "" where it was not."""
    load, cores = environment["load"], environment["cores"]
    if load is None or load <= BUSY * cores:
        return ""
    return f"the load was {load:.1f} on {cores} cores when the run began: trust only ratios with narrow ranges, or run it again"


def noise(run: RunResult, named: int = _NAMED) -> str:
    """One line that says how many comparisons are undecided, and which cases spread widely; "" where none."""
    compared = [
        each.ratio
        for case in run.cases
        for each in case.contenders
        if each.role == OURS and each.ratio is not None and each.name != case.baseline
    ]
    undecided = sum(ratio.straddles_one for ratio in compared)
    spreads = {
        case.name: max((each.seconds.relative for each in case.contenders if each.seconds is not None), default=0.0)
        for case in run.cases
    }
    wide = sorted((name for name, spread in spreads.items() if spread > WIDE_SPREAD), key=lambda name: -spreads[name])
    parts = []
    if undecided:
        parts.append(f"{undecided} of {len(compared)} comparisons undecided (the range contains 1)")
    if wide:
        names = ", ".join(wide[:named]) + (f" and {len(wide) - named} more" if len(wide) > named else "")
        line = f"times spread by more than ±{100 * WIDE_SPREAD:.0f} % in {len(wide)} of {len(run.cases)} cases"
        parts.append(f"{line}: {names}" if named else line)
    return "; ".join(parts)
