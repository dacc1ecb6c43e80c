"""Results as rich tables, for terminals from 80 columns up."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from fastbert.bench.cases import LIMIT
from fastbert.bench.results import OK, CaseResult, ContenderResult, RunResult
from fastbert.bench.timer import Spread

_WIDE, _WIDER = 96, 126  # columns of terminal from which more columns of table fit
_BUSY = 0.5  # load per core, before the run, from which a machine is called busy
_ROLE_STYLE = {"ours": "bold cyan", "peer": "", "limit": "dim"}

FOOTER_CPU = (
    "Ratio: baseline's time / this one's, median over rounds in which all contenders ran in turn; above 1 is faster than the "
    "baseline, ~ marks a range (central 80 % of the rounds) that contains 1: no winner. limit%: share of the speed of the row "
    "that is printed dim, in the same run. On CPUs only ratios are claimed; times are this machine's, today's."
)
FOOTER_GPU = (
    FOOTER_CPU.split(" On CPUs")[0]
    + " Times are GPU time by CUDA events, with a cold L2 cache. floor%: share of the time "
    "that the products at torch.mm's rate and the bytes at a copy's take, whichever is longer."
)
FOOTER_ERROR = "Error: largest difference from float64, checked before timing, {units}."


def print_run(console: Console, run: RunResult) -> None:
    """Environment, one table a group of cases, and the notes."""
    print_environment(console, run.environment)
    for _, cases in groupby(run.cases, key=lambda case: (case.suite, case.group)):
        console.print()
        _print_group(console, list(cases))
    _print_remarks(console, run)


def print_environment(console: Console, environment: dict[str, Any]) -> None:
    versions = environment["versions"]
    rows = [
        ("device", environment["device"]),
        ("cpu", f"{environment['cpu']}, {environment['isa'] or 'no extension'}"),
        ("threads", f"{environment['threads']} on {environment['cores']} cores"),
        ("versions", ", ".join(f"{name} {version}" for name, version in versions.items() if version)),
        ("python", f"{environment['python']}, {environment['platform']}"),
        ("commit", environment["commit"] or "not a checkout"),
        ("date", environment["date"]),
    ]
    if environment["device"] == environment["cpu"]:
        rows[:2] = [("device", f"{environment['cpu']}, {environment['isa'] or 'no extension'}")]
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(name, Text(str(value)))
    console.print(table)


def _print_group(console: Console, cases: Sequence[CaseResult]) -> None:
    width = console.width
    measured = [case for case in cases if case.contenders]
    if not measured:
        return  # the remarks say why
    unit, factor = time_unit(measured)
    rate = _rate(measured)
    title = f"[bold]{escape(cases[0].suite)} · {escape(cases[0].group)}[/]"
    implementations = sorted(
        {each.implementation for case in measured for each in case.contenders if each.implementation}
    )
    if implementations:
        title += f"  [dim]fastbert answers with {escape(', '.join(implementations))}[/]"
    console.print(title, highlight=False, soft_wrap=False)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1), show_edge=False, header_style="bold")
    table.add_column("case", overflow="fold", min_width=9)
    table.add_column("contender", overflow="fold", min_width=16)
    table.add_column(unit, justify="right", no_wrap=True)
    if width >= _WIDE:
        table.add_column("±%", justify="right", no_wrap=True)
    table.add_column("ratio", justify="right", no_wrap=True)
    if width >= _WIDER:
        table.add_column("range", justify="right", no_wrap=True)
    if rate is not None and width >= _WIDE:
        table.add_column(rate[0], justify="right", no_wrap=True)
    floors = width >= _WIDE and any(case.floor is not None for case in measured)
    if floors:
        table.add_column("floor%", justify="right", no_wrap=True)
    limits = width >= _WIDE and not floors and any(_limit(case) is not None for case in measured)
    if limits:
        table.add_column("limit%", justify="right", no_wrap=True)
    table.add_column("error", justify="right", no_wrap=True)
    for case in measured:
        for index, contender in enumerate(case.contenders):
            row: list[str | Text] = [Text(case.title) if index == 0 else ""]
            name = Text(contender.name, style=_ROLE_STYLE.get(contender.role, ""))
            row.append(name)
            row.append("" if contender.seconds is None else number(contender.seconds.median * factor))
            if width >= _WIDE:
                row.append("" if contender.seconds is None else f"{100.0 * contender.seconds.relative:.0f}")
            row.append(ratio_text(contender, case.baseline))
            if width >= _WIDER:
                row.append(
                    "" if contender.ratio is None or contender.name == case.baseline else range_text(contender.ratio)
                )
            if rate is not None and width >= _WIDE:
                amount = getattr(case, rate[1])
                known = amount is not None and contender.seconds is not None and contender.role != "limit"
                row.append(number(amount / contender.seconds.median * rate[2]) if known else "")  # type: ignore[union-attr]
            if floors:
                known = case.floor is not None and contender.seconds is not None and contender.role != "limit"
                row.append(f"{100.0 * case.floor / contender.seconds.median:.0f}" if known else "")  # type: ignore[operator,union-attr]
            if limits:
                row.append(_limit_text(contender, _limit(case)))
            row.append(_error_text(contender))
            table.add_row(*row, end_section=index == len(case.contenders) - 1)
    console.print(table)


def _limit(case: CaseResult) -> ContenderResult | None:
    """The contender that the others cannot beat, where it was measured."""
    return next((each for each in case.contenders if each.role == LIMIT and each.ratio is not None), None)


def _limit_text(contender: ContenderResult, limit: ContenderResult | None) -> str:
    """How much of the limit's speed the contender has, by their ratios to the same baseline."""
    if limit is None or limit.ratio is None or contender.ratio is None or contender is limit:
        return ""
    return f"{100.0 * contender.ratio.median / limit.ratio.median:.0f}"


def time_unit(cases: Sequence[CaseResult]) -> tuple[str, float]:
    """The unit for a table's times, and how many of it make a second."""
    medians = [each.seconds.median for case in cases for each in case.contenders if each.seconds is not None]
    return ("ms", 1e3) if medians and min(medians) >= 1e-3 else ("µs", 1e6)


def _rate(cases: Sequence[CaseResult]) -> tuple[str, str, float] | None:
    """(header, field of CaseResult, factor): what all cases of a table can be rated by."""
    if all(case.suite == "end-to-end" and case.items for case in cases):
        return f"{cases[0].item_unit}/s", "items", 1.0
    if all(case.flops for case in cases):
        return "GFLOP/s", "flops", 1e-9
    if all(case.bytes for case in cases):
        return "GB/s", "bytes", 1e-9
    return None


def number(value: float) -> str:
    """Three digits, as a person writes them: 0.123, 1.23, 12.3, 123, 12,345."""
    if value >= 99.95:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 9.995 else f"{value:.2f}" if value >= 0.0995 else f"{value:.3g}"


def factor(value: float) -> str:
    """A ratio: two digits behind the point up to ten."""
    return number(value) if value >= 1.0 else f"{value:.2f}"


def ratio_text(contender: ContenderResult, baseline: str) -> Text:
    if contender.status != OK:
        return Text(contender.status.upper(), style="bold red")
    if contender.name == baseline:
        return Text("1×", style="dim")
    if contender.ratio is None:
        return Text("")
    ratio = contender.ratio
    undecided = "~" if ratio.straddles_one else ""
    faster = ratio.median >= 1.0
    style = "bold" if contender.role != "ours" else "bold yellow" if undecided else "bold green" if faster else "bold"
    return Text(f"{undecided}{factor(ratio.median)}×", style=style)


def range_text(ratio: Spread) -> str:
    return f"{factor(ratio.low)}-{factor(ratio.high)}"


def _error_text(contender: ContenderResult) -> Text:
    if contender.error is None:
        return Text("" if contender.status == OK else "-")
    return Text(f"{contender.error:.1e}", style="bold red" if contender.status != OK else "")


def _print_remarks(console: Console, run: RunResult) -> None:
    wrong = [(case, each) for case in run.cases for each in case.wrong]
    skipped = [(case, name, why) for case in run.cases for name, why in case.not_measured.items()]
    notes = _unique((case.group, note) for case in run.cases for note in case.notes)
    console.print()
    for case, contender in wrong:
        console.print(
            f"[bold red]{contender.status.upper()}[/] {escape(case.name)}: {escape(contender.name)}: {escape(contender.message)}"
        )
    for name, why in _unique((case.group if name == "*" else name, why) for case, name, why in skipped):
        console.print(f"[yellow]not measured[/] {escape(name)}: {escape(why)}", highlight=False)
    load, cores = run.environment["load"], run.environment["cores"]
    if load is not None and load > _BUSY * cores:
        console.print(
            f"[yellow]busy[/] the load was {load:.1f} on {cores} cores when the run began: trust only ratios with narrow ranges",
            highlight=False,
        )
    if run.interrupted:
        console.print("[yellow]interrupted[/]: what had been measured until then is above.")
    for title, note in notes:
        console.print(f"[dim]{escape(title)}: {escape(note)}[/]", highlight=False)
    if any(case.contenders for case in run.cases):
        units = " or ".join(sorted({case.error_unit for case in run.cases if case.error_unit}, reverse=True))
        footer = FOOTER_CPU if run.environment["device_type"] == "cpu" else FOOTER_GPU
        console.print(f"[dim]{footer} {FOOTER_ERROR.format(units=units)}[/]", highlight=False)


def _unique(pairs: Iterable[tuple[str, str]]) -> Iterable[tuple[str, str]]:
    return dict.fromkeys(pairs)
