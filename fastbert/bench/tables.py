"""Results as rich tables, for terminals from 80 columns up."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from fastbert.bench.compare import FASTER, SLOWER, Comparison
from fastbert.bench.results import RunResult
from fastbert.bench.rows import Group, Row, environment_rows, groups, remarks

WIDE, WIDER = 96, 126  # columns of terminal from which more columns of table fit
_ROLE_STYLE = {"ours": "bold cyan", "peer": "", "limit": "dim"}
_RATIO_STYLE = {"bad": "bold red", "baseline": "dim"}
_CHANGE_STYLE = {SLOWER: "bold red", FASTER: "green"}
_OUR_RATIO_STYLE = {**_RATIO_STYLE, "faster": "bold green", "undecided": "bold yellow"}


def print_run(console: Console, run: RunResult) -> None:
    """Environment, one table a group of cases, and the notes."""
    print_environment(console, run.environment)
    for group in groups(run):
        console.print()
        _print_group(console, group)
    _print_remarks(console, run)


def print_environment(console: Console, environment: dict[str, Any]) -> None:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in environment_rows(environment):
        table.add_row(name, Text(str(value)))
    console.print(table)


def _print_group(console: Console, group: Group) -> None:
    title = f"[bold]{escape(group.suite)} · {escape(group.name)}[/]"
    if group.implementations:
        title += f"  [dim]fastbert answers with {escape(', '.join(group.implementations))}[/]"
    console.print(title, highlight=False, soft_wrap=False)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1), show_edge=False, header_style="bold")
    table.add_column("case", overflow="fold", min_width=9)
    table.add_column("contender", overflow="fold", min_width=16)
    wide, wider = console.width >= WIDE, console.width >= WIDER
    shown = [  # header, field of Row, whether there is room for it and something in it
        (group.unit, "time", True),
        ("±%", "spread", wide),
        ("ratio", "ratio", True),
        ("range", "range", wider),
        (group.rate_unit, "rate", wide and group.rate_unit),
        (group.share_name, "share", wide and group.share_name),
        ("error", "error", True),
    ]
    columns = [(header, field) for header, field, there in shown if there]
    for header, _ in columns:
        table.add_column(header, justify="right", no_wrap=True)
    for row in group.rows:
        cells = [Text(getattr(row, field), style=_style(row, field)) for _, field in columns]
        table.add_row(
            Text(row.case), Text(row.contender, style=_ROLE_STYLE.get(row.role, "")), *cells, end_section=row.last
        )
    console.print(table)


def _style(row: Row, field: str) -> str:
    if field == "ratio":
        return (_OUR_RATIO_STYLE if row.role == "ours" else _RATIO_STYLE).get(row.verdict, "bold")
    return "bold red" if field == "error" and row.verdict == "bad" else ""


def print_comparison(console: Console, comparison: Comparison) -> None:
    """What changed against another result, and what may explain it."""
    console.print()
    console.print(f"[bold]compared with[/] {escape(comparison.source)} of {comparison.date[:10]}", highlight=False)
    changed = comparison.notable
    if changed:
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1), show_edge=False, header_style="bold")
        for header in ("case", "contender"):
            table.add_column(header, overflow="fold", min_width=12)
        for header in ("before", "now"):
            table.add_column(header, justify="right")
        table.add_column("verdict")
        for each in changed:
            table.add_row(
                Text(each.case),
                Text(each.contender),
                f"{each.before_text} ({each.before_range})",
                f"{each.after_text} ({each.after_range})",
                Text(each.verdict, style=_CHANGE_STYLE.get(each.verdict, "")),
            )
        console.print(table)
    console.print(comparison.summary, highlight=False)
    for title, names in (("new", comparison.new), ("gone", comparison.gone)):
        if names:
            console.print(f"[yellow]{title}[/] {escape(', '.join(names))}", highlight=False)
    for remark in comparison.remarks:
        console.print(f"[yellow]note[/] {escape(remark)}", highlight=False)


def _print_remarks(console: Console, run: RunResult) -> None:
    found = remarks(run)
    console.print()
    for status, name, why in found.wrong:
        console.print(f"[bold red]{status}[/] {escape(name)}: {escape(why)}")
    for name, why in found.not_measured:
        console.print(f"[yellow]not measured[/] {escape(name)}: {escape(why)}", highlight=False)
    for word, line in found.warnings:
        console.print(f"[yellow]{word}[/] {escape(line)}", highlight=False)
    for group, note in found.notes:
        console.print(f"[dim]{escape(group)}: {escape(note)}[/]", highlight=False)
    if found.footer:
        console.print(f"[dim]{escape(found.footer)}[/]", highlight=False)
